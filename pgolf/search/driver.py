"""The loop of a search: take a trial, train or refuse it, prune it, tell the sampler, until the budget is spent.

Any number of processes may run it for one search at once.
"""

import time
from collections.abc import Callable
from typing import Protocol

from pgolf.search.search_file import Search, SearchError
from pgolf.search.study import Outcome, Study, Taken
from pgolf_core.config import ConfigError, RunConfig

POLL_SECONDS = 0.5
MOST_FAILURES = 3  # in a row and not because of knobs: a full disk would use up the whole budget


class Evaluator(Protocol):
    """Scores trials: Trainings, or a surrogate of them. Every method names a trial by its run."""

    def has_room(self) -> bool:
        """True if another trial can begin."""

    def begin(self, run: str, config: RunConfig) -> Outcome | None:
        """Begin a trial; its outcome at once if it needs no training."""

    def curve(self, run: str) -> list[tuple[int, float]]:
        """Step and bits per byte of each validation so far."""

    def ended(self, run: str) -> Outcome | None:
        """The outcome of a trial that has begun; None while it goes on."""

    def prune(self, run: str, why: str) -> Outcome:
        """End a trial whose curve is behind; its outcome, of a complete trial if it has just completed."""

    def stop(self, run: str) -> None:
        """End the processes of a trial that is to continue later."""


def run_search(search: Search, evaluator: Evaluator, say: Callable[[str], None] = print) -> Study:
    """Try configurations until the budget is spent and no process works on a trial; returns the study.

    Raises SearchError after MOST_FAILURES failures in a row; the same command continues the search.
    """
    study, active, failures = Study(search), {}, 0  # active: trial -> last step compared
    try:
        while True:
            while evaluator.has_room() and (taken := study.take()):
                active[taken] = 0
                if outcome := study.same(taken) or _begin(search, evaluator, taken):
                    _tell(study, active, taken, outcome, say)
            if not active and study.is_over():
                return study
            time.sleep(POLL_SECONDS)
            for taken in list(active):
                outcome = evaluator.ended(taken.run) or _prune(study, evaluator, active, taken)
                if outcome:
                    _tell(study, active, taken, outcome, say)
                    failures = failures + 1 if outcome.state == "failed" and outcome.over <= 0 else 0
                if failures == MOST_FAILURES:
                    raise SearchError(f"{failures} trainings failed in a row, the last: {outcome.why}")
    finally:
        for taken in active:
            evaluator.stop(taken.run)
            taken.lock.release()


def _begin(search: Search, evaluator: Evaluator, taken: Taken) -> Outcome | None:
    try:
        config = search.config(taken.values)
    except ConfigError as error:
        why = "; ".join(line.removeprefix("  - ") for line in str(error).splitlines()[1:])
        return Outcome("refused", over=1.0, why=why)
    return evaluator.begin(taken.run, config)


def _prune(study: Study, evaluator: Evaluator, active: dict[Taken, int], taken: Taken) -> Outcome | None:
    """The outcome of a trial that is pruned at one of its new validations; None if it continues."""
    for step, bpb in evaluator.curve(taken.run):
        if step > active[taken]:
            active[taken] = step
            if study.behind(taken, step, bpb):
                return evaluator.prune(taken.run, f"{bpb:.4f} bpb at step {step}, behind other trials there")
    return None


def _tell(study: Study, active: dict[Taken, int], taken: Taken, outcome: Outcome, say: Callable[[str], None]) -> None:
    study.tell(taken, outcome)
    del active[taken]
    if outcome.same_as:
        say(f"{taken.run:24} not trained: the knobs of {outcome.same_as}")
    elif outcome.state in ("refused", "pruned"):
        say(f"{taken.run:24} {'not trained' if outcome.state == 'refused' else 'pruned'}: {outcome.why}")
