"""Statistics of a split from one pass over its documents: tokens, bytes by the byte table, bytes of their text."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pgolf.data.dataset import Dataset
from pgolf.data.tokenizers import CaseOps, SentencePiece, Tokenizer
from pgolf_core.shards import read_shard

BATCH = 1 << 20  # tokens per batch
LONGEST = 1 << 24  # tokens; a longer document is cut, which bounds memory for shards without BOS
ALL = 1 << 62
# (split, thorough) -> documents decoded per batch, decoded in all, and encoded again in all.
SAMPLES = {
    ("val", True): (ALL, ALL, 1000),
    ("val", False): (500, 500, 50),
    ("train", True): (20, ALL, 0),
    ("train", False): (0, 0, 0),
}
MARK = "▁"  # SentencePiece's space
# Private use, noncharacters and control characters: no text has them, altered text has them as operators.
FOREIGN = re.compile("[\ue000-\uf8ff\ufdd0-\ufdef\ufffe\uffff\U000f0000-\U0010ffff\0-\x08\x0e-\x1f\x7f]")


class Batch(NamedTuple):
    """Whole documents: tokens (n,), offset of each document (d,), number of the first."""

    tokens: np.ndarray
    starts: np.ndarray
    first: int

    def rows(self) -> list[np.ndarray]:
        """Tokens of each document."""
        return np.split(self.tokens, self.starts[1:])

    def keys(self) -> list[bytes]:
        """Hash of each document's tokens after BOS; b"" for an empty document."""
        return [hashlib.blake2b(row[1:], digest_size=16).digest() if len(row) > 1 else b"" for row in self.rows()]


def batches(paths: list[Path], bos: int) -> Iterator[Batch]:
    """All documents of the shards in order, about BATCH tokens at a time."""
    tokens, first = np.empty(0, np.uint16), 0
    for path in paths:
        shard = read_shard(path)
        for at in range(0, len(shard), BATCH):
            tokens = np.concatenate([tokens, shard[at : at + BATCH]])
            starts = np.append(0, np.flatnonzero(tokens[1:] == bos) + 1)
            end = len(tokens) if len(tokens) > LONGEST else starts[-1]  # the last document may go on
            if end:
                starts = starts[starts < end]
                yield Batch(tokens[:end], starts, first)
                tokens, first = tokens[end:], first + len(starts)
    if len(tokens):
        yield Batch(tokens, np.zeros(1, int), first)


