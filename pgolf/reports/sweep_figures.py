"""Figures of configs with several seeds: a sweep against its baseline, seed noise, the leaderboard."""

from collections.abc import Sequence
from itertools import cycle, product

import matplotlib.dates as mdates
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pgolf.reports.figures import (
    BLUE,
    COLOURS,
    DASHED,
    RED,
    SKY,
    byte_axis,
    dot,
    log_axis,
    padded,
    staircase,
    symlog_axis,
)
from pgolf.reports.labels import place_labels, short
from pgolf.runs.table import KNOBS

VERDICTS = {  # a config against the baseline: marker, colour of face and edge
    "baseline": ("D", "black", "black"), "better": ("o", BLUE, BLUE), "worse": ("s", RED, RED),
    "not significant": ("o", "white", "0.35"), "equal": ("P", "white", "0.35"), "not known": ("X", "white", "0.6"),
}  # fmt: skip
MIN_SPAN = 4e-4  # bpb; an axis spans at least this, so that its ticks have few digits
CONFIGS = 24  # per figure; tables have all


def numeric_knob(rows: pd.DataFrame, group: pd.DataFrame) -> str:
    """The one knob in which a sweep's configs differ if its values are three or more numbers, else ''.

    rows: of analysis.seed_groups; group: the runs they are made of.
    """
    first = group.loc[[labels[0] for labels in rows["index"]]]
    knobs = [name for name in KNOBS if name != "seed" and first[name].astype(str).nunique() > 1]
    numeric = len(knobs) == 1 and pd.to_numeric(first[knobs[0]], errors="coerce").notna().all()
    return knobs[0] if numeric and first[knobs[0]].nunique() > 2 else ""


def ordered(rows: pd.DataFrame, group: pd.DataFrame) -> tuple[pd.DataFrame, str, list[str]]:
    """The configs that plot_sweep draws, in its order, the numeric_knob and the configs' names on the axis."""
    knob = numeric_knob(rows, group)
    rows = rows[:CONFIGS]
    if not knob:
        return rows, knob, [short(name) for name in rows.arm]
    values = pd.to_numeric(group.loc[[labels[0] for labels in rows["index"]], knob]).to_numpy()
    return rows.iloc[np.argsort(values, kind="stable")], knob, [f"{value:g}" for value in np.sort(values)]


def reference_scores(rows: pd.DataFrame, results: pd.DataFrame) -> pd.DataFrame:
    """The reference's round-trip results of a sweep's configs, with `arm`. results: of analysis.reference_results."""
    scored = results[(results.stage == "") & results.bpb.notna() & (results.score == "roundtrip")]
    arm_of = {run: row.arm for row in rows.itertuples() for run in [row.arm, *row.runs]}
    return scored.drop_duplicates("run", keep="last").assign(arm=lambda own: own.run.map(arm_of)).dropna(subset="arm")


