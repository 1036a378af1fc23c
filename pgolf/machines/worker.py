"""Work of a Dask worker for a sweep that was started elsewhere: one notebook at a time, in the shared runs folder.

This module imports neither torch nor pandas, which would stay in the worker's memory: what needs them runs in processes
of its own, with the code that is on disk by then.
"""

import asyncio
import json
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import filelock
import psutil

from pgolf.processes import kill_family, visible_gpus
from pgolf.runs import directory
from pgolf.runs.code import code_digest
from pgolf.runs.integrity import is_complete
from pgolf.sweeps import kernel_process
from pgolf_core.config import ROOT

POLL_SECONDS = 0.5
LOCK_SECONDS = 60.0  # within these, a kernel whose worker was lost releases its run
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")  # Dask's nanny sets them all to 1

_one_at_a_time = threading.Lock()  # a run has the worker's GPUs to itself, however many threads the worker has


async def call(function, *args):
    """Run function in a thread, so that the worker continues to answer its scheduler."""
    return await asyncio.to_thread(function, *args)


# Whether this worker can do a sweep's runs


def about(canary: str, notebooks: list[str]) -> dict:
    """Facts that decide whether this worker can do a sweep's runs. canary: a file in the sweep's own runs folder."""
    return {
        "pid": os.getpid(), "host": platform.node(), "root": str(ROOT), "gpus": len(visible_gpus()),
        "runs": str(directory.RUNS), "sees_runs": (directory.RUNS / canary).is_file(),
        "python": ".".join(platform.python_version_tuple()[:2]), "torch": metadata.version("torch").partition("+")[0],
        "code": code_digest(notebooks, fresh=True),
    }  # fmt: skip


def fingerprints(knobs: list[dict]) -> list[tuple[str, str]]:
    """Per run: the fingerprint of its data, and what is wrong with them or ''. Builds embedded corpora."""
    command = [sys.executable, "-m", "pgolf.machines.worker"]
    done = subprocess.run(command, input=json.dumps(knobs), capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    return [("", (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1])] * len(knobs)


def main() -> None:
    """`fingerprints` in a process of its own: knobs of runs as JSON on stdin, the answers on stdout."""
    from pgolf.training.inputs import open_dataset
    from pgolf_core.config import RunConfig

    answers = []
    for knobs in json.load(sys.stdin):
        try:
            answers.append((open_dataset(RunConfig(**knobs)).fingerprint, ""))
        except (ValueError, OSError) as error:  # DataError, ConfigError: the user sits at another machine
            answers.append(("", " ".join(str(error).split())))
    print(json.dumps(answers))


# Running


def execute(job: dict) -> dict:
    """The Dask task: run a job's notebook, unless its directory is complete. {'returncode': …, 'complete': …}

    returncode is None if this worker ended the notebook because nobody waits for it: its sweep was stopped, or was
    killed and the scheduler took the task back; or because the worker closes.
    """
    from distributed import get_worker

    worker = get_worker()
    key, run_dir = worker.get_current_task(), directory.RUNS / job["name"]

    def is_wanted() -> bool:
        task = worker.state.tasks.get(key)
        return task is not None and task.state != "cancelled" and worker.status.name in ("running", "paused")

    unwanted = {"returncode": None, "complete": False}
    if os.getpid() != job["pid"]:  # a restarted process took the address of the worker that was checked
        return unwanted
    while not _one_at_a_time.acquire(timeout=POLL_SECONDS):  # another sweep's run
        if not is_wanted():
            return unwanted
    try:
        if is_complete(run_dir):
            return {"returncode": 0, "complete": True}
        return _execute(job, run_dir, is_wanted, worker.nanny is not None) or unwanted
    finally:
        _one_at_a_time.release()


def _execute(job: dict, run_dir: Path, is_wanted: Callable[[], bool], has_nanny: bool) -> dict | None:
    """Outcome of a job's notebook; None if it was ended because it is not wanted."""
    # Until no kernel writes this run; after LOCK_SECONDS the next kernel reports that itself.
    run_dir.mkdir(parents=True, exist_ok=True)
    with suppress(filelock.Timeout), filelock.FileLock(run_dir / ".lock").acquire(timeout=LOCK_SECONDS):
        pass
    notebook = ROOT / "notebooks" / job["notebook"]
    environment = dict(os.environ)
    if has_nanny:  # without the thread limits that it added: a run's knobs set its threads
        with suppress(psutil.Error):
            before = psutil.Process(os.getppid()).environ()
            environment = {k: v for k, v in environment.items() if k not in THREADS or k in before}
    process = kernel_process.start(run_dir, notebook, job["parameters"], directory.RUNS, environment)
    try:
        while is_wanted():
            with suppress(subprocess.TimeoutExpired):
                return {"returncode": process.wait(POLL_SECONDS), "complete": (run_dir / "result.json").exists()}
        return None
    finally:
        if process.returncode is None:
            kill_family(process.pid)
            process.wait()


if __name__ == "__main__":
    main()
