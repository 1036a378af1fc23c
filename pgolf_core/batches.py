"""Token streams and batches: shards in order or documents shuffled; the next batch is prepared while a step runs."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pgolf_core.knobs import DataConfig
from pgolf_core.shards import read_shard

MAPPED = 64  # shards mapped at a time: macOS allows 256 open files
CPU = torch.device("cpu")
AHEAD = ThreadPoolExecutor(1, "batches")  # one thread per process, however many trainings it runs


class Stream:
    """Endless tokens: spans of the shards' tokens, numbered through all shards, in the order of a subclass.

    It has `position`; `seek(position)`, which goes back to one; and `advance(n)`, which moves on by at most n tokens
    and returns their span (first, last), without last.
    """

    def __init__(self, paths: Iterable[str | Path]):
        self.paths = list(paths)
        assert self.paths, "a stream needs a shard"
        self.starts = [0, *accumulate(len(read_shard(path)) for path in self.paths)]  # one per shard, and the end
        self.shard = lru_cache(MAPPED)(lambda index: read_shard(self.paths[index]))

    def take(self, n: int) -> np.ndarray:
        """The next n tokens, (n,) uint16."""
        assert n > 0, n
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


class DocumentStream(Stream):
    """Document by document in an order drawn from (seed, epoch).

    Positions are (epoch, documents done in it, tokens done of the next document). Finding the documents reads every
    shard once: 0.1 s for 100,000,000 tokens that are in memory already.
    """

    def __init__(self, paths: Iterable[str | Path], bos: int, seed: int):
        super().__init__(paths)
        self.seed = seed
        found = [np.flatnonzero(self.shard(i) == bos) + start for i, start in enumerate(self.starts[:-1])]
        # Document k is tokens bounds[k]..bounds[k + 1]; text before the first BOS is one too.
        self.bounds = np.unique(np.concatenate([[0], *found, self.starts[-1:]]))
        self.seek((0, 0, 0))

    @property
    def position(self) -> tuple[int, int, int]:
        return self.epoch, self.done, self.offset

    def seek(self, position: tuple[int, int, int]) -> None:
        self.epoch, self.done, self.offset = position
        self.order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.bounds) - 1)

    def advance(self, n: int) -> tuple[int, int]:
        if self.done == len(self.order):
            self.seek((self.epoch + 1, 0, 0))
        document = self.order[self.done]
        first, end = int(self.bounds[document]) + self.offset, int(self.bounds[document + 1])
        last = min(first + n, end)
        self.offset += last - first
        if last == end:
            self.done, self.offset = self.done + 1, 0
        return first, last


def sequences(shards: Iterable[str | Path], tokens: int, length: int, batch_tokens: int = 8192) -> Iterator[Tensor]:
    """(B, length) int64 ids from the beginning of the shards, at most batch_tokens of them per batch.

    In all there are `tokens` of them, rounded up to whole sequences.
    """
    stream, left = TokenStream(shards), -(-tokens // length)
    while left:
        count = min(left, max(1, batch_tokens // length))
        yield torch.from_numpy(stream.take(count * length).astype("int64")).view(count, length)
        left -= count


def training_stream(paths: Iterable[str | Path], config: DataConfig, bos: int) -> Stream:
    """A TokenStream, or with shuffle_documents a DocumentStream with that seed."""
    return DocumentStream(paths, bos, config.shuffle_documents) if config.shuffle_documents else TokenStream(paths)


class Batches:
    """Inputs of one process's forward passes, on its device; a thread prepares the next while a step runs.

    All processes together take world_size * (local + 1) tokens off the stream per micro-batch; rank r owns the r-th
    local + 1 of them. A pass has config.microbatches of these. Every rank needs a stream of its own: it skips the
    tokens of the others. Copies to a GPU go through pinned memory and do not block the host.
    """

    def __init__(self, stream: Stream, config: DataConfig, rank: int = 0, device: torch.device = CPU):
        assert 0 <= rank < config.world_size, f"rank {rank} of {config.world_size}"
        self.stream, self.config, self.rank, self.device = stream, config, rank, device
        self.local = config.train_batch_tokens // (config.world_size * config.grad_accum * config.microbatches)
        assert self.local and self.local % config.train_seq_len == 0, (self.local, config.train_seq_len)
        self.position = stream.position  # after the last batch given; the stream itself is one ahead
        self._ahead: Future | None = None

    def next(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets, both (microbatches · local / train_seq_len, train_seq_len) int64."""
        ahead, self._ahead = self._ahead or AHEAD.submit(self._make), None
        x, y, self.position = ahead.result()
        self._ahead = AHEAD.submit(self._make)
        return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)

    def state_dict(self) -> dict:
        return {"position": list(self.position)}

    def load_state_dict(self, state: dict) -> None:
        if self._ahead:
            wait([self._ahead])  # its batch, or its error, belongs to the old position
            self._ahead = None
        self.stream.seek(tuple(state["position"]))
        self.position = self.stream.position

    def _make(self) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        shape = self.config.microbatches, self.config.world_size, self.local + 1
        own = self.stream.take(math.prod(shape)).reshape(shape)[:, self.rank]
        own = torch.from_numpy(own.astype(np.int64))
        x, y = (part.reshape(-1, self.config.train_seq_len) for part in (own[:, :-1], own[:, 1:]))
        if self.device.type == "cuda":
            x, y = x.pin_memory(), y.pin_memory()
        return x, y, self.stream.position
