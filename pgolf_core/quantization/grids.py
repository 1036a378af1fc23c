"""Quantization grids: where the levels of a weight lie, and rounding onto them.

`QuantizedTensor.dequantize` is the way back from all grids.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pgolf_core.quantization.gptq import HessianFactor, gptq
from pgolf_core.quantization.primitives import SCALE_DTYPE, QuantizedTensor

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

    step_size = QuantizedTensor.step_size

    def round(self, w: Tensor, factor: HessianFactor | None = None, block: int = 128) -> QuantizedTensor:
        """w (rows, cols) at the nearest levels or, given a factor, by GPTQ; in the smallest integer type."""
        steps = self.step_size()  # type: ignore[misc]
        if factor is None:
            q = torch.clamp(torch.round(w.float() / steps), -self.qmax, self.qmax)
        else:
            q = gptq(w, steps, factor, self.qmax, block)
        dtype = torch.int8 if q.abs().max() <= 127 else torch.int16
        return QuantizedTensor(q.to(dtype), self.scale, self.axis, self.row_exponents, self.col_exponents)


def step_grid(w: Tensor, c: float, row_weight: Tensor | None = None, col_weight: Tensor | None = None) -> Grid:
    """Step sizes c·rms / √(row_weight · col_weight), with geometric mean c·rms: finer where errors cost more.

    Nothing is clipped. A squared error of a weight costs row_weight (rows,) · col_weight (cols,). At equal entropy the
    total cost is least if step² · weight is constant (reverse water-filling of independent sources; Cover & Thomas,
    Elements of Information Theory, 10.3.3).
    """
    rows, cols = (
        None if t is None else exponents((_raised(t) / geometric_mean(t)).rsqrt()) for t in (row_weight, col_weight)
    )
    return Grid(stored_scale(c * rms(w)), None, UNCLIPPED, rows, cols)


def rms(w: Tensor, dim: int | None = None) -> Tensor:
    """Root mean square, of each row when dim is 1."""
    squares = w.float().square()
    return (squares.mean() if dim is None else squares.mean(dim)).sqrt()


def geometric_mean(weight: Tensor) -> float:
    """Geometric mean of weights >= 0, small ones raised to the largest / WEIGHT_RANGE; 0 if all are 0."""
    return _raised(weight).log().mean().exp().item()


def _raised(weight: Tensor) -> Tensor:
    return weight.float().clamp_min(weight.max() / WEIGHT_RANGE)


def exponents(ratio: Tensor) -> Tensor:
    """Ratios as int8 exponents of 2^(1/4); 0 for a ratio of 0 or NaN."""
    ratio = torch.where(ratio > 0, ratio, 1.0)
    return torch.round(4 * ratio.log2()).clamp(-127, 127).to(torch.int8)


def stored_scale(scale: Tensor) -> Tensor:
    """Step sizes in float16; at least MIN_SCALE, also for a row of zeros."""
    return scale.clamp_min(MIN_SCALE).to(SCALE_DTYPE)
