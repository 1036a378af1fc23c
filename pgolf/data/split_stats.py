"""What the documents of a split come to, walked through once: tokens, bytes by the table, bytes of their text."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from pgolf.data.dataset import Dataset
from pgolf_core.shards import read_shard
from pgolf_core.tokens import ByteTable, SentencePiece, Tokenizer

BATCH = 1 << 20  # tokens looked at together
LONGEST = 1 << 24  # tokens; a longer document is cut: shards without BOS must not fill the memory
# The first documents of each shard that are decoded, and of these encoded again: split, thorough -> how many.
DECODED = {("val", True): 1 << 62, ("val", False): 500, ("train", True): 2000, ("train", False): 0}
ENCODED = {("val", True): 1000, ("val", False): 50, ("train", True): 0, ("train", False): 0}
MARK = "▁"  # SentencePiece's space


@dataclass(frozen=True)
class Batch:
    """Whole documents that begin in one shard: tokens (n,), where each starts (d,); `first`: the first one's number."""

    shard: int
    first: int
    tokens: np.ndarray
    starts: np.ndarray

    def rows(self, count: int | None = None) -> list[np.ndarray]:
        return np.split(self.tokens, self.starts[1:])[:count]

    def keys(self) -> list[bytes]:
        """A hash of each document's tokens after BOS, b"" where there are none."""
        content, ends = memoryview(self.tokens).cast("B"), [*self.starts[1:].tolist(), len(self.tokens)]
        return [
            hashlib.blake2b(content[2 * start + 2 : 2 * end], digest_size=16).digest() if end - start > 1 else b""
            for start, end in zip(self.starts.tolist(), ends, strict=True)
        ]


def batches(paths: list[Path], bos: int, progress: Callable[[str], object]) -> Iterator[Batch]:
    """All documents in order, some BATCH tokens at a time; one that spans shards is put together, in its own batch."""
    rest, shard, first = [], 0, 0  # parts of a document that may go on in the next shard, and where it begins
    for i, path in enumerate(paths):
        progress(path.name)
        tokens = read_shard(path)
        starts = np.flatnonzero(tokens == bos)
        rest.append(tokens[: starts[0] if len(starts) else len(tokens)])
        if len(starts) or sum(map(len, rest)) > LONGEST:
            yield from _put_together(rest, shard, first)
            rest = []
        done = 0
        while done + 1 < len(starts):
            end = min(max(done + 1, int(np.searchsorted(starts, starts[done] + BATCH))), len(starts) - 1)
            yield Batch(i, done, np.array(tokens[starts[done] : starts[end]]), starts[done:end] - starts[done])
            done = end
        if len(starts):
            rest, shard, first = [tokens[starts[-1] :]], i, done
    yield from _put_together(rest, shard, first)


def _put_together(parts: list[np.ndarray], shard: int, first: int) -> Iterator[Batch]:
    tokens = np.concatenate(parts) if parts else np.empty(0, np.uint16)
    for at in range(0, len(tokens), LONGEST):
        yield Batch(shard, first, tokens[at : at + LONGEST], np.zeros(1, int))


