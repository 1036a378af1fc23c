"""A sweep's notebooks on other machines: `pgolf sweep FILE --cluster ADDRESS`, through a Dask scheduler.

Each Dask worker, one GPU group or one CPU slot, does one run at a time. Who gets which is decided here, not by Dask: a
run goes to one named worker, and when that dies to another. A worker that sees our run store writes there; from one
with a store of its own files come home while the run goes on. What happens on the worker is in worker.py.
"""

import importlib.util
import json
import logging
import threading
import time
import uuid
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tqdm import tqdm

from pgolf.machines import worker
from pgolf.runs import directory
from pgolf.runs.directory import hold_lock
from pgolf.runs.result import RunError
from pgolf.sweeps.runner import Failure, Job, failed, finish, progress, say
from pgolf.sweeps.sweep_file import SweepError
from pgolf_core.files import atomic_write

CONNECT_SECONDS = 10
POLL_SECONDS = 0.5
DEATHS = 5  # of its workers, after which a run is given up
SEEN_WITHIN = 60.0  # seconds until what one machine wrote to a shared disk is there for another
STOP_SECONDS = 10.0


class Lost(Exception):
    """The worker is gone, or does not answer."""


@dataclass(frozen=True, eq=False)
class Worker:
    """One that may be given runs."""

    address: str
    pid: int
    host: str
    shares: bool  # sees our run store
    gpus: int
    gone: threading.Event = field(default_factory=threading.Event)

    @property
    def name(self) -> str:
        return f"worker {self.address} ({self.host})"


@dataclass
class Pool:
    """A scheduler's workers: those that may be given runs, those that are being asked, and those refused."""

    client: object
    address: str
    ours: dict  # worker.about of this process
    canary: str
    notebooks: list[str]
    data: dict[str, dict]  # fingerprint -> knobs of a run on this data
    ranks: int  # GPUs that the largest run trains on, where it finds any; 0: all are to train on the CPU
    on_gpus: bool | None = None  # what this sweep trains on; None = nobody is there yet
    workers: dict[str, Worker] = field(default_factory=dict)
    idle: set[str] = field(default_factory=set)  # addresses that take tasks, as the scheduler says
    asked: dict[str, tuple[Future, threading.Event]] = field(default_factory=dict)  # and whether it is gone
    refused: set[str] = field(default_factory=set)
    checked: set[tuple[str, str]] = field(default_factory=set)  # machine and folder: its data are ours
    one_asks: threading.Lock = field(default_factory=threading.Lock)
    waits: bool = False

    def call(self, address: str, gone: threading.Event, function, *args):
        """What a function of worker.py answers there. Lost when the worker is gone, which Dask takes long to say."""
        future = _in_background(self.client.run, worker.call, function, *args, workers=[address])
        while True:
            try:
                return future.result(timeout=POLL_SECONDS)[address]
            except NotYet:
                if gone.is_set():
                    raise Lost(f"{address} is gone") from None
            except (OSError, KeyError) as error:
                raise Lost(f"{address}: {error}") from error


def _in_background(function, *args, **options) -> Future:
    """In a thread that nobody waits for at the end: a call to a machine that vanished may hang for long."""
    future = Future()

    def work() -> None:
        try:
            future.set_result(function(*args, **options))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


# Connecting


@contextmanager
def connected(
    address: str, runs_root: Path, notebooks: list[str], data: dict[str, dict], ranks: int = 1
) -> Iterator[Pool]:
    """The workers of the scheduler at an address, or that a scheduler file names, once each was looked at.

    data: fingerprint -> knobs of a run on it. Raises SweepError: nothing answers, or a worker cannot do these runs.
    """
    client = _client(address)
    canary = runs_root / f".canary-{uuid.uuid4().hex}"
    try:
        canary.touch()
        ours = worker.about(canary.name, notebooks)
        pool = Pool(client, client.scheduler.address, ours, canary.name, notebooks, data, ranks)
        pool.checked.add((ours["machine"], ours["root"]))
        _introduce(pool)
        yield pool
    finally:
        canary.unlink(missing_ok=True)
        with suppress(OSError, TimeoutError):
            client.close(timeout=STOP_SECONDS)


