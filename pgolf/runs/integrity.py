"""Is a finished run's directory what it was when the run ended? A damaged one is named and counted nowhere."""

import json
from pathlib import Path

from pgolf.disk import checksum
from pgolf.runs.result import ARTIFACT, CHECKPOINT

WRITTEN_WITHIN = 5.0  # seconds that may lie between a file and the result that describes it


def damage(run_dir: Path, result: dict, thorough: bool = False) -> str:
    """What is wrong with a complete run's files, '' where nothing is. result: of its result.json.

    Log and metrics are held to their checksums; artifact and checkpoint to their sizes, and to their checksums where
    they are younger than the result, or thorough. A checkpoint, and the log, may have been deleted to save space.
    """
    for name in ("job.json", "import.json"):
        if (run_dir / name).exists() and not _is_mapping(run_dir / name):
            return name
    if not _whole_notebook(run_dir / "notebook.ipynb"):
        return "notebook.ipynb"
    for name, sha256 in result["files"].items():
        path = run_dir / name
        if name != "log.txt" and not path.exists():
            return f"{name} (missing)"
        if path.exists() and checksum(path) != sha256:
            return name
    since = None if thorough else (run_dir / "result.json").stat().st_mtime + WRITTEN_WITHIN
    artifact, checkpoint = run_dir / ARTIFACT, run_dir / CHECKPOINT
    if result["artifact_sha256"] and result["kind"] != "import":
        if not artifact.exists():
            return f"{ARTIFACT} (missing)"
        size = result["total_bytes"] - result["bytes"]["code"]
        if artifact.stat().st_size != size or not _is(artifact, result["artifact_sha256"], since):
            return ARTIFACT
    own = result["kind"] == "train" and result["checkpoint_sha256"]  # of an export it is that of its source's
    whole = not own or not checkpoint.exists() or (_whole_safetensors(checkpoint) and _is(checkpoint, own, since))
    return "" if whole else CHECKPOINT


def lacking(run_dir: Path, training: bool = True) -> list[str]:
    """What is not there of the least that a run's directory must hold before the machine that made it may go.

    Knobs, environment and log, whatever became of it; the file of one that scored it, and of any other why it has none.
    One that ended before it began has knobs and log of its notebook. training: False for a stage, which keeps no log.
    """
    result_file = run_dir / "result.json"
    result = json.loads(result_file.read_text(encoding="utf-8")) if result_file.exists() else None
    needed = [("config.json",)]
    if result is None:
        began = (run_dir / "config.json").exists()
        needed = [("config.json", "job.json"), ("log.txt", "kernel.log"), ("error.json",)]
        needed += [("environment.json",)] if training and began else []
    elif result["kind"] == "train":
        needed += [("environment.json",), ("log.txt",)]
    if result and result["artifact_sha256"]:
        needed.append((ARTIFACT,))
    return [names[0] for names in needed if not any((run_dir / name).is_file() for name in names)]


def _is(path: Path, sha256: str, since: float | None) -> bool:
    """Whether the file has this checksum; one older than `since` is taken to have it."""
    if since is not None and path.stat().st_mtime <= since:
        return True
    return checksum(path) == sha256


def _is_mapping(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    except ValueError:
        return False


def _whole_notebook(path: Path) -> bool:
    """Whether an executed notebook, where there is one, begins and ends as one: it says nothing that is counted."""
    if not path.exists():
        return True
    with open(path, "rb") as f:
        head = f.read(64)
        f.seek(max(0, path.stat().st_size - 64))
        return head.lstrip()[:1] == b"{" and f.read().rstrip()[-1:] == b"}"


def _whole_safetensors(path: Path) -> bool:
    """Whether the header can be read and names as many bytes as there are."""
    size = path.stat().st_size
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if not 0 < length <= size - 8:
            return False
        try:
            header = json.loads(f.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return False
    return 8 + length + max(ends, default=0) == size
