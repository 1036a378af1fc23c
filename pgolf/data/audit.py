"""Is a dataset's byte count true, is its validation text unseen and whole? Bits per byte are only as true as these.

Every check is here because scores were published without it: leading spaces counted twice, a byte token counted as
the three bytes of U+FFFD, a space without a piece of its own, validation text in the training shards, a tenth of the
validation split scored.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pgolf.data.dataset import DESCRIPTION, SPLITS, Dataset
from pgolf.data.split_stats import MARK, Survey, batches, byte_token
from pgolf.disk import checksum
from pgolf_core import tokens as tokenizers
from pgolf_core.batches import TokenStream
from pgolf_core.config import ROOT
from pgolf_core.files import DataError, atomic_write
from pgolf_core.shards import read_shard, shard_paths
from pgolf_core.tokens import ByteTable, SentencePiece, Tokenizer

VERSION = 1  # of what is checked: an audit that another version stored counts for nothing
STORED = "audit.json"
CHECKS = {  # in the order of a report
    "shards": "whole files, tokens in the vocabulary",
    "documents": "each begins with BOS, none is missing, nothing inside but text",
    "tokenizer": "no text is lost, a space is one byte",
    "table": "every piece counts the bytes it decodes to",
    "bytes": "every document counts the bytes it decodes to",
    "overlap": "no validation document in the training shards",
    "published": "a published validation split is whole",
    "scored": "all of the validation split is scored",
}
PUBLISHED = [  # name, vocabulary, window, tokens scored in the challenge's logs, documents (0: not known), remark
    ("fineweb10B_sp1024", 1024, 1024, 62_021_632, 50_000, ""),
    ("fineweb10B_sp8192", 8192, 2048, 40_540_160, 50_000, ""),
    ("fineweb10B_sp8192_caseops", 8192, 2048, 47_851_520, 0, "the sp8192 split of the CaseOps records"),
    ("fineweb10B_sp1024_march17", 1024, 1024, 63_779_840, 0, "an earlier published split, of March 17"),
]
PUBLISHED_DOCUMENTS = 50_000  # of every published validation split
KEPT_OVERLAP = 0.01  # of the bytes of a published split: the most that may be in training shards too
FAST_READ = 5_000_000  # training tokens


@dataclass(frozen=True)
class Finding:
    """error: a number from this data would be false. warning: it is not one to publish. note: good to know."""

    level: str
    check: str  # of CHECKS
    message: str


@dataclass(frozen=True)
class Audit:
    """Findings, and figures that JSON can hold; thorough: all of the data was read, not a sample."""

    findings: list[Finding]
    figures: dict
    thorough: bool

    @property
    def ok(self) -> bool:
        return all(finding.level != "error" for finding in self.findings)


def inspect(directory: str | Path, tokenizer_path: str | Path = "", **options: object) -> Audit:
    """audit of a folder, with its options; what keeps it from being opened is an error of every shard concerned."""
    directory = ROOT / directory
    try:
        dataset = Dataset.open(directory, tokenizer_path)
    except DataError as error:
        findings = list(dict.fromkeys(_why_closed(directory, tokenizer_path)))
        figures = {"folder": directory.name, "checked": ["shards"]}
        return Audit(findings or [Finding("error", "shards", str(error))], figures, False)
    return audit(dataset, **options)


def audit(
    dataset: Dataset,
    *,
    byte_table: ByteTable | None = None,
    seq_len: int = 1024,
    max_tokens: int = 0,
    max_documents: int = 0,
    thorough: bool = True,
    documents: Iterable[str] | None = None,
    progress: Callable[[str], object] = lambda _: None,
) -> Audit:
    """All CHECKS of a dataset.

    byte_table: another than its own. seq_len, max_tokens, max_documents: of the score, as validation_tokens takes
    them. documents: the texts that the validation split was made of, in order. progress is told which shard is next.
    Fast reads the validation tokens and FAST_READ training tokens, and decodes a few documents.
    """
    table, tokenizer, about = byte_table or dataset.byte_table, dataset.tokenizer, dataset.about
    figures = {"folder": dataset.directory.name, "checked": ["shards", "table"], "byte_table": _digest(table)}
    paths = dataset.val_shards + (dataset.train_shards if thorough else [])  # opening read the others' tokens
    listed = {shard["name"]: shard for split in SPLITS for shard in dataset.description[split]} if thorough else {}
    findings = [found for path in paths for found in _check_shard(path, tokenizer.vocab_size, listed.get(path.name))]
    mistakes = list(_check_table(tokenizer, table))
    if findings or len(table.base_bytes) != tokenizer.vocab_size:
        return Audit(findings + mistakes, figures, thorough)  # nothing can be counted
    figures["checked"] = list(CHECKS)

    val, train = Survey("val", dataset, table, thorough), Survey("train", dataset, table, thorough)
    keys, texts = [], iter(documents or ())
    for batch in batches(dataset.val_shards, tokenizer.bos, progress):
        keys += batch.keys()
        val.add(batch, texts)
    first = {key: i for i, key in reversed(list(enumerate(keys))) if key}
    met: dict[bytes, tuple[str, np.ndarray]] = {}  # where in the training shards, and the tokens there
    for batch in batches(dataset.train_shards, tokenizer.bos, progress):
        train.add(batch)
        for i, key in enumerate(batch.keys()):
            if key in first and key not in met:
                met[key] = train.place(batch, i), batch.rows()[i]
        if not thorough and train.tokens >= FAST_READ:
            break

    variant = _variant(dataset)
    told = {split: about.get(split, {}).get("documents") for split in SPLITS}
    if variant or not thorough:  # of published training shards any number may be here
        told["train"] = None
    findings += mistakes
    for split in (val, train):
        findings += [*_check_documents(split, told[split.name]), *_check_bytes(split, mistakes)]
    kept = bool(_published(val)[0]) or (about.get("source") or {}).get("keep_overlap") is True
    findings += [*_check_tokenizer(tokenizer, val), *_check_overlap(val, train, keys, first, met, kept)]
    if documents is not None:
        findings += _check_texts(val, len(list(texts)))
    hits = [i for i, key in enumerate(keys) if key in met]
    figures |= {"train": train.figures(), "val": val.figures(), "published": _published(val)[0]}
    figures |= {"overlap_documents": len(hits), "overlap_bytes": int(val.bytes[hits].sum())}
    figures |= {"seq_len": seq_len, "max_tokens": max_tokens, "max_documents": max_documents}
    figures |= _scored(val, seq_len, max_tokens, max_documents)
    findings += [*_check_published(val, variant), *_check_scored(val, figures)]
    return Audit(sorted(findings, key=lambda found: list(CHECKS).index(found.check)), figures, thorough)


# Shards


def _check_shard(path: Path, vocab_size: int, listed: dict | None = None) -> Iterator[Finding]:
    """vocab_size 0: not known. listed: what its checksum was when it was listed."""
    try:
        tokens = read_shard(path)
    except DataError as error:
        yield Finding("error", "shards", str(error))
        return
    if vocab_size and tokens.max() >= vocab_size:
        at = int(np.argmax(tokens >= vocab_size))
        last = f"the tokenizer's last is {vocab_size - 1} (vocab_size={vocab_size})"
        message = f"{path}: token {at:,} is {tokens[at]}, and {last}; shards and tokenizer do not belong together"
        yield Finding("error", "shards", message)
    elif listed and checksum(path) != listed["sha256"]:
        message = f"{path}: not the content that was listed (sha256); download or build it again"
        yield Finding("error", "shards", message)


def _why_closed(directory: Path, tokenizer_path: str | Path) -> Iterator[Finding]:
    paths, listed, vocab_size = [], {}, 0
    names = [directory / name for name in tokenizers.NAMES]
    own = next(filter(Path.exists, names), names[0])
    for split in SPLITS:
        try:
            paths += shard_paths(directory, split)
        except DataError as error:
            yield Finding("error", "shards", str(error))
    try:
        vocab_size = tokenizers.load(ROOT / tokenizer_path if tokenizer_path else own).vocab_size
    except DataError as error:
        yield Finding("error", "shards", str(error))
    try:
        about = json.loads((directory / DESCRIPTION).read_text(encoding="utf-8"))
        listed = {shard["name"]: shard for split in SPLITS for shard in about[split].get("shards", [])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # opening the folder said what is wrong with it
    for path in paths:
        yield from _check_shard(path, vocab_size, listed.get(path.name))
    there = {path.name for path in paths}
    for name in sorted(listed.keys() ^ there) if listed else ():
        what = "lists it, and it is not there" if name in listed else "does not list it; delete it"
        yield Finding("error", "shards", f"{directory / name}: {DESCRIPTION} {what}")


# Checks


def _check_table(tokenizer: Tokenizer, table: ByteTable) -> Iterator[Finding]:
    """Hold every entry to what the token decodes to behind a letter, and tell which known mistake a wrong one is."""
    count = tokenizer.vocab_size
    columns = table.base_bytes, table.has_leading_space, table.is_boundary
    if any(len(column) != count for column in columns):
        sizes = " and ".join(str(len(column)) for column in columns)
        yield Finding("error", "table", f"the byte table has {sizes} entries, and the tokenizer {count} tokens")
        return
    base, leads, boundary = (column.numpy() for column in columns)
    byte = np.isin(np.arange(count), [byte_token(tokenizer, value) for value in range(256)])
    control = np.array([piece.boundary for piece in tokenizer.pieces])  # <unk>, and unused pieces, decode to something
    alone = tokenizer.decode([[i] for i in range(count)])
    letter = next(i for i in range(count) if alone[i].isalpha() and not control[i])
    texts = [text.removeprefix(alone[letter]) for text in tokenizer.decode([[letter, i] for i in range(count)])]
    true_boundary = control | np.array([text == "" for text in texts])
    # A byte >= 0x80 decodes to U+FFFD without the rest of its character, and the byte of a space is a byte too.
    true_leads = np.array([text.startswith(" ") for text in texts]) & ~byte & ~true_boundary
    true = np.where(byte, 1, [len(text.encode()) for text in texts]) - true_leads
    true[true_boundary] = 0
    wrong = (base != true) | (leads != true_leads) | (boundary != true_boundary)
    space = true_leads & (true == 0)
    characters = np.array([len(text) for text in texts]) - true_leads
    mistakes = [  # the first that fits
        (byte & np.isin(base, (3, 6)), "byte tokens are counted as U+FFFD (3 bytes) or as their names (6): each is 1"),
        (space & (base == 0) & ~leads, f"the piece {MARK}, a lone space, is counted as no byte: it is 1"),
        (true_leads & leads & (base == true + 1), "leading spaces are counted twice: in the piece and as the space"),
        (true_leads & ~leads & (base == true), "leading spaces are not counted"),
        (true_leads & (base == true + 3), f"the mark {MARK} is counted as its own 3 bytes: it is a space, 1"),
        (true_boundary & (base > 0), "control tokens are counted, and stand for no text"),
        (true_boundary & ~boundary, "control tokens are no boundaries: the space after them, which is no text, counts"),
        (~true_boundary & boundary, "pieces of text are taken for control tokens: the space after them is not counted"),
        ((base == characters) & (true != characters), "characters are counted, not their UTF-8 bytes"),
        (wrong, "bytes are miscounted"),
    ]
    for fits, mistake in mistakes:
        ids = np.flatnonzero(fits & wrong)
        wrong = wrong & ~fits
        if len(ids):
            shown = [f"{_name(tokenizer, i)} {base[i] + leads[i]} not {true[i] + true_leads[i]}" for i in ids[:4]]
            pieces = ", ".join(shown + ["…"] * (len(ids) > 4))
            yield Finding("error", "table", f"{mistake}; {len(ids):,} of {count:,} pieces: {pieces}")


def _check_documents(split: Survey, told: int | None) -> Iterator[Finding]:
    """told: how many dataset.json says there are, None where it is silent."""
    level, name, bos = "error" if split.name == "val" else "warning", split.name, split.tokenizer.bos
    if not split.documents:
        yield Finding("error", "documents", f"{name}: no BOS (token {bos}) in front of any document")
    elif split.headless:
        yield Finding(level, "documents", f"{name}: begins without BOS (token {bos}), in the middle of a document")
    if told is not None and told != split.documents:
        message = f"{name}: {split.documents:,} documents, and {DESCRIPTION} tells of {told:,}"
        yield Finding(level, "documents", message)
    for token, (count, place) in sorted(split.inside.items()):
        what = "text that is lost" if token == _unknown(split.tokenizer) else "a control token inside a document"
        message = f"{name}: {count:,} × {_name(split.tokenizer, token)}, {what}; the first in {place}"
        yield Finding(level, "documents", message)
    if empty := int((split.bytes == 0).sum()):
        yield Finding("note", "documents", f"{name}: {empty:,} empty documents")


def _check_tokenizer(tokenizer: Tokenizer, val: Survey) -> Iterator[Finding]:
    if isinstance(tokenizer, SentencePiece):
        space = tokenizer.processor.piece_to_id(MARK)
        missing = tokenizer.pieces[space].boundary or tokenizer.processor.id_to_piece(space) != MARK
        if missing or val.spelled:
            excess = 2 * val.spelled
            message = (
                f"{'no piece' if missing else 'a piece'} {MARK} in the tokenizer, and lone spaces spelled by the byte "
                f"tokens E2 96 81, which count 3 bytes instead of 1: {val.spelled:,} × in val, "
                f"{excess / max(1, val.bytes.sum() - excess):+.2%} bytes; make tokenizer and shards anew"
            )
            yield Finding("error", "tokenizer", message)
        values = sum(byte_token(tokenizer, value) is not None for value in range(256))
        if values < 256:
            message = f"{values} of 256 byte tokens: text that no piece spells is lost as <unk>"
            yield Finding("warning", "tokenizer", message)
    for count, what in (
        (val.lossy, "change their text when they are encoded again"),
        (val.recut, "are not the tokens that the tokenizer makes of their text"),
    ):
        other = 2 * count > val.encoded  # no accident: their text is no text, and its bytes are not the true ones
        message = f"{count:,} of {val.encoded:,} validation documents {what}"
        if count:
            message += "; the shards were made with another tokenizer" * other
            yield Finding("error" if other else "warning", "tokenizer", message)


def _check_bytes(split: Survey, mistakes: list[Finding]) -> Iterator[Finding]:
    why = "; ".join(found.message.partition(";")[0] for found in mistakes)
    if not why:
        why = "control tokens inside" if split.inside else "bytes that are no UTF-8, or a space at the beginning"
    for place, table, true in split.differ[:1]:
        excess = split.table_bytes / max(1, split.text_bytes) - 1
        message = (
            f"{len(split.differ):,} of {split.decoded:,} {split.name} documents: the table counts "
            f"{split.table_bytes:,} bytes, and their text has {split.text_bytes:,} ({excess:+.2%}); the first: "
            f"{place}, {table:,} not {true:,}: {why}"
        )
        yield Finding("error", "bytes", message)


def _check_texts(val: Survey, left: int) -> Iterator[Finding]:
    """left: texts beyond the last document."""
    if val.texts + left != len(val.bytes):
        message = f"{len(val.bytes):,} validation documents, and {val.texts + left:,} texts were given"
        yield Finding("error", "bytes", message)
    for place, table, true in val.differ_from_texts[:1]:
        message = (
            f"{len(val.differ_from_texts):,} of {val.texts:,} validation documents have other bytes than their texts, "
            f"normalised; the first: {place}, {table:,} not {true:,}"
        )
        yield Finding("error", "bytes", message)


def _check_overlap(
    val: Survey, train: Survey, keys: list[bytes], first: dict[bytes, int], met: dict, kept: bool
) -> Iterator[Finding]:
    """keys: of the validation documents. first: key -> the first of these. met: key -> place, tokens in training.

    kept: in what others published a few may be in both, and nobody who uses it can change that.
    """
    hits = [i for i, key in enumerate(keys) if key in met]
    if hits:
        place, tokens = met[keys[hits[0]]]
        text = train.tokenizer.decode([tokens.tolist()])[0]
        share = val.bytes[hits].sum() / max(1, val.bytes.sum())
        where = "" if train.tokens == train.available else f"first {train.tokens:,} tokens of the "
        message = (
            f"{len(hits):,} of {len(keys):,} validation documents ({share:.2%} of its bytes) are also in the {where}"
            f"training shards, the first: val document {hits[0]:,} = train {place}: "
            f'"{text[:60]}{"…" * (len(text) > 60)}"'
        )
        few = kept and share < KEPT_OVERLAP
        yield Finding("warning" if few else "error", "overlap", message)
    if repeated := sum(map(bool, keys)) - len(first):
        yield Finding("note", "overlap", f"{repeated:,} validation documents repeat an earlier one")


def _published(val: Survey) -> tuple[str, str]:
    """Name of the published validation split that this is, and what is to be said of it; '' where it is none."""
    for name, vocabulary, window, tokens, documents, remark in PUBLISHED:
        same = val.tokenizer.vocab_size == vocabulary and (val.available - 1) // window * window == tokens
        if same and val.documents == (documents or val.documents):
            return name, remark
    return "", ""


def _check_published(val: Survey, variant: str) -> Iterator[Finding]:
    """variant: what the folder says that it is, such as sp1024; '' where it is not published data."""
    name, remark = _published(val)
    if remark:
        yield Finding("note", "published", f"{remark}: scores on it do not compare with others")
    sizes = [f" and {tokens:,} tokens" for name, *_, tokens, _, _ in PUBLISHED if name == f"fineweb10B_{variant}"]
    if variant and not name and (sizes or val.documents != PUBLISHED_DOCUMENTS):
        message = (
            f"a part of the published validation split is missing: {val.documents:,} documents and {val.available:,} "
            f"tokens, and fineweb10B_{variant} has {PUBLISHED_DOCUMENTS:,} documents{''.join(sizes)} in whole windows"
        )
        yield Finding("error", "published", message)


def _scored(val: Survey, seq_len: int, max_tokens: int, max_documents: int) -> dict:
    """What validation_tokens leaves of a split; the fraction is of its bytes."""
    ends = np.cumsum(val.lengths)
    end = (min(val.available - 1, max_tokens or val.available) // seq_len * seq_len) + 1
    if max_documents:
        end = int(ends[min(max_documents, len(ends)) - 1])
    whole = int(np.searchsorted(ends, end, "right"))
    rest = TokenStream(val.shards).take(end)[ends[whole - 1] if whole else 0 :]  # of a document that is cut
    scored = int(val.bytes[:whole].sum()) + (int(val.count(rest).sum()) if len(rest) else 0)
    return {
        "scored_tokens": end - 1,
        "scored_documents": whole + (len(rest) > 0),
        "scored_bytes": scored,
        "scored_fraction": scored / max(1, int(val.bytes.sum())),
    }


def _check_scored(val: Survey, figures: dict) -> Iterator[Finding]:
    seq_len, wanted, documents = figures["seq_len"], figures["max_documents"], len(val.bytes)
    tokens = figures["scored_tokens"]
    told = f"{tokens:,} of {val.available - 1:,} tokens, {figures['scored_documents']:,} of {documents:,} documents"
    if wanted > documents:
        yield Finding("error", "scored", f"{wanted:,} documents are to be scored, and there are {documents:,}")
    elif tokens < seq_len:
        yield Finding("error", "scored", f"no window of {seq_len} tokens is scored: {told}")
    elif tokens < (val.available - 1) // seq_len * seq_len:
        share = f"{figures['scored_fraction']:.2%}"
        message = f"{share} of the validation split is scored ({told}): not a number to publish"
        yield Finding("warning", "scored", message)


def _variant(dataset: Dataset) -> str:
    """Which published data the folder says that it is, '' for none."""
    source = dataset.about.get("source")
    told = source.get("variant", "") if isinstance(source, dict) else ""
    name = told or (dataset.directory.name if dataset.directory.name.startswith("fineweb10B_") else "")
    return str(name).removeprefix("fineweb10B_")


def _unknown(tokenizer: Tokenizer) -> int:
    return tokenizer.processor.unk_id() if isinstance(tokenizer, SentencePiece) else tokenizers.SPECIAL["unk_id"]


def _name(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.processor.id_to_piece(int(token)) if isinstance(tokenizer, SentencePiece) else f"token {token}"


def _digest(table: ByteTable) -> str:
    columns = table.base_bytes.short(), table.has_leading_space, table.is_boundary
    return hashlib.sha256(b"".join(column.numpy().tobytes() for column in columns)).hexdigest()


# Reports


def words(audit: Audit) -> str:
    """A report for a terminal: the checks, their findings, the figures."""
    levels = [finding.level for finding in audit.findings]
    counts = ", ".join(
        f"{levels.count(level)} {level}{'s' * (levels.count(level) > 1)}"
        for level in ("error", "warning", "note")
        if level in levels
    )
    kind = "thorough" if audit.thorough else "fast"
    lines = [f"audit of {audit.figures['folder']} ({kind}): {counts or 'nothing to find fault with'}", ""]
    train, val = audit.figures.get("train", {}), audit.figures.get("val", {})
    partial = {}  # what a fast audit has not looked at is not ok
    if train and train["tokens_read"] < train["tokens"]:
        partial["overlap"] = f" (of {train['tokens']:,} training tokens the first {train['tokens_read']:,} were read)"
    if val and val["decoded_documents"] < val["documents"]:
        partial["bytes"] = f" (of {val['documents']:,} in val {val['decoded_documents']:,} were decoded)"
    for check, question in CHECKS.items():
        found = [finding for finding in audit.findings if finding.check == check]
        said = [f"{finding.level}: {finding.message}" for finding in found]
        if check not in audit.figures["checked"]:
            said = said or ["not checked"]
        for text in said or [f"ok: {question}{partial.get(check, '')}"]:
            lines += textwrap.wrap(
                f"  {check:<10} {text}",
                110,
                subsequent_indent=" " * 13,
                break_long_words=False,
                break_on_hyphens=False,
            )
    figures = {f"{split} {name}": value for split in SPLITS for name, value in audit.figures.get(split, {}).items()}
    figures |= {name: value for name, value in audit.figures.items() if name not in ("checked", "byte_table", *SPLITS)}
    width = max(map(len, figures))
    lines.append("")
    for name, value in figures.items():
        shown = {int: "{:,}", float: "{:.4%}"}.get(type(value), "{}").format("none" if value == "" else value)
        lines.append(f"  {name.replace('_', ' '):<{width}}  {shown}")
    return "\n".join(lines)


def store(dataset: Dataset, audit: Audit) -> Path | None:
    """Keep a thorough audit beside the shards, for `stored`; a folder that may not be written keeps none."""
    assert audit.thorough, "a fast audit costs less than it is worth keeping"
    content = _key(dataset) | {"byte_table": audit.figures["byte_table"]} | dataclasses.asdict(audit)
    with contextlib.suppress(OSError):
        return atomic_write(dataset.directory / STORED, json.dumps(content, indent=1))


def stored(dataset: Dataset) -> Audit | None:
    """The thorough audit of just this data, byte table and dataset.json, where there is one."""
    try:
        content = json.loads((dataset.directory / STORED).read_text(encoding="utf-8"))
        if any(content[name] != value for name, value in _key(dataset).items()):
            return None
        return Audit([Finding(**finding) for finding in content["findings"]], content["figures"], content["thorough"])
    except (OSError, ValueError, KeyError, TypeError):  # no audit that counts: it can be made again
        return None


def _key(dataset: Dataset) -> dict:
    about = hashlib.sha256(json.dumps(dataset.about, sort_keys=True).encode()).hexdigest()
    table = _digest(dataset.byte_table)
    return {"version": VERSION, "fingerprint": dataset.fingerprint, "about": about, "byte_table": table}
