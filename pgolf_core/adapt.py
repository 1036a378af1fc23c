"""A model that learns from what it has scored: every token is scored before anything learns from it, and once.

sgd: all weights learn from a chunk of the text after its windows are scored. lora: every document is scored chunk by
chunk, and low-rank adapters of all matrices learn from each chunk; the next document begins with fresh ones (Hu et al.
2021, https://arxiv.org/abs/2106.09685). phased: lora, and at some boundaries all weights learn from the documents
scored so far. The order of events is that of `predictions`, which hands out logits before it learns.
"""

import copy
import math
from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from pgolf_core.device import autocast, deterministic_kernels
from pgolf_core.distributed import ALONE, Ranks
from pgolf_core.evaluate import Score, all_windows, evaluate, score_of, summing_device
from pgolf_core.knobs import BOS, EvalConfig
from pgolf_core.model import GPT
from pgolf_core.parameters import roles_of
from pgolf_core.tilt import hints_of, tilted
from pgolf_core.tokens import ByteTable

MOMENTUM, CLIP = 0.9, 1.0  # SGD on all weights
SEQUENCES = 8  # per update of all weights
ADAM_BETAS, ADAM_EPSILON = (0.0, 0.99), 1e-10  # adapters' Adam: few updates reach its second moment

Span = tuple[int, int]  # [first, last) of targets; target i is token i + 1


def evaluate_adapted(
    model: GPT, tokens: Tensor, byte_table: ByteTable, config: EvalConfig, dtype=torch.float32, ranks: Ranks = ALONE
) -> Score:
    """Score of tokens (n,) by a copy of the model that adapts as config.adapt says; arguments as `evaluate`.

    Every rank scores its documents, or its windows, and all get the same score.
    """
    device = next(model.parameters()).device
    nats = torch.zeros(len(tokens) - 1, dtype=torch.float64, device=summing_device(device))
    tokens = tokens.to(device)
    with deterministic_kernels(device.type == "cuda"):  # ranks must hold equal weights
        for (first, last), logits in predictions(model, tokens, config, dtype, ranks):
            loss = F.cross_entropy(logits.detach().float(), tokens[first + 1 : last + 1], reduction="none")
            nats[first:last] = loss.to(nats.device, torch.float64)
    ranks.add_(nats)  # targets of other ranks are zeros, so the sum is exact
    L = config.eval_seq_len
    windows = torch.stack([nats[first : start + L].sum() for start, first in all_windows(tokens, config)])
    return score_of(windows, len(nats), byte_table.count(tokens))


def evaluate_shipped(
    model: GPT, tokens: Tensor, byte_table: ByteTable, config: EvalConfig, dtype=torch.float32, ranks: Ranks = ALONE
) -> Score:
    """The score that counts: by `evaluate`, or with config.adapt by a copy of the model that adapts."""
    score = evaluate if config.adapt == "off" else evaluate_adapted
    return score(model, tokens, byte_table, config, dtype, ranks)


def predictions(
    model: GPT, tokens: Tensor, config: EvalConfig, dtype=torch.float32, ranks: Ranks = ALONE
) -> Iterator[tuple[Span, Tensor]]:
    """Targets of tokens (n,) with their logits (targets, V), each target once in all ranks together.

    The model learns from what is yielded when the next is asked for, never before, and from logits without the tilt.
    """
    tokens = tokens.to(next(model.parameters()).device)
    hints = hints_of(tokens, config) if config.eval_tilt_boost else None
    for (first, last), logits in _learning(model, tokens, config, dtype, ranks):
        yield (first, last), logits if hints is None else tilted(logits, hints[first:last], config.eval_tilt_boost)


def _learning(
    model: GPT, tokens: Tensor, config: EvalConfig, dtype: torch.dtype, ranks: Ranks
) -> Iterator[tuple[Span, Tensor]]:
    learner = Learner(copy.deepcopy(model).eval(), config, dtype, ranks)
    if config.adapt == "sgd":
        yield from learner.by_windows(tokens)
        return
    documents = spans_of(tokens)
    phases = config.adapt_phases if config.adapt == "phased" else 0
    boundaries = [config.adapt_phase_documents * (i + 1) for i in range(phases)]
    for first, last in pairwise([0, *(n for n in boundaries if n < len(documents)), len(documents)]):
        if first:
            learner.learn([tokens[a : b + 1] for a, b in documents[:first]], config.adapt_base_lr)
        for document in documents[first:last][ranks.rank :: ranks.size]:
            yield from learner.by_document(tokens, document)


def spans_of(tokens: Tensor) -> list[Span]:
    """Targets of every document: what follows its BOS, and the next one's BOS; text before the first is one too."""
    starts = sorted({0, *(tokens[:-1] == BOS).nonzero().flatten().tolist()})
    return list(zip(starts, [*starts[1:], len(tokens) - 1], strict=True))


