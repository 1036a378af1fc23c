"""The workbench around pgolf_core: data, runs, sweeps, statistics, reports, machines."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pgolf.runs.table import load_runs
    from pgolf.studies.finished_run import open_run as open
    from pgolf.training.run import train

__all__ = ["load_runs", "open", "train"]
_PLACES = {
    "load_runs": ("pgolf.runs.table", "load_runs"),
    "open": ("pgolf.studies.finished_run", "open_run"),
    "train": ("pgolf.training.run", "train"),
}


def __getattr__(name: str):
    """Load an entry point on first use: tables and pages need no torch."""
    if name not in _PLACES:
        raise AttributeError(f"module 'pgolf' has no attribute {name!r}")
    import_module("pgolf_core.config").require_root()
    module, function = _PLACES[name]
    return getattr(import_module(module), function)
