"""Train a run: set up, loop, export, score, write result.json. Under torchrun each rank starts in main()."""

import argparse
import hashlib
import math
import os
import sys
import time
import traceback
import warnings
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch
from tqdm import tqdm

from pgolf.disk import explain_disk_errors
from pgolf.processes import SWEEP_PID
from pgolf.runs import directory
from pgolf.runs.code import other_code
from pgolf.runs.directory import locked, run_name, why_it_failed, write_environment
from pgolf.runs.result import ARTIFACT, CHECKPOINT, Result, evaluation_protocol, read_result, write_result
from pgolf.training import flops
from pgolf.training.forecast import check, forecast_from
from pgolf.training.launch import is_secondary_error, joined, launch, write_end
from pgolf.training.resume import RESUME, TrainError, save_resume
from pgolf.training.round_trip import load_checkpoint, round_trip, roundtrip_fields, score_model
from pgolf.training.setup import Run, setup
from pgolf_core.config import RunConfig
from pgolf_core.device import cpu_threads, pick_dtype
from pgolf_core.distributed import Ranks, under_torchrun
from pgolf_core.evaluate import evaluate
from pgolf_core.export import export_name
from pgolf_core.files import atomic_write
from pgolf_core.optim import lr_factor
from pgolf_core.train import train_step

ERROR_REPORT_SECONDS = 3.0  # other ranks wait while the failing one reports
EARLY_CHECK_FRACTION = 0.1  # share of training, see check_size_early


def train(config: RunConfig, run_dir: str | Path, initial: dict | None = None) -> Result:
    """Train, export, score the file, and leave everything in run_dir.

    A complete directory of the same knobs returns its stored result; an interrupted one continues from its resume
    file and ends with the bytes of an undisturbed run. initial: a state dict to start from instead of seeded weights.
    With world_size > 1 that many processes are started here, unless torchrun started this one. Raises ConfigError,
    DataError, RunError, TrainError, RankError, or ForecastError if the artifact would be over the cap; a failed run
    leaves error.json, and its log.
    """
    run_dir = Path(run_dir)
    if read_result(run_dir) is None:
        check({run_dir.name: config})  # other knobs can still take the directory's name
        if config.world_size > 1 and not under_torchrun():
            launch(config, run_dir, initial, say=tqdm.write)
            return read_result(run_dir)
    with (
        explain_disk_errors(run_dir),
        joined(config.world_size, run_dir) as ranks,
        locked(run_dir, config) if ranks.first else nullcontext(),
    ):
        return _train_if_missing(config, run_dir, initial, ranks)


