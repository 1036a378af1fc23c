"""Fixtures of the remote tests: a local checkout, a rented machine, a job on it, and what each pull left."""

import argparse
import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
import yaml
from support.pod import Pod

from pgolf.cli import remote as cli_remote
from pgolf.disk import checksum
from pgolf.machines import job as jobs
from pgolf.machines import preflight, remote, transfer
from pgolf.runs import directory, integrity
from pgolf.runs.result import Result, result_checksum
from pgolf.runs.table import load_runs

SWEEP = {
    "name": "small", "track": "nano",
    "base": {"num_layers": 1, "model_dim": 64, "num_heads": 2, "num_kv_heads": 1},
    "grid": {"matrix_lr": [0.01, 0.02, 0.03]},
}  # fmt: skip
FIRST, SECOND, THIRD = (f"matrix_lr{value}" for value in SWEEP["grid"]["matrix_lr"])


@pytest.fixture
def local(tmp_path, monkeypatch):
    """A checkout of three files that git tracks, and its runs."""
    root = tmp_path / "local"
    (root / "pgolf_core").mkdir(parents=True)
    for name in ("README.md", "pyproject.toml", "pgolf_core/__init__.py"):
        (root / name).write_text(name)
    (root / ".gitignore").write_text("runs\n")
    for words in ("init -q", "add .", "-c user.name=a -c user.email=a@b commit -qm first"):
        subprocess.run(["git", *words.split()], cwd=root, check=True)
    monkeypatch.setattr(directory, "RUNS", root / "runs")
    for module in (preflight, transfer, directory):
        monkeypatch.setattr(module, "ROOT", root)
    return root


@pytest.fixture
def pod(tmp_path):
    with Pod(tmp_path / "pod") as pod:
        yield pod


@pytest.fixture
def make(local, pod, tmp_path, monkeypatch):
    """A function that makes a job of the stand-in, from keys of POD.yaml and the stand-in's plan."""

    def make(checked=False, steps=20, pace=0.005, fails=(), bare=(), waits="", **keys):
        (tmp_path / "small.yaml").write_text(yaml.safe_dump(SWEEP))
        pod_file = pod.yaml(**{"data": "there", "python": sys.executable} | keys)
        job = jobs.load_job(pod_file, [tmp_path / "small.yaml"], {})
        for name, config in job.sweeps[0].runs.items():
            finished_run(tmp_path / "made" / name, config)
        plan = dict(made=str(tmp_path / "made"), steps=steps, pace=pace, fails=fails, bare=bare, waits=waits)
        (tmp_path / "plan.json").write_text(json.dumps(plan))
        wrapper = tmp_path / "python"  # runs the stand-in in place of `python -m pgolf.cli.main sweep …`
        stand_in = Path(__file__).with_name("training_stand_in.py")
        wrapper.write_text(
            f'#!/bin/sh\n[ "$1" = -m ] || exec {sys.executable} "$@"\n'
            f'cd .. && exec {sys.executable} -S {stand_in} {tmp_path}/plan.json "$PWD"\n'
        )
        wrapper.chmod(0o755)
        monkeypatch.setattr(remote, "check", preflight.check if checked else lambda job, say: None)
        own = {} if "python" in keys else {"python": str(wrapper)}
        return replace(job, pod=job.pod.model_copy(update=own))

    return make


def finished_run(folder: Path, config) -> None:
    """Write the files of a training of these knobs, except log, metrics and environment."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.model_dump()))
    checkpoint, artifact = folder / "checkpoint.safetensors", folder / "artifact.pgolf"
    safetensors.torch.save_file({"w": torch.full((50_000,), config.matrix_lr)}, checkpoint)
    artifact.write_bytes(random.Random(config.hash).randbytes(100_000))
    result = Result(
        kind="train", config_hash=config.hash, seed=config.seed, track="nano", roundtrip_val_bpb=2.5, val_bpb=2.5,
        bytes={"weights": 100_000, "code": 9}, total_bytes=100_009, cap_bytes=config.cap_bytes,
        artifact_sha256=checksum(artifact), checkpoint_sha256=checksum(checkpoint),
        roundtrip_bytes=160_112, roundtrip_tokens=65_536, steps=config.iterations,
    )  # fmt: skip
    (folder / "result.json").write_text(json.dumps(vars(result) | {"checksum": result_checksum(vars(result))}))


def contents(folder: Path) -> dict[str, bytes]:
    """All files but locks and other hidden ones."""
    names = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in names.items() if "/." not in f"/{name}"}


@pytest.fixture
def pulls(monkeypatch, local):
    """all: local files after each pull, held to the promise that nothing became less. then(n) follows the nth."""
    pulls, real = SimpleNamespace(all=[], then=lambda n: None), transfer.pull

    def pull(*arguments, **options):
        try:
            return real(*arguments, **options)
        finally:  # also of a pull that was cut off
            now, before = contents(directory.RUNS / "small"), (pulls.all or [{}])[-1]
            pulls.all.append(now)
            assert_no_less(before, now)
            pulls.then(len(pulls.all))

    monkeypatch.setattr(transfer, "pull", pull)
    return pulls


def assert_no_less(before: dict[str, bytes], now: dict[str, bytes]) -> None:
    for name, content in before.items():
        if name.endswith("error.json"):  # deleted when its run is tried again
            continue
        assert name in now, f"{name} was deleted"
        shorter = len(now[name]) < len(content)
        assert not (shorter and content.startswith(now[name])), f"{name}: {len(now[name])} of {len(content)} bytes"
        if name.endswith("log.txt") and now[name].split()[:1] == content.split()[:1]:  # not begun anew
            assert now[name].startswith(content), name
        if name.endswith("resume.pt"):
            assert int(now[name][:8]) >= int(content[:8]), name
    for name, content in now.items():
        if name.endswith("result.json"):
            run = directory.RUNS / "small" / Path(name).parent
            assert not integrity.damage(run, json.loads(content), thorough=True), name
        if name.endswith("resume.pt"):  # its rows are local
            rows = now[name.replace("resume.pt", "metrics.jsonl")].decode().splitlines()
            assert json.loads(rows[-1])["step"] >= int(content[:8]), name


def assert_all_local(pod: Pod) -> None:
    table = load_runs(directory.RUNS / "small", thorough=True)
    assert list(table.status) == ["complete"] * 3, table[["run", "status", "problem"]]
    here, there = contents(directory.RUNS / "small"), contents(pod.disk / "pgolf/runs/small")
    assert {name: here[name] for name in there} == there
    assert {name.split("/")[-1] for name in here.keys() - there.keys()} <= {"resume.pt"}


class Said(list):
    """Lines that were said. when: words -> what to do once a line has them, once."""

    def __init__(self):
        self.when: dict[str, object] = {}

    def __call__(self, line: str) -> None:
        self.append(line)
        for words in [words for words in self.when if words in line]:
            self.when.pop(words)()

    def has(self, words: str) -> bool:
        return any(words in line for line in self)


@pytest.fixture
def said():
    return Said()


def attempts(pod: Pod, job) -> list[str]:
    folder = pod.disk / "pgolf/jobs" / job.id
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("attempt-") and not path.suffix)


def go(pod: Pod) -> None:
    """Let the run that waits end, on a new disk too."""
    (pod.disk / "pgolf").mkdir(exist_ok=True)
    (pod.disk / "pgolf/go").touch()


def pgolf_remote(*words: object) -> int:
    parser = argparse.ArgumentParser()
    cli_remote.add_commands(parser.add_subparsers())
    arguments = parser.parse_args(["remote", *map(str, words)])
    return arguments.command(arguments)