def _client(address: str):
    try:
        import distributed
    except ImportError:
        raise SweepError('--cluster needs Dask: pip install -c constraints.txt -e ".[cluster]"') from None
    for name in ("distributed", *(n for n in logging.root.manager.loggerDict if n.startswith("distributed."))):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # a worker that dies is ours to tell, in one line
    warnings.filterwarnings("ignore", category=distributed.versions.VersionMismatchWarning)  # what counts, about() says
    where = {"scheduler_file": address} if Path(address).is_file() else {"address": address}
    if "address" in where and ":" not in address:
        raise SweepError(f"--cluster {address}: no such scheduler file, nor an address like tcp://host:8786")
    try:
        return distributed.Client(**where, timeout=CONNECT_SECONDS, name="pgolf-sweep", set_as_default=False)
    except (OSError, ValueError, KeyError) as error:
        said = " ".join(str(error).split())
        raise SweepError(f"--cluster {address}: no scheduler answers there ({said}); start `dask scheduler`") from None


def _introduce(pool: Pool) -> None:
    """Look at the workers that are there, and say what the cluster is. SweepError naming each that will not do."""
    problems = look(pool)
    while pool.asked:
        time.sleep(POLL_SECONDS / 5)
        problems += look(pool)
    if problems:
        raise SweepError(f"{pool.address}:\n" + "\n".join(f"  - {problem}" for problem in problems))
    there = list(pool.workers.values())
    hosts, gpus = {one.host for one in there}, sum(one.gpus for one in there)
    line = f"cluster {pool.address}: {_count(len(there), 'worker')}"
    if there:
        line += f" on {_count(len(hosts), 'machine')}, {_count(gpus, 'GPU') if gpus else 'no GPU'}"
    if apart := {one.host for one in there if not one.shares}:
        line += f"; {', '.join(sorted(apart))}: not on our run store, results are copied as they come"
    say(line)
    if pool.client.run_on_scheduler(importlib.util.find_spec, "bokeh"):
        say(f"dashboard: {pool.client.dashboard_link}")
    else:
        say("no dashboard: `pip install bokeh` where the scheduler runs, and start it again")


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


def look(pool: Pool) -> list[str]:
    """Note who came and who went since the last look; what is wrong with those that came. SweepError: no scheduler."""
    try:
        told = pool.client.scheduler_info(n_workers=-1)
    except (OSError, TimeoutError):
        told = {}
    if pool.client.status in ("closing", "closed"):
        raise SweepError(f"{pool.address}: the scheduler is gone; with one there, the same command goes on")
    if pool.client.status != "running" or "workers" not in told:
        return []  # the client tries to connect again
    there = told["workers"]
    pool.idle = {address for address, told in there.items() if told["status"] == "running"}
    for address in pool.workers.keys() - there.keys():
        pool.workers.pop(address).gone.set()
    pool.refused &= there.keys()
    for address in pool.idle - pool.workers.keys() - pool.asked.keys() - pool.refused:
        gone = threading.Event()
        pool.asked[address] = _in_background(_inspect, pool, address, gone), gone
    problems = []
    for address, (answer, gone) in list(pool.asked.items()):
        if address not in there:
            gone.set()
        if answer.done():
            del pool.asked[address]
            try:
                pool.workers[address] = answer.result()
            except Lost:
                continue
            except Exception as error:  # whatever an environment that we do not know makes of our questions
                pool.refused.add(address)
                problems.append(f"worker {address} {error}")
    return problems + ([] if pool.asked and pool.on_gpus is None else _of_another_kind(pool))


def _of_another_kind(pool: Pool) -> list[str]:
    """Take out those whose runs would not compare: a sweep trains on GPUs or on CPUs, as its first workers do."""
    if not pool.ranks:
        return []
    if pool.on_gpus is None and pool.workers:
        pool.on_gpus = any(one.gpus for one in pool.workers.values())
    others = [one for one in pool.workers.values() if bool(one.gpus) != pool.on_gpus]
    for one in others:
        del pool.workers[one.address]
        pool.refused.add(one.address)
    why = "sees no GPU, and this sweep trains on GPUs: stop it, or look at nvidia-smi and CUDA_VISIBLE_DEVICES there"
    if not pool.on_gpus:
        why = "has GPUs, and this sweep trains on CPUs: to go on with GPUs alone, stop the sweep and start it again"
    return [f"{one.name} {why}" for one in others]


