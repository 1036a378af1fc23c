"""Sentences of the report pages, in Markdown."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten

import pandas as pd

from pgolf.analysis import diff, frontier, seed_groups
from pgolf.disk import read_json
from pgolf.reports.figures import rank_correlation
from pgolf.reports.labels import md
from pgolf.reports.tables import format_interval
from pgolf.runs.code import short_code
from pgolf.runs.schema import About, read_about
from pgolf.runs.table import sentences_in


def listed(items: Sequence[str], most: int, between: str = ", ") -> str:
    """'a, b and 3 more'."""
    items = list(items)
    return between.join(items[:most]) + (f"{between}and {len(items) - most:,} more" if len(items) > most else "")


def lines(items: Sequence[str], most: int = 8) -> str:
    """A Markdown list; '' if there are no items."""
    return "- " + listed(items, most, "\n- ") if len(items) else ""


def run_counts(runs: pd.DataFrame) -> str:
    counts = ", ".join(f"{count:,} {status}" for status, count in runs.status.value_counts().sort_index().items())
    over, groups = frontier.scored(runs).over_cap.sum(), len(frontier.comparison_groups(runs))
    many = [f"{n:,} {what}{'s' * (n != 1)}" for n, what in ((len(runs), "run"), (runs.sweep.nunique(), "sweep"))]
    text = f"{' in '.join(many)}: {counts or 'none yet'}."
    text += f" Over their cap, so never on a front: {over}." if over else ""
    return text + (f" They fall into {groups} groups that cannot be compared." if groups > 1 else "")


def best_run(rows: pd.DataFrame) -> str:
    """The best of a frontier_table that fits its cap."""
    for run in rows[~rows.over_cap].nsmallest(1, "bpb").itertuples():
        text = (
            f"Best that fits its cap, of {len(rows):,} runs: **{md(run.sweep)}/{md(run.run)}**, {run.bpb:.4f} bpb in "
        )
        return f"{text}{run.total_bytes:,} bytes."
    return f"{len(rows):,} runs, none fits its cap."


def share(shown: pd.DataFrame, rows: pd.DataFrame, what: str = "runs") -> str:
    return f"{len(shown)} of {len(rows):,} {what}." if len(shown) < len(rows) else f"{len(rows):,} {what}."


def not_listed(rows: pd.DataFrame, shown: pd.DataFrame, file: str) -> str:
    """Where the rows are that a table does not show; '' if it shows all."""
    return f"{len(rows) - len(shown):,} more are in tables/{file}.csv." if len(shown) < len(rows) else ""


def describe_data(group: pd.DataFrame) -> str:
    """What the scores of a group stand on: which part of which validation split, and what its audit found."""
    known = [told for told in group.data if isinstance(told, dict) and told]
    texts = []
    for told in {json.dumps(told, sort_keys=True): told for told in known}.values():
        share = told["scored_fraction"]
        text = f"{md(told['folder'])}: {'all' if share > 0.999 else f'{share:.1%}'} of its validation split"
        text += f", the published {md(told['published'])}" if told["published"] else ", which is not published data"
        found = [finding for finding in told["findings"] if "of the validation split is scored" not in finding]
        text += f"; {told['train_tokens']:,} training tokens; {md(told['audit'])} audit: "
        texts.append(text + md("; ".join(found) or "nothing found") + ".")
    if len(group) > len(known):
        texts.append("Older runs were not audited." if texts else "These runs were not audited.")
    return "Scored: " + " ".join(sorted(texts))


def made(runs: pd.DataFrame) -> str:
    """Commits and versions that made the scored runs, and the time now."""
    columns = ["git_commit", "git_dirty", "torch", "python", "platform"]
    table = pd.DataFrame(list(frontier.scored(runs).environment)).reindex(columns=columns).fillna("").astype(str)
    texts = [
        f"{run.n:,} runs: commit {md(run.git_commit[:9]) or 'unknown'}{' with changes' * (run.git_dirty == 'True')}, "
        f"torch {md(run.torch)}, Python {md(run.python)}, {md(run.platform)}"
        for run in table.value_counts().reset_index(name="n").itertuples()
    ]
    return f"Written {time.strftime('%Y-%m-%d %H:%M')}.\n\n" + lines(texts)


def left_out(runs: pd.DataFrame) -> str:
    """Runs that are counted nowhere, and why."""
    rows = frontier.not_counted(runs)
    texts = [md(f"{run.run}: {run.why}") for run in rows.itertuples()]
    return "Counted nowhere:\n\n" + lines(texts) if texts else ""


def conclusions(configs: pd.DataFrame, exports: pd.DataFrame) -> list[str]:
    """What the tests of a sweep's by_config rows say, a sentence for each config and one for the smallest good file."""
    texts = []
    for row in configs[configs.delta.notna()].itertuples():
        delta = format_interval(row.delta, row.half, ".4f")
        if row.verdict in ("better", "worse"):
            texts.append(f"**{md(row.arm)}** is {row.verdict} than the baseline run: {delta} bpb.")
        elif row.verdict == "not significant":
            found = "" if pd.isna(row.detectable) else f"; {row.detectable:.4f} would have been found nine times in ten"
            texts.append(f"**{md(row.arm)}**: no difference found, {delta} bpb{found}.")
    for row in exports[exports.verdict.ne("worse") & exports.half.notna()].nsmallest(1, "total_bytes").itertuples():
        delta = format_interval(row.delta, row.half, ".4f")
        name = f"**{md(row.arm)}**"
        texts.append(
            f"{name} is the smallest file not found worse than its run: {row.total_bytes:,} bytes, {delta} bpb."
        )
    return texts


