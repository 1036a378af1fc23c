"""Audit of a dataset: whether its byte counts are true, and its validation text unseen in training and complete.

Bits per byte are only as true as these. Scores were published without each of the checks: leading spaces counted
twice, a byte token counted as the three bytes of U+FFFD, a lone space without a token of its own, validation text in
the training shards, a tenth of the validation split scored.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pgolf.data.dataset import DESCRIPTION, SPLITS, Dataset
from pgolf.data.split_stats import MARK, SplitStats, batches, byte_token
from pgolf.data.tokenizers import SPECIAL, SentencePiece, Tokenizer
from pgolf.disk import checksum, read_json
from pgolf_core.batches import TokenStream
from pgolf_core.files import DataError, atomic_write

VERSION = 1  # version of the checks; an audit.json of another version is ignored
STORED = "audit.json"
CHECKS = {  # in the order of a report
    "shards": "whole files, tokens in the vocabulary",
    "documents": "each begins with BOS, none is missing, nothing inside but text",
    "tokenizer": "no text is lost, a space is one byte",
    "table": "every token counts the bytes it decodes to",
    "bytes": "every document counts the bytes it decodes to",
    "overlap": "no validation document in the training shards",
    "published": "a published validation split is whole",
    "scored": "all of the validation split is scored",
}
KEPT_OVERLAP = 0.01  # largest tolerated overlap of a published split, as a share of its validation bytes
FAST_READ = 5_000_000  # training tokens read by a fast audit
PUBLISHED_DOCUMENTS = 50_000


class PublishedSplit(NamedTuple):
    """A published validation split, recognised by its sizes. documents 0: unknown."""

    name: str
    vocab_size: int
    window: int
    scored_tokens: int  # printed in the challenge's logs
    documents: int
    remark: str


PUBLISHED = [
    PublishedSplit("fineweb10B_sp1024", 1024, 1024, 62_021_632, PUBLISHED_DOCUMENTS, ""),
    PublishedSplit("fineweb10B_sp8192", 8192, 2048, 40_540_160, PUBLISHED_DOCUMENTS, ""),
    PublishedSplit("fineweb10B_sp8192_caseops", 8192, 2048, 47_851_520, 0, "the sp8192 split of the CaseOps records"),
    PublishedSplit("fineweb10B_sp1024_march17", 1024, 1024, 63_779_840, 0, "an earlier published split, of March 17"),
]
Results = Iterator[tuple[str, str]]  # (level, message) of the findings of one check


@dataclass(frozen=True)
class Finding:
    """level: error (scores on this data are false), warning (not to be published) or note. check: one of CHECKS."""

    level: str
    check: str
    message: str


@dataclass(frozen=True)
class Audit:
    """Findings and JSON-ready figures; thorough: all of the data was read, not a sample."""

    findings: list[Finding]
    figures: dict
    thorough: bool

    @property
    def ok(self) -> bool:
        return all(finding.level != "error" for finding in self.findings)


def audit_folder(directory: str | Path, **options: object) -> Audit:
    """`audit` of a folder; if it cannot be opened, an error for each reason."""
    try:
        return audit(Dataset.open(directory), **options)
    except DataError as error:
        findings = [Finding("error", "shards", reason) for reason in str(error).splitlines()]
        return Audit(findings, {"folder": Path(directory).name, "checked": ["shards"]}, thorough=False)


def audit(
    dataset: Dataset,
    *,
    seq_len: int = 1024,
    max_tokens: int = 0,
    max_documents: int = 0,
    thorough: bool = True,
    documents: Iterable[str] | None = None,
) -> Audit:
    """Make all CHECKS of a dataset.

    seq_len, max_tokens, max_documents: limits of the scored text, as in validation_tokens. documents: the source texts
    of the validation split, in order. A fast audit (thorough=False) reads the validation tokens and FAST_READ training
    tokens, and decodes a few documents.
    """
    results = {"shards": list(_check_shards(dataset)) if thorough else [], "table": list(_check_table(dataset))}
    if results["shards"] or len(dataset.byte_table.base_bytes) != dataset.tokenizer.vocab_size:
        figures = {"folder": dataset.directory.name, "checked": ["shards", "table"]}
        return Audit(_findings(results), figures, thorough)  # nothing can be counted
    sources = None if documents is None else iter(documents)
    val, train, keys, seen = _read_splits(dataset, thorough, sources)
    hits = [i for i, key in enumerate(keys) if key in seen]  # validation documents that are in training
    known = _published(val)
    figures = {"folder": dataset.directory.name, "checked": list(CHECKS), "published": known.name if known else ""}
    figures |= {"train": train.figures(), "val": val.figures(), "overlap_documents": len(hits)}
    figures |= {"overlap_bytes": int(val.bytes[hits].sum()), "seq_len": seq_len, "max_tokens": max_tokens}
    figures |= {"max_documents": max_documents} | _scored(val, seq_len, max_tokens, max_documents)
    results |= {
        "documents": [*_check_documents(val), *_check_documents(train)],
        "tokenizer": _check_tokenizer(val),
        "bytes": [*_check_bytes(val, results["table"], sources), *_check_bytes(train, results["table"])],
        "overlap": _check_overlap(val, train, hits, seen[keys[hits[0]]]) if hits else (),
        "published": _check_published(val),
        "scored": _check_scored(val, figures),
    }
    return Audit(_findings(results), figures, thorough)


def _findings(results: dict[str, Iterable[tuple[str, str]]]) -> list[Finding]:
    return [Finding(level, check, message) for check in CHECKS for level, message in results.get(check, ())]


def _read_splits(dataset: Dataset, thorough: bool, sources: Iterator[str] | None) -> tuple:
    """Both splits' SplitStats, Batch.keys of val, and key -> (number, tokens) of training documents with such a key."""
    val, train = (SplitStats(split, dataset, thorough) for split in ("val", "train"))
    keys, seen = [], {}
    for batch in batches(dataset.val_shards, dataset.tokenizer.bos):
        val.add(batch, sources)
        keys += batch.keys()
    known = {key for key in keys if key}
    for batch in batches(dataset.train_shards, dataset.tokenizer.bos):
        train.add(batch)
        for i, key in enumerate(batch.keys()):
            if key in known and key not in seen:
                seen[key] = batch.first + i, batch.rows()[i]
        if not thorough and train.tokens >= FAST_READ:
            break
    return val, train, keys, seen