def _inspect(pool: Pool, address: str, gone: threading.Event) -> Worker:
    """The worker. SweepError: what keeps it from doing these runs."""
    try:
        told = pool.call(address, gone, worker.about, pool.canary, pool.notebooks)
    except Lost:
        raise
    except Exception as error:  # Dask wraps what its unpickling met
        raise SweepError(
            f"has no pgolf of this version ({error}): install this checkout there and restart the worker"
        ) from None
    where = f"({told['host']}, {told['root']})"
    if told["code"] != pool.ours["code"]:
        raise SweepError(f"{where} has other code: bring its checkout to the state of this one")
    if told["started_with"] != pool.ours["started_with"]:
        raise SweepError(f"{where} was started before its code changed: restart it")
    if 0 < told["gpus"] < pool.ranks:
        raise SweepError(f"{where} sees {_count(told['gpus'], 'GPU')}, and a run here trains on {pool.ranks}")
    with pool.one_asks:  # of the workers of one machine
        place = (told["machine"], told["root"])
        if place not in pool.checked:
            if problem := _problem_of_data(pool, address, gone):
                raise SweepError(f"{where} {problem}")
            pool.checked.add(place)
    if differ := [what for what in ("torch", "python") if told[what] != pool.ours[what]]:
        versions = ", ".join(f"{what} {told[what]} (here {pool.ours[what]})" for what in differ)
        say(f"worker {address} {where}: {versions}; its runs may not repeat ours bit by bit")
    return Worker(address, told["pid"], told["host"], told["shares"], told["gpus"])


def _problem_of_data(pool: Pool, address: str, gone: threading.Event) -> str:
    wanted = list(pool.data.items())
    told = pool.call(address, gone, worker.fingerprints, [knobs for _, knobs in wanted])
    for (fingerprint, knobs), answer in zip(wanted, told, strict=True):
        if "problem" in answer:
            return f"cannot read the data: {answer['problem']}"
        if answer["fingerprint"] != fingerprint:
            return (
                f"has other data at data_path={knobs['data_path']} (fingerprint {answer['fingerprint'][:12]}, here "
                f"{fingerprint[:12]}), and scores on it would not compare: copy the folder of ours there"
            )
    return ""


# Running


@dataclass(eq=False)
class _Try:
    job: Job
    worker: Worker
    start: float = field(default_factory=time.perf_counter)
    thread: threading.Thread | None = None
    outcome: dict | None = None  # what worker.execute returned
    error: BaseException | None = None

    @property
    def name(self) -> str:
        return f"{self.job.run_dir.parent.name}/{self.job.run_dir.name}"


def run_jobs(pool: Pool, jobs: list[Job], bar: tqdm) -> list[Failure]:
    """Execute all jobs, one a worker at a time. However this ends, the workers stop what it started."""
    waiting, active, failures, deaths = list(jobs), [], [], Counter()
    done = bar.n
    try:
        while waiting or active:
            _notice(pool)
            busy = {one.worker.address for one in active}
            free = [one for one in pool.workers.values() if one.address in pool.idle - busy]
            while waiting and free and (pool.on_gpus is not None or not pool.ranks):
                active.append(_begin(pool, waiting.pop(0), free.pop(0)))
            if not pool.workers and not pool.asked and not pool.waits:
                say(f"no workers at {pool.address}: waiting for some (`pgolf worker {pool.address}` on a machine)")
            pool.waits = not pool.workers and not pool.asked
            time.sleep(POLL_SECONDS)
            for one in [one for one in active if not one.thread.is_alive()]:
                active.remove(one)
                if isinstance(one.error, Lost) or (one.error is None and one.outcome["returncode"] is None):
                    _notice(pool)
                    gone = one.worker.gone.is_set() or one.error is None
                    why = f"{one.worker.name} {'is gone' if gone else f'fails: {one.error}'}"
                    pool.workers.pop(one.worker.address, None)  # looked at anew, if it is there
                    deaths[one.job.name] += 1
                    if deaths[one.job.name] <= DEATHS:
                        say(f"{why}; its run {one.job.name} goes to another")
                        waiting.insert(0, one.job)
                        continue
                    reason = f"given up after {DEATHS + 1} workers; the last: {why}"
                    failures.append(failed(one.job.name, reason, one.job.log))
                elif isinstance(one.error, RunError | worker.CopyError | OSError):  # of this disk: full, say
                    failures.append(failed(one.job.name, " ".join(str(one.error).split()), one.job.log))
                elif one.error is not None:
                    raise one.error
                else:
                    failures += finish(one.job, one.outcome["returncode"], time.perf_counter() - one.start)
                done += 1
            states = [progress(one.job) for one in active]
            bar.n = done + sum(fraction for fraction, _ in states)
            bar.set_postfix_str(", ".join(text for _, text in states), refresh=True)
    finally:
        for one in active:
            one.worker.gone.set()  # for us: what attends to it gives up
        for one in active:
            one.thread.join(STOP_SECONDS)
    return failures


