"""Files that a pull may overwrite and a push takes along, and job.sh on this machine."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from support.rented import contents, finished_run

from pgolf.machines import state, transfer
from pgolf.machines.pod import JOB_SCRIPT, RemoteError, load_pod
from pgolf.runs import directory
from pgolf.runs.integrity import is_complete
from pgolf.runs.result import Result, write_result


@pytest.mark.parametrize(
    "name, local, incoming, taken",
    [
        ("log.txt", b"a\nb\n", b"a\n", False),  # the disk there was full, or is another one
        ("log.txt", b"a\nb\n", b"", False),
        ("log.txt", b"a\n", b"a\nb\n", True),
        ("metrics.jsonl", b"1\n2\n3\n", b"1\n4\n", True),  # resumed
        ("resume.pt", b"12345", b"123", False),
        ("resume.pt", b"12345", b"67", True),
        ("config.json", b'{"a": 1}', b'{"a": 1, "b', False),
        ("config.json", None, b"{", False),
        ("kernel.log", None, b"", True),
    ],
)
def test_reason_to_keep_local(tmp_path, name, local, incoming, taken):
    (tmp_path / "arriving").mkdir()
    (tmp_path / "arriving" / name).write_bytes(incoming)
    if local is not None:
        (tmp_path / name).write_bytes(local)
    assert (transfer.reason_to_keep_local(tmp_path / "arriving" / name, tmp_path / name, False) == "") == taken


@pytest.mark.slow
def test_a_killed_pull_leaves_no_harm(local, pod):
    machine = load_pod(pod.yaml())
    arriving = state.folder("job") / ".arriving/A/run"
    for folder in (arriving / ".partial", pod.disk / "pgolf/runs/A/run", pod.disk / "pgolf/jobs/job"):
        folder.mkdir(parents=True)
    (pod.disk / "pgolf/runs/A/run/log.txt").write_text("a\nb\n")
    for name in ("log.txt", ".log.txt.AbCdEf", ".partial/log.txt"):
        (arriving / name).write_text("a\n")
    transfer.pull(machine, "job", ["A"])
    assert contents(directory.RUNS / "A") == {"run/log.txt": b"a\nb\n"}
    assert list(state.folder("job").iterdir()) == []
    (pod.disk / "pgolf/runs/A/run/log.txt").write_text("a\n")  # truncated since
    assert transfer.pull(machine, "job", ["A"])[1] == {"A/run/log.txt": "the local copy is longer"}
    assert contents(directory.RUNS / "A") == {"run/log.txt": b"a\nb\n"}


@pytest.mark.slow
def test_a_result_waits_for_its_files_a_complete_run_stays_and_a_truncated_file_is_not_verified(pod, make):
    job = make()
    name, config = next(iter(job.sweeps[0].runs.items()))
    run, there = directory.RUNS / "small" / name, pod.disk / "pgolf/runs/small" / name
    finished_run(there, config)
    (pod.disk / "pgolf/jobs" / job.id).mkdir(parents=True)
    (there / "log.txt").write_text("all of it")
    write_result(there, Result(**json.loads((there / "result.json").read_text())))
    artifact = (there / "artifact.pgolf").read_bytes()
    (there / "artifact.pgolf").write_bytes(artifact[:50])  # a disk that lies
    assert transfer.pull(job.pod, job.id, ["small"])[1] == {f"small/{name}/result.json": "artifact.pgolf"}
    assert not (run / "result.json").exists() and (run / "log.txt").exists()
    assert set(transfer.differing(job.pod, job.id, ["small"])) == {f"small/{name}/result.json"}
    (there / "artifact.pgolf").write_bytes(artifact)
    config = "small/matrix_lr0.02/config.json"
    for path, content in ((pod.disk / "pgolf/runs" / config, "{"), (directory.RUNS / config, "{}")):
        path.parent.mkdir(parents=True)
        path.write_text(content)
    assert transfer.differing(job.pod, job.id, ["small"]) == {config: transfer.TRUNCATED}
    assert is_complete(run)
    (pod.disk / "pgolf/runs" / config).unlink()
    before = contents(run)
    for file in ("log.txt", "checkpoint.safetensors", "artifact.pgolf"):
        (there / file).write_bytes(b"another training, longer or not" * 50_000)
    for file in ("error.json", "result.json"):
        (there / file).write_text('{"error": "another"}')
    (there / "resume.pt").touch()
    kept = transfer.pull(job.pod, job.id, ["small"])[1]
    assert set(kept.values()) == {"the run is complete locally"} and len(kept) == 6
    assert contents(run) == before


@pytest.mark.parametrize("there, pushed", [("10", 0), ("5", 0), ("4", 2), ("complete", 0), ("", 2)])
def test_runs_are_pushed_where_they_are_further_here(local, monkeypatch, there, pushed):
    run = directory.RUNS / "small/run"
    run.mkdir(parents=True)
    (run / "resume.pt").touch()
    (run / "error.json").touch()
    (run / "metrics.jsonl").write_text("{}\n" * 5)
    sent = []
    monkeypatch.setattr(transfer, "send", lambda pod, target, cwd, names, *options: sent.extend(names))
    transfer.push_runs(None, [run], [f"{there} small/run"] if there else [], lambda line: None)
    assert sent == ["small/run/metrics.jsonl", "small/run/resume.pt"][:pushed]


def test_code_is_what_git_tracks(local, monkeypatch):
    tracked = [".gitignore", "README.md", "pgolf_core/__init__.py", "pyproject.toml"]
    (local / "pgolf_core/new.py").touch()
    assert transfer.code_files() == tracked
    (local / "naïve name.md").touch()
    subprocess.run(["git", "add", "naïve name.md"], cwd=local, check=True)
    assert transfer.code_files() == sorted([*tracked, "naïve name.md"])
    shutil.rmtree(local / ".git")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(local.parent))
    with pytest.raises(RemoteError, match="only tracked ones are pushed: git init"):
        transfer.code_files()


def test_a_claim_of_a_process_number_that_another_process_has_now(tmp_path):
    folder = tmp_path / "jobs/small-1"
    folder.mkdir(parents=True)

    def look() -> str:
        words = ["sh", JOB_SCRIPT, "look", tmp_path, "small-1"]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout

    (folder / "attempt-1").write_text(f"{os.getpid()} 123-of-another-boot\n")
    assert look() == "state dead 1\nend\n"
    stat = Path(f"/proc/{os.getpid()}/stat").read_text().rpartition(") ")[2].split()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    (folder / "attempt-2").write_text(f"{os.getpid()} {stat[19]}-{boot}")
    assert look() == "state running 2\nend\n"


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck_finds_nothing_in_job_sh():
    done = subprocess.run(["shellcheck", "-s", "sh", JOB_SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
