"""Compression regularizers: differentiable penalties on weights (weights → scalar) and the schedule of their use.

The terms compare a tensor with its quantised form, through which no gradient flows.
"""

import torch
from torch import Tensor, nn

from pgolf_core.config import RunConfig
from pgolf_core.parameters import roles_of
from pgolf_core.quantization.primitives import SCALE_DTYPE, AxisMode, leading_pair, quantize_rows

EPSILON = 1e-6  # below any weight that matters; keeps quotients finite


def reconstruction(w: Tensor, w_hat: Tensor) -> Tensor:
    """Mean squared error of the quantised tensor."""
    return (w - w_hat).square().mean()


def grid(w: Tensor, scale: Tensor) -> Tensor:
    """Mean squared distance to the nearest step; scale broadcasts to w."""
    u = torch.clamp(w / scale, -127, 127)
    return (u - u.detach().round()).square().mean()


def scale_smoothness(w: Tensor) -> Tensor:
    """Mean squared difference of the log RMS of neighbouring rows."""
    # Clamped before the root, whose slope is infinite at a row of zeros; projections start as zeros.
    log_rms = w.square().mean(dim=1).clamp_min(EPSILON**2).sqrt().log()
    return log_rms.diff().square().mean()


def ternary(w: Tensor) -> Tensor:
    """Mean squared distance to {-s, 0, s}, s the mean magnitude."""
    s = w.abs().mean().clamp_min(EPSILON)
    return (w - s * torch.clamp(torch.round(w / s), -1, 1).detach()).square().mean()


def outlier(w: Tensor) -> Tensor:
    """Mean over rows of the largest magnitude, over the mean magnitude."""
    magnitude = w.abs()
    return magnitude.amax(dim=1).mean() / (magnitude.mean() + EPSILON)


@torch.no_grad()
def _as_exported(w: Tensor, bits: int, axis: AxisMode) -> tuple[Tensor, Tensor, Tensor]:
    """Dequantised tensor (rows, cols), its scales broadcastable to it, and a 0-d bool, true if scales are per row.

    Both axes are computed and one selected on the device, so that no step synchronises with the host.
    """
    qmax = 2 ** (bits - 1) - 1
    (q, scale), (q_t, scale_t) = quantize_rows(w, qmax), quantize_rows(w.T, qmax)
    row_scale, col_scale = scale.to(SCALE_DTYPE).float()[:, None], scale_t.to(SCALE_DTYPE).float()[None, :]
    by_row, by_col = q * row_scale, q_t.T * col_scale
    if axis == "auto":
        row_error, col_error = (w - by_row).square().mean(), (w - by_col).square().mean()
        fewer_rows = w.size(0) <= w.size(1)
        rows = (row_error <= col_error) if fewer_rows else (row_error < col_error)
    else:
        rows = torch.full((), axis == "row", device=w.device)  # filled on the device
    return torch.where(rows, by_row, by_col), torch.where(rows, row_scale, col_scale), rows


class CompressionRegularizer:
    """`regularizer(step)` -> (mean over the sampled tensors, their names); (zero, []) on a step without a penalty.

    The caller multiplies by compression_reg_weight. Candidates are all parameters but the control ones, largest
    first; each due step samples the next few and a window of columns of each.
    """

    def __init__(self, model: nn.Module, config: RunConfig):
        self.roles = roles_of(model)
        matrices = [(name, p) for name, p in model.named_parameters() if not self.roles[name].is_control]
        self.candidates = sorted(matrices, key=lambda item: -item[1].numel())  # stable: ties keep model order
        self.config = config

    def __call__(self, step: int) -> tuple[Tensor, list[str]]:
        c = self.config
        started = c.compression_reg_weight > 0 and step >= c.compression_reg_warmup_steps
        if not started or step % c.compression_reg_interval:
            return torch.zeros((), device=self.candidates[0][1].device), []
        n = len(self.candidates)
        k = min(c.compression_reg_sample_tensors, n)
        sampled = [self.candidates[(step * k + o) % n] for o in range(k)]
        values = [self._value(name, p, 131 * step + 17 * o) for o, (name, p) in enumerate(sampled)]
        return torch.stack(values).mean(), [name for name, _ in sampled]

    def _value(self, name: str, parameter: Tensor, start: int) -> Tensor:
        c = self.config
        width = parameter.size(1)
        cols = min(width, c.compression_reg_max_cols)
        start %= width - cols + 1
        w = parameter[:, start : start + cols].float()
        bits = c.embed_bits if self.roles[name].kind == "embedding" else c.weight_quantization_bits
        if bits == 16:  # stored in float16: no quantisation error to reduce
            return w.sum() * 0.0
        w_hat, scale, rows = _as_exported(w.detach(), bits, c.int8_axis_mode)

        def with_rank1() -> Tensor:
            return w_hat + torch.outer(*leading_pair(w.detach() - w_hat, c.int8_residual_power_iters))

        residuals = c.int8_residual_rank and c.int8_residual_budget_bytes  # else the export would store none
        terms = [
            (c.compression_grid_reg_weight, lambda: grid(w, scale)),
            (c.compression_scale_reg_weight, lambda: torch.where(rows, scale_smoothness(w), scale_smoothness(w.T))),
            (c.compression_rank1_reg_weight if residuals else 0, lambda: reconstruction(w, with_rank1())),
            (c.ternary_reg_weight, lambda: ternary(w)),
            (c.outlier_reg_weight, lambda: outlier(w)),
        ]
        return sum((weight * term() for weight, term in terms if weight), start=reconstruction(w, w_hat))
