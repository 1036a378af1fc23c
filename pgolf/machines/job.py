"""A job: sweeps on a rented machine. Its definition, and how it is started and found there.

Locally, runs/.remote/<job>/ holds state.json, copies of the sweep files and, once pulled, the job's logs.
job.sh describes the files on the machine.
"""

import os
import secrets
import shlex
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pgolf.machines import state, transfer
from pgolf.machines.local_runs import forget_errors
from pgolf.machines.pod import JOB_SCRIPT, Pod, RemoteError, UnreachableError, load_pod
from pgolf.runs import directory
from pgolf.sweeps.sweep_file import Sweep, load_sweep
from pgolf_core.config import PREFIX, RunConfig, digest, environment_knobs
from pgolf_core.files import atomic_write

Say = Callable[[str], None]


@dataclass(frozen=True)
class Look:
    """A job as its machine sees it. kind: none, running, ended, or dead (it neither runs nor ended)."""

    kind: str
    number: int = 0  # last attempt
    status: int = 0  # its exit status
    verified: bool = False  # all files of that attempt were verified on the user's machine
    others: tuple[str, ...] = ()  # "JOB STATE" of other jobs that are not verified
    runs: tuple[str, ...] = ()  # reserve: "ROWS RUN" of runs there, see transfer.push_runs

    @property
    def died(self) -> bool:
        return self.kind in ("none", "dead") or (self.kind == "ended" and self.status >= 128)  # killed by a signal


@dataclass(frozen=True)
class Job:
    """Sweeps to run on a pod. id identifies the sweeps' content, whatever the machine."""

    pod: Pod
    pod_file: Path
    sweeps: tuple[Sweep, ...]
    files: dict[str, str]  # path in the job's folder -> text of the sweep file when it was read
    words: tuple[str, ...]  # arguments of `pgolf sweep` after the files
    id: str

    @property
    def names(self) -> list[str]:
        return [sweep.name for sweep in self.sweeps]

    @property
    def run_dirs(self) -> list[Path]:
        return [run_dir for sweep in self.sweeps for run_dir in sweep.run_dirs]

    @property
    def command(self) -> str:
        """The command that continues the job from the copies of its sweep files, whatever becomes of the files."""
        variables = _knobs() | ({"PGOLF_RUNS": runs} if (runs := os.environ.get("PGOLF_RUNS")) else {})
        environment = ["env", *map("=".join, variables.items())] if variables else []
        files = [str(state.folder(self.id) / name) for name in self.files]
        return shlex.join([*environment, "pgolf", "remote", "run", str(self.pod_file), *files, *self.words])

    @property
    def settings(self) -> str:
        """settings.sh of job.sh: how an attempt runs `pgolf sweep`, with the local knobs alone."""
        pod, files = self.pod, [f'"$job"/{shlex.quote(name)}' for name in self.files]
        lines = [f"python={shlex.quote(pod.python)} setup={shlex.quote(pod.setup.strip())} gpus={pod.gpus}"]
        lines += [f"unset {' '.join(PREFIX + name.upper() for name in RunConfig.model_fields)}"]
        lines += [f"export {name}={shlex.quote(value)}" for name, value in _knobs().items()]
        return "\n".join([*lines, f"set -- {' '.join(files)} {shlex.join(self.words)}\n"])

    def log(self, number: int) -> Path:
        """What an attempt printed, once it is pulled."""
        return state.folder(self.id) / f"attempt-{number}.log"

    def known(self) -> dict:
        """The job's state on this machine, {} if it was last seen on another one."""
        known = state.read(self.id)
        return known if self.pod.place.items() <= known.items() else {}

    def update(self, **news: object) -> None:
        """Add to the job's state on this machine."""
        facts = self.pod.place | {"sweeps": self.names, "command": self.command}
        state.write(self.id, self.known() | facts | news)

    def ask(self, command: str, *words: str) -> Look:
        """Run look, reserve, start or verified of job.sh on this job; what is there then. Raises as `call` does."""
        lines = [line.partition(" ")[::2] for line in self.pod.call(command, self.id, *words).splitlines()]
        if not lines or lines[-1][0] != "end":
            raise UnreachableError(f"{self.pod.address}: the connection broke in the answer to {command}")
        kind, *numbers = dict(lines)["state"].split()
        number, status = (*map(int, numbers), 0, 0)[:2]
        verified = kind == "ended" and dict(lines).get("verified") == str(number)
        others, runs = (tuple(words for name, words in lines if name == key) for key in ("other", "run"))
        return Look(kind, number, status, verified, others, runs)

    def next_number(self, found: Look) -> int:
        """Number of the attempt after the one found, and after all that were started from here on any machine."""
        return max(found.number, state.read(self.id).get("number") or 0) + 1


