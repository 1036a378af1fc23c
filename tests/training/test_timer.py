"""The wallclock limit: what counts toward it, when training stops, and what a resumed run keeps of it."""

import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from support.training import tiny

from pgolf.training.resume import TrainError
from pgolf.training.run import train
from pgolf_core import optim
from pgolf_core.timer import TrainTimer


def test_training_stops_at_the_wallclock_limit(embedded, tmp_path):
    result = train(tiny(max_wallclock_seconds=1.0, iterations=100_000, val_loss_every=0), tmp_path / "run")
    assert result.stopped_by == "wallclock" and 1.0 <= result.train_seconds < 3 and result.steps > 1


def test_learning_counts_toward_the_wallclock_limit_as_calibration_does(embedded, tmp_path):
    learning = dict(allocation="solve", codec="ans", cap_bytes=40_000, learn_steps=6, learn_tokens=256)
    config = tiny(iterations=100_000, max_wallclock_seconds=3.0, val_loss_every=0, calibration_tokens=512, **learning)
    budget = train(config, tmp_path / "run").budget
    reserve = float(re.search(r"reserve:([\d.]+)s", (tmp_path / "run" / "log.txt").read_text())[1])
    assert 0.2 * reserve < budget["calibration"] < 5 * reserve
    for knobs in ({}, dict(allocation="fixed", quantizer="ternary", allow_over_cap=True)):  # ternary needs none
        with pytest.raises(TrainError, match=r"calibration and learn_steps=6 alone take"):
            train(config.with_knobs(max_wallclock_seconds=0.01, **knobs), tmp_path / f"short{len(knobs)}")


def test_calibration_counts_toward_the_wallclock_limit(embedded, tmp_path):
    """Training ends early by the time that calibration takes; the budget lists both."""
    limit = 3.0
    config = tiny(
        iterations=100_000, max_wallclock_seconds=limit, warmdown_iters=20, val_loss_every=0, train_log_every=10,
        quantizer="step:0.4", gptq=True, calibration_tokens=4_096, resume_every_seconds=0.5,
    )  # fmt: skip
    result = train(config, tmp_path / "run")
    account = result.budget
    assert (account["limit"], account["train"], result.stopped_by) == (limit, result.train_seconds, "wallclock")
    assert account["counted"] == account["train"] + account["calibration"]
    assert account["over"] == max(0.0, account["counted"] - limit)
    assert account["calibration"] > 0.02 and account["train"] < limit  # without calibration it is used up
    assert account["apart"].keys() == {"warmup", "validation", "forecast", "resume files"}
    assert account["apart"]["validation"] > 0
    assert "reserve:" in (tmp_path / "run" / "log.txt").read_text()
    with pytest.raises(TrainError, match=r"max_wallclock_seconds=0\.01: calibration and learn_steps=0 alone take"):
        train(config.with_knobs(max_wallclock_seconds=0.01), tmp_path / "short")


@pytest.mark.parametrize("other", [{}, {"train_log_every": 1}, {"train_log_every": 2}, {"val_loss_every": 2}])
def test_timer_counts_the_queued_step_once(finished, tmp_path, monkeypatch, other):
    """On a simulated GPU with 10 seconds per step: a step in its queue counts already, and once."""
    readings, now, steps = [], [0.0], [0]

    def wait_for(step):
        now[0] = max(now[0], 10.0 * step)

    def seconds_since(start, _):
        wait_for(steps[0])
        return now[0] - start

    def step_optimizers(*arguments):
        steps[0] += 1
        real(*arguments)

    real = optim.step_optimizers
    for name, stand_in in {
        "pgolf_core.timer.mark": lambda device: SimpleNamespace(synchronize=partial(wait_for, steps[0])),
        "pgolf_core.timer.time": SimpleNamespace(perf_counter=lambda: now[0], process_time=lambda: now[0]),
        "pgolf_core.timer.seconds_since": seconds_since,
        "pgolf_core.train.step_optimizers": step_optimizers,
        "pgolf_core.distributed.Ranks.share_float": lambda _, reading: readings.append(reading) or reading,
    }.items():
        monkeypatch.setattr(name, stand_in)
    knobs = dict(iterations=9, max_wallclock_seconds=35, val_loss_every=0, train_log_every=0, resume_every_seconds=99)
    config = tiny(**knobs | other)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # killed when it is scored
        patch.setattr("pgolf.training.run.round_trip", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        train(config, tmp_path / "run")
    reserve, first, *others = readings
    assert others == [20.0, 30.0, 40.0] and first in (0.0, 10.0) and reserve == 0.0
    result = train(config, tmp_path / "run")  # trains no more
    assert (result.stopped_by, result.steps, result.train_seconds, result.resumed) == ("wallclock", 4, 40.0, 1)
    assert result.budget["cpu"] == 40.0  # kept by the resume file, as the wallclock's seconds are


def test_expired_timer_stays_expired_after_a_resume():
    """The queued step ended sooner than extrapolated."""
    timer = TrainTimer(torch.device("cpu"), 35.0)
    timer.trained_s, timer.expired = 34.0, True
    again = TrainTimer(torch.device("cpu"), 35.0)
    again.load_state_dict(timer.state_dict())
    assert again.expired and again.trained_s == 34.0
