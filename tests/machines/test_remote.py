import argparse
import contextlib
import errno
import json
import multiprocessing
import os
import random
import shlex
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import safetensors.torch
import torch
import yaml
from pod import Pod, need_sshd

from pgolf.cli import remote as cli_remote
from pgolf.disk import checksum
from pgolf.machines import preflight, remote, remote_job, ssh, transfer
from pgolf.machines.ssh import RemoteError
from pgolf.reports import monitor
from pgolf.runs import directory, integrity
from pgolf.runs.result import Result, write_result
from pgolf.runs.table import load_runs

need_sshd()

# Stands for `pgolf sweep`: the files of a training, in their order, in a second, without torch; resumed as train() is.
TRAINING = """
import hashlib, json, os, shutil, sys, time
from pathlib import Path

plan, top = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
failed = []

def whole(path, content):
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

def append(path, line):
    with open(path, "a") as f:
        f.write(line + "\\n")

def train(run, made):
    (run / "error.json").unlink(missing_ok=True)
    whole(run / "config.json", (made / "config.json").read_bytes())
    if run.name in plan["fails"]:
        whole(run / "environment.json", b"{}")
        append(run / "log.txt", "it begins")
        whole(run / "error.json", json.dumps({"error": "TrainError", "message": "as asked"}).encode())
        raise ValueError("as asked")
    if run.name not in plan["bare"]:
        whole(run / "environment.json", b"{}")
    resume, log, metrics = run / "resume.pt", run / "log.txt", run / "metrics.jsonl"
    step = int(resume.read_bytes()[:8]) if resume.exists() else 0
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    if step:
        append(log, f"resumed at {step}")
    else:
        log.unlink(missing_ok=True)
    whole(metrics, "".join(json.dumps(row) + "\\n" for row in rows if row["step"] <= step).encode())
    while step < plan["steps"]:
        step += 1
        append(log, f"step {step}")
        append(metrics, json.dumps({"step": step, "at": time.time()}))
        if step % 5 == 0:  # of another size, since rsync does not tell apart times within a second
            whole(resume, b"%08d" % step + bytes([step]) * (100_000 + step))
        time.sleep(plan["pace"])
    while run.name == plan["waits"] and not (top / "go").exists():
        time.sleep(0.02)
    for name in ("checkpoint.safetensors", "artifact.pgolf"):
        whole(run / name, (made / name).read_bytes())
    result = json.loads((made / "result.json").read_text())
    told = {name: hashlib.sha256((run / name).read_bytes()).hexdigest() for name in ("log.txt", "metrics.jsonl")}
    result |= {"files": told, "finished": "2026-01-01T00:00:00"}
    said = {name: value for name, value in result.items() if name != "checksum"}
    result["checksum"] = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]
    whole(run / "result.json", json.dumps(result, indent=1).encode())
    resume.unlink(missing_ok=True)
    whole(run / "notebook.ipynb", json.dumps({"cells": [run.name] * 1000}).encode())

makes = sorted(Path(plan["made"]).iterdir())
whole(top / "runs" / plan["sweep"] / "sweep.json", json.dumps({"runs": [made.name for made in makes]}).encode())
for made in makes:
    run = top / "runs" / plan["sweep"] / made.name
    run.mkdir(parents=True, exist_ok=True)
    if not (run / "result.json").exists():
        append(top / "trained", made.name)
        whole(run / "job.json", b"{}")
        try:
            train(run, made)
        except Exception as error:
            print(f"{run.name} FAILED: {error}", flush=True)
            failed.append(run.name)
if failed:
    print(f"pgolf: {len(failed)} failed: {failed}", flush=True)
sys.exit(1 if failed else 0)
"""
SWEEP = {
    "name": "small", "track": "nano",
    "base": {"num_layers": 1, "model_dim": 64, "num_heads": 2, "num_kv_heads": 1},
    "grid": {"matrix_lr": [0.01, 0.02, 0.03]},
}  # fmt: skip


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A checkout of three files, and its runs."""
    root = tmp_path / "home"
    (root / "pgolf_core").mkdir(parents=True)
    for name in ("README.md", "pyproject.toml", "pgolf_core/__init__.py"):
        (root / name).write_text(name)
    monkeypatch.setattr(directory, "RUNS", root / "runs")
    for module in (preflight, transfer):
        monkeypatch.setattr(module, "ROOT", root)
    return root


@pytest.fixture
def pod(tmp_path):
    with Pod(tmp_path / "pod") as pod:
        yield pod


@pytest.fixture
def make(home, pod, tmp_path, monkeypatch):
    """A job of the stand-in, from keys of POD.yaml and the plan of the stand-in."""
    (tmp_path / "training.py").write_text(TRAINING)

    def make(checked=False, steps=20, pace=0.005, fails=(), bare=(), waits="", **keys):
        file = tmp_path / "small.yaml"
        file.write_text(yaml.safe_dump(SWEEP))
        job = remote_job.load_job(pod.yaml(**{"data": "there", "python": sys.executable} | keys), [file], {})
        made = tmp_path / "made"
        for name, config in job.sweeps[0].runs.items():
            _make_run(made / name, config)
        plan = {"made": str(made), "sweep": "small", "steps": steps, "pace": pace}
        plan |= {"fails": list(fails), "bare": list(bare), "waits": waits}
        (tmp_path / "plan.json").write_text(json.dumps(plan))
        words = f'cd ../.. && exec {sys.executable} -S {tmp_path}/training.py {tmp_path}/plan.json "$(pwd)"'
        monkeypatch.setattr(remote_job, "steps", lambda job, code: words)
        if not checked:
            monkeypatch.setattr(remote, "check", lambda job, say: None)
        return job

    return make


def _make_run(folder: Path, config) -> None:
    """What a training of these knobs would leave, but for its log, metrics and environment."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.model_dump()))
    checkpoint = safetensors.torch.save({"w": torch.full((50_000,), config.matrix_lr)})
    artifact = random.Random(config.hash).randbytes(100_000)
    (folder / "checkpoint.safetensors").write_bytes(checkpoint)
    (folder / "artifact.pgolf").write_bytes(artifact)
    sha = {name: checksum(folder / name) for name in ("checkpoint.safetensors", "artifact.pgolf")}
    result = Result(
        kind="train", config_hash=config.hash, seed=config.seed, track="nano", roundtrip_val_bpb=2.5, val_bpb=2.5,
        bytes={"weights": len(artifact), "code": 9}, total_bytes=len(artifact) + 9, cap_bytes=config.cap_bytes,
        artifact_sha256=sha["artifact.pgolf"], checkpoint_sha256=sha["checkpoint.safetensors"],
    )  # fmt: skip
    (folder / "result.json").write_text(json.dumps(vars(result)))


def contents(folder: Path) -> dict[str, bytes]:
    """Of all files but locks, and what hides."""
    names = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in names.items() if "/." not in f"/{name}"}


@pytest.fixture
def pulls(monkeypatch, home):
    """What was home after each pull; what should not have become less, did not. then(n): called after the nth."""

    class Pulls:
        def __init__(self):
            self.all, self.then = [], lambda n: None

    pulls, real = Pulls(), transfer.pull

    def pull(*arguments, **options):
        try:
            return real(*arguments, **options)
        finally:  # of a pull that was cut off too
            now, before = contents(directory.RUNS / "small"), (pulls.all or [{}])[-1]
            pulls.all.append(now)
            assert_no_less(before, now)
            pulls.then(len(pulls.all))

    monkeypatch.setattr(transfer, "pull", pull)
    return pulls


