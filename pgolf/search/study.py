"""The Optuna study of a search, in a journal that several processes share.

A process holds a lock file per trial that it works on. The lock of a dead process is free, so another process takes the
trial over, with the same knobs and run. A configuration depends on the trials before it and on sampler_seed alone, so a
killed search continues with the configurations that it would have tried.
"""

import math
import os
import warnings
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import filelock
import numpy as np

from pgolf.search.search_file import Search, SearchError, Values

if TYPE_CHECKING:
    import optuna

JOURNAL, LOCKS = "search.journal", ".trials"
MAX_LINE = 65_536  # bytes of a line of the journal
OF_SPACE = ("track", "base", "space", "objective", "cap", "max_bpb")  # keys that must not change within a journal
STARTUP = 10  # random trials before TPE
PRUNED_FROM = 1 / 3  # share of the steps: earlier, curves still cross
PRUNER_STARTUP, REDUCTION = 5, 3  # complete trials before median prunes; asha keeps the best third


@dataclass(frozen=True)
class Outcome:
    """How a trial ended. state: complete; pruned; refused, never trained; failed, because of its knobs if over > 0."""

    state: str
    bpb: float | None = None  # score of the file; of a pruned trial its last validation
    bytes: int | None = None  # size of the file; of a refused trial its forecast
    over: float = -1.0  # relative excess over its limit; above 0 it cannot be the answer
    seconds: float = 0.0
    why: str = ""
    same_as: str = ""  # the earlier run with the same knobs that has this outcome


@dataclass(frozen=True, eq=False)
class Taken:
    """A trial that this process works on and holds the lock of, until its outcome is told."""

    trial: "optuna.Trial"
    run: str
    values: dict  # knobs of space
    lock: filelock.FileLock


