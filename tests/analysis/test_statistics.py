"""Comparisons against simulation and against scipy, and samples that allow none."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from pgolf.analysis import statistics

DRAWS = 600


def config(values, seeds=(1, 2, 3, 4, 5)) -> pd.Series:
    return statistics.samples(list(seeds), values)


def pairs(rng) -> tuple[pd.Series, pd.Series]:
    """Five seeds of two configs that share each seed's luck; their difference has a deviation of 0.003."""
    baseline = 2.5 + 0.01 * rng.normal(size=5)
    return config(baseline + 0.003 * rng.normal(size=5)), config(baseline)


def other_seeds(rng) -> tuple[pd.Series, pd.Series]:
    return config(rng.normal(2.5, 0.01, 5)), config(rng.normal(2.5, 0.01, 5), range(11, 16))


def single_seeds(rng) -> tuple[pd.Series, pd.Series, statistics.SeedNoise]:
    """One seed each, with noise of 8 degrees of freedom from other configs of equal spread."""
    noise = statistics.seed_noise(config(rng.normal(2.4, 0.01, 5)) for _ in range(2))
    return config([rng.normal(2.5, 0.01)], [1]), config([rng.normal(2.5, 0.01)], [1]), noise


@pytest.mark.parametrize("draw", [pairs, other_seeds, single_seeds])
def test_verdicts_and_intervals_keep_their_level(draw):
    """Without an effect a config is better in half of ALPHA of the draws, and the interval covers 0 in 1 − ALPHA."""
    rng = np.random.default_rng(7)
    found = [statistics.compare(*draw(rng)) for _ in range(DRAWS)]
    better = sum(one.verdict == "better" for one in found)
    covered = sum(one.low <= 0 <= one.high for one in found)
    assert 0.01 * DRAWS < better <= statistics.ALPHA * DRAWS
    assert 0.93 * DRAWS < covered < 0.97 * DRAWS and all((one.p > 0.05) == (one.low <= 0 <= one.high) for one in found)


def test_holm_keeps_the_family_wise_level_of_ten_configs():
    """Without any effect one of ten configs is called better alone in about a fifth of sweeps, in 2.5 % by Holm."""
    rng = np.random.default_rng(5)
    alone = together = 0
    for _ in range(100):
        tests = [statistics.compare(*pairs(rng)) for _ in range(10)]
        alone += any(test.verdict == "better" for test in tests)
        together += any(test.verdict == "better" for test in statistics.holm(tests))
    assert together <= statistics.ALPHA * 100 < alone


def test_paired_and_welch_tests_equal_scipys():
    a, b = np.array([2.51, 2.49, 2.53, 2.50]), np.array([2.52, 2.51, 2.53, 2.52])
    paired = statistics.compare(config(a, range(4)), config(b, range(4)))
    assert paired.p == pytest.approx(stats.ttest_rel(a, b).pvalue) and paired.method == "paired, 4 seeds"
    assert (paired.low, paired.high) == pytest.approx(tuple(stats.ttest_rel(a, b).confidence_interval(0.95)))
    welch = statistics.compare(config(a, range(4)), config(b, range(4, 8)))
    scipys = stats.ttest_ind(a, b, equal_var=False)
    assert welch.p == pytest.approx(scipys.pvalue)
    assert (welch.low, welch.high) == pytest.approx(tuple(scipys.confidence_interval(0.95)))
    assert welch.method == "Welch, 4 and 4 seeds" and paired.delta == pytest.approx(welch.delta)
    assert paired.p < welch.p


def test_only_common_seeds_are_paired():
    found = statistics.compare(config([2.0, 2.1, 9.0], [1, 2, 3]), config([2.1, 2.3, 0.1], [1, 2, 4]))
    assert found.delta == pytest.approx(-0.15) and found.method == "paired, 2 seeds"


def test_repeats_of_a_seed_are_one_sample():
    """Runs that agree to the last bit would give any difference p = 0."""
    a, b = statistics.samples([1, 1, 1], [2.4, 2.4, 2.4]), statistics.samples([1, 1, 1], [2.5, 2.5, 2.5])
    assert len(a) == len(b) == 1
    found = statistics.compare(a, b)
    assert (found.verdict, found.method) == ("not known", "one seed each") and math.isnan(found.p)
    assert statistics.compare(a, a).verdict == "equal"
    assert statistics.seed_noise([a, b, statistics.samples([1, 2], [2.4, 2.4])]) is None
    # On two machines a run may differ in its last digits, which does not measure seed noise either.
    assert len(statistics.samples([1, 1], [2.5, 2.500002])) == 1
    # With several seeds a seed's repeats are one sample, whether they agree or not.
    assert statistics.samples([1, 1, 2], [2.4, 2.6, 2.7]).tolist() == [2.5, 2.7]


