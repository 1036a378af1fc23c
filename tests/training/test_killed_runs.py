"""A killed training continues to the bytes of an undisturbed run; a resume file of other code or data is refused."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
from support.training import TINY, tiny, what_counts

from pgolf.runs import code, directory
from pgolf.runs.result import RunError, read_result
from pgolf.runs.table import load_metrics
from pgolf.training import run as training
from pgolf.training.resume import RESUME, TrainError
from pgolf.training.run import train
from pgolf_core.config import ConfigError, RunConfig
from pgolf_core.model import GPT


@pytest.mark.slow
@pytest.mark.parametrize("shuffled", [0, 5])
def test_killed_and_resumed_is_bit_identical(embedded, tmp_path, shuffled):
    """kill -9 during training, twice; the artifact equals the undisturbed one's."""
    knobs = TINY | dict(iterations=60, resume_every_seconds=0.05, val_loss_every=20, shuffle_documents=shuffled)
    undisturbed = train(RunConfig(**knobs), tmp_path / "undisturbed")
    script = (
        "import sys, json; from pgolf_core.config import RunConfig; from pgolf.training.run import train;"
        "train(RunConfig(**json.loads(sys.argv[1])), sys.argv[2])"
    )
    run_dir = tmp_path / "killed"
    for steps in (15, 40):
        process = subprocess.Popen(
            [sys.executable, "-c", script, json.dumps(knobs), str(run_dir)], stdout=subprocess.DEVNULL
        )
        deadline = time.time() + 60
        while len(load_metrics(run_dir)) < steps and time.time() < deadline:
            assert process.poll() is None, "ended before it was killed"
            time.sleep(0.02)
        process.kill()
        process.wait()
        assert read_result(run_dir) is None and (run_dir / "resume.pt").exists()
    resumed = train(RunConfig(**knobs), run_dir)
    assert resumed.resumed >= 1
    assert what_counts(resumed) == what_counts(undisturbed)
    rows = [
        load_metrics(folder).drop(columns=["train_seconds", "tokens_per_second"])
        for folder in (run_dir, tmp_path / "undisturbed")
    ]
    pd.testing.assert_frame_equal(*rows)


@pytest.fixture
def killed_at(monkeypatch):
    """killed_at(step, config, run_dir): train, and end in that step as a kill would, with a resume file of the last."""

    def kill(step: int, config: RunConfig, run_dir) -> None:
        def step_until(state, lr_scale):
            if state.step == step:
                raise KeyboardInterrupt
            return train_step(state, lr_scale)

        train_step = training.train_step
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(training, "train_step", step_until)
            train(config, run_dir)
        assert torch.load(run_dir / RESUME, weights_only=True)["train"]["step"] == step

    return kill


def test_resume_continues_the_random_numbers_of_the_model(finished, tmp_path, monkeypatch, killed_at):
    def noisy(self, ids):
        logits = uncapped(self, ids)
        return logits + 0.1 * torch.randn_like(logits) if self.training else logits

    config = tiny(compression_reg_weight=0.005, resume_every_seconds=1e-9, warmup_steps=1, ema_decay=0.6)
    uncapped = GPT.uncapped
    monkeypatch.setattr(GPT, "uncapped", noisy)
    undisturbed = train(config, tmp_path / "undisturbed")
    assert undisturbed.raw_val_bpb != finished[1].val_bpb
    killed_at(4, config, tmp_path / "killed")
    killed_at(9, config, tmp_path / "killed")
    resumed = train(config, tmp_path / "killed")
    assert resumed.resumed == 2
    assert what_counts(resumed) == what_counts(undisturbed)


