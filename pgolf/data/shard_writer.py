"""Writing the shards of a split: each block at the position that the figures state, so writing one again is safe."""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pgolf_core.files import DataError
from pgolf_core.shards import HEADER_BYTES, header

NOTHING = {"documents": 0, "text_bytes": 0, "tokens": 0, "documents_sha256": "00" * 32}  # figures of an empty split


class Encoded(NamedTuple):
    """A document: sha256 and length of its UTF-8, its tokens (n,), its identity, bytes of original text per token."""

    sha256: bytes
    size: int
    tokens: np.ndarray
    identity: bytes
    text_bytes: np.ndarray | None = None  # (n,) uint16; None = as the byte table counts


class SplitWriter:
    """The growing shards of a split. figures: of the documents written; `add` keeps them up to date."""

    def __init__(self, directory: Path, name: str, shard_tokens: int, figures: dict):
        self.directory, self.name, self.shard_tokens, self.figures = directory, name, shard_tokens, NOTHING | figures
        self.unsynced = set()
        for begin in range(0, self.figures["tokens"], shard_tokens):
            path, tokens = self._path(begin), min(shard_tokens, self.figures["tokens"] - begin)
            if not path.exists() or path.stat().st_size < HEADER_BYTES + 2 * tokens:
                raise DataError(f"{path}: not what was written; delete {directory.name}")

    def add(self, documents: list[Encoded]) -> None:
        figures, chain = self.figures, bytes.fromhex(self.figures["documents_sha256"])
        for document in documents:
            chain = hashlib.sha256(chain + document.sha256).digest()
        figures["documents_sha256"] = chain.hex()
        figures["documents"] += len(documents)
        figures["text_bytes"] += sum(document.size for document in documents)
        tokens = np.concatenate([np.empty(0, "<u2"), *(document.tokens for document in documents)], dtype="<u2")
        while len(tokens):
            offset = figures["tokens"] % self.shard_tokens
            part = tokens[: self.shard_tokens - offset]
            path = self._path(figures["tokens"])
            with open(path, "rb+" if offset else "wb") as f:
                f.write(header(offset + len(part)))
                f.seek(HEADER_BYTES + 2 * offset)
                f.write(part.data)
                f.truncate()  # what a killed process wrote after its last record
            self.unsynced.add(path)
            figures["tokens"] += len(part)
            tokens = tokens[len(part) :]

    def synced(self) -> dict:
        """The figures, once everything that they count is on disk."""
        while self.unsynced:
            with open(self.unsynced.pop(), "rb+") as f:
                os.fsync(f.fileno())
        return self.figures

    def _path(self, token: int) -> Path:
        """The shard that holds a token of the split, by its number."""
        return self.directory / f"fineweb_{self.name}_{token // self.shard_tokens:06d}.bin"
