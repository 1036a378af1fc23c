"""A sweep → notebooks executed by papermill, several at a time. Run again, it does what is missing.

The file is sweepfile.py's; each notebook runs in a process of its own, slot.py.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from pgolf.machines.worker import start_slot
from pgolf.processes import kill_family
from pgolf.runs import directory, integrity
from pgolf.runs.directory import check_config, hold_lock
from pgolf.runs.result import RunError, read_json, read_result
from pgolf.runs.table import best_training_run, load_runs
from pgolf.sweeps.sweep_file import GIVEN, NOTEBOOKS, Stage, Sweep, SweepError, load_sweep
from pgolf.training.forecast import check
from pgolf.training.round_trip import open_dataset, stored
from pgolf_core.config import ConfigError, RunConfig
from pgolf_core.files import atomic_write

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Job:
    """One notebook to execute. run_dir complete = nothing to do."""

    name: str
    notebook: Path
    parameters: dict
    run_dir: Path
    config: RunConfig

    @property
    def output(self) -> Path:
        return self.run_dir / "notebook.ipynb"

    @property
    def log(self) -> Path:
        """What the slot and its kernel said outside of the notebook: a crash's last words."""
        return self.run_dir / "kernel.log"


@dataclass(frozen=True)
class Failure:
    run: str
    reason: str  # one line
    log: Path


# From the Sweep to jobs


def plan(sweep: Sweep) -> list[Job]:
    """A job for each run. The notebook gets the resolved knobs, so a kernel's environment cannot change them."""
    return [
        Job(
            name,
            NOTEBOOKS / "train.ipynb",
            _given(sweep, name, config) | sweep.train_parameters,
            sweep.directory / name,
            config,
        )
        for name, config in sweep.runs.items()
    ]


def stage_job(sweep: Sweep, stage: Stage, source: str) -> Job:
    """The stage's job on the checkpoint of the run named source."""
    name = stage.notebook
    config = sweep.runs[source]
    parameters = _given(sweep, name, config) | {"source": source} | stage.parameters
    return Job(name, NOTEBOOKS / f"{name}.ipynb", parameters, sweep.directory / name, config)


def _given(sweep: Sweep, run: str, config: RunConfig) -> dict:
    knobs = config.model_dump()
    return {"sweep": sweep.name, "run": run, "track": knobs.pop("track"), "knobs": knobs}


def best_run(sweep: Sweep) -> str:
    """The name of this sweep's best run that fits its cap; of those allowed over it where none does. Or RunError."""
    table = load_runs(sweep.directory)
    table = table[table.run.isin(list(sweep.runs))]
    if table.over_cap.eq(True).all():
        table = table.assign(over_cap=~table.allow_over_cap.eq(True))
    return best_training_run(table).run


def missing(sweep: Sweep) -> tuple[list[Job], list[Stage]]:
    """What is still to run. Raises SweepError naming every directory that holds something else."""
    problems, jobs = [], []
    for job in plan(sweep):
        try:
            check_config(job.run_dir, job.config)
            result = read_result(job.run_dir)
            harm = "" if result is None else integrity.damage(job.run_dir, asdict(result))
            if result is None or harm == "notebook.ipynb":  # which is made anew, from the result that is there
                jobs.append(job)
            elif harm:
                problems.append(f"{job.run_dir}: damaged: {harm}; delete that folder to run it again")
        except (ConfigError, RunError) as error:
            problems.append(str(error))
    stages = []
    for stage in sweep.stages:
        try:
            # While runs are missing the best is not known; then a finished stage is looked at when it is.
            done = read_result(sweep.directory / stage.notebook) is not None and not jobs
            if not (done and is_complete(stage_job(sweep, stage, best_run(sweep)))):
                stages.append(stage)
        except RunError as error:
            problems.append(str(error))
    if problems:
        raise SweepError(f"sweep {sweep.name}:\n" + "\n".join(f"  - {p}" for p in problems))
    return jobs, stages


def is_complete(stage: Job) -> bool:
    """Whether a stage's job is done. RunError when it is, but on another run or with other parameters."""
    result = read_result(stage.run_dir)
    if result is None:
        return False
    source = f"{stage.parameters['sweep']}/{stage.parameters['source']}"
    if result.source != source:
        raise RunError(
            f"{stage.run_dir}: made from {result.source}, and the best run is now {source}; delete that folder"
        )
    if (current := read_result(directory.RUNS / source)) is not None:
        stored(stage.run_dir, directory.RUNS / source, current)  # refuses a result of another training
    before = (read_json(stage.run_dir / "job.json") or {}).get("parameters", stage.parameters)
    there, now = ({k: v for k, v in p.items() if k not in (*GIVEN, "source")} for p in (before, stage.parameters))
    if there != now:
        raise RunError(f"{stage.run_dir}: made with parameters {there}, not {now}; delete that folder")
    return True


# Execution


