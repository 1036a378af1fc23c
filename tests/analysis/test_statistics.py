"""Comparisons against simulation and against scipy, and samples that allow none."""

import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from pgolf.analysis import dunnett, statistics

DRAWS = 600


def config(values, seeds=(1, 2, 3, 4, 5)) -> pd.Series:
    return statistics.samples(list(seeds), values)


def alone(ours, baseline, noise=None) -> statistics.Comparison:
    return statistics.compare([ours], baseline, noise)[0]


def sweep(rng, seeds: int, effect: float = 0.0, shared: float = 0.0, configs: int = 7) -> list[pd.Series]:
    """A baseline and configs of equal spread 0.01, of which the second is worse by `effect` spreads.

    shared: correlation of the scores of one seed; 0: each config has seeds of its own.
    """
    luck = np.sqrt(shared) * rng.normal(size=seeds)
    scores = 2.5 + 0.01 * (luck + np.sqrt(1 - shared) * rng.normal(size=(1 + configs, seeds)))
    scores[1] += 0.01 * effect
    return [config(own, range(seeds) if shared else range(100 * i, 100 * i + seeds)) for i, own in enumerate(scores)]


@pytest.mark.slow
@pytest.mark.parametrize("shared", [0.0, 0.5])
@pytest.mark.parametrize("seeds", [3, 5])
def test_a_sweep_is_wrong_in_five_percent_and_finds_four_deviations(seeds, shared, monkeypatch):
    """Seven configs against a baseline. p, whose integral is slow, is checked against the interval in a few draws."""

    def by_critical(t, counts, *rest):
        return float(abs(t) <= dunnett.critical(statistics.ALPHA, tuple(counts), *rest))

    patched = SimpleNamespace(critical=dunnett.critical, p_value=by_critical)
    monkeypatch.setattr(statistics, "dunnett", patched)
    rng, draws, wrong, found = np.random.default_rng(seeds), 2000, 0, 0
    for draw in range(draws):
        baseline, *configs = sweep(rng, seeds, shared=shared)
        wrong += any(one.verdict in ("better", "worse") for one in statistics.compare(configs, baseline))
        if draw < 300:
            baseline, *configs = sweep(rng, seeds, 4, shared)
            found += statistics.compare(configs, baseline)[0].verdict == "worse"
    assert 0.02 * draws < wrong <= statistics.ALPHA * draws and found >= 0.9 * 300
    monkeypatch.undo()
    for one in statistics.compare(configs, baseline):
        assert (one.p > statistics.ALPHA) == (one.low <= 0 <= one.high) == (one.verdict == "not significant")


def test_dunnett_is_scipys_for_seeds_of_their_own():
    rng = np.random.default_rng(3)
    scores = [rng.normal(0.4 * i, 1, 3 + i) for i in range(4)]
    expected = stats.dunnett(*scores[1:], control=scores[0], random_state=1)
    found = statistics.compare([config(own, range(9 * i, 9 * i + len(own))) for i, own in enumerate(scores)][1:],
                               config(scores[0], range(900, 903)))  # fmt: skip
    interval = expected.confidence_interval(0.95)
    assert [one.p for one in found] == pytest.approx(expected.pvalue, abs=2e-3)
    assert [one.low for one in found] == pytest.approx(interval.low, abs=0.05)
    assert [one.high for one in found] == pytest.approx(interval.high, abs=0.05)
    assert found[0].method == "4 to 6 seeds against 3, 3 configs at once"


@pytest.mark.parametrize(("configs", "dof", "expected"), [(2, 5, 3.03), (5, 10, 2.99), (7, 14, 2.97), (3, 1, 20.0)])
def test_critical_values_are_those_of_a_simulation(configs, dof, expected):
    limit = dunnett.critical(0.05, (4,) * configs, 4, float(dof))
    assert limit == pytest.approx(expected, abs=0.01)
    rng = np.random.default_rng(0)
    normal = np.sqrt(0.5) * (rng.normal(size=(configs, 200_000)) + rng.normal(size=200_000))
    largest = np.abs(normal).max(0) / np.sqrt(rng.chisquare(dof, 200_000) / dof)
    assert (largest > limit).mean() == pytest.approx(0.05, abs=0.0015)
    assert dunnett.p_value(limit, (4,) * configs, 4, dof) == pytest.approx(0.05, abs=1e-6)


def test_two_configs_with_common_seeds_are_a_paired_test_and_others_welchs():
    a, b = np.array([2.51, 2.49, 2.53, 2.50]), np.array([2.52, 2.51, 2.53, 2.52])
    paired = alone(config(a, range(4)), config(b, range(4)))
    assert paired.p == pytest.approx(stats.ttest_rel(a, b).pvalue) and paired.method == "paired, 4 seeds"
    assert (paired.low, paired.high) == pytest.approx(tuple(stats.ttest_rel(a, b).confidence_interval(0.95)))
    welch = alone(config(a, range(4)), config(b, range(4, 8)))
    scipys = stats.ttest_ind(a, b, equal_var=False)
    assert welch.p == pytest.approx(scipys.pvalue) and welch.method == "Welch, 4 and 4 seeds"
    assert (welch.low, welch.high) == pytest.approx(tuple(scipys.confidence_interval(0.95)))


