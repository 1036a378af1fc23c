"""A run folder that somebody made: whatever it holds, it is named, it costs no time, and the runs beside it count."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.runs import make_run

from pgolf.disk import read_json
from pgolf.reports import monitor
from pgolf.runs.directory import is_held, run_directories
from pgolf.runs.table import load_runs
from pgolf_core.config import ROOT, digest

DEEP = 100_000
TEXTS = {
    "deep list": "[" * DEEP + "]" * DEEP, "deep object": '{"a":' * DEEP + "1" + "}" * DEEP, "empty": "", "null": "null",
    "list": "[1, 2]", "text": '"zwei"', "huge": f'{{"step": 1{"0" * 400}, "seed": 1{"0" * 400}}}', "not JSON": "{{",
    "nan": '{"step": NaN, "train_loss": NaN}', "a list of step": '{"step": [1], "train_loss": "x"}',
}  # fmt: skip
KINDS = {
    "pipe": os.mkfifo, "device": lambda path: path.symlink_to("/dev/zero"), "a folder": Path.mkdir,
    "dangling": lambda path: path.symlink_to("/nowhere/at/all"), "itself": lambda path: path.symlink_to(path),
    "not UTF-8": lambda path: path.write_bytes(b"\xff"), "sparse": lambda path: os.truncate(path.open("w").name, 2**36),
}  # fmt: skip
FILES = ("config.json", "result.json", "metrics.jsonl", "log.txt", "error.json", "job.json", "import.json")
WRONG = {
    "roundtrip_val_bpb": ["zwei", None, [2.5], {}, True, 10**400], "total_bytes": ["x", 10**400, 2.5],
    "files": [[1], {"../../other/log.txt": "0" * 64}, {"/etc/hostname": "0" * 64}, {"log.txt": 3}],
    "seed": [[1], "1", 10**400, None], "environment": [[], "x", {"code": ["a"]}, {"git_commit": 10**400}],
    "budget": [7, {"over": "x"}, {"over": {}}], "bytes": [{"code": "x"}, [], {}], "steps": [0, -1, "x"],
    "data": [{"folder": 1}, "x", [], {"findings": [[]]}], "table": ["x", [1], [[]]],
    "kind": [None, 3, "\x00", "no such"],
    "roundtrip_block_nats": [["a"], "x", [[]], [None]], "finished": [3, "yesterday"], "protocol": [3, []],
    "cap_bytes": [None, "x"], "track": [None, []], "config_hash": [None, 3], "scored_text": [3, []], "flags": [3],
    "schema": ["x", None, [], 10**400],
}  # fmt: skip
BOUND_SECONDS, BOUND_BYTES = 60, 3 * 2**30  # of a whole process with pandas, on a busy machine


def signed(run_dir, **changes) -> None:
    """result.json with other fields and a checksum that is right."""
    content = json.loads((run_dir / "result.json").read_text()) | changes
    content["checksum"] = digest({name: value for name, value in content.items() if name != "checksum"})
    (run_dir / "result.json").write_text(json.dumps(content))


@pytest.fixture
def root(tmp_path):
    """runs/ with one good run; beside it, in its own folder, each hostile one."""
    make_run(tmp_path / "runs", "s/good")
    hostile = [(f"{name} {what}", name, make) for name in FILES for what, make in KINDS.items()]
    hostile += [(f"{n} {w}", n, lambda p, text=text: p.write_text(text)) for n in FILES for w, text in TEXTS.items()]
    for place, name, make in hostile:
        path = make_run(tmp_path / "runs", f"s/{place}") / name
        path.unlink(missing_ok=True)
        make(path)
    for name, values in WRONG.items():
        for i, value in enumerate(values):
            signed(make_run(tmp_path / "runs", f"s/result {name} {i}"), **{name: value})
    for kind in ("sensitivity", "residual_allocation", "export_lab", "export"):
        for i, table in enumerate([[{}], [{"bpb": "x", "knobs": [], "bytes": 3, "variant": [[]]}], [{"tensor": "x"}]]):
            signed(make_run(tmp_path / "runs", f"s/{kind} {i}"), kind=kind, table=table)
    for i, config in enumerate([{"seed": [1]}, {"num_layers": "x"}, {"track": 7}, {"matrix_lr": 10**400}]):
        path = make_run(tmp_path / "runs", f"s/config {i}") / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    (tmp_path / "runs" / "only a lock" / "run").mkdir(parents=True)
    (tmp_path / "runs" / "only a lock" / "run" / ".lock").touch()
    os.mkfifo(tmp_path / "runs" / "only a lock" / ".lock")
    for i, text in enumerate([*TEXTS.values(), '{"arms": [1], "runs": [[], "../../.."]}']):
        make_run(tmp_path / "runs", f"t{i}/control")
        (tmp_path / "runs" / f"t{i}" / "sweep.json").write_text(text)
    return tmp_path / "runs"


def test_every_hostile_folder_is_listed_beside_the_good_run(root):
    table = load_runs(root)
    assert len(table) == len(run_directories(root)) > 150
    status = table.set_index("run").status
    assert status["good"] == "complete" and table.set_index("run").bpb["good"] == 2.5
    lying = [run for run in status.index[status == "complete"] if run.startswith("result ")]
    # What a run may lack, and what nobody reads.
    harmless = {"budget 2", "kind 2", "kind 3", "finished 1", "flags 0", "roundtrip_val_bpb 1"}
    assert set(lying) == {f"result {name}" for name in harmless}
    problems = table[table.status == "damaged"].problem
    assert problems.str.len().max() < 300 and problems.str.len().min() > 0
    monitor.state(root)


@pytest.mark.slow
def test_every_page_is_written_in_bounded_time_and_memory(root, tmp_path):
    script = (
        "import sys, pathlib; from pgolf.reports import pages; pages.write_reports(*map(pathlib.Path, sys.argv[1:]))"
    )
    subprocess.run(
        [sys.executable, "-c", script, root, tmp_path / "out"], cwd=ROOT, timeout=BOUND_SECONDS * 5, check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (BOUND_BYTES, BOUND_BYTES)),
    )  # fmt: skip
    for page in (tmp_path / "out").glob("*.html"):
        assert "could not be written" not in page.read_text()


def test_links_to_sweeps_are_followed_once(tmp_path):
    made = make_run(tmp_path / "elsewhere", "s/a")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "linked").symlink_to(made.parent)
    (tmp_path / "runs" / "again").symlink_to(made.parent)
    (made.parent / "loop").symlink_to(tmp_path / "runs")
    assert list(load_runs(tmp_path / "runs").run) == ["a"]


def test_a_newer_result_is_read_or_asks_for_an_update(tmp_path):
    signed(make_run(tmp_path, "s/a"), novel={"x": 1})
    signed(make_run(tmp_path, "s/b"), schema=99, kind=None)
    table = load_runs(tmp_path).set_index("run")
    assert (table.status["a"], table.status["b"]) == ("complete", "damaged")
    assert table.problem["b"] == "result.json: written by a newer version of the workbench; update the workbench"


def test_a_score_without_checksum_does_not_count(tmp_path):
    run_dir = make_run(tmp_path, "s/a")
    content = read_json(run_dir / "result.json") | {"checksum": "", "roundtrip_val_bpb": 0.5}
    (run_dir / "result.json").write_text(json.dumps(content))
    assert load_runs(tmp_path).status[0] == "damaged"


def test_a_file_that_is_a_link_is_not_the_runs(tmp_path):
    run_dir = make_run(tmp_path, "s/a")
    shutil.move(run_dir / "metrics.jsonl", tmp_path / "elsewhere")
    (run_dir / "metrics.jsonl").symlink_to(tmp_path / "elsewhere")
    assert load_runs(tmp_path).problem[0] == "metrics.jsonl (a link)"


def test_a_lock_that_is_no_file_is_held_by_nobody(tmp_path):
    os.mkfifo(tmp_path / ".lock")
    assert not is_held(tmp_path / ".lock")
