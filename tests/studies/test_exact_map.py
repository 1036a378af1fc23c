"""Exact scores against whole evaluations, bit for bit, whatever the order of blocks."""

import re

import pytest
import torch

from pgolf.studies.exact_map import exact_scores
from pgolf_core.evaluate import evaluate
from pgolf_core.knobs import EvalConfig, ModelConfig
from pgolf_core.model import GPT
from pgolf_core.tokens import ByteTable

TINY = dict(vocab_size=61, num_layers=4, model_dim=32, num_heads=4, num_kv_heads=2)
WINDOWS = dict(eval_seq_len=24, val_batch_size=96)


def table(vocab_size: int) -> ByteTable:
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, 9, (vocab_size,), generator=generator).to(torch.int16)
    return ByteTable(lengths, lengths > 4, torch.arange(vocab_size) < 2)


def noisy(**knobs) -> tuple[GPT, dict[str, torch.Tensor], torch.Tensor]:
    """A model in which every path carries signal, a change of every matrix, and a stream of tokens."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(**TINY | knobs))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    names = [name for name in model.state_dict() if name.endswith("weight")]
    changes = {name: t + 0.05 * torch.randn_like(t) for name, t in model.state_dict().items() if name in names}
    return model, changes, torch.randint(61, (24 * 11 + 7,))


def evaluated(model, changes, tokens, config, dtype=torch.float32):
    """Every variant as a model of its own."""
    state, scores = {name: t.clone() for name, t in model.state_dict().items()}, {}
    for name in ("", *changes):
        variant = GPT(model.config)
        variant.block_of_layer = model.block_of_layer
        variant.tok_emb.to(model.tok_emb.weight.dtype)
        variant.load_state_dict(state | ({name: changes[name]} if name else {}))
        scores[name] = evaluate(variant, tokens, table(61), config, dtype)
    return scores


@pytest.mark.parametrize(
    "shape",
    [
        dict(num_layers=1), dict(),
        dict(num_layers=5, tie_embeddings=False), dict(num_layers=2, embed_dim=8),
        dict(embed_dim=8, tie_embeddings=False), dict(num_unique_blocks=2), dict(num_layers=5, num_unique_blocks=3),
        dict(num_layers=3, num_unique_blocks=1, embed_dim=16), dict(window_size=5), dict(num_kv_heads=4, mlp_mult=3),
        dict(parallel_from=2, residual_lanes=2, loop_extra=1, attn_gate="sparse", skip_gates=True, ve_last=2),
        dict(parallel_from=3, loop_start=1, loop_end=2, loop_extra=2, bigram_vocab_size=50, document_mask=True),
    ],
    ids=lambda shape: "-".join(f"{k}={v}" for k, v in shape.items()) or "plain",
)  # fmt: skip
def test_exact_map_is_evaluate_to_the_last_bit(shape):
    model, changes, tokens = noisy(**shape)
    config = EvalConfig(**WINDOWS)
    scores = exact_scores(model, changes, tokens, table(61), config)
    assert scores == evaluated(model, changes, tokens, config)
    assert len({score.val_loss for score in scores.values()}) == 1 + len(changes)


@pytest.mark.parametrize("order", [[0, 1, 1, 2, 0, 2], [2, 2, 1, 0, 1, 1], [1, 1, 2, 2, 1, 1]], ids=str)
def test_exact_map_is_right_for_any_order_of_blocks(order):
    """Blocks used out of turn, several times in a row, or (the last) not at all."""
    model, changes, tokens = noisy(num_layers=6, num_unique_blocks=3)
    model.block_of_layer = order
    scores = exact_scores(model, changes, tokens, table(61), EvalConfig(**WINDOWS))
    assert scores == evaluated(model, changes, tokens, EvalConfig(**WINDOWS))
    unused = {name for name, score in scores.items() if name and score == scores[""]}
    assert unused == {name for name in changes if name.startswith("blocks.0.") and 0 not in order}


@pytest.mark.parametrize(
    ("knobs", "dtype"),
    [
        (dict(eval_stride=7, sw_eval_batch=3), torch.float32),
        (dict(eval_cache_size=9, eval_cache_mix_weight=0.2, eval_bigram_mix_weight=1.0), torch.float32),
        (dict(eval_stride=12, eval_cache_size=5, eval_bigram_mix_weight=1.0, eval_cache_delay=1), torch.float32),
        (dict(eval_seq_len=60, val_batch_size=8), torch.float32),
        (dict(), torch.bfloat16),
    ],
)
def test_exact_map_under_every_protocol(knobs, dtype):
    model, changes, tokens = noisy(num_layers=3, num_unique_blocks=2, embed_dim=16)
    if dtype == torch.bfloat16:
        model.tok_emb.to(dtype)
    config = EvalConfig(**WINDOWS | knobs)
    expected = evaluated(model, changes, tokens, config, dtype)
    assert exact_scores(model, changes, tokens, table(61), config, dtype) == expected


def test_exact_map_of_control_tensors_and_of_nothing():
    model, _, tokens = noisy()
    config = EvalConfig(**WINDOWS)
    controls = {name: t * 1.5 for name, t in model.state_dict().items() if not name.endswith("weight")}
    assert len(controls) == 5
    for changes in (controls, {}):
        assert exact_scores(model, changes, tokens, table(61), config) == evaluated(model, changes, tokens, config)


def test_the_model_is_left_as_it_was(monkeypatch):
    model, changes, tokens = noisy()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    config = EvalConfig(**WINDOWS)
    exact_scores(model, changes, tokens, table(61), config)
    with monkeypatch.context() as patch, pytest.raises(AttributeError):  # in the middle of the work
        patch.delattr(GPT, "head")
        exact_scores(model, changes, tokens, table(61), config)
    assert model.training and all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    model.loss(tokens[None, :8], tokens[None, 1:9]).backward()  # nor are its parameters of inference mode


def test_changes_must_fit():
    model, changes, tokens = noisy()
    config = EvalConfig(**WINDOWS)
    for name, shape in (("blocks.9.mlp.fc.weight", (2, 3)), ("tok_emb.weight", (1,))):
        with pytest.raises(ValueError, match=re.escape(f"no tensor {name} of shape {shape}")):
            exact_scores(model, {name: torch.zeros(shape)}, tokens, table(61), config)
    with pytest.raises(ValueError, match="hold no window"):
        exact_scores(model, changes, tokens[:5], table(61), config)