def test_resume_refuses_other_code_and_other_data(embedded, tmp_path, monkeypatch, killed_at):
    config, path = tiny(resume_every_seconds=1e-9), tmp_path / "run" / RESUME
    killed_at(5, config, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(code, "_sources", lambda studies: b"edited")
        with pytest.raises(RunError, match="edited after this process loaded it"):
            train(config, tmp_path / "run")
        patch.setattr(code, "LOADED", dict.fromkeys((False, True), b"edited"))
        with pytest.raises(TrainError, match=r"other code; delete .* to train anew, or check out that code \(commit"):
            train(config, tmp_path / "run")
    state = torch.load(path, weights_only=True)
    for made_by, differ in [
        (state["made_by"] | {"data": "other data"}, "data; delete the run's directory to"),
        ([2, "as older versions wrote it"], "data, code, device"),
    ]:
        torch.save(state | {"made_by": made_by}, path)
        with pytest.raises(TrainError, match=rf"resume\.pt: left by a run on other {differ}"):
            train(config, tmp_path / "run")
    torch.save(state, path)
    assert train(config, tmp_path / "run").resumed == 1


def test_torn_and_foreign_resume_files_are_named(embedded, tmp_path, killed_at):
    config, path = tiny(resume_every_seconds=1e-9), tmp_path / "run" / RESUME
    killed_at(5, config, tmp_path / "run")
    good = path.read_bytes()
    state = torch.load(path, weights_only=True)
    luck = random.Random(0)
    bad = [b"", b"x", good[: len(good) // 2], good[:-1], *(good[: luck.randrange(len(good))] for _ in range(5))]
    other = state["train"] | {"model": {"w": torch.zeros(2)}}
    for content in ([1], {"a": 1}, state | {"train": 3}, state | {"train": other}, state | {"timer": {}}):
        torch.save(content, path)
        bad.append(path.read_bytes())
    for content in bad:
        path.write_bytes(content)
        with pytest.raises(TrainError, match=r"resume\.pt: torn, or .*; put a good copy .* or delete it to train anew"):
            train(config, tmp_path / "run")
    path.write_bytes(good)
    assert train(config, tmp_path / "run").resumed == 1


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit on a file's size")
@pytest.mark.parametrize("limit", [200_000, *(pytest.param(n, marks=pytest.mark.slow) for n in (300, 3000, 700_000))])
def test_full_disk_ends_in_one_line_and_nothing_half_written(embedded, tmp_path, limit):
    """A limit on the size of files stands for the disk: logs, the resume file or the checkpoint do not fit."""
    script = (
        "import errno, os, resource, signal, sys; from pgolf.cli.main import main; import pgolf.disk as disk\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); errno.ENOSPC = errno.EFBIG\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); sys.exit(main(sys.argv[1:]))"
    )
    words = [f"-k{name}={value}" for name, value in (TINY | dict(resume_every_seconds=0.01)).items()]
    words = [sys.executable, "-c", script, "train", *words, "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(words, capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if "step/s" not in line]
    assert done.returncode == 2 and len(said) == 1 and said[0].endswith("which resumes"), done.stderr
    assert said[0].startswith(f"pgolf: {tmp_path / 'run'}: the disk is full")
    assert not [*tmp_path.rglob("result.json"), *tmp_path.rglob("*.tmp")]


def test_two_writers_cannot_share_a_directory(embedded, tmp_path, monkeypatch):
    monkeypatch.setattr(directory, "LOCK_PATIENCE_SECONDS", 0.1)
    script = "import filelock, sys, time\nwith filelock.FileLock(sys.argv[1]): print(flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / ".lock")], stdout=subprocess.PIPE)
    try:
        holder.stdout.readline()
        with pytest.raises(RunError, match="another process is writing"):
            train(tiny(), tmp_path)
    finally:
        holder.kill()
        holder.wait()
    assert train(tiny(iterations=2), tmp_path).steps == 2  # the lock goes with its holder


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no kill -9 on this platform")
def test_process_that_holds_a_run_ends_with_its_sweep(tmp_path):
    sweep = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    script = (
        "import sys, time; from pgolf.runs.directory import locked; from pgolf_core.config import RunConfig\n"
        "with locked(sys.argv[1], RunConfig()):\n    print('locked', flush=True); time.sleep(60)"
    )
    kernel = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "run")],
        env=os.environ | {"PGOLF_SWEEP_PID": str(sweep.pid)}, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert kernel.stdout.readline().strip() == b"locked"
    sweep.kill()
    sweep.wait()
    assert kernel.wait(timeout=20) == 1


def test_refused_run_releases_the_directory_lock(finished, monkeypatch):
    run_dir, _ = finished
    monkeypatch.setattr(directory, "LOCK_PATIENCE_SECONDS", 0.1)
    kept = []  # a notebook keeps the last error with its frames
    for iterations in (13, 14):
        with pytest.raises(ConfigError, match="iterations 12 there") as error:
            train(tiny(compression_reg_weight=0.005, iterations=iterations), run_dir)
        kept.append(error)
