"""Pools: workers fit the cores or GPUs, and one bad worker or disk does not end a sweep."""

import os
from collections import Counter

import pytest
import torch
import yaml
from support.runs import make_run
from tqdm import tqdm

from pgolf.runs import directory
from pgolf.sweeps import pool
from pgolf.sweeps.pool import LocalPool, WorkerLost, run_jobs, worker_environments
from pgolf.sweeps.runner import plan
from pgolf.sweeps.sweep_file import SweepError, load_sweep
from pgolf_core.config import RunConfig


def test_workers_fit_the_cores(monkeypatch):
    cores = os.cpu_count()
    config = RunConfig(device="cpu", cpu_threads=1)
    assert len(worker_environments([config])) == cores
    assert len(worker_environments([config.with_knobs(cpu_threads=0)])) == 1
    assert len(worker_environments([config], 3)) == 3
    with pytest.raises(SweepError, match="workers=0"):
        worker_environments([config], 0)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert len(worker_environments([config.with_knobs(world_size=4)])) == 2


def test_each_worker_sees_as_many_gpus_as_a_run_trains_on(monkeypatch):
    def gpus(configs, workers=None):
        return [environment["CUDA_VISIBLE_DEVICES"] for environment in worker_environments(configs, workers)]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    monkeypatch.setenv("PATH", "")  # no nvidia-smi
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpus([RunConfig()]) == ["0", "1", "2", "3", "4"]
    assert gpus([RunConfig(world_size=2), RunConfig()]) == ["0,1", "2,3"]  # and one that is left over
    with pytest.raises(SweepError, match="world_size=8: one GPU per process, and there are 5"):
        worker_environments([RunConfig(world_size=8)])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert gpus([RunConfig()], 3) == ["3", "5", "3"]


class Fake(LocalPool):
    """Jobs named lost lose their worker, full find a full disk, others end at once."""

    def __init__(self):
        self.started = Counter()

    def start(self, job):
        self.started[job.name] += 1
        if job.name == "full":
            raise OSError(28, "No space left on device")
        return True

    def poll(self, job):
        if job.name == "lost":
            raise WorkerLost("worker tcp://a:1 (a) is gone")
        return 0

    def stop(self, job):
        raise AssertionError("nothing runs at the end")


def test_a_run_that_no_worker_survives_and_one_without_disk_fail_and_the_others_are_done(tmp_path, monkeypatch):
    monkeypatch.setattr(directory, "RUNS", tmp_path)
    monkeypatch.setattr(pool, "POLL_SECONDS", 0)
    monkeypatch.setattr(pool, "finish", lambda *_: [])
    runs = {"lost": {}, "full": {"seed": 2}, "good": {"seed": 3}}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"track": "nano", "runs": runs}), encoding="utf-8")
    workers = Fake()
    with tqdm(total=3, disable=True) as bar:
        failures = run_jobs(workers, plan(load_sweep(tmp_path / "s.yaml")), bar)
    reasons = {failure.run: failure.reason for failure in failures}
    assert reasons.keys() == {"lost", "full"} and "No space left on device" in reasons["full"]
    assert "given up after 6 workers; the last: worker tcp://a:1 (a) is gone" in reasons["lost"]
    assert workers.started == {"lost": 6, "full": 1, "good": 1}


def test_after_an_edit_of_the_code_what_runs_goes_on_and_nothing_else_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(directory, "RUNS", tmp_path)
    monkeypatch.setattr(pool, "POLL_SECONDS", 0)
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump({"track": "nano", "runs": {n: {"seed": i} for i, n in enumerate("abc")}}))
    jobs = plan(load_sweep(path))
    digests = ["before"]

    class OneAtATime(Fake):
        def start(self, job):
            if self.started.total() and digests[-1] == "before":
                return False
            self.started[job.name] += 1
            make_run(tmp_path, f"s/{job.name}", knobs={"seed": job.config.seed}, environment={"code": "before"})
            return True

        def poll(self, job):
            digests.append("after")
            return 0

    monkeypatch.setattr(pool, "code_digest", lambda notebooks, fresh=False: digests[-1] if fresh else "before")
    workers = OneAtATime()
    with tqdm(disable=True) as bar:
        failures = run_jobs(workers, jobs, bar)
    assert dict(workers.started) == {"a": 1}
    assert [(f.run, f.reason) for f in failures] == [(name, pool.CODE_CHANGED) for name in "bc"]
    said = capsys.readouterr().out
    assert f"b, c: {pool.CODE_CHANGED}" in said
    assert "a: made by code before, and the code now is " in said and "not pooled" in said
