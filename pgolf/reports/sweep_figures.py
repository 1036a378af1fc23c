"""The plots of arms: a sweep against its control, seeds and repeats, leaders, bytes as training goes on."""

from collections.abc import Sequence

import matplotlib.dates as mdates
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from pgolf.reports.figures import BLUE, COLOURS, RED, SKY, byte_unit, padded, place_labels, short
from pgolf.runs.table import KNOBS

LOOKS = {  # of an arm against its control: colour of the face and of the edge, marker
    "control": ("black", "black", "D"),
    "better": (BLUE, BLUE, "o"),
    "worse": (RED, RED, "s"),
    "not told apart": ("white", "0.35", "o"),
    "equal": ("white", "0.35", "P"),
    "not known": ("white", "0.6", "X"),
}
FINEST = 4e-4  # bpb that an axis spans at least
ARMS = 24  # of a figure; a table has them all


def factor(rows: pd.DataFrame, panel: pd.DataFrame) -> str:
    """The knob that alone tells a sweep's arms apart and is a number, '' where there is none. rows: of arms.arms."""
    first = panel.loc[[labels[0] for labels in rows["index"]]]
    knobs = [name for name in KNOBS if name != "seed" and first[name].astype(str).nunique() > 1]
    numeric = len(knobs) == 1 and pd.to_numeric(first[knobs[0]], errors="coerce").notna().all()
    return knobs[0] if numeric and first[knobs[0]].nunique() > 2 else ""


def plot_sweep(rows: pd.DataFrame, panel: pd.DataFrame, seed: pd.DataFrame) -> Figure:
    """A sweep's arms: bpb with the 95 % interval of the difference to the control, bytes, and the seed's own figures.

    One numeric factor is drawn as a curve over its values, else arms stand under one another. rows: of arms.arms, one
    sweep; seed: arm and bpb of ledger.load, the same sweep, may be empty: figures of other data, on an axis apart.
    """
    knob = factor(rows, panel)
    rows = rows[:ARMS]
    if knob:
        values = pd.to_numeric(panel.loc[[labels[0] for labels in rows["index"]], knob]).to_numpy()
        rows = rows.iloc[np.argsort(values, kind="stable")]
        names = [f"{value:g}" for value in np.sort(values)]
    else:
        names = [short(name) for name in rows.arm]
    place = np.arange(len(rows))
    columns = 2 + bool(len(seed))
    height = 3.3 if knob else 1.5 + 0.27 * len(rows)
    figure, axes = plt.subplots(
        1, columns, figsize=(11, height), layout="constrained", sharex=bool(knob), sharey=not knob
    )

    def spots(ax: Axes, places: Sequence, values: Sequence, **look) -> None:
        ax.plot(*((places, values) if knob else (values, places)), **look)

    unit, name = byte_unit(rows.total_bytes)
    state = np.where(rows.is_control, "control", rows.verdict.where(rows.verdict != "", "not known"))
    if knob:
        axes[0].plot(place, rows.bpb, color="0.7", lw=1.2, zorder=1)
        axes[1].plot(place, rows.total_bytes / unit, color="0.7", lw=1.2, zorder=1)
    for control in rows[rows.is_control].bpb:
        (axes[0].axhline if knob else axes[0].axvline)(control, color="black", lw=0.8, ls=(0, (4, 3)), zorder=1)
    control = rows.bpb[rows.is_control].mean()
    for at, row, kind in zip(place, rows.itertuples(), state, strict=True):
        face, edge, marker = LOOKS[kind]
        if row.n > 1:
            spots(axes[0], [at] * row.n, row.samples, ls="", marker=".", ms=5, color="0.6", zorder=2)
        if not np.isnan(row.half):
            # Of the difference, on top of the control: where only common seeds are compared it is not about bpb.
            spots(axes[0], [at, at], [control + row.low, control + row.high], color=edge, lw=1.4, zorder=3)
        dot = dict(ls="", marker=marker, mfc=face, mec=edge, ms=6.5, mew=1.3, zorder=4)
        spots(axes[0], [at], [row.bpb], **dot)
        spots(axes[1], [at], [row.total_bytes / unit], **dot | ({"mec": RED, "mfc": "white"} if row.over_cap else {}))
    for cap in rows.cap_bytes.unique():
        if cap <= 1.6 * rows.total_bytes.max():
            (axes[1].axhline if knob else axes[1].axvline)(cap / unit, color=RED, lw=1.2, ls=(0, (5, 3)))
            where = dict(xy=(0.02, cap / unit), xycoords=("axes fraction", "data"), va="bottom")
            if not knob:
                where = dict(xy=(cap / unit, 1.0), xycoords=("data", "axes fraction"), ha="right", va="bottom")
            axes[1].annotate(f"cap {cap:,.0f} B", color=RED, fontsize=8, **where)
    labels = ["bits per byte after round trip", f"artifact and code ({name})"]
    if len(seed):
        for at, arm in zip(place, rows.arm, strict=True):
            theirs = seed.bpb[seed.arm == arm]
            spots(axes[2], [at] * len(theirs), theirs, ls="", marker="^", mfc="white", mec="0.45", ms=6, mew=1.2)
        labels.append("the seed's bpb (other data)")
    for ax, label in zip(axes, labels, strict=True):
        ax.margins(0.12)
        if ax is not axes[1]:  # finer than any score is known, labels would have more digits than room
            low, high = ax.get_ylim() if knob else ax.get_xlim()
            if high - low < FINEST:
                middle = (low + high) / 2
                (ax.set_ylim if knob else ax.set_xlim)(middle - FINEST / 2, middle + FINEST / 2)
        if knob:
            ax.set_xticks(place, names, fontsize=8, rotation=0 if max(map(len, names)) < 7 else 30)
            ax.set(xlabel=knob, ylabel=label)
        else:
            ax.set_xlabel(label, fontsize=8.5)
            ax.set_ylim(len(rows) - 0.4, -0.6)
        axis = ax.yaxis if knob else ax.xaxis
        axis.set_major_locator(plt.MaxNLocator(5))
        axis.get_major_formatter().set_useOffset(False) if hasattr(
            axis.get_major_formatter(), "set_useOffset"
        ) else None
    if not knob:
        axes[0].set_yticks(place, names, fontsize=8)
    there = [kind for kind in LOOKS if kind in state]
    handles = [
        Line2D([], [], ls="", mfc=f, mec=e, marker=m, ms=6.5, label=kind) for kind in there for f, e, m in [LOOKS[kind]]
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), fontsize=8)
    return figure


