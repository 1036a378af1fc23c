"""Audit of a dataset: whether its byte counts are true, and its validation text unseen in training and complete.

Bits per byte are only as true as these. Scores were published without each of the checks: leading spaces counted
twice, a byte token counted as the three bytes of U+FFFD, a lone space without a token of its own, validation text in
the training shards, a tenth of the validation split scored.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from pgolf.data.dataset import DESCRIPTION, SPLITS, Dataset
from pgolf.data.split_stats import MARK, SplitStats, batches, byte_token
from pgolf.data.tokenizers import SentencePiece, Tokenizer
from pgolf.disk import checksum, read_json
from pgolf_core.files import DataError, atomic_write

VERSION = 2  # version of the checks; an audit.json of another version is ignored
STORED = "audit.json"
CHECKS = {  # in the order of a report
    "shards": "whole files, tokens in the vocabulary",
    "documents": "each begins with BOS, none is missing, nothing inside but text",
    "tokenizer": "no text is lost, a space is one byte",
    "table": "every token counts the bytes it decodes to",
    "bytes": "every document counts the bytes it decodes to",
    "marks": "no characters that altered text has and original text has not",
    "size": "enough validation documents, none of which decides the score",
    "overlap": "no validation document in the training shards",
    "published": "a published validation split is whole",
    "scored": "all of the validation split is scored",
}
KEPT_OVERLAP = 0.01  # largest tolerated overlap of a published split, as a share of its validation bytes
SEEN_MARKS, FALSE_MARKS = 0.0001, 0.001  # shares of bytes: crawled text has fewer, scores are false
SIDECAR_TOLERANCE = 0.001  # a letter and its capital may differ in bytes
THIN = 20  # validation documents of one size that are as telling as those there are
FAST_READ = 5_000_000  # training tokens read by a fast audit
PUBLISHED = {  # validation split -> vocab_size, window, tokens in whole windows, as printed in the challenge's logs
    "fineweb10B_sp1024": (1024, 1024, 62_021_632),
    "fineweb10B_sp8192": (8192, 2048, 40_540_160),
    "fineweb10B_sp8192_caseops": (8192, 2048, 47_851_520),
    "fineweb10B_sp1024_march17": (1024, 1024, 63_779_840),
}
NOT_COMPARABLE = ("fineweb10B_sp8192_caseops", "fineweb10B_sp1024_march17")  # altered text, and an earlier split
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
    results = {"shards": list(_check_shards(dataset)) if thorough else []}
    figures = {"folder": dataset.directory.name}
    if not results["shards"]:  # else nothing can be counted
        val, train, hits, first = _read_splits(dataset, thorough, documents)
        limits = {"seq_len": seq_len, "max_tokens": max_tokens, "max_documents": max_documents}
        scored, partly = _scored(val, **limits)
        figures |= {"published": _published(val), "train": train.figures(), "val": val.figures()}
        figures |= {"overlap_documents": len(hits), "overlap_bytes": sum(val.bytes[i] for i in hits)}
        figures |= limits | scored
        results |= {
            "documents": [*_check_documents(val), *_check_documents(train)],
            "tokenizer": _check_tokenizer(val),
            "table": _check_table(dataset),
            "bytes": [*_check_bytes(val), *_check_bytes(train)],
            "marks": _check_marks(val),
            "size": _check_size(val),
            "overlap": _check_overlap(val, train, hits, *first) if hits else (),
            "published": _check_published(val),
            "scored": partly,
        }
    findings = [Finding(level, check, message) for check, found in results.items() for level, message in found]
    return Audit(findings, figures | {"checked": list(results)}, thorough)


def _read_splits(dataset: Dataset, thorough: bool, documents: Iterable[str] | None) -> tuple:
    """Both splits' SplitStats, validation documents that are in training, number and tokens of the first one there."""
    val, train = SplitStats("val", dataset, thorough, documents), SplitStats("train", dataset, thorough)
    keys, seen = [], {}
    for batch in batches(dataset.val_shards, dataset.tokenizer.bos):
        val.add(batch)
        keys += batch.keys()
    known = {key for key in keys if key}
    for batch in batches(dataset.train_shards, dataset.tokenizer.bos):
        train.add(batch)
        for i, key in enumerate(batch.keys()):
            if key in known and key not in seen:
                seen[key] = batch.first + i, batch.rows()[i]
        if not thorough and train.tokens >= FAST_READ:
            break
    hits = [i for i, key in enumerate(keys) if key in seen]
    return val, train, hits, seen[keys[hits[0]]] if hits else None


def _check_shards(dataset: Dataset) -> Results:
    """Opening reads a shard again only if its size or time changed."""
    for path in (*dataset.val_shards, *dataset.train_shards):
        if checksum(path) != dataset.shards[path.name]["sha256"]:
            yield "error", f"{path}: sha256 is not as {DESCRIPTION} lists; download or build it again"


