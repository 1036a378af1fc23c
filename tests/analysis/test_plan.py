"""`pgolf plan` over synthetic runs."""

import pytest
from support.runs import make_config, make_run

from pgolf.analysis.plan import plan
from pgolf.runs.result import RunError


def test_a_plan_gives_the_seeds_that_find_a_difference(tmp_path):
    make_run(tmp_path, "s/alone", bpb=2.4, knobs={"num_layers": 5})
    with pytest.raises(RunError, match="no config of any track was trained with several seeds"):
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
