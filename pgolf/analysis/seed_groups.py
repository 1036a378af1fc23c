"""Runs grouped into configs: runs that differ in nothing but their seed, compared with the sweep's baseline run.

`runs` is one group of frontier.comparison_groups everywhere, so its scores are comparable.
"""

import math

import numpy as np
import pandas as pd

from pgolf.analysis import statistics
from pgolf.analysis.statistics import Comparison, SeedNoise
from pgolf.runs.code import code_of
from pgolf.runs.table import KNOBS

COMPARED = ["delta", "low", "high", "p", "method", "verdict", "half", "detectable"]
CONFIG = {  # by_config's column: the runs' column and its aggregate over a config
    "sweep": ("sweep", "first"), "arm": ("arm", "first"), "kind": ("kind", "first"),
    "is_baseline": ("is_baseline", "any"), "runs": ("run", list),
    "seeds": ("seed", lambda seeds: [int(seed) for seed in seeds]), "index": ("label", list),
    "total_bytes": ("total_bytes", "max"), "over_cap": ("over_cap", "any"), "cap_bytes": ("cap_bytes", "first"),
    "steps": ("steps", lambda steps: (int(steps.min()), int(steps.max()))),
    "track": ("track", "first"), "time_limit": ("time_limit", "first"), "code": ("code", "first"),
    "parameters": ("parameters", "first"),
}  # fmt: skip
REPEATS = {  # repeats' column, likewise, over a set of repeats
    "track": ("track", "first"), "time_limited": ("time_limited", "first"),
    "seed": ("seed", lambda seeds: int(seeds.iloc[0])), "places": ("place", list), "n": ("place", "size"),
    "spread": ("bpb", lambda bpb: bpb.max() - bpb.min()),
    "same_file": ("artifact_sha256", lambda files: bool(files.notna().all() and files.nunique() == 1)),
}  # fmt: skip
MACHINE = ("device_name", "torch", "python")
UNKNOWN = Comparison(math.nan, "", "")  # a baseline compared with itself


def same_knobs(table: pd.DataFrame, ignored: tuple[str, ...] = ("seed",)) -> pd.Series:
    """A hash per run, equal for runs of equal data, equal code and equal knobs, `ignored` apart."""
    columns = ["data_fingerprint", *(name for name in KNOBS if name not in ignored)]
    facts = table[columns].assign(code=table.environment.map(code_of))
    return pd.util.hash_pandas_object(facts.astype(str), index=False)


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
    """Trained runs of equal knobs, seed, machine and code, whatever their sweeps: one row per set of several.

    Columns: track, time_limited, seed, places (list of sweep/run), n, spread (highest − lowest bpb), same_file (all
    artifacts have equal bytes).
    """
    trained = runs[runs.kind == "train"]
    trained = trained.assign(
        knobs=same_knobs(trained, ()),
        made_on=trained.environment.map(lambda made: str([made.get(name) for name in MACHINE])).astype(object),
        place=trained.sweep + "/" + trained.run,
        time_limited=trained.max_wallclock_seconds.astype(float) > 0,
    )
    keys = ["knobs", "made_on"]
    sets = trained[trained.duplicated(keys, keep=False)].groupby(keys)
    return sets.agg(**REPEATS).sort_values("n", ascending=False, ignore_index=True)


def by_config(runs: pd.DataFrame, across_sweeps: bool = False) -> pd.DataFrame:
    """One row per config: the runs of one sweep that differ in seed and repeat only. Baselines first, then by bpb.

    Runs of other code (see code_of) are another config.

    across_sweeps: group the runs of all sweeps together and compare nothing with a baseline.

    Columns: sweep, arm (the config's name in its sweep file), kind, is_baseline; runs, seeds (lists), index (labels
    of the rows of `runs`); n (samples), bpb (their mean), sd; total_bytes (of the largest run), over_cap (any run);
    cap_bytes; steps (lowest, highest); track; time_limit (seconds, 0 = none); code; parameters; samples (bpb by
    seed); delta, low, high, p, method, verdict, half, detectable of its statistics.Comparison.

    A trained config is compared with its baseline_of, an export with the run that it exports, by the text. p and
    interval are simultaneous over the trained configs of one baseline, and over a sweep's exports.
    """
    facts = runs.assign(
        is_baseline=(runs.run == runs.control) & (runs.kind == "train"),
        time_limit=runs.max_wallclock_seconds.astype(float),
        label=runs.index,
        code=runs.environment.map(code_of),
    )
    keys = [*([] if across_sweeps else [runs.sweep]), runs.kind, same_knobs(runs)]
    groups = facts.groupby(keys, sort=False)
    table = groups.agg(**CONFIG).reset_index(drop=True).astype({"total_bytes": "int64", "cap_bytes": "int64"})
    columns = groups[["seed", "bpb", "time_limit"]]
    samples = [statistics.samples(own.seed, own.bpb, own.time_limit.iloc[0] > 0) for _, own in columns]
    samples = pd.Series(samples, index=table.index, dtype=object)
    scores = dict(n=samples.map(len), bpb=samples.map(pd.Series.mean), sd=samples.map(pd.Series.std))
    table = table.assign(samples=samples, **scores)
    found = {} if across_sweeps else _comparisons(runs, table)
    found = [found.get(label, UNKNOWN) for label in table.index]
    table = table.assign(**{name: [getattr(one, name) for one in found] for name in COMPARED})
    return table.iloc[np.lexsort((table.bpb, ~table.is_baseline.astype(bool), table.sweep))]


