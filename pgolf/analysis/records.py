"""Records as runs: training logs, and the submission.json that makes claims about them.

A record is the folder that holds submission.json, at most two above the log, else the log's own. Its logs become
runs/<record>/<log>/: log.txt and submission.json as they were, config.json, metrics.jsonl, import.json with all that
was read and said about it, and result.json if the log has a final score.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

from pgolf.analysis import training_logs
from pgolf.analysis.training_logs import Log, LogError
from pgolf.disk import read_json
from pgolf.runs.result import Result, write_result
from pgolf_core.config import digest
from pgolf_core.files import atomic_write

SUBMISSION = "submission.json"
LARGEST = 64 * 2**20  # bytes of a log; a text file beyond that is something else
SCORES = ("val_loss", "val_bpb")


@dataclass(frozen=True)
class Source:
    """A log file that was read."""

    given: Path  # as the user named it
    home: Path  # the record's folder
    content: bytes
    log: Log

    @property
    def seed(self) -> str:
        return str(self.log.config.get("seed", "?"))


@dataclass(frozen=True)
class Imported:
    run_dir: Path
    status: str  # complete, incomplete
    bpb: float | None
    total_bytes: int | None
    remarks: list[str]  # flags, then disagreements
    again: bool  # it was there, and was left


def import_logs(paths: list[Path], sweep: str | None, root: Path) -> tuple[list[Imported], list[str]]:
    """Import log files, and all logs of folders, into root; the runs, and what to say of whole records.

    Everything is read and every place looked at before anything is written. Raises LogError.
    """
    if sweep is not None and _folder_name(sweep) != sweep:
        raise LogError(f"--sweep {sweep!r}: cannot be a folder everywhere; use letters, digits, . _ + = -")
    sources = {path: source for start in paths for path, source in _find(start).items()}
    neighbours = {home: _logs_of(home, sources) for home in dict.fromkeys(s.home for s in sources.values())}
    places = _places({path: s for logs in neighbours.values() for path, s in logs.items()} | sources, sweep, root)
    jobs = []
    for path, source in sources.items():
        run_dir = places[path]
        if run_dir in [place for place, *_ in jobs]:
            raise LogError(f"{source.given}: another log would be {run_dir} too; rename it, or import it by itself")
        claims = _submission(source.home)
        jobs.append((run_dir, source, claims, _is_there(run_dir, source, claims)))
    several = {home: len(logs) > 1 for home, logs in neighbours.items()}
    imported = [_import(*job, several[job[1].home]) for job in jobs]
    return imported, [said for home, logs in neighbours.items() for said in _missing_seeds(home, logs)]


# Finding and naming.


def _find(start: Path) -> dict[Path, Source]:
    """A file, or every log in a folder and below it; by resolved path."""
    if not start.is_dir():
        return {start.resolve(): _read(start)}
    found = _logs_below(start)
    if not found:
        raise LogError(f"{start}: no training log in this folder or below it (looked at *.log and *.txt)")
    return found


def _logs_below(folder: Path, known: dict[Path, Source] | None = None) -> dict[Path, Source]:
    files = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in (".log", ".txt") and path.is_file()]
    found = {path.resolve(): (known or {}).get(path.resolve()) or _read(path, must=False) for path in files}
    return {path: source for path, source in found.items() if source}


def _read(path: Path, must: bool = True) -> Source | None:
    """None, or LogError where it must be one, when the file is no training log."""
    try:
        content = path.read_bytes() if path.stat().st_size <= LARGEST else b"\0"
    except OSError as error:
        raise LogError(f"{path}: cannot be read: {error.strerror}") from None
    utf16 = content[:2] in (b"\xff\xfe", b"\xfe\xff")  # of a Windows console
    text = content.decode("utf-16" if utf16 else "utf-8-sig", errors="replace")
    log = None if "\0" in text else training_logs.read(text)
    if log and (log.rows or log.scores):
        return Source(path, _home(path.resolve()), content, log)
    if not must:
        return None
    why = "no step and no score in it" if log else f"binary, or more than {LARGEST:,} bytes"
    raise LogError(f"{path}: not a training log: {why}")


def _home(path: Path) -> Path:
    return next((folder for folder in path.parents[:3] if (folder / SUBMISSION).is_file()), path.parent)


def _logs_of(home: Path, known: dict[Path, Source]) -> dict[Path, Source]:
    """All logs of a record. A folder without submission.json may hold anything: there, those asked for are all."""
    logs = _logs_below(home, known) if (home / SUBMISSION).is_file() else known
    return {path: source for path, source in logs.items() if source.home == home}


def _places(sources: dict[Path, Source], sweep: str | None, root: Path) -> dict[Path, Path]:
    """Run directories: named after the log; where two of a sweep share a name, after their way from the record."""
    names: dict[Path, list[str]] = {}
    for path, source in sources.items():
        way = path.relative_to(source.home)
        stem = "-".join(way.with_suffix("").parts)
        forms = [path.stem, stem, f"{source.home.name}-{stem}", f"{source.home.name}-{'-'.join(way.parts)}"]
        folder = sweep or _folder_name(source.home.name)
        names[path] = [f"{folder}/{_folder_name(form)}" for form in forms]
    taken = [[forms[i].lower() for forms in names.values()] for i in range(4)]
    return {
        path: root / next((form for i, form in enumerate(forms) if taken[i].count(form.lower()) == 1), forms[-1])
        for path, forms in names.items()
    }


def _folder_name(name: str) -> str:
    """The nearest name that can be a folder everywhere, as sweep files want it."""
    name = re.sub(r"[^A-Za-z0-9_.+=-]+", "-", name).lstrip(".+=-")[:100].rstrip(".") or "log"
    return f"_{name}"[:100] if re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", name.lower()) else name


# What submission.json claims.


def _submission(home: Path) -> bytes | None:
    path = home / SUBMISSION
    return path.read_bytes() if path.is_file() else None


def _parsed(claims: bytes | None) -> dict | None:
    """Figures with the digits they are given in; None where it is no mapping."""
    try:
        content = json.loads((claims or b"{}").decode("utf-8-sig"), parse_float=Decimal)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def _seed_results(submission: dict) -> dict[str, dict]:
    results = submission.get("seed_results") or {}
    if isinstance(results, list):
        results = {str(entry.get("seed")): entry for entry in results if isinstance(entry, dict)}
    if not isinstance(results, dict):
        return {}
    return {seed: of if isinstance(of, dict) else {"val_bpb": of} for seed, of in results.items()}


def _seeds(submission: dict) -> list[str]:
    seeds = submission.get("seeds")
    return [str(seed) for seed in seeds] if isinstance(seeds, list) else list(_seed_results(submission))


def compare(log: Log, submission: dict, several: bool) -> tuple[list[str], list[str]]:
    """Flags and disagreements: where submission.json says other than this log, to the digits that it gives.

    Its own figures are the log's where it is about one seed; of several seeds they are means, or another's.
    """
    seed, seeds = str(log.config.get("seed", "?")), _seeds(submission)
    words = " ".join(value for value in submission.values() if isinstance(value, str))
    means = any(name.endswith("_std") for name in submission) or re.search(r"\b\d+[- ]seed", words)
    claims = {f"seed_results {seed} {name}": v for name, v in _seed_results(submission).get(seed, {}).items()}
    if not several and not means and (not seeds or seeds == [seed]):
        claims |= submission
    score, file = training_logs.final(log), training_logs.artifact(log)
    logged = {"artifact_bytes": file.get("total"), "bytes_total": file.get("total")}
    logged |= {"steps": log.steps, "step_stop": log.steps}
    before = training_logs.before_quantization(log)
    raw = {name: getattr(before, name) if before else log.validation.get(name) for name in SCORES}
    flags, found = [], []
    for name, claim in claims.items():
        kind = name.split()[-1]
        if isinstance(claim, bool) or not isinstance(claim, int | Decimal):
            continue
        if kind in SCORES:
            is_raw = raw[kind] is not None and _agree(claim, raw[kind], before.digits if before else 4)
            if not score and is_raw:
                flags.append(f"{name} {claim} in {SUBMISSION} is the score before quantisation")
            elif not score:
                found.append(f"{name} {claim} in {SUBMISSION}, no score after quantisation in the log")
            elif not _agree(claim, getattr(score, kind), score.digits):
                found.append(f"{name} {claim} in {SUBMISSION}, {getattr(score, kind)} in the log")
                found[-1] += ": it is the score before quantisation" if is_raw else ""
        elif logged.get(kind) is not None and not _agree(claim, logged[kind], 0):
            found.append(f"{name} {claim} in {SUBMISSION}, {logged[kind]} in the log")
            found[-1] += ": it is the file without its code" if claim == file.get("weights") else ""
    codes = [size.bytes for size in log.sizes if size.what == "Code size"]
    if codes and isinstance(code := submission.get("bytes_code"), int) and code not in codes:
        found.append(f"bytes_code {code} in {SUBMISSION}, {codes[-1]} in the log")
    if seeds and seed != "?" and seed not in seeds:
        found.append(f"seed {seed} is not among those of {SUBMISSION}: {', '.join(seeds)}")
    return flags, found


def _agree(claim: int | Decimal, logged: float, digits: int) -> bool:
    """Equal to the digits that both have."""
    given = max(0, -claim.as_tuple().exponent) if isinstance(claim, Decimal) else 0
    return abs(claim - Decimal(str(logged))) <= Decimal(5).scaleb(-min(given, digits) - 1)


def _missing_seeds(home: Path, logs: dict[Path, Source]) -> list[str]:
    """Seeds that a record claims results of and shows no log of."""
    there = {source.seed for source in logs.values()}
    missing = [seed for seed in _seeds(_parsed(_submission(home)) or {}) if seed not in there]
    return [f"{home.name}: no log of seed {', '.join(missing)}, which {SUBMISSION} lists"] if missing else []


# Writing.


def _is_there(run_dir: Path, source: Source, claims: bytes | None) -> bool:
    """Whether this very log was imported there. LogError when anything else is there."""
    if not run_dir.exists() or (run_dir.is_dir() and all(f.suffix == ".tmp" for f in run_dir.iterdir())):
        return False
    facts = read_json(run_dir / "import.json")
    elsewhere = "import it with another --sweep"
    if facts is None:
        raise LogError(f"{run_dir}: is no import, so {source.given} cannot go there; {elsewhere}")
    if facts.get("sha256") != hashlib.sha256(source.content).hexdigest():
        raise LogError(f"{run_dir}: another log is there, {facts.get('source')}; {elsewhere}, or delete it first")
    last = "result.json" if training_logs.final(source.log) else "config.json"
    if not (run_dir / last).exists():
        return False  # killed while it was written
    copy = run_dir / SUBMISSION
    if (copy.read_bytes() if copy.exists() else None) != claims:
        raise LogError(f"{run_dir}: was imported with another {SUBMISSION}; {elsewhere}, or delete it first")
    return True


def _import(run_dir: Path, source: Source, claims: bytes | None, again: bool, several: bool) -> Imported:
    log, submission = source.log, _parsed(claims)
    score, file = training_logs.final(log), training_logs.artifact(log)
    claimed, disagreements = compare(log, submission or {}, several)
    flags = training_logs.flags(log) + claimed + ([f"{SUBMISSION} is not readable"] if submission is None else [])
    if not again:
        _write(run_dir, source, claims, flags, disagreements)
    status = "complete" if score else "incomplete"
    return Imported(run_dir, status, score and score.val_bpb, file.get("total"), flags + disagreements, again)


def _write(run_dir: Path, source: Source, claims: bytes | None, flags: list[str], disagreements: list[str]) -> None:
    """import.json first, it says whose directory this is; result.json last, as in every run."""
    log, content = source.log, source.content
    score, before = training_logs.final(log), training_logs.before_quantization(log)
    facts = {
        "source": str(source.given),
        "sha256": hashlib.sha256(content).hexdigest(),
        "imported": datetime.now(UTC).isoformat(timespec="seconds"),
        "metrics": [asdict(s) for s in log.scores],
        "final": score and score.label,
        "before_quantization": before and before.label,
        "sizes": [{"label": f"{s.what} {s.codec}".strip(), "bytes": s.bytes, "line": s.line} for s in log.sizes],
        "codec": training_logs.artifact(log).get("codec"),
        "steps": log.steps,
        "iterations": log.iterations,
        "seconds": log.seconds,
        "seed": log.config.get("seed"),
        "tokenizer": training_logs.tokenizer(log),
        "val_tokens": log.config.get("val_tokens"),
        "flags": flags,
        "disagreements": disagreements,
    }
    atomic_write(run_dir / "import.json", json.dumps(facts, indent=1))
    atomic_write(run_dir / "log.txt", content)
    if claims is not None:
        atomic_write(run_dir / SUBMISSION, claims)
    atomic_write(run_dir / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in log.rows))
    atomic_write(run_dir / "config.json", json.dumps(log.config, indent=1))
    if score:
        write_result(run_dir, result(log))


def result(log: Log) -> Result:
    """Of a log with a final score. Its bytes are as the log states them: nothing was measured here."""
    score, before, file = training_logs.final(log), training_logs.before_quantization(log), training_logs.artifact(log)
    batch = log.config.get("train_batch_tokens")
    return Result(
        kind="import",
        config_hash=digest(log.config),
        seed=log.config.get("seed"),
        track="",
        val_loss=log.validation.get("val_loss"),
        val_bpb=log.validation.get("val_bpb"),
        prequant_val_bpb=before.val_bpb if before else log.validation.get("val_bpb"),
        roundtrip_val_loss=score.val_loss,
        roundtrip_val_bpb=score.val_bpb,
        bytes={part: file[part] for part in ("weights", "code", "total") if part in file},
        total_bytes=file.get("total"),
        cap_bytes=log.cap,
        parameters=log.config.get("model_params", log.config.get("params")),
        steps=log.steps,
        tokens=log.steps * batch if log.steps and isinstance(batch, int) else None,
        stopped_by=log.stopped_by,
        train_seconds=log.seconds,
        eval_seconds=training_logs.eval_seconds(log),
        data_fingerprint=training_logs.data_fingerprint(log),
        protocol=training_logs.protocol(log),
        environment=log.environment,
    )
