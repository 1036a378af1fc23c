"""Is it better, or was it luck? Tests of a difference in bits per byte, and how many seeds a claim needs.

A sample is what one seed gave, the mean of its repeats where there are some. With common seeds the test is paired,
else Welch's; an arm of one sample is held against the track's floor, the pooled spread of all arms that have several.
Only under a clock are repeats of a single seed samples too, of the clock's luck alone: how fast the machine was moves
all runs of an hour together, so they are never tested by their own spread but against the floor.
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

LEVEL = 0.05  # of the words better and worse, both sides together; intervals cover 1 − LEVEL
POWER = 0.9  # with which seeds_needed finds what it was asked for
RECORD_NATS, RECORD_LEVEL = 0.005, 0.01  # the challenge's rule for a new record: nats a token, one-sided p
MOST_SEEDS = 1000
ROUNDING = 1e-12  # differences of doubles that are equal but for it


@dataclass(frozen=True)
class Floor:
    """What chance alone does on a track: standard deviation of one run's bpb, pooled over arms of several samples."""

    sd: float
    df: int  # degrees of freedom: samples less arms
    arms: int
    repeats: bool = False  # of one seed under a clock: what another seed would do is not in it


@dataclass(frozen=True)
class Comparison:
    """delta: mean of an arm less its control's, in bpb or nats; low, high: 95 % of it, nan where not known.

    verdict: better or worse where p ≤ LEVEL (smaller is better); equal: no sample differs; not told apart; not known:
    one sample and no floor. method: the test, with its samples.
    """

    delta: float
    low: float
    high: float
    p: float
    method: str
    verdict: str

    @property
    def half(self) -> float:
        """Half the width of the interval, which is symmetric: delta ± half."""
        return (self.high - self.low) / 2


def samples(seeds: Iterable[int | None], scores: Iterable[float], clocked: bool = False) -> pd.Series:
    """Scores by seed, a sample each as said above; a single seed repeated under a clock stands there several times.

    A seed that is not known is its own: it pairs with none.
    """
    scores = pd.Series(list(scores), dtype=float)
    scores.index = pd.Index([f"? {i}" if pd.isna(seed) else int(seed) for i, seed in enumerate(seeds)], dtype=object)
    if clocked and scores.index.nunique() == 1 and scores.nunique() > 1:
        return scores
    return scores.groupby(level=0).mean()


def compare(arm: pd.Series, control: pd.Series, floor: Floor | None = None) -> Comparison:
    """An arm's samples against its control's, both as `samples` gives them."""
    delta = arm.mean() - control.mean()
    seeds = arm.index.is_unique and control.index.is_unique
    if seeds:
        common = arm.index.intersection(control.index)
        if len(common) and (arm[common] == control[common]).all() and len(arm) == len(control) == len(common):
            return Comparison(0.0, 0.0, 0.0, math.nan, _pairs(len(common)), "equal")
        if len(common) > 1:
            # Seeds of one side alone are left out: they would move delta by what the other side never saw.
            return _paired(arm[common].to_numpy(), control[common].to_numpy())
    if seeds and len(arm) > 1 and len(control) > 1:
        test = stats.ttest_ind(arm, control, equal_var=False)
        low, high = test.confidence_interval(1 - LEVEL)
        return _judged(delta, low, high, test.pvalue, f"Welch, {len(arm)} and {len(control)} seeds")
    if floor is None:
        why = "one seed each" if len(arm) == len(control) == 1 else "one seed on one side"
        return Comparison(delta, math.nan, math.nan, math.nan, why, "not known")
    error = floor.sd * math.sqrt(1 / len(arm) + 1 / len(control))
    reach = stats.t.ppf(1 - LEVEL / 2, floor.df) * error
    p = 2 * stats.t.sf(abs(delta) / error, floor.df) if error else math.nan
    of = "repeats of one seed" if floor.repeats else "seeds"
    return _judged(delta, delta - reach, delta + reach, p, f"track's floor of {of}, {floor.df} degrees of freedom")


def compare_text(score: "Score", control: "Score") -> Comparison:
    """Two scores of one text, as of two files of the same weights: paired by its blocks.

    The chance here is which text was scored; what another seed would do is not in it.
    """
    return compare_blocks(score.block_nats, control.block_nats, score.bytes)


