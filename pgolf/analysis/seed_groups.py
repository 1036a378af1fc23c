"""Runs → arms: what differs in nothing but its seed, and what may be said of it against its control.

Everything here takes one panel of frontier.comparable, so its scores may be set against each other.
"""

import math
from dataclasses import asdict

import numpy as np
import pandas as pd

from pgolf.analysis import statistics
from pgolf.analysis.statistics import Comparison, Floor
from pgolf.runs.table import KNOBS

COMPARED = ["delta", "low", "high", "p", "method", "verdict", "half"]
ARM = [
    "sweep", "arm", "kind", "is_control", "runs", "seeds", "index", "n", "bpb", "sd", "total_bytes", "over_cap",
    "cap_bytes", "steps", "track", "clock", "samples", "nats",
]  # fmt: skip
USED = [  # of a panel; slicing all of its columns arm by arm takes longer than everything else
    "sweep", "run", "control", "arm", "kind", "seed", "bpb", "total_bytes", "over_cap", "cap_bytes", "steps", "track",
]  # fmt: skip
UNKNOWN = Comparison(math.nan, math.nan, math.nan, math.nan, "", "")  # of a control against itself


def same_knobs(table: pd.DataFrame, but: tuple[str, ...] = ("seed",)) -> pd.Series:
    """A number a run, equal for runs whose knobs are, apart from those named in `but`, and whose data is the same."""
    columns = ["data_fingerprint", *(name for name in KNOBS if name not in but)]
    return pd.util.hash_pandas_object(table[columns].astype(str), index=False)


def floors(panel: pd.DataFrame) -> dict[tuple[str, float], Floor | None]:
    """What chance does, by (track, seconds of its clock, 0 without): of all trained runs, whatever their sweep."""
    trained = panel[panel.kind == "train"]
    clock = trained.max_wallclock_seconds.astype(float)
    found = {}
    for key, of_track in trained.groupby([trained.track, clock]):
        groups = of_track[["seed", "bpb"]].groupby(same_knobs(of_track))
        found[key] = statistics.floor_of(statistics.samples(group.seed, group.bpb, key[1] > 0) for _, group in groups)
    return found


def repeats(panel: pd.DataFrame) -> pd.DataFrame:
    """Trained runs of equal knobs and seed, machine and commit, a row a set of several, whatever their sweeps.

    Columns: track, clocked, seed, places (list of sweep/run), n, spread (highest less lowest bpb), same_file (all
    artifacts are equal, bit by bit).
    """
    trained = panel[panel.kind == "train"]
    like = ("device_name", "torch", "python", "git_commit")
    machine = [str([made.get(name) for name in like]) for made in trained.environment]
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


