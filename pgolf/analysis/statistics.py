"""Is it better, or was it luck? Tests of differences in bits per byte, and the differences that a design can find.

One sample is the score of one seed, averaged over its repeats. The configs of a sweep are compared with its baseline at
once, by Dunnett's test with the error pooled over them: verdict and interval both hold for all configs together. Seeds
that all of them share are blocks, since a seed's luck is common to them. Single samples are tested against the
track's seed noise, the standard deviation pooled over all configs with several. Repeats of one seed are samples only if
the run is time-limited, where they measure the machine's speed. That speed is shared by all runs of one hour, so such
repeats are tested against the seed noise and never by their own spread.
"""

import bisect
import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import special  # scipy.stats takes seconds to import

from pgolf.analysis import dunnett

ALPHA = 0.05  # family-wise two-sided level of "better" and "worse"; intervals cover 1 − ALPHA
POWER = 0.9  # probability that a difference of `detectable` is found
RECORD_NATS, RECORD_ALPHA = 0.005, 0.01  # the challenge's rule for a record: nats per token, one-sided p
MAX_SEEDS = 1000
ROUNDING = 1e-12  # double rounding error of a difference
SPREAD_ALPHA = 0.05  # Bartlett's test: below it configs spread too differently to pool their error


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
    significant"; "equal" if no sample differs; "not known" if nothing tells the error. low, high: interval of delta,
    nan if unknown. p and interval are adjusted for all comparisons made together. detectable: the smallest true
    difference that such a comparison finds with probability POWER, None if unknown.
    """

    delta: float
    method: str
    verdict: str = "not known"
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan
    detectable: float | None = None

    @property
    def half(self) -> float:
        """Half the width of the interval: delta ± half."""
        return (self.high - self.low) / 2


def samples(seeds: Iterable[int], scores: Iterable[float], time_limited: bool = False) -> pd.Series:
    """Scores indexed by seed, repeats averaged; time-limited repeats of a single seed stay several samples."""
    scores = pd.Series(list(scores), [int(seed) for seed in seeds], dtype=float)
    if time_limited and scores.index.nunique() == 1 and scores.nunique() > 1:
        return scores
    return scores.sort_index() if scores.index.is_unique else scores.groupby(level=0).mean()


def compare(configs: Sequence[pd.Series], baseline: pd.Series, noise: SeedNoise | None = None) -> list[Comparison]:
    """Compare configs with one baseline, all at once, by their `samples`."""
    tested = [one for one in configs if not one.equals(baseline) and not math.isnan(one.mean(skipna=False))]
    answers = iter(_compare_at_once(tested, baseline, noise) if tested else ())
    equal = Comparison(0.0, _pairs(len(baseline)), "equal", 0.0, 0.0)
    diverged = Comparison(math.nan, "a seed diverged")
    return [
        equal if one.equals(baseline) else diverged if math.isnan(one.mean(skipna=False)) else next(answers)
        for one in configs
    ]


def _compare_at_once(configs: list[pd.Series], baseline: pd.Series, noise: SeedNoise | None) -> list[Comparison]:
    everyone = [baseline, *configs]
    if math.isnan(baseline.mean(skipna=False)):
        return [Comparison(math.nan, "a seed of the baseline diverged") for _ in configs]
    unique = all(one.index.is_unique for one in everyone)  # not repeats of one seed
    common = functools.reduce(pd.Index.intersection, (one.index for one in everyone))
    together = f", {len(configs)} configs at once" if len(configs) > 1 else ""
    if unique and len(common) > 1:
        # A seed that only some have would move their mean by a draw that the others never saw.
        scores = [one[common].to_numpy() for one in everyone]
        luck = np.mean(scores, axis=0)
        apart, dof = [own - luck for own in scores], len(configs) * (len(common) - 1)
        method = _pairs(len(common)) + together
    elif unique and min(map(len, everyone)) > 1:
        if len(configs) == 1:  # nothing to pool with
            return [_alone(configs[0], baseline)]
        scores = apart = [one.to_numpy() for one in everyone]
        dof, counts = sum(len(own) - 1 for own in scores), [len(own) for own in configs]
        seeds = f"{min(counts)} to {max(counts)}" if len(set(counts)) > 1 else f"{counts[0]}"
        method = f"{seeds} seeds against {len(baseline)}{together}"
    else:
        return _against_noise(everyone, noise, together)
    if (p := _spread_p(apart)) < SPREAD_ALPHA:
        why = f"; spreads differ (p {p:.2g}), so each by its own"
        return [_alone(one, baseline, len(configs), why) for one in configs]
    squares = sum(((own - own.mean()) ** 2).sum() for own in apart)
    std = 0.0 if squares < ROUNDING**2 else math.sqrt(squares / dof)
    return _dunnett([own.mean() for own in scores], [len(own) for own in scores], std, dof, method)


def _against_noise(everyone: list[pd.Series], noise: SeedNoise | None, together: str) -> list[Comparison]:
    """Dunnett's test with the noise of other configs, for those that do not tell their own."""
    means = [one.mean() for one in everyone]
    if noise is None:
        singles = ["one seed each" if len(one) == len(everyone[0]) == 1 else "one seed on one side" for one in everyone]
        return [Comparison(mean - means[0], why) for mean, why in zip(means[1:], singles[1:], strict=True)]
    counts = [len(one) if noise.repeats else one.index.nunique() for one in everyone]
    source = "noise of repeats of one seed" if noise.repeats else "seed noise"
    method = f"track's {source}, {noise.dof} degrees of freedom{together}"
    return _dunnett(means, counts, noise.std, noise.dof, method)


