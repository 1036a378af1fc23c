"""Figures that answer the mouse: a link over each point of a PNG, whose text appears while the pointer is on it.

HTML and CSS without a script: the text is an attribute that CSS shows, so no name of a run is read as markup. It works
in a page opened from disk and in JupyterLab.
"""

import html
from collections.abc import Iterable
from functools import cache

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from pgolf.reports import figures
from pgolf.reports.labels import printable
from pgolf.reports.sweep_figures import ordered
from pgolf.runs.table import KNOBS
from pgolf_core.config import TRACKS, RunConfig

STYLE = """<style>
.pgolf-figure { position: relative; max-width: 100%; }
.pgolf-figure img { display: block; width: 100%; height: auto; }
.pgolf-point { position: absolute; width: 14px; height: 14px; margin: -7px 0 0 -7px; border-radius: 50%; }
.pgolf-point:hover, .pgolf-point:focus { box-shadow: 0 0 0 2px #D55E00; z-index: 9; outline: none; }
.pgolf-point:hover::after, .pgolf-point:focus::after { content: attr(aria-label); position: absolute; z-index: 9;
 left: 18px; top: 0; width: max-content; max-width: 430px; padding: 6px 10px; background: #fff; color: #222;
 border: 1px solid #888; border-radius: 4px; box-shadow: 0 2px 6px #0003; font: 12px/1.45 system-ui, sans-serif;
 text-align: left; white-space: pre-wrap; overflow-wrap: anywhere; pointer-events: none; }
.pgolf-left:hover::after, .pgolf-left:focus::after { left: auto; right: 18px; }
.pgolf-up:hover::after, .pgolf-up:focus::after { top: auto; bottom: 0; }
</style>"""
NEAR = 3.0  # pixels of the page; points nearer than this share one link
TOGETHER, DIFFERENT = 3, 8  # runs that one text tells of, and knobs of each
WIDTH = 96  # pixels per inch of a figure


def drawn(figure: Figure, points: pd.DataFrame) -> str:
    """HTML of a figure with a text over each of its points and no links. points: x, y, text."""
    data, _ = figures.save(figure, None, "figure")._repr_mimebundle_()
    return over(figure, data["image/png"], points.assign(href=""))


def over(figure: Figure, png: str, points: pd.DataFrame) -> str:
    """HTML of a drawn figure with links over the points of its first axes.

    png: base64. points: x, y (data units of the axes), text, href, the most important first; those beyond the axes'
    limits are left out.
    """
    width, height = (WIDTH * figure.get_size_inches()).round().astype(int)
    ax, scale = figure.axes[0], WIDTH / figure.dpi
    pixels = ax.transData.transform(points[["x", "y"]].to_numpy(float)) * scale
    edges = ax.bbox.extents * scale
    inside = ((pixels >= edges[:2] - 1) & (pixels <= edges[2:] + 1)).all(1)
    spots = points[inside].assign(
        left=pixels[inside, 0] / width, top=1 - pixels[inside, 1] / height,
        cell=list(map(tuple, (pixels[inside] / NEAR).round().astype(int))),
    )  # fmt: skip
    links = []
    for _, own in reversed(list(spots.groupby("cell", sort=False))):  # the first lie above the others
        texts = list(own.text[:TOGETHER]) + ([f"and {len(own) - TOGETHER} more here"] if len(own) > TOGETHER else [])
        first = own.iloc[0]
        side = (" pgolf-left" if first.left > 0.5 else "") + (" pgolf-up" if first.top > 0.5 else "")
        place = f"left:{first.left:.2%};top:{first.top:.2%}"
        says = html.escape("\n\n".join(texts))
        href = f' href="{first.href}"' if first.href else ""
        links.append(f'<a class="pgolf-point{side}" style="{place}"{href} aria-label="{says}"></a>')
    picture = f'<img alt="a point tells of its run" src="data:image/png;base64,{png}">'
    return f'{STYLE}<div class="pgolf-figure" style="width:{width}px">{picture}{"".join(links)}</div>'


def changed(own: dict, other: dict, names: Iterable[str] = KNOBS) -> str:
    """A line per knob in which own differs from other, 'muon_momentum 0.9 instead of 0.95'; '' if in none."""
    differ = [name for name in names if name in other and str(own.get(name)) != str(other[name])]
    words = [f"{name} {printable(own.get(name))} instead of {printable(other[name])}" for name in differ[:DIFFERENT]]
    return "\n".join(words + ([f"and {len(differ) - DIFFERENT} more knobs"] if len(differ) > DIFFERENT else []))


