"""Milliseconds of a training step by phase, tokens a second and peak memory, for a shape given on the command line.

    python benchmarks/bench_train.py track=nano
    python benchmarks/bench_train.py track=fixed_step num_layers=12 model_dim=384 --steps 5

Every knob goes as NAME=VALUE. The phases are those of pgolf_core.train, timed with the device's queue
finished in between, so their sum is a little more than a step of the real loop, which is timed too.
"""

import argparse
import statistics
import time

import psutil
import torch
import yaml

from pgolf_core.config import RunConfig
from pgolf_core.loader import Batches, training_stream
from pgolf_core.model import GPT
from pgolf_core.optim import make_optimizers, step_optimizers
from pgolf_core.regularizers import CompressionRegularizer
from pgolf_core.roundtrip import cpu_threads, open_dataset, pick_device, pick_dtype, to_precision

PHASES = ("data", "forward", "backward", "regulariser", "optimiser")


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    info = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"):  # Windows
        return info.peak_wset
    import resource  # not on Windows

    unit = 1 if torch.backends.mps.is_built() else 1024  # macOS counts bytes, Linux kibibytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def bench(config: RunConfig, steps: int) -> None:
    device, dataset = pick_device(config), open_dataset(config)
    dtype = pick_dtype(config, device)
    torch.manual_seed(config.seed)
    model = GPT(config.model).to(device)
    to_precision(model, dtype)
    optimizers, regularizer = make_optimizers(model, config), CompressionRegularizer(model, config)
    stream = training_stream(dataset.train_shards, config.data, dataset.tokenizer.bos)
    batches = Batches(stream, config.data, pin=device.type == "cuda")
    loss_of = torch.compile(model.loss) if config.compile else model.loss
    accumulation = config.data.grad_accum
    spent = {phase: [] for phase in PHASES}

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def step(index: int, timed: bool) -> dict[str, float]:
        seconds = dict.fromkeys(PHASES, 0.0)
        clock = now if timed else time.perf_counter
        for _ in range(accumulation):
            start = clock()
            x, y = (t.to(device, non_blocking=True) for t in batches.next())
            seconds["data"] += (loaded := clock()) - start
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                loss = loss_of(x, y) / accumulation
            seconds["forward"] += (done := clock()) - loaded
            loss.backward()
            seconds["backward"] += clock() - done
        start = clock()
        penalty, sampled = regularizer(index)
        if sampled:
            (config.compression_reg_weight * penalty).backward()
        seconds["regulariser"] += (done := clock()) - start
        step_optimizers(optimizers, 1.0, config.muon_momentum)
        seconds["optimiser"] += clock() - done
        return seconds

    # Four steps at a time, so that a regulariser at interval 4 is paid once in each.
    for index in range(4):
        step(index, timed=True)
    for index in range(steps):
        for phase, value in step(config.compression_reg_warmup_steps + index, timed=True).items():
            spent[phase].append(value)
    start = now()
    for index in range(steps):
        step(config.compression_reg_warmup_steps + index, timed=False)
    whole = (now() - start) / steps

    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{config.num_layers}x{config.model_dim}, {parameters:,} parameters, "
        f"{config.train_batch_tokens:,} tokens a step, "
        f"{device.type}, {dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    phased = sum(statistics.mean(values) for values in spent.values())
    for phase, values in spent.items():
        mean, median = 1000 * statistics.mean(values), 1000 * statistics.median(values)
        print(f"{phase:12} mean {mean:9.2f} ms   median {median:9.2f} ms   {100 * mean / phased / 1000:5.1f} %")
    print(f"{'sum':12} mean {1000 * phased:9.2f} ms")
    print(f"{'whole step':12} mean {1000 * whole:9.2f} ms   {config.train_batch_tokens / whole:,.0f} tokens/s")
    print(f"peak memory  {peak_bytes(device) / 2**20:,.0f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("knobs", nargs="*", metavar="NAME=VALUE")
    parser.add_argument("--steps", type=int, default=8)
    arguments = parser.parse_args()
    config = RunConfig(**{name: yaml.safe_load(value) for name, value in (k.split("=", 1) for k in arguments.knobs)})
    with cpu_threads(config):
        bench(config, arguments.steps)


if __name__ == "__main__":
    main()