def test_configs_that_spread_differently_are_compared_by_their_own():
    rng = np.random.default_rng(0)
    baseline, *others = sweep(rng, 4, shared=0.5)
    wild = config(2.5 + rng.normal(0, 1, 4), range(4))
    found = statistics.compare([wild, *others], baseline)
    assert all("paired, 4 seeds; spreads differ (p " in one.method for one in found)
    difference = (others[0] - baseline).to_numpy()
    half = stats.t.ppf(1 - 0.025 / 8, 3) * difference.std(ddof=1) / 2
    assert found[1].half == pytest.approx(half) and found[1].p == min(1, 8 * stats.ttest_1samp(difference, 0).pvalue)
    assert "spreads" not in statistics.compare(others, baseline)[0].method


def test_seeds_that_not_all_have_are_left_out():
    found = alone(config([2.0, 2.1, 9.0], [1, 2, 3]), config([2.1, 2.3, 0.1], [1, 2, 4]))
    assert found.delta == pytest.approx(-0.15) and found.method == "paired, 2 seeds"


def test_repeats_of_a_seed_are_one_sample():
    """Runs that agree to the last bit would give any difference p = 0."""
    a, b = statistics.samples([1, 1, 1], [2.4, 2.4, 2.4]), statistics.samples([1, 1, 1], [2.5, 2.5, 2.5])
    assert len(a) == len(b) == 1
    found = alone(a, b)
    assert (found.verdict, found.method) == ("not known", "one seed each") and math.isnan(found.p)
    assert alone(a, a).verdict == "equal"
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
    found = alone(side, base, noise)
    method = "track's noise of repeats of one seed, 4 degrees of freedom"
    assert (found.verdict, found.method) == ("not significant", method)
    # Three that the machine ran at one speed may agree among themselves: their own spread is no evidence.
    close = statistics.samples([1337] * 3, [2.0301, 2.0302, 2.0303], time_limited=True)
    assert alone(close, base).verdict == "not known"
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


@pytest.mark.parametrize(("configs", "seeds"), [(1, 3), (7, 3), (7, 10)])
def test_detectable_differences_are_found_nine_times_in_ten(configs, seeds):
    size = statistics.detectable(seeds, 0.003, configs)
    rng, draws = np.random.default_rng(2), 20_000
    scores = rng.normal(0, 0.003, (draws, configs + 1, seeds))
    scores[:, 1] += size
    pooled = np.sqrt(scores.var(-1, ddof=1).mean(-1))
    t = (scores[:, 1].mean(-1) - scores[:, 0].mean(-1)) / pooled / np.sqrt(2 / seeds)
    limit = dunnett.critical(0.05, (seeds,) * configs, seeds, (configs + 1) * (seeds - 1))
    assert (t > limit).mean() == pytest.approx(statistics.POWER, abs=0.01)
    assert statistics.seeds_needed(size * 1.0001, 0.003, configs) == seeds
    assert statistics.seeds_needed(1e-6, 1.0) == math.inf == statistics.detectable(1, 1.0)


def test_one_lucky_seed_does_not_lead():
    """Ten configs of one seed and ten of five are equally good: by raw means one of one seed leads in 9 of 10 draws."""
    rng, noise = np.random.default_rng(1), statistics.SeedNoise(0.01, 40, 10)
    means = 2.5 + 0.01 * rng.normal(size=(DRAWS, 20)) / np.sqrt([1] * 10 + [5] * 10)
    assert (means.argmin(1) < 10).mean() > 0.85
    bounds = [[statistics.upper_bound(m, 1 + 4 * (i >= 10), noise, 20) for i, m in enumerate(row)] for row in means]
    assert (np.argmin(bounds, 1) < 10).mean() <= 0.5
    assert statistics.upper_bound(2.5 - 0.08, 1, noise, 20) < statistics.upper_bound(2.5, 5, noise, 20)
    assert statistics.upper_bound(2.5, 1, None, 20) == 2.5


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
    ("ours", "baseline", "method"),
    [
        ([2.5, math.nan, 2.6], [2.4, 2.5, 2.7], "a seed diverged"),
        ([2.4, 2.5, 2.7], [2.5, math.nan, 2.6], "a seed of the baseline diverged"),
        ([2.5, 2.25], [2.75, 2.5], "paired, 2 seeds: the same difference in each"),
    ],
)
def test_samples_that_allow_no_verdict(ours, baseline, method):
    seeds = range(len(ours))
    found = alone(config(ours, seeds), config(baseline, seeds))
    assert (found.verdict, found.method) == ("not known", method)
    assert math.isnan(found.p) and found.detectable is None


def test_a_diverged_config_is_left_out_of_the_others_comparison():
    baseline, other, nan = (
        config(own, range(3)) for own in ([2.4, 2.5, 2.7], [2.41, 2.49, 2.72], [2.5, math.nan, 2.6])
    )
    diverged, compared, equal = statistics.compare([nan, other, baseline], baseline)
    assert diverged.verdict == "not known" and equal.verdict == "equal"
    assert compared == alone(other, baseline) and compared.method == "paired, 3 seeds"