def _train_if_missing(config: RunConfig, run_dir: Path, initial: dict | None, ranks: Ranks) -> Result:
    if (result := ranks.share(read_result(run_dir))) is not None:
        if ranks.first:
            (run_dir / RESUME).unlink(missing_ok=True)  # left by a kill right after result.json was written
            if made := other_code(result):
                tqdm.write(f"{run_dir.name}: complete, {made}; to train it anew, name another run or delete {run_dir}")
        return result
    try:
        with cpu_threads(config.cpu_threads):
            if ranks.first:
                write_environment(run_dir, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
            run = setup(config, run_dir, ranks, initial)
            with run.log:
                train_loop(run, config)
                return finish(run, config)
    except Exception as error:
        with suppress(OSError):  # a full disk has no room for the reason either
            write_end(run_dir, error)
        raise


def train_loop(run: Run, config: RunConfig) -> None:
    """Train until `iterations` or the wallclock limit; validate, log and checkpoint along the way."""
    state, timer, ranks, log = run.state, run.timer, run.ranks, run.log
    evaluation, dtype = config.eval, pick_dtype(config.train, state.device)
    size_checked = run.forecast_at_tenth is not None
    saved = time.perf_counter()
    timer.start()
    with log.progress_bar(state.step) as bar:
        while True:
            last = timer.expired or state.step == config.iterations
            if last and config.loop_extra and not state.model.looping:
                log(f"warning:loop_from={config.loop_from:g} was not reached: scored with loops that were not trained")
            state.reach(1.0 if last else timer.fraction(state.step, config.iterations))
            if last or is_due(state.step, config.val_loss_every):
                with timer.excluded("validation"):
                    check_same(run)
                    run.val = evaluate(state.model, run.val_tokens, run.dataset.byte_table, evaluation, dtype, ranks)
                    check_finite(run.val.val_loss, "validation", state.step)
                    log.validation(state.step, run.val, timer.trained_s)
            if last:
                break
            if not size_checked and state.fraction >= EARLY_CHECK_FRACTION:
                size_checked = True
                with timer.excluded("forecast"):
                    check_size_early(run, config)

            # No synchronization with the device from here to the log line.
            lr_scale = lr_factor(state.config, state.step, timer.step_end_s, timer.calibration_reserve_s)
            with run.kernels():
                loss, penalty = train_step(state, lr_scale)
            bar.update()

            if is_due(state.step, config.train_log_every, first=10):
                seconds = timer.seconds()
                nats = ranks.add_(loss).item() / ranks.size
                check_finite(nats, "training", state.step)
                check_same(run)
                log.training(state.step, nats, penalty.item(), lr_scale, seconds, state.batches.tokens)
                bpb, left = nats / math.log(2) * run.tokens_per_byte, log.time_left(state.step, seconds)
                bar.set_postfix(loss=f"{nats:.3f}", bpb=f"{bpb:.3f}", left=left)
            timer.update(state.step, ranks)
            if config.resume_every_seconds and time.perf_counter() - saved >= config.resume_every_seconds:
                with timer.excluded("resume files"):
                    saved = time.perf_counter()
                    save(run)
    if config.resume_every_seconds:
        save(run)  # scoring can be killed too


def score_average(run: Run, config: RunConfig) -> dict:
    """Put the average, if there is one, in place of the raw weights and score it; the fields that say so."""
    state, raw = run.state, run.val
    if state.average is None or not state.average.count:
        if config.swa_every:
            run.log(f"warning:swa_every={config.swa_every} averaged nothing in {state.step} steps: raw weights scored")
        return dict(weights="raw")
    state.average.replace_weights()
    dtype = pick_dtype(config.train, state.device)
    run.val = evaluate(state.model, run.val_tokens, run.dataset.byte_table, config.eval, dtype, run.ranks)
    check_finite(run.val.val_loss, "validation", state.step)
    run.log(f"weights:{state.average} val_bpb:{run.val.val_bpb:.4f} raw_val_bpb:{raw.val_bpb:.4f}")
    return dict(weights=str(state.average), raw_val_bpb=raw.val_bpb)


def is_due(step: int, every: int, first: int = 0) -> bool:
    """True at every `every`-th step (0 = never) and at each of the steps 1 to `first`."""
    return bool(every and step and (step <= first or step % every == 0))


def check_finite(nats: float, what: str, step: int) -> None:
    """TrainError saying which knobs to change if a loss is infinite or nan."""
    if not math.isfinite(nats):
        raise TrainError(
            f"{what} loss is {nats} at step {step}; lower matrix_lr, scalar_lr or tied_embed_lr, or set grad_clip_norm"
        )


def check_same(run: Run) -> None:
    """TrainError, on every rank at once, if their weights differ in a bit; a nan on one rank is such a difference."""
    if not run.ranks.hold_same(run.state.model.parameters()):  # only rank 0's would be saved
        raise TrainError(f"ranks hold different weights at step {run.state.step}; train with deterministic=1")


def check_size_early(run: Run, config: RunConfig) -> None:
    """Estimate the artifact from the weights so far; TrainError if all of the interval is over cap_bytes.

    Rank 0 decides for all ranks. It skips weights that are not finite: the next loss stops the training.
    """
    state, estimate = run.state, None
    if run.ranks.first and all(p.isfinite().all() for p in state.model.parameters()):
        fraction = run.timer.fraction(state.step, config.iterations)
        estimate = forecast_from(state.model.state_dict(), config, fraction, state.step)
    estimate = run.ranks.share(estimate)
    if estimate is None:
        return
    run.log(f"step:{state.step}/{config.iterations} forecast:{estimate.verdict(config.cap_bytes)}")
    if estimate.low > config.cap_bytes and config.final_roundtrip_eval and not config.allow_over_cap:
        save(run)
        run.ranks.barrier()  # no rank ends the run before the file is written
        raise TrainError(
            f"stopped at step {state.step}: forecast {estimate}, all of it over cap_bytes={config.cap_bytes}; "
            "with allow_over_cap=1 the same run goes on from here; other knobs are another run"
        )
    run.forecast_at_tenth = estimate.bytes


def save(run: Run) -> None:
    """Write the resume file, on rank 0."""
    if run.ranks.first:
        numbers = {"resumed": run.resumed, "forecast_at_tenth": run.forecast_at_tenth}
        save_resume(run.directory / RESUME, run.made_by, train=run.state, timer=run.timer, **numbers)


def finish(run: Run, config: RunConfig) -> Result:
    """Save the checkpoint, export and score the file, write result.json, and drop the resume file."""
    state, ranks, dataset = run.state, run.ranks, run.dataset
    scored, prequant = score_average(run, config), run.val
    weights = {name: t.detach().cpu().contiguous() for name, t in state.model.state_dict().items()}
    result = replace(_train_result(run, config), **scored)
    if config.save_raw_checkpoint and ranks.first:
        checkpoint = safetensors.torch.save(weights)
        atomic_write(run.directory / CHECKPOINT, checkpoint)
        result = replace(result, checkpoint_sha256=hashlib.sha256(checkpoint).hexdigest())
    if config.final_roundtrip_eval:
        with warnings.catch_warnings(record=True) as remarks:
            warnings.simplefilter("always")
            trip = round_trip(weights, config, dataset, run.directory / ARTIFACT, ranks=ranks)
        for remark in dict.fromkeys(str(remark.message) for remark in remarks):
            run.log(f"warning:{remark}")
        if trip.score.tokens != prequant.tokens:
            prequant = score_model(state.model, config, dataset, roundtrip=True, ranks=ranks)
        run.log.round_trip(trip, export_name(config.export), prequant)
        fields = roundtrip_fields(trip, prequant.val_bpb, prequant.block_nats, dataset, config)
        result = replace(result, budget=run.timer.budget(trip.calibration_seconds), **fields)
    run.log.budget(result.budget, result.overtime)
    if ranks.first:
        result = write_result(run.directory, result)
        (run.directory / RESUME).unlink(missing_ok=True)
    return ranks.share(result)


def _train_result(run: Run, config: RunConfig) -> Result:
    """The fields that training decides, without checkpoint and file."""
    state, timer, val = run.state, run.timer, run.val
    tokens = state.batches.tokens
    return Result(
        kind="train", config_hash=config.hash, seed=config.seed, track=config.track, cap_bytes=config.cap_bytes,
        val_loss=val.val_loss, val_bpb=val.val_bpb, val_tokens=val.tokens, val_bytes=val.bytes,
        forecast_bytes=run.expected.bytes, forecast_at_tenth=run.forecast_at_tenth,
        parameters=sum(p.numel() for p in state.model.parameters()), steps=state.step, tokens=tokens,
        stopped_by="wallclock" if timer.expired else "iterations", resumed=run.resumed,
        train_seconds=timer.trained_s, budget=timer.budget(), peak_memory_bytes=flops.peak_memory(state.device),
        flops_per_token=flops.flops_per_token(config),
        mfu=flops.utilisation(config, tokens, timer.trained_s, state.device),
        data_fingerprint=run.dataset.fingerprint, data=run.facts,
        protocol=evaluation_protocol(config.eval, config.train, state.device.type), environment=run.environment,
    )  # fmt: skip


def main(words: list[str] | None = None) -> int:
    """`torchrun --nproc_per_node=8 -m pgolf.training.run --config FILE`: one of its processes, or a run without it."""
    parser = argparse.ArgumentParser(prog="python -m pgolf.training.run", description=main.__doc__)
    parser.add_argument("--config", type=Path, metavar="FILE", help="knobs as YAML or JSON")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="default: runs/explore/<track>-<hash of the knobs>")
    parser.add_argument("--initial", type=Path, metavar="FILE", help="checkpoint.safetensors to start from")
    parser.add_argument("-k", dest="knobs", action="append", default=[], metavar="NAME=VALUE", help="set a knob")
    arguments = parser.parse_args(words)
    run_dir = Path()
    first = not under_torchrun() or os.environ["RANK"] == "0"
    try:
        knobs = dict(pair.partition("=")[::2] for pair in arguments.knobs)
        config = RunConfig.from_file(arguments.config, **knobs) if arguments.config else RunConfig(**knobs)
        explore = directory.RUNS / "explore"
        run_dir = arguments.run_dir or explore / run_name(config, explore)
        train(config, run_dir, load_checkpoint(arguments.initial) if arguments.initial else None)
    except Exception as error:
        return _end_rank(error, run_dir, first)
    if first and not os.environ.get(SWEEP_PID):  # the process that started torchrun prints it otherwise
        print(run_dir)
    return 0


def _end_rank(error: Exception, run_dir: Path, first: bool) -> int:
    """Say once what went wrong, and end the process under torchrun. Returns the exit status."""
    secondary = is_secondary_error(error)
    of_user = type(error).__module__.startswith(("pgolf.", "pgolf_core.", "__main__"))
    if secondary or of_user or isinstance(error, FileNotFoundError):  # --config
        if first:
            print(f"pgolf: {(secondary and why_it_failed(run_dir)) or error}", file=sys.stderr)
    elif under_torchrun():
        traceback.print_exc()
    else:
        raise error
    sys.stderr.flush()
    if secondary or not first:
        time.sleep(ERROR_REPORT_SECONDS)  # torchrun reports the rank that exits first
    if under_torchrun():
        os._exit(2)  # NCCL's shutdown deadlocks while other ranks wait
    return 2


if __name__ == "__main__":
    sys.exit(main())
