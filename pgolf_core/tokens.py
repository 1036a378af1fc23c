"""The UTF-8 bytes that each token stands for. Tokenizers themselves, text ↔ tokens, are in pgolf/data/tokenizers.py."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from torch import Tensor

from pgolf_core.files import DataError
from pgolf_core.shards import read_shard, sidecar_paths


@dataclass(frozen=True)
class Piece:
    """Text of one token. leads: a space comes before it, unless a boundary precedes."""

    text: bytes  # UTF-8, without the leading space; the byte of a byte token
    leads: bool
    boundary: bool  # a control, unknown or unused token, without text


MAX_MODEL_BYTES = 16 * 2**20  # 65,536 pieces, the most that 16-bit tokens can tell apart, take 2 MB
MAX_PIECES = 2**16

# Raw bytes: pad, BOS, EOS and unknown, then every byte of UTF-8.
BYTE_PIECES = [Piece(b"", False, True)] * 4 + [Piece(bytes([i]), False, False) for i in range(256)]


def read_sentencepiece(path: str | Path) -> sentencepiece.SentencePieceProcessor:
    """The model of a .model file. Raises DataError naming a file that is missing or is none."""
    path = Path(path)
    if not path.is_file():
        raise DataError(
            f"tokenizer_path: no file {path}; name a SentencePiece .model, or the .json of a byte tokenizer"
        )
    try:
        content = path.read_bytes() if path.stat().st_size <= MAX_MODEL_BYTES else b""
        if content:  # SentencePiece takes b"" for a model
            processor = sentencepiece.SentencePieceProcessor(model_proto=content)
            if processor.vocab_size() <= MAX_PIECES and pieces_of(processor):
                return processor
    except (RuntimeError, ValueError):  # ValueError: a piece that is not UTF-8, or a byte without its number
        pass
    raise DataError(f"tokenizer_path: {path} is no SentencePiece model of at most {MAX_PIECES:,} pieces")


def pieces_of(processor: sentencepiece.SentencePieceProcessor) -> list[Piece]:
    """Every token of a SentencePiece model, in order of ids."""
    pieces = []
    for i in range(processor.vocab_size()):
        text = processor.id_to_piece(i).replace("▁", " ")
        if processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i):
            pieces.append(Piece(b"", False, True))
        elif processor.is_byte(i):  # its piece is a name like <0x0A>
            pieces.append(Piece(bytes([int(text[3:5], 16)]), False, False))
        else:
            pieces.append(Piece(text.removeprefix(" ").encode(), text.startswith(" "), False))
    if any(len(piece.text) >= 2**15 for piece in pieces):
        raise ValueError("a piece is longer than 16 bits can count")
    return pieces


@dataclass(frozen=True)
class ByteTable:
    """UTF-8 bytes per token; three tensors of (vocab_size,), and a byte sidecar if the data have one.

    base_bytes: bytes of the decoded piece without its leading space. has_leading_space: one byte more, unless the
    previous token is a boundary. is_boundary: control, unknown and unused pieces, which have no text. sidecar: bytes
    of original text of every token of the validation split, (n,), which count instead of the table's.
    """

    base_bytes: Tensor
    has_leading_space: Tensor
    is_boundary: Tensor
    sidecar: Tensor | None = None

    @classmethod
    def from_sentencepiece(cls, path: str | Path) -> ByteTable:
        """The table of a .model file, or of a byte tokenizer's .json. Raises DataError as read_sentencepiece."""
        return cls.of(BYTE_PIECES if Path(path).suffix == ".json" else pieces_of(read_sentencepiece(path)))

    @classmethod
    def of(cls, pieces: Iterable[Piece]) -> ByteTable:
        pieces = list(pieces)
        return cls(
            torch.tensor([len(piece.text) for piece in pieces], dtype=torch.int16),
            torch.tensor([piece.leads for piece in pieces]),
            torch.tensor([piece.boundary for piece in pieces]),
        )

    def with_sidecar(self, directory: str | Path) -> ByteTable:
        """With the byte sidecar of a folder of shards, if it has one."""
        if not (paths := sidecar_paths(directory)):
            return self
        sizes = np.concatenate([read_shard(path) for path in paths]).astype(np.int32)
        return replace(self, sidecar=torch.from_numpy(sizes))

    def sizes(self, tokens: Tensor) -> Tensor:
        """Bytes of every target in tokens (n,), (n - 1,); with a sidecar, tokens begin the validation split."""
        if self.sidecar is not None:
            return self.sidecar[1 : len(tokens)].to(tokens.device)
        columns = self.base_bytes, self.has_leading_space, self.is_boundary
        base_bytes, has_leading_space, is_boundary = (column.to(tokens.device) for column in columns)
        return base_bytes[tokens[1:]] + (has_leading_space[tokens[1:]] & ~is_boundary[tokens[:-1]])

    def count(self, tokens: Tensor) -> int:
        """Bytes of all targets in tokens (n,) together."""
        return int(self.sizes(tokens).sum(dtype=torch.int64))