def _check_shards(dataset: Dataset) -> Results:
    """Opening reads a shard again only if its size or time changed."""
    for path in (*dataset.val_shards, *dataset.train_shards):
        if checksum(path) != dataset.shards[path.name]["sha256"]:
            yield "error", f"{path}: sha256 is not as {DESCRIPTION} lists; download or build it again"


def _check_table(dataset: Dataset) -> Results:
    """Compare every entry with the bytes that its token decodes to behind a letter; name the known miscounts."""
    tokenizer, table = dataset.tokenizer, dataset.byte_table
    count = tokenizer.vocab_size
    columns = table.base_bytes, table.has_leading_space, table.is_boundary
    if any(len(column) != count for column in columns):
        sizes = " and ".join(str(len(column)) for column in columns)
        yield "error", f"the byte table has {sizes} entries, and the tokenizer {count} tokens"
        return
    base, leads, boundary = (column.numpy() for column in columns)
    byte = np.isin(np.arange(count), [byte_token(tokenizer, value) for value in range(256)])
    control = np.array([piece.boundary for piece in tokenizer.pieces])  # <unk> and unused tokens decode to text
    alone = tokenizer.decode([[i] for i in range(count)])
    letter = next(i for i in range(count) if alone[i].isalpha() and not control[i])
    texts = [text.removeprefix(alone[letter]) for text in tokenizer.decode([[letter, i] for i in range(count)])]
    true_boundary = control | np.array([text == "" for text in texts])
    # A byte token >= 0x80 alone decodes to U+FFFD, and the byte token of a space has no leading space.
    true_leads = np.array([text.startswith(" ") for text in texts]) & ~byte & ~true_boundary
    true = np.where(byte, 1, [len(text.encode()) for text in texts]) - true_leads
    true[true_boundary] = 0
    wrong = (base != true) | (leads != true_leads) | (boundary != true_boundary)
    space = true_leads & (true == 0)
    characters = np.array([len(text) for text in texts]) - true_leads
    miscounts = [  # an entry is reported under the first that fits
        (byte & np.isin(base, (3, 6)), "byte tokens are counted as U+FFFD (3 bytes) or as their names (6): each is 1"),
        (space & (base == 0) & ~leads, f"the token {MARK}, a lone space, is counted as 0 bytes: it is 1"),
        (true_leads & leads & (base == true + 1), "leading spaces are counted twice: in the token and as the space"),
        (true_leads & ~leads & (base == true), "leading spaces are not counted"),
        (true_leads & (base == true + 3), f"the mark {MARK} is counted as its own 3 bytes: it is a space, 1"),
        (boundary != true_boundary, "control tokens must be boundaries, text tokens must not"),
        ((base == characters) & (true != characters), "characters are counted, not their UTF-8 bytes"),
        (wrong, "bytes are miscounted"),
    ]
    for fits, miscount in miscounts:
        ids = np.flatnonzero(fits & wrong)
        wrong = wrong & ~fits
        if len(ids):
            shown = [f"{_name(tokenizer, i)} {base[i] + leads[i]} not {true[i] + true_leads[i]}" for i in ids[:4]]
            shown = ", ".join(shown + ["…"] * (len(ids) > 4))
            yield "error", f"{miscount}; {len(ids):,} of {count:,} tokens: {shown}"