def run_sweep(
    path: str | Path,
    slots: int | None = None,
    knobs: dict | None = None,
    scale: str = "",
    seeds: list[int] | None = None,
    cluster: str = "",
) -> list[Failure]:
    """Run what is missing of a sweep file, `slots` notebooks at a time; the runs that failed, with their reasons.

    cluster: address or file of a Dask scheduler, whose workers then do it, each one notebook at a time.

    A run that fails does not stop the others; stages wait until every run is complete. Stopped or killed at
    any moment, it goes on where it was when run again. Raises SweepError, DataError, RunError, or ForecastError for
    runs that would miss their caps, before anything runs.
    """
    if cluster and slots is not None:
        raise SweepError(f"slots={slots}: a cluster does as many notebooks at a time as it has workers; leave it out")
    sweep = load_sweep(path, knobs, scale, seeds)
    sweep.directory.mkdir(parents=True, exist_ok=True)
    busy = f"{sweep.directory}: this sweep is running already, in another process"
    with hold_lock(sweep.directory / ".lock", 0, busy):
        for unfinished in sweep.directory.glob(".*.tmp"):  # of a sweep that was killed
            unfinished.unlink()
        jobs, stages = missing(sweep)
        check({job.name: job.config for job in jobs}, say)
        before = read_json(sweep.directory / "sweep.json") or {}
        about = {"name": sweep.name, "question": sweep.question, "control": sweep.control, "runs": list(sweep.runs)}
        # Runs of earlier seeds or of a larger file are still there, and still what they were.
        arms, changes = (before.get(key) or {} for key in ("arms", "changes"))
        about |= {"arms": arms | sweep.arms, "changes": changes | sweep.changes, "file": Path(path).stem}
        about |= {"stages": [stage.notebook for stage in sweep.stages]}
        atomic_write(sweep.directory / "sweep.json", json.dumps(about, indent=1))
        data = {(j.config.data_path, j.config.tokenizer_path, j.config.vocab_size): j.config for j in jobs}
        # Built once, and what is wrong with the data said, before anything runs.
        data = {open_dataset(config).fingerprint: config for config in data.values()}
        environments = [] if cluster else slot_environments([job.config for job in jobs], slots)
        there = _workers(cluster, sweep, data) if cluster and (jobs or stages) else nullcontext()
        total = len(sweep.runs) + len(sweep.stages)
        with there as execute, _bar(sweep.name, total, done=total - len(jobs) - len(stages)) as bar:
            execute = execute or partial(_run_jobs, environments=environments)
            failures = execute(jobs, bar=bar)
            if failures and stages:
                say(f"not run: {', '.join(s.notebook for s in stages)}; stages wait until every run is complete")
                return failures
            for stage in stages:
                try:
                    job = stage_job(sweep, stage, best_run(sweep))
                    if not is_complete(job):
                        failures += execute([job], bar=bar)
                except RunError as error:
                    failures.append(failed(stage.notebook, str(error), sweep.directory / stage.notebook))
    return failures


@contextmanager
def _workers(address: str, sweep: Sweep, data: dict[str, RunConfig]) -> Iterator[Callable]:
    """What executes jobs on the workers of a cluster, as _run_jobs does here."""
    from pgolf.machines import cluster  # only who asks for it needs Dask

    if not data:  # stages alone are left: their data are their source's
        configs = {(c.data_path, c.tokenizer_path, c.vocab_size): c for c in sweep.runs.values()}
        data = {open_dataset(config).fingerprint: config for config in configs.values()}
    knobs = {fingerprint: config.model_dump() for fingerprint, config in data.items()}
    notebooks = ["train.ipynb", *(f"{stage.notebook}.ipynb" for stage in sweep.stages)]
    ranks = max((c.world_size for c in sweep.runs.values() if c.device != "cpu"), default=0 if sweep.runs else 1)
    with cluster.connected(address, directory.RUNS, notebooks, knobs, ranks) as pool:
        yield partial(cluster.run_jobs, pool)


