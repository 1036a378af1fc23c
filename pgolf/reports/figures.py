"""The plots: frontier, exports of one checkpoint, maps of tensors, bytes by part; labels that do not collide.

Colours are told apart with every common colour blindness, and colour is never the only sign.
"""

import io
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pgolf.analysis import frontier
from pgolf.reports.tables import names_of
from pgolf_core.files import atomic_write
from pgolf_core.parameters import tensor_place

# Okabe & Ito's colours, told apart with every common colour blindness: https://jfly.uni-koeln.de/color/
BLUE, SKY, GREEN, ORANGE, RED, PINK = "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7"
COLOURS = ["#000000", BLUE, RED, GREEN, ORANGE, PINK, SKY]  # of lines, in this order
MARKERS = {"train": "o", "export": "^"}  # by kind; a square for any other
PARTS = {
    "weights": BLUE,
    "scales": SKY,
    "residuals": ORANGE,
    "float tensors": GREEN,
    "metadata": "#999999",
    "code": PINK,
}
FAMILIES = {  # of frontier.family: colour, marker
    "absmax": ("#000000", "o"),
    "rank-1 residual": ("0.6", "D"),
    "σ-tied steps": (SKY, "s"),
    "Fisher steps": (SKY, "v"),
    "GPTQ": (BLUE, "^"),
    "GPTQ, Fisher steps": (GREEN, "v"),
    "LQER": ("#882255", "p"),
    "sdclip": (PINK, "P"),
    "ternary": ("#F0E442", "X"),
    "codebook": (ORANGE, "h"),
    "solver": (RED, "*"),
}
HALO = [patheffects.withStroke(linewidth=2.5, foreground="white")]  # of text that may lie on a line
LABELS = 16  # runs of one figure that are labelled, drawn as curves or as bars

# For plt.rcParams.update, before figures are made.
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "grid.color": "0.92",
    "legend.frameon": False,
}