def plot_sweep(rows: pd.DataFrame, group: pd.DataFrame, reference: pd.DataFrame) -> Figure:
    """A sweep's configs: bpb with the 95 % interval of the difference to the baseline, bytes, the reference's bpb.

    A single numeric knob is drawn as a curve over its values; other configs stand under one another. rows: one sweep's
    of analysis.seed_groups. reference: arm and bpb, scores of other data, on axes of their own; may be empty.
    """
    rows, knob, names = ordered(rows, group)
    size = (11, 3.3 if knob else 1.5 + 0.27 * len(rows))
    shared = dict(sharex=True) if knob else dict(sharey=True)
    figure, axes = plt.subplots(1, 2 + bool(len(reference)), figsize=size, layout="constrained", **shared)
    place, baseline = range(len(rows)), rows.bpb[rows.is_baseline].mean()
    across = Axes.axhline if knob else Axes.axvline

    def draw(ax: Axes, places: Sequence, values: Sequence, **look) -> None:
        ax.plot(*((places, values) if knob else (values, places)), **look)

    if knob:
        draw(axes[0], place, rows.bpb, color="0.7", lw=1.2, zorder=1)
        draw(axes[1], place, rows.total_bytes, color="0.7", lw=1.2, zorder=1)
    if not np.isnan(baseline):
        across(axes[0], baseline, color="black", lw=0.8, ls=(0, (4, 3)), zorder=1)
    state = np.where(rows.is_baseline, "baseline", rows.verdict.where(rows.verdict != "", "not known"))
    for at, row, verdict in zip(place, rows.itertuples(), state, strict=True):
        marker, face, edge = VERDICTS[verdict]
        look = dict(ls="", marker=marker, mfc=face, mec=edge, ms=6.5, mew=1.3, zorder=4)
        if row.n > 1:
            draw(axes[0], [at] * row.n, row.samples, ls="", marker=".", ms=5, color="0.6", zorder=2)
        # The interval is of the difference, drawn on the baseline: with common seeds alone compared it is not of bpb.
        draw(axes[0], [at, at], [baseline + row.low, baseline + row.high], color=edge, lw=1.4, zorder=3)
        draw(axes[0], [at], [row.bpb], **look)
        draw(axes[1], [at], [row.total_bytes], **look | ({"mec": RED, "mfc": "white"} if row.over_cap else {}))
        scores = reference.bpb[reference.arm == row.arm]
        draw(axes[-1], [at] * len(scores), scores, ls="", marker="^", mfc="white", mec="0.45", ms=6, mew=1.2)
    for cap in rows.cap_bytes.unique():
        if cap <= 1.6 * rows.total_bytes.max():
            across(axes[1], cap, color=RED, lw=1.2, ls=DASHED)
            where = dict(xy=(0, cap)) if knob else dict(xy=(cap, -0.6), ha="right")
            axes[1].annotate(f"cap {cap:,.0f} B", color=RED, fontsize=8, va="bottom", **where)
    labels = ["bits per byte after round trip", "", "reference bpb (other data)"]
    for ax, label in zip(axes, labels, strict=False):
        _finish(ax, label, knob, names, is_score=ax is not axes[1])
    byte_axis(axes[1].yaxis if knob else axes[1].xaxis, rows.total_bytes, "artifact and code")
    handles = [dot(verdict, *look, ms=6.5) for verdict, look in VERDICTS.items() if verdict in state]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), fontsize=8)
    return figure


def _finish(ax: Axes, label: str, knob: str, names: list[str], is_score: bool) -> None:
    """Limits, ticks and labels of one axes of plot_sweep: values upward over a knob, else to the right."""
    ax.margins(0.12)
    values, (low, high) = ("y", ax.get_ylim()) if knob else ("x", ax.get_xlim())
    if is_score and high - low < MIN_SPAN:
        middle = (low + high) / 2
        ax.set(**{f"{values}lim": (middle - MIN_SPAN / 2, middle + MIN_SPAN / 2)})
    ax.locator_params(axis=values, nbins=5)
    ax.ticklabel_format(axis=values, useOffset=False)
    if knob:
        ax.set_xticks(range(len(names)), names, fontsize=8, rotation=0 if max(map(len, names)) < 7 else 30)
        ax.set(xlabel=knob, ylabel=label)
    else:
        ax.set_yticks(range(len(names)), names, fontsize=8)
        ax.set_xlabel(label, fontsize=8.5)
        ax.set_ylim(len(names) - 0.4, -0.6)


def plot_widths(rows: pd.DataFrame) -> Figure:
    """bpb over bits per weight, a line per cap and steps, its lowest filled. rows: of analysis.widths."""
    figure, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for ((cap, steps), own), colour in zip(rows.groupby(["cap_bytes", "steps"]), cycle(COLOURS), strict=False):
        label = f"{cap:,} B, {steps[1]:,} steps"
        ax.plot(own.bits, own.bpb, color=colour, lw=1.3, marker="o", ms=6, mfc="white", mec=colour, label=label)
        ax.plot(own.bits[own.best], own.bpb[own.best], ls="", marker="o", ms=7, color=colour)
        for row in own.itertuples():
            ax.plot([row.bits] * row.n, row.samples, ls="", marker=".", ms=4, color=colour, alpha=0.6)
    ax.set_xscale("log", base=2)
    ticks = 2.0 ** np.arange(np.floor(np.log2(rows.bits.min())), np.ceil(np.log2(rows.bits.max())) + 1)
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.set(xlabel="bits per weight, file and code", ylabel="bits per byte after round trip")
    ax.margins(0.12)
    ax.legend(fontsize=8)
    place_labels(ax, rows[["bits", "bpb"]].to_numpy(), rows.arm.map(short))
    return figure


