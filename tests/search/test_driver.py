"""The driver tries each trial once whatever is killed, prunes by steps, keeps to its budget, finds the optimum."""

import multiprocessing
import os
import random
import signal
import statistics
import time
from collections import Counter

import numpy as np
import optuna
import pytest
from search.conftest import LEAST, SPACE, Surrogate, surrogate_bpb

from pgolf.search import study as study_module
from pgolf.search.driver import run_search
from pgolf.search.search_file import SearchError
from pgolf.search.study import JOURNAL, Outcome, Study, outcome_of

fork = pytest.mark.skipif(os.name == "nt", reason="children share what is imported by fork")


def _quiet(line):
    pass


def _child(search, log, seconds=0.03):
    """A process that runs the search on a surrogate and may be killed."""
    process = multiprocessing.get_context("fork").Process(
        target=run_search, args=(search, Surrogate(log, seconds), _quiet), daemon=True
    )
    process.start()
    return process


def _told(study):
    return [(trial.number, trial.params, outcome_of(trial)) for trial in study.trials()]


@fork
def test_a_search_killed_ten_times_tries_what_an_undisturbed_one_tries(search, tmp_path):
    whole = run_search(search(name="whole", trials=30, enqueue={"first": {}}), Surrogate(), _quiet)
    killed = search(name="killed", trials=30, enqueue={"first": {}})
    dice, log = random.Random(0), tmp_path / "log"
    for _ in range(10):
        process = _child(killed, log)
        time.sleep(dice.uniform(0.05, 0.25))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    study = run_search(killed, Surrogate(log), _quiet)
    assert _told(study) == _told(whole)
    trained = Counter(log.read_text().split())
    assert set(trained) == {trial.user_attrs["run"] for trial in study.trials()} and len(study.trials()) == 30
    assert sum(trained.values()) <= 30 + 10  # a kill between the end of a training and its telling


@fork
def test_the_trial_of_a_killed_worker_goes_to_the_other(search, tmp_path):
    shared, log = search(trials=16), tmp_path / "log"
    Study(shared)
    slow, other = _child(shared, log, seconds=60), _child(shared, log, seconds=0.02)
    while not any(trial.state.name == "RUNNING" for trial in Study(shared).trials()):
        time.sleep(0.01)
    time.sleep(0.3)
    os.kill(slow.pid, signal.SIGKILL)
    slow.join()
    other.join(timeout=60)
    assert other.exitcode == 0
    trials = Study(shared).trials()
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 16
    assert Counter(log.read_text().split()) == Counter(trial.user_attrs["run"] for trial in trials)


def test_a_torn_last_line_of_the_journal_is_dropped(search):
    small = search(trials=3)
    run_search(small, Surrogate(), _quiet)
    with open(small.directory / JOURNAL, "ab") as journal:
        journal.write(b'{"op_code": 4, "wor')
    more = small.keys.model_copy(update={"trials": 5})
    object.__setattr__(small, "keys", more)
    assert len(run_search(small, Surrogate(), _quiet).trials()) == 5
    assert len(Study(small).trials()) == 5


@pytest.mark.slow
def test_the_regret_after_60_trials_is_half_of_random_searchs_at_most(search, monkeypatch):
    monkeypatch.setattr(study_module, "_storage", lambda folder: optuna.storages.InMemoryStorage())
    regrets = {"tpe": [], "random": []}
    tpe = study_module._sampler
    for kind, sampler in (("tpe", tpe), ("random", _random)):
        monkeypatch.setattr(study_module, "_sampler", sampler)
        for seed in range(20):
            found = run_search(search(name=f"{kind}{seed}", trials=60, sampler_seed=seed), Surrogate(), _quiet)
            regrets[kind].append(found.answers()[0][2].bpb - LEAST)
    assert statistics.median(regrets["tpe"]) <= statistics.median(regrets["random"]) / 2


def _random(search, number, knob=""):
    seed = np.random.SeedSequence([1, search.keys.sampler_seed, number, *knob.encode()]).generate_state(1)[0]
    return optuna.samplers.RandomSampler(seed=int(seed))


def test_the_budget_counts_trainings_hours_and_money(search):
    for keys in ({"trainings": 5}, {"hours": 4.5}, {"money": 9.5, "price_per_hour": 2}):
        small = search(name=next(iter(keys)), trials=None, **keys)  # an hour each
        assert len(run_search(small, Surrogate(), _quiet).trials()) == 5