def plot_frontier(table: pd.DataFrame, ax: Axes, rows: pd.DataFrame | None = None) -> None:
    """bpb against total bytes of one panel: the front, caps, over-cap runs hollow. Of many runs some are named.

    rows: its frontier_table, where that was made before.
    """
    rows = frontier.frontier_table(table) if rows is None else rows
    # What the solver was given for a cap is of its own file alone, and there is one for each of them.
    trained = table[table.kind != "export"]
    caps = sorted((trained if len(trained) else table).cap_bytes.unique())
    unit, name = byte_unit(rows.total_bytes)
    x, y = rows.total_bytes.to_numpy() / unit, rows.bpb.to_numpy()
    in_reach = [cap for cap in caps if cap <= 2 * rows.total_bytes.max()]
    left, right = padded(np.concatenate([x, np.divide(in_reach, unit)]))
    # Runs that diverged would press all others together: the axis ends above the rest and says what it hides.
    # The front is never hidden, and exports, many to a checkpoint, do not decide what is usual.
    usual = np.median(y[rows.kind != "export"]) if (rows.kind != "export").any() else np.median(y)
    top = max([usual + 6 * (usual - y.min()), *y[rows.on_front]]) if len(y) > 7 else np.inf
    low, high = padded(y[y <= top])
    ax.set(xlim=(left, right), ylim=(low, high))
    xlabel = f"artifact and code ({name}, 1 {name} = {unit:,.0f} bytes)"

    front = rows[rows.on_front].sort_values(["total_bytes", "bpb"])
    line = np.empty((0, 2))
    if len(front):
        # The best bpb that fits in x bytes: level until the next run, then down; it ends at the largest cap.
        end = caps[-1] / unit if caps[-1] in in_reach else right
        steps_x = np.append(np.repeat(front.total_bytes / unit, 2)[1:], end)
        line = np.column_stack([steps_x, np.repeat(front.bpb, 2)])
        ax.plot(*line.T, color=BLUE, lw=1.5, zorder=2)
    looks = {"on the front": (BLUE, BLUE), "off the front": ("0.8", "0.5"), "over cap": ("none", RED)}
    state = np.select([rows.on_front, rows.over_cap], ["on the front", "over cap"], "off the front")
    big = 34 if len(rows) < 60 else 16
    for (name, kind), points in rows.groupby([state, "kind"], sort=False):
        (face, edge), marker = looks[name], MARKERS.get(kind, "s")
        spots = ax.scatter(
            points.total_bytes / unit, points.bpb, big, face, marker=marker, edgecolors=edge, linewidths=1.2
        )
        spots.set_zorder(4 if name == "on the front" else 3)
    for cap in caps:
        if cap in in_reach:
            ax.axvline(cap / unit, color=RED, lw=1.2, ls=(0, (5, 3)), zorder=1)
            ax.annotate(
                f"cap {cap:,.0f} B", (cap / unit, 1), xycoords=("data", "axes fraction"), xytext=(-4, -3),
                textcoords="offset points", rotation=90, ha="right", va="top", color=RED, fontsize=8,
            )  # fmt: skip
    notes = [f"cap {cap:,.0f} B lies beyond this axis" for cap in caps if cap not in in_reach]
    if len(hidden := rows[y > high]):
        names = ", ".join(f"{run} ({bpb:.2f} bpb)" for run, bpb in zip(hidden.run[:3], hidden.bpb, strict=False))
        more = f" and {len(hidden) - 3} more" if len(hidden) > 3 else ""
        notes.append(f"not shown, above this axis: {names}{more}")
    ax.set(xlabel="\n".join([xlabel, *notes]), ylabel="bits per byte after round trip")
    dot = dict(ls="", ms=5.5, mew=1.2)
    handles = [Line2D([], [], color=BLUE, lw=1.5, marker="o", ms=5.5, label="Pareto front")]
    handles += [
        Line2D([], [], mfc=looks[name][0], mec=looks[name][1], marker="o", label=name, **dot)
        for name in ("off the front", "over cap")
        if name in state
    ]
    if rows.kind.nunique() > 1:
        kinds = {kind: MARKERS.get(kind, "s") for kind in rows.kind.unique()}
        handles += [Line2D([], [], mfc="w", mec="0.3", marker=m, label=kind, **dot) for kind, m in kinds.items()]
    ax.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=6, fontsize=8, borderaxespad=0)

    labels = _labels(rows)
    shown = (y <= high) & np.array([label != "" for label in labels])
    place_labels(ax, x[shown], y[shown], list(np.array(labels)[shown]), (x, y), line)


