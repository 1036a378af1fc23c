"""Sweeps on a cluster: every run once whatever dies, and which workers are refused.

Schedulers and workers are real processes on this machine, or a client whose answers are given here.
"""

import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import psutil
import pytest
import yaml
from support import training

from pgolf.cli import cluster as cli_cluster
from pgolf.cli.main import main
from pgolf.machines import cluster, worker
from pgolf.processes import kill_family
from pgolf.runs import directory
from pgolf.runs.result import read_result
from pgolf.runs.table import load_runs
from pgolf.sweeps.runner import run_sweep
from pgolf.sweeps.sweep_file import SweepError, load_sweep
from pgolf.training.inputs import open_dataset
from pgolf.training.run import train
from pgolf_core.config import ROOT, ConfigError, RunConfig

TINY = training.TINY | dict(model_dim=96, iterations=4, warmdown_iters=0, val_loss_every=0, cpu_threads=1)
del TINY["track"]
LONG = TINY | dict(iterations=60, resume_every_seconds=0.1)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(directory, "RUNS", tmp_path / "runs")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    directory.RUNS.mkdir()
    return tmp_path


def write_sweep(folder, content):
    path = folder / "s.yaml"
    path.write_text(yaml.safe_dump({"track": "nano", "base": TINY} | content, sort_keys=False), encoding="utf-8")
    return path


class Machines:
    """A scheduler and workers, each a process of its own."""

    def __init__(self, folder):
        self.folder, self.workers = folder, []
        self.file = str(folder / "scheduler.json")
        words = ["scheduler", "--host", "127.0.0.1", "--port", "0", "--dashboard-address", "127.0.0.1:0"]
        self.scheduler = self.dask([*words, "--no-dashboard", "--scheduler-file", self.file])
        wait_for(lambda: os.path.exists(self.file))

    def dask(self, words, **environment):
        with open(self.folder / "dask.log", "ab") as log:
            options = dict(stdout=log, stderr=subprocess.STDOUT, cwd=self.folder, env=os.environ | environment)
            return subprocess.Popen([sys.executable, "-m", "dask", *words], **options)

    def add(self, runs_root, nanny=False, **environment):
        """A worker, or its nanny; two threads, which must not run two notebooks at a time."""
        words = ["worker", "--scheduler-file", self.file, "--nthreads", "2", "--nworkers", "1", "--no-dashboard"]
        words += ["--memory-limit", "0", "--host", "127.0.0.1", "--local-directory", str(self.folder)]
        words += ["--nanny" if nanny else "--no-nanny"]
        self.workers.append(self.dask(words, PGOLF_RUNS=str(runs_root), **environment))
        return self.workers[-1]

    def wait(self, count):
        from distributed import Client

        with Client(scheduler_file=self.file, set_as_default=False, timeout=120) as client:
            client.wait_for_workers(count, timeout=300)

    def run_while(self, path, disturb=lambda: None):
        """Failures of a sweep, while another function runs in a thread."""
        with ThreadPoolExecutor(1) as thread:
            other = thread.submit(disturb)
            failures = run_sweep(path, open_pool=partial(cluster.connect, self.file))
            other.result()
        return failures

    def kill(self, process):
        if process in self.workers:
            self.workers.remove(process)
        kill_family(process.pid)
        process.wait()


@pytest.fixture
def machines(folder):
    pytest.importorskip("distributed", reason='no Dask: pip install -e ".[cluster]"')
    opened = Machines(folder)
    yield opened
    for process in [*opened.workers, opened.scheduler]:
        opened.kill(process)


