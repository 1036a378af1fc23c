"""`pgolf remote run` from the start to verification, with kills, lost networks and full disks, on a real sshd."""

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest
import yaml
from support.rented import (
    FIRST,
    SECOND,
    SWEEP,
    THIRD,
    assert_all_local,
    assert_no_less,
    attempts,
    contents,
    go,
    pgolf_remote,
)

from pgolf.machines import job as jobs
from pgolf.machines import remote, state, transfer
from pgolf.machines.pod import RemoteError
from pgolf.reports import monitor
from pgolf.runs import directory, integrity
from pgolf.runs.table import load_runs

pytestmark = pytest.mark.slow
SEED = int(os.environ.get("SEED_OF_KILLS", "7"))


def trained(pod) -> list[str]:
    return (pod.disk / "pgolf/trained").read_text().split()


def resume_step(files: dict[str, bytes], run: str) -> int:
    return int(files.get(f"{run}/resume.pt", b"0" * 8)[:8])


def test_a_machine_killed_at_random_moments(make, pod, pulls, said, monkeypatch):
    moments = [random.Random(f"{SEED} {i}").uniform(0, 0.6) for i in range(10)]
    monkeypatch.setattr(remote, "RESTARTS", 100)
    job = make(steps=40, pace=0.01, waits=THIRD)
    ended = threading.Event()

    def trains() -> bool:
        with contextlib.suppress(psutil.Error):  # it ended meanwhile
            return any("stand_in" in word for process in pod.processes() for word in process.cmdline())
        return False

    def kill() -> int:
        deadline = time.monotonic() + 60
        try:
            for i, moment in enumerate(moments):
                # Every third kill: whatever it does then.
                while i % 3 != 2 and not ended.wait(0.01) and not trains() and time.monotonic() < deadline:
                    pass
                if ended.wait(moment):
                    return i
                pod.kill()
                pod.start()
            return len(moments)
        finally:
            go(pod)  # a failure here must not let the job wait for ever

    with ThreadPoolExecutor(1) as thread:
        killer = thread.submit(kill)
        try:
            assert remote.run(job, said) == 0
        finally:
            ended.set()
        assert killer.result() == len(moments)
    assert_all_local(pod)
    assert said.has("died without an exit status. Interrupted: small/")


def test_a_laptop_killed_at_random_moments(make, pod):
    job = make(steps=60, pace=0.01, waits=THIRD)
    before, fork = {}, multiprocessing.get_context("fork")
    for i in range(7):
        last = i == 6
        if last:
            go(pod)
        process = fork.Process(target=lambda: os._exit(remote.run(job, lambda line: None)))
        process.start()
        process.join(None if last else random.Random(f"{SEED} {i}").uniform(0.3, 1.2))
        process.kill()
        process.join()
        now = contents(directory.RUNS / "small")
        assert_no_less(before, now)
        before = now
    assert process.exitcode == 0
    assert attempts(pod, job) == ["attempt-1"]
    assert_all_local(pod)


@pytest.mark.parametrize("lose", ["kill", "cut"])
def test_a_lost_machine_marks_its_runs_and_is_continued_once_it_is_back(make, pod, pulls, said, tmp_path, lose):
    job = make(waits=SECOND, give_up_minutes=0.001, teardown=f"touch {tmp_path}/torn")
    pulls.then = lambda n: getattr(pod, lose)() if f"{SECOND}/resume.pt" in pulls.all[-1] else None
    assert remote.run(job, said) == 2
    table = load_runs(directory.RUNS / "small").set_index("run")
    assert list(table.status) == ["complete", "interrupted"]
    assert "not been reachable for 0.001 minutes" in table.problem.iloc[1] and "last pull 2" in table.problem.iloc[1]
    assert list(monitor.state(directory.RUNS, "small").set_index("run").state) == ["complete", "dead", "waiting"]
    assert not (tmp_path / "torn").exists() and state.read(job.id)["state"] == "lost"
    pod.start()
    states = []

    def see(n: int) -> None:
        states.append(monitor.state(directory.RUNS, "small").set_index("run").state[SECOND])
        if states[-1] == "running":
            go(pod)

    pulls.then = see
    assert remote.run(job, said) == 0
    assert states[0] == "dead" and "running" in states and (tmp_path / "torn").exists()
    assert len(attempts(pod, job)) == (2 if lose == "kill" else 1)
    assert_all_local(pod)


