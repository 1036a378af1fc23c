"""Several processes train one run: the same bits as one of them, a prompt end when one dies, and the way on."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
import torch
from support.training import TINY, tiny, what_counts

from pgolf.runs.directory import metric_rows
from pgolf.runs.result import read_result
from pgolf.runs.table import load_metrics, load_runs
from pgolf.training.launch import RankError
from pgolf.training.run import train
from pgolf_core.config import ConfigError, RunConfig
from pgolf_core.distributed import ALONE, GradientSum
from pgolf_core.optim import newton_schulz, partition

THIRTY = dict(
    TINY, num_layers=2, iterations=30, val_loss_every=15, compression_reg_weight=0.005, ema_decay=0.8, muon_wd=0.1,
    muon_row_normalize=True, coprime_sequences=3, train_batch_schedule="512@0.5", document_mask=True,
)  # fmt: skip
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
GLOO = pytest.mark.skipif(os.name == "nt", reason="torch for Windows has no ranks that talk through gloo's devices")


@pytest.fixture(scope="module")
def alone(embedded, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("ranks") / "alone"
    return train(RunConfig(**THIRTY), run_dir), run_dir


def ranks_of(run_dir) -> list[psutil.Process]:
    """The processes that train this run, torchrun left out, in order of rank."""
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            if str(run_dir) in words and "torch.distributed.run" not in words:
                found.append((int(process.environ()["RANK"]), process))
        except (psutil.Error, KeyError):
            continue
    return [process for _, process in sorted(found, key=lambda pair: pair[0])]


def losses(run_dir):
    return load_metrics(run_dir).dropna(subset="train_loss").train_loss.to_numpy()


@pytest.mark.slow
@GLOO
@pytest.mark.parametrize("size", [2, 4])
def test_any_number_of_ranks_trains_the_same_bits(alone, tmp_path, size):
    """Not within rounding but to the bit: gradients are summed in one order, and every kernel sees what it saw."""
    result, run_dir = alone
    if size == 2:
        together = train(RunConfig(**THIRTY, world_size=size), tmp_path / "run")
        assert train(RunConfig(**THIRTY, world_size=size), tmp_path / "run") == together  # complete: only read
        with pytest.raises(ConfigError, match="was run with other knobs"):
            train(RunConfig(**THIRTY | {"seed": 2}, world_size=size), tmp_path / "run")
    else:  # started by torchrun, not by train()
        (tmp_path / "knobs.yaml").write_text(json.dumps(THIRTY))
        words = [f"--nproc_per_node={size}", "-m", "pgolf.training.run", "--config", str(tmp_path / "knobs.yaml")]
        subprocess.run([*TORCHRUN, *words, "--run-dir", str(tmp_path / "run")], check=True, capture_output=True)
        together = read_result(tmp_path / "run")
    assert len(losses(run_dir)) == 30
    assert losses(tmp_path / "run") == pytest.approx(losses(run_dir), abs=1e-6)
    ours, theirs = what_counts(result), what_counts(together)
    assert {name for name in ours if ours[name] != theirs[name]} <= {"config_hash", "budget", "peak_memory_bytes"}
    assert together.checkpoint_sha256 == result.checkpoint_sha256
    assert together.artifact_sha256 == result.artifact_sha256


@pytest.mark.slow
@GLOO
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no kill -9 on this platform")
def test_dead_rank_ends_the_run_which_then_resumes(embedded, tmp_path):
    config = tiny(world_size=2, iterations=40, resume_every_seconds=0.05)
    expected = train(config, tmp_path / "undisturbed")
    luck, ended = random.Random(6), []
    for _ in range(2):
        victim, later = luck.randrange(2), luck.randrange(2, 12)

        def kill(victim=victim, lines=later):
            """A rank, once some more lines are there."""
            metrics, there = tmp_path / "run" / "metrics.jsonl", len(metric_rows(tmp_path / "run"))
            while not metrics.exists() or len(metric_rows(tmp_path / "run")) < there + lines:
                time.sleep(0.01)
            ranks_of(tmp_path / "run")[victim].kill()
            ended.append(time.monotonic())

        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        with pytest.raises(RankError, match=f"rank {victim} was killed"):
            train(config, tmp_path / "run")
        killer.join()
        assert time.monotonic() - ended[-1] < 60
        assert ranks_of(tmp_path / "run") == []
        (row,) = load_runs(tmp_path).query("run == 'run'").itertuples()
        assert (row.status, "was killed" in row.problem) == ("failed", True)
    with pytest.raises(RankError, match="was run with other knobs"):  # not what the last try left
        train(config.with_knobs(seed=5), tmp_path / "run")
    again = train(config, tmp_path / "run")
    assert again.resumed == 2
    assert again.checkpoint_sha256 == expected.checkpoint_sha256
    assert again.roundtrip_block_nats == expected.roundtrip_block_nats
    assert not (tmp_path / "run" / "error.json").exists()


@pytest.mark.slow
@GLOO
def test_error_of_several_ranks_is_printed_once(embedded, tmp_path):
    words = ["--nproc_per_node=2", "-m", "pgolf.training.run", "-k", "track=nano", "--run-dir", str(tmp_path / "run")]
    said = subprocess.run([*TORCHRUN, *words, "-k", "world_size=4"], capture_output=True, text=True)
    assert said.returncode != 0
    assert said.stderr.count("pgolf: world_size=4, and torchrun started 2 processes") == 1
    assert not (tmp_path / "run").exists()


def test_numbers_of_ranks_that_cannot_work_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="use 1, 2, 4 or 8 processes"):
        RunConfig(world_size=3)
    with pytest.raises(ConfigError, match="device=cuda:1 is one device"):
        RunConfig(world_size=2, device="cuda:1")
    with pytest.raises(ConfigError, match="grad_accum_steps=3 does not divide 8 / world_size=2"):
        RunConfig(world_size=2, grad_accum_steps=3)
    assert [RunConfig(world_size=n).data.grad_accum for n in (1, 2, 4, 8)] == [8, 4, 2, 1]
    assert RunConfig(world_size=2, grad_accum_steps=1).data.microbatches == 4


@pytest.mark.slow
@GLOO
def test_ranks_with_other_weights_are_seen(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(
        "import os, torch, torch.distributed as dist\n"
        "from pgolf_core.distributed import Ranks\n"
        "dist.init_process_group('gloo')\n"
        "ranks = Ranks(dist.get_rank(), dist.get_world_size())\n"
        "weights = [torch.ones(3), torch.full((2, 2), float('nan'), dtype=torch.bfloat16), torch.empty(0)]\n"
        "same = ranks.hold_same(weights)\n"
        "weights[0][1] += 1e-7 * ranks.rank\n"
        "assert same and not ranks.hold_same(weights)\n"
        "dist.destroy_process_group()\n"  # gloo's threads end with the group
    )
    subprocess.run([*TORCHRUN, "--nproc_per_node=2", str(script)], check=True, capture_output=True)
    assert ALONE.hold_same([torch.ones(3)])


@pytest.mark.slow
@GLOO
@pytest.mark.parametrize("change", ["float('nan')", "p[0] + 1e-3"])
def test_a_rank_with_other_weights_ends_all_at_once(embedded, tmp_path, change):
    script = tmp_path / "drift.py"
    script.write_text(
        "import os, sys\nfrom pgolf.training import run\nstep = run.train_step\n"
        "def drifting(state, lr_scale):\n"
        "    result = step(state, lr_scale)\n"
        "    if state.step == 3 and os.environ['RANK'] == '1':\n"
        "        p = state.model.q_gains.data\n"
        f"        p[0] = {change}\n"
        "    return result\n"
        "run.train_step = drifting\nsys.exit(run.main())\n"
    )
    (tmp_path / "knobs.yaml").write_text(json.dumps(TINY | {"world_size": 2}))
    words = ["--nproc_per_node=2", str(script), "--config", str(tmp_path / "knobs.yaml")]
    began = time.monotonic()
    done = subprocess.run([*TORCHRUN, *words, "--run-dir", str(tmp_path / "run")], capture_output=True, text=True)
    assert done.returncode and time.monotonic() - began < 120
    assert json.loads((tmp_path / "run" / "error.json").read_text()) == {
        "error": "TrainError",
        "message": "ranks hold different weights at step 3; train with deterministic=1",
    }


def test_one_process_adds_nothing():
    p = torch.nn.Parameter(torch.ones(3))
    gradients = GradientSum([p], ALONE)
    (2 * p).sum().backward()
    kept = p.grad
    gradients.add()
    gradients.finish()
    assert p.grad is kept
    assert ALONE.share("x") == "x"
    assert ALONE.share_float(1.5) == 1.5


def test_gradients_written_over_by_the_next_pass_add_up_as_autograd_adds_them():
    shapes = [torch.randn(3, 2), torch.randn(4, dtype=torch.float64), torch.randn(2)]
    parameters = [torch.nn.Parameter(t) for t in shapes]
    buffers = [torch.empty_like(p) for p in parameters]  # a CUDA graph's, the same in every pass
    gradients, expected = GradientSum(parameters, ALONE, reused=True), [torch.zeros_like(p) for p in parameters]
    for _ in range(3):
        for i in range(2):  # nothing uses the last parameter yet
            parameters[i].grad = buffers[i].normal_()
            expected[i] += buffers[i]
        gradients.add()
    gradients.finish()
    assert all(torch.equal(p.grad, total) for p, total in zip(parameters, expected, strict=True))


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_muon_matrices_are_divided_among_ranks(ranks):
    """Each matrix once, and no rank has more than its share and the largest matrix."""
    shapes = [torch.Size(s) for s in [(512, 512), (256, 512), (256, 512), (512, 512), (1024, 512), (512, 1024)] * 9]
    own = partition(tuple(shapes), ranks)
    assert sorted(i for indices in own for i in indices) == list(range(len(shapes)))
    work = [sum(shapes[i].numel() * min(shapes[i]) for i in indices) for indices in own]
    assert max(work) <= sum(work) / ranks + max(s.numel() * min(s) for s in shapes)


def test_newton_schulz_of_a_batch_equals_that_of_each_matrix():
    """A rank that has fewer matrices of a shape gets the same bits for each."""
    matrices = torch.randn(6, 48, 64, generator=torch.Generator().manual_seed(0))
    together = newton_schulz(matrices, 5)
    assert all(torch.equal(newton_schulz(matrices[i : i + 2], 5), together[i : i + 2]) for i in range(5))