def test_equal_knobs_are_trained_once(search, tmp_path):
    few = search(space={"num_layers": [1, 2]}, trials=8)
    study = run_search(few, Surrogate(tmp_path / "log"), _quiet)
    assert len((tmp_path / "log").read_text().split()) == 2
    assert sum(bool(outcome_of(trial).same_as) for trial in study.trials()) == 6 and len(study.answers()) == 2


class Curves(Surrogate):
    """Three validations per trial, the last of which is the score's."""

    def curve(self, run):
        return [(step, surrogate_bpb(self.begun[run][0]) + 100 / step) for step in (40, 80, 120)]


@pytest.mark.parametrize("pruner", ["median", "asha"])
def test_trials_behind_others_at_the_same_step_are_pruned_and_the_enqueued_never(search, pruner):
    worst = {"matrix_lr": 1.0, "scalar_lr": 1.0, "beta2": 0.0}
    curves = Curves(seconds=0.02)
    enqueue = {"good": {"matrix_lr": 0.03, "scalar_lr": 0.2, "beta2": 0.6}, "bad": worst}
    study = run_search(search(pruner=pruner, trials=30, enqueue=enqueue), curves, _quiet)
    ended = {trial.user_attrs["run"]: trial.state.name for trial in study.trials()}
    assert ended["bad"] == ended["good"] == "COMPLETE"
    assert 3 <= len(curves.pruned) < 28 and {ended[run] for run in curves.pruned} == {"PRUNED"}
    bpb = {"COMPLETE": [], "PRUNED": []}
    for trial in study.trials():
        bpb[trial.state.name].append(surrogate_bpb(study.search.config(trial.params)))
    assert statistics.median(bpb["PRUNED"]) > statistics.median(bpb["COMPLETE"])


def test_failures_of_the_machine_end_the_search_and_those_of_knobs_do_not(search):
    class Failing(Surrogate):
        over = -1.0

        def ended(self, run):
            return super().ended(run) and Outcome("failed", over=self.over, why="the disk is full")

    few = search(trials=8)
    with pytest.raises(SearchError, match="3 trainings failed in a row, the last: the disk is full"):
        run_search(few, Failing(seconds=0.001), _quiet)
    diverging = Failing(seconds=0.001)
    diverging.over = 1.0
    study = run_search(few, diverging, _quiet)
    assert [trial.state.name for trial in study.trials()] == ["FAIL"] * 3 + ["PRUNED"] * 5


def test_configurations_that_no_rule_allows_are_told_and_not_begun(search):
    surrogate = Surrogate()
    study = run_search(search(space={"num_heads": [4, 5]}, trials=6), surrogate, _quiet)
    ended = {trial.params["num_heads"]: outcome_of(trial) for trial in study.trials()}
    assert ended[4].state == "complete" and ended[5].state == "refused" and "num_heads" in ended[5].why


def test_the_objective_both_answers_with_the_front(search):
    class Sized(Surrogate):
        def ended(self, run):
            self.size = 10_000 * self.begun[run][0].num_layers
            return super().ended(run)

        def curve(self, run):
            return [(20, 3.0)]

    both = search(space=SPACE | {"num_layers": [1, 2, 3]}, objective="both", trials=20)
    front = run_search(both, Sized(seconds=0.001), _quiet).answers()
    sizes = [outcome.bytes for *_, outcome in front]
    assert front and sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)


def test_a_journal_of_another_space_is_refused(search):
    run_search(search(trials=2), Surrogate(), _quiet)
    with pytest.raises(SearchError, match="begun with another space; give the search another name"):
        Study(search(space={"num_layers": [1, 2]}))


def test_a_search_does_not_go_on_with_other_knobs_than_it_began_with(search, monkeypatch):
    begun = {"trials": 2, "enqueue": {"a": {"matrix_lr": 0.1}}}
    run_search(search(**begun), Surrogate(), _quiet)
    with pytest.raises(SearchError, match="a was begun with other knobs; rename it"):
        Study(search(**begun | {"enqueue": {"a": {"matrix_lr": 0.2}}}))
    monkeypatch.setenv("PGOLF_NUM_LAYERS", "3")
    with pytest.raises(SearchError, match="begun with another environment"):
        Study(search(**begun))


def test_a_damaged_journal_is_named(search):
    journal = run_search(search(trials=2), Surrogate(), _quiet).folder / "search.journal"
    journal.write_bytes(b"no json\n" + journal.read_bytes())
    with pytest.raises(SearchError, match=r"search\.journal: damaged"):
        Study(search(trials=2))
