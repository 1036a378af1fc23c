"""The data of a run: opened, checked before training is paid for, and described in its result."""

import functools
from pathlib import Path

from torch import Tensor

from pgolf.data import audit, embedded_corpus
from pgolf.data.dataset import Dataset
from pgolf_core.config import RunConfig
from pgolf_core.files import DataError
from pgolf_core.knobs import BOS, EMBEDDED, EvalConfig


def open_dataset(config: RunConfig) -> Dataset:
    """The shards and tokenizer of the knobs; builds an embedded corpus that is missing. Raises DataError."""
    directory = embedded_corpus.resolve(config.data, config.vocab_size)
    dataset = Dataset.open(directory, config.tokenizer_path, vocab_size=config.vocab_size)
    off = {"document_mask": (False,), "smear_gate": ("off",), "adapt": ("off", "sgd")}
    asks = [name for name, values in off.items() if getattr(config, name) not in values]
    if asks and dataset.tokenizer.bos != BOS:
        raise DataError(
            f"{asks[0]}: {dataset.tokenizer_path} begins documents with token {dataset.tokenizer.bos}, and the "
            f"model looks for token {BOS}; train a tokenizer with bos_id={BOS}"
        )
    return dataset


def scored_tokens(dataset: Dataset, seq_len: int, config: EvalConfig, roundtrip: bool = False) -> Tensor:
    """The part of the validation split that the knobs score, (n,) int64; roundtrip: the part for the file's score.

    seq_len: train_seq_len, of which the split is cut to whole multiples. Raises DataError if the split is shorter.
    """
    if roundtrip:
        return dataset.validation(seq_len, config.roundtrip_val_max_tokens, config.roundtrip_val_max_documents)
    return dataset.validation(seq_len, config.val_max_tokens, config.val_max_documents)


def tokens_per_byte(dataset: Dataset, seq_len: int) -> float:
    """Mean of the first validation tokens; turns a training loss into approximate bits per byte."""
    sample = dataset.validation(seq_len, 65_536)
    return (len(sample) - 1) / dataset.byte_table.count(sample)


def check_scored(dataset: Dataset, seq_len: int, config: EvalConfig) -> None:
    """DataError if the validation split has fewer documents or tokens than the knobs score."""
    of_file = config.roundtrip_val_max_tokens, config.roundtrip_val_max_documents
    for limits in {(config.val_max_tokens, config.val_max_documents), of_file}:  # usually equal: read once
        tokens = len(dataset.validation(seq_len, *limits))
        if tokens <= config.eval_seq_len:
            raise DataError(
                f"{dataset.directory}: {tokens:,} tokens are to be scored, and a window has {config.eval_seq_len}; "
                "shorten eval_seq_len, or score more"
            )


def part_read(config: RunConfig, train_tokens: int) -> str:
    """A sentence on a training that reads the first files alone, at most so many of train_tokens; '' for any other.

    The embedded corpus has its documents in the order of a hash, so that its beginning is like the rest.
    """
    data, read = config.data, config.iterations * max(batch for batch, _ in config.data.stages)
    mixed = data.shuffle_documents or data.shuffle_sequences or data.coprime_sequences or data.data_path in EMBEDDED
    if mixed or read >= train_tokens:
        return ""
    first = f"the first {read / train_tokens:.0%} in the order of the files"
    return f"training reads {read:,} of {train_tokens:,} tokens, {first}; with shuffle_sequences=1 it reads all parts"


def data_facts(dataset: Dataset, seq_len: int, config: EvalConfig) -> tuple[dict, str]:
    """The field `data` of a result, and the sha256 of the text behind its round trip. Raises DataError on false data.

    folder; train_tokens, val_tokens; published: name of the published split this is, or ''; scored_fraction: share
    of the validation split's bytes; audit: fast, or thorough where that was done before; findings: sentences.
    """
    limits = config.roundtrip_val_max_tokens, config.roundtrip_val_max_documents
    return _data_facts(dataset.directory, dataset.fingerprint, dataset.tokenizer_path, seq_len, *limits)


@functools.cache  # shared by all exports of one lab
def _data_facts(
    directory: Path, fingerprint: str, tokenizer_path: Path, seq_len: int, max_tokens: int, max_documents: int
) -> tuple[dict, str]:
    dataset = Dataset.open(directory, tokenizer_path)
    if dataset.fingerprint != fingerprint:
        raise DataError(f"{directory}: changed while a run used it; build or download it again, and run again")
    text = dataset.scored_text(seq_len, max_tokens, max_documents)
    found = audit.audit(dataset, seq_len=seq_len, max_tokens=max_tokens, max_documents=max_documents, thorough=False)
    whole = audit.stored(dataset)
    errors = [f.message for one in (found, whole) if one for f in one.findings if f.level == "error"]
    if errors:
        listed = "".join(f"\n  - {message}" for message in dict.fromkeys(errors))
        raise DataError(f"{directory}: data that gives false numbers; `pgolf data audit` says all about it{listed}")
    description, figures = dataset.description, found.figures
    facts = {
        "folder": directory.name, "train_tokens": description["train_tokens"], "val_tokens": description["val_tokens"],
        "published": figures["published"], "scored_fraction": figures["scored_fraction"],
        "audit": "thorough" if whole else "fast",
        "findings": [finding.message for finding in found.findings if finding.level == "warning"],
    }  # fmt: skip
    return facts, text
