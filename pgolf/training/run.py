"""train(): setup, the loop inline on one screen, export and score, result.json; and the entry point for torchrun."""

import argparse
import hashlib
import math
import os
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch
from tqdm import tqdm

from pgolf.disk import read_json
from pgolf.processes import SWEEP_PID
from pgolf.runs import directory
from pgolf.runs.directory import locked, run_name, write_environment
from pgolf.runs.result import ARTIFACT, CHECKPOINT, Result, evaluation_protocol, read_result, write_result
from pgolf.training import flops
from pgolf.training.device import cpu_threads
from pgolf.training.forecast import check, forecast_from
from pgolf.training.launch import is_echo, joined, launch, under_torchrun, write_end
from pgolf.training.log import bits_per_byte
from pgolf.training.resume import RESUME, TrainError, save_resume
from pgolf.training.round_trip import load_checkpoint, round_trip, roundtrip_fields, score_model
from pgolf.training.setup import Run, setup
from pgolf_core.config import RunConfig
from pgolf_core.distributed import Ranks
from pgolf_core.evaluate import evaluate
from pgolf_core.export import export_name
from pgolf_core.files import atomic_write
from pgolf_core.knobs import EvalConfig
from pgolf_core.optim import lr_factor
from pgolf_core.train import train_step

PATIENCE_SECONDS = 3.0  # other ranks wait this long while the failing one reports
EARLY_CHECK_FRACTION = 0.1  # share of training after which the size is estimated from the weights


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
        check({run_dir.name: config})  # before the directory exists, so that other knobs can still take its name
        if config.world_size > 1 and not under_torchrun():
            launch(config, run_dir, initial, say=tqdm.write)
            return read_result(run_dir)
    with joined(config.world_size, run_dir) as ranks:
        if ranks.first:
            with locked(run_dir, config):
                return _train_if_missing(config, run_dir, initial, ranks)
        return _train_if_missing(config, run_dir, initial, ranks)


