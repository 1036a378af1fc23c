"""Digest of the code that makes a run: of what training may import, and of the code cells of its notebook."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import pgolf_core
from pgolf.runs.result import Result, RunError
from pgolf_core.config import ROOT

# What training imports, as the contract of layers in pyproject.toml has it; a study's result also depends on studies.
WORKBENCH = ("data", "disk.py", "processes.py", "runs", "training")
STUDIES = ("studies",)


def code_digest(notebooks: Iterable[str] = (), fresh: bool = False, studies: bool = False) -> str:
    """sha256 (hex) of the code that makes a run, and of these notebooks' code cells; line endings do not matter.

    fresh: of the files as they are now, instead of those that this process loaded.
    """
    digest = hashlib.sha256(_sources(studies) if fresh else LOADED[studies])
    for name in sorted(notebooks):
        try:
            cells = json.loads((ROOT / "notebooks" / name).read_text(encoding="utf-8"))["cells"]
        except FileNotFoundError:
            cells = []
        for cell in cells:
            if cell["cell_type"] == "code":
                digest.update("".join(cell["source"]).replace("\r\n", "\n").encode() + b"\0")
    return digest.hexdigest()


def _sources(studies: bool) -> bytes:
    digest, core, workbench = hashlib.sha256(), Path(pgolf_core.__file__).parent, Path(__file__).parents[1]
    for place in (core, *(workbench / name for name in WORKBENCH + STUDIES * studies)):
        package = core if place == core else workbench
        for path in sorted(place.rglob("*.py")) or [place]:
            name = path.relative_to(package.parent).as_posix()
            digest.update(name.encode() + b"\0" + path.read_bytes().replace(b"\r\n", b"\n") + b"\0")
    return digest.digest()


# Read when this module is imported: a later edit changes the code of later processes only.
LOADED = {studies: _sources(studies) for studies in (False, True)}


def check_code(studies: bool = False) -> None:
    """RunError if the files are no longer those that this process loaded, so that no digest would be true of it."""
    if _sources(studies) != LOADED[studies]:
        raise RunError(
            "the code was edited after this process loaded it, so this run would not be what its result says; "
            "restart the kernel (or the command)"
        )


def code_of(environment: object) -> str:
    """What tells the code of two runs apart: its digest; of versions that kept none, the commit and if it had changes.

    environment: that of a result. '' for an imported log.
    """
    made = environment if isinstance(environment, dict) else {}
    if made.get("code") or not made.get("git_commit"):
        return str(made.get("code") or "")
    return f"commit {made['git_commit']}{' with changes' * bool(made.get('git_dirty'))}"


def short_code(code: str) -> str:
    """'code 1a2b3c4d' or 'commit 1a2b3c4d with changes' of a code_of."""
    commit = code.startswith("commit ")
    return f"commit {code[7:15]}{' with changes' * code.endswith('s')}" if commit else f"code {code[:8] or 'unknown'}"


def other_code(result: Result) -> str:
    """'made by code 1a2b3c4d, and the code now is 5e6f7a8b'; '' if it is the same."""
    now = code_digest(studies=result.kind != "train")
    made = code_of(result.environment)
    return "" if made == now else f"made by {short_code(made)}, and the code now is {now[:8]}"