def arms(panel: pd.DataFrame, across: bool = False) -> pd.DataFrame:
    """A row an arm: the runs of one sweep, or of any, that differ in nothing but seed and repeat. Controls first.

    across: of any; then nothing is compared with a control. Then by bpb.

    sweep, arm (of the first run), kind, is_control; runs, seeds, index (lists; index: labels of the panel's rows); n
    (samples), bpb (their mean), sd; total_bytes (of the largest), over_cap (any); cap_bytes; steps (lowest, highest);
    track; clock (seconds, 0 = none); samples and nats (Series by seed, bpb and nats a token of one tokenizer).
    Of a trained arm the fields of noise.Comparison against the sweep's control; of an export against the run that it
    exports, by the text.
    p is adjusted after Holm, for all trained arms of a sweep and for all exports of it. half; needed (seeds an arm that
    would tell such a difference apart; None unknown, inf over noise.MOST_SEEDS).
    """
    rows = []
    clock = panel.max_wallclock_seconds.astype(float)
    # Of the tokenizer with the most tokens, where there are several: the smallest, so that no rule is met by it.
    nats_a_bit = math.log(2) * float(panel.roundtrip_bytes.max()) / float(panel.roundtrip_tokens.max())
    keys = [*([] if across else [panel.sweep]), panel.kind, same_knobs(panel)]
    for _, group in panel[USED].groupby(keys, sort=False):
        first, clocked = group.iloc[0], clock[group.index[0]] > 0
        samples = statistics.samples(group.seed, group.bpb, clocked)
        rows.append(
            {
                "sweep": first.sweep,
                "arm": first.arm,
                "kind": first.kind,
                "is_control": bool((group.run == group.control).any()) and first.kind == "train",
                "runs": list(group.run),
                "seeds": [int(seed) for seed in group.seed],
                "index": list(group.index),
                "n": len(samples),
                "bpb": samples.mean(),
                "sd": samples.std() if len(samples) > 1 else math.nan,
                "total_bytes": int(group.total_bytes.max()),
                "over_cap": bool(group.over_cap.any()),
                "cap_bytes": int(first.cap_bytes),
                "steps": (int(group.steps.min()), int(group.steps.max())),
                "track": first.track,
                "clock": clock[group.index[0]],
                "samples": samples,
                "nats": statistics.samples(group.seed, group.bpb * nats_a_bit, clocked),
            }
        )
    table = pd.DataFrame(rows, columns=ARM)
    compared = pd.Series([UNKNOWN] * len(table), index=table.index, dtype=object)
    needed = pd.Series([None] * len(table), index=table.index, dtype=object)
    by_track = floors(panel)
    for _, sweep in table.groupby("sweep") if not across else ():
        trained, exported = sweep[sweep.kind == "train"], sweep[sweep.kind != "train"]
        for _, control in trained[trained.is_control][:1].iterrows():
            others = trained.index[~trained.is_control]
            for j in others:
                arm = table.loc[j]
                floor = by_track.get((arm.track, arm.clock)) if _alike(arm, control) else None
                by_text = _of_text(panel, arm, control)
                compared[j] = by_text or statistics.compare(arm.samples, control.samples, floor)
                needed[j] = None if by_text else _needed(arm, control, compared[j].delta, floor)
            compared[others] = statistics.holm(list(compared[others]))
        for j in exported.index:
            compared[j] = _against_its_run(panel, table.loc[j])
        compared[exported.index] = statistics.holm(list(compared[exported.index]))
    fields = pd.DataFrame([asdict(c) | {"half": c.half} for c in compared], index=table.index, columns=COMPARED)
    table = table.join(fields).assign(needed=needed)
    return table.iloc[np.lexsort((table.bpb, ~table.is_control.astype(bool), table.sweep))]


def _alike(arm: pd.Series, other: pd.Series) -> bool:
    """Whether one floor is of both."""
    return (arm.track, arm.clock) == (other.track, other.clock)


def _of_text(panel: pd.DataFrame, arm: pd.Series, control: pd.Series) -> Comparison | None:
    """Two ways to store or to score one checkpoint, told apart by the text; None where there are several."""
    weights = panel.checkpoint_sha256[[*arm["index"], *control["index"]]]
    if weights.isna().any() or weights.nunique() > 1:
        return None
    found = _blocks(panel.loc[arm["index"][0]], panel.loc[control["index"][0]])
    return None if math.isnan(found.delta) else found


def _against_its_run(panel: pd.DataFrame, arm: pd.Series) -> Comparison:
    """An export against the run of the same weights in this panel; UNKNOWN where that is not there."""
    export = panel.loc[arm["index"][0]]
    own = panel[(panel.kind == "train") & (panel.checkpoint_sha256 == export.checkpoint_sha256)]
    return _blocks(export, own.iloc[0]) if len(own) and len(arm["index"]) == 1 else UNKNOWN


def _blocks(ours: pd.Series, theirs: pd.Series) -> Comparison:
    return statistics.compare_blocks(ours.roundtrip_block_nats, theirs.roundtrip_block_nats, ours.roundtrip_bytes)