@pytest.mark.parametrize("disk", ["new", "older"])
def test_another_disk_continues_from_the_local_files_where_these_are_further(make, pod, pulls, said, disk):
    job = make(waits=SECOND, steps=25)

    def replace_disk(n: int) -> None:
        if resume_step(pulls.all[-1], SECOND) < 25 or pulls.then is None:
            return
        pulls.then = lambda n: None
        pod.kill()
        if disk == "new":
            pod.replace_disk()
        else:
            begun = pod.disk / f"pgolf/runs/small/{SECOND}"
            shutil.rmtree(begun.with_name(FIRST))
            (begun / "resume.pt").write_bytes(b"%08d" % 5 + bytes([5]) * 100_000)
            for name in ("metrics.jsonl", "log.txt"):
                lines = (begun / name).read_text().splitlines(keepends=True)
                (begun / name).write_text("".join(lines[:6]))
            (pod.disk / "pgolf/trained").unlink()
        go(pod)
        pod.start()

    pulls.then = replace_disk
    assert remote.run(job, said) == 0
    assert_all_local(pod)
    assert said.has("its disk is another one") == (disk == "new")
    assert trained(pod) == [SECOND, THIRD]
    assert "resumed at 25" in (directory.RUNS / f"small/{SECOND}/log.txt").read_text()


def test_ctrl_c_here_stops_nothing_there(make, pod, pulls, monkeypatch, capsys, tmp_path):
    job = make(waits=SECOND)
    held = []

    def stop(n: int) -> None:
        if n > 1 and f"{SECOND}/config.json" in pulls.all[-2]:
            held.extend(monitor.state(directory.RUNS, "small").set_index("run").state[[FIRST, SECOND]])
            raise KeyboardInterrupt

    pulls.then = stop
    monkeypatch.setattr("pgolf.machines.job.load_job", lambda *_: job)
    words = ["run", pod.folder / "POD.yaml", tmp_path / "small.yaml"]
    assert pgolf_remote(*words) == 130
    assert held == ["complete", "running"]
    assert "The job continues on" in capsys.readouterr().err
    assert not monitor.is_held(directory.RUNS / "small/.lock") and pod.processes()
    pulls.then = lambda n: go(pod)
    assert pgolf_remote(*words) == 0
    assert "found on" in capsys.readouterr().out
    assert attempts(pod, job) == ["attempt-1"] and trained(pod) == list(job.sweeps[0].runs)
    assert_all_local(pod)


def test_nothing_starts_twice(make, local, pod, said):
    job = make(waits=FIRST)
    jobs.start(job, 1, said)
    shutil.rmtree(state.folder(job.id))  # another laptop, which knows nothing
    starters = [threading.Thread(target=jobs.start, args=(job, number, said)) for number in (1, 2, 5)]
    for starter in starters:
        starter.start()
    for starter in starters:
        starter.join()
    assert job.ask("look") == jobs.Look("running", 1)
    assert trained(pod) == [FIRST] and attempts(pod, job) == ["attempt-1"]
    folder = pod.disk / "pgolf/jobs" / job.id
    subprocess.run(["sh", "job.sh", "attempt", pod.disk / "pgolf", job.id, "7"], cwd=folder, check=True)
    assert attempts(pod, job) == ["attempt-1"]  # and one that looked just before
    with pytest.raises(RemoteError, match=rf"another job is on this machine: {job.id} \(running 1\); finish it first"):
        jobs.start(replace(job, id="another"), 1, said)
    for process in pod.processes():
        process.kill()
    (pod.disk / "pgolf/claim").write_text("token someone:/runs\n")
    with pytest.raises(RemoteError, match="being started from someone:/runs: wait"):
        jobs.start(job, 2, said)
    with pytest.raises(RemoteError, match="took the claim"):
        job.ask("start", "2", "another token")
    assert attempts(pod, job) == ["attempt-1"]


def test_a_changed_sweep_file_orphans_no_job(make, pod, said, tmp_path, capsys, monkeypatch):
    job = make(waits=FIRST)
    jobs.start(job, 1, said)
    base = {**SWEEP["base"], "seed": 2}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SWEEP | {"base": base}))
    changed = jobs.load_job(job.pod_file, [tmp_path / "small.yaml"], {})
    with pytest.raises(RemoteError, match=f"another job is on this machine: {job.id}") as error:
        remote.run(changed, said)
    go(pod)
    assert pgolf_remote("status") == 0 and job.command in capsys.readouterr().out and job.command in str(error.value)
    assert pgolf_remote(*job.command.split()[2:]) == 0
    assert attempts(pod, job) == ["attempt-1"]
    assert_all_local(pod)
    (pod.disk / "pgolf/jobs/old-1").mkdir()
    (pod.disk / "pgolf/jobs/old-1/try-1").touch()
    with pytest.raises(RemoteError, match=r"old-1 \(begun by an older pgolf\); finish it first"):
        jobs.start(job, 2, said)


