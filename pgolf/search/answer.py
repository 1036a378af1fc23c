"""What a search found: its finalists trained again with new seeds, the answer as a sentence, trials as a table."""

import math
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import special

from pgolf.analysis import frontier, seed_groups, statistics
from pgolf.runs.directory import is_held
from pgolf.runs.table import load_runs
from pgolf.search.search_file import Search
from pgolf.search.study import JOURNAL, Study, open_journal, outcome_of
from pgolf.search.trainings import OpenPool, of_trials
from pgolf.sweeps.jobs import Failure
from pgolf.sweeps.runner import run_checked
from pgolf.sweeps.sweep_file import Sweep
from pgolf_core.config import shown

RESAMPLES = 200  # of trials, for the interval of a knob's importance
TOP = 0.25  # share of trials that count as good: an important knob's values differ there from those of all
FEWEST = 8  # complete trials that importances are computed from
SUFFIX = "-finalists"  # of the sweep of them: the trials' own scores, by which they were chosen, are not among it


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
        best = again.sort_values("bytes" if keys.objective == "bytes" else "bpb").iloc[0]
        run, values = best.arm, known[best.arm][0]
        said = (
            f"{best.bpb:.4f} ± {best.ci:.4f} bpb over {best.n} new seeds in {best.total_bytes:,} of {keys.cap:,} bytes"
        )
        if not best.is_baseline and search.baseline:
            half = "" if math.isnan(best.half) else f" ± {best.half:.4f}"
            said += f"; {best.delta:+.4f}{half} against {search.baseline}, {best.verdict}"
    knobs = ", ".join(f"{knob}={shown(value)}" for knob, value in values.items())
    return f"best of {search.name}: {run}, {said}. {knobs}"


def _again(search: Search) -> pd.DataFrame | None:
    """seed_groups.by_config of the finalists that fit, with half of the 95 % interval of their mean; None without."""
    runs = load_runs(search.directory.with_name(search.name + SUFFIX))
    groups = frontier.comparison_groups(runs)
    if not groups:
        return None
    table = seed_groups.by_config(groups[0][1])
    table = table[~table.over_cap.astype(bool)]
    t = [special.stdtrit(n - 1, 1 - statistics.ALPHA / 2) if n > 1 else math.nan for n in table.n]
    return table.assign(ci=t * table.sd / np.sqrt(table.n)) if len(table) else None


def trial_table(folder: Path) -> pd.DataFrame:
    """One row per trial of the search in a folder: number, run, state, is_baseline, the Outcome, every knob of space.

    state: also running, and same, of a trial with the knobs of an earlier one. Raises SearchError without Optuna.
    """
    study, rows = open_journal(folder), []
    for trial in study.get_trials(deepcopy=False):
        outcome = outcome_of(trial)
        run = trial.user_attrs.get("run", "")
        row = {"number": trial.number, "run": run, "is_baseline": run == study.user_attrs.get("baseline")}
        row |= vars(outcome) if outcome else {"state": trial.state.name.lower()}
        rows.append(row | {"state": "same" if row.get("same_as") else row["state"]} | trial.params)
    return pd.DataFrame(rows)


def knobs_of(folder: Path) -> list[str]:
    """Knobs of the space of the search in a folder."""
    return list(open_journal(folder).user_attrs["search"]["space"])


def searches(root: Path) -> list[Path]:
    """Folders of searches: root itself, or those in it."""
    return sorted(path.parent for path in [*root.glob(JOURNAL), *root.glob(f"*/{JOURNAL}")])


def importances(folder: Path) -> pd.DataFrame:
    """How much each knob decides whether a trial is among the best quarter: PED-ANOVA over complete trials, in shares.

    Columns: knob, importance, low and high (5th and 95th percentile over resampled trials), chance (95th percentile
    with the scores shuffled: a knob without effect is below it). The most important first; no rows of few trials.
    """
    trials = [trial for trial in open_journal(folder).get_trials() if trial.state.name == "COMPLETE"]
    scores = np.array([outcome_of(trial).bpb for trial in trials])
    knobs = sorted({knob for trial in trials for knob in trial.params})
    columns = ["knob", "importance", "low", "high", "chance"]
    if len(trials) < FEWEST:
        return pd.DataFrame(columns=columns)
    random = np.random.default_rng(0)
    places = [random.integers(len(trials), size=len(trials)) for _ in range(RESAMPLES)]
    resampled = [_ped_anova([trials[i] for i in own], scores[own], knobs) for own in places]
    shuffled = [_ped_anova(trials, random.permutation(scores), knobs) for _ in range(RESAMPLES)]
    low, high = np.quantile(resampled, [0.05, 0.95], axis=0)
    whole = [knobs, _ped_anova(trials, scores, knobs), low, high, np.quantile(shuffled, 0.95, axis=0)]
    table = pd.DataFrame(dict(zip(columns, whole, strict=True)))
    return table.sort_values("importance", ascending=False, ignore_index=True)


def _ped_anova(trials: list, scores: np.ndarray, knobs: list[str]) -> np.ndarray:
    """Importance of each knob, as a share of their sum."""
    import optuna

    with warnings.catch_warnings(action="ignore"):
        study = optuna.create_study()
        for trial, score in zip(trials, scores, strict=True):
            study.add_trial(
                optuna.trial.create_trial(value=score, params=trial.params, distributions=trial.distributions)
            )
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=TOP)
        active = [knob for knob in knobs if any(knob in trial.params for trial in trials)]
        found = optuna.importance.get_param_importances(study, evaluator=evaluator, params=active)
    return np.array([found.get(knob, 0.0) for knob in knobs])
