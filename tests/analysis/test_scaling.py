"""Laws and forecasts on synthetic families of known law."""

import math

import numpy as np
import pandas as pd
import pytest
from support.runs import make_run

from pgolf.analysis import scaling
from pgolf.reports import sentences
from pgolf.runs.result import RunError, read_result, write_result
from pgolf.runs.table import load_runs

E, A, B, ALPHA, BETA = 1.2, 30.0, 40.0, 0.35, 0.3
SIZES, LENGTHS = (1e5, 1.5e5, 3e5, 5e5), (6e4, 1.2e5, 1.8e5)


def true_law(n, d):
    return E + A * n**-ALPHA + B * d**-BETA


def make_family(noise=0.003, wobble=0.004, seeds=(1, 2)):
    """Runs whose curves fall with the steps, and once more with the falling rate of their second half."""
    random, rows, shares = np.random.default_rng(3), [], np.arange(0.05, 1.001, 0.05)
    for n in SIZES:
        for d in LENGTHS:
            for seed in seeds:
                end = true_law(n, d) * math.exp(random.normal(0, noise))
                fall = 1 + 0.06 * np.clip(1 - shares, 0, 0.5) * math.log(d / 1e4)
                curve = end * fall * shares**-0.1 * np.exp(random.normal(0, wobble, len(shares)))
                rows.append({
                    "run": f"{n:g}-{d:g}-{seed}", "config": f"{n:g}-{d:g}", "status": "complete", "parameters": n,
                    "tokens": d, "bpb": end, "total_bytes": 20_000 + 0.7 * n, "curve": pd.Series(curve, shares),
                })  # fmt: skip
    return pd.DataFrame(rows)


def test_a_law_without_noise_is_found_and_reaches_beyond():
    runs = make_family(noise=0)
    law = scaling.fit_law(runs.parameters, runs.tokens, runs.bpb, draws=2)
    found = law.ranges()
    assert found["E"][0] == pytest.approx(E, rel=0.03)
    assert (found["α"][0], found["β"][0]) == (pytest.approx(ALPHA, rel=0.05), pytest.approx(BETA, rel=0.05))
    assert law.at(1e6, 4e5) == pytest.approx(true_law(1e6, 4e5), rel=0.002)
    assert sentences.law_found(law).startswith(f"bpb = E + A · N^−α + B · D^−β: E {found['E'][0]:.3g} (")


def test_the_intervals_of_a_noisy_law_hold_the_true_numbers():
    runs = make_family()
    law = scaling.fit_law(runs.parameters, runs.tokens, runs.bpb, draws=40)
    for name, value in {"E": E, "α": ALPHA, "β": BETA}.items():
        _, low, high = law.ranges()[name]
        assert low * 0.9 <= value <= high * 1.1, name
    low, high = law.interval(7e5, 2.5e5)
    assert low < true_law(7e5, 2.5e5) < high and high / low < 1.1
    assert law.noise == pytest.approx(0.003, rel=0.5)


def test_one_wild_run_does_not_move_the_law():
    runs = make_family(noise=0)
    runs.loc[5, "bpb"] *= 1.2
    law = scaling.fit_law(runs.parameters, runs.tokens, runs.bpb, draws=2)
    assert law.at(3e5, 1.2e5) == pytest.approx(true_law(3e5, 1.2e5), rel=0.01)


@pytest.mark.parametrize(("low", "reach"), [(0.01, True), (1.0, False)])
def test_a_law_whose_limit_is_loose_says_so(low, reach):
    numbers = np.array([1.2, 1.0, 1.0, 0.3, 0.3])
    draws = np.array([numbers * [low / 1.2, 1, 1, 1, 1], numbers * [1.5, 1, 1, 1, 1]])
    law = scaling.Law(numbers, draws, 0.003, (1e5, 1e5))
    assert ("do not tell E" in sentences.law_found(law)) == reach


def test_too_few_runs_give_no_law():
    runs = make_family()
    for own in (runs[:5], runs[runs.parameters == 1e5], runs[runs.tokens == 6e4]):
        with pytest.raises(RunError, match="two sizes and two lengths"):
            scaling.fit_law(own.parameters, own.tokens, own.bpb)


def test_the_end_of_a_run_is_told_at_30_percent_within_1_percent():
    ahead = scaling.held_out(make_family())
    assert len(ahead) == 24
    assert (ahead.error.abs() < 0.01).mean() >= 0.9 and ahead.covered.mean() >= 0.85


def test_a_forecast_reads_nothing_of_the_run_after_its_share():
    runs = make_family()
    run = runs.iloc[0]
    cut = run.copy()
    cut["curve"], cut["bpb"], cut["status"] = run.curve[run.curve.index <= 0.3001], math.nan, "incomplete"
    others = runs[runs.config != run.config]
    assert scaling.forecast(others, cut, 0.3) == scaling.forecast(others, run, 0.3)
    open_runs = scaling.unfinished(pd.concat([others, cut.to_frame().T]))
    assert list(open_runs.run) == [run.run] and open_runs.share.item() == pytest.approx(0.3)
    assert open_runs.low.item() < run.bpb < open_runs.high.item()
    assert math.isnan(scaling.forecast(others, cut, 0.5)[0])


def test_a_family_of_one_size_is_forecast_too():
    runs = make_family(seeds=range(4))
    ahead = scaling.held_out(runs[runs.parameters == 1e5])
    assert len(ahead) == 12 and ahead.error.abs().median() < 0.01


def test_larger_and_longer_runs_are_held_against_the_law_of_the_rest():
    beyond = scaling.extrapolated(make_family())
    assert beyond.groupby("beyond").size().to_dict() == {"length": 8, "size": 6}
    assert beyond.error.abs().max() < 0.03 and (beyond.low < beyond.predicted).all()


def test_bytes_are_a_line_in_parameters():
    line = scaling.byte_line(make_family())
    assert line.total_bytes.to_numpy() == pytest.approx(20_000 + 0.7 * line.parameters.to_numpy())
    assert line.parameters.max() == 1e6


def test_curves_are_read_by_their_share_of_the_schedule(tmp_path):
    run_dir = make_run(tmp_path, "s/a-20", knobs={"iterations": 20}, parameters=1000)
    metrics = '{"step": 0, "val_bpb": 9.0}\n{"step": 10, "val_bpb": 4.0}\n{"step": 20, "val_bpb": 3.0}\n'
    result = read_result(run_dir)
    (run_dir / "metrics.jsonl").write_text(metrics)
    write_result(run_dir, result)
    (run,) = scaling.family(load_runs(tmp_path)).itertuples()
    assert (run.size, run.parameters, run.tokens) == ("a", 1000, 20 * 4096)
    assert run.curve.to_dict() == {0.5: 4.0, 1.0: 3.0}
    assert scaling.score_at(run.curve, 0.75) == pytest.approx(math.exp(math.log(4) * 0.75 + math.log(3) * 0.25))


def test_a_score_that_is_not_finite_is_no_point_of_a_law(tmp_path):
    for name, bpb in (("a-20", math.inf), ("b-20", 2.0)):
        make_run(tmp_path, f"s/{name}", bpb=bpb, knobs={"iterations": 20, "num_layers": 1 + (name == "a-20")})
    assert scaling.family(load_runs(tmp_path)).set_index("run").bpb.dropna().to_dict() == {"b-20": 2.0}
