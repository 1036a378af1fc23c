"""Figures of a search: how it went, which knobs mattered, and the score over each knob."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pgolf.reports.figures import ABOVE, BLUE, DASHED, ORANGE, RED, dot, log_axis, padded, staircase

LOOKS = {  # state of a trial: marker, face, edge
    "answer": ("o", BLUE, BLUE), "over a limit": ("o", "none", RED), "pruned": ("v", "0.8", "0.5"),
    "not trained": ("x", "0.5", "0.5"), "failed": ("X", RED, RED),
}  # fmt: skip
COLUMNS = 4  # slices in a row


def looks_of(trials: pd.DataFrame) -> np.ndarray:
    """The key of LOOKS per trial; '' if it runs or repeats another."""
    complete = trials.state == "complete"
    states = [complete & (trials.over <= 0), complete, *(trials.state == s for s in ("pruned", "refused", "failed"))]
    return np.select(states, list(LOOKS), "")


def ranked(trials: pd.DataFrame) -> pd.DataFrame:
    """Trials that have ended, answers first, each kind by its score."""
    looks = looks_of(trials)
    order = pd.Series(looks, index=trials.index).map({name: i for i, name in enumerate(LOOKS)})
    return trials.assign(order=order)[looks != ""].sort_values(["order", "bpb"])


def plot_history(trials: pd.DataFrame) -> Figure:
    """Score of each trial in the order of trials, and the best answer so far. trials: of search.trials.trial_table."""
    figure, ax = plt.subplots(figsize=(10, 4), layout="constrained")
    looks = looks_of(trials)
    answers = trials[looks == "answer"]
    _limit(ax, trials[trials.state == "complete"])
    best = answers.bpb.astype(float).cummin()
    staircase(ax, answers.number, best, trials.number.max(), color=BLUE, lw=1.5, zorder=2)
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + 0.08 * (high - low))
    for name, (marker, face, edge) in LOOKS.items():
        own = trials[looks == name]
        # A trial that was not trained has no score: it stands on the axis. Pruned and failed ones stand at the top.
        y = own.bpb.astype(float).clip(upper=high)
        if name not in ("answer", "over a limit"):
            y = np.full(len(own), ax.get_ylim()[0] if name == "not trained" else high)
        colour = dict(c=edge) if marker == "x" else dict(facecolors=face, edgecolors=edge)
        ax.scatter(own.number, y, 30, marker=marker, zorder=3, clip_on=False, **colour)
    base = trials[trials.is_baseline & trials.bpb.notna()]
    if len(base):
        ax.axhline(float(base.bpb.iloc[0]), color=ORANGE, lw=1.2, ls=DASHED, zorder=1)
    handles = [dot(f"{name} ({(looks == name).sum()})", *LOOKS[name], ms=5) for name in LOOKS if (looks == name).any()]
    handles += [plt.Line2D([], [], color=BLUE, lw=1.5, label="best so far")]
    handles += [plt.Line2D([], [], color=ORANGE, lw=1.2, ls=DASHED, label=base.run.iloc[0])] if len(base) else []
    ax.legend(handles=handles, **ABOVE)
    ax.set(xlabel="trial", ylabel="bits per byte of the file")
    return figure


def _limit(ax: Axes, complete: pd.DataFrame) -> None:
    """Limit the y axis so that scores far above the median do not compress it; the baseline stays inside."""
    y = complete.bpb.astype(float)
    if len(y):
        top = y.median() + 6 * (y.median() - y.min()) if len(y) > 7 else y.max()
        ax.set_ylim(*padded(y[(y <= top) | complete.is_baseline]))


def plot_importances(rows: pd.DataFrame) -> Figure:
    """Share of each knob, its interval over resampled trials, and chance. rows: of search.trials.importances."""
    figure, ax = plt.subplots(figsize=(8, 0.8 + 0.32 * len(rows)), layout="constrained")
    y = np.arange(len(rows))[::-1]
    ax.barh(y, rows.importance, 0.6, color=[BLUE if above else "0.75" for above in rows.importance > rows.chance])
    ax.hlines(y, rows.low, rows.high, color="0.2", lw=1.5)
    ax.scatter(rows.chance, y, 60, marker="|", color=RED, zorder=3)
    ax.set_yticks(y, rows.knob)
    ax.grid(axis="y", visible=False)
    ax.set(xlabel="importance, share of all knobs", xlim=(0, None))
    handles = [
        plt.Line2D([], [], color="0.2", lw=1.5, label="90 % over resampled trials"),
        dot("95 % of shuffled scores lie below", "|", RED, RED, ms=9),
    ]
    ax.legend(handles=handles, **ABOVE)
    return figure


def plot_slices(trials: pd.DataFrame, knobs: list[str]) -> Figure:
    """Score over each knob, later trials darker, the best answer ringed, the baseline a cross."""
    rows, columns = math.ceil(len(knobs) / COLUMNS), min(COLUMNS, len(knobs))
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.6 * columns, 2.3 * rows), sharey=True, squeeze=False, layout="constrained"
    )
    done = trials[trials.state == "complete"]
    best = done.bpb[done.over <= 0].astype(float).idxmin() if (done.over <= 0).any() else None
    for ax in axes.flat[len(knobs) :]:
        ax.set_visible(False)
    for ax, knob in zip(axes.flat, knobs, strict=False):
        own = done[done[knob].notna()]
        x = _places(ax, trials[knob], own[knob], knob)
        points = ax.scatter(x, own.bpb.astype(float), 18, own.number, cmap="Blues", edgecolors="0.4", linewidths=0.5)
        points.set_clim(-0.4 * trials.number.max(), trials.number.max())
        ringed = own[own.index == best]
        ax.scatter(x[ringed.index], ringed.bpb, 90, facecolors="none", edgecolors=RED, linewidths=1.5)
        base = own[own.is_baseline]
        ax.scatter(x[base.index], base.bpb, 45, marker="x", color=ORANGE, zorder=3)
        ax.set_title(knob)
    for ax in axes[:, 0]:
        ax.set_ylabel("bits per byte")
    _limit(axes[0, 0], done)
    return figure


def _places(ax: Axes, all_values: pd.Series, values: pd.Series, knob: str) -> pd.Series:
    """Scale the x axis; returns the place of each value: choices side by side, numbers at their value."""
    known = all_values.dropna()
    numeric = known.map(lambda value: type(value) in (int, float)).all()
    distinct = sorted(set(known), key=None if numeric else str)
    if not numeric or len(distinct) <= 4:
        ax.set_xticks(range(len(distinct)), [str(f"{v:g}" if numeric else v) for v in distinct])
        ax.set_xlim(-0.5, len(distinct) - 0.5)
        jitter = pd.Series(np.linspace(-0.2, 0.2, len(values)), index=values.index)
        return values.map(distinct.index).astype(float) + jitter
    if min(distinct) > 0 and max(distinct) / min(distinct) > 5:
        log_axis(ax)
    return values.astype(float)
