"""Verification and teardown: a rented machine goes only after every file is local and verified."""

import json
import os
import shutil
from dataclasses import replace

import pytest
from support.rented import FIRST, SECOND, THIRD, assert_all_local, attempts, contents, go

from pgolf.machines import job as jobs
from pgolf.machines import remote, state, transfer
from pgolf.machines.pod import RemoteError
from pgolf.runs import directory
from pgolf.runs.table import load_runs

pytestmark = pytest.mark.slow


def test_everything_is_local_before_the_teardown(make, pod, pulls, said, tmp_path):
    states = directory.RUNS / ".remote"
    teardown = f"mkdir {tmp_path}/then && cp -r {directory.RUNS} {pod.disk} {states}/*/state.json {tmp_path}/then"
    job = make(teardown=teardown, checked=True)
    assert remote.run(job, said) == 0
    assert_all_local(pod)
    then = tmp_path / "then"  # copied when the machine went
    assert contents(then / "runs/small").items() >= contents(then / "disk/pgolf/runs/small").items()
    at_teardown = json.loads((then / "state.json").read_text())
    assert at_teardown["verified"] and at_teardown["teardown"].get("status") is None
    assert said.index(f"teardown: {teardown}") > next(i for i, line in enumerate(said) if "may go" in line)
    assert len(pulls.all) >= 2 and attempts(pod, job) == ["attempt-1"]
    for runs in (directory.RUNS, pod.disk / "pgolf/runs", states):
        assert not list(runs.glob("_canary*"))

    pod.kill()
    assert remote.run(job, said) == 0 and "nothing to do" in said[-1]
    assert "verified" in state.report()[0] and "teardown done" in state.report()[0]
    assert not load_runs(directory.RUNS).sweep.str.startswith(".").any()


def test_a_failed_run_is_local_with_its_reason_and_a_failed_teardown_and_run_are_tried_again(make, pod, said, tmp_path):
    job = make(fails=[SECOND], teardown=f"echo x >> {tmp_path}/torn; exit 3")
    for count in (1, 2, 3):
        assert remote.run(job, said) == 2
        assert said.has(f"TEARDOWN FAILED (exit status 3): THE MACHINE IS STILL PAID FOR. By hand: {job.pod.teardown}")
        assert (tmp_path / "torn").read_text() == "x\n" * count
        if count == 2:
            pod.kill()  # the machine is gone: what is known here is enough
    table = load_runs(directory.RUNS / "small").set_index("run")
    assert list(table.status) == ["complete", "failed", "complete"]
    assert table.problem.iloc[1] == "TrainError: as asked"
    assert said.has("1 failed; every file is local and verified: the machine may go")
    assert remote.run(make(fails=[SECOND], teardown="true"), said) == 1 and said[-1] == "torn down"
    pod.start()  # the machine is there after all
    assert remote.run(make(teardown="true"), said) == 0 and said[-1] == "torn down"
    assert_all_local(pod)


def test_no_teardown_before_the_least_is_local(make, pod, said, tmp_path):
    job = make(bare=[SECOND], teardown=f"touch {tmp_path}/torn")
    for _ in range(2):
        assert remote.run(job, said) == 2
        assert said.has("NOT VERIFIED") and said.has(f"small/{SECOND}: has no environment.json")
        assert not (tmp_path / "torn").exists()
        said.clear()
    with pytest.raises(RuntimeError, match="not verified there, so it is not torn down"):
        remote.Follower(job, said)._teardown()


def test_what_one_machine_verified_tears_no_other_down(make, pod, said, tmp_path):
    assert remote.run(make(teardown="exit 3"), said) == 2
    shutil.rmtree(directory.RUNS / "small" / THIRD)
    job = make(teardown="exit 3", dir=str(pod.disk / "other"))
    said.clear()
    assert remote.run(job, said) == 2
    begun = next(i for i, line in enumerate(said) if line.startswith("started on"))
    assert begun < said.index("teardown: exit 3")
    assert (pod.disk / "other/trained").read_text().split() == [THIRD]
    assert list(load_runs(directory.RUNS / "small", thorough=True).status) == ["complete"] * 3


