"""The resume file: written while training runs, so that a killed run continues to the same bytes."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from pgolf_core.files import atomic_write

RESUME = "resume.pt"


class TrainError(RuntimeError):
    """Training that cannot go on; the message says at which step and what to change."""


def save_resume(path: Path, made_by: dict, **parts) -> None:
    """Write made_by (see check_resume) and the state dict, or plain value, of every part; atomic."""
    content = {name: part.state_dict() if hasattr(part, "state_dict") else part for name, part in parts.items()}
    buffer = io.BytesIO()  # torch's own writing would hide that the disk is full
    torch.save(content | {"made_by": made_by}, buffer)
    atomic_write(path, buffer.getbuffer())


def read_resume(path: Path) -> dict | None:
    """The content of the resume file on the CPU; None if there is none. TrainError if it is torn or something else."""
    if not path.exists():
        return None
    with naming(path):
        if not path.is_file():
            raise ValueError("not a regular file")
        content = torch.load(path, weights_only=True, map_location="cpu")
        parts = [content[name] for name in ("made_by", "train", "timer", "resumed", "forecast_at_tenth")]
        if not (isinstance(parts[1]["step"], int) and isinstance(parts[3], int)):
            raise TypeError("its step is no number")
        return content


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Any error inside the block, from reading or restoring what is in the resume file, as a TrainError."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        way = "put a good copy in its place to go on from there, or delete it to train anew"
        raise TrainError(f"{path}: torn, or no resume file of this run ({why}); {way}") from error


def check_resume(path: Path, resume: dict, made_by: dict) -> None:
    """TrainError if other data, code, device or precision made the file: the run could not end with the same bytes."""
    theirs = resume["made_by"] if isinstance(resume["made_by"], dict) else {}  # a list: by an older version
    if differ := [name for name in made_by if name != "commit" and theirs.get(name) != made_by[name]]:
        way_back = f", or check out that code (commit {theirs.get('commit', 'unknown')})" if "code" in differ else ""
        raise TrainError(
            f"{path}: left by a run on other {', '.join(differ)}; delete the run's directory to train anew{way_back}"
        )