def _knobs() -> dict[str, str]:
    """The environment variables that set knobs of sweeps here."""
    return {PREFIX + name.upper(): value for name, value in sorted(environment_knobs(prefixed=True).items())}


def load_job(
    pod_file: Path, files: list[Path], knobs: dict[str, str], scale: str = "", seeds: list[int] | None = None
) -> Job:
    """Read and check everything that defines the job. Raises RemoteError or SweepError."""
    pod = load_pod(pod_file)
    sweeps = {file: load_sweep(file, knobs, scale, seeds) for file in files}
    words = [word for name, value in knobs.items() for word in ("-k", f"{name}={value}")]
    words += ["--scale", scale] if scale else []
    words += ["--seeds", *map(str, seeds)] if seeds else []
    content, texts = {}, {}
    for i, (file, sweep) in enumerate(sweeps.items()):
        if sweep.name in content:
            raise RemoteError(f"two of {', '.join(map(str, files))} are the same sweep; name each once")
        stages = [list(stage) for stage in sweep.stages.items()]
        content[sweep.name] = [{run: config.hash for run, config in sweep.runs.items()}, stages]
        # A sweep may be named after its file, so the name stays.
        texts[f"{i}-{sweep.name}/{Path(file).name}"] = Path(file).read_text(encoding="utf-8")
    job_id = f"{next(iter(content), 'none')}-{digest(content)}"
    return Job(pod, Path(pod_file).absolute(), tuple(sweeps.values()), texts, tuple(words), job_id)


def other_job(job: Job, found: Look) -> str:
    """In words, a job other than this one on the machine whose files are not verified; '' if there is none."""
    others, place = dict(words.split(" ", 1) for words in found.others), job.pod.place
    for other, known in state.states().items():  # in other folders of the machine
        differ = {key for key in place if known.get(key) != place[key]}
        if other != job.id and differ and differ <= {"user", "dir"} and not known.get("verified"):
            others[other] = f"in {known['dir']}"
    if not others:
        return ""
    other, what = next(iter(others.items()))
    command = state.read(other).get("command") or "`pgolf remote run` where it was started"
    return (
        f"{job.pod.address}: another job is on this machine: {other} ({what}); finish it first: {command}. If "
        f"nothing of it is needed, delete {state.folder(other)}, and jobs/{other} there"
    )


def start(job: Job, number: int, say: Say, push: bool = True) -> None:
    """Push what is missing and start attempt `number`; if an attempt runs already, nothing is started.

    push: False = with the code and data that are there. Raises RemoteError if another job is on the machine.
    """
    pod, token = job.pod, secrets.token_hex(4)
    owner = f"{socket.gethostname()}:{directory.RUNS.absolute()}"
    found = job.ask("reserve", token, owner, *job.names)
    if why := other_job(job, found):
        raise RemoteError(why)
    if found.kind != "running":
        if push:
            transfer.push_code(pod, job.sweeps, say)
        transfer.push_runs(pod, job.run_dirs, found.runs, say)
        texts = {"job.sh": JOB_SCRIPT.read_text(encoding="utf-8"), "settings.sh": job.settings, **job.files}
        for name, text in texts.items():
            atomic_write(state.folder(job.id) / name, text)
        transfer.send(pod, f"jobs/{job.id}/", state.folder(job.id), sorted(texts))
        note(job, Look("starting", number))
        runs = [f"{run_dir.parent.name}/{run_dir.name}" for run_dir in job.run_dirs]
        found = job.ask("start", str(number), token, *runs)
    note(job, found)


def note(job: Job, found: Look) -> None:
    """Write down the state in which the job was seen; of an attempt not known yet, forget what was known of others."""
    if job.known().get("number") != found.number:
        forget_errors(job.run_dirs)  # this attempt's are pulled
        state.write(job.id, {**job.pod.place, "number": found.number, "started": state.now()})
    job.update(state=found.kind)
