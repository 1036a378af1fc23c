"""Forecasts against files really written, and what a forecast over the cap stops."""

import math

import pytest
import torch
import yaml
from support import training
from support.training import gaussian_state

import pgolf.training.file_size as file_size
import pgolf.training.forecast as forecast_module
from pgolf.cli import main
from pgolf.runs import directory
from pgolf.runs.table import load_runs
from pgolf.script.compile import script_of
from pgolf.sweeps.runner import run_sweep
from pgolf.training.forecast import ForecastError, forecast, forecast_from
from pgolf.training.growth import lr_area, warmdown_steps
from pgolf.training.run import RESUME, TrainError, train
from pgolf_core.config import RunConfig
from pgolf_core.export import export
from pgolf_core.optim import lr_factor

TINY = training.TINY | dict(
    warmdown_iters=0, val_loss_every=0, roundtrip_val_max_tokens=2048, keep_float_max_numel=2048
)


CHECKPOINTS = [
    dict(num_layers=2, model_dim=96, quantizer="step:0.5", codec="ans"),
    dict(num_layers=2, model_dim=128, quantizer="step:0.3:row", embed_quantizer="step:0.05", codec="brotli"),
    dict(num_layers=1, model_dim=128, tie_embeddings=False, quantizer="sdclip:6:12.5", codec="lzma"),
    dict(num_layers=6, num_unique_blocks=3, model_dim=128, quantizer="absmax:6", codec="zlib"),
    dict(num_layers=2, model_dim=96, embed_dim=64, quantizer="absmax", mlp_out_quantizer="ternary", codec="ans"),
    dict(num_layers=1, model_dim=64, quantizer="float16", codec="auto"),
    dict(num_layers=2, model_dim=128, quantizer="absmax", int8_residual_rank=1, int8_residual_budget_bytes=4000),
]


@pytest.mark.parametrize("knobs", CHECKPOINTS, ids=lambda knobs: f"{knobs['quantizer']} {knobs.get('codec', '')}")
def test_a_final_checkpoint_is_coded_as_export_does(tmp_path, knobs):
    config = RunConfig(track="nano", num_heads=4, num_kv_heads=2, keep_float_max_numel=4096, **knobs)
    state = gaussian_state(config)
    account = export(state, config.export, tmp_path / "artifact", code_bytes=len(script_of(config).packed))
    seen = forecast_from(state, config, 1.0)
    assert seen.bytes == sum(seen.parts.values()) and seen.parts["code"] == account.code
    assert seen.bytes - account.code == pytest.approx(account.artifact, rel=0.01)
    assert seen.low < account.total < seen.high


def test_a_file_that_is_mostly_small_float_matrices_says_so():
    narrow = RunConfig(track="nano", model_dim=96, num_heads=4, num_kv_heads=2)
    said = "12 of 13 matrices stay float16 (keep_float_max_numel=65536)"
    assert forecast(narrow).verdict(narrow.cap_bytes).endswith(f"fits; {said}")
    for knobs in ({"keep_float_max_numel": 4096}, {"allocation": "solve", "codec": "ans"}):
        assert not forecast(narrow.with_knobs(**knobs)).kept


@pytest.mark.parametrize(("codec", "dim"), [("ans", 64), ("zlib", 128)])
def test_of_many_weights_some_stand_for_all(tmp_path, monkeypatch, codec, dim):
    config = RunConfig(**TINY | dict(num_layers=8, model_dim=dim), quantizer="step:0.4", codec=codec)
    state = gaussian_state(config)
    account = export(state, config.export, tmp_path / "artifact")
    monkeypatch.setattr(forecast_module, "CHECKPOINT_WEIGHTS", 25 * dim**2)  # three blocks
    monkeypatch.setitem(file_size.SAMPLES, codec, 18 * dim**2)
    seen = forecast_from(state, config, 1.0)
    assert seen.bytes - seen.parts["code"] == pytest.approx(account.artifact, rel=0.02)


def test_finer_steps_and_larger_models_cost_more():
    plain = TINY | dict(codec="ans", quantizer="step:0.4")
    at = lambda **knobs: forecast(RunConfig(**plain | knobs)).bytes  # noqa: E731
    sizes = [at(quantizer=f"step:{c}") for c in (1.5, 0.4, 0.2, 0.05)]
    assert sizes == sorted(sizes)
    weights = 1024 * 64 + 7 * 64 * 64  # embedding, attention 3, MLP 4
    assert 8 * (sizes[2] - sizes[1]) == pytest.approx(weights, rel=0.08)  # half the step, a bit a weight
    small = dict(model_dim=32)
    assert at(**small) < at(**small, num_layers=2) < at(**small, num_layers=4)
    assert at(**small) < at(model_dim=48) < sizes[1]
    shared = at(**small, num_layers=4, num_unique_blocks=2)
    assert at(**small, num_layers=2) == pytest.approx(shared, rel=0.03)  # control vectors


def test_steps_tied_to_sigma_know_no_training_length_and_the_reference_does():
    tied = [forecast(RunConfig(**TINY | dict(quantizer="step:0.4", iterations=n))) for n in (100, 5000)]
    grown = [forecast(RunConfig(**TINY | dict(iterations=n))) for n in (100, 5000)]
    assert tied[1].bytes == pytest.approx(tied[0].bytes, rel=0.04)
    assert grown[1].bytes > 1.05 * grown[0].bytes
    width = lambda f: (f.high - f.low) / f.bytes  # noqa: E731
    assert width(grown[0]) > 2 * width(tied[0])
    clocked = forecast(RunConfig(**TINY | dict(iterations=5000, max_wallclock_seconds=60)))
    assert grown[0].low < clocked.low < clocked.bytes < grown[1].bytes


