"""POD.yaml, the checks before money is spent, and what is known of jobs without a network."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
from support.pod import Pod
from support.rented import FIRST, pgolf_remote

from pgolf.machines import job as jobs
from pgolf.machines import preflight, remote, state
from pgolf.machines.pod import RemoteError, UnreachableError, load_pod


def test_pod_yaml(tmp_path):
    path = tmp_path / "POD.yaml"
    path.write_text("hots: a\nport: many\nkey: no_such_key\ndir: my folder\ndata: maybe\npython: python3\n")
    with pytest.raises(RemoteError) as error:
        load_pod(path)
    for words in (
        "did you mean host?", "host: field required", "port: input should be a valid integer",
        "dir: a folder named with letters, digits", "data: input should be 'push' or 'there', found 'maybe'",
        "python: an absolute path on the machine",
    ):  # fmt: skip
        assert words in str(error.value)
    path.write_text("host: a\nkey: no_such_key")
    with pytest.raises(RemoteError, match=r"key: no such file: .*no_such_key"):
        load_pod(path)
    (tmp_path / "id").touch()
    path.write_text("host: a\nkey: id\nssh_options: [ConnectTimeout=3, ProxyJump=me@bastion:22]")
    pod = load_pod(path)
    assert pod.key == str(tmp_path / "id") and pod.dir == "pgolf-remote"
    for text in ("host: -oProxyCommand=x", "[1, 2]", "host: [", "host: a\nuser: -x", "host: a\ndir: /a/$(b)"):
        path.write_text(text)
        with pytest.raises(RemoteError):
            load_pod(path)


@pytest.mark.parametrize(
    "option",
    [
        *("ProxyCommand=touch x", "proxycommand touch x", "LocalCommand=x", "PermitLocalCommand=yes"),
        *("KnownHostsCommand=x", "Match=exec x", "ProxyJump=-oProxyCommand=x", "ProxyJump=$(x)", "Include=x"),
        *("ForwardAgent=yes", "RemoteForward=1 a:2", "SecurityKeyProvider=x.so", "PKCS11Provider=x.so", "IdentityFile"),
    ],
)
def test_ssh_options_that_run_something_here_are_refused(tmp_path, option):
    path = tmp_path / "POD.yaml"
    path.write_text(f"host: a\nssh_options: ['{option}']")
    with pytest.raises(RemoteError, match=r"runs no command on this machine; .* ~/.ssh/config"):
        load_pod(path)


@pytest.fixture
def job(local, tmp_path):
    """A job on a machine that nobody reaches."""
    (tmp_path / "POD.yaml").write_text("host: nowhere.invalid\npython: /usr/bin/python3\ngpus: 0")
    (tmp_path / "small.yaml").write_text("track: nano\nruns: {one: {}}")
    return jobs.load_job(tmp_path / "POD.yaml", [tmp_path / "small.yaml"], {})


def test_ctrl_c_says_how_things_stand(job, tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(remote, "run", stop)
    words = ["run", job.pod_file, tmp_path / "small.yaml"]
    with pytest.raises(KeyboardInterrupt):  # nothing was started
        pgolf_remote(*words)
    for seen, said in (("running", "continues on root@nowhere.invalid"), ("died", "was last seen died")):
        job.update(started="then", state=seen)
        assert pgolf_remote(*words) == 130 and said in capsys.readouterr().err


def test_status_reads_what_is_known_and_loads_no_torch(job, tmp_path):
    job.update(state="running", started="then")
    damaged = state.folder("damaged-1") / "state.json"
    damaged.parent.mkdir(parents=True)
    damaged.write_text("{")
    script = "import sys; from pgolf.cli.main import main; main(['remote', 'status']); print('torch' in sys.modules)"
    environment = os.environ | {"PGOLF_RUNS": str(state.folder("x").parents[1])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    first, second, command, torch = done.stdout.splitlines()
    assert (
        "its state.json cannot be read" in first and "running, on root@nowhere.invalid port 22, started then" in second
    )
    assert command.strip() == job.command and torch == "False"


def test_a_job_of_another_user_or_folder_of_the_machine_is_another_job(job):
    other = replace(job, id="large-1", pod=job.pod.model_copy(update={"user": "another"}))
    other.update(started="then")
    assert "another job is on this machine: large-1 (in pgolf-remote)" in jobs.other_job(job, jobs.Look("none"))
    other.update(verified="then")
    replace(other, id="large-2", pod=job.pod.model_copy(update={"port": 23})).update(started="then")
    assert jobs.other_job(job, jobs.Look("none")) == ""


def test_the_command_and_settings_of_a_job_hold_the_local_knobs(job, tmp_path, monkeypatch):
    monkeypatch.setenv("PGOLF_NUM_LAYERS", "3")
    monkeypatch.setenv("PGOLF_RUNS", "/my runs")
    assert job.command.startswith("env PGOLF_NUM_LAYERS=3 'PGOLF_RUNS=/my runs' pgolf remote run ")
    (tmp_path / "settings.sh").write_text(job.settings)
    script = '. ./settings.sh; echo "$PGOLF_NUM_LAYERS-$PGOLF_MODEL_DIM-$1-$python"'
    environment = os.environ | {"PGOLF_MODEL_DIM": "5", "job": "/jobs/1"}
    done = subprocess.run(["sh", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == "3--/jobs/1/0-small/small.yaml-/usr/bin/python3\n"


def test_teardowns_that_a_shell_can_run():
    for command, right in [
        ("~/bin/no-such-tool", False), ("no-such-tool 3", False), ("K=v no-such-tool 3", False), ("K=v", True),
        ("K=v true", True), ("cd x && y", True), ("sh -c x", True), ("no | such", False),
    ]:  # fmt: skip
        assert (preflight._unknown_command(command) == "") == right, command


def test_another_rsync_here_and_an_address_that_gives_only_a_terminal(job, tmp_path, monkeypatch):
    """A provider's proxy says so on stdout."""
    for name, script in (
        ("rsync", "echo openrsync: protocol version 29"), ("ssh", "echo 'Error: no support of PTY'; exit 1")
    ):  # fmt: skip
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert "macOS's own will not do: `brew install rsync`" in preflight.local_tools()
    with pytest.raises(RemoteError, match="no support of PTY; this address takes terminals alone: use"):
        job.ask("look")


