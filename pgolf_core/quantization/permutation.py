"""Neuron permutation: sort the hidden neurons of each MLP, so that similar rows are neighbours.

Applied to both matrices of an MLP it leaves the function as it is, and zlib needs fewer bytes.
"""

import math
import re

import torch
from torch import Tensor

from pgolf_core.quantization.primitives import QuantizedTensor
from pgolf_core.quantization.stored import Stored


def neuron_permutations(tensors: dict[str, Stored]) -> dict[str, tuple[Tensor, int]]:
    """Name -> (order, axis) for both matrices of each MLP whose matrices are integers."""
    integers = {name: t for name, t in tensors.items() if isinstance(t, QuantizedTensor)}
    orders = {}
    for fc in integers:
        if match := re.fullmatch(r"(blocks\.\d+\.mlp\.)fc\.weight", fc):
            proj = match[1] + "proj.weight"
            if proj in integers:
                order = _order(integers[fc], integers[proj])  # type: ignore[arg-type]
                orders |= {fc: (order, 0), proj: (order, 1)}
    return orders


def _order(fc: QuantizedTensor, proj: QuantizedTensor) -> Tensor:
    """(hidden,) indices, sorted by fc scale, proj scale, Σ|q| of the fc row and proj column, four row entries."""
    hidden, width = fc.q.shape
    keys = [
        fc.scale.float() if fc.axis == 0 else torch.zeros(hidden),
        proj.scale.float() if proj.axis == 1 else torch.zeros(hidden),
        fc.q.abs().sum(dim=1),
        proj.q.abs().sum(dim=0),
        *(fc.q[:, i] for i in range(0, width, math.ceil(width / 4))),
    ]
    order = torch.arange(hidden)
    for key in reversed(keys):  # stable sorts from the last key to the first make a lexicographic one
        order = order[torch.argsort(key[order], stable=True)]
    return order


def permute(t: QuantizedTensor, order: Tensor, axis: int) -> QuantizedTensor:
    """t with its rows (axis 0) or columns (axis 1) in that order."""

    def moved(values: Tensor | None, their_axis: int | None) -> Tensor | None:
        return values[order] if values is not None and their_axis == axis else values

    q, scale = t.q.index_select(axis, order).contiguous(), moved(t.scale, t.axis)
    return QuantizedTensor(q, scale, t.axis, moved(t.row_exponents, 0), moved(t.col_exponents, 1))
