"""Followed from train() to result.json, a RunConfig goes down once: groups are handed to those that need them."""

import sys
from itertools import groupby

from support.training import tiny

from pgolf.training.run import train
from pgolf_core.config import RunConfig

OF_KNOBS = {f"pgolf_core.{name}" for name in ("config", "rules", "knobs")}  # checks of knobs against one another


def modules_given_a_config(call) -> list[str]:
    """Modules of both packages whose functions `call` called with a RunConfig among their arguments, in order."""
    way: list[str] = []

    def profile(frame, event, argument):
        name = frame.f_globals.get("__name__", "")
        if event != "call" or not name.startswith(("pgolf.", "pgolf_core.")) or way[-1:] == [name]:
            return
        code = frame.f_code
        count = code.co_argcount + code.co_kwonlyargcount
        if any(isinstance(frame.f_locals.get(local), RunConfig) for local in code.co_varnames[:count]):
            way.append(name)

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return way


def test_config_enters_few_modules_and_rarely_returns(embedded, tmp_path):
    knobs = dict(compression_reg_weight=0.005, quantizer="step:0.4", gptq=True, calibration_tokens=1024, warmup_steps=1)
    config = tiny(**knobs, max_wallclock_seconds=600, resume_every_seconds=0.01)
    way = modules_given_a_config(lambda: train(config, tmp_path / "run"))
    way = [name for name, _ in groupby(name for name in way if name not in OF_KNOBS)]
    assert way[0] == "pgolf.training.run" and "pgolf_core.train" in way  # the test sees the way
    assert len(set(way)) <= 16, way
    assert len(way) - len(set(way)) <= 17, " ".join(way)
