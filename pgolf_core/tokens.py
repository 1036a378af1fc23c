"""Tokenizers: text ↔ tokens, and the UTF-8 bytes that each token stands for.

A tokenizer is a SentencePiece .model (BPE or unigram), or a .json of raw bytes: the published byte260, or one that
normalises text first, as SentencePiece does, so that both spell the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from torch import Tensor

from pgolf_core.files import DataError

NAMES = ("tokenizer.model", "tokenizer.json")  # file names, next to the shards
SPECIAL = dict(pad_id=0, bos_id=1, eos_id=2, unk_id=3)  # the same in every tokenizer made here and in the published
NORMALIZATION = "nmt_nfkc"


@dataclass(frozen=True)
class Piece:
    """Text of one token. leads: a space comes before it, unless a boundary precedes."""

    text: bytes  # UTF-8, without the leading space; the byte of a byte token
    leads: bool
    boundary: bool  # a control, unknown or unused token, without text


class SentencePiece:
    """A SentencePiece model."""

    def __init__(self, content: bytes):
        """Raises RuntimeError if content is not a model."""
        if not content:  # SentencePiece would make a model without pieces
            raise RuntimeError("empty")
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        self.vocab_size, self.bos = self.processor.vocab_size(), self.processor.bos_id()

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Tokens of each text, (n,) uint16, BOS first."""
        # One thread per call: callers with much text use several, and SentencePiece releases the GIL.
        rows = self.processor.encode(list(texts), add_bos=True, num_threads=1, return_type="numpy")
        return [row.astype(np.uint16) for row in rows]

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        return self.processor.decode(list(ids))

    def normalize(self, text: str) -> str:
        """The text that its tokens spell."""
        return self.processor.normalize(text).replace("▁", " ")

    @cached_property
    def pieces(self) -> list[Piece]:
        sp, pieces = self.processor, []
        for i in range(self.vocab_size):
            text = sp.id_to_piece(i).replace("▁", " ")
            if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
                pieces.append(Piece(b"", False, True))
            elif sp.is_byte(i):  # its piece is a name like <0x0A>
                pieces.append(Piece(bytes([int(text[3:5], 16)]), False, False))
            else:
                pieces.append(Piece(text.removeprefix(" ").encode(), text.startswith(" "), False))
        return pieces


class Bytes:
    """Every byte of UTF-8 is a token, `offset` + its value; the ids below are pad, BOS, EOS and unknown."""

    offset, vocab_size, bos = 4, 260, SPECIAL["bos_id"]

    def __init__(self, normalization: str = ""):
        self.normalization = normalization
        self._normalizer = normalizer(normalization) if normalization else None

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Tokens of each text, (n,) uint16, BOS first."""
        return [
            np.concatenate([[self.bos], np.frombuffer(self.normalize(text).encode(), np.uint8) + self.offset]).astype(
                np.uint16
            )
            for text in texts
        ]

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        return [bytes(i - self.offset for i in row if i >= self.offset).decode(errors="replace") for row in ids]

    def normalize(self, text: str) -> str:
        """The text that its tokens spell."""
        return self._normalizer.normalize(text) if self._normalizer else text

    @cached_property
    def pieces(self) -> list[Piece]:
        return [Piece(b"", False, True)] * self.offset + [Piece(bytes([i]), False, False) for i in range(256)]

    def to_json(self) -> str:
        """Content of a file like the published tokenizer's, with the normalisation if there is one."""
        content = {"config": {**SPECIAL, "byte_offset": self.offset, "byte_count": 256}, "tokenizer_type": "pure_byte"}
        content |= {"normalization_rule_name": self.normalization} if self.normalization else {}
        return json.dumps(content | {"vocab_size": self.vocab_size}, indent=2, sort_keys=True) + "\n"


Tokenizer = SentencePiece | Bytes


def normalizer(rule: str) -> sentencepiece.SentencePieceNormalizer:
    """The normalizer of SentencePiece models trained here: no space is added in front."""
    return sentencepiece.SentencePieceNormalizer(
        rule_name=rule, add_dummy_prefix=False, escape_whitespaces=False, remove_extra_whitespaces=True
    )


def load(path: str | Path) -> Tokenizer:
    """The tokenizer of a .model or .json file. Raises DataError naming the file if it is neither."""
    path = Path(path)
    if not path.is_file():
        raise DataError(
            f"tokenizer_path: no file {path}; name a SentencePiece .model, or the .json of a byte tokenizer"
        )
    content = path.read_bytes()
    if path.suffix == ".json":
        return _load_bytes(path, content)
    try:
        return SentencePiece(content)
    except RuntimeError:
        raise DataError(f"tokenizer_path: {path} is no SentencePiece model") from None


def _load_bytes(path: Path, content: bytes) -> Bytes:
    try:
        stated = json.loads(content)
        tokenizer = Bytes(stated.get("normalization_rule_name", ""))
        if json.loads(tokenizer.to_json()) == stated:
            return tokenizer
    except (ValueError, AttributeError, RuntimeError):
        pass
    raise DataError(
        f"tokenizer_path: {path} is no tokenizer of 260 bytes like the published fineweb_pure_byte_260.json"
    )


@dataclass(frozen=True)
class ByteTable:
    """UTF-8 bytes per token; three tensors of (vocab_size,).

    base_bytes: bytes of the decoded piece without its leading space. has_leading_space: one byte more, unless the
    previous token is a boundary. is_boundary: control, unknown and unused pieces, which have no text.
    """

    base_bytes: Tensor
    has_leading_space: Tensor
    is_boundary: Tensor

    @classmethod
    def from_sentencepiece(cls, path: str | Path) -> ByteTable:
        return cls.of(load(path))

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ByteTable:
        pieces = tokenizer.pieces
        return cls(
            torch.tensor([len(piece.text) for piece in pieces], dtype=torch.int16),
            torch.tensor([piece.leads for piece in pieces]),
            torch.tensor([piece.boundary for piece in pieces]),
        )

    def to(self, device: torch.device | str) -> ByteTable:
        return ByteTable(self.base_bytes.to(device), self.has_leading_space.to(device), self.is_boundary.to(device))

    def count(self, previous_ids: Tensor, target_ids: Tensor) -> Tensor:
        """Bytes of all targets together, () int64; previous_ids[i] is the token before target_ids[i]."""
        spaces = self.has_leading_space[target_ids] & ~self.is_boundary[previous_ids]
        return (self.base_bytes[target_ids] + spaces).sum(dtype=torch.int64)
