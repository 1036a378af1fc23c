"""A job: sweeps on a pod. What says it, what is known of it here, and how it is started there and looked at.

There, below the pod's dir, are checkout/, runs/ and jobs/<job>/, with a script, a claim (pid, and when it began), a
log and an exit status of each try. Here is runs/.remote/<job>/: a copy of that folder, and state.json.
"""

import json
import os
import secrets
import shlex
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from pgolf.machines import transfer
from pgolf.machines.ssh import FIND_PYTHON, Pod, RemoteError, UnreachableError, at, load_pod, run_script
from pgolf.runs import directory
from pgolf.runs.result import TIME, read_json
from pgolf.sweeps.sweep_file import Sweep, load_sweep
from pgolf_core.config import RunConfig, digest, environment_knobs
from pgolf_core.files import atomic_write

OF_A_TRY = dict.fromkeys(  # what is known of the last try alone
    ("starting", "ended", "status", "verified", "verified_on", "verified_number", "failed", "teardown")
)
BEGAN_NOT = 3  # exit status of a job whose python, setup or GPUs failed
SEES_GPUS = (
    "import torch, sys; n = torch.cuda.device_count(); "
    'sys.exit(0 if n >= %(gpus)d else f"torch {torch.__version__} sees {n} GPUs, %(gpus)d are needed: '
    'the driver is too old for it, or it has no CUDA; take another machine, or set python: to one that sees them")'
)


@dataclass(frozen=True)
class Job:
    """Sweeps to run on a pod. id names what they are, whatever the machine."""

    pod: Pod
    pod_file: Path
    sweeps: tuple[Sweep, ...]
    files: tuple[Path, ...]
    texts: tuple[str, ...]  # of the files, as they were read: a job is what it began with
    words: tuple[str, ...]  # of `pgolf sweep`, after the files
    id: str

    @property
    def names(self) -> list[str]:
        return [sweep.name for sweep in self.sweeps]

    @property
    def command(self) -> str:
        """What goes on with the job, whatever becomes of its sweep files: from copies of them."""
        knobs = {name.upper(): value for name, value in environment_knobs().items()}
        knobs |= {"PGOLF_RUNS": os.environ["PGOLF_RUNS"]} if os.environ.get("PGOLF_RUNS") else {}
        before = ["env", *(f"{name}={value}" for name, value in sorted(knobs.items()))] if knobs else []
        files = [str(transfer.folder(self.id) / name) for name in _sweep_files(self)]
        return shlex.join([*before, "pgolf", "remote", "run", str(self.pod_file), *files, *self.words])


@dataclass(frozen=True)
class Look:
    """kind: none (no such job there), running, ended, dead (it neither runs nor ended)."""

    kind: str
    number: int = 0  # of the last try there
    status: int = 0  # its exit status

    @property
    def died(self) -> bool:
        return self.kind in ("none", "dead") or (self.kind == "ended" and self.status >= 128)  # by a signal


def load_job(
    pod_file: Path, files: list[Path], knobs: dict[str, str], scale: str = "", seeds: list[int] | None = None
) -> Job:
    """Read and check all that says what is to run where. RemoteError, SweepError."""
    pod = load_pod(pod_file)
    sweeps = tuple(load_sweep(file, knobs, scale, seeds) for file in files)
    texts = tuple(Path(file).read_text(encoding="utf-8") for file in files)
    if len({sweep.name for sweep in sweeps}) < len(sweeps):
        raise RemoteError(f"two of {', '.join(map(str, files))} are the same sweep; name each once")
    words = [word for name, value in knobs.items() for word in ("-k", f"{name}={value}")]
    words += ["--scale", scale] if scale else []
    words += ["--seeds", *map(str, seeds)] if seeds else []
    content = {
        sweep.name: [
            {run: config.hash for run, config in sweep.runs.items()},
            [[stage.notebook, stage.parameters] for stage in sweep.stages],
        ]
        for sweep in sweeps
    }
    job_id = f"{sweeps[0].name if sweeps else 'none'}-{digest(content)}"
    return Job(pod, Path(pod_file).absolute(), sweeps, tuple(files), texts, tuple(words), job_id)


# What is known here


def read_state(job_id: str) -> dict:
    """{} of a job that was never started from here."""
    return read_json(transfer.folder(job_id) / "state.json") or {}


def write_state(job: Job, **news: object) -> dict:
    """The job's state with the news in it, now on disk."""
    pod = job.pod
    where = {**place(pod), "sweeps": job.names, "command": job.command}
    state = read_state(job.id) | where | news
    atomic_write(transfer.folder(job.id) / "state.json", json.dumps(state, indent=1))
    return state