def plot_passes(runs: pd.DataFrame) -> Figure:
    """bpb over passes through looped layers, means over seeds: a line per arm if all tokens take 1, 2, … of them.

    The filled marker is the arm's own score, at the passes that its tokens took. runs: with mean_passes and
    bpb_by_passes.
    """
    figure, ax = plt.subplots(figsize=(8.5, 3.6), layout="constrained")
    looks = cycle(product(("-", "--", ":"), COLOURS))
    for (arm, own), (line, colour) in zip(runs.groupby("arm", sort=False), looks, strict=False):
        scores = np.array(own.bpb_by_passes.to_list(), dtype=float)
        places = np.arange(1, scores.shape[1] + 1)
        ax.plot(places, scores.mean(0), color=colour, lw=1.2, ls=line, marker="o", ms=5, mfc="white", label=short(arm))
        ax.plot(own.mean_passes, own.bpb, ls="", marker=".", ms=4, color=colour, alpha=0.6)
        ax.plot(own.mean_passes.mean(), own.bpb.mean(), ls="", marker="D", ms=6, color=colour)
    ax.set(xlabel="passes through the looped layers, mean over tokens", ylabel="bits per byte after round trip")
    ax.set_xticks(range(1, max(map(len, runs.bpb_by_passes)) + 1))
    ax.margins(0.12)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def plot_costs(rows: pd.DataFrame) -> Figure:
    """Each arm's difference to the control with its interval, and its training and scoring time over the control's.

    rows: of analysis.research.arms.
    """
    figure, (gain, cost) = plt.subplots(
        1, 2, figsize=(11, 1.5 + 0.27 * len(rows)), layout="constrained", sharey=True, width_ratios=(3, 2)
    )
    for at, row in enumerate(rows.itertuples()):
        marker, face, edge = VERDICTS["baseline" if row.is_baseline else row.verdict or "not known"]
        delta, half = (0.0, 0.0) if row.is_baseline else (row.delta, row.half)
        gain.plot([delta - half, delta + half], [at, at], color=edge, lw=1.4)
        gain.plot([delta], [at], ls="", marker=marker, mfc=face, mec=edge, ms=6.5, mew=1.3)
        for name, way in (("train", "s"), ("eval", "^")):
            cost.plot([getattr(row, f"times_{name}_seconds")], [at], ls="", marker=way, mfc="white", mec="0.35", ms=6)
    gain.axvline(0, color="black", lw=0.8, ls=(0, (4, 3)), zorder=1)
    cost.axvline(1, color="black", lw=0.8, ls=(0, (4, 3)), zorder=1)
    gain.set_yticks(range(len(rows)), [short(name) for name in rows.arm], fontsize=8)
    gain.set(ylim=(len(rows) - 0.4, -0.6), xlabel="Δ bits per byte against the control; left is better")
    log_axis(cost)
    cost.set(xlabel="seconds over the control's")
    handles = [dot(word, way, "white", "0.35", ms=6) for word, way in (("training", "s"), ("scoring", "^"))]
    figure.legend(handles=handles, loc="outside upper right", ncols=2, fontsize=8)
    return figure


