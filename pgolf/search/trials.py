"""Trials of a search as a table, and the importance of its knobs: read from the journal, without torch."""

import warnings
from dataclasses import fields
from pathlib import Path

import numpy as np
import pandas as pd

from pgolf.search.study import JOURNAL, Outcome, open_journal, outcome_of

RESAMPLES = 100  # bootstrap samples of the trials, for the interval of an importance
TOP = 0.25  # PED-ANOVA's target quantile: share of trials that count as good
FEWEST = 8  # complete trials, below which no importances are computed
SUFFIX = "-finalists"  # ends the name of their sweep, which holds no score by which they were chosen


def trial_table(folder: Path) -> pd.DataFrame:
    """One row per trial of the search in a folder: number, run, state, is_baseline, the Outcome, every knob of space.

    state: also running, and same, of a trial with the knobs of an earlier one. Raises SearchError without Optuna.
    """
    study, rows = open_journal(folder), []
    columns = ["number", "run", "is_baseline", *(field.name for field in fields(Outcome)), *_space(study)]
    for trial in study.get_trials(deepcopy=False):
        outcome = outcome_of(trial)
        run = trial.user_attrs.get("run", "")
        row = {"number": trial.number, "run": run, "is_baseline": run == study.user_attrs.get("baseline")}
        row |= vars(outcome or Outcome(trial.state.name.lower()))
        rows.append(row | {"state": "same" if row["same_as"] else row["state"]} | trial.params)
    return pd.DataFrame(rows, columns=columns)


def knobs_of(folder: Path) -> list[str]:
    """Knobs of the space of the search in a folder."""
    return _space(open_journal(folder))


def _space(study) -> list[str]:
    return list(study.user_attrs["search"]["space"])


def searches(root: Path) -> list[Path]:
    """Folders of searches: root itself, or those in it."""
    return sorted(path.parent for path in [*root.glob(JOURNAL), *root.glob(f"*/{JOURNAL}")])


def importances(folder: Path) -> pd.DataFrame:
    """Importance of each knob for being among the best quarter of trained trials (PED-ANOVA), the largest first.

    A pruned trial counts as worse than all complete ones. Columns: knob, importance (share of their sum), low and high
    (5th and 95th percentile over resampled trials), chance (95th percentile under shuffled scores: a knob without
    effect lies below it). Empty below FEWEST complete trials, and where no knob tells trials apart.
    """
    trials = [trial for trial in open_journal(folder).get_trials() if trial.state.is_finished()]
    ended = [(trial, outcome_of(trial)) for trial in trials if outcome_of(trial).state in ("complete", "pruned")]
    trials = [trial for trial, _ in ended]
    complete = [outcome.bpb for _, outcome in ended if outcome.state == "complete"]
    worst = max(complete, default=0.0) + 1
    scores = np.array([outcome.bpb if outcome.state == "complete" else worst for _, outcome in ended])
    knobs = sorted({knob for trial in trials for knob in trial.params})
    columns = ["knob", "importance", "low", "high", "chance"]
    if len(complete) < FEWEST:
        return pd.DataFrame(columns=columns)
    random = np.random.default_rng(0)
    places = [random.integers(len(trials), size=len(trials)) for _ in range(RESAMPLES)]
    resampled = [_ped_anova([trials[i] for i in own], scores[own], knobs) for own in places]
    shuffled = [_ped_anova(trials, random.permutation(scores), knobs) for _ in range(RESAMPLES)]
    found = _ped_anova(trials, scores, knobs)
    shares = [own / own.sum() for own in resampled if own.sum()]
    if not shares:
        return pd.DataFrame(columns=columns)
    low, high = np.quantile(shares, [0.05, 0.95], axis=0)
    whole, chance = found.sum() or 1.0, np.quantile(shuffled, 0.95, axis=0)
    rows = [knobs, found / whole, low, high, chance / whole]
    table = pd.DataFrame(dict(zip(columns, rows, strict=True)))
    return table.sort_values("importance", ascending=False, ignore_index=True)


def _ped_anova(trials: list, scores: np.ndarray, knobs: list[str]) -> np.ndarray:
    """Importance of each knob: the Pearson divergence of its values among the best from those among all."""
    import optuna

    with warnings.catch_warnings(action="ignore"):
        study = optuna.create_study()
        for trial, score in zip(trials, scores, strict=True):
            study.add_trial(
                optuna.trial.create_trial(value=score, params=trial.params, distributions=trial.distributions)
            )
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=TOP)
        active = [knob for knob in knobs if any(knob in trial.params for trial in trials)]
        found = optuna.importance.get_param_importances(study, evaluator=evaluator, params=active, normalize=False)
    return np.array([found.get(knob, 0.0) for knob in knobs])
