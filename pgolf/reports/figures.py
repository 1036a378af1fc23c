"""Figures of runs and files: frontier, exports of one checkpoint, bytes by part, maps of tensors.

Colours differ for every common colour vision (Okabe & Ito, https://jfly.uni-koeln.de/color/), and colour is never the
only sign.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

from pgolf.reports.labels import HALO, place_labels, short
from pgolf.reports.tables import format_number, names_of
from pgolf_core.files import atomic_write
from pgolf_core.parameters import tensor_place

BLUE, SKY, GREEN, ORANGE, RED, PINK = "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7"
COLOURS = ["#000000", BLUE, RED, GREEN, ORANGE, PINK, SKY]  # lines take them in this order
MARKERS = {"train": "o", "export": "^"}  # per kind; any other is a square
STATES = {"on the front": (BLUE, BLUE), "off the front": ("0.8", "0.5"), "over cap": ("none", RED)}  # face, edge
PARTS = {  # parts of a file
    "weights": BLUE, "scales": SKY, "residuals": ORANGE, "float tensors": GREEN, "metadata": "#999999", "code": PINK,
}  # fmt: skip
FAMILIES = {  # analysis.frontier.family: colour, marker
    "absmax": ("#000000", "o"), "rank-1 residual": ("0.6", "D"), "σ-tied steps": (SKY, "s"), "Fisher steps": (SKY, "v"),
    "GPTQ": (BLUE, "^"), "GPTQ, Fisher steps": (GREEN, "v"), "LQER": ("#882255", "p"), "sdclip": (PINK, "P"),
    "ternary": ("#F0E442", "X"), "binary": ("0.4", "X"), "codebook": (ORANGE, "h"), "solver": (RED, "*"),
    "learned": ("#882255", "*"),
}  # fmt: skip
ABOVE = dict(loc="lower left", bbox_to_anchor=(0, 1), ncols=7, fontsize=8, borderaxespad=0)  # a legend's place
BESIDE = dict(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
LABELS = 16  # runs of one figure that are labelled, drawn as curves or as bars
DASHED = (0, (5, 3))
DIFFERENCES = (0.01, 0.03, 0.1, 0.3, 1)  # bpb, ticks of symlog_axis

# For plt.rcParams.update, before figures are made.
STYLE = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "axes.titlelocation": "left", "axes.titlesize": 10, "axes.labelsize": 9, "xtick.labelsize": 8,
    "ytick.labelsize": 8, "grid.color": "0.92", "legend.frameon": False,
    "text.parse_math": False,  # a run may be called $x$
}  # fmt: skip


def plot_frontier(rows: pd.DataFrame) -> Figure:
    """bpb against total bytes of one comparison group: the front, caps, over-cap runs hollow; some runs named.

    rows: of analysis.frontier.frontier_table.
    """
    figure, ax = plt.subplots(figsize=(10, 5), layout="constrained")
    trained = rows[rows.kind != "export"]
    usual = trained if len(trained) else rows  # exports, many per checkpoint and each with a cap, decide no limits
    caps = (usual.total_bytes + usual.headroom).drop_duplicates().sort_values()
    in_reach = caps[caps <= 2 * rows.total_bytes.max()]
    # The axis ends above the usual runs and the front, so that diverged runs do not compress the plot.
    middle, y = usual.bpb.median(), rows.bpb
    top = max([middle + 6 * (middle - y.min()), *y[rows.on_front]]) if len(y) > 7 else np.inf
    low, high = padded(y[y <= top])
    ax.set(xlim=padded([*rows.total_bytes, *in_reach]), ylim=(low, high), ylabel="bits per byte after round trip")

    front = rows[rows.on_front].sort_values(["total_bytes", "bpb"])
    end = max(caps.max(), front.total_bytes.max()) if len(in_reach) == len(caps) else ax.get_xlim()[1]
    staircase(ax, front.total_bytes, front.bpb, end, color=BLUE, lw=1.5, zorder=2)
    state = np.select([rows.on_front, rows.over_cap], ["on the front", "over cap"], "off the front")
    for (name, kind), points in rows.groupby([state, "kind"], sort=False):
        face, edge = STATES[name]
        look = dict(marker=MARKERS.get(kind, "s"), edgecolors=edge, linewidths=1.2, zorder=3 + (name == "on the front"))
        ax.scatter(points.total_bytes, points.bpb, 34 if len(rows) < 60 else 16, face, **look)
    for cap in in_reach:
        ax.axvline(cap, color=RED, lw=1.2, ls=DASHED, zorder=1)
        ax.annotate(
            f"cap {cap:,.0f} B", (cap, 1), xycoords=("data", "axes fraction"), xytext=(-4, -3),
            textcoords="offset points", rotation=90, ha="right", va="top", color=RED, fontsize=8,
        )  # fmt: skip
    notes = [f"cap {cap:,.0f} B lies beyond this axis" for cap in caps.drop(in_reach.index)]
    if len(hidden := rows[y > high]):
        names = ", ".join(f"{run} ({bpb:.2f} bpb)" for run, bpb in zip(hidden.run[:3], hidden.bpb, strict=False))
        more = f" and {len(hidden) - 3} more" if len(hidden) > 3 else ""
        notes.append(f"not shown, above this axis: {names}{more}")
    byte_axis(ax.xaxis, rows.total_bytes, "artifact and code", *notes)
    handles = [Line2D([], [], color=BLUE, lw=1.5, marker="o", ms=5.5, label="Pareto front")]
    handles += [dot(word, "o", *STATES[word]) for word in ("off the front", "over cap") if word in state]
    handles += [dot(kind, MARKERS.get(kind, "s")) for kind in rows.kind.unique() if rows.kind.nunique() > 1]
    ax.legend(handles=handles, **ABOVE)

    names = pd.Series(_labels(rows), index=rows.index)
    named = rows[(y <= high) & (names != "")].sort_values("on_front", ascending=False, kind="stable")
    place_labels(ax, named[["total_bytes", "bpb"]].to_numpy(), names[named.index])
    return figure


def dot(label: str, marker: str, face: str = "w", edge: str = "0.3", **look) -> Line2D:
    """A legend's entry for points."""
    return Line2D([], [], label=label, marker=marker, mfc=face, mec=edge, **dict(ls="", ms=5.5, mew=1.2) | look)