class Study:
    """The study of a search. Raises SearchError if its journal is of another space, or Optuna is not installed."""

    def __init__(self, search: Search):
        optuna = _optuna()
        self.search, self.folder = search, search.directory
        self.locks = self.folder / LOCKS
        self.locks.mkdir(parents=True, exist_ok=True)
        self._lock = filelock.FileLock(self.locks / "study.lock")
        with self._lock, warnings.catch_warnings(action="ignore"):
            directions = ["minimize"] * (2 if search.keys.objective == "both" else 1)
            self.study = optuna.create_study(
                storage=_storage(self.folder), study_name=search.name, directions=directions, load_if_exists=True,
                pruner=_pruner(search), sampler=_sampler(search, 0),
            )  # fmt: skip
            self._check_same()
            queued = {trial.user_attrs.get("run"): trial.system_attrs.get("fixed_params") for trial in self.trials()}
            for run, values in search.enqueued.items():
                if queued.get(run, values) != values:
                    raise SearchError(f"{self.folder / JOURNAL}: {run} was begun with other knobs; rename it")
                if run not in queued:
                    self.study.enqueue_trial(values, user_attrs={"run": run})

    def _check_same(self) -> None:
        keys = self.search.keys.model_dump(mode="json")
        ours = {name: keys[name] for name in OF_SPACE} | {"environment": self.search.outside}
        theirs = self.study.user_attrs.get("search", {})
        if differ := [name for name in ours if theirs.get(name, ours[name]) != ours[name]]:
            raise SearchError(
                f"{self.folder / JOURNAL}: begun with another {', '.join(differ)}; give the search another name"
            )
        self.study.set_user_attr("search", ours)
        self.study.set_user_attr("baseline", self.search.baseline)

    def trials(self) -> list["optuna.trial.FrozenTrial"]:
        return self.study.get_trials(deepcopy=False)

    def take(self) -> Taken | None:
        """A trial to work on: one whose process died, else the next; None if the budget is spent."""
        optuna = _optuna()
        with self._lock, warnings.catch_warnings(action="ignore"):
            trials = self.trials()
            for frozen in trials:
                if frozen.state == optuna.trial.TrialState.RUNNING and (lock := self._held(frozen.number)):
                    self.study.sampler = _sampler(self.search, frozen.number)
                    return self._taken(optuna.Trial(self.study, frozen._trial_id), lock)
            if self._is_spent(trials):
                return None
            waiting = [frozen.number for frozen in trials if frozen.state == optuna.trial.TrialState.WAITING]
            number = min(waiting, default=len(trials))
            self.study.sampler = _sampler(self.search, number)
            lock = self._held(number)
            return self._taken(self.study.ask(), lock)

    def _held(self, number: int) -> filelock.FileLock | None:
        """The lock of a trial, acquired; None if a process holds it."""
        lock = filelock.FileLock(self.locks / f"{number}.lock")
        with suppress(filelock.Timeout):
            lock.acquire(timeout=0)
            return lock
        return None

    def _taken(self, trial: "optuna.Trial", lock: filelock.FileLock) -> Taken:
        _ = trial.relative_params  # drawn once, before any knob

        def suggest(knob: str, values: Values) -> object:
            # Own random numbers per knob: after a kill, knobs that are stored already draw none.
            self.study.sampler = _sampler(self.search, trial.number, knob)
            return _suggest(trial, knob, values)

        values = self.search.choose(suggest)
        run = trial.user_attrs.get("run") or f"trial{trial.number:03}"
        trial.set_user_attr("run", run)
        return Taken(trial, run, values, lock)

    def _is_spent(self, trials: list["optuna.trial.FrozenTrial"]) -> bool:
        keys = self.search.keys
        begun = [trial for trial in trials if trial.state.name != "WAITING"]
        told = [outcome for trial in begun if (outcome := outcome_of(trial))]
        trained = len(begun) - sum(outcome.state == "refused" or bool(outcome.same_as) for outcome in told)
        hours = sum(outcome.seconds for outcome in told) / 3600
        limits = [(len(begun), self.search.most_trials), (trained, keys.trainings), (hours, keys.hours)]
        limits.append((hours * (keys.price_per_hour or 0), keys.money))
        return any(limit is not None and used >= limit for used, limit in limits)

    def is_over(self) -> bool:
        """True once the budget is spent and no trial runs, in any process."""
        trials = self.trials()
        return self._is_spent(trials) and not any(trial.state.name == "RUNNING" for trial in trials)

    def same(self, taken: Taken) -> Outcome | None:
        """The outcome of an earlier trial of the same knobs."""
        earlier = [trial for trial in self.trials() if trial.number < taken.trial.number]
        for trial in earlier:
            if trial.params == taken.values and (outcome := outcome_of(trial)):
                return replace(outcome, seconds=0.0, same_as=outcome.same_as or trial.user_attrs["run"])
        return None

    def behind(self, taken: Taken, step: int, bpb: float) -> bool:
        """Report the validation of a step; True if the pruner stops the trial."""
        if self.search.keys.objective == "both":  # Optuna keeps no curves of two objectives
            return False
        with warnings.catch_warnings(action="ignore"):  # a step that was reported before a kill
            taken.trial.report(bpb, step)
        return taken.run not in self.search.enqueued and taken.trial.should_prune()

    def tell(self, taken: Taken, outcome: Outcome) -> None:
        """Store the outcome of a trial and release its lock."""
        states = _optuna().trial.TrialState
        objectives = {"bpb": [outcome.bpb], "bytes": [outcome.bytes], "both": [outcome.bpb, outcome.bytes]}
        with self._lock, warnings.catch_warnings(action="ignore"):
            taken.trial.set_user_attr("outcome", asdict(outcome))
            if outcome.state == "failed" and outcome.over <= 0:
                self.study.tell(taken.trial, state=states.FAIL)
            else:
                taken.trial.set_constraint("over", outcome.over)
                values = objectives[self.search.keys.objective] if outcome.state == "complete" else None
                state = states.PRUNED if values is None else states.COMPLETE
                self.study.tell(taken.trial, values, state=state)
        taken.lock.release()

    def answers(self) -> list[tuple[str, dict, Outcome]]:
        """Run, knobs and outcome of trials within the limits, the best first; objective both: the Pareto front."""
        found = []
        for trial in self.trials():
            outcome = outcome_of(trial)
            if outcome and outcome.state == "complete" and outcome.over <= 0 and not outcome.same_as:
                found.append((trial.user_attrs["run"], trial.params, outcome))
        by = "bytes" if self.search.keys.objective == "bytes" else "bpb"
        found.sort(key=lambda one: getattr(one[2], by))
        if self.search.keys.objective == "both":
            sizes = [one[2].bytes for one in found]
            found = [one for i, one in enumerate(found) if one[2].bytes < min(sizes[:i], default=one[2].bytes + 1)]
        return found


