"""From knobs to a training that is ready for its first step, or for the step after its resume file."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pgolf.data.dataset import Dataset
from pgolf.runs.directory import describe_environment, outside_knobs
from pgolf.script.compile import packed_script
from pgolf.training.forecast import Forecast, forecast
from pgolf.training.inputs import check_scored, data_facts, open_dataset, part_read, scored_tokens, tokens_per_byte
from pgolf.training.log import Log
from pgolf.training.resume import RESUME, TrainError, check_resume, naming, read_resume
from pgolf.training.tensor_groups import idle_knobs, tensor_lines
from pgolf_core.batches import training_stream
from pgolf_core.config import RunConfig
from pgolf_core.device import deterministic_kernels, keep_freed_memory, not_compiled, pick_device, training_dtype
from pgolf_core.distributed import Ranks
from pgolf_core.evaluate import Score
from pgolf_core.export_inputs import reserve_seconds
from pgolf_core.optim import newton_schulz_dtype
from pgolf_core.timer import TrainTimer
from pgolf_core.train import TrainState, make_state, warm_up


@dataclass
class Run:
    """A training in progress: what a step needs (state) and what stands around it."""

    directory: Path
    ranks: Ranks
    dataset: Dataset
    facts: dict  # see data_facts
    state: TrainState
    timer: TrainTimer
    log: Log
    kernels: Callable[[], AbstractContextManager]  # see deterministic_kernels
    val_tokens: Tensor
    made_by: dict  # see check_resume
    environment: dict
    expected: Forecast
    tokens_per_byte: float
    forecast_at_tenth: int | None = None  # bytes estimated from early weights
    resumed: int = 0
    val: Score | None = None


def setup(config: RunConfig, run_dir: Path, ranks: Ranks, initial: dict[str, Tensor] | None) -> Run:
    """Open and check the data, build the model, warm up, reserve calibration time, and load the resume file."""
    train, seq_len, evaluation = config.train, config.train_seq_len, config.eval
    device = pick_device(train)
    dtype = training_dtype(train, device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.reset_peak_memory_stats(device)
    if device.type == "cpu":
        keep_freed_memory()
    if not ranks.first:
        ranks.barrier()  # rank 0 builds a missing embedded corpus
    dataset = open_dataset(config)
    if ranks.first:
        ranks.barrier()
    check_scored(dataset, seq_len, evaluation)  # before training is paid for
    facts, _ = data_facts(dataset, seq_len, evaluation)
    muon_dtype = newton_schulz_dtype(train.muon_dtype, device)
    environment = describe_environment(device) | {"training_dtype": str(dtype), "muon_dtype": str(muon_dtype)}
    made_by = {
        "data": dataset.fingerprint, "code": environment["code"], "device": device.type, "precision": str(dtype),
        "muon_dtype": str(muon_dtype), "commit": environment["git_commit"],
    }  # fmt: skip
    resume = ranks.share(read_resume(run_dir / RESUME) if ranks.first else None)
    if resume:
        check_resume(run_dir / RESUME, resume, made_by)
    log = Log(run_dir if ranks.first else None, resume["train"]["step"] if resume else 0, config)
    why_eager = not_compiled(train, device)
    stream = training_stream(dataset.train_shards, config.data, dataset.tokenizer.bos)
    state = make_state(config, stream, device, dtype, ranks, not why_eager, initial)
    run = Run(
        directory=run_dir, ranks=ranks, dataset=dataset, facts=facts, state=state, log=log, made_by=made_by,
        timer=TrainTimer(device, config.max_wallclock_seconds), environment=environment, expected=forecast(config),
        kernels=partial(deterministic_kernels, config.deterministic and device.type == "cuda"),
        val_tokens=scored_tokens(dataset, seq_len, evaluation), tokens_per_byte=tokens_per_byte(dataset, seq_len),
    )  # fmt: skip
    if ranks.first and config.final_roundtrip_eval:
        packed_script(config)  # an edit of the core that no script can hold is to be known before training is paid for
    _log_heading(run, config, why_eager, muon_dtype)
    if warmup_steps := max(config.warmup_steps, 0 if why_eager else 1):
        with run.timer.excluded("warmup"), run.kernels():
            warm_up(state, warmup_steps)
        log(f"warmup_steps:{warmup_steps} done and undone")
    _reserve_calibration(run, config, resume)
    if resume:
        with naming(run_dir / RESUME):
            state.load_state_dict(resume["train"])
            run.timer.load_state_dict(resume["timer"])
        run.resumed, run.forecast_at_tenth = resume["resumed"] + 1, resume["forecast_at_tenth"]
        log(f"resumed at step:{state.step} for the {run.resumed}. time")
    return run


def _log_heading(run: Run, config: RunConfig, why_eager: str, muon_dtype: torch.dtype) -> None:
    state, dataset, facts, log = run.state, run.dataset, run.facts, run.log
    parameters = sum(p.numel() for p in state.model.parameters())
    log(
        f"model:{config.num_layers}x{config.model_dim} params:{parameters} device:{state.device} dtype:{state.dtype} "
        f"threads:{torch.get_num_threads()}"
    )
    kernels = "deterministic" if config.deterministic or state.device.type == "cpu" else "fastest"
    compiled = f"off, {why_eager}" if why_eager else "on"
    log(f"compile:{compiled} kernels:{kernels} ranks:{run.ranks.size} muon:{muon_dtype}")
    log(f"data:{dataset.directory.name} fingerprint:{dataset.fingerprint[:12]} config:{config.hash}")
    if part := part_read(config, facts["train_tokens"]):
        log(f"warning:{part}")
    share = f"{facts['scored_fraction']:.2%} of the validation split is scored"
    once = [] if any(found.startswith(share) for found in facts["findings"]) else [share]
    log(f"audit:{facts['audit']}, {'; '.join([*once, *facts['findings']])}")
    if knobs := config.taken_from(outside_knobs()):
        log("environment:" + " ".join(f"{k}={v}" for k, v in sorted(knobs.items())))
    log(f"forecast:{run.expected.verdict(config.cap_bytes)}")
    for line in tensor_lines(state.model, config):
        log(line, shown=None)  # long, and the same for each run of a sweep
    for line in idle_knobs(config):
        log(line)


def _reserve_calibration(run: Run, config: RunConfig, resume: dict | None) -> None:
    """Keep time for calibration, which counts toward the limit: as in the resume file, else as rank 0 measures it."""
    timer, reserve = run.timer, 0.0
    if resume:
        with naming(run.directory / RESUME):
            reserve = resume["timer"]["calibration_reserve_s"]
    if run.ranks.first and not resume:
        weights, shards = run.state.model.state_dict(), run.dataset.train_shards
        reserve = reserve_seconds(weights, config, shards, run.state.device, timer)
    timer.calibration_reserve_s = run.ranks.share_float(reserve)
    if not timer.calibration_reserve_s:
        return
    if timer.calibration_reserve_s >= timer.limit_s:
        raise TrainError(
            f"max_wallclock_seconds={timer.limit_s:g}: calibration and learn_steps={config.learn_steps} alone take "
            f"{timer.calibration_reserve_s:.0f} s; lower calibration_tokens or learn_steps, or give them more time"
        )
    run.log(f"reserve:{timer.calibration_reserve_s:.1f}s of {timer.limit_s:g}s for calibration")