def best_widths(rows: pd.DataFrame) -> list[str]:
    """Where bits per weight are best at one size of file, a sentence per cap and steps. rows: of analysis.widths."""
    texts = []
    for (cap, steps), own in rows.groupby(["cap_bytes", "steps"]):
        best = own[own.best].iloc[0]
        end = "" if own.bits.min() < best.bits < own.bits.max() else ", at the end of what was tried"
        texts.append(
            f"At {cap:,} bytes after {steps[1]:,} steps the best of {len(own)} sizes is **{md(best.arm)}**: "
            f"{best.bits:.1f} bits per weight of {best.parameters:,.0f}, {best.bpb:.4f} bpb{end}."
        )
    return texts


def unclean_comparisons(rows: pd.DataFrame, group: pd.DataFrame, changes: dict[str, list[str]]) -> list[str]:
    """One sentence per config of a sweep that did not change just what its file says. changes: of sweep.json."""
    texts = []
    for arm, own in rows[rows.kind == "train"].groupby("arm"):
        if own.code.nunique() > 1:
            parts = [f"{md(', '.join(one.runs))} ({short_code(one.code)})" for one in own.itertuples()]
            texts.append(f"**{md(arm)}: made by several versions of the code**, not pooled: {'; '.join(parts)}.")
    changed = rows[~rows.is_baseline & rows.arm.isin(changes.keys())]
    for label, configs in changed.groupby(seed_groups.baseline_of(rows, changed)):
        (baseline,) = rows.loc[[label]].itertuples()
        base = {int(group.seed[i]): group.path[i] for i in reversed(baseline.index)}
        for config in configs.itertuples():
            problems = {}
            for i in config.index:
                differs = diff.between(group.path[i], base.get(int(group.seed[i]), group.path[baseline.index[0]]))
                own = set(changes.get(baseline.arm, [])) & set(differs.setting)
                if problem := diff.judge(differs, ({*changes[config.arm]} | own) - {"seed"}):
                    problems.setdefault(problem, []).append(group.run[i])
            for problem, names in problems.items():
                texts.append(f"**{md(', '.join(names))}: not a clean comparison**: {md(problem)}.")
    return texts


def sampled(rows: pd.DataFrame) -> str:
    """The texts of a sample as a list, each on one line; '' without texts."""
    return lines([md(text) for text in (rows.text if "text" in rows else [])])


def about_sweep(folder: Path) -> str:
    """A sweep's question, or that its sweep.json is damaged."""
    about = read_about(folder)
    if about is None and (folder / "sweep.json").exists():
        return "**sweep.json is damaged**: the next `pgolf sweep` writes it; until then no baseline run is known."
    return md((about and about.question) or "")


