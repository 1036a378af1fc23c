"""Start the processes of a run under torchrun, join them, and end them all together."""

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

from pgolf.disk import read_json
from pgolf.processes import SWEEP_PID, end_with, end_with_sweep, kill_family
from pgolf.runs.directory import write_failure
from pgolf_core.config import ConfigError, RunConfig
from pgolf_core.distributed import ALONE, Ranks
from pgolf_core.files import atomic_write

PATIENCE = timedelta(hours=1)  # of ranks that wait while rank 0 exports; a dead rank is noticed without it
GOES_ON = "run again, it goes on from its last resume file"
LOG = "ranks.log"  # tracebacks of a run that failed


class RankError(RuntimeError):
    """Ranks that cannot go on together; the message says which one ended, and what to do."""


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


@contextmanager
def joined(world_size: int, run_dir: Path) -> Iterator[Ranks]:
    """The ranks of this run inside the block. Raises ConfigError where torchrun started another number of them.

    A rank that is told to end (SIGTERM: another one died, a job scheduler wants the machine) leaves error.json, even
    while it waits for the others, and ends at once.
    """
    if not under_torchrun():  # with world_size > 1: to look at a run that is complete
        yield ALONE
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if size != world_size:
        raise ConfigError(
            f"world_size={world_size}, and torchrun started {size} processes; give --nproc_per_node and "
            "world_size the same number"
        )
    end_with_sweep()
    end_with(os.getppid())  # torchrun: without it nobody would notice that a rank died
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE)
    with _ending_on_sigterm(run_dir, rank):
        yield Ranks(rank, size)
    # Not after an error: NCCL's end waits for the other ranks, which wait for this one; the process ends instead.
    dist.destroy_process_group()


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0)) if under_torchrun() else 0


@contextmanager
def _ending_on_sigterm(run_dir: Path, rank: int) -> Iterator[None]:
    """A thread answers SIGTERM: the main thread may wait in a collective that never ends, where Python's handlers
    do not run."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)

    def watch() -> None:
        while told := ours.recv(64):
            if signal.SIGTERM in told:
                write_end(run_dir, RankError(f"rank {rank} was told to end: another rank died, or its machine goes"))
                os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, name="sigterm", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGTERM, before)
        theirs.close()  # ends the thread


def is_echo(error: BaseException) -> bool:
    """Whether it only says that another rank is gone."""
    gone = r"gloo|remote process (has )?exited|connection (was )?(closed|reset)|abort|timed? ?out"
    return isinstance(error, RuntimeError) and re.search(gone, str(error), re.IGNORECASE) is not None


def write_end(run_dir: Path, error: BaseException) -> None:
    """error.json, unless a rank has left one: what ends the others is only that the first one ended."""
    follows = is_echo(error) or isinstance(error, RankError)
    if is_echo(error):
        error = RankError(f"another rank ended ({str(error).splitlines()[0]})")
    if run_dir.is_dir() and not (follows and (run_dir / "error.json").exists()):
        write_failure(run_dir, error)


def launch(config: RunConfig, run_dir: Path, initial: dict[str, Tensor] | None, say: Callable[[str], None]) -> None:
    """Start torchrun with config.world_size processes on this machine and wait for the end of the run.

    Raises RankError with what its error.json says. However this ends, no process it started goes on.
    """
    before = read_json(run_dir / "error.json")
    with tempfile.TemporaryDirectory() as folder:
        knobs = Path(folder) / "config.json"
        knobs.write_text(json.dumps(config.model_dump()), encoding="utf-8")
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={config.world_size}"]
        words += ["-m", "pgolf.training.run", "--config", str(knobs), "--run-dir", str(run_dir.resolve())]
        if initial is not None:
            initial = {name: tensor.contiguous() for name, tensor in initial.items()}
            safetensors.torch.save_file(initial, Path(folder) / "initial.safetensors")
            words += ["--initial", str(Path(folder) / "initial.safetensors")]
        errors = Path(folder) / "stderr"
        with open(errors, "wb") as said, subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said, text=True, encoding="utf-8",
            errors="replace", env=os.environ | {SWEEP_PID: str(os.getpid())}, start_new_session=True,
        ) as torchrun:  # fmt: skip
            try:
                for line in torchrun.stdout:  # the first rank's log
                    say(line.rstrip())
                status = torchrun.wait()
            finally:
                kill_family(torchrun.pid)
        words = errors.read_text(encoding="utf-8", errors="replace")
    if status == 0:
        (run_dir / LOG).unlink(missing_ok=True)  # of an earlier try
        return
    killed = f"torchrun was killed (signal {-status}); {GOES_ON}" if status < 0 else _killed_rank(words)
    said = re.findall(r"^pgolf: (.*(?:\n  - .*)*)", words, re.MULTILINE)
    error = read_json(run_dir / "error.json")
    if error is not None and error == before and not killed:  # of an earlier try: this one never had the directory
        error = None
    if error is not None or killed:
        atomic_write(run_dir / LOG, words)
    if killed and run_dir.is_dir():  # what the others said is only that it was gone
        write_failure(run_dir, RankError(killed))
    told = f"{error['error']}: {error['message']}" if error else ""
    raise RankError(killed or told or (said[-1] if said else words.strip().split("\n")[-1]))


def _killed_rank(said: str) -> str:
    """'rank 1 was killed (signal 9) …' by torchrun's last words; '' where all ended by themselves, or by torchrun."""
    for rank, code in re.findall(r"^\s*rank\s*:\s*(\d+).*\n\s*exitcode\s*:\s*-(\d+)", said, re.MULTILINE):
        if int(code) != signal.SIGTERM:
            return f"rank {rank} was killed (signal {code}); {GOES_ON}"
    return ""
