"""Allocation: a step size for every row and column of every tensor, so that the file fits the cap and loses least.

Calibration gives the sensitivity of each weight: nats per squared error (`Statistics`, `HessianFactor.column_weight`).
With a uniform step the squared error is step²/12, and one bit more halves the step, whatever the weight. The cheapest
file of a given size therefore has the same step² · sensitivity everywhere (reverse water-filling: Cover & Thomas,
Elements of Information Theory, 10.3.3). One number is left to find: lam, the square root of that product.
"""

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pgolf_core.knobs import ExportConfig
from pgolf_core.quantization.calibration import Calibration, Statistics
from pgolf_core.quantization.gptq import HessianFactor, factorize_hessian
from pgolf_core.quantization.grids import MIN_SCALE, Grid, geometric_mean, rms, step_grid, stored_scale
from pgolf_core.quantization.residuals import fit_low_rank
from pgolf_core.quantization.stored import Quantized
from pgolf_core.scheme import ExportError

MIN_CAP_FILL = 0.9985  # share of the cap at which the search stops
MAX_ITERS = 24
MAX_RATIO = 1.25  # true over estimated bytes of weights, at most
FEW_ROWS = 32  # an estimate looks at that many at least, at a fourth of them at least
MAX_COUNTED = 2**15  # levels that an estimate tells apart
# Tables and GPTQ's compensation add these bytes to a weight's, half of them where its nearest level takes so many:
# LOG.md has the measurement.
EXCESS_BYTES = 0.25 / 8
HALF_EXCESS_AT = 0.08 / 8
MAX_REL_STEP = 64.0  # geometric mean of the steps in σ of a tensor; above it almost all weights round to zero
MAX_SCALE = 32_768.0  # half of what float16 holds
MAX_LEVEL = 8_000  # levels on each side of zero; int16 holds four times that, room for error compensation


class AllocationError(ValueError):
    """A cap that no allocation meets; the message says how far it is."""


@dataclass(frozen=True)
class Solution:
    """lam: square root of step² · sensitivity, in nats^½ per token. bytes: file and code."""

    quantized: Quantized
    lam: float
    bytes: int


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
    grids = {name: step_grids(w, calibration[name], factors[name]) for name, w in weights.items()}
    limits = min(finest for _, finest, _ in grids.values()), max(coarsest for _, _, coarsest in grids.values())

    def at(lam: float, residuals: tuple[str, ...] = ()) -> Solution:
        integers, low_ranks = {}, {}
        for name, w in weights.items():
            integers[name] = grids[name][0](lam).round(w, factors[name], config.gptq_block)
            if not integers[name].scale.isfinite():
                raise ExportError.too_large(name)
            if name in residuals:
                low_ranks[name], _, _ = fit_low_rank(w - integers[name].dequantize(), calibration[name], config)
        quantized = Quantized(integers, low_ranks, floats)  # type: ignore[arg-type]
        return Solution(quantized, lam, file_bytes(quantized))

    def predicted(solution: Solution) -> float:
        """Rise of the loss in nats per token."""
        read = solution.quantized.state_dict()
        return sum(calibration[name].cost(w - read[name]) for name, w in weights.items())

    def estimate(lam: float) -> float:
        """Bytes of the weights, nearly: a few rows of each at the nearest level, under their entropy."""
        nearest = sum(_entropy_bytes(w, grids[name][0](lam).step_size()) for name, w in weights.items())  # type: ignore[misc]
        return nearest * (1 + EXCESS_BYTES / (nearest / parameters + HALF_EXCESS_AT))

    parameters = sum(w.numel() for w in weights.values())
    sizes = SizeEstimate(estimate, file_bytes(Quantized({}, {}, floats)), parameters, limits)
    best = search(at, config.cap_bytes, sizes)
    if not config.int8_residual_rank:
        return best.quantized
    coarser = at(1.1 * best.lam)
    nats_per_byte = (predicted(coarser) - predicted(best)) / max(best.bytes - coarser.bytes, 1)  # won by finer steps
    if chosen := residuals_worth_their_bytes(best.quantized, nats_per_byte, weights, calibration, config):
        sizes.correct(best)
        with suppress(AllocationError):  # residuals may be too large for any steps
            best = min((best, search(lambda lam: at(lam, chosen), config.cap_bytes, sizes, best.lam)), key=predicted)
    return best.quantized