def assert_no_less(before: dict[str, bytes], now: dict[str, bytes]) -> None:
    for name, content in before.items():
        if name.endswith("error.json"):  # which goes when its run is tried again
            continue
        assert name in now, f"{name} is no more home"
        shorter = len(now[name]) < len(content)
        assert not (shorter and content.startswith(now[name])), f"{name}: {len(now[name])} of {len(content)} bytes"
        if name.endswith("log.txt") and now[name].split()[:1] == content.split()[:1]:  # not begun anew
            assert now[name].startswith(content), name
        if name.endswith("resume.pt"):
            assert int(now[name][:8]) >= int(content[:8]), name
    for name, content in now.items():
        if name.endswith("result.json"):
            run = directory.RUNS / "small" / Path(name).parent
            assert not integrity.damage(run, json.loads(content), thorough=True), name
        if name.endswith("resume.pt"):  # its rows are home
            rows = now[name.replace("resume.pt", "metrics.jsonl")].decode().splitlines()
            assert json.loads(rows[-1])["step"] >= int(content[:8]), name


def assert_all_home(pod: Pod, here_alone: set[str] = frozenset()) -> None:
    table = load_runs(directory.RUNS / "small", thorough=True)
    assert list(table.status) == ["complete"] * 3, table[["run", "status", "problem"]]
    here, there = contents(directory.RUNS / "small"), contents(pod.disk / "pgolf/runs/small")
    assert {name: here[name] for name in there} == there
    assert {name.split("/")[-1] for name in here.keys() - there.keys()} <= {"resume.pt"} | here_alone


def trains(pod: Pod) -> bool:
    with contextlib.suppress(psutil.Error):  # one that ended as we looked
        return any("training.py" in word for process in pod.processes() for word in process.cmdline())
    return False


def tries(pod: Pod, job) -> list[str]:
    folder = pod.disk / "pgolf/jobs" / job.id
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("try-") and not path.suffix)


def pgolf(*words: str) -> int:
    """`pgolf remote`."""
    parser = argparse.ArgumentParser()
    cli_remote.add_commands(parser.add_subparsers())
    arguments = parser.parse_args(["remote", *words])
    return arguments.command(arguments)


class Said(list):
    """Lines; words -> what to do when a line has them, once."""

    def __init__(self):
        super().__init__()
        self.when: dict[str, object] = {}

    def __call__(self, line: str) -> None:
        self.append(line)
        for words in [words for words in self.when if words in line]:
            self.when.pop(words)()

    def has(self, words: str) -> bool:
        return any(words in line for line in self)


@pytest.fixture
def said():
    return Said()


# From the start to the teardown


def test_all_is_home_before_the_teardown(make, pod, pulls, said, tmp_path, capsys):
    state = directory.RUNS / ".remote"
    teardown = f"mkdir {tmp_path}/then && cp -r {directory.RUNS} {pod.disk} {state}/*/state.json {tmp_path}/then"
    job = make(teardown=teardown, checked=True)
    assert remote.run(job, said) == 0
    assert_all_home(pod)
    then = tmp_path / "then"  # as it was when the machine went
    assert contents(then / "runs/small").items() >= contents(then / "disk/pgolf/runs/small").items()
    at_teardown = json.loads((then / "state.json").read_text())
    assert at_teardown["verified"] and at_teardown["teardown"].get("status") is None
    assert said.index(f"teardown: {teardown}") > next(i for i, line in enumerate(said) if "may go" in line)
    assert len(pulls.all) > 3 and tries(pod, job) == ["try-1"]
    assert not any(list(path.parent.glob("_canary*")) for path in (directory.RUNS / "x", pod.disk / "pgolf/runs/x"))

    pod.kill()  # as it went; again: nothing to do
    assert remote.run(job, said) == 0 and "nothing to do" in said[-1]
    assert pgolf("status") == 0
    assert "verified, on" in capsys.readouterr().out
    assert not load_runs(directory.RUNS).sweep.str.startswith(".").any()


def test_killed_at_random_moments(make, pod, pulls, said, monkeypatch):
    seed = int(os.environ.get("SEED_OF_KILLS", "7"))
    print(f"seed {seed}")
    moments = [random.Random(f"{seed} {i}").uniform(0, 0.6) for i in range(10)]
    monkeypatch.setattr(remote, "RESTARTS", 100)
    monkeypatch.setattr(remote, "LONGEST_WAIT", 0.05)
    job = make(steps=40, pace=0.01, waits="matrix_lr0.03")
    killed = []

    def kill() -> None:
        for i, moment in enumerate(moments):
            while i % 3 != 2 and not ended.is_set() and not trains(pod):  # each third: whatever it does then
                ended.wait(0.01)
            if ended.wait(moment):
                return
            pod.kill()
            killed.append(moment)
            pod.start()
        (pod.disk / "pgolf/go").touch()

    ended = threading.Event()
    killer = threading.Thread(target=kill)
    killer.start()
    try:
        assert remote.run(job, said) == 0
    finally:
        ended.set()
        killer.join()
    assert len(killed) == 10, killed
    assert_all_home(pod)
    assert said.has("died without an end; interrupted: small/")


def test_home_killed_at_random_moments(make, pod):
    seed = int(os.environ.get("SEED_OF_KILLS", "7"))
    print(f"seed {seed}")
    job = make(steps=60, pace=0.01, waits="matrix_lr0.03")
    before, fork = {}, multiprocessing.get_context("fork")
    for i in range(7):
        last = i == 6
        if last:
            (pod.disk / "pgolf/go").touch()
        process = fork.Process(target=lambda: os._exit(remote.run(job, lambda line: None)))
        process.start()
        process.join(None if last else random.Random(f"{seed} {i}").uniform(0.3, 1.2))
        process.kill()
        process.join()
        now = contents(directory.RUNS / "small")
        assert_no_less(before, now)
        before = now
    assert process.exitcode == 0
    assert tries(pod, job) == ["try-1"]
    assert_all_home(pod)


def test_network_cut_and_restored(make, pod, pulls, said):
    job = make(waits="matrix_lr0.03")
    pulls.then = lambda n: pod.cut() if n == 3 else None
    said.when["nothing listens"] = pod.mend
    said.when["pulling again"] = (pod.disk / "pgolf/go").touch
    assert remote.run(job, said) == 0
    assert_all_home(pod)
    assert tries(pod, job) == ["try-1"] and not said.when


def test_lost_for_good_then_there_again(make, pod, pulls, said, tmp_path):
    job = make(waits="matrix_lr0.02", give_up_minutes=0.001, teardown=f"touch {tmp_path}/torn")

    def when_two_are_there(n: int) -> None:
        if "matrix_lr0.02/resume.pt" in pulls.all[-1] and pod.process:
            pod.kill()

    pulls.then = when_two_are_there
    assert remote.run(job, said) == 2
    table = load_runs(directory.RUNS / "small").set_index("run")
    assert list(table.status) == ["complete", "interrupted"]
    assert "not been reachable since" in table.problem.iloc[1] and "last pull 2" in table.problem.iloc[1]
    assert list(monitor.state(directory.RUNS, "small").set_index("run").state) == ["complete", "dead", "waiting"]
    assert not (tmp_path / "torn").exists() and remote_job.states()[job.id]["state"] == "lost"

    pod.start()
    pulls.then = lambda n: None
    (pod.disk / "pgolf/go").touch()
    assert remote.run(job, said) == 0
    assert_all_home(pod)
    assert (tmp_path / "torn").exists() and len(tries(pod, job)) == 2


