"""Training end to end: the recorded trace, repeatability, resume, budgets, and what stops it."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from golden_vectors import golden_path
from support.corpus import small_documents
from support.training import TINY, tiny, what_counts

from pgolf.data import embedded_corpus
from pgolf.data.dataset import Dataset, validation_tokens
from pgolf.runs import directory
from pgolf.runs.result import ARTIFACT, CHECKPOINT, RunError, read_result, write_result
from pgolf.runs.table import load_metrics, load_runs
from pgolf.studies.reexport import export_checkpoint
from pgolf.training.resume import TrainError
from pgolf.training.run import train
from pgolf.training.timer import TrainTimer
from pgolf_core import optim
from pgolf_core.config import ConfigError, RunConfig
from pgolf_core.export import load
from pgolf_core.files import DataError
from pgolf_core.quantization.allocation import AllocationError
from pgolf_core.shards import read_shard, write_shard


def test_trace_of_the_reference(tmp_path):
    """60 steps from the recorded weights. A change of 1e-7 in one weight moves these losses by up to 5e-3
    within the 60 steps (Newton–Schulz rounds to bfloat16), and no two kinds of machine sum in one order; so
    early steps are held tightly, later ones to that spread, their mean and the final scores to the bar.
    benchmarks/trace_conformance.py shows the spread."""
    folder = golden_path("trace")
    recorded = json.loads((folder / "trace.json").read_text())
    with np.load(folder / "init.npz") as arrays:
        initial = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    config = RunConfig(
        **recorded["knobs"],
        data_path=str(folder / "data"),
        tokenizer_path=str(folder / "sp1024.model"),
        eval_cache_delay=1,
        cpu_threads=1,
    )
    result = train(config, tmp_path / "run", initial)
    table = load_metrics(tmp_path / "run").dropna(subset="train_loss").set_index("step")
    difference = table.train_loss - pd.Series(dict(recorded["train_loss"]))
    assert difference[:8].abs().max() < 5e-4
    assert difference.abs().max() < 6e-3
    assert difference.abs().mean() < 2e-3
    penalties = table.comp_reg[table.comp_reg > 0]
    assert list(penalties.index) == [step for step, _ in recorded["comp_reg"]]
    assert (penalties - pd.Series(dict(recorded["comp_reg"]))).abs().mean() < 3e-4
    assert result.val_bpb == pytest.approx(recorded["val_bpb"], abs=2e-3)
    assert result.roundtrip_val_bpb == pytest.approx(recorded["roundtrip_val_bpb"], abs=2e-3)
    log = (tmp_path / "run" / "log.txt").read_text()
    final = f"val_loss:{result.roundtrip_val_loss:.8f} val_bpb:{result.roundtrip_val_bpb:.8f}"
    assert log.splitlines()[-1] == f"final_int8_zlib_roundtrip_exact {final}"


@pytest.fixture(scope="module")
def finished(embedded, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "sweep" / "run"
    return run_dir, train(tiny(compression_reg_weight=0.005), run_dir)


def test_same_knobs_and_seed_give_the_same_bits(finished, tmp_path):
    _, first = finished
    again = train(tiny(compression_reg_weight=0.005), tmp_path / "again")
    assert what_counts(again) == what_counts(first)
    other = train(tiny(compression_reg_weight=0.005, seed=2), tmp_path / "other")
    assert other.artifact_sha256 != first.artifact_sha256


def test_run_directory_is_whole(finished):
    run_dir, result = finished
    assert {p.name for p in run_dir.iterdir()} == {
        ".lock", "config.json", "environment.json", "metrics.jsonl", "log.txt", CHECKPOINT, ARTIFACT,
        "result.json",
    }  # fmt: skip
    assert RunConfig.from_file(run_dir / "config.json") == tiny(compression_reg_weight=0.005)
    assert read_result(run_dir) == result
    assert result.steps == 12 and result.tokens == 12 * 1024 and result.stopped_by == "iterations"
    assert result.total_bytes == (run_dir / ARTIFACT).stat().st_size + result.bytes["code"]
    assert set(load(run_dir / ARTIFACT)) >= {"tok_emb.weight", "blocks.0.mlp.fc.weight"}
    table = load_metrics(run_dir)
    assert list(table.step[table.val_bpb.notna()]) == [5, 10, 12]
    assert table.comp_reg.max() > 0
    assert table.train_loss.dropna().iloc[-1] < math.log(1024) < 1.01 * table.train_loss.iloc[0]


def test_a_result_tells_of_its_data(finished, embedded):
    run_dir, result = finished
    assert (result.data["folder"], result.data["published"]) == ("embedded_sp1024", "")
    assert 0.008 < result.data["scored_fraction"] < 0.01
    (found,) = result.data["findings"]
    assert "of the validation split is scored (4,096 of 455,009 tokens" in found
    assert "of the validation split scored" in (run_dir / "log.txt").read_text(encoding="utf-8")
    tokens = validation_tokens(embedded, 64, 4096)
    assert result.scored_text == Dataset.open(embedded).text_sha256(tokens)


def test_false_data_is_refused_before_it_is_paid_for(embedded, tmp_path):
    folder = tmp_path / "leaky"
    folder.mkdir()
    shutil.copy(embedded / "tokenizer.model", folder)
    tokens = read_shard(embedded / "fineweb_val_000000.bin")
    for split in ("train", "val"):
        write_shard(folder / f"fineweb_{split}_000000.bin", tokens)
    with pytest.raises(DataError, match=r"200 of 200 validation documents .* are also in the training shards"):
        train(tiny(data_path=str(folder)), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "error.json").read_text())["error"] == "DataError"
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"val_max_documents": 500}, "val_max_documents=500: .* has 200 validation documents"),
        ({"roundtrip_val_max_documents": 500}, "val_max_documents=500: .* has 200 validation documents"),
        ({"eval_seq_len": 4097, "val_batch_size": 8192, "val_max_tokens": 4100}, "4,097 tokens are to be scored"),
    ],
)
def test_what_cannot_be_scored_is_said_before_training(embedded, tmp_path, knobs, says):
    with pytest.raises(DataError, match=says):
        train(tiny(**{"roundtrip_val_max_tokens": 0} | knobs), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("tokenizer", ["unigram", "bytes"])
def test_other_tokenizers_score_the_same_text(embedded, tmp_path, tokenizer, monkeypatch):
    """Runs of two tokenizers share text and bytes of the score when it is of whole documents."""
    monkeypatch.setattr(embedded_corpus, "embedded_documents", small_documents)
    monkeypatch.setattr(embedded_corpus, "ROOT", tmp_path)
    documents = dict(val_max_documents=30, roundtrip_val_max_documents=30)
    ours, theirs = (
        train(tiny(**documents, **knobs), tmp_path / name)
        for name, knobs in {
            "a": dict(tokenizer=tokenizer, vocab_size=260 if tokenizer == "bytes" else 300),
            "b": dict(vocab_size=320),
        }.items()
    )
    assert (ours.scored_text, ours.roundtrip_bytes) == (theirs.scored_text, theirs.roundtrip_bytes)
    assert ours.roundtrip_tokens != theirs.roundtrip_tokens and ours.data_fingerprint != theirs.data_fingerprint
    assert ours.roundtrip_bytes == sum(len(document.text.encode()) for document in small_documents()[:30])


def test_a_complete_run_is_not_trained_again(finished):
    run_dir, result = finished
    stamp = (run_dir / "result.json").stat().st_mtime_ns
    assert train(tiny(compression_reg_weight=0.005), run_dir) == result
    assert (run_dir / "result.json").stat().st_mtime_ns == stamp
    with pytest.raises(ConfigError, match="iterations 12 there, 13 now"):
        train(tiny(compression_reg_weight=0.005, iterations=13), run_dir)


@pytest.mark.parametrize("shuffled", [0, 5])
def test_killed_and_resumed_is_bit_identical(embedded, tmp_path, shuffled):
    """kill -9 in mid-training, twice; the artifact equals the undisturbed one's."""
    knobs = TINY | dict(iterations=60, resume_every_seconds=0.05, val_loss_every=20, shuffle_documents=shuffled)
    undisturbed = train(RunConfig(**knobs | dict(resume_every_seconds=0.05)), tmp_path / "undisturbed")
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
    kept = load_metrics(run_dir).drop(columns=["train_seconds", "tokens_per_second"])
    expected = load_metrics(tmp_path / "undisturbed").drop(columns=["train_seconds", "tokens_per_second"])
    pd.testing.assert_frame_equal(kept, expected)