def _check_documents(split: SplitStats) -> Results:
    level, name, tokenizer = "error" if split.name == "val" else "warning", split.name, split.tokenizer
    listed = split.dataset.about.get(name, {}).get("documents")
    if name == "train" and (_variant(split.dataset) or not split.thorough):
        listed = None  # a folder may hold any number of published training shards
    if not split.documents:
        yield "error", f"{name}: no BOS (token {tokenizer.bos}) in front of any document"
    elif split.headless:
        yield level, f"{name}: begins without BOS (token {tokenizer.bos}), in the middle of a document"
    if listed not in (None, split.documents):
        yield level, f"{name}: {split.documents:,} documents, and {DESCRIPTION} lists {listed:,}"
    unknown = tokenizer.processor.unk_id() if isinstance(tokenizer, SentencePiece) else SPECIAL["unk_id"]
    for token, (count, document) in sorted(split.inside.items()):
        what = "text that is lost" if token == unknown else "a control token inside a document"
        yield level, f"{name}: {count:,} × {_name(tokenizer, token)}, {what}; the first in document {document:,}"
    if empty := int((split.bytes == 0).sum()):
        yield "note", f"{name}: {empty:,} empty documents"


def _check_tokenizer(val: SplitStats) -> Results:
    if isinstance(tokenizer := val.tokenizer, SentencePiece):
        space = tokenizer.processor.piece_to_id(MARK)
        missing = tokenizer.pieces[space].boundary or tokenizer.processor.id_to_piece(space) != MARK
        if missing or val.spelled_spaces:
            message = (
                f"{'no token' if missing else 'a token'} {MARK} in the tokenizer, and lone spaces spelled by the byte "
                f"tokens E2 96 81, which count 3 bytes instead of 1: {val.spelled_spaces:,} × in val; build tokenizer "
                "and shards again"
            )
            yield "error", message
        values = sum(byte_token(tokenizer, value) is not None for value in range(256))
        if values < 256:
            yield "warning", f"{values} of 256 byte tokens: text outside the vocabulary is lost as <unk>"
    message = f"{val.retokenized:,} of {val.encoded:,} validation documents are not the tokens of their text"
    if 2 * val.retokenized > val.encoded:  # systematic: these tokens spell another text, with other bytes
        yield "error", f"{message}; the shards were made with another tokenizer"
    elif val.retokenized:
        yield "warning", message