def _labels(rows: pd.DataFrame) -> list[str]:
    """A name a row, '' for rows that stay unnamed: all of few, of many the front, the controls and the extremes."""
    ambiguous = rows.groupby("run").sweep.transform("nunique") > 1
    names = rows.run.where(~ambiguous, rows.sweep + "/" + rows.run)
    names = names.map(short) + np.where(rows.over_cap, " (over cap)", "")
    keep = rows.kind.ne("export") | (rows.on_front & ~rows.source.duplicated(keep=False))
    for source, exports in rows[rows.kind == "export"].groupby("source"):
        if len(exports) > 1:  # the export report has a figure of them; here they are one spot with one name
            good = exports[exports.bpb <= exports.bpb.median()].total_bytes.sort_values().index
            middle = good[len(good) // 2]
            names[middle] = f"{len(exports)} exports of {short(source.split('/')[-1])}"
            keep[middle] = True
    if keep.sum() > LABELS:
        keep[:] = False
        front = rows[rows.on_front].drop_duplicates(["total_bytes", "bpb"]).sort_values("total_bytes").index
        keep[front[np.linspace(0, len(front) - 1, min(len(front), LABELS // 2)).round().astype(int)]] = True
        keep[rows.index[rows.is_control][:3]] = True
        keep[[rows.bpb.idxmin(), rows.total_bytes.idxmin(), rows.total_bytes.idxmax()]] = True
    trained = rows[rows.kind != "export"].groupby(["total_bytes", "bpb"])  # one name for those that lie on one another
    same = trained.cumcount().reindex(rows.index, fill_value=0)
    count = trained.run.transform("size").reindex(rows.index, fill_value=1)
    names += np.where(count > 1, " +" + (count - 1).astype(str), "")
    return list(names.where(keep & (same == 0), ""))


def plot_exports(rows: pd.DataFrame, ax: Axes, against: str = "raw") -> None:
    """One checkpoint's files: bpb lost by bytes; all of few named, of many the telling ones.

    rows: of frontier.exports. against: raw, the raw weights, or plain, the seed's file.
    """
    unit, name = byte_unit(rows.total_bytes)
    x, y = rows.total_bytes.to_numpy() / unit, 1e3 * rows[f"delta_{against}"].to_numpy()
    # From less than noise to ruin: linear up to ±1 (less where most is less), logarithmic beyond.
    part = _linear_part(y)
    origin = "raw weights" if against == "raw" else "plain file"
    score = (rows.bpb - rows[f"delta_{against}"]).iloc[0]
    ax.set_yscale("symlog", linthresh=part, linscale=0.7)
    ax.set(xlim=padded(x, 0.06), ylim=(min(-0.4 * part, 1.6 * y.min()), max(part, 2 * y.max())))
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:+,g}".replace("-", "−") if value else "0")
    ax.set(
        xlabel=f"artifact and code ({name}, 1 {name} = {unit:,.0f} bytes)",
        ylabel=f"lost against the {origin} (milli-bpb)",
    )
    line = np.empty((0, 2))
    for front, colour, style, label in (
        ("fixed_front", "0.45", (0, (4, 2)), "front without the solver"), ("on_front", "black", "-", "front of all")
    ):  # fmt: skip
        corners = np.column_stack([x, y])[rows[front]]
        if len(corners) and (front == "on_front" or (rows.on_front != rows.fixed_front).any()):
            steps = np.append(np.repeat(corners[:, 0], 2)[1:], ax.get_xlim()[1])
            ax.plot(steps, np.repeat(corners[:, 1], 2), color=colour, ls=style, lw=1.2, zorder=2, label=label)
            line = np.column_stack([steps, np.repeat(corners[:, 1], 2)])
    ax.axhline(0, color=BLUE, lw=1, zorder=1, label=f"{origin}, {score:.4f} bpb")
    for kind, (colour, marker) in FAMILIES.items():
        if (mine := (rows.family == kind).to_numpy()).any():
            size = 90 if marker == "*" else 34
            look = dict(color=colour, edgecolors="0.25", linewidths=0.5, zorder=4 if kind == "solver" else 3)
            ax.scatter(x[mine], y[mine], size, marker=marker, label=kind, **look)
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)

    # What lies on one another has one label; of many points the seed's, the solver's, the fronts and the best of
    # each family.
    spots = pd.DataFrame(
        {
            "x": x,
            "y": y,
            "name": rows.variant.map(short),
            "telling": rows.on_front | rows.fixed_front | rows.share.eq(1),
        }
    )
    spots.loc[[*rows.groupby("family").bpb.idxmin(), *rows.index[rows.family == "solver"]], "telling"] = True
    spots = spots.groupby([spots.x.round(2 if unit == 1e3 else 4), spots.y.round(2)], sort=False)
    spots = spots.agg({"x": "first", "y": "first", "name": list, "telling": "any"})
    if len(spots) > LABELS + 8:
        spots = spots[spots.telling][: LABELS + 8]
    texts = [", ".join(names[:2]) + (f" +{len(names) - 2}" if len(names) > 2 else "") for names in spots.name]
    place_labels(ax, spots.x.to_numpy(), spots.y.to_numpy(), texts, (x, y), line)


def plot_maps(maps: dict[str, pd.DataFrame], label: str, norm: Normalize, form: str, cmap: str = "cividis_r") -> Figure:
    """Heat maps on one colour scale, two in a row: blocks down, their matrices across, what is outside of blocks below.

    maps: title -> a tensor a row: tensor, value. label: what a value is, with its unit; form: its format.
    """
    places = {name: tensor_place(name) for values in maps.values() for name in values.tensor}
    layers = sorted({layer for layer, _ in places.values() if layer is not None})
    parts = sorted({part for layer, part in places.values() if layer is not None})
    lines = [*layers, *sorted({part for layer, part in places.values() if layer is None})]
    height = -(-len(maps) // 2)
    size = (11, max(2.6, height * (0.9 + 0.27 * len(lines))))
    figure, axes = plt.subplots(height, min(2, len(maps)), figsize=size, layout="constrained", squeeze=False)
    for ax, (title, values) in zip(axes.flat, maps.items(), strict=False):
        grid = np.full((len(lines), max(len(parts), 1)), np.nan)
        for name, value in zip(values.tensor, values.value, strict=True):
            layer, part = places[name]
            grid[(lines.index(part), 0) if layer is None else (lines.index(layer), parts.index(part))] = value
        image = ax.imshow(grid, aspect="auto", cmap=cmap, norm=norm)
        ax.set_xticks(range(len(parts)), parts)
        ax.set_yticks(range(len(lines)), [f"block {line}" if line in layers else line for line in lines])
        ax.grid(visible=False)
        ax.set_title(title)
        for (i, j), value in np.ndenumerate(grid):
            if np.isfinite(value):
                red, green, blue, _ = image.cmap(image.norm(value))
                colour = "w" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else "k"
                text = format(value, form).replace("-", "−")
                ax.text(j, i, text, ha="center", va="center", fontsize=7.5, color=colour)
    for ax in axes.flat[len(maps) :]:
        ax.set_axis_off()
    figure.colorbar(image, ax=axes, label=label, format="%g", pad=0.01)
    return figure


def short(name: str) -> str:
    """A name that fits beside its point; tables have it whole."""
    return name if len(name) <= 36 else f"{name[:20]}…{name[-15:]}"


def padded(values: np.ndarray, share: float = 0.08) -> tuple[float, float]:
    """Axis limits that leave a share free at both ends."""
    low, high = values.min(), values.max()
    room = share * (high - low) or 0.1 * abs(high) or 1.0
    return low - room, high + room


def byte_unit(sizes: pd.Series) -> tuple[float, str]:
    return (1e3, "kB") if sizes.max() < 2e6 else (1e6, "MB")


def _linear_part(values: np.ndarray) -> float:
    """The power of ten from 0.01 to 1 below half of the values."""
    usual = np.median(np.abs(values[values != 0])) if values.any() else 1.0
    return float(10 ** np.clip(np.floor(np.log10(usual)), -2, 0))


def place_labels(
    ax: Axes, x: np.ndarray, y: np.ndarray, texts: Sequence[str], dots: tuple[np.ndarray, np.ndarray], line: np.ndarray
) -> None:
    """Write each text beside its point where it covers least: no label, no frame, few dots, little of the line.

    Greedy, in the order given, over places around the point; far labels get a leader line. x, y, dots and the
    line's corners (n, 2) in data units; axis limits must be set.
    """
    ax.figure.draw_without_rendering()  # settles the layout, so that data units are pixels from here on
    ax.figure.set_layout_engine("none")
    pixels, renderer = ax.transData.transform, ax.figure.canvas.get_renderer()
    point_size = ax.figure.dpi / 72
    dots = pixels(np.column_stack(dots))
    line = pixels(line) if len(line) else np.empty((0, 2))
    line = np.concatenate([line[:1], *(np.linspace(a, b, 40) for a, b in pairwise(line))])
    frame = ax.get_window_extent(renderer)
    angle = np.deg2rad(np.arange(0, 360, 15))
    ring = np.column_stack([np.cos(angle), np.sin(angle)])
    boxes = np.array([t.get_window_extent(renderer).extents for t in ax.texts]).reshape(-1, 4)  # of what is written
    for a, b, text in zip(x, y, texts, strict=True):
        target = pixels((a, b))
        probe = ax.text(0, 0, text, fontsize=8)
        extent = probe.get_window_extent(renderer)
        probe.remove()
        size = np.array([extent.width, extent.height])
        distance = np.repeat([6.5, 12, 22, 36, 54, 76, 100], len(ring)) * point_size
        toward = np.tile(ring, (7, 1))
        centre = target + toward * (distance[:, None] + size / 2)  # (places, 2)
        low, high = centre - size / 2, centre + size / 2
        inside = ((low >= frame.min) & (high <= frame.max)).all(1)
        gap = 1.5 * point_size
        cost = distance / point_size + 6 * (np.abs(toward[:, 1]) > 0.99) + 1e4 * ~inside
        cost += 1e3 * _hits(low - gap, high + gap, boxes[:, :2], boxes[:, 2:])
        cost += 60 * _hits(low - gap, high + gap, dots, dots) + 2 * _hits(low, high, line, line)
        others = dots[np.abs(dots - target).max(1) > 1]
        if len(others):  # a label stands nearer to its own point than to any other
            apart = np.maximum(low[:, None] - others, others - high[:, None]).clip(0)  # (places, dots, 2)
            near = distance <= 10 * point_size
            cost += 20 * (near & (np.hypot(*np.moveaxis(apart, 2, 0)).min(1) < distance))
        leader = target + toward[:, None] * (distance[:, None, None] * np.linspace(0.2, 1, 6)[:, None])
        for step in leader.swapaxes(0, 1):  # leaders run over no label, and over few points
            cost += 300 * _hits(step, step, boxes[:, :2], boxes[:, 2:])
            cost += 10 * _hits(step - 2 * gap, step + 2 * gap, others, others)
        chosen = cost.argmin()
        boxes = np.vstack([boxes, [*low[chosen], *high[chosen]]])
        far = distance[chosen] > 10 * point_size
        label = ax.annotate(
            text, (a, b), xytext=(centre[chosen] - target) / point_size, textcoords="offset points", fontsize=8,
            ha="center", va="center", path_effects=HALO, zorder=5,
            arrowprops=dict(arrowstyle="-", color="0.55", lw=0.7, shrinkA=0, shrinkB=3) if far else None,
        )  # fmt: skip
        label.set_in_layout(False)


def _hits(low: np.ndarray, high: np.ndarray, lows: np.ndarray, highs: np.ndarray) -> np.ndarray:
    """How many of the boxes (m, 2) each of the boxes (n, 2) meets; a dot is a box without size."""
    return ((low[:, None] < highs) & (high[:, None] > lows)).all(2).sum(1)


def plot_bytes(table: pd.DataFrame) -> Figure:
    """Bytes by part, a bar a run in the table's order, against the cap."""
    figure, ax = plt.subplots(figsize=(10, 1.3 + 0.3 * len(table)), layout="constrained")
    unit, name = byte_unit(table.total_bytes)
    parts = pd.DataFrame(list(table.bytes)).drop(columns="total", errors="ignore").fillna(0) / unit
    left = np.zeros(len(table))
    for part in [part for part in PARTS if part in parts and parts[part].any()]:
        ax.barh(range(len(table)), parts[part], left=left, height=0.7, color=PARTS[part], label=part)
        left += parts[part].to_numpy()
    for i, (total, over) in enumerate(zip(table.total_bytes, table.over_cap, strict=True)):
        ax.annotate(
            f"{total:,.0f}" + (" over cap" if over else ""), (left[i], i), xytext=(4, 0), textcoords="offset points",
            va="center", fontsize=8, color=RED if over else "black", path_effects=HALO,
        )  # fmt: skip
    for cap in table.cap_bytes.unique():
        if cap <= 2 * table.total_bytes.max():
            ax.axvline(cap / unit, color=RED, lw=1.2, ls=(0, (5, 3)), label=f"cap {cap:,.0f} B")
    ax.set_yticks(range(len(table)), names_of(table), fontsize=8)
    ax.set_ylim(len(table) - 0.4, -0.6)
    ax.margins(x=0.17)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel(f"bytes of the artifact and its code ({name}); total in bytes at the bar's end")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=7, fontsize=8, borderaxespad=0, handlelength=1)
    return figure


def save(figure: Figure, out: str | Path, name: str):
    """Keep a figure as out/figures/<name>.png (nowhere when out is ''), and give it to be shown in a notebook."""
    from IPython.display import Image  # a notebook's need; the command line does without

    png = io.BytesIO()
    figure.set_dpi(150)
    FigureCanvasAgg(figure).print_png(png)  # savefig would draw it twice
    plt.close(figure)
    if out:
        atomic_write(Path(out) / "figures" / f"{name}.png", png.getvalue())
    return Image(png.getvalue(), width=round(96 * figure.get_figwidth()), alt=name.replace("_", " "))


def plot_sensitivity(rows: pd.DataFrame) -> Figure:
    """Exact and estimated maps on one scale: milli-bpb that 1,000 coded bytes are worth. rows: map_sensitivity's."""
    rows = rows[(rows.tensor != "") & (rows.delta_bytes != 0)]
    worth = {
        "exact: every change scored": 1e3 * rows.bpb_per_kb,
        "estimated: from gradients": -1e6 * rows.estimated_delta_bpb / rows.delta_bytes,
    }
    largest = max(values.abs().max() for values in worth.values()) or 1.0
    norm = SymLogNorm(float(10 ** np.round(np.log10(largest / 100))), vmin=-largest, vmax=largest)
    maps = {title: pd.DataFrame({"tensor": rows.tensor, "value": values}) for title, values in worth.items()}
    return plot_maps(maps, "milli-bpb for each 1,000 bytes", norm, ".4f", "PuOr_r")


def plot_estimates(rows: pd.DataFrame, ax: Axes) -> float:
    """Estimated against exact rise of bpb, a point a tensor; their rank correlation. rows: map_sensitivity's."""
    rows = rows[rows.tensor != ""]
    exact, estimated = 1e3 * rows.delta_bpb.to_numpy(), 1e3 * rows.estimated_delta_bpb.to_numpy()
    both = np.abs(np.concatenate([exact, estimated]))
    part = float(10 ** np.floor(np.log10(np.quantile(both, 0.2) + 1e-9)))
    ends = [min(-0.5 * part, 1.6 * exact.min(), 1.6 * estimated.min()), 2.5 * both.max()]
    for axis, label in (("x", "exact"), ("y", "estimated")):
        getattr(ax, f"set_{axis}scale")("symlog", linthresh=part, linscale=0.7)
        getattr(ax, f"{axis}axis").set_major_formatter(lambda value, _: f"{value:g}".replace("-", "−"))
        ax.set(**{f"{axis}lim": ends, f"{axis}label": f"{label} rise (milli-bpb)"})
    ax.plot(ends, ends, color="0.6", lw=1, zorder=1)
    looks = dict(zip(sorted({tensor_place(name)[1] for name in rows.tensor}), FAMILIES.values(), strict=False))
    parts = np.array([tensor_place(name)[1] for name in rows.tensor])
    for name, (colour, marker) in looks.items():
        mine = parts == name
        ax.scatter(exact[mine], estimated[mine], 34, colour, marker, edgecolors="0.25", linewidths=0.5, label=name)
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
    return float(rows.delta_bpb.rank().corr(rows.estimated_delta_bpb.rank()))
