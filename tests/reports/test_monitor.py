"""The monitor: states of runs that train, hang, were killed, failed, wait or are done; time left; what it shows."""

import json
import math
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import papermill
import pytest

from pgolf.reports import live, monitor
from pgolf.runs import directory
from pgolf.runs.directory import hold_lock, write_failure
from pgolf.runs.result import Result, RunError, write_result
from pgolf_core.config import ROOT, RunConfig

TINY = dict(track="nano", iterations=100, num_layers=1, model_dim=64, val_loss_every=50, train_log_every=1)
HOLD = """
import json, sys
from pgolf.runs.directory import locked
from pgolf_core.config import RunConfig
with locked(sys.argv[1], RunConfig(**json.loads(sys.argv[2]))):
    print("held", flush=True)
    sys.stdin.read()
"""


def begun(run_dir, steps=10, pace=2.0, **knobs):
    """A run's files after so many steps, as a training leaves them, and nobody's lock."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / ".lock").touch()
    (run_dir / "config.json").write_text(json.dumps(RunConfig(**TINY | knobs).model_dump()))
    rows = [{"step": n, "train_loss": 5 - n / 100, "train_seconds": pace * n} for n in range(1, steps + 1)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run_dir / "log.txt").write_text("model\n")
    return run_dir


def done(run_dir, **fields):
    content = dict(kind="train", config_hash="0", seed=1, track="nano", steps=100, train_seconds=200.0, val_bpb=2.5)
    write_result(begun(run_dir, 100), Result(**content | fields))
    return run_dir


def written(seconds_ago: float, *paths: Path, now: float = 0.0) -> None:
    """Every file there, or in these folders, as if it had last been written so long ago."""
    then = (now or time.time()) - seconds_ago
    for path in paths:
        for file in path.iterdir() if path.is_dir() else [path]:
            os.utime(file, (then, then))


def sweep_of(root, *names, sweep="s"):
    (root / sweep).mkdir(parents=True, exist_ok=True)
    (root / sweep / "sweep.json").write_text(json.dumps({"name": sweep, "runs": list(names)}))
    return root / sweep


def held(folder):
    return hold_lock(folder / ".lock", 0, "held")


def look(root, sweep="s", now=None) -> dict:
    return {row.run: row for row in monitor.state(root, sweep, now=now).itertuples()}


def test_a_run_at_work_then_silent_then_killed(tmp_path):
    folder = sweep_of(tmp_path, "a", "b")
    process = subprocess.Popen(  # holds the run as train() does
        [sys.executable, "-c", HOLD, str(folder / "a"), json.dumps(TINY)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "held\n"
        begun(folder / "a")
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        a = look(tmp_path)["a"]
        assert (a.state, a.note, a.step, a.of) == ("running", "training", 10, 100)
        assert a.step_seconds == pytest.approx(2) and a.seconds_left == pytest.approx(180, abs=5)
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before  # nothing made or written
        written(59, folder / "a")
        assert look(tmp_path)["a"].state == "running"
        written(200, folder / "a")
        a = look(tmp_path)["a"]
        assert a.state == "stalled" and "(3.3 min)" in a.note and "usually one every 2 s" in a.note
        assert math.isnan(a.seconds_left)
        with pytest.raises(RunError, match="held"), held(folder / "a"):
            pass  # looking took nothing from the holder
    finally:
        process.kill()
        process.wait()
    a = look(tmp_path)["a"]
    assert a.state == "dead" and a.note == "killed at step 10; run again it starts anew"
    (folder / "a" / "resume.pt").touch()
    assert "goes on from its last resume file" in look(tmp_path)["a"].note
    with held(folder / "a"):
        assert look(tmp_path)["a"].state == "running"  # its lock alone says so, in any process


def test_two_looks_at_once_do_not_see_one_another_and_keep_nothing(tmp_path):
    lock = tmp_path / ".lock"
    assert not monitor.is_held(lock) and not lock.exists()
    lock.touch()
    assert not monitor.is_held(lock)
    if directory.fcntl:
        with open(lock, "rb") as other:
            directory.fcntl.flock(other, directory.fcntl.LOCK_SH)  # another monitor in the middle of its look
            assert not monitor.is_held(lock)
    (sweep_of(tmp_path, "a") / "a").mkdir()
    with held(tmp_path), held(tmp_path / "s" / "a"):  # free at once after a look
        assert monitor.is_held(lock)
        a = look(tmp_path)["a"]
        assert (a.state, a.note) == ("running", "starting")  # a lock is the first file of a run


@pytest.mark.parametrize(
    ("last", "knobs", "doing"),
    [
        ({}, {}, "training"),
        ({"step": 50, "train_loss": 4.0, "train_seconds": 100.0}, {}, "validating"),
        ({"step": 50, "val_bpb": 3.0, "train_seconds": 100.0}, {}, "training"),
        ({"step": 100, "train_loss": 4.0, "train_seconds": 200.0}, {}, "validating"),
        ({"step": 100, "val_bpb": 3.0, "train_seconds": 200.0}, {}, "scoring and storing"),
        ({"step": 61, "val_bpb": 3.0, "train_seconds": 121.0}, {"max_wallclock_seconds": 120}, "scoring and storing"),
    ],
)
def test_silence_is_no_stall_while_no_line_is_expected(tmp_path, last, knobs, doing):
    run_dir = begun(sweep_of(tmp_path, "a") / "a", **knobs)
    if last:
        with open(run_dir / "metrics.jsonl", "a") as f:
            f.write(json.dumps(last) + "\n")
    with held(run_dir):
        assert look(tmp_path)["a"].note == doing
        written(300, run_dir)
        assert look(tmp_path)["a"].state == ("stalled" if doing == "training" else "running")
        written(700, run_dir)
        assert look(tmp_path)["a"].state == "stalled"


def test_slow_steps_are_no_stall(tmp_path):
    run_dir = begun(sweep_of(tmp_path, "a") / "a", pace=30.0)
    with held(run_dir):
        for seconds, state in ((290, "running"), (310, "stalled")):
            written(seconds, run_dir)
            assert look(tmp_path)["a"].state == state


def test_failed_and_damaged_runs_say_why(tmp_path):
    folder = sweep_of(tmp_path, "a", "b", "c", "d", "e")
    write_failure(begun(folder / "a"), ValueError("training loss is\nnan <b>"))
    (folder / "b").mkdir()
    (folder / "b" / "job.json").write_text("{}")
    (folder / "b" / "kernel.log").write_text("[IPKernelApp] WARNING | over TCP\nForecastError: over its cap\n")
    (begun(folder / "c") / "kernel.log").write_text("the kernel died; out of memory, or killed?\n")
    (done(folder / "d") / "result.json").write_text("{")
    (begun(folder / "e") / "config.json").write_bytes(b"\x00\xff")
    seen = look(tmp_path)
    assert (seen["a"].state, seen["a"].note) == ("failed", "ValueError: training loss is nan <b>")
    assert (seen["b"].state, seen["b"].note) == ("failed", "ForecastError: over its cap")
    assert seen["c"].state == "dead" and "out of memory" in seen["c"].note
    assert seen["d"].state == "failed" and seen["d"].note.startswith("result.json: holds no JSON object")
    assert seen["e"].state == "failed" and "config.json is damaged" in seen["e"].note
    assert "&lt;b&gt;" in monitor.styled(monitor.state(tmp_path, "s")).to_html()


ODD = [b"", b"\x00\xff\xfe", b"[1]\n3\nnull\n", b'{"step": "x"}\n{"a": 1}\n', b'{"step": 3, "val_bpb": NaN}\n']


def test_damaged_metrics_hide_no_run(tmp_path):
    folder, whole = tmp_path / "s", (begun(tmp_path / "whole") / "metrics.jsonl").read_bytes()
    contents = [c for odd in ODD for c in (odd, whole + odd, whole + odd + whole[:-20], odd + whole)]
    with ExitStack() as locks:
        for i, content in enumerate(contents):
            (begun(folder / f"{i}") / "metrics.jsonl").write_bytes(content)
            locks.enter_context(held(folder / f"{i}"))
        table = monitor.state(tmp_path, "s")
    assert set(table.state) == {"running"} and len(table) == len(contents)
    assert len(monitor.format_state(table)) == len(contents)
    monitor.plot_live(table, most=len(contents))
    plt.close("all")


def test_the_turn_of_a_run_in_a_sweep_that_runs(tmp_path):
    folder = sweep_of(tmp_path, "new", "before", "failed", "starts", "hangs")
    begun(folder / "before")
    write_failure(begun(folder / "failed"), ValueError("no"))
    for name in ("before", "failed", "starts", "hangs"):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "job.json").write_text("{}")
    written(3600, folder / "before", folder / "failed")
    written(1800, folder / "sweep.json")
    written(900, folder / "hangs")
    seen = look(tmp_path)
    assert [seen[n].state for n in ("new", "before", "failed")] == ["waiting", "dead", "failed"]
    assert seen["new"].note == "nobody is running its sweep"
    with held(folder):
        seen = look(tmp_path)
    assert [seen[n].state for n in ("new", "before", "failed")] == ["waiting"] * 3
    assert seen["new"].note == "" and seen["before"].note.startswith("was killed at step 10")
    assert seen["failed"].note == "failed before: ValueError: no"
    assert (seen["starts"].state, seen["starts"].note) == ("running", "its notebook starts")
    assert seen["hangs"].state == "dead"


def test_time_left_of_a_run_is_its_training_and_a_waiting_run_takes_as_long_as_complete_ones(tmp_path):
    folder = sweep_of(tmp_path, "a", "b", "c", "d", "e")
    for name in ("a", "b"):  # 50 s in all
        (done(folder / name, train_seconds=20.0) / "job.json").write_text('{"notebook": "train.ipynb"}')
        written(50, folder / name / "job.json", now=(folder / name / "result.json").stat().st_mtime)
    c = begun(folder / "c", steps=50, pace=0.2)
    (c / "job.json").write_text("{}")
    now = (c / "metrics.jsonl").stat().st_mtime
    written(10, c / "config.json", c / "log.txt", c / "job.json", now=now)
    written(1000, folder / "sweep.json", now=now)
    with held(c), held(folder):
        assert look(tmp_path, now=now + 4)["c"].seconds_left == pytest.approx(6)
        table = monitor.state(tmp_path, "s", now=now)
    assert monitor.seconds_left(table) == pytest.approx(10 + 2 * 50)  # d and e, one at a time
    assert "about 1.8 min left" in monitor.overview(table, now)
    limited = begun(tmp_path / "t" / "a", max_wallclock_seconds=50, iterations=10_000)
    with held(limited):  # the time limit ends it
        assert look(tmp_path, "t")["a"].seconds_left == pytest.approx(30, abs=3)


def rows_of(*states, left=math.nan, **columns):
    row = {name: math.nan for name in monitor.COLUMNS} | dict(kind="train", sweep="s", sweep_runs=True) | columns
    return pd.DataFrame([row | {"state": s, "seconds_left": left if s == "running" else math.nan} for s in states])


def test_time_left_of_a_sweep():
    two = rows_of("running", "running", left=60.0, step_seconds=0.8, of=100)
    assert monitor.seconds_left(two) == 60  # side by side
    four = pd.concat([two, rows_of("waiting", "waiting", "waiting", "waiting")])
    assert monitor.seconds_left(four) == (2 * 60 + 4 * 80) / 2  # they take as long as those at work
    known = pd.concat([four, rows_of("complete", seconds=100.0)])
    assert monitor.seconds_left(known) == (2 * 60 + 4 * 100) / 2
    slow = pd.concat([two, rows_of("running", left=1000.0)])
    assert monitor.seconds_left(slow) == 1000
    assert math.isnan(monitor.seconds_left(rows_of("running", "waiting")))  # before the first line
    assert monitor.seconds_left(rows_of("complete", "failed", "dead", "stalled")) == 0
    assert monitor.seconds_left(rows_of("waiting", sweep_runs=False)) == 0


def test_which_sweeps_are_shown(tmp_path):
    assert monitor.state(tmp_path / "nothing").empty
    assert monitor.overview(monitor.state(tmp_path)) == ""
    assert monitor.styled(monitor.state(tmp_path)).to_html()
    for name, age in (("old", 48 * 3600), ("recent", 3600)):
        written(age, done(sweep_of(tmp_path, "a", sweep=name) / "a"))
    written(72 * 3600, begun(tmp_path / "open" / "a"))  # `pgolf train` made it: no sweep.json
    done(tmp_path / "single")
    (done(tmp_path / "log" / "a") / "import.json").touch()  # somebody else's training
    (tmp_path / "empty").mkdir()
    assert list(monitor.state(tmp_path).sweep.unique()) == ["", "recent", "open"]
    assert list(monitor.state(tmp_path, "old").state) == ["complete"]
    assert monitor.overview(monitor.state(tmp_path)).endswith("- all runs complete: without a sweep (1), recent (1).")
    assert set(monitor.state(tmp_path, hours=1000).sweep) == {"", "recent", "open", "old"}
    with pytest.raises(RunError, match="there are empty, log, old, open, recent, single"):
        monitor.state(tmp_path, "no")


def test_a_run_that_ends_while_we_look_is_complete(tmp_path, monkeypatch):
    run_dir = begun(sweep_of(tmp_path, "a") / "a")
    is_held = monitor.is_held

    def ends_before_its_lock_is_tried(lock):
        if lock.parent == run_dir:
            done(run_dir)
        return is_held(lock)

    monkeypatch.setattr(monitor, "is_held", ends_before_its_lock_is_tried)
    assert look(tmp_path)["a"].state == "complete"


def test_a_stage_has_no_lines_to_follow(tmp_path):
    folder = sweep_of(tmp_path, "a")
    written(7200, done(folder / "a"))
    done(begun(folder / "export_lab") / "plain", kind="export")
    (folder / "export_lab" / "job.json").write_text(json.dumps({"notebook": "notebooks/export_lab.ipynb"}))
    with held(folder / "export_lab"):
        stage = look(tmp_path)["export_lab"]
    assert (stage.kind, stage.state) == ("export_lab", "running") and "1 files so far" in stage.note


def test_rows_are_in_order_and_counted(tmp_path):
    folder = sweep_of(tmp_path, *(f"r{i}" for i in range(6)))
    for i in range(4):
        done(folder / f"r{i}", total_bytes=1000 + i, cap_bytes=1001)
    begun(folder / "r5")
    table = monitor.state(tmp_path, "s")
    text = monitor.format_state(table)
    assert list(text.state) == ["dead", "waiting", *["complete"] * 4]
    assert text.step[0] == "10 of 100" and text.step[2] == "100"
    assert set(text.note[text.run == "r3"]) == {"over its cap by 2 bytes"}
    html = monitor.styled(table, 3).to_html()
    assert html.count("<tr>") == 4 and "and 3 more complete" in html
    assert monitor.overview(table).startswith("- **s**: 4 of 6 runs complete, 1 dead, 1 waiting; nobody is running it")


def test_a_look_at_2000_runs_is_quick(tmp_path):
    folder = sweep_of(tmp_path)
    first = done(folder / "r0", table=[{"variant": "x" * 40, "bpb": 2.0}] * 10)
    for i in range(1, 2000):
        (folder / f"r{i}").mkdir()
        for name in ("config.json", "metrics.jsonl", *["result.json"] * (i % 10 > 0)):
            os.link(first / name, folder / f"r{i}" / name)
    monitor.state(tmp_path)
    start = time.perf_counter()
    table = monitor.state(tmp_path)
    monitor.styled(table).to_html()
    assert time.perf_counter() - start < 4  # 0.4 s on two idle cores
    assert len(table) == 2000 and (table.state == "complete").sum() == 1801


def test_the_notebook_updates_what_it_shows_in_place(tmp_path, monkeypatch):
    root = tmp_path / "runs"
    monkeypatch.setenv("PGOLF_RUNS", str(root))
    folder = sweep_of(root, "a", "b", "c")
    done(folder / "a")
    write_failure(begun(folder / "b"), ValueError("training loss is nan"))
    begun(folder / "c", steps=60)
    path = ROOT / "notebooks" / "monitor.ipynb"
    with held(folder / "c"):
        knobs = {"for_seconds": 1.5, "refresh_seconds": 0.2}
        cells = papermill.execute_notebook(path, tmp_path / "out.ipynb", knobs, progress_bar=False).cells
    shown = [output for cell in cells for output in cell.get("outputs", [])]
    assert [output["output_type"] for output in shown] == ["display_data"] * 4
    text = "".join(str(output["data"]) for output in shown)
    assert "1 of 3 runs complete, 1 running, 1 failed" in text and "training loss is nan" in text
    assert "60 of 100" in text and text.count("image/png") == 1
    assert "GPU" in text


def test_the_watch_keeps_up_while_other_cells_run(tmp_path, monkeypatch):
    """A cell after the watch's runs at once, and what it changes is displayed."""
    monkeypatch.setenv("PGOLF_RUNS", str(tmp_path))
    folder = sweep_of(tmp_path, "a")
    (folder / "a").mkdir()
    sources = [
        f"from pgolf.reports import live\nwatch = live.Watch({str(tmp_path)!r}, 's')\nwatch.keep_up(0.1, 60)\n"
        "said = []\nwatch.shown['sweeps'].update = lambda own: said.append(own.data)",
        "import sys\nsys.path.insert(0, 'tests')\n"
        f"from pathlib import Path\nfrom reports.test_monitor import done\ndone(Path({str(folder / 'a')!r}))",
        "import asyncio\nawait asyncio.sleep(1.5)\nwatch.stop()\nawait asyncio.sleep(0.1)\n"
        "assert watch.task.cancelled() and '0 of 1 runs' not in said[-1] and 'complete: s (1)' in said[-1], said",
    ]
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    kernel = {"name": "python3", "display_name": "", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), tmp_path / "in.ipynb")
    begun_at = time.monotonic()
    first, *_ = papermill.execute_notebook(
        tmp_path / "in.ipynb", tmp_path / "out.ipynb", progress_bar=False, cwd=ROOT
    ).cells
    assert time.monotonic() - begun_at < 40  # not a minute
    assert len(first["outputs"]) == 4