@pytest.mark.slow
def test_checks_name_everything_that_is_wrong_and_leave_nothing(local, make, said, tmp_path):
    make()
    path = tmp_path / "bin"  # without rsync
    path.mkdir()
    for name in ("sh", "dirname", "df", "awk", "tail", "head", "mkdir", "grep", "sha256sum", "bash", "setsid", "rm"):
        (path / name).symlink_to(shutil.which(name))
    with Pod(tmp_path / "other", str(path)) as other:
        pod_file = other.yaml(data="there", gpus=99, free_gb=1e6, python="/no/python", teardown="no-such-tool --id 3")
        job = jobs.load_job(pod_file, [tmp_path / "small.yaml"], {"cap_bytes": "10000"})
        configs = job.sweeps[0].runs
        runs_of_100 = configs | {FIRST: configs[FIRST].model_copy(update={"world_size": 100})}
        job = replace(job, sweeps=(replace(job.sweeps[0], runs=runs_of_100),))
        with pytest.raises(RemoteError, match="7 of 13 checks failed; nothing was started"):
            preflight.check(job, said)
    wrong = [line for line in said if line.startswith("WRONG")]
    for words in (
        "forecast over the cap, so not started", "no command no-such-tool here",
        "gpus: 99, and a run has nproc 100; set gpus: 100", "/no/python is not there",
        "gpus: 99, and 0 by nvidia-smi -L there", "1000000.0 GB needed; take a larger disk",
        "rsync is not there; install it: apt-get install rsync",
    ):  # fmt: skip
        assert sum(words in line for line in wrong) == 1, (words, said)
    assert not any((other.disk / "pgolf").iterdir())


@pytest.mark.slow
def test_a_machine_that_cannot_be_reached_is_named_before_anything_starts(make, said):
    for keys, words in (
        ({"key": "other_key"}, "Permission denied .*; look at host:, port: and key:"),
        ({"port": 1}, "port 1: .*refused.*; look at host:, port: and key:"),
        ({"host": "no-such-host.invalid"}, r"no-such-host.invalid port .*resolve .*; look at host:"),
    ):
        job = make(checked=True, **keys)
        with pytest.raises(UnreachableError, match="1 of 7 checks failed"):
            remote.run(job, said)
        with pytest.raises(UnreachableError, match=words):
            job.ask("look")
