"""A sweep: notebooks executed by papermill, several at a time. Run again, it does only what is missing."""

import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path

from pgolf.data import dataset
from pgolf.disk import read_json
from pgolf.runs import directory, integrity
from pgolf.runs.code import other_code
from pgolf.runs.directory import REFUSED, check_config, hold_lock, locked, read_failure, write_interruption
from pgolf.runs.result import RunError, read_result, stored_result
from pgolf.runs.schema import About, read_about
from pgolf.runs.table import best_training_run, load_runs
from pgolf.sweeps.jobs import Failure, Job, failed, say, sweep_bar
from pgolf.sweeps.pool import LocalPool, run_jobs, worker_environments
from pgolf.sweeps.sweep_file import GIVEN, NOTEBOOKS, Sweep, SweepError, load_sweep, said_of_environment
from pgolf.training.forecast import check, over_cap
from pgolf.training.inputs import open_dataset, part_read
from pgolf_core.config import ROOT, ConfigError, RunConfig, did_you_mean, shown
from pgolf_core.files import atomic_write
from pgolf_core.rules import without_effect

LOOK_SECONDS = 1.0  # a monitor that looks holds a sweep's lock for an instant
OpenPool = Callable[[Sweep], AbstractContextManager]


def plan(sweep: Sweep) -> list[Job]:
    """One job per run. The notebook gets the resolved knobs, so a kernel's environment cannot change them."""
    return [_job(sweep, name, "train", config, sweep.train_parameters) for name, config in sweep.runs.items()]


def stage_job(sweep: Sweep, stage: str, source: str) -> Job:
    """The stage's job on the checkpoint of the run named source."""
    return _job(sweep, stage, stage, sweep.runs[source], {"source": source} | sweep.stages[stage])


def _job(sweep: Sweep, run: str, notebook: str, config: RunConfig, parameters: dict) -> Job:
    knobs = config.model_dump()
    given = {"sweep": sweep.name, "run": run, "track": knobs.pop("track"), "knobs": knobs}
    return Job(run, NOTEBOOKS / f"{notebook}.ipynb", given | parameters, sweep.directory / run, config)


def best_run(sweep: Sweep) -> str:
    """Name of this sweep's best run that fits its cap; if none does, of those allowed over it. Raises RunError."""
    table = load_runs(sweep.directory)
    table = table[table.run.isin(list(sweep.runs))]
    if table.over_cap.eq(True).all():
        table = table.assign(over_cap=~table.allow_over_cap.eq(True))
    return best_training_run(table).run


def missing(sweep: Sweep) -> tuple[list[Job], list[str]]:
    """Jobs of runs, and stages, still to run. Raises SweepError naming every directory that holds something else."""
    problems, jobs, stages = [], [], []
    for job in plan(sweep):
        try:
            if not (is_complete(job) or _is_refused(sweep, job)):
                jobs.append(job)
        except (ConfigError, RunError) as error:
            problems.append(str(error))
    for stage in sweep.stages:
        try:
            # The best run is known only once no run is missing; a finished stage is checked then.
            done = read_result(sweep.directory / stage) is not None and not jobs
            if not (done and is_stage_complete(stage_job(sweep, stage, best_run(sweep)))):
                stages.append(stage)
        except RunError as error:
            problems.append(str(error))
    if problems:
        raise SweepError(f"sweep {sweep.name}:\n" + "\n".join(f"  - {p}" for p in problems))
    return jobs, stages


def is_complete(job: Job) -> bool:
    """True if a run is done. Raises RunError if it is damaged, ConfigError if its directory has other knobs."""
    check_config(job.run_dir, job.config)
    result = read_result(job.run_dir)
    damage = "" if result is None else integrity.damage(job.run_dir, asdict(result))
    if damage and damage != "notebook.ipynb":  # the notebook is made again, from the result
        raise RunError(f"{job.run_dir}: damaged: {damage}; delete that folder to run it again")
    return result is not None and not damage


def _is_refused(sweep: Sweep, job: Job) -> bool:
    """True if an earlier call has found that the run's file would not fit."""
    failure = read_failure(job.run_dir) or ("",)
    return sweep.skips_over_cap and not job.config.allow_over_cap and failure[0] == REFUSED


