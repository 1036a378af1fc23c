"""A training step by phase, tokens a second, MFU and memory, for the shapes of the research; and over ranks.

    python benchmarks/bench_train.py                            # one GPU, the reference's batches
    python benchmarks/bench_train.py --ranks 1 2 4 8            # scaling, with torchrun
    python benchmarks/bench_train.py --bars                     # and: are two fixed-step runs the same bits
    python benchmarks/bench_train.py --tokens 8192 --shapes 9x512 compile=0   # on a CPU
    python benchmarks/bench_train.py --shapes nano              # the track of the demo

Knobs go as NAME=VALUE. The text is made up: only shapes count. The phases are those of training, timed with the
device's queue finished in between, so their sum is more than the whole step, which is timed without. --json FILE writes
everything.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import yaml

from pgolf.training import flops
from pgolf.training.launch import joined
from pgolf_core import train as core
from pgolf_core.batches import training_stream
from pgolf_core.config import RunConfig
from pgolf_core.device import cpu_threads, deterministic_kernels, not_compiled, pick_device, pick_dtype
from pgolf_core.distributed import Ranks
from pgolf_core.shards import header
from pgolf_core.train import TrainState, make_state, train_step

# Shapes of the notes, all with the regularizer at interval 4.
PRESSURE = dict(compression_reg_weight=0.005, compression_grid_reg_weight=0.1, compression_reg_interval=4)
SHAPES = {
    "9x512": dict(track="h100"),
    "12x384": dict(track="fixed_step", deterministic=False),
    "14x560": dict(
        track="fixed_step",
        deterministic=False,
        num_layers=14,
        model_dim=560,
        num_heads=8,
        num_kv_heads=4,
        vocab_size=4096,
    ),
    "14x576": dict(track="h100", num_layers=14, model_dim=576),
    "nano": dict(track="nano"),
}
PHASES = ("data", "forward", "backward", "gradients", "regulariser", "optimiser")
WARM_STEPS = 4
TEXT_TOKENS = 8_000_000


def measure(config: RunConfig, ranks: Ranks, steps: int) -> dict:
    """Milliseconds by phase and whole, of this rank; steps is rounded up to whole intervals of the regulariser."""
    device = pick_device(config.train)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    why_eager = not_compiled(config.train, device)
    steps = -(-steps // config.compression_reg_interval) * config.compression_reg_interval
    with tempfile.TemporaryDirectory() as folder, deterministic_kernels(config.deterministic and device.type == "cuda"):
        tokens = np.random.default_rng(0).integers(0, config.vocab_size, TEXT_TOKENS, dtype=np.uint16)
        shard = Path(folder) / "fineweb_train_000000.bin"
        shard.write_bytes(header(len(tokens)) + tokens.tobytes())
        stream = training_stream([shard], config.data, bos=1)
        state = make_state(config, stream, device, pick_dtype(config.train, device), ranks, not why_eager)
        first = state.step = config.compression_reg_warmup_steps  # the regularizer is due from here on
        began = finished_queue(device)
        for _ in range(WARM_STEPS):
            train_step(state, 1.0)
        warm_seconds = finished_queue(device) - began
        graphs = _graphs()
        state.step = first + WARM_STEPS
        seconds = phases(state, steps)
        state.step = first + WARM_STEPS
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("warn")
            start = finished_queue(device)
            for _ in range(steps):
                train_step(state, 1.0)
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
            whole = (finished_queue(device) - start) / steps
        syncs = sum("synchronizing" in str(w.message) for w in caught)
        state.batches.load_state_dict(state.batches.state_dict())  # wait for the thread that reads the file
    milliseconds = {phase: 1000 * seconds[phase] / steps for phase in PHASES}
    return {
        "parameters": sum(p.numel() for p in state.model.parameters()),
        "tokens_a_step": config.train_batch_tokens,
        "ranks": ranks.size,
        "passes_a_step": state.grad_accum,
        "phases_ms": milliseconds,
        "step_ms": 1000 * whole,
        "tokens_a_second": config.train_batch_tokens / whole,
        "tflops": flops.flops_per_token(config) * config.train_batch_tokens / whole / 1e12,
        "mfu": flops.utilisation(config, config.train_batch_tokens, whole, device),
        "peak_memory_mib": flops.peak_memory(device) / 2**20,
        "regulariser_share": milliseconds["regulariser"] / sum(milliseconds.values()),
        "eager": why_eager,
        "graphs": graphs,
        "graphs_later": _graphs() - graphs,
        "host_syncs": syncs,
        "warm_up_seconds": warm_seconds,
    }


def finished_queue(device: torch.device) -> float:
    """The host's clock after the device's queue has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def phases(state: TrainState, steps: int) -> dict[str, float]:
    """Seconds by phase of train_step's own parts, each timed with the device's queue finished before and after."""
    seconds = dict.fromkeys((*PHASES, "passes"), 0.0)

    def timed(phase: str, function):
        def call(*arguments):
            start = finished_queue(state.device)
            result = function(*arguments)
            seconds[phase] += finished_queue(state.device) - start
            return result

        return call

    with ExitStack() as patches:
        for owner, name, phase in (
            (state.batches, "next", "data"),
            (state, "loss_fn", "forward"),
            (state.gradients, "add", "gradients"),
            (state.gradients, "finish", "gradients"),
            (core, "accumulate_gradients", "passes"),
            (core, "backward_regularizer", "regulariser"),
            (core, "step_optimizers", "optimiser"),
        ):
            patches.enter_context(mock.patch.object(owner, name, timed(phase, getattr(owner, name))))
        for _ in range(steps):
            train_step(state, 1.0)
    seconds["backward"] = seconds["passes"] - seconds["data"] - seconds["forward"] - seconds["gradients"]
    return seconds


