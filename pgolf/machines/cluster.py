"""A sweep's notebooks on other machines that share its runs folder: `pgolf sweep FILE --cluster ADDRESS`, over Dask.

Each Dask worker, one GPU group or one CPU worker, does one run at a time. This module, not Dask, assigns runs: a run
goes to one named worker, and if that is lost to another, where it continues from its resume file. worker.py is what
happens on the worker.
"""

import logging
import threading
import time
import uuid
import warnings
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from pgolf.machines import worker
from pgolf.processes import in_background
from pgolf.runs import directory
from pgolf.sweeps.jobs import Job, say
from pgolf.sweeps.pool import WorkerLost
from pgolf.sweeps.runner import datasets
from pgolf.sweeps.sweep_file import Sweep, SweepError

CONNECT_SECONDS = 10
POLL_SECONDS = 0.1
VISIBLE_SECONDS = 60.0  # within these, a shared disk shows here what another machine wrote
ANSWER_SECONDS = 10.0  # for a worker to hand over its outcome, or a scheduler to say goodbye
OTHER_DEVICE = {  # key: the sweep trains on GPUs
    True: "sees no GPU, and this sweep trains on GPUs: stop it, or check nvidia-smi and CUDA_VISIBLE_DEVICES",
    False: "has GPUs, and this sweep trains on CPUs: to use GPUs alone, stop the sweep and start it again",
}


@dataclass(eq=False)
class Worker:
    """A Dask worker that may be given runs."""

    address: str
    pid: int
    host: str
    gpus: int
    is_gone: bool = False