def _dunnett(means: list[float], counts: list[int], std: float, dof: float, method: str) -> list[Comparison]:
    """Comparisons of all but the first with the first, by a standard deviation of samples with dof."""
    deltas = [float(mean - means[0]) for mean in means[1:]]
    if not std:  # p would be 0
        return [Comparison(delta, f"{method}: the same difference in each") for delta in deltas]
    limit, found = dunnett.critical(ALPHA, tuple(counts[1:]), counts[0], dof), []
    for delta, count in zip(deltas, counts[1:], strict=True):
        error = std * math.sqrt(1 / count + 1 / counts[0])
        p = dunnett.p_value(delta / error, counts[1:], counts[0], dof)
        found.append(_judged(delta, error, dof, method, limit, p))
    return found


def _spread_p(groups: list[np.ndarray]) -> float:
    """p of Bartlett's test (1937) that all spread alike; 1 for two groups, whose blocks leave them one spread."""
    freedom = np.array([len(own) - 1 for own in groups])
    variances = np.array([own.var(ddof=1) for own in groups]) + ROUNDING**2
    if len(groups) < 3:
        return 1.0
    pooled = freedom @ variances / freedom.sum()
    correction = 1 + ((1 / freedom).sum() - 1 / freedom.sum()) / 3 / (len(groups) - 1)
    statistic = (freedom.sum() * math.log(pooled) - freedom @ np.log(variances)) / correction
    return float(special.chdtrc(len(groups) - 1, statistic))


def compare_blocks(nats: Sequence[float], baseline: Sequence[float], text_bytes: int, family: int = 1) -> Comparison:
    """Compare two scores of one text, as of two files of the same weights, paired by its blocks; delta in bpb.

    nats, baseline: of each block (blocks,). text_bytes: of the whole text. family: comparisons made together; the level
    is divided by it, since files of one checkpoint spread too differently to pool. The interval covers other text, not
    other seeds.
    """
    if not 1 < len(nats) == len(baseline):
        return Comparison(math.nan, "no blocks of text to compare")
    difference = (np.asarray(nats) - np.asarray(baseline)) / math.log(2) / (text_bytes / len(nats))
    method = f"paired, {len(difference)} blocks of text"
    if not difference.any():
        return Comparison(0.0, method, "equal", 0.0, 0.0)
    return _t_test(*_mean(difference), method, family)


def _alone(ours: pd.Series, baseline: pd.Series, family: int = 1, why: str = "") -> Comparison:
    delta, error, dof, method = _by_seeds(ours, baseline)
    return _t_test(delta, error, dof, f"{method}{why}", family)


