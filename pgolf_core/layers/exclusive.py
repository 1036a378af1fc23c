"""Exclusive self-attention (XSA): outputs orthogonal to the token's own value. https://arxiv.org/abs/2603.09078"""

import torch.nn.functional as F
from torch import Tensor


def exclusive(y: Tensor, v: Tensor) -> Tensor:
    """y (B, H, T, C) without its part along the token's own value, v (B, K, T, C) of the group of heads."""
    unit = F.normalize(v.to(y.dtype), dim=-1)[:, :, None]  # (B, K, 1, T, C)
    grouped = y.unflatten(1, (v.size(1), -1))  # (B, K, H/K, T, C)
    return (grouped - (grouped * unit).sum(-1, keepdim=True) * unit).flatten(1, 2)
