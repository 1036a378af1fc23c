"""Where the levels of a weight lie: steps tied to σ, clipped, ternary, or as fine as the loss asks for.

A quantiser is a grid and a rounding onto it: to the nearest level (`to_nearest`), or column by column with mending
(`gptq.gptq`). `QuantizedTensor.dequantize` is the way back from all of them.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from pgolf_core.quantization.primitives import SCALE_DTYPE, AxisMode, QuantizedTensor, quantize, step_sizes

FINEST = 2.0**-20  # step that float16 still holds to four bits
UNCLIPPED = 32_767  # of int16: a grid without clipping
WEIGHT_RANGE = 2.0**16  # between the weights of two rows, so that a row no token reached does not stretch the grid


@dataclass(frozen=True)
class Grid:
    """Where a weight's levels lie: scale, axis and exponents as in QuantizedTensor, levels -qmax..qmax."""

    scale: Tensor
    axis: int | None
    qmax: int
    row_exponents: Tensor | None = None
    col_exponents: Tensor | None = None

    def step_size(self) -> Tensor:
        """float32, broadcastable to the weight."""
        return step_sizes(self.scale, self.axis, self.row_exponents, self.col_exponents)

    def with_levels(self, q: Tensor) -> QuantizedTensor:
        """Whole numbers q (rows, cols) on this grid, in the smallest integer type that holds them."""
        dtype = torch.int8 if q.abs().max() <= 127 else torch.int16
        return QuantizedTensor(q.to(dtype), self.scale, self.axis, self.row_exponents, self.col_exponents)


def to_nearest(w: Tensor, grid: Grid) -> QuantizedTensor:
    """Round every weight (rows, cols) to the nearest level."""
    return grid.with_levels(torch.clamp(torch.round(w.float() / grid.step_size()), -grid.qmax, grid.qmax))


def absmax_grid(w: Tensor, bits: int, axis: AxisMode = "auto") -> Grid:
    """The levels that `quantize` uses, for a rounding of its own."""
    quantized = quantize(w, bits, axis)
    return Grid(quantized.scale, quantized.axis, 2 ** (bits - 1) - 1)


def sdclip_grid(w: Tensor, bits: int, k: float) -> Grid:
    """2^bits − 1 levels a row over ±k·σ of that row. Size then depends on bits and k, not on how large weights grew."""
    qmax = 2 ** (bits - 1) - 1
    return Grid(_float16(k * rms(w, 1) / qmax), 0, qmax)


def step_grid(w: Tensor, c: float, per: Literal["tensor", "row"] = "tensor") -> Grid:
    """Steps of c·σ, σ of the whole tensor or of each row, nothing clipped.

    A row's σ is kept to a quarter of an octave, in a byte that codes to three bits.
    """
    spread = rms(w)
    grid = Grid(_float16(c * spread), None, UNCLIPPED)
    return grid if per == "tensor" else replace(grid, row_exponents=_exponents(rms(w, 1) / spread))


def weighted_grid(w: Tensor, c: float, row_weight: Tensor | None, col_weight: Tensor | None) -> Grid:
    """Steps finer in the rows and columns whose errors cost more: c·σ / √(row_weight · col_weight), geometric mean c·σ.

    A squared error of a weight costs row_weight (rows,) · col_weight (cols,). At equal entropy the total cost is
    least when every weight's share of it is the same, that is, when step² · weight is constant (reverse
    water-filling of independent sources; Cover & Thomas, Elements of Information Theory, 10.3.3).
    """
    return Grid(
        _float16(c * rms(w)),
        None,
        UNCLIPPED,
        None if row_weight is None else _exponents(_evened(row_weight).rsqrt()),
        None if col_weight is None else _exponents(_evened(col_weight).rsqrt()),
    )


def ternary_grid(w: Tensor) -> Grid:
    """Levels −s, 0, s a row. Weights beyond 0.7 of the row's mean |w| count as large; s is their mean.

    Source: Ternary Weight Networks, Li et al. 2016, https://arxiv.org/abs/1605.04711. The levels round at s/2,
    which is where the squared error is least for a given s.
    """
    magnitude = w.float().abs()
    large = magnitude > 0.7 * magnitude.mean(1, keepdim=True)
    return Grid(_float16((magnitude * large).sum(1) / large.sum(1).clamp_min(1)), 0, 1)


def rms(w: Tensor, dim: int | None = None) -> Tensor:
    """Root mean square, of each row when dim is 1."""
    squares = w.float().square()
    return (squares.mean() if dim is None else squares.mean(dim)).sqrt()


def geometric_mean(weight: Tensor) -> float:
    """Of weights no further apart than WEIGHT_RANGE; 0 where there are none."""
    weight = weight.float()
    if not (weight > 0).any():
        return 0.0
    return weight.clamp_min(weight.max() / WEIGHT_RANGE).log().mean().exp().item()


def _evened(weight: Tensor) -> Tensor:
    """Weights over their geometric mean; all 1 where there are none."""
    if (mean := geometric_mean(weight)) == 0:
        return torch.ones_like(weight, dtype=torch.float32)
    return weight.float().clamp_min(weight.max() / WEIGHT_RANGE) / mean


def _exponents(ratio: Tensor) -> Tensor:
    """Ratios as int8 quarter octaves; 0 for a ratio of 0."""
    ratio = torch.where(ratio > 0, ratio, 1.0)
    return torch.round(4 * ratio.log2()).clamp(-127, 127).to(torch.int8)


def _float16(scale: Tensor) -> Tensor:
    """Steps as they are stored. A row of zeros, or one too fine for float16, gets FINEST."""
    return scale.clamp_min(FINEST).to(SCALE_DTYPE)