def _by_seeds(ours: pd.Series, baseline: pd.Series) -> tuple[float, float, float, str] | None:
    """Mean difference, its standard error, degrees of freedom and the test's name; None without several seeds each."""
    if not (ours.index.is_unique and baseline.index.is_unique):
        return None
    common = ours.index.intersection(baseline.index)
    if len(common) > 1:
        return *_mean((ours[common] - baseline[common]).to_numpy()), _pairs(len(common))
    if min(len(ours), len(baseline)) < 2:
        return None
    counts = np.array([len(ours), len(baseline)])
    variances = np.array([ours.var(), baseline.var()]) / counts
    dof = variances.sum() ** 2 / ((variances**2 / (counts - 1)).sum() or 1.0)
    method = f"Welch, {len(ours)} and {len(baseline)} seeds"
    return ours.mean() - baseline.mean(), math.sqrt(variances.sum()), dof, method


def _mean(difference: np.ndarray) -> tuple[float, float, int]:
    """The mean, its standard error (0 if all are equal but for rounding) and degrees of freedom."""
    error = 0.0 if np.ptp(difference) < ROUNDING else difference.std(ddof=1) / math.sqrt(len(difference))
    return difference.mean(), error, len(difference) - 1


def _t_test(delta: float, error: float, dof: float, method: str, family: int = 1) -> Comparison:
    """Two-sided t test of a difference by its standard error, at ALPHA / family (Bonferroni)."""
    if not error:  # p would be 0
        return Comparison(float(delta), f"{method}: the same difference in each")
    limit = float(t_limit(dof, family))
    p = min(1.0, float(2 * special.stdtr(dof, -abs(delta) / error)) * family)
    return _judged(float(delta), float(error), dof, method, limit, p)


def t_limit(dof: float, family: int = 1) -> float:
    """The |t| that is significant at ALPHA / family, two-sided; nan without degrees of freedom. dof: also an array."""
    return special.stdtrit(dof, 1 - ALPHA / 2 / family)


def _judged(delta: float, error: float, dof: float, method: str, limit: float, p: float) -> Comparison:
    """The comparison whose interval is delta ± limit · error."""
    verdict = "not significant"
    if p <= ALPHA:
        verdict = "better" if delta < 0 else "worse"
    half, found = limit * error, float(special.nctdtrinc(dof, 1 - POWER, limit)) * error
    return Comparison(delta, method, verdict, delta - half, delta + half, p, found)


def _pairs(count: int) -> str:
    return f"paired, {count} seed{'s' if count > 1 else ''}"


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


def detectable(seeds: int, std: float, configs: int = 1) -> float:
    """Smallest true difference that is found with POWER when this many configs and a baseline have `seeds` each.

    std: of single runs between seeds. inf for one seed.
    """
    if seeds < 2:
        return math.inf
    dof = (configs + 1) * (seeds - 1)
    limit = dunnett.critical(ALPHA, (seeds,) * configs, seeds, dof)
    return float(special.nctdtrinc(dof, 1 - POWER, limit)) * std * math.sqrt(2 / seeds)


def seeds_needed(difference: float, std: float, configs: int = 1) -> float:
    """Seeds per config and of the baseline that find a true difference, see detectable; inf above MAX_SEEDS."""
    n = bisect.bisect_left(range(2, MAX_SEEDS + 1), True, key=lambda n: detectable(n, std, configs) <= difference) + 2
    return n if n <= MAX_SEEDS else math.inf


def upper_bound(mean: float, seeds: int, noise: SeedNoise | None, candidates: int) -> float:
    """mean + z · std / √seeds, with z of Bonferroni's normal interval over the candidates; the mean without a noise.

    Ranked by it, of equally good configs one with few seeds does not lead because one of them was lucky. It is a rank,
    not an interval: that the noise itself is uncertain is the same for all candidates and left out.
    """
    return mean if noise is None else mean + special.ndtri(1 - ALPHA / 2 / candidates) * noise.std / math.sqrt(seeds)


def is_record(nats: pd.Series, best: pd.Series) -> tuple[bool, float]:
    """True if a config beats another by the challenge's rule, and the p of its one-sided test.

    nats: loss per token by seed. Null hypothesis: it is better by less than RECORD_NATS. p is nan if a config has one
    seed only, however often that was repeated.
    """
    by_seeds = _by_seeds(nats, best)
    if not by_seeds or not by_seeds[1]:
        return False, math.nan
    delta, error, dof, _ = by_seeds
    p = float(special.stdtr(dof, (delta + RECORD_NATS) / error))
    return p < RECORD_ALPHA, p
