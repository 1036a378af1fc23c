"""The page of searches: written where there is one, with every figure drawn, and without torch."""

import json
from contextlib import nullcontext

import pandas as pd
import pytest
from matplotlib import pyplot as plt
from search.conftest import SPACE, Surrogate, surrogate_bpb
from support.runs import make_run

from pgolf.reports import pages, search_figures, sentences
from pgolf.runs import directory
from pgolf.search import study, trials
from pgolf.search.answer import answer
from pgolf.search.driver import run_search
from pgolf.search.study import Outcome
from pgolf.sweeps.kernel_process import SharedKernel


class Stored(Surrogate):
    """Complete trials are runs of the store; every fourth configuration is over the cap, every fifth pruned."""

    def begin(self, run, config):
        number = int(run.removeprefix("trial")) if run != "stack" else 0
        if number % 4 == 3:
            return Outcome("refused", bytes=1_100_000, over=0.1, why="forecast 1,100,000 bytes")
        if number % 5 == 4:
            return Outcome("pruned", 3.0, why="3.0000 bpb at step 40, behind other trials there")
        knobs = {name: getattr(config, name) for name in SPACE} | {"bigram_vocab_size": config.bigram_vocab_size}
        make_run(directory.RUNS, f"s/{run}", 900_000, surrogate_bpb(config), knobs)
        return Outcome("complete", surrogate_bpb(config), 900_000, -0.1, 60.0)


def test_the_page_of_a_search_has_its_figures_trials_and_knobs(search, tmp_path, monkeypatch):
    run_search(
        search(space=SPACE | {"bigram_vocab_size": [0, 4096]}, trials=40, enqueue={"stack": {}}), Stored(), print
    )
    with SharedKernel() as kernel:
        monkeypatch.setattr(pages, "SharedKernel", lambda: nullcontext(kernel))
        _, page = pages.write_reports(tmp_path / "runs", tmp_path / "out", ["search"])
    text = page.read_text(encoding="utf-8")
    for words in ("40 trials: ", "not trained", "best by its one seed", "stack", "Which knobs decide"):
        assert words in text, words
    names = ("", "_front", "_importances", "_slices")
    for figure in (tmp_path / "out" / "figures" / f"search_1_s{name}.png" for name in names):
        assert plt.imread(figure)[..., :3].std() > 0.05
    assert len(pd.read_csv(tmp_path / "out" / "tables" / "search.csv")) == 40


def test_the_page_shows_searches_that_have_just_begun_or_are_damaged(search, tmp_path):
    study.Study(search(name="begun", enqueue={"stack": {}})).take().lock.release()
    for name in ("empty", "none"):
        study.Study(search(name=name))
    (tmp_path / "runs" / "empty" / "search.journal").write_bytes(b"")
    _, page = pages.write_reports(tmp_path / "runs", tmp_path / "out", ["search"])
    text = page.read_text(encoding="utf-8")
    for words in ("1 trials: 1 running", "no search has begun in it", "0 trials"):
        assert words in text, words


def test_trials_that_no_knob_tells_apart_have_no_importances(search):
    run_search(same := search(space={"num_layers": [2]}, trials=trials.FEWEST), Surrogate(), lambda line: None)
    assert not len(trials.importances(same.directory))


def test_a_knob_that_decides_is_above_chance_and_one_without_effect_is_not(search, monkeypatch):
    monkeypatch.setattr(study, "STARTUP", 60)  # all at random
    monkeypatch.setattr(trials, "RESAMPLES", 40)
    space = {"matrix_lr": SPACE["matrix_lr"], "bigram_vocab_size": [0, 4096]}
    run_search(alone := search(space=space, trials=60), Surrogate(), lambda line: None)
    found = trials.importances(alone.directory).set_index("knob")
    assert (found.low <= found.high).all() and found.importance.sum() == pytest.approx(1)
    assert found.importance["matrix_lr"] > found.chance["matrix_lr"]
    assert found.importance["bigram_vocab_size"] < 0.1


def test_the_smallest_finalist_within_max_bpb_answers_a_search_for_bytes(search):
    least = search(objective="bytes", max_bpb=4, trials=12, enqueue={"stack": {}}, finalists=1, seeds=[1, 2])
    told = run_search(least, Surrogate(), lambda line: None)
    assert "one seed" in answer(least, told)
    best = next(run for run, *_ in told.answers() if run != "stack")
    for run, bpb, size in (("stack", 4.2, 80_000), (best, 2.4, 90_000)):
        for seed in (1, 2):
            knobs = {"seed": seed, "beta2": bpb / 5}
            make_run(directory.RUNS, f"s-finalists/{run}-s{seed}", size, bpb + seed / 1000, knobs)
    arms = {f"{run}-s{seed}": run for run in ("stack", best) for seed in (1, 2)}
    (directory.RUNS / "s-finalists" / "sweep.json").write_text(json.dumps({"control": "stack", "arms": arms}))
    assert f"best of s: {best}, " in (said := answer(least, told)) and "over 2 new seeds in 90,000" in said
    assert "matrix_lr=" in said


def test_trials_that_were_not_trained_are_grouped_by_reason_and_stand_on_the_axis():
    whys = ["forecast 312,111 bytes (300,000 to 320,000) against cap_bytes=300,000", "forecast 400,000 bytes", "", ""]
    states = ["refused", "refused", "complete", "complete"]
    table = pd.DataFrame({"number": range(4), "run": list("abcd"), "state": states, "why": whys, "is_baseline": False})
    table = table.assign(bpb=[None, None, 2.5, 2.4], bytes=[1, 2, 3, 4], over=[0.1, 0.3, -0.1, -0.1])
    assert "not trained: a, b, forecast over the cap" in sentences.describe_search(table)
    ax = search_figures.plot_history(table).axes[0]
    crosses = ax.collections[list(search_figures.LOOKS).index("not trained")].get_offsets()
    assert list(crosses[:, 1]) == [ax.get_ylim()[0]] * 2
