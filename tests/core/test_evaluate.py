"""Bits per byte: recorded scores, an independent count of the bytes, and a source of known entropy."""

import math

import numpy as np
import pytest
import sentencepiece
import torch
from golden_vectors import golden, state_of

from pgolf.data.dataset import Dataset, validation_tokens
from pgolf_core import evaluate as evaluation
from pgolf_core.config import RunConfig
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
    config = EvalConfig(
        eval_bigram_mix_weight=1.0, eval_cache_mix_weight=0.5, eval_cache_size=8, eval_cache_delay=delay
    )
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
    assert (scored[: targets // 64 * 64 if not stride else targets] == 1).all()


def test_needs_a_window():
    model = GPT(ModelConfig(vocab_size=8, num_layers=1, model_dim=8, num_heads=2, num_kv_heads=1))
    table = ByteTable(torch.ones(8, dtype=torch.int16), torch.zeros(8).bool(), torch.zeros(8).bool())
    with pytest.raises(ValueError, match="hold no window of eval_seq_len=16"):
        evaluate(model, torch.zeros(16).long(), table, EvalConfig(eval_seq_len=16))
    with pytest.raises(ValueError, match="eval_seq_len=0"):
        evaluate(model, torch.zeros(16).long(), table, EvalConfig())


class _Guess(torch.nn.Module):
    """Log probabilities that depend on the token alone, so that their sum can be found without a model."""

    def __init__(self, vocab_size: int):
        super().__init__()
        torch.manual_seed(3)
        self.logits = torch.nn.Parameter(torch.randn(vocab_size))

    def forward(self, ids):
        return self.logits.expand(*ids.shape, -1)


@pytest.mark.parametrize("stride", [0, 100])
def test_bits_per_byte_of_the_real_corpus_by_another_path(embedded, stride):
    """The same text, detokenised by SentencePiece and measured in UTF-8, document by document."""
    dataset = Dataset.open(embedded, vocab_size=1024)
    sp = sentencepiece.SentencePieceProcessor(model_file=str(dataset.tokenizer_path))
    stream = validation_tokens(embedded, 256, 0 if not stride else 30_000)
    # End with a whole document, so that its detokenised text has no cut character.
    last = (stream == sp.bos_id()).nonzero()[-1].item()
    targets = (last - 1) // 256 * 256 if not stride else last - 1
    end = targets + 1
    tokens = stream[:end]
    model = _Guess(1024)
    score = evaluate(
        model, tokens, dataset.byte_table, EvalConfig(eval_seq_len=256, eval_stride=stride, val_batch_size=8192)
    )
    nats = -model.logits.log_softmax(0).double()[tokens[1:]].sum().item()
    text_bytes, document = 0, []
    for token in [*tokens.tolist()[1:], sp.bos_id()]:
        if token == sp.bos_id():
            text_bytes += _utf8_bytes(sp, document)
            document = []
        else:
            document.append(token)
    assert score.tokens == targets
    assert score.bytes == text_bytes
    assert score.val_bpb == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-6)


def _utf8_bytes(sp, document: list[int]) -> int:
    """Bytes of a document's text; where it ends inside a character, those of the pieces that stand alone."""
    trailing = 0
    while document and sp.is_byte(document[-1]):
        document, trailing = document[:-1], trailing + 1
    return len(sp.decode(document).encode()) + trailing


def test_never_below_the_entropy_of_the_source():
    """A Markov chain over four symbols: the model that knows it scores its entropy rate, others more."""
    rng = np.random.default_rng(0)
    transition = rng.dirichlet(np.full(4, 0.5), size=4)
    values, vectors = np.linalg.eig(transition.T)
    stationary = np.real(vectors[:, np.argmax(values.real)])
    stationary /= stationary.sum()
    entropy = -(stationary[:, None] * transition * np.log2(transition)).sum()
    tokens = [0]
    for u in rng.random(40_000):
        tokens.append(min(3, int(np.searchsorted(transition[tokens[-1]].cumsum(), u))))
    tokens = torch.tensor(tokens)
    table = ByteTable(torch.ones(4, dtype=torch.int16), torch.zeros(4).bool(), torch.zeros(4).bool())
    config = EvalConfig(eval_seq_len=100, val_batch_size=10_000)

    class Oracle(torch.nn.Module):
        def __init__(self, blur: float):
            super().__init__()
            mixed = (1 - blur) * torch.tensor(transition) + blur / 4
            self.table = torch.nn.Parameter(mixed.log().float())

        def forward(self, ids):
            return self.table[ids]

    knowing, *blurred = (evaluate(Oracle(b), tokens, table, config).val_bpb for b in (0.0, 0.1, 0.5))
    assert knowing == pytest.approx(entropy, abs=4 * 0.8 / math.sqrt(40_000))  # four standard errors
    assert knowing < blurred[0] < blurred[1]
    # A real model trained on the chain comes near its entropy and not below.
    torch.manual_seed(0)
    model = GPT(ModelConfig(vocab_size=4, num_layers=1, model_dim=16, num_heads=2, num_kv_heads=2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for i in range(120):
        batch = tokens[(i % 30) * 1001 : (i % 30) * 1001 + 1001]
        optimizer.zero_grad()
        model.loss(batch[:-1].view(10, 100), batch[1:].view(10, 100)).backward()
        optimizer.step()
    trained = evaluate(model, tokens[30_100:], table, config).val_bpb
    knowing_there = evaluate(Oracle(0.0), tokens[30_100:], table, config).val_bpb
    assert knowing_there < trained < knowing_there + 0.05


def test_precision_and_batch_do_not_change_the_score(monkeypatch):
    model = GPT(ModelConfig(vocab_size=64, num_layers=1, model_dim=16, num_heads=2, num_kv_heads=2))
    tokens = torch.randint(64, (1025,))
    table = ByteTable(torch.ones(64, dtype=torch.int16), torch.zeros(64).bool(), torch.zeros(64).bool())
    scores = [evaluate(model, tokens, table, EvalConfig(eval_seq_len=64, val_batch_size=b)) for b in (64, 256, 1024)]
    assert [s.val_bpb for s in scores] == pytest.approx([scores[0].val_bpb] * 3, rel=1e-6)
    half = evaluate(model, tokens, table, EvalConfig(eval_seq_len=64, val_batch_size=256), torch.bfloat16)
    assert half.val_bpb == pytest.approx(scores[0].val_bpb, rel=1e-2)
    monkeypatch.setattr(evaluation, "MAX_LOGITS", 2 * 64 * 64)  # two windows' logits
    sizes = [len(b.ids) for b in evaluation.batches(tokens, table, EvalConfig(eval_seq_len=64), torch.device("cpu"))]
    assert sizes == [2] * 8
    assert evaluate(model, tokens, table, EvalConfig(eval_seq_len=64)) == evaluate(
        model, tokens, table, EvalConfig(eval_seq_len=64, val_batch_size=128)
    )


def test_eval_group_resolves_its_window():
    assert RunConfig(track="nano").eval.eval_seq_len == RunConfig(track="nano").train_seq_len
