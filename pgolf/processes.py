"""Processes that end with the one that started them, and the GPUs that this one may use."""

import contextlib
import gc
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import psutil

SWEEP_PID = "PGOLF_SWEEP_PID"  # environment: the process to end with
POLL_SECONDS = 0.5
TURN, USUAL_TURN = 0.001, sys.getswitchinterval()  # seconds until another thread's operation may go on
NVIDIA_SMI_SECONDS = 20


def end_with_sweep() -> None:
    """End this process and its children when the process named by SWEEP_PID, if any, is gone.

    A kernel outlives a killed parent: it would go on training for a sweep that no longer exists. A kernel process
    watches the sweep, and its kernel watches the kernel process.
    """
    if pid := os.environ.get(SWEEP_PID):
        end_with(int(pid))


def end_with(pid: int) -> None:
    """End this process and its children when process pid is gone. A second call for a pid does nothing."""
    name = f"{SWEEP_PID} {pid}"
    if any(thread.name == name for thread in threading.enumerate()):
        return
    try:
        parent = psutil.Process(pid)
    except psutil.NoSuchProcess:
        _end()

    def watch() -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            while parent.is_running() and parent.status() != psutil.STATUS_ZOMBIE:
                time.sleep(POLL_SECONDS)
        _end()

    threading.Thread(target=watch, name=name, daemon=True).start()


def _end() -> None:
    kill_family(os.getpid(), itself=False)
    os._exit(1)


def in_background(function: Callable, *args) -> Future:
    """The function's result, computed in a daemon thread: the process may end, or be interrupted, without it."""
    future = Future()

    def work() -> None:
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def interactive() -> bool:
    """True if a person can see a progress bar: in a terminal, or in a notebook that no sweep runs."""
    return SWEEP_PID not in os.environ and (sys.stderr.isatty() or "ipykernel" in sys.modules)


def kill_family(pid: int, itself: bool = True) -> None:
    """Kill a process and all its children. Files are written atomically, so none is left torn."""
    try:
        process = psutil.Process(pid)
        family = [*([process] if itself else []), *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(family, timeout=10)


def visible_gpus() -> list[str]:
    """GPUs this process may use, named as in CUDA_VISIBLE_DEVICES: its value, else all that nvidia-smi lists."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None and (smi := shutil.which("nvidia-smi")):
        query = [smi, "--query-gpu=index", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run(query, capture_output=True, text=True, timeout=NVIDIA_SMI_SECONDS)
            visible = ",".join(done.stdout.split()) if done.returncode == 0 else ""
    return [gpu.strip() for gpu in (visible or "").split(",") if gpu.strip()]


def gpu_environments(gpus: list[str], size: int) -> list[dict[str, str]]:
    """Environment that shows a process its GPUs, per group of `size`; a rest smaller than a group is left out."""
    return [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[i : i + size])} for i in range(0, len(gpus) - size + 1, size)]


@contextlib.contextmanager
def work_on_syntax_trees() -> Iterator[None]:
    """Python neither looks for cycles, which trees of many nodes lack, nor lets other threads wait as long as usual."""
    collecting = gc.isenabled()
    gc.disable()
    sys.setswitchinterval(TURN)
    try:
        yield
    finally:
        sys.setswitchinterval(USUAL_TURN)
        if collecting:
            gc.enable()