def test_a_restart_continues_with_the_code_that_it_began_with(make, local, pod, pulls, said):
    job = make(waits=SECOND, steps=10, fails=[THIRD])
    code = pod.disk / "pgolf/checkout/.pgolf-code.sh"
    seen = []

    def kill(n: int) -> None:
        if f"{SECOND}/resume.pt" in pulls.all[-1] and not seen:
            pod.kill()
            seen.append(code.read_text())
            (local / "README.md").write_text("edited meanwhile")
            (local.parent / "small.yaml").unlink()  # the sweep file is not read again
            go(pod)
            pod.start()

    pulls.then = kill
    assert remote.run(job, said) == 1
    assert attempts(pod, job) == ["attempt-1", "attempt-2"] and seen == [code.read_text()]
    assert (pod.disk / "pgolf/checkout/README.md").read_text() == "README.md"
    assert remote.run(job, said) == 1  # it ended, so this is another start, with the code of now
    assert attempts(pod, job)[-1] == "attempt-3" and code.read_text() == seen[0].strip() + "1\n"
    assert (pod.disk / "pgolf/checkout/README.md").read_text() == "edited meanwhile"


def test_a_job_whose_start_was_not_seen_is_found(make, pod, said, monkeypatch):
    job, real = make(waits=FIRST), jobs.note

    def lost(job, found):
        if found.kind == "running":
            raise KeyboardInterrupt
        real(job, found)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(jobs, "note", lost)
        remote.run(job, said)
    assert job.known()["state"] == "starting"
    go(pod)
    assert remote.run(job, said) == 0 and said.has("found on")
    assert attempts(pod, job) == ["attempt-1"]
    assert_all_local(pod)


def test_errors_of_an_attempt_that_another_laptop_began(make, pod, said):
    job = make(fails=[FIRST], waits=SECOND)
    jobs.start(job, 1, said)
    while not (pod.disk / f"pgolf/runs/small/{SECOND}/config.json").exists():
        pass
    shutil.rmtree(state.folder(job.id))
    old = directory.RUNS / f"small/{THIRD}/error.json"
    old.parent.mkdir(parents=True)
    old.write_text('{"error": "of an earlier attempt"}')
    assert remote.pull_once(job, said) == 0
    assert (directory.RUNS / f"small/{FIRST}/error.json").exists() and not old.exists()


def test_a_job_that_dies_again_and_again_is_given_up(make, pod, said):
    job = make(setup="kill -9 $PPID")
    assert remote.run(job, said) == 2
    assert said.has("died 4 times") and len(attempts(pod, job)) == 4


def test_python_setup_and_words_of_an_attempt(local, pod, said, tmp_path, monkeypatch):
    """install.py makes a .venv there, of a python that only prints what it is asked."""
    monkeypatch.setenv("PGOLF_MATRIX_LR", "0.03")
    monkeypatch.setattr(remote, "check", lambda job, say: None)
    (local / "tools").mkdir()
    (local / "tools/install.py").write_text(
        "import os, pathlib\npathlib.Path('.venv/bin').mkdir(parents=True, exist_ok=True)\n"
        "pathlib.Path('.venv/bin/python').write_text('#!/bin/sh\\n"
        'echo "$@"; cat up "$4"; echo $PGOLF_MATRIX_LR $PGOLF_NUM_LAYERS; echo $PGOLF_RUNS; exit 9\')\n'
        "os.chmod('.venv/bin/python', 0o755)\n"
    )
    (local / "pgolf_core/old.py").touch()
    subprocess.run(["git", "add", "."], cwd=local, check=True)
    file = tmp_path / "it's $small.yaml"
    file.write_text(yaml.safe_dump(SWEEP))
    pod_file = pod.yaml(data="there", setup="echo a 'setup' > up\nexit 0")
    job = jobs.load_job(pod_file, [file], {"num_heads": "1"}, seeds=[1, 2])
    (local / "untracked.txt").touch()
    assert remote.run(job, said) == 2
    assert said.has("ended with exit status 9: ") and said.has("git does not track them (git add does): untracked.txt")
    lines = (state.folder(job.id) / "attempt-1.log").read_text().splitlines()
    top = pod.disk / "pgolf"
    words = f"{top}/jobs/{job.id}/0-small/{file.name} -k num_heads=1 --seeds 1 2"
    assert lines[0] == f"-m pgolf.cli.main sweep {words}"
    assert lines[1:] == ["a setup", *file.read_text().splitlines(), "0.03", f"{top}/runs"]
    assert not (top / "checkout/untracked.txt").exists()
    (local / "pgolf_core/old.py").unlink()
    assert (top / "checkout/pgolf_core/old.py").exists()
    assert remote.run(replace(job, pod=job.pod.model_copy(update={"setup": "source (", "python": "/x"})), said) == 2
    assert said.has("ended with exit status 3: setup failed")
    assert not (top / "checkout/pgolf_core/old.py").exists() and (top / "checkout/up").exists()
    gpus = {"python": sys.executable, "setup": "", "gpus": 99}
    assert remote.run(replace(job, pod=job.pod.model_copy(update=gpus)), said) == 2
    assert said.has("GPUs, 99 are needed: ")