def test_given_up_here_it_went_on_there(make, pod, pulls, said):
    job = make(waits="matrix_lr0.02", give_up_minutes=0.001)
    pulls.then = lambda n: pod.cut() if "matrix_lr0.02/config.json" in pulls.all[-1] else None
    assert remote.run(job, said) == 2
    assert list(load_runs(directory.RUNS / "small").status) == ["complete", "interrupted"]
    pod.mend()
    states = []

    def see(n: int) -> None:
        states.append(monitor.state(directory.RUNS, "small").set_index("run").state["matrix_lr0.02"])
        if states[-1] == "running":
            (pod.disk / "pgolf/go").touch()

    pulls.then = see
    assert remote.run(job, said) == 0
    assert tries(pod, job) == ["try-1"] and states[:2] == ["dead", "running"]
    assert_all_home(pod)


def test_another_machine_goes_on_from_what_is_home(make, pod, pulls, said):
    job = make(waits="matrix_lr0.02", steps=25, give_up_minutes=0.001)

    def kill(n: int) -> None:
        if pod.process and int(pulls.all[-1].get("matrix_lr0.02/resume.pt", b"0" * 8)[:8]) == 25:
            pod.kill()

    pulls.then = kill
    assert remote.run(job, said) == 2
    pulls.then = lambda n: None
    pod.replace_disk()
    pod.start()
    (pod.disk / "pgolf").mkdir()
    (pod.disk / "pgolf/go").touch()
    assert remote.run(job, said) == 0
    assert_all_home(pod, {"checkpoint.safetensors"})  # which nothing there has a use for
    assert said.has("its disk is another one")
    assert (pod.disk / "pgolf/trained").read_text().split() == ["matrix_lr0.02", "matrix_lr0.03"]
    assert "resumed at 25" in (directory.RUNS / "small/matrix_lr0.02/log.txt").read_text()


def test_stopped_here_it_goes_on_there(make, pod, pulls, said, monkeypatch, capsys):
    job = make(waits="matrix_lr0.02")
    held = []

    def stop(n: int) -> None:
        if "matrix_lr0.02/config.json" in pulls.all[-2]:
            held.extend(
                monitor.state(directory.RUNS, "small").set_index("run").state[["matrix_lr0.01", "matrix_lr0.02"]]
            )
            raise KeyboardInterrupt

    pulls.then = lambda n: stop(n) if n > 1 else None
    monkeypatch.setattr("pgolf.machines.remote_job.load_job", lambda *_: job)
    words = ["run", str(pod.folder / "POD.yaml"), str(job.files[0])]
    assert pgolf(*words) == 130
    assert held == ["complete", "running"]
    assert "The job goes on on" in capsys.readouterr().err
    assert not monitor.is_held(directory.RUNS / "small/.lock") and pod.processes()
    pulls.then = lambda n: (pod.disk / "pgolf/go").touch()
    assert pgolf(*words) == 0
    assert "found on" in capsys.readouterr().out
    assert tries(pod, job) == ["try-1"]
    assert (pod.disk / "pgolf/trained").read_text().split() == list(job.sweeps[0].runs)
    assert_all_home(pod)


def test_what_is_said_when_stopped_is_so(make, monkeypatch, capsys):
    job = make()

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(remote, "run", stop)
    monkeypatch.setattr("pgolf.machines.remote_job.load_job", lambda *_: job)
    words = ["run", str(job.pod_file), str(job.files[0])]
    with pytest.raises(KeyboardInterrupt):  # nothing was started
        pgolf(*words)
    for state, said in (
        ("running", "goes on on root@"),
        ("died", "was last seen died on"),
        ("verified", "All is home"),
    ):
        remote_job.write_state(job, started="then", state=state)
        assert pgolf(*words) == 130 and said.replace("root", job.pod.user) in capsys.readouterr().err


def test_nothing_starts_twice(make, home, pod, said):
    job = make(waits="matrix_lr0.01")
    remote_job.start(job, 1, said)
    shutil.rmtree(transfer.folder(job.id))  # another machine at home, which knows nothing
    starters = [threading.Thread(target=remote_job.start, args=(job, 1, said)) for _ in range(3)]
    for starter in starters:
        starter.start()
    for starter in starters:
        starter.join()
    assert remote_job.look(job) == remote_job.Look("running", 1)
    assert (pod.disk / "pgolf/trained").read_text().split() == ["matrix_lr0.01"]
    assert all((pod.disk / "pgolf/checkout" / name).exists() for name in transfer.code_files())
    another = replace(job, id="another")
    with pytest.raises(RemoteError, match="sweep small runs there already, as job small-"):
        remote_job.start(another, 1, said)
    another = replace(another, sweeps=(replace(job.sweeps[0], name="large"),))
    (home / "README.md").write_text("changed")
    with pytest.raises(RemoteError, match=r"job small-.* runs there with other code \(README.md\)"):
        remote_job.start(another, 1, said)


def test_a_changed_sweep_file_orphans_no_job(make, pod, said, capsys):
    job = make(waits="matrix_lr0.01")
    remote_job.start(job, 1, said)
    job.files[0].write_text(yaml.safe_dump(SWEEP | {"base": {**SWEEP["base"], "seed": 2}}))
    changed = remote_job.load_job(job.pod_file, list(job.files), {})
    with pytest.raises(RemoteError, match=f"runs there already, as job {job.id}; go on with it first: pgolf") as error:
        remote.run(changed, said)
    (pod.disk / "pgolf/go").touch()
    assert pgolf("status") == 0 and (command := str(error.value).partition("first: ")[2]) in capsys.readouterr().out
    assert pgolf(*shlex.split(command)[2:]) == 0
    assert tries(pod, job) == ["try-1"]
    assert_all_home(pod)


def test_a_restart_goes_on_with_the_code_that_it_began_with(make, home, pod, pulls, said, monkeypatch):
    job = make(waits="matrix_lr0.02", steps=10)
    codes = []
    stand_in = remote_job.steps
    monkeypatch.setattr(remote_job, "steps", lambda job, code: codes.append(code) or stand_in(job, code))
    monkeypatch.setattr(remote_job, "_code", lambda: {"PGOLF_GIT_COMMIT": (home / "README.md").read_text()})

    def kill(n: int) -> None:
        if "matrix_lr0.02/resume.pt" in pulls.all[-1] and job.files[0].exists():
            pod.kill()
            (home / "README.md").write_text("edited meanwhile")
            job.files[0].unlink()  # the sweep file is not looked at again
            (pod.disk / "pgolf/go").touch()
            pod.start()

    pulls.then = kill
    assert remote.run(job, said) == 0
    assert_all_home(pod)
    assert codes == [{"PGOLF_GIT_COMMIT": "README.md"}] * 2 and tries(pod, job) == ["try-1", "try-2"]
    assert (pod.disk / "pgolf/checkout/README.md").read_text() == "README.md"
    another = replace(job, pod=job.pod.model_copy(update={"dir": str(pod.disk / "other")}))
    remote_job.start(another, 1, said, push=False)  # where it was never pushed to
    assert codes[-1] == {"PGOLF_GIT_COMMIT": "edited meanwhile"}
    assert (pod.disk / "other/checkout/README.md").read_text() == "edited meanwhile"
    (pod.disk / "other/checkout" / transfer.PUSHED_NAME).write_text("another job's")
    for process in pod.processes():
        process.kill()
    (home / "README.md").write_text("edited again")
    remote_job.start(another, 2, said, push=False)  # where another job pushed its own since
    assert codes[-1] == {"PGOLF_GIT_COMMIT": "edited again"}