def _entropy_bytes(w: Tensor, steps: Tensor) -> float:
    """Entropy of w (rows, cols) at the nearest levels, in bytes, given the magnitudes of its rows and columns.

    Of some rows if there are many; the classes are nearly those of the codec 'ans'.
    """
    every = max(1, min(4, len(w) // FEW_ROWS))
    x = (w[::every] / steps[::every]).float().nan_to_num().clamp(-MAX_COUNTED, MAX_COUNTED)
    rows, cols = (2 * x.abs().mean(dim).clamp(2**-10, 2**20).log2() for dim in (1, 0))
    classes = (rows[:, None] + cols + 40).round().long().flatten()  # from 0 to 120
    q = torch.round(x).long().flatten()
    return (_entropy((q - q.min()) * 128 + classes) - _entropy(classes)) / math.log(256) * w.numel()


def _entropy(symbols: Tensor) -> float:
    """Nats per symbol, of int64 >= 0; Miller and Madow's correction for symbols that were seen too rarely."""
    counts = torch.bincount(symbols)
    counts = counts[counts > 0].double()
    return torch.special.entr(counts / counts.sum()).sum().item() + (len(counts) - 1) / (2 * len(symbols))


class SizeEstimate:
    """Bytes of a file by lam: `weights(lam)`, an estimate that costs little, corrected by the files made so far.

    fixed: bytes of all but the weights. parameters: how many weights there are. limits: of lam.
    """

    def __init__(self, weights: Callable[[float], float], fixed: int, parameters: int, limits: tuple[float, float]):
        self.weights, self.fixed, self.parameters, self.limits = weights, fixed, parameters, limits
        self.ratio, self.rest = 1.0, float(fixed)  # bytes: rest + ratio · weights(lam)

    def correct(self, solution: Solution) -> None:
        """Fit the last file; what is far beyond the estimate is tables, which do not shrink with the weights'."""
        weights = self.weights(solution.lam)
        self.ratio = min((solution.bytes - self.fixed) / max(weights, 1), MAX_RATIO)
        self.rest = solution.bytes - self.ratio * weights

    def __call__(self, lam: float) -> float:
        return self.rest + self.ratio * self.weights(lam)

    def lam(self, size: float, near: float) -> float:
        """lam at which a file takes about `size` bytes, by the secant method from a lam near it."""
        slope, lam = -self.parameters / 8, max(self.limits[0], min(self.limits[1], near))
        estimated = self(lam)
        for _ in range(MAX_ITERS):
            octaves = max(-3.0, min(3.0, (size - estimated) / slope))
            if abs(octaves) < 1e-5:
                break
            before, last, lam = estimated, lam, max(self.limits[0], min(self.limits[1], lam * 2**octaves))
            if lam == last:
                break
            estimated = self(lam)
            slope = min((estimated - before) / octaves, slope / 4)
        return lam


def step_grids(
    w: Tensor, statistics: Statistics, factor: HessianFactor
) -> tuple[Callable[[float], Grid], float, float]:
    """lam -> grid of w with steps lam / √sensitivity; the lams where they are at their finest and at their coarsest.

    sensitivity (row, col) = row_weight · column_weight, nats / error².
    """
    row_weight, col_weight = statistics.row_weight / statistics.tokens, factor.column_weight
    unit = replace(step_grid(w, 1.0, row_weight, col_weight), scale=torch.ones(()))  # geometric mean 1
    size = rms(w)
    finite = min(max(size.item(), 1e-38), 1e38)  # a scale of inf is refused later
    levels = (w.abs() / unit.step_size()).max().item() / finite  # type: ignore[misc]
    finest = max(levels / MAX_LEVEL, MIN_SCALE / finite)
    coarsest = max(min(MAX_REL_STEP, MAX_SCALE / finite), finest)
    lams = finite * math.sqrt(max(geometric_mean(row_weight) * geometric_mean(col_weight), 1e-38))

    def at(lam: float) -> Grid:
        return replace(unit, scale=stored_scale(max(min(lam / lams, coarsest), finest) * size))

    return at, finest * lams, coarsest * lams


def search(at: Callable[[float], Solution], cap: int, sizes: SizeEstimate, lam: float = 1e-4) -> Solution:
    """The finest solution that fits the cap, filling MIN_CAP_FILL of it if there is one; lam: near the first tried.

    Estimated until files lie on both sides of the cap, then interpolated: mostly two to four are made, more where a
    weight takes a tenth of a bit.
    """
    best = coarse = fine = None  # brackets: the last that fits, the last that does not
    target = (1 + MIN_CAP_FILL) / 2 * cap
    lam = sizes.lam(target, lam)
    for _ in range(MAX_ITERS):
        solution = at(lam)
        if solution.bytes <= cap:
            if solution.bytes >= MIN_CAP_FILL * cap or lam <= sizes.limits[0]:
                return solution
            coarse, best = solution, solution if best is None or solution.bytes >= best.bytes else best
        else:
            fine = solution
            if lam >= sizes.limits[1]:
                break
        if coarse and fine:
            share = min(max((fine.bytes - target) / (fine.bytes - coarse.bytes), 0.1), 0.9)
            lam = fine.lam ** (1 - share) * coarse.lam**share
        else:
            sizes.correct(solution)
            lam = sizes.lam(target, lam)
    if best is None:
        raise AllocationError(
            f"cap_bytes={cap}: with the coarsest steps file and code take {fine.bytes:,} bytes; raise cap_bytes or "
            "train a smaller model"
        )
    return best


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