def note(job: Job, found: Look, **news: object) -> None:
    """Write down in what state the job was seen. What was known of another try, or machine, is not so of this one."""
    anew = {} if is_known(job, found) else OF_A_TRY | {"started": now()}
    write_state(job, **{"state": found.kind, "number": found.number} | anew | news)


def is_known(job: Job, found: Look) -> bool:
    """Whether the state is of this try, on this machine."""
    state = read_state(job.id)
    here = place(job.pod).items() <= state.items()
    return bool(state.get("started")) and found.number == state.get("number") and here


def place(pod: Pod) -> dict:
    """What tells a machine and its folder from others."""
    return {"host": pod.host, "port": pod.port, "user": pod.user, "dir": pod.dir}


def states() -> dict[str, dict]:
    """Job -> state, of all that were started from here."""
    found = sorted((directory.RUNS / transfer.REMOTE).glob("*/state.json"))
    return {path.parent.name: read_state(path.parent.name) for path in found}


def again(job_id: str, seen: Job) -> str:
    """What a user is to do about a job that is not home, on the machine of another."""
    state = read_state(job_id)
    if "command" not in state:
        return "go on with it first, from where it was started"
    words = shlex.split(state["command"])
    if not _same_machine(state, seen.pod) or _same_folder(state, seen.pod):  # seen there, wherever it went since
        words[words.index("run") + 1] = str(seen.pod_file)
    return f"go on with it first: {shlex.join(words)}"


def now() -> str:
    return time.strftime(TIME, time.gmtime())


# The job there

LIBRARY = r"""
since() {  # when a process began, and at which boot; nothing of one that is gone, or waits to be buried
    if [ -r /proc/self/stat ]; then
        [ -r "/proc/$1/stat" ] || return 0
        set -- $(sed 's/.*) //' "/proc/$1/stat")
        [ "$1" = Z ] || echo "${20}-$(cat /proc/sys/kernel/random/boot_id)"
    else
        ps -o lstart= -p "$1" | tr -d ' '
    fi
}
look() {  # in a job's folder
    n=$(ls 2>/dev/null | sed -n 's/^try-\([0-9]*\)$/\1/p' | sort -n | tail -1)
    [ -n "$n" ] || { echo none; return; }
    i=0
    while [ ! -s "try-$n" ] && [ $i -lt 3 ]; do sleep 1; i=$((i + 1)); done  # claimed at this very moment?
    pid= began=
    read -r pid began < "try-$n"
    if [ ! -s "try-$n.status" ] && [ -n "$began" ] && [ "$(since "$pid")" = "$began" ]; then
        echo "running $n"
    elif [ -s "try-$n.status" ]; then
        echo "ended $n $(cat "try-$n.status")"
    else
        echo "dead $n"
    fi
}
"""
LOOK = LIBRARY + 'cd "$1/jobs/$2" 2>/dev/null || { echo none; exit 0; }; look'
OTHERS = LIBRARY + (
    'cd "$1/jobs" 2>/dev/null || exit 0\n'
    'for job in *; do (cd "$job" && case $(look) in running*) echo "$job" $(cat sweeps);; esac); done; exit 0'
)
ALL = LIBRARY + (
    'cd "$1/jobs" 2>/dev/null || { [ ! -e "$1/jobs" ] && echo end; exit; }\n'
    'for job in *; do [ ! -d "$job" ] || (cd "$job" && echo "$job" $(look) / $(cat sweeps 2>/dev/null)); done\n'
    "echo end"
)
# The try claims its number itself, so that whoever starts it twice has one. What the disk needs for the exit status it
# holds from the beginning, and lets go of at the end.
TRY = (
    LIBRARY
    + r"""
n=%(number)d
set -C
echo "$$ $(since $$)" 2>/dev/null > "try-$n" || exit 0
set +C
exec > "try-$n.log" 2>&1
# One that somebody started by another number runs on, and of two that begin at once the lower.
runs_on() {
    [ -e "try-$1" ] && [ ! -s "try-$1.status" ] || return 1
    pid= began=
    read -r pid began < "try-$1"
    [ -n "$began" ] && [ "$(since "$pid")" = "$began" ]
}
for other in $(ls | sed -n 's/^try-\([0-9]*\)$/\1/p'); do
    [ "$other" = "$n" ] && continue
    [ "$other" -gt "$n" ] && [ ! -e "try-$other.log" ] && continue
    runs_on "$other" || continue
    [ "$other" -gt "$n" ] && sleep 2 && ! runs_on "$other" && continue  # it gave way, as it saw this one
    rm -f "try-$n" "try-$n.log"
    exit 0
done
head -c 65536 /dev/zero > ".try-$n.room"
(
%(settle)s
%(steps)s
)
status=$?
rm -f ".try-$n.room"
until echo $status > ".try-$n.new" && [ -s ".try-$n.new" ] && mv ".try-$n.new" "try-$n.status"; do sleep 5; done
"""
)
# Only the try that has the claim touches runs: what was pushed because home has more of it takes the place of what lies
# there. A try that was killed here leaves the rest to the next.
SETTLE = f"""
incoming=../../runs/.incoming-%s
for path in "$incoming"/*/*; do
    [ -e "$path" ] || continue
    place=../../runs/${{path#"$incoming"/}}
    [ ! -d "$path" ] || rm -rf "$place"
    [ -e "$place" ] || mv "$path" "$place" || {{ echo "$place cannot be put in place"; exit {BEGAN_NOT}; }}
done
rm -rf "$incoming"
"""
START = (
    LIBRARY
    + r"""
cd "$1/jobs/$2" || exit 1
n=$3 new=$4
shift 4
(cd "$new" && find . -type f) | while IFS= read -r file; do
    mkdir -p "$(dirname "$file")" && mv -f "$new/$file" "$file" || exit 1
done || exit 1
rm -rf "$new"
[ -e "try-$n" ] || for run; do rm -f "../../runs/$run/error.json"; done  # of tries before
if command -v setsid >/dev/null; then
    nohup setsid sh "./try-$n.sh" < /dev/null > /dev/null 2>&1 &
else
    nohup sh "./try-$n.sh" < /dev/null > /dev/null 2>&1 &
fi
i=0
while [ ! -s "try-$n" ] && [ $i -lt 100 ]; do sleep 0.1; i=$((i + 1)); done
look
"""
)


