"""Parts of one layer besides its block of weights, which several layers may share."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from pgolf_core.layers.fused import norm


class Layer(NamedTuple):
    q_gain: Tensor  # (H,)
    attn_scale: Tensor  # (D,)
    mlp_scale: Tensor  # (D,)
    parallel: bool = True  # whether the MLP reads what attention reads, or its result
    norm_scale: float = 1.0
    exclusive: bool = False  # see exclusive.py
    gate: Callable[[Tensor], Tensor] | None = None  # (B, T, D) -> (B, H, T, 1), see gates.py
    value: Tensor | None = None  # (B, T, K·C), see value_embedding.py

    def norm(self, x: Tensor) -> Tensor:
        return norm(x) if self.norm_scale == 1 else self.norm_scale * norm(x)
