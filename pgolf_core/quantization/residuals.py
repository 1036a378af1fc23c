"""Residual corrections: which quantized matrices get one within a budget of bytes."""

import math

from torch import Tensor

from pgolf_core.knobs import ExportConfig
from pgolf_core.parameters import Role
from pgolf_core.quantization.calibration import Calibration, Statistics
from pgolf_core.quantization.lowrank import LowRank, low_rank
from pgolf_core.quantization.primitives import RankOne, rank_one
from pgolf_core.quantization.stored import Residual, Stored

EARLY_BLOCKS = 4  # 'early' in the names of residual modes

# mode -> quantizer knobs of the matrices that may have a residual, and whether only early blocks may
MODES = {
    "all_mlp_proj": (("mlp_out",), False),
    "all_attn_proj": (("attn_out",), False),
    "early_mlp_proj": (("mlp_out",), True),
    "early_combo": (("attn_out", "mlp_out"), True),
}


def choose_residuals(
    weights: dict[str, Tensor],
    tensors: dict[str, Stored],
    roles: dict[str, Role],
    config: ExportConfig,
    calibration: Calibration | None,
) -> dict[str, Residual]:
    """Residuals that fit the budget, taken by (priority, benefit per byte, benefit), largest first.

    weights, tensors: before and after quantization. Rank 1 in float16 is the reference's; any other is low-rank, its
    benefit in calibrated cost.
    """
    if not (config.int8_residual_rank and config.int8_residual_budget_bytes):
        return {}
    mode = config.int8_targeted_residual_mode
    fits = {
        name: _fit(weights[name].float() - t.dequantize(), calibration and calibration.get(name), config)
        for name, t in tensors.items()
        if weights[name].ndim == 2 and (mode not in MODES or _has_role(roles[name], *MODES[mode]))
    }

    def rank(name: str) -> tuple[bool, float, float]:
        _, size, benefit = fits[name]
        first = mode == "early_proj_combo" and _has_role(roles[name], *MODES["early_combo"])
        return first, benefit / size, benefit

    chosen: dict[str, Residual] = {}
    left = config.int8_residual_budget_bytes
    for name in sorted(fits, key=rank, reverse=True):
        residual, size, benefit = fits[name]
        if benefit > 0 and size <= left:
            chosen[name] = residual
            left -= size
    return chosen


def _has_role(role: Role, quantizers: tuple[str, ...], early: bool) -> bool:
    return role.quantizer_group in quantizers and (not early or (role.block is not None and role.block < EARLY_BLOCKS))


def _fit(error: Tensor, statistics: Statistics | None, config: ExportConfig) -> tuple[RankOne | LowRank, int, float]:
    """The residual of an error (rows, cols), its bytes before compression, and its benefit."""
    if not config.low_rank_residuals:
        fit = rank_one(error, config.int8_residual_power_iters)
        return fit, fit.bytes, fit.benefit
    fit, size = fit_residual(error, statistics, config)
    before, after = (
        statistics.cost(e) if statistics else e.square().sum().item() for e in (error, error - fit.dense())
    )
    return fit, size, before - after


def fit_residual(error: Tensor, statistics: Statistics | None, config: ExportConfig) -> tuple[LowRank, int]:
    """The low-rank form of an error (rows, cols) that the knobs ask for, and its bytes before compression."""
    hessian, row_weight = (statistics.hessian, statistics.row_weight) if statistics else (None, None)
    bits, rank = config.int8_residual_bits, min(config.int8_residual_rank, *error.shape)
    fit = low_rank(error, rank, bits, config.int8_residual_group, hessian, row_weight)
    scales = sum(2 * t.numel() for t in (fit.left_scale, fit.right_scale) if t is not None)
    return fit, math.ceil(bits * (fit.left.numel() + fit.right.numel()) / 8) + scales
