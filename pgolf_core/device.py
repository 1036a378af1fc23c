"""What a run computes with: device, precision, compiler, deterministic kernels, CPU threads."""

import ctypes
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from typing import Any

import torch

from pgolf_core.config import ConfigError
from pgolf_core.distributed import local_rank
from pgolf_core.knobs import TrainConfig

# Deterministic cuBLAS needs a fixed workspace, and reads this at the first matrix product of the process.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pick_device(config: TrainConfig) -> torch.device:
    """The torch.device of the knob; auto = cuda if there is one, else cpu. Each rank takes a GPU of its own.

    Raises ConfigError if this machine does not have the device, or has fewer GPUs than ranks.
    """
    device = torch.device(config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    if device == torch.device("cuda") and torch.cuda.is_available():
        if local_rank() >= torch.cuda.device_count():
            raise ConfigError(
                f"world_size: rank {local_rank()} finds no GPU of its own, this machine has "
                f"{torch.cuda.device_count()}; start one process per GPU"
            )
        return torch.device("cuda", local_rank())
    present: dict[str, Callable[[], bool]] = {
        "cuda": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
        "cpu": lambda: True,
    }
    if not present[device.type]():
        raise ConfigError(f"device={config.device}: this machine has none; use device=auto or cpu")
    return device


def pick_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """The dtype of scoring's matrix products; precision=auto and mixed are bfloat16 on cuda, float32 elsewhere."""
    return getattr(torch, config.precision_on(device.type))


def training_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """The dtype of training's matrix products: pick_dtype's, but for precision=mixed on a CPU with AMX bfloat16.

    Products are 3 to 8 times as fast with AMX. Files are scored in float32 there too, so scores of all CPUs compare.
    """
    amx = device.type == "cpu" and torch.cpu.get_capabilities().get("amx_bf16")
    return torch.bfloat16 if amx and config.precision == "mixed" else pick_dtype(config, device)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Inside the block matrix products run in dtype, by autocast if it is not float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def not_compiled(config: TrainConfig, device: torch.device) -> str:
    """Why the model is not compiled on this machine; '' if it is."""
    if not config.compile:
        return "compile=0"
    if device.type == "cuda":
        return "" if find_spec("triton") else "this machine has no Triton"
    compilers = ("c++", "g++", "clang++", "cl")
    return "" if any(map(shutil.which, compilers)) else "this machine has no C++ compiler"


@contextmanager
def deterministic_kernels(on: bool) -> Iterator[None]:
    """Inside the block, if on, CUDA gives the same bits each time; an operation that cannot raises RuntimeError."""
    if not on:  # every step asks; the setter imports torch._inductor
        yield
        return
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(True)
        memory.fill_uninitialized_memory = False  # no code here reads it
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        memory.fill_uninitialized_memory = before[1]


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """torch runs on `count` CPU threads inside the block; 0 = as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def keep_freed_memory() -> None:
    """Have glibc keep memory that a step frees for the next step, up to 256 MiB; other systems are left as they are.

    Otherwise a nano step returns it and faults 14,000 pages in again: 40 to 60 ms of 570.
    """
    with suppress(AttributeError, OSError, TypeError):  # no mallopt, no libc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 256 << 20)  # M_TRIM_THRESHOLD
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, its maximum
