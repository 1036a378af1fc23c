"""GPTQ: quantize columns in order; after each, update the remaining columns to compensate for its error.

Reference: Frantar et al. 2022, https://arxiv.org/abs/2210.17323. Rounding a row w to ŵ costs (w − ŵ) H (w − ŵ)ᵀ,
H being the second moments of the layer's inputs. With compensation column j contributes error² / Hinv_jj², where
Hinv is the upper Cholesky factor of H⁻¹.
"""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from pgolf_core.scheme import ExportError

MAX_DAMP = 10.0  # times the mean diagonal; above it columns are just rounded


@dataclass(frozen=True)
class HessianFactor:
    """perm (cols,): order in which columns are quantized. Hinv (cols, cols): upper Cholesky factor of H⁻¹, permuted."""

    perm: Tensor
    Hinv: Tensor

    @property
    def column_weight(self) -> Tensor:
        """Cost of a squared rounding error per column after compensation, (cols,) in the weight's own order."""
        weight = torch.empty_like(self.Hinv.diagonal())
        weight[self.perm] = self.Hinv.diagonal().square().reciprocal()
        return weight


def factorize_hessian(H: Tensor, damp: float = 0.01, act_order: bool = True) -> HessianFactor:
    """Factor H (cols, cols) once, for any number of `gptq` calls.

    damp: fraction of the mean diagonal added to the diagonal; where few tokens were seen and it is too small for a
    factor, it is raised tenfold until there is one, with a warning. act_order: columns of large inputs come first.
    """
    diagonal = H.diagonal()
    perm = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(len(diagonal))
    H, mean, used = H.double()[perm][:, perm], diagonal.double().mean().item(), damp
    while (Hinv := _inverse_factor(H, used * mean)) is None:
        if used >= MAX_DAMP:
            raise ExportError(f"second moments of inputs (mean {mean:.3g}) have no factor even at gptq_damp={used:g}")
        used = min(10 * used, MAX_DAMP)
    if used != damp:
        few = "calibration_tokens are few for it, or some inputs are far larger than others"
        warnings.warn(f"gptq_damp={damp:g} leaves second moments singular ({few}); raised to {used:g}", stacklevel=2)
    return HessianFactor(perm, Hinv)


def _inverse_factor(H: Tensor, damp: float) -> Tensor | None:
    """Upper Cholesky factor of (H + damp · I)⁻¹, float32; None if it is not finite or has a zero on its diagonal."""
    damped = H.clone()
    # The floor keeps a weight that no token reached (H = 0) factorizable: its columns are then just rounded.
    damped.diagonal().add_(max(damp, 1e-12))
    lower, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        return None
    Hinv, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    Hinv = Hinv.float()
    return None if failed or not (Hinv.isfinite().all() and Hinv.diagonal().all()) else Hinv


def gptq(W: Tensor, scale: Tensor, factor: HessianFactor, qmax: int, block_size: int = 128) -> Tensor:
    """Quantize W (rows, cols) column by column, compensating later columns; returns Q, whole float32 in ±qmax.

    scale: step size, broadcastable to W. block_size: columns between two updates of all later ones; affects speed,
    and the result only by rounding.
    """
    rows, cols = W.shape
    perm, Hinv = factor.perm, factor.Hinv
    W = W.float()[:, perm]  # a copy, updated in place
    scale = scale.expand(rows, cols)[:, perm]
    Q = torch.empty_like(W)
    for i1 in range(0, cols, block_size):
        i2 = min(i1 + block_size, cols)
        # Blocks are transposed, (block, rows): a column is then contiguous in memory.
        W_block, s, Hinv_block = W[:, i1:i2].T.contiguous(), scale[:, i1:i2].T.contiguous(), Hinv[i1:i2, i1:i2]
        err, Q_block = torch.empty_like(W_block), torch.empty_like(W_block)
        for j in range(i2 - i1):
            Q_block[j] = torch.clamp(torch.round(W_block[j] / s[j]), -qmax, qmax)
            err[j] = (W_block[j] - Q_block[j] * s[j]) / Hinv_block[j, j]
            W_block[j + 1 :].addr_(Hinv_block[j, j + 1 :], err[j], alpha=-1)  # compensate within the block
        Q[:, perm[i1:i2]] = Q_block.T
        W[:, i2:].addmm_(err.T, Hinv[i1:i2, i2:], alpha=-1)  # compensate all later columns once per block
    return Q