def test_time_limited_repeats_of_one_seed_are_tested_against_the_noise_alone():
    """The reference's mistake: three time-limited repeats, the best of one config against the worst of the other."""
    side = statistics.samples([1337] * 3, [2.05608381, 2.09377262, 2.07285932], time_limited=True)
    base = statistics.samples([1337] * 3, [2.06761597, 2.07369637, 2.08956232], time_limited=True)
    assert len(side) == len(base) == 3
    noise = statistics.seed_noise([side, base])
    assert noise.repeats and noise.dof == 4
    found = statistics.compare(side, base, noise)
    method = "track's noise of repeats of one seed, 4 degrees of freedom"
    assert (found.verdict, found.method) == ("not significant", method)
    # Three that the machine ran at one speed may agree among themselves: their own spread is no evidence.
    close = statistics.samples([1337] * 3, [2.0301, 2.0302, 2.0303], time_limited=True)
    assert statistics.compare(close, base).verdict == "not known"
    assert not statistics.seed_noise([side, statistics.samples([1, 2], [2.4, 2.5])]).repeats  # seeds come first
    record, p = statistics.is_record(pd.Series([1.0, 1.1], index=[1, 1]), pd.Series([2.0, 2.1], index=[1, 1]))
    assert not record and math.isnan(p)


def test_blocks_of_text_are_compared_in_pairs():
    rng = np.random.default_rng(1)
    base = rng.normal(600, 60, 64)
    assert statistics.compare_blocks(base, base, 64 * 400).verdict == "equal"
    worse = statistics.compare_blocks(base + rng.normal(1.0, 0.5, 64), base, 64 * 400)
    assert worse.verdict == "worse" and worse.low < 1 / math.log(2) / 400 < worse.high
    total = ((base + 1).sum() - base.sum()) / math.log(2) / (64 * 400)
    assert statistics.compare_blocks(base + 1 + np.tile([0.1, -0.1], 32), base, 64 * 400).delta == pytest.approx(total)


@pytest.mark.parametrize(("delta", "paired"), [(-0.002, True), (0.01, True), (0.004, False)])
def test_seeds_needed_reach_the_power(delta, paired):
    sd = 0.003
    n = statistics.seeds_needed(delta, sd, paired)
    rng = np.random.default_rng(2)

    def share(n: int) -> float:
        if paired:
            p = stats.ttest_1samp(rng.normal(delta, sd, (20_000, n)), 0, axis=1).pvalue
        else:
            p = stats.ttest_ind(rng.normal(delta, sd, (20_000, n)), rng.normal(0, sd, (20_000, n)), axis=1).pvalue
        return (p <= statistics.ALPHA).mean()

    assert share(n) >= statistics.POWER - 0.01
    assert n == 2 or share(n - 1) < statistics.POWER + 0.01
    assert statistics.seeds_needed(1e-9, 1.0) == math.inf and statistics.seeds_needed(0.0, 1.0) is None
    assert statistics.seeds_needed(-2, 1) == 5


def test_is_record_is_the_challenges_rule():
    """Three seeds 0.02 nats better with little spread are a record; 0.006 with the usual spread or one seed are not."""
    best = pd.Series([1.885, 1.886, 1.884], index=[1, 2, 3])
    assert statistics.is_record(best - [0.020, 0.0205, 0.0198], best)[0]
    assert statistics.is_record(pd.Series([1.86, 1.861, 1.859], index=[7, 8, 9]), best)[0]  # Welch
    weak, p = statistics.is_record(best - [0.004, 0.008, 0.006], best)
    assert not weak and p > statistics.RECORD_ALPHA
    single, p = statistics.is_record(best[:1] - 1, best[:1])
    assert not single and math.isnan(p)
    rng = np.random.default_rng(4)
    drawn = rng.normal(-statistics.RECORD_NATS, 0.001, (DRAWS, 3))
    assert sum(statistics.is_record(best + draw, best)[0] for draw in drawn) <= 0.02 * DRAWS


@pytest.mark.parametrize(
    ("ours", "baseline", "verdict"),
    [
        ([2.5, math.nan, 2.6], [2.4, 2.5, 2.7], "not significant"),  # it diverged
        ([2.4, 2.5, 2.7], [2.5, math.nan, 2.6], "not significant"),
        ([2.5, 2.25], [2.75, 2.5], "not known"),  # the same difference in each
    ],
)
def test_samples_that_allow_no_verdict(ours, baseline, verdict):
    seeds = range(len(ours))
    found = statistics.compare(config(ours, seeds), config(baseline, seeds))
    assert found.verdict == verdict and math.isnan(found.p) and found.needed is None
