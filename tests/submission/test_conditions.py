"""The tests of the four conditions: they hold for legal scorers, and name what a planted violation breaks."""

import dataclasses

import pytest
import torch
from support.training import gaussian_state, tiny

from pgolf.submission import conditions
from pgolf.submission.conditions import FAIL, NOT_TESTED, PASS, AdaptedPipeline, Pipeline, Scored, examine, probe
from pgolf_core import adapt
from pgolf_core.model import GPT
from pgolf_core.tokens import BYTE_PIECES, ByteTable

V, BOS, WINDOW, CHUNK = 24, 1, 16, 6
DOCUMENTS = (13, 7, 19, 11)  # tokens each


def text():
    generator = torch.Generator().manual_seed(3)
    parts = [torch.cat([torch.tensor([BOS]), torch.randint(2, V, (n - 1,), generator=generator)]) for n in DOCUMENTS]
    return torch.cat(parts)


class Learner:
    """A table of token pairs and a bias that learns from every chunk after it was scored; `fault` breaks a rule."""

    def __init__(self, fault="", isolated=False, shortest_first=False):
        self.fault, self.isolated, self.shortest_first = fault, isolated, shortest_first
        self.table = torch.randn(V, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def spans(self, tokens):
        """Targets of each document, in the order in which they are scored."""
        starts = [i for i in (tokens == BOS).nonzero().flatten().tolist() if i < len(tokens) - 1]
        starts = starts if starts[:1] == [0] else [0, *starts]
        spans = list(zip(starts, [*starts[1:], len(tokens) - 1], strict=True))
        return sorted(spans, key=lambda span: span[1] - span[0]) if self.shortest_first else spans

    def one_pass(self, tokens, bias=None):
        """Probabilities (n - 1, V) of all targets, the order, and the bias at the end."""
        p, order = torch.zeros(len(tokens) - 1, V, dtype=torch.float64), []
        bias = torch.zeros(V, dtype=torch.float64) if bias is None else bias.clone()
        for start, end in self.spans(tokens):
            if self.isolated and self.fault != "not reset":
                bias = torch.zeros(V, dtype=torch.float64)
            for first in range(start, end, CHUNK):
                chunk = list(range(first, min(first + CHUNK, end)))
                learned = 0.3 * torch.bincount(tokens[[i + 1 for i in chunk]], minlength=V)
                if self.fault == "adapts first":
                    bias = bias + learned
                for i in chunk:
                    p[i] = self.probabilities(tokens, i, bias)
                bias = bias + learned * (self.fault != "adapts first")
                order += chunk
        rank = torch.empty(len(order), dtype=torch.int64)
        rank[order] = torch.arange(len(order))
        return p, torch.arange(len(order)) if self.fault == "says file order" else rank, bias

    def probabilities(self, tokens, i, bias):
        logits, target = self.table[tokens[i]] + bias, tokens[i + 1]
        if self.fault == "future gate" and i + 2 < len(tokens):
            logits = logits * (1 + 0.2 * (tokens[i + 2] % 3))
        if self.fault == "class of the target":
            logits = logits + (torch.arange(V) % 2 == target % 2)
        p = logits.softmax(0)
        if self.fault == "unnormalised mixture":
            p = p + 0.1 * torch.nn.functional.one_hot(tokens[i], V)
        if self.fault == "target in the key":
            seen = ((tokens[:i] == tokens[i]) & (tokens[1 : i + 1] == target)).sum()
            p = 0.9 * p + 0.1 * torch.nn.functional.one_hot(target, V) * (1 + seen)
        return p

    def score(self, tokens):
        p, order, bias = self.one_pass(tokens)
        if self.fault == "second pass":
            p = self.one_pass(tokens, bias)[0]
        nats = -p.gather(1, tokens[1:, None])[:, 0].log()
        if self.fault == "better of two":
            nats = torch.minimum(nats, -self.one_pass(tokens, bias)[0].gather(1, tokens[1:, None])[:, 0].log())
        if self.fault == "bonus for the gold token":
            nats = -(0.8 * (-nats).exp() + 0.2).log()
        times = torch.ones_like(order)
        times[-4:] += {"tail twice": 1, "tail dropped": -1}.get(self.fault, 0)
        return Scored(nats * times, times, order)

    def distribution(self, tokens, position):
        p, _, bias = self.one_pass(tokens)
        return (self.one_pass(tokens, bias)[0] if self.fault == "second pass" else p)[position - 1]


def outcomes(scorer):
    return {v.rule: v for v in examine(scorer, text(), WINDOW, BOS)}


@pytest.mark.parametrize("knobs", [{}, {"isolated": True}, {"shortest_first": True}])
def test_a_scorer_that_learns_only_from_what_it_has_scored_passes_every_condition(knobs):
    verdicts = outcomes(Learner(**knobs))
    assert [v.rule for v in verdicts.values() if v.outcome == FAIL] == []
    assert (verdicts["documents independent"].outcome == PASS) == ("isolated" in knobs)


@pytest.mark.parametrize(
    ("fault", "rule", "says"),
    [
        ("future gate", "C1 causality", "tokens scored later change the distribution at token"),
        ("second pass", "C1 causality", "tokens scored later change"),
        ("adapts first", "C3 score before update", "the token itself changes the distribution at token"),
        ("class of the target", "C3 score before update", "the token itself changes the distribution"),
        ("target in the key", "C3 score before update", "the token itself changes the distribution"),
        ("target in the key", "C2 normalisation", "would score"),
        ("unnormalised mixture", "C2 normalisation", "sum to 1.1"),
        ("bonus for the gold token", "C2 normalisation", "and the distribution says"),
        ("better of two", "C4 one pass", "nats, and its distribution gives"),
        ("tail twice", "C4 one pass", "4 targets are not scored exactly once, but between 1 and 2 times"),
        ("tail dropped", "C4 one pass", "4 targets are not scored exactly once, but between 0 and 1 times"),
    ],
)
def test_a_violated_condition_is_named(fault, rule, says):
    verdict = outcomes(Learner(fault))[rule]
    assert verdict.outcome == FAIL
    assert says in verdict.found


def test_an_adapter_that_is_not_reset_between_documents_is_named_where_they_are_said_to_be_independent():
    assert outcomes(Learner("not reset", isolated=True))["documents independent"].outcome == FAIL
    assert outcomes(Learner("not reset"))["documents independent"].outcome == NOT_TESTED


def test_a_scorer_that_hides_its_order_is_not_causal():
    assert outcomes(Learner("says file order", shortest_first=True))["C1 causality"].outcome == FAIL


def model_and_tokens(**knobs):
    config = tiny(train_seq_len=32, vocab_size=260, **knobs)
    model = GPT(config.model)
    model.load_state_dict(gaussian_state(config))
    tokens = torch.randint(4, 260, (200,), generator=torch.Generator().manual_seed(1))
    tokens[::23] = BOS
    return model, config, probe(tokens, 32, BOS)


KNOBS = [
    {},
    {"eval_stride": 8},
    {"eval_stride": 8, "document_mask": True, "smear_gate": "v2"},
    {"eval_cache_size": 16, "eval_cache_mix_weight": 1.0, "eval_bigram_mix_weight": 2.0},
]


@pytest.mark.parametrize("knobs", KNOBS)
def test_the_project_s_own_scorer_passes_every_condition_and_gives_the_nats_of_evaluate(knobs):
    model, config, tokens = model_and_tokens(**knobs)
    pipeline = Pipeline(model, config, ByteTable.of(BYTE_PIECES))
    verdicts = [pipeline.against_evaluate(tokens), *examine(pipeline, tokens, 32, BOS)]
    assert [f"{v.rule}: {v.found}" for v in verdicts if v.outcome == FAIL] == []
    assert (verdicts[-1].outcome == PASS) == ("document_mask" in knobs)


@pytest.mark.parametrize("way", ["lora", "sgd", pytest.param("phased", marks=pytest.mark.slow)])
def test_a_model_that_learns_from_what_it_has_scored_passes_every_condition(way):
    model, config, tokens = model_and_tokens(adapt=way, adapt_chunk=8, adapt_lr=0.05, adapt_phase_documents=1)
    pipeline = AdaptedPipeline(model, config, ByteTable.of(BYTE_PIECES))
    plain = Pipeline(model, config.with_knobs(adapt="off"), ByteTable.of(BYTE_PIECES)).score(tokens)
    assert not torch.equal(pipeline.score(tokens).nats, plain.nats)
    verdicts = [pipeline.against_evaluate(tokens), *examine(pipeline, tokens, 32, BOS)]
    assert [f"{v.rule}: {v.found}" for v in verdicts if v.outcome == FAIL] == []
    assert (verdicts[-1].outcome == PASS) == (way == "lora")


@pytest.mark.parametrize("way", ["sgd", pytest.param("phased", marks=pytest.mark.slow)])
def test_a_model_whose_weights_learn_from_text_that_is_not_scored_is_named(way, monkeypatch):
    honest, learn = conditions.predictions, adapt.Learner.learn

    def cheating(model, tokens, *arguments):
        monkeypatch.setattr(adapt.Learner, "learn", lambda self, texts, rate: learn(self, [tokens], rate))
        yield from honest(model, tokens, *arguments)

    monkeypatch.setattr(conditions, "predictions", cheating)
    model, config, tokens = model_and_tokens(adapt=way, adapt_chunk=8)
    pipeline = AdaptedPipeline(model, config, ByteTable.of(BYTE_PIECES))
    broken = {v.rule for v in examine(pipeline, tokens, 32, BOS) if v.outcome == FAIL}
    assert {"C1 causality", "C3 score before update"} <= broken


def test_a_model_that_learns_first_and_scores_then_is_named(monkeypatch):
    def learned_first(self, tokens, document):
        chunks = [*by_document(self, tokens, document)]  # the adapters of the last have seen all but its own targets
        for (first, last), logits in chunks:
            yield (first, last), logits + torch.nn.functional.one_hot(tokens[first + 1 : last + 1], logits.size(1))

    by_document = adapt.Learner.by_document
    monkeypatch.setattr(adapt.Learner, "by_document", learned_first)
    model, config, tokens = model_and_tokens(adapt="lora", adapt_chunk=8)
    pipeline = AdaptedPipeline(model, config, ByteTable.of(BYTE_PIECES))
    broken = {v.rule for v in examine(pipeline, tokens, 32, BOS) if v.outcome == FAIL}
    assert "C3 score before update" in broken


class AcrossDocuments(GPT):
    """A model that reads the mean of all tokens in the window, later ones and other documents' included."""

    def forward(self, ids):
        return super().forward(ids) + 0.01 * ids.float().mean(1)[:, None, None] * torch.arange(260) / 260


def test_a_model_that_reads_the_whole_window_is_named_through_the_project_s_own_scorer():
    model, config, tokens = model_and_tokens(document_mask=True)
    model.__class__ = AcrossDocuments
    pipeline = Pipeline(model, config, ByteTable.of(BYTE_PIECES))
    broken = {v.rule for v in examine(pipeline, tokens, 32, BOS) if v.outcome == FAIL}
    assert {"C1 causality", "C3 score before update", "documents independent"} <= broken


def test_scores_that_evaluate_does_not_give_are_not_taken_for_the_run_s():
    model, config, tokens = model_and_tokens()
    pipeline = Pipeline(model, config, ByteTable.of(BYTE_PIECES))
    score = pipeline.score
    pipeline.score = lambda tokens: dataclasses.replace(score(tokens), nats=0.99 * score(tokens).nats)
    assert pipeline.against_evaluate(tokens).outcome == FAIL


def test_the_tested_text_is_of_several_documents_however_long_they_are():
    tokens = torch.arange(10_000) % 200 + 4
    tokens[[0, 100, 3000, 6000, 9000]] = BOS
    part = probe(tokens, 32, BOS)
    assert part[0] == BOS
    assert int((part == BOS).sum()) == 4
    assert len(part) == 82
    assert probe(tokens[:90], 32, BOS).tolist() == tokens[:82].tolist()