def _code() -> dict[str, str]:
    """What the environment there says of the code, which has no .git."""
    known = directory.describe_environment(torch.device("cpu"))
    if known["git_commit"] is None:
        return {}
    return {"PGOLF_GIT_COMMIT": known["git_commit"], "PGOLF_GIT_DIRTY": "1" if known["git_dirty"] else ""}


def steps(job: Job, code: dict[str, str]) -> str:
    """What a try does, in sh, in the job's folder. code: as of _code, when it was pushed."""
    pod = job.pod
    ours = {name.upper(): value for name, value in environment_knobs().items()} | code
    lines = [
        "cd ../.. && top=$(pwd) && cd checkout || exit 1",
        f"unset {' '.join(name.upper() for name in RunConfig.model_fields)}",  # a knob is what it is at home
        *(f"export {name}={shlex.quote(value)}" for name, value in sorted(ours.items())),
        'export PGOLF_ROOT="$top/checkout" PGOLF_RUNS="$top/runs" PYTHONUNBUFFERED=1',
    ]
    if pod.python:
        lines.append(f"python={shlex.quote(pod.python)}")
    else:
        lines += [FIND_PYTHON, f'find_python && "$python" tools/install.py || exit {BEGAN_NOT}']
        lines.append("python=.venv/bin/python")
    if pod.setup.strip():
        lines.append(f"sh -c {shlex.quote(pod.setup)} || {{ echo setup failed; exit {BEGAN_NOT}; }}")
    if pod.gpus:  # else a paid machine trains on its CPU
        lines.append(f'"$python" -c {shlex.quote(SEES_GPUS % {"gpus": pod.gpus})} || exit {BEGAN_NOT}')
    files = " ".join(f'"$top"/jobs/{job.id}/{shlex.quote(name)}' for name in _sweep_files(job))
    return "\n".join([*lines, f'"$python" -m pgolf.cli.main sweep {files} {shlex.join(job.words)}'])


def _sweep_files(job: Job) -> dict[str, str]:
    """Name in the job's folder, here and there -> text; a sweep may be named after its file."""
    both = zip(job.names, job.files, job.texts, strict=True)
    return {f"{i}-{name}/{file.name}": text for i, (name, file, text) in enumerate(both)}


def look(job: Job) -> Look:
    """In what state the job is there."""
    return _look(run_script(job.pod, LOOK, job.pod.dir, job.id))


def _look(said: str) -> Look:
    match said.split():
        case ["none"]:
            return Look("none")
        case ["running" | "dead" as kind, number]:
            return Look(kind, int(number))
        case ["ended", number, status]:
            return Look("ended", int(number), int(status))
    raise UnreachableError(f"the machine answers {said!r}, which says nothing of the job")


