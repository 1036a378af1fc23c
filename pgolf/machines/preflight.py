"""Checks of a job and its machine before money is spent, each reported in one line."""

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata

from pgolf.machines import transfer
from pgolf.machines.job import Job, Say
from pgolf.machines.pod import Pod, RemoteError, UnreachableError
from pgolf.runs import directory
from pgolf.runs.result import RunError
from pgolf.sweeps.runner import missing
from pgolf.sweeps.sweep_file import SweepError
from pgolf.training import forecast
from pgolf_core.config import ROOT
from pgolf_core.files import DataError
from pgolf_core.model import skeleton

INSTALLED_BYTES = {True: 9_000_000_000, False: 2_000_000_000}  # .venv there, with and without GPUs
RUN_BYTES = 20  # per parameter: checkpoint, artifact and resume file

Finding = tuple[str, Callable[[], object] | str]  # a check; and how it is done, or its problem, '' = none


def check(job: Job, say: Say) -> None:
    """Do every check; RemoteError if one fails, UnreachableError if nothing but the connection does."""
    problems = []
    for what, problem in _findings(job):
        if callable(problem):
            try:
                problem()
                problem = ""
            except (SweepError, RemoteError, DataError, forecast.ForecastError, RunError, OSError) as error:
                problem = error
        say(f"WRONG {problem}" if problem else f"ok    {what}")
        problems.append(problem)
    if wrong := [one for one in problems if one]:
        kind = UnreachableError if all(isinstance(one, UnreachableError) for one in wrong) else RemoteError
        raise kind(f"{len(wrong)} of {len(problems)} checks failed; nothing was started")


def _findings(job: Job) -> Iterator[Finding]:
    pod, tools = job.pod, local_tools()
    yield "ssh and rsync 3 are installed here", tools
    to_do, pushed = [], []
    for sweep in job.sweeps:
        configs = {n: c for n, c in sweep.runs.items() if not (sweep.directory / n / "result.json").exists()}
        to_do += configs.values()
        yield f"sweep {sweep.name}: {len(configs)} runs to do", partial(missing, sweep)
        if not sweep.skips_over_cap:
            yield f"sweep {sweep.name}: forecast under the caps", partial(forecast.check, configs)
    nproc = max((c.world_size for sweep in job.sweeps for c in sweep.runs.values()), default=0)
    if pod.gpus and nproc:
        what = f"gpus: {pod.gpus}, and a run has nproc {nproc}"
        yield what, "" if nproc <= pod.gpus else f"{what}; set gpus: {nproc}"
    yield "code: git tracks it", lambda: pushed.extend(transfer.code_files())
    if pod.data == "push":
        yield "data: it can be pushed", lambda: pushed.extend(transfer.data_files(job.sweeps))
    yield f"teardown: {pod.teardown or 'none; stop the machine yourself'}", _unknown_command(pod.teardown)
    kept = RUN_BYTES * sum(p.numel() for config in to_do for p in skeleton(config.model).parameters())
    directory.RUNS.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory.RUNS).free
    what = f"{free / 1e9:.1f} GB free here, {kept / 1e9:.1f} GB needed"
    yield what, "" if free > kept else f"{what} in {directory.RUNS}; make room"
    if not tools:
        size = sum((ROOT / name).stat().st_size for name in pushed)
        yield from _remote_findings(pod, size + kept + (0 if pod.python else INSTALLED_BYTES[pod.gpus > 0]))


def _unknown_command(teardown: str) -> str:
    """'' if the teardown's first word, after variables, is a command of this machine's shell, or is no plain word."""
    first = re.sub(r"^(\w+=\S*\s+)*", "", teardown).partition(" ")[0]
    if not re.fullmatch(r"[\w~./+-]+", first) or not subprocess.call(f"command -v {first} >/dev/null", shell=True):
        return ""
    return f"teardown: no command {first} here; install it, or give its path"


def local_tools() -> str:
    """'' if ssh and rsync 3 are installed here, else what to do."""
    if absent := [name for name in ("ssh", "rsync") if not shutil.which(name)]:
        return f"{' and '.join(absent)} not found here; install OpenSSH's client and rsync (on Windows: in WSL)"
    first = subprocess.run(["rsync", "--version"], capture_output=True, text=True).stdout.partition("\n")[0]
    if first.startswith("rsync  version 3."):
        return ""
    return f"rsync here says {first!r}, and version 3 is needed: macOS's own will not do: `brew install rsync`"


def _remote_findings(pod: Pod, needed: int) -> Iterator[Finding]:
    """needed: bytes on the machine's disk, without free_gb. Stops after the first if the machine does not answer."""
    found: dict[str, str] = {}
    yield f"{pod.address} answers and accepts the key", lambda: found.update(_probe(pod))
    if not found:
        return
    gpus, free, tool = int(found["gpus"]), 1024 * int(found["free"] or 0), found.get("lacks_tool")
    version, lacks = found.get("version", ""), ", ".join(found.get("lacks", "").split() if pod.python else [])
    python = f"{pod.python or 'python3'} is not there, older than 3.11 or without venv; install one, or set python:"
    if version >= "3.11":  # two digits each
        python = f"{pod.python} has no {lacks}; install these, or set python: ''" if lacks else ""
    needed += int(1e9 * pod.free_gb)
    disk = f"{free / 1e9:.1f} GB free there, {needed / 1e9:.1f} GB needed"
    yield f"{pod.dir} can be written there", "" if "writable" in found else f"{pod.dir} cannot be made; set dir:"
    yield "rsync is installed there", f"{tool} is not there; install it: apt-get install {tool}" if tool else ""
    yield f"Python {version} is there", python
    yield f"{gpus} GPUs there", "" if gpus >= pod.gpus else f"gpus: {pod.gpus}, and {gpus} by nvidia-smi -L there"
    yield disk, "" if free >= needed else f"{disk}; take a larger disk"


def _probe(pod: Pod) -> dict[str, str]:
    """What the machine has, by the names of job.sh."""
    requirements = [re.match(r"[\w.-]+", line)[0] for line in metadata.requires("pgolf") if "extra ==" not in line]
    answer = pod.call("probe", pod.python, " ".join(requirements).lower().replace("_", "-"))
    if not answer.startswith("pgolf-probe\n"):
        said = answer.partition("\n")[0]
        raise RemoteError(f"{pod.address}: silence .bashrc there: it prints {said!r}, which breaks rsync")
    return dict(line.partition("=")[::2] for line in answer.splitlines())
