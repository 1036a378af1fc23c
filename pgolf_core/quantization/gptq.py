"""Rounding one column at a time, each next column mended for the errors made so far (GPTQ).

Source: Frantar et al. 2022, https://arxiv.org/abs/2210.17323. The error of rounding a row w to ŵ is
(w − ŵ) H (w − ŵ)ᵀ with H the second moments of the layer's inputs. Once a column is rounded the ones not yet
rounded can make up for part of its error; what is left of it is error² · importance, with importance = 1/U_jj² and
U the upper Cholesky factor of H⁻¹.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Order:
    """Of one weight's columns: `order` (cols,) in which they are rounded, `upper` (cols, cols) in that order."""

    order: Tensor
    upper: Tensor

    @property
    def column_weight(self) -> Tensor:
        """(cols,) in the weight's own order: what a squared rounding error of a column costs after the mending."""
        weight = torch.empty_like(self.upper.diagonal())
        weight[self.order] = self.upper.diagonal().square().reciprocal()
        return weight


def prepare(hessian: Tensor, damp: float = 0.01, act_order: bool = True) -> Order:
    """Factor (cols, cols) second moments once, for any number of `gptq` calls.

    damp: share of the mean diagonal that is added to it. act_order rounds columns of large inputs first.
    """
    diagonal = hessian.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(len(diagonal))
    damped = hessian.double()[order][:, order]
    # A weight that no token reached has no moments at all; any order and no mending is right for it.
    damped.diagonal().add_(max(damp * diagonal.double().mean().item(), 1e-12))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return Order(order, torch.linalg.cholesky(inverse, upper=True).float())


def gptq(w: Tensor, steps: Tensor, order: Order, qmax: int, block: int = 128) -> Tensor:
    """(rows, cols) weights -> whole numbers q (rows, cols) float32 in ±qmax, so that q · steps is near w for the loss.

    steps: broadcastable to w, the distance between the levels of each weight. block: columns between two updates
    of all later ones; it decides the speed, not the result beyond rounding.
    """
    rows, cols = w.shape
    left = w.float()[:, order.order]  # a copy: columns not yet rounded, mended as the others are
    grid = steps.expand(rows, cols)[:, order.order]
    q = torch.empty_like(left)
    for start in range(0, cols, block):
        end = min(start + block, cols)
        current, upper = left[:, start:end].T.contiguous(), order.upper[start:end, start:end]  # (block, rows)
        errors = torch.empty_like(current)
        step, rounded = grid[:, start:end].T.contiguous(), torch.empty_like(current)
        for j in range(end - start):
            rounded[j] = torch.clamp(torch.round(current[j] / step[j]), -qmax, qmax)
            errors[j] = (current[j] - rounded[j] * step[j]) / upper[j, j]
            current[j + 1 :].addr_(upper[j, j + 1 :], errors[j], alpha=-1)
        q[:, start:end] = rounded.T
        left[:, end:].addmm_(errors.T, order.upper[start:end, end:], alpha=-1)
    result = torch.empty_like(q)
    result[:, order.order] = q
    return result
