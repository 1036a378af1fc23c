"""Integrity of a run's files: what is damaged, and what is missing before its machine may be given up."""

import os
from pathlib import Path

from pgolf.disk import checksum, open_regular, read_json
from pgolf.runs.directory import MAX_LOG_BYTES
from pgolf.runs.result import ARTIFACT, CHECKPOINT, CHECKSUMMED_FILES, RunError, read_result

OWN_FILES = {*CHECKSUMMED_FILES, ARTIFACT, CHECKPOINT, "config.json", "result.json", "job.json", "notebook.ipynb"}
MAX_HEADER_BYTES = 2**20  # a checkpoint's header is smaller
WRITTEN_WITHIN = 5.0  # seconds between the last file and result.json, at most


def is_complete(run_dir: Path) -> bool:
    """Whether the run has a result and every file matches it, by checksums."""
    try:
        result = read_result(run_dir)
    except RunError:
        return False
    return result is not None and not damage(run_dir, vars(result), thorough=True)


def damage(run_dir: Path, result: dict, thorough: bool = False) -> str:
    """Name of the first damaged file of a complete run, '' if there is none. result: content of result.json.

    Logs are compared with their checksums, the artifact with its size; artifact and checkpoint with their checksums if
    they are newer than result.json, or thorough. Checkpoint and log.txt may have been deleted to save space. A link is
    damage, since nothing vouches for what it names.
    """
    with os.scandir(run_dir) as entries:
        if links := [entry.name for entry in entries if entry.name in OWN_FILES and entry.is_symlink()]:
            return f"{links[0]} (a link)"
    for name in ("job.json", "import.json"):
        if (run_dir / name).exists() and read_json(run_dir / name) is None:
            return name
    if not _whole_notebook(run_dir / "notebook.ipynb"):
        return "notebook.ipynb"
    for name, sha256 in result["files"].items():
        path = run_dir / name
        if name != "log.txt" and not path.exists():
            return f"{name} (missing)"
        if path.exists() and not _is(path, sha256, most=MAX_LOG_BYTES):
            return name
    since = 0.0 if thorough else (run_dir / "result.json").stat().st_mtime + WRITTEN_WITHIN
    artifact, checkpoint = run_dir / ARTIFACT, run_dir / CHECKPOINT
    if result["artifact_sha256"] and result["kind"] != "import":
        if not artifact.exists():
            return f"{ARTIFACT} (missing)"
        size = (result["total_bytes"] or 0) - result["bytes"].get("code", 0)
        if artifact.stat().st_size != size or not _is(artifact, result["artifact_sha256"], since):
            return ARTIFACT
    if not (result["kind"] in ("train", "checkpoint") and result["checkpoint_sha256"] and checkpoint.exists()):
        return ""  # an export's checkpoint is its source's
    too_large = checkpoint.stat().st_size > 8 * (result["parameters"] or 0) + MAX_HEADER_BYTES
    return CHECKPOINT if too_large or not _is(checkpoint, result["checkpoint_sha256"], since) else ""


def lacking(run_dir: Path, training: bool = True) -> list[str]:
    """Names of missing files without which the machine that made the run must not be given up.

    Always needed: knobs, environment and log; with a score its artifact; without a result error.json. A run that never
    began has the knobs and log of its notebook. training: False for a stage, which keeps no log.
    """
    result = read_json(run_dir / "result.json")
    needed = [("config.json",)]
    if result is None:
        began = (run_dir / "config.json").exists()
        needed = [("config.json", "job.json"), ("log.txt", "kernel.log"), ("error.json",)]
        needed += [("environment.json",)] if training and began else []
    elif result.get("kind") == "train":
        needed += [("environment.json",), ("log.txt",)]
    if result and result.get("artifact_sha256"):
        needed.append((ARTIFACT,))
    return [names[0] for names in needed if not any((run_dir / name).is_file() for name in names)]


def _is(path: Path, sha256: str, since: float = 0.0, most: int | None = None) -> bool:
    """True if the file has this checksum; assumed for files older than `since` (seconds, 0 = none)."""
    try:
        return (since > 0 and path.stat().st_mtime <= since) or checksum(path, most) == sha256
    except OSError:
        return False


def _whole_notebook(path: Path) -> bool:
    """True if there is no executed notebook, or it begins and ends like one; no figure is read from it."""
    if not path.exists():
        return True
    try:
        with open_regular(path) as f:
            head = f.read(64)
            f.seek(max(0, path.stat().st_size - 64))
            return head.lstrip()[:1] == b"{" and f.read().rstrip()[-1:] == b"}"
    except OSError:
        return False
