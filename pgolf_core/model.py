"""The decoder, read top to bottom: embed; layers of attention and MLP, with skips between them; project.

Shapes: B sequences, T positions, V vocabulary, D model, E embedding, L layers, H heads, C head dimension.
Parameter names are the reference trainer's, so its state dicts load here.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pgolf_core.knobs import ModelConfig
from pgolf_core.layers.attention import CausalSelfAttention, Positions, rotary_angles, window_mask, within_documents
from pgolf_core.layers.bigram import BigramHash
from pgolf_core.layers.fused import capped_cross_entropy, norm, relu_squared, softcap
from pgolf_core.layers.gates import HeadGates, SkipGates
from pgolf_core.layers.generated import generate
from pgolf_core.layers.halting import Halting
from pgolf_core.layers.lanes import TwoLanes
from pgolf_core.layers.layer import Layer
from pgolf_core.layers.smear import SmearGate
from pgolf_core.layers.softcap import AsymmetricSoftcap
from pgolf_core.layers.value_embedding import ValueEmbedding
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
    """Attention and MLP. Layers may share a block; a Layer is what each has of its own."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attn = CausalSelfAttention(config)
        self.mlp = MLP(config)
        if config.orthogonal_init:
            for linear in (self.attn.c_q, self.attn.c_k, self.attn.c_v, self.mlp.fc):
                nn.init.orthogonal_(linear.weight)

    def forward(self, x: Tensor, layer: Layer, positions: Positions, lane: Tensor | None = None) -> Tensor | tuple:
        """x (B, T, D) -> (B, T, D). With a lane of the MLP's own: what attention and the MLP write, both (B, T, D)."""

        def mlp(y: Tensor) -> Tensor:
            return layer.mlp_scale.to(x.dtype) * self.mlp(y)

        y = layer.norm(x)
        attn = layer.attn_scale.to(x.dtype) * self.attn(y, layer, positions)
        if lane is not None:
            return attn, mlp(layer.norm(lane))
        x = x + attn
        return x + mlp(y if layer.parallel else layer.norm(x))


