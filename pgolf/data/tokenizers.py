"""Tokenizers: text ↔ tokens.

A tokenizer is a SentencePiece .model (BPE or unigram), or a .json of raw bytes: the published byte260, or one that
normalises text first, as SentencePiece does, so that both spell the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece

from pgolf.data import caseops
from pgolf.disk import read_json
from pgolf_core.files import DataError
from pgolf_core.tokens import BYTE_PIECES, Piece, pieces_of, read_sentencepiece

NAMES = ("tokenizer.model", "tokenizer.json")  # file names, next to the shards
SPECIAL = dict(pad_id=0, bos_id=1, eos_id=2, unk_id=3)  # the same in every tokenizer made here and in the published
NORMALIZATION = "nmt_nfkc"
MAX_SYMBOL = 16  # special tokens and symbols that a model was told stand below, learnt pieces above


@contextmanager
def _explain_damage() -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError:
        raise DataError("tokenizer_path: the SentencePiece model spells text that is not UTF-8; get it again") from None


class SentencePiece:
    """A SentencePiece model."""

    def __init__(self, processor: sentencepiece.SentencePieceProcessor):
        self.processor = processor
        self.vocab_size, self.bos = self.processor.vocab_size(), self.processor.bos_id()

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Tokens of each text, (n,) uint16, BOS first."""
        # One thread per call: callers with much text use several, and SentencePiece releases the GIL.
        rows = self.processor.encode(list(texts), add_bos=True, num_threads=1, return_type="numpy")
        return [row.astype(np.uint16) for row in rows]

    def spell(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """The text of tokens, as it is stored."""
        with _explain_damage():
            return self.processor.decode(list(ids))

    def restore(self, text: str) -> str:
        """The original of spelled text."""
        return text

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """The original text of tokens."""
        return [self.restore(text) for text in self.spell(ids)]

    def normalize(self, text: str) -> str:
        """The text that its tokens spell."""
        with _explain_damage():
            return self.processor.normalize(text).replace("▁", " ")

    @cached_property
    def pieces(self) -> list[Piece]:
        return pieces_of(self.processor)


class CaseOps(SentencePiece):
    """A SentencePiece model of text whose capitals are operators; it takes and gives the original."""

    restore = staticmethod(caseops.decode)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Tokens of each text, (n,) uint16, BOS first."""
        return super().encode([caseops.encode(text) for text in texts])

    def normalize(self, text: str) -> str:
        """The original of the text that its tokens spell."""
        return caseops.decode(super().normalize(caseops.encode(text)))

    def text_bytes(self, tokens: np.ndarray) -> np.ndarray:
        """Bytes of original text of each token of a document, (n,) uint16."""
        sizes, escaped = self._sizes[tokens], 0
        for i in np.flatnonzero(tokens[:-1] == self.operators[-1]) + 1:
            if i - 1 != escaped:  # an escape that is not escaped itself; U+2581 is spelled in 1 of its 3 bytes
                escaped = i
                sizes[i] += 3 if tokens[i] in self.operators else 2
        return sizes

    @cached_property
    def _sizes(self) -> np.ndarray:
        sizes = np.array([len(piece.text) + piece.leads for piece in self.pieces], np.uint16)
        sizes[self.operators] = 0
        return sizes

    @cached_property
    def operators(self) -> list[int]:
        return operators_of(self.processor)


def operators_of(processor: sentencepiece.SentencePieceProcessor) -> list[int]:
    """Tokens of the four operators; [] of a model without: only symbols that it was told stand before all others."""
    tokens = [processor.piece_to_id(operator) for operator in caseops.OPERATORS]
    return tokens if len(set(tokens)) == len(tokens) and max(tokens) < MAX_SYMBOL else []


class Bytes:
    """Every byte of UTF-8 is a token, `offset` + its value; the ids below are pad, BOS, EOS and unknown."""

    offset, vocab_size, bos, pieces = 4, 260, SPECIAL["bos_id"], BYTE_PIECES

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
        """The text of tokens."""
        return [bytes(i - self.offset for i in row if i >= self.offset).decode(errors="replace") for row in ids]

    spell, restore = decode, staticmethod(str)

    def normalize(self, text: str) -> str:
        """The text that its tokens spell."""
        return self._normalizer.normalize(text) if self._normalizer else text

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


def beside(directory: Path) -> Path | None:
    """The tokenizer file beside the shards of a folder."""
    return next((directory / name for name in NAMES if (directory / name).is_file()), None)


def load(path: str | Path) -> Tokenizer:
    """The tokenizer of a .model or .json file. Raises DataError naming the file if it is neither."""
    path = Path(path)
    if path.suffix != ".json" or not path.is_file():
        processor = read_sentencepiece(path)
        tokenizer = CaseOps(processor) if operators_of(processor) else SentencePiece(processor)
        if tokenizer.bos < 0:
            why = "no BOS: it has no control token <s> that begins a document, or <s> is a user-defined symbol"
            raise DataError(f"tokenizer_path: {path} has {why}; train one with bos_id=1")
        return tokenizer
    try:
        stated = read_json(path) or {}
        tokenizer = Bytes(stated.get("normalization_rule_name", ""))
        if json.loads(tokenizer.to_json()) == stated:
            return tokenizer
    except (ValueError, AttributeError, RuntimeError, TypeError):  # RecursionError is a RuntimeError
        pass
    raise DataError(
        f"tokenizer_path: {path} is no tokenizer of 260 bytes like the published fineweb_pure_byte_260.json"
    )
