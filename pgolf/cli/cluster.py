"""`pgolf worker`: this machine does runs of sweeps that are started elsewhere."""

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from pgolf.cli.arguments import count
from pgolf.processes import kill_family
from pgolf_core.config import ConfigError

POLL_SECONDS = 0.5
STOP_SECONDS = 5


def add_commands(commands) -> None:
    text = "do runs of sweeps that are started with --cluster: a Dask worker for each group of GPUs"
    sub = commands.add_parser("worker", help=text, description=text)
    sub.set_defaults(command=worker)
    sub.add_argument("address", metavar="ADDRESS", help="of the Dask scheduler: tcp://host:8786, or its file")
    sub.add_argument("--gpus", type=count, default=1, metavar="N", help="a run gets so many; default 1")
    sub.add_argument("--slots", type=count, metavar="N", help="runs at a time on a machine without GPUs; default 1")


def worker(arguments: argparse.Namespace) -> int:
    """Until Ctrl-C, or until the scheduler ends."""
    if importlib.util.find_spec("distributed") is None:
        raise ConfigError('worker needs Dask: pip install -c constraints.txt -e ".[cluster]"')
    groups = gpu_groups(arguments.gpus)
    if groups and arguments.slots:
        raise ConfigError(f"--slots {arguments.slots}: this machine has GPUs, and does a run on each --gpus of them")
    environments = [{"CUDA_VISIBLE_DEVICES": group} for group in groups] or [{}] * (arguments.slots or 1)
    where = ["--scheduler-file", arguments.address] if Path(arguments.address).is_file() else [arguments.address]
    command = [sys.executable, "-m", "dask", "worker", *where, "--nthreads", "1", "--nworkers", "1"]
    command += ["--memory-limit", "0", "--no-dashboard"]
    print(f"{len(environments)} at a time: " + (" | ".join(f"GPU {group}" for group in groups) or "on the CPU"))
    processes = []

    def stop(*_) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)  # of a batch system whose time is up
    try:
        for environment in environments:
            processes.append(
                subprocess.Popen(
                    command,
                    env=os.environ | environment,
                    start_new_session=True,  # POSIX: Ctrl-C reaches us, and we end them
                    creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # Windows
                )
            )
        while any(process.poll() is None for process in processes):
            time.sleep(POLL_SECONDS)
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()  # it tells the scheduler
        deadline = time.monotonic() + STOP_SECONDS
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS / 5)
        for process in processes:
            kill_family(process.pid)
    print(f"the scheduler at {arguments.address} is gone")
    return 1


def gpu_groups(size: int) -> list[str]:
    """The GPUs that are seen, so many to a group, as CUDA_VISIBLE_DEVICES names them; [] where there are none."""
    if size < 1:
        raise ConfigError("--gpus 0: a run needs at least one; CUDA_VISIBLE_DEVICES= hides them all")
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if seen is None and (smi := shutil.which("nvidia-smi")):
        told = subprocess.run([smi, "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True)
        seen = ",".join(told.stdout.split()) if told.returncode == 0 else ""
    gpus = [gpu.strip() for gpu in (seen or "").split(",") if gpu.strip()]
    if gpus and len(gpus) % size:
        raise ConfigError(f"--gpus {size}: it does not divide the {len(gpus)} GPUs here ({', '.join(gpus)})")
    return [",".join(gpus[i : i + size]) for i in range(0, len(gpus), size)]
