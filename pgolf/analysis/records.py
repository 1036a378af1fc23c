"""Import public records as runs: their training logs, and the claims of submission.json about them.

A record is the folder that holds submission.json, at most two levels above the log; without one, the log's folder.
Each log becomes runs/<record>/<log>/: log.txt and submission.json unchanged, config.json, metrics.jsonl, import.json
(everything parsed, flags, disagreements), and result.json if the log has a final score.
"""

import hashlib
import json
import re
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from pgolf.analysis import claims, training_logs
from pgolf.analysis.claims import SUBMISSION
from pgolf.analysis.training_logs import Log, LogError
from pgolf.disk import read_json
from pgolf.runs.directory import folder_name
from pgolf.runs.result import Result, write_result
from pgolf_core.config import digest
from pgolf_core.files import atomic_write

MAX_BYTES = 64 * 2**20  # a larger text file is no training log
NAMED_SEED = re.compile(r"seed[ _-]?(\d{1,9})(?!\d)", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """A parsed log file."""

    given: Path  # path as the user gave it
    record: Path  # folder
    content: bytes
    log: Log


@dataclass(frozen=True)
class Imported:
    run_dir: Path
    status: str  # complete, incomplete
    bpb: float | None
    total_bytes: int | None
    remarks: list[str]  # flags, then disagreements
    again: bool  # imported before, and left unchanged


def import_logs(paths: list[Path], sweep: str | None, root: Path) -> tuple[list[Imported], list[str]]:
    """Import log files, and all logs of folders, into root; returns the runs, and remarks on whole records.

    Everything is read and checked before anything is written. Raises LogError.
    """
    if sweep is not None and folder_name(sweep) != sweep:
        raise LogError(f"--sweep {sweep!r}: cannot be a folder everywhere; use letters, digits, . _ + = -")
    problems: list[str] = []
    sources = {path: source for start in paths for path, source in _find(start, problems).items()}
    records = {
        folder: _logs_of(folder, sources, problems) for folder in dict.fromkeys(s.record for s in sources.values())
    }
    places = _places({path: s for logs in records.values() for path, s in logs.items()} | sources, sweep, root)
    jobs: dict[Path, tuple] = {}
    for path, source in sources.items():
        run_dir, stated = places[path], claims.read_claims(source.record)
        if run_dir in jobs:
            raise LogError(f"{source.given}: another log would be {run_dir} too; rename it, or import it by itself")
        logs = [other.log for other in records[source.record].values()]
        jobs[run_dir] = (source, stated, _was_imported(run_dir, source, stated), logs)
    imported = [_import(run_dir, *job) for run_dir, job in jobs.items()]
    said = [
        remark
        for folder, logs in records.items()
        for remark in claims.of_record(folder, [source.log for source in logs.values()])
    ]
    return imported, [*dict.fromkeys(problems), *said]


def _find(start: Path, problems: list[str]) -> dict[Path, Source]:
    """One log file, or every log in and below a folder, by resolved path."""
    found = logs_below(start, {}, problems) if start.is_dir() else {start.resolve(): _read(start)}
    if not found:
        told = f": {problems[-1]}" if problems else ""
        raise LogError(f"{start}: no training log in this folder or below it (looked at *.log and *.txt){told}")
    if None in found.values():
        raise LogError(f"{start}: not a training log: no step and no score in it, binary, or over {MAX_BYTES:,} bytes")
    return found


def logs_below(folder: Path, known: dict[Path, Source], problems: list[str]) -> dict[Path, Source]:
    """All logs in and below a folder, by resolved path; known: already parsed ones. Unreadable files are problems."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in (".log", ".txt"):
            try:
                found[path.resolve()] = known.get(path.resolve()) or (_read(path) if path.is_file() else None)
            except (LogError, OSError) as error:
                problems.append(str(error))
    return {path: source for path, source in found.items() if source}


def _read(path: Path) -> Source | None:
    """Parse a file; None if it is no training log. Raises LogError if it cannot be read."""
    try:
        if path.exists() and not path.is_file():
            raise LogError(f"{path}: no regular file")
        content = path.read_bytes() if path.stat().st_size <= MAX_BYTES else b"\0"
        above = path.resolve().parents
        record = next((folder for folder in above[:3] if (folder / SUBMISSION).is_file()), above[0])
    except OSError as error:
        raise LogError(f"{path}: cannot be read: {error.strerror}") from None
    text = _decoded(content)
    log = training_logs.read("" if "\0" in text else text)
    if log.seed is None and (named := NAMED_SEED.search(path.stem)):
        log.config["seed"] = int(named[1])
        log.notes.append("the log names no seed; it is that of the file's name")
    return Source(path, record, content, log) if log.rows or log.scores else None


def _decoded(content: bytes) -> str:
    """Text of a log with \\n between lines, without zeros at its end, which a crash of the machine leaves."""
    head, codec = content[:2], "utf-8-sig"
    if head in (b"\xff\xfe", b"\xfe\xff"):  # a Windows console writes it
        codec = "utf-16"
    elif head[1:] == b"\0" and head[:1].isascii():  # without a mark
        codec = "utf-16-le"
    text = content.decode(codec, errors="replace")
    text = text if "\n" in text else text.replace("\r", "\n")
    kept = text.rstrip("\0\r\n")
    return f"{kept}\n" if "\0" in text[len(kept) :] else text


def _logs_of(record: Path, known: dict[Path, Source], problems: list[str]) -> dict[Path, Source]:
    """All logs of a record; of a folder without submission.json, which may hold anything, only the known ones."""
    logs = logs_below(record, known, problems) if (record / SUBMISSION).is_file() else known
    return {path: source for path, source in logs.items() if source.record == record}


def _places(sources: dict[Path, Source], sweep: str | None, root: Path) -> dict[Path, Path]:
    """Run directories by log, named after the log; on a collision, after its path from the record."""
    names: dict[Path, list[str]] = {}
    for path, source in sources.items():
        inside, record = path.relative_to(source.record), source.record.name
        stem = "-".join(inside.with_suffix("").parts)
        forms = [path.stem, stem, f"{record}-{stem}", f"{record}-{'-'.join(inside.parts)}"]
        names[path] = [f"{sweep or folder_name(record)}/{folder_name(form)}" for form in forms]
    taken = [Counter(form.lower() for form in forms) for forms in zip(*names.values(), strict=True)]
    return {
        path: root / next((form for form, n in zip(forms, taken, strict=True) if n[form.lower()] == 1), forms[-1])
        for path, forms in names.items()
    }


def _was_imported(run_dir: Path, source: Source, stated: bytes | None) -> bool:
    """True if this log is in run_dir already. Raises LogError if run_dir holds anything else."""
    if not run_dir.exists() or (run_dir.is_dir() and all(f.suffix == ".tmp" for f in run_dir.iterdir())):
        return False
    facts = read_json(run_dir / "import.json")
    way_out = "import it with another --sweep"
    if facts is None:
        raise LogError(f"{run_dir}: is no import, so {source.given} cannot go there; {way_out}")
    if facts.get("sha256") != hashlib.sha256(source.content).hexdigest():
        raise LogError(f"{run_dir}: another log is there, {facts.get('source')}; {way_out}, or delete it first")
    if not (run_dir / ("result.json" if source.log.final else "config.json")).exists():
        return False  # the import was killed
    if claims.read_claims(run_dir) != stated:
        raise LogError(f"{run_dir}: was imported with another {SUBMISSION}; {way_out}, or delete it first")
    return True


def _import(run_dir: Path, source: Source, stated: bytes | None, again: bool, others: list[Log]) -> Imported:
    """Write import.json first, as it identifies the directory, and result.json last, as in every run."""
    log, submission = source.log, claims.parsed(stated)
    flags, disagreements = claims.compare(log, submission or {}, others)
    flags = log.flags + flags + ([f"{SUBMISSION} is not readable"] if submission is None else [])
    score, before, total = log.final, log.before_quantization, log.artifact.get("total")
    status, bpb = ("complete", score.val_bpb) if score else ("incomplete", None)
    imported = Imported(run_dir, status, bpb, total, flags + disagreements, again)
    if again:
        return imported
    facts = {
        "source": str(source.given), "sha256": hashlib.sha256(source.content).hexdigest(),
        "imported": datetime.now(UTC).isoformat(timespec="seconds"), "metrics": [asdict(s) for s in log.scores],
        "final": score and score.label, "before_quantization": before and before.label,
        "sizes": [{"label": f"{s.what} {s.codec}".strip(), "bytes": s.bytes, "line": s.line} for s in log.sizes],
        "codec": log.artifact.get("codec"), "steps": log.steps, "iterations": log.iterations, "seconds": log.seconds,
        "seed": log.seed, "tokenizer": log.tokenizer, "val_tokens": log.config.get("val_tokens"),
        "flags": flags, "disagreements": disagreements,
    }  # fmt: skip
    atomic_write(run_dir / "import.json", json.dumps(facts, indent=1))
    atomic_write(run_dir / "log.txt", source.content)
    if stated is not None:
        atomic_write(run_dir / SUBMISSION, stated)
    atomic_write(run_dir / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in log.rows))
    atomic_write(run_dir / "config.json", json.dumps(log.config, indent=1))
    if score:
        write_result(run_dir, result(log))
    return imported


def result(log: Log) -> Result:
    """The Result of a log that has a final score; bytes are the log's own statements."""
    score, before, file, config = log.final, log.before_quantization, log.artifact, log.config
    val_bpb, batch = log.validation.get("val_bpb"), config.get("train_batch_tokens")
    timed = (s.seconds for s in log.scores if s.name == score.name and s.seconds is not None)
    return Result(
        kind="import", config_hash=digest(config), seed=log.seed, track="",
        val_loss=log.validation.get("val_loss"), val_bpb=val_bpb, steps=log.steps,
        prequant_val_bpb=before.val_bpb if before else val_bpb,
        roundtrip_val_loss=score.val_loss, roundtrip_val_bpb=score.val_bpb, protocol=log.protocol,
        bytes={part: file[part] for part in ("weights", "code", "total") if part in file},
        total_bytes=file.get("total"), cap_bytes=log.cap, parameters=log.parameters,
        tokens=log.steps * batch if log.steps and isinstance(batch, int) else None, stopped_by=log.stopped_by,
        train_seconds=log.seconds, eval_seconds=next(timed, None), environment=log.environment,
        data_fingerprint=log.data_fingerprint,
    )  # fmt: skip