def _check_table(dataset: Dataset) -> Results:
    """Compare every entry with the bytes that its token decodes to behind a letter; name the known miscounts."""
    tokenizer, table = dataset.tokenizer, dataset.byte_table
    count = tokenizer.vocab_size
    base, leads, boundary = (c.numpy() for c in (table.base_bytes, table.has_leading_space, table.is_boundary))
    byte = np.isin(np.arange(count), [byte_token(tokenizer, value) for value in range(256)])
    control = np.array([piece.boundary for piece in tokenizer.pieces])  # <unk> and unused tokens decode to text
    alone = tokenizer.spell([[i] for i in range(count)])
    letter = next((i for i in range(count) if alone[i].isalpha() and not control[i]), None)
    if letter is None:
        yield "error", "no token of the tokenizer is a letter"
        return
    texts = [text.removeprefix(alone[letter]) for text in tokenizer.spell([[letter, i] for i in range(count)])]
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
    listed = split.dataset.about.get(name, {}).get("documents") if name == "val" or split.thorough else None
    if not split.documents:
        yield "error", f"{name}: no BOS (token {tokenizer.bos}) in front of any document"
    elif split.headless:
        yield level, f"{name}: begins without BOS (token {tokenizer.bos}), in the middle of a document"
    if listed not in (None, split.documents):
        yield level, f"{name}: {split.documents:,} documents, and {DESCRIPTION} lists {listed:,}"
    for token, (count, document) in sorted(split.inside.items()):
        piece = _name(tokenizer, token)
        what = "text that is lost" if piece == "<unk>" else "a control token inside a document"
        yield level, f"{name}: {count:,} × {piece}, {what}; the first in document {document:,}"
    if empty := split.bytes.count(0):
        yield "note", f"{name}: {empty:,} empty documents"


def _check_tokenizer(val: SplitStats) -> Results:
    if isinstance(tokenizer := val.tokenizer, SentencePiece):
        space = tokenizer.processor.piece_to_id(MARK)
        if tokenizer.pieces[space].boundary or tokenizer.processor.id_to_piece(space) != MARK:
            message = f"no token {MARK} in the tokenizer: lone spaces are spelled by the byte tokens E2 96 81"
            yield "error", f"{message}, which count 3 bytes instead of 1; build tokenizer and shards again"
        values = sum(byte_token(tokenizer, value) is not None for value in range(256))
        if values < 256:
            yield "warning", f"{values} of 256 byte tokens: text outside the vocabulary is lost as <unk>"
    message = f"{val.retokenized:,} of {val.encoded:,} validation documents are not the tokens of their text"
    if 2 * val.retokenized > val.encoded:  # systematic: these tokens spell another text, with other bytes
        yield "error", f"{message}; the shards were made with another tokenizer"
    elif val.retokenized:
        yield "warning", message


def _check_bytes(split: SplitStats) -> Results:
    given = 0 if split.sources is None else split.compared + len(list(split.sources))
    if split.sources is not None and given != len(split.bytes):
        yield "error", f"{len(split.bytes):,} validation documents, and {given:,} texts were given"
    by = "table" if split.sidecar is None else "byte sidecar"
    if split.sidecar is not None:
        change = sum(split.bytes) / max(1, split.by_table) - 1
        yield "note", f"val: counted by the byte sidecar, {sum(split.bytes):,} bytes, {change:+.2%} against the table"
    if split.differing:
        message = (
            f"{split.differing:,} of {split.compared:,} {split.name} documents: the {by} counts {split.counted:,} "
            f"bytes, and their {'text' if split.sources is None else 'source text, normalised,'} has {split.true:,} "
            f"({split.counted / max(1, split.true) - 1:+.2%}); the first: {split.first_differing}; without another "
            "finding the cause is bytes that are not UTF-8, or a space at the start"
        )
        if split.added:
            message += f"; the source has not: {_characters(split.added)}"
        close = split.deviation <= SIDECAR_TOLERANCE * split.true
        yield "warning" if split.sidecar is not None and split.sources is None and close else "error", message


def _characters(counts: Counter[str]) -> str:
    shown = [f"U+{ord(character):04X} × {count:,}" for character, count in counts.most_common(4)]
    return ", ".join(shown + ["…"] * (len(counts) > 4))


