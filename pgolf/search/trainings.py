"""Trials as runs: executed and listed in sweep.json as those of a sweep, pruned by their validation curves."""

import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import filelock

from pgolf.runs.code import code_digest
from pgolf.runs.directory import PRUNED, locked, metric_rows, read_failure, why_it_failed, write_interruption
from pgolf.runs.result import ARTIFACT, CHECKPOINT, read_result
from pgolf.search.search_file import Search, SearchError
from pgolf.search.study import LOCKS, Outcome
from pgolf.sweeps.jobs import Job, finish, say
from pgolf.sweeps.pool import CODE_CHANGED, MAX_LOST_WORKERS, LocalPool, WorkerLost
from pgolf.sweeps.runner import OpenPool, check_workers, datasets, is_complete, mark_refused, plan, pool_of, write_about
from pgolf.sweeps.sweep_file import Sweep
from pgolf.training.forecast import forecast, over_cap
from pgolf.training.resume import RESUME
from pgolf_core.config import RunConfig

OF_KNOBS = ("loss is", "all of it over cap_bytes")  # a TrainError with these words recurs with the same knobs


class Trainings:
    """The Evaluator that trains: one run per trial, on the workers of a pool."""

    def __init__(self, search: Search, pool: LocalPool):
        self.search, self.pool, self.code = search, pool, code_digest(["train.ipynb"])
        self.jobs: dict[str, Job] = {}
        self.waiting: list[Job] = []
        self.lost: Counter = Counter()
        # The monitor reads from this lock that the search runs; one of several processes holds it.
        self.lock = filelock.FileLock(search.directory / ".lock")

    def has_room(self) -> bool:
        """True if another trial can begin; waiting jobs start first. Raises SearchError after an edit of the code.

        Trials that run at the edit end before the error.
        """
        if not self.lock.is_locked:
            with suppress(filelock.Timeout):
                self.lock.acquire(timeout=0)
        self.pool.refresh()
        while self.waiting and self.pool.start(self.waiting[0]):
            self.waiting.pop(0)
        if code_digest(["train.ipynb"], fresh=True) == self.code:
            return not self.waiting and self.pool.has_room()
        if self.jobs:
            return False
        raise SearchError(CODE_CHANGED)

    def begin(self, run: str, config: RunConfig) -> Outcome | None:
        """The outcome of a run that is complete or was pruned, or whose forecast is over its cap; else it starts."""
        sweep = of_trials(self.search, {run: config})
        (job,) = plan(sweep)
        if stored := _stored(self.search, job):
            return stored
        with filelock.FileLock(self.search.directory / LOCKS / "about.lock"):
            write_about(sweep, self.search.file)
        if far := over_cap({run: config}).get(run):
            mark_refused(job.run_dir, config, far)
            size = forecast(config).bytes
            return Outcome("refused", bytes=size, over=size / config.cap_bytes - 1, why=f"forecast {far}")
        self.jobs[run] = job
        self.waiting.append(job)
        self.has_room()
        return None

    def curve(self, run: str) -> list[tuple[int, float]]:
        """Step and bpb of each validation, without the last step: pruning there saves nothing."""
        job = self.jobs[run]
        return [point for point in _validations(job) if point[0] < job.config.iterations]

    def ended(self, run: str) -> Outcome | None:
        job = self.jobs[run]
        if job in self.waiting:
            return None
        try:
            returncode = self.pool.poll(job)
        except WorkerLost as error:
            self.lost[run] += 1
            if self.lost[run] > MAX_LOST_WORKERS:
                del self.jobs[run]
                return Outcome("failed", why=f"given up after {self.lost[run]} workers; the last: {error}")
            say(f"{error}; its run {run} goes to another")
            self.waiting.append(job)
            return None
        if returncode is None:
            return None
        del self.jobs[run]
        failures = finish(job, returncode, _seconds(job))
        if outcome := _stored(self.search, job):
            return outcome
        of_knobs = why_it_failed(job.run_dir).startswith("TrainError") and any(
            words in failures[0].reason for words in OF_KNOBS
        )
        return Outcome("failed", over=1.0 if of_knobs else -1.0, seconds=_seconds(job), why=failures[0].reason)

    def prune(self, run: str, why: str) -> Outcome:
        """End the training and mark its run as pruned. Raises RunError if its processes keep the run's lock."""
        job = self.jobs.pop(run)
        self.pool.stop(job)
        with locked(job.run_dir, job.config) as run_dir:
            if read_result(run_dir) is None:
                for unfinished in (RESUME, CHECKPOINT, ARTIFACT):
                    (run_dir / unfinished).unlink(missing_ok=True)
                write_interruption(run_dir, why, PRUNED)
        return _stored(self.search, job)

    def stop(self, run: str) -> None:
        job = self.jobs.get(run)
        if job and job not in self.waiting:
            self.pool.stop(job)


def of_trials(search: Search, runs: dict[str, RunConfig], groups: dict[str, str] | None = None) -> Sweep:
    """Trials as runs of a sweep, which claims the knobs that differ from the baseline as changes. groups: see Sweep."""
    groups = groups or {run: run for run in runs}
    base = search.config(search.enqueued.get(search.baseline, {}))
    changes = {
        groups[run]: [knob for knob in search.keys.space if getattr(config, knob) != getattr(base, knob)]
        for run, config in runs.items()
    }
    return Sweep(search.name, search.keys.question, search.baseline, runs, groups, changes, True, {}, {})


def _stored(search: Search, job: Job) -> Outcome | None:
    """The outcome of a run that is complete or pruned, else None. Raises ConfigError, RunError."""
    if is_complete(job):
        result = read_result(job.run_dir)
        bpb, size = result.roundtrip_val_bpb, result.total_bytes
        if not math.isfinite(bpb):
            return Outcome("failed", over=1.0, seconds=_seconds(job), why="its score is not a number")
        return Outcome("complete", bpb, size, search.over(bpb, size), _seconds(job))
    state, why = read_failure(job.run_dir) or ("", "")
    if state != PRUNED:
        return None
    last = [bpb for _, bpb in _validations(job)][-1:] or [None]
    return Outcome("pruned", last[0], seconds=_seconds(job), why=why)


def _validations(job: Job) -> list[tuple[int, float]]:
    return [(row["step"], row["val_bpb"]) for row in metric_rows(job.run_dir) if "val_bpb" in row]


def _seconds(job: Job) -> float:
    """Seconds of the run's last attempt, its notebook's start included."""
    times = {path.name: path.stat().st_mtime for path in job.run_dir.glob("*.json")}
    end = times.get("result.json") or times.get("error.json") or time.time()
    return max(0.0, end - times.get("job.json", end))


@contextmanager
def open_trainings(search: Search, workers: int | None, open_pool: OpenPool | None) -> Iterator[Trainings]:
    """The Trainings of a search on worker processes of this machine, or on the pool that open_pool makes."""
    check_workers(workers, open_pool)
    first = {run: search.config(values) for run, values in search.enqueued.items()} or {"base": search.config({})}
    datasets(first.values())  # built once, and its problems reported before anything runs
    with pool_of(of_trials(search, first), [*first.values()], workers, open_pool) as pool:
        trainings = Trainings(search, pool)
        try:
            yield trainings
        finally:
            trainings.lock.release()