def slot_environments(configs: list[RunConfig], slots: int | None = None) -> list[dict[str, str]]:
    """Environment of each slot: as many as fit the cores, or one a GPU group, which then sees those GPUs only.

    A group is as many GPUs as a run's world_size. Raises SweepError where there are fewer.
    """
    if slots is not None and slots < 1:
        raise SweepError(f"slots={slots}: at least one notebook at a time")
    ranks = max((config.world_size for config in configs), default=1)
    if torch.cuda.is_available() and any(config.device in ("auto", "cuda") for config in configs):
        seen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        gpus = seen.split(",")
        if len(gpus) < ranks:
            raise SweepError(f"world_size={ranks}: a GPU each, and there are {len(gpus)}; lower nproc or world_size")
        groups = [",".join(gpus[i : i + ranks]) for i in range(0, len(gpus) - ranks + 1, ranks)]
        return [{"CUDA_VISIBLE_DEVICES": groups[i % len(groups)]} for i in range(slots or len(groups))]
    cores = os.cpu_count() or 1
    on_cpu = all(config.device in ("auto", "cpu") for config in configs)
    threads = max((config.world_size * (config.cpu_threads or cores) for config in configs), default=cores)
    return [{} for _ in range(slots or (max(1, cores // threads) if on_cpu else 1))]


@dataclass
class _Active:
    job: Job
    process: subprocess.Popen
    environment: dict[str, str]
    start: float


def _run_jobs(jobs: list[Job], environments: list[dict[str, str]], bar: tqdm) -> list[Failure]:
    """Execute all jobs, one a slot at a time. However this ends, no process it started goes on."""
    waiting, free, active, failures = list(jobs), list(environments), [], []
    done = bar.n
    try:
        while waiting or active:
            while waiting and free:
                job, environment = waiting.pop(0), free.pop(0)
                active.append(_Active(job, start(job, environment), environment, time.perf_counter()))
            time.sleep(POLL_SECONDS)
            for one in [one for one in active if one.process.poll() is not None]:
                active.remove(one)
                free.append(one.environment)
                done += 1
                failures += finish(one.job, one.process.returncode, time.perf_counter() - one.start)
            states = [progress(one.job) for one in active]
            bar.n = done + sum(fraction for fraction, _ in states)
            bar.set_postfix_str(", ".join(text for _, text in states), refresh=True)
    finally:
        for one in active:
            kill_family(one.process.pid)
    return failures


def start(job: Job, environment: dict[str, str]) -> subprocess.Popen:
    """Start the job's slot, apart from our terminal: Ctrl-C reaches us, and we end it."""
    return start_slot(job.run_dir, job.notebook, job.parameters, directory.RUNS, os.environ | environment)


def finish(job: Job, returncode: int, seconds: float) -> list[Failure]:
    """Say in a line how the job ended. Whether it is complete its result.json says, and nothing else."""
    result = read_result(job.run_dir)
    reason = _reason(job, returncode) if returncode else ""
    if result is None:
        return [failed(job.name, reason or "its notebook ended without a result", job.log)]
    line = f"{job.name:24} "
    if result.kind == "train":
        bpb, size = result.roundtrip_val_bpb, result.total_bytes
        line += f"{result.val_bpb:.4f} bpb raw" if bpb is None else f"{bpb:.4f} bpb"
        line += "" if size is None else f"  {size:>11,} of {result.cap_bytes:,} bytes"
        line += "  over the cap" if result.fits is False else ""
    else:
        line += f"on {result.source}"
    say(f"{line}  {seconds:.0f} s")
    if reason:
        say(f"  complete, but its notebook ended early: {reason} (see {job.log})")
    return []


def failed(run: str, reason: str, log: Path) -> Failure:
    say(f"{run:24} FAILED: {reason}\n  see {log}")
    return Failure(run, reason, log)


def _reason(job: Job, returncode: int) -> str:
    """Why a job ended without a result, in one line: what train() wrote, else its slot's last words."""
    if error := read_json(job.run_dir / "error.json"):
        return " ".join(f"{error.get('error')}: {error.get('message')}".split())
    words = job.log.read_text(encoding="utf-8", errors="replace").split("\n")
    said = (line.strip() for line in reversed(words) if "[IPKernelApp]" not in line)  # a kernel's own warnings
    return next((line for line in said if line), "killed" if returncode < 0 else f"exit status {returncode}")


def say(line: str) -> None:
    tqdm.write(line)  # above the bar
    sys.stdout.flush()


def progress(job: Job) -> tuple[float, str]:
    """Fraction done and 'control 80/120 2.71 bpb', from the last lines of the run's metrics."""
    try:
        with open(job.run_dir / "metrics.jsonl", "rb") as f:
            f.seek(max(0, f.seek(0, os.SEEK_END) - 8192))
            lines = f.read().splitlines()
    except FileNotFoundError:
        return 0.0, job.name
    last: dict = {}
    for line in lines:
        try:
            last |= json.loads(line)
        except ValueError:  # the first was cut by us, the last may be on its way
            continue
    step, of = last.get("step", 0), job.config.iterations
    clock = job.config.max_wallclock_seconds
    trained = max(step / of, last.get("train_seconds", 0.0) / clock if clock else 0.0)
    bpb = f" {last['val_bpb']:.2f} bpb" if "val_bpb" in last else ""
    return 0.95 * min(trained, 1.0), f"{job.name} {step}/{of}{bpb}"  # scoring takes the rest


def _bar(name: str, total: int, done: int) -> tqdm:
    """One bar for the whole sweep, in runs, for somebody who watches: a terminal or a notebook."""
    return tqdm(
        desc=name,
        total=total,
        initial=done,
        smoothing=0,  # the average rate: a fraction of a run at a time has no rate of its own
        bar_format="{desc}: {percentage:3.0f}%|{bar:20}| {n:.1f}/{total} [{elapsed}<{remaining}{postfix}]",
        disable=not (sys.stderr.isatty() or "ipykernel" in sys.modules),
    )
