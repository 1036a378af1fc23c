"""`pgolf worker`: this machine runs notebooks of sweeps that were started on another one."""

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from pgolf.cli.arguments import add_command, add_workers, count
from pgolf.processes import gpu_environments, kill_family, visible_gpus
from pgolf_core.config import ConfigError

STOP_SECONDS = 5


def add_commands(commands) -> None:
    text = "run notebooks of sweeps that were started with --cluster: one Dask worker per group of GPUs"
    sub = add_command(commands, worker, "worker", text, "pgolf worker tcp://host:8786", "pgolf worker scheduler.json")
    sub.add_argument("address", metavar="ADDRESS", help="the Dask scheduler: tcp://host:8786, or its scheduler file")
    sub.add_argument("--gpus", type=count, default=1, metavar="N", help="GPUs per run; default 1")
    add_workers(sub, "runs at a time on a machine without GPUs; default 1")


def worker(arguments: argparse.Namespace) -> int:
    """Run Dask workers until Ctrl-C, or until the scheduler ends."""
    if importlib.util.find_spec("distributed") is None:
        raise ConfigError('worker needs Dask: pip install -c constraints.txt -e ".[cluster]"')
    environments = _environments(arguments.gpus, arguments.workers)
    where = ["--scheduler-file", arguments.address] if Path(arguments.address).is_file() else [arguments.address]
    command = [sys.executable, "-m", "dask", "worker", *where, "--nthreads", "1", "--nworkers", "1"]
    command += ["--memory-limit", "0", "--no-dashboard"]
    groups = [f"GPU {e['CUDA_VISIBLE_DEVICES']}" for e in environments if e]
    print(f"{len(environments)} at a time: {' | '.join(groups) or 'on the CPU'}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a batch system's time limit
    processes = []
    try:
        for environment in environments:
            # Ctrl-C reaches only this process, which ends them.
            apart = {"start_new_session": True, "creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}
            processes.append(subprocess.Popen(command, env=os.environ | environment, **apart))
        for process in processes:
            process.wait()
    finally:
        for process in processes:
            process.terminate()  # a worker then tells the scheduler
        psutil.wait_procs([psutil.Process(p.pid) for p in processes if p.poll() is None], timeout=STOP_SECONDS)
        for process in processes:
            kill_family(process.pid)
    print(f"the scheduler at {arguments.address} is gone")
    return 1


def _environments(gpus_per_run: int, workers: int | None) -> list[dict[str, str]]:
    """Environment of each Dask worker: a group of GPUs each, or none on a machine without GPUs."""
    if gpus_per_run < 1:
        raise ConfigError("--gpus 0: a run needs at least one; CUDA_VISIBLE_DEVICES= hides them all")
    gpus = visible_gpus()
    if len(gpus) % gpus_per_run:
        raise ConfigError(f"--gpus {gpus_per_run}: it does not divide the {len(gpus)} GPUs here ({', '.join(gpus)})")
    if gpus and workers:
        raise ConfigError(f"--workers {workers}: this machine has GPUs, and runs one notebook per --gpus of them")
    return gpu_environments(gpus, gpus_per_run) or [{}] * (workers or 1)