def _check_marks(val: SplitStats) -> Results:
    """Marks are counted as text, 3 bytes each for U+E000 to U+F8FF, unless a byte sidecar counts."""
    size = sum(len(character.encode()) * count for character, count in val.foreign.items())
    if not size:
        return
    share = size / max(1, val.decoded_bytes)
    message = f"val: private-use marks or control characters, {_characters(val.foreign)}"
    if val.sidecar is not None:
        yield "note", f"{message}: the byte sidecar counts the original text without them"
        return
    if val.sources is not None and not val.foreign.keys() & val.added.keys():
        yield "note", f"{message}: the source text has them too"
        return
    message += f": {size:,} of {val.decoded_bytes:,} bytes; if they are not in the original text, bits per byte come "
    message += f"out {share:.2%} too low; put a byte sidecar of the original text, fineweb_val_bytes_*.bin, beside them"
    yield "error" if share >= FALSE_MARKS else "warning" if share >= SEEN_MARKS else "note", message


def _check_size(val: SplitStats) -> Results:
    sizes = np.array(val.bytes, dtype=float)
    if sizes.sum() ** 2 < THIN * (sizes**2).sum():
        message = f"the validation split is thin: {len(sizes):,} documents, the largest {sizes.max() / sizes.sum():.0%}"
        yield "warning", f"{message} of its bytes; a score on it says little about other text"


def _check_overlap(val: SplitStats, train: SplitStats, hits: list[int], document: int, tokens: np.ndarray) -> Results:
    """document, tokens: the training document that is the first hit.

    A small overlap of a published split is a warning: its users cannot change it.
    """
    text = train.tokenizer.decode([tokens.tolist()])[0]
    share = sum(val.bytes[i] for i in hits) / max(1, sum(val.bytes))
    message = (
        f"{len(hits):,} of {len(val.bytes):,} validation documents ({share:.2%} of its bytes) are also in the "
        f"training shards, the first: val document {hits[0]:,} = train document {document:,}: “{text[:60]} …”"
    )
    kept = _published(val) or val.dataset.about.get("source", {}).get("keep_overlap")
    yield "warning" if kept and share < KEPT_OVERLAP else "error", message


def _published(val: SplitStats) -> str:
    """Name of the published validation split with these sizes; "" if none."""
    for name, (vocab_size, window, tokens) in PUBLISHED.items():
        if (vocab_size, tokens) == (val.tokenizer.vocab_size, (val.available - 1) // window * window):
            return name
    return ""


def _check_published(val: SplitStats) -> Results:
    known, source = _published(val), val.dataset.about.get("source", {})
    if known in NOT_COMPARABLE:
        yield "note", f"the validation split of {known}: scores on it do not compare with others"
    claimed = f"fineweb10B_{source['variant']}" if "variant" in source else val.dataset.directory.name
    if claimed in PUBLISHED and not known:
        message = f"a part of the published validation split is missing: {val.available:,} tokens, and {claimed} has"
        yield "error", f"{message} {PUBLISHED[claimed][2]:,} in whole windows"


def _scored(val: SplitStats, seq_len: int, max_tokens: int, max_documents: int) -> tuple[dict, list[tuple[str, str]]]:
    """Figures of the text that an evaluation scores, and what is to be said of it; the fraction is of val's bytes."""
    try:
        tokens = val.dataset.validation(seq_len, max_tokens, max_documents).numpy()
    except DataError as error:
        return {}, [("error", str(error))]
    scored, documents = len(tokens) - 1, int(np.count_nonzero(tokens == val.tokenizer.bos))
    size = val.dataset.byte_table.count(torch.from_numpy(tokens))
    figures = {"scored_tokens": scored, "scored_documents": documents, "scored_bytes": size}
    figures["scored_fraction"] = fraction = size / max(1, sum(val.bytes))
    if scored >= (val.available - 1) // seq_len * seq_len:
        return figures, []
    part = f"{scored:,} of {val.available - 1:,} tokens, {documents:,} of {len(val.bytes):,} documents"
    return figures, [("warning", f"{fraction:.2%} of the validation split is scored ({part}): not a number to publish")]


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


def store(dataset: Dataset, audit: Audit) -> None:
    """Write a thorough audit beside the shards, unless the folder is write-protected."""
    with contextlib.suppress(OSError):
        atomic_write(dataset.directory / STORED, json.dumps(_key(dataset) | asdict(audit), indent=1))


def stored(dataset: Dataset) -> Audit | None:
    """The stored thorough audit of exactly this data and dataset.json; None without one."""
    content = read_json(dataset.directory / STORED) or {}
    if not _key(dataset).items() <= content.items():
        return None
    try:
        return Audit([Finding(**finding) for finding in content["findings"]], content["figures"], thorough=True)
    except (KeyError, TypeError):
        return None


def _key(dataset: Dataset) -> dict:
    about = hashlib.sha256(json.dumps(dataset.about, sort_keys=True).encode()).hexdigest()
    return {"version": VERSION, "fingerprint": dataset.fingerprint, "about": about}
