"""A finished run damaged in each of its files in turn is named and counted nowhere; whole ones stay."""

import json
import os
import shutil

import pytest

from pgolf.analysis import frontier
from pgolf.reports import pages
from pgolf.runs import integrity
from pgolf.runs.directory import write_interruption
from pgolf.runs.result import RunError, read_result
from pgolf.runs.table import load_runs
from pgolf.studies.reexport import export_checkpoint

FILES = [
    "config.json", "result.json", "metrics.jsonl", "log.txt", "artifact.pgolf", "checkpoint.safetensors",
    "notebook.ipynb", "job.json", "environment.json",
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(finished, tmp_path_factory):
    """A real run, with the files that a sweep writes beside it."""
    run_dir = shutil.copytree(finished[0], tmp_path_factory.mktemp("whole") / "demo" / "control")
    (run_dir / "notebook.ipynb").write_text('{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}')
    (run_dir / "job.json").write_text(json.dumps({"notebook": "train.ipynb", "parameters": {}}))
    return run_dir


def flip(content: bytes) -> bytes:
    """One bit of a letter near the middle: the last digit of a number may stand for the same float."""
    i = next(i for i in range(len(content) // 2, len(content)) if chr(content[i]).isalpha())
    return content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :]


DAMAGES = {
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "flip": flip,
}


def harm(run_dir, name: str, damage) -> None:
    path = run_dir / name
    content = path.read_bytes()
    assert damage(content) != content
    path.write_bytes(damage(content))
    later = (run_dir / "result.json").stat().st_mtime + 60
    os.utime(path, (later, later))


def test_a_whole_run_is_complete(whole, tmp_path):
    assert sorted(path.name for path in whole.iterdir() if path.name != ".lock") == sorted(FILES)
    shutil.copytree(whole, tmp_path / "s" / "copied")  # with new times: every checksum is looked at
    for path in (tmp_path / "s" / "copied").iterdir():
        os.utime(path)
    (row,) = load_runs(tmp_path).itertuples()
    assert row.status == "complete" and row.bpb > 0
    assert load_runs(whole.parents[1], thorough=True).status.tolist() == ["complete"]


@pytest.mark.parametrize("how", DAMAGES)
def test_each_file_damaged(whole, tmp_path, how):
    # A letter of a notebook's pictures, or of the parameters it was given, is not missed: nothing is read from them.
    names = [name for name in FILES if how != "flip" or name not in ("notebook.ipynb", "job.json")]
    shutil.copytree(whole, tmp_path / "demo" / "control")
    for name in names:
        harm(shutil.copytree(whole, tmp_path / "demo" / name), name, DAMAGES[how])
    table = load_runs(tmp_path)
    rows = table.set_index("run")
    assert rows.status.to_dict() == {"control": "complete"} | dict.fromkeys(names, "damaged")
    assert all(name in rows.problem[name] for name in names)
    ((_, runs),) = frontier.comparison_groups(table)
    assert list(runs.run) == ["control"]
    left_out = frontier.not_counted(table)
    assert dict(zip(left_out.run, left_out.why, strict=True)) == {n: f"damaged: {rows.problem[n]}" for n in names}


def test_files_that_are_missing(whole, tmp_path):
    for name in FILES[2:]:
        shutil.copytree(whole, tmp_path / "s" / name)
        (tmp_path / "s" / name / name).unlink()
    problems = load_runs(tmp_path).set_index("run").problem.to_dict()
    needed = ("metrics.jsonl", "artifact.pgolf", "environment.json")  # the others are for people, or large
    assert problems == {name: f"{name} (missing)" if name in needed else "" for name in FILES[2:]}


def test_a_score_changed_by_hand_is_not_one(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "s" / "better")
    path = tmp_path / "s" / "better" / "result.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"roundtrip_val_bpb": content["roundtrip_val_bpb"] - 0.1}))
    (row,) = load_runs(tmp_path).itertuples()
    assert (row.status, row.problem) == ("damaged", "result.json: changed since the run wrote it")
    with pytest.raises(RunError, match="changed since the run wrote it"):
        read_result(path.parent)


def test_old_damage_is_found_by_a_thorough_look(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "s" / "rotten")
    path = tmp_path / "s" / "rotten" / "checkpoint.safetensors"
    path.write_bytes(flip(path.read_bytes()))
    os.utime(path, (0, 0))
    assert load_runs(tmp_path).status.tolist() == ["complete"]
    assert load_runs(tmp_path, thorough=True).problem.tolist() == ["checkpoint.safetensors"]


def test_reports_name_the_damaged_and_count_the_whole(whole, tmp_path, monkeypatch):
    root = tmp_path / "runs"
    shutil.copytree(whole, root / "demo" / "control")
    export_checkpoint(root / "demo" / "control", root / "demo" / "int6", weight_quantization_bits=6)
    for i, name in enumerate(FILES):
        shutil.copytree(whole, root / "demo" / f"harmed-{i}")
        harm(root / "demo" / f"harmed-{i}", name, DAMAGES["zeros"])
    monkeypatch.setattr(pages, "AT_ONCE", 1)  # one kernel for both pages
    _, *written = pages.write_reports(root, tmp_path / "out", ["frontier", "sweep"])
    page, sweep = (path.read_text(encoding="utf-8") for path in written)
    assert f"2 complete, {len(FILES)} damaged" in page
    assert all(f"harmed-{i}" in page for i in range(len(FILES)))
    csv = (tmp_path / "out" / "tables" / "frontier.csv").read_text()
    assert "harmed" not in csv and "control" in csv and "int6" in csv
    assert "Counted nowhere" in sweep and "harmed-0: damaged: config.json" in sweep


def test_what_must_be_home_before_a_machine_goes(whole, tmp_path):
    """The least that a run must leave, whatever became of it."""
    run_dir = shutil.copytree(whole, tmp_path / "run")
    assert integrity.lacking(run_dir) == []
    for name in ("config.json", "environment.json", "log.txt", "artifact.pgolf"):
        shutil.move(run_dir / name, tmp_path / name)
        assert integrity.lacking(run_dir) == [name]
        shutil.move(tmp_path / name, run_dir / name)
    (run_dir / "result.json").unlink()
    assert integrity.lacking(run_dir) == ["error.json"]
    write_interruption(run_dir, "the machine is gone")
    assert integrity.lacking(run_dir) == []
    row = load_runs(tmp_path).iloc[0]
    assert (row.status, row.problem) == ("interrupted", "the machine is gone")
