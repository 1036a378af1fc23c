"""What a look at the files says of runs that train, hang, were killed, failed, wait or are done; and its arithmetic."""

import json
import math
import os
import subprocess
import sys
import time

import matplotlib.pyplot as plt
import pandas as pd
import papermill
import pytest

from pgolf.reports import monitor
from pgolf.runs.directory import hold_lock, write_failure
from pgolf.runs.result import Result, RunError, write_result
from pgolf_core.config import ROOT, RunConfig

TINY = dict(track="nano", iterations=100, num_layers=1, model_dim=64, val_loss_every=50, train_log_every=1)
HOLD = """
import json, sys
from pgolf.runs.directory import hold_lock, locked, write_failure
from pgolf.runs.result import Result, RunError, write_result
from pgolf_core.config import RunConfig
with locked(sys.argv[1], RunConfig(**json.loads(sys.argv[2]))):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(run_dir) -> subprocess.Popen:
    """A process that holds the run as train() does."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run_dir), json.dumps(TINY)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    return process


def begun(run_dir, steps=10, pace=2.0, **knobs):
    """A run's files after so many steps, as a training leaves them, and nobody's lock."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / ".lock").touch()
    (run_dir / "config.json").write_text(json.dumps(RunConfig(**TINY | knobs).model_dump()))
    rows = [{"step": n, "train_loss": 5 - n / 100, "train_seconds": pace * n} for n in range(1, steps + 1)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run_dir / "log.txt").write_text("model\n")
    return run_dir


def done(run_dir, job_seconds=None, **fields):
    """A complete run; job_seconds: from its job to its result."""
    content = dict(kind="train", config_hash="0", seed=1, track="nano", steps=100, train_seconds=200.0, val_bpb=2.5)
    write_result(begun(run_dir, 100), Result(**content | fields))
    if job_seconds:
        (run_dir / "job.json").write_text('{"notebook": "train.ipynb"}')
        now = (run_dir / "result.json").stat().st_mtime
        os.utime(run_dir / "job.json", (now - job_seconds, now - job_seconds))
    return run_dir


def aged(folder, seconds: float):
    """Every file there as if it had last been written so long ago."""
    then = time.time() - seconds
    for path in folder.iterdir():
        os.utime(path, (then, then))


def sweep_of(root, *names, sweep="s"):
    (root / sweep).mkdir(parents=True, exist_ok=True)
    (root / sweep / "sweep.json").write_text(json.dumps({"name": sweep, "runs": list(names)}))
    return root / sweep


def look(root, sweep="s") -> dict:
    return {row.run: row for row in monitor.state(root, sweep).itertuples()}


def snapshot(root):
    return {path: path.stat().st_mtime_ns for path in root.rglob("*")}


def test_a_run_at_work_then_silent_then_killed(tmp_path):
    folder = sweep_of(tmp_path, "a", "b")
    process = holder(folder / "a")
    try:
        begun(folder / "a")
        before = snapshot(tmp_path)
        a = look(tmp_path)["a"]
        assert (a.state, a.note, a.step, a.of) == ("running", "training", 10, 100)
        assert a.step_seconds == pytest.approx(2) and a.seconds_left == pytest.approx(180, abs=5)
        assert snapshot(tmp_path) == before  # no directory for b, no file anywhere

        aged(folder / "a", 59)
        assert look(tmp_path)["a"].state == "running"
        aged(folder / "a", 200)
        a = look(tmp_path)["a"]
        assert a.state == "stalled" and "(3.3 min)" in a.note and "usually one every 2 s" in a.note
        assert math.isnan(a.seconds_left)
        with (
            pytest.raises(RunError, match="another process"),
            hold_lock(folder / "a" / ".lock", 0, "another process"),
        ):
            pass  # looking took nothing from the holder
    finally:
        process.kill()
        process.wait()
    a = look(tmp_path)["a"]
    assert a.state == "dead" and a.note == "killed at step 10; run again it starts anew"
    (folder / "a" / "resume.pt").touch()
    assert "goes on from its last resume file" in look(tmp_path)["a"].note
    with hold_lock(folder / "a" / ".lock", 0, "still held"):
        assert look(tmp_path)["a"].state == "running"  # by its lock alone, in whichever process


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
def test_silence_is_no_stall_where_no_line_is_to_be_expected(tmp_path, last, knobs, doing):
    run_dir = begun(sweep_of(tmp_path, "a") / "a", **knobs)
    if last:
        with open(run_dir / "metrics.jsonl", "a") as f:
            f.write(json.dumps(last) + "\n")
    with hold_lock(run_dir / ".lock", 0, "held"):
        assert look(tmp_path)["a"].note == doing
        aged(run_dir, 300)
        assert look(tmp_path)["a"].state == ("stalled" if doing == "training" else "running")
        aged(run_dir, 700)
        assert look(tmp_path)["a"].state == "stalled"


def test_slow_steps_are_no_stall(tmp_path):
    run_dir = begun(sweep_of(tmp_path, "a") / "a", pace=30.0)
    with hold_lock(run_dir / ".lock", 0, "held"):
        aged(run_dir, 290)
        assert look(tmp_path)["a"].state == "running"
        aged(run_dir, 310)
        assert look(tmp_path)["a"].state == "stalled"


def test_failed_and_damaged_runs_say_why(tmp_path):
    folder = sweep_of(tmp_path, "a", "b", "c", "d", "e")
    write_failure(begun(folder / "a"), ValueError("training loss is\nnan <b>"))
    (folder / "b").mkdir()
    (folder / "b" / "job.json").write_text(json.dumps({"notebook": "train.ipynb"}))
    (folder / "b" / "kernel.log").write_text("[IPKernelApp] WARNING | over TCP\nForecastError: over its cap\n")
    (begun(folder / "c") / "kernel.log").write_text("the kernel died; out of memory, or killed?\n")
    (done(folder / "d") / "result.json").write_text("{")
    (begun(folder / "e") / "config.json").write_bytes(b"\x00\xff")
    seen = look(tmp_path)
    assert (seen["a"].state, seen["a"].note) == ("failed", "ValueError: training loss is nan <b>")
    assert (seen["b"].state, seen["b"].note) == ("failed", "ForecastError: over its cap")
    assert seen["c"].state == "dead" and "out of memory" in seen["c"].note
    assert seen["d"].state == "failed" and seen["d"].note.startswith("result.json: not a result")
    assert seen["e"].state == "failed" and "config.json is damaged" in seen["e"].note
    assert "&lt;b&gt;" in monitor.styled(monitor.state(tmp_path, "s")).to_html()


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"\x00\xff\xfe",
        b"[1, 2]\n3\nnull\n",
        b'{"step": "x"}\n{"train_loss": 1}\n',
        b'{"step": 3, "val_bpb": NaN}\n',
    ],
)
def test_damaged_metrics_hide_no_run(tmp_path, damage):
    run_dir = begun(sweep_of(tmp_path, "a") / "a")
    whole = (run_dir / "metrics.jsonl").read_bytes()
    for content in (damage, whole + damage, whole + damage + whole[:-20], damage + whole):
        (run_dir / "metrics.jsonl").write_bytes(content)
        with hold_lock(run_dir / ".lock", 0, "held"):
            table = monitor.state(tmp_path, "s")
            assert list(table.state) == ["running"]
            monitor.format_state(table)
            monitor.plot_live(table)
    plt.close("all")


def test_the_turn_of_a_run_in_a_sweep_that_runs(tmp_path):
    folder = sweep_of(tmp_path, "new", "before", "failed", "starts", "hangs")
    begun(folder / "before")
    write_failure(begun(folder / "failed"), ValueError("no"))
    for name in ("before", "failed"):
        (folder / name / "job.json").write_text("{}")
        aged(folder / name, 3600)
    for name in ("starts", "hangs"):
        (folder / name).mkdir()
        (folder / name / "job.json").write_text("{}")
    os.utime(folder / "sweep.json", (time.time() - 1800,) * 2)
    aged(folder / "hangs", 900)
    seen = look(tmp_path)
    assert [seen[n].state for n in ("new", "before", "failed")] == ["waiting", "dead", "failed"]
    assert seen["new"].note == "nobody is running its sweep"
    with hold_lock(folder / ".lock", 0, "held"):
        seen = look(tmp_path)
        assert [seen[n].state for n in ("new", "before", "failed")] == ["waiting"] * 3
        assert seen["new"].note == "" and seen["before"].note.startswith("was killed at step 10")
        assert seen["failed"].note == "failed before: ValueError: no"
        assert (seen["starts"].state, seen["starts"].note) == ("running", "its notebook starts")
        assert seen["hangs"].state == "dead"


def test_what_is_left_of_a_run(tmp_path):
    """20 s of training a run and 30 s besides, as the complete ones took."""
    folder = sweep_of(tmp_path, "a", "b", "c", "d", "e")
    done(folder / "a", job_seconds=50.0, train_seconds=20.0)
    done(folder / "b", job_seconds=50.0, train_seconds=20.0)
    begun(folder / "c", steps=50, pace=0.2)
    (folder / "c" / "job.json").write_text("{}")
    now = (folder / "c" / "metrics.jsonl").stat().st_mtime
    os.utime(folder / "c" / "job.json", (now - 16, now - 16))  # 10 s trained, 6 s to start
    for name in ("config.json", "log.txt"):
        os.utime(folder / "c" / name, (now - 10, now - 10))
    os.utime(folder / "sweep.json", (now - 1000, now - 1000))
    with hold_lock(folder / "c" / ".lock", 0, "held"):
        (c,) = (row for row in monitor.state(tmp_path, "s", now=now).itertuples() if row.run == "c")
        assert c.seconds_left == pytest.approx(10 + 30 - 6)
        (c,) = (row for row in monitor.state(tmp_path, "s", now=now + 4).itertuples() if row.run == "c")
        assert c.seconds_left == pytest.approx(6 + 30 - 10)
        with hold_lock(folder / ".lock", 0, "held"):
            table = monitor.state(tmp_path, "s", now=now)
            assert monitor.seconds_left(table) == pytest.approx(34 + 2 * 50)  # d and e, one at a time
            assert "about 2.2 min left" in monitor.overview(table, now)
        table = monitor.state(tmp_path, "s", now=now)
        assert monitor.seconds_left(table) == pytest.approx(34)  # nobody will start d and e


def rows_of(*states, left=math.nan, **columns):
    row = {name: math.nan for name in monitor.COLUMNS} | dict(kind="train", sweep="s", sweep_runs=True) | columns
    return pd.DataFrame(
        [row | {"state": state, "seconds_left": left if state == "running" else math.nan} for state in states]
    )


def test_what_is_left_of_a_sweep():
    two = rows_of("running", "running", left=60.0, train_seconds=20.0, train_left=60.0)
    assert monitor.seconds_left(two) == 60  # side by side
    four = pd.concat([two, rows_of("waiting", "waiting", "waiting", "waiting")])
    assert monitor.seconds_left(four) == (2 * 60 + 4 * 80) / 2  # as long as those at work will have taken
    known = pd.concat([four, rows_of("complete", seconds=100.0, train_seconds=80.0)])
    assert monitor.seconds_left(known) == (2 * 60 + 4 * 100) / 2
    slow = pd.concat([two, rows_of("running", left=1000.0, train_seconds=0.0, train_left=1000.0)])
    assert monitor.seconds_left(slow) == 1000
    assert math.isnan(monitor.seconds_left(rows_of("running", "waiting")))  # before the first line
    assert monitor.seconds_left(rows_of("complete", "failed", "dead", "stalled")) == 0
    assert monitor.seconds_left(rows_of("waiting", sweep_runs=False)) == 0


def test_the_clock_ends_a_run_too(tmp_path):
    run_dir = begun(sweep_of(tmp_path, "a") / "a", steps=10, pace=2.0, max_wallclock_seconds=50, iterations=10_000)
    with hold_lock(run_dir / ".lock", 0, "held"):
        assert look(tmp_path)["a"].seconds_left == pytest.approx(30, abs=3)


def test_which_sweeps(tmp_path):
    assert monitor.state(tmp_path / "nothing").empty
    assert monitor.overview(monitor.state(tmp_path)) == ""
    assert monitor.styled(monitor.state(tmp_path)).to_html()
    for name, age in (("old", 48 * 3600), ("recent", 3600)):
        aged(done(sweep_of(tmp_path, "a", sweep=name) / "a"), age)
    aged(begun(tmp_path / "open" / "a"), 72 * 3600)  # by `pgolf train`: no sweep.json
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
    held = monitor.is_held

    def ends_before_its_lock_is_tried(lock):
        if lock.parent == run_dir:
            done(run_dir)
        return held(lock)

    monkeypatch.setattr(monitor, "is_held", ends_before_its_lock_is_tried)
    assert look(tmp_path)["a"].state == "complete"


def test_a_stage_has_no_lines_to_follow(tmp_path):
    folder = sweep_of(tmp_path, "a")
    done(folder / "a")
    done(begun(folder / "export_lab") / "plain", kind="export")
    (folder / "export_lab" / "job.json").write_text(json.dumps({"notebook": "notebooks/export_lab.ipynb"}))
    aged(folder / "a", 7200)
    with hold_lock(folder / "export_lab" / ".lock", 0, "held"):
        stage = look(tmp_path)["export_lab"]
        assert (stage.kind, stage.state) == ("export_lab", "running") and "1 files so far" in stage.note


def test_words_are_in_order_and_counted(tmp_path):
    folder = sweep_of(tmp_path, *(f"r{i}" for i in range(6)))
    for i in range(4):
        done(folder / f"r{i}", total_bytes=1000 + i, cap_bytes=1001)
    begun(folder / "r5")
    table = monitor.state(tmp_path, "s")
    words = monitor.format_state(table)
    assert list(words.state) == ["dead", "waiting", *["complete"] * 4]
    assert words.step[0] == "10 of 100" and words.step[2] == "100"
    assert set(words.note[words.run == "r3"]) == {"over its cap by 2 bytes"}
    html = monitor.styled(table, 3).to_html()
    assert html.count("<tr>") == 4 and "and 3 more complete" in html
    assert monitor.overview(table).startswith("- **s**: 4 of 6 runs complete, 1 dead, 1 waiting; nobody is running it")


def test_a_look_at_2000_runs_is_quick(tmp_path):
    folder = sweep_of(tmp_path)
    first = done(folder / "r0", table=[{"variant": "x" * 40, "bpb": 2.0}] * 10)
    files = {name: (first / name).read_bytes() for name in ("config.json", "result.json", "metrics.jsonl")}
    for i in range(1, 2000):
        (folder / f"r{i}").mkdir()
        for name, content in files.items():
            if i % 10 or name != "result.json":
                (folder / f"r{i}" / name).write_bytes(content)
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        table = monitor.state(tmp_path)
        monitor.styled(table).to_html()
        seconds.append(time.perf_counter() - start)
    assert len(table) == 2000 and (table.state == "complete").sum() == 1801
    assert seconds[1] < 4, seconds  # 0.4 s on two idle cores


def test_gpus_in_words():
    said = "0, NVIDIA H100 80GB HBM3, 41000, 81559\n1, NVIDIA H100 80GB HBM3, [N/A], [N/A]\n\n"
    lines = monitor.format_gpus(said).splitlines()
    assert lines[0] == "- GPU 0, NVIDIA H100 80GB HBM3: 40.0 of 79.6 GiB in use"
    assert lines[1].endswith("memory not known") and len(lines) == 2
    assert "No GPU here" in monitor.format_gpus("")
    assert "GPU" in monitor.gpus()


def test_the_notebook(tmp_path, monkeypatch):
    root = tmp_path / "runs"
    monkeypatch.setenv("PGOLF_RUNS", str(root))
    folder = sweep_of(root, "a", "b", "c")
    done(folder / "a")
    write_failure(begun(folder / "b"), ValueError("training loss is nan"))
    begun(folder / "c", steps=60)
    path = ROOT / "notebooks" / "monitor.ipynb"
    with hold_lock(folder / "c" / ".lock", 0, "held"):
        knobs = {"for_seconds": 1.5, "refresh_seconds": 0.2}
        cells = papermill.execute_notebook(path, tmp_path / "out.ipynb", knobs, progress_bar=False).cells
    shown = [output for cell in cells for output in cell.get("outputs", [])]
    assert [output["output_type"] for output in shown] == ["display_data"] * 4  # updated in place, not added to
    text = "".join(str(output["data"]) for output in shown)
    assert "1 of 3 runs complete, 1 running, 1 failed" in text and "training loss is nan" in text
    assert "60 of 100" in text and text.count("image/png") == 1
    assert "GPU" in text
