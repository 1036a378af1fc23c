"""Options of the model against a plain computation from their definitions, and parameter counts of published runs."""

import math

import pytest
import torch
from support.options import MODEL_OPTIONS, combinations, knobs_of

from pgolf_core.knobs import ModelConfig
from pgolf_core.layers.exclusive import exclusive
from pgolf_core.model import GPT

SHAPE = dict(vocab_size=61, num_layers=5, model_dim=24, num_heads=4, num_kv_heads=2)
GROUPS = [
    (),
    *((name,) for name in MODEL_OPTIONS),
    *(g for seed in range(4) for g in combinations(seed, MODEL_OPTIONS)),
]


def noisy(**knobs) -> GPT:
    """A model in float64 in which every path carries signal."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(**SHAPE | knobs)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("group", GROUPS, ids=", ".join)
def test_options_are_what_their_definitions_say(group):
    model = noisy(**knobs_of(group))
    ids = torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(2))
    expected = torch.stack([Plain(model).logits(row) for row in ids])
    torch.testing.assert_close(model(ids), expected, rtol=1e-6, atol=1e-6)


class Plain:
    """The model of one sequence (T,), position by position and head by head where that is plainer."""

    def __init__(self, model: GPT):
        self.c, self.p = model.config, dict(model.named_parameters())

    def logits(self, ids):
        c, p = self.c, self.p
        x = x0 = rms(p["tok_emb.weight"][ids])
        skips, half = [], c.num_layers // 2
        for i in range(c.num_layers):
            if i >= half and skips:
                x = self.join(x, p["skip_weights"][i - half] * skips.pop(), i - half)
            x = p["resid_mixes"][i, 0] * x + p["resid_mixes"][i, 1] * x0
            y = rms(x) / (math.sqrt(i + 1) if c.ln_scale else 1)
            x = x + p["attn_scales"][i] * self.attention(i, y) + p["mlp_scales"][i] * self.mlp(i, y)
            skips += [x] if i < half else []
        return c.logit_softcap * torch.tanh(rms(x) @ p["tok_emb.weight"].T / c.logit_softcap)

    def join(self, x, skip, j):
        if not self.c.skip_gates:
            return x + skip
        g = 1 / (1 + torch.exp(-self.p["skip_gates.weight"][j]))
        return g * x + (1 - g) * skip

    def mlp(self, i, u):
        z = u @ self.p[f"blocks.{i}.mlp.fc.weight"].T
        return torch.where(z > 0, z**2, (self.c.mlp_slope * z) ** 2) @ self.p[f"blocks.{i}.mlp.proj.weight"].T

    def attention(self, i, u):
        c, W = self.c, {n: self.p[f"blocks.{i}.attn.{n}.weight"] for n in ("c_q", "c_k", "c_v", "proj")}
        C, outputs = c.head_dim, []
        for h in range(c.num_heads):
            kv = slice(h * c.num_kv_heads // c.num_heads * C, (h * c.num_kv_heads // c.num_heads + 1) * C)
            q, k, v = u @ W["c_q"][h * C : (h + 1) * C].T, u @ W["c_k"][kv].T, u @ W["c_v"][kv].T
            q, k = self.rotate(rms(q)) * self.p["q_gains"][i, h], self.rotate(rms(k))
            scores = (q @ k.T / math.sqrt(C)).masked_fill(torch.ones(len(u), len(u)).triu(1).bool(), -math.inf)
            y = scores.softmax(-1) @ v
            if i >= c.num_layers - c.xsa_last:
                y = torch.stack([a - (a @ b) / (b @ b) * b for a, b in zip(y, v, strict=True)])
            if c.attn_gate != "off":
                width = len(u[0]) if c.attn_gate == "dense" else c.attn_gate_width
                z = c.attn_gate_scale * u[:, :width] @ self.p["head_gates.weight"][i, h]
                y = y * (2 if c.attn_gate == "doubled" else 1) / (1 + torch.exp(-z))[:, None]
            outputs.append(y)
        return torch.cat(outputs, 1) @ W["proj"].T

    def rotate(self, x):
        R, x = self.c.rope_dims or self.c.head_dim, x.clone()
        for t, j in ((t, j) for t in range(len(x)) for j in range(R // 2)):
            angle = t * self.c.rope_base ** (-2 * j / R)
            pair = torch.complex(x[t, j], x[t, j + R // 2]) * torch.exp(torch.tensor(-1j * angle))
            x[t, j], x[t, j + R // 2] = pair.real, pair.imag
        return x


def rms(x):
    return x / (x**2).mean(-1, keepdim=True).sqrt()


def test_exclusive_outputs_are_orthogonal_to_the_tokens_own_value():
    y, v = torch.randn(2, 6, 5, 8), torch.randn(2, 3, 5, 8)
    out = exclusive(y, v)
    assert (out * v.repeat_interleave(2, dim=1)).sum(-1).abs().max() < 1e-5 and out.norm() > 0.5 * y.norm()
    assert torch.equal(exclusive(y, torch.zeros_like(v)), y)


@pytest.mark.parametrize("gate", ["dense", "sparse", "doubled"])
def test_head_gates_start_at_half_or_whole(gate):
    model = GPT(ModelConfig(**SHAPE, attn_gate=gate))
    factors = model.head_gates(3, torch.randn(1, 7, 24))
    assert factors.shape == (1, 4, 7, 1)
    torch.testing.assert_close(factors, torch.full_like(factors, 1.0 if gate == "doubled" else 0.5), atol=0.02, rtol=0)
