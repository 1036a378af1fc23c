"""Tables for the reader: every figure as text, with its unit in the heading and its interval beside it."""

import json
from collections.abc import Iterable

import numpy as np
import pandas as pd
from pandas.io.formats.style import Styler
from scipy import stats

from pgolf.analysis import diff, statistics
from pgolf.analysis.frontier import comparable, fold, frontier_table, not_counted, panel_title

WORDS = (
    "run",
    "kind",
    "note",
    "file",
    "at most",
    "the solver",
    "best of the others",
    "tensor",
    "sweep",
    "track",
    "status",
    "verdict",
    "seeds",
    "of",
    "from",
    "scored as",
)  # left-aligned


def in_words(rows: pd.DataFrame) -> pd.DataFrame:
    """frontier_table for the reader; a note says whether a run is better or worse than its control."""
    notes = []
    for row in rows.itertuples():
        words = ["control"] if row.is_control else []
        words += ["on the front"] if row.on_front else []
        words += ["over cap"] if row.over_cap else []
        words += [verdict_in_words(row)] if row.verdict else []
        notes.append(", ".join(words))

    return pd.DataFrame(
        {
            "run": names_of(rows),
            "kind": rows.kind.to_numpy(),
            "bpb": figures(rows.bpb, ".4f"),
            "Δ control": with_interval(rows.delta_bpb, rows.delta_half.mask(rows.is_control, 0.0), ".4f"),
            "quantised": with_interval(rows.quantisation_bpb, rows.quantisation_half, ".4f"),
            "total bytes": figures(rows.total_bytes, ",.0f"),
            "left to cap": figures(rows.headroom, ",.0f"),
            "parameters": figures(rows.parameters, ",.0f"),
            "steps": figures(rows.steps, ",.0f"),
            "train s": figures(rows.train_seconds, ",.0f"),
            "note": notes,
        }
    )


def verdict_in_words(row) -> str:
    """'better (paired, 5 seeds)'. row: verdict and method, as of noise.Comparison."""
    if row.verdict in ("better", "worse"):
        return f"{row.verdict} ({row.method})"
    return {"not known": row.method, "equal": "equal to the last bit"}.get(row.verdict, row.verdict)


def with_interval(values: Iterable[float], halves: Iterable[float], form: str, factor: float = 1.0) -> list[str]:
    """'+0.0031 ± 0.0012': a difference and half of its 95 % interval; ± ? where that is not known."""
    texts = []
    for value, half in zip(values, halves, strict=True):
        text = "–" if pd.isna(value) else format(factor * value, "+z" + form).replace("-", "−")
        if not (pd.isna(value) or half == 0):
            text += " ± ?" if pd.isna(half) else f" ± {format(factor * half, form)}"
        texts.append(text)
    return texts


def styled(text: pd.DataFrame) -> Styler:
    """A table in words for a notebook or page: words to the left, what is on the front in bold."""
    left = [i for i, name in enumerate(text) if name in WORDS]
    notes = text.get("note", pd.Series("", index=text.index)).astype(str)
    bold = notes.str.contains("on the front").map({True: "font-weight: 600", False: ""})
    return (
        text.reset_index(drop=True)
        .style.hide(axis="index")
        .apply(lambda column: bold.to_list())
        .set_properties(subset=text.columns[left], **{"text-align": "left"})
        .set_properties(
            subset=[name for name in text if name in ("run", "sweep", "scored as", "note", "verdict")],
            **{"white-space": "normal", "overflow-wrap": "anywhere", "min-width": "14em"},
        )
        .set_table_styles([{"selector": f"th.col{i}", "props": "text-align: left"} for i in left])
    )


