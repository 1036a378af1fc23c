"""Digest of the code that makes a run: both packages, and the code cells of its notebook."""

import hashlib
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pgolf_core
from pgolf_core.config import ROOT


def code_digest(notebooks: Iterable[str] = (), fresh: bool = False) -> str:
    """sha256 (hex) of both packages and of these notebooks' code cells, whatever their outputs and line endings.

    fresh: read the packages again, for a process that starts others with the code that is on disk by then.
    """
    digest = hashlib.sha256(_packages.__wrapped__() if fresh else _packages())
    for name in sorted(notebooks):
        try:
            cells = json.loads((ROOT / "notebooks" / name).read_text(encoding="utf-8"))["cells"]
        except FileNotFoundError:
            cells = []
        for cell in cells:
            if cell["cell_type"] == "code":
                digest.update("".join(cell["source"]).replace("\r\n", "\n").encode() + b"\0")
    return digest.hexdigest()


@cache
def _packages() -> bytes:
    """Read once per process: an edit changes the code of later processes only."""
    digest = hashlib.sha256()
    for folder in (Path(pgolf_core.__file__).parent, Path(__file__).parents[1]):
        for path in sorted(folder.rglob("*.py")):
            name = path.relative_to(folder.parent).as_posix()
            digest.update(name.encode() + b"\0" + path.read_bytes().replace(b"\r\n", b"\n") + b"\0")
    return digest.digest()
