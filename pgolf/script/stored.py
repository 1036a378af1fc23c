"""Packed scripts on disk: processes that run the same knobs, such as the seeds of a sweep, make one once."""

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pgolf.script.parts import SOURCES
from pgolf_core.config import ROOT
from pgolf_core.files import atomic_write

FOLDER = ROOT / "data" / "scripts"
# What makes scripts, as this process loaded it.
MAKERS = {path.name: path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))}


def stored(knobs: dict[str, Any], others: dict[str, str], make: Callable[[], bytes]) -> bytes:
    """The script of these knobs, from disk or made; a folder that cannot be written keeps none.

    others: sources outside the package that it holds too. Its file is named by the knobs and all of its code.
    """
    parts = json.dumps([SOURCES, MAKERS, others, version("python-minifier"), knobs], sort_keys=True)
    place = FOLDER / hashlib.sha256(parts.encode()).hexdigest()[:32]
    with suppress(OSError):
        digest, _, script = place.read_bytes().partition(b"\n")
        if hashlib.sha256(script).hexdigest().encode() == digest:
            return script
    script = make()
    with suppress(OSError):
        FOLDER.mkdir(parents=True, exist_ok=True)
        atomic_write(place, hashlib.sha256(script).hexdigest().encode() + b"\n" + script)
    return script