def describe_search(trials: pd.DataFrame) -> list[str]:
    """How a search's trials ended, and its best against its baseline. trials: of search.trials.trial_table."""
    counts = trials.state.replace({"same": "of knobs tried before", "refused": "not trained"}).value_counts()
    over = int(((trials.state == "complete") & (trials.over > 0)).sum())
    said = [f"{len(trials):,} trials: " + ", ".join(f"{count:,} {state}" for state, count in counts.items())]
    said += [f"{over:,} files are over a limit, so no answer"] * bool(over)
    answers = trials[(trials.state == "complete") & (trials.over <= 0)]
    for best in answers.sort_values("bpb")[:1].itertuples():
        text = f"best by its one seed: **{md(best.run)}**, {best.bpb:.4f} bpb in {best.bytes:,.0f} bytes"
        base = answers[answers.is_baseline & (answers.run != best.run)]
        said.append(text + "".join(f"; {md(own.run)}: {own.bpb:.4f} in {own.bytes:,.0f}" for own in base.itertuples()))
    for why, own in trials[trials.state == "refused"].groupby(trials.why.map(_reason)):
        said.append(f"not trained: {md(listed(list(own.run), 5))}, {md(why)}")
    return said


def _reason(why: str) -> str:
    """Why a trial was not trained, in few words and alike for all of one reason."""
    return "forecast over the cap" if why.startswith("forecast ") else shorten(why.split(":")[0], 80, placeholder=" …")


def not_comparable(title: str, groups: int, rows: pd.DataFrame, about: About) -> str:
    """What it means for one group's rows that a sweep is in several comparison groups; '' if it is in one."""
    lost = bool(about.control) and not rows.is_baseline.any()
    more = " Its baseline run was scored on other text or in other windows: nothing can be said between them."
    return "" if groups < 2 else f"**{md(title)}**: not comparable with the others of this sweep.{more * lost}"


def describe_leaders(leaders: pd.DataFrame, rows: pd.DataFrame, group: pd.DataFrame) -> list[str]:
    """Why each of seed_groups.leaders leads, and by how much. rows: of seed_groups.candidates."""
    texts = [] if len(leaders) else [f"{len(group):,} runs, and none fits its cap: no leader."]
    for leader in leaders.itertuples():
        first = rows.loc[leader.config]
        files = ", ".join(f"{md(group.run[i])} (seed {group.seed[i]:.0f}) {group.bpb[i]:.4f}" for i in first["index"])
        text = f"**{md(first.sweep)}/{md(first.arm)}** leads under {leader.cap_bytes:,} bytes: {first.bpb:.4f} bpb in "
        text += (
            f"{first.total_bytes:,} bytes, the lowest upper bound of {leader.candidates} that fit ({leader.bound:.4f})"
        )
        text += f"{', from one seed' if len(set(first.seeds)) == 1 else ''}; all its runs: {files}."
        texts.append(text)
        if leader.second is not None and not pd.isna(leader.second):
            second = rows.loc[leader.second]
            delta = format_interval(leader.delta, leader.half, ".4f")
            texts.append(f"Next: {md(second.sweep)}/{md(second.arm)}, {delta} bpb. {_how_sure(leader)}")
    return texts


def _how_sure(leader) -> str:
    if leader.verdict == "not known":
        lead = f"Whether the lead is significant is not known: {leader.method}."
    else:
        word = "" if leader.verdict == "worse" else "not "
        lead = f"The lead is {word}significant ({leader.method}, p {leader.p:.2g})."
    rule = "not decided: that asks for several seeds of both"
    if not pd.isna(leader.record_p):
        rule = f"{'a' if leader.record else 'no'} record: p {leader.record_p:.2g}"
    return f"{lead} By the challenge's rule (0.005 nats at p < 0.01) it is {rule}."


