"""Processes that end with the one that started them, and whether somebody watches this one."""

import contextlib
import os
import sys
import threading
import time

import psutil

SWEEP_PID = "PGOLF_SWEEP_PID"  # environment: the process to end with
POLL_SECONDS = 0.5


def end_with_sweep() -> None:
    """From now on, end this process and its children when the process that SWEEP_PID names is gone.

    Kernels outlive a killed parent: without this, one would go on training for a sweep that is no more. A
    slot watches the sweep, and a kernel its slot. Without SWEEP_PID, and from the second call on, nothing.
    """
    if pid := os.environ.get(SWEEP_PID):
        end_with(int(pid))


def end_with(pid: int) -> None:
    """The same for any process."""
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


def interactive() -> bool:
    """Whether somebody watches, whom a progress bar is for: a terminal, or a notebook that no sweep runs."""
    return SWEEP_PID not in os.environ and (sys.stderr.isatty() or "ipykernel" in sys.modules)


def kill_family(pid: int, itself: bool = True) -> None:
    """Kill a process and all its children. Nothing is left half-written: files appear whole or not at all."""
    try:
        process = psutil.Process(pid)
        family = [*([process] if itself else []), *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=10)