def staircase(ax: Axes, x: Sequence[float], y: Sequence[float], end: float, **look) -> None:
    """Draw y as steps, level from each x to the next and from the last to the end."""
    if len(x):
        ax.step([*x, end], [*y, list(y)[-1]], where="post", **look)


def _labels(rows: pd.DataFrame) -> np.ndarray:
    """A name per row, '' for rows without: all of few; of many the front, the baseline runs and the extremes."""
    ambiguous = rows.groupby("run").sweep.transform("nunique") > 1
    names = rows.run.where(~ambiguous, rows.sweep + "/" + rows.run)
    names = names.map(short) + np.where(rows.over_cap, " (over cap)", "")
    keep = rows.kind.ne("export") | (rows.on_front & ~rows.source.duplicated(keep=False))
    for source, exports in rows[rows.kind == "export"].groupby("source"):
        if len(exports) > 1:  # the export page draws them all; here they share one name
            good = exports[exports.on_front if exports.on_front.any() else exports.bpb <= exports.bpb.median()]
            good = good.total_bytes.sort_values().index
            middle = good[len(good) // 2]
            names[middle] = f"{len(exports)} exports of {short(source.split('/')[-1])}"
            keep[middle] = True
    if keep.sum() > LABELS:
        front = rows[rows.on_front].drop_duplicates(["total_bytes", "bpb"]).sort_values("total_bytes").index
        some = front[np.linspace(0, len(front) - 1, min(len(front), LABELS)).round().astype(int)]
        others = [*rows.index[rows.is_baseline][:3], rows.total_bytes.idxmin(), rows.total_bytes.idxmax()]
        keep[:] = rows.index.isin([*some, *others[: LABELS - len(some)]])
    trained = rows[rows.kind != "export"].groupby(["total_bytes", "bpb"])  # coinciding points share one name
    repeated = trained.cumcount().reindex(rows.index, fill_value=0) > 0
    count = trained.run.transform("size").reindex(rows.index, fill_value=1)
    names += np.where(count > 1, " +" + (count - 1).astype(str), "")
    return names.where(keep & ~repeated, "").to_numpy(object)


def plot_exports(rows: pd.DataFrame, against: str = "prequant", title: str = "") -> Figure:
    """bpb lost by each file of one checkpoint, by bytes; few files are all named, of many the telling ones.

    rows: of analysis.frontier.exports. against: prequant, the weights before quantization, or int8, the int8 zlib file.
    """
    figure, ax = plt.subplots(figsize=(11, 5.5), layout="constrained")
    x, y = rows.total_bytes, 1e3 * rows[f"delta_{against}"]
    # Losses span from noise to ruin: linear up to the power of ten below half of them, logarithmic beyond.
    usual = y[y != 0].abs().median() if y.any() else 1.0
    part = float(10 ** np.clip(np.floor(np.log10(usual)), -2, 0))
    origin = "pre-quant weights" if against == "prequant" else "int8 zlib file"
    ax.set_yscale("symlog", linthresh=part, linscale=0.7)
    limits = dict(xlim=padded(x, 0.06), ylim=(min(-0.4 * part, 1.6 * y.min()), max(part, 2 * y.max())))
    ax.set(title=title, ylabel=f"lost against the {origin} (milli-bpb)", **limits)
    ax.yaxis.set_major_formatter(lambda value, _: format_number(value, "+,g") if value else "0")
    byte_axis(ax.xaxis, x, "artifact and code")
    end, look = ax.get_xlim()[1], dict(lw=1.2, zorder=2)
    if (rows.on_front != rows.fixed_front).any():
        front = rows.fixed_front
        staircase(ax, x[front], y[front], end, color="0.45", ls=(0, (4, 2)), label="front without the solver", **look)
    staircase(ax, x[rows.on_front], y[rows.on_front], end, color="black", label="front of all", **look)
    score = (rows.bpb - rows[f"delta_{against}"]).iloc[0]
    ax.axhline(0, color=BLUE, lw=1, zorder=1, label=f"{origin}, {score:.4f} bpb")
    for family, (colour, marker) in FAMILIES.items():
        if (mine := rows.family == family).any():
            look = dict(color=colour, edgecolors="0.25", linewidths=0.5, zorder=4 if marker == "*" else 3)
            ax.scatter(x[mine], y[mine], 90 if marker == "*" else 34, marker=marker, label=family, **look)
    ax.legend(**BESIDE)

    # Coinciding files share one label. Of many files the int8 zlib file, the solver's, fronts and family bests get one.
    telling = rows.on_front | rows.fixed_front | rows.share.eq(1) | rows.family.str.startswith("solver")
    telling |= rows.index.isin(rows.groupby("family").bpb.idxmin())
    spots = pd.DataFrame({"x": x, "y": y, "name": rows.variant.map(short), "telling": telling})
    spots = spots.groupby([x.round(-1), y.round(2)], sort=False)
    spots = spots.agg({"x": "first", "y": "first", "name": list, "telling": "any"})
    if len(spots) > LABELS + 8:
        spots = spots[spots.telling][: LABELS + 8]
    texts = [", ".join(names[:2]) + (f" +{len(names) - 2}" if len(names) > 2 else "") for names in spots.name]
    place_labels(ax, spots[["x", "y"]].to_numpy(), texts)
    return figure


def plot_maps(maps: dict[str, pd.DataFrame], label: str, norm: Normalize, form: str, cmap: str = "cividis_r") -> Figure:
    """Heat maps on one colour scale, two per row: blocks down, their matrices across, other tensors below.

    maps: title -> rows of tensor, value. label: what a value is, with its unit; form: its format.
    """
    places = {name: tensor_place(name) for values in maps.values() for name in values.tensor}
    columns = sorted({part for layer, part in places.values() if layer is not None}) or [""]
    cells = {name: (part, columns[0]) if layer is None else (layer, part) for name, (layer, part) in places.items()}
    lines = sorted({line for line, _ in cells.values()}, key=lambda line: (isinstance(line, str), line))
    height = -(-len(maps) // 2)
    size = (11, max(2.6, height * (0.9 + 0.27 * len(lines))))
    figure, axes = plt.subplots(height, min(2, len(maps)), figsize=size, layout="constrained", squeeze=False)
    for ax, (title, values) in zip(axes.flat, maps.items(), strict=False):
        grid = pd.DataFrame(np.nan, lines, columns)
        for name, value in zip(values.tensor, values.value, strict=True):
            grid.at[cells[name]] = value
        image = ax.imshow(grid, aspect="auto", cmap=cmap, norm=norm)
        ax.set_xticks(range(len(columns)), columns)
        ax.set_yticks(range(len(lines)), [line if isinstance(line, str) else f"block {line}" for line in lines])
        ax.grid(visible=False)
        ax.set_title(title)
        for (i, j), value in np.ndenumerate(grid.to_numpy()):
            if np.isfinite(value):
                bright = np.dot(image.cmap(image.norm(value))[:3], (0.3, 0.59, 0.11)) >= 0.5
                look = dict(ha="center", va="center", fontsize=7.5, color="k" if bright else "w")
                ax.text(j, i, format_number(value, form), **look)
    for ax in axes.flat[len(maps) :]:
        ax.set_axis_off()
    figure.colorbar(image, ax=axes, label=label, format="%g", pad=0.01)
    return figure


def plot_sensitivity(rows: pd.DataFrame) -> Figure:
    """Exact and estimated maps on one scale: milli-bpb per 1,000 coded bytes. rows: a sensitivity stage's table."""
    rows = rows[(rows.tensor != "") & (rows.delta_bytes != 0)]
    values = {
        "exact: every change scored": 1e3 * rows.bpb_per_kb,
        "estimated: from gradients": -1e6 * rows.estimated_delta_bpb / rows.delta_bytes,
    }
    largest = max(value.abs().max() for value in values.values()) or 1.0
    norm = SymLogNorm(float(10 ** np.round(np.log10(largest / 100))), vmin=-largest, vmax=largest)
    maps = {title: pd.DataFrame({"tensor": rows.tensor, "value": value}) for title, value in values.items()}
    return plot_maps(maps, "milli-bpb per 1,000 bytes", norm, ".4f", "PuOr_r")


def rank_correlation(rows: pd.DataFrame) -> float:
    """Spearman correlation of the estimated with the exact rise of bpb. rows: a sensitivity stage's table."""
    rows = rows[rows.tensor != ""]
    return float(rows.delta_bpb.rank().corr(rows.estimated_delta_bpb.rank()))


def plot_estimates(rows: pd.DataFrame) -> Figure:
    """Estimated against exact rise of bpb, one point per tensor. rows: a sensitivity stage's table."""
    figure, ax = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    ax.set_title(f"estimated against exact: Spearman rank correlation {rank_correlation(rows):.2f}")
    rows = rows[rows.tensor != ""]
    exact, estimated = 1e3 * rows.delta_bpb.to_numpy(), 1e3 * rows.estimated_delta_bpb.to_numpy()
    both = np.abs(np.concatenate([exact, estimated]))
    part = float(10 ** np.floor(np.log10(np.quantile(both, 0.2) + 1e-9)))
    ends = [min(-0.5 * part, 1.6 * exact.min(), 1.6 * estimated.min()), 2.5 * both.max()]
    for axis, label in (("x", "exact"), ("y", "estimated")):
        getattr(ax, f"set_{axis}scale")("symlog", linthresh=part, linscale=0.7)
        getattr(ax, f"{axis}axis").set_major_formatter(lambda value, _: format_number(value, "g"))
        ax.set(**{f"{axis}lim": ends, f"{axis}label": f"{label} rise (milli-bpb)"})
    ax.plot(ends, ends, color="0.6", lw=1, zorder=1)
    parts = np.array([tensor_place(name)[1] for name in rows.tensor])
    for name, (colour, marker) in zip(sorted(set(parts)), FAMILIES.values(), strict=False):
        mine = parts == name
        ax.scatter(exact[mine], estimated[mine], 34, colour, marker, edgecolors="0.25", linewidths=0.5, label=name)
    ax.legend(**BESIDE)
    return figure


def plot_bytes(table: pd.DataFrame) -> Figure:
    """Bytes by part, one bar per run in the table's order, against the cap."""
    figure, ax = plt.subplots(figsize=(10, 1.3 + 0.3 * len(table)), layout="constrained")
    parts = pd.DataFrame(list(table.bytes), names_of(table)).reindex(columns=list(PARTS)).fillna(0)
    parts.loc[:, parts.any()].plot.barh(ax=ax, stacked=True, width=0.7, color=PARTS, fontsize=8)
    totals = table.total_bytes.map("{:,.0f}".format) + np.where(table.over_cap, " over cap", "")
    drawn = ax.bar_label(ax.containers[-1], totals, padding=4, fontsize=8, path_effects=HALO)
    for text, over in zip(drawn, table.over_cap, strict=True):
        text.set_color(RED if over else "black")
    for cap in table.cap_bytes.unique():
        if cap <= 2 * table.total_bytes.max():
            ax.axvline(cap, color=RED, lw=1.2, ls=DASHED, label=f"cap {cap:,.0f} B")
    ax.margins(x=0.17)
    ax.grid(axis="y", visible=False)
    ax.set(ylim=(len(table) - 0.4, -0.6))
    byte_axis(ax.xaxis, table.total_bytes, "artifact and its code, total bytes at the bar's end")
    ax.legend(**ABOVE, handlelength=1)
    return figure


def padded(values: Sequence[float], share: float = 0.08) -> tuple[float, float]:
    """Axis limits that leave a share free at both ends."""
    low, high = min(values), max(values)
    room = share * (high - low) or 0.1 * abs(high) or 1.0
    return low - room, high + room


def symlog_axis(ax: Axes, axis: str, linear: float, limits: tuple[float, float] | None = None) -> None:
    """Scale axis x or y linearly up to ±linear bpb and logarithmically beyond; limits: default those it then has."""
    getattr(ax, f"set_{axis}scale")("symlog", linthresh=linear)
    limits = limits or getattr(ax, f"get_{axis}lim")()
    ticks = [sign * tick for tick in DIFFERENCES if tick >= linear for sign in (-1, 1)]
    names = ["0", *(format_number(tick, "+g") for tick in ticks)]
    getattr(ax, f"set_{axis}ticks")([0, *ticks], names, fontsize=8)
    getattr(ax, f"set_{axis}ticks")([], minor=True)
    getattr(ax, f"set_{axis}lim")(limits)


def log_axis(ax: Axes) -> None:
    """Scale the x axis logarithmically, with ticks at 1, 2 and 5 times powers of ten."""
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.xaxis.set_minor_locator(NullLocator())


def byte_axis(axis: Axis, sizes: pd.Series, label: str, *notes: str) -> None:
    """Ticks in kB or MB by the largest of sizes, and the label, a note per line below it."""
    unit, name = (1e3, "kB") if sizes.max() < 2e6 else (1e6, "MB")
    axis.set_major_formatter(lambda size, _: f"{size / unit:g}")
    axis.set_label_text("\n".join([f"{label} ({name}, 1 {name} = {unit:,.0f} bytes)", *notes]))


def save(figure: Figure, out: str | Path | None, name: str):
    """Write out/figures/<name>.png (not if out is empty); returns the picture for a notebook to display."""
    from IPython.display import Image  # only notebooks need it

    png = io.BytesIO()
    figure.set_dpi(150)
    FigureCanvasAgg(figure).print_png(png)  # savefig would draw the figure twice
    plt.close(figure)
    if out:
        atomic_write(Path(out) / "figures" / f"{name}.png", png.getvalue())
    look = dict(width=round(96 * figure.get_figwidth()), alt=name.replace("_", " "))
    return Image(png.getvalue(), **look, metadata={"file": f"{name}.png"})
