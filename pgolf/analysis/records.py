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
from decimal import Decimal
from pathlib import Path

from pgolf.analysis import training_logs
from pgolf.analysis.training_logs import Log, LogError
from pgolf.disk import read_json
from pgolf.runs.directory import folder_name
from pgolf.runs.result import Result, write_result
from pgolf_core.config import digest
from pgolf_core.files import atomic_write

SUBMISSION = "submission.json"
MAX_BYTES = 64 * 2**20  # a larger text file is no training log
SCORES = ("val_loss", "val_bpb")


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
    sources = {path: source for start in paths for path, source in _find(start).items()}
    records = {folder: _logs_of(folder, sources) for folder in dict.fromkeys(s.record for s in sources.values())}
    places = _places({path: s for logs in records.values() for path, s in logs.items()} | sources, sweep, root)
    jobs: dict[Path, tuple] = {}
    for path, source in sources.items():
        run_dir, claims = places[path], _submission(source.record)
        if run_dir in jobs:
            raise LogError(f"{source.given}: another log would be {run_dir} too; rename it, or import it by itself")
        jobs[run_dir] = (source, claims, _was_imported(run_dir, source, claims), len(records[source.record]) > 1)
    imported = [_import(run_dir, *job) for run_dir, job in jobs.items()]
    return imported, [remark for folder, logs in records.items() for remark in _missing_seeds(folder, logs)]


def _find(start: Path) -> dict[Path, Source]:
    """One log file, or every log in and below a folder, by resolved path."""
    found = _logs_below(start) if start.is_dir() else {start.resolve(): _read(start)}
    if not found:
        raise LogError(f"{start}: no training log in this folder or below it (looked at *.log and *.txt)")
    if None in found.values():
        raise LogError(f"{start}: not a training log: no step and no score in it, binary, or over {MAX_BYTES:,} bytes")
    return found


def _logs_below(folder: Path, known: dict[Path, Source] | None = None) -> dict[Path, Source]:
    files = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in (".log", ".txt") and path.is_file()]
    found = {path.resolve(): (known or {}).get(path.resolve()) or _read(path) for path in files}
    return {path: source for path, source in found.items() if source}


def _read(path: Path) -> Source | None:
    """Parse a file; None if it is no training log. Raises LogError if it cannot be read."""
    try:
        content = path.read_bytes() if path.stat().st_size <= MAX_BYTES else b"\0"
    except OSError as error:
        raise LogError(f"{path}: cannot be read: {error.strerror}") from None
    text = _decoded(content)
    log = training_logs.read("" if "\0" in text else text)
    above = path.resolve().parents
    record = next((folder for folder in above[:3] if (folder / SUBMISSION).is_file()), above[0])
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


def _logs_of(record: Path, known: dict[Path, Source]) -> dict[Path, Source]:
    """All logs of a record; of a folder without submission.json, which may hold anything, only the known ones."""
    logs = _logs_below(record, known) if (record / SUBMISSION).is_file() else known
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


def _submission(record: Path) -> bytes | None:
    path = record / SUBMISSION
    return path.read_bytes() if path.is_file() else None


def _parsed(claims: bytes | None) -> dict | None:
    """The mapping, with floats as Decimal so that their digits are known; None if it is no mapping."""
    try:
        content = json.loads((claims or b"{}").decode("utf-8-sig"), parse_float=Decimal)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def _claims_by_seed(submission: dict) -> tuple[list[str], dict[str, dict]]:
    """The seeds that it lists, and its claims about each."""
    results, seeds = submission.get("seed_results"), submission.get("seeds")
    if isinstance(results, list):
        results = {entry.get("seed"): entry for entry in results if isinstance(entry, dict)}
    if isinstance(seeds, dict):  # the figures of each
        results, seeds = seeds, list(seeds)
    results = results if isinstance(results, dict) else {}
    claims = {str(seed): own if isinstance(own, dict) else {"val_bpb": own} for seed, own in results.items()}
    return [str(seed) for seed in seeds] if isinstance(seeds, list) else list(claims), claims


