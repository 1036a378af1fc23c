"""Every option, alone and in random combinations, goes all the way of a run: trained, killed, solved, read back."""

import itertools
import math
from functools import partial

import pytest
import torch
from support.options import BASE, OPTIONS, combinations, config_of

from pgolf.runs.result import ARTIFACT, CHECKPOINT
from pgolf.training import run as training
from pgolf.training import setup
from pgolf.training.forecast import CODE_MARGIN, forecast
from pgolf.training.round_trip import load_checkpoint
from pgolf.training.run import train
from pgolf_core.config import RunConfig
from pgolf_core.export import load
from pgolf_core.model import GPT, roles, roles_by_name

pytestmark = pytest.mark.usefixtures("real_scripts")
# All that the notes wish for in one.
FOR_ITS_BYTES = ("loops", "EMA", "learned rounding", "n-gram cache", "low-rank residuals")
SLOW = (
    [group for group in combinations(seed=0) if len(group) > 1]
    + [(name,) for name in OPTIONS]
    + [group for seed in (1, 2) for group in combinations(seed)]
)
GROUPS = [FOR_ITS_BYTES, *(pytest.param(group, marks=pytest.mark.slow) for group in SLOW)]


@pytest.mark.parametrize("group", GROUPS, ids=", ".join)
def test_options_train_resume_to_the_same_bytes_solve_and_read_back(group, embedded, tmp_path, monkeypatch):
    config, run_dir = config_of(group), tmp_path / "sweep" / "run"
    result = train(config, run_dir)
    assert result.roundtrip_val_bpb < result.prequant_val_bpb + 0.02  # after six steps rounding may as well help

    # Every parameter was trained, and the solver's file holds it.
    state, stored = load_checkpoint(run_dir / CHECKPOINT), load(run_dir / ARTIFACT)
    torch.manual_seed(config.seed)
    initial = GPT(config.model).state_dict()
    known = roles(config.model)
    assert known == roles_by_name(state) and state.keys() == stored.keys() == known.keys()
    for name, trained in state.items():
        assert not torch.equal(trained, initial[name]), name
        assert stored[name].any(), name
    assert result.total_bytes <= config.cap_bytes
    assert result.bytes["code"] == pytest.approx(forecast(config).parts["code"], rel=CODE_MARGIN)

    # Killed in the middle and resumed: the same weights.
    step, config = training.train_step, config.with_knobs(final_roundtrip_eval=False)

    def killed(state, *arguments):
        if state.step == 4:
            raise KeyboardInterrupt
        return step(state, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "train_step", killed)
        train(config, tmp_path / "killed")
    resumed = train(config, tmp_path / "killed")
    assert resumed.resumed == 1 and resumed.checkpoint_sha256 == result.checkpoint_sha256


@pytest.mark.parametrize("group", GROUPS, ids=", ".join)
def test_options_are_in_graphs_that_warm_up_has_built(group, embedded, tmp_path, monkeypatch):
    """One graph per form of the model, none of them built or built again while the timer runs."""
    loop = training.train_loop

    def strict_loop(run, config):
        with torch.compiler.set_stance("fail_on_recompile"):
            loop(run, config)

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(setup, "not_compiled", lambda *arguments: "")
    monkeypatch.setattr(training, "train_loop", strict_loop)
    config = config_of(group, compile=True, val_loss_every=2, final_roundtrip_eval=False)
    assert math.isfinite(train(config, tmp_path / "run").val_bpb)


@pytest.mark.slow
def test_loops_are_on_from_their_share_of_training_and_in_what_is_scored(embedded, tmp_path, monkeypatch):
    seen, uncapped = [], GPT.uncapped

    def noted(self, ids):
        seen.append(("train" if self.training else "score", self.looping))
        return uncapped(self, ids)

    monkeypatch.setattr(GPT, "uncapped", noted)
    train(config_of(("late loops",), val_loss_every=2), tmp_path / "run")
    warm_up = [("train", False), ("train", True)]
    steps = [("train", False), ("score", False), ("train", False), ("train", True), ("score", True), ("train", True)]
    assert [form for form, _ in itertools.groupby(seen)] == [*warm_up, *steps, ("score", True)]


@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_off_by_default_and_off_is_the_same_run(name):
    config = RunConfig({}, **BASE)
    off = {knob: RunConfig.model_fields[knob].default for knob in OPTIONS[name]}
    assert config.with_knobs(**off).hash == config.hash != config_of((name,)).hash