def not_home(job: Job, begun: bool) -> dict[str, str]:
    """Job there that runs, ended or died, and is not verified here -> its sweeps. Of other folders there only those
    that were started from here are known.

    begun: the machine may be gone already, so that what home knows is enough where nobody answers. RemoteError.
    """
    known = states()

    def is_open(state: dict) -> bool:
        tried = state.get("started") or state.get("starting")
        return bool(tried) and not state.get("verified") and _same_machine(state, job.pod)

    open_there = {other: state for other, state in known.items() if is_open(state)}
    try:
        *lines, end = run_script(job.pod, ALL, job.pod.dir).splitlines() or [""]
    except UnreachableError:
        if not begun:
            raise
        return {other: " ".join(s["sweeps"]) for other, s in open_there.items()}
    if end != "end":
        raise UnreachableError(f"{job.pod.address}: the connection broke while its jobs were listed")
    found = {other: " ".join(s["sweeps"]) for other, s in open_there.items() if not _same_folder(s, job.pod)}
    for line in lines:
        said, _, names = line.partition(" / ")
        other, kind, *numbers = said.rstrip(" /").split()
        if kind != "none" and not _is_home(known.get(other, {}), job.pod, kind, numbers):
            found[other] = names or other.rpartition("-")[0]
    return found


def _is_home(state: dict, pod: Pod, kind: str, numbers: list[str]) -> bool:
    """Whether just this try of a job, on just this machine, was verified."""
    where, number = state.get("verified_on") or {}, state.get("verified_number")
    same = _same_machine(where, pod) and _same_folder(where, pod)
    return bool(state.get("verified")) and same and kind == "ended" and numbers[:1] == [str(number)]


def _same_machine(where: dict, pod: Pod) -> bool:
    return (where.get("host"), where.get("port")) == (pod.host, pod.port)


def _same_folder(where: dict, pod: Pod) -> bool:
    """Of one machine: a relative one is in its user's home."""
    return where["dir"] == pod.dir and (pod.dir.startswith("/") or where["user"] == pod.user)


def went_with(job: Job) -> str:
    """The job whose teardown took this one's machine, after this one was verified; '' of none."""
    own = read_state(job.id)
    for other, state in states().items():
        torn = state.get("teardown") or {}
        since = torn.get("status") == 0 and torn["begun"] >= own["verified"]
        if other != job.id and _same_machine(state, job.pod) and since:
            return other
    return ""


def start(job: Job, number: int, say: Callable[[str], None], push: bool = True) -> Look:
    """Push what is needed and start a try of the job; the one that runs already where there is one.

    push: without, a job that was started there before goes on with the code and data that it began with.
    """
    pod = job.pod
    if (found := look(job)).kind == "running":  # begun where the connection broke, or by another home
        transfer.forget_errors(job.sweeps)
        note(job, found)
        return found
    others = dict(line.partition(" ")[::2] for line in run_script(pod, OTHERS, pod.dir).splitlines())
    others.pop(job.id, None)
    for other, names in others.items():
        if same := sorted(set(names.split()) & set(job.names)):
            what = f"sweep {', '.join(same)} runs there already, as job {other}"
            raise RemoteError(f"{pod.address}: {what}; {again(other, job)}")
    new = secrets.token_hex(4)
    pushed = read_state(job.id).get("pushed") or {}
    if push or pushed.get("name") != transfer.pushed_name(pod):
        transfer.push_code(pod, job.sweeps, sorted(others), new, say)
        pushed = {"name": new, "code": _code()}
    transfer.push_runs(pod, job.sweeps, new, say)
    does = {"number": number, "settle": SETTLE % new, "steps": steps(job, pushed["code"])}
    texts = {f"try-{number}.sh": TRY % does, "sweeps": " ".join(job.names) + "\n"}
    for name, text in _sweep_files(job).items():
        texts[name] = text
        atomic_write(transfer.folder(job.id) / name, text)  # whatever becomes of the sweep file
    folder = transfer.folder(job.id) / f".new-{new}"
    try:
        for name, text in texts.items():
            atomic_write(folder / name, text)
        run_script(pod, 'mkdir -p "$1/jobs/$2"', pod.dir, job.id)
        transfer.send(pod, [".", *at(pod, f"jobs/{job.id}/{folder.name}/")], folder, sorted(texts))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    write_state(job, pushed=pushed, **OF_A_TRY | {"state": "starting", "starting": number})
    found = _look(run_script(pod, START, pod.dir, job.id, str(number), folder.name, *_run_folders(job)))
    transfer.forget_errors(job.sweeps)  # here too: all of these are tried again
    note(job, found, **OF_A_TRY | {"started": now()})
    return found


def _run_folders(job: Job) -> list[str]:
    return [f"{run_dir.parent.name}/{run_dir.name}" for sweep in job.sweeps for run_dir in transfer.wanted(sweep)]