def test_a_machine_that_comes_back_with_an_older_disk(make, pod, pulls, said):
    """What home has more of goes there; what the machine has more of stays."""
    job = make(waits="matrix_lr0.02", steps=25)

    def older(n: int) -> None:
        if int(pulls.all[-1].get("matrix_lr0.02/resume.pt", b"0" * 8)[:8]) == 25 and len(tries(pod, job)) == 1:
            pod.kill()
            complete, begun = (pod.disk / "pgolf/runs/small" / name for name in ("matrix_lr0.01", "matrix_lr0.02"))
            for path in complete.iterdir():
                if path.name != "config.json":
                    path.unlink()
            (begun / "resume.pt").write_bytes(b"%08d" % 5 + bytes([5]) * 100_000)
            rows = (begun / "metrics.jsonl").read_text().splitlines(keepends=True)
            (begun / "metrics.jsonl").write_text("".join(rows[:6]))
            (begun / "log.txt").write_text("".join(f"step {i}\n" for i in range(1, 7)))
            (pod.disk / "pgolf/go").touch()
            pod.start()

    pulls.then = older
    assert remote.run(job, said) == 0
    assert_all_home(pod, {"checkpoint.safetensors"})
    assert (pod.disk / "pgolf/trained").read_text().split() == [*job.sweeps[0].runs][:2] + [*job.sweeps[0].runs][1:]
    assert "resumed at 25" in (directory.RUNS / "small/matrix_lr0.02/log.txt").read_text()


def test_what_is_further_there_stays_there(make, home, pod, said):
    job = make(steps=5)
    here, there = directory.RUNS / "small/matrix_lr0.01", pod.disk / "pgolf/runs/small/matrix_lr0.01"
    for folder, step in ((here, 5), (there, 10)):
        folder.mkdir(parents=True)
        (folder / "resume.pt").write_bytes(b"%08d" % step)
        (folder / "metrics.jsonl").write_text("{}\n" * step)
    for rows, pushed in ((10, False), (4, True)):
        (there / "metrics.jsonl").write_text("{}\n" * rows)
        transfer.push_runs(job.pod, job.sweeps, f"{rows}", said)
        incoming = pod.disk / f"pgolf/runs/.incoming-{rows}/small/matrix_lr0.01"
        assert (incoming / "resume.pt").exists() == pushed
    assert (there / "resume.pt").read_bytes() == b"%08d" % 10  # until a try has its claim


def test_a_start_that_home_did_not_live_to_see(make, pod, said, tmp_path, monkeypatch):
    """The job is known from its own first look on, and what an earlier try was verified for is not so of this one."""
    job = make(waits="matrix_lr0.01")
    (pod.disk / "pgolf").mkdir()
    (pod.disk / "pgolf/go").touch()
    assert remote.run(job, said) == 0 and remote_job.read_state(job.id)["verified_number"] == 1
    real = remote_job.note
    for number in (2, 3):
        (pod.disk / "pgolf/go").unlink()
        shutil.rmtree(pod.disk / "pgolf/runs/small")
        shutil.rmtree(directory.RUNS / "small")
        monkeypatch.setattr(remote_job, "note", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            remote_job.start(job, number, said)
        monkeypatch.setattr(remote_job, "note", real)
        state = remote_job.read_state(job.id)
        assert state["starting"] == number and not state["verified"]
        large = replace(job, id="large-1", pod=job.pod.model_copy(update={"dir": str(pod.disk / "other")}))
        assert remote_job.not_home(large, False) == {job.id: "small"}
        if number == 2:
            assert remote.pull_once(job, said) == 0
        else:  # as from elsewhere, where nothing is known of it
            remote_job.write_state(job, number=1, verified="then", verified_number=1, verified_on={}, starting=None)
            assert remote.pull_once(job, said) == 0
        assert remote_job.not_home(large, False) == {job.id: "small"}
        assert remote_job.not_home(job, False) == {job.id: "small"}  # its own teardown waits too
        (pod.disk / "pgolf/go").touch()
        assert remote.run(job, said) == 0
    assert tries(pod, job) == ["try-1", "try-2", "try-3"]
    assert_all_home(pod)


def test_what_an_older_version_verified_ends_too(make, pod, said, tmp_path):
    """Its state names no try: the same command looks at what is there, verifies it, and tears down."""
    job = make(teardown="exit 3", fails=["matrix_lr0.03"])
    assert remote.run(job, said) == 2
    for teardown in ("exit 3", f"echo x >> {tmp_path}/torn"):  # and another command is no other machine
        job = make(teardown=teardown, fails=["matrix_lr0.03"])
        remote_job.write_state(job, verified_number=None)
        said.clear()
        assert remote.run(job, said) == (2 if teardown == "exit 3" else 1)
        assert said.has("a try of this job is there that was not verified") and said.has("all is home and verified")
    assert (tmp_path / "torn").read_text() == "x\n" and tries(pod, job) == ["try-1"]


def test_verified_and_no_teardown_then_another_home_went_on(make, pod, said):
    job = make()
    assert remote.run(job, said) == 0 and remote.run(job, said) == 0 and "nothing to do" in said[-1]
    remote_job.write_state(job, verified_number=7)  # another try than the one there
    assert remote.run(job, said) == 0 and said.has("found on") and tries(pod, job) == ["try-1"]
    assert remote.run(job, said) == 0 and "nothing to do" in said[-1]


def test_what_was_lost_here_since_is_pulled_again(make, pod, said, tmp_path):
    job = make()
    assert remote.run(job, said) == 0
    shutil.rmtree(directory.RUNS / "small/matrix_lr0.02")
    (directory.RUNS / "small/matrix_lr0.03/artifact.pgolf").write_bytes(b"damaged")
    job = make(teardown=f"touch {tmp_path}/torn")
    assert remote.run(job, said) == 0
    assert said.has("small/matrix_lr0.02: nothing of it is there") and said.has("small/matrix_lr0.03: damaged")
    assert_all_home(pod)
    assert (tmp_path / "torn").exists() and tries(pod, job) == ["try-1"]


def test_a_machine_that_was_lost_and_comes_back(make, pod, said, tmp_path):
    """The job was verified on another since; each refusal names a command that leads out."""
    lost = make(waits="matrix_lr0.01", dir=str(pod.disk / "lost"))
    remote_job.start(lost, 1, said)
    for process in pod.processes():
        process.kill()
    (pod.disk / "pgolf").mkdir()
    (pod.disk / "pgolf/go").touch()
    assert remote.run(make(teardown=f"echo x >> {tmp_path}/torn"), said) == 0
    large = replace(lost, id="large-1")  # on the machine that came back
    assert list(remote_job.not_home(large, False)) == [lost.id]
    words = shlex.split(remote_job.again(lost.id, large))
    assert words[words.index("run") + 1] == str(lost.pod_file)
    for teardown in ("", f"echo x >> {tmp_path}/torn"):
        again = make(teardown=teardown, dir=str(pod.disk / "lost"))
        assert remote.run(again, said) == 0
        assert remote_job.not_home(large, False) == {}
        assert remote.run(again, said) == 0 and "nothing to do" in said[-1]
    assert (tmp_path / "torn").read_text() == "x\nx\n"


def test_a_machine_that_ended_and_an_address_that_refuses(make, pod, said, monkeypatch):
    job = make()
    assert remote.run(job, said) == 0

    def refuse(*_, **__):
        raise RemoteError("no support of PTY")

    monkeypatch.setattr(remote_job, "run_script", refuse)
    assert remote.run(job, said) == 0 and "nothing to do" in said[-1]


def test_what_failed_in_a_try_that_another_home_began(make, pod, said):
    job = make(fails=["matrix_lr0.01"], waits="matrix_lr0.02")
    remote_job.start(job, 1, said)
    while not (pod.disk / "pgolf/runs/small/matrix_lr0.02/config.json").exists():
        pass
    shutil.rmtree(transfer.folder(job.id))
    old = directory.RUNS / "small/matrix_lr0.03/error.json"
    old.parent.mkdir(parents=True)
    old.write_text('{"error": "of a try before"}')
    assert remote.pull_once(job, said) == 0
    assert (directory.RUNS / "small/matrix_lr0.01/error.json").exists() and not old.exists()


def test_what_another_jobs_teardown_took(make, pod, said, tmp_path):
    job = make(teardown=f"touch {tmp_path}/torn")
    other = pod.disk / "pgolf/jobs/large-123"
    other.mkdir(parents=True)
    (other / "try-1").write_text("1 another-boot")
    assert remote.run(job, said) == 2
    before = remote_job.read_state(job.id)
    large = replace(job, id="large-123")
    remote_job.write_state(large, verified="then", teardown={"begun": "9999", "status": 0})
    assert remote.run(job, said) == 2 and not said.has("the machine went with")  # for it answers
    pod.kill()
    for begun, status, code in ((before["verified"][:4], 0, 2), ("9999", 1, 2), ("9999", 0, 0)):
        remote_job.write_state(large, verified="then", teardown={"begun": begun, "status": status})
        assert remote.run(job, said) == code
    assert said.has("the machine went with job large-123") and not (tmp_path / "torn").exists()
    assert remote.run(job, said) == 0 and "nothing to do" in said[-1]


def test_folders_of_two_users(make, pod):
    """The same name, in the home of each."""
    job = make(dir="pgolf-remote")
    other = replace(job, id="large-1", pod=job.pod.model_copy(update={"user": "another"}))
    remote_job.write_state(other, started="then")
    assert remote_job.not_home(job, False) == {"large-1": "small"}
    everywhere = {"dir": str(pod.disk / "pgolf")}
    remote_job.write_state(replace(other, pod=other.pod.model_copy(update=everywhere)))
    assert remote_job.not_home(replace(job, pod=job.pod.model_copy(update=everywhere)), False) == {}


def test_a_teardown_that_began_is_not_forgotten(make, pod, said, monkeypatch):
    job = make(teardown="exit 3")
    assert remote.run(job, said) == 2
    large = replace(job, id="large-1", pod=job.pod.model_copy(update={"dir": "elsewhere"}))
    remote_job.write_state(large, started="then")
    for _ in range(2):
        assert remote.run(job, said) == 2 and said[-1].startswith("job large-1")
        pod.kill()  # the machine is gone: what home knows is enough
    remote_job.write_state(large, verified="then")
    assert remote.run(job, said) == 2 and said.has("TEARDOWN FAILED (exit status 3)")


def test_damaged_here(make, said, capsys, monkeypatch):
    job = make()
    transfer.folder(job.id).mkdir(parents=True)
    (transfer.folder(job.id) / "state.json").write_text("{")
    assert pgolf("status") == 0 and "its state.json cannot be read" in capsys.readouterr().out
    monkeypatch.setattr("pgolf.machines.remote_job.load_job", lambda *_: job)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "state.json")

    monkeypatch.setattr(remote, "run", full)
    with pytest.raises(RemoteError, match=r"^state.json: No space left on device; the same command goes on$"):
        pgolf("run", str(job.pod_file), str(job.files[0]))


