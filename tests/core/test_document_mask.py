"""Document masks: a token's nats depend on its own document alone, to the last bit."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf_core.evaluate import evaluate
from pgolf_core.knobs import BOS, EvalConfig, ModelConfig
from pgolf_core.model import GPT
from pgolf_core.tokens import ByteTable

ALL = dict(bigram_vocab_size=301, smear_gate="v2", ve_last=2, num_layers=4, parallel_from=2, residual_lanes=2,
           loop_extra=1, loop_end=1, skip_gates=True, xsa_last=4, attn_gate="sparse", rope_dims=4)  # fmt: skip
SHAPES = [{}, dict(window_size=20), dict(num_unique_blocks=1, embed_dim=8), ALL, ALL | dict(smear_gate="v1")]
V = 50


def model_of(**knobs) -> GPT:
    """A model whose attention says something from the first step on."""
    config = ModelConfig(vocab_size=V, model_dim=32, num_heads=4, **dict(num_layers=2, num_kv_heads=2) | knobs)
    torch.manual_seed(0)
    model = GPT(config)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    return model


def rows_of_documents(T: int) -> tuple[Tensor, list[int]]:
    """Ids (2, T) and where their documents begin; the first lost its beginning, and one is a BOS alone."""
    starts = [0, 17, 18, T // 2, T - 9]
    ids = torch.randint(BOS + 1, V, (2, T))
    ids[:, starts[1:]] = BOS
    return ids, starts


def nats(model: GPT, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return F.cross_entropy(model(ids[:, :-1]).mT, ids[:, 1:], reduction="none")


@pytest.mark.parametrize("T", [64, 1100])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tokens_of_other_documents_change_no_bit(T, shape):
    model = model_of(document_mask=True, **shape)
    ids, starts = rows_of_documents(T)
    before = nats(model, ids)
    assert before.isfinite().all()
    for first, end in zip(starts, [*starts[1:], T], strict=True):
        other = torch.randint(BOS, V, ids.shape)  # documents of other lengths too
        other[:, first : end + 1] = ids[:, first : end + 1]  # the next BOS ends this one
        after = nats(model, other)
        assert torch.equal(after[:, first : end - 1], before[:, first : end - 1])
        assert first == 0 or not torch.equal(after[:, : first - 1], before[:, : first - 1])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_document_is_as_if_alone(shape):
    model, alone = model_of(document_mask=True, **shape), model_of(**shape)
    ids, starts = rows_of_documents(64)
    together = model(ids)
    for first, end in zip(starts, [*starts[1:], 64], strict=True):
        assert torch.allclose(together[:, first:end], alone(ids[:, first:end]), atol=1e-4)
    assert not torch.allclose(together, alone(ids), atol=1e-2)


def test_scores_are_those_of_the_documents_alone():
    model, ids = model_of(document_mask=True), torch.randint(BOS + 1, V, (129,))
    ids[torch.arange(0, 129, 8)] = BOS
    table = ByteTable(torch.ones(V, dtype=torch.int16), *torch.zeros(2, V, dtype=torch.bool))
    score = evaluate(model, ids, table, EvalConfig(eval_seq_len=64, val_batch_size=64))
    expected = nats(model_of(), torch.cat([ids[:-1].view(16, 8), ids[8::8, None]], dim=1))
    assert score.val_loss == pytest.approx(expected.mean().item(), abs=1e-5)
