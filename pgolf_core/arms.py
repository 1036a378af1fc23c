"""Runs → arms: what differs in nothing but its seed, and what may be said of it against its control.

Everything here takes one panel of frontier.comparable, so its scores may be set against each other.
"""

import math
from dataclasses import asdict

import numpy as np
import pandas as pd

from pgolf_core import noise
from pgolf_core.noise import Comparison, Floor
from pgolf_core.runs import KNOBS

UNKNOWN = Comparison(math.nan, math.nan, math.nan, math.nan, "", "")  # of a control against itself


def same_knobs(table: pd.DataFrame, but: tuple[str, ...] = ("seed",)) -> pd.Series:
    """A number a run, equal for runs whose knobs are, apart from those named in `but`."""
    return pd.util.hash_pandas_object(table[[name for name in KNOBS if name not in but]].astype(str), index=False)


def floors(panel: pd.DataFrame) -> dict[tuple[str, bool], Floor | None]:
    """What chance does, by (track, whether a clock ends its runs): of all trained runs, whatever their sweep."""
    trained = panel[panel.kind == "train"]
    clocked = trained.max_wallclock_seconds.astype(float) > 0
    found = {}
    for key, runs_of_track in trained.groupby([trained.track, clocked]):
        groups = runs_of_track.groupby(same_knobs(runs_of_track))
        found[key] = noise.floor_of(noise.samples(group.seed, group.bpb) for _, group in groups)
    return found


def repeats(panel: pd.DataFrame) -> pd.DataFrame:
    """Trained runs of equal knobs and seed on equal machines, a row a set of several, whatever their sweeps.

    Columns: track, clocked, seed, places (list of sweep/run), n, spread (highest less lowest bpb), same_file (all
    artifacts are equal, bit by bit).
    """
    trained = panel[panel.kind == "train"]
    machine = [str([made.get(name) for name in ("device_name", "torch", "python")]) for made in trained.environment]
    rows = []
    for _, group in trained.groupby([same_knobs(trained, ()), np.array(machine, object)]):
        if len(group) > 1:
            first = group.iloc[0]
            rows.append(
                {
                    "track": first.track,
                    "clocked": float(first.max_wallclock_seconds) > 0,
                    "seed": int(first.seed),
                    "places": [f"{run.sweep}/{run.run}" for run in group.itertuples()],
                    "n": len(group),
                    "spread": group.bpb.max() - group.bpb.min(),
                    "same_file": group.artifact_sha256.notna().all() and group.artifact_sha256.nunique() == 1,
                }
            )
    columns = ["track", "clocked", "seed", "places", "n", "spread", "same_file"]
    return pd.DataFrame(rows, columns=columns).sort_values("n", ascending=False, ignore_index=True)


def arms(panel: pd.DataFrame) -> pd.DataFrame:
    """A row an arm: the runs of one sweep that differ in nothing but seed and repeat. Controls first, then by bpb.

    sweep, arm, kind, is_control; runs, seeds, index (lists; index: labels of the panel's rows); n (samples), bpb (their
    mean), sd; total_bytes (of the largest), over_cap (any); cap_bytes; track; clocked; samples and nats (Series by
    seed, bpb and nats a token); the fields of noise.Comparison against the sweep's control, p adjusted after Holm for
    all trained arms of the sweep; half; needed (seeds an arm that would tell such a difference apart, None unknown).
    """
    by_track = floors(panel)
    clocked = panel.max_wallclock_seconds.astype(float) > 0
    keys = [panel.sweep, panel.kind, same_knobs(panel)]
    rows = []
    for (sweep, kind, _), group in panel.groupby(keys, sort=False):
        samples = noise.samples(group.seed, group.bpb)
        rows.append(
            {
                "sweep": sweep,
                "arm": group.arm.iloc[0],
                "kind": kind,
                "is_control": bool((group.run == group.control).any()),
                "runs": list(group.run),
                "seeds": [int(seed) for seed in group.seed],
                "index": list(group.index),
                "n": len(samples),
                "bpb": samples.mean(),
                "sd": samples.std() if len(samples) > 1 else math.nan,
                "total_bytes": int(group.total_bytes.max()),
                "over_cap": bool(group.over_cap.any()),
                "cap_bytes": int(group.cap_bytes.iloc[0]),
                "track": group.track.iloc[0],
                "clocked": bool(clocked[group.index[0]]),
                "samples": samples,
                "nats": noise.samples(group.seed, group.roundtrip_val_loss.astype(float)),
            }
        )
    table = pd.DataFrame(rows)
    compared = pd.Series([UNKNOWN] * len(table), index=table.index, dtype=object)
    needed = pd.Series([None] * len(table), index=table.index, dtype=object)
    for _, sweep in table.groupby("sweep"):
        controls = sweep[sweep.is_control & (sweep.kind == "train")]
        others = sweep[~sweep.is_control]
        for i in others.index if len(controls) else ():
            control, arm = controls.iloc[0], others.loc[i]
            floor = by_track.get((arm.track, arm.clocked)) if arm.clocked == control.clocked else None
            compared[i] = _of_text(panel, arm, control) or noise.compare(arm.samples, control.samples, floor)
            needed[i] = _needed(arm, control, compared[i], floor)
        trained = others.index[others.kind == "train"]
        compared[trained] = noise.holm(list(compared[trained]))
    fields = pd.DataFrame([asdict(c) | {"half": c.half} for c in compared], index=table.index)
    table = table.join(fields).assign(needed=needed)
    return table.iloc[np.lexsort((table.bpb, ~table.is_control, table.sweep))]


