"""Token streams and batches: shards in order or documents shuffled; the next batch is prepared while a step runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pgolf_core.knobs import DataConfig
from pgolf_core.shards import read_shard

MAPPED = 64  # shards mapped at a time: macOS allows 256 open files
Position = tuple[int, int, int]
CPU = torch.device("cpu")
AHEAD = ThreadPoolExecutor(1, "batches")  # one thread per process, however many trainings a notebook runs


class TokenStream:
    """Endless tokens: the shards in order, again and again."""

    start = (0, 0)

    def __init__(self, paths: Iterable[str | Path]):
        self.paths = list(paths)
        assert self.paths, "a stream needs a shard"
        self.seek(self.start)

    @property
    def position(self) -> tuple[int, int]:
        """(shard, offset in tokens): `seek` goes back to it."""
        return self.index, self.offset

    def seek(self, position: tuple[int, int]) -> None:
        self.index, self.offset = position
        self.tokens = read_shard(self.paths[self.index])  # only one shard is mapped
        assert 0 <= self.offset <= len(self.tokens), f"position {position} of {len(self.tokens)} tokens"

    def take(self, n: int) -> np.ndarray:
        """The next n tokens, (n,) uint16."""
        assert n > 0, n
        parts = []
        while n:
            if self.offset == len(self.tokens):
                self.seek(((self.index + 1) % len(self.paths), 0))
            part = self.tokens[self.offset : self.offset + n]
            parts.append(part)
            self.offset += len(part)
            n -= len(part)
        return np.concatenate(parts)


def sequences(shards: Iterable[str | Path], tokens: int, length: int, batch_tokens: int = 8192) -> Iterator[Tensor]:
    """(B, length) int64 ids from the beginning of the shards, at most batch_tokens of them per batch.

    In all there are `tokens` of them, rounded up to whole sequences.
    """
    stream, left = TokenStream(shards), -(-tokens // length)
    while left:
        count = min(left, max(1, batch_tokens // length))
        yield torch.from_numpy(stream.take(count * length).astype("int64")).view(count, length)
        left -= count


class DocumentStream:
    """Endless tokens, document by document in an order drawn from (seed, epoch).

    Finding the documents reads every shard once: 0.1 s for 100,000,000 tokens that are in memory already.
    """

    start = (0, 0, 0)

    def __init__(self, paths: Iterable[str | Path], bos: int, seed: int):
        self.paths, self.seed = list(paths), seed
        starts, lengths = [], []
        for path in self.paths:
            tokens = read_shard(path)
            starts.append(np.flatnonzero(tokens == bos) + sum(lengths))
            lengths.append(len(tokens))
        self.shard_ends = np.cumsum(lengths)
        # Text before the first BOS is a document too; a document may span shards.
        starts = np.concatenate([[0], *starts, self.shard_ends[-1:]])
        self.bounds = np.unique(starts)  # document k is tokens bounds[k]..bounds[k + 1] of all shards in a row
        self._mapped = lru_cache(MAPPED)(lambda index: read_shard(self.paths[index]))
        self.seek(self.start)

    @property
    def position(self) -> Position:
        """(epoch, documents done in it, tokens done of the next document): `seek` goes back to it."""
        return self.epoch, self.done, self.offset

    def seek(self, position: Position) -> None:
        self.epoch, self.done, self.offset = position
        self.order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.bounds) - 1)

    def take(self, n: int) -> np.ndarray:
        """The next n tokens, (n,) uint16."""
        assert n > 0, n
        parts = []
        while n:
            if self.done == len(self.order):
                self.seek((self.epoch + 1, 0, 0))
            document = self.order[self.done]
            first, end = int(self.bounds[document]) + self.offset, int(self.bounds[document + 1])
            last = min(first + n, end)
            parts += self._tokens(first, last)
            n -= last - first
            self.offset += last - first
            if last == end:
                self.done, self.offset = self.done + 1, 0
        return np.concatenate(parts)

    def _tokens(self, first: int, last: int) -> list[np.ndarray]:
        """Tokens first..last of all shards in a row, one array per shard."""
        parts = []
        while first < last:
            shard = int(np.searchsorted(self.shard_ends, first, side="right"))
            base = int(self.shard_ends[shard - 1]) if shard else 0
            part = self._mapped(shard)[first - base : last - base]
            parts.append(part)
            first += len(part)
        return parts


def training_stream(paths: Iterable[str | Path], config: DataConfig, bos: int) -> TokenStream | DocumentStream:
    """A TokenStream, or with shuffle_documents a DocumentStream with that seed."""
    return DocumentStream(paths, bos, config.shuffle_documents) if config.shuffle_documents else TokenStream(paths)


class Batches:
    """Inputs of one process's forward passes, on its device; a thread prepares the next while a step runs.

    All processes together take world_size * (local + 1) tokens off the stream per micro-batch; rank r owns the r-th
    local + 1 of them. A pass has config.microbatches of these. Every rank needs a stream of its own: it skips the
    tokens of the others. Copies to a GPU go through pinned memory and do not block the host.
    """

    def __init__(
        self,
        stream: TokenStream | DocumentStream,
        config: DataConfig,
        rank: int = 0,
        device: torch.device = CPU,
    ):
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

    def seek(self, position: tuple[int, ...]) -> None:
        """Continue from a `position`."""
        if self._ahead:
            wait([self._ahead])  # its batch, or its error, belongs to the old position
            self._ahead = None
        self.stream.seek(tuple(position))
        self.position = self.stream.position

    def state_dict(self) -> dict:
        return {"position": list(self.position)}

    def load_state_dict(self, state: dict) -> None:
        self.seek(state["position"])

    def _make(self) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        taken = self.stream.take(self.config.microbatches * self.config.world_size * (self.local + 1))
        own = taken.reshape(self.config.microbatches, self.config.world_size, self.local + 1)[:, self.rank]
        own = torch.from_numpy(own.astype(np.int64))
        x, y = (part.reshape(-1, self.config.train_seq_len) for part in (own[:, :-1], own[:, 1:]))
        if self.device.type == "cuda":
            x, y = x.pin_memory(), y.pin_memory()
        return x, y, self.stream.position
