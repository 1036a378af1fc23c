"""Elementwise chains with a backward pass of their own: half the passes over memory that autograd takes.

They are for eager float32 and float64 on a CPU. Elsewhere torch has kernels or a compiler for the plain expressions.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

BLOCK = 2**16  # logits that are worked on at a time


def _fuses(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.element_size() >= 4 and not torch.compiler.is_compiling()


def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last axis without a gain, in x's dtype: autocast on CUDA may widen it."""
    return _Norm.apply(x) if _fuses(x) else F.rms_norm(x, (x.size(-1),)).to(x.dtype)


class _Norm(Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        scale = x.square().mean(-1, keepdim=True).add_(torch.finfo(x.dtype).eps).rsqrt_()  # F.rms_norm does so
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        y, scale = ctx.saved_tensors
        return torch.addcmul(grad, y, (grad * y).mean(-1, keepdim=True), value=-1).mul_(scale)


def relu_squared(x: Tensor, slope: float = 0.0) -> Tensor:
    """x² above 0, (slope · x)² below."""
    return _ReluSquared.apply(x, slope) if _fuses(x) else _leaky(x, slope).square()


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
    """cap · tanh(logits / cap), in float32: in bfloat16, eager mode rounds three times and a compiled model once."""
    return _SoftCap.apply(logits, cap) if _fuses(logits) else cap * torch.tanh(logits.float() / cap)


class _SoftCap(Function):
    @staticmethod
    def forward(ctx, logits: Tensor, cap: float) -> Tensor:
        capped = torch.empty_like(logits, memory_format=torch.contiguous_format)
        for x, y in _blocks(logits, capped):
            torch.div(x, cap, out=y).tanh_().mul_(cap)
        ctx.save_for_backward(capped)
        ctx.slope = -1 / cap**2
        return capped

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (capped,) = ctx.saved_tensors
        result = torch.empty_like(capped)
        for g, y, out in _blocks(grad, capped, result):
            torch.addcmul(g, g * y, y, value=ctx.slope, out=out)  # the derivative is 1 - tanh²
        return result, None


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean nats of targets (N,) under logits (N, V)."""
    return _CrossEntropy.apply(logits, targets) if _fuses(logits) else F.cross_entropy(logits, targets)


class _CrossEntropy(Function):
    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor) -> Tensor:
        share, nats = 1 / len(logits), logits.new_zeros(())
        slope = torch.empty_like(logits, memory_format=torch.contiguous_format)
        for x, y, g in _blocks(logits, targets[:, None], slope):
            largest = x.amax(1, keepdim=True)
            sums = torch.sub(x, largest, out=g).exp_().sum(1, keepdim=True)
            nats += (sums.log() + largest - x.gather(1, y)).sum()
            g.mul_(share / sums).scatter_add_(1, y, g.new_full((1, 1), -share).expand_as(y))
        ctx.save_for_backward(slope)
        return nats * share

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0].mul_(grad), None  # in place: a second backward pass raises


def _blocks(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Matching rows of tensors (..., columns), few enough for a processor's cache."""
    rows = max(1, BLOCK // logits.size(-1))
    return zip(*(t.reshape(-1, t.size(-1)).split(rows) for t in (logits, *others)), strict=True)
