"""The decoder, read top to bottom: embed, mix, attend and transform in parallel, project, cap.

Shapes: B sequences, T positions, V vocabulary, D model, E embedding, H heads, K key/value heads, C head
dimension. Parameter names are the reference trainer's, so its state dicts load here.
"""

from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import flex_attention as flex

from pgolf_core.knobs import ModelConfig
from pgolf_core.parameters import CONTROL, EMBEDDING, HEAD, Role, declare, matrix, roles_for, roles_of


def rmsnorm(x: Tensor) -> Tensor:
    """Divide by the root mean square over the last axis; no gain. In x's dtype: autocast on CUDA may widen it."""
    return F.rms_norm(x, (x.size(-1),)).to(x.dtype)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (first half, second half) of each head by its position's angles."""
    x1, x2 = x.chunk(2, dim=-1)  # (B, H, T, C/2) each
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)


def rotary_angles(length: int, head_dim: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of shape (T, C/2), float32."""
    frequency = 1 / base ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequency)
    return angle.cos(), angle.sin()


def window_mask(length: int, window: int, device: torch.device):
    """Query i sees key j iff 0 <= i - j < window: (T, T) bool, or on a GPU with Triton the blocks of FlexAttention."""

    def sees(b, h, i, j):
        return (i >= j) & (i - j < window)

    if device.type == "cuda" and find_spec("triton"):
        return flex.create_block_mask(sees, None, None, length, length, device=device)
    position = torch.arange(length, device=device)
    return sees(None, None, position[:, None], position[None, :])


@cache
def compiled_flex_attention():
    """For a model that is not compiled: as plain operations it would hold every score of every head."""
    return torch.compile(flex.flex_attention)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = (
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
        )
        kv_dim = config.num_kv_heads * config.head_dim
        self.c_q = declare(nn.Linear(config.model_dim, config.model_dim, bias=False), matrix("attn_in"))
        self.c_k = declare(nn.Linear(config.model_dim, kv_dim, bias=False), matrix("attn_in"))
        self.c_v = declare(nn.Linear(config.model_dim, kv_dim, bias=False), matrix("attn_in"))
        self.proj = declare(nn.Linear(config.model_dim, config.model_dim, bias=False), matrix("attn_out"))
        nn.init.zeros_(self.proj.weight)

    def queries(self, x: Tensor, q_gain: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q = self.c_q(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)  # (B, H, T, C)
        return rotary(rmsnorm(q), cos, sin) * q_gain.to(q.dtype)[:, None, None]

    def keys(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        k = self.c_k(x).unflatten(-1, (self.num_kv_heads, self.head_dim)).transpose(1, 2)  # (B, K, T, C)
        return rotary(rmsnorm(k), cos, sin)

    def values(self, x: Tensor) -> Tensor:
        return self.c_v(x).unflatten(-1, (self.num_kv_heads, self.head_dim)).transpose(1, 2)  # (B, K, T, C)

    def gather(self, q: Tensor, k: Tensor, v: Tensor, mask) -> Tensor:
        """What every position takes from those it sees, (B, T, D)."""
        k, v, gqa = k.to(q.dtype), v.to(q.dtype), self.num_kv_heads != self.num_heads
        if mask is None or isinstance(mask, Tensor):
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=gqa)
        else:
            attend = flex.flex_attention if torch.compiler.is_compiling() else compiled_flex_attention()
            y = attend(q, k, v, block_mask=mask, enable_gqa=gqa)
        return y.transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, q_gain: Tensor, cos: Tensor, sin: Tensor, mask) -> Tensor:
        q, k, v = self.queries(x, q_gain, cos, sin), self.keys(x, cos, sin), self.values(x)
        return self.proj(self.gather(q, k, v, mask))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.fc = declare(nn.Linear(config.model_dim, config.mlp_mult * config.model_dim, bias=False), matrix("mlp_in"))
        self.proj = declare(
            nn.Linear(config.mlp_mult * config.model_dim, config.model_dim, bias=False), matrix("mlp_out")
        )
        nn.init.zeros_(self.proj.weight)

    def units(self, x: Tensor) -> Tensor:
        """The hidden layer, (B, T, mlp_mult · D)."""
        return F.relu(self.fc(x)).square()

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.units(x))


class Block(nn.Module):
    """The weights a layer borrows; layers that share a block differ in their control parameters."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attn = Attention(config)
        self.mlp = MLP(config)


class GPT(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        L, D = config.num_layers, config.model_dim
        E = config.embed_dim or D
        self.tok_emb = declare(nn.Embedding(config.vocab_size, E), EMBEDDING)
        self.tok_emb_proj = declare(nn.Linear(E, D, bias=False), matrix("embed")) if E < D else None
        # The first half of the layers hands its outputs to the second half, last in first out.
        self.skip_weights = nn.Parameter(torch.ones(L // 2, D))
        self.q_gains = nn.Parameter(torch.full((L, config.num_heads), config.qk_gain_init))
        self.attn_scales = nn.Parameter(torch.ones(L, D))
        self.mlp_scales = nn.Parameter(torch.ones(L, D))
        self.resid_mixes = nn.Parameter(torch.stack((torch.ones(L, D), torch.zeros(L, D)), dim=1))  # (L, 2, D)
        declare(self, CONTROL, "skip_weights", "q_gains", "attn_scales", "mlp_scales", "resid_mixes")
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.lm_head = None if config.tie_embeddings else declare(nn.Linear(D, config.vocab_size, bias=False), HEAD)
        if config.tie_embeddings:
            nn.init.normal_(self.tok_emb.weight, std=config.tied_embed_init_std)
        else:
            nn.init.zeros_(self.lm_head.weight)
        self._positions: dict[tuple, tuple] = {}  # (T, device) -> cos, sin, mask

    def positions(self, x: Tensor) -> tuple:
        """For x (B, T, D): cos, sin (T, C/2) and the window_mask, None where plain causal attention does.

        Kept between calls.
        """
        length, device = x.size(1), x.device
        key = (length, device)
        if key not in self._positions:
            # Made outside inference mode: tensors of inference mode could not serve a later training step.
            with torch.inference_mode(False):
                cos, sin = rotary_angles(length, self.config.head_dim, self.config.rope_base, device)
                banded = 0 < self.config.window_size < length
                mask = window_mask(length, self.config.window_size, device) if banded else None
            self._positions[key] = (cos, sin, mask)
        cos, sin, mask = self._positions[key]
        return cos.to(x.dtype), sin.to(x.dtype), mask

    def embed(self, ids: Tensor) -> Tensor:
        """(B, T) token ids -> x0 (B, T, D), which the layers start from and mix in again."""
        x = self.tok_emb(ids)
        if self.tok_emb_proj is not None:
            x = self.tok_emb_proj(x)
        return rmsnorm(x)

    def block(self, i: int) -> Block:
        return self.blocks[i % self.config.blocks]

    def enter(self, i: int, x: Tensor, x0: Tensor, stack: list[Tensor]) -> Tensor:
        """What attention and MLP of layer i read: x with x0 mixed in, and an early layer's output off the stack."""
        L = self.config.num_layers
        if i >= L // 2 and stack:
            x = x + self.skip_weights[i - L // 2].to(x.dtype) * stack.pop()
        mix = self.resid_mixes[i].to(x.dtype)
        return mix[0] * x + mix[1] * x0

    def leave(self, i: int, x: Tensor, attn: Tensor, mlp: Tensor, stack: list[Tensor]) -> Tensor:
        """Layer i's output, which goes on the stack in the first half."""
        x = x + self.attn_scales[i].to(x.dtype) * attn + self.mlp_scales[i].to(x.dtype) * mlp
        if i < self.config.num_layers // 2:
            stack.append(x)
        return x

    def layers(self, first: int, x: Tensor, x0: Tensor, stack: list[Tensor]) -> Tensor:
        """Layers first.. on what those before it left: x, x0 (B, T, D) and the stack -> (B, T, D), normed."""
        cos, sin, mask = self.positions(x)
        for i in range(first, self.config.num_layers):
            x = self.enter(i, x, x0, stack)
            # Attention and MLP read the same x, in parallel; a norm each, so that gradients add in the
            # reference's order, bit for bit.
            attn = self.block(i).attn(rmsnorm(x), self.q_gains[i], cos, sin, mask)
            mlp = self.block(i).mlp(rmsnorm(x))
            x = self.leave(i, x, attn, mlp, stack)
        return rmsnorm(x)

    def hidden(self, ids: Tensor) -> Tensor:
        """(B, T) token ids -> (B, T, D), after the last norm."""
        x0 = self.embed(ids)
        return self.layers(0, x0, x0, [])

    def head(self, x: Tensor) -> Tensor:
        """(B, T, D) of `hidden` -> (B, T, V) logits, after the soft cap."""
        if self.lm_head is not None:
            logits = self.lm_head(x)
        else:
            if self.tok_emb_proj is not None:
                x = F.linear(x, self.tok_emb_proj.weight.to(x.dtype).T)
            logits = F.linear(x, self.tok_emb.weight.to(x.dtype))
        cap = self.config.logit_softcap
        return cap * torch.tanh(logits / cap)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) token ids -> (B, T, V) logits, after the soft cap."""
        return self.head(self.hidden(ids))

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean nats a token over (B, T) targets, in float32."""
        return F.cross_entropy(self(ids).float().flatten(0, 1), targets.flatten())


def roles(config: ModelConfig) -> dict[str, Role]:
    """Name -> role of every parameter of GPT(config), which is not built for it."""
    with torch.device("meta"):
        return roles_of(GPT(config))


def roles_by_name(names: Iterable[str]) -> dict[str, Role]:
    """Roles of a GPT's tensors where only their names are known. Raises RoleError naming one that no GPT has."""
    everything = ModelConfig(
        vocab_size=4, num_layers=2, model_dim=2, num_heads=1, num_kv_heads=1, embed_dim=1, tie_embeddings=False
    )
    return roles_for(names, roles(everything))