class GPT(nn.Module):
    """Token ids (B, T) -> logits (B, T, V)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        L, D = config.num_layers, config.model_dim
        E = config.embed_dim or D
        self.tok_emb = declare(nn.Embedding(config.vocab_size, E), EMBEDDING)
        self.tok_emb_proj = None
        if config.embed_dim and config.embed_dim < config.model_dim:
            self.tok_emb_proj = declare(nn.Linear(E, D, bias=False), matrix("embed"))
        self.bigram_hash = BigramHash(config) if config.bigram_vocab_size else None
        self.smear_gate = SmearGate(config) if config.smear_gate != "off" else None
        self.value_embed = ValueEmbedding(config) if config.ve_last else None
        self.skip_weights = nn.Parameter(torch.ones(len(config.passes()) // 2, D))
        self.q_gains = nn.Parameter(torch.full((L, config.num_heads), config.qk_gain_init))
        self.attn_scales = nn.Parameter(torch.ones(L, D))
        self.mlp_scales = nn.Parameter(torch.ones(L, D))
        self.resid_mixes = nn.Parameter(torch.stack((torch.ones(L, D), torch.zeros(L, D)), dim=1))  # (L, 2, D)
        declare(self, CONTROL, "skip_weights", "q_gains", "attn_scales", "mlp_scales", "resid_mixes")
        self.skip_gates = SkipGates(*self.skip_weights.shape) if config.skip_gates else None
        self.head_gates = HeadGates(config) if config.attn_gate != "off" else None
        self.lanes = TwoLanes(L) if config.residual_lanes == 2 else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        if config.weights != "own":
            self.generator = generate(config, self.blocks, [Block(config) for _ in range(config.weight_bases)])
        self.block_of_layer = [i % config.blocks for i in range(L)]
        self.halting = Halting(config) if config.halting != "off" or config.halting_eval == "fixed" else None
        self.looping = True  # with loop_extra; training begins without until loop_from
        self.lm_head = None if config.tie_embeddings else declare(nn.Linear(D, config.vocab_size, bias=False), HEAD)
        self.softcaps = AsymmetricSoftcap(config.logit_softcap) if config.asymmetric_softcap else None
        if config.tie_embeddings:
            nn.init.normal_(self.tok_emb.weight, std=config.tied_embed_init_std)
        else:
            nn.init.zeros_(self.lm_head.weight)
        self._positions_cache: dict[tuple, Positions] = {}  # keys: (T, device)

    def positions(self, x: Tensor) -> Positions:
        """cos and sin (T, R/2) for x (B, T, D), and the window's mask (None without a window); kept between calls."""
        T, device = x.size(1), x.device
        if (T, device) not in self._positions_cache:
            # Tensors made in inference mode could not be used by a later training step.
            with torch.inference_mode(False):
                dims = self.config.rope_dims or self.config.head_dim
                cos, sin = rotary_angles(T, dims, self.config.rope_base, device)
                window = self.config.window_size
                mask = window_mask(T, window, device) if self.config.window_size and window < T else None
            self._positions_cache[T, device] = (cos, sin, mask)
        cos, sin, mask = self._positions_cache[T, device]
        return cos.to(x.dtype), sin.to(x.dtype), mask

    def layer(self, i: int, values: list[Tensor]) -> Layer:
        """The own parts of layer i. values: (B, T, K·C) for each of the last layers, see ValueEmbedding."""
        config, from_end = self.config, i - self.config.num_layers
        return Layer(
            q_gain=self.q_gains[i],
            attn_scale=self.attn_scales[i],
            mlp_scale=self.mlp_scales[i],
            parallel=config.parallel_from == 0 or i >= config.parallel_from,
            norm_scale=(i + 1) ** -0.5 if config.ln_scale else 1.0,
            exclusive=config.xsa_last > 0 and from_end >= -config.xsa_last,
            gate=self.head_gates and partial(self.head_gates, i),
            value=values[from_end] if config.ve_last and from_end >= -len(values) else None,
        )

    def skip(self, x: Tensor, skipped: Tensor, i: int) -> Tensor:
        """x joined with the output of an early layer, by the i-th weights and gates of skips."""
        skipped = self.skip_weights[i].to(x.dtype) * skipped
        return x + skipped if self.skip_gates is None else self.skip_gates(i, x, skipped)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (B, T, V), soft-capped, in float32."""
        logits = self.uncapped(ids)
        return softcap(logits, self.config.logit_softcap) if self.softcaps is None else self.softcaps(logits)

    def uncapped(self, ids: Tensor) -> Tensor:
        """Logits (B, T, V) before the soft cap."""
        x = self.tok_emb(ids)  # (B, T, E)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if self.tok_emb_proj is not None:
            x = self.tok_emb_proj(x)  # (B, T, D)
        if self.bigram_hash is not None:
            x = x + self.bigram_hash(ids)
        if self.config.smear_gate == "v2":
            x = self.smear_gate(x, ids)
        x = norm(x)
        if self.config.smear_gate == "v1":
            x = self.smear_gate(x, ids)
        x0, lane, skips, passes = x, None, [], self.config.passes(self.looping)
        positions = within_documents(self.positions(x), ids, self.config)
        values = self.value_embed(ids) if self.value_embed is not None else []
        half = len(passes) // 2  # skips: first half to second, last in, first out
        if self.halting is not None:
            exits = None
        for step, i in enumerate(passes):
            if self.halting is not None and self.looping:
                if self.halting.skips(step):
                    skips = [*skips, x] if step < half else skips[:-1]
                    continue
                before = x
            if self.lanes is not None and i == self.config.parallel_from:
                lane = x
            if step >= half and skips:
                x = self.skip(x, skips.pop(), step - half)
            mix = self.resid_mixes[i].to(x.dtype)
            mixed = mix[0] * x + mix[1] * x0
            block, layer = self.blocks[self.block_of_layer[i]], self.layer(i, values)
            if lane is None:
                x = block(mixed, layer, positions)
            else:
                x, lane = self.lanes(i, (x, lane), block(mixed, layer, positions, lane))
            if self.halting is not None and self.looping:
                x, exits = self.halting(step, before, x, exits)
            if step < half:
                skips.append(x)
        if lane is not None:
            x = (x + lane) / 2
        x = norm(x)
        if self.lm_head is not None:
            return self.lm_head(x)
        if self.tok_emb_proj is not None:
            x = F.linear(x, self.tok_emb_proj.weight.T)  # (B, T, E)
        return F.linear(x, self.tok_emb.weight)

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean nats per token over (B, T) targets, plus the ponder cost with halting."""
        if self.softcaps is not None:
            nats = F.cross_entropy(self(ids).flatten(0, 1), targets.flatten())
        else:
            nats = capped_cross_entropy(self.uncapped(ids).flatten(0, 1), targets.flatten(), self.config.logit_softcap)
        return nats if self.halting is None else nats + self.halting.ponder()


def skeleton(config: ModelConfig) -> GPT:
    """GPT(config) whose weights are not written, so that even a large one takes no time and hardly any memory."""
    with _NotWritten():
        return GPT(config)


class _NotWritten(TorchFunctionMode):
    """Leaves out initial values. On the meta device PyTorch would import its compiler for them, which takes seconds."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        fills = func in (Tensor.normal_, Tensor.uniform_, Tensor.zero_)
        if fills or getattr(func, "__module__", "") == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        if func is torch.linalg.qr:  # orthogonal_ asks for it
            return args[0], args[0][: args[0].size(1)]
        return func(*args, **(kwargs or {}))


def roles(config: ModelConfig) -> dict[str, Role]:
    """Name -> role of every parameter of GPT(config), whose weights are not made."""
    return roles_of(skeleton(config))


def roles_by_name(names: Iterable[str]) -> dict[str, Role]:
    """Roles of a GPT's tensors where only their names are known. Raises RoleError naming one that no GPT has."""
    small: dict[str, Any] = dict(vocab_size=4, num_layers=2, model_dim=2, num_heads=1, num_kv_heads=1, embed_dim=1)
    options: dict[str, Any] = dict(
        tie_embeddings=False, skip_gates=True, attn_gate="dense", residual_lanes=2, smear_gate="v2"
    )
    options |= dict(bigram_vocab_size=2, bigram_dim=1, ve_last=1, ve_dim=1, asymmetric_softcap=True, halting="act")
    known = roles(ModelConfig(**small, **options))
    for weights in ("basis", "hypernetwork"):
        generated: dict[str, Any] = dict(weights=weights, weight_bases=1, weight_rank=1, weight_row_scale=True)
        known |= roles(ModelConfig(**small, **generated))
    return roles_for(names, known)
