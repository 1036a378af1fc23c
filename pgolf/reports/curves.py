"""Curves of training: its loss and the validation bpb of the raw weights, against steps and seconds."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pgolf.reports.figures import COLOURS, short
from pgolf.runs.table import load_metrics

PANELS = ("step", "train_loss"), ("step", "val_bpb"), ("train_seconds", "val_bpb")
LABELS = {
    "step": "step",
    "train_seconds": "seconds of training",
    "train_loss": "training loss (nats a token)",
    "val_bpb": "validation bpb, raw weights",
}


def plot_training(run_dirs: Iterable[str | Path], names: Sequence[str]) -> Figure:
    """A line a run; names: of the runs, in the order of their directories."""
    figure, axes = panels()
    handles = []
    for i, (run_dir, name) in enumerate(zip(run_dirs, names, strict=True)):
        look = line(i)
        draw(axes, run_dir, **look)
        handles.append(Line2D([], [], label=short(name), **look))
    finish(axes)
    figure.legend(handles=handles, loc="outside lower left", ncols=4, fontsize=8)
    return figure


def panels() -> tuple[Figure, np.ndarray]:
    """An empty figure of PANELS; those against steps show the same ones."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(11, 3.7), layout="constrained")
    axes[1].sharex(axes[0])
    return figure, axes


def line(place: int) -> dict:
    """The look of one line among many: every colour in one style, then every colour in the next."""
    style = ("-", "--", ":")[place // len(COLOURS) % 3]
    return dict(color=COLOURS[place % len(COLOURS)], lw=1.4, ls=style)


def draw(axes: Iterable[Axes], run_dir: str | Path, **look) -> None:
    """One run's line in each panel, as far as metrics.jsonl has it."""
    rows = load_metrics(run_dir).reindex(columns=list(LABELS)).apply(pd.to_numeric, errors="coerce")
    for ax, (x, y) in zip(axes, PANELS, strict=True):
        points = rows[(rows.step > 0) & (rows[x] > 0) & np.isfinite(rows[[x, y]]).all(axis=1)]
        ax.plot(points[x], points[y], marker="o" if y == "val_bpb" else None, ms=3, **look)


def finish(axes: Iterable[Axes]) -> None:
    """Name the axes; cut off the first sixth, which is far above all that is told apart later."""
    for ax, (x, y) in zip(axes, PANELS, strict=True):
        ax.set(xlabel=LABELS[x], ylabel=LABELS[y])
        lines = [points for points in (drawn.get_xydata() for drawn in ax.lines) if len(points)]
        if lines:
            ax.set_ylim(top=1.03 * max(points[points[:, 0] > points[:, 0].max() / 6, 1].max() for points in lines))
        else:
            ax.text(0.5, 0.5, "nothing recorded", transform=ax.transAxes, ha="center", color="0.4")
