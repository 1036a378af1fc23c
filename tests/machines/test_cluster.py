"""Sweeps on a cluster: every run once whatever dies, files of machines with a store of their own, and what is refused.

Schedulers and workers are real processes on this machine; "another machine" is a worker with another PGOLF_RUNS.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import yaml
from tqdm import tqdm

from pgolf.cli import cluster as cli_cluster
from pgolf.cli.main import main
from pgolf.machines import cluster, worker
from pgolf.reports import monitor
from pgolf.runs import directory
from pgolf.runs.result import read_result
from pgolf.runs.table import load_runs
from pgolf.sweeps.runner import plan, run_sweep
from pgolf.sweeps.sweep_file import SweepError, load_sweep
from pgolf.training.round_trip import open_dataset
from pgolf.training.run import train
from pgolf_core.config import ROOT, ConfigError, RunConfig

TINY = dict(
    num_layers=1, model_dim=96, num_heads=2, num_kv_heads=1, train_seq_len=64, train_batch_tokens=2048, iterations=4,
    warmdown_iters=0, val_loss_every=0, val_batch_size=2048, val_max_tokens=2048, roundtrip_val_max_tokens=2048,
    cpu_threads=1,
)  # fmt: skip
LONG = TINY | dict(iterations=40, resume_every_seconds=0.1)
BAD = {"matrix_lr": 1e30, "tied_embed_lr": 1e30}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(directory, "RUNS", tmp_path / "runs")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    directory.RUNS.mkdir()
    return tmp_path


def write_sweep(home, content):
    path = home / "s.yaml"
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
            return subprocess.Popen(
                [sys.executable, "-m", "dask", *words],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env=os.environ | environment,
            )

    def add(self, runs_root, nanny=False, **environment):
        """A worker, or its nanny; two threads, which must not make two runs at a time."""
        words = ["worker", "--scheduler-file", self.file, "--nthreads", "2", "--nworkers", "1", "--no-dashboard"]
        words += ["--memory-limit", "0", "--host", "127.0.0.1", "--local-directory", str(self.folder)]
        words += ["--nanny" if nanny else "--no-nanny"]
        self.workers.append(self.dask(words, PGOLF_RUNS=str(runs_root), **environment))
        return self.workers[-1]

    def wait(self, count):
        from distributed import Client

        with Client(scheduler_file=self.file, set_as_default=False, timeout=20) as client:
            client.wait_for_workers(count, timeout=60)

    def close(self):
        for process in [*self.workers, self.scheduler]:
            if process.poll() is None:
                family = psutil.Process(process.pid).children(recursive=True)
                process.kill()
                for child in family:
                    child.kill() if child.is_running() else None
                process.wait()


@pytest.fixture
def machines(home):
    pytest.importorskip("distributed", reason='no Dask: pip install -e ".[cluster]"')
    opened = Machines(home)
    yield opened
    opened.close()


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return found


def slots(process):
    """Slots below a process, and their kernels."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if any("pgolf.sweeps.kernel_process" in word or "ipykernel" in word for word in child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found


def worker_of(nanny):
    """The process that a nanny watches, once it is there."""

    def find():
        for child in psutil.Process(nanny.pid).children():
            try:
                if "spawn_main" in " ".join(child.cmdline()):
                    return child
            except psutil.Error:
                continue

    return wait_for(find)


def figures(run_dir):
    result = read_result(run_dir)
    return result.val_bpb, result.roundtrip_val_bpb, result.bytes, result.artifact_sha256, result.steps


def expect_as_at_home(path, folder, names):
    """Runs are what a training in this process makes of their knobs, and their files whole."""
    table = load_runs(directory.RUNS, thorough=True)
    assert set(table[table.status == "complete"].run) >= set(names)
    for name in names:
        train(load_sweep(path).runs[name], folder / name)
        assert figures(directory.RUNS / "s" / name) == figures(folder / name), name


# Runs


