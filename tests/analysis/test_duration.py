"""Estimates of training time: by the nearest complete run, by the time limit, or not at all."""

import pytest
from support.runs import make_run

from pgolf.analysis.duration import in_words, seconds_of
from pgolf.runs.table import load_runs
from pgolf.training.flops import flops_per_token
from pgolf_core.config import RunConfig


def config(**knobs):
    return RunConfig(track="nano", **knobs)


def done(root, name, seconds, **knobs):
    facts = dict(flops_per_token=flops_per_token(config(**knobs)), tokens=120 * 4096, train_seconds=seconds)
    make_run(root, f"s/{name}", knobs=knobs, **facts)


def test_a_run_like_a_complete_one_takes_its_time_and_twice_the_steps_twice(tmp_path):
    done(tmp_path, "a", 30.0)
    done(tmp_path, "wide", 500.0, model_dim=1024)
    runs = {"same": config(seed=2), "long": config(iterations=240), "limited": config(max_wallclock_seconds=7)}
    expected = {"same": 30.0, "long": 60.0, "limited": 7.0}
    assert seconds_of(runs, load_runs(tmp_path)) == pytest.approx(expected)


def test_without_a_run_on_as_many_threads_only_a_time_limit_is_known(tmp_path):
    done(tmp_path, "a", 30.0)
    runs = {"threads": config(cpu_threads=2), "limited": config(cpu_threads=2, max_wallclock_seconds=7)}
    assert seconds_of(runs, load_runs(tmp_path)) == {"threads": None, "limited": 7.0}
    assert seconds_of(runs, load_runs(tmp_path / "absent"))["threads"] is None


def test_a_time_is_said_in_one_unit():
    assert [in_words(s) for s in (41.2, 400, 11_500)] == ["about 41 s", "about 7 min", "about 3.2 h"]
