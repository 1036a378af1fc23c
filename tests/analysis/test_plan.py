"""`pgolf plan` over synthetic runs."""

import re

import pytest
from support.runs import make_config, make_run

from pgolf.analysis import duration
from pgolf.analysis.plan import plan
from pgolf.cli import main
from pgolf.runs import directory
from pgolf.runs.result import RunError
from pgolf.runs.table import load_runs
from pgolf.sweeps.sweep_file import NOTEBOOKS
from pgolf_core.config import RunConfig


def test_a_plan_gives_the_seeds_that_find_a_difference(tmp_path):
    make_run(tmp_path, "s/alone", bpb=2.4, knobs={"num_layers": 5})
    with pytest.raises(RunError, match=r"several seeds.*`pgolf demo`, or .*seeds: \[1337, 1338, 1339\]"):
        list(plan(tmp_path, 0.002, 7))
    make_config(tmp_path, "control", [2.50, 2.52, 2.51, 2.49, 2.505])
    title, noise, needed, found = plan(tmp_path, 0.02, 7, "nano")
    assert title.startswith("nano; ") and noise == "  seed noise 0.0112 bpb, 4 degrees of freedom from 1 configs"
    assert needed.startswith("  0.02 bpb, 7 against a baseline, found with 90%: 10 seeds each, 80 runs, ")
    assert found.startswith("  found with 90%: 0.0394 with 3, 0.0290 with 5")
    with pytest.raises(RunError, match="no config of track quick was"):
        list(plan(tmp_path, 0.002, 7, "quick"))
    with pytest.raises(RunError, match="--runs 0: expected at least 1"):
        list(plan(tmp_path, 0.002, 0))


def test_the_arms_of_a_sweep_file_are_counted_and_priced(tmp_path):
    make_config(tmp_path, "control", [2.50, 2.52, 2.51, 2.49, 2.505], train_seconds=3600.0)
    *_, needed, _ = plan(tmp_path, 0.02, 1, "nano", price=2.0)
    seeds = int(re.search(r"(\d+) seeds each", needed)[1])
    assert f"{2 * seeds} runs, about {2 * seeds:.1f} h of training, {4 * seeds:.2f} at 2 per hour" in needed
    make_config(tmp_path, "flops", [2.50], seeds=[9], train_seconds=3600.0, flops_per_token=1e6, tokens=120 * 4096)
    arms = {"control": RunConfig(track="nano"), "arm": RunConfig(track="nano", iterations=240)}
    hours = sum(duration.seconds_of(arms, load_runs(tmp_path)).values()) / 3600
    *_, needed, _ = plan(tmp_path, 0.02, 1, "nano", arms, 1000.0)
    seeds = int(re.search(r"(\d+) seeds each", needed)[1])
    assert f"{1000 * seeds * hours:,.2f} at 1000 per hour" in needed
    with pytest.raises(RunError, match="no config of track nano was"):  # its noise is that of another time limit
        list(plan(tmp_path, 0.02, 1, "nano", {"a": RunConfig(track="nano", max_wallclock_seconds=60)}))


def test_the_command_takes_configs_and_track_from_a_sweep_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(directory, "RUNS", tmp_path)
    make_config(tmp_path, "control", [2.50, 2.52, 2.51, 2.49, 2.505])
    file = str(NOTEBOOKS / "sweeps" / "stack_add_one.yaml")
    assert main.main(["plan", file, "--effect", "0.02", "--price-per-hour", "3"]) == 0
    assert "0.02 bpb, 22 against a baseline" in (out := capsys.readouterr().out) and "at 3 per hour" in out
    assert main.main(["plan", file, "--effect", "0.02", "--runs", "3"]) == 2
    assert "gives configs and track; leave --runs and --track out" in capsys.readouterr().err
