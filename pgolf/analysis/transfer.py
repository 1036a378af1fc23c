"""Does an arm's effect at one scale hold at another? Sweeps of `pgolf transfer`, and effects that others measured.

notebooks/sweeps/scale_effects.csv: effects of knobs that others measured at two scales; delta and other_delta in bits
per byte, negative = better; decide_at: knob=value of the scale at which to decide, '' if the signs agree.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd

from pgolf.analysis import published_deltas, statistics
from pgolf.runs.schema import About
from pgolf_core.config import ROOT

PATH = ROOT / "notebooks" / "sweeps" / "scale_effects.csv"
PUBLISHED = "published"
DRAWS, SEED = 4000, 0  # bootstrap samples of the arms
SIGNIFICANT = ("better", "worse")


def load_known() -> pd.DataFrame:
    """The rows of scale_effects.csv, with flips: the signs differ."""
    table = pd.read_csv(PATH, dtype={"delta": float, "other_delta": float}).fillna({"decide_at": ""})
    return table.assign(flips=table.delta * table.other_delta < 0)


def effects(tables: Sequence[pd.DataFrame], about: Mapping[str, About]) -> pd.DataFrame:
    """One row per transfer study, scale and arm that is compared with its control.

    tables: of seed_groups.by_config, one per comparison group. about: by sweep. Columns: family, scale, arm, knobs
    (those that the arm changes), n (seeds), delta, low, high, half (bits per byte), verdict; needed: seeds that find a
    true effect of this size (inf above MAX_SEEDS, nan if the noise is not known); by_seed: delta of each seed.
    """
    rows = []
    trained = [own for table in tables for own in table[table.kind == "train"].groupby("sweep", sort=False)]
    for sweep, own in trained:
        told, baseline = about.get(sweep) or About(), own[own.is_baseline][:1]
        arms = own[~own.is_baseline & own.delta.notna()].drop_duplicates("arm")
        for row in arms.itertuples() if told.scale and len(baseline) else ():
            needed, unit = math.nan, statistics.detectable(row.n, 1.0, len(arms))
            if row.delta and row.detectable and math.isfinite(unit):
                needed = statistics.seeds_needed(abs(row.delta), row.detectable / unit, len(arms))
            rows.append({
                "family": told.family, "scale": told.scale, "arm": row.arm, "knobs": told.changes.get(row.arm, []),
                "n": row.n, "delta": row.delta, "low": row.low, "high": row.high, "half": row.half,
                "verdict": row.verdict, "needed": needed, "by_seed": row.samples - baseline.samples.iloc[0],
            })  # fmt: skip
    columns = ["family", "scale", "arm", "knobs", "n", "delta", "low", "high", "half", "verdict", "needed", "by_seed"]
    return pd.DataFrame(rows, columns=columns)


def verdicts(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per arm of several scales. rows: of `effects`, one family's.

    verdict: transfers (significant at every scale, one sign), flips (significant with both signs), else unknown.
    needed: of an unknown arm, seeds at which its effects would be significant if they are as large as estimated. signs:
    '− +', of the estimate per scale; agree: they are equal. delta_<scale>, half_<scale>: nan if a scale lacks the arm.
    """
    found = []
    for arm, own in rows.groupby("arm", sort=False):
        if len(own) < 2:
            continue
        significant = own.verdict.isin(SIGNIFICANT)
        flips, transfers = own.verdict[significant].nunique() > 1, significant.all()
        row = {"arm": arm, "knobs": own.knobs.iloc[0], "agree": np.sign(own.delta).nunique() == 1}
        row |= {"signs": " ".join("−0+"[1 + int(sign)] for sign in np.sign(own.delta))}
        row |= {"verdict": "flips" if flips else "transfers" if transfers else "unknown"}
        row |= {"needed": own.needed[~significant].max(skipna=False) if row["verdict"] == "unknown" else math.nan}
        for one in own.itertuples():
            row |= {f"delta_{one.scale}": one.delta, f"half_{one.scale}": one.half}
        found.append(row)
    return pd.DataFrame(found, columns=list(dict.fromkeys(name for row in found for name in row)))