def _needed(arm: pd.Series, control: pd.Series, delta: float, floor: Floor | None) -> float | None:
    """Seeds after which a difference of delta bpb is told apart; None where nothing says how far seeds lie apart."""
    if math.isnan(delta):
        return None
    if arm.samples.index.is_unique and control.samples.index.is_unique:
        common = arm.samples.index.intersection(control.samples.index)
        if len(common) > 1:
            return statistics.seeds_needed(delta, (arm.samples[common] - control.samples[common]).std())
        if arm.n > 1 and control.n > 1:
            return statistics.seeds_needed(delta, math.hypot(arm.sd, control.sd) / math.sqrt(2), paired=False)
    return statistics.seeds_needed(delta, floor.sd, paired=False) if floor else None


def candidates(panel: pd.DataFrame) -> pd.DataFrame:
    """Arms across sweeps that may lead: all trained ones, and exports of runs that no other seed was trained for.

    An export is made of the best seed; where there are others its score is partly that choice.
    """
    table = arms(panel, across=True)
    trained = table[table.kind == "train"]
    several = {
        i for labels, seeds in zip(trained["index"], trained.seeds, strict=True) if len(set(seeds)) > 1 for i in labels
    }
    chosen = set(panel.checkpoint_sha256[list(several)].dropna())
    weights = table["index"].map(lambda labels: panel.checkpoint_sha256[labels[0]])
    return table[(table.kind == "train") | ~weights.isin(chosen)]


def leaders(panel: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Of table, candidates(panel): a row a cap, the arm of lowest mean bpb all of whose runs fit, and the next best.

    Columns: cap_bytes, candidates, arm (row label in table), second (row label or None), and of the second less the
    first: delta, half, p, verdict, method; record, record_p: whether the first beats it by the challenge's rule. A
    second of the first's very score is none: it is the same file.
    """
    rows, by_track = [], floors(panel)
    for cap, group in table[~table.over_cap].groupby("cap_bytes"):
        ranked = group.sort_values(["bpb", "total_bytes"])
        first = ranked.iloc[0]
        others = ranked[ranked.bpb != first.bpb]
        row = {"cap_bytes": cap, "candidates": len(group), "arm": first.name, "second": None}
        if len(others):
            second = others.iloc[0]
            floor = by_track.get((first.track, first.clock)) if _alike(first, second) else None
            found = _of_text(panel, second, first) or statistics.compare(second.samples, first.samples, floor)
            record, p = statistics.is_record(first.nats, second.nats)
            row |= {"second": second.name, **asdict(found), "half": found.half, "record": record, "record_p": p}
        rows.append(row)
    return pd.DataFrame(rows, columns=["cap_bytes", "candidates", "arm", "second", *COMPARED, "record", "record_p"])


def history(panel: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """How the lead changed as runs finished: finished (time), cap_bytes, arm (row label of table), bpb, total_bytes.

    table: candidates(panel). The lead is of the mean over the seeds an arm had by then, and only of arms none of whose
    runs was over its cap; total_bytes is of the largest of them.
    """
    arm_of = {label: i for i, labels in table["index"].items() for label in labels}
    rows = []
    for cap, group in panel[panel.index.isin(arm_of)].groupby("cap_bytes"):
        seen: dict = {}
        lead_of: dict = {}  # arm -> its mean and bytes so far, while all its runs fit
        last = None
        for run in group.sort_values("finished").itertuples():
            arm = arm_of[run.Index]
            seen.setdefault(arm, []).append(run)
            own = seen[arm]
            if any(one.over_cap for one in own):
                lead_of.pop(arm, None)
            else:
                mean = statistics.samples([one.seed for one in own], [one.bpb for one in own]).mean()
                lead_of[arm] = (mean, int(max(one.total_bytes for one in own)))
            lead = min(lead_of, key=lead_of.get) if lead_of else None
            if lead is not None and (lead, lead_of[lead]) != last:
                last = (lead, lead_of[lead])
                rows.append((run.finished, cap, lead, *lead_of[lead]))
    return pd.DataFrame(rows, columns=["finished", "cap_bytes", "arm", "bpb", "total_bytes"])
