"""The quantiser against recorded integers and scales, and its properties over random tensors."""

import numpy as np
import pytest
import torch
from golden_vectors import GOLDEN, golden
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from pgolf_core.quantization.primitives import CLIP_QUANTILE, clip_quantile, quantize
from pgolf_core.quantization.residuals import fit_rank_one

CASES = sorted(p.stem.removeprefix("quant_") for p in GOLDEN.glob("quant_*_*.json"))

matrices = arrays(
    np.float32, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40),
    elements=st.floats(-100, 100, width=32),
).map(torch.from_numpy)  # fmt: skip


@pytest.mark.parametrize("case", [*CASES, "vector"])
def test_golden(case):
    recorded, arrays = golden(f"quant_{case}")
    t = quantize(arrays["w"], recorded["num_bits"], recorded.get("int8_axis_mode", "auto"))
    assert t.axis == recorded.get("axis")
    assert torch.equal(t.q, arrays["q"]) and torch.equal(t.scale, arrays["scale"].reshape(t.scale.shape))
    assert torch.equal(t.dequantize(), arrays["dequant"])


def test_golden_rank_one():
    recorded, arrays = golden("rank1_residual")
    r, _, benefit = fit_rank_one(arrays["residual"], recorded["power_iters"])
    for factor, expected in ((r.left, arrays["left"]), (r.right, arrays["right"])):
        torch.testing.assert_close(factor, expected, rtol=2**-10, atol=0)  # one unit of float16: processors differ
    assert benefit == pytest.approx(recorded["benefit"], rel=1e-6)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 128, 1000, 65_537])
def test_clip_is_torchs_quantile(n):
    magnitude = torch.randn(5, n).abs()
    assert torch.equal(clip_quantile(magnitude), torch.quantile(magnitude, CLIP_QUANTILE, dim=1))


@settings(deadline=None, max_examples=60)
@given(w=matrices, bits=st.integers(4, 8), axis=st.sampled_from(["auto", "row", "col"]))
def test_error_is_half_a_step(w, bits, axis):
    t = quantize(w, bits, axis)
    assert t.q.dtype == torch.int8 and t.q.abs().max() <= 2 ** (bits - 1) - 1
    step = t.scale.float()[:, None] if t.axis == 0 else t.scale.float()[None, :]
    # Half a step, what float16 rounds off the scale over the whole range, and what the quantile clips.
    clipped = 2e-6 * w.abs().max() * max(w.shape)
    assert ((w - t.dequantize()).abs() <= 0.5 * step + 2**-10 * w.abs() + step * 1e-3 + clipped).all()


@settings(deadline=None, max_examples=60)
@given(w=matrices, bits=st.integers(4, 8))
def test_auto_is_the_better_axis(w, bits):
    error = {axis: (w - quantize(w, bits, axis).dequantize()).square().sum() for axis in ("auto", "row", "col")}
    assert error["auto"] <= min(error["row"], error["col"]) * (1 + 1e-6) + 1e-12


def test_zero_rows_stay_zero():
    w = torch.randn(6, 8)
    w[2] = 0
    assert torch.equal(quantize(w, 8, "row").dequantize()[2], torch.zeros(8))
    assert torch.equal(quantize(torch.zeros(4, 4)).dequantize(), torch.zeros(4, 4))


@pytest.mark.parametrize("bad", [torch.tensor([[1.0, float("nan")]]), torch.tensor([float("inf")]), torch.zeros(0, 3)])
def test_refuses_what_has_no_integers(bad):
    with pytest.raises(ValueError, match="empty or not finite"):
        quantize(bad)


def test_residual_lowers_the_error_by_its_benefit():
    residual = torch.randn(30, 20) + 2 * torch.outer(torch.randn(30), torch.randn(20))
    r, size, benefit = fit_rank_one(residual, 6)
    after = (residual - r.dequantize()).square().sum()
    assert residual.square().sum() - after == pytest.approx(benefit, rel=1e-4)
    assert after < 0.6 * residual.square().sum() and size == sum(t.nbytes for t in r.arrays().values())