def _graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"] if "torch._dynamo" in sys.modules else 0


def in_processes(name: str, config: RunConfig, steps: int) -> dict:
    """The measurement of rank 0, in processes of their own: memory and compiled graphs of no other shape are in it."""
    with tempfile.TemporaryDirectory() as folder:
        knobs, out = Path(folder) / "config.json", Path(folder) / "out.json"
        knobs.write_text(json.dumps(config.model_dump()))
        words = [__file__, "--worker", str(knobs), str(out), "--steps", str(steps)]
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={config.world_size}"]
        done = subprocess.run([sys.executable, *(torchrun if config.world_size > 1 else []), *words])
        if done.returncode:
            sys.exit(f"{name} on {config.world_size} ranks ended with status {done.returncode}")
        return json.loads(out.read_text())


def work(knobs: str, out: str, steps: int) -> None:
    config = RunConfig.from_file(knobs)
    with cpu_threads(config.cpu_threads), joined(config.world_size, Path(out).parent / "none") as ranks:
        measured = measure(config, ranks, steps)
        if ranks.first:
            Path(out).write_text(json.dumps(measured))


def bars(knobs: dict, steps: int) -> dict:
    """Two fixed-step runs of a few steps on the embedded corpus: the same bits? And what deterministic kernels cost."""
    from pgolf.training.run import train

    short = dict(deterministic=True, iterations=24, val_max_tokens=65_536, roundtrip_val_max_tokens=65_536)
    config = RunConfig(**SHAPES["12x384"] | short | {"allow_over_cap": True} | knobs)
    with tempfile.TemporaryDirectory() as folder:
        shas = [train(config, Path(folder) / str(i)).checkpoint_sha256 for i in range(2)]
    cost = [in_processes("12x384", config.with_knobs(deterministic=on), steps)["step_ms"] for on in (True, False)]
    return {"fixed_step_runs_bit_equal": shas[0] == shas[1], "deterministic_over_fastest": cost[0] / cost[1]}


def table(rows: dict[str, dict]) -> str:
    columns = ["shape", "ranks", "tokens", *PHASES, "step", "tokens/s", "TFLOP/s", "MFU", "MiB", "graphs", "syncs"]
    lines = [columns]
    for name, row in rows.items():
        phases = [f"{row['phases_ms'][phase]:.1f}" for phase in PHASES]
        mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
        lines.append(
            [name.split()[0], f"{row['ranks']}", f"{row['tokens_a_step']:,}", *phases, f"{row['step_ms']:.1f}",
             f"{row['tokens_a_second']:,.0f}", f"{row['tflops']:.2f}", mfu, f"{row['peak_memory_mib']:,.0f}",
             f"{row['graphs']}+{row['graphs_later']}", f"{row['host_syncs']}"]
        )  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("knobs", nargs="*", metavar="NAME=VALUE")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["9x512", "12x384", "14x560", "14x576"])
    parser.add_argument("--tokens", type=int, metavar="N", help="a step; default: the reference's")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1], metavar="N")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--bars", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(*arguments.worker, arguments.steps)
        return
    knobs = {name: yaml.safe_load(value) for name, value in (k.split("=", 1) for k in arguments.knobs)}
    rows = {}
    for shape in arguments.shapes:
        for size in arguments.ranks:
            own = PRESSURE | SHAPES[shape] | {"world_size": size}
            own |= {"train_batch_tokens": arguments.tokens} if arguments.tokens else {}
            rows[f"{shape} on {size}"] = in_processes(shape, RunConfig(**own | knobs), arguments.steps)
            print(table(rows) if len(rows) == 1 else table(rows).splitlines()[-1], flush=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    about = {"device": device, "torch": torch.__version__, "python": platform.python_version(), "command": sys.argv[1:]}
    told = about | {"shapes": rows} | (bars(knobs, arguments.steps) if arguments.bars else {})
    if arguments.bars:
        print({name: told[name] for name in ("fixed_step_runs_bit_equal", "deterministic_over_fastest")})
    if arguments.json:
        arguments.json.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
