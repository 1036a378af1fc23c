"""Quantization grids: where the levels of a weight lie, and rounding onto them.

Rounding is to the nearest level, or column by column with error compensation (GPTQ). `QuantizedTensor.dequantize` is
the way back from all grids.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from pgolf_core.quantization.gptq import gptq
from pgolf_core.quantization.primitives import SCALE_DTYPE, QuantizedTensor, step_sizes
from pgolf_core.scheme import FitContext

MIN_SCALE = 2.0**-20  # float16 still holds it to four bits
UNCLIPPED = 32_767  # qmax of a grid without clipping: int16's largest
WEIGHT_RANGE = 2.0**16  # largest ratio of two rows' weights, so that a row no token reached does not stretch the grid


@dataclass(frozen=True)
class Grid:
    """Levels -qmax..qmax of a weight; scale, axis and exponents as in QuantizedTensor."""

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


def round_to(grid: Grid, w: Tensor, context: FitContext) -> QuantizedTensor:
    """Round w (rows, cols) to the nearest level or, if the context has a factor, by GPTQ."""
    if context.factor is None:
        return to_nearest(w, grid)
    return grid.with_levels(gptq(w, grid.step_size(), context.factor, grid.qmax, context.gptq_block))


def step_grid(w: Tensor, c: float, per: Literal["tensor", "row"] = "tensor") -> Grid:
    """Step size c·rms, of the whole tensor or of each row, nothing clipped.

    A row's rms is stored as a power of 2^(1/4): one byte, some three bits after entropy coding.
    """
    whole = rms(w)
    grid = Grid(stored_scale(c * whole), None, UNCLIPPED)
    return grid if per == "tensor" else replace(grid, row_exponents=_exponents(rms(w, 1) / whole))


def weighted_grid(w: Tensor, c: float, row_weight: Tensor | None, col_weight: Tensor | None) -> Grid:
    """Step sizes c·rms / √(row_weight · col_weight), with geometric mean c·rms: finer where errors cost more.

    A squared error of a weight costs row_weight (rows,) · col_weight (cols,). At equal entropy the total cost is
    least if step² · weight is constant (reverse water-filling of independent sources; Cover & Thomas, Elements of
    Information Theory, 10.3.3).
    """
    rows, cols = (t if t is None else _exponents(_evened(t).rsqrt()) for t in (row_weight, col_weight))
    return Grid(stored_scale(c * rms(w)), None, UNCLIPPED, rows, cols)


def rms(w: Tensor, dim: int | None = None) -> Tensor:
    """Root mean square, of each row when dim is 1."""
    squares = w.float().square()
    return (squares.mean() if dim is None else squares.mean(dim)).sqrt()


def geometric_mean(weight: Tensor) -> float:
    """Geometric mean of weights >= 0, small ones raised to the largest / WEIGHT_RANGE; 0 if all are 0."""
    weight = weight.float()
    return weight.clamp_min(weight.max() / WEIGHT_RANGE).log().mean().exp().item()


def _evened(weight: Tensor) -> Tensor:
    """Weights over their geometric mean; all 1 if all are 0."""
    if (mean := geometric_mean(weight)) == 0:
        return torch.ones_like(weight, dtype=torch.float32)
    return weight.float().clamp_min(weight.max() / WEIGHT_RANGE) / mean


def _exponents(ratio: Tensor) -> Tensor:
    """Ratios as int8 exponents of 2^(1/4); 0 for a ratio of 0."""
    ratio = torch.where(ratio > 0, ratio, 1.0)
    return torch.round(4 * ratio.log2()).clamp(-127, 127).to(torch.int8)


def stored_scale(scale: Tensor) -> Tensor:
    """Step sizes in float16; at least MIN_SCALE, also for a row of zeros."""
    return scale.clamp_min(MIN_SCALE).to(SCALE_DTYPE)
