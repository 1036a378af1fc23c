"""The four conditions of a legal score, tested on the scorer that makes it: change tokens, look what else changes.

A scorer is any object with the two methods of Scorer, whether its model is fixed or learns from what it has scored.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgolf_core.adapt import evaluate_adapted, predictions
from pgolf_core.config import RunConfig
from pgolf_core.device import autocast, pick_dtype
from pgolf_core.evaluate import Batch, all_windows, batches, evaluate, evaluating, scored_logits
from pgolf_core.tokens import ByteTable

PASS, FAIL, NOT_TESTED = "pass", "fail", "not tested"
PLACES = 8  # tokens whose distributions are looked at
SUM_TOLERANCE = 1e-5  # tolerated error of a distribution's sum
NATS_TOLERANCE = 1e-4  # between a score and the logarithm of its probability, both of float32 logits
C1, C2, C3, C4 = "C1 causality", "C2 normalisation", "C3 score before update", "C4 one pass"
NOISE, MOST_NOISE = 4.0, 1e-3  # tolerated change: so many differences of two equal scorings, at most so many nats


@dataclass(frozen=True)
class Verdict:
    """outcome: PASS, FAIL or NOT_TESTED. how: the test. found: its figures, or why there was none."""

    rule: str
    outcome: str
    how: str
    found: str


def judged(rule: str, how: str, problems: list[str], figures: str) -> Verdict:
    """FAIL with the problems if there are any, else PASS with the figures."""
    return Verdict(rule, FAIL, how, "; ".join(problems)) if problems else Verdict(rule, PASS, how, figures)


@dataclass(frozen=True)
class Scored:
    """The scores of a text of n tokens; target i is token i + 1.

    nats: (n - 1,) float64. times: (n - 1,), how often each target was counted. order: (n - 1,), the order in which the
    scorer says it scored: a target may depend on targets of lower order alone, and on the first token.
    """

    nats: Tensor
    times: Tensor
    order: Tensor


class Scorer(Protocol):
    isolated: bool  # whether every document is said to be scored as if it were alone

    def score(self, tokens: Tensor) -> Scored:
        """Scores of tokens (n,) from the state that the file gives: no call leaves anything for the next one."""

    def distribution(self, tokens: Tensor, position: int) -> Tensor:
        """Probabilities (V,) float64 by which tokens[position] was scored in score(tokens)."""


class Pipeline:
    """The scorer of pgolf_core.evaluate: the same batches of windows, document mask, n-gram cache and tilt."""

    def __init__(self, model: nn.Module, config: RunConfig, byte_table: ByteTable):
        self.model, self.evaluation, self.byte_table = model, config.eval, byte_table
        self.dtype = pick_dtype(config.train, next(model.parameters()).device)
        self.evaluate = evaluate
        # Cache and tilt look beyond a document.
        self.isolated = config.document_mask and not (config.eval_cache_size or config.eval_tilt_boost)

    def _batches(self, tokens: Tensor, only: int | None = None) -> Iterator[tuple[Batch, Tensor, Tensor]]:
        """Batches with the numbers (B·T,) of their targets and logits (B·T, V); only: of those that count this one."""
        starts = torch.tensor([start for start, _ in all_windows(tokens, self.evaluation)])
        offsets = torch.arange(self.evaluation.eval_seq_len)
        with evaluating(self.model) as device:
            for batch in batches(tokens, self.byte_table, self.evaluation, device):
                targets = (starts[batch.windows, None] + offsets).flatten()
                if only is not None and only not in targets[batch.scored.cpu()]:
                    continue
                with autocast(device, self.dtype):
                    logits = self.model(batch.ids)
                yield batch, targets, scored_logits(logits, batch, self.evaluation).flatten(0, 1)

    def score(self, tokens: Tensor) -> Scored:
        nats = torch.zeros(len(tokens) - 1, dtype=torch.float64)
        times = torch.zeros(len(tokens) - 1, dtype=torch.int64)
        for batch, targets, logits in self._batches(tokens):
            loss = F.cross_entropy(logits, batch.targets.flatten(), reduction="none").double().cpu()
            scored = batch.scored.cpu()
            nats.index_add_(0, targets[scored], loss[scored])
            times.index_add_(0, targets[scored], torch.ones_like(targets[scored]))
        return Scored(nats, times, torch.arange(len(nats)))

    def distribution(self, tokens: Tensor, position: int) -> Tensor:
        for batch, targets, logits in self._batches(tokens, only=position - 1):
            row = ((targets == position - 1) & batch.scored.cpu()).nonzero()[0, 0]
            return logits[row].double().cpu().softmax(0)
        raise ValueError(f"token {position} is scored in no window")

    def against_evaluate(self, tokens: Tensor) -> Verdict:
        """Whether the scores tested here are those of evaluate(), whose sum a result states."""
        whole = self.evaluate(self.model, tokens, self.byte_table, self.evaluation, self.dtype)
        ours, theirs = self.score(tokens), whole.val_loss * whole.tokens
        own, counted = ours.nats.sum().item(), int(ours.times.sum())
        same = abs(own - theirs) <= 1e-9 * theirs and counted == whole.tokens
        found = f"{own:.6f} nats of {counted:,} targets here, {theirs:.6f} of {whole.tokens:,} in evaluate()"
        return judged("tested as scored", "sum of the tested nats against evaluate()", [] if same else [found], found)


class AdaptedPipeline(Pipeline):
    """The scorer of pgolf_core.adapt, which learns from what it has scored.

    All weights learn after every document, or half a window, so that the text of a test holds such updates.
    """

    def __init__(self, model: nn.Module, config: RunConfig, byte_table: ByteTable):
        super().__init__(model, config, byte_table)
        often = {"adapt_phase_documents": 1, "adapt_chunk": min(config.adapt_chunk, config.eval_window // 2)}
        self.evaluation = self.evaluation.model_copy(update=often)
        self.isolated, self.evaluate = config.adapt == "lora" and not config.eval_tilt_boost, evaluate_adapted

    def score(self, tokens: Tensor) -> Scored:
        nats, times = torch.zeros(len(tokens) - 1, dtype=torch.float64), torch.zeros(len(tokens) - 1, dtype=torch.int64)
        for (first, last), logits in predictions(self.model, tokens, self.evaluation, self.dtype):
            targets = tokens[first + 1 : last + 1].to(logits.device)
            nats[first:last] += F.cross_entropy(logits.detach().float(), targets, reduction="none").double().cpu()
            times[first:last] += 1
        return Scored(nats, times, torch.arange(len(nats)))

    def distribution(self, tokens: Tensor, position: int) -> Tensor:
        for (first, last), logits in predictions(self.model, tokens, self.evaluation, self.dtype):
            if first < position <= last:
                return logits[position - 1 - first].detach().double().cpu().softmax(0)
        raise ValueError(f"token {position} is scored in no chunk")


def probe(tokens: Tensor, window: int, bos: int) -> Tensor:
    """The text that is tested: beginnings of the first documents in tokens (n,), up to 2.5 windows of them."""
    length = 5 * window // 2 + 2
    borders = (tokens == bos).nonzero().flatten().tolist() or [0]
    parts = [tokens[a : min(b, a + length // 4 + 1)] for a, b in pairwise([*borders, len(tokens)])]
    return torch.cat(parts)[:length] if len(parts) > 3 else tokens[:length]


def examine(scorer: Scorer, tokens: Tensor, window: int, bos: int) -> list[Verdict]:
    """Verdicts on the four conditions, and on documents that are said to be independent. tokens: (n,), see probe."""
    trial, places = _Trial(scorer, tokens, bos), _places(tokens, window, bos)
    for place in places:
        trial.at(place)
    slack = f"tolerance {trial.tolerance:.1e}" if trial.tolerance else "to the bit"
    moved, sums, own = "largest change {:.1e}, " + slack, "sums within {:.1e} of 1", "each once, within {:.1e} nats"
    tests = {
        C1: ("change every token scored after it", moved),
        C2: ("sum over the vocabulary, and score other tokens in its place", f"{sums}, {trial.others} others agree"),
        C3: ("change the token itself", moved),
        C4: ("count the scores of each target, and compare each with its one distribution", own),
    }
    where = f"{len(places)} places, {len(tokens):,} tokens"
    return [
        *(
            judged(r, f"{how}: {where}", trial.problems[r][:3], f.format(trial.largest[r]))
            for r, (how, f) in tests.items()
        ),
        trial.isolation(),
    ]


def _places(tokens: Tensor, window: int, bos: int) -> list[int]:
    """Positions at the edges of windows, around the begin of documents, and between."""
    n, borders = len(tokens), (tokens == bos).nonzero().flatten().tolist()
    border = next((i for i in borders if i > 1), n // 3)
    fixed = [1, window, window + 1, border, border + 1]
    free = torch.randperm(n - 1, generator=torch.Generator().manual_seed(0))[:PLACES] + 1
    return sorted({i for i in [*fixed, *free.tolist()] if 1 <= i < n})


class _Trial:
    """A text, its scores, and what changed tokens did to them."""

    def __init__(self, scorer: Scorer, tokens: Tensor, bos: int):
        self.scorer, self.tokens, self.bos, self.others = scorer, tokens, bos, 0
        self.base, again = scorer.score(tokens), scorer.score(tokens)
        self.tolerance = min(NOISE * float((again.nats - self.base.nats).abs().max()), MOST_NOISE)
        self.problems: dict[str, list[str]] = {rule: [] for rule in (C1, C2, C3, C4)}
        self.largest = dict.fromkeys(self.problems, 0.0)
        if wrong := int((self.base.times != 1).sum()):
            counts = f"between {int(self.base.times.min())} and {int(self.base.times.max())} times"
            self._note(C4, 0.0, f"{wrong:,} targets are not scored exactly once, but {counts}", wrong)
        # Another order than the file's may follow the lengths of documents, which then stay as they are.
        self.same_documents = not bool((self.base.order.diff() > 0).all())
        self.random = torch.Generator().manual_seed(1)

    def _note(self, rule: str, size: float, words: str, fails: bool) -> None:
        self.largest[rule] = max(self.largest[rule], size)
        if fails:
            self.problems[rule].append(words)

    def _changed(self, where: Tensor, vocabulary: int, same_documents: bool) -> Tensor:
        """The text with other tokens at `where` (n,) bool."""
        step = torch.randint(1, vocabulary, self.tokens.shape, generator=self.random)
        other = (self.tokens + step) % vocabulary
        if same_documents:
            other = torch.where(other == self.bos, (self.bos + 1) % vocabulary, other)
            where = where & (self.tokens != self.bos)
        return torch.where(where, other, self.tokens)

    def at(self, place: int) -> None:
        """Test the score of one token."""
        order, target, token = self.base.order, place - 1, int(self.tokens[place])
        p = self.scorer.distribution(self.tokens, place)
        off = abs(float(p.sum()) - 1)
        words = f"the probabilities at token {place} sum to {float(p.sum()):.6g}"
        self._note(C2, off, words, not (off <= SUM_TOLERANCE and bool((p >= 0).all())))
        nats, own = float(self.base.nats[target]), -float(p[token].log())
        words = f"token {place} is scored {nats:.4f} nats, and its distribution gives {own:.4f}"
        self._note(C4, abs(nats - own), words, not abs(nats - own) <= NATS_TOLERANCE)
        later = torch.cat([torch.tensor([False]), order > order[target]])
        self._compare(C1, place, p, self._changed(later, len(p), self.same_documents), order <= order[target])
        others = {int(p.argmax()), int(self.tokens[place - 1]), int(torch.randint(len(p), (), generator=self.random))}
        if self.same_documents:
            others = set() if token == self.bos else others - {self.bos}
        for other in others - {token}:
            text = self.tokens.clone()
            text[place] = other
            nats = float(self._compare(C3, place, p, text, order < order[target])[target])
            own = -float(p[other].log())
            words = f"at token {place} token {other} would score {nats:.4f} nats, and the distribution says {own:.4f}"
            self._note(C2, 0.0, words, not abs(nats - own) <= NATS_TOLERANCE)
            self.others += 1

    def _compare(self, rule: str, place: int, p: Tensor, text: Tensor, unchanged: Tensor) -> Tensor:
        """Nats of a changed text, of which the unchanged targets and the distribution at place must be as before."""
        nats = self.scorer.score(text).nats
        moved = float(((nats - self.base.nats) * unchanged).abs().max())
        shift = float((self.scorer.distribution(text, place) - p).abs().max())
        what = "tokens scored later change" if rule == C1 else "the token itself changes"
        words = f"{what} the distribution at token {place} by {shift:.1e} and earlier scores by {moved:.1e} nats"
        self._note(rule, max(moved, shift), words, not max(moved, shift) <= self.tolerance)
        return nats

    def isolation(self) -> Verdict:
        """Whether other documents keep their scores when all of one document is changed."""
        rule, how = "documents independent", "change all tokens of a document: every other one keeps its nats"
        borders = (self.tokens == self.bos).nonzero().flatten().tolist()
        if not self.scorer.isolated:
            return Verdict(rule, NOT_TESTED, how, "the scorer does not say that documents are independent")
        if len(borders) < 2:
            return Verdict(rule, NOT_TESTED, how, "the tested text has one document")
        problems, largest = [], 0.0
        vocabulary = len(self.scorer.distribution(self.tokens, 1))
        for start, end in zip(borders[:4], [*borders[1:], len(self.tokens)][:4], strict=True):
            where = torch.zeros_like(self.tokens, dtype=torch.bool)
            where[start + 1 : end] = True
            text = self._changed(where, vocabulary, same_documents=True)
            elsewhere = torch.ones_like(self.base.times, dtype=torch.bool)
            elsewhere[start:end] = False  # its last context predicts the next document's first token
            moved = float(((self.scorer.score(text).nats - self.base.nats) * elsewhere).abs().max())
            largest = max(largest, moved)
            if not moved <= self.tolerance:
                problems.append(f"the document at token {start} changes scores of others by {moved:.1e} nats")
        return judged(rule, how, problems[:3], f"{min(4, len(borders))} documents, largest change {largest:.1e} nats")
