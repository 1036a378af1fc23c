"""The loop, inline and visible: batches → forward, backward, regulariser, schedule, step, log → result."""

import hashlib
import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch
from tqdm import tqdm

from pgolf_core import runs
from pgolf_core.config import ConfigError, RunConfig, environment_knobs
from pgolf_core.export import scheme
from pgolf_core.files import whole_file, write_whole
from pgolf_core.forecast import check, forecast, forecast_from
from pgolf_core.loader import Batches, training_stream
from pgolf_core.model import GPT
from pgolf_core.optim import lr_factor, make_optimizers, muon_momentum, step_optimizers
from pgolf_core.regularizers import CompressionRegularizer
from pgolf_core.roundtrip import (
    check_scored,
    cpu_threads,
    data_facts,
    open_dataset,
    pick_device,
    pick_dtype,
    round_trip,
    roundtrip_fields,
    score_model,
    to_precision,
)
from pgolf_core.slot import interactive

RESUME = "resume.pt"
TENTH = 0.1  # of the training: from there its size is forecast again


class TrainError(RuntimeError):
    """Training that cannot go on; the message says at which step and what to change."""


def train(config: RunConfig, run_dir: str | Path, initial: dict | None = None) -> runs.Result:
    """Train, export, score the file, and leave it all in run_dir.

    A complete directory of the same knobs gives its stored result; an interrupted one goes on from its
    resume file and ends with the bytes of an undisturbed run. `initial` is a state dict to start from
    instead of the seeded one. Raises ConfigError, DataError, RunError, TrainError, or ForecastError when the
    artifact would be over the cap; a run that fails leaves error.json, and what it had.
    """
    if config.world_size > 1:
        raise ConfigError(f"world_size={config.world_size}: train() runs in one process; unset WORLD_SIZE")
    if runs.read_result(run_dir) is None:
        check({Path(run_dir).name: config})  # before there is a directory: other knobs may take its name
    with runs.claim(run_dir, config) as run_dir:
        if (result := runs.read_result(run_dir)) is not None:
            (run_dir / RESUME).unlink(missing_ok=True)  # left by a kill between the two
            return result
        try:
            with cpu_threads(config):
                return _train(config, run_dir, initial)
        except Exception as error:
            runs.write_failure(run_dir, error)
            raise


