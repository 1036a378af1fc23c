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

import numpy as np
import pandas as pd
from scipy import special  # scipy.stats takes seconds to import

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

    method: the test and its samples. verdict: "better" or "worse" if p ≤ ALPHA (smaller is better), else "not
    significant"; "equal" if no sample differs; "not known" if there is one sample and no seed noise. low, high: 95 %
    interval of delta, nan if unknown. std, paired: as seeds_needed takes them.
    """

    delta: float
    method: str
    verdict: str = "not known"
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan
    std: float | None = None
    paired: bool = False

    @property
    def half(self) -> float:
        """Half the width of the interval: delta ± half."""
        return (self.high - self.low) / 2

    @property
    def needed(self) -> float | None:
        """Seeds per config that would make the difference significant; None if unknown, inf above MAX_SEEDS."""
        return seeds_needed(self.delta, self.std, self.paired)


def samples(seeds: Iterable[int], scores: Iterable[float], time_limited: bool = False) -> pd.Series:
    """Scores indexed by seed, repeats averaged; time-limited repeats of a single seed stay several samples."""
    scores = pd.Series(list(scores), [int(seed) for seed in seeds], dtype=float)
    if time_limited and scores.index.nunique() == 1 and scores.nunique() > 1:
        return scores
    return scores.sort_index() if scores.index.is_unique else scores.groupby(level=0).mean()


def compare(ours: pd.Series, baseline: pd.Series, noise: SeedNoise | None = None) -> Comparison:
    """Compare two configs by their `samples`."""
    if ours.index.is_unique and ours.equals(baseline):
        return Comparison(0.0, _pairs(len(ours)), "equal", 0.0, 0.0)
    if by_seeds := _by_seeds(ours, baseline):
        return _t_test(*by_seeds)
    delta = ours.mean() - baseline.mean()
    if noise is None:
        return Comparison(delta, "one seed each" if len(ours) == len(baseline) == 1 else "one seed on one side")
    error = noise.std * math.sqrt(1 / len(ours) + 1 / len(baseline))
    source = "noise of repeats of one seed" if noise.repeats else "seed noise"
    return _t_test(delta, error, noise.dof, f"track's {source}, {noise.dof} degrees of freedom", noise.std)


def compare_blocks(nats: Sequence[float], baseline: Sequence[float], text_bytes: int) -> Comparison:
    """Compare two scores of one text, as of two files of the same weights, paired by its blocks; delta in bpb.

    nats, baseline: of each block (blocks,). text_bytes: of the whole text. The interval covers other text, not other
    seeds.
    """
    if not 1 < len(nats) == len(baseline):
        return Comparison(math.nan, "no blocks of text to compare")
    difference = (np.asarray(nats) - np.asarray(baseline)) / math.log(2) / (text_bytes / len(nats))
    method = f"paired, {len(difference)} blocks of text"
    if not difference.any():
        return Comparison(0.0, method, "equal", 0.0, 0.0)
    return _t_test(*_mean(difference), method)


def _by_seeds(ours: pd.Series, baseline: pd.Series) -> tuple[float, float, float, str, float, bool] | None:
    """The arguments of _t_test; None without several seeds each."""
    if not (ours.index.is_unique and baseline.index.is_unique):
        return None
    common = ours.index.intersection(baseline.index)
    if len(common) > 1:
        # A seed that only one side has would move the difference by a draw that the other side never saw.
        difference = (ours[common] - baseline[common]).to_numpy()
        return *_mean(difference), _pairs(len(common)), difference.std(ddof=1), True
    if min(len(ours), len(baseline)) < 2:
        return None
    counts = np.array([len(ours), len(baseline)])
    variances = np.array([ours.var(), baseline.var()]) / counts
    dof = variances.sum() ** 2 / ((variances**2 / (counts - 1)).sum() or 1.0)
    method = f"Welch, {len(ours)} and {len(baseline)} seeds"
    std = math.sqrt((ours.var() + baseline.var()) / 2)
    return ours.mean() - baseline.mean(), math.sqrt(variances.sum()), dof, method, std, False


def _mean(difference: np.ndarray) -> tuple[float, float, int]:
    """The mean, its standard error (0 if all are equal but for rounding) and degrees of freedom."""
    error = 0.0 if np.ptp(difference) < ROUNDING else difference.std(ddof=1) / math.sqrt(len(difference))
    return difference.mean(), error, len(difference) - 1


def _t_test(
    delta: float, error: float, dof: float, method: str, std: float | None = None, paired: bool = False
) -> Comparison:
    """Two-sided t test of a difference by its standard error."""
    if not error:  # p would be 0
        return Comparison(delta, f"{method}: the same difference in each")
    half = float(special.stdtrit(dof, 1 - ALPHA / 2) * error)
    delta, p = float(delta), float(2 * special.stdtr(dof, -abs(delta) / error))
    return Comparison(delta, method, _verdict(delta, p), delta - half, delta + half, p, std, paired)


def _verdict(delta: float, p: float) -> str:
    if not p <= ALPHA:  # nor if p is nan, of a run that diverged
        return "not significant"
    return "better" if delta < 0 else "worse"


def _pairs(count: int) -> str:
    return f"paired, {count} seed{'s' if count > 1 else ''}"


def holm(comparisons: list[Comparison]) -> list[Comparison]:
    """The comparisons with p and verdict adjusted for making all of them at once (Holm 1979).

    Intervals stay those of the single comparisons.
    """
    tested = sorted((i for i, c in enumerate(comparisons) if not math.isnan(c.p)), key=lambda i: comparisons[i].p)
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


def seeds_needed(delta: float, std: float | None, paired: bool = True) -> float | None:
    """Seeds per config that find a true difference of delta with POWER at ALPHA; inf above MAX_SEEDS.

    std: of the paired differences, or of single runs if they are not paired. None if delta or std is 0 or
    unknown. Power from the noncentral t distribution.
    """
    if not (std or 0) * abs(delta) > 0:  # nor if one is nan
        return None

    def power(n: int) -> float:
        dof = n - 1 if paired else 2 * (n - 1)
        noncentrality = abs(delta) / std * math.sqrt(n if paired else n / 2)
        missed = special.nctdtr(dof, noncentrality, special.stdtrit(dof, 1 - ALPHA / 2))
        return 1 - np.nan_to_num(missed)  # nan if it underflows

    n = bisect.bisect_left(range(2, MAX_SEEDS + 1), POWER, key=power) + 2
    return n if n <= MAX_SEEDS else math.inf


def is_record(nats: pd.Series, best: pd.Series) -> tuple[bool, float]:
    """True if a config beats another by the challenge's rule, and the p of its one-sided test.

    nats: loss per token by seed. Null hypothesis: it is better by less than RECORD_NATS. p is nan if a config has one
    seed only, however often that was repeated.
    """
    by_seeds = _by_seeds(nats, best)
    if not by_seeds or not by_seeds[1]:
        return False, math.nan
    delta, error, dof, *_ = by_seeds
    p = float(special.stdtr(dof, (delta + RECORD_NATS) / error))
    return p < RECORD_ALPHA, p
