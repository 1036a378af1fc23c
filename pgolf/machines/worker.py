"""What a machine does for somebody's sweep: it runs one notebook at a time, and hands files of runs in and out.

cluster.py calls this from elsewhere, in the process of a Dask worker; below are both ends of copying files. It imports
neither torch nor pandas, which would stay there: what needs them runs in processes of its own, with the code that is on
disk by then.
"""

import asyncio
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from importlib import metadata
from pathlib import Path

import filelock
import psutil

from pgolf.disk import checksum
from pgolf.processes import SWEEP_PID, kill_family
from pgolf.runs import integrity
from pgolf.runs.code import code_digest
from pgolf.runs.result import CHECKSUMMED_FILES
from pgolf_core.config import ROOT
from pgolf_core.files import atomic_path, atomic_write

POLL_SECONDS = 0.5
LOCK_SECONDS = 60.0  # a kernel that another machine lost sight of lets go within these
TICKET = ".ticket"  # in a run's directory: which home's run this is a copy of
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")  # Dask's nanny sets them all to 1
STARTED_WITH = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()  # this file, as this process has it

PIECE = 4 << 20  # bytes at a time: the worker and the scheduler have other things to do meanwhile
EVERY_SECONDS = 2.0  # between two looks, and
SHARE = 5  # so many times as long as the last one took
TRIES = 3
RESULT, RESUME = "result.json", "resume.pt"
JOB = "job.json"  # names files of the machine that it lies on: each has its own

_one_at_a_time = threading.Lock()  # whatever the worker's number of threads: a run has its GPUs to itself


def store() -> Path:
    """This machine's runs, as runs.RUNS says without importing torch."""
    return Path(os.environ.get("PGOLF_RUNS", ROOT / "runs")).resolve()


async def call(function, *args):
    """In a thread, for a worker must go on answering its scheduler meanwhile."""
    return await asyncio.to_thread(function, *args)


# What this machine is


def about(canary: str, notebooks: list[str]) -> dict:
    """What decides whether it can do a sweep's runs. canary: a file that lies in the sweep's own store."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return {
        "pid": os.getpid(),
        "host": platform.node(),
        "machine": f"{_machine()} {psutil.boot_time():.0f}",  # hosts are often named alike
        "root": str(ROOT),
        "python": platform.python_version(),
        "torch": metadata.version("torch").partition("+")[0],
        "code": code_digest(notebooks),
        "started_with": STARTED_WITH,
        "shares": (store() / canary).is_file(),
        "gpus": _gpus() if seen is None else len([gpu for gpu in seen.split(",") if gpu.strip()]),
    }


def _machine() -> str:
    return f"{platform.node()} {uuid.getnode():x}"


def _gpus() -> int:
    if not (smi := shutil.which("nvidia-smi")):
        return 0
    with suppress(OSError, subprocess.TimeoutExpired):
        told = subprocess.run([smi, "-L"], capture_output=True, timeout=20).stdout
        return sum(line.startswith(b"GPU") for line in told.splitlines())
    return 0


def fingerprints(knobs: list[dict]) -> list[dict]:
    """Of the data of each run: {'fingerprint': …}, or {'problem': …}. Builds embedded corpora that are not there."""
    done = subprocess.run(
        [sys.executable, "-m", "pgolf.machines.worker"],
        input=json.dumps(knobs),
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        env=environment(),
    )
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return [{"problem": words[-1]} for _ in knobs]
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """fingerprints, in a process of its own."""
    from pgolf.training.round_trip import open_dataset
    from pgolf_core.config import RunConfig

    told = []
    for one in json.load(sys.stdin):
        try:
            told.append({"fingerprint": open_dataset(RunConfig(**one)).fingerprint})
        except (ValueError, OSError) as error:  # DataError, ConfigError: for the user, who sits elsewhere
            told.append({"problem": " ".join(str(error).split())})
    print(json.dumps(told))


# Running


def start_slot(
    run_dir: Path, notebook: Path, parameters: dict, runs_root: Path, environment: Mapping[str, str]
) -> subprocess.Popen:
    """Start a slot that executes a notebook into a run's directory and ends with this process.

    It stands apart from our terminal: Ctrl-C reaches us, and we end it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "error.json").unlink(missing_ok=True)  # of an earlier try
    content = {"notebook": str(notebook), "output": str(run_dir / "notebook.ipynb"), "parameters": parameters}
    job_file = atomic_write(run_dir / "job.json", json.dumps(content, indent=1))
    # The kernel's working directory is another one, so relative folders would not be the same for it.
    ours = {SWEEP_PID: str(os.getpid()), "PGOLF_RUNS": str(runs_root.resolve()), "PGOLF_ROOT": str(ROOT.resolve())}
    with open(run_dir / "kernel.log", "wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "pgolf.sweeps.kernel_process", str(job_file.resolve())],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**environment, **ours},
            start_new_session=True,  # POSIX
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # Windows
        )


