"""All six terms against recorded values and gradients, and the schedule of who is sampled when."""

import json

import pytest
import torch
from golden_vectors import generated_state, golden_path

from pgolf_core.config import RunConfig
from pgolf_core.knobs import RegularizerConfig
from pgolf_core.model import GPT
from pgolf_core.regularizers import CompressionRegularizer

RECORDED = json.loads(golden_path("regularizers.json").read_text())
RESIDUALS = {name: RECORDED[name] for name in ("int8_residual_rank", "int8_residual_budget_bytes")}
KNOBS = RECORDED["model"] | RECORDED["common"] | RESIDUALS | dict(compression_reg_weight=0.005)


@pytest.fixture(scope="module")
def model():
    model = GPT(RunConfig(**KNOBS).model)
    model.load_state_dict(generated_state())
    return model


@pytest.mark.parametrize("case", RECORDED["cases"], ids=lambda c: f"{'+'.join(c['terms']) or 'plain'}@{c['step']}")
def test_golden(model, case):
    model.zero_grad()
    value, sampled = CompressionRegularizer(model, RunConfig(**KNOBS | case["terms"]))(case["step"])
    assert sampled == case["sampled"]
    assert value.item() == pytest.approx(case["value"], rel=1e-5)
    if sampled:
        value.backward()
        norms = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None}
        assert norms == pytest.approx(case["grad_norms"], rel=1e-4)


def test_rank1_needs_a_budget(model):
    with_term = RunConfig(**KNOBS | dict(compression_rank1_reg_weight=1.0, int8_residual_budget_bytes=0))
    without = RunConfig(**KNOBS | dict(int8_residual_budget_bytes=0))
    assert CompressionRegularizer(model, with_term)(32)[0] == CompressionRegularizer(model, without)(32)[0]


def test_every_candidate_gets_its_turn(model):
    regularizer = CompressionRegularizer(model, RunConfig(**KNOBS | dict(compression_reg_interval=1)))
    seen = {name for step in range(32, 64) for name in regularizer(step)[1]}
    assert seen == {name for name, _ in regularizer.candidates}


def test_embedding_kept_in_float16_is_left_alone(model):
    knobs = KNOBS | dict(embed_quantization_bits=16, compression_reg_sample_tensors=1, compression_reg_interval=1)
    regularizer = CompressionRegularizer(model, RunConfig(**knobs))
    step = next(s for s in range(32, 200) if regularizer(s)[1] == ["tok_emb.weight"])
    assert regularizer(step)[0].item() == 0.0


def test_every_gradient_is_finite_on_a_fresh_model():
    """Projections start at zero, where a root or logarithm has no slope."""
    terms = {name: 0.1 for name in RegularizerConfig.model_fields if name.endswith("reg_weight")}
    config = RunConfig(**KNOBS | terms | dict(compression_reg_warmup_steps=0, compression_reg_sample_tensors=99))
    fresh = GPT(config.model)
    value, sampled = CompressionRegularizer(fresh, config)(0)
    value.backward()
    assert "blocks.0.mlp.proj.weight" in sampled
    assert all(torch.isfinite(p.grad).all() for p in fresh.parameters() if p.grad is not None)