def of_frontier(rows: pd.DataFrame, group: pd.DataFrame) -> pd.DataFrame:
    """Points of figures.plot_frontier: x, y, text, path. group: the runs that the rows are made of.

    Knobs are compared with the run that an export stores, else with the sweep's baseline run, else with the track.
    """
    rows = rows.sort_values("on_front", ascending=False, kind="stable")
    runs = group.loc[rows.index]
    places = dict(zip(runs.sweep + "/" + runs.run, runs[KNOBS].to_dict("records"), strict=True))
    texts = []
    for row, own in zip(rows.itertuples(), runs.itertuples(), strict=True):
        place, base = f"{row.sweep}/{row.run}", f"{row.sweep}/{own.control}"
        if row.kind == "export" or base not in places:
            base = str(row.source) if row.kind == "export" else ""
        base, other = (base, places[base]) if base in places else _of_track(own.track)
        interval = "" if np.isnan(row.delta_half) else f" ± {row.delta_half:.4f}"
        against = "the run it stores" if row.kind == "export" else "the baseline run"
        delta = "" if np.isnan(row.delta_bpb) or row.is_baseline else f", {row.delta_bpb:+.4f}{interval} to {against}"
        state = "over its cap" if row.over_cap else "on the front" if row.on_front else "off the front"
        texts.append([
            printable(place), f"{row.bpb:.4f} bpb{delta}",
            f"{row.total_bytes:,} bytes of {row.total_bytes + row.headroom:,}, {state}",
            _of_knobs(changed(places[place], other), base, place),
        ])  # fmt: skip
    return _points(rows.total_bytes, rows.bpb, texts, runs.path)


def of_exports(rows: pd.DataFrame, against: str = "prequant") -> pd.DataFrame:
    """Points of figures.plot_exports: x, y, text, path; knobs are compared with the file as trained."""
    rows = rows.sort_values("on_front", ascending=False, kind="stable")
    own = rows.knobs[rows.variant == "as trained"]
    other, base = (own.iloc[0], "as trained") if len(own) else ({}, "")
    origin, texts = "pre-quant weights" if against == "prequant" else "int8 zlib file", []
    for row in rows.itertuples():
        delta, half = getattr(row, f"delta_{against}"), getattr(row, f"half_{against}")
        interval = "" if np.isnan(half) else f" ± {half:.4f}"
        front = ", on the front" if row.on_front else ""
        texts.append([
            printable(f"{row.variant} ({row.family})"), f"{row.bpb:.4f} bpb, {delta:+.4f}{interval} to the {origin}",
            f"{row.total_bytes:,} bytes{front}", _of_knobs(changed(row.knobs, other, row.knobs), base, row.variant),
        ])  # fmt: skip
    return _points(rows.total_bytes, 1e3 * rows[f"delta_{against}"], texts, rows.path)


def of_sweep(rows: pd.DataFrame, group: pd.DataFrame) -> pd.DataFrame:
    """Points of sweep_figures.plot_sweep: x, y, text, path of the first seed; knobs compared with the baseline run."""
    rows, knob, _ = ordered(rows, group)
    labels = [own[0] for own in rows["index"]]
    runs = group.loc[labels, KNOBS].to_dict("records")
    baseline = next((knobs for knobs, own in zip(runs, rows.is_baseline, strict=True) if own), {})
    texts = []
    for row, own in zip(rows.itertuples(), runs, strict=True):
        delta = f", {row.delta:+.4f} ± {row.half:.4f} to the baseline: {row.verdict}" if row.half >= 0 else ""
        seeds = f"mean of {row.n} seeds" if row.n > 1 else "one seed"
        says = f"{row.total_bytes:,} bytes" + (", over its cap" if row.over_cap else "")
        base = "" if row.is_baseline else "the baseline run"
        knobs = _of_knobs(changed(own | {"seed": None}, baseline | {"seed": None}), base, "")
        texts.append([printable(f"{row.sweep}/{row.arm}"), f"{row.bpb:.4f} bpb, {seeds}{delta}", says, knobs])
    place = np.arange(len(rows))
    x, y = (place, rows.bpb) if knob else (rows.bpb, place)
    return _points(x, y, texts, group.path[labels])


def _of_knobs(differences: str, base: str, place: str) -> str:
    if base == place or not base:
        return ""
    return f"against {printable(base)}:{differences and chr(10)}{differences or ' no knob differs'}"


def _points(x, y, texts: list[list[str]], paths: pd.Series) -> pd.DataFrame:
    texts = ["\n".join(filter(None, lines)) for lines in texts]
    return pd.DataFrame({"x": np.asarray(x), "y": np.asarray(y), "text": texts, "path": list(paths)})


@cache
def _of_track(track: str) -> tuple[str, dict]:
    """'the track nano', its knobs; '' and none for an unknown track."""
    if track not in TRACKS and track != "":
        return "", {}
    return f"the track {track}" if track else "the defaults", RunConfig(track=track).model_dump()
