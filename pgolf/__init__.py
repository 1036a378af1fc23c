"""The workbench around pgolf_core: data, runs, sweeps, statistics, reports, machines."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pgolf.runs.table import load_runs
    from pgolf.training.run import train

__all__ = ["load_runs", "train"]
_MODULES = {"load_runs": "pgolf.runs.table", "train": "pgolf.training.run"}


def __getattr__(name: str):
    """Load an entry point on first use: tables and pages need no torch."""
    if name not in _MODULES:
        raise AttributeError(f"module 'pgolf' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