def test_warmup_leaves_no_trace(finished, tmp_path):
    _, plain = finished
    warmed = train(tiny(compression_reg_weight=0.005, warmup_steps=3), tmp_path / "run")
    assert warmed.artifact_sha256 == plain.artifact_sha256


def test_wallclock_budget(embedded, tmp_path):
    result = train(tiny(max_wallclock_seconds=1.5, iterations=100_000, val_loss_every=0), tmp_path / "run")
    assert result.stopped_by == "wallclock" and 1.5 <= result.train_seconds < 3 and result.steps > 3


def test_the_clock_counts_calibration(embedded, tmp_path):
    """Training leaves the time that reading training text for the export takes; the account tells both."""
    limit = 6.0
    config = tiny(
        iterations=100_000, max_wallclock_seconds=limit, warmdown_iters=20, val_loss_every=0, train_log_every=10,
        quantizer="step:0.4", gptq=True, calibration_tokens=8_192, resume_every_seconds=0.5,
    )  # fmt: skip
    result = train(config, tmp_path / "run")
    account = result.budget
    assert (account["limit"], account["train"]) == (limit, result.train_seconds)
    assert account["counted"] == account["train"] + account["calibration"]
    assert account["over"] == max(0.0, account["counted"] - limit)
    assert result.stopped_by == "wallclock"
    assert account["calibration"] > 0.05
    assert account["train"] < limit  # before the clock of a run without calibration would have stopped it
    assert account["apart"].keys() == {"warmup", "validation", "forecast", "resume files"}
    assert account["apart"]["validation"] > 0
    assert "reserve:" in (tmp_path / "run" / "log.txt").read_text()
    with pytest.raises(TrainError, match=r"max_wallclock_seconds=0\.01: calibration alone takes"):
        train(config.with_knobs(max_wallclock_seconds=0.01), tmp_path / "short")


