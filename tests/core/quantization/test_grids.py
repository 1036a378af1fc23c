"""Every grid: where its levels lie, that rounding is nearest, and edge rows."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf_core.quantization import grids
from pgolf_core.quantization.primitives import exp2_quarters
from pgolf_core.scheme import FitContext, parse_scheme

W = torch.randn(30, 50, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.5, 2, 30)[:, None]
GRIDS = {
    "absmax": lambda w: parse_scheme("absmax:4").grid(w, FitContext()),
    "sdclip": lambda w: parse_scheme("sdclip:3:2.5").grid(w, FitContext()),
    "step": lambda w: grids.step_grid(w, 0.5),
    "step row": lambda w: grids.step_grid(w, 0.5, "row"),
    "fisher": lambda w: grids.weighted_grid(w, 0.5, torch.rand(w.size(0)), torch.rand(w.size(1))),
    "ternary": lambda w: parse_scheme("ternary").grid(w, FitContext()),
}


@pytest.mark.parametrize("name", GRIDS)
def test_nearest_level(name):
    torch.manual_seed(0)
    grid = GRIDS[name](W)
    t = grids.to_nearest(W, grid)
    steps = t.step_size().expand_as(W)
    levels = torch.arange(-min(grid.qmax, 40), min(grid.qmax, 40) + 1)
    nearest = (W[..., None] - levels * steps[..., None]).abs().min(-1).values
    assert torch.allclose((W - t.dequantize()).abs(), nearest, atol=1e-6)
    largest = t.q.abs().max().item()
    assert largest <= grid.qmax and t.q.dtype == (torch.int8 if largest <= 127 else torch.int16)


def test_steps_are_what_they_say():
    assert grids.step_grid(W, 0.5).step_size().item() == pytest.approx(0.5 * W.square().mean().sqrt().item(), rel=1e-3)
    rows = grids.step_grid(W, 0.5, "row").step_size()[:, 0] / (0.5 * W.square().mean(1).sqrt())
    assert (rows.log2().abs() <= 0.1251).all()  # a quarter octave, rounded
    clip = GRIDS["sdclip"](W).step_size()[:, 0] * 3 / W.square().mean(1).sqrt()
    assert torch.allclose(clip, torch.tensor(2.5), rtol=1e-3)


def test_size_follows_c_and_not_how_large_weights_are():
    assert torch.equal(
        grids.to_nearest(W, grids.step_grid(W, 0.3)).q, grids.to_nearest(8 * W, grids.step_grid(8 * W, 0.3)).q
    )


def test_weighted_steps_keep_their_mean_and_follow_the_weights():
    row, col = 4.0 ** torch.arange(30).clamp_max(5), torch.ones(50)
    steps = grids.weighted_grid(W, 0.5, row, col).step_size()
    assert steps.log2().mean().item() == pytest.approx(math.log2(0.5 * W.square().mean().sqrt().item()), abs=0.13)
    assert (steps[0] / steps[5]).mean().item() == pytest.approx(32, rel=0.1)


def test_ternary_is_better_than_two_bits_of_absmax():
    def error(grid):
        return (W - grids.to_nearest(W, grid).dequantize()).square().sum()

    assert error(GRIDS["ternary"](W)) < 0.6 * error(parse_scheme("absmax:2").grid(W, FitContext()))


@pytest.mark.parametrize("name", GRIDS)
def test_rows_of_zeros(name):
    w = torch.zeros(4, 6)
    w[1] = 1.0
    t = grids.to_nearest(w, GRIDS[name](w))
    assert torch.isfinite(t.dequantize()).all() and (t.dequantize()[0] == 0).all()
    assert (grids.to_nearest(0 * w, GRIDS[name](0 * w)).q == 0).all()


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
