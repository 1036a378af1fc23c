"""The answer of a search: its finalists, trained again with new seeds, and a sentence about the best of them."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd

from pgolf.analysis import frontier, seed_groups, statistics
from pgolf.runs.directory import is_held
from pgolf.runs.table import load_runs
from pgolf.search.search_file import Search
from pgolf.search.study import Outcome, Study, outcome_of
from pgolf.search.trainings import of_trials
from pgolf.search.trials import SUFFIX
from pgolf.sweeps.jobs import Failure
from pgolf.sweeps.runner import OpenPool, run_checked
from pgolf.sweeps.sweep_file import Sweep
from pgolf_core.config import shown


def finalists(search: Search, study: Study) -> Sweep | None:
    """Sweep of the best trials and the baseline, once per seed; None without finalists or without answers."""
    keys, answers = search.keys, study.answers()
    if not (keys.finalists and answers):
        return None
    chosen = {run: values for run, values, _ in answers[: keys.finalists]}
    chosen = {run: search.enqueued[run] for run in [search.baseline] if run} | chosen
    runs, groups = {}, {}
    for run, seed in itertools.product(chosen, keys.seeds):
        name = f"{run}-s{seed}"
        runs[name], groups[name] = search.config(chosen[run], seed=seed), run
    return replace(of_trials(search, runs, groups), name=search.name + SUFFIX)


def train_finalists(
    search: Search, study: Study, workers: int | None, open_pool: OpenPool | None, say: Callable[[str], None]
) -> list[Failure]:
    """Train what is missing of the finalists; nothing if another process trains them. Returns the failures."""
    sweep = finalists(search, study)
    if sweep is None:
        return []
    if is_held(sweep.directory / ".lock"):
        say(f"{sweep.name}: trained by another process")
        return []
    return run_checked(sweep, search.file, workers, open_pool)


def answer(search: Search, study: Study) -> str:
    """A sentence: the best configuration, its difference to the baseline, its knobs."""
    answers, keys = study.answers(), search.keys
    if not answers:
        limits = f"{keys.cap:,} bytes" + (f" and {keys.max_bpb:g} bpb" if keys.max_bpb else "")
        return f"{search.name}: no trial stayed within {limits}; `pgolf report` lists why"
    again = _again(search)
    run, said = _by_one_seed(search, answers) if again.empty else _by_finalists(search, again)
    trials = {trial.user_attrs.get("run"): trial for trial in reversed(study.trials())}
    ended = search.baseline in trials and outcome_of(trials[search.baseline])
    if ended and ended.over > 0:
        said += f"; the baseline {search.baseline} was over the {'limit' if search.keys.max_bpb else 'cap'}, "
        said += "nothing to compare with"
    knobs = ", ".join(f"{knob}={_rounded(value)}" for knob, value in trials[run].params.items())
    return f"best of {search.name}: {run}, {said}. {knobs}"


def _rounded(value: object) -> str:
    """A knob's value, a float with four significant digits."""
    return f"{value:.4g}" if isinstance(value, float) else shown(value)


def _by_one_seed(search: Search, answers: list[tuple[str, dict, Outcome]]) -> tuple[str, str]:
    """The best run of the search itself, and its score against the baseline's."""
    run, _, best = answers[0]
    said = f"{best.bpb:.4f} bpb in {best.bytes:,} of {search.keys.cap:,} bytes, one seed, chosen as the best"
    base = [own.bpb for name, _, own in answers if name == search.baseline != run]
    return run, said + "".join(f"; {best.bpb - bpb:+.4f} against {search.baseline}" for bpb in base)


def _by_finalists(search: Search, again: pd.DataFrame) -> tuple[str, str]:
    """The best finalist, and its score over the new seeds against the baseline's. again: of `_again`."""
    best = again.sort_values("total_bytes" if search.keys.objective == "bytes" else "bpb").iloc[0]
    said = f"{best.bpb:.4f} ± {best.ci:.4f} bpb over {best.n} new seeds in {best.total_bytes:,} of "
    said += f"{search.keys.cap:,} bytes"
    if not best.is_baseline and not math.isnan(best.delta):
        half = "" if math.isnan(best.half) else f" ± {best.half:.4f}"
        said += f"; {best.delta:+.4f}{half} against {search.baseline}, {best.verdict}"
    return best.arm, said


def _again(search: Search) -> pd.DataFrame:
    """seed_groups.by_config of the finalists within the limits, with ci: half of the 95 % interval of their mean."""
    groups = frontier.comparison_groups(load_runs(search.directory.with_name(search.name + SUFFIX)))
    if not groups:
        return pd.DataFrame()
    table = seed_groups.by_config(groups[0][1])
    fits = [search.over(bpb, size) <= 0 for bpb, size in zip(table.bpb, table.total_bytes, strict=True)]
    return table.assign(ci=statistics.t_limit(table.n - 1) * table.sd / np.sqrt(table.n))[fits]