@dataclass(eq=False)
class ClusterPool:
    """A scheduler's workers: accepted, being checked, or refused. Methods as in sweeps.pool.LocalPool."""

    client: object
    canary: str
    notebooks: list[str]
    data: dict[str, dict]  # data_fingerprint -> knobs of a run on this data
    ranks: int  # GPUs that the largest run trains on, if it finds any; 0: all runs train on the CPU
    local: dict  # worker.about of this process
    on_gpus: bool | None = None  # set by the first workers; None = none is accepted yet
    workers: dict[str, Worker] = field(default_factory=dict)
    idle: set[str] = field(default_factory=set)  # addresses that take tasks, according to the scheduler
    active: dict[Job, tuple[Worker, object]] = field(default_factory=dict)  # and the Dask future of its task
    checking: dict[str, Future] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)  # address -> why
    checkouts: dict[tuple, threading.Lock] = field(default_factory=lambda: defaultdict(threading.Lock))
    with_data: set[tuple] = field(default_factory=set)  # checkouts, as (host, root), that have the sweep's data
    is_waiting: bool = False

    def _free(self) -> Worker | None:
        idle = self.idle - {one.address for one, _ in self.active.values()}
        return next((one for one in self.workers.values() if one.address in idle), None)

    def has_room(self) -> bool:
        return self._free() is not None

    def start(self, job: Job) -> bool:
        free = self._free()
        if free is None:
            return False
        name = f"{job.run_dir.parent.name}/{job.run_dir.name}"
        content = {"name": name, "notebook": job.notebook.name, "parameters": job.parameters, "pid": free.pid}
        only = {"workers": [free.address], "allow_other_workers": False, "pure": False}
        task = self.client.submit(worker.execute, content, key=f"{name}-{uuid.uuid4().hex[:8]}", **only)
        self.active[job] = free, task
        return True

    def poll(self, job: Job) -> int | None:
        one, task = self.active[job]
        if one.is_gone or task.status in ("cancelled", "lost"):
            raise self._lost(job, "is gone")
        if not task.done():
            return None
        try:
            outcome = task.result(timeout=ANSWER_SECONDS)
        except Exception as error:  # Dask's own, or what execute met on that machine: a full disk, say
            raise self._lost(job, f"fails: {error}") from error
        if outcome["returncode"] is None:
            raise self._lost(job, "closes")
        deadline = time.monotonic() + VISIBLE_SECONDS
        while outcome["complete"] and not (job.run_dir / "result.json").exists() and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        del self.active[job]
        return outcome["returncode"]

    def _lost(self, job: Job, why: str) -> WorkerLost:
        """Forget the worker; if it is still there, it is checked again before it gets another run."""
        one = self.active[job][0]
        self.workers.pop(one.address, None)
        self.stop(job)
        return WorkerLost(f"worker {one.address} ({one.host}) {why}")

    def stop(self, job: Job) -> None:
        """Take the task back, so that the worker ends the notebook's process."""
        with suppress(OSError, TimeoutError):
            self.active.pop(job)[1].cancel()

    def refresh(self) -> None:
        """Notice workers that came or went, and name those that are refused. Raises SweepError without a scheduler."""
        workers = None
        with suppress(OSError, TimeoutError):
            workers = self.client.scheduler_info(n_workers=-1).get("workers")
        if self.client.status in ("closing", "closed"):
            raise SweepError("the scheduler is gone; once it is back, the same command continues the sweep")
        if self.client.status != "running" or workers is None:
            return  # the client is reconnecting
        self._update({address: about["status"] for address, about in workers.items()})
        waits = not self.workers and not self.checking
        if waits and not self.is_waiting:
            address = self.client.scheduler.address
            say(f"no workers at {address}: waiting for some (`pgolf worker {address}` on a machine)")
        self.is_waiting = waits

    def _update(self, status: dict[str, str]) -> None:
        """status: of each worker that the scheduler knows, by address."""
        self.idle = {address for address, state in status.items() if state == "running"}
        for address in self.workers.keys() - status.keys():
            self.workers.pop(address).is_gone = True
        for known in (self.checking, self.refused):
            for address in known.keys() - status.keys():
                del known[address]
        for address in self.idle - self.workers.keys() - self.checking.keys() - self.refused.keys():
            # A call to a machine that vanished may hang for long.
            self.checking[address] = in_background(self._check, address)
        if self.on_gpus is None and not all(answer.done() for answer in self.checking.values()):
            return  # the first workers decide together what the sweep trains on: scores of CPUs and GPUs do not compare
        fit = []
        for address in [address for address, answer in self.checking.items() if answer.done()]:
            try:
                fit.append(self.checking.pop(address).result())
            except (OSError, KeyError):  # gone before it answered
                continue
            except Exception as error:  # an unknown environment may answer with anything
                self._refuse(address, str(error))
        if self.on_gpus is None and fit:
            self.on_gpus = any(one.gpus for one in fit)
        for one in fit:
            if self.ranks and bool(one.gpus) != self.on_gpus:
                self._refuse(one.address, f"({one.host}) {OTHER_DEVICE[self.on_gpus]}")
            else:
                self.workers[one.address] = one

    def _refuse(self, address: str, why: str) -> None:
        self.refused[address] = f"worker {address} {why}"
        say(f"not used: {self.refused[address]}")

    def _check(self, address: str) -> Worker:
        """The worker at an address. SweepError says why it cannot do the sweep's runs; OSError or KeyError: gone."""
        try:
            about = self._call(address, worker.about, self.canary, self.notebooks)
        except (OSError, KeyError):
            raise
        except Exception as error:  # Dask wraps what its unpickling met
            raise SweepError(f"has no pgolf of this version ({error}): install this checkout, restart it") from None
        checkout = address.rpartition(":")[0], about["root"]
        with self.checkouts[checkout]:  # its workers share the data: one reads them
            problem = self._mismatch(about) or (checkout not in self.with_data and self._data_problem(address))
            if problem:
                raise SweepError(f"({about['host']}, {about['root']}) {problem}")
            self.with_data.add(checkout)
        return Worker(address, about["pid"], about["host"], about["gpus"])

    def _mismatch(self, about: dict) -> str:
        """Why a worker cannot do the sweep's runs by what it says about itself; '' if it can."""
        differ = [name for name in ("python", "torch", "code") if about[name] != self.local[name]]
        if differ == ["code"]:
            return "has other code: bring its checkout to the state of this one"
        if differ:
            return f"has {differ[0]} {about[differ[0]]}, and this sweep {self.local[differ[0]]}: install that one there"
        if not about["sees_runs"]:
            return (
                f"does not see this sweep's runs folder {directory.RUNS} (its own is {about['runs']}): start it with "
                "PGOLF_RUNS set to the same shared folder; `pgolf remote` serves machines without one"
            )
        if 0 < about["gpus"] < self.ranks:
            return f"sees {about['gpus']} of the {self.ranks} GPUs that a run here trains on: start it with --gpus"
        return ""

    def _data_problem(self, address: str) -> str:
        """Why the data at a worker are not the sweep's; '' if they are."""
        answers = self._call(address, worker.fingerprints, list(self.data.values()))
        for (ours, knobs), (theirs, problem) in zip(self.data.items(), answers, strict=True):
            if problem:
                return f"cannot read the data: {problem}"
            if theirs != ours:
                where = f"at data_path={knobs['data_path']} (fingerprint {theirs[:12]}, here {ours[:12]})"
                return f"has other data {where}, and scores would not compare: copy the folder of this machine there"
        return ""

    def _call(self, address: str, function, *args):
        """The answer of a function of worker.py on that worker; OSError or KeyError if it is gone."""
        return self.client.run(worker.call, function, *args, workers=[address])[address]