def test_every_run_once_though_workers_are_killed(embedded, home, machines, capfd):
    names = [f"seed{n}" for n in range(12)]
    path = write_sweep(home, {"grid": {"seed": list(range(12))}})
    for _ in range(3):
        machines.add(directory.RUNS, nanny=True)
    machines.wait(3)
    rng, kills, trouble = random.Random(7), [], []

    def kill():
        try:
            while len(kills) < 5 and len(list(directory.RUNS.glob("s/*/result.json"))) < 11:
                time.sleep(rng.uniform(0.5, 3))
                victim = rng.choice(machines.workers)
                if victim.poll() is not None or not slots(victim):
                    continue
                children = slots(victim)
                if len(kills) % 2:  # a whole machine; another takes its place
                    process = worker_of(victim)
                    victim.kill()
                    process.kill()
                    machines.workers.remove(victim)
                    machines.add(directory.RUNS, nanny=True)
                    victim.wait()
                else:  # a process that its nanny starts anew
                    worker_of(victim).kill()
                kills.append(time.monotonic())
                _, alive = psutil.wait_procs(children, timeout=10)
                assert alive == []
        except BaseException as error:
            trouble.append(error)

    killer = threading.Thread(target=kill)
    killer.start()
    failures = run_sweep(path, cluster=machines.file)
    killer.join()
    said = capfd.readouterr()
    assert trouble == [] and failures == [] and len(kills) == 5
    assert said.out.count("goes to another") >= 3  # a victim may have been between two runs
    for name in names:
        assert sum(line.startswith(f"{name} ") and " bpb " in line for line in said.out.splitlines()) == 1
    assert "Traceback" not in said.out + said.err and "distributed." not in said.err
    assert sorted(p.parent.name for p in directory.RUNS.rglob("result.json")) == sorted(names)
    assert list(load_runs(directory.RUNS, thorough=True).status) == ["complete"] * 12
    expect_as_at_home(path, home / "direct", names[::3])


def test_a_store_of_its_own_comes_home(embedded, home, machines, monkeypatch, capfd):
    """One worker is killed when home has a resume file: another goes on from that. A stage gets its source."""
    monkeypatch.setattr(worker, "EVERY_SECONDS", 0.3)
    path = write_sweep(home, {"runs": {"bad": BAD, "long": LONG}})
    for name in ("one", "two"):
        machines.add(home / name)
    machines.wait(2)
    run_dir, seen = directory.RUNS / "s" / "long", {}

    def kill():
        wait_for(lambda: (run_dir / "resume.pt").exists() and (run_dir / "metrics.jsonl").exists())
        row = monitor.state(directory.RUNS, "s").set_index("run").loc["long"]
        seen["state"], seen["lines"] = row.state, (run_dir / "metrics.jsonl").read_bytes()
        (victim,) = [n for n in machines.workers if any("/s/long/" in " ".join(p.cmdline()) for p in slots(n))]
        victim.kill()
        machines.workers.remove(victim)
        # What joins with other code is not used.
        strange = home / "strange"
        (strange / "notebooks").mkdir(parents=True)
        (strange / "notebooks" / "train.ipynb").write_text('{"cells": []}', encoding="utf-8")
        machines.add(home / "three", PGOLF_ROOT=str(strange))

    killer = threading.Thread(target=kill)
    killer.start()
    failures = run_sweep(path, cluster=machines.file)
    killer.join()
    said = capfd.readouterr().out
    assert [f.run for f in failures] == ["bad"] and "TrainError: training loss is nan" in failures[0].reason
    assert said.count("bad ") == 2 and said.count("goes to another") == 1  # forecast, failure: no second try
    assert "not on our run store" in said
    assert seen["state"] == "running" and seen["lines"]
    assert read_result(run_dir).resumed == 1 and not (run_dir / "resume.pt").exists()
    assert set(load_runs(directory.RUNS).run) == {"bad", "long"}
    assert not list(directory.RUNS.glob(".canary*"))
    expect_as_at_home(path, home / "direct", ["long"])

    # A stage alone, on a worker that may have nothing of its source; and the stray one refused at the start.
    path = write_sweep(home, {"runs": {"long": LONG}, "stages": [{"sensitivity": {"tokens": 1024}}]})
    machines.wait(2)
    with pytest.raises(SweepError, match="has other code: bring its checkout to the state of this one"):
        run_sweep(path, cluster=machines.file)
    stray = machines.workers.pop()
    stray.kill()
    stray.wait()
    for one in (home / "one", home / "two"):  # whoever gets the stage has nothing of its source
        shutil.rmtree(one)
    assert run_sweep(path, cluster=machines.file) == []
    assert read_result(directory.RUNS / "s" / "sensitivity").source == "s/long"