def wait_for(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return found


def notebooks_of(process):
    """Kernel processes below a process, and their kernels."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.Error):
            if any("pgolf.sweeps.kernel_process" in word or "ipykernel" in word for word in child.cmdline()):
                found.append(child)
    return found


def expect_as_local(path, folder, names):
    """Runs are what a training in this process makes of their knobs, and their files are undamaged."""
    table = load_runs(directory.RUNS, thorough=True)
    assert set(table[table.status == "complete"].run) >= set(names)
    for name in names:
        train(load_sweep(path).runs[name], folder / name)
        here, there = (training.what_counts(read_result(root / name)) for root in (folder, directory.RUNS / "s"))
        assert here == there, name


# Runs


@pytest.mark.slow
def test_every_run_is_done_once_though_workers_are_killed(embedded, folder, machines, capfd):
    names = [f"seed{n}" for n in range(4)]
    path = write_sweep(folder, {"grid": {"seed": list(range(4))}})
    for _ in range(2):
        machines.add(directory.RUNS, nanny=True)
    machines.wait(2)
    rng, kills = random.Random(7), []

    def strike():
        while len(kills) < 2 and len(list(directory.RUNS.glob("s/*/result.json"))) < 3:
            time.sleep(rng.uniform(0.2, 2))
            victim = rng.choice(machines.workers)
            if not (children := notebooks_of(victim)):
                continue
            if len(kills) % 2:  # a whole machine; another takes its place
                machines.kill(victim)
                machines.add(directory.RUNS, nanny=True)
            else:  # a process that its nanny starts again
                children[0].parent().kill()
            kills.append(victim)
            assert psutil.wait_procs(children, timeout=60)[1] == []

    failures = machines.run_while(path, strike)
    said = capfd.readouterr()
    assert failures == [] and len(kills) == 2
    assert said.out.count("goes to another") >= 1  # a victim may have been between two runs
    for name in names:
        assert sum(line.startswith(f"{name} ") and " bpb " in line for line in said.out.splitlines()) == 1
    assert "Traceback" not in said.out + said.err and "distributed." not in said.err
    assert sorted(p.parent.name for p in directory.RUNS.rglob("result.json")) == sorted(names)
    assert list(load_runs(directory.RUNS, thorough=True).status) == ["complete"] * 4
    assert not list(directory.RUNS.glob(".canary*"))
    expect_as_local(path, folder / "direct", names[::3])


@pytest.mark.slow
def test_a_killed_workers_run_continues_on_another_and_unfit_workers_are_named(embedded, folder, machines, capfd):
    """A failed run is not tried again, a stage gets its source, and a sweep ends only if every worker is unfit."""
    bad = {"matrix_lr": 1e30, "tied_embed_lr": 1e30}
    content = {"runs": {"bad": bad, "long": LONG}}
    path, run_dir = write_sweep(folder, content), directory.RUNS / "s" / "long"
    (folder / "strange" / "notebooks").mkdir(parents=True)
    (folder / "strange" / "notebooks" / "train.ipynb").write_text('{"cells": []}', encoding="utf-8")
    apart = machines.add(folder / "other runs")
    machines.wait(1)
    with pytest.raises(SweepError, match=r"does not see this sweep's runs folder .*PGOLF_RUNS.*`pgolf remote`"):
        machines.run_while(path)
    strange = machines.add(directory.RUNS, PGOLF_ROOT=str(folder / "strange"))
    for _ in range(2):
        machines.add(directory.RUNS)
    machines.wait(4)
    capfd.readouterr()

    def kill():
        wait_for(lambda: (run_dir / "resume.pt").exists() and (run_dir / "metrics.jsonl").exists())
        (victim,) = [w for w in machines.workers if any("/s/long/" in " ".join(p.cmdline()) for p in notebooks_of(w))]
        machines.kill(victim)

    failures = machines.run_while(path, kill)
    said = capfd.readouterr().out
    assert [f.run for f in failures] == ["bad"] and "TrainError: training loss is nan" in failures[0].reason
    assert said.count("bad ") == 2 and said.count("goes to another") == 1  # forecast, failure: no second attempt
    assert said.count("not used:") == 2 and "has other code: bring its checkout to the state of this one" in said
    assert read_result(run_dir).resumed == 1 and not (run_dir / "resume.pt").exists()
    expect_as_local(path, folder / "direct", ["long"])

    path = write_sweep(folder, {"runs": {"long": LONG}, "stages": [{"sensitivity": {"tokens": 1024}}]})
    assert machines.run_while(path) == []
    assert read_result(directory.RUNS / "s" / "sensitivity").source == "s/long"
    assert apart.poll() is None and strange.poll() is None


CLIENT = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
CLIENT += "from pgolf.cli.main import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="a process cannot send Ctrl-C to one other alone")
def test_notebooks_end_with_their_sweep_and_workers_with_their_command(embedded, folder, machines):
    """A sweep killed, or stopped by Ctrl-C: the workers stay and do the next one's, until Ctrl-C to `pgolf worker`."""

    def pgolf(*words):
        environment = os.environ | {"PGOLF_RUNS": str(directory.RUNS), "CUDA_VISIBLE_DEVICES": ""}
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        return subprocess.Popen([sys.executable, "-c", CLIENT, *words], env=environment, **pipes)

    command = pgolf("worker", machines.file, "--workers", "2")
    machines.wait(2)
    path = write_sweep(folder, {"runs": {"a": LONG | {"iterations": 2000}}})
    resume = directory.RUNS / "s" / "a" / "resume.pt"
    for end in (signal.SIGKILL, signal.SIGINT):
        resume.unlink(missing_ok=True)
        client = pgolf("sweep", str(path), "--cluster", machines.file)
        wait_for(lambda: resume.exists() or client.poll() is not None)  # noqa: B023
        children = notebooks_of(command)
        assert len(children) == 2, client.communicate() if client.poll() is not None else children
        client.send_signal(end)
        out, err = client.communicate(timeout=120)
        assert "Traceback" not in out + err
        assert psutil.wait_procs(children, timeout=60)[1] == []
    assert client.returncode == 130 and "goes on where this one was" in err
    family = psutil.Process(command.pid).children(recursive=True)
    command.send_signal(signal.SIGINT)
    out, _ = command.communicate(timeout=120)
    assert command.returncode == 130 and "2 at a time: on the CPU" in out
    assert family and psutil.wait_procs(family, timeout=30)[1] == []


# Refusals


def test_without_dask_or_a_scheduler_it_says_what_is_missing(embedded, folder, monkeypatch, capsys):
    pytest.importorskip("distributed", reason='no Dask: pip install -e ".[cluster]"')
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 1)
    words = ["sweep", str(write_sweep(folder, {"runs": {"a": {}}})), "--cluster"]

    def refusal(*more):
        assert main([*words, *more]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "tcp://127.0.0.1:1: no scheduler answers there" in refusal("tcp://127.0.0.1:1")
    assert "nowhere.json: no such scheduler file, nor an address like tcp://host:8786" in refusal("nowhere.json")
    assert "one notebook per worker that joined it" in refusal("tcp://127.0.0.1:1", "--workers", "2")
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert 'pip install -c constraints.txt -e ".[cluster]"' in refusal("tcp://127.0.0.1:1")
    assert not list(directory.RUNS.glob(".canary*"))


def test_dask_is_imported_only_where_a_cluster_is_asked_for():
    code = "import sys, pgolf.cli.main, pgolf.sweeps.runner; print({'dask', 'distributed'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "set()", done.stderr


FIT = dict(python="3.12", torch="2.13.0", code="c", sees_runs=True, runs="/there/runs", gpus=0)


def pool(data=None, ranks=1):
    return cluster.ClusterPool(None, "", [], data or {}, ranks, FIT)


@pytest.mark.parametrize(
    ("differs", "says"),
    [
        ({}, ""),
        ({"gpus": 2}, ""),
        ({"python": "3.11"}, "has python 3.11, and this sweep 3.12"),
        ({"torch": "2.11.0"}, "has torch 2.11.0, and this sweep 2.13.0"),
        ({"code": "d"}, "has other code"),
        ({"sees_runs": False}, "its own is /there/runs"),
        ({"gpus": 1}, "sees 1 of the 2 GPUs that a run here trains on"),
    ],
)
def test_a_worker_that_cannot_do_the_runs_is_refused(differs, says):
    problem = pool(ranks=2)._mismatch(FIT | differs)
    assert says in problem and bool(says) == bool(problem)


def test_the_data_of_a_machine_are_read_once(monkeypatch):
    here, reads = pool(), []
    about = FIT | {"root": "/checkout", "host": "a", "pid": 1}
    monkeypatch.setattr(cluster.ClusterPool, "_call", lambda *_: about)
    monkeypatch.setattr(cluster.ClusterPool, "_data_problem", lambda _, address: reads.append(address))
    for address in ("tcp://10.0.0.1:1", "tcp://10.0.0.1:2", "tcp://10.0.0.2:1"):
        here._check(address)
    assert reads == ["tcp://10.0.0.1:1", "tcp://10.0.0.2:1"]


def test_a_worker_with_other_data_is_refused(embedded, folder, monkeypatch):
    ours = RunConfig(track="nano")
    absent = ours.with_knobs(data_path="data/nowhere")
    answers = worker.fingerprints([ours.model_dump(), absent.model_dump()])
    fingerprint = open_dataset(ours).fingerprint
    assert answers[0] == [fingerprint, ""] and "no folder" in answers[1][1]
    monkeypatch.setattr(cluster.ClusterPool, "_call", lambda *_: answers)
    knobs = {fingerprint: ours.model_dump(), "1": absent.model_dump()}
    assert "cannot read the data: data_path=data/nowhere: no folder" in pool(data=knobs)._data_problem("")
    answers.pop()
    assert pool(data={fingerprint: ours.model_dump()})._data_problem("") == ""
    assert "has other data at data_path=embedded" in pool(data={"0" * 64: ours.model_dump()})._data_problem("")


@pytest.mark.parametrize("first", ["cpu", "gpu"])
def test_a_sweep_trains_on_gpus_or_on_cpus(monkeypatch, capsys, first):
    gpus = {"tcp://cpu:1": 0, "tcp://gpu:1": 8, "tcp://gpu:2": 8}
    monkeypatch.setattr(cluster.ClusterPool, "_check", lambda _, a: cluster.Worker(a, 1, a[6:9], gpus[a]))

    def refused(pool, *there):
        pool._update(dict.fromkeys(there, "running"))
        while pool.checking:
            pool._update(dict.fromkeys(there, "running"))
        return [line for line in capsys.readouterr().out.splitlines() if "not used" in line]

    here = pool()
    assert refused(here, f"tcp://{first}:1") == [] and here.on_gpus == (first == "gpu")
    (problem, *others) = refused(here, *gpus)
    why = {"gpu": "sees no GPU, and this sweep trains on GPUs", "cpu": "has GPUs, and this sweep trains on CPUs"}
    assert why[first] in problem and len(others) == (first == "cpu") and refused(here, *gpus) == []  # said once
    assert all(bool(one.gpus) == here.on_gpus for one in here.workers.values()) and here.workers
    assert refused(all_on_cpus := pool(ranks=0), *gpus) == [] and len(all_on_cpus.workers) == 3


# pgolf worker


def test_a_worker_command_has_one_worker_per_group_of_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,4,5")
    assert cli_cluster._environments(2, None) == [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "4,5"}]
    with pytest.raises(ConfigError, match="does not divide the 4 GPUs"):
        cli_cluster._environments(3, None)
    with pytest.raises(ConfigError, match="--workers 2: this machine has GPUs"):
        cli_cluster._environments(2, 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert cli_cluster._environments(2, 3) == [{}, {}, {}]