class Learner:
    """The model's weights, adapters of its matrices, and what changes them. ranks: hold equal weights at all times."""

    def __init__(self, model: GPT, config: EvalConfig, dtype: torch.dtype, ranks: Ranks):
        self.model, self.config, self.dtype, self.ranks = model.requires_grad_(True), config, dtype, ranks
        matrices = {name for name, role in roles_of(model).items() if role.kind == "matrix"}
        self.matrices = {name: p for name, p in model.named_parameters() if name in matrices}
        generator, self.start = torch.Generator().manual_seed(0), {}
        for name, w in self.matrices.items():  # (rank, cols), uniform within ±1/√cols
            drawn = torch.rand(config.adapt_rank, w.size(1), generator=generator)
            self.start[name] = ((2 * drawn - 1) / math.sqrt(w.size(1))).to(w.device, w.dtype)

    def logits(self, ids: Tensor, weights: dict[str, Tensor] | None = None) -> Tensor:
        """Logits (B, T, V) of ids (B, T) with these weights in place of the model's."""
        with autocast(ids.device, self.dtype):
            return functional_call(self.model, weights or {}, (ids,)).float()

    def by_document(self, tokens: Tensor, document: Span) -> Iterator[tuple[Span, Tensor]]:
        """Chunks of a document, scored with up to eval_seq_len tokens of it; adapters learn from all but the last."""
        left = {name: w.new_zeros(w.size(0), self.config.adapt_rank) for name, w in self.matrices.items()}
        right = {name: start.clone() for name, start in self.start.items()}
        adapters = [t.requires_grad_() for t in (*left.values(), *right.values())]
        optimizer = torch.optim.Adam(adapters, self.config.adapt_lr, betas=ADAM_BETAS, eps=ADAM_EPSILON)
        (first, end), chunk = document, self.config.adapt_chunk
        for start in range(first, end, chunk):
            last = min(start + chunk, end)
            with torch.enable_grad():
                weights = {name: w.detach() + left[name] @ right[name] for name, w in self.matrices.items()}
                # Context and shapes must not depend on where the document ends: not even by their rounding.
                begin, stop = max(first, start + chunk - self.config.eval_seq_len), start + chunk
                ids = F.pad(tokens[begin:last], (0, stop - last), value=BOS)
                logits = self.logits(ids[None], weights)[0, start - begin : last - begin]
            yield (start, last), logits
            if last < end:
                loss = F.cross_entropy(logits, tokens[start + 1 : last + 1])
                for t, gradient in zip(adapters, torch.autograd.grad(loss, adapters), strict=True):
                    t.grad = gradient
                optimizer.step()

    def by_windows(self, tokens: Tensor) -> Iterator[tuple[Span, Tensor]]:
        """Windows as in `evaluate`; all weights learn from adapt_chunk targets after those are scored, but the last."""
        L, chunk, count = self.config.eval_seq_len, self.config.adapt_chunk, len(tokens) - 1
        windows = all_windows(tokens, self.config)
        for start in range(0, count, chunk):
            own = [(a, first) for a, first in windows if start <= first < start + chunk and first < a + L]
            for a, first in own[self.ranks.rank :: self.ranks.size]:
                with torch.no_grad():
                    yield (first, a + L), self.logits(tokens[None, a : a + L])[0, first - a :]
            scored = max([a + L for a, _ in own], default=0)
            if start + chunk < count and scored:
                rate = self.config.adapt_base_lr * (1 + math.cos(math.pi * start / count)) / 2
                self.learn([tokens[own[0][1] : scored + 1]], rate)

    def learn(self, texts: list[Tensor], rate: float) -> None:
        """SGD on all weights, adapt_epochs times through texts (n,) that are scored, in sequences of a window."""
        L = self.config.eval_seq_len
        sequences = [sequence for text in texts for sequence in split_into_sequences(text, L)]
        parameters = [p for p in self.model.parameters() if p.numel()]
        optimizer = torch.optim.SGD(parameters, rate, momentum=MOMENTUM)
        for _ in range(self.config.adapt_epochs):
            for i in range(0, len(sequences), SEQUENCES):
                batch = sequences[i : i + SEQUENCES]
                total = sum(len(sequence) - 1 for sequence in batch)
                with torch.enable_grad():
                    for sequence in batch:
                        logits = self.logits(sequence[None, :-1])[0]
                        (F.cross_entropy(logits, sequence[1:], reduction="sum") / total).backward()
                torch.nn.utils.clip_grad_norm_(parameters, CLIP)
                optimizer.step()
                optimizer.zero_grad()


def split_into_sequences(text: Tensor, length: int) -> list[Tensor]:
    """Text (n,) in sequences of length inputs and one target more; the last may be shorter."""
    return [text[i : i + length + 1] for i in range(0, len(text) - 1, length)]
