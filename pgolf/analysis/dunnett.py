"""Dunnett's distribution (1955): the largest |t| of several configs that are all compared with one baseline.

scipy.stats.dunnett draws it at random and has no blocks; here it is integrated, so equal runs give equal p. Under no
effect t of config i is (√(1 − λᵢ²) eᵢ + λᵢ e₀) / s with standard normal e, λᵢ² = nᵢ / (nᵢ + n₀), and dof · s² χ²
distributed.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from scipy import special

BISECTIONS = 40
NORMALS, SCALES = 61, 40  # nodes of the integrals over e₀ and over log s


def p_value(t: float, counts: Sequence[int], baseline: int, dof: float) -> float:
    """P(max |t| ≥ t) under no effect. counts: samples of each config. dof: of the pooled standard deviation."""
    if len(counts) == 1:
        return float(2 * special.stdtr(dof, -abs(t)))
    weight, limits = _scales(dof)
    share = np.asarray(counts) / (np.asarray(counts) + baseline)  # λ²
    normal = np.linspace(-8.5, 8.5, NORMALS)[:, None, None]
    upper = (abs(t) * limits[:, None] - np.sqrt(share) * normal) / np.sqrt(1 - share)
    lower = (-abs(t) * limits[:, None] - np.sqrt(share) * normal) / np.sqrt(1 - share)
    inside = (special.ndtr(upper) - special.ndtr(lower)).prod(-1) @ weight  # (NORMALS,)
    density = np.exp(-(normal.ravel() ** 2) / 2)
    return float(np.clip(1 - inside @ density / density.sum(), 0, 1))


@lru_cache(maxsize=256)
def critical(level: float, counts: tuple[int, ...], baseline: int, dof: float) -> float:
    """The t that the largest |t| exceeds with probability `level`; it lies between those of one test and Bonferroni."""
    low, high = (float(special.stdtrit(dof, 1 - level / 2 / tests)) for tests in (1, len(counts)))
    for _ in range(BISECTIONS if len(counts) > 1 else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(middle, counts, baseline, dof) > level else (low, middle)
    return high


def _scales(dof: float) -> tuple[np.ndarray, np.ndarray]:
    """Weights and nodes of s (SCALES,), spaced evenly in log s, where the density falls to 0 on both sides."""
    ends = np.sqrt(special.chdtri(dof, [1 - 1e-11, 1e-11]) / dof)
    s = np.geomspace(*ends, SCALES)
    logs = dof * np.log(s) - dof * s**2 / 2  # log of s · density(s), but for a constant
    weight = np.exp(logs - logs.max())
    return weight / weight.sum(), s
