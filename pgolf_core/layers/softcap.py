"""Soft cap of the logits with learned limits, one above zero and one below."""

import torch
from torch import Tensor, nn

from pgolf_core.parameters import CONTROL, declare


class AsymmetricSoftcap(nn.Module):
    def __init__(self, cap: float):
        super().__init__()
        self.caps = nn.Parameter(torch.full((2,), cap))
        declare(self, CONTROL)

    def forward(self, logits: Tensor) -> Tensor:
        logits = logits.float()
        caps = torch.where(logits > 0, self.caps[0], self.caps[1])
        return caps * torch.tanh(logits / caps)
