"""Before money is spent: every check of a job and its machine, each told in a line."""

import contextlib
import itertools
import os
import re
import secrets
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from pgolf.disk import checksum
from pgolf.machines import transfer
from pgolf.machines.remote_job import Job
from pgolf.machines.ssh import Pod, RemoteError, UnreachableError, local_tools, probe, run_script
from pgolf.runs import directory
from pgolf.runs.result import RunError
from pgolf.sweeps.runner import missing
from pgolf.sweeps.sweep_file import SweepError
from pgolf.training import forecast
from pgolf_core.config import ROOT, RunConfig
from pgolf_core.files import DataError
from pgolf_core.model import GPT

SHELL = "|&;<>()$`*?[]{}\n"  # what only the shell can read
BUILTINS = ("cd", "source", ".", "exec", "export", "test", "[", "true", "false", "echo", "exit", ":", "eval", "set")
INSTALLED_BYTES = {True: 9_000_000_000, False: 2_000_000_000}  # .venv there, with and without GPUs
RUN_BYTES = 20  # a parameter: checkpoint, artifact and resume file

Say = Callable[[str], None]


def check(job: Job, say: Say) -> None:
    """Every check in a line of its own; RemoteError when one fails. Nothing stays but empty folders there."""
    pod, results = job.pod, []

    def told(what: str, problem: Exception | str | None) -> bool:
        say(f"WRONG {problem}" if problem else f"ok    {what}")
        results.append(problem)
        return not problem

    tools = told("ssh and rsync are here", local_tools())
    to_do = {}
    for sweep in job.sweeps:
        configs = {n: c for n, c in sweep.runs.items() if not (sweep.directory / n / "result.json").exists()}
        to_do |= {f"{sweep.name}/{name}": config for name, config in configs.items()}
        if told(f"sweep {sweep.name}: {len(configs)} runs to do", _problem(missing, sweep)):
            told(f"sweep {sweep.name}: forecast under the caps", _problem(forecast.check, configs))
    if pod.gpus and job.sweeps:
        nproc = max((c.world_size for sweep in job.sweeps for c in sweep.runs.values()), default=0)
        what = f"gpus: {pod.gpus}, and runs of at most nproc {nproc}"
        told(what, "" if nproc <= pod.gpus else f"gpus: {pod.gpus}, and a run has nproc {nproc}; set gpus: {nproc}")
    pushed: list[str] = []
    problem = _problem(lambda: pushed.extend(transfer.data_files(job.sweeps))) if pod.data == "push" else None
    data = _size(pushed)
    told(f"data: {pod.data}, {data:,} bytes" if data else f"data: {pod.data}", problem)
    told(f"teardown: {pod.teardown or 'none; the machine is yours to stop'}", _teardown_problem(pod))
    kept = RUN_BYTES * sum(map(_parameters, to_do.values()))
    free = _free(directory.RUNS)
    what = f"{free / 1e9:.1f} GB free here, {kept / 1e9:.1f} GB needed"
    told(what, "" if free > kept else f"{what} in {directory.RUNS}; make room")
    if tools:
        installed = 0 if pod.python else INSTALLED_BYTES[pod.gpus > 0]
        found = [told(*one) for one in probe(pod, data + _size(transfer.code_files()) + kept + installed)]
        if len(found) > 1 and all(found[:4]):
            told("a file written there came home whole", _problem(canary, pod))
    if wrong := [one for one in results if one]:
        kind = UnreachableError if all(isinstance(one, UnreachableError) for one in wrong) else RemoteError
        raise kind(f"{len(wrong)} of {len(results)} checks failed; nothing was started")


def _problem(attempt: Callable, *arguments: object) -> Exception | None:
    try:
        attempt(*arguments)
    except (SweepError, RemoteError, DataError, forecast.ForecastError, RunError, OSError) as error:
        return error
    return None


def _size(names: list[str]) -> int:
    return sum((ROOT / name).stat().st_size for name in names)


def _free(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _parameters(config: RunConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in GPT(config.model).parameters())


def _teardown_problem(pod: Pod) -> str:
    try:
        words = shlex.split(pod.teardown, posix=os.name != "nt")
    except ValueError as error:
        return f"teardown: {pod.teardown}: {error}"
    words = list(itertools.dropwhile(re.compile(r"[A-Za-z_]\w*=").match, words))
    word = words[0].strip('"') if words else ""
    if not word or word in BUILTINS or set(pod.teardown.strip()) & set(SHELL):
        return ""
    there = shutil.which(os.path.expanduser(word))
    return "" if there else f"teardown: no command {word} here; install it, or give its path"


def canary(pod: Pod) -> None:
    """RemoteError unless a file written into the runs there comes home whole, by the way that results take."""
    name = f"_canary-{secrets.token_hex(6)}"
    job = f"{name}-job"
    make = 'mkdir -p "$1/runs/$2" "$1/jobs/$3" && head -c 100000 /dev/urandom > "$1/runs/$2/canary"'
    try:
        run_script(pod, make, pod.dir, name, job)
        there = transfer.checksums(pod, [name])
        transfer.pull(pod, job, [name])
        path = directory.RUNS / name / "canary"
        if not path.is_file() or checksum(path) != there.get(f"{name}/canary"):
            raise RemoteError(f"{pod.address}: a file written there did not come home whole; nothing else would")
    finally:
        shutil.rmtree(directory.RUNS / name, ignore_errors=True)
        shutil.rmtree(transfer.folder(job), ignore_errors=True)
        with contextlib.suppress(RemoteError):
            run_script(pod, 'rm -rf "$1/runs/$2" "$1/jobs/$3"', pod.dir, name, job)