@contextmanager
def connect(address: str, sweep: Sweep) -> Iterator[ClusterPool]:
    """The workers of the scheduler at an address, or named by a scheduler file, once each was checked.

    Raises SweepError if nothing answers, or if there are workers and none can do the sweep's runs.
    """
    client = _client(address)
    canary, configs = directory.RUNS / f".canary-{uuid.uuid4().hex}", sweep.runs.values()
    try:
        canary.touch()
        data = {fingerprint: config.model_dump() for fingerprint, config in datasets(configs).items()}
        notebooks = ["train.ipynb", *(f"{stage}.ipynb" for stage in sweep.stages)]
        ranks = max((c.world_size for c in configs if c.device != "cpu"), default=0)
        pool = ClusterPool(client, canary.name, notebooks, data, ranks, worker.about(canary.name, notebooks))
        pool.refresh()
        while pool.checking:
            time.sleep(POLL_SECONDS)
            pool.refresh()
        workers = pool.workers.values()
        if pool.refused and not workers:
            raise SweepError("\n  - ".join([f"{address}: no worker can do these runs:", *pool.refused.values()]))
        machines, gpus = len({one.host for one in workers}), sum(one.gpus for one in workers)
        where = client.scheduler.address
        say(f"cluster {where}: workers {len(workers)}, machines {machines}, GPUs {gpus}; {client.dashboard_link}")
        yield pool
    finally:
        canary.unlink(missing_ok=True)
        with suppress(OSError, TimeoutError):
            client.close(timeout=ANSWER_SECONDS)


def _client(address: str):
    try:
        import distributed
    except ImportError:
        raise SweepError('--cluster needs Dask: pip install -c constraints.txt -e ".[cluster]"') from None
    for name in ("distributed", *(n for n in logging.root.manager.loggerDict if n.startswith("distributed."))):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # lost workers are reported here, in one line each
    warnings.filterwarnings("ignore", category=distributed.versions.VersionMismatchWarning)  # _mismatch reports it
    where = {"scheduler_file": address} if Path(address).is_file() else {"address": address}
    if "address" in where and ":" not in address:
        raise SweepError(f"--cluster {address}: no such scheduler file, nor an address like tcp://host:8786")
    try:
        return distributed.Client(**where, timeout=CONNECT_SECONDS, name="pgolf-sweep", set_as_default=False)
    except (OSError, ValueError, KeyError) as error:
        why = " ".join(str(error).split())
        raise SweepError(f"--cluster {address}: no scheduler answers there ({why}); start `dask scheduler`") from None
