"""Labels beside points that cover no other label and few points."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes

HALO = [patheffects.withStroke(linewidth=2.5, foreground="white")]  # for text that may lie on a line
DISTANCES = np.array([6.5, 12, 22, 36, 54, 76, 100])  # points (1/72 inch) between a point and its label
NEAR = 10  # points; labels farther away get a leader line
ANGLES = np.deg2rad(np.arange(0, 360, 15))


def short(name: str) -> str:
    """A name that fits beside its point; tables have it whole."""
    return name if len(name) <= 36 else f"{name[:20]}…{name[-15:]}"


def place_labels(ax: Axes, spots: np.ndarray, texts: Sequence[str], dots: np.ndarray, line: np.ndarray) -> None:
    """Write each text beside its spot at the place of lowest cost: no label, no frame, few dots, little of the line.

    Greedy, in the order given. spots, dots (all points drawn) and line (its corners) are (n, 2), in data units; axis
    limits must be set.
    """
    ax.figure.draw_without_rendering()  # settles the layout: from here on, data units map to fixed pixels
    ax.figure.set_layout_engine("none")
    to_pixels, renderer = ax.transData.transform, ax.figure.canvas.get_renderer()
    point = ax.figure.dpi / 72  # pixels
    dots, line = to_pixels(dots), to_pixels(line) if len(line) else line
    line = np.concatenate([line[:1], *(np.linspace(a, b, 40) for a, b in pairwise(line))])
    frame = ax.get_window_extent(renderer)
    distance = np.repeat(DISTANCES, len(ANGLES)) * point  # one per candidate place
    direction = np.tile(np.column_stack([np.cos(ANGLES), np.sin(ANGLES)]), (len(DISTANCES), 1))
    taken = np.array([text.get_window_extent(renderer).extents for text in ax.texts]).reshape(-1, 4)
    for spot, text in zip(spots, texts, strict=True):
        target = to_pixels(spot)
        probe = ax.text(0, 0, text, fontsize=8)
        extent = probe.get_window_extent(renderer)
        probe.remove()
        size = np.array([extent.width, extent.height])
        centre = target + direction * (distance[:, None] + size / 2)  # (places, 2)
        low, high = centre - size / 2, centre + size / 2
        gap = 1.5 * point
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
        arrow = dict(arrowstyle="-", color="0.55", lw=0.7, shrinkA=0, shrinkB=3)
        label = ax.annotate(
            text, spot, xytext=(centre[best] - target) / point, textcoords="offset points", fontsize=8, ha="center",
            va="center", path_effects=HALO, zorder=5, arrowprops=arrow if distance[best] > NEAR * point else None,
        )  # fmt: skip
        label.set_in_layout(False)


def _hits(low: np.ndarray, high: np.ndarray, lows: np.ndarray, highs: np.ndarray) -> np.ndarray:
    """For each of the boxes (n, 2), how many of the boxes (m, 2) overlap it; a dot is a box without size."""
    return ((low[:, None] < highs) & (high[:, None] > lows)).all(2).sum(1)
