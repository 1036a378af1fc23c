"""Elementwise chains with their own backward pass against the plain expressions that they stand for."""

import pytest
import torch
import torch.nn.functional as F

from pgolf_core.layers import fused
from pgolf_core.layers.attention import apply_rotary_emb, rotary_angles

CAP = 3.0
CHAINS = {
    "rotary": (lambda x: fused.rotary(x, *angles(x)), lambda x: rotated(x, *angles(x))),
    "norm": (fused.norm, lambda x: F.rms_norm(x, (x.size(-1),))),
    "relu_squared": (fused.relu_squared, lambda x: F.relu(x).square()),
    "capped_cross_entropy": (
        lambda x: fused.capped_cross_entropy(x.flatten(0, -2), targets(x), CAP),
        lambda x: F.cross_entropy(CAP * torch.tanh(x.flatten(0, -2) / CAP), targets(x)),
    ),
}


def targets(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(x[..., 0].numel()) * 7 % x.size(-1)


def angles(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(a.to(x.dtype) for a in rotary_angles(x.size(-2), 6, 10.0, x.device))


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The first six dimensions turned in pairs, as complex numbers; the others as they are."""
    pairs = torch.complex(x[..., :3], x[..., 3:6]) * torch.complex(cos, -sin)
    return torch.cat((pairs.real, pairs.imag, x[..., 6:]), -1)


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
def test_in_bfloat16_only_what_goes_in_and_comes_out_is_rounded(name):
    ours, plain = CHAINS[name]
    low = torch.randn(2, 40, 13, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16).requires_grad_()
    wide = low.detach().float().requires_grad_()
    y, z = ours(low), plain(wide)
    upstream = torch.randn_like(z).to(y.dtype)
    y.backward(upstream), z.backward(upstream.float())
    torch.testing.assert_close(y.float(), z, rtol=2**-7, atol=2**-7)
    assert low.grad.dtype == torch.bfloat16
    torch.testing.assert_close(low.grad.float(), wide.grad, rtol=2**-6, atol=2**-6 * wide.grad.abs().mean().item())


@pytest.mark.parametrize("name", CHAINS)
def test_forward_keeps_the_bits_of_scores(name):
    """Files scored before are scored alike; the loss of training alone sums in another order."""
    x = 5 * torch.randn(2, 40, 64)
    ours, plain = (chain(x) for chain in CHAINS[name])
    assert torch.equal(ours, plain) or (name == "capped_cross_entropy" and torch.allclose(ours, plain, rtol=1e-6))


@pytest.mark.parametrize("heads, kv_heads, length", [(2, 2, 7), (6, 3, 64), (4, 1, 150)])
def test_attention_and_its_gradients_are_torchs_own(heads, kv_heads, length):
    draw = torch.Generator().manual_seed(0)
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float64, 1e-12)):
        results = []
        sides = [torch.randn(3, length, h, 8, generator=draw, dtype=dtype) for h in (heads, kv_heads, kv_heads)]
        upstream = torch.randn(3, heads, length, 8, generator=draw, dtype=dtype)
        for own in (
            fused.causal_attention,
            lambda *qkv: F.scaled_dot_product_attention(*qkv, None, 0, True, enable_gqa=True),
        ):
            q, k, v = (side.clone().transpose(1, 2).requires_grad_() for side in sides)
            y = own(q, k, v)
            results.append((y, *torch.autograd.grad(y, (q, k, v), upstream)))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_rotation_has_the_same_bits_with_a_gradient_and_without():
    x, turns = torch.randn(2, 40, 3, 16), rotary_angles(40, 6, 10.0, torch.device("cpu"))
    assert torch.equal(apply_rotary_emb(x, *turns), apply_rotary_emb(x.requires_grad_(), *turns))