def flipped(tables: Sequence[pd.DataFrame], about: Mapping[str, About]) -> dict[str, str]:
    """Knob whose effect flips in one of our own studies -> 'A and B of STUDY', the scales between which it flips.

    tables, about: of `effects`.
    """
    found = {}
    for family, own in effects(tables, about).groupby("family"):
        for row in verdicts(own).itertuples():
            if row.verdict == "flips":
                found |= dict.fromkeys(row.knobs, f"{' and '.join(dict.fromkeys(own.scale))} of {family}")
    return found


def correlations(rows: pd.DataFrame) -> pd.DataFrame:
    """Rank correlation of the arms' effects between each pair of scales, and of each scale with the published changes.

    rows: of `effects`, one family's. Columns: scale, other, arms (number), rho (Spearman); low, high: 95 % by bootstrap
    over the arms; ceiling: the correlation that equal effects would show under this seed noise, nan if the other are
    published figures or a scale has one seed.
    """
    wide = rows.pivot(index="arm", columns="scale", values="delta")[list(dict.fromkeys(rows.scale))]
    scales, published = list(wide), published_deltas.load().set_index("technique")
    wide[PUBLISHED] = (published.low + published.high) / 2
    reliable = {scale: _reliability(own.by_seed) for scale, own in rows.groupby("scale")}
    found = []
    for scale, other in itertools.combinations(wide, 2):
        pair = wide[[scale, other]].dropna().to_numpy().T
        if pair.shape[1] < 4:
            continue
        drawn = np.random.default_rng(SEED).integers(0, pair.shape[1], (DRAWS, pair.shape[1]))
        low, high = np.nanquantile(spearman(pair[0][drawn], pair[1][drawn]), [0.025, 0.975])
        ceiling = math.sqrt(reliable[scale] * reliable[other]) if other in scales else math.nan
        found.append((scale, other, pair.shape[1], float(spearman(*pair[:, None])[0]), low, high, ceiling))
    return pd.DataFrame(found, columns=["scale", "other", "arms", "rho", "low", "high", "ceiling"])


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman correlation of each row of a with that of b, both (rows, arms): (rows,), nan if a row is constant."""
    a, b = (pd.DataFrame(one).rank(axis=1).to_numpy() for one in (a, b))
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    with np.errstate(invalid="ignore"):
        return (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))


def _reliability(by_seed: pd.Series) -> float:
    """Rank correlation of the arms' means with means over as many other seeds, by the Spearman-Brown formula."""
    table = pd.DataFrame(list(by_seed)).dropna().to_numpy().T  # (seeds, arms); arms that lack seeds are left out
    if len(table) < 2:
        return math.nan
    one = np.mean([spearman(a[None], b[None])[0] for a, b in itertools.combinations(table, 2)])
    return max(0.0, float(len(table) * one / (1 + (len(table) - 1) * one)))


def warnings(about: About, runs: pd.DataFrame, flipped: Mapping[str, str]) -> Iterator[str]:
    """Sentences about knobs of a sweep whose effect is known to flip at a scale that the sweep does not have.

    runs: the sweep's. flipped: of the function of this name.
    """
    knobs = {knob for changed in about.changes.values() for knob in changed}
    for row in load_known().itertuples():
        wanted, _, value = row.decide_at.partition("=")
        if row.flips and row.knobs in knobs and not (runs[wanted].astype(str) == value).all():
            deltas = f"{row.delta:+.4f} bpb at {row.scale}, {row.other_delta:+.4f} at {row.other_scale}"
            yield f"{row.knobs}: {row.what}: {deltas} ({row.source}); decide it at {row.decide_at}"
    if not about.family:
        yield from (f"{knob}: its effect flips between {flipped[knob]}" for knob in sorted(knobs & flipped.keys()))