def execute(job: dict) -> dict:
    """The task: run a job's notebook here, unless its directory is complete. {'returncode': …, 'complete': …}

    returncode None: ended by us, for nobody wants it any more (its sweep was stopped, or died, and the scheduler
    took the task back) or this worker closes.
    """
    from distributed import get_worker

    worker = get_worker()
    key, run_dir = worker.get_current_task(), store() / job["name"]
    ended = {"returncode": None, "complete": False}

    def wanted() -> bool:
        task = worker.state.tasks.get(key)
        return task is not None and task.state != "cancelled" and worker.status.name in ("running", "paused")

    if os.getpid() != job["pid"]:  # Dask took a new process of the same address for the one that was asked
        return ended
    while not _one_at_a_time.acquire(timeout=POLL_SECONDS):  # another sweep's run
        if not wanted():
            return ended
    process = None
    try:
        if is_complete(run_dir):
            return {"returncode": 0, "complete": True}
        _wait_for_lock(run_dir)
        if not wanted():
            return ended
        notebook = ROOT / "notebooks" / job["notebook"]
        process = start_slot(run_dir, notebook, job["parameters"], store(), environment(worker.nanny is not None))
        while process.poll() is None:
            if not wanted():
                return ended
            time.sleep(POLL_SECONDS)
        return {"returncode": process.returncode, "complete": (run_dir / "result.json").exists()}
    finally:
        if process is not None and process.poll() is None:
            kill_family(process.pid)
            process.wait()
        _one_at_a_time.release()


def is_complete(run_dir: Path) -> bool:
    """Whether a run's directory holds a result and all that it names."""
    try:
        result = json.loads((run_dir / "result.json").read_text(encoding="utf-8"))
        return not integrity.damage(run_dir, result)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _wait_for_lock(run_dir: Path) -> None:
    """Until no kernel writes here any more, or long enough for the next one to say so in words."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with suppress(filelock.Timeout), filelock.FileLock(run_dir / ".lock").acquire(timeout=LOCK_SECONDS):
        pass


def environment(of_nanny: bool = False) -> dict[str, str]:
    """This worker's, without the limits of threads that its nanny added: how many a run has its knobs say."""
    ours = dict(os.environ)
    if of_nanny:
        with suppress(psutil.Error):
            before = psutil.Process(os.getppid()).environ()
            ours = {name: value for name, value in ours.items() if name not in THREADS or name in before}
    return ours


# Files of runs, for a home that does not see this store. name: <sweep>/<run>, file: a path in its directory


def prepare(name: str, ticket: str) -> str:
    """Make a run's directory one of the home that the ticket's first line names; why that cannot be, or ''.

    A copy of an earlier run of that home's, which has deleted it since, goes, and a damaged one; what is anybody
    else's stays.
    """
    run_dir = store() / name
    _wait_for_lock(run_dir)
    path = run_dir / TICKET
    there = path.read_text(encoding="utf-8") if path.exists() else ""
    if there == ticket and (is_complete(run_dir) or not (run_dir / RESULT).exists()):
        return ""
    leftovers = [entry for entry in run_dir.iterdir() if entry.name != ".lock"]
    if leftovers and there.partition("\n")[0] != ticket.partition("\n")[0]:
        return f"{run_dir} on {platform.node()} holds somebody else's run; delete it there, or name yours otherwise"
    for entry in leftovers:
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    atomic_write(path, ticket)
    return ""