def test_two_numbers_do_not_run_at_once(make, pod, said):
    job = make(waits="matrix_lr0.01")
    remote_job.start(job, 5, said)
    assert remote_job.start(job, 2, said) == remote_job.Look("running", 5)  # as a home does that knows of no try
    folder = pod.disk / "pgolf/jobs" / job.id
    script = remote_job.TRY % {"number": 7, "settle": "", "steps": "touch began"}
    (folder / "try-7.sh").write_text(script)
    subprocess.run(["sh", "try-7.sh"], cwd=folder, check=True)  # and one that looked just before
    assert tries(pod, job) == ["try-5"] and not (folder / "began").exists()
    for number in (3, 9):  # of two that claim at the same moment the lower goes on
        claim = f"{remote_job.LIBRARY}\necho {os.getpid()} $(since {os.getpid()})"
        for path in folder.glob("try-*"):
            path.unlink()
        done = subprocess.run(["sh", "-c", claim], capture_output=True, text=True)
        (folder / "try-6").write_text(done.stdout)
        (folder / f"try-{number}.sh").write_text(script.replace("n=7", f"n={number}"))
        subprocess.run(["sh", f"try-{number}.sh"], cwd=folder, check=True)
        assert (folder / "began").exists() == (number == 3)
        (folder / "began").unlink(missing_ok=True)


def test_its_environment(make, home, pod, monkeypatch):
    """Of the command that goes on with a job, and of the runs there."""
    monkeypatch.setenv("NUM_LAYERS", "3")
    monkeypatch.setenv("PGOLF_RUNS", "/my runs")
    job = make()
    words = shlex.split(job.command)
    assert words[:5] == ["env", "NUM_LAYERS=3", "PGOLF_RUNS=/my runs", "pgolf", "remote"]
    for dirty in (True, False):
        told = {"git_commit": "abc", "git_dirty": dirty}
        with monkeypatch.context() as patch:
            patch.setattr(directory, "describe_environment", lambda _, told=told: told)
            code = remote_job._code()
        with monkeypatch.context() as patch:
            for name, value in (code | {"GIT_DIR": "/nowhere"}).items():
                patch.setenv(name, value)
            there = directory.describe_environment(torch.device("cpu"))
        assert {name: there[name] for name in told} == told


def test_a_run_that_failed_is_home_with_its_reason(make, pod, pulls, said, tmp_path):
    count = f"echo x >> {tmp_path}/torn"
    assert remote.run(make(fails=["matrix_lr0.02"], teardown=count), said) == 1
    table = load_runs(directory.RUNS / "small").set_index("run")
    assert list(table.status) == ["complete", "failed", "complete"]
    assert table.problem.iloc[1] == "TrainError: as asked"
    assert said.has("1 failed; all is home and verified: the machine may go") and said[-1] == "torn down"
    assert remote.run(make(teardown=count), said) == 0  # the machine is there after all: what failed is tried again
    assert_all_home(pod)
    assert (tmp_path / "torn").read_text() == "x\nx\n"


def test_its_own_python_and_setup(home, pod, said, tmp_path, monkeypatch):
    """install.py there makes a .venv, of a python that only says what it is asked."""
    monkeypatch.setenv("MATRIX_LR", "0.03")
    (home / "tools").mkdir()
    (home / "tools/install.py").write_text(
        "import os, pathlib\npathlib.Path('.venv/bin').mkdir(parents=True, exist_ok=True)\n"
        "pathlib.Path('.venv/bin/python').write_text("
        '\'#!/bin/sh\\necho "$@"; cat up "$4"; echo $MATRIX_LR $NUM_LAYERS; echo $PGOLF_RUNS; exit 9\')\n'
        "os.chmod('.venv/bin/python', 0o755)\n"
    )
    file = tmp_path / "it's $small.yaml"
    file.write_text(yaml.safe_dump(SWEEP))
    pod_file = pod.yaml(data="there", setup="echo a 'setup' > up\nexit 0")
    job = remote_job.load_job(pod_file, [file], {"num_heads": "1"}, seeds=[1, 2])
    (home / "pgolf_core/old.py").touch()
    assert remote.run(job, said) == 2
    assert said.has("the job on 127.0.0.1 ended with exit status 9: ")
    log = (transfer.folder(job.id) / "try-1.log").read_text()
    top = pod.disk / "pgolf"
    assert log.splitlines()[0] == (
        f"-m pgolf.cli.main sweep {top}/jobs/{job.id}/0-small/{file.name} -k num_heads=1 --seeds 1 2"
    )
    assert log.splitlines()[1:] == ["a setup", *file.read_text().splitlines(), "0.03", f"{top}/runs"]
    (home / "pgolf_core/old.py").unlink()  # and not there for long
    assert (top / "checkout/pgolf_core/old.py").exists()
    assert remote.run(replace(job, pod=job.pod.model_copy(update={"setup": "false"})), said) == 2
    assert said.has("ended with exit status 3: setup failed")
    assert not (top / "checkout/pgolf_core/old.py").exists() and (top / "checkout/up").exists()


