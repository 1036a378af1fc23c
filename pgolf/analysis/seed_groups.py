"""Runs grouped into configs: runs that differ in nothing but their seed, compared with the sweep's baseline run.

`runs` is one group of frontier.comparison_groups everywhere, so its scores are comparable.
"""

import math
from dataclasses import asdict

import numpy as np
import pandas as pd

from pgolf.analysis import statistics
from pgolf.analysis.statistics import Comparison, SeedNoise
from pgolf.runs.table import KNOBS

COMPARED = ["delta", "low", "high", "p", "method", "verdict", "half"]
CONFIG = {  # by_config's column: the runs' column and its aggregate over a config
    "sweep": ("sweep", "first"), "arm": ("arm", "first"), "kind": ("kind", "first"),
    "is_baseline": ("is_baseline", "any"), "runs": ("run", list),
    "seeds": ("seed", lambda seeds: [int(seed) for seed in seeds]), "index": ("label", list),
    "total_bytes": ("total_bytes", "max"), "over_cap": ("over_cap", "any"), "cap_bytes": ("cap_bytes", "first"),
    "steps": ("steps", lambda steps: (int(steps.min()), int(steps.max()))),
    "track": ("track", "first"), "time_limit": ("time_limit", "first"),
}  # fmt: skip
MACHINE = ("device_name", "torch", "python", "git_commit")
UNKNOWN = Comparison(math.nan, math.nan, math.nan, math.nan, "", "")  # a baseline compared with itself


def same_knobs(table: pd.DataFrame, ignored: tuple[str, ...] = ("seed",)) -> pd.Series:
    """A hash per run, equal for runs of equal data and equal knobs, `ignored` apart."""
    columns = ["data_fingerprint", *(name for name in KNOBS if name not in ignored)]
    return pd.util.hash_pandas_object(table[columns].astype(str), index=False)


def noise_by_track(runs: pd.DataFrame) -> dict[tuple[str, float], SeedNoise | None]:
    """Seed noise by (track, time limit in seconds, 0 = none), from the trained runs of all sweeps."""
    trained = runs[runs.kind == "train"]
    limit = trained.max_wallclock_seconds.astype(float)
    found = {}
    for key, of_track in trained.groupby([trained.track, limit]):
        groups = of_track[["seed", "bpb"]].groupby(same_knobs(of_track))
        found[key] = statistics.seed_noise(statistics.samples(own.seed, own.bpb, key[1] > 0) for _, own in groups)
    return found


def repeats(runs: pd.DataFrame) -> pd.DataFrame:
    """Trained runs of equal knobs, seed, machine and commit, whatever their sweeps: one row per set of several.

    Columns: track, time_limited, seed, places (list of sweep/run), n, spread (highest − lowest bpb), same_file (all
    artifacts have equal bytes).
    """
    trained = runs[runs.kind == "train"]
    made_on = trained.environment.map(lambda made: str([made.get(name) for name in MACHINE])).astype(object)
    trained = trained.assign(
        knobs=same_knobs(trained, ()),
        made_on=made_on,
        place=trained.sweep + "/" + trained.run,
        time_limited=trained.max_wallclock_seconds.astype(float) > 0,
    )
    keys = ["knobs", "made_on"]
    sets = trained[trained.duplicated(keys, keep=False)].groupby(keys)
    table = sets.agg(
        track=("track", "first"),
        time_limited=("time_limited", "first"),
        seed=("seed", lambda seeds: int(seeds.iloc[0])),
        places=("place", list),
        n=("place", "size"),
        spread=("bpb", lambda bpb: bpb.max() - bpb.min()),
        same_file=("artifact_sha256", lambda files: bool(files.notna().all() and files.nunique() == 1)),
    )
    return table.sort_values("n", ascending=False, ignore_index=True)