def _comparisons(runs: pd.DataFrame, table: pd.DataFrame) -> dict[int, Comparison]:
    """by_config's comparisons within each sweep, by row label."""
    noises, found = noise_by_track(runs), {}
    for _, sweep in table.groupby("sweep"):
        is_trained = sweep.kind == "train"
        rest = sweep[is_trained & ~sweep.is_baseline]
        for baseline, own in rest.groupby(baseline_of(sweep, rest)):
            found |= _compare(runs, own, sweep.loc[baseline], noises)
        exports = sweep["index"][~is_trained]
        for j, labels in exports.items():
            same = runs.checkpoint_sha256 == runs.checkpoint_sha256[labels[0]]
            source = runs.index[same & (runs.kind == "train")]
            found[j] = _compare_files(runs, labels, list(source), len(exports)) or UNKNOWN
    return found


def baseline_of(table: pd.DataFrame, configs: pd.DataFrame) -> pd.Series:
    """For each config the row label of its baseline in by_config's table: that of its code, else the first; or None."""
    labels = {code: label for label, code in reversed(list(table.code[table.is_baseline].items()))}
    return configs.code.map(lambda code: labels.get(code, next(reversed(labels.values()), None)))


def _compare(
    runs: pd.DataFrame, configs: pd.DataFrame, other: pd.Series, noises: dict[tuple[str, float], SeedNoise | None]
) -> dict[int, Comparison]:
    """Configs compared with another at once, by row label; those of the other's checkpoint are compared by the text."""
    by_text = {j: _compare_files(runs, labels, other["index"], len(configs)) for j, labels in configs["index"].items()}
    found = {j: one for j, one in by_text.items() if one and not math.isnan(one.delta)}
    # The noise of others holds for no config of another track or time limit.
    same = (configs.track == other.track) & (configs.time_limit == other.time_limit)
    for is_same, group in configs.drop(list(found)).groupby(same):
        noise = noises.get((other.track, other.time_limit)) if is_same else None
        found |= zip(group.index, statistics.compare(list(group.samples), other.samples, noise), strict=True)
    return found


def _compare_files(runs: pd.DataFrame, ours: list, theirs: list, family: int) -> Comparison | None:
    """Files of one checkpoint, given by row labels, compared by the text; None if there are several checkpoints."""
    weights = runs.checkpoint_sha256[[*ours, *theirs]]
    if not theirs or weights.isna().any() or weights.nunique() > 1:
        return None
    a, b = runs.loc[ours[0]], runs.loc[theirs[0]]
    return statistics.compare_blocks(a.roundtrip_block_nats, b.roundtrip_block_nats, a.roundtrip_bytes, family)


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
    """For each cap the config of lowest bound that fits with all its runs, and the next best. table: candidates.

    bound: statistics.upper_bound of the mean, so that one lucky seed does not lead several good ones.

    Columns: cap_bytes, candidates, config (row label of table), bound, second (row label, None without one); delta,
    half, p, verdict, method of the second − the first; record, record_p: does the first beat the second by the
    challenge's rule. A config of exactly the first's score is the same file, and no second.
    """
    # The tokenizer with the most tokens has the fewest nats per token, so no other choice makes a record easier.
    nats_per_bit = math.log(2) * float(runs.roundtrip_bytes.max()) / float(runs.roundtrip_tokens.max())
    rows, noises = [], noise_by_track(runs)
    for cap, group in table[~table.over_cap].groupby("cap_bytes"):
        noise = [_noise_of(config, noises) for config in group.itertuples()]
        facts = zip(group.bpb, group.seeds, noise, strict=True)
        bounds = [statistics.upper_bound(bpb, len(set(seeds)), own, len(group)) for bpb, seeds, own in facts]
        ranked = group.assign(bound=bounds).sort_values(["bound", "bpb", "total_bytes"])
        first = ranked.iloc[0]
        row = {"cap_bytes": cap, "candidates": len(group), "config": first.name, "bound": first.bound, "second": None}
        for label, second in ranked[ranked.bpb != first.bpb][:1].iterrows():
            found = _compare(runs, ranked.loc[[label]], first, noises)[label]
            record, p = statistics.is_record(first.samples * nats_per_bit, second.samples * nats_per_bit)
            row |= {name: getattr(found, name) for name in COMPARED}
            row |= {"second": second.name, "record": record, "record_p": p}
        rows.append(row)
    columns = ["cap_bytes", "candidates", "config", "bound", "second", *COMPARED, "record", "record_p"]
    return pd.DataFrame(rows, columns=columns)


def _noise_of(config, noises: dict[tuple[str, float], SeedNoise | None]) -> SeedNoise | None:
    """The noise of a config's own track and time limit, else the largest that is known."""
    known = [noise for noise in noises.values() if noise]
    return noises.get((config.track, config.time_limit)) or max(known, key=lambda noise: noise.std, default=None)


def history(runs: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """How the lowest mean changed as runs finished. table: candidates.

    Columns: finished (time), cap_bytes, config (row label of table), bpb (mean over the seeds finished by then),
    total_bytes (of the largest run). A config leaves the lead when one of its runs is over the cap.
    """
    config_of = {label: i for i, labels in table["index"].items() for label in labels}
    finished = runs[runs.index.isin(config_of)].sort_values("finished")
    rows = []
    for cap, group in finished.assign(config=finished.index.map(config_of)).groupby("cap_bytes"):
        scores, last = {}, None  # scores: (mean bpb, bytes) by config
        for run in group.itertuples():
            own = group[group.config == run.config].loc[: run.Index]
            mean = math.inf if own.over_cap.any() else statistics.samples(own.seed, own.bpb).mean()
            scores[run.config] = (mean, int(own.total_bytes.max()))
            lead = min(scores, key=scores.get)
            if scores[lead][0] < math.inf and (lead, *scores[lead]) != last:
                last = (lead, *scores[lead])
                rows.append((run.finished, cap, *last))
    return pd.DataFrame(rows, columns=["finished", "cap_bytes", "config", "bpb", "total_bytes"])
