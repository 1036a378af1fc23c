"""The loop, inline and visible: batches → forward, backward, regulariser, schedule, step, log → result."""

import argparse
import hashlib
import json
import math
import os
import sys
import time
import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
from tqdm import tqdm

from pgolf.cli.arguments import add_knobs, existing_file, knobs_of
from pgolf.processes import SWEEP_PID, interactive
from pgolf.runs import directory
from pgolf.runs.directory import locked, metric_rows, run_name, write_environment
from pgolf.runs.result import ARTIFACT, CHECKPOINT, Result, evaluation_protocol, read_json, read_result, write_result
from pgolf.training import flops
from pgolf.training.forecast import check, forecast, forecast_from
from pgolf.training.launch import is_echo, joined, launch, under_torchrun, write_end
from pgolf.training.round_trip import (
    RoundTrip,
    calibration_of,
    check_scored,
    cpu_threads,
    data_facts,
    deterministic_kernels,
    load_checkpoint,
    not_compiled,
    open_dataset,
    pick_device,
    pick_dtype,
    round_trip,
    roundtrip_fields,
    score_model,
    to_precision,
)
from pgolf.training.timer import Clock, seconds_since
from pgolf_core.batches import Batches, training_stream
from pgolf_core.config import RunConfig, environment_knobs
from pgolf_core.distributed import GradientSum, Ranks
from pgolf_core.export import scheme
from pgolf_core.files import atomic_path, atomic_write
from pgolf_core.model import GPT
from pgolf_core.optim import lr_factor, make_optimizers, muon_momentum, newton_schulz_dtype, step_optimizers
from pgolf_core.regularizers import CompressionRegularizer

RESUME = "resume.pt"
RESUME_FORMAT = 2
RESERVE = 1.25  # of the time that calibration takes before training is kept for it after
PATIENCE_SECONDS = 3.0  # that other ranks wait while the first one says what is wrong
TENTH = 0.1  # of the training: from there its size is forecast again


class TrainError(RuntimeError):
    """Training that cannot go on; the message says at which step and what to change."""


def train(config: RunConfig, run_dir: str | Path, initial: dict | None = None) -> Result:
    """Train, export, score the file, and leave it all in run_dir.

    A complete directory of the same knobs gives its stored result; an interrupted one goes on from its
    resume file and ends with the bytes of an undisturbed run. `initial` is a state dict to start from
    instead of the seeded one. With world_size > 1 that many processes are started here, unless torchrun started this
    one. Raises ConfigError, DataError, RunError, TrainError, RankError, or ForecastError when the artifact would be
    over the cap; a run that fails leaves error.json, and what it had.
    """
    run_dir = Path(run_dir)
    if read_result(run_dir) is None:
        check({run_dir.name: config})  # before there is a directory: other knobs may take its name
        if config.world_size > 1 and not under_torchrun():
            launch(config, run_dir, initial, say=tqdm.write)
            return read_result(run_dir)
    with joined(config, run_dir) as ranks:
        if ranks.first:
            with locked(run_dir, config):
                return _train_if_missing(config, run_dir, initial, ranks)
        return _train_if_missing(config, run_dir, initial, ranks)


def _train_if_missing(config: RunConfig, run_dir: Path, initial: dict | None, ranks: Ranks) -> Result:
    if (result := ranks.share(read_result(run_dir))) is not None:
        if ranks.first:
            (run_dir / RESUME).unlink(missing_ok=True)  # left by a kill between the two
        return result
    try:
        with cpu_threads(config):
            return _train(config, run_dir, initial, ranks)
    except Exception as error:
        write_end(run_dir, error)
        raise