def by_config(runs: pd.DataFrame, across_sweeps: bool = False) -> pd.DataFrame:
    """One row per config: the runs of one sweep that differ in seed and repeat only. Baselines first, then by bpb.

    across_sweeps: group the runs of all sweeps together and compare nothing with a baseline.

    Columns: sweep, arm (the config's name in its sweep file), kind, is_baseline; runs, seeds (lists), index (labels
    of the rows of `runs`); n (samples), bpb (their mean), sd; total_bytes (of the largest run), over_cap (any run);
    cap_bytes; steps (lowest, highest); track; time_limit (seconds, 0 = none); samples (bpb by seed); the fields of
    statistics.Comparison and its half; needed (seeds per config that would make the difference significant; None =
    unknown, inf = above statistics.MAX_SEEDS).

    A trained config is compared with the sweep's baseline, an export with the run that it exports, by the text. p is
    Holm-adjusted over the trained configs of a sweep, and over its exports.
    """
    facts = runs.assign(
        is_baseline=(runs.run == runs.control) & (runs.kind == "train"),
        time_limit=runs.max_wallclock_seconds.astype(float),
        label=runs.index,
    )
    keys = [*([] if across_sweeps else [runs.sweep]), runs.kind, same_knobs(runs)]
    groups = facts.groupby(keys, sort=False)
    table = groups.agg(**CONFIG).reset_index(drop=True).astype({"total_bytes": "int64", "cap_bytes": "int64"})
    samples = [
        statistics.samples(own.seed, own.bpb, own.time_limit.iloc[0] > 0)
        for _, own in groups[["seed", "bpb", "time_limit"]]
    ]
    samples = pd.Series(samples, index=table.index, dtype=object)
    table = table.assign(
        samples=samples, n=samples.map(len), bpb=samples.map(pd.Series.mean), sd=samples.map(pd.Series.std)
    )
    compared = pd.Series([UNKNOWN] * len(table), index=table.index, dtype=object)
    needed = pd.Series([None] * len(table), index=table.index, dtype=object)
    by_track = noise_by_track(runs)
    for _, sweep in table.groupby("sweep") if not across_sweeps else ():
        trained, exported = sweep[sweep.kind == "train"], sweep[sweep.kind != "train"]
        for _, baseline in trained[trained.is_baseline][:1].iterrows():
            others = trained.index[~trained.is_baseline]
            for j in others:
                config = table.loc[j]
                noise = by_track.get((config.track, config.time_limit)) if _same_limits(config, baseline) else None
                by_text = _compare_same_weights(runs, config, baseline)
                compared[j] = by_text or statistics.compare(config.samples, baseline.samples, noise)
                needed[j] = None if by_text else _seeds_needed(config, baseline, compared[j].delta, noise)
            compared[others] = statistics.holm(list(compared[others]))
        for j in exported.index:
            compared[j] = _compare_with_source(runs, table.loc[j])
        compared[exported.index] = statistics.holm(list(compared[exported.index]))
    fields = pd.DataFrame([asdict(c) | {"half": c.half} for c in compared], index=table.index, columns=COMPARED)
    table = table.join(fields).assign(needed=needed)
    return table.iloc[np.lexsort((table.bpb, ~table.is_baseline.astype(bool), table.sweep))]


def _same_limits(config: pd.Series, other: pd.Series) -> bool:
    """True if one seed noise holds for both configs."""
    return (config.track, config.time_limit) == (other.track, other.time_limit)


def _compare_same_weights(runs: pd.DataFrame, config: pd.Series, baseline: pd.Series) -> Comparison | None:
    """Two ways to store or score one checkpoint, compared by the text; None if there are several checkpoints."""
    weights = runs.checkpoint_sha256[[*config["index"], *baseline["index"]]]
    if weights.isna().any() or weights.nunique() > 1:
        return None
    found = _compare_text(runs.loc[config["index"][0]], runs.loc[baseline["index"][0]])
    return None if math.isnan(found.delta) else found


def _compare_with_source(runs: pd.DataFrame, config: pd.Series) -> Comparison:
    """An export compared with the trained run of the same weights; UNKNOWN if that is not among the runs."""
    export = runs.loc[config["index"][0]]
    own = runs[(runs.kind == "train") & (runs.checkpoint_sha256 == export.checkpoint_sha256)]
    return _compare_text(export, own.iloc[0]) if len(own) and len(config["index"]) == 1 else UNKNOWN


def _compare_text(ours: pd.Series, theirs: pd.Series) -> Comparison:
    return statistics.compare_blocks(ours.roundtrip_block_nats, theirs.roundtrip_block_nats, ours.roundtrip_bytes)