def test_no_teardown_of_a_machine_that_does_not_answer(make, pod, said, tmp_path, monkeypatch):
    job = make(teardown=f"touch {tmp_path}/torn", give_up_minutes=0.001)
    with monkeypatch.context() as patch:
        patch.setattr(os, "sync", pod.cut)  # right after every file was compared
        assert remote.run(job, said) == 2 and remote.run(job, said) == 2
    assert said.has("has not been reachable for") and not (tmp_path / "torn").exists()
    pod.start()
    assert remote.run(job, said) == 0 and (tmp_path / "torn").exists()


@pytest.mark.parametrize("kind", ["running", "ended", "dead"])
def test_no_teardown_while_another_job_there_is_not_verified(make, pod, said, tmp_path, kind):
    job = make(teardown=f"touch {tmp_path}/torn", waits=FIRST)
    jobs.start(job, 1, said)
    other = pod.disk / "pgolf/jobs/large-123"
    other.mkdir()
    claim = next((pod.disk / "pgolf/jobs" / job.id).glob("attempt-1")).read_text()
    (other / "attempt-1").write_text(claim if kind == "running" else "1 another-boot")
    if kind == "ended":
        (other / "attempt-1.status").write_text("0\n")
    go(pod)
    for verified in ("", "0", "2"):  # another attempt of it was
        (other / "verified").write_text(verified)
        assert remote.run(job, said) == 2 and not (tmp_path / "torn").exists()
        assert said.has("another job is on this machine: large-123")
    (other / "verified").write_text("1")
    (other / "attempt-1.status").write_text("0\n")
    elsewhere = replace(job, id="large-1", pod=job.pod.model_copy(update={"dir": "elsewhere"}))
    elsewhere.update(started="then")
    assert remote.run(job, said) == 2 and not (tmp_path / "torn").exists()
    assert said.has("another job is on this machine: large-1 (in elsewhere); finish it first: pgolf remote run")
    elsewhere.update(verified="then")
    assert remote.run(job, said) == 0
    assert (tmp_path / "torn").exists() and attempts(pod, job) == ["attempt-1"]


def test_an_attempt_begun_since_the_verification_forbids_the_teardown(make, pod, said, tmp_path):
    job = make(teardown="exit 3")
    assert remote.run(job, said) == 2
    (pod.disk / "pgolf/jobs" / job.id / "attempt-2").write_text("1 another-boot")
    job = make(teardown=f"touch {tmp_path}/torn")
    assert remote.run(job, said) == 0 and said.has("died without")
    assert attempts(pod, job)[-1] == "attempt-3" and (tmp_path / "torn").exists()


def test_files_lost_here_since_the_verification_are_pulled_again(make, pod, said, tmp_path):
    assert remote.run(make(teardown="exit 3"), said) == 2
    shutil.rmtree(directory.RUNS / "small" / SECOND)
    (directory.RUNS / f"small/{THIRD}/artifact.pgolf").write_bytes(b"damaged")
    job = make(teardown=f"touch {tmp_path}/torn")
    assert remote.run(job, said) == 0
    assert_all_local(pod)
    assert (tmp_path / "torn").exists() and attempts(pod, job) == ["attempt-1"]


def test_files_that_differ_only_in_content_are_pulled_again_and_not_for_ever(make, pod, said, tmp_path, monkeypatch):
    job, real = make(teardown=f"touch {tmp_path}/torn", give_up_minutes=0.001), transfer.differing

    def spoil(*arguments):
        paths = [runs / f"small/{THIRD}/kernel.log" for runs in (pod.disk / "pgolf/runs", directory.RUNS)]
        for path, content in zip(paths, (b"right", b"wrong"), strict=True):
            path.write_bytes(content)
            os.utime(path, (1e9, 1e9))
        return real(*arguments)

    def refuse(*_):
        raise RemoteError("a file there cannot be read")

    with monkeypatch.context() as patch:
        patch.setattr(transfer, "differing", refuse)
        assert remote.run(job, said) == 2
    assert said.has("NOT VERIFIED, so the machine must stay: a file there cannot be read")
    assert job.known()["state"] == "unverified" and not (tmp_path / "torn").exists()
    monkeypatch.setattr(transfer, "differing", spoil)
    assert remote.run(job, said) == 0 and (tmp_path / "torn").exists()
    assert_all_local(pod)
