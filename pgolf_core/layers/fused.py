"""Elementwise chains and attention with a backward pass of their own: about half of what autograd takes.

They are for eager code on a CPU. Elsewhere torch has kernels or a compiler for the plain expressions. What is kept of
bfloat16 activations is bfloat16; sums and rotations are float32, and attention is, which follows a rotation.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

BLOCK = 2**16  # logits that are worked on at a time
QUERIES = 64  # positions of a head whose scores are worked on at a time
KEPT = 2**24  # probabilities of a layer's attention; more are left to torch, which keeps none
KEPT_LOW = 2**22  # the same under autocast, which lets torch take bfloat16: faster where there are more


def fuses(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last axis without a gain, in x's dtype: autocast on CUDA may widen it."""
    return _Norm.apply(x) if fuses(x) else F.rms_norm(x, (x.size(-1),)).to(x.dtype)


class _Norm(Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        wide = x if x.element_size() >= 4 else x.float()
        scale = wide.square().mean(-1, keepdim=True).add_(torch.finfo(wide.dtype).eps).rsqrt_()  # F.rms_norm does so
        y = (wide * scale).to(x.dtype)
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        y, scale = ctx.saved_tensors
        wide, y = grad.to(scale.dtype), y.to(scale.dtype)
        return torch.addcmul(wide, y, (wide * y).mean(-1, keepdim=True), value=-1).mul_(scale).to(grad.dtype)


def relu_squared(x: Tensor, slope: float = 0.0) -> Tensor:
    """x² above 0, (slope · x)² below."""
    return _ReluSquared.apply(x, slope) if fuses(x) else _leaky(x, slope).square()


def _leaky(x: Tensor, slope: float) -> Tensor:
    return F.leaky_relu(x, slope) if slope else F.relu(x)


class _ReluSquared(Function):
    @staticmethod
    def forward(ctx, x: Tensor, slope: float) -> Tensor:
        y = _leaky(x, slope)
        ctx.save_for_backward(y)
        ctx.slope = slope
        return y.square()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        grad = (grad * y).mul_(2)
        return (torch.ops.aten.leaky_relu_backward(grad, y, ctx.slope, True) if ctx.slope else grad), None


def softcap(logits: Tensor, cap: float) -> Tensor:
    """cap · tanh(logits / cap); not in bfloat16, where eager mode rounds three times and a compiled model once."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (logits / cap).tanh_() * cap


def capped_cross_entropy(logits: Tensor, targets: Tensor, cap: float) -> Tensor:
    """Mean nats of targets (N,) under softcap(logits, cap), logits (N, V)."""
    if fuses(logits):
        return _CappedCrossEntropy.apply(logits, targets, cap)
    return F.cross_entropy(softcap(logits, cap), targets)


class _CappedCrossEntropy(Function):
    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, cap: float) -> Tensor:
        wide, share = torch.promote_types(logits.dtype, torch.float32), 1 / len(logits)
        nats, slope = logits.new_zeros((), dtype=wide), torch.empty_like(logits, memory_format=torch.contiguous_format)
        for x, y, rows in _blocks(logits, targets[:, None], slope):
            tanh = (x.to(wide) / cap).tanh_()
            largest = tanh.amax(1, keepdim=True)
            p = (tanh - largest).mul_(cap).exp_()
            sums = p.sum(1, keepdim=True)
            nats += (sums.log() + cap * (largest - tanh.gather(1, y))).sum()
            p.mul_(share / sums).scatter_add_(1, y, p.new_full((1, 1), -share).expand_as(y))
            rows.copy_(p.addcmul_(p, tanh.square_(), value=-1))
        ctx.save_for_backward(slope)
        return nats * share

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.saved_tensors[0].mul_(grad), None, None  # in place: a second backward pass raises


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """apply_rotary_emb, whose gradient is a rotation too, back."""
    return _Rotary.apply(x, cos, sin)


class _Rotary(Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    y = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
    (x1, x2), (y1, y2) = (t[..., : 2 * cos.size(-1)].chunk(2, dim=-1) for t in (x, y))
    y1.mul_(cos).add_(x2 * sin)
    y2.mul_(cos).sub_(x1 * sin)
    return y


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (B, H, T, C), k and v (B, K, T, C) -> (B, H, T, C); keeps its probabilities for the backward pass."""
    groups = (q * q.size(-1) ** -0.5).unflatten(1, (k.size(1), -1)).flatten(0, 1)
    return _Attention.apply(groups, k.flatten(0, 1), v.flatten(0, 1)).reshape(q.shape)


class _Attention(Function):
    """q (N, G, T, C), scaled: G heads for each of the keys and values, both (N, T, C)."""

    @staticmethod
    @torch.autocast("cpu", enabled=False)
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y, kept = torch.empty_like(q), []
        for start, stop in _spans(q):
            scores = (q[:, :, start:stop].flatten(1, 2) @ k[:, :stop].mT).unflatten(1, (-1, stop - start))
            future = torch.ones(stop - start, stop - start, dtype=torch.bool).triu(1)
            scores[..., start:].masked_fill_(future, -torch.inf)
            kept.append(scores.softmax(-1).flatten(1, 2))
            y[:, :, start:stop] = (kept[-1] @ v[:, :stop]).view_as(y[:, :, start:stop])
        ctx.save_for_backward(q, k, v, y, *kept)
        return y

    @staticmethod
    @once_differentiable
    @torch.autocast("cpu", enabled=False)
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, y, *kept = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        share = (grad * y).sum(-1, keepdim=True)
        for (start, stop), p in zip(_spans(q), kept, strict=True):
            own_q, own_grad, own_share = (x[:, :, start:stop].flatten(1, 2) for x in (q, grad, share))
            dv[:, :stop].baddbmm_(p.mT, own_grad)
            dscores = (own_grad @ v[:, :stop].mT).sub_(own_share).mul_(p)
            dq[:, :, start:stop] = (dscores @ k[:, :stop]).view_as(dq[:, :, start:stop])
            dk[:, :stop].baddbmm_(dscores.mT, own_q)
        return dq, dk, dv


def _spans(q: Tensor) -> list[tuple[int, int]]:
    return [(start, min(start + QUERIES, q.size(2))) for start in range(0, q.size(2), QUERIES)]


def _blocks(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Matching rows of tensors (..., columns), few enough for a processor's cache."""
    rows = max(1, BLOCK // logits.size(-1))
    return zip(*(t.reshape(-1, t.size(-1)).split(rows) for t in (logits, *others)), strict=True)
