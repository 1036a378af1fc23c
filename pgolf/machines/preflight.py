"""Checks of a job and its machine before money is spent, each reported in one line."""

import contextlib
import re
import secrets
import shutil
import subprocess
from collections.abc import Callable
from importlib import metadata

import torch

from pgolf.machines import state, transfer
from pgolf.machines.job import Job, Say
from pgolf.machines.pod import Pod, RemoteError
from pgolf.machines.ssh import UnreachableError, call
from pgolf.runs import directory
from pgolf.runs.result import RunError
from pgolf.sweeps.runner import missing
from pgolf.sweeps.sweep_file import SweepError
from pgolf.training import forecast
from pgolf_core.config import ROOT
from pgolf_core.files import DataError
from pgolf_core.model import GPT

INSTALLED_BYTES = {True: 9_000_000_000, False: 2_000_000_000}  # .venv there, with and without GPUs
RUN_BYTES = 20  # per parameter: checkpoint, artifact and resume file


def check(job: Job, say: Say) -> None:
    """Do every check; RemoteError if one fails, UnreachableError if nothing but the connection does.

    Nothing is left on the machine but empty folders.
    """
    pod, problems = job.pod, []

    def told(what: str, problem: Exception | str | None) -> bool:
        say(f"WRONG {problem}" if problem else f"ok    {what}")
        problems.append(problem)
        return not problem

    tools = told("ssh and rsync 3 are installed here", local_tools())
    to_do = []
    for sweep in job.sweeps:
        configs = {n: c for n, c in sweep.runs.items() if not (sweep.directory / n / "result.json").exists()}
        to_do += configs.values()
        if told(f"sweep {sweep.name}: {len(configs)} runs to do", _problem(missing, sweep)):
            told(f"sweep {sweep.name}: forecast under the caps", _problem(forecast.check, configs))
    if pod.gpus and job.sweeps:
        nproc = max((c.world_size for sweep in job.sweeps for c in sweep.runs.values()), default=0)
        what = f"gpus: {pod.gpus}, and a run has nproc {nproc}"
        told(what, "" if nproc <= pod.gpus else f"{what}; set gpus: {nproc}")
    pushed: list[str] = []
    told("code: git tracks it", _problem(lambda: pushed.extend(transfer.code_files())))
    if pod.data == "push":
        told("data: it can be pushed", _problem(lambda: pushed.extend(transfer.data_files(job.sweeps))))
    told(f"teardown: {pod.teardown or 'none; stop the machine yourself'}", _teardown_problem(pod.teardown))
    with torch.device("meta"):
        kept = RUN_BYTES * sum(p.numel() for config in to_do for p in GPT(config.model).parameters())
    directory.RUNS.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory.RUNS).free
    what = f"{free / 1e9:.1f} GB free here, {kept / 1e9:.1f} GB needed"
    told(what, "" if free > kept else f"{what} in {directory.RUNS}; make room")
    if tools:
        size = sum((ROOT / name).stat().st_size for name in pushed)
        installed = 0 if pod.python else INSTALLED_BYTES[pod.gpus > 0]
        found = [told(*one) for one in probe(pod, size + kept + installed)]
        if len(found) > 1 and all(found[:3]):
            told("a file written there was pulled unchanged", _problem(canary, pod))
    if wrong := [one for one in problems if one]:
        kind = UnreachableError if all(isinstance(one, UnreachableError) for one in wrong) else RemoteError
        raise kind(f"{len(wrong)} of {len(problems)} checks failed; nothing was started")


def _problem(attempt: Callable, *arguments: object) -> Exception | None:
    try:
        attempt(*arguments)
    except (SweepError, RemoteError, DataError, forecast.ForecastError, RunError, OSError) as error:
        return error
    return None


def _teardown_problem(command: str) -> str:
    """'' if the first word is a command of this machine's shell, or the command is more than plain words."""
    words = [word for word in command.split() if not re.match(r"[A-Za-z_]\w*=", word)]
    if not words or re.search(r"[^\w~./+-]", words[0]) or re.search(r"[|&;<>()$`\n]", command):
        return ""
    found = subprocess.run(f"command -v {words[0]}", shell=True, capture_output=True).returncode == 0
    return "" if found else f"teardown: no command {words[0]} here; install it, or give its path"


def local_tools() -> str:
    """'' if ssh and rsync 3 are installed here, else what to do."""
    if absent := [name for name in ("ssh", "rsync") if not shutil.which(name)]:
        return f"{' and '.join(absent)} not found here; install OpenSSH's client and rsync (on Windows: in WSL)"
    first = subprocess.run(["rsync", "--version"], capture_output=True, text=True).stdout.partition("\n")[0]
    if first.startswith("rsync  version 3."):
        return ""
    return f"rsync here says {first!r}, and version 3 is needed: macOS's own will not do: `brew install rsync`"


def probe(pod: Pod, needed_bytes: int) -> list[tuple[str, RemoteError | str]]:
    """(what was looked at on the machine, what is wrong with it or ''); only the first if it does not answer."""
    names = [re.match(r"[\w.-]+", line)[0] for line in metadata.requires("pgolf") or [] if "extra ==" not in line]
    try:
        answer = call(pod, "probe", pod.python, " ".join(names).lower().replace("_", "-"))
    except RemoteError as error:
        return [(f"{pod.address} answers", error)]
    if not answer.startswith("pgolf-probe\n"):
        why = f"its shell prints {answer.splitlines()[0]!r} before any command, which breaks rsync; silence .bashrc"
        return [(f"{pod.address} answers", f"{pod.address}: {why} there")]
    found = dict(line.partition("=")[::2] for line in answer.splitlines())
    gpus, free = int(found.get("gpus") or 0), 1024 * int(found.get("free") or 0)
    needed, tool = needed_bytes + int(1e9 * pod.free_gb), found.get("lacks_tool")
    version, lacks = found.get("version", ""), ", ".join(found.get("lacks", "").split() if pod.python else [])
    python = f"{pod.python or 'python3'} is not there, older than 3.11 or without venv; install one, or set python:"
    if version >= "3.11":  # two digits each
        python = f"{pod.python} has no {lacks}; install these, or set python: ''" if lacks else ""
    disk = f"{free / 1e9:.1f} GB free there, {needed / 1e9:.1f} GB needed"
    return [
        (f"{pod.address} answers and accepts the key", ""),
        (f"{pod.dir} can be written there", "" if found.get("writable") else f"{pod.dir} cannot be made; set dir:"),
        ("rsync is installed there", f"{tool} is not there; install it: apt-get install {tool}" if tool else ""),
        (f"Python {version} is there", python),
        (f"{gpus} GPUs there", "" if gpus >= pod.gpus else f"gpus: {pod.gpus}, and {gpus} by nvidia-smi -L there"),
        (disk, "" if free >= needed else f"{disk}; take a larger disk"),
    ]


def canary(pod: Pod) -> None:
    """RemoteError unless a file written into the runs there is pulled unchanged, in the way of the results."""
    name = f"_canary-{secrets.token_hex(6)}"
    try:
        call(pod, "make-canary", name)
        differ = transfer.differing(pod, f"{name}-job", [name])
        if differ or not (directory.RUNS / name / "canary").is_file():
            raise RemoteError(f"{pod.address}: a file written there was not pulled unchanged, nor would results be")
    finally:
        shutil.rmtree(directory.RUNS / name, ignore_errors=True)
        shutil.rmtree(state.folder(f"{name}-job"), ignore_errors=True)
        with contextlib.suppress(RemoteError):
            call(pod, "remove-canary", name)
