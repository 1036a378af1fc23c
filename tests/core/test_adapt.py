"""Adaptation scores every token once and before it learns from it, and begins anew with each document."""

import pytest
import torch

from pgolf_core.adapt import evaluate_adapted, predictions, spans_of
from pgolf_core.config import RunConfig
from pgolf_core.distributed import Ranks
from pgolf_core.evaluate import evaluate
from pgolf_core.knobs import BOS
from pgolf_core.model import GPT
from pgolf_core.tokens import BYTE_PIECES, ByteTable

TABLE = ByteTable.of(BYTE_PIECES)
KNOBS = dict(
    track="nano", vocab_size=260, num_layers=2, model_dim=32, num_heads=2, num_kv_heads=1, train_seq_len=32,
    train_batch_tokens=1024, adapt_chunk=8, adapt_lr=0.02, adapt_phases=1, adapt_phase_documents=2,
)  # fmt: skip


def config_of(adapt: str, **knobs) -> RunConfig:
    return RunConfig(**KNOBS | dict(adapt=adapt) | knobs)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = GPT(config_of("off").model)
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model


def documents_of(*lengths: int) -> list[torch.Tensor]:
    """Documents (n,), each of a few bytes that repeat."""
    generator = torch.Generator().manual_seed(1)
    bodies = [torch.randint(4, 260, (5,), generator=generator).repeat(length)[:length] for length in lengths]
    return [torch.cat([torch.tensor([BOS]), body]) for body in bodies]


def text_of(documents: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([*documents, torch.tensor([BOS])])


def nats_by_document(model: GPT, tokens: torch.Tensor, config: RunConfig, ranks: Ranks = Ranks()) -> dict:  # noqa: B008
    """Text of a document -> nats of its targets, in order."""
    nats = {}
    for (first, last), logits in predictions(model, tokens, config.eval, ranks=ranks):
        losses = torch.nn.functional.cross_entropy(logits, tokens[first + 1 : last + 1], reduction="none")
        document = next(span for span in spans_of(tokens) if span[0] <= first < span[1])
        nats.setdefault(tuple(tokens[document[0] : document[1]].tolist()), []).extend(losses.tolist())
    return nats


def test_order_of_documents_and_ranks_change_no_bit_of_a_document(model):
    documents, config = documents_of(20, 70, 9, 41, 33), config_of("lora")
    expected = nats_by_document(model, text_of(documents), config)
    assert len(expected) == 5
    assert nats_by_document(model, text_of(documents[::-1]), config) == expected
    for size in (2, 4):
        parts = [nats_by_document(model, text_of(documents), config, Ranks(rank, size)) for rank in range(size)]
        assert {name: nats for part in parts for name, nats in part.items()} == expected


@pytest.mark.parametrize("adapt", ["lora", "phased", "sgd"])
def test_every_target_is_scored_once_and_the_model_stays_as_it_is(model, adapt):
    tokens, before = text_of(documents_of(20, 70, 9, 41, 33)), [p.clone() for p in model.parameters()]
    scored = [span for span, _ in predictions(model, tokens, config_of(adapt).eval)]
    assert sorted(target for span in scored for target in range(*span)) == list(range(len(tokens) - 1))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    score = evaluate_adapted(model, tokens, TABLE, config_of(adapt).eval)
    assert score.tokens == len(tokens) - 1 and score.bytes == TABLE.count(tokens)


def test_fresh_adapters_leave_the_model_as_it_is_to_the_bit(model):
    tokens = text_of(documents_of(20, 70, 9))
    starts = {first for first, _ in spans_of(tokens)}
    for (first, last), logits in predictions(model, tokens, config_of("lora").eval):
        if first in starts:
            ids = torch.nn.functional.pad(tokens[first:last], (0, 8 - (last - first)), value=BOS)
            assert torch.equal(logits, model(ids[None])[0, : last - first])


@pytest.mark.parametrize("adapt", ["lora", "phased", "sgd"])
def test_what_repeats_is_learned(model, adapt):
    tokens = text_of(documents_of(90, 90, 90))[: 32 * 8 + 1]
    plain = evaluate(model, tokens, TABLE, config_of("off").eval)
    rates = dict(adapt_base_lr=0.3, adapt_epochs=4)
    assert evaluate_adapted(model, tokens, TABLE, config_of(adapt, **rates).eval).val_bpb < plain.val_bpb - 0.2


def test_a_window_longer_than_a_chunk_gives_context_and_no_second_score(model):
    tokens = text_of(documents_of(60))
    short, long = (config_of("lora", eval_seq_len=length, adapt_lr=1e-9).eval for length in (8, 32))
    nats = [evaluate_adapted(model, tokens, TABLE, config).val_loss for config in (short, long)]
    assert nats[0] != nats[1]