def is_stage_complete(stage: Job) -> bool:
    """True if a stage's job is done. Raises RunError if it is, but on another run or with other parameters."""
    result = read_result(stage.run_dir)
    if result is None:
        return False
    source = f"{stage.parameters['sweep']}/{stage.parameters['source']}"
    if result.source != source:
        made = f"made from {result.source}, and the best run is now {source}"
        raise RunError(f"{stage.run_dir}: {made}; delete that folder")
    # Refuses a result of another training.
    stored_result(stage.run_dir, directory.RUNS / source, read_result(directory.RUNS / source))
    before = (read_json(stage.run_dir / "job.json") or {}).get("parameters", stage.parameters)
    old, new = ({k: v for k, v in dict(p).items() if k not in (*GIVEN, "source")} for p in (before, stage.parameters))
    if old != new:
        raise RunError(f"{stage.run_dir}: made with parameters {old}, not {new}; delete that folder")
    return True


def chosen(sweep: Sweep, only: Collection[str]) -> Sweep:
    """The sweep with these runs alone, each named itself or by its entry of runs: or grid:, and no stage; all if none.

    Raises SweepError naming the nearest for a name of neither.
    """
    names = {*sweep.runs, *sweep.groups.values()}
    for name in only:
        if name not in names:
            nearest = did_you_mean(name, names) or f"; there are {', '.join(sweep.runs)}"
            raise SweepError(f"--only {name}: sweep {sweep.name} has no such run{nearest}")
    runs = {run: config for run, config in sweep.runs.items() if {run, sweep.groups[run]} & {*only}}
    return replace(sweep, runs=runs, stages={}) if only else sweep


def said_of_knobs(sweep: Sweep) -> list[str]:
    """A line per knob that changes nothing as some runs set it, and per part of its text that a training reads."""
    found = defaultdict(list)
    for name, config in sweep.runs.items():
        for knob, why in without_effect(config).items():
            found[f"{knob}={shown(getattr(config, knob))} has no effect, since {why}"].append(name)
        tokens = dataset.read_about(ROOT / config.data_path).get("train", {}).get("tokens", 0)
        if part := part_read(config, tokens):
            found[part].append(name)
    return [f"warning: {line}: {', '.join(names)}" for line, names in found.items()]


def done_by_other_code(sweep: Sweep) -> list[str]:
    """One line per other code that made complete runs of this sweep. They stay, and are not pooled with new ones."""
    runs: dict[str, list[str]] = {}
    for name in [*sweep.runs, *sweep.stages]:
        result = read_result(sweep.directory / name)
        if result is not None and (made := other_code(result)):
            runs.setdefault(made, []).append(name)
    way = "they stay, and are not pooled with runs of this code; delete their folders to run them again"
    return [f"complete, {made}: {', '.join(names)}; {way}" for made, names in runs.items()]


def datasets(configs: Iterable[RunConfig]) -> dict[str, RunConfig]:
    """Fingerprint of each dataset that runs use -> a config that uses it; builds embedded corpora. Raises DataError."""
    distinct = {(c.data_path, c.tokenizer_path, c.vocab_size): c for c in configs}
    return {open_dataset(config).fingerprint: config for config in distinct.values()}


def run_sweep(
    path: str | Path,
    workers: int | None = None,
    knobs: dict | None = None,
    scale: str = "",
    seeds: list[int] | None = None,
    open_pool: OpenPool | None = None,
    ended: Callable[[str], None] = lambda run: None,
) -> list[Failure]:
    """Run what is missing of a sweep file, `workers` notebooks at a time. Returns the runs that failed.

    open_pool: makes the pool that executes the jobs, for example `partial(cluster.connect, address)`; default: worker
    processes on this machine. ended: called with the name of each run or stage that ended. A failed run does not stop
    the others; stages wait until every run is complete. Stopped or killed at any moment, the sweep continues when it is
    run again. Before anything runs it raises SweepError, DataError, RunError, or ForecastError for runs that would
    exceed their caps.
    """
    return run_checked(load_sweep(path, knobs, scale, seeds), Path(path).stem, workers, open_pool, ended)


