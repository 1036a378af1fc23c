"""Results of the reference, as its notes give them: notebooks/sweeps/reference_results.csv.

sweep, run      names as in notebooks/sweeps; in a stage's row, run is the variant's name
stage           notebook that scored the variant on the run's checkpoint; '' = training
reference_run   name in the notes; '' = they name none
track           track of the sweep
changed         knobs that differ from the sweep's baseline, 'knob=value knob=value'; in a stage's row, from 'plain'
score           what was scored: roundtrip (the file read back) or raw (the pre-quant weights)
bpb             bits per byte with the digits given; val_loss: nats per token; bytes: with code. '' = not recorded
status          complete; incomplete: never scored; aborted: ended early or never begun; over cap: over 16,000,000 bytes
verdict         what the figure shows by all that is known now
"""

import csv
from pathlib import Path

import pandas as pd

from pgolf_core.config import ROOT

PATH = ROOT / "notebooks" / "sweeps" / "reference_results.csv"
COLUMNS = [
    "sweep", "run", "stage", "reference_run", "track", "changed", "score", "bpb", "val_loss", "bytes", "status",
    "verdict",
]  # fmt: skip


def load(path: str | Path = PATH) -> pd.DataFrame:
    """The file's rows as text; bpb and val_loss as floats, bytes as Int64, '' as missing; bpb_text keeps bpb's digits.

    Raises FileNotFoundError, or ValueError naming the file and the line.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:  # spreadsheets write a byte order mark
            rows = list(csv.reader(file, strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a CSV file in UTF-8 ({error})") from error
    if not rows or rows[0] != COLUMNS:
        raise ValueError(f"{path}: line 1: expected the columns {', '.join(COLUMNS)}")
    for number, row in enumerate(rows[1:], 2):
        if len(row) != len(COLUMNS):
            raise ValueError(f"{path}: line {number}: {len(row)} fields, expected {len(COLUMNS)}")
    table = pd.DataFrame(rows[1:], columns=COLUMNS)
    table.insert(COLUMNS.index("bpb") + 1, "bpb_text", table.bpb)
    for name in ("bpb", "val_loss", "bytes"):
        try:
            table[name] = pd.to_numeric(table[name])
        except ValueError as error:
            raise ValueError(f"{path}: column {name}: {error}") from error
    return table.astype({"bytes": "Int64"})


def knobs(changed: str) -> dict[str, str]:
    """'num_layers=10 mlp_permutation=true' -> values by knob, as text that RunConfig accepts."""
    return dict(word.split("=", 1) for word in changed.split())