def _check_bytes(split: SplitStats, miscounts: list[tuple[str, str]], sources: Iterator[str] | None = None) -> Results:
    """sources: the source texts that are left behind the last document."""
    left = 0 if sources is None else len(list(sources))
    if left or (sources is not None and split.compared < len(split.bytes)):
        yield "error", f"{len(split.bytes):,} validation documents, and {split.compared + left:,} texts were given"
    if split.differing:
        why = "as compared with the source texts, normalised"
        if sources is None:
            why = "control tokens inside" if split.inside else "bytes that are not UTF-8, or a space at the start"
            why = "; ".join(message.partition(";")[0] for _, message in miscounts) or why
        message = (
            f"{split.differing:,} of {split.compared:,} {split.name} documents: the table counts {split.counted:,} "
            f"bytes, and their text has {split.true:,} ({split.counted / max(1, split.true) - 1:+.2%}); the first: "
            f"{split.first_differing}: {why}"
        )
        yield "error", message


def _check_overlap(val: SplitStats, train: SplitStats, hits: list[int], first: tuple) -> Results:
    """first: number and tokens of the training document that is the first hit.

    A small overlap of a published split is a warning: its users cannot change it.
    """
    document, tokens = first
    text = train.tokenizer.decode([tokens.tolist()])[0]
    share = val.bytes[hits].sum() / max(1, val.bytes.sum())
    where = "" if train.tokens == train.available else f"first {train.tokens:,} tokens of the "
    message = (
        f"{len(hits):,} of {len(val.bytes):,} validation documents ({share:.2%} of its bytes) are also in the "
        f"{where}training shards, the first: val document {hits[0]:,} = train document {document:,}: "
        f'"{text[:60]}{"…" * (len(text) > 60)}"'
    )
    kept = _published(val) or (val.dataset.about.get("source") or {}).get("keep_overlap") is True
    yield "warning" if kept and share < KEPT_OVERLAP else "error", message


def _published(val: SplitStats) -> PublishedSplit | None:
    """The published validation split with these sizes."""
    for split in PUBLISHED:
        sizes = val.tokenizer.vocab_size, (val.available - 1) // split.window * split.window
        if sizes == (split.vocab_size, split.scored_tokens) and split.documents in (0, val.documents):
            return split
    return None


def _check_published(val: SplitStats) -> Results:
    known, variant = _published(val), _variant(val.dataset)
    if known and known.remark:
        yield "note", f"{known.remark}: scores on it do not compare with others"
    sizes = [f" and {split.scored_tokens:,} tokens" for split in PUBLISHED if split.name == f"fineweb10B_{variant}"]
    if variant and not known and (sizes or val.documents != PUBLISHED_DOCUMENTS):
        message = (
            f"a part of the published validation split is missing: {val.documents:,} documents and {val.available:,} "
            f"tokens, and fineweb10B_{variant} has {PUBLISHED_DOCUMENTS:,} documents{''.join(sizes)} in whole windows"
        )
        yield "error", message


def _variant(dataset: Dataset) -> str:
    """The published variant that a folder claims to be, such as sp1024; "" if none."""
    source = dataset.about.get("source")
    claimed = source.get("variant", "") if isinstance(source, dict) else ""
    name = claimed or (dataset.directory.name if dataset.directory.name.startswith("fineweb10B_") else "")
    return str(name).removeprefix("fineweb10B_")