def compare_blocks(nats: Sequence[float], control: Sequence[float], text_bytes: int) -> Comparison:
    """As compare_text: nats of each block (blocks,), and the bytes of all the text; delta in bpb."""
    if not 1 < len(nats) == len(control):
        unknown = math.nan
        return Comparison(unknown, unknown, unknown, unknown, "no blocks of text to compare", "not known")
    difference = (np.asarray(nats) - np.asarray(control)) / math.log(2) / (text_bytes / len(nats))
    if not difference.any():
        return Comparison(0.0, 0.0, 0.0, math.nan, f"paired, {len(difference)} blocks of text", "equal")
    return replace(_paired(difference, np.zeros(len(difference))), method=f"paired, {len(difference)} blocks of text")


def _paired(arm: np.ndarray, control: np.ndarray) -> Comparison:
    difference = arm - control
    if np.ptp(difference) < ROUNDING:  # these cannot be draws of anything
        return Comparison(
            difference[0], math.nan, math.nan, math.nan, "the same difference for every seed", "not known"
        )
    test = stats.ttest_1samp(difference, 0.0)
    low, high = test.confidence_interval(1 - LEVEL)
    return _judged(difference.mean(), low, high, test.pvalue, _pairs(len(difference)))


def _pairs(count: int) -> str:
    return f"paired, {count} seed{'s' if count > 1 else ''}"


def _judged(delta: float, low: float, high: float, p: float, method: str) -> Comparison:
    return Comparison(float(delta), float(low), float(high), float(p), method, _verdict(delta, p))


def _verdict(delta: float, p: float) -> str:
    if math.isnan(p) or p > LEVEL:
        return "not told apart"
    return "better" if delta < 0 else "worse"


def holm(comparisons: list[Comparison]) -> list[Comparison]:
    """The same with p adjusted for how many are made at once (Holm 1979), so that the best of many is no luck.

    Intervals stay those of each comparison alone.
    """
    tested = [i for i, c in enumerate(comparisons) if not math.isnan(c.p)]
    tested.sort(key=lambda i: comparisons[i].p)
    adjusted, worst = list(comparisons), 0.0
    for rank, i in enumerate(tested):
        worst = max(worst, min(1.0, (len(tested) - rank) * comparisons[i].p))
        adjusted[i] = replace(comparisons[i], p=worst, verdict=_verdict(comparisons[i].delta, worst))
    return adjusted


def floor_of(arms: Iterable[pd.Series]) -> Floor | None:
    """Pooled over the seeds of arms; over repeats of single seeds where no arm has several. None where none has two.

    None also where chance does nothing at all.
    """
    arms = list(arms)
    if of_seeds := [arm for arm in arms if arm.index.is_unique and len(arm) > 1]:
        arms = of_seeds
    several = [arm for arm in arms if len(arm) > 1]
    df = sum(len(arm) - 1 for arm in several)
    squares = sum(((arm - arm.mean()) ** 2).sum() for arm in several)
    return Floor(math.sqrt(squares / df), df, len(several), not of_seeds) if df and squares > ROUNDING**2 else None


def seeds_needed(delta: float, sd: float, paired: bool = True) -> float | None:
    """Seeds an arm so that a true difference of delta is found with POWER at LEVEL; inf if over MOST_SEEDS.

    None where there is no delta or no sd. sd: of the differences of pairs, or of single runs where they are not paired.
    From the noncentral t distribution.
    """
    if not sd or not delta:
        return None

    def power(n: int) -> float:
        df = n - 1 if paired else 2 * (n - 1)
        centre = abs(delta) / sd * math.sqrt(n if paired else n / 2)
        return stats.nct.sf(stats.t.ppf(1 - LEVEL / 2, df), df, centre)

    n = bisect.bisect_left(range(2, MOST_SEEDS + 1), POWER, key=power) + 2
    return n if n <= MOST_SEEDS else math.inf


def is_record(nats: pd.Series, best: pd.Series) -> tuple[bool, float]:
    """Whether an arm beats another by the challenge's rule, and the p of its one-sided test.

    nats: loss a token by seed. The null: it is better by less than RECORD_NATS. Of one seed, however often it was
    repeated, p is nan.
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
    return bool(test.pvalue < RECORD_LEVEL), float(test.pvalue)