def plot_seeds(rows: pd.DataFrame) -> Figure:
    """Each run's distance from the mean of its config, and the standard deviation. rows: of analysis.seed_groups."""
    rows = rows[:CONFIGS]
    figure, ax = plt.subplots(figsize=(10, 1.2 + 0.27 * len(rows)), layout="constrained")
    for at, row in enumerate(rows.itertuples()):
        away = 1e3 * (row.samples - row.bpb)
        ax.plot([-1e3 * row.sd, 1e3 * row.sd], [at, at], color=SKY, lw=5, solid_capstyle="butt", zorder=1)
        ax.plot(away, [at] * len(away), ls="", marker="o", ms=5, mfc="white", mec="black", zorder=2)
    ax.axvline(0, color="0.5", lw=0.8)
    # Repeats of one seed are of time-limited runs: their spread is the machine's speed alone.
    names = [short(f"{r.sweep}/{r.arm}") + " (repeats)" * (len(set(r.seeds)) == 1) for r in rows.itertuples()]
    ax.set_yticks(range(len(rows)), names, fontsize=8)
    ax.set(ylim=(len(rows) - 0.4, -0.6), xlabel="from the config's mean (milli-bpb); band: ± one standard deviation")
    return figure


def plot_leaderboard(steps: pd.DataFrame) -> Figure:
    """The lowest mean bpb as runs finished, one line per cap. steps: of analysis.seed_groups.history, with name."""
    figure, ax = plt.subplots(figsize=(10, 3.6), layout="constrained")
    times = pd.to_datetime(steps.finished)
    span = max(times.max() - times.min(), pd.Timedelta(minutes=1))
    ax.set(ylim=padded(steps.bpb.to_numpy(), 0.15), xlim=(times.min() - 0.04 * span, times.max() + 0.25 * span))
    ax.xaxis.set_major_formatter(mdates.ConciseDateFormatter(ax.xaxis.get_major_locator()))
    for (cap, own), colour in zip(steps.groupby("cap_bytes"), cycle(COLOURS), strict=False):
        t = times[own.index]
        staircase(ax, t, own.bpb, times.max(), color=colour, lw=1.5)
        ax.plot(t, own.bpb, ls="", marker="o", ms=5, color=colour, label=f"cap {cap:,.0f} B")
    ax.set(xlabel="when the run finished (UTC)", ylabel="bits per byte, mean over seeds")
    if steps.cap_bytes.nunique() > 1:
        ax.legend(fontsize=8, loc="upper right")
    new = steps.name != steps.groupby("cap_bytes").name.shift()  # a leader that goes on leading is named once
    spots = np.column_stack([mdates.date2num(times), steps.bpb])
    place_labels(ax, spots[new], steps.name[new].map(short))
    return figure


def plot_published(rows: pd.DataFrame) -> Figure:
    """What having each technique changes here, with 95 % intervals, and the published change on axes of its own.

    rows: of analysis.published_deltas.ablations.
    """
    names = list(dict.fromkeys(rows.title))[::-1]
    size = (11, 1.3 + 0.3 * len(names))
    figure, (here, there) = plt.subplots(1, 2, figsize=size, layout="constrained", sharey=True, width_ratios=(3, 2))
    ways = list(dict.fromkeys(rows.ours))
    for row in rows.itertuples():
        colour = {"helps": BLUE, "harms": RED}.get(row.verdict, "0.45")
        at = names.index(row.title) + 0.18 * (len(ways) - 1) * (1 - 2 * ways.index(row.ours))
        here.plot([row.low, row.high], [at, at], color=colour, lw=1.4)
        here.plot(row.delta, at, ls="", marker="os"[ways.index(row.ours)], color=colour, ms=5)
        span = [row.published_low, row.published_high]
        there.plot(span, 2 * [names.index(row.title)], color="0.45", lw=1.4, marker="|", ms=7, mew=1.4)
    for ax, label in ((here, "Δ bits per byte of having it, here"), (there, "published Δ (other data)")):
        ax.axvline(0, color="black", lw=0.8, ls=(0, (4, 3)), zorder=1)
        ax.set(xlabel=label)
        ax.grid(axis="y", visible=False)
    symlog_axis(here, "x", 0.01, here.get_xlim())  # vocabularies change ten times as much as gates
    here.set_yticks(range(len(names)), names, fontsize=8)
    handles = [dot(f"{way}", "os"[i], "0.45", "0.45", ms=5) for i, way in enumerate(ways)]
    handles += [dot(word, "D", colour, colour, ms=5) for word, colour in (("helps", BLUE), ("harms", RED))]
    figure.legend(handles=handles, loc="outside upper left", ncols=4, fontsize=8)
    return figure
