"""The seed's figures as it recorded them: notebooks/sweeps/ledger.csv, which runs of the sweeps there stand against.

sweep, run   as in notebooks/sweeps; of a stage's row the variant's name
stage        the notebook that scored it on the run's checkpoint; '' = training
seed_run     its name in the seed's notes; '' = they do not name it
track        of the sweep
changed      knobs against the sweep's control, 'knob=value knob=value'; of a stage's row against its plain file
score        what bpb is of: roundtrip (the file read back) or raw weights
bpb          bits per byte, with the digits given; val_loss in nats a token; bytes with code. '' = not recorded
status       complete; incomplete: never scored; aborted: not to the end, or never begun; over cap
verdict      what the figure says by all that is known now
"""

import csv
import io
import re
from pathlib import Path

import pandas as pd

from pgolf_core.config import ROOT, RunConfig
from pgolf_core.tracks import TRACKS

LEDGER = ROOT / "notebooks" / "sweeps" / "ledger.csv"
COLUMNS = (
    "sweep", "run", "stage", "seed_run", "track", "changed", "score", "bpb", "val_loss", "bytes", "status", "verdict",
)  # fmt: skip
CHOICES = {
    "track": tuple(TRACKS),
    "score": ("roundtrip", "raw"),
    "status": ("complete", "incomplete", "aborted", "over cap"),
}
FORMS = {"bpb": r"\d\.\d{4,8}", "val_loss": r"\d\.\d{4,8}", "bytes": r"\d{6,9}"}
CAP_BYTES = 16_000_000  # that the seed's files were held against


class LedgerError(ValueError):
    """A ledger that cannot be read; the message names every damaged line and what is wrong with it."""


def load(path: str | Path = LEDGER) -> pd.DataFrame:
    """A row each; text as in the file, but bpb and val_loss as numbers, bytes as Int64, all with gaps.

    bpb_text is bpb with the digits given. Raises FileNotFoundError or LedgerError.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")  # spreadsheets begin it with a mark
    except UnicodeDecodeError as error:
        raise LedgerError(f"{path}: not UTF-8 ({error})") from error
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        lines = [(reader.line_num, fields) for fields in reader]
    except csv.Error as error:
        raise LedgerError(f"{path}: line {reader.line_num}: {error}") from error
    if not lines or tuple(lines[0][1]) != COLUMNS:
        raise LedgerError(f"{path}: line 1: expected the columns {', '.join(COLUMNS)}")
    problems, seen = [], {}
    for number, fields in lines[1:]:
        if len(fields) != len(COLUMNS):
            problems.append(f"line {number}: {len(fields)} fields, not {len(COLUMNS)}")
            continue
        row = dict(zip(COLUMNS, fields, strict=True))
        problems += [f"line {number}: {problem}" for problem in _problems(row)]
        key = tuple(row[name] for name in ("sweep", "run", "stage", "score"))
        if (first := seen.setdefault(key, number)) != number:
            problems.append(f"line {number}: {row['sweep']}/{row['run']} stands in line {first} already")
    if problems:
        raise LedgerError(f"{path}:\n" + "\n".join(f"  - {problem}" for problem in problems))
    table = pd.DataFrame([fields for _, fields in lines[1:]], columns=list(COLUMNS))
    table.insert(COLUMNS.index("bpb") + 1, "bpb_text", table.bpb)
    for name in ("bpb", "val_loss"):
        table[name] = pd.to_numeric(table[name])
    return table.assign(bytes=pd.to_numeric(table.bytes).astype("Int64"))


def knobs(changed: str) -> dict[str, str]:
    """'num_layers=10 mlp_permutation=true' -> values by knob, as text that RunConfig understands."""
    return dict(word.split("=", 1) for word in changed.split())


def _problems(row: dict[str, str]) -> list[str]:
    found = [f"no {name}" for name in ("sweep", "run", "verdict") if not row[name]]
    found += [f"{name} {row[name]!r} is none of {', '.join(of)}" for name, of in CHOICES.items() if row[name] not in of]
    malformed = [name for name, form in FORMS.items() if row[name] and not re.fullmatch(form, row[name])]
    found += [f"{name} {row[name]!r} is no such figure" for name in malformed]
    if row["status"] in ("incomplete", "aborted") and (row["bpb"] or row["val_loss"]):
        found.append(f"{row['status']}, yet it has a score")
    if "bytes" not in malformed and (row["status"] == "over cap") != (int(row["bytes"] or 0) > CAP_BYTES):
        found.append(f"{row['status']} with bytes {row['bytes'] or 'unknown'} of {CAP_BYTES:,}")
    words = [word.partition("=") for word in row["changed"].split()]
    wrong = ["".join(word) for word in words if word[0] not in RunConfig.model_fields or not word[2]]
    return found + [f"changed: {word!r} is no knob=value" for word in wrong]