def test_the_terminal_shows_a_sweep_a_run_and_what_is_not_there(tmp_path, capsys, monkeypatch):
    folder = sweep_of(tmp_path, "a", "b", "c")
    done(folder / "a")
    begun(folder / "b", steps=60)
    with held(folder / "b"):
        live.terminal(tmp_path, "s")
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith("s: 1 of 3 runs complete, 1 running") and "**" not in lines[0]
        assert [line.split()[0] for line in lines[2:]] == ["run", "b", "c", "a"]
        live.terminal(tmp_path, "s/b")
        assert "60 of 100" in (out := capsys.readouterr().out) and "waiting" not in out
        looks = []
        monkeypatch.setattr(time, "sleep", lambda seconds: (looks.append(seconds), done(folder / "b")))
        live.terminal(tmp_path, "s/b", every=3.0)  # at work, then complete: it ends
    assert looks == [3.0] and capsys.readouterr().out.count(live.UP) == 2
    with pytest.raises(RunError, match=r"has no run bb; did you mean b\?"):
        live.terminal(tmp_path, "s/bb")
    with pytest.raises(RunError, match="no sweep 't'"):
        live.terminal(tmp_path, "t")
    live.terminal(tmp_path / "none")
    assert capsys.readouterr().out.startswith("nothing wrote to")


