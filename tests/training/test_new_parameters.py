"""Parameters of an option are in the map of sensitivities, the size forecast and the pressure, as all others are."""

import math

import pytest
import torch
from support.training import gaussian_state

from pgolf.studies.sensitivity import map_sensitivity
from pgolf.training.forecast import forecast, forecast_from
from pgolf.training.run import train
from pgolf_core.config import RunConfig
from pgolf_core.export import export
from pgolf_core.model import GPT, roles

KNOBS = dict(
    track="nano", num_layers=2, model_dim=32, num_heads=2, num_kv_heads=1, train_seq_len=64, train_batch_tokens=1024,
    iterations=7, val_loss_every=0, val_max_tokens=1024, roundtrip_val_max_tokens=1024, val_batch_size=1024,
    calibration_tokens=512, quantizer="step:0.3", codec="ans", keep_float_max_numel=0, bigram_vocab_size=389,
    bigram_dim=8, compression_reg_weight=0.005, compression_reg_interval=1, compression_reg_warmup_steps=0,
)  # fmt: skip


def test_each_matrix_of_an_option_is_mapped(embedded, tmp_path):
    train(RunConfig(**KNOBS), tmp_path / "sweep" / "run")
    table = map_sensitivity(tmp_path / "sweep" / "run", tmp_path / "map", tokens=1024, change="step:2").table
    rows = {row["tensor"]: row for row in table}
    for name in ("bigram_hash.table.weight", "bigram_hash.proj.weight"):
        assert rows[name]["delta_bpb"] != 0 and math.isfinite(rows[name]["estimated_delta_bpb"]), name


def test_they_are_part_of_the_forecast(tmp_path):
    config = RunConfig(**KNOBS)
    state = gaussian_state(config)
    account = export(state, config.export, tmp_path / "file", roles=roles(config.model))
    seen, before = forecast_from(state, config, 1.0), forecast(config)
    assert seen.bytes - seen.parts["code"] == pytest.approx(account.artifact, rel=0.01) and seen.without == ()
    assert before.parts["weights"] == pytest.approx(account.parts["weights"], rel=0.04)  # the option's are 7 % of them


def test_a_tensor_that_is_no_parameter_is_named_and_stops_no_forecast():
    config = RunConfig(**KNOBS)
    state = GPT(config.model).state_dict()
    seen = forecast_from(state | {"extra.weight": torch.ones(2, 2)}, config, 0.5)
    assert seen.without == ("extra.weight",) and str(seen).endswith(", without tensor extra.weight")
    assert seen.bytes == forecast_from(state, config, 0.5).bytes
