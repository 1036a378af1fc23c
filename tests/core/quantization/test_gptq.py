"""GPTQ against its definition: rounding in order with the least-squares mending of what is left."""

import warnings

import pytest
import torch

from pgolf_core.quantization.gptq import factorize_hessian, gptq
from pgolf_core.quantization.grids import UNCLIPPED
from pgolf_core.scheme import ExportError


def problem(rows=24, cols=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    inputs = torch.randn(400, cols, generator=g) @ torch.randn(cols, cols, generator=g)
    return torch.randn(rows, cols, generator=g), inputs.T @ inputs / 400


def cost(error, hessian):
    return (error @ hessian * error).sum().item()


def by_definition(w, step, hessian, order):
    """Round one column, then set the ones left to what minimises the cost for the errors made: plain least squares."""
    left, q = w.double()[:, order].clone(), torch.empty_like(w.double())
    h = hessian.double()[order][:, order]
    for j in range(w.size(1)):
        q[:, j] = torch.round(left[:, j] / step)
        error = left[:, j] - q[:, j] * step
        if j + 1 < w.size(1):
            left[:, j + 1 :] += torch.outer(error, torch.linalg.solve(h[j + 1 :, j + 1 :], h[j + 1 :, j]))
    result = torch.empty_like(q)
    result[:, order] = q
    return result.float()


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("block", [1, 7, 128])
def test_is_sequential_least_squares(act_order, block):
    w, hessian = problem()
    order = factorize_hessian(hessian, damp=1e-6, act_order=act_order)
    q = gptq(w, torch.tensor(0.5), order, UNCLIPPED, block)
    expected = by_definition(w, 0.5, hessian, order.perm)
    assert (q != expected).float().mean() < 0.01  # ties of rounding apart


def test_costs_less_than_rounding_to_nearest():
    w, hessian = problem()
    step = torch.tensor(0.7)
    nearest = torch.round(w / step) * step
    mended = gptq(w, step, factorize_hessian(hessian), UNCLIPPED) * step
    assert cost(mended - w, hessian) < 0.5 * cost(nearest - w, hessian)
    assert (mended - w).square().sum() > (nearest - w).square().sum()  # bought with plain error


def test_without_correlation_it_is_rounding_to_nearest():
    w, _ = problem()
    assert torch.equal(gptq(w, torch.tensor(0.3), factorize_hessian(torch.eye(40)), UNCLIPPED), torch.round(w / 0.3))


def test_column_weight_is_what_an_error_costs():
    """At fine steps the cost is the sum over columns of step²/12 · column_weight."""
    w, hessian = problem(rows=4000)
    order = factorize_hessian(hessian, damp=1e-9)
    steps = torch.linspace(0.02, 0.08, 40)
    error = gptq(w, steps, order, UNCLIPPED) * steps - w
    expected = len(w) * (steps.square() / 12 * order.column_weight).sum().item()
    assert cost(error, hessian) == pytest.approx(expected, rel=0.03)


def few_tokens(cols=256):
    x = torch.randn(40, cols, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, cols)
    return x.T @ x  # rank 40


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e25])
@pytest.mark.parametrize("damp", [1e-4, 1e-8, 1e-12])
def test_damping_too_small_for_few_tokens_is_raised_and_said(damp, size):
    dead = torch.diag((torch.arange(64) % 2).float())
    for hessian in (few_tokens(), torch.ones(64, 64), dead):
        with warnings.catch_warnings(record=True) as said:
            factor = factorize_hessian(size * hessian, damp)
        q = gptq(torch.randn(8, len(hessian)), torch.tensor(0.3), factor, 127)
        assert torch.isfinite(q).all() and torch.isfinite(factor.column_weight).all()
        assert all(f"gptq_damp={damp:g}" in str(remark.message) for remark in said)
    with pytest.warns(UserWarning, match=r"gptq_damp=1e-12 leaves second moments singular .*; raised to 1e-0"):
        factorize_hessian(few_tokens(), 1e-12)
    with pytest.raises(ExportError, match="no factor even at gptq_damp=10"):
        factorize_hessian(torch.full((4, 4), float("inf")), damp)


def test_clips_and_survives_a_silent_layer():
    w, _ = problem()
    q = gptq(100 * w, torch.tensor(0.1), factorize_hessian(torch.zeros(40, 40)), 7)
    assert q.abs().max() == 7 and torch.isfinite(q).all()