def _train(config: RunConfig, run_dir: Path, initial: dict | None, ranks: Ranks) -> Result:
    if ranks.first:
        write_environment(run_dir, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    device = pick_device(config)
    dtype = pick_dtype(config, device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.reset_peak_memory_stats(device)
    if not ranks.first:
        ranks.share(None)  # rank 0 builds an embedded corpus that is not there yet
    dataset = open_dataset(config)
    if ranks.first:
        ranks.share(None)
    check_scored(config, dataset)  # before it is paid for
    facts, _ = data_facts(config, dataset)
    resume = ranks.share(_read_resume(run_dir / RESUME) if ranks.first else None)
    muon_dtype = newton_schulz_dtype(config.muon_dtype, device)
    made_by = [RESUME_FORMAT, dataset.fingerprint, device.type, str(dtype), str(muon_dtype)]
    if resume and resume["made_by"] != made_by:
        raise TrainError(
            f"{run_dir / RESUME}: left by a run on other data, device or precision, or by another version "
            f"({resume['made_by']}, now {made_by}); delete the run's directory to train anew"
        )
    log = _Log(run_dir if ranks.first else None, resume["step"] if resume else 0)

    torch.manual_seed(config.seed)
    model = GPT(config.model)
    if initial is not None:
        model.load_state_dict(initial)
    model.to(device)
    to_precision(model, dtype)
    optimizers = make_optimizers(model, config, ranks)
    gradients = GradientSum(model.parameters(), ranks)
    regularizer = CompressionRegularizer(model, config)
    stream = training_stream(dataset.train_shards, config.data, dataset.tokenizer.bos)
    batches = Batches(stream, config.data, ranks.rank, pin=device.type == "cuda")
    why_eager = not_compiled(config, device)
    # One graph, for one shape, so that nothing is compiled again while the clock runs. A graph that saw the table of
    # positions being made would hold for that first time only.
    model.positions(torch.empty(1, config.train_seq_len, 0, device=device))
    if not why_eager:
        torch._dynamo.reset()  # graphs of an earlier training of this process, of which it keeps eight at most
    loss_of = model.loss if why_eager else torch.compile(model.loss, fullgraph=True, dynamic=False)
    kernels = partial(deterministic_kernels, config.deterministic and device.type == "cuda")
    parameters = sum(p.numel() for p in model.parameters())
    shape = f"{config.num_layers}x{config.model_dim}"
    log(f"model:{shape} params:{parameters} device:{device} dtype:{dtype} threads:{torch.get_num_threads()}")
    alike = "deterministic" if config.deterministic or device.type == "cpu" else "fastest"
    log(f"compile:{f'off, {why_eager}' if why_eager else 'on'} kernels:{alike} ranks:{ranks.size} muon:{muon_dtype}")
    log(f"data:{dataset.directory.name} fingerprint:{dataset.fingerprint[:12]} config:{config.hash}")
    share = f"{facts['scored_fraction']:.2%} of the validation split scored"
    log(f"audit:{facts['audit']}, {share}{''.join(f'; {finding}' for finding in facts['findings'])}")
    if knobs := environment_knobs():
        log("environment:" + " ".join(f"{k}={v}" for k, v in sorted(knobs.items())))
    expected, at_tenth = forecast(config), None
    log(f"forecast:{expected.verdict(config.cap_bytes)}")

    def accumulate_gradients() -> torch.Tensor:
        """Forward and backward over the step's micro-batches, averaged over ranks; this rank's mean loss in nats."""
        total = torch.zeros((), device=device)
        for _ in range(config.data.grad_accum):
            x, y = batches.next()
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                loss = loss_of(x, y) / config.data.grad_accum
            loss.backward()
            gradients.add()
            total += loss.detach()
        gradients.finish()
        return total

    clock = Clock(device, config.max_wallclock_seconds)
    warmup_steps = max(config.warmup_steps, 0 if why_eager else 1)
    if warmup_steps:
        # Builds kernels and allocates before the clock starts; then everything is as if it had not been.
        with clock.stopped("warmup"):
            before = {k: v.clone() for k, v in model.state_dict().items()}
            with kernels():
                for _ in range(warmup_steps):
                    accumulate_gradients()
                    step_optimizers(optimizers, 1.0, config.muon_momentum)
            model.load_state_dict(before)
            optimizers = make_optimizers(model, config, ranks)
            batches.seek(stream.start)
        log(f"warmup_steps:{warmup_steps} done and undone")
    # The clock counts reading training text for the export too: time is kept for it, as long as it takes now.
    if config.max_wallclock_seconds and config.final_roundtrip_eval and config.export.needs_calibration:
        reserve = 0.0
        if ranks.first:
            calibration_of(
                model.state_dict(), config.with_knobs(calibration_tokens=1), dataset, device
            )  # builds kernels
            with clock.stopped("warmup"):
                began = time.perf_counter()
                calibration_of(model.state_dict(), config, dataset, device)
                reserve = RESERVE * seconds_since(began, device)
        clock.reserve = resume["reserve"] if resume else ranks.clock(reserve)
        if clock.reserve >= clock.of:
            raise TrainError(
                f"max_wallclock_seconds={clock.of:g}: calibration alone takes {clock.reserve:.0f} s; "
                "lower calibration_tokens, or give it more time"
            )
        log(f"reserve:{clock.reserve:.1f}s of {clock.of:g}s for calibration")

    step, resumed, last_val = 0, 0, None
    if resume:
        model.load_state_dict(resume["model"])
        for optimizer, state in zip(optimizers, resume["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        batches.seek(resume["position"])
        step, resumed, at_tenth = resume["step"], resume["resumed"] + 1, resume["forecast_at_tenth"]
        clock.resume(resume)
        log(f"resumed at step:{step} for the {resumed}. time")

    def save_resume() -> None:
        if not ranks.first:
            return
        with atomic_path(run_dir / RESUME) as path:
            torch.save(
                {
                    "model": model.state_dict(),
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                    "position": list(batches.position),
                    "step": step,
                    "resumed": resumed,
                    "forecast_at_tenth": at_tenth,
                    "made_by": made_by,
                    **clock.state(),
                },
                path,
            )

    sample = dataset.validation(config.train_seq_len, 65_536)
    tokens_a_byte = (len(sample) - 1) / dataset.byte_table.count(sample[:-1], sample[1:]).item()
    saved = time.perf_counter()
    # In a notebook the bar goes where the lines go, so that one does not break up the other.
    stream_of_bar = sys.stdout if "ipykernel" in sys.modules else sys.stderr
    watched = ranks.first and interactive()
    clock.start()
    with tqdm(total=config.iterations, initial=step, unit="step", file=stream_of_bar, disable=not watched) as bar:
        while True:
            last = clock.ran_out or step == config.iterations
            if last or (config.val_loss_every and step and step % config.val_loss_every == 0):
                with clock.stopped("validation"):
                    last_val = score_model(model, config, dataset, ranks=ranks)
                    _check_finite(last_val.val_loss, "validation", step)
                    trained = clock.trained
                    log(
                        f"step:{step}/{config.iterations} val_loss:{last_val.val_loss:.4f} "
                        f"val_bpb:{last_val.val_bpb:.4f} train_time:{1000 * trained:.0f}ms "
                        f"step_avg:{1000 * trained / max(step, 1):.2f}ms",
                        step=step, val_loss=last_val.val_loss, val_bpb=last_val.val_bpb, train_seconds=trained,
                    )  # fmt: skip
            if last:
                break
            fraction = clock.fraction(step, config.iterations)
            if at_tenth is None and fraction >= TENTH and all(p.isfinite().all() for p in model.parameters()):
                with clock.stopped("forecast"):
                    of_now = forecast_from(model.state_dict(), config, fraction, step) if ranks.first else None
                    seen = ranks.share(of_now)
                    log(f"step:{step}/{config.iterations} forecast:{seen.verdict(config.cap_bytes)}")
                    if seen.low > config.cap_bytes and config.final_roundtrip_eval and not config.allow_over_cap:
                        save_resume()
                        ranks.share(None)  # all wait for the file before any of them ends the run
                        raise TrainError(
                            f"stopped at step {step}: forecast {seen}, all of it over cap_bytes={config.cap_bytes}; "
                            "with allow_over_cap=1 the same run goes on from here; other knobs are another run"
                        )
                    at_tenth = seen.bytes

            # From here to the log line nothing waits for the device.
            factor = lr_factor(config, step, 1000 * clock.reading, clock.reserve)
            with kernels():
                loss = accumulate_gradients()
                penalty, sampled = regularizer(step)
                if sampled:
                    (config.compression_reg_weight * penalty).backward()
                if config.grad_clip_norm:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip_norm)
                step_optimizers(optimizers, factor, muon_momentum(config, step))
            step += 1
            bar.update()

            if config.train_log_every and (step <= 10 or step % config.train_log_every == 0):
                seconds = clock.seconds()
                nats, reg = ranks.add_(loss).item() / ranks.size, penalty.item()
                _check_finite(nats, "training", step)
                rate = step * config.train_batch_tokens / seconds
                log(
                    f"step:{step}/{config.iterations} train_loss:{nats:.4f} train_time:{1000 * seconds:.0f}ms "
                    f"step_avg:{1000 * seconds / step:.2f}ms comp_reg:{reg:.6f}",
                    step=step, train_loss=nats, comp_reg=reg, lr_factor=factor, train_seconds=seconds,
                    tokens_per_second=rate,
                )  # fmt: skip
                bpb = nats / math.log(2) * tokens_a_byte
                bar.set_postfix(loss=f"{nats:.3f}", bpb=f"{bpb:.3f}", tok_s=f"{rate:.0f}")
            clock.read(step, ranks)
            if (
                ranks.first
                and config.resume_every_seconds
                and time.perf_counter() - saved >= config.resume_every_seconds
            ):
                with clock.stopped("resume files"):
                    saved = time.perf_counter()
                    save_resume()

    if config.resume_every_seconds:
        save_resume()  # scoring can be killed too
    state = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    checkpoint_sha256 = None
    if config.save_raw_checkpoint and ranks.first:
        checkpoint = safetensors.torch.save(state)
        atomic_write(run_dir / CHECKPOINT, checkpoint)
        checkpoint_sha256 = hashlib.sha256(checkpoint).hexdigest()
    tokens = step * config.train_batch_tokens
    result = Result(
        kind="train",
        config_hash=config.hash,
        seed=config.seed,
        track=config.track,
        val_loss=last_val.val_loss,
        val_bpb=last_val.val_bpb,
        val_tokens=last_val.tokens,
        val_bytes=last_val.bytes,
        checkpoint_sha256=checkpoint_sha256,
        cap_bytes=config.cap_bytes,
        forecast_bytes=expected.bytes,
        forecast_at_tenth=at_tenth,
        parameters=parameters,
        steps=step,
        tokens=tokens,
        stopped_by="wallclock" if clock.ran_out else "iterations",
        train_seconds=clock.trained,
        budget=clock.budget(),
        peak_memory_bytes=flops.peak_memory(device),
        flops_per_token=flops.flops_a_token(config),
        mfu=flops.utilisation(config, tokens, clock.trained, device),
        resumed=resumed,
        data_fingerprint=dataset.fingerprint,
        data=facts,
        protocol=evaluation_protocol(config),
        environment=directory.describe_environment(device),
    )
    if config.final_roundtrip_eval:
        trip = round_trip(state, config, dataset, run_dir / ARTIFACT, ranks=ranks)
        raw = last_val
        if trip.score.tokens != raw.tokens:
            raw = score_model(model, config, dataset, roundtrip=True, ranks=ranks)
        _log_round_trip(trip, config, log)
        account = clock.budget(trip.calibration_seconds)
        fields = roundtrip_fields(trip, raw.val_bpb, raw.block_nats, dataset, config)
        result = replace(result, budget=account, **fields)
    if clock.of:
        account = result.budget
        read = f"{account['train']:.1f}s training + {account['calibration']:.1f}s calibration"
        log(f"clock:{read} of {account['limit']:g}s")
        if result.overtime:
            log(f"over the clock by {result.overtime:.1f} s")
    if ranks.first:
        result = write_result(run_dir, result)
        (run_dir / RESUME).unlink(missing_ok=True)
    return ranks.share(result)


def _log_round_trip(trip: RoundTrip, config: RunConfig, log) -> None:
    account, score = trip.account, trip.score
    name = scheme(config.export)
    codec = name.replace("_", "+")
    log(f"Serialized model {codec}: {account.artifact} bytes (payload:{account.payload})")
    log(f"Total submission size {codec}: {account.total} bytes (code:{account.code} cap:{account.cap})")
    if not account.fits:
        log(f"over the cap by {account.total - account.cap} bytes")
    log(f"final_{name}_roundtrip_exact val_loss:{score.val_loss:.8f} val_bpb:{score.val_bpb:.8f}")


class _Log:
    """Lines for the reader (log.txt, screen) and rows for the plots (metrics.jsonl), each whole at once."""

    def __init__(self, run_dir: Path | None, resume_step: int):
        self.silent = run_dir is None  # of another rank than the first
        if self.silent:
            return
        self.text = run_dir / "log.txt"
        self.rows = run_dir / "metrics.jsonl"
        if not resume_step:
            self.text.unlink(missing_ok=True)
        # What the killed training wrote after its last resume file will be written again.
        kept = [row for row in metric_rows(run_dir) if _before(row, resume_step)]
        atomic_write(self.rows, "".join(json.dumps(row) + "\n" for row in kept))

    def __call__(self, line: str, **row: float) -> None:
        if self.silent:
            return
        tqdm.write(line)
        with open(self.text, "a", encoding="utf-8", newline="\n") as f:
            f.write(line + "\n")
        if row:
            with open(self.rows, "a", encoding="utf-8", newline="\n") as f:
                f.write(json.dumps(row) + "\n")


def _check_finite(nats: float, what: str, step: int) -> None:
    if not math.isfinite(nats):
        raise TrainError(
            f"{what} loss is {nats} at step {step}; lower matrix_lr, scalar_lr or tied_embed_lr, or set grad_clip_norm"
        )


def _before(row: dict, resume_step: int) -> bool:
    """A step resumed at is trained, but not yet validated again."""
    return row["step"] < resume_step or (row["step"] == resume_step and "val_bpb" not in row)


def _read_resume(path: Path) -> dict | None:
    return torch.load(path, weights_only=True, map_location="cpu") if path.exists() else None


def main(words: list[str] | None = None) -> int:
    """`torchrun --nproc_per_node=8 -m pgolf.training.run --config FILE`: one of its processes; the only one without."""
    parser = argparse.ArgumentParser(prog="python -m pgolf.training.run", description=__doc__)
    parser.add_argument("--config", type=existing_file, metavar="FILE", help="knobs as YAML or JSON")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="default: runs/explore/<track>-<hash of the knobs>")
    parser.add_argument("--initial", type=existing_file, metavar="FILE", help="checkpoint.safetensors to start from")
    add_knobs(parser)
    arguments = parser.parse_args(words)
    run_dir = Path()
    first = not under_torchrun() or os.environ["RANK"] == "0"
    try:
        knobs = knobs_of(arguments.knobs)
        config = RunConfig.from_file(arguments.config, **knobs) if arguments.config else RunConfig(**knobs)
        run_dir = arguments.run_dir or directory.RUNS / "explore" / run_name(config)
        train(config, run_dir, load_checkpoint(arguments.initial) if arguments.initial else None)
    except Exception as error:
        of_user = type(error).__module__.startswith(("pgolf.", "pgolf_core.", "__main__"))
        if first and is_echo(error):  # what ended the other rank it has left
            left = read_json(run_dir / "error.json") or {"error": "RankError", "message": str(error)}
            print(f"pgolf: {left['error']}: {left['message']}", file=sys.stderr)
        elif of_user and first:
            print(f"pgolf: {error}", file=sys.stderr)
        elif not (of_user or is_echo(error)):
            if not under_torchrun():
                raise
            traceback.print_exc()
        sys.stderr.flush()
        if is_echo(error) or not first:
            time.sleep(PATIENCE_SECONDS)  # torchrun is to see first what ended first, and the first rank to say it
        if under_torchrun():  # without the end of NCCL, which waits for ranks that wait for this one
            os._exit(2)
        return 2
    if first and not os.environ.get(SWEEP_PID):  # who started torchrun says it
        print(run_dir)
    return 0


if __name__ == "__main__":
    sys.exit(main())
