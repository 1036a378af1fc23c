"""Allocation: a step size for every row and column of every tensor, so that the file fits the cap and loses least.

Calibration gives the sensitivity of each weight: nats per squared error (`Statistics`, `HessianFactor.column_weight`).
With a uniform step the squared error is step²/12, and one bit more halves the step, whatever the weight. The cheapest
file of a given size therefore has the same step² · sensitivity everywhere (reverse water-filling: Cover & Thomas,
Elements of Information Theory, 10.3.3). One number is left to find: lam, the square root of that product.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from pgolf_core.knobs import ExportConfig
from pgolf_core.quantization.calibration import Calibration, Statistics
from pgolf_core.quantization.gptq import HessianFactor, factorize_hessian
from pgolf_core.quantization.grids import Grid, geometric_mean, rms, step_grid
from pgolf_core.quantization.residuals import fit_low_rank
from pgolf_core.quantization.stored import Quantized
from pgolf_core.scheme import ExportError

MIN_CAP_FILL = 0.9985  # share of the cap at which the search stops
MAX_ITERS = 24
MAX_REL_STEP = 64.0  # geometric mean of the steps in σ of a tensor; above it almost all weights round to zero
MAX_SCALE = 32_768.0  # half of what float16 holds
MAX_LEVEL = 8_000  # levels on each side of zero; int16 holds four times that, room for error compensation


class AllocationError(ValueError):
    """A cap that no allocation meets; the message says how far it is."""


@dataclass(frozen=True)
class Solution:
    """lam: square root of step² · sensitivity, in nats^½ per token. bytes: file and code. predicted: nats per token."""

    quantized: Quantized
    lam: float
    bytes: int
    predicted: float


def solve(
    weights: dict[str, Tensor],
    floats: dict[str, Tensor],
    calibration: Calibration,
    config: ExportConfig,
    file_bytes: Callable[[Quantized], int],
) -> Quantized:
    """The quantised model whose file and code take 99.85 to 100 % of config.cap_bytes.

    weights: every matrix, with its statistics in calibration; floats: what is stored as it is; file_bytes:
    of the file and the code that reads it. int8_residual_rank > 0 also gives a tensor a low-rank residual where that
    wins more for its bytes than finer steps would. Less than the whole cap is used only where the finest steps there
    are fit it. Raises AllocationError when nothing fits.
    """
    factors = {n: factorize_hessian(calibration[n].hessian, config.gptq_damp, config.gptq_act_order) for n in weights}

    def at(lam: float, residuals: tuple[str, ...] = ()) -> Solution:
        integers, low_ranks, predicted = {}, {}, 0.0
        for name, w in weights.items():
            grid = grid_at(lam, w, calibration[name], factors[name])
            integers[name] = grid.round(w, factors[name], config.gptq_block)
            if not integers[name].scale.isfinite():
                raise ExportError.too_large(name)
            error = w - integers[name].dequantize()
            if name in residuals:
                low_ranks[name], _, _ = fit_low_rank(error, calibration[name], config)
                error = error - low_ranks[name].dequantize()
            predicted += calibration[name].cost(error)
        quantized = Quantized(integers, low_ranks, floats)
        return Solution(quantized, lam, file_bytes(quantized), predicted)

    parameters = sum(w.numel() for w in weights.values())
    best = search(at, config.cap_bytes, parameters)
    if not config.int8_residual_rank:
        return best.quantized
    coarser = at(1.1 * best.lam)
    nats_per_byte = (coarser.predicted - best.predicted) / max(best.bytes - coarser.bytes, 1)  # won by finer steps
    if chosen := residuals_worth_their_bytes(best.quantized, nats_per_byte, weights, calibration, config):
        with_residuals = search(lambda lam: at(lam, chosen), config.cap_bytes, parameters, best.lam)
        best = min((best, with_residuals), key=lambda solution: solution.predicted)
    return best.quantized


def grid_at(lam: float, w: Tensor, statistics: Statistics, factor: HessianFactor) -> Grid:
    """Grid of w with steps lam / √sensitivity; sensitivity (row, col) = row_weight · column_weight, nats / error²."""
    row_weight, col_weight = statistics.row_weight / statistics.tokens, factor.column_weight
    sensitivity = geometric_mean(row_weight) * geometric_mean(col_weight)
    size = max(rms(w).item(), 1e-38)
    c = min(lam / math.sqrt(max(sensitivity, 1e-38)) / size, MAX_REL_STEP, MAX_SCALE / size)
    levels = (w.abs() / step_grid(w, 1.0, row_weight, col_weight).step_size()).max().item()
    return step_grid(w, max(c, levels / MAX_LEVEL), row_weight, col_weight)


def search(at: Callable[[float], Solution], cap: int, parameters: int, lam: float = 1e-4) -> Solution:
    """The finest solution that fits the cap, filling MIN_CAP_FILL of it if there is one."""
    coarse = fine = None  # brackets: one that fits, one that does not
    for _ in range(MAX_ITERS):
        solution = at(lam)
        if solution.bytes <= cap:
            if coarse is not None and solution.bytes == coarse.bytes and 8 * solution.bytes > 2 * parameters:
                return solution  # the finest there is; at the coarsest, where sizes are equal too, go on
            coarse = solution if coarse is None or solution.bytes > coarse.bytes else coarse
            if solution.bytes >= MIN_CAP_FILL * cap:
                return solution
        else:
            fine = solution if fine is None or solution.bytes < fine.bytes else fine
        lam = _next_lam(solution, coarse, fine, cap, parameters)
    if coarse is None:
        raise AllocationError(
            f"cap_bytes={cap}: with the coarsest steps file and code take {fine.bytes:,} bytes; raise cap_bytes or "
            "train a smaller model"
        )
    return coarse


def _next_lam(last: Solution, coarse: Solution | None, fine: Solution | None, cap: int, parameters: int) -> float:
    """Next lam to try: interpolated between the brackets; without one, one bit per weight for each factor of two."""
    target = (1 + MIN_CAP_FILL) / 2 * cap
    if coarse is None or fine is None:
        octaves = (last.bytes - target) / (parameters / 8)
        return last.lam * 2 ** max(-3.0, min(3.0, octaves + math.copysign(0.02, octaves)))
    share = (fine.bytes - target) / max(fine.bytes - coarse.bytes, 1)
    share = min(max(share, 0.02), 0.98)
    return math.exp((1 - share) * math.log(fine.lam) + share * math.log(coarse.lam))


def residuals_worth_their_bytes(
    quantized: Quantized,
    nats_per_byte: float,
    weights: dict[str, Tensor],
    calibration: Calibration,
    config: ExportConfig,
) -> tuple[str, ...]:
    """Tensors whose low-rank residual wins more nats per byte than finer steps do."""
    fits = {n: fit_low_rank(weights[n] - t.dequantize(), calibration[n], config) for n, t in quantized.tensors.items()}
    return tuple(name for name, (_, size, benefit) in fits.items() if benefit > nats_per_byte * size)