def test_no_teardown_before_the_least_is_home(make, pod, said, tmp_path):
    job = make(fails=[], bare=["matrix_lr0.02"], teardown=f"touch {tmp_path}/torn")
    for _ in range(2):
        assert remote.run(job, said) == 2
        assert said.has("NOT VERIFIED") and said.has("small/matrix_lr0.02: has no environment.json")
        assert not (tmp_path / "torn").exists()
        said.clear()


def test_a_teardown_that_fails_is_said_and_tried_again(make, pod, said, tmp_path):
    job = make(teardown=f"echo x >> {tmp_path}/torn; exit 3")
    for count in (1, 2):
        assert remote.run(job, said) == 2
        assert said.has(f"TEARDOWN FAILED (exit status 3): THE MACHINE IS STILL PAID FOR. By hand: {job.pod.teardown}")
        assert (tmp_path / "torn").read_text() == "x\n" * count
    assert tries(pod, job) == ["try-1"]
    assert remote.run(make(teardown="true"), said) == 0


@pytest.mark.parametrize("kind", ["running", "ended", "dead"])
def test_no_teardown_while_another_job_there_is_not_home(make, home, pod, said, tmp_path, kind):
    job = make(teardown=f"touch {tmp_path}/torn")
    shutil.copytree(home, pod.disk / "pgolf/checkout")  # of the other job
    other = pod.disk / "pgolf/jobs/large-123"
    other.mkdir(parents=True)
    (other.parent / "pushed-456").mkdir()  # and never started
    (other / "sweeps").write_text("large\n")
    script = f"{remote_job.LIBRARY}\necho {os.getpid()} $(since {os.getpid()})"
    claim = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout
    (other / "try-1").write_text(claim if kind == "running" else "1 another-boot")
    if kind == "ended":
        (other / "try-1.status").write_text("0\n")
    words = "job large-123 (large) is there and not home, so the machine stays; go on with it first"
    large = replace(job, id="large-123")
    verified = {"verified_number": 1, "verified": "then", "verified_on": remote_job.place(job.pod)}
    for state in (
        None, {"number": 1, "started": "then"}, verified | {"verified_number": 2}, verified | {"verified_number": None},
        verified | {"verified_on": remote_job.place(job.pod) | {"port": 1}},
    ):  # fmt: skip
        if state:
            remote_job.write_state(large, **state)
        assert remote.run(job, said) == 2
        assert said[-1].startswith(words) and not (tmp_path / "torn").exists()
    remote_job.write_state(large, **verified)
    if kind != "ended":  # since it was home, somebody else began it anew
        assert remote.run(job, said) == 2 and not (tmp_path / "torn").exists()
        (other / "try-1.status").write_text("0\n")
    remote_job.write_state(replace(large, id="x", pod=job.pod.model_copy(update={"dir": "elsewhere"})), started="then")
    assert remote.run(job, said) == 2 and not (tmp_path / "torn").exists()
    shutil.rmtree(transfer.folder("x"))
    assert remote.run(job, said) == 0
    assert (tmp_path / "torn").exists() and tries(pod, job) == ["try-1"]


def test_no_teardown_of_a_machine_where_nobody_answers(make, pod, said, tmp_path, monkeypatch):
    job = make(teardown=f"touch {tmp_path}/torn")
    monkeypatch.setattr(os, "sync", pod.cut)  # right after all is home
    assert remote.run(job, said) == 2 and remote.run(job, said) == 2
    assert said.has("nobody knows what else runs there") and not (tmp_path / "torn").exists()
    pod.mend()
    assert remote.run(job, said) == 0 and (tmp_path / "torn").exists()


def test_what_one_machine_verified_tears_no_other_down(make, pod, said, tmp_path):
    job = make(teardown="exit 3")
    assert remote.run(job, said) == 2
    shutil.rmtree(directory.RUNS / "small/matrix_lr0.03")
    job = make(teardown="exit 3", dir=str(pod.disk / "other"))
    said.clear()
    assert remote.run(job, said) == 2
    begun = next(i for i, line in enumerate(said) if line.startswith("started on"))
    assert begun < said.index("teardown: exit 3")
    assert (pod.disk / "other/trained").read_text().split() == ["matrix_lr0.03"]
    assert list(load_runs(directory.RUNS / "small", thorough=True).status) == ["complete"] * 3


def test_teardowns_that_a_shell_can_read(pod):
    machine = ssh.load_pod(pod.yaml())
    for command, right in [
        ("~/bin/no-such-tool", False), ("no-such-tool 3", False), ("K=v no-such-tool 3", False), ("K=v", True),
        ("K=v true", True), ("cd x && y", True), ("source x", True), ("sh -c x", True), ("no | such", True),
    ]:  # fmt: skip
        assert (preflight._teardown_problem(machine.model_copy(update={"teardown": command})) == "") == right, command


def test_another_rsync(tmp_path, monkeypatch):
    assert ssh.local_tools() == ""
    (tmp_path / "rsync").write_text("#!/bin/sh\necho openrsync: protocol version 29")
    (tmp_path / "rsync").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert "macOS's own rsync will not do: `brew install rsync`; on Windows, work in WSL" in ssh.local_tools()


def test_a_setup_that_no_shell_can_read_fails_once(pod, tmp_path):
    job = remote_job.load_job(pod.yaml(python=sys.executable, setup="source venv/bin/activate ("), [], {})
    (tmp_path / "checkout").mkdir()
    (tmp_path / "jobs/none").mkdir(parents=True)
    done = subprocess.run(["sh", "-c", remote_job.steps(job, {})], cwd=tmp_path / "jobs/none", capture_output=True)
    assert done.returncode == remote_job.BEGAN_NOT and done.stdout == b"setup failed\n"


def test_no_training_where_torch_sees_too_few_gpus(pod):
    job = remote_job.load_job(pod.yaml(python=sys.executable, gpus=99), [], {})
    [line] = [line for line in remote_job.steps(job, {}).splitlines() if "device_count" in line]
    done = subprocess.run(["sh", "-c", f"python={sys.executable}\n{line}"], capture_output=True, text=True)
    assert done.returncode == remote_job.BEGAN_NOT and "GPUs, 99 are needed: " in done.stderr


def test_what_differs_there_is_pulled_again(make, pod, said, monkeypatch):
    """Equal in size and time, so that only checksums tell."""
    job, real = make(), transfer.differing

    def spoil(*arguments):
        path = directory.RUNS / "small/matrix_lr0.03/kernel.log"
        there = pod.disk / "pgolf/runs/small/matrix_lr0.03/kernel.log"
        for one, content in ((there, b"right"), (path, b"wrong")):
            one.write_bytes(content)
            os.utime(one, (1e9, 1e9))
        return real(*arguments)

    monkeypatch.setattr(transfer, "differing", spoil)
    assert remote.run(job, said) == 0
    assert_all_home(pod)