class Survey:
    """What the documents of a split come to. The lists name documents: (place, bytes by the table, bytes of text)."""

    def __init__(self, name: str, dataset: Dataset, table: ByteTable, thorough: bool):
        self.name, self.tokenizer = name, dataset.tokenizer
        self.shards = dataset.val_shards if name == "val" else dataset.train_shards
        self.available = dataset.description[f"{name}_tokens"]
        self.base, self.boundary = table.base_bytes.numpy(), table.is_boundary.numpy()
        self.full = self.base + table.has_leading_space.numpy()
        self.control = np.array([i != self.tokenizer.bos and p.boundary for i, p in enumerate(self.tokenizer.pieces)])
        self.mark = [byte_token(self.tokenizer, value) for value in MARK.encode()]
        self.to_decode, self.to_encode = DECODED[name, thorough], ENCODED[name, thorough]
        self.parts: list[np.ndarray] = [np.empty((2, 0), np.int64)]  # (2, d) tokens and bytes of documents, a batch
        self.tokens = self.headless = self.spelled = self.texts = 0
        self.decoded = self.table_bytes = self.text_bytes = self.encoded = self.lossy = self.recut = 0
        self.inside: dict[int, list] = {}  # control token -> how many, the place of the first
        self.differ: list[tuple[str, int, int]] = []
        self.differ_from_texts: list[tuple[str, int, int]] = []

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, (d,); once all are added."""
        return np.concatenate(self.parts, 1)[0]

    @cached_property
    def bytes(self) -> np.ndarray:
        return np.concatenate(self.parts, 1)[1]

    @cached_property
    def documents(self) -> int:
        """That begin with BOS."""
        return len(self.bytes) - self.headless

    def place(self, batch: Batch, i: int) -> str:
        return f"document {batch.first + i:,} of {self.shards[batch.shard].name}"

    def count(self, tokens: np.ndarray) -> np.ndarray:
        """Bytes of each token (n,), as ByteTable.count has them; before the first is no token."""
        counts = self.full[tokens]
        after = np.append(0, np.flatnonzero(self.boundary[tokens[:-1]]) + 1)
        counts[after] = self.base[tokens[after]]
        return counts

    def add(self, batch: Batch, texts: Iterable[str] = ()) -> None:
        """texts: of the documents, where they are known."""
        tokens, starts = batch.tokens, batch.starts
        sizes = np.add.reduceat(self.count(tokens), starts, dtype=np.int64)
        self.tokens += len(tokens)
        self.headless += int((tokens[starts] != self.tokenizer.bos).sum())
        self.parts.append(np.stack([np.diff(starts, append=len(tokens)), sizes]))
        for at in np.flatnonzero(self.control[tokens]):
            place = self.place(batch, int(np.searchsorted(starts, at, "right")) - 1)
            self.inside.setdefault(int(tokens[at]), [0, place])[0] += 1
        if isinstance(self.tokenizer, SentencePiece) and None not in self.mark:
            at = np.flatnonzero(tokens[:-2] == self.mark[0])
            self.spelled += int(((tokens[at + 1] == self.mark[1]) & (tokens[at + 2] == self.mark[2])).sum())
        prefix = self.tokenizer.normalize("a").removesuffix("a")  # the space that some models add is no text
        for i, (size, text) in enumerate(zip(sizes.tolist(), texts, strict=False)):
            self.texts += 1
            if size != (true := len(self.tokenizer.normalize(text).removeprefix(prefix).encode())):
                self.differ_from_texts.append((self.place(batch, i), size, true))
        if self.to_decode > batch.first:
            self.decode(batch, batch.rows(self.to_decode - batch.first), sizes)

    def decode(self, batch: Batch, rows: list[np.ndarray], sizes: np.ndarray) -> None:
        texts = self.tokenizer.decode([row.tolist() for row in rows])
        true = [len(text.encode()) for text in texts]
        self.decoded += len(rows)
        self.text_bytes += sum(true)
        self.table_bytes += int(sizes[: len(rows)].sum())
        for i in np.flatnonzero(sizes[: len(rows)] != true):
            self.differ.append((self.place(batch, i), int(sizes[i]), true[i]))
        texts = texts[: max(0, self.to_encode - batch.first)]
        again = self.tokenizer.encode(texts)
        self.encoded += len(texts)
        self.recut += sum(not np.array_equal(new, row) for new, row in zip(again, rows, strict=False))
        spelled = self.tokenizer.decode([new.tolist() for new in again])
        self.lossy += sum(text != new for text, new in zip(texts, spelled, strict=True))

    def figures(self) -> dict:
        return {
            "shards": len(self.shards),
            "tokens": self.available,
            "tokens_read": self.tokens,  # the rest is about these
            "documents": self.documents,
            "bytes": int(self.bytes.sum()),
            "empty_documents": int((self.bytes == 0).sum()),
            "longest_document": int(self.lengths.max(initial=0)),  # tokens
            "decoded_documents": self.decoded,
        }


def byte_token(tokenizer: Tokenizer, value: int) -> int | None:
    """The token that stands for a byte, None where there is none."""
    if not isinstance(tokenizer, SentencePiece):
        return tokenizer.offset + value
    token = tokenizer.processor.piece_to_id(f"<0x{value:02X}>")
    return token if tokenizer.processor.is_byte(token) else None
