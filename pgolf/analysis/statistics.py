"""Is it better, or was it luck? Tests of a difference in bits per byte, and how many seeds a claim needs.

One sample is the score of one seed, averaged over its repeats. Common seeds give a paired t test, other seeds Welch's;
a single sample is tested against the track's seed noise, the standard deviation pooled over all configs with several.
Repeats of one seed are samples only if the run is time-limited, where they measure the machine's speed. That speed is
shared by all runs of one hour, so such repeats are tested against the seed noise and never by their own spread.
"""

import bisect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import stats

if TYPE_CHECKING:
    from pgolf_core.evaluate import Score

ALPHA = 0.05  # two-sided level of "better" and "worse"; intervals cover 1 − ALPHA
POWER = 0.9  # probability that seeds_needed finds the difference asked for
RECORD_NATS, RECORD_ALPHA = 0.005, 0.01  # the challenge's rule for a record: nats per token, one-sided p
MAX_SEEDS = 1000
ROUNDING = 1e-12  # double rounding error of a difference


@dataclass(frozen=True)
class SeedNoise:
    """Standard deviation of single-run bpb on a track, pooled over the configs that have several samples."""

    std: float
    dof: int  # degrees of freedom: samples − configs
    configs: int
    repeats: bool = False  # time-limited repeats of single seeds: the variation between seeds is not included


@dataclass(frozen=True)
class Comparison:
    """A difference to the baseline. delta: mean of the samples − mean of the baseline's, in bpb or nats.

    low, high: 95 % interval of delta, nan if unknown. method: the test and its samples. verdict: "better" or "worse"
    if p ≤ ALPHA (smaller is better), else "not significant"; "equal" if no sample differs; "not known" if there is
    one sample and no seed noise.
    """

    delta: float
    low: float
    high: float
    p: float
    method: str
    verdict: str

    @property
    def half(self) -> float:
        """Half the width of the interval: delta ± half."""
        return (self.high - self.low) / 2


def samples(seeds: Iterable[int | None], scores: Iterable[float], time_limited: bool = False) -> pd.Series:
    """Scores indexed by seed, repeats averaged; time-limited repeats of a single seed stay several samples.

    An unknown seed gets an index of its own, so it pairs with no other.
    """
    scores = pd.Series(list(scores), dtype=float)
    scores.index = pd.Index([f"? {i}" if pd.isna(seed) else int(seed) for i, seed in enumerate(seeds)], dtype=object)
    if time_limited and scores.index.nunique() == 1 and scores.nunique() > 1:
        return scores
    return scores.groupby(level=0).mean()


def compare(ours: pd.Series, baseline: pd.Series, noise: SeedNoise | None = None) -> Comparison:
    """Compare two configs by their `samples`."""
    delta = ours.mean() - baseline.mean()
    seeds = ours.index.is_unique and baseline.index.is_unique
    if seeds:
        common = ours.index.intersection(baseline.index)
        if len(common) and (ours[common] == baseline[common]).all() and len(ours) == len(baseline) == len(common):
            return Comparison(0.0, 0.0, 0.0, math.nan, _pairs(len(common)), "equal")
        if len(common) > 1:
            # A seed that only one side has would move delta by a draw that the other side never saw.
            return _paired((ours[common] - baseline[common]).to_numpy(), _pairs(len(common)))
    if seeds and len(ours) > 1 and len(baseline) > 1:
        test = stats.ttest_ind(ours, baseline, equal_var=False)
        low, high = test.confidence_interval(1 - ALPHA)
        return _judged(delta, low, high, test.pvalue, f"Welch, {len(ours)} and {len(baseline)} seeds")
    if noise is None:
        why = "one seed each" if len(ours) == len(baseline) == 1 else "one seed on one side"
        return _unknown(delta, why)
    error = noise.std * math.sqrt(1 / len(ours) + 1 / len(baseline))
    half = stats.t.ppf(1 - ALPHA / 2, noise.dof) * error
    p = 2 * stats.t.sf(abs(delta) / error, noise.dof) if error else math.nan
    source = "noise of repeats of one seed" if noise.repeats else "seed noise"
    return _judged(delta, delta - half, delta + half, p, f"track's {source}, {noise.dof} degrees of freedom")


def compare_text(score: "Score", baseline: "Score") -> Comparison:
    """Compare two scores of one text, as of two files of the same weights, paired by its blocks.

    The interval covers other text, not other seeds.
    """
    return compare_blocks(score.block_nats, baseline.block_nats, score.bytes)


