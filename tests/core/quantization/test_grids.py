"""Every grid: where its levels lie, that rounding is nearest, and edge rows; and which schemes can be named."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf_core.quantization.grids import step_grid
from pgolf_core.quantization.primitives import exp2_quarters, quantize
from pgolf_core.scheme import FitContext, parse_scheme

W = torch.randn(30, 50, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.5, 2, 30)[:, None]
RMS = W.square().mean().sqrt().item()
GRIDS = ("sdclip:3:2.5", "step:0.5", "step:0.5:row", "step:0.5:fisher", "ternary")


def grid_of(text: str, w=W):
    torch.manual_seed(0)
    return parse_scheme(text).grid(w, FitContext(row_weight=torch.rand(w.size(0)), col_weight=torch.rand(w.size(1))))


@pytest.mark.parametrize("text", GRIDS)
def test_nearest_level(text):
    grid = grid_of(text)
    t = grid.round(W)
    steps = t.step_size().expand_as(W)
    levels = torch.arange(-min(grid.qmax, 40), min(grid.qmax, 40) + 1)
    nearest = (W[..., None] - levels * steps[..., None]).abs().min(-1).values
    assert torch.allclose((W - t.dequantize()).abs(), nearest, atol=1e-6)
    largest = t.q.abs().max().item()
    assert largest <= grid.qmax and t.q.dtype == (torch.int8 if largest <= 127 else torch.int16)


def test_steps_are_what_they_say():
    assert grid_of("step:0.5").step_size().item() == pytest.approx(0.5 * RMS, rel=1e-3)
    rows = grid_of("step:0.5:row").step_size()[:, 0] / (0.5 * W.square().mean(1).sqrt())
    assert (rows.log2().abs() <= 0.1251).all()  # a quarter octave, rounded
    clip = grid_of("sdclip:3:2.5").step_size()[:, 0] * 3 / W.square().mean(1).sqrt()
    assert torch.allclose(clip, torch.tensor(2.5), rtol=1e-3)


def test_size_follows_c_and_not_how_large_weights_are():
    assert torch.equal(step_grid(W, 0.3).round(W).q, step_grid(8 * W, 0.3).round(8 * W).q)


def test_weighted_steps_keep_their_mean_and_follow_the_weights():
    steps = step_grid(W, 0.5, 4.0 ** torch.arange(30).clamp_max(5), torch.ones(50)).step_size()
    assert steps.log2().mean().item() == pytest.approx(math.log2(0.5 * RMS), abs=0.13)
    assert (steps[0] / steps[5]).mean().item() == pytest.approx(32, rel=0.1)
    assert torch.equal(step_grid(W, 0.5, torch.zeros(30)).step_size(), step_grid(W, 0.5).step_size().expand(30, 1))


def test_ternary_is_better_than_two_bits_of_absmax():
    def error(t):
        return (W - t.dequantize()).square().sum()

    assert error(grid_of("ternary").round(W)) < 0.6 * error(quantize(W, 2))


@pytest.mark.parametrize("text", GRIDS)
def test_rows_of_zeros(text):
    w = torch.zeros(4, 6)
    w[1] = 1.0
    t = grid_of(text, w).round(w)
    assert torch.isfinite(t.dequantize()).all() and (t.dequantize()[0] == 0).all()
    assert (grid_of(text, 0 * w).round(0 * w).q == 0).all()


def test_exp2_quarters_are_exact_at_octaves():
    k = torch.arange(-127, 128, dtype=torch.int8)
    assert torch.equal(exp2_quarters(k)[3::4], torch.ldexp(torch.ones(63), torch.arange(-31, 32)))
    assert torch.allclose(exp2_quarters(k).log2(), k / 4, atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(text=st.text(alphabet="abcdefinoprstux:0123456789.-", max_size=24))
def test_a_scheme_is_parsed_or_refused_with_words(text):
    try:
        parse_scheme(text)
    except ValueError as error:
        assert str(error).startswith("input should")


@pytest.mark.parametrize(
    ("text", "message"),
    [("step", "step:C"), ("step:0", "step:C"), ("absmax:9", "BITS 2 to 8"), ("nearest", "begin with absmax"),
     ("step:0.4:rows", "step:C:row"), ("sdclip:6", "sdclip:BITS:K"), ("codebook:9999:2", "4096"),
     ("ternary:2", "three")],
)  # fmt: skip
def test_schemes_that_cannot_work(text, message):
    with pytest.raises(ValueError, match=message):
        parse_scheme(text)