def run_checked(
    sweep: Sweep, file: str, workers: int | None = None, open_pool: OpenPool | None = None,
    ended: Callable[[str], None] = lambda run: None,
) -> list[Failure]:  # fmt: skip
    """As run_sweep, of a sweep that was loaded, and perhaps `chosen`, from the file of this name without .yaml."""
    check_workers(workers, open_pool)
    sweep.directory.mkdir(parents=True, exist_ok=True)
    busy = f"{sweep.directory}: this sweep is running already, in another process"
    with hold_lock(sweep.directory / ".lock", LOOK_SECONDS, busy):
        for unfinished in sweep.directory.glob(".*.tmp"):  # files of a sweep that was killed
            unfinished.unlink()
        for line in (*said_of_environment(), *said_of_knobs(sweep)):
            say(line)
        jobs, stages = missing(sweep)
        for line in done_by_other_code(sweep):
            say(line)
        if _refuse(sweep, jobs):
            jobs, stages = missing(sweep)
        write_about(sweep, file)
        datasets(job.config for job in jobs)  # built once, and its problems reported before anything runs
        if not (jobs or stages):
            return []
        total = len(sweep.runs) + len(sweep.stages)
        with (
            pool_of(sweep, [job.config for job in jobs], workers, open_pool) as pool,
            sweep_bar(sweep.name, total, done=total - len(jobs) - len(stages)) as bar,
        ):
            failures = run_jobs(pool, jobs, bar, ended)
            if failures and stages:
                say(f"not run: {', '.join(stages)}; stages wait until every run is complete")
                return failures
            jobs.clear()
            for stage in stages:
                try:
                    job = stage_job(sweep, stage, best_run(sweep))
                    jobs += [] if is_stage_complete(job) else [job]
                except RunError as error:
                    failures.append(failed(stage, str(error), sweep.directory / stage))
            failures += run_jobs(pool, jobs, bar, ended)
    return failures


def check_workers(workers: int | None, open_pool: OpenPool | None) -> None:
    """SweepError if a number of workers is given to a cluster."""
    if open_pool and workers is not None:
        raise SweepError(f"workers={workers}: a cluster runs one notebook per worker that joined it; leave workers out")


def pool_of(
    sweep: Sweep, configs: list[RunConfig], workers: int | None, open_pool: OpenPool | None
) -> AbstractContextManager:
    """The pool that open_pool makes, else worker processes on this machine. Raises SweepError."""
    return open_pool(sweep) if open_pool else nullcontext(LocalPool(worker_environments(configs, workers)))


def mark_refused(run_dir: Path, config: RunConfig, far: str) -> None:
    """error.json of a run that is not to be trained. far: how far its forecast is over its cap."""
    with locked(run_dir, config):
        write_interruption(run_dir, f"not trained: forecast {far}", REFUSED)


def _refuse(sweep: Sweep, jobs: list[Job]) -> dict[str, str]:
    """Runs whose files would not fit their caps, and how far; each is marked in its folder as not to be trained.

    Raises ForecastError naming them all unless the sweep skips them.
    """
    configs = {job.name: job.config for job in jobs}
    if not sweep.skips_over_cap:
        check(configs, say)
        return {}
    refused = over_cap(configs, say)
    for name, far in refused.items():
        mark_refused(sweep.directory / name, configs[name], far)
        say(f"{name:24} not trained: over its cap")
    return refused


def write_about(sweep: Sweep, file: str) -> None:
    """sweep.json: what analysis and reports need to know of the sweep file, whose name is `file`."""
    before = read_about(sweep.directory) or About()
    # Runs of earlier seeds or of a larger file are still in the folder, so what was written about them stays.
    about = {
        "name": sweep.name, "question": sweep.question, "control": sweep.baseline, "runs": list(sweep.groups),
        "arms": before.arms | sweep.groups, "changes": before.changes | sweep.changes,
        "file": file, "family": sweep.family, "scale": sweep.scale,
        "stages": before.stages if len(sweep.runs) < len(sweep.groups) else list(sweep.stages),
    }  # fmt: skip
    atomic_write(sweep.directory / "sweep.json", json.dumps(about, indent=1))
