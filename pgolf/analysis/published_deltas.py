"""What the public records report of each technique, beside our own ablations: notebooks/sweeps/published_deltas.csv.

technique    name in our sweeps: an arm of this name has it, and its baseline run has not; no_<name> the reverse
low, high    range of the published change of bits per byte, negative = better; '' = never measured alone
reliability  seeds, and what else changed; source: pull requests of the challenge

Published figures are of FineWeb, 8 GPUs and models of 20 million parameters or more: they are ranked with nothing here.
"""

from pathlib import Path

import pandas as pd

from pgolf_core.config import ROOT

PATH = ROOT / "notebooks" / "sweeps" / "published_deltas.csv"
WITHOUT = "no_"
VERDICTS = {"better": "helps", "worse": "harms"}
OPPOSITE = {"better": "worse", "worse": "better"}


def load(path: str | Path = PATH) -> pd.DataFrame:
    """The table, text but for low and high."""
    return pd.read_csv(path, dtype={"low": float, "high": float}).fillna({"source": ""})


def ablations(configs: pd.DataFrame) -> pd.DataFrame:
    """What having each published technique changes: a row per compared arm of that name, or no_ and that name.

    configs: of seed_groups.by_config. Columns: those of load(), with published_low and published_high; ours (added, or
    taken away), sweep, n, delta, low, high, half (of having it, whichever way it was tried), verdict (helps, harms or
    the test's word).
    """
    published = load().rename(columns={"low": "published_low", "high": "published_high"})
    rows = configs[configs.delta.notna()].drop_duplicates(["sweep", "arm"])
    away = rows.arm.str.startswith(WITHOUT)
    sign = 1 - 2 * away
    word = rows.verdict.where(~away, rows.verdict.replace(OPPOSITE)).replace(VERDICTS)
    own = rows.assign(
        technique=rows.arm.str.removeprefix(WITHOUT), ours=away.map({True: "taken away", False: "added"}),
        delta=sign * rows.delta, low=rows.low.where(~away, -rows.high), high=rows.high.where(~away, -rows.low),
        verdict=word,
    )  # fmt: skip
    columns = ["technique", "ours", "sweep", "n", "delta", "low", "high", "half", "verdict"]
    return published.merge(own[columns], on="technique")