@pytest.fixture
def small_disk():
    """Mounts a small file system on a folder."""
    mounted = []

    def mount(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        command = [*["mount", "-t", "tmpfs", "-o", "size=4000000", "none"], folder]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("only root can mount a small disk, and not everywhere")
        mounted.append(folder)

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path) -> Path:
    """Take all free space."""
    with open(folder / "filler", "wb", buffering=0) as f:
        for size in (1 << 16, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while f.write(bytes(size)):
                    pass
    return folder / "filler"


def test_a_disk_that_runs_full_there(small_disk, make, pod, pulls, said):
    small_disk(pod.disk)
    job = make(steps=60, pace=0.02)
    full = []
    pulls.then = lambda n: full or f"{SECOND}/log.txt" not in pulls.all[-1] or full.append(fill(pod.disk))
    assert remote.run(job, said) == 2
    assert said.has("ended with exit status 1")
    statuses = set(load_runs(directory.RUNS / "small").status)
    assert statuses <= {"complete", "interrupted"} and "interrupted" in statuses
    full[0].unlink()
    assert remote.run(job, said) == 0
    assert_all_local(pod)


@pytest.mark.parametrize("trouble", ["network", "disk"])
def test_a_network_that_is_cut_and_a_full_disk_here_are_waited_out(small_disk, make, pod, pulls, said, local, trouble):
    begin, words, end = pod.cut, "refused", pod.start
    if trouble == "disk":
        small_disk(local / "runs")
        begin, words, end = partial(fill, directory.RUNS), "No space left", (directory.RUNS / "filler").unlink
    job = make(waits=THIRD)
    pulls.then = lambda n: begin() if n == 2 else None
    said.when = {words: end, "pulling again": partial(go, pod)}
    assert remote.run(job, said) == 0
    assert_all_local(pod)
    assert attempts(pod, job) == ["attempt-1"] and not said.when


def test_a_real_sweep_end_to_end(embedded, pod, tmp_path, monkeypatch, said):
    monkeypatch.setattr(directory, "RUNS", tmp_path / "runs")
    monkeypatch.setenv("PGOLF_MATRIX_LR", "0.03")  # set locally, not on the machine
    base = {"num_layers": 1, "model_dim": 32, "num_heads": 2, "num_kv_heads": 1, "iterations": 4, "cpu_threads": 1}
    base |= {"val_max_tokens": 1024, "roundtrip_val_max_tokens": 1024, "val_batch_size": 1024}
    file = tmp_path / "real sweep.yaml"
    file.write_text(yaml.safe_dump({"name": "real", "track": "nano", "base": base, "runs": {"only": {}}}))
    pod_file = pod.yaml(python=sys.executable, setup="echo set > up", pull_seconds=1, teardown=f"touch {tmp_path}/torn")
    job = jobs.load_job(pod_file, [file], {"seed": "5"})
    assert remote.run(job, said) == 0, said
    [row] = load_runs(tmp_path / "runs", thorough=True).itertuples()
    assert (row.status, row.steps, row.seed, row.matrix_lr) == ("complete", 4, 5, 0.03)
    environment = json.loads((tmp_path / "runs/real/only/environment.json").read_text())
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=transfer.ROOT, capture_output=True, text=True).stdout
    assert environment["git_commit"] == commit.strip()
    assert (pod.disk / "pgolf/checkout/up").read_text() == "set\n"
    assert (tmp_path / "torn").exists() and not integrity.lacking(tmp_path / "runs/real/only")
    assert remote.run(job, said) == 0 and "nothing to do" in said[-1]
