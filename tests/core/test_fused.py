"""Elementwise chains with their own backward pass against the plain expressions that they stand for."""

import pytest
import torch
import torch.nn.functional as F

from pgolf_core.layers import fused

CAP = 3.0
CHAINS = {
    "norm": (fused.norm, lambda x: F.rms_norm(x, (x.size(-1),))),
    "relu_squared": (fused.relu_squared, lambda x: F.relu(x).square()),
    "softcap": (lambda x: fused.softcap(x, CAP), lambda x: CAP * torch.tanh(x / CAP)),
    "cross_entropy": (
        lambda x: fused.cross_entropy(x.flatten(0, -2), targets(x)),
        lambda x: F.cross_entropy(x.flatten(0, -2), targets(x)),
    ),
}


def targets(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(x[..., 0].numel()) * 7 % x.size(-1)


@pytest.mark.parametrize("block", [1, 40, 2**16])  # rows of 13: one, three, all at a time
@pytest.mark.parametrize("name", CHAINS)
def test_value_and_gradient_are_the_plain_expressions(name, block, monkeypatch):
    monkeypatch.setattr(fused, "BLOCK", block)
    ours, plain = CHAINS[name]
    for scale in (1e-6, 1.0, 200.0):  # exp(200) is no float32
        x = (scale * torch.randn(5, 2, 13, generator=torch.Generator().manual_seed(0))).transpose(0, 1)
        for dtype, rtol in ((torch.float32, 2e-6), (torch.float64, 1e-12)):
            got, expected = (x.to(dtype, copy=True).requires_grad_() for _ in range(2))
            y, z = ours(got), plain(expected)
            torch.testing.assert_close(y, z, rtol=rtol, atol=rtol * z.detach().abs().mean().item())
            upstream = torch.randn_like(z)
            y.backward(upstream), z.backward(upstream)
            atol = 10 * rtol * expected.grad.abs().mean().item() + 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(got.grad, expected.grad, rtol=10 * rtol, atol=atol)


@pytest.mark.parametrize("name", CHAINS)
def test_forward_keeps_the_bits_of_scores(name):
    """Files scored before are scored alike; the loss of training alone sums in another order."""
    x = 5 * torch.randn(2, 40, 64)
    ours, plain = (chain(x) for chain in CHAINS[name])
    assert torch.equal(ours, plain) or (name == "cross_entropy" and torch.allclose(ours, plain, rtol=1e-6))
