"""Figures of studies over scales: effects of arms at each scale, and scores over sizes and lengths."""

from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from pgolf.reports.figures import BLUE, COLOURS, RED, byte_axis, dot, symlog_axis
from pgolf.reports.labels import place_labels, short

VERDICTS = {"transfers": BLUE, "flips": RED, "unknown": "0.45"}
LINEAR = 0.03  # bpb; effects beyond it are on a logarithmic axis
MARKERS = "osD^v"  # one per scale, in their order


def plot_transfer(rows: pd.DataFrame, verdicts: pd.DataFrame, scales: list[str]) -> Figure:
    """Each arm's effect at each scale with its 95 % interval, and the first two scales against each other.

    rows: of analysis.transfer.effects, one family's; verdicts: of analysis.transfer.verdicts.
    """
    size = (11, 1.6 + 0.3 * len(verdicts))
    figure, (left, right) = plt.subplots(1, 2, figsize=size, layout="constrained", width_ratios=(3, 2))
    order = verdicts.sort_values(f"delta_{scales[0]}", ascending=False).arm.tolist()
    colours = dict(zip(verdicts.arm, verdicts.verdict.map(VERDICTS), strict=True))
    shift = dict(zip(scales, np.linspace(0.2, -0.2, len(scales)), strict=True))
    for row in rows[rows.arm.isin(order)].itertuples():
        at, marker = order.index(row.arm) + shift[row.scale], MARKERS[scales.index(row.scale) % len(MARKERS)]
        left.plot([row.low, row.high], [at, at], color=colours[row.arm], lw=1.3)
        left.plot(row.delta, at, ls="", marker=marker, ms=5, color=colours[row.arm])
    left.set_yticks(range(len(order)), [short(arm) for arm in order], fontsize=8)
    left.set_xlabel("Δ bits per byte, interval 95 %")
    left.grid(axis="y", visible=False)
    pair = verdicts.dropna(subset=[f"delta_{scale}" for scale in scales[:2]])
    points = pair[[f"delta_{scale}" for scale in scales[:2]]].to_numpy()
    for (x, y), arm in zip(points, pair.arm, strict=True):
        right.plot(x, y, ls="", marker="o", ms=5, color=colours[arm])
    right.axline((0, 0), slope=1, color="0.6", lw=0.8, ls=(0, (4, 3)))
    right.set(xlabel=f"Δ at {short(scales[0])}", ylabel=f"Δ at {short(scales[1])}")
    for ax, axis in ((left, "x"), (right, "x"), (right, "y")):
        (ax.axvline if axis == "x" else ax.axhline)(0, color="black", lw=0.8, zorder=1)
        ax.margins(0.08)
        symlog_axis(ax, axis, LINEAR)
    handles = [dot(short(scale), way, "0.45", "0.45", ms=5) for scale, way in zip(scales, cycle(MARKERS), strict=False)]
    handles += [dot(word, "D", colour, colour, ms=5) for word, colour in VERDICTS.items()]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), fontsize=8)
    place_labels(right, points, pair.arm.map(short))
    return figure


def plot_scaling(runs: pd.DataFrame, law, sizes: pd.DataFrame) -> Figure:
    """Scores over training tokens with the fitted law, a line per size, and bytes over parameters.

    runs: of analysis.scaling.family. law: a scaling.Law. sizes: of scaling.byte_line.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", width_ratios=(3, 2))
    for (parameters, own), colour in zip(runs.groupby("parameters"), cycle(COLOURS), strict=False):
        left.plot(own.tokens, own.bpb, ls="", marker="o", ms=5, mfc="white", mec=colour)
        tokens = np.geomspace(runs.tokens.min(), 2 * runs.tokens.max(), 50)
        left.plot(tokens, law.at(parameters, tokens), color=colour, lw=1.2, label=f"{parameters:,.0f} parameters")
        right.plot(own.parameters, own.total_bytes, ls="", marker="o", ms=5, mfc="white", mec=colour)
    right.plot(sizes.parameters, sizes.total_bytes, color="0.4", lw=1.1)
    right.fill_between(sizes.parameters, sizes.low, sizes.high, color="0.85")
    left.axvspan(runs.tokens.max(), 2 * runs.tokens.max(), color="0.95", zorder=0)
    left.set(xscale="log", xlabel="tokens of training (shaded: beyond all runs)", ylabel="bits per byte of the file")
    ticks = [*sorted(set(runs.tokens)), 2 * runs.tokens.max()]
    left.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks], fontsize=8)
    left.set_xticks([], minor=True)
    right.xaxis.set_major_formatter("{x:,.0f}")
    right.locator_params(axis="x", nbins=5)
    right.set(xlabel="parameters")
    byte_axis(right.yaxis, sizes.high, "artifact and code")
    left.legend(fontsize=8)
    return figure


def plot_forecasts(rows: pd.DataFrame, title: str) -> Figure:
    """Forecast scores with their intervals against true ones. rows: predicted, low, high, bpb, parameters."""
    figure, ax = plt.subplots(figsize=(6.4, 4.6), layout="constrained")
    for (parameters, own), colour in zip(rows.groupby("parameters"), cycle(COLOURS), strict=False):
        spread = [own.predicted - own.low, own.high - own.predicted]
        ax.errorbar(own.bpb, own.predicted, spread, ls="", marker="o", ms=5, color=colour, elinewidth=1,
                    label=f"{parameters:,.0f} parameters")  # fmt: skip
    ax.axline((rows.bpb.mean(), rows.bpb.mean()), slope=1, color="0.6", lw=0.8, ls=(0, (4, 3)))
    ax.set(xlabel="true bits per byte", ylabel="forecast, interval 95 %", title=title)
    ax.legend(fontsize=8)
    return figure
