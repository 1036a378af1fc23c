"""Bits per byte: recorded scores, an independent count of the bytes, and a source of known entropy."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from golden_vectors import golden, state_of
from torch import Tensor

from pgolf_core import evaluate as evaluation
from pgolf_core.evaluate import evaluate, ngram_cache, windows
from pgolf_core.knobs import EvalConfig, ModelConfig
from pgolf_core.model import GPT
from pgolf_core.tokens import ByteTable


@pytest.mark.parametrize("i", range(4))
def test_golden_ngram_cache(i):
    recorded, arrays = golden(f"sidecar_{i}")
    out = ngram_cache(arrays["logits"], arrays["input_ids"].long(), EvalConfig(**recorded, eval_cache_delay=1))
    assert torch.allclose(out, arrays["out"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("i", range(4))
def test_golden_scores(i):
    recorded, arrays = golden("eval")
    model = GPT(ModelConfig(**{k: v for k, v in recorded.items() if k != "cases"}))
    model.load_state_dict(state_of(arrays))
    table = ByteTable(arrays["base_bytes"], arrays["has_leading_space"], arrays["is_boundary"])
    case = dict(recorded["cases"][i])
    expected = case.pop("val_loss"), case.pop("val_bpb")
    score = evaluate(model, arrays["val_tokens"].long(), table, EvalConfig(**case, eval_cache_delay=1))
    assert (score.val_loss, score.val_bpb) == pytest.approx(expected, rel=1e-6)


def test_aligned_ngram_cache_predicts_the_continuation():
    ids = torch.tensor([[5, 6, 7, 5, 6]])  # after 5 6 comes 7
    config = EvalConfig(eval_bigram_mix_weight=1.0, eval_cache_mix_weight=0.1, eval_cache_size=4)
    aligned = ngram_cache(torch.zeros(1, 5, 10), ids, config)[0, -1]
    late = ngram_cache(torch.zeros(1, 5, 10), ids, config.model_copy(update={"eval_cache_delay": 1}))[0, -1]
    assert aligned.argmax() == 7 and late.argmax() == 6
    assert aligned[6] == pytest.approx(0.1 / 1 + 0.1 / 4)  # the current token and its twin, seen 1 and 4 back
    assert late[5] > 0  # the late one has not seen the current 6


@pytest.mark.parametrize("delay", [0, 1])
def test_ngram_cache_never_sees_the_future(delay):
    torch.manual_seed(0)
    gains = dict(eval_bigram_mix_weight=1.0, eval_cache_mix_weight=0.5)
    config = EvalConfig(**gains, eval_cache_size=8, eval_cache_delay=delay)
    ids = torch.randint(6, (1, 30))
    changed = ids.clone()
    changed[0, 15:] = 5 - changed[0, 15:]
    a, b = ngram_cache(torch.zeros(1, 30, 6), ids, config), ngram_cache(torch.zeros(1, 30, 6), changed, config)
    assert torch.equal(a[:, :15], b[:, :15]) and not torch.equal(a, b)


@pytest.mark.parametrize("targets", [64, 65, 100, 191])
@pytest.mark.parametrize("stride", [0, 1, 16, 48, 64])
def test_every_target_is_scored_once(targets, stride):
    scored = np.zeros(targets, int)
    for start, first in windows(targets, 64, stride):
        assert 0 <= start <= targets - 64 and start <= first
        scored[first : start + 64] += 1
    assert (scored == 1).all()


def a_byte_each(vocab_size: int) -> ByteTable:
    nothing = torch.zeros(vocab_size, dtype=torch.bool)
    return ByteTable(torch.ones(vocab_size, dtype=torch.int16), nothing, nothing)


def small_model(vocab_size: int) -> GPT:
    torch.manual_seed(0)
    return GPT(ModelConfig(vocab_size=vocab_size, num_layers=1, model_dim=16, num_heads=2, num_kv_heads=2))


@pytest.mark.parametrize(("window", "message"), [(16, "hold no window of eval_seq_len=16"), (0, "eval_seq_len=0")])
def test_needs_a_window(window, message):
    with pytest.raises(ValueError, match=message):
        evaluate(small_model(8), torch.zeros(16).long(), a_byte_each(8), EvalConfig(eval_seq_len=window))


class Lookup(torch.nn.Module):
    """Logits that depend on the current token alone, so that a score can be found without a model."""

    def __init__(self, logits: Tensor):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)  # (V, V)

    def forward(self, ids):
        return self.logits[ids]


@pytest.mark.parametrize("stride", [0, 100])
def test_bits_per_byte_by_another_path(stride):
    """Target by target, under a model that needs no context; test_tokens counts the bytes of real text."""
    draw = torch.Generator().manual_seed(3)
    logits, tokens = torch.randn(1024, generator=draw), torch.randint(1024, (10_001,), generator=draw)
    leads, boundary = torch.rand(2, 1024, generator=draw) < 0.3
    table = ByteTable(torch.randint(9, (1024,), generator=draw, dtype=torch.int16), leads, boundary)
    config = EvalConfig(eval_seq_len=256, eval_stride=stride, val_batch_size=8192)
    score = evaluate(Lookup(logits.expand(1024, -1)), tokens, table, config)
    pairs = pairwise(tokens.tolist())
    text_bytes = sum(int(table.base_bytes[b]) + bool(leads[b] and not boundary[a]) for a, b in pairs)
    nats = -logits.log_softmax(0).double()[tokens[1:]].sum().item()
    assert (score.tokens, score.bytes) == (10_000, text_bytes)
    assert score.val_bpb == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-6)


def test_never_below_the_entropy_of_the_source():
    """A Markov chain over four symbols: the model that knows it scores its entropy rate, others more."""
    rng = np.random.default_rng(0)
    transition = rng.dirichlet(np.full(4, 0.5), size=4)
    values, vectors = np.linalg.eig(transition.T)
    stationary = np.real(vectors[:, np.argmax(values.real)])
    stationary /= stationary.sum()
    entropy = -(stationary[:, None] * transition * np.log2(transition)).sum()
    tokens, steps = [0], transition.cumsum(axis=1)
    for u in rng.random(40_000):
        tokens.append(min(3, int(np.searchsorted(steps[tokens[-1]], u))))
    tokens, config = torch.tensor(tokens), EvalConfig(eval_seq_len=100, val_batch_size=10_000)

    def bits(model, first=0):
        return evaluate(model, tokens[first:], a_byte_each(4), config).val_bpb

    chain = torch.tensor(transition)
    knowing, *blurred = (Lookup(((1 - b) * chain + b / 4).log().float()) for b in (0.0, 0.1, 0.5))
    assert bits(knowing) == pytest.approx(entropy, abs=4 * 0.8 / math.sqrt(40_000))  # four standard errors
    assert bits(knowing) < bits(blurred[0]) < bits(blurred[1])
    # A real model trained on the chain comes near its entropy and not below.
    model = small_model(4)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for i in range(60):
        batch = tokens[(i % 30) * 1001 : (i % 30) * 1001 + 1001]
        optimizer.zero_grad()
        model.loss(batch[:-1].view(10, 100), batch[1:].view(10, 100)).backward()
        optimizer.step()
    assert bits(knowing, 30_100) < bits(model, 30_100) < bits(knowing, 30_100) + 0.05


def test_precision_and_batch_do_not_change_the_score(monkeypatch):
    model, tokens, table = small_model(64), torch.randint(64, (1025,)), a_byte_each(64)
    scores = [evaluate(model, tokens, table, EvalConfig(eval_seq_len=64, val_batch_size=b)) for b in (64, 128, 1024)]
    assert [s.val_bpb for s in scores] == pytest.approx([scores[0].val_bpb] * 3, rel=1e-6)
    config = EvalConfig(eval_seq_len=64)
    assert evaluate(model, tokens, table, config, torch.bfloat16).val_bpb == pytest.approx(scores[0].val_bpb, rel=1e-2)
    monkeypatch.setattr(evaluation, "MAX_LOGITS", 2 * 64 * 64)  # two windows' logits
    assert [len(b.ids) for b in evaluation.batches(tokens, table, config, torch.device("cpu"))] == [2] * 8
    assert evaluate(model, tokens, table, config) == scores[1]
