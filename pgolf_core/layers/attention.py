"""Causal attention: grouped-query heads, QK norm, rotary positions, an optional window.

Shapes: B sequences, T positions, D model, H heads, K key/value heads, C head dimension, R of it rotated.
"""

from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import flex_attention as flex

from pgolf_core.knobs import BOS, ModelConfig
from pgolf_core.layers.exclusive import exclusive
from pgolf_core.layers.fused import KEPT, KEPT_LOW, fuses, norm
from pgolf_core.layers.layer import Layer
from pgolf_core.parameters import declare, matrix

Mask = Tensor | flex.BlockMask | None  # None = plain causal attention
Positions = tuple[Tensor, Tensor, Mask]  # cos and sin (T, R/2), mask
TRITON = find_spec("triton") is not None  # asked once: a graph cannot ask


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first R dimensions of each head of x (B, T, H, C), as pairs (first half, second half) of them.

    cos and sin: (T, R/2), as rotary_angles gives them.
    """
    cos, sin = cos[:, None], sin[:, None]
    if x.requires_grad and fuses(x):
        from pgolf_core.layers.fused import rotary  # a reader of files needs no gradients: not counted

        return rotary(x, cos, sin)
    R = 2 * cos.size(-1)
    x1, x2 = x[..., :R].chunk(2, dim=-1)  # (B, T, H, R/2) each
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin, x[..., R:]), dim=-1)


def rotary_angles(length: int, dims: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of shape (T, R/2), float32, for R = dims."""
    frequency = 1 / base ** (torch.arange(0, dims, 2, dtype=torch.float32, device=device) / dims)
    angle = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequency)
    return angle.cos(), angle.sin()


def window_mask(length: int, window: int, device: torch.device, document: Tensor | None = None) -> Mask:
    """Query i sees key j iff 0 <= i - j < window and, with document (B, T) given, both are in the same one.

    (T, T) or (B, 1, T, T) bool, or FlexAttention's blocks on a GPU with Triton.
    """

    def sees(b, h, i, j):
        seen = (i >= j) & (i - j < window)
        return seen if document is None else seen & (document[b, i] == document[b, j])

    rows = None if document is None else len(document)
    if device.type == "cuda" and TRITON:
        return flex.create_block_mask(sees, rows, None, length, length, device=device)
    position = torch.arange(length, device=device)
    b = None if document is None else torch.arange(rows, device=device)[:, None, None, None]
    return sees(b, None, position[:, None], position[None, :])


def within_documents(positions: Positions, ids: Tensor, config: ModelConfig) -> Positions:
    """With document_mask, positions whose mask ends each token's sight at the BOS of its document; ids (B, T)."""
    if not config.document_mask:
        return positions
    T, document = ids.size(1), (ids == BOS).cumsum(1)
    return *positions[:2], window_mask(T, config.window_size or T, ids.device, document)


@cache
def compiled_flex_attention():
    """FlexAttention for a model that is not compiled; uncompiled, it would hold the scores (T, T) of every head."""
    return torch.compile(flex.flex_attention)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """q (B, H, T, C), k and v (B, K, T, C) -> (B, H, T, C)."""
    k, v, gqa = k.to(q.dtype), v.to(q.dtype), k.size(1) != q.size(1)
    kept = KEPT_LOW if torch.is_autocast_enabled("cpu") else KEPT
    if fuses(q) and q.requires_grad and mask is None and q[..., 0].numel() * q.size(2) <= kept:
        from pgolf_core.layers.fused import causal_attention  # not counted either

        return causal_attention(q, k, v)
    if mask is None or isinstance(mask, Tensor):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=gqa)
    flex_attention = flex.flex_attention if torch.compiler.is_compiling() else compiled_flex_attention()
    return flex_attention(q, k, v, block_mask=mask, enable_gqa=gqa)


class CausalSelfAttention(nn.Module):
    """Grouped-query attention with QK norm, rotary positions and a learned gain per query head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        D, kv_dim = config.model_dim, config.num_kv_heads * config.head_dim
        self.c_q = declare(nn.Linear(D, D, bias=False), matrix("attn_in"))
        self.c_k = declare(nn.Linear(D, kv_dim, bias=False), matrix("attn_in"))
        self.c_v = declare(nn.Linear(D, kv_dim, bias=False), matrix("attn_in"))
        self.proj = declare(nn.Linear(D, D, bias=False), matrix("attn_out"))
        nn.init.zeros_(self.proj.weight)

    def forward(self, x: Tensor, layer: Layer, positions: Positions) -> Tensor:
        """x (B, T, D) -> (B, T, D)."""
        cos, sin, mask = positions
        B, T, D = x.shape
        q = self.c_q(x).view(B, T, self.num_heads, self.head_dim)
        k = self.c_k(x).view(B, T, self.num_kv_heads, self.head_dim)
        v = self.c_v(x) if layer.value is None else self.c_v(x) + layer.value
        v = v.view(B, T, self.num_kv_heads, self.head_dim)
        q, k = norm(q), norm(k)
        q, k = apply_rotary_emb(q, cos, sin), apply_rotary_emb(k, cos, sin)
        q = q * layer.q_gain.to(q.dtype)[:, None]
        # Transposed only now: a compiler lays memory out in the order of what it computes, and kernels return q's.
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = attention(q, k, v, mask)  # (B, H, T, C)
        if layer.exclusive:
            y = exclusive(y, v)
        if layer.gate is not None:
            y = y * layer.gate(x)
        return self.proj(y.transpose(1, 2).reshape(B, T, D))