@pytest.mark.parametrize("other", [{}, {"train_log_every": 1}, {"train_log_every": 2}, {"val_loss_every": 2}])
def test_the_clock_is_read_a_step_behind_the_queue(finished, tmp_path, monkeypatch, other):
    """On a GPU that is made up, of 10 seconds a step: what is in its queue is on the clock already, once."""
    readings, now, steps = [], [0.0], [0]

    def wait_for(step):
        now[0] = max(now[0], 10.0 * step)

    def seconds_since(start, _):
        wait_for(steps[0])
        return now[0] - start

    def step_optimizers(*arguments):
        steps[0] += 1
        real(*arguments)

    real = optim.step_optimizers
    for name, stand_in in {
        "pgolf.training.timer.mark": lambda device: SimpleNamespace(synchronize=partial(wait_for, steps[0])),
        "pgolf.training.timer.time": SimpleNamespace(perf_counter=lambda: now[0]),
        "pgolf.training.timer.seconds_since": seconds_since,
        "pgolf_core.train.step_optimizers": step_optimizers,
        "pgolf_core.distributed.Ranks.share_float": lambda _, reading: readings.append(reading) or reading,
    }.items():
        monkeypatch.setattr(name, stand_in)
    knobs = dict(iterations=9, max_wallclock_seconds=35, val_loss_every=0, train_log_every=0, resume_every_seconds=99)
    config = tiny(**knobs | other)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # killed when it is scored
        patch.setattr("pgolf.training.run.round_trip", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        train(config, tmp_path / "run")
    assert readings[1:] == [20.0, 30.0, 40.0] and readings[0] in (0.0, 10.0)
    result = train(config, tmp_path / "run")  # trains no more
    assert (result.stopped_by, result.steps, result.train_seconds, result.resumed) == ("wallclock", 4, 40.0, 1)


def test_a_run_that_was_to_be_over_trains_no_further_step():
    """The step in the queue ended sooner than was thought."""
    timer = TrainTimer(torch.device("cpu"), 35.0)
    timer.trained_s, timer.expired = 34.0, True
    again = TrainTimer(torch.device("cpu"), 35.0)
    again.load_state_dict(timer.state_dict())
    assert again.expired and again.trained_s == 34.0


def test_larger_passes_train_the_same(finished, tmp_path):
    _, result = finished
    one = train(tiny(compression_reg_weight=0.005, grad_accum_steps=1), tmp_path / "run")
    assert one.val_bpb == pytest.approx(result.val_bpb, abs=5e-3)
    assert one.tokens == result.tokens


def test_a_result_tells_memory_and_operations(finished):
    _, result = finished
    assert result.peak_memory_bytes > 50 * 2**20
    assert result.flops_per_token > 6 * result.parameters * 0.5
    assert result.mfu is None  # nobody knows a CPU's peak


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_training_scores_the_same(finished, tmp_path):
    _, plain = finished
    compiled = train(tiny(compression_reg_weight=0.005, compile=True), tmp_path / "run")
    assert compiled.val_bpb == pytest.approx(plain.val_bpb, abs=5e-3)


def test_clipping_changes_only_what_is_too_long(finished, tmp_path):
    _, plain = finished
    loose = train(tiny(compression_reg_weight=0.005, grad_clip_norm=1e9), tmp_path / "loose")
    tight = train(tiny(compression_reg_weight=0.005, grad_clip_norm=1e-3), tmp_path / "tight")
    assert loose.artifact_sha256 == plain.artifact_sha256 != tight.artifact_sha256


def test_bfloat16_autocast_trains(finished, tmp_path):
    _, plain = finished
    half = train(tiny(compression_reg_weight=0.005, precision="bfloat16"), tmp_path / "run")
    assert half.val_bpb == pytest.approx(plain.val_bpb, abs=0.1) and half.val_bpb != plain.val_bpb


def test_export_again_with_other_settings(finished, tmp_path):
    run_dir, source = finished
    same = export_checkpoint(run_dir, tmp_path / "same", weight_quantization_bits=8)
    assert same.artifact_sha256 == source.artifact_sha256 and same.roundtrip_val_bpb == source.roundtrip_val_bpb
    kept = export_checkpoint(run_dir, tmp_path / "kept", weight_quantization_bits=4, embed_quantization_bits=16)
    assert kept.kind == "export" and kept.source == "sweep/run"
    assert kept.prequant_val_bpb == source.prequant_val_bpb
    narrow = export_checkpoint(run_dir, tmp_path / "narrow", eval_seq_len=32)
    assert narrow.prequant_val_bpb != source.prequant_val_bpb and narrow.protocol != source.protocol
    with pytest.raises(RunError, match="only a finished run"):
        export_checkpoint(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"matrix_lr=9\.0: the run was trained with matrix_lr=0\.04"):
        export_checkpoint(run_dir, tmp_path / "out", matrix_lr=9)


def test_training_ends_with_the_solvers_file(finished, tmp_path):
    size = finished[1].total_bytes
    config = tiny(
        allocation="solve", codec="ans", control_dtype="float16", cap_bytes=size // 2, calibration_tokens=1024
    )
    result = train(config, tmp_path / "solved")
    assert 0.998 * size // 2 < result.total_bytes <= size // 2
    assert result.roundtrip_val_bpb == pytest.approx(result.prequant_val_bpb, abs=0.01)
    with pytest.raises(AllocationError, match="cap_bytes=29000: with the coarsest"):
        export_checkpoint(tmp_path / "solved", tmp_path / "tiny", cap_bytes=29_000)


def test_an_export_of_an_earlier_training_is_not_taken_for_this_one(finished, tmp_path):
    run_dir = tmp_path / "sweep" / "run"
    train(tiny(iterations=3), run_dir)
    export_checkpoint(run_dir, tmp_path / "out")
    shutil.rmtree(run_dir)
    train(tiny(iterations=4), run_dir)
    with pytest.raises(ConfigError, match="iterations 3 there, 4 now"):
        export_checkpoint(run_dir, tmp_path / "out")
    stale = read_result(run_dir)
    write_result(run_dir, replace(stale, checkpoint_sha256="0" * 64))
    export_checkpoint(run_dir, tmp_path / "other")
    write_result(run_dir, stale)
    with pytest.raises(RunError, match="made from another training"):
        export_checkpoint(run_dir, tmp_path / "other")


def test_a_refusal_lets_go_of_the_directory(finished, monkeypatch):
    run_dir, _ = finished
    monkeypatch.setattr(directory, "LOCK_PATIENCE_SECONDS", 0.1)
    kept = []  # as a notebook keeps the last error, with its frames
    for iterations in (13, 14):
        with pytest.raises(ConfigError, match="iterations 12 there") as error:
            train(tiny(compression_reg_weight=0.005, iterations=iterations), run_dir)
        kept.append(error)


def test_resume_refuses_other_data(embedded, tmp_path):
    knobs = dict(iterations=300, resume_every_seconds=0.01, val_loss_every=0)
    script = (
        "import sys, json; from pgolf_core.config import RunConfig; from pgolf.training.run import train;"
        "train(RunConfig(**json.loads(sys.argv[1])), sys.argv[2])"
    )
    words = [sys.executable, "-c", script, json.dumps(TINY | knobs), str(tmp_path / "run")]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    while not (tmp_path / "run" / "resume.pt").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    state = torch.load(tmp_path / "run" / "resume.pt", weights_only=True)
    torch.save(state | {"made_by": state["made_by"] | {"data": "other data"}}, tmp_path / "run" / "resume.pt")
    with pytest.raises(TrainError, match=r"resume\.pt: left by a run on other data"):
        train(tiny(**knobs), tmp_path / "run")


def test_divergence_after_the_last_logged_step_is_seen(embedded, tmp_path):
    hot = dict(matrix_lr=1e30, tied_embed_lr=1e30, scalar_lr=1e30, train_log_every=0, final_roundtrip_eval=False)
    with pytest.raises(TrainError, match="validation loss is nan at step"):
        train(tiny(**hot, val_loss_every=0), tmp_path / "run")
    assert not (tmp_path / "run" / "result.json").exists()


def test_bad_input_stops_before_any_work(embedded, tmp_path):
    with pytest.raises(DataError, match="vocab_size=512"):
        train(tiny(data_path=str(embedded), vocab_size=512), tmp_path / "vocabulary")
    with pytest.raises(DataError, match="data_path"):
        train(tiny(data_path=str(tmp_path / "nowhere")), tmp_path / "nowhere_run")
    with pytest.raises(DataError, match="is not the tokenizer of the shards"):
        other = golden_path("trace") / "sp1024.model"
        train(tiny(data_path=str(embedded), tokenizer_path=str(other)), tmp_path / "tokenizer")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="is a file"):
        train(tiny(), tmp_path / "file")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="device=cuda"):
            train(tiny(device="cuda"), tmp_path / "cuda")
        assert not (tmp_path / "cuda" / "metrics.jsonl").exists()
    assert not list(tmp_path.rglob("result.json"))


def test_divergence_is_said_and_leaves_no_result(embedded, tmp_path):
    with pytest.raises(TrainError, match="at step"):
        train(tiny(matrix_lr=1e30, tied_embed_lr=1e30, scalar_lr=1e30), tmp_path / "runs" / "hot")
    row = load_runs(tmp_path / "runs").iloc[0]
    assert row.status == "failed" and "TrainError" in row.problem and math.isnan(row.bpb or math.nan)


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
def test_a_kernel_ends_with_its_sweep(tmp_path):
    """The watch of runs.claim: a process whose sweep is gone does not train on."""
    sweep = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    script = (
        "import sys, time; from pgolf_core import runs; from pgolf_core.config import RunConfig\n"
        "with runs.claim(sys.argv[1], RunConfig()):\n    print(flush=True); time.sleep(60)"
    )
    kernel = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "run")],
        env=os.environ | {"PGOLF_SWEEP_PID": str(sweep.pid)}, stdout=subprocess.PIPE,
    )  # fmt: skip
    kernel.stdout.readline()
    sweep.kill()
    sweep.wait()
    assert kernel.wait(timeout=20) == 1
