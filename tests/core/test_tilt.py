"""The n-gram tilt: its hints are of a table of earlier tokens alone, its distribution sums to one."""

from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from support.training import gaussian_state, tiny
from test_adapt import TABLE

from pgolf.submission.conditions import FAIL, AdaptedPipeline, Pipeline, examine
from pgolf_core import tilt
from pgolf_core.distributed import Ranks
from pgolf_core.evaluate import evaluate
from pgolf_core.knobs import BOS, EvalConfig
from pgolf_core.model import GPT
from pgolf_core.tilt import hints_of, tilted

ORDER = EvalConfig(eval_tilt_boost=2.0, eval_tilt_order=2)


def text_of(tokens: int, seed: int = 0) -> torch.Tensor:
    """Pieces of one text in random order, with some tokens changed: what repeats, repeats not always."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(4, 12, (60,), generator=generator)
    starts = torch.randint(0, 40, (tokens // 20,), generator=generator)
    text = torch.cat([source[start : start + 20] for start in starts])
    changed = torch.rand(len(text), generator=generator) < 0.05
    return text.where(~changed, torch.randint(4, 12, (len(text),), generator=generator))


def plain_hints(tokens: torch.Tensor, lowest: int) -> list[int]:
    """Target by target: look up, then update. The first of tokens seen equally often is the hint."""
    text, tables, leaders, hints = tokens.tolist(), defaultdict(Counter), {}, []
    for i in range(1, len(text)):
        contexts = [tuple(text[i - k : i]) for k in range(16, lowest - 1, -2) if i >= k]
        hint = -1
        for context in contexts:
            share, count = (0.5, 2) if len(context) >= 14 else (0.6, 2) if len(context) >= 11 else (0.7, 3)
            table, leader = tables[context], leaders.get(context)
            if hint < 0 and table[leader] >= max(count, share * table.total()):
                hint = leader
        hints.append(hint)
        for context in contexts:
            tables[context][text[i]] += 1
            if tables[context][text[i]] > tables[context][leaders.get(context)]:
                leaders[context] = text[i]
    return hints


@pytest.mark.parametrize("lowest", [2, 5, 8, 16])
def test_hints_are_those_of_a_table_that_is_looked_up_before_each_update(lowest):
    text = text_of(1500)
    hints = hints_of(text, ORDER.model_copy(update={"eval_tilt_order": lowest}))
    assert hints.tolist() == plain_hints(text, lowest) and 50 < (hints >= 0).sum() < len(hints)


def test_short_texts_have_no_hints():
    for n in (2, 3, 9, 17):
        assert (hints_of(torch.full((n,), 5), EvalConfig(eval_tilt_boost=1.0, eval_tilt_order=16)) < 0).all()


def flips(hints_of) -> list[int]:
    """Targets whose own change, or a change of what comes later, changes a hint up to theirs."""
    text, found, noise = text_of(800), [], torch.randint(4, 12, (800,), generator=torch.Generator().manual_seed(9))
    before = hints_of(text, ORDER)
    for target in range(0, len(text) - 1, 7):
        other = text.clone()
        other[target + 1 :] = noise[target + 1 :]
        if not torch.equal(hints_of(other, ORDER)[: target + 1], before[: target + 1]):
            found.append(target)
    return found


def test_a_target_changes_no_hint_up_to_its_own_and_a_table_that_is_updated_first_is_found(monkeypatch):
    assert flips(hints_of) == []
    monkeypatch.setattr(tilt, "earlier", lambda values: values)  # the table after the target's own update
    assert len(flips(hints_of)) > 3


def model_and_text(**knobs):
    config = tiny(train_seq_len=32, vocab_size=260, eval_tilt_boost=2.0, eval_tilt_order=2, **knobs)
    model = GPT(config.model)
    model.load_state_dict(gaussian_state(config))
    text = torch.arange(4, 28).repeat(5)[:101]  # a table is confident from the fourth time on
    text[[0, 45]] = BOS
    return model, config, text


CASES = [
    {},
    {"eval_stride": 8},
    {"document_mask": True, "eval_stride": 16},
    {"eval_cache_size": 8, "eval_cache_mix_weight": 1.0, "eval_bigram_mix_weight": 2.0},
    {"adapt": "sgd", "adapt_chunk": 16},
    pytest.param({"adapt": "lora", "adapt_chunk": 8}, marks=pytest.mark.slow),
    pytest.param({"adapt": "phased", "adapt_chunk": 8, "adapt_phase_documents": 1}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("knobs", CASES, ids=str)
def test_a_tilted_score_keeps_the_four_conditions(knobs):
    model, config, text = model_and_text(**knobs)
    pipeline = (AdaptedPipeline if "adapt" in knobs else Pipeline)(model, config, TABLE)
    verdicts = [pipeline.against_evaluate(text), *examine(pipeline, text, 32, BOS)]
    assert [f"{v.rule}: {v.found}" for v in verdicts if v.outcome == FAIL] == []
    plain = type(pipeline)(model, config.with_knobs(eval_tilt_boost=0), TABLE)
    assert not torch.equal(pipeline.score(text).nats, plain.score(text).nats)


def test_a_table_that_is_updated_before_the_score_breaks_the_third_condition(monkeypatch):
    monkeypatch.setattr(tilt, "earlier", lambda values: values)
    model, config, text = model_and_text()
    broken = {v.rule for v in examine(Pipeline(model, config, TABLE), text, 32, BOS) if v.outcome == FAIL}
    assert "C3 score before update" in broken


def test_the_distribution_is_the_definition_and_sums_to_one():
    logits = 3 * torch.randn(50, 300, generator=torch.Generator().manual_seed(0))
    hints = torch.arange(50) * 5
    hints[::4] = -1
    p, q = logits.softmax(-1).double(), tilted(logits, hints, 2.0).log_softmax(-1).double().exp()
    assert (q.sum(-1) - 1).abs().max() < 1e-5
    for i, hint in enumerate(hints.tolist()):
        expected = p[i].clone()
        if hint >= 0:
            expected[hint] *= np.exp(2.0)
            expected /= 1 + p[i, hint] * (np.exp(2.0) - 1)
        torch.testing.assert_close(q[i], expected, rtol=1e-4, atol=1e-7)


def test_ranks_change_no_bit_of_a_tilted_score():
    model, config, text = model_and_text(val_batch_size=32)

    class Half(Ranks):
        def add_(self, tensor):
            sums.append(tensor.clone())
            return tensor

    nats = []
    for rank in (0, 1):
        sums = []
        evaluate(model, text, TABLE, config.eval, ranks=Half(rank, 2))
        nats.append(sums[0])
    assert (nats[0] + nats[1]).sum().item() == pytest.approx(
        evaluate(model, text, TABLE, config.eval).val_loss * (len(text) - 1), rel=1e-12
    )


def test_text_that_repeats_scores_better_tilted():
    model, config, text = model_and_text()
    plain = evaluate(model, text, TABLE, config.with_knobs(eval_tilt_boost=0).eval)
    assert evaluate(model, text, TABLE, config.eval).val_loss < plain.val_loss - 0.1
