"""Two residual lanes: attention reads the first and the MLP the second, and each writes into both."""

import torch
from torch import Tensor, nn

from pgolf_core.parameters import CONTROL, declare


class TwoLanes(nn.Module):
    def __init__(self, layers: int):
        super().__init__()
        self.keep = nn.Parameter(torch.full((layers, 2), 1.1))
        self.write = nn.Parameter(torch.ones(layers, 2, 2))  # [layer, attention or MLP, lane]
        declare(self, CONTROL)

    def forward(self, i: int, lanes: tuple[Tensor, Tensor], written: tuple[Tensor, Tensor]) -> list[Tensor]:
        """Lanes after layer i, which has written this; all (B, T, D)."""
        attn, mlp = written
        keep, write = self.keep[i].to(attn.dtype), self.write[i].to(attn.dtype)
        return [keep[j] * lane + write[0, j] * attn + write[1, j] * mlp for j, lane in enumerate(lanes)]