def compare_blocks(nats: Sequence[float], baseline: Sequence[float], text_bytes: int) -> Comparison:
    """compare_text from the nats of each block (blocks,) and the bytes of the whole text; delta in bpb."""
    if not 1 < len(nats) == len(baseline):
        return _unknown(math.nan, "no blocks of text to compare")
    difference = (np.asarray(nats) - np.asarray(baseline)) / math.log(2) / (text_bytes / len(nats))
    method = f"paired, {len(difference)} blocks of text"
    return _paired(difference, method) if difference.any() else Comparison(0.0, 0.0, 0.0, math.nan, method, "equal")


def _paired(difference: np.ndarray, method: str) -> Comparison:
    if np.ptp(difference) < ROUNDING:  # without any spread the t test would give p = 0
        return _unknown(difference[0], f"{method}: the same difference in each")
    test = stats.ttest_1samp(difference, 0.0)
    low, high = test.confidence_interval(1 - ALPHA)
    return _judged(difference.mean(), low, high, test.pvalue, method)


def _pairs(count: int) -> str:
    return f"paired, {count} seed{'s' if count > 1 else ''}"


def _unknown(delta: float, why: str) -> Comparison:
    return Comparison(delta, math.nan, math.nan, math.nan, why, "not known")


def _judged(delta: float, low: float, high: float, p: float, method: str) -> Comparison:
    return Comparison(float(delta), float(low), float(high), float(p), method, _verdict(delta, p))


def _verdict(delta: float, p: float) -> str:
    if math.isnan(p) or p > ALPHA:
        return "not significant"
    return "better" if delta < 0 else "worse"


def holm(comparisons: list[Comparison]) -> list[Comparison]:
    """The comparisons with p and verdict adjusted for making all of them at once (Holm 1979).

    Intervals stay those of the single comparisons.
    """
    tested = [i for i, c in enumerate(comparisons) if not math.isnan(c.p)]
    tested.sort(key=lambda i: comparisons[i].p)
    adjusted, largest = list(comparisons), 0.0
    for rank, i in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * comparisons[i].p))
        adjusted[i] = replace(comparisons[i], p=largest, verdict=_verdict(comparisons[i].delta, largest))
    return adjusted


def seed_noise(configs: Iterable[pd.Series]) -> SeedNoise | None:
    """Pool the `samples` of configs with several seeds, else of those with time-limited repeats of one seed.

    None if no config has several samples, or if none of them varies.
    """
    several = [one for one in configs if len(one) > 1]
    with_seeds = [one for one in several if one.index.is_unique]
    pooled = with_seeds or several
    dof = sum(len(one) - 1 for one in pooled)
    squares = sum(((one - one.mean()) ** 2).sum() for one in pooled)
    if not dof or squares <= ROUNDING**2:
        return None
    return SeedNoise(math.sqrt(squares / dof), dof, len(pooled), not with_seeds)


def seeds_needed(delta: float, std: float, paired: bool = True) -> float | None:
    """Seeds per config that find a true difference of delta with POWER at ALPHA; inf above MAX_SEEDS.

    std: of the paired differences, or of single runs if they are not paired. None if delta or std is 0. Power from
    the noncentral t distribution.
    """
    if not std or not delta:
        return None

    def power(n: int) -> float:
        dof = n - 1 if paired else 2 * (n - 1)
        noncentrality = abs(delta) / std * math.sqrt(n if paired else n / 2)
        return stats.nct.sf(stats.t.ppf(1 - ALPHA / 2, dof), dof, noncentrality)

    n = bisect.bisect_left(range(2, MAX_SEEDS + 1), POWER, key=power) + 2
    return n if n <= MAX_SEEDS else math.inf


def is_record(nats: pd.Series, best: pd.Series) -> tuple[bool, float]:
    """True if a config beats another by the challenge's rule, and the p of its one-sided test.

    nats: loss per token by seed. Null hypothesis: it is better by less than RECORD_NATS. p is nan if a config has one
    seed only, however often that was repeated.
    """
    if not (nats.index.is_unique and best.index.is_unique):
        return False, math.nan
    common = nats.index.intersection(best.index)
    if len(common) > 1:
        difference = nats[common] - best[common]
        if np.ptp(difference) < ROUNDING:
            return False, math.nan
        test = stats.ttest_1samp(difference, -RECORD_NATS, alternative="less")
    elif len(nats) > 1 and len(best) > 1:
        test = stats.ttest_ind(nats + RECORD_NATS, best, equal_var=False, alternative="less")
    else:
        return False, math.nan
    return bool(test.pvalue < RECORD_ALPHA), float(test.pvalue)