def summary(table: pd.DataFrame, best: int = 20) -> str:
    """All runs for a terminal, a block a panel: control first, then by bpb, * on the front."""
    blocks = []
    for key, panel in comparable(table):
        rows = frontier_table(panel)
        shown = fold(rows, best)
        twins = shown.groupby(["kind", "bpb", "total_bytes"]).run  # exports that chose the same residuals
        shown = shown.assign(run=shown.run + twins.transform("size").map(lambda n: f" +{n - 1} alike" if n > 1 else ""))
        hidden = len(rows) - len(shown)
        shown = shown[twins.cumcount() == 0]
        text = in_words(shown).drop(columns=["parameters", "steps", "train s"])
        text["run"] = np.where(shown.on_front, "* ", "  ") + text.run.to_numpy(object)
        for name in ("run", "kind", "note"):
            text[name] = text[name].str.ljust(text[name].str.len().max())
        text.columns = [name.ljust(len(text[name].iloc[0])) if name in ("run", "kind") else name for name in text]
        block = f"{panel_title(key)}\n{text.to_string(index=False)}"
        if hidden:
            block += f"\n  and {hidden:,} more off the front"
        blocks.append(block)
    left_out = not_counted(table)
    if len(left_out):
        lines = [f"  {name}  {why}" for name, why in zip(names_of(left_out)[:best], left_out.why, strict=False)]
        lines += [f"  and {len(left_out) - best:,} more"] if len(left_out) > best else []
        blocks.append("not complete: counted nowhere\n" + "\n".join(lines))
    return "\n\n".join(blocks) or "no runs yet"


def data_in_words(panel: pd.DataFrame) -> str:
    """What the scores of a panel stand on: which part of which validation split, and what its audit found."""
    facts = {json.dumps(told, sort_keys=True): told for told in panel.data if isinstance(told, dict) and told}
    sentences = []
    for told in facts.values():
        share = told["scored_fraction"]
        text = f"{told['folder']}: " + ("all" if share > 0.999 else f"{share:.1%}") + " of its validation split"
        text += f", the published {told['published']}" if told["published"] else ", which is not published data"
        text += f"; {told['train_tokens']:,} training tokens; {told['audit']} audit"
        # How much is scored is said already.
        found = [finding for finding in told["findings"] if "of the validation split is scored" not in finding]
        sentences.append(f"{text}: {'; '.join(found) if found else 'nothing found'}.")
    if len(panel) > sum(1 for told in panel.data if isinstance(told, dict) and told):
        sentences.append("Older runs were not audited." if sentences else "These runs were not audited.")
    return "Scored: " + " ".join(sorted(sentences))


def exports_in_words(rows: pd.DataFrame) -> pd.DataFrame:
    """exports() for the reader, as in_words."""
    return pd.DataFrame(
        {
            "file": rows.variant,
            "kind": rows.family,
            "bpb": [f"{bpb:.5f}" for bpb in rows.bpb],
            "Δ raw": with_interval(rows.delta_raw, rows.half_raw, ".2f", 1e3),
            "Δ plain": with_interval(rows.delta_plain, rows.half_plain, ".2f", 1e3),
            "total bytes": figures(rows.total_bytes, ",.0f"),
            "of plain": figures(rows.share, ".1%"),
            "note": np.select([rows.on_front, rows.fixed_front], ["on the front", "behind the solver's alone"], ""),
        }
    )


def within_in_words(rows: pd.DataFrame) -> pd.DataFrame:
    """within() for the reader; a missing file is –."""
    words = {"at most": [f"{row.share:.0%} = {row.limit:,} B" for row in rows.itertuples()]}
    for who, heading in (("solver", "the solver"), ("fixed", "best of the others")):
        sizes = figures(rows[f"{who}_bytes"], ",.0f")
        names = rows[who].fillna("–")
        words[heading] = [f"{name}, {size} B" if size != "–" else "–" for name, size in zip(names, sizes, strict=True)]
        words[f"{who}: bpb"] = figures(rows[f"{who}_bpb"], ".5f")
    words["solver − others (milli-bpb)"] = with_interval(rows.delta_bpb, rows.half, ".2f", 1e3)
    words["note"] = [verdict if isinstance(verdict, str) else "" for verdict in rows.verdict]
    return pd.DataFrame(words)


def sensitivity_in_words(rows: pd.DataFrame) -> pd.DataFrame:
    """map_sensitivity's rows for the reader, tensors where a byte is worth most first."""
    rows = rows[rows.tensor != ""].sort_values("bpb_per_kb", ascending=False)
    return pd.DataFrame(
        {
            "tensor": rows.tensor,
            "rise (milli-bpb)": with_interval(rows.delta_bpb, rows.delta_half, ".3f", 1e3),
            "estimated": figures(1e3 * rows.estimated_delta_bpb, "+z.3f"),
            "its bytes, coded": figures(rows.tensor_bytes, ",.0f"),
            "change of the file (B)": figures(rows.delta_bytes, "+,.0f"),
            "worth (milli-bpb a 1,000 B)": figures(1e3 * rows.bpb_per_kb, "+z.4f"),
        }
    )


