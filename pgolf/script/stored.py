"""Packed scripts on disk: processes that run the same knobs, such as the seeds of a sweep, make one once."""

import hashlib
import json
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pgolf.script.parts import SOURCES
from pgolf_core.config import find_root
from pgolf_core.files import atomic_write

FOLDER = find_root() and find_root() / "data" / "scripts"  # none outside a workspace
MAKERS = {path.name: path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))}


def from_disk(facts: dict[str, Any], make: Callable[[], bytes]) -> bytes:
    """The script that `make` gives, kept in a file; a folder that cannot be written keeps none.

    facts: knobs and what follows from them. The file is named by them, by the code of the core and of this package
    as it was at import, and by the versions of Python and python-minifier.
    """
    if FOLDER is None:
        return make()
    parts = [SOURCES, MAKERS, version("python-minifier"), sys.version_info[:2], facts]
    place = FOLDER / hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode()).hexdigest()[:32]
    with suppress(OSError):
        digest, _, script = place.read_bytes().partition(b"\n")
        if hashlib.sha256(script).hexdigest().encode() == digest:
            return script
    script = make()
    with suppress(OSError):
        FOLDER.mkdir(parents=True, exist_ok=True)
        atomic_write(place, hashlib.sha256(script).hexdigest().encode() + b"\n" + script)
    return script
