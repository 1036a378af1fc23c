"""The loop that runs jobs on a pool of workers, one each at a time; the pool of processes on this machine."""

import os
import subprocess
import time
from collections import Counter
from collections.abc import Callable

import torch
from tqdm import tqdm

from pgolf.processes import gpu_environments, kill_family, visible_gpus
from pgolf.runs import directory
from pgolf.runs.code import code_digest
from pgolf.sweeps import kernel_process
from pgolf.sweeps.jobs import Failure, Job, failed, finish, progress, say
from pgolf.sweeps.sweep_file import SweepError
from pgolf_core.config import RunConfig

POLL_SECONDS = 0.5
CODE_CHANGED = "not started: the code was edited while the sweep ran; run the sweep again to go on with the new code"
MAX_LOST_WORKERS = 5  # per run; then it is given up


class WorkerLost(Exception):
    """The worker that ran a job is gone; the message names it. Another may run the job."""


def run_jobs(
    pool: "LocalPool", jobs: list[Job], bar: tqdm, ended: Callable[[str], None] = lambda run: None
) -> list[Failure]:
    """Execute all jobs, calling ended with the name of each that did. Returns those that failed.

    A job whose worker is lost is the next to start; however this ends, no process goes on.
    After an edit of the code, or of a notebook, no further job is started, and those that run go on.

    pool: any object with the methods of LocalPool.
    """
    notebooks = {job.notebook.name for job in jobs}
    code = code_digest(notebooks)
    waiting, active, failures, lost = list(jobs), {}, [], Counter()  # active: job -> when it started
    done_before = bar.n
    try:
        while waiting or active:
            pool.refresh()
            if waiting and code_digest(notebooks, fresh=True) != code:
                say(f"{', '.join(job.name for job in waiting)}: {CODE_CHANGED}")
                failures += [Failure(job.name, CODE_CHANGED, job.log) for job in waiting]
                waiting.clear()
            try:
                while waiting and pool.start(waiting[0]):
                    active[waiting.pop(0)] = time.perf_counter()
            except OSError as error:  # a full disk, say
                job = waiting.pop(0)
                failures.append(failed(job.name, str(error), job.log))
            time.sleep(POLL_SECONDS)
            for job in list(active):
                try:
                    if (returncode := pool.poll(job)) is not None:
                        failures += finish(job, returncode, time.perf_counter() - active.pop(job))
                        ended(job.name)
                except WorkerLost as error:
                    del active[job]
                    lost[job] += 1
                    if lost[job] <= MAX_LOST_WORKERS:
                        say(f"{error}; its run {job.name} goes to another")
                        waiting.insert(0, job)
                    else:
                        why = f"given up after {lost[job]} workers; the last: {error}"
                        failures.append(failed(job.name, why, job.log))
            states = [progress(job) for job in active]
            done = len(jobs) - len(waiting) - len(active)
            bar.n = done_before + done + sum(fraction for fraction, _ in states)
            bar.set_postfix_str(", ".join(text for _, text in states), refresh=True)
    finally:
        for job in active:
            pool.stop(job)
    return failures


class LocalPool:
    """One kernel process per environment, which is added to that of this process."""

    def __init__(self, environments: list[dict[str, str]]):
        self.free = list(environments)
        self.started: dict[Job, tuple[subprocess.Popen, dict[str, str]]] = {}

    def refresh(self) -> None:
        """Notice workers that came or went: here none do."""

    def has_room(self) -> bool:
        """True if a worker is free."""
        return bool(self.free)

    def start(self, job: Job) -> bool:
        """Start a job on a free worker; False if there is none. Raises OSError."""
        if not self.free:
            return False
        own = os.environ | self.free[0]
        process = kernel_process.start(job.run_dir, job.notebook, job.parameters, directory.RUNS, own)
        self.started[job] = process, self.free.pop(0)
        return True

    def poll(self, job: Job) -> int | None:
        """Exit status of a started job's process; None while it runs. Raises WorkerLost."""
        process, environment = self.started[job]
        if process.poll() is not None:
            self.free.append(environment)
        return process.returncode

    def stop(self, job: Job) -> None:
        """End a started job's process; its worker is free again."""
        process, environment = self.started.pop(job)
        kill_family(process.pid)
        self.free.append(environment)


def worker_environments(configs: list[RunConfig], workers: int | None = None) -> list[dict[str, str]]:
    """Environment of each worker: as many as fit the cores, or one per group of GPUs, of which it sees no others.

    A group has as many GPUs as a run's world_size. Raises SweepError if there are fewer.
    """
    if workers is not None and workers < 1:
        raise SweepError(f"workers={workers}: at least one notebook at a time")
    ranks = max((config.world_size for config in configs), default=1)
    if torch.cuda.is_available() and any(config.device in ("auto", "cuda") for config in configs):
        gpus = visible_gpus() or [str(i) for i in range(torch.cuda.device_count())]  # no nvidia-smi: ROCm
        if len(gpus) < ranks:
            there = f"one GPU per process, and there are {len(gpus)}"
            raise SweepError(f"world_size={ranks}: {there}; lower nproc or world_size")
        groups = gpu_environments(gpus, ranks)
        return [groups[i % len(groups)] for i in range(workers or len(groups))]
    cores = os.cpu_count() or 1
    on_cpu = all(config.device in ("auto", "cpu") for config in configs)
    threads = max((config.world_size * (config.cpu_threads or cores) for config in configs), default=cores)
    return [{} for _ in range(workers or (max(1, cores // threads) if on_cpu else 1))]
