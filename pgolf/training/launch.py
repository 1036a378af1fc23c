"""Ranks: processes started by torchrun that train one run together, and end together."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from pgolf.processes import SWEEP_PID, end_with, end_with_sweep, kill_family
from pgolf.runs.directory import outside_knobs, why_it_failed, write_failure
from pgolf_core.config import ConfigError, RunConfig
from pgolf_core.distributed import ALONE, Ranks, under_torchrun
from pgolf_core.files import atomic_write

PATIENCE = timedelta(hours=1)  # collectives wait while rank 0 exports
GOES_ON = "run again, it goes on from its last resume file"
LOG = "ranks.log"  # stderr of all ranks of a failed run


class RankError(RuntimeError):
    """A rank ended before the run did; the message says which one, and what to do."""


@contextmanager
def joined(world_size: int, run_dir: Path) -> Iterator[Ranks]:
    """The Ranks of this process inside the block. ConfigError if torchrun started another number than world_size.

    On SIGTERM (another rank died, or a job scheduler takes the machine) a rank writes error.json and ends at once,
    even while it waits in a collective.
    """
    if not under_torchrun():  # with world_size > 1 only to read a complete run
        yield ALONE
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if size != world_size:
        raise ConfigError(
            f"world_size={world_size}, and torchrun started {size} processes; give --nproc_per_node and "
            "world_size the same number"
        )
    end_with_sweep()
    end_with(os.getppid())  # torchrun, which notices when another rank dies
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE)
    with _ending_on_sigterm(run_dir, rank):
        yield Ranks(rank, size)
    # Not after an error: NCCL's shutdown deadlocks while other ranks wait on this one. The process ends instead.
    dist.destroy_process_group()


@contextmanager
def _ending_on_sigterm(run_dir: Path, rank: int) -> Iterator[None]:
    """Handle SIGTERM in a thread: Python runs no signal handler while the main thread waits in a collective."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)

    def watch() -> None:
        while signals := ours.recv(64):
            if signal.SIGTERM in signals:
                write_end(run_dir, RankError(f"rank {rank} got SIGTERM: another rank died, or the machine ends"))
                os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, name="sigterm", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGTERM, before)
        theirs.close()  # ends the thread


def is_secondary_error(error: BaseException) -> bool:
    """True if the error only follows from the end of another rank."""
    gone = r"gloo|remote process (has )?exited|connection (was )?(closed|reset)|abort|timed? ?out"
    return isinstance(error, RuntimeError) and re.search(gone, str(error), re.IGNORECASE) is not None


def write_end(run_dir: Path, error: BaseException) -> None:
    """Write error.json; an error that follows from another rank's end does not replace that rank's."""
    if is_secondary_error(error):
        error = RankError(f"another rank ended ({str(error).splitlines()[0]})")
    if run_dir.is_dir() and not (isinstance(error, RankError) and (run_dir / "error.json").exists()):
        write_failure(run_dir, error)


def launch(config: RunConfig, run_dir: Path, initial: dict[str, Tensor] | None, say: Callable[[str], None]) -> None:
    """Start torchrun with config.world_size processes on this machine and wait for the run to end.

    say(line) gets rank 0's output. Raises RankError with the content of error.json. No started process outlives this.
    """
    before = why_it_failed(run_dir)
    if knobs := config.taken_from(outside_knobs()):  # its ranks are given them all
        say("environment:" + " ".join(f"{name}={value}" for name, value in sorted(knobs.items())))
    with tempfile.TemporaryDirectory() as folder:
        knobs, weights, errors = (Path(folder) / name for name in ("config.json", "initial.safetensors", "stderr"))
        knobs.write_text(json.dumps(config.model_dump()), encoding="utf-8")
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={config.world_size}"]
        words += ["-m", "pgolf.training.run", "--config", str(knobs), "--run-dir", str(run_dir.resolve())]
        if initial is not None:
            safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in initial.items()}, weights)
            words += ["--initial", str(weights)]
        with open(errors, "wb") as stderr, subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, text=True, encoding="utf-8",
            errors="replace", env=os.environ | {SWEEP_PID: str(os.getpid())}, start_new_session=True,
        ) as torchrun:  # fmt: skip
            try:
                for line in torchrun.stdout:
                    say(line.rstrip())
                status = torchrun.wait()
            finally:
                kill_family(torchrun.pid)
        said = errors.read_text(encoding="utf-8", errors="replace")
    if status == 0:
        (run_dir / LOG).unlink(missing_ok=True)  # left by a failed attempt
        return
    killed = f"torchrun was killed (signal {-status}); {GOES_ON}" if status < 0 else _killed_rank(said)
    cause = why_it_failed(run_dir)
    cause = "" if cause == before and not killed else cause  # left by an earlier attempt
    if cause or killed:
        atomic_write(run_dir / LOG, said)
    if killed and run_dir.is_dir():  # the other ranks only wrote that it was gone
        write_failure(run_dir, RankError(killed))
    printed = re.findall(r"^pgolf: (.*(?:\n  - .*)*)", said, re.MULTILINE)
    raise RankError(killed or cause or (printed or said.strip().split("\n"))[-1])


def _killed_rank(said: str) -> str:
    """'rank 1 was killed (signal 9) …' from torchrun's report; '' if every rank ended by itself or by torchrun."""
    for rank, code in re.findall(r"^\s*rank\s*:\s*(\d+).*\n\s*exitcode\s*:\s*-(\d+)", said, re.MULTILINE):
        if int(code) != signal.SIGTERM:
            return f"rank {rank} was killed (signal {code}); {GOES_ON}"
    return ""
