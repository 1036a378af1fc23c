"""Residual corrections: which quantized matrices get one within a budget of bytes."""

import math

from torch import Tensor

from pgolf_core.knobs import ExportConfig
from pgolf_core.parameters import Role
from pgolf_core.quantization.calibration import Calibration, Statistics
from pgolf_core.quantization.lowrank import LowRank, low_rank
from pgolf_core.quantization.primitives import SCALE_DTYPE, RankOne, leading_pair
from pgolf_core.quantization.stored import Stored

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
) -> dict[str, RankOne | LowRank]:
    """Residuals that fit the budget, taken by (priority, benefit per byte, benefit), largest first.

    weights, tensors: before and after quantization. Rank 1 in float16 is the reference's; any other is low-rank and
    needs calibration.
    """
    if not (config.int8_residual_rank and config.int8_residual_budget_bytes):
        return {}
    mode = config.int8_targeted_residual_mode
    fits: dict[str, tuple[RankOne | LowRank, int, float]] = {}
    errors = {
        name: weights[name].float() - t.dequantize()
        for name, t in tensors.items()
        if weights[name].ndim == 2 and (mode not in MODES or _has_role(roles[name], *MODES[mode]))
    }
    if mode == "largest_3":
        errors = dict(sorted(errors.items(), key=lambda item: -item[1].norm())[:3])
    for name, error in errors.items():
        if config.low_rank_residuals:
            fits[name] = fit_low_rank(error, calibration[name], config)
        else:
            fits[name] = fit_rank_one(error, config.int8_residual_power_iters)

    def rank(name: str) -> tuple[bool, float, float]:
        _, size, benefit = fits[name]
        first = mode == "early_proj_combo" and _has_role(roles[name], *MODES["early_combo"])
        return first, benefit / size, benefit

    chosen: dict[str, RankOne | LowRank] = {}
    left = config.int8_residual_budget_bytes
    for name in sorted(fits, key=rank, reverse=True):
        residual, size, benefit = fits[name]
        if benefit > 0 and size <= left:
            chosen[name] = residual
            left -= size
    return chosen


def _has_role(role: Role, quantizers: tuple[str, ...], early: bool) -> bool:
    return role.quantizer_group in quantizers and (not early or (role.block is not None and role.block < EARLY_BLOCKS))


def fit_rank_one(error: Tensor, power_iters: int) -> tuple[RankOne, int, float]:
    """The reference's residual of an error (rows, cols), its bytes before compression, and its benefit.

    benefit: decrease of the squared error.
    """
    fit = RankOne(*(factor.to(SCALE_DTYPE) for factor in leading_pair(error, power_iters)))
    benefit = error.square().sum() - (error - fit.dequantize()).square().sum()
    return fit, 2 * sum(error.shape), benefit.item()


def fit_low_rank(error: Tensor, statistics: Statistics, config: ExportConfig) -> tuple[LowRank, int, float]:
    """The low-rank residual of an error, its bytes before compression, and its benefit in nats per token."""
    bits, rank = config.int8_residual_bits, min(config.int8_residual_rank, *error.shape)
    fit = low_rank(error, rank, bits, config.int8_residual_group, statistics.hessian, statistics.row_weight)
    scales = sum(2 * t.numel() for t in (fit.left_scale, fit.right_scale) if t is not None)
    size = math.ceil(bits * (fit.left.numel() + fit.right.numel()) / 8) + scales
    return fit, size, statistics.cost(error) - statistics.cost(error - fit.dequantize())
