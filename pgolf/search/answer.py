"""The answer of a search: its finalists trained again with new seeds, and what they say in a sentence."""

import math
from collections.abc import Callable

import numpy as np
import pandas as pd
from scipy import special

from pgolf.analysis import frontier, seed_groups, statistics
from pgolf.runs.directory import is_held
from pgolf.runs.table import load_runs
from pgolf.search.search_file import Search
from pgolf.search.study import Study
from pgolf.search.trainings import OpenPool, of_trials
from pgolf.search.trials import SUFFIX
from pgolf.sweeps.jobs import Failure
from pgolf.sweeps.runner import run_checked
from pgolf.sweeps.sweep_file import Sweep
from pgolf_core.config import shown


def finalists(search: Search, study: Study) -> Sweep | None:
    """The best trials and the baseline, once per seed; None if the file asks for none or no trial is an answer."""
    keys, answers = search.keys, study.answers()
    if not (keys.finalists and answers):
        return None
    chosen = {run: values for run, values, _ in answers[: keys.finalists]}
    chosen = {run: search.enqueued[run] for run in [search.baseline] if run} | chosen
    groups = {f"{run}-s{seed}": run for run in chosen for seed in keys.seeds}
    runs = {name: search.config(chosen[run], seed=int(name.rpartition("-s")[2])) for name, run in groups.items()}
    sweep = of_trials(search, runs, groups)
    return Sweep(**vars(sweep) | {"name": search.name + SUFFIX, "baseline": search.baseline})


def train_finalists(
    search: Search, study: Study, workers: int | None, open_pool: OpenPool | None, say: Callable[[str], None]
) -> list[Failure]:
    """Train what is missing of the finalists, as a sweep; nothing if another process is at it."""
    sweep = finalists(search, study)
    if sweep is None:
        return []
    if is_held(sweep.directory / ".lock"):
        say(f"{sweep.name}: trained by another process")
        return []
    return run_checked(sweep, search.file, workers, open_pool)


def answer(search: Search, study: Study) -> str:
    """The best configuration against the baseline, with its knobs, in a sentence or two."""
    answers, keys = study.answers(), search.keys
    if not answers:
        limits = f"{keys.cap:,} bytes" + (f" and {keys.max_bpb:g} bpb" if keys.max_bpb else "")
        return f"{search.name}: no trial ended within {limits}; `pgolf report` lists why"
    again = _again(search)
    known = {run: (values, outcome) for run, values, outcome in answers}
    if again is None:
        run, values, outcome = answers[0]
        said = f"{outcome.bpb:.4f} bpb in {outcome.bytes:,} of {keys.cap:,} bytes, one seed, chosen as the best"
        base = known.get(search.baseline)
        if base and run != search.baseline:
            said += f"; {outcome.bpb - base[1].bpb:+.4f} against {search.baseline}"
    else:
        best = again.sort_values("total_bytes" if keys.objective == "bytes" else "bpb").iloc[0]
        run, values = best.arm, {trial.user_attrs.get("run"): trial.params for trial in study.trials()}[best.arm]
        said = (
            f"{best.bpb:.4f} ± {best.ci:.4f} bpb over {best.n} new seeds in {best.total_bytes:,} of {keys.cap:,} bytes"
        )
        if not best.is_baseline and search.baseline:
            half = "" if math.isnan(best.half) else f" ± {best.half:.4f}"
            said += f"; {best.delta:+.4f}{half} against {search.baseline}, {best.verdict}"
    knobs = ", ".join(f"{knob}={shown(value)}" for knob, value in values.items())
    return f"best of {search.name}: {run}, {said}. {knobs}"


def _again(search: Search) -> pd.DataFrame | None:
    """seed_groups.by_config of the finalists that are answers, with half of the 95 % interval; None without."""
    runs = load_runs(search.directory.with_name(search.name + SUFFIX))
    groups = frontier.comparison_groups(runs)
    if not groups:
        return None
    table = seed_groups.by_config(groups[0][1])
    fits = [search.over(*row) <= 0 for row in zip(table.bpb, table.total_bytes, strict=True)]
    table = table[fits]
    t = [special.stdtrit(n - 1, 1 - statistics.ALPHA / 2) if n > 1 else math.nan for n in table.n]
    return table.assign(ci=t * table.sd / np.sqrt(table.n)) if len(table) else None