def _of_text(panel: pd.DataFrame, arm: pd.Series, control: pd.Series) -> Comparison | None:
    """Two ways to store or to score one checkpoint, told apart by the text; None where there are several."""
    weights = panel.checkpoint_sha256[[*arm["index"], *control["index"]]]
    if weights.isna().any() or weights.nunique() > 1:
        return None
    ours, theirs = panel.loc[arm["index"][0]], panel.loc[control["index"][0]]
    found = noise.compare_blocks(ours.roundtrip_block_nats, theirs.roundtrip_block_nats, ours.roundtrip_bytes)
    return None if math.isnan(found.delta) else found


def _needed(arm: pd.Series, control: pd.Series, found: Comparison, floor: Floor | None) -> int | None:
    if math.isnan(found.delta):
        return None
    common = arm.samples.index.intersection(control.samples.index)
    if len(common) > 1 and arm.samples.index.is_unique and control.samples.index.is_unique:
        return noise.seeds_needed(found.delta, (arm.samples[common] - control.samples[common]).std())
    if arm.n > 1 and control.n > 1:
        return noise.seeds_needed(found.delta, math.hypot(arm.sd, control.sd) / math.sqrt(2), paired=False)
    return noise.seeds_needed(found.delta, floor.sd, paired=False) if floor else None


def leaders(panel: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Of table, arms(panel): a row a cap, the arm of lowest mean bpb all of whose runs fit, and the next best.

    Columns: cap_bytes, candidates, arm (row label in table), second (row label or None), and of the second less the
    first: delta, half, p, verdict, method; record, record_p: whether the first beats it by the challenge's rule. A
    second of the first's very score is none: it is the same file, or the same run of another sweep.
    """
    rows, by_track = [], floors(panel)
    for cap, group in table[~table.over_cap].groupby("cap_bytes"):
        ranked = group.sort_values(["bpb", "total_bytes"])
        first = ranked.iloc[0]
        others = ranked[ranked.bpb != first.bpb]
        row = {"cap_bytes": cap, "candidates": len(group), "arm": first.name, "second": None}
        if len(others):
            second = others.iloc[0]
            floor = by_track.get((first.track, first.clocked))
            found = _of_text(panel, second, first) or noise.compare(second.samples, first.samples, floor)
            record, p = noise.is_record(first.nats, second.nats)
            row |= {"second": second.name, **asdict(found), "half": found.half, "record": record, "record_p": p}
        rows.append(row)
    return pd.DataFrame(rows, columns=["cap_bytes", "candidates", "arm", "second", *COMPARED, "record", "record_p"])


COMPARED = ["delta", "low", "high", "p", "method", "verdict", "half"]


def history(panel: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """How the lead changed as runs finished: finished (time), cap_bytes, arm (row label of table), bpb, total_bytes.

    The lead is of the mean over the seeds an arm had by then, and only of arms none of whose runs was over its cap.
    """
    arm_of = {label: row.Index for row in table.itertuples() for label in row.index}
    rows = []
    for cap, group in panel[panel.index.isin(arm_of)].groupby("cap_bytes"):
        means: dict = {}
        seen: dict = {}
        over: set = set()
        last = None
        for run in group.sort_values("finished").itertuples():
            arm = arm_of[run.Index]
            seen.setdefault(arm, []).append(run.bpb)
            means[arm] = sum(seen[arm]) / len(seen[arm])
            if run.over_cap:
                over.add(arm)
            legal = {a: mean for a, mean in means.items() if a not in over}
            lead = min(legal, key=legal.get) if legal else None
            if lead is not None and (lead, legal[lead]) != last:
                rows.append((run.finished, cap, lead, legal[lead], int(table.total_bytes[lead])))
                last = (lead, legal[lead])
    return pd.DataFrame(rows, columns=["finished", "cap_bytes", "arm", "bpb", "total_bytes"])