def _train(config: RunConfig, run_dir: Path, initial: dict | None) -> runs.Result:
    device = pick_device(config)
    dtype = pick_dtype(config, device)
    dataset = open_dataset(config)
    check_scored(config, dataset)  # before it is paid for
    facts, _ = data_facts(config, dataset)
    resume = _read_resume(run_dir / RESUME)
    log = _Log(run_dir, resume["step"] if resume else 0)

    torch.manual_seed(config.seed)
    model = GPT(config.model)
    if initial is not None:
        model.load_state_dict(initial)
    model.to(device)
    to_precision(model, dtype)
    optimizers = make_optimizers(model, config)
    regularizer = CompressionRegularizer(model, config)
    stream = training_stream(dataset.train_shards, config.data, dataset.tokenizer.bos)
    batches = Batches(stream, config.data, pin=device.type == "cuda")
    loss_of = torch.compile(model.loss) if config.compile else model.loss
    parameters = sum(p.numel() for p in model.parameters())
    shape = f"{config.num_layers}x{config.model_dim}"
    log(f"model:{shape} params:{parameters} device:{device} dtype:{dtype} threads:{torch.get_num_threads()}")
    log(f"data:{dataset.directory.name} fingerprint:{dataset.fingerprint[:12]} config:{config.hash}")
    share = f"{facts['scored_fraction']:.2%} of the validation split scored"
    log(f"audit:{facts['audit']}, {share}{''.join(f'; {finding}' for finding in facts['findings'])}")
    if knobs := environment_knobs():
        log("environment:" + " ".join(f"{k}={v}" for k, v in sorted(knobs.items())))
    expected, at_tenth = forecast(config), None
    log(f"forecast:{expected.verdict(config.cap_bytes)}")

    def accumulate_gradients() -> torch.Tensor:
        """Forward and backward over the step's micro-batches; mean task loss in nats."""
        total = torch.zeros((), device=device)
        for _ in range(config.data.grad_accum):
            x, y = batches.next()
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                loss = loss_of(x, y) / config.data.grad_accum
            loss.backward()
            total += loss.detach()
        return total

    if config.warmup_steps:
        # Builds kernels and allocates before the clock starts; then everything is as if it had not been.
        before = {k: v.clone() for k, v in model.state_dict().items()}
        for _ in range(config.warmup_steps):
            accumulate_gradients()
            step_optimizers(optimizers, 1.0, config.muon_momentum)
        model.load_state_dict(before)
        optimizers = make_optimizers(model, config)
        batches.seek(stream.start)
        log(f"warmup_steps:{config.warmup_steps} done and undone")

    step, elapsed, resumed, last_val = 0, 0.0, 0, None
    made_by = [dataset.fingerprint, device.type, str(dtype)]
    if resume:
        if resume["made_by"] != made_by:
            raise TrainError(
                f"{run_dir / RESUME}: left by a run on other data, device or precision ({resume['made_by']}, "
                f"now {made_by}); delete the run's directory to train anew"
            )
        model.load_state_dict(resume["model"])
        for optimizer, state in zip(optimizers, resume["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        batches.seek(resume["position"])
        step, elapsed, resumed = resume["step"], resume["elapsed"], resume["resumed"] + 1
        at_tenth = resume["forecast_at_tenth"]
        log(f"resumed at step:{step} for the {resumed}. time")

    def save_resume() -> None:
        with whole_file(run_dir / RESUME) as path:
            torch.save(
                {
                    "model": model.state_dict(),
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                    "position": list(batches.position),
                    "step": step,
                    "elapsed": elapsed,
                    "resumed": resumed,
                    "forecast_at_tenth": at_tenth,
                    "made_by": made_by,
                },
                path,
            )

    sample = dataset.validation(config.train_seq_len, 65_536)
    tokens_a_byte = (len(sample) - 1) / dataset.byte_table.count(sample[:-1], sample[1:]).item()
    clock_ran_out = 0 < config.max_wallclock_seconds <= elapsed  # resumed after the last step
    started = saved = time.perf_counter()
    # In a notebook the bar goes where the lines go, so that one does not break up the other.
    stream_of_bar = sys.stdout if "ipykernel" in sys.modules else sys.stderr
    with tqdm(total=config.iterations, initial=step, unit="step", file=stream_of_bar, disable=not interactive()) as bar:
        while True:
            last = clock_ran_out or step == config.iterations
            if last or (config.val_loss_every and step and step % config.val_loss_every == 0):
                elapsed += _seconds_since(started, device)  # the clock counts training only
                last_val = score_model(model, config, dataset)
                _check_finite(last_val.val_loss, "validation", step)
                log(
                    f"step:{step}/{config.iterations} val_loss:{last_val.val_loss:.4f} val_bpb:{last_val.val_bpb:.4f} "
                    f"train_time:{1000 * elapsed:.0f}ms step_avg:{1000 * elapsed / max(step, 1):.2f}ms",
                    step=step, val_loss=last_val.val_loss, val_bpb=last_val.val_bpb, train_seconds=elapsed,
                )  # fmt: skip
                started = time.perf_counter()
            if last:
                break
            fraction = _fraction(config, step, elapsed + time.perf_counter() - started)
            if at_tenth is None and fraction >= TENTH and all(p.isfinite().all() for p in model.parameters()):
                elapsed += _seconds_since(started, device)
                seen = forecast_from(model.state_dict(), config, fraction, step)
                log(f"step:{step}/{config.iterations} forecast:{seen.verdict(config.cap_bytes)}")
                if seen.low > config.cap_bytes and config.final_roundtrip_eval and not config.allow_over_cap:
                    save_resume()
                    raise TrainError(
                        f"stopped at step {step}: forecast {seen}, all of it over cap_bytes={config.cap_bytes}; with "
                        "allow_over_cap=1 the same run goes on from here; other knobs are another run"
                    )
                at_tenth = seen.bytes
                started = time.perf_counter()

            factor = lr_factor(config, step, 1000 * (elapsed + time.perf_counter() - started))
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
                seconds = elapsed + _seconds_since(started, device)
                nats, reg = loss.item(), penalty.item()
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
            if config.max_wallclock_seconds:
                clock_ran_out = elapsed + time.perf_counter() - started >= config.max_wallclock_seconds
            if config.resume_every_seconds and time.perf_counter() - saved >= config.resume_every_seconds:
                elapsed += _seconds_since(started, device)
                save_resume()
                started = saved = time.perf_counter()

    if config.resume_every_seconds:
        save_resume()  # scoring can be killed too
    state = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    if config.save_raw_checkpoint:
        checkpoint = safetensors.torch.save(state)
        write_whole(run_dir / runs.CHECKPOINT, checkpoint)
        checkpoint_sha256 = hashlib.sha256(checkpoint).hexdigest()
    else:
        checkpoint_sha256 = None
    result = runs.Result(
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
        tokens=step * config.train_batch_tokens,
        stopped_by="wallclock" if clock_ran_out else "iterations",
        train_seconds=elapsed,
        resumed=resumed,
        data_fingerprint=dataset.fingerprint,
        data=facts,
        protocol=runs.evaluation_protocol(config),
        environment=runs.environment(device),
    )
    if config.final_roundtrip_eval:
        result = _with_round_trip(result, model, state, config, dataset, run_dir, last_val, log)
    result = runs.write_result(run_dir, result)
    (run_dir / RESUME).unlink(missing_ok=True)
    return result


def _with_round_trip(result, model, state, config, dataset, run_dir, last_val, log) -> runs.Result:
    """Add the score of the artifact on disk, and of the raw weights on the same tokens."""
    trip = round_trip(state, config, dataset, run_dir / runs.ARTIFACT)
    raw = last_val
    if trip.score.tokens != raw.tokens:
        raw = score_model(model, config, dataset, roundtrip=True)
    account = trip.account
    name = scheme(config.export)
    codec = name.replace("_", "+")
    log(f"Serialized model {codec}: {account.artifact} bytes (payload:{account.payload})")
    log(f"Total submission size {codec}: {account.total} bytes (code:{account.code} cap:{account.cap})")
    if not account.fits:
        log(f"over the cap by {account.total - account.cap} bytes")
    score = trip.score
    log(f"final_{name}_roundtrip_exact val_loss:{score.val_loss:.8f} val_bpb:{score.val_bpb:.8f}")
    return replace(result, **roundtrip_fields(trip, raw.val_bpb, raw.block_nats, dataset, config))


class _Log:
    """Lines for the reader (log.txt, screen) and rows for the plots (metrics.jsonl), each whole at once."""

    def __init__(self, run_dir: Path, resume_step: int):
        self.text = run_dir / "log.txt"
        self.rows = run_dir / "metrics.jsonl"
        if not resume_step:
            self.text.unlink(missing_ok=True)
        # What the killed training wrote after its last resume file will be written again.
        kept = [row for row in runs.metric_rows(run_dir) if _before(row, resume_step)]
        write_whole(self.rows, "".join(json.dumps(row) + "\n" for row in kept))

    def __call__(self, line: str, **row: float) -> None:
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


def _fraction(config: RunConfig, step: int, seconds: float) -> float:
    """Of the training done after so many steps and seconds of it; 0 before the first step."""
    clock = seconds / config.max_wallclock_seconds if config.max_wallclock_seconds else 0.0
    return min(1.0, max(step / config.iterations, clock)) if step else 0.0


def _before(row: dict, resume_step: int) -> bool:
    """A step resumed at is trained, but not yet validated again."""
    return row["step"] < resume_step or (row["step"] == resume_step and "val_bpb" not in row)


def _read_resume(path: Path) -> dict | None:
    return torch.load(path, weights_only=True, map_location="cpu") if path.exists() else None


def _seconds_since(start: float, device: torch.device) -> float:
    """Host seconds since start, the device's queue finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