def describe_repeats(rows: pd.DataFrame) -> list[str]:
    """What seed_groups.repeats says of each track, time-limited or not."""
    if rows.empty:
        return ["No run was repeated with an equal seed yet: `repeats: 2` in a sweep file does it."]
    texts = []
    for (track, limited), own in rows.groupby(["track", "time_limited"]):
        worst = own.iloc[own.spread.to_numpy().argmax()]
        found = f"zero spread{' and all artifacts of a set are the same file' if own.same_file.all() else ''}"
        if worst.spread:
            why = ": their time limit ends them at different steps" if limited else ", and they must not"
            found = f"**they differ by up to {worst.spread:.4f} bpb** ({md(listed(worst.places, 4))}){why}"
        text = f"{md(track or 'no track')}, {'time-limited' if limited else 'fixed steps'}: {own.n.sum()} runs in "
        texts.append(f"{text}{len(own)} sets of equal knobs and seed; {found}.")
    return texts


def noise_known(noise: pd.DataFrame) -> str:
    """'' if several seeds tell the noise. noise: of tables.seed_noise."""
    known = len(noise) and not noise.repeats.all()
    return "" if known else "**No config was trained with several seeds yet: the seed noise is not known.**"


def scored_on(title: str, links: str) -> str:
    return f"Scored on {md(title)}." + (f" Notebooks: {links}." if links else "")


def describe_map(rows: pd.DataFrame, link: str) -> str:
    """How a sensitivity stage changed its tensors, or that it is too old to draw."""
    if not is_map(rows):
        return f"{link} is of an older version; delete that folder and run it again."
    text = f"{link}: each of {len(rows) - 1} tensors changed by {md(rows.change.iloc[0])}. "
    return f"{text}Spearman rank correlation of estimated and exact rise of bpb: {rank_correlation(rows):.2f}."


def is_map(rows: pd.DataFrame) -> bool:
    return {"estimated_delta_bpb", "delta_half"} <= set(rows)


def findings(folder: Path) -> list[str]:
    """Rules that the records of a sweep violate, as `pgolf import-record` left them in its folder."""
    found = []
    for path in sorted(folder.glob("legality_*.json")):
        verdicts = (read_json(path) or {}).get("verdicts")
        for verdict in verdicts if isinstance(verdicts, list) else ():
            if isinstance(verdict, dict) and verdict.get("outcome") == "fail":
                record = path.stem.removeprefix("legality_")
                found.append(md(f"{record}, {verdict.get('rule')}: {verdict.get('found')}"))
    return found


def remarks(logs: pd.DataFrame) -> list[str]:
    """What is odd about imported logs, and where they disagree with what was claimed."""
    found = [(run.run, read_json(run.path / "import.json") or {}) for run in logs.itertuples()]
    return [
        md(f"{run}: {text}")
        for run, log in found
        for kind in ("flags", "disagreements")
        for text in sentences_in(log, kind)
    ]


def transfer_answer(verdicts: pd.DataFrame, scales: Sequence[str]) -> str:
    """How many arms of a study transfer, flip or are unknown, and how many signs agree. verdicts: of transfer."""
    counts = verdicts.verdict.value_counts()
    told = ", ".join(f"{counts.get(word, 0)} {word}" for word in ("transfers", "flips", "unknown"))
    named = md(listed(verdicts.arm[verdicts.verdict.ne("unknown")].tolist(), 12)) or "none"
    signs = f"the sign of the estimate is the same everywhere for {verdicts.agree.sum()}"
    return f"{len(verdicts)} arms at {md(listed(scales, 6))}: {told}; known: {named}; {signs}."


def law_found(law) -> str:
    """The numbers of a scaling.Law with their intervals."""
    told = ", ".join(
        f"{name} {value:.3g} ({low:.3g} to {high:.3g})" for name, (value, low, high) in law.ranges().items()
    )
    text = f"bpb = E + A · N^−α + B · D^−β: {told}; one run lies {law.noise:.2%} from it (rms)."
    low, high = law.ranges()["E"][1:]
    return text + " These lengths do not tell E, so the law reaches no further than they do." * bool(low < high / 10)


def forecast_record(rows: pd.DataFrame, what: str) -> str:
    """How good forecasts were. rows: of analysis.scaling.held_out or extrapolated."""
    close, median = (rows.error.abs() <= 0.01).mean(), rows.error.abs().median()
    return (
        f"{len(rows)} {what}: {close:.0%} within 1 % of the true score, median error {median:.2%}, "
        f"largest {rows.error.abs().max():.2%}; the 95 % interval holds {rows.covered.mean():.0%}."
    )
