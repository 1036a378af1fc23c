"""Arms of the sweeps of research models against their control: differences in bits per byte, and costs.

Arms with another way of scoring, such as adaptation, are comparison groups of their own elsewhere. Here they are
compared with their control on the same text by the same seeds: the way of scoring is the treatment.
"""

import math

import pandas as pd

from pgolf.analysis import frontier, seed_groups, statistics

SWEEPS = {  # sweep file -> title; its file's question is the page's
    "generated_weights": "Generated weights",
    "halting": "Depth by token",
    "adaptation": "A model that learns while it is scored",
}
COSTS = ("train_seconds", "eval_seconds", "total_bytes")


def arms(runs: pd.DataFrame) -> pd.DataFrame:
    """One row per arm of a sweep, of complete runs scored on the control's text; the control first, then by bpb.

    Columns: arm, n (seeds), is_baseline, bpb (mean over seeds); delta, half, verdict, method of its Comparison,
    simultaneous over the arms; parameters, mean_passes; train_seconds, eval_seconds, total_bytes (means), and
    times_<name>, their ratio to the control's; distribution_error (largest). Empty without a control.
    """
    runs = frontier.scored(runs)
    runs = runs[runs.kind == "train"]
    control = runs[runs.run == runs.control]
    if not len(control):
        return pd.DataFrame()
    text = ["scored_text", "roundtrip_bytes"]
    runs = runs[runs[text].eq(control[text].iloc[0]).all(axis=1)]
    groups = {arm: own for arm, own in runs.groupby("arm", sort=False)}
    first = control.arm.iloc[0]
    names = [first, *(arm for arm in groups if arm != first)]
    samples = [statistics.samples(groups[arm].seed, groups[arm].bpb) for arm in names]
    found = [seed_groups.UNKNOWN, *statistics.compare(samples[1:], samples[0])]
    rows = []
    for arm, scores, one in zip(names, samples, found, strict=True):
        own = groups[arm]
        row = {"arm": arm, "n": len(scores), "is_baseline": arm == first, "bpb": scores.mean(), "delta": one.delta}
        row |= {"half": one.half, "verdict": one.verdict, "method": one.method, "parameters": own.parameters.iloc[0]}
        row |= {name: own[name].astype(float).mean() for name in ("mean_passes", *COSTS)}
        row |= {f"times_{name}": row[name] / groups[first][name].astype(float).mean() for name in COSTS}
        rows.append(row | {"distribution_error": own.distribution_error.astype(float).max()})
    table = pd.DataFrame(rows)
    return pd.concat([table[:1], table[1:].sort_values("bpb")], ignore_index=True)


def describe(rows: pd.DataFrame) -> list[str]:
    """A sentence per arm: its difference to the control, its time and its bytes. rows: of `arms`."""
    control, said = rows.iloc[0], []
    for row in rows[1:].itertuples():
        half = "" if math.isnan(row.half) else f" ± {row.half:.4f}"
        times = [(row.times_train_seconds, ".2f", "the training time")]
        times += [(row.times_eval_seconds, ".2f", "the scoring time")]
        times += [(row.times_total_bytes, ".3f", "the bytes")] * (abs(row.times_total_bytes - 1) > 0.005)
        costs = [f"{own:{digits}} × {what}" for own, digits, what in times if math.isfinite(own)]
        verb = {"better": "wins", "worse": "loses"}.get(row.verdict)
        text = f"{verb} {abs(row.delta):.4f}" if verb else f"{row.delta:+.4f}".replace("-", "−")
        known = "" if verb else f", {row.verdict}"
        paid = f", at {' and '.join(costs)} of {control.arm}" if costs else ""
        said.append(f"{row.arm} {text}{half} bpb{known}{paid}")
    return said