CLIENT = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
CLIENT += "from pgolf.cli.main import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.skipif(sys.platform == "win32", reason="a process cannot send Ctrl-C to one other alone")
def test_slots_end_with_their_sweep(embedded, home, machines):
    """Killed, or stopped by Ctrl-C; the worker stays, and goes on with the next."""
    process = machines.add(directory.RUNS)
    path = write_sweep(home, {"runs": {"a": LONG | {"iterations": 2000}}})
    resume = directory.RUNS / "s" / "a" / "resume.pt"
    for end in (signal.SIGKILL, signal.SIGINT):
        resume.unlink(missing_ok=True)
        client = subprocess.Popen(
            [sys.executable, "-c", CLIENT, "sweep", str(path), "--cluster", machines.file],
            env=os.environ | {"PGOLF_RUNS": str(directory.RUNS)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_for(lambda: resume.exists() or client.poll() is not None)  # noqa: B023
        children = slots(process)
        assert len(children) == 2, client.communicate() if client.poll() is not None else children
        client.send_signal(end)
        out, err = client.communicate(timeout=30)
        assert "Traceback" not in out + err
        assert psutil.wait_procs(children, timeout=10)[1] == []
    assert client.returncode == 130 and "goes on where this one was" in err
    assert process.poll() is None


def test_a_run_that_no_worker_survives_is_given_up(home, monkeypatch, capsys):
    """The others are done. Without Dask: what a pool says and what becomes of a run are given here."""
    (bad, good) = plan(load_sweep(write_sweep(home, {"runs": {"bad": {}, "good": {"seed": 2}}})))
    tried = Counter()

    def attend(pool, one):
        tried[one.job.name] += 1
        if one.job is bad:
            raise cluster.Lost("no answer")
        return {"returncode": 0, "complete": True}

    def look(pool):
        pool.workers.setdefault("tcp://a:1", cluster.Worker("tcp://a:1", 1, "a", True, 0))
        pool.idle, pool.on_gpus = {"tcp://a:1"}, False
        return []

    monkeypatch.setattr(cluster, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(cluster, "look", look)
    monkeypatch.setattr(cluster, "_on_shared_store", attend)
    monkeypatch.setattr(cluster, "finish", lambda *_: [])
    pool = cluster.Pool(None, "tcp://s:1", {}, "", [], {}, 1)
    with tqdm(total=2, disable=True) as bar:
        (failure,) = cluster.run_jobs(pool, [bad, good], bar)
    assert failure.run == "bad" and "given up after 6 workers; the last: worker tcp://a:1 (a) fails" in failure.reason
    assert tried == {"bad": 6, "good": 1}


# Refusals


def test_without_dask_it_says_what_to_install(embedded, home, monkeypatch, capsys):
    path = write_sweep(home, {"runs": {"a": {}}})
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert main(["sweep", str(path), "--cluster", "tcp://127.0.0.1:1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert 'pip install -c constraints.txt -e ".[cluster]"' in line
    assert not list(directory.RUNS.glob(".canary*"))


def test_dask_is_imported_only_where_a_cluster_is_asked_for():
    code = "import sys, pgolf.cli.main, pgolf.sweeps.runner; print({'dask', 'distributed'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "set()", done.stderr


def test_where_nothing_answers_it_says_so(embedded, home, monkeypatch, capsys):
    pytest.importorskip("distributed", reason='no Dask: pip install -e ".[cluster]"')
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 1)
    path = write_sweep(home, {"runs": {"a": {}}})
    for address, words in {
        "tcp://127.0.0.1:1": "no scheduler answers there",
        "nowhere.json": "no such scheduler file, nor an address like tcp://host:8786",
    }.items():
        assert main(["sweep", str(path), "--cluster", address]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert address in line and words in line
    with pytest.raises(SweepError, match="as many notebooks at a time as it has workers"):
        run_sweep(path, 2, cluster="tcp://127.0.0.1:1")


def test_a_worker_with_other_data_is_refused(embedded, home):
    ours = RunConfig(track="nano")
    absent = ours.with_knobs(data_path="data/nowhere")
    told = worker.fingerprints([ours.model_dump(), absent.model_dump()])
    fingerprint = open_dataset(ours).fingerprint
    assert told[0] == {"fingerprint": fingerprint} and "no folder" in told[1]["problem"]

    class Away(cluster.Pool):
        def call(self, address, gone, function, *args):
            return told

    def problem(data):
        return cluster._problem_of_data(Away(None, "", {}, "", [], data, 1), "", threading.Event())

    knobs = {fingerprint: ours.model_dump(), "1": absent.model_dump()}
    assert "cannot read the data: data_path=data/nowhere: no folder" in problem(knobs)
    told.pop()
    assert problem({fingerprint: ours.model_dump()}) == ""
    assert "has other data at data_path=embedded" in problem({"0" * 64: ours.model_dump()})


@pytest.mark.parametrize("first", ["cpu", "gpu"])
def test_a_sweep_trains_on_gpus_or_on_cpus(monkeypatch, first):
    """A real pool, of which the scheduler's and the workers' answers are given here."""
    gpus = {"tcp://cpu:1": 0, "tcp://gpu:1": 8, "tcp://gpu:2": 8}

    class Client:
        status, scheduler = "running", None
        scheduler_info = staticmethod(lambda n_workers: {"workers": {a: {"status": "running"} for a in there}})
        run_on_scheduler = staticmethod(lambda *_: None)

    monkeypatch.setattr(cluster, "_inspect", lambda _, a, gone: cluster.Worker(a, 1, a[6:9], True, gpus[a], gone))
    monkeypatch.setattr(cluster, "POLL_SECONDS", 0.01)

    def pool(ranks=1):
        return cluster.Pool(Client, "tcp://s:1", {}, "", [], {}, ranks)

    def looked(pool):
        problems = cluster.look(pool)
        while pool.asked:
            problems += cluster.look(pool)
        return problems

    there = [f"tcp://{first}:1"]
    here = pool()
    assert looked(here) == [] and here.on_gpus == (first == "gpu")
    there = list(gpus)
    (problem, *others) = looked(here)
    assert (
        "sees no GPU, and this sweep trains on GPUs" if first == "gpu" else "has GPUs, and this sweep trains on"
    ) in problem
    assert len(others) == (first == "cpu") and looked(here) == []  # said once
    assert all(bool(one.gpus) == here.on_gpus for one in here.workers.values()) and here.workers
    assert looked(all_on_cpus := pool(0)) == [] and len(all_on_cpus.workers) == 3
    with pytest.raises(SweepError, match=r"worker tcp://cpu:1 \(cpu\) sees no GPU, and this sweep trains on GPUs"):
        cluster._introduce(pool())


# Files


def here(function, *args):
    """What Copy and push call, with the other machine in this process."""
    return function(*args)


@pytest.fixture
def away(home, monkeypatch):
    monkeypatch.setenv("PGOLF_RUNS", str(home / "away"))
    monkeypatch.setattr(worker, "PIECE", 7)
    return home / "away"


def test_files_go_out_and_come_home(home, away):
    ours = directory.RUNS / "s" / "a"
    (ours / "sub").mkdir(parents=True)
    for file, text in {"resume.pt": "x" * 20, "metrics.jsonl": "one\ntwo\n", "sub/result.json": "{}"}.items():
        (ours / file).write_text(text)
    (ours / "job.json").write_text("{}")
    worker.push(here, ours)
    there = away / "s" / "a"
    assert worker.checksums("s/a") == {
        file: worker.checksum(path) for file, path in worker.files_of(ours).items() if file != "job.json"
    }
    # It goes on there. What is only the beginning of what we have does not take its place.
    (there / "metrics.jsonl").write_text("one\n")
    (there / "log.txt").write_text("")
    (there / "resume.pt").write_text("y" * 30)
    (there / "result.json").write_text('{"a": 1}')
    copy = worker.Copy(here, ours)
    copy.refresh()
    assert (ours / "metrics.jsonl").read_text() == "one\ntwo\n" and (ours / "resume.pt").read_text() == "y" * 30
    assert (ours / "log.txt").read_text() == "" and not (ours / "result.json").exists()
    (there / "resume.pt").unlink()
    copy.settle(complete=True)
    assert (ours / "metrics.jsonl").read_text() == "one\n" and (ours / "result.json").read_text() == '{"a": 1}'
    assert not (ours / "resume.pt").exists() and not list(ours.rglob(".*.tmp"))


def test_a_file_that_changes_while_it_is_read_waits(home, away):
    ours, there = directory.RUNS / "s" / "a", away / "s" / "a"
    there.mkdir(parents=True)
    (there / "resume.pt").write_text("x" * 20)

    def call(function, *args):
        answer = function(*args)
        if function is worker.read:
            (there / "resume.pt").write_text("y" * random.randrange(20, 99))
        return answer

    copy = worker.Copy(call, ours)
    copy.refresh()
    assert not (ours / "resume.pt").exists()
    with pytest.raises(worker.CopyError, match="kept changing"):
        copy.settle(complete=True)


def test_what_ended_while_nobody_was_at_home_is_fetched_not_overwritten(home, away):
    ours, there = directory.RUNS / "s" / "a", away / "s" / "a"
    ours.mkdir(parents=True)
    (ours / "resume.pt").write_text("x")
    (ours / "metrics.jsonl").write_text("old\n")
    worker.push(here, ours)
    (there / "resume.pt").unlink()
    (there / "metrics.jsonl").write_text("new\n")
    files = {"metrics.jsonl": worker.checksum(there / "metrics.jsonl")}
    result = {"kind": "train", "artifact_sha256": None, "checkpoint_sha256": None, "files": files}
    (there / "result.json").write_text(json.dumps(result))
    worker.push(here, ours)
    assert worker.is_complete(there)
    worker.Copy(here, ours).settle(complete=True)
    assert worker.is_complete(ours) and not (ours / "resume.pt").exists()
    # But what is not what it was when it ended goes on from what we have.
    for file in ("result.json", "metrics.jsonl"):
        (ours / file).unlink()
    (ours / "resume.pt").write_text("x")
    (there / "metrics.jsonl").write_text("torn")
    worker.push(here, ours)
    assert sorted(path.name for path in there.iterdir()) == [".lock", ".ticket", "resume.pt"]


def test_whose_copy_it_is(home, away):
    ours, there = directory.RUNS / "s" / "a", away / "s" / "a"
    ours.mkdir(parents=True)
    worker.push(here, ours)
    (there / "resume.pt").write_text("x")
    worker.push(here, ours)
    assert (there / "resume.pt").exists()  # of the run that we still have: home was stopped before it came
    (ours / ".ticket").unlink()
    worker.push(here, ours)
    assert not (there / "resume.pt").exists()  # of one that we deleted
    (there / ".ticket").unlink()
    (there / "resume.pt").write_text("x")
    with pytest.raises(worker.CopyError, match="holds somebody else's run"):
        worker.push(here, ours)
    assert (there / "resume.pt").exists()


# pgolf worker


def test_gpus_go_in_groups(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,4,5")
    assert cli_cluster.gpu_groups(2) == ["0,1", "4,5"]
    with pytest.raises(ConfigError, match="does not divide the 4 GPUs"):
        cli_cluster.gpu_groups(3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert cli_cluster.gpu_groups(2) == []


@pytest.mark.skipif(sys.platform == "win32", reason="a process cannot send Ctrl-C to one other alone")
def test_a_worker_command_starts_as_many_and_ends_them(home, machines):
    process = subprocess.Popen(
        [sys.executable, "-c", CLIENT, "worker", machines.file, "--slots", "2"],
        env=os.environ | {"PGOLF_RUNS": str(directory.RUNS), "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    machines.wait(2)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 130 and "2 at a time: on the CPU" in out
    assert psutil.wait_procs(family, timeout=5)[1] == []
    assert Path(machines.file).exists()
