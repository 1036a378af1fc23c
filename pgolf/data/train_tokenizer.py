"""Train a tokenizer on text: SentencePiece BPE or unigram with the reference's settings, or raw bytes."""

import io
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from pgolf.data.tokenizers import NORMALIZATION, SPECIAL, Bytes
from pgolf_core.files import DataError, atomic_write

NAMES = {"bpe": "sp", "unigram": "unigram", "bytes": "byte"}  # kind -> prefix in folder names


def name_of(kind: str, vocab_size: int) -> str:
    """Name of a tokenizer in folder names: sp1024, unigram1024, byte260."""
    return f"{NAMES[kind]}{vocab_size}"


def check(kind: str, vocab_size: int) -> None:
    """DataError if no such tokenizer can exist."""
    if kind not in NAMES:
        raise DataError(f"tokenizer={kind}: choose one of {', '.join(NAMES)}")
    if kind == "bytes" and vocab_size != Bytes.vocab_size:
        raise DataError(f"tokenizer=bytes has 256 bytes and 4 special tokens: set vocab_size={Bytes.vocab_size}")


def make(texts: Iterable[str], directory: Path, kind: str, vocab_size: int) -> Path:
    """Write tokenizer.model or tokenizer.json into a folder; equal texts give equal bytes. Raises DataError.

    All kinds spell the same text: nmt_nfkc normalised, runs of spaces as one space.
    """
    check(kind, vocab_size)
    if kind == "bytes":
        return atomic_write(directory / "tokenizer.json", Bytes(NORMALIZATION).to_json())
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            # Whole documents, as they will be encoded: the words at the start of lines would be seen without their
            # space, which costs 2.4 % more tokens. U+2585 is SentencePiece's mark for unknown text; a document that
            # contains it would be left out.
            sentence_iterator=(text.replace("\u2585", " ") for text in texts),
            max_sentence_length=2**30,  # bytes; the default leaves out documents over 4192
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
            num_threads=2,  # fixed: recorded in the model file
            minloglevel=2,
        )
    except RuntimeError as error:
        # "INTERNAL: file.cc(12) [condition] words or decrease …": pgolf does not offer that option.
        reason = str(error).rpartition("] ")[2].partition(" or decrease character_coverage")[0]
        raise DataError(f"vocab_size={vocab_size}: no such tokenizer of this text: {reason}") from error
    trained = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
    if trained != vocab_size:
        raise DataError(f"vocab_size={vocab_size}: this text gives no more than vocab_size={trained}")
    return atomic_write(directory / "tokenizer.model", model.getvalue())
