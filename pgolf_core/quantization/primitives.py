"""Tensor ↔ integers and scales; rank-1 residuals.

`quantize` is the reference's symmetric quantizer, schemes/ has the others; `QuantizedTensor.dequantize` undoes them
all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pgolf_core.quantization.stored import FLOATS, INTEGERS, checked, stored_form

CLIP_QUANTILE = 0.9999984  # quantile of |w| along a channel at which it is clipped
SCALE_DTYPE = torch.float16

AxisMode = Literal["auto", "row", "col"]


@stored_form("int")
@dataclass(frozen=True)
class QuantizedTensor:
    """Levels q (int8 or int16) of the weight's shape, and the step size between two levels.

    scale: float16 (rows,) for axis 0, (cols,) for axis 1; one number for axis None. row_exponents (rows,),
    col_exponents (cols,): int8; if given, the step size of a row or column is the scale times 2^(exponent / 4).
    """

    q: Tensor
    scale: Tensor
    axis: int | None
    row_exponents: Tensor | None = None
    col_exponents: Tensor | None = None

    def arrays(self) -> dict[str, Tensor]:
        """Kind -> tensor; whether axis is 1 is kept beside them."""
        fields = {"q": self.q, "scale": self.scale, "rows": self.row_exponents, "cols": self.col_exponents}
        return {kind: t for kind, t in fields.items() if t is not None}

    @classmethod
    def from_arrays(cls, arrays: dict[str, Tensor], axis_1: bool = False) -> QuantizedTensor:
        """Raises KeyError or ValueError on arrays that do not fit each other."""
        q, scale = arrays["q"], arrays["scale"]
        axis = int(axis_1) if scale.ndim else None
        # Only a tensor with nothing but one scale has another number of dimensions than two.
        q = checked(arrays, "q", INTEGERS, *(q.shape if len(arrays) + scale.ndim == 2 else [-1, -1]))
        checked(arrays, "scale", FLOATS, *([] if axis is None else [q.size(axis)]))
        sizes = {"rows": q.size(0), "cols": q.size(1)} if len(arrays) > 2 else {}
        exponents = {kind: checked(arrays, kind, INTEGERS[:1], n) for kind, n in sizes.items() if kind in arrays}
        return cls(q, scale, axis, exponents.get("rows"), exponents.get("cols"))

    @property
    def shape(self) -> torch.Size:
        return self.q.shape

    def step_size(self) -> Tensor:
        """float32, broadcastable to q."""
        sizes = self.scale.float()
        if self.axis == 0:
            sizes = sizes[:, None]
        if self.row_exponents is not None:
            sizes = sizes * exp2_quarters(self.row_exponents)[:, None]
        if self.col_exponents is not None:
            sizes = sizes * exp2_quarters(self.col_exponents)
        return sizes

    def dequantize(self) -> Tensor:
        """float32 of q's shape."""
        return self.q.float() * self.step_size()


def exp2_quarters(exponents: Tensor) -> Tensor:
    """2^(exponents / 4), float32; by a table of four and exact powers of two, so the same on every machine."""
    table = torch.tensor([1.0, 1.189207115002721, 1.4142135623730951, 1.681792830507429])
    k = exponents.to(torch.int64)
    return torch.ldexp(table[k % 4], torch.div(k, 4, rounding_mode="floor"))


def clip_quantile(magnitude: Tensor) -> Tensor:
    """The CLIP_QUANTILE quantile of each row of (channels, n) by linear interpolation, as torch.quantile.

    For rows of up to 600,000 elements it lies between the two largest, so no sort is needed.
    """
    n = magnitude.size(1)
    rank = np.float32(CLIP_QUANTILE) * np.float32(n - 1)
    if n == 1 or rank < n - 2:
        return torch.quantile(magnitude, CLIP_QUANTILE, dim=1) if n > 1 else magnitude[:, 0]
    largest, second = magnitude.topk(2, dim=1).values.unbind(1)
    return torch.lerp(second, largest, float(rank - np.float32(n - 2)))  # a number: nothing is sent to a GPU


def quantize_rows(w: Tensor, qmax: int) -> tuple[Tensor, Tensor]:
    """(rows, n) float32 -> q (rows, n) of whole float32 numbers in ±qmax, scale (rows,) float32."""
    clip = clip_quantile(w.abs())
    clipped = torch.clamp(w, -clip[:, None], clip[:, None])
    scale = (clip / qmax).clamp_min(1.0 / qmax)
    return torch.clamp(torch.round(clipped / scale[:, None]), -qmax, qmax), scale


def quantize(w: Tensor, bits: int = 8, axis: AxisMode = "auto") -> QuantizedTensor:
    """Symmetric integers of `bits` bits with one scale per row ('row') or column ('col').

    'auto' takes the axis of smaller squared error, on a tie the one of fewer scales. A tensor that is not
    2-D gets a single scale. Raises ValueError on an empty tensor or one holding NaN or infinity.
    """
    if w.numel() == 0 or not torch.isfinite(w).all():
        raise ValueError(f"cannot quantise a tensor of shape {tuple(w.shape)} that is empty or not finite")
    w = w.detach().float()
    qmax = 2 ** (bits - 1) - 1
    if w.ndim != 2:
        q, scale = quantize_rows(w.reshape(1, -1), qmax)
        return QuantizedTensor(q.reshape(w.shape).to(torch.int8), scale[0], None)

    def along(axis: int) -> QuantizedTensor:
        q, scale = quantize_rows(w.T if axis else w, qmax)
        return QuantizedTensor((q.T if axis else q).contiguous().to(torch.int8), scale.to(SCALE_DTYPE), axis)

    if axis != "auto":
        return along(("row", "col").index(axis))
    return min(along(0), along(1), key=lambda t: (relative_error(w, t.dequantize()), t.scale.numel()))


def relative_error(w: Tensor, approximation: Tensor) -> float:
    """Squared error over squared norm."""
    norm = w.float().square().mean().clamp_min(1e-12)
    return ((w.float() - approximation.float()).square().mean() / norm).item()


@dataclass(frozen=True)
class RankOne:
    """The residual outer(left, right); left (rows,) and right (cols,) are float16."""

    left: Tensor
    right: Tensor

    def arrays(self) -> dict[str, Tensor]:
        return {"left": self.left, "right": self.right}

    @classmethod
    def from_arrays(cls, arrays: dict[str, Tensor]) -> RankOne:
        return cls(*(checked(arrays, kind, FLOATS[:1], -1) for kind in ("left", "right")))

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.left), len(self.right)

    def dequantize(self) -> Tensor:
        return torch.outer(self.left.float(), self.right.float())


def leading_pair(residual: Tensor, power_iters: int) -> tuple[Tensor, Tensor]:
    """Leading singular pair of (rows, cols) by power iteration from its column mean squares.

    left (rows,) carries the singular value, right (cols,) has unit length; float32.
    """
    right = residual.square().mean(dim=0)
    right = right / right.norm().clamp_min(1e-8)
    for _ in range(power_iters):
        left = residual @ right
        left = left / left.norm().clamp_min(1e-8)
        right = residual.T @ left
        sigma = right.norm()
        right = right / sigma.clamp_min(1e-8)
    return left * sigma, right