def plot_seeds(rows: pd.DataFrame) -> Figure:
    """Arms of several samples: every run's distance from the arm's mean, and the standard deviation. rows: of arms."""
    rows = rows[:ARMS]
    figure, ax = plt.subplots(figsize=(10, 1.2 + 0.27 * len(rows)), layout="constrained")
    for at, row in enumerate(rows.itertuples()):
        away = 1e3 * (row.samples - row.bpb)
        ax.plot([-1e3 * row.sd, 1e3 * row.sd], [at, at], color=SKY, lw=5, solid_capstyle="butt", zorder=1)
        ax.plot(away, [at] * len(away), ls="", marker="o", ms=5, mfc="white", mec="black", zorder=2)
    ax.axvline(0, color="0.5", lw=0.8)
    ax.set_yticks(range(len(rows)), [short(f"{r.sweep}/{r.arm}") for r in rows.itertuples()], fontsize=8)
    ax.set(
        ylim=(len(rows) - 0.4, -0.6), xlabel="from the arm's mean (milli-bpb); band: one standard deviation either way"
    )
    return figure


def plot_leaders(steps: pd.DataFrame, names: Sequence[str], ax: Axes) -> None:
    """How the lead fell as runs finished, a line a cap. steps: of arms.history; names: one for each of its rows."""
    times = pd.to_datetime(steps.finished)
    now = times.max()
    room = padded(steps.bpb.to_numpy(), 0.15)
    span = max((now - times.min()).total_seconds() / 86400, 1 / 1440)
    ax.set(ylim=room, xlim=(times.min() - pd.Timedelta(days=0.04 * span), now + pd.Timedelta(days=0.25 * span)))
    ax.xaxis.set_major_formatter(mdates.ConciseDateFormatter(ax.xaxis.get_major_locator()))
    for (cap, own), colour in zip(steps.groupby("cap_bytes"), [*COLOURS, *COLOURS], strict=False):
        t = times[own.index]
        ax.step([*t, now], [*own.bpb, own.bpb.iloc[-1]], where="post", color=colour, lw=1.5)
        ax.plot(t, own.bpb, ls="", marker="o", ms=5, color=colour, label=f"cap {cap:,.0f} B")
    ax.set(xlabel="when the run finished (UTC)", ylabel="bits per byte, mean over seeds")
    if steps.cap_bytes.nunique() > 1:
        ax.legend(fontsize=8, loc="upper right")
    x = mdates.date2num(times)
    y = steps.bpb.to_numpy()
    place_labels(ax, x, y, [short(name) for name in names], (x, y), np.empty((0, 2)))


def plot_growth(rows: pd.DataFrame) -> Figure:
    """Bits that a parameter takes in the file, and what rounding costs, against steps; a line a way to store, named.

    rows: how (words), steps, bits, bpb, cost (bpb lost against the raw weights), half (of its interval).
    """
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 3.8), layout="constrained")
    for (_, own), colour, marker in zip(rows.groupby("how", sort=False), COLOURS, "osD^vPX", strict=False):
        own = own.sort_values("steps")
        axes[0].plot(own.steps, own.bits, color=colour, marker=marker, ms=5, lw=1.5)
        axes[1].errorbar(
            own.steps, 1e3 * own.cost, 1e3 * own.half, color=colour, marker=marker, ms=5, lw=1.5, capsize=2
        )
    for ax, label in zip(
        axes, ("bits a parameter in the artifact", "lost against the raw weights (milli-bpb)"), strict=True
    ):
        ax.set_xscale("log")
        ax.set(xlabel="optimiser steps (log)", ylabel=label)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        ax.set_xticks(sorted(rows.steps.unique()))
        ax.minorticks_off()
        ax.margins(y=0.15)
    axes[0].set_ylim(bottom=0)
    last = rows.loc[rows.groupby("how").steps.idxmax()]
    line = np.empty((0, 2))
    place_labels(axes[0], last.steps.to_numpy(), last.bits.to_numpy(), list(last.how), (rows.steps, rows.bits), line)
    return figure