def compare(log: Log, submission: dict, several: bool) -> tuple[list[str], list[str]]:
    """Flags, and disagreements of submission.json with this log, to the digits that both give.

    Its top-level figures count only if the record has one seed; with several they are means, or another seed's.
    """
    seed = str(log.config.get("seed", "?"))
    seeds, by_seed = _claims_by_seed(submission)
    words = " ".join(value for value in submission.values() if isinstance(value, str))
    means = any(name.endswith("_std") for name in submission) or re.search(r"\b\d+[- ]seed", words)
    claims = {f"seed_results {seed} {name}": v for name, v in by_seed.get(seed, {}).items()}
    if not several and not means and (not seeds or seeds == [seed]):
        claims |= submission
    score, before, file = log.final, log.before_quantization, log.artifact
    total, steps = file.get("total"), log.steps
    logged = {"artifact_bytes": total, "bytes_total": total, "steps": steps, "step_stop": steps}
    flags, found = [], []
    for name, claim in claims.items():
        if isinstance(claim, bool) or not isinstance(claim, int | Decimal):
            continue
        kind, said = name.split()[-1], f"{name} {claim} in {SUBMISSION}"
        if kind in SCORES:
            prequant = getattr(before, kind) if before else log.validation.get(kind)
            is_prequant = prequant is not None and _agree(claim, prequant, before.digits if before else 4)
            if not score and is_prequant:
                flags.append(f"{said} is the score before quantisation")
            elif not score:
                found.append(f"{said}, no score after quantisation in the log")
            elif not _agree(claim, getattr(score, kind), score.digits):
                why = ": it is the score before quantisation" if is_prequant else ""
                found.append(f"{said}, {getattr(score, kind)} in the log{why}")
        elif logged.get(kind) is not None and not _agree(claim, logged[kind], 0):
            why = ": it is the file without its code" if claim == file.get("weights") else ""
            found.append(f"{said}, {logged[kind]} in the log{why}")
    codes = [size.bytes for size in log.sizes if size.what == "Code size"]
    if codes and isinstance(code := submission.get("bytes_code"), int) and code not in codes:
        found.append(f"bytes_code {code} in {SUBMISSION}, {codes[-1]} in the log")
    if seeds and seed != "?" and seed not in seeds:
        found.append(f"seed {seed} is not among those of {SUBMISSION}: {', '.join(seeds)}")
    return flags, found


def _agree(claim: int | Decimal, logged: float, digits: int) -> bool:
    """True if both are equal when rounded to the digits that both have."""
    given = max(0, -claim.as_tuple().exponent) if isinstance(claim, Decimal) else 0
    return abs(claim - Decimal(str(logged))) <= Decimal(5).scaleb(-min(given, digits) - 1)


def _missing_seeds(record: Path, logs: dict[Path, Source]) -> list[str]:
    """A remark on the seeds that submission.json lists and the record has no log of."""
    logged = {str(source.log.config.get("seed")) for source in logs.values()}
    missing = [seed for seed in _claims_by_seed(_parsed(_submission(record)) or {})[0] if seed not in logged]
    return [f"{record.name}: no log of seed {', '.join(missing)}, which {SUBMISSION} lists"] if missing else []


def _was_imported(run_dir: Path, source: Source, claims: bytes | None) -> bool:
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
    if _submission(run_dir) != claims:
        raise LogError(f"{run_dir}: was imported with another {SUBMISSION}; {way_out}, or delete it first")
    return True


def _import(run_dir: Path, source: Source, claims: bytes | None, again: bool, several: bool) -> Imported:
    """Write import.json first, as it identifies the directory, and result.json last, as in every run."""
    log, submission = source.log, _parsed(claims)
    flags, disagreements = compare(log, submission or {}, several)
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
        "seed": log.config.get("seed"), "tokenizer": log.tokenizer, "val_tokens": log.config.get("val_tokens"),
        "flags": flags, "disagreements": disagreements,
    }  # fmt: skip
    atomic_write(run_dir / "import.json", json.dumps(facts, indent=1))
    atomic_write(run_dir / "log.txt", source.content)
    if claims is not None:
        atomic_write(run_dir / SUBMISSION, claims)
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
        kind="import", config_hash=digest(config), seed=config.get("seed"), track="",
        val_loss=log.validation.get("val_loss"), val_bpb=val_bpb, steps=log.steps,
        prequant_val_bpb=before.val_bpb if before else val_bpb,
        roundtrip_val_loss=score.val_loss, roundtrip_val_bpb=score.val_bpb, protocol=log.protocol,
        bytes={part: file[part] for part in ("weights", "code", "total") if part in file},
        total_bytes=file.get("total"), cap_bytes=log.cap, parameters=config.get("model_params", config.get("params")),
        tokens=log.steps * batch if log.steps and isinstance(batch, int) else None, stopped_by=log.stopped_by,
        train_seconds=log.seconds, eval_seconds=next(timed, None), environment=log.environment,
        data_fingerprint=log.data_fingerprint,
    )  # fmt: skip