def _notice(pool: Pool) -> None:
    for problem in look(pool):
        say(f"not used: {problem}")


def _begin(pool: Pool, job: Job, on: Worker) -> _Try:
    one = _Try(job, on)

    def attend() -> None:
        try:
            one.outcome = _on_shared_store(pool, one) if on.shares else _on_its_own_store(pool, one)
        except BaseException as error:
            one.error = error

    one.thread = threading.Thread(target=attend, name=one.name, daemon=True)
    one.thread.start()
    return one


def _on_shared_store(pool: Pool, one: _Try) -> dict:
    outcome = _task(pool, one, lambda: None)
    # A network disk may show late what another machine wrote.
    deadline = time.monotonic() + SEEN_WITHIN
    while outcome["complete"] and not (one.job.run_dir / "result.json").exists() and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return outcome


def _on_its_own_store(pool: Pool, one: _Try) -> dict:
    """As above, with the run's directory there made as ours is, and ours kept as that one becomes."""
    job, on = one.job, one.worker
    call = partial(pool.call, on.address, on.gone)
    job.run_dir.mkdir(parents=True, exist_ok=True)
    busy = f"{job.run_dir}: another process is writing this run; wait for it or name another run"
    with hold_lock(job.run_dir / ".lock", directory.LOCK_PATIENCE_SECONDS, busy):  # so the monitor knows that it runs
        if source := job.parameters.get("source"):
            worker.push(call, job.run_dir.parent / source)
        (job.run_dir / "error.json").unlink(missing_ok=True)  # of an earlier try
        content = {"notebook": str(job.notebook), "output": str(job.output), "parameters": job.parameters}
        atomic_write(job.run_dir / worker.JOB, json.dumps(content, indent=1))
        worker.push(call, job.run_dir)
        copy = worker.Copy(call, job.run_dir)
        outcome = _task(pool, one, copy.refresh)
        if outcome["returncode"] is not None:
            copy.settle(outcome["complete"])
    return outcome


def _task(pool: Pool, one: _Try, meanwhile) -> dict:
    """What worker.execute returned. Lost when the worker is, or when we stop."""
    from distributed import CancelledError, KilledWorker

    job, on = one.job, one.worker
    content = {"name": one.name, "notebook": job.notebook.name, "parameters": job.parameters, "pid": on.pid}
    future = pool.client.submit(
        worker.execute,
        content,
        key=f"{one.name}-{uuid.uuid4().hex[:8]}",
        workers=[on.address],
        allow_other_workers=False,
        pure=False,
    )
    try:
        while not future.done():
            if on.gone.wait(POLL_SECONDS) or future.status in ("cancelled", "lost"):
                raise Lost(f"{on.address} is gone")
            with suppress(Lost):  # a look that failed is made again, and whether the worker is gone the scheduler says
                meanwhile()
        return future.result()
    except (CancelledError, KilledWorker, OSError) as error:
        raise Lost(f"{on.address}: {error}") from error
    finally:
        if not future.done():
            with suppress(OSError, TimeoutError):
                future.cancel()
