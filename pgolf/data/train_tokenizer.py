"""Train a tokenizer on text: SentencePiece BPE or unigram with the reference's settings, or raw bytes."""

import io
from collections.abc import Iterable, Iterator

import sentencepiece

from pgolf.data import caseops
from pgolf.data.tokenizers import NORMALIZATION, SPECIAL, Bytes
from pgolf_core.files import DataError

NAMES = {"bpe": "sp", "unigram": "unigram", "bytes": "byte"}  # kind -> prefix in folder names
MAX_VOCABULARY = 1 << 16  # shards are uint16


def name_of(kind: str, vocab_size: int) -> str:
    """Name of a tokenizer in folder names: sp1024, unigram1024, byte260."""
    return f"{NAMES[kind]}{vocab_size}"


def check(kind: str, vocab_size: int) -> None:
    """DataError if no such tokenizer can exist."""
    if kind not in NAMES:
        raise DataError(f"tokenizer={kind}: choose one of {', '.join(NAMES)}")
    if kind == "bytes" and vocab_size != Bytes.vocab_size:
        raise DataError(f"tokenizer=bytes has 256 bytes and 4 special tokens: set vocab_size={Bytes.vocab_size}")
    if vocab_size > MAX_VOCABULARY:
        raise DataError(f"vocab_size={vocab_size}: shards hold tokens of vocab_size <= {MAX_VOCABULARY}")


def train(texts: Iterable[str], kind: str, vocab_size: int, transform: str = "") -> bytes:
    """Content of a tokenizer file, tokenizer.json for bytes; equal texts give equal content. Raises DataError.

    All kinds spell the same text: nmt_nfkc normalised, runs of spaces as one space. With transform "caseops" they spell
    the original, whose capitals are operators.
    """
    if kind == "bytes":
        return Bytes(NORMALIZATION).to_json().encode()
    model, failures, spelled = io.BytesIO(), [], caseops.encode if transform else str
    rules = dict(normalization_rule_name=NORMALIZATION)
    if transform:
        rules = dict(normalization_rule_name="identity", user_defined_symbols=[*caseops.OPERATORS])
        rules |= dict(remove_extra_whitespaces=False, allow_whitespace_only_pieces=True)

    def sentences() -> Iterator[str]:
        try:
            # Whole documents, as they will be encoded: the words at the start of lines would be seen without their
            # space, which costs 2.4 % more tokens. U+2585 is SentencePiece's mark for unknown text; a document that
            # contains it would be left out.
            yield from (spelled(text).replace("\u2585", " ") for text in texts)
        except DataError as error:  # SentencePiece would replace its message
            failures.append(error)
            raise

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(), model_writer=model, model_type=kind, vocab_size=vocab_size,
            character_coverage=0.999, byte_fallback=True, split_digits=True, add_dummy_prefix=False,
            hard_vocab_limit=False, **SPECIAL, **rules,
            max_sentence_length=2**30,  # bytes; the default leaves out documents over 4192
            num_threads=2, minloglevel=2,  # the threads are recorded in the model file
        )  # fmt: skip
    except RuntimeError as error:
        # "INTERNAL: file.cc(12) [condition] words or decrease …": pgolf does not offer that option.
        reason = str(error).rpartition("] ")[2].partition(" or decrease character_coverage")[0]
        raise (*failures, DataError(f"vocab_size={vocab_size}: no such tokenizer of this text: {reason}"))[0] from error
    trained = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
    if trained != vocab_size:
        raise DataError(f"vocab_size={vocab_size}: this text gives no more than vocab_size={trained}")
    return model.getvalue()
