"""The decoder, read top to bottom: embed; layers of attention and MLP in parallel, with skips between them; project.

Shapes: B sequences, T positions, V vocabulary, D model, E embedding, L layers, H heads, C head dimension.
Parameter names are the reference trainer's, so its state dicts load here.
"""

from collections.abc import Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgolf_core.knobs import ModelConfig
from pgolf_core.layers.attention import CausalSelfAttention, Positions, rotary_angles, window_mask, within_documents
from pgolf_core.layers.fused import cross_entropy, norm, relu_squared, softcap
from pgolf_core.layers.gates import HeadGates, SkipGates
from pgolf_core.layers.layer import Layer
from pgolf_core.parameters import CONTROL, EMBEDDING, HEAD, Role, declare, matrix, roles_for, roles_of


class MLP(nn.Module):
    """Two matrices with relu², or its leaky form, between them."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, hidden = config.model_dim, config.mlp_mult * config.model_dim
        self.fc = declare(nn.Linear(D, hidden, bias=False), matrix("mlp_in"))
        self.proj = declare(nn.Linear(hidden, D, bias=False), matrix("mlp_out"))
        self.slope = config.mlp_slope
        nn.init.zeros_(self.proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(relu_squared(self.fc(x), self.slope))  # (B, T, D)


class Block(nn.Module):
    """Attention and MLP that read the same x. Layers may share a block; a Layer is what each has of its own."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attn = CausalSelfAttention(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, layer: Layer, positions: Positions) -> Tensor:
        """x (B, T, D) -> (B, T, D)."""
        y = layer.norm(x)
        attn, mlp = self.attn(y, layer, positions), self.mlp(y)
        return x + layer.attn_scale.to(x.dtype) * attn + layer.mlp_scale.to(x.dtype) * mlp


class GPT(nn.Module):
    """Token ids (B, T) -> logits (B, T, V)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        L, D = config.num_layers, config.model_dim
        E = config.embed_dim or D
        self.tok_emb = declare(nn.Embedding(config.vocab_size, E), EMBEDDING)
        self.tok_emb_proj = declare(nn.Linear(E, D, bias=False), matrix("embed")) if E < D else None
        self.skip_weights = nn.Parameter(torch.ones(L // 2, D))
        self.q_gains = nn.Parameter(torch.full((L, config.num_heads), config.qk_gain_init))
        self.attn_scales = nn.Parameter(torch.ones(L, D))
        self.mlp_scales = nn.Parameter(torch.ones(L, D))
        self.resid_mixes = nn.Parameter(torch.stack((torch.ones(L, D), torch.zeros(L, D)), dim=1))  # (L, 2, D)
        declare(self, CONTROL, "skip_weights", "q_gains", "attn_scales", "mlp_scales", "resid_mixes")
        self.skip_gates = SkipGates(*self.skip_weights.shape) if config.skip_gates else None
        self.head_gates = HeadGates(config) if config.attn_gate != "off" else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.block_of_layer = [i % config.blocks for i in range(L)]
        self.lm_head = None if config.tie_embeddings else declare(nn.Linear(D, config.vocab_size, bias=False), HEAD)
        if config.tie_embeddings:
            nn.init.normal_(self.tok_emb.weight, std=config.tied_embed_init_std)
        else:
            nn.init.zeros_(self.lm_head.weight)
        self._positions_cache: dict[tuple, Positions] = {}  # keys: (T, device)

    def positions(self, x: Tensor) -> Positions:
        """cos and sin (T, R/2) for x (B, T, D), and the window's mask (None without a window); kept between calls."""
        T, device, window = x.size(1), x.device, self.config.window_size
        if (T, device) not in self._positions_cache:
            # Tensors made in inference mode could not be used by a later training step.
            with torch.inference_mode(False):
                dims = self.config.rope_dims or self.config.head_dim
                cos, sin = rotary_angles(T, dims, self.config.rope_base, device)
                mask = window_mask(T, window, device) if 0 < window < T else None
            self._positions_cache[T, device] = (cos, sin, mask)
        cos, sin, mask = self._positions_cache[T, device]
        return cos.to(x.dtype), sin.to(x.dtype), mask

    def layer(self, i: int) -> Layer:
        """What layer i has of its own."""
        config = self.config
        return Layer(
            q_gain=self.q_gains[i],
            attn_scale=self.attn_scales[i],
            mlp_scale=self.mlp_scales[i],
            norm_scale=(i + 1) ** -0.5 if config.ln_scale else 1.0,
            exclusive=i >= config.num_layers - config.xsa_last,
            gate=self.head_gates and partial(self.head_gates, i),
        )

    def skip(self, x: Tensor, skipped: Tensor, i: int) -> Tensor:
        """x joined with the output of an early layer, by the i-th weights and gates of skips."""
        skipped = self.skip_weights[i].to(x.dtype) * skipped
        return x + skipped if self.skip_gates is None else self.skip_gates(i, x, skipped)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (B, T, V), soft-capped, in float32."""
        x = self.tok_emb(ids)  # (B, T, E)
        if self.tok_emb_proj is not None:
            x = self.tok_emb_proj(x)  # (B, T, D)
        x = x0 = norm(x)
        positions, skips = within_documents(self.positions(x), ids, self.config), []
        half = self.config.num_layers // 2  # skips: first half to second, last in, first out
        for i, block in enumerate(self.block_of_layer):
            if i >= half and skips:
                x = self.skip(x, skips.pop(), i - half)
            mix = self.resid_mixes[i].to(x.dtype)
            x = mix[0] * x + mix[1] * x0
            x = self.blocks[block](x, self.layer(i), positions)
            if i < half:
                skips.append(x)
        x = norm(x)
        if self.lm_head is not None:
            logits = self.lm_head(x)
        else:
            if self.tok_emb_proj is not None:
                x = F.linear(x, self.tok_emb_proj.weight.to(x.dtype).T)  # (B, T, E)
            logits = F.linear(x, self.tok_emb.weight.to(x.dtype))
        return softcap(logits, self.config.logit_softcap)

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean nats per token over (B, T) targets."""
        return cross_entropy(self(ids).flatten(0, 1), targets.flatten())


def roles(config: ModelConfig) -> dict[str, Role]:
    """Name -> role of every parameter of GPT(config), whose weights are not made."""
    with torch.device("meta"):
        return roles_of(GPT(config))


def roles_by_name(names: Iterable[str]) -> dict[str, Role]:
    """Roles of a GPT's tensors where only their names are known. Raises RoleError naming one that no GPT has."""
    small = dict(vocab_size=4, num_layers=2, model_dim=2, num_heads=1, num_kv_heads=1, embed_dim=1)
    options = dict(tie_embeddings=False, skip_gates=True, attn_gate="dense")
    return roles_for(names, roles(ModelConfig(**small, **options)))