def arms_in_words(rows: pd.DataFrame, ledger: pd.DataFrame) -> pd.DataFrame:
    """arms.arms of a sweep for the reader; ledger: arm, bpb, bytes of the seed, to stand beside; may be empty."""
    table = pd.DataFrame(
        {
            "run": rows.arm,
            "seeds": [seeds_in_words(seeds) for seeds in rows.seeds],
            "bpb": figures(rows.bpb, ".4f"),
            "Δ control": with_interval(rows.delta, rows.half, ".4f"),
            "p": figures(rows.p, ".2g"),
            "note": [
                ", ".join(
                    (["control"] if row.is_control else [])
                    + (["over cap"] if row.over_cap else [])
                    + ([verdict_in_words(row)] if row.verdict else [])
                )
                for row in rows.itertuples()
            ],
            "seeds needed": [count_in_words(n) for n in rows.needed],
            "total bytes": figures(rows.total_bytes, ",.0f"),
        }
    )
    if (rows.clock > 0).any():  # what a clock leaves of them is most of what it does to a score
        table["steps"] = [f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}" for low, high in rows.steps]
    if len(ledger):
        theirs = ledger.groupby("arm")[["bpb", "bytes"]].mean().reindex(rows.arm)
        table["the seed's bpb"] = figures(theirs.bpb.to_numpy(float), ".4f")
        table["its bytes"] = figures(theirs.bytes.to_numpy(float, na_value=np.nan), ",.0f")
    return table


def count_in_words(count: float | None) -> str:
    """Of seeds_needed."""
    if pd.isna(count):
        return "–"
    return f"over {statistics.MOST_SEEDS:,}" if np.isinf(count) else f"{count:,.0f}"


def seeds_in_words(seeds: list[int]) -> str:
    """'1337, 1338', '1337 × 3' for repeats."""
    counts = pd.Series(seeds).value_counts(sort=False)
    return ", ".join(f"{seed} × {count}" if count > 1 else f"{seed}" for seed, count in counts.items())


def claims_in_words(rows: pd.DataFrame, panel: pd.DataFrame, changes: dict[str, list[str]]) -> list[str]:
    """A sentence for each arm of a sweep that did not change just what its file says. changes: of sweep.json."""
    lines = []
    for control in rows[rows.is_control][:1].itertuples():
        base = {int(panel.seed[i]): panel.path[i] for i in reversed(control.index)}
        for arm in rows[~rows.is_control & rows.arm.isin(changes.keys())].itertuples():
            problems = {}
            for i in arm.index:
                differs = diff.between(panel.path[i], base.get(int(panel.seed[i]), panel.path[control.index[0]]))
                claimed = {*changes[arm.arm], *(set(changes.get(control.arm, [])) & set(differs.setting))} - {"seed"}
                if problem := diff.judge(differs, claimed):
                    problems.setdefault(problem, []).append(panel.run[i])
            for problem, names in problems.items():
                lines.append(f"**{', '.join(names)}: not a clean comparison**: {problem}.")
    return lines


def exports_of_sweep_in_words(rows: pd.DataFrame) -> pd.DataFrame:
    """A sweep's exports, rows of arms.arms, smallest first: against the run of the same weights."""
    rows = rows.sort_values(["total_bytes", "bpb"]).drop_duplicates(["total_bytes", "bpb"])
    return pd.DataFrame(
        {
            "file": rows.arm,
            "bpb": figures(rows.bpb, ".5f"),
            "Δ its run (milli-bpb)": with_interval(rows.delta, rows.half, ".2f", 1e3),
            "total bytes": figures(rows.total_bytes, ",.0f"),
            "note": [", ".join(filter(None, ["over cap" * row.over_cap, row.verdict])) for row in rows.itertuples()],
        }
    )


