"""A new matrix, embedding table and control vector, added to GPT by a few lines here, go all the way of a run."""

import itertools
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from support.training import gaussian_state
from torch import nn

from pgolf.runs.result import ARTIFACT, CHECKPOINT
from pgolf.studies.reexport import export_checkpoint
from pgolf.studies.sensitivity import map_sensitivity
from pgolf.training.forecast import forecast, forecast_from
from pgolf.training.round_trip import load_checkpoint
from pgolf.training.run import train
from pgolf_core.config import RunConfig
from pgolf_core.export import export, load
from pgolf_core.layers.attention import norm
from pgolf_core.model import GPT, MLP, roles
from pgolf_core.parameters import CONTROL, EMBEDDING, declare, matrix

KNOBS = dict(
    track="nano", num_layers=2, model_dim=32, num_heads=2, num_kv_heads=1, train_seq_len=64, train_batch_tokens=1024,
    iterations=7, val_loss_every=0, val_max_tokens=1024, roundtrip_val_max_tokens=1024, val_batch_size=1024,
    calibration_tokens=512, quantizer="step:0.3", codec="ans", keep_float_max_numel=0, resume_every_seconds=0.001,
    compression_reg_weight=0.005, compression_reg_interval=1, compression_reg_warmup_steps=0,
)  # fmt: skip
SOLVE = dict(allocation="solve", cap_bytes=55_000)
TABLES = ["bigram.weight"]
MATRICES = ["bigram_proj.weight", "blocks.0.mlp.bypass.weight", "blocks.1.mlp.bypass.weight"]


@pytest.fixture
def extended(monkeypatch):
    """GPT with a hashed bigram embedding, its projection and gain, and a matrix around each MLP's hidden layer."""
    init, mlp_init, mlp_forward = GPT.__init__, MLP.__init__, MLP.forward

    def new_init(self, config):
        init(self, config)
        self.bigram = declare(nn.Embedding(389, 8), EMBEDDING)
        self.bigram_proj = declare(nn.Linear(8, config.model_dim, bias=False), matrix())
        self.bigram_gain = nn.Parameter(torch.full((config.model_dim,), 0.5))
        declare(self, CONTROL, "bigram_gain")
        self.tok_emb.register_forward_hook(partial(add_bigrams, self))  # a partial is copied with the model

    def add_bigrams(self, table, inputs, x):
        hashed = (31 * F.pad(inputs[0], (1, 0))[:, :-1] + inputs[0]) % 389
        return norm(x) + self.bigram_gain * self.bigram_proj(self.bigram(hashed))

    def new_mlp_init(self, config):
        mlp_init(self, config)
        self.bypass = declare(nn.Linear(config.model_dim, config.model_dim, bias=False), matrix("mlp_in"))

    monkeypatch.setattr(GPT, "__init__", new_init)
    monkeypatch.setattr(MLP, "__init__", new_mlp_init)
    monkeypatch.setattr(MLP, "forward", lambda self, x: mlp_forward(self, x) + self.bypass(x))


def test_new_parameters_train_resume_solve_read_back_and_map(embedded, extended, tmp_path, monkeypatch):
    config, run_dir = RunConfig(**KNOBS), tmp_path / "sweep" / "run"
    result = train(config, run_dir)
    state = load_checkpoint(run_dir / CHECKPOINT)

    # Trained: by Adam, by Muon, and the control vector by Adam.
    torch.manual_seed(config.seed)
    initial = GPT(config.model).state_dict()
    assert all(not torch.equal(state[name], initial[name]) for name in (*TABLES, *MATRICES, "bigram_gain"))

    # Solved: the file holds them nearly as they are, not zeroed.
    solved = export_checkpoint(run_dir, tmp_path / "solved", **SOLVE)
    stored = load(tmp_path / "solved" / ARTIFACT)
    assert state.keys() == stored.keys() == roles(config.model).keys()
    for name in (*TABLES, *MATRICES, "bigram_gain"):
        assert (stored[name] - state[name]).norm() < 0.7 * state[name].norm(), name
    assert SOLVE["cap_bytes"] >= solved.total_bytes > 0.99 * SOLVE["cap_bytes"]

    # Killed in the middle and resumed: the same file.
    calls, forward = itertools.count(), GPT.forward

    def killed(self, ids):
        if next(calls) == 40:
            raise KeyboardInterrupt
        return forward(self, ids)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(GPT, "forward", killed)
        train(config, tmp_path / "killed")
    resumed = train(config, tmp_path / "killed")
    assert resumed.resumed == 1 and resumed.artifact_sha256 == result.artifact_sha256

    # Mapped: each has a row of its own, and what it does to the score.
    table = map_sensitivity(run_dir, tmp_path / "map", tokens=1024, change="step:2").table
    rows = {row["tensor"]: row for row in table}
    for name in (*TABLES, *MATRICES):
        assert rows[name]["delta_bpb"] != 0 and math.isfinite(rows[name]["estimated_delta_bpb"]), name


def test_new_parameters_are_part_of_the_forecast(extended, tmp_path):
    config = RunConfig(**KNOBS)
    state = gaussian_state(config)
    account = export(state, config.export, tmp_path / "file", roles=roles(config.model))
    seen, before = forecast_from(state, config, 1.0), forecast(config)
    assert seen.bytes == pytest.approx(account.total, rel=0.01) and seen.without == ()
    assert before.parts["weights"] == pytest.approx(account.parts["weights"], rel=0.04)  # the new ones are 9 % of them


def test_a_tensor_that_is_no_parameter_is_named_and_stops_no_forecast():
    config = RunConfig(**KNOBS)
    state = GPT(config.model).state_dict()
    seen = forecast_from(state | {"extra.weight": torch.ones(2, 2)}, config, 0.5)
    assert seen.without == ("extra.weight",) and str(seen).endswith(", without tensor extra.weight")
    assert seen.bytes == forecast_from(state, config, 0.5).bytes
