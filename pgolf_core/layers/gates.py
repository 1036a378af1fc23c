"""Gates of attention's heads, computed from its input, and of skip connections, a learned vector each."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgolf_core.knobs import ModelConfig
from pgolf_core.parameters import CONTROL, declare


class HeadGates(nn.Module):
    """Factors σ(scale · W u) of the heads' outputs, where u is attention's input.

    dense: W reads all of u (https://arxiv.org/abs/2505.06708); sparse: its first entries; doubled: 2σ of these.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        dense = config.attn_gate == "dense"
        self.scale, self.most = config.attn_gate_scale, 2.0 if config.attn_gate == "doubled" else 1.0
        width = config.model_dim if dense else config.attn_gate_width
        self.weight = nn.Parameter(torch.zeros(config.num_layers, config.num_heads, width))
        declare(self, CONTROL)
        if dense:
            nn.init.normal_(self.weight, std=0.005)

    def forward(self, layer: int, u: Tensor) -> Tensor:
        """u (B, T, D) -> factors (B, H, T, 1)."""
        weight = self.weight[layer].to(u.dtype)
        gate = torch.sigmoid(self.scale * F.linear(u[..., : weight.size(1)], weight))  # (B, T, H)
        return self.most * gate.transpose(1, 2)[..., None]


class SkipGates(nn.Module):
    """σ(g) · x + (1 − σ(g)) · skip for each of the skip connections; the half of both at the start."""

    def __init__(self, skips: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(skips, dim))
        declare(self, CONTROL)

    def forward(self, i: int, x: Tensor, skip: Tensor) -> Tensor:
        return torch.lerp(skip, x, torch.sigmoid(self.weight[i]).to(x.dtype))
