"""The resume file: written while training runs, so that a killed run continues to the same bytes."""

from pathlib import Path

import torch

from pgolf_core.files import atomic_path

RESUME = "resume.pt"


class TrainError(RuntimeError):
    """Training that cannot go on; the message says at which step and what to change."""


def save_resume(path: Path, made_by: dict, **parts) -> None:
    """Write made_by (see check_resume) and the state dict, or plain value, of every part; atomic."""
    content = {name: part.state_dict() if hasattr(part, "state_dict") else part for name, part in parts.items()}
    with atomic_path(path) as temporary:
        torch.save(content | {"made_by": made_by}, temporary)


def read_resume(path: Path) -> dict | None:
    """The content of the resume file on the CPU; None if there is none."""
    return torch.load(path, weights_only=True, map_location="cpu") if path.exists() else None


def check_resume(path: Path, resume: dict, made_by: dict) -> None:
    """TrainError if other data, code, device or precision made the file: the run could not end with the same bytes."""
    theirs = resume["made_by"] if isinstance(resume["made_by"], dict) else {}  # a list: by an older version
    if differ := [name for name in made_by if name != "commit" and theirs.get(name) != made_by[name]]:
        way_back = f", or check out that code (commit {theirs.get('commit', 'unknown')})" if "code" in differ else ""
        raise TrainError(
            f"{path}: left by a run on other {', '.join(differ)}; delete the run's directory to train anew{way_back}"
        )
