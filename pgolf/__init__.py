"""The workbench around pgolf_core: data, runs, sweeps, statistics, reports, machines."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # loaded on first use: tables and pages need no torch
    from pgolf.runs.table import load_runs
    from pgolf.training.run import train

__all__ = ["load_runs", "train"]


def __getattr__(name: str):
    if name == "train":
        from pgolf.training.run import train

        return train
    if name == "load_runs":
        from pgolf.runs.table import load_runs

        return load_runs
    raise AttributeError(f"module 'pgolf' has no attribute {name!r}")
