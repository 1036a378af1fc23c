"""Train, export, read the file back, score it: the program of a submission.

    torchrun --standalone --nproc_per_node=8 train_gpt.py     # or python train_gpt.py, on one GPU or a CPU
    python train_gpt.py --eval artifact.pgolf                 # only score a file

`pgolf submission` makes that script of this package, with a run's knobs baked in. SEED, DATA_PATH, TOKENIZER_PATH and
OUT (the folder of log and artifact) may be set in the environment; the rest of a submission is fixed.
"""

import hashlib
import math
import os
import sys
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from pgolf_core.adapt import evaluate_shipped
from pgolf_core.artifact.codec import LIBRARIES, library
from pgolf_core.batches import training_stream, validation_tokens
from pgolf_core.config import RunConfig
from pgolf_core.device import (
    deterministic_kernels,
    keep_freed_memory,
    not_compiled,
    pick_device,
    pick_dtype,
    training_dtype,
)
from pgolf_core.distributed import ALONE, Ranks, under_torchrun
from pgolf_core.evaluate import evaluate
from pgolf_core.export import export_name, load, write_artifact
from pgolf_core.export_inputs import calibration_of, model_of, reserve_seconds, teacher_of
from pgolf_core.knobs import BOS
from pgolf_core.optim import lr_factor
from pgolf_core.parameters import roles_of
from pgolf_core.shards import shard_paths
from pgolf_core.timer import TrainTimer
from pgolf_core.tokens import ByteTable
from pgolf_core.train import TrainState, make_state, train_step, warm_up

PATIENCE = timedelta(hours=1)  # ranks wait while rank 0 exports
ARTIFACT = "artifact.pgolf"

Say = Callable[[str], None]


def main() -> None:
    config, ranks = RunConfig(), ALONE
    if under_torchrun():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
        ranks = Ranks(dist.get_rank(), dist.get_world_size())
    config, out = config.with_knobs(world_size=ranks.size), Path(os.environ.get("OUT", "."))
    torch.set_num_threads(config.cpu_threads or torch.get_num_threads())
    device = pick_device(config.train)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    if sys.argv[1:2] == ["--eval"]:
        score_file(Path(sys.argv[2]), config, device, ranks, print if ranks.first else silent)
    else:
        out.mkdir(parents=True, exist_ok=True)
        if ranks.first:
            (out / "train.log").unlink(missing_ok=True)
        say = partial(log, out / "train.log") if ranks.first else silent
        state, timer = train(config, device, ranks, say)
        export_and_score(state, config, timer, ranks, out / ARTIFACT, say)
    if under_torchrun():
        dist.destroy_process_group()


def log(path: Path, line: str) -> None:
    print(line, flush=True)
    with open(path, "a", encoding="utf-8") as f:
        f.write(line + "\n")


def silent(line: str) -> None:
    """Log of ranks other than 0."""


def train(config: RunConfig, device: torch.device, ranks: Ranks, say: Say) -> tuple[TrainState, TrainTimer]:
    """Train until `iterations` or the wallclock limit; weights are averaged if the knobs say so."""
    dtype, why_eager = pick_dtype(config.train, device), not_compiled(config.train, device)
    if config.codec in LIBRARIES:
        library(config.codec)  # a missing package is to be known before training is paid for
    if config.codec == "auto":
        library("ans"), library("brotli")
    shards = shard_paths(config.data_path, "train")
    if not shards:
        raise SystemExit(f"DATA_PATH={config.data_path}: no fineweb_train_*.bin in this folder")
    stream = training_stream(shards, config.data, BOS)
    state = make_state(config, stream, device, training_dtype(config.train, device), ranks, not why_eager)
    timer = TrainTimer(device, config.max_wallclock_seconds)
    tokens, table = text_of(config, config.val_max_tokens, config.val_max_documents)
    parameters = sum(p.numel() for p in state.model.parameters())
    say(
        f"model_params:{parameters} world_size:{ranks.size} grad_accum_steps:{state.grad_accum} "
        f"device:{device} {state.dtype}"
    )
    say(f"train_batch_tokens:{config.train_batch_tokens} iterations:{config.iterations} seed:{config.seed}")
    kernels = partial(deterministic_kernels, config.deterministic and device.type == "cuda")
    if warmup_steps := max(config.warmup_steps, 0 if why_eager else 1):
        with timer.excluded("warmup"), kernels():
            warm_up(state, warmup_steps)
    if config.max_wallclock_seconds and (config.needs_calibration or config.learn_steps):
        reserve = reserve_seconds(state.model.state_dict(), config, shards, device, timer) if ranks.first else 0.0
        timer.calibration_reserve_s = ranks.share_float(reserve)
    timer.start()
    while True:
        last = timer.expired or state.step == config.iterations
        state.reach(1.0 if last else timer.fraction(state.step, config.iterations))
        if last or (config.val_loss_every and state.step and state.step % config.val_loss_every == 0):
            with timer.excluded("validation"):
                if not ranks.hold_same(state.model.parameters()):
                    raise SystemExit(f"ranks hold different weights at step {state.step}")
                score = evaluate(state.model, tokens, table, config.eval, dtype, ranks)
            if not math.isfinite(score.val_loss):
                raise SystemExit(f"validation loss is {score.val_loss} at step {state.step}")
            of_score = f"val_loss:{score.val_loss:.4f} val_bpb:{score.val_bpb:.4f}"
            say(f"step:{state.step}/{config.iterations} {of_score} {times(timer.trained_s, state.step)}")
        if last:
            break
        lr_scale = lr_factor(state.config, state.step, timer.step_end_s, timer.calibration_reserve_s)
        with kernels():
            loss, _ = train_step(state, lr_scale)
        if config.train_log_every and (state.step <= 10 or state.step % config.train_log_every == 0):
            seconds, nats = timer.seconds(), ranks.add_(loss).item() / ranks.size
            say(f"step:{state.step}/{config.iterations} train_loss:{nats:.4f} {times(seconds, state.step)}")
        timer.update(state.step, ranks)
    if timer.expired:
        say(f"stopping_early: wallclock_cap {times(timer.trained_s, state.step)} step:{state.step}/{config.iterations}")
    if state.average is not None and state.average.count:
        state.average.replace_weights()
        say(f"weights:{state.average}")
    return state, timer