def ledger_in_words(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of ledger.load for the reader."""
    return pd.DataFrame(
        {
            "sweep": rows.sweep,
            "run": rows.run,
            "track": rows.track,
            "bpb": [text or "–" for text in rows.bpb_text],
            "of": rows.score.where(rows.bpb.notna(), "–"),
            "total bytes": figures(rows.bytes.to_numpy(float, na_value=np.nan), ",.0f"),
            "status": rows.status,
            "verdict": rows.verdict,
        }
    )


def leader_in_words(leader, rows: pd.DataFrame, panel: pd.DataFrame) -> list[str]:
    """Why a row of arms.leaders leads, and by how much. rows: of arms.arms."""
    first = rows.loc[leader.arm]
    files = ", ".join(f"{panel.run[i]} (seed {panel.seed[i]:.0f}) {panel.bpb[i]:.4f}" for i in first["index"])
    fits = f"{leader.candidates} that fit" if leader.candidates > 1 else "one that fits"
    text = f"**{first.sweep}/{first.arm}** leads under {leader.cap_bytes:,} bytes: {first.bpb:.4f} bpb in "
    text += f"{first.total_bytes:,} bytes, the lowest of {fits}; all its runs: {files}."
    lines = [text]
    if leader.second is not None and not pd.isna(leader.second):
        second = rows.loc[leader.second]
        text = f"Next: {second.sweep}/{second.arm}, "
        text += with_interval([leader.delta], [leader.half], ".4f")[0] + " bpb. "
        if leader.verdict == "worse":
            text += f"The lead is real by the test ({leader.method}, p {leader.p:.2g})."
        elif leader.verdict == "not known":
            text += f"Whether that is more than luck is not known: {leader.method}."
        else:
            text += f"By the test the two are not told apart ({leader.method}, p {leader.p:.2g})."
        if pd.isna(leader.record_p):
            text += " The challenge's rule (0.005 nats at p < 0.01) asks for several seeds of both."
        else:
            is_record = "a record" if leader.record else "no record"
            text += f" By the challenge's rule (0.005 nats at p < 0.01) it is {is_record}: p {leader.record_p:.2g}."
        lines.append(text)
    return lines


def history_in_words(steps: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """arms.history for the reader, the last first."""
    table = pd.DataFrame(
        {
            "finished (UTC)": steps.finished.str.replace("T", " "),
            "cap": figures(steps.cap_bytes, ",.0f"),
            "run": names,
            "mean bpb by then": figures(steps.bpb, ".4f"),
            "total bytes": figures(steps.total_bytes, ",.0f"),
        }
    )
    return table.iloc[::-1][:30]


def repeats_in_words(rows: pd.DataFrame) -> list[str]:
    """What arms.repeats says of each track, with a clock and without."""
    if rows.empty:
        return ["No run was repeated with an equal seed: `repeats: 2` in a sweep file does it."]
    lines = []
    for (track, clocked), own in rows.groupby(["track", "clocked"]):
        what = f"{track or 'no track'}, {'under a clock' if clocked else 'fixed steps'}: {own.n.sum()} runs in "
        what += f"{len(own)} sets of equal knobs and seed; "
        if own.spread.max() == 0:
            files = " and all artifacts of a set are the same file" if own.same_file.all() else ""
            lines.append(f"{what}zero spread{files}.")
        else:
            worst = own.iloc[own.spread.to_numpy().argmax()]
            text = f"{what}**they differ by up to {worst.spread:.4f} bpb** ({', '.join(worst.places[:4])})"
            lines.append(text + (": a clock ends them at different steps." if clocked else ", and they must not."))
    return lines


def repeat_sets_in_words(rows: pd.DataFrame) -> pd.DataFrame:
    """arms.repeats for the reader."""
    return pd.DataFrame(
        {
            "run": [", ".join(places[:6]) + (" …" if len(places) > 6 else "") for places in rows.places],
            "track": rows.track + np.where(rows.clocked, ", clock", ""),
            "seed": rows.seed,
            "runs": rows.n,
            "spread (bpb)": [f"{spread:.4f}" if spread else "0" for spread in rows.spread],
            "same file": np.where(rows.same_file, "yes", "no"),
        }
    )


def floors_in_words(floors: dict) -> pd.DataFrame:
    """arms.floors for the reader: what one run against one must differ by, and the seeds for smaller differences."""
    rows = []
    for (track, clock), floor in floors.items():
        alone = stats.t.ppf(1 - statistics.LEVEL / 2, floor.df) * floor.sd * 2**0.5
        row = {
            "track": f"{track or 'no track'}{f', clock of {clock:g} s' if clock else ''}",
            "standard deviation (milli-bpb)": f"{1e3 * floor.sd:.2f}",
            "from": f"{floor.df + floor.arms} {'repeats' if floor.repeats else 'seeds'} of {floor.arms} arms",
            "one against one differs by (milli-bpb)": f"{1e3 * alone:.1f}",
        }
        for milli in (5, 2, 1):
            n = statistics.seeds_needed(1e-3 * milli, floor.sd, paired=False)
            row[f"seeds an arm for {milli}"] = count_in_words(n)
        rows.append(row)
    return pd.DataFrame(rows)


def growth_in_words(rows: pd.DataFrame) -> str:
    """One sentence a way to store: bits a parameter at the first and the last length. rows: of frontier.growth."""
    texts = []
    for how, own in rows.groupby("how", sort=False):
        first, last = own.iloc[0], own.iloc[-1]
        texts.append(
            f"{how}: {first.bits:.2f} bits a parameter after {first.steps:,} steps, {last.bits:.2f} after "
            f"{last.steps:,} ({last.bits / first.bits:.2f} times)."
        )
    return " ".join(texts)


def growth_table_in_words(rows: pd.DataFrame) -> pd.DataFrame:
    """frontier.growth's rows for the reader."""
    return pd.DataFrame(
        {
            "file": rows.how,
            "steps": figures(rows.steps, ",.0f"),
            "bits a parameter": figures(rows.bits, ".2f"),
            "total bytes": figures(rows.bytes, ",.0f"),
            "bpb": figures(rows.bpb, ".4f"),
            "lost (milli-bpb)": with_interval(rows.cost, rows.half, ".2f", 1e3),
        }
    )


def imports_in_words(rows: pd.DataFrame) -> pd.DataFrame:
    """Imported logs for the reader, a record's together, the best record first."""
    best = rows.groupby("sweep").bpb.transform("min").astype(float)
    rows = rows.assign(best=best).sort_values(["best", "sweep", "run"])
    return pd.DataFrame(
        {
            "sweep": rows.sweep,
            "run": rows.run,
            "status": rows.status,
            "seed": [str(seed) for seed in rows.seed.fillna("–")],
            "bpb": figures(rows.bpb.astype(float), ".5f"),
            "scored as": rows.protocol.fillna("–"),
            "before rounding": figures(rows.prequant_val_bpb.astype(float), ".5f"),
            "total bytes": figures(rows.total_bytes.astype(float), ",.0f"),
            "steps": figures(rows.steps.astype(float), ",.0f"),
            "train s": figures(rows.train_seconds.astype(float), ",.0f"),
            "note": np.where(rows.over_cap.eq(True), "over cap", ""),
        }
    )


def _value(value: object) -> str:
    return "–" if value is None else f"`{value}`"


def pair_in_words(pair) -> str:
    """A row of difference.nearest."""
    rows = pair.differs
    knobs = list(rows.setting[rows.kind == "knob"])
    others = ", ".join(rows.setting[rows.kind.isin(["chance", "identity"])]) or "nothing"
    text = f"**{pair.ours}** against {pair.theirs}: "
    if pair.found is not None:
        change = with_interval([pair.found.delta], [pair.found.half], ".5f")[0]
        text = f"{text}{change} bpb over all logs of both, {verdict_in_words(pair.found)}; "
    if not knobs:
        return (
            f"{text}**the logged configurations differ in nothing but {others}**: no change of a knob is in these logs."
        )
    rows = rows[rows.kind == "knob"]
    shown = [f"`{r.setting}` {_value(r.theirs)} → {_value(r.ours)}" for r in rows[:8].itertuples()]
    more = f" and {len(rows) - 8} more" if len(rows) > 8 else ""
    count = f"{len(knobs)} settings differ" if len(knobs) > 1 else "1 setting differs"
    return f"{text}{count}: {', '.join(shown)}{more}."


def figures(values: Iterable[float], form: str) -> list[str]:
    """Numbers as text, – where there is none."""
    return ["–" if pd.isna(value) else format(value, form).replace("-", "−") for value in values]


def names_of(rows: pd.DataFrame) -> list[str]:
    """Run names; with the sweep where there are several."""
    if rows.sweep.nunique() < 2:
        return list(rows.run)
    return [f"{sweep}/{run}" if sweep else run for sweep, run in zip(rows.sweep, rows.run, strict=True)]
