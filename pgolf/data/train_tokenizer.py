"""Make a tokenizer of a text: SentencePiece BPE or unigram as the reference makes its own, or raw bytes."""

import io
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from pgolf_core.files import DataError, atomic_write
from pgolf_core.tokens import NORMALIZATION, SPECIAL, Bytes

KINDS = ("bpe", "unigram", "bytes")


def name_of(kind: str, vocab_size: int) -> str:
    """As it stands in names of folders: sp1024, unigram1024, byte260."""
    return {"bpe": "sp", "unigram": "unigram", "bytes": "byte"}[kind] + str(vocab_size)


def check(kind: str, vocab_size: int) -> None:
    """DataError where there can be no such tokenizer."""
    if kind not in KINDS:
        raise DataError(f"tokenizer={kind}: choose one of {', '.join(KINDS)}")
    if kind == "bytes" and vocab_size != Bytes.vocab_size:
        raise DataError(f"tokenizer=bytes has 256 bytes and 4 special tokens: set vocab_size={Bytes.vocab_size}")


def make(texts: Iterable[str], directory: Path, kind: str, vocab_size: int) -> Path:
    """Write tokenizer.model, or tokenizer.json, into a folder; the same texts give the same bytes.

    All of them spell the same text: what nmt_nfkc makes of it, runs of spaces as one.
    """
    check(kind, vocab_size)
    if kind == "bytes":
        return atomic_write(directory / "tokenizer.json", Bytes(NORMALIZATION).to_json())
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            # Whole documents, as they will be encoded: cut into lines, words at a line's start would be seen
            # without their space, which costs 2.4 % more tokens. U+2585 is SentencePiece's own mark for
            # unknown text, and a document with it would be left out.
            sentence_iterator=(text.replace("\u2585", " ") for text in texts),
            max_sentence_length=2**30,  # bytes; the default leaves out documents of more than 4192
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size,
            character_coverage=0.999,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name=NORMALIZATION,
            add_dummy_prefix=False,
            **SPECIAL,
            hard_vocab_limit=False,
            num_threads=2,  # fixed: the model file records it
            minloglevel=2,
        )
    except RuntimeError as error:
        # "INTERNAL: file.cc(12) [condition] words or decrease …": that option is none of ours.
        reason = str(error).rpartition("] ")[2].partition(" or decrease character_coverage")[0]
        raise DataError(f"vocab_size={vocab_size}: no such tokenizer of this text: {reason}") from error
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
    if pieces != vocab_size:
        raise DataError(f"vocab_size={vocab_size}: this text gives no more than {pieces} pieces")
    return atomic_write(directory / "tokenizer.model", model.getvalue())
