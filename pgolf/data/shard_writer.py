"""Writing the shards of a split document by document, continued after a kill from recorded figures."""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pgolf_core.files import DataError
from pgolf_core.shards import HEADER_BYTES, header


class Encoded(NamedTuple):
    """A document: sha256 and length of its UTF-8, its tokens (n,), its identity."""

    sha256: bytes
    size: int
    tokens: np.ndarray
    identity: bytes


class SplitWriter:
    """The growing shards of a split and the figures of its documents, from the figures of a record on."""

    def __init__(self, directory: Path, name: str, shard_tokens: int, figures: dict):
        start = {"documents": 0, "text_bytes": 0, "tokens": 0, "documents_sha256": "00" * 32}
        self.directory, self.name, self.shard_tokens, self.file = directory, name, shard_tokens, None
        self.figures = start | figures
        left, at = self.figures["tokens"], 0
        for path in sorted(directory.glob(f"fineweb_{name}_*.bin")):
            if (part := min(left, shard_tokens)) == 0:
                path.unlink()  # written after the record
            elif path != self._path(at) or path.stat().st_size < HEADER_BYTES + 2 * part:
                break
            elif part < shard_tokens:
                self.file = open(path, "rb+")  # noqa: SIM115
                self.file.truncate(HEADER_BYTES + 2 * part)
                self.file.seek(0, os.SEEK_END)
            left, at = left - part, at + 1
        if left:
            raise DataError(f"{directory}: shard {at} of {name} is not what was written; delete this folder")

    def add(self, documents: list[Encoded]) -> None:
        figures, chain = self.figures, bytes.fromhex(self.figures["documents_sha256"])
        for document in documents:
            chain = hashlib.sha256(chain + document.sha256).digest()
        figures["documents_sha256"] = chain.hex()
        figures["documents"] += len(documents)
        figures["text_bytes"] += sum(document.size for document in documents)
        tokens = np.concatenate([np.empty(0, "<u2"), *(document.tokens for document in documents)], dtype="<u2")
        while len(tokens):
            shard, offset = divmod(figures["tokens"], self.shard_tokens)
            if not offset:
                self.close()
                self.file = open(self._path(shard), "wb")  # noqa: SIM115
                self.file.write(header(self.shard_tokens))
            part = tokens[: self.shard_tokens - offset]
            self.file.write(part.data)
            figures["tokens"] += len(part)
            tokens = tokens[len(part) :]

    def synced(self) -> dict:
        """The figures, once everything that they count is on disk."""
        if self.file:
            self.file.flush()
            os.fsync(self.file.fileno())
        return self.figures

    def close(self) -> None:
        """Close the shard, whose header now states its tokens; until then it states those of a full shard."""
        if self.file:
            with self.file as file:
                self.file = None  # a full disk is an error once
                file.seek(0)
                file.write(header((self.figures["tokens"] - 1) % self.shard_tokens + 1))
                file.flush()
                os.fsync(file.fileno())

    def _path(self, shard: int) -> Path:
        return self.directory / f"fineweb_{self.name}_{shard:06d}.bin"