def outcome_of(trial: "optuna.trial.FrozenTrial") -> Outcome | None:
    """How a trial ended; None while it runs or waits."""
    return Outcome(**trial.user_attrs["outcome"]) if trial.state.is_finished() else None


def _optuna():
    """Optuna, quiet. SearchError without it."""
    try:
        import optuna
    except ImportError as error:
        raise SearchError("a search needs Optuna: pip install 'pgolf[search]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


class _JournalLock:
    """Optuna's interface of a lock. A killed process does not keep it, and its last line, if torn, is dropped."""

    def __init__(self, path: Path):
        self.path, self.lock = path, filelock.FileLock(path.parent / LOCKS / "journal.lock")

    def acquire(self) -> bool:
        self.lock.acquire()
        with open(self.path, "rb+") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - MAX_LINE))
            if not (tail := file.read()).endswith(b"\n"):
                file.truncate(size - len(tail) + tail.rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        self.lock.release()


def _storage(folder: Path) -> "optuna.storages.JournalStorage":
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    path = folder / JOURNAL
    try:
        return JournalStorage(JournalFileBackend(str(path), lock_obj=_JournalLock(path)))
    except (ValueError, KeyError) as error:
        raise SearchError(f"{path}: damaged ({error}); restore it, or give the search another name") from error


def open_journal(folder: Path) -> "optuna.Study":
    """The study of the search in a folder, for reading. Raises SearchError of a journal that is damaged or empty."""
    optuna, storage = _optuna(), _storage(folder)
    studies = [optuna.load_study(study_name=one.study_name, storage=storage) for one in storage.get_all_studies()]
    if not studies or "search" not in studies[0].user_attrs:
        raise SearchError(f"{folder / JOURNAL}: no search has begun in it")
    return studies[0]


def _sampler(search: Search, number: int, knob: str = "") -> "optuna.samplers.TPESampler":
    """The sampler of one trial, or of one of its knobs; its RNG depends on sampler_seed, trial and knob alone."""
    conditional = any(values.when for values in search.keys.space.values())
    seed = int(np.random.SeedSequence([search.keys.sampler_seed, number, *knob.encode()]).generate_state(1)[0])
    return _optuna().samplers.TPESampler(seed=seed, multivariate=True, group=conditional, n_startup_trials=STARTUP)


def _pruner(search: Search) -> "optuna.pruners.BasePruner":
    pruners, every = _optuna().pruners, search.defaults["val_loss_every"]
    first = every and math.ceil(PRUNED_FROM * search.defaults["iterations"] / every) * every
    if search.pruner == "median":
        return pruners.MedianPruner(n_startup_trials=PRUNER_STARTUP, n_warmup_steps=first)
    if search.pruner == "asha":
        return pruners.SuccessiveHalvingPruner(min_resource=first, reduction_factor=REDUCTION)
    return pruners.NopPruner()


def _suggest(trial: "optuna.Trial", knob: str, values: Values) -> object:
    if values.choices is not None:
        return trial.suggest_categorical(knob, values.choices)
    if type(values.low) is int:
        return trial.suggest_int(knob, values.low, values.high, step=int(values.step or 1), log=values.log)
    return trial.suggest_float(knob, values.low, values.high, step=values.step, log=values.log)