class SplitStats:
    """Statistics of one split; `add` takes its batches in order. documents: the source texts, if they are known."""

    def __init__(self, name: str, dataset: Dataset, thorough: bool, documents: Iterable[str] | None = None):
        self.name, self.dataset, self.tokenizer, self.thorough = name, dataset, dataset.tokenizer, thorough
        self.sources = None if documents is None else iter(documents)  # those that were not compared yet
        self.shards = dataset.val_shards if name == "val" else dataset.train_shards
        self.available = dataset.description[f"{name}_tokens"]
        table = dataset.byte_table
        self.base, self.boundary = table.base_bytes.numpy(), table.is_boundary.numpy()
        self.full = self.base + table.has_leading_space.numpy()
        self.control = np.array([i != self.tokenizer.bos and p.boundary for i, p in enumerate(self.tokenizer.pieces)])
        self.bytes: list[int] = []  # bytes of each document by the table
        self.tokens = self.headless = self.longest = 0  # headless: documents without BOS; longest: tokens
        self.inside: dict[int, list] = {}  # control token inside a document -> [count, document of the first]
        # Compared with the source texts if they are given, else with the decoded tokens: documents, their bytes by the
        # table, bytes of their text, documents in which these differ, and the first of them.
        self.compared = self.counted = self.true = self.differing = self.deviation = 0
        self.first_differing = ""
        self.foreign: Counter[str] = Counter()  # FOREIGN characters of the decoded documents
        self.added: Counter[str] = Counter()  # characters that decoded documents have and their source texts have not
        self.decoded_bytes = 0
        self.sidecar = table.sidecar.numpy() if name == "val" and table.sidecar is not None else None
        self.by_table = 0  # bytes as the table counts them, even if a sidecar counts
        self.decoded = self.encoded = self.retokenized = 0  # documents decoded; encoded again; giving other tokens

    @property
    def documents(self) -> int:
        """Number of documents that begin with BOS."""
        return len(self.bytes) - self.headless

    def count(self, tokens: np.ndarray) -> np.ndarray:
        """Bytes of each token (n,), as ByteTable.count counts them; the first has no previous token."""
        counts = self.full[tokens]
        after = np.append(0, np.flatnonzero(self.boundary[tokens[:-1]]) + 1)
        counts[after] = self.base[tokens[after]]
        return counts

    def add(self, batch: Batch) -> None:
        tokens, starts, first = batch
        sizes = np.add.reduceat(self.count(tokens), starts, dtype=np.int64)
        self.by_table += int(sizes.sum())
        if self.sidecar is not None:
            stated = self.sidecar[self.tokens : self.tokens + len(tokens)]
            sizes = np.add.reduceat(stated, starts, dtype=np.int64)
        self.bytes += sizes.tolist()
        self.longest = max(self.longest, int(np.diff(starts, append=len(tokens)).max()))
        self.tokens += len(tokens)
        self.headless += int((tokens[starts] != self.tokenizer.bos).sum())
        for at in np.flatnonzero(self.control[tokens]):
            document = first + int(np.searchsorted(starts, at, "right")) - 1
            self.inside.setdefault(int(tokens[at]), [0, document])[0] += 1
        per_batch, to_decode, to_encode = SAMPLES[self.name, self.thorough]
        rows = batch.rows()[: min(per_batch, to_decode - self.decoded)]
        texts = self.tokenizer.spell([row.tolist() for row in rows])
        originals = [self.tokenizer.restore(text) for text in texts]
        again = self.tokenizer.encode(originals[: to_encode - self.encoded])
        self.decoded += len(texts)
        self.encoded += len(again)
        self.retokenized += sum(not np.array_equal(new, row) for new, row in zip(again, rows, strict=False))
        for text in texts:
            self.foreign.update(FOREIGN.findall(text))
            self.decoded_bytes += len(text.encode())
        if self.sources is not None:
            prefix = self.tokenizer.normalize("a").removesuffix("a")  # the space that some models prepend is not text
            texts = [self.tokenizer.normalize(text).removeprefix(prefix) for text in islice(self.sources, len(starts))]
            for text, source in zip(originals, texts, strict=False):
                if text != source:
                    self.added.update(Counter(text) - Counter(source))
        elif self.sidecar is not None:
            texts = originals if isinstance(self.tokenizer, CaseOps) else [FOREIGN.sub("", text) for text in texts]
        for document, (counted, text) in enumerate(zip(sizes.tolist(), texts, strict=False), first):
            true = len(text.encode())
            if counted != true:
                self.differing += 1
                self.deviation += abs(counted - true)
                self.first_differing = self.first_differing or f"document {document:,}, {counted:,} not {true:,}"
            self.compared += 1
            self.counted += counted
            self.true += true

    def figures(self) -> dict:
        """JSON-ready figures; all but shards and tokens describe the tokens_read."""
        return {
            "shards": len(self.shards),
            "tokens": self.available,
            "tokens_read": self.tokens,
            "documents": self.documents,
            "bytes": sum(self.bytes),
            "empty_documents": self.bytes.count(0),
            "longest_document": self.longest,
            "decoded_documents": self.decoded,
        }


def byte_token(tokenizer: Tokenizer, value: int) -> int | None:
    """The token for a byte value; None if the tokenizer has none."""
    if not isinstance(tokenizer, SentencePiece):
        return tokenizer.offset + value
    token = tokenizer.processor.piece_to_id(f"<0x{value:02X}>")
    return token if tokenizer.processor.is_byte(token) else None