def times(seconds: float, step: int) -> str:
    return f"train_time:{1000 * seconds:.0f}ms step_avg:{1000 * seconds / max(step, 1):.2f}ms"


def export_and_score(
    state: TrainState, config: RunConfig, timer: TrainTimer, ranks: Ranks, path: Path, say: Say
) -> None:
    """Write the artifact on rank 0; score the weights as they are, and the file as it is read back."""
    weights = {name: t.detach().cpu().contiguous() for name, t in state.model.state_dict().items()}
    tokens, table = text_of(config, config.roundtrip_val_max_tokens, config.roundtrip_val_max_documents)
    score = evaluate(state.model, tokens, table, config.eval, pick_dtype(config.train, state.device), ranks)
    say(f"pre-quantization val_loss:{score.val_loss:.8f} val_bpb:{score.val_bpb:.8f}")
    if ranks.first:
        shards, began = shard_paths(config.data_path, "train"), time.perf_counter()
        calibration = calibration_of(weights, config, shards, state.device)
        teacher = teacher_of(weights, config, shards, state.device)
        calibrated = time.perf_counter() - began
        with deterministic_kernels(state.device.type == "cuda"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of learned levels that were not better
            write_artifact(weights, config.export, path, calibration, roles_of(state.model), teacher, code_bytes())
        counted = timer.trained_s + calibrated + (teacher.seconds if teacher else 0.0)
        say(f"wallclock:{timer.trained_s:.1f}s training, {counted:.1f}s with calibration")
        size, code = path.stat().st_size, code_bytes()
        say(f"Serialized model {config.codec}: {size} bytes")
        say(f"Total submission size: {size + code} bytes (code:{code} cap:{config.cap_bytes})")
        say(f"artifact_sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}")
    score_file(path, config, state.device, ranks, say)


def score_file(path: Path, config: RunConfig, device: torch.device, ranks: Ranks, say: Say) -> None:
    """Score an artifact that rank 0 reads."""
    began = time.perf_counter()
    weights = ranks.share(load(path) if ranks.first else None)
    model = model_of(weights, config, device)
    tokens, table = text_of(config, config.roundtrip_val_max_tokens, config.roundtrip_val_max_documents)
    score = evaluate_shipped(model, tokens, table, config.eval, pick_dtype(config.train, device), ranks)
    if not math.isfinite(score.val_loss):
        raise SystemExit(f"{path}: the file scores {score.val_loss}")
    seconds = time.perf_counter() - began
    name = f"final_{export_name(config.export)}_roundtrip"
    say(f"{name} val_loss:{score.val_loss:.4f} val_bpb:{score.val_bpb:.4f} eval_time:{1000 * seconds:.0f}ms")
    say(f"{name}_exact val_loss:{score.val_loss:.8f} val_bpb:{score.val_bpb:.8f}")


def text_of(config: RunConfig, max_tokens: int, max_documents: int) -> tuple[Tensor, ByteTable]:
    """The scored validation tokens (n,), and the bytes that each stands for."""
    if not shard_paths(config.data_path, "val"):
        raise SystemExit(f"DATA_PATH={config.data_path}: no fineweb_val_*.bin in this folder")
    tokens = validation_tokens(config.data_path, config.train_seq_len, max_tokens, max_documents, BOS)
    folder = Path(config.data_path)
    own = folder / "tokenizer.model" if (folder / "tokenizer.model").is_file() else folder / "tokenizer.json"
    tokenizer = config.tokenizer_path or own
    return tokens, ByteTable.from_sentencepiece(tokenizer).with_sidecar(folder)


def code_bytes() -> int:
    """Bytes of this script as it is submitted."""
    return len(Path(__file__).read_bytes())


if __name__ == "__main__":
    main()
