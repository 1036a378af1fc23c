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

    Raises FileNotFoundError, or ValueError naming the file and what is wrong in it.
    """
    try:
        # utf-8-sig: spreadsheets write a byte order mark.
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig", index_col=False)
        if [*table.columns] != COLUMNS:
            raise ValueError(f"expected the columns {', '.join(COLUMNS)}")
        table.insert(COLUMNS.index("bpb") + 1, "bpb_text", table.bpb)
        figures = {name: pd.to_numeric(table[name]) for name in ("bpb", "val_loss", "bytes")}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return table.assign(**figures).astype({"bytes": "Int64"})


def knobs(changed: str) -> dict[str, str]:
    """'num_layers=10 mlp_permutation=true' -> values by knob, as text that RunConfig accepts."""
    return dict(word.split("=", 1) for word in changed.split())