def files_of(run_dir: Path) -> dict[str, Path]:
    """A run's files, those of its sub-runs too, by their paths in its directory; none that begins with a dot."""
    found = {path.relative_to(run_dir): path for path in run_dir.rglob("*") if path.is_file()}
    return {place.as_posix(): path for place, path in found.items() if not any(p.startswith(".") for p in place.parts)}


def finished(name: str) -> bool:
    return is_complete(store() / name)


def stamps(name: str) -> dict[str, list[int]]:
    """Size and time of the last change of each file."""
    told = {}
    for file, path in files_of(store() / name).items():
        with suppress(FileNotFoundError):
            told[file] = _stamp(path.stat())
    return told


def _stamp(status: os.stat_result) -> list[int]:
    return [status.st_size, status.st_mtime_ns]


def checksums(name: str) -> dict[str, str]:
    """sha256 of each file."""
    told = {}
    for file, path in files_of(store() / name).items():
        with suppress(FileNotFoundError):
            told[file] = checksum(path)
    return told


def read(name: str, file: str, offset: int, size: int) -> tuple[bytes, list[int]] | None:
    """A piece of a file, and its stamp then; None when it is gone."""
    try:
        with open(store() / name / file, "rb") as f:
            f.seek(offset)
            return f.read(size), _stamp(os.fstat(f.fileno()))  # of what was read, if another has its name by now
    except FileNotFoundError:
        return None


def write(name: str, file: str, offset: int, piece: bytes, last: bool) -> None:
    """Put a piece beside a file's place, and the whole there with the last one."""
    path = store() / name / file
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.pushed.tmp")
    with open(temporary, "r+b" if offset else "wb") as f:
        f.seek(offset)
        f.write(piece)
        if last:
            f.flush()
            os.fsync(f.fileno())
    if last:
        os.replace(temporary, path)


# The same at home. call(function, *args): of the above, on the other machine


class CopyError(ValueError):
    """A copy that cannot be made or had; the message names the directory."""


class _Changed(Exception):
    """A file was replaced or deleted while it was being read."""


def push(call, run_dir: Path) -> None:
    """Make the copy there go on from what we have. CopyError when that place is somebody else's."""
    name = f"{run_dir.parent.name}/{run_dir.name}"
    if problem := call(prepare, name, _ticket(run_dir)):
        raise CopyError(problem)
    ours = files_of(run_dir)
    if RESULT not in ours and call(finished, name):
        return  # it ended there, and home was stopped before that came
    if RESULT not in ours and RESUME not in ours:
        # Nothing to go on from; lines without a resume file could only be older than one that is there.
        for file in CHECKSUMMED_FILES:
            ours.pop(file, None)
    there = call(checksums, name) if ours.keys() - {JOB} else {}
    # The lines of a training must be there before the resume file that stands for them, and all else before a result.
    for file in sorted(ours, key=_rank, reverse=True):
        if file != JOB and there.get(file) != checksum(ours[file]):
            _send(call, name, file, ours[file])


def _ticket(run_dir: Path) -> str:
    """Names this directory among all that there ever were under its name: whose, and which."""
    path = run_dir / TICKET
    if not path.exists():
        atomic_write(path, f"{_machine()} {run_dir.resolve().parents[1]}\n{uuid.uuid4().hex}")
    return path.read_text(encoding="utf-8")


def _rank(file: str) -> int:
    """Results first, then resume files: files are read in this order, and put in place in the reverse one."""
    name = file.rpartition("/")[2]
    return 0 if name == RESULT else 1 if name == RESUME else 2


