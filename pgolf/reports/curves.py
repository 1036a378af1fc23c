"""Training curves: loss and validation bpb of the pre-quant weights, against steps and seconds."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from pgolf.reports.figures import COLOURS
from pgolf.reports.labels import short
from pgolf.runs.table import load_metrics

AXES = ("step", "train_loss"), ("step", "val_bpb"), ("train_seconds", "val_bpb")
LABELS = {
    "step": "step", "train_seconds": "seconds of training", "train_loss": "training loss (nats per token)",
    "val_bpb": "validation bpb, pre-quant",
}  # fmt: skip


def plot_training(run_dirs: Iterable[str | Path], names: Sequence[str]) -> Figure:
    """One line per run; names: of the runs, in the order of their directories."""
    runs = enumerate(zip(run_dirs, names, strict=True))
    lines = [(run_dir, {"label": short(name)} | line_style(i)) for i, (run_dir, name) in runs]
    return plot_lines(lines, loc="outside lower left", ncols=4)


def choose(runs: pd.DataFrame, most: int = 8) -> pd.DataFrame:
    """Few of one sweep's training runs: the baseline's first seed, the best, the worst two."""
    runs = runs.assign(val_bpb=runs.val_bpb.astype(float)).sort_values("val_bpb")
    baseline = runs[runs.run == runs.control].sort_values("seed")[:1]
    rest = runs.drop(baseline.index)
    return pd.concat([baseline, rest if len(runs) <= most else pd.concat([rest[: most - 3], rest[-2:]])])


def line_style(place: int) -> dict:
    """Looks of many lines: every colour in one style, then every colour in the next."""
    style = ("-", "--", ":")[place // len(COLOURS) % 3]
    return dict(color=COLOURS[place % len(COLOURS)], lw=1.4, ls=style)


def plot_lines(lines: Iterable[tuple[str | Path, dict]], **legend) -> Figure:
    """Each pair of AXES with a line per run, as far as its metrics.jsonl goes. lines: run directory, look."""
    figure, axes = plt.subplots(1, len(AXES), figsize=(11, 3.7), layout="constrained")
    axes[1].sharex(axes[0])
    for run_dir, look in lines:
        rows = load_metrics(run_dir).reindex(columns=list(LABELS)).apply(pd.to_numeric, errors="coerce")
        for ax, (x, y) in zip(axes, AXES, strict=True):
            points = rows[(rows.step > 0) & (rows[x] > 0) & np.isfinite(rows[[x, y]]).all(axis=1)]
            ax.plot(points[x], points[y], marker="o" if y == "val_bpb" else None, ms=3, **look)
    for ax, (x, y) in zip(axes, AXES, strict=True):
        ax.set(xlabel=LABELS[x], ylabel=LABELS[y])
        drawn = [points for points in (line.get_xydata() for line in ax.lines) if len(points)]
        if drawn:  # the first sixth of a line may be cut off: it lies far above all later differences
            ax.set_ylim(top=1.03 * max(points[points[:, 0] > points[:, 0].max() / 6, 1].max() for points in drawn))
        else:
            ax.text(0.5, 0.5, "nothing recorded", transform=ax.transAxes, ha="center", color="0.4")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, title_fontsize=8, **legend)
    return figure