def test_what_cannot_be_verified_is_not_tried_for_ever(make, pod, said, tmp_path, monkeypatch):
    job = make(teardown=f"touch {tmp_path}/torn", give_up_minutes=0.001)

    def differing(*_):
        raise RemoteError("a file there cannot be read")

    with monkeypatch.context() as patch:
        patch.setattr(transfer, "differing", differing)
        assert remote.run(job, said) == 2
    assert said[-1].startswith("NOT VERIFIED, so the machine must not go: a file there cannot be read")
    assert remote_job.read_state(job.id)["state"] == "unverified" and not (tmp_path / "torn").exists()
    assert remote.run(job, said) == 0 and (tmp_path / "torn").exists()


def test_torn_there_is_not_home(home, pod, make):
    job = make()
    config = "pgolf/runs/small/matrix_lr0.01/config.json"
    for path, content in ((pod.disk / config, "{"), (directory.RUNS / "small/matrix_lr0.01/config.json", "{}")):
        path.parent.mkdir(parents=True)
        path.write_text(content)
    (pod.disk / "pgolf/jobs" / job.id).mkdir(parents=True)
    kept = transfer.pull(job.pod, job.id, ["small"]).kept
    assert kept == {"small/matrix_lr0.01/config.json": transfer.TORN}
    assert transfer.differing(job.pod, job.id, ["small"], kept) == ["small/matrix_lr0.01/config.json"]


# Disks that run full


@pytest.fixture
def small_disk():
    """Mounts a small file system on a folder."""
    if os.geteuid():
        pytest.skip("only root can mount a small disk")
    mounted = []

    def mount(folder: Path, size: int) -> None:
        folder.mkdir(exist_ok=True)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], capture_output=True)
        if done.returncode:
            pytest.skip("no small disk can be mounted here")
        mounted.append(folder)

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path) -> Path:
    """Take all that is free."""
    with open(folder / "filler", "wb", buffering=0) as f:
        for piece in (1 << 16, 1 << 12, 1):
            try:
                while f.write(bytes(piece)):
                    pass
            except OSError:
                continue
    return folder / "filler"


def test_disk_there_runs_full(small_disk, make, pod, pulls, said):
    small_disk(pod.disk, 4_000_000)
    job = make(steps=60, pace=0.02)
    full = []
    pulls.then = lambda n: full or "matrix_lr0.02/log.txt" not in pulls.all[-1] or full.append(fill(pod.disk))
    assert remote.run(job, said) == 2
    assert said.has("ended with exit status 1")
    statuses = set(load_runs(directory.RUNS / "small").status)
    assert statuses <= {"complete", "interrupted"} and "interrupted" in statuses
    full[0].unlink()
    assert remote.run(job, said) == 0
    assert_all_home(pod)


def test_disk_here_runs_full(small_disk, make, pod, pulls, said, home):
    small_disk(home / "runs", 4_000_000)
    job = make(waits="matrix_lr0.03")
    pulls.then = lambda n: fill(directory.RUNS) if n == 2 else None
    said.when["the disk is full"] = (directory.RUNS / "filler").unlink
    said.when["pulling again"] = (pod.disk / "pgolf/go").touch
    assert remote.run(job, said) == 0
    assert_all_home(pod)
    assert not said.when


# Before money is spent


def test_checks_name_everything_that_is_wrong(home, pod, make, said):
    job = make(checked=True)
    pod_file = pod.yaml(data="there", gpus=99, free_gb=1e6, python="/no/python", teardown="no-such-tool --id 3")
    job = remote_job.load_job(pod_file, list(job.files), {"cap_bytes": "10000"})
    configs = job.sweeps[0].runs
    one = next(iter(configs))
    runs_of_100 = configs | {one: configs[one].model_copy(update={"world_size": 100})}
    job = replace(job, sweeps=(replace(job.sweeps[0], runs=runs_of_100),))
    with pytest.raises(RemoteError, match="6 of 15 checks failed; nothing was started"):
        remote.check(job, said)
    wrong = [line for line in said if line.startswith("WRONG")]
    for words in (
        "forecast over the cap, so not started", "no command no-such-tool here",
        "gpus: 99, and a run has nproc 100; set gpus: 100", "/no/python is not there",
        "0 GPUs by nvidia-smi -L, and gpus: 99", "and 1000000.0 GB needed; take a larger disk",
    ):  # fmt: skip
        assert sum(words in line for line in wrong) == 1, (words, said)
    assert said[-1] == "ok    a file written there came home whole"
    assert [path.name for path in (pod.disk / "pgolf/runs").iterdir()] == []


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"key": "other_key"}, "other_key is not accepted; put its .pub into authorized_keys there"),
        ({"port": 1}, "port 1: nothing listens there; look at port:"),
        ({"host": "no-such-host.invalid"}, "no-such-host.invalid port .*: no such host; look at host:"),
    ],
)
def test_not_reachable(home, pod, make, said, keys, words):
    job = make(checked=True, **keys)
    with pytest.raises(RemoteError, match="1 of 7 checks failed"):
        remote.run(job, said)
    with pytest.raises(ssh.UnreachableError, match=words):
        remote_job.look(job)


def test_checks_wait_where_nobody_answers(make, pod, said):
    job = make(checked=True)
    pod.cut()
    with pytest.raises(ssh.UnreachableError):
        remote._check_anew(job, said)
    assert said == []
    pod.mend()
    remote._check_anew(job, said)
    assert said and all(line.startswith("ok ") for line in said)
    with pytest.raises(RemoteError) as error:
        remote._check_anew(make(checked=True, gpus=99), said)
    assert error.type is RemoteError and "WRONG 0 GPUs by nvidia-smi -L" in "\n".join(said)


def test_an_address_that_gives_only_a_terminal(pod):
    """As a provider's proxy does: on its output."""
    machine = ssh.load_pod(pod.yaml())
    with pytest.raises(RemoteError, match="no support of PTY; this address takes terminals alone: use"):
        ssh.run_script(machine, "echo Error: no support of PTY; exit 1")


def test_no_rsync_there(home, tmp_path, said):
    path = tmp_path / "bin"
    path.mkdir()
    for name in ("sh", "dirname", "df", "awk", "tail", "mkdir", "grep", "sha256sum", "bash"):
        (path / name).symlink_to(shutil.which(name))
    with Pod(tmp_path / "other", str(path)) as other:
        job = remote_job.load_job(other.yaml(data="there", python=sys.executable), [], {})
        with pytest.raises(RemoteError, match="1 of 11 checks failed"):
            remote.check(job, said)
    assert "WRONG rsync is not there; install it: apt-get install rsync" in said


def test_a_canary_that_does_not_come_home(home, pod, make, said, monkeypatch):
    real = transfer.rsync

    def rsync(pod, words, cwd, names=None):
        done = real(pod, words, cwd, names)
        for path in cwd.rglob("canary"):
            path.write_bytes(path.read_bytes()[:-1] + b"?")
        return done

    monkeypatch.setattr(transfer, "rsync", rsync)
    with pytest.raises(RemoteError, match="1 of 14 checks failed"):
        remote.check(make(checked=True), said)
    assert "a file written there did not come home whole" in said[-1]


