"""Options of the model against a plain computation from their definitions, and parameter counts of published runs."""

import math

import pytest
import torch
from support.options import MODEL_OPTIONS, combinations, knobs_of

from pgolf_core.knobs import ModelConfig
from pgolf_core.layers.exclusive import exclusive
from pgolf_core.model import GPT, skeleton

SHAPE = dict(vocab_size=61, num_layers=4, model_dim=24, num_heads=4, num_kv_heads=2)
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
    knobs = {knob: value for knob, value in knobs_of(group).items() if knob in ModelConfig.model_fields}
    model = noisy(**knobs).eval()
    ids = torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(2))
    ids[0, 0] = ids[1, 5] = 1  # BOS
    expected = torch.stack([Plain(model).logits(row) for row in ids])
    torch.testing.assert_close(model(ids), expected, rtol=1e-6, atol=1e-6)


class Plain:
    """The model of one sequence (T,), position by position and head by head where that is plainer."""

    def __init__(self, model: GPT):
        self.c, self.p, self.buffers = model.config, dict(model.named_parameters()), dict(model.named_buffers())

    def logits(self, ids):
        c, p = self.c, self.p
        x = p["tok_emb.weight"][ids]
        if c.bigram_vocab_size:
            x = (
                x
                + p["bigram_hash.scale"]
                * p["bigram_hash.table.weight"][self.pairs(ids)]
                @ p["bigram_hash.proj.weight"].T
            )
        if c.smear_gate == "v2":
            e, w = x, p["smear_gate.gate"]
            share = [0] + [sigmoid(w @ e[t, :12]) if ids[t] != 1 else 0 for t in range(1, len(e))]
            x = torch.stack([e[t] + p["smear_gate.strength"] * share[t] * e[t - 1] for t in range(len(e))])
        x = rms(x)
        if c.smear_gate == "v1":
            e, g = x, sigmoid(p["smear_gate.gate"])
            x = torch.stack([(1 - g) * e[t] + g * (e[t - 1] if t and ids[t] != 1 else 0) for t in range(len(e))])
        x0, y, skips, s, e = x, None, [], c.loop_start, c.loop_end
        order = [*range(s), *[i for _ in range(1 + c.loop_extra) for i in range(s, e + 1)], *range(e + 1, c.num_layers)]
        half, tokens = len(order) // 2, [{"staying": 1.0, "mean": 0.0} for _ in ids]
        for n, i in enumerate(order):
            before = x
            y = x if c.residual_lanes == 2 and i == c.parallel_from else y
            if n >= half and skips:
                x = self.join(x, p["skip_weights"][n - half] * skips.pop(), n - half)
            mixed = p["resid_mixes"][i, 0] * x + p["resid_mixes"][i, 1] * x0
            scale = 1 / math.sqrt(i + 1) if c.ln_scale else 1
            attn = p["attn_scales"][i] * self.attention(i, scale * rms(mixed), ids)
            read = mixed if y is None and i >= c.parallel_from else mixed + attn if y is None else y
            mlp = p["mlp_scales"][i] * self.mlp(i, scale * rms(read))
            if y is None:
                x = mixed + attn + mlp
            else:
                keep, write = p["lanes.keep"][i], p["lanes.write"][i]
                x, y = (keep[j] * (x, y)[j] + write[0, j] * attn + write[1, j] * mlp for j in (0, 1))
            x = self.leave(n, tokens, before, x)
            skips += [x] if n < half else []
        x = x if y is None else (x + y) / 2
        z = rms(x) @ p["tok_emb.weight"].T
        up, down = p["softcaps.caps"] if c.asymmetric_softcap else 2 * [c.logit_softcap]
        return torch.where(z > 0, up * torch.tanh(z / up), down * torch.tanh(z / down))

    def leave(self, n, tokens, before, x):
        """The states x after step n, of tokens that were in the states before; tokens: what is known of each."""
        c, p, x = self.c, self.p, [*x]
        loop, layer = divmod(n - c.loop_start, c.loop_end + 1 - c.loop_start)
        if not c.loop_extra or not 0 <= loop <= c.loop_extra:
            return torch.stack(x)
        if c.halting_eval == "fixed":
            return before if c.halting_passes and loop >= c.halting_passes else torch.stack(x)
        for t, token in enumerate(tokens):
            if c.halting == "off":
                continue
            if c.halting_eval == "threshold" and 1 - token["staying"] >= c.halting_threshold:
                x[t] = before[t]
            elif layer == c.loop_end - c.loop_start:
                leaving = 1 if loop == c.loop_extra else sigmoid(p["halting.weight"] @ rms(x[t]) + p["halting.bias"])
                token["mean"] = token["mean"] + token["staying"] * leaving * x[t]
                token["staying"] *= 1 - leaving
                if loop == c.loop_extra and c.halting_eval == "expected":
                    x[t] = token["mean"]
        return torch.stack(x)

    def pairs(self, ids):
        ids, B, alone = ids.tolist(), self.c.bigram_vocab_size, self.c.document_mask
        pair = lambda t: ((36313 * ids[t]) ^ (27191 * ids[t - 1])) % (B - 1)  # noqa: E731
        return [B - 1 if t == 0 or (alone and ids[t] == 1) else pair(t) for t in range(len(ids))]

    def join(self, x, skip, j):
        if not self.c.skip_gates:
            return x + skip
        g = sigmoid(self.p["skip_gates.weight"][j])
        return g * x + (1 - g) * skip

    def mlp(self, i, u):
        z = u @ self.weight(i, "mlp.fc").T
        return torch.where(z > 0, z**2, (self.c.mlp_slope * z) ** 2) @ self.weight(i, "mlp.proj").T

    def weight(self, i, part):
        c, p, own = self.c, self.p, f"blocks.{i}.{part}"
        if c.weights == "own":
            return p[f"{own}.weight"]
        if c.weights == "random":
            W = self.buffers[f"{own}.map"]
        else:
            kind = ("attn.c_q", "attn.c_k", "attn.c_v", "attn.proj", "mlp.fc", "mlp.proj").index(part)
            if c.weights == "hypernetwork":
                hidden = torch.tanh(p["generator.hidden"] @ p["generator.embedding"][i])
                shares = p["generator.outputs"][kind] @ hidden / 8
                shares[i % c.weight_bases] += 1
            elif c.weight_coefficients == "legendre":
                depths = [2 * j / (c.num_layers - 1) - 1 for j in range(c.num_layers)]
                polynomials = [[1, t, (3 * t**2 - 1) / 2] for t in depths]
                size = math.sqrt(sum(x**2 for row in polynomials for x in row) / c.num_layers)
                shares = torch.tensor(polynomials[i]) / size
            else:
                shares = p["generator.table"][kind, i] / 8
                shares[i % c.weight_bases] += 1
            bases = [p[f"generator.bases.{part.replace('.', '_')}.{j}.weight"] for j in range(c.weight_bases)]
            W = sum(share * base for share, base in zip(shares, bases, strict=True))
        W = p[f"{own}.scale"][:, None] * W if f"{own}.scale" in p else W
        return W + p[f"{own}.left.weight"] @ p[f"{own}.right.weight"] if c.weight_rank else W

    def attention(self, i, u, ids):
        c, W = self.c, {n: self.weight(i, f"attn.{n}") for n in ("c_q", "c_k", "c_v", "proj")}
        C, outputs = c.head_dim, []
        for h in range(c.num_heads):
            kv = slice(h * c.num_kv_heads // c.num_heads * C, (h * c.num_kv_heads // c.num_heads + 1) * C)
            q, k, v = u @ W["c_q"][h * C : (h + 1) * C].T, u @ W["c_k"][kv].T, u @ W["c_v"][kv].T
            if i >= c.num_layers - c.ve_last:
                table, proj = self.p["value_embed.table.weight"], self.p["value_embed.proj.weight"]
                own = self.p["value_embed.layer_scales"][i - c.num_layers] * self.p["value_embed.scale"]
                v = v + own * (table[ids] @ proj.T)[:, kv]
            q, k = self.rotate(rms(q)) * self.p["q_gains"][i, h], self.rotate(rms(k))
            unseen = torch.ones(len(u), len(u)).triu(1).bool()
            if c.window_size:
                unseen |= torch.ones(len(u), len(u)).tril(-c.window_size).bool()
            if c.document_mask:
                document = (ids == 1).cumsum(0)
                unseen |= document[:, None] != document
            scores = (q @ k.T / math.sqrt(C)).masked_fill(unseen, -math.inf)
            y = scores.softmax(-1) @ v
            if i >= c.num_layers - c.xsa_last:
                y = torch.stack([a - (a @ b) / (b @ b) * b for a, b in zip(y, v, strict=True)])
            if c.attn_gate != "off":
                width = len(u[0]) if c.attn_gate == "dense" else c.attn_gate_width
                z = c.attn_gate_scale * u[:, :width] @ self.p["head_gates.weight"][i, h]
                y = y * (2 if c.attn_gate == "doubled" else 1) * sigmoid(z)[:, None]
            outputs.append(y)
        return torch.cat(outputs, 1) @ W["proj"].T

    def rotate(self, x):
        R, x = self.c.rope_dims or self.c.head_dim, x.clone()
        for t, j in ((t, j) for t in range(len(x)) for j in range(R // 2)):
            angle = t * self.c.rope_base ** (-2 * j / R)
            pair = torch.complex(x[t, j], x[t, j + R // 2]) * torch.exp(torch.tensor(-1j * angle))
            x[t, j], x[t, j + R // 2] = pair.real, pair.imag
        return x


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


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


def test_smear_gates_take_nothing_across_documents():
    ids = torch.tensor([[1, 5, 6, 1, 7, 8]])
    for version in ("v1", "v2"):
        gate = noisy(smear_gate=version).smear_gate
        x = torch.randn(1, 6, 24, dtype=torch.float64)
        changed = torch.cat((torch.randn(1, 3, 24, dtype=torch.float64), x[:, 3:]), 1)
        assert torch.equal(gate(x, ids)[:, 3:], gate(changed, ids)[:, 3:])
        assert not torch.equal(gate(x, ids)[:, 4:], x[:, 4:])


def test_passes_are_those_of_the_published_loops():
    config = ModelConfig(num_layers=11, loop_start=3, loop_end=5, loop_extra=2)
    assert config.passes() == [0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10]
    assert config.passes(looping=False) == ModelConfig(num_layers=11).passes() == [*range(11)]


def test_orthogonal_init_leaves_outputs_at_zero():
    for name, weight in GPT(ModelConfig(**SHAPE, orthogonal_init=True)).blocks.named_parameters():
        gram = weight.T @ weight if len(weight) > weight.size(1) else weight @ weight.T
        expected = torch.zeros_like(gram) if ".proj." in name else torch.eye(len(gram))
        torch.testing.assert_close(gram, expected, rtol=0, atol=1e-5)


ELEVEN = dict(num_layers=11, parallel_from=11)
SP1024 = ELEVEN | dict(mlp_mult=3, smear_gate="v1", xsa_last=4)
SP4096 = ELEVEN | dict(mlp_mult=4, vocab_size=4096, skip_gates=True, xsa_last=11, qk_gain_init=4.0)
SP8192 = SP4096 | dict(vocab_size=8192, loop_start=4, loop_end=5, loop_extra=2)
TOP = SP8192 | dict(loop_start=3, parallel_from=8, residual_lanes=2, rope_dims=16, ln_scale=True, mlp_slope=0.5)
VE = dict(ve_last=2, ve_dim=128)
PUBLISHED = {  # pull request of a record: its knobs and parameters
    "baseline": (dict(parallel_from=9), 17_059_912),
    "162": (dict(parallel_from=9, mlp_mult=3, smear_gate="v1", bigram_vocab_size=4096), 22_368_841),
    "180": (SP1024 | dict(num_layers=10, bigram_vocab_size=10_240), 25_517_137),
    "315": (SP1024 | dict(bigram_vocab_size=2048), 26_829_913),
    "414": (SP1024 | VE | dict(bigram_vocab_size=2048), 26_993_756),
    "549": (SP1024 | VE | dict(bigram_vocab_size=1536), 26_928_220),
    "1060": (SP1024 | VE | dict(bigram_vocab_size=2816, bigram_dim=112), 27_038_812),
    "1394": (SP8192, 35_943_512),
    "1493": (SP8192 | dict(loop_start=3, parallel_from=7), 35_944_536),
    "1530": (TOP, 35_944_602),
    "1736": (TOP | dict(attn_gate="dense"), 35_989_658),
    "1787": (TOP | dict(attn_gate="sparse"), 35_945_658),
    "1667": (TOP | dict(attn_gate="doubled", smear_gate="v2"), 35_945_671),
}  # those of notebooks/sweeps/record_*.yaml: tests/sweeps/test_sweep_file.py


@pytest.mark.parametrize("record", PUBLISHED)
def test_parameters_are_as_many_as_published(record):
    knobs, parameters = PUBLISHED[record]
    assert sum(p.numel() for p in skeleton(ModelConfig(**knobs, orthogonal_init=True)).parameters()) == parameters
