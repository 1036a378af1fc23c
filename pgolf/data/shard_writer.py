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
        self.directory, self.name, self.shard_tokens, self.file = directory, name, shard_tokens, None
        counts = (figures.get(key, 0) for key in ("documents", "text_bytes", "tokens"))
        self.documents, self.text_bytes, self.tokens = counts
        self.chain = bytes.fromhex(figures.get("documents_sha256", "00" * 32))
        shards, rest = divmod(self.tokens, shard_tokens)
        present = {int(path.stem[-6:]): path for path in directory.glob(f"fineweb_{name}_*.bin")}
        for i in range(shards + (rest > 0)):
            size = HEADER_BYTES + 2 * (shard_tokens if i < shards else rest)
            if i not in present or present[i].stat().st_size < size:
                raise DataError(f"{directory}: shard {i} of {name} is not what was written; delete this folder")
        for i in present.keys() - range(shards + (rest > 0)):  # written after the record
            present[i].unlink()
        if rest:
            self._open(shards, "rb+")
            self.file.truncate(HEADER_BYTES + 2 * rest)
            self.file.seek(0, os.SEEK_END)

    def figures(self) -> dict:
        figures = {"documents": self.documents, "text_bytes": self.text_bytes, "tokens": self.tokens}
        return figures | {"documents_sha256": self.chain.hex()}

    def add(self, documents: list[Encoded]) -> None:
        for document in documents:
            self.chain = hashlib.sha256(self.chain + document.sha256).digest()
        self.documents += len(documents)
        self.text_bytes += sum(document.size for document in documents)
        tokens = np.concatenate([np.empty(0, "<u2"), *(document.tokens for document in documents)], dtype="<u2")
        while len(tokens):
            shard, offset = divmod(self.tokens, self.shard_tokens)
            if not offset:
                self.close()
                self._open(shard, "wb")
            part = tokens[: self.shard_tokens - offset]
            self.file.write(part.data)
            self.tokens += len(part)
            tokens = tokens[len(part) :]

    def sync(self) -> None:
        """Write everything to disk, before a record states it."""
        if self.file:
            self.file.flush()
            os.fsync(self.file.fileno())

    def close(self) -> None:
        """Close a shard, whose header now states its tokens; until then it states those of a full shard."""
        if self.file:
            with self.file:
                self._write_header((self.tokens - 1) % self.shard_tokens + 1)
                self.sync()
            self.file = None

    def abandon(self) -> None:
        """Close the file as it is: Windows does not delete open files."""
        if self.file:
            self.file.close()

    def _open(self, shard: int, mode: str) -> None:
        self.file = open(self.directory / f"fineweb_{self.name}_{shard:06d}.bin", mode)  # noqa: SIM115
        self._write_header(self.shard_tokens)

    def _write_header(self, tokens: int) -> None:
        self.file.seek(0)
        self.file.write(header(tokens))
