"""Packed scripts on disk: processes that run the same knobs, such as the seeds of a sweep, make one once."""

import hashlib
import inspect
import json
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from pgolf.script.parts import SOURCES
from pgolf.script.reach import forms
from pgolf_core.config import ROOT, RunConfig
from pgolf_core.files import atomic_write

FOLDER = ROOT / "data" / "scripts"
# What makes scripts, as this process loaded it.
MAKERS = {path.name: path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))}


def packed(config: RunConfig, make: Callable[[RunConfig], bytes]) -> bytes:
    """The script of these knobs, from disk or made; a folder that cannot be written keeps none."""
    place = _place(config)
    with suppress(OSError):
        digest, _, script = place.read_bytes().partition(b"\n")
        if hashlib.sha256(script).hexdigest().encode() == digest:
            return script
    script = make(config)
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(place, hashlib.sha256(script).hexdigest().encode() + b"\n" + script)
    return script


def _place(config: RunConfig) -> Path:
    """The script's file, named by the knobs and by all code that it depends on."""
    others = {name: inspect.getsource(import_module(name)) for name, _ in forms(config) if name not in SOURCES}
    parts = [SOURCES, MAKERS, others, version("python-minifier"), config.model_dump(mode="json")]
    return FOLDER / hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