def _scored(val: SplitStats, seq_len: int, max_tokens: int, max_documents: int) -> dict:
    """Figures of the text that validation_tokens returns; the fraction is of the split's bytes."""
    ends = np.cumsum(val.lengths)
    end = (min(val.available - 1, max_tokens or val.available) // seq_len * seq_len) + 1
    if max_documents:
        end = int(ends[min(max_documents, len(ends)) - 1])
    whole = int(np.searchsorted(ends, end, "right"))
    rest = TokenStream(val.shards).take(end)[ends[whole - 1] if whole else 0 :]  # part of the last document
    scored = int(val.bytes[:whole].sum()) + (int(val.count(rest).sum()) if len(rest) else 0)
    figures = {"scored_tokens": end - 1, "scored_documents": whole + (len(rest) > 0), "scored_bytes": scored}
    return figures | {"scored_fraction": scored / max(1, int(val.bytes.sum()))}


def _check_scored(val: SplitStats, figures: dict) -> Results:
    seq_len, wanted, documents = figures["seq_len"], figures["max_documents"], len(val.bytes)
    tokens = figures["scored_tokens"]
    part = f"{tokens:,} of {val.available - 1:,} tokens, {figures['scored_documents']:,} of {documents:,} documents"
    if wanted > documents:
        yield "error", f"{wanted:,} documents are to be scored, and there are {documents:,}"
    elif tokens < seq_len:
        yield "error", f"no window of {seq_len} tokens is scored: {part}"
    elif tokens < (val.available - 1) // seq_len * seq_len:
        share = f"{figures['scored_fraction']:.2%}"
        yield "warning", f"{share} of the validation split is scored ({part}): not a number to publish"


def _name(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.processor.id_to_piece(int(token)) if isinstance(tokenizer, SentencePiece) else f"token {token}"


def format_audit(audit: Audit) -> str:
    """Report for a terminal: the checks with their findings, then the figures."""
    levels = [finding.level for finding in audit.findings]
    counts = [f"{levels.count(level)} {level}{'s' * (levels.count(level) > 1)}" for level in dict.fromkeys(levels)]
    kind = "thorough" if audit.thorough else "fast: it reads a part of the training tokens and decodes some documents"
    lines = [f"audit of {audit.figures['folder']} ({kind}): {', '.join(counts) or 'no findings'}", ""]
    for check, passed in CHECKS.items():
        ok = f"ok: {passed}" if check in audit.figures["checked"] else "not checked"
        found = [f"{found.level}: {found.message}" for found in audit.findings if found.check == check]
        lines += [f"  {check:<10} {text}" for text in found or [ok]]
    figures = {f"{split} {name}": value for split in SPLITS for name, value in audit.figures.get(split, {}).items()}
    figures |= {name: value for name, value in audit.figures.items() if name not in ("checked", *SPLITS)}
    lines.append("")
    for name, value in figures.items():
        shown = {int: "{:,}", float: "{:.4%}"}.get(type(value), "{}").format("none" if value == "" else value)
        lines.append(f"  {name.replace('_', ' '):<24}  {shown}")
    return "\n".join(lines)


def store(dataset: Dataset, audit: Audit) -> Path | None:
    """Write a thorough audit beside the shards; None if the folder cannot be written."""
    assert audit.thorough, "store takes a thorough audit"
    content = _key(dataset) | asdict(audit)
    with contextlib.suppress(OSError):
        return atomic_write(dataset.directory / STORED, json.dumps(content, indent=1))


def stored(dataset: Dataset) -> Audit | None:
    """The stored thorough audit of exactly this data, byte table and dataset.json; None without one."""
    content = read_json(dataset.directory / STORED) or {}
    if any(content.get(name) != value for name, value in _key(dataset).items()):
        return None
    return Audit([Finding(**finding) for finding in content["findings"]], content["figures"], content["thorough"])


def _key(dataset: Dataset) -> dict:
    about = hashlib.sha256(json.dumps(dataset.about, sort_keys=True).encode()).hexdigest()
    table = dataset.byte_table
    columns = table.base_bytes.short(), table.has_leading_space, table.is_boundary
    digest = hashlib.sha256(b"".join(column.numpy().tobytes() for column in columns)).hexdigest()
    return {"version": VERSION, "fingerprint": dataset.fingerprint, "about": about, "byte_table": digest}