def _send(call, name: str, file: str, path: Path) -> None:
    size, offset = path.stat().st_size, 0
    with open(path, "rb") as f:
        while True:
            piece = f.read(PIECE)
            last = offset + len(piece) >= size
            call(write, name, file, offset, piece, last)
            offset += len(piece)
            if last:
                return


class Copy:
    """The directory at home of a run that goes on elsewhere."""

    def __init__(self, call, run_dir: Path):
        self.call = call
        self.run_dir = run_dir
        self.name = f"{run_dir.parent.name}/{run_dir.name}"
        self.seen: dict[str, list[int]] = {}
        self.next = 0.0

    def refresh(self) -> None:
        """Bring what has changed, unless that was done just now. The run's result waits for settle."""
        if time.monotonic() < self.next:
            return
        began = time.monotonic()
        there = self.call(stamps, self.name)
        changed = [file for file, stamp in there.items() if self.seen.get(file) != stamp]
        changed = [file for file in changed if file not in (RESULT, JOB)]
        small = [file for file in changed if there[file][0] <= PIECE]
        large = [file for file in changed if there[file][0] > PIECE]
        # First what is quick. A resume file comes with the lines up to it, which are read after it.
        for batch in (small, [*large, *(file for file in CHECKSUMMED_FILES if file in there)] if large else []):
            try:
                self._bring(batch)
                self.seen |= {file: there[file] for file in batch}
            except _Changed:
                pass  # next time
        self.next = time.monotonic() + max(EVERY_SECONDS, SHARE * (time.monotonic() - began))

    def settle(self, complete: bool) -> None:
        """Bring the rest; of a complete run every byte, checked. CopyError when that cannot be had."""
        if not complete:
            self.next = 0.0
            return self.refresh()
        for _ in range(TRIES):
            there = {f: sha for f, sha in self.call(checksums, self.name).items() if f != JOB}
            here = files_of(self.run_dir)
            wanted = [file for file, sha in there.items() if file not in here or checksum(here[file]) != sha]
            try:
                self._bring(wanted, there)
            except _Changed:
                continue
            (self.run_dir / "error.json").unlink(missing_ok=True)
            if RESUME not in there:
                (self.run_dir / RESUME).unlink(missing_ok=True)
            return None
        raise CopyError(f"{self.run_dir}: complete elsewhere, but its files kept changing while they were copied")

    def _bring(self, files: list[str], sha256: dict[str, str] | None = None) -> None:
        """Read files and put all of them in place, the first last. _Changed, and none is, when one does not hold."""
        with ExitStack() as stack:  # which ends its contexts in reverse
            for file in sorted(files, key=_rank):
                path = self.run_dir / file
                temporary = stack.enter_context(atomic_path(path))
                self._fetch(file, temporary)
                if sha256 is not None and checksum(temporary) != sha256[file]:
                    raise _Changed(file)
                if sha256 is None and _begins(path, temporary):
                    shutil.copyfile(path, temporary)  # never less at home than before

    def _fetch(self, file: str, to: Path) -> None:
        offset, first = 0, None
        with open(to, "wb") as f:
            while True:
                answer = self.call(read, self.name, file, offset, PIECE)
                if answer is None:
                    raise _Changed(file)
                piece, stamp = answer
                first = first or stamp
                if stamp != first and file not in CHECKSUMMED_FILES:  # those only grow: what was read holds
                    raise _Changed(file)
                f.write(piece)
                offset += len(piece)
                if len(piece) < PIECE:
                    return


def _begins(whole: Path, part: Path) -> bool:
    """Whether a file is there that begins with part and has more."""
    size = part.stat().st_size
    if not whole.exists() or whole.stat().st_size <= size:
        return False
    with open(whole, "rb") as a, open(part, "rb") as b:
        while piece := b.read(PIECE):
            if a.read(len(piece)) != piece:
                return False
    return True


if __name__ == "__main__":
    main()