@pytest.mark.parametrize(("said", "words"), [("index\n0, H100, [N/A]\n", "0, H100, [N/A]"), ("", "no GPU")])
def test_gpus_are_listed_as_nvidia_smi_says(monkeypatch, said, words):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, said))
    assert words in monitor.gpus()


@pytest.mark.parametrize(
    ("file", "advice"), [("sweep.json", "`pgolf sweep` on its file"), ("search.journal", "`pgolf search` on its file"),
                         ("", "the same `pgolf train` command again")],
)  # fmt: skip
def test_a_killed_run_is_continued_by_the_command_that_began_it(tmp_path, file, advice):
    begun(tmp_path / "s" / "a")
    if file:
        sweep_of(tmp_path, "a")  # a search has both
        (tmp_path / "s" / file).touch()
    assert f"1 dead; nobody is running it: {advice}" in monitor.overview(monitor.state(tmp_path))


def test_a_finished_search_waits_for_nobody(tmp_path):
    folder = sweep_of(tmp_path, "a", "b", "c")
    (folder / "search.journal").touch()
    done(folder / "a")
    directory.write_interruption(begun(folder / "b"), "forecast", directory.REFUSED)
    directory.write_interruption(begun(folder / "c"), "behind", directory.PRUNED)
    said = monitor.overview(monitor.state(tmp_path, "s"))
    assert "1 of 3 runs complete, 1 refused, 1 pruned" in said and "nobody" not in said