def _train_if_missing(config: RunConfig, run_dir: Path, initial: dict | None, ranks: Ranks) -> Result:
    if (result := ranks.share(read_result(run_dir))) is not None:
        if ranks.first:
            (run_dir / RESUME).unlink(missing_ok=True)  # left by a kill right after result.json was written
        return result
    try:
        with cpu_threads(config.cpu_threads):
            if ranks.first:
                write_environment(run_dir, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
            run = setup(config, run_dir, ranks, initial)
            train_loop(run, config, config.eval)
            return finish(run, config)
    except Exception as error:
        write_end(run_dir, error)
        raise


def train_loop(run: Run, config: RunConfig, evaluation: EvalConfig) -> None:
    """Train until `iterations` or the wallclock limit; validate, log and checkpoint along the way."""
    state, timer, ranks, log = run.state, run.timer, run.ranks, run.log
    size_checked = run.early_bytes is not None
    sample = run.dataset.validation(config.train_seq_len, 65_536)
    tokens_per_byte = (len(sample) - 1) / run.dataset.byte_table.count(sample[:-1], sample[1:]).item()
    saved = time.perf_counter()
    timer.start()
    with log.progress_bar(state.step) as bar:
        while True:
            last = timer.expired or state.step == config.iterations
            if last or is_due(state.step, config.val_loss_every):
                with timer.excluded("validation"):
                    run.val = evaluate(
                        state.model, run.val_tokens, run.dataset.byte_table, evaluation, state.dtype, ranks
                    )
                    check_finite(run.val.val_loss, "validation", state.step)
                    log.validation(state.step, run.val, timer.trained_s)
            if last:
                break
            if not size_checked and timer.fraction(state.step, config.iterations) >= EARLY_CHECK_FRACTION:
                size_checked = True
                with timer.excluded("forecast"):
                    check_size_early(run, config)

            # No synchronization with the device from here to the log line.
            lr_scale = lr_factor(state.config, state.step, 1000 * timer.step_end_s, timer.calibration_reserve_s)
            with run.kernels():
                loss, penalty = train_step(state, lr_scale)
            bar.update()

            if is_due(state.step, config.train_log_every, first=10):
                seconds = timer.seconds()
                nats = ranks.add_(loss).item() / ranks.size
                check_finite(nats, "training", state.step)
                check_replicas(run)
                log.training(state.step, nats, penalty.item(), lr_scale, seconds, config.train_batch_tokens)
                bar.set_postfix(loss=f"{nats:.3f}", bpb=f"{bits_per_byte(nats, tokens_per_byte):.3f}")
            timer.update(state.step, ranks)
            if config.resume_every_seconds and time.perf_counter() - saved >= config.resume_every_seconds:
                with timer.excluded("resume files"):
                    saved = time.perf_counter()
                    save(run)
    if config.resume_every_seconds:
        save(run)  # scoring can be killed too


def is_due(step: int, every: int, first: int = 0) -> bool:
    """Every `every` steps, 0 = never; also at each of the first steps."""
    return bool(every and step and (step <= first or step % every == 0))


def check_finite(nats: float, what: str, step: int) -> None:
    if not math.isfinite(nats):
        raise TrainError(
            f"{what} loss is {nats} at step {step}; lower matrix_lr, scalar_lr or tied_embed_lr, or set grad_clip_norm"
        )


def check_replicas(run: Run) -> None:
    """TrainError if the ranks' weights differ: from then on only rank 0's would be saved, and all would train them."""
    if not run.ranks.hold_same(run.state.model.parameters()):
        raise TrainError(f"ranks hold different weights at step {run.state.step}; train with deterministic=1")


def check_size_early(run: Run, config: RunConfig) -> None:
    """Estimate the artifact from the weights so far; TrainError if all of the interval is over cap_bytes.

    Rank 0 decides for all, also whether the weights are finite and can be coded: if not, training will say so.
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
        run.ranks.share(None)  # no rank ends the run before the file is written
        raise TrainError(
            f"stopped at step {state.step}: forecast {estimate}, all of it over cap_bytes={config.cap_bytes}; "
            "with allow_over_cap=1 the same run goes on from here; other knobs are another run"
        )
    run.early_bytes = estimate.bytes


def save(run: Run) -> None:
    if run.ranks.first:
        parts = {"train": run.state, "timer": run.timer, "resumed": run.resumed, "early_bytes": run.early_bytes}
        save_resume(run.directory / RESUME, run.made_by, **parts)


def finish(run: Run, config: RunConfig) -> Result:
    """Save the checkpoint, export and score the file, write result.json, and drop the resume file."""
    state, timer, ranks, dataset, val = run.state, run.timer, run.ranks, run.dataset, run.val
    evaluation = config.eval
    weights = {name: t.detach().cpu().contiguous() for name, t in state.model.state_dict().items()}
    checkpoint_sha256 = None
    if config.save_raw_checkpoint and ranks.first:
        checkpoint = safetensors.torch.save(weights)
        atomic_write(run.directory / CHECKPOINT, checkpoint)
        checkpoint_sha256 = hashlib.sha256(checkpoint).hexdigest()
    tokens = state.step * config.train_batch_tokens
    result = Result(
        kind="train",
        config_hash=config.hash,
        seed=config.seed,
        track=config.track,
        val_loss=val.val_loss,
        val_bpb=val.val_bpb,
        val_tokens=val.tokens,
        val_bytes=val.bytes,
        checkpoint_sha256=checkpoint_sha256,
        cap_bytes=config.cap_bytes,
        forecast_bytes=run.expected.bytes,
        forecast_at_tenth=run.early_bytes,
        parameters=sum(p.numel() for p in state.model.parameters()),
        steps=state.step,
        tokens=tokens,
        stopped_by="wallclock" if timer.expired else "iterations",
        train_seconds=timer.trained_s,
        budget=timer.budget(),
        peak_memory_bytes=flops.peak_memory(state.device),
        flops_per_token=flops.flops_per_token(config),
        mfu=flops.utilisation(config, tokens, timer.trained_s, state.device),
        resumed=run.resumed,
        data_fingerprint=dataset.fingerprint,
        data=run.facts,
        protocol=evaluation_protocol(evaluation),
        environment=run.environment,
    )
    if config.final_roundtrip_eval:
        trip = round_trip(weights, config, dataset, run.directory / ARTIFACT, ranks=ranks)
        raw = val
        if trip.score.tokens != raw.tokens:
            raw = score_model(state.model, config, dataset, roundtrip=True, ranks=ranks)
        run.log.round_trip(trip, export_name(config.export))
        fields = roundtrip_fields(trip, raw.val_bpb, raw.block_nats, dataset, config.train_seq_len, evaluation)
        result = replace(result, budget=timer.budget(trip.calibration_seconds), **fields)
    run.log.budget(result.budget, result.overtime)
    if ranks.first:
        result = write_result(run.directory, result)
        (run.directory / RESUME).unlink(missing_ok=True)
    return ranks.share(result)


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
        run_dir = arguments.run_dir or directory.RUNS / "explore" / run_name(config)
        train(config, run_dir, load_checkpoint(arguments.initial) if arguments.initial else None)
    except Exception as error:
        return _end_rank(error, run_dir, first)
    if first and not os.environ.get(SWEEP_PID):  # the process that started torchrun prints it otherwise
        print(run_dir)
    return 0


def _end_rank(error: Exception, run_dir: Path, first: bool) -> int:
    """Say once what went wrong, and end the process under torchrun. Returns the exit status."""
    own = type(error).__module__.startswith(("pgolf.", "pgolf_core.", "__main__"))
    of_user = own or isinstance(error, FileNotFoundError)  # --config
    if first and is_echo(error):  # the rank that failed has left the cause
        left = read_json(run_dir / "error.json") or {"error": "RankError", "message": str(error)}
        print(f"pgolf: {left['error']}: {left['message']}", file=sys.stderr)
    elif of_user and first:
        print(f"pgolf: {error}", file=sys.stderr)
    elif not (of_user or is_echo(error)):
        if not under_torchrun():
            raise error
        traceback.print_exc()
    sys.stderr.flush()
    if is_echo(error) or not first:
        time.sleep(PATIENCE_SECONDS)  # let the failing rank exit first, so that torchrun reports the real cause
    if under_torchrun():
        os._exit(2)  # skip the shutdown of NCCL: it deadlocks while other ranks wait on this one
    return 2


if __name__ == "__main__":
    sys.exit(main())
