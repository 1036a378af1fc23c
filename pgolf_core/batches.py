"""Token streams and batches: shards in order, documents or sequences shuffled; a step runs while the next is made."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from pgolf_core.files import DataError
from pgolf_core.knobs import DataConfig
from pgolf_core.shards import read_shard, shard_paths

MAPPED = 64  # shards mapped at a time: macOS allows 256 open files
CPU = torch.device("cpu")
AHEAD = ThreadPoolExecutor(1, "batches")  # one thread per process, however many trainings it runs


class Stream:
    """Endless tokens: spans of the shards' tokens, numbered through all shards, in the order of a subclass.

    It has `position`; `seek(position)`, which goes back to one; and `advance(n)`, which moves on by at most n tokens
    and returns their span (first, last), without last. sequence: 0 = running text; else it gives sequences of so many
    tokens, each with one more for its last target.
    """

    sequence = 0
    position: ClassVar[Any]
    seek: ClassVar[Callable[..., None]]
    advance: ClassVar[Callable[..., tuple[int, int]]]

    def __init__(self, paths: Iterable[str | Path]):
        self.paths = list(paths)
        assert self.paths, "a stream needs a shard"
        self.starts = [0, *accumulate(len(read_shard(path)) for path in self.paths)]  # one per shard, and the end
        self.shard = lru_cache(MAPPED)(lambda index: read_shard(self.paths[index]))

    def take(self, n: int) -> np.ndarray:
        """The next n tokens, (n,) uint16."""
        parts = []
        while n:
            first, last = self.advance(n)
            n -= last - first
            while first < last:
                shard, offset = self.place(first)
                parts.append(self.shard(shard)[offset : offset + last - first])
                first += len(parts[-1])
        return np.concatenate(parts)

    def place(self, token: int) -> tuple[int, int]:
        """(shard, offset in it) of a token."""
        shard = bisect_right(self.starts, token) - 1
        return shard, token - self.starts[shard]


class TokenStream(Stream):
    """The shards in order, again and again; positions are (shard, offset in tokens)."""

    token = 0

    @property
    def position(self) -> tuple[int, int]:
        return self.place(self.token)

    def seek(self, position: tuple[int, int]) -> None:
        shard, offset = position
        assert 0 <= offset <= len(self.shard(shard)), f"position {position} is not in its shard"
        self.token = (self.starts[shard] + offset) % self.starts[-1]

    def advance(self, n: int) -> tuple[int, int]:
        first, last = self.token, min(self.token + n, self.starts[-1])
        self.token = last % self.starts[-1]
        return first, last


class ShuffledStream(Stream):
    """Spans of tokens in an order drawn from (seed, epoch); a subclass has `spans(rng)`, firsts and lasts in order.

    Positions are (epoch, spans done in it, tokens done of the next span).
    """

    spans: ClassVar[Callable[..., tuple[np.ndarray, np.ndarray]]]

    def __init__(self, paths: Iterable[str | Path], seed: int):
        super().__init__(paths)
        self.seed = seed

    @property
    def position(self) -> tuple[int, int, int]:
        return self.epoch, self.done, self.offset

    def seek(self, position: tuple[int, int, int]) -> None:
        self.epoch, self.done, self.offset = position
        self.firsts, self.lasts = self.spans(np.random.default_rng([self.seed, self.epoch]))

    def advance(self, n: int) -> tuple[int, int]:
        if self.done == len(self.firsts):
            self.seek((self.epoch + 1, 0, 0))
        first, end = int(self.firsts[self.done]) + self.offset, int(self.lasts[self.done])
        last = min(first + n, end)
        self.offset += last - first
        if last == end:
            self.done, self.offset = self.done + 1, 0
        return first, last


class DocumentStream(ShuffledStream):
    """Document by document. To find them reads every shard once: 0.1 s for 100,000,000 tokens in memory already."""

    def __init__(self, paths: Iterable[str | Path], bos: int, seed: int):
        super().__init__(paths, seed)
        found = [np.flatnonzero(self.shard(i) == bos) + start for i, start in enumerate(self.starts[:-1])]
        # Document k is tokens bounds[k]..bounds[k + 1]; text before the first BOS is one too.
        self.bounds = np.unique(np.concatenate([[0], *found, self.starts[-1:]]))
        self.seek((0, 0, 0))

    def spans(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        order = rng.permutation(len(self.bounds) - 1)
        return self.bounds[:-1][order], self.bounds[1:][order]


class SequenceStream(ShuffledStream):
    """Whole sequences; each epoch cuts every shard from another token on.

    Shuffled: one permutation of all. Coprime: the j-th of a shard's n is number start + j · stride mod n, with random
    start and stride, gcd(stride, n) = 1; shards take turns in proportion to their n.
    """

    def __init__(self, paths: Iterable[str | Path], length: int, seed: int, coprime: bool):
        super().__init__(paths, seed)
        self.sequence, self.coprime = length, coprime
        if max(np.diff(self.starts)) <= length:
            raise DataError(f"train_seq_len={length}: no shard beside {self.paths[0]} is longer than one sequence")
        self.seek((0, 0, 0))

    def spans(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        firsts, turns = [], []
        for start, end in pairwise(self.starts):
            if end - start <= self.sequence:
                continue
            phase = int(rng.integers(min(self.sequence, end - start - self.sequence)))
            n = (end - start - 1 - phase) // self.sequence  # a last target is needed too
            order = np.arange(n)
            if self.coprime:
                stride = rng.choice(np.flatnonzero(np.gcd(order, n) == 1))
                order = (rng.integers(n) + order * stride) % n
            firsts.append(start + phase + order * self.sequence)
            turns.append((np.arange(n) + 0.5) / n)
        all_firsts, turn = np.concatenate(firsts), np.concatenate(turns)
        ordered = all_firsts[np.argsort(turn, kind="stable")] if self.coprime else rng.permutation(all_firsts)
        return ordered, ordered + self.sequence + 1


def sequences(
    shards: Iterable[str | Path], tokens: int, length: int, batch_tokens: int = 8192, after: int = 0
) -> Iterator[Tensor]:
    """(B, length) int64 ids of the shards' text after so many tokens, at most batch_tokens of them per batch.

    In all there are `tokens` of them, rounded up to whole sequences. After the last shard the first begins again.
    """
    stream, left = TokenStream(shards), -(-tokens // length)
    stream.token = after % stream.starts[-1]
    while left:
        count = min(left, max(1, batch_tokens // length))
        yield torch.from_numpy(stream.take(count * length).astype("int64")).view(count, length)
        left -= count


def training_stream(paths: Iterable[str | Path], config: DataConfig, bos: int) -> Stream:
    """The stream in the order that the knobs say. Raises DataError if no shard holds a sequence."""
    if config.shuffle_documents:
        return DocumentStream(paths, bos, config.shuffle_documents)
    if config.shuffle_sequences or config.coprime_sequences:
        seed = config.shuffle_sequences or config.coprime_sequences
        return SequenceStream(paths, config.train_seq_len, seed, bool(config.coprime_sequences))
    return TokenStream(paths)


def validation_tokens(
    directory: str | Path, seq_len: int, max_tokens: int = 0, max_documents: int = 0, bos: int = 1
) -> Tensor:
    """The scored part of all val shards, (n,) int64; each token but the first is a target.

    Whole windows of seq_len, at most max_tokens (0 = all), and one token more. With max_documents, the first
    max_documents whole documents instead: the same text for every tokenizer. DataError if no window is left.
    """
    stream = TokenStream(shard_paths(directory, "val"))
    available = stream.starts[-1]
    count = min(available - 1, max_tokens or available) // seq_len * seq_len + 1
    if max_documents:
        starts = np.flatnonzero(stream.take(available) == bos)  # the stream is at its first token again
        if len(starts) < max_documents:
            raise DataError(f"val_max_documents={max_documents}: {directory} has {len(starts)} validation documents")
        count = [*starts, available][max_documents]
    if count <= seq_len:
        limit = f"val_max_documents={max_documents}" if max_documents else f"val_max_tokens={max_tokens or 'all'}"
        raise DataError(
            f"{directory}: its {available} validation tokens with {limit} hold no window of {seq_len} and one more; "
            "score more, or shorten eval_seq_len or train_seq_len"
        )
    return torch.from_numpy(stream.take(count).astype(np.int64))


class Batches:
    """Inputs of one process's forward passes, on its device; a thread prepares the next while a step runs.

    All processes together take world_size * (local + 1) tokens off the stream per micro-batch; rank r owns the r-th
    local + 1 of them. A pass has config.microbatches of these. Every rank needs a stream of its own: it skips the
    tokens of the others. Copies to a GPU go through pinned memory and do not block the host.
    tokens: trained on so far by all processes. stage: tokens per step and per sequence, see DataConfig.stage.
    """

    def __init__(self, stream: Stream, config: DataConfig, rank: int = 0, device: torch.device = CPU):
        assert 0 <= rank < config.world_size, f"rank {rank} of {config.world_size}"
        self.stream, self.config, self.rank, self.device = stream, config, rank, device
        self.stage, self.tokens = config.stage(0.0), 0
        assert self.local and self.local % self.stage[1] == 0, (self.local, self.stage)
        self.position = stream.position  # after the last batch given; the stream itself is one ahead
        self._ahead: Future | None = None

    @property
    def local(self) -> int:
        """Tokens of one process in a micro-batch."""
        return self.stage[0] // (self.config.world_size * self.config.grad_accum * self.config.microbatches)

    def enter(self, stage: tuple[int, int]) -> None:
        """Go on with batches of this stage."""
        if stage != self.stage:
            self.load_state_dict(self.state_dict() | {"stage": stage})  # the batch made ahead has the old shape

    def next(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets, both (microbatches · local / length, length) int64, of the stage's length."""
        ahead, self._ahead = self._ahead or AHEAD.submit(self._make), None
        x, y, self.position = ahead.result()
        self.tokens += x.numel() * self.config.world_size
        self._ahead = AHEAD.submit(self._make)
        return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)

    def state_dict(self) -> dict:
        return {"position": list(self.position), "tokens": self.tokens, "stage": list(self.stage)}

    def load_state_dict(self, state: dict) -> None:
        if self._ahead:
            wait([self._ahead])  # its batch, or its error, belongs to the old position
            self._ahead = None
        self.stream.seek(tuple(state["position"]))
        self.position, self.tokens, self.stage = self.stream.position, state["tokens"], tuple(state["stage"])

    def _make(self) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        piece, length = self.stream.sequence or self.local, self.stage[1]
        shape = self.config.microbatches, self.config.world_size, self.local // piece, piece + 1
        taken = self.stream.take(math.prod(shape)).reshape(shape)[:, self.rank]
        own = torch.from_numpy(taken.astype(np.int64))
        x, y = (part.reshape(-1, length) for part in (own[..., :-1], own[..., 1:]))
        if self.device.type == "cuda":
            x, y = x.pin_memory(), y.pin_memory()
        return x, y, self.stream.position