def test_pod_file(tmp_path):
    path = tmp_path / "POD.yaml"
    path.write_text("hots: a\nport: many\nkey: no_such_key\ndir: my folder\ndata: maybe\npython: python3\n")
    with pytest.raises(RemoteError) as error:
        ssh.load_pod(path)
    for words in (
        "hots: no such key; did you mean host?", "host: is not there", "port: 'many': expected a valid integer",
        "dir: 'my folder': expected a folder there", "data: 'maybe': expected 'push' or 'there'",
        "python: 'python3': expected an absolute path there",
    ):  # fmt: skip
        assert words in str(error.value)
    path.write_text("host: a\nkey: no_such_key")
    with pytest.raises(RemoteError, match=r"key: no such file: .*no_such_key"):
        ssh.load_pod(path)
    (tmp_path / "id").touch()
    path.write_text("host: a\nkey: id")
    assert ssh.load_pod(path).key == str(tmp_path / "id")
    assert ssh.load_pod(path).dir == "pgolf-remote"
    for text in ("host: -oProxyCommand=x", "[1, 2]", "host: [", "host: a\nuser: -x", "host: a\ndir: /a/$(b)"):
        path.write_text(text)
        with pytest.raises(RemoteError):
            ssh.load_pod(path)


# What comes home


@pytest.mark.parametrize(
    "name, here, there, expected",
    [
        ("log.txt", b"a\nb\n", b"a\n", b"a\nb\n"),  # its disk was full, or is another one
        ("log.txt", b"a\nb\n", b"", b"a\nb\n"),
        ("log.txt", b"a\n", b"a\nb\n", b"a\nb\n"),
        ("metrics.jsonl", b"1\n2\n3\n", b"1\n4\n", b"1\n4\n"),  # resumed
        ("resume.pt", b"12345", b"123", b"12345"),
        ("resume.pt", b"12345", b"67", b"67"),
        ("config.json", b'{"a": 1}', b'{"a": 1, "b', b'{"a": 1}'),
        ("config.json", None, b"{", None),
        ("kernel.log", None, b"", b""),
    ],
)
def test_what_takes_the_place_of_what(home, pod, name, here, there, expected):
    machine = ssh.load_pod(pod.yaml())
    run, place = directory.RUNS / "A/run", pod.disk / "pgolf/runs/A/run"
    for folder in (run, place, pod.disk / "pgolf/jobs/job"):
        folder.mkdir(parents=True)
    (place / name).write_bytes(there)
    if here is not None:
        (run / name).write_bytes(here)
    transfer.pull(machine, "job", ["A"])
    assert ((run / name).read_bytes() if (run / name).exists() else None) == expected


def test_a_pull_that_was_killed_leaves_no_harm(home, pod):
    machine = ssh.load_pod(pod.yaml())
    arriving = transfer.folder("job") / ".arriving/A/run"
    for folder in (arriving / ".partial", pod.disk / "pgolf/runs/A/run", pod.disk / "pgolf/jobs/job"):
        folder.mkdir(parents=True)
    (pod.disk / "pgolf/runs/A/run/log.txt").write_text("a\nb\n")
    for name in ("log.txt", ".log.txt.AbCdEf", ".partial/log.txt"):
        (arriving / name).write_text("a\n")
    transfer.pull(machine, "job", ["A"])
    assert contents(directory.RUNS / "A") == {"run/log.txt": b"a\nb\n"}
    assert list(transfer.folder("job").iterdir()) == []


def test_a_complete_run_stays_and_a_result_waits_for_its_files(home, pod, make):
    job = make()
    name, config = next(iter(job.sweeps[0].runs.items()))
    run, place = directory.RUNS / "small" / name, pod.disk / "pgolf/runs/small" / name
    _make_run(place, config)
    (pod.disk / "pgolf/jobs" / job.id).mkdir(parents=True)
    (place / "log.txt").write_text("all of it")
    made = {f: v for f, v in json.loads((place / "result.json").read_text()).items()}
    write_result(place, Result(**made))
    artifact = (place / "artifact.pgolf").read_bytes()
    (place / "artifact.pgolf").write_bytes(artifact[:50])  # a disk that lies
    assert transfer.pull(job.pod, job.id, ["small"]).held == {f"small/{name}": "artifact.pgolf"}
    assert not (run / "result.json").exists() and (run / "log.txt").exists()
    (place / "artifact.pgolf").write_bytes(artifact)
    assert not transfer.pull(job.pod, job.id, ["small"]).held
    assert transfer.is_complete(run)
    before = contents(run)
    for file in ("log.txt", "checkpoint.safetensors", "artifact.pgolf"):
        (place / file).write_bytes(b"another training, longer or not" * 50_000)
    for file in ("error.json", "result.json"):
        (place / file).write_text('{"error": "another"}')
    (place / "resume.pt").touch()
    kept = transfer.pull(job.pod, job.id, ["small"]).kept
    assert set(kept.values()) == {"the run is complete here"} and len(kept) == 6
    assert contents(run) == before


def test_a_claim_of_a_number_that_another_process_has_now(tmp_path):
    """As after a reboot."""
    (tmp_path / "try-1").write_text(f"{os.getpid()} 123-of-another-boot\n")
    script = f"{remote_job.LIBRARY}\nlook; echo {os.getpid()} $(since {os.getpid()}) > try-2; look"
    done = subprocess.run(["sh", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["dead 1", "running 2"]


def test_code_is_what_git_knows_or_would_add(home, monkeypatch):
    (home / "pgolf_core/__pycache__").mkdir()
    (home / "pgolf_core/__pycache__/x.pyc").touch()
    ours = ["README.md", "pgolf_core/__init__.py", "pyproject.toml"]
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(home.parent))
    assert transfer.code_files() == ours
    subprocess.run(["git", "init", "-q"], cwd=home, check=True)
    (home / ".gitignore").write_text("secret\n__pycache__\n")
    (home / "secret").touch()
    (home / "naïve name.md").touch()
    subprocess.run(["git", "add", "naïve name.md"], cwd=home, check=True)
    (home / "my data").mkdir()
    (home / "my data/huge.bin").touch()
    (home / "pgolf_core/new.py").touch()
    assert transfer.code_files() == ["README.md", "naïve name.md", ours[1], "pgolf_core/new.py", ours[2]]
    assert transfer.not_pushed() == [".gitignore", "my data/huge.bin"]


# A real sweep


def test_end_to_end(embedded, pod, tmp_path, monkeypatch, said):
    monkeypatch.setattr(directory, "RUNS", tmp_path / "runs")
    monkeypatch.setenv("MATRIX_LR", "0.03")  # of the environment here, which the machine does not have
    base = {"num_layers": 1, "model_dim": 32, "num_heads": 2, "num_kv_heads": 1, "iterations": 4, "cpu_threads": 1}
    base |= {"val_max_tokens": 1024, "roundtrip_val_max_tokens": 1024, "val_batch_size": 1024}
    file = tmp_path / "real sweep.yaml"
    file.write_text(yaml.safe_dump({"name": "real", "track": "nano", "base": base, "runs": {"only": {}}}))
    pod_file = pod.yaml(python=sys.executable, setup="echo set > up", pull_seconds=1, teardown=f"touch {tmp_path}/torn")
    job = remote_job.load_job(pod_file, [file], {"seed": "5"})
    assert remote.run(job, said) == 0, said
    [row] = load_runs(tmp_path / "runs", thorough=True).itertuples()
    assert (row.status, row.steps, row.seed, row.matrix_lr) == ("complete", 4, 5, 0.03)
    assert (pod.disk / "pgolf/checkout/up").read_text() == "set\n"
    assert (tmp_path / "torn").exists() and not integrity.lacking(tmp_path / "runs/real/only")
    assert remote.run(job, said) == 0 and "nothing to do" in said[-1]
