"""Foreign strings as text, and labels beside points that cover no other label and little of the lines drawn."""

import re
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes

HALO = [patheffects.withStroke(linewidth=2.5, foreground="white")]  # for text that may lie on a line
ARROW = dict(arrowstyle="-", color="0.55", lw=0.7, shrinkA=0, shrinkB=3)
DISTANCES = np.array([6.5, 12, 22, 36, 54, 76, 100])  # points (1/72 inch) between a point and its label
NEAR = 10  # points; labels farther away get a leader line
ANGLES = np.deg2rad(np.arange(0, 360, 15))


CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
MARKUP = re.compile(r"[\\`*{}\[\]<>&#!|~$\"'^]|(?<!\w)_|_(?!\w)|:(?=//)")


def printable(text: object) -> str:
    """A foreign string on one line, its control characters, direction marks and lone surrogates as \\x1b, \\u202e."""
    return CONTROLS.sub(lambda found: ascii(found[0])[1:-1], " ".join(str(text).split()))


def md(text: object) -> str:
    """A foreign string for Markdown: shown whole and as it is, never as markup, in Markdown or HTML."""
    return MARKUP.sub(lambda found: f"&#{ord(found[0])};", printable(text))


def short(name: str) -> str:
    """A name that fits beside its point; tables have it whole. A legend would leave out a name that begins with _."""
    name = " " * name.startswith("_") + printable(name)
    return name if len(name) <= 36 else f"{name[:20]}…{name[-15:]}"


def place_labels(ax: Axes, spots: np.ndarray, texts: Sequence[str]) -> None:
    """Write each text beside its spot at the place of lowest cost, by what is drawn; greedy, in the order given.

    spots: (n, 2) in data units. Axis limits must be set.
    """
    ax.figure.draw_without_rendering()  # settles the layout: from here on, data units map to fixed pixels
    ax.figure.set_layout_engine("none")
    renderer, point = ax.figure.canvas.get_renderer(), ax.figure.dpi / 72  # pixels
    dots, line = _drawn(ax)
    frame, gap = ax.get_window_extent(renderer), 1.5 * point
    distance = np.repeat(DISTANCES, len(ANGLES)) * point  # one per candidate place
    direction = np.tile(np.column_stack([np.cos(ANGLES), np.sin(ANGLES)]), (len(DISTANCES), 1))
    taken = np.array([text.get_window_extent(renderer).extents for text in ax.texts]).reshape(-1, 4)
    for spot, text in zip(spots, texts, strict=True):
        target = ax.transData.transform(spot)
        probe = ax.text(0, 0, text, fontsize=8)
        size = probe.get_window_extent(renderer).size
        probe.remove()
        centre = target + direction * (distance[:, None] + size / 2)  # (places, 2)
        low, high = centre - size / 2, centre + size / 2
        cost = distance / point + 6 * (np.abs(direction[:, 1]) > 0.99)
        cost += 1e4 * ~((low >= frame.min) & (high <= frame.max)).all(1)
        cost += 1e3 * _hits(low - gap, high + gap, taken[:, :2], taken[:, 2:])
        cost += 60 * _hits(low - gap, high + gap, dots, dots) + 2 * _hits(low, high, line, line)
        others = dots[np.abs(dots - target).max(1) > 1]
        if len(others):  # a label without a leader line stands nearer to its own point than to any other
            free = np.maximum(low[:, None] - others, others - high[:, None]).clip(0)  # (places, dots, 2)
            cost += 20 * ((distance <= NEAR * point) & (np.hypot(*np.moveaxis(free, 2, 0)).min(1) < distance))
        leader = target + direction[:, None] * (distance[:, None, None] * np.linspace(0.2, 1, 6)[:, None])
        for step in leader.swapaxes(0, 1):  # leader lines cross no label, and few points
            cost += 300 * _hits(step, step, taken[:, :2], taken[:, 2:])
            cost += 10 * _hits(step - 2 * gap, step + 2 * gap, others, others)
        best = cost.argmin()
        taken = np.vstack([taken, [*low[best], *high[best]]])
        label = ax.annotate(
            text, spot, xytext=(centre[best] - target) / point, textcoords="offset points", fontsize=8, ha="center",
            va="center", path_effects=HALO, zorder=5, arrowprops=ARROW if distance[best] > NEAR * point else None,
        )  # fmt: skip
        label.set_in_layout(False)


def _drawn(ax: Axes) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (n, 2) of every point, and of places along every line."""
    dots, lines = [ax.transData.transform(points.get_offsets()) for points in ax.collections], [np.empty((0, 2))]
    for line in ax.lines:
        corners = line.get_transform().transform_path(line.get_path()).vertices
        if line.get_linestyle() == "None":
            dots.append(corners)
        else:
            lines += [np.linspace(a, b, 40) for a, b in pairwise(corners)]
    return np.concatenate(dots), np.concatenate(lines)


def _hits(low: np.ndarray, high: np.ndarray, lows: np.ndarray, highs: np.ndarray) -> np.ndarray:
    """For each of the boxes (n, 2), how many of the boxes (m, 2) overlap it; a dot is a box without size."""
    return ((low[:, None] < highs) & (high[:, None] > lows)).all(2).sum(1)