def test_the_solver_fills_its_cap_by_construction():
    config = RunConfig(**TINY, allocation="solve", cap_bytes=70_000)
    seen = forecast(config)
    assert seen.bytes == seen.high == 70_000 and 69_000 < seen.low < 70_000
    least = seen.parts["code"] + 1000
    assert forecast(config.with_knobs(cap_bytes=least)).bytes > least  # even the coarsest steps
    assert forecast(config.with_knobs(cap_bytes=10_000_000)).bytes < 1_000_000  # even the finest


def test_area_is_the_sum_of_the_schedule():
    for steps, warmdown, frac, floor in (
        (12, 0, 0, 0), (12, 5, 0, 0), (12, 40, 0, 0), (1, 1, 0, 0), (12, 5, 0, 0.5), (12, 0, 0.5, 0.1),
        (40, 5, 0.9, 0.3),
    ):  # fmt: skip
        schedule = dict(warmdown_iters=warmdown, warmdown_frac=frac, min_lr=floor)
        config = RunConfig(**TINY | dict(iterations=steps, max_wallclock_seconds=0) | schedule)
        area = lr_area(steps, warmdown_steps(config.train, steps), floor)
        assert area == pytest.approx(sum(lr_factor(config, step, 0.0) for step in range(steps)))


def test_global_random_numbers_are_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    config = RunConfig(**TINY | dict(iterations=77))
    forecast(config)
    forecast_from(gaussian_state(config), config, 0.1)
    assert torch.equal(torch.rand(3), expected)
    for fraction in (0, 1.1, math.nan):
        with pytest.raises(ValueError, match="fraction"):
            forecast_from(gaussian_state(config), config, fraction)


# Runs that a forecast stops


def test_a_sweep_over_its_cap_is_refused_whole(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(directory, "RUNS", tmp_path / "runs")
    path = tmp_path / "s.yaml"
    small = TINY | dict(cap_bytes=80_000)
    coarse, deep = dict(quantizer="step:1.5"), dict(num_layers=4)
    wanted = {"fits": dict(cap_bytes=900_000), "large": {}, "coarse": coarse, "deep": deep}
    path.write_text(yaml.safe_dump({"base": small, "runs": wanted}), encoding="utf-8")
    with pytest.raises(ForecastError) as refusal:
        run_sweep(path)
    message = str(refusal.value)
    assert "large:" in message and "deep:" in message and "fits:" not in message and "coarse:" not in message
    for words in ("cap_bytes=80,000", "raise cap_bytes", "quantizer", "allow_over_cap=1"):
        assert words in message
    assert not list((tmp_path / "runs").rglob("config.json"))
    said = capfd.readouterr().out
    assert all(any(line.startswith(name) and "of " in line for line in said.splitlines()) for name in wanted)

    assert main.main(["sweep", str(path), "--dry-run"]) == 2
    out, err = capfd.readouterr()
    assert ": over" in out and "4 to run" in out and err.startswith("pgolf: forecast over the cap")
    assert main.main(["sweep", str(path), "--dry-run", "-k", "allow_over_cap=1"]) == 0


def test_a_training_over_its_cap_does_not_start_and_may(embedded, tmp_path):
    knobs = TINY | dict(cap_bytes=60_000)
    with pytest.raises(ForecastError, match=r"run: .* against cap_bytes=60,000"):
        train(RunConfig(**knobs), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    result = train(RunConfig(**knobs, allow_over_cap=True), tmp_path / "run")
    assert result.fits is False
    assert result.forecast_bytes == pytest.approx(result.total_bytes, rel=0.1)
    assert result.forecast_at_tenth == pytest.approx(result.total_bytes, rel=0.1)
    assert f"forecast:{result.forecast_bytes:,} bytes" in (tmp_path / "run" / "log.txt").read_text(encoding="utf-8")
    assert train(RunConfig(**knobs), tmp_path / "run") == result  # a complete run is not refused
    without = train(RunConfig(**knobs, final_roundtrip_eval=False), tmp_path / "no artifact")
    assert without.total_bytes is None


def test_a_tenth_of_training_may_stop_it_and_it_may_go_on(embedded, tmp_path, monkeypatch):
    knobs = TINY | dict(iterations=20, resume_every_seconds=0, quantizer="step:0.4")
    monkeypatch.setattr("pgolf.training.run.check", lambda configs: None)  # a first forecast that was too low
    tight = dict(cap_bytes=42_000)
    with pytest.raises(TrainError, match=r"stopped at step 2: .* over cap_bytes=42000; with allow_over_cap=1 the same"):
        train(RunConfig(**knobs, **tight), tmp_path / "runs" / "run")
    assert load_runs(tmp_path / "runs").iloc[0].status == "failed"
    assert (tmp_path / "runs" / "run" / RESUME).exists()
    with pytest.raises(TrainError, match="stopped at step 2"):
        train(RunConfig(**knobs, **tight), tmp_path / "runs" / "run")
    result = train(RunConfig(**knobs, **tight, allow_over_cap=True), tmp_path / "runs" / "run")
    assert result.resumed == 2 and result.steps == 20 and result.fits is False
    undisturbed = train(RunConfig(**knobs, **tight, allow_over_cap=True), tmp_path / "undisturbed")
    assert undisturbed.artifact_sha256 == result.artifact_sha256
    assert undisturbed.forecast_at_tenth == result.forecast_at_tenth
    assert undisturbed.config_hash == result.config_hash