def _seeds_needed(config: pd.Series, baseline: pd.Series, delta: float, noise: SeedNoise | None) -> float | None:
    """Seeds per config that make a difference of delta bpb significant; None if the spread of seeds is unknown."""
    if math.isnan(delta):
        return None
    if config.samples.index.is_unique and baseline.samples.index.is_unique:
        common = config.samples.index.intersection(baseline.samples.index)
        if len(common) > 1:
            return statistics.seeds_needed(delta, (config.samples[common] - baseline.samples[common]).std())
        if config.n > 1 and baseline.n > 1:
            return statistics.seeds_needed(delta, math.hypot(config.sd, baseline.sd) / math.sqrt(2), paired=False)
    return statistics.seeds_needed(delta, noise.std, paired=False) if noise else None


def candidates(runs: pd.DataFrame) -> pd.DataFrame:
    """Configs of all sweeps that may lead: the trained ones, and exports of runs whose config has one seed.

    If a config has several seeds, the best of them was exported, and the export's score is partly that choice.
    """
    table = by_config(runs, across_sweeps=True)
    trained = table[table.kind == "train"]
    several = trained["index"][trained.seeds.map(lambda seeds: len(set(seeds)) > 1)]
    chosen = set(runs.checkpoint_sha256[[*several.explode().dropna()]].dropna())
    weights = table["index"].map(lambda labels: runs.checkpoint_sha256[labels[0]])
    return table[(table.kind == "train") | ~weights.isin(chosen)]


def leaders(runs: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """For each cap the config of lowest mean bpb that fits with all its runs, and the next best. table: candidates.

    Columns: cap_bytes, candidates, config (row label of table), second (row label, None without one); delta, half, p,
    verdict, method of the second − the first; record, record_p: does the first beat the second by the challenge's
    rule. A config of exactly the first's score is the same file, and no second.
    """
    # The tokenizer with the most tokens has the fewest nats per token, so no other choice makes a record easier.
    nats_per_bit = math.log(2) * float(runs.roundtrip_bytes.max()) / float(runs.roundtrip_tokens.max())
    rows, by_track = [], noise_by_track(runs)
    for cap, group in table[~table.over_cap].groupby("cap_bytes"):
        ranked = group.sort_values(["bpb", "total_bytes"])
        first = ranked.iloc[0]
        others = ranked[ranked.bpb != first.bpb]
        row = {"cap_bytes": cap, "candidates": len(group), "config": first.name, "second": None}
        if len(others):
            second = others.iloc[0]
            noise = by_track.get((first.track, first.time_limit)) if _same_limits(first, second) else None
            found = _compare_same_weights(runs, second, first)
            found = found or statistics.compare(second.samples, first.samples, noise)
            record, p = statistics.is_record(first.samples * nats_per_bit, second.samples * nats_per_bit)
            row |= {"second": second.name, **asdict(found), "half": found.half, "record": record, "record_p": p}
        rows.append(row)
    return pd.DataFrame(rows, columns=["cap_bytes", "candidates", "config", "second", *COMPARED, "record", "record_p"])


def history(runs: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """How the lead changed as runs finished. table: candidates.

    Columns: finished (time), cap_bytes, config (row label of table), bpb (mean over the seeds finished by then),
    total_bytes (of the largest run). A config leaves the lead when one of its runs is over the cap.
    """
    config_of = {label: i for i, labels in table["index"].items() for label in labels}
    rows = []
    for cap, group in runs[runs.index.isin(config_of)].groupby("cap_bytes"):
        seen: dict = {}
        fitting: dict = {}  # config -> mean bpb and bytes of its runs so far
        last = None
        for run in group.sort_values("finished").itertuples():
            config = config_of[run.Index]
            own = seen.setdefault(config, [])
            own.append(run)
            if any(one.over_cap for one in own):
                fitting.pop(config, None)
            else:
                mean = statistics.samples([one.seed for one in own], [one.bpb for one in own]).mean()
                fitting[config] = (mean, int(max(one.total_bytes for one in own)))
            lead = min(fitting, key=fitting.get) if fitting else None
            if lead is not None and (lead, fitting[lead]) != last:
                last = (lead, fitting[lead])
                rows.append((run.finished, cap, lead, *fitting[lead]))
    return pd.DataFrame(rows, columns=["finished", "cap_bytes", "config", "bpb", "total_bytes"])
