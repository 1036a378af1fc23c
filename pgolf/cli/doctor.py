"""`pgolf doctor`: what this machine and installation have, and what that means for speed."""

import argparse
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from importlib.util import find_spec

from pgolf.cli.arguments import add_command
from pgolf.runs import directory
from pgolf_core.config import ROOT, environment_knobs

# torch.backends.cpu.get_cpu_capability() -> meaning for training on the CPU.
CAPABILITIES = {
    "DEFAULT": "no vector instructions that torch uses: several times slower than AVX2",
    "NO AVX": "no vector instructions that torch uses: several times slower than AVX2",
    "AVX2": "a run of the nano track takes about a minute on a thread",
    "AVX512": "faster than AVX2: two cores ran the demo in 2 min 51 s instead of 4 min 7 s",
}
COMPILERS = ("c++", "g++", "clang++", "cl")


def add_commands(commands) -> None:
    text = "what this machine and installation have, and what that means for speed"
    add_command(commands, doctor, "doctor", text, "pgolf doctor").set_defaults(anywhere=True)


def doctor(_: argparse.Namespace) -> int:
    """Exit status 1 if something that every run needs is missing."""
    from pgolf.reports.text import aligned

    rows = [*_processor(), *_gpus(), *_compilers(), *_room(), *_installed(), *_data()]
    print(
        *aligned([(f"{'!' if bad else ' '} {name}", what, means) for name, what, means, bad in rows], "<<<"), sep="\n"
    )
    problems = [name for name, _, _, bad in rows if bad]
    print(f"\nnot right: {', '.join(problems)}" if problems else "\nall that runs need is here; `pgolf demo` begins")
    return 1 if problems else 0


Rows = Iterator[tuple[str, str, str, bool]]  # name, finding, meaning, whether it keeps runs from working


def _processor() -> Rows:
    import psutil
    import torch

    from pgolf_core.device import training_dtype
    from pgolf_core.knobs import TrainConfig
    from pgolf_core.optim import newton_schulz_dtype

    capability = torch.backends.cpu.get_cpu_capability()
    yield "cpu", f"{platform.machine()}, {capability}", CAPABILITIES.get(capability, "not measured"), False
    cpu = torch.device("cpu")
    bf16 = newton_schulz_dtype("auto", cpu) == torch.bfloat16
    words = "in hardware: muon_dtype=auto uses it" if bf16 else "not in hardware: muon_dtype=auto takes float32"
    if training_dtype(TrainConfig(precision="mixed"), cpu) == torch.bfloat16:
        words = "with AMX: precision=mixed, as in the nano track, trains and calibrates with it and scores in float32"
    yield "bfloat16", "yes" if bf16 else "no", words, False
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield "cores", str(usable), f"a sweep of the nano track runs {usable} notebooks at a time", False
    memory = psutil.virtual_memory()
    total, free = memory.total / 2**30, memory.available / 2**30
    yield (
        "memory",
        f"{free:.1f} of {total:.1f} GiB free",
        "each notebook of a sweep is a process with torch loaded",
        free < 1,
    )


def _gpus() -> Rows:
    import torch

    from pgolf.training.flops import peak_flops

    if not torch.cuda.is_available():
        apple = torch.backends.mps.is_available()
        yield "gpu", "Apple" if apple else "none", "device=mps uses it" if apple else "runs train on the CPU", False
        return
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        peak = peak_flops(torch.device("cuda", i))
        means = f"peak {peak / 1e12:,.0f} TFLOP/s in bfloat16" if peak else "peak not known, so no MFU is reported"
        yield "gpu", f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB", means, False


def _compilers() -> Rows:
    import torch

    found = next(filter(None, map(shutil.which, COMPILERS)), "")
    means = "compile=1 works on the CPU" if found else "compile=1 is left out on the CPU: slower steps of large models"
    yield "compiler", found or "none", means, False
    if torch.cuda.is_available():
        has = find_spec("triton") is not None
        yield (
            "triton",
            "yes" if has else "no",
            "compile=1 works" if has else "compile=1 is left out: slower steps",
            False,
        )


def _room() -> Rows:
    place = directory.RUNS if directory.RUNS.is_dir() else ROOT
    free = shutil.disk_usage(place).free / 2**30
    means = "a run keeps its checkpoint (4 bytes per parameter) and its file below"
    yield "disk", f"{free:.0f} GiB free", f"{means} {directory.RUNS}", free < 1
    writable = os.access(place, os.W_OK)
    yield "runs", "writable" if writable else "read-only", "PGOLF_RUNS names another folder", not writable


def _installed() -> Rows:
    yield "python", platform.python_version(), "", False
    for package, use in (("torch", ""), ("constriction", "codec=ans"), ("brotli", "codec=brotli"), ("jupyterlab", "")):
        version = None
        with suppress(metadata.PackageNotFoundError):
            version = metadata.version(package)
        optional = package == "jupyterlab"
        missing = "notebooks open in no browser: install the extra lab" if optional else "missing: install pgolf again"
        yield package, version or "none", use if version else missing, version is None and not optional
    if knobs := environment_knobs():
        yield "environment", " ".join(f"{k}={v}" for k, v in knobs.items()), "sets these knobs of single runs", False


def _data() -> Rows:
    folder = ROOT / "data"
    found = sorted(path.parent.name for path in folder.glob("*/fineweb_train_000000.bin"))
    built = any(name.startswith("embedded") for name in found)
    means = ", ".join(found) if built else "the embedded corpus is built by the first run, in some 20 s"
    yield "data", f"{len(found)} folders of shards", means, False
