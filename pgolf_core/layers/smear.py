"""SmearGate: a token takes a gated part of the token before it. The first token of a document takes nothing."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgolf_core.knobs import BOS, ModelConfig
from pgolf_core.parameters import CONTROL, declare

WIDTH = 12  # first dimensions of a token that the gate of v2 reads


class SmearGate(nn.Module):
    """v1: (1 − σ(g)) · x[t] + σ(g) · x[t−1], g per dimension; v2: x[t] + λ · σ(g · x[t, :12]) · x[t−1]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        v1 = config.smear_gate == "v1"
        self.gate = nn.Parameter(torch.zeros(config.model_dim if v1 else min(WIDTH, config.model_dim)))
        self.strength = None if v1 else nn.Parameter(torch.zeros(()))
        declare(self, CONTROL)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        """x (B, T, D) of the tokens ids (B, T) -> (B, T, D)."""
        before = F.pad(x, (0, 0, 1, -1)).masked_fill((ids == BOS)[..., None], 0)
        gate = self.gate.to(x.dtype)
        if self.strength is None:
            return torch.lerp(x, before, torch.sigmoid(gate))
        share = torch.sigmoid((x[..., : len(gate)] * gate).sum(-1, keepdim=True))
        return x + self.strength.to(x.dtype) * share * before
