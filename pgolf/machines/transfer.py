"""Files to and from a rented machine, by rsync over ssh.

A pull copies what is new into runs/.remote/<job>/.arriving. From there each file is moved into place unless the local
one is better (`reason_to_keep_local`), a result.json only after the files it references. So a kill at any moment
leaves whole files, never shorter than before.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from pgolf.disk import checksum, read_json
from pgolf.machines import state
from pgolf.machines.pod import Pod, RemoteError, UnreachableError
from pgolf.runs import directory, integrity
from pgolf.runs.directory import git
from pgolf.runs.result import RunError, read_result
from pgolf.sweeps.sweep_file import Sweep
from pgolf.training.inputs import open_dataset
from pgolf.training.resume import RESUME
from pgolf_core.config import MARKER, ROOT

MUTABLE_AFTER_COMPLETION = ("notebook.ipynb", "kernel.log", "job.json")
TRUNCATED = "truncated on the machine"
COMPLETE, LONGER = "the run is complete locally", "the local copy is longer"
NOT_NEEDED = "truncated on the machine, and not needed"
LOCAL_IS_BETTER = (COMPLETE, LONGER, NOT_NEEDED)


# Push


def code_files() -> list[str]:
    """Files to push, relative to ROOT: those that git tracks. RemoteError without git or a repository."""
    if (ROOT / MARKER).is_file():
        raise RemoteError(f"{ROOT}: made by `pgolf init`; `pgolf remote` pushes a checkout, so start it in one")
    names = sorted(name for name in _listed() if (ROOT / name).is_file())
    if not names:
        raise RemoteError(f"{ROOT}: git tracks no file here, and only tracked ones are pushed: git init && git add .")
    return names


def _listed(*options: str) -> list[str]:
    return [name for name in (git("ls-files", "-z", *options) or "").split("\0") if name]


def data_files(sweeps: tuple[Sweep, ...]) -> list[str]:
    """Shards and tokenizers of the runs, relative to ROOT. DataError; RemoteError if they are outside of ROOT."""
    names, root = set(), ROOT.absolute()
    configs = [config for sweep in sweeps for config in sweep.runs.values()]
    for config in {(c.data_path, c.tokenizer, c.tokenizer_path, c.vocab_size): c for c in configs}.values():
        dataset = open_dataset(config)
        is_absolute = os.path.isabs(config.data_path) or os.path.isabs(config.tokenizer_path)
        for path in [*dataset.directory.absolute().iterdir(), dataset.tokenizer_path.absolute()]:
            if is_absolute or ".." in path.parts or not path.is_relative_to(root):
                raise RemoteError(
                    f"data: push: {path} must be below {ROOT} and data_path relative to it, since the folder has "
                    "another path on the machine; or copy it there yourself and set data: there"
                )
            if path.is_file() and path.suffix not in (".tmp", ".lock"):
                names.add(path.relative_to(root).as_posix())
    return sorted(names)


def push_code(pod: Pod, sweeps: tuple[Sweep, ...], say) -> None:
    """Push code, the data of the sweeps, and which commit it is; delete code that earlier pushes left."""
    code, data = code_files(), data_files(sweeps) if pod.data == "push" else []
    size = sum((ROOT / name).stat().st_size for name in data)
    say(f"pushing {len(code)} files of code, and {len(data)} files of data, {size:,} bytes")
    if untracked := _listed("-o", "--exclude-standard"):
        more = f" and {len(untracked) - 5} more" if len(untracked) > 5 else ""
        say(f"not pushed, since git does not track them (git add does): {', '.join(untracked[:5])}{more}")
    send(pod, "checkout/", ROOT, code + data)
    dirty = "1" if git("status", "--porcelain") else ""
    pod.call("code", str(len(code)), git("rev-parse", "HEAD") or "", dirty, stdin="\n".join(code) + "\n")


def push_runs(pod: Pod, run_dirs: list[Path], there: Sequence[str], say) -> None:
    """Push the files of complete runs, and of unfinished ones that are further here than on the machine.

    there: "ROWS RUN" of the runs there: rows of metrics that the resume file covers, or "complete".
    """
    rows = {run: rows for rows, run in (words.split(" ", 1) for words in there)}
    names: list[str] = []
    for run_dir in run_dirs:
        run = f"{run_dir.parent.name}/{run_dir.name}"
        complete, metrics = integrity.is_complete(run_dir), run_dir / "metrics.jsonl"
        local_rows = metrics.read_bytes().count(b"\n") if (run_dir / RESUME).exists() and metrics.exists() else -1
        if rows.get(run) != "complete" and (complete or local_rows > int(rows.get(run, -1))):
            skip = ("error.json", RESUME if complete else "")
            files = sorted(path.name for path in run_dir.iterdir() if path.is_file() and path.name[0] != ".")
            names += [f"{run}/{name}" for name in files if name not in skip]
    if names:
        say(f"pushing {len(names)} files of runs")
        send(pod, "runs/", directory.RUNS, names, "--delay-updates")  # all in place at once, at the end


def send(pod: Pod, target: str, cwd: Path, names: list[str], *options: str) -> None:
    """Copy these files of a local folder to a folder of the pod; RemoteError unless all arrive."""
    if not pod.rsync(["-rlpt", *options, ".", *pod.at(target)], cwd, names):
        raise RemoteError(f"{pod.address}: not every file could be pushed; is {pod.dir} writable there?")


# Pull


def pull(pod: Pod, job_id: str, names: list[str], compare_contents: bool = False) -> tuple[bool, dict[str, str]]:
    """Copy what is new in these sweeps' folders, and in the job's.

    Returns whether every file could be read there; and, per <sweep>/<run>/<file> that was not taken, why not.
    compare_contents: compare checksums of all files, not only sizes and times. Raises UnreachableError, RemoteError or
    OSError; what had arrived whole by then is in place.
    """
    arriving = state.folder(job_id) / ".arriving"
    arriving.mkdir(parents=True, exist_ok=True)
    words = ["-rtR", "--partial-dir=.partial", "--exclude=.*", "--compare-dest=../..", "--compare-dest=../../.."]
    words += ["--checksum"] if compare_contents else []
    sources = [*pod.at(*(f"runs/./{name}" for name in names), f"jobs/./{job_id}"), "."]
    try:
        # Resume files first: the log and metrics that come after then reach at least as far as the resume file.
        only = [f"--include={RESUME}", "--include=*/", "--exclude=*"]
        whole = pod.rsync([*words, *only, *sources], arriving)
        whole &= pod.rsync([*words, f"--exclude={RESUME}", *sources], arriving)
    except (RemoteError, OSError):
        _move_into_place(job_id, with_resume=False)
        raise
    not_taken = _move_into_place(job_id, with_resume=whole)
    if whole:  # only empty folders are left, and parts of files that are gone there
        shutil.rmtree(arriving, ignore_errors=True)
    return whole, not_taken


def _move_into_place(job_id: str, with_resume: bool) -> dict[str, str]:
    """Per file that was not taken, why not."""
    arriving, not_taken, complete = state.folder(job_id) / ".arriving", {}, {}
    places = [path.relative_to(arriving) for path in arriving.rglob("*") if path.is_file()]
    places = [place for place in places if not any(part.startswith(".") for part in place.parts)]  # rsync's own
    # A resume file after its metrics, a result after everything it references.
    for place in sorted(places, key=lambda place: (place.name == "result.json", place.name == RESUME, place)):
        if place.name == RESUME and not with_resume:
            continue
        arrived, name, run_dir = arriving / place, place.as_posix(), directory.RUNS.joinpath(*place.parts[:2])
        local = (directory.RUNS / state.REMOTE if place.parts[0] == job_id else directory.RUNS) / place
        if run_dir not in complete:
            complete[run_dir] = integrity.is_complete(run_dir)
        why = reason_to_keep_local(arrived, local, complete[run_dir])
        if place.name == "result.json" and not complete[run_dir]:
            why = _result_waits_for(arrived, run_dir) or why
        elif place.name == RESUME and local.exists():
            why = why or not_taken.get(place.with_name("metrics.jsonl").as_posix(), "")
        if why:
            not_taken[name] = why
            arrived.unlink()
        else:
            local.parent.mkdir(parents=True, exist_ok=True)
            os.replace(arrived, local)
    return not_taken


def reason_to_keep_local(incoming: Path, local: Path, run_complete: bool) -> str:
    """Why an incoming file must not overwrite the local one; '' if it may.

    Log files only grow, so an incoming file that is a prefix of the local one is stale. A resumed training writes its
    later rows again: once the contents differ, the incoming ones count.
    """
    is_mutable = incoming.name in MUTABLE_AFTER_COMPLETION
    if run_complete and not is_mutable and (local.exists() or incoming.name in ("error.json", RESUME)):
        return COMPLETE
    if incoming.suffix in (".json", ".ipynb") and read_json(incoming) is None:
        return NOT_NEEDED if is_mutable else TRUNCATED
    return LONGER if is_strict_prefix(incoming, local) else ""


def is_strict_prefix(path: Path, other: Path, chunk: int = 1 << 20) -> bool:
    """True if `other` exists, is longer than `path`, and starts with the same bytes."""
    if not other.exists() or path.stat().st_size >= other.stat().st_size:
        return False
    with open(path, "rb") as a, open(other, "rb") as b:
        return all(block == b.read(len(block)) for block in iter(lambda: a.read(chunk), b""))


def _result_waits_for(arrived: Path, run_dir: Path) -> str:
    """The file that an arrived result references and that is not in place yet; '' if all are."""
    try:
        return integrity.damage(run_dir, vars(read_result(arrived.parent)), thorough=True)
    except RunError:
        return TRUNCATED


def differing(pod: Pod, job_id: str, names: list[str]) -> dict[str, str]:
    """Pull; then the files whose local sha256 is not the machine's, and why.

    Files of which the local copy is better do not count. Raises UnreachableError, RemoteError or OSError.
    """
    not_taken = pull(pod, job_id, names, compare_contents=True)[1]
    lines = pod.call("checksums", *names, timeout=3600).splitlines()
    if lines[-1:] != ["end"]:
        raise UnreachableError(f"{pod.address}: the connection broke while files were read there")
    differ = {}
    for sha256, name in (line.split("  ", 1) for line in lines[:-1]):
        local, why = directory.RUNS / name, not_taken.get(name, "other content")
        if why not in LOCAL_IS_BETTER and not (local.is_file() and checksum(local) == sha256):
            differ[name] = why
    return differ
