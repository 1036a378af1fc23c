"""`pgolf push`: what arrives at a hub on this machine, and what is refused."""

import hashlib
import json
import shutil
from dataclasses import replace

import pytest
import yaml
from huggingface_hub import constants
from support.hub_server import HubServer

from pgolf.cli.main import main
from pgolf.runs.result import ARTIFACT, read_result, write_result
from pgolf.submission.push import push
from pgolf.submission.submit import SubmissionError
from pgolf_core.config import RunConfig


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "good")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the server has the older protocol of uploads
    with HubServer({}) as server:
        yield server


def test_all_files_arrive_in_one_commit_with_a_card(server, finished, capsys):
    run_dir, result = finished
    assert main(["push", str(run_dir), "--to", "hub", "--private", "--endpoint", server.endpoint]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{server.endpoint}/me/pgolf-sweep-run: {result.roundtrip_val_bpb:.4f} bpb in ")
    ((repo, files),) = server.models.items()
    assert repo == "me/pgolf-sweep-run" and server.private == {repo} and len(server.commit_messages) == 1
    for name in (ARTIFACT, "config.json", "result.json"):
        assert files.pop(name) == (run_dir / name).read_bytes()
    assert hashlib.sha256(files["train_gpt.py"]).hexdigest() == result.script_sha256
    compile(files["train_gpt_readable.py"], "train_gpt_readable.py", "exec")
    card = files["README.md"].decode()
    about = yaml.safe_load(card.split("---")[1])
    (bpb, size) = about["model-index"][0]["results"][0]["metrics"]
    assert (bpb["value"], size["value"]) == (result.roundtrip_val_bpb, result.total_bytes)
    assert f"**{result.roundtrip_val_bpb:.5f} bits per byte in {result.total_bytes:,} bytes**" in card
    knobs = yaml.safe_load(card.split("```yaml")[1].split("```")[0])
    config = RunConfig.from_file(run_dir / "config.json")
    assert knobs == {name: value for name, (value, _) in config.differences(RunConfig(track="nano")).items()}


def test_another_push_is_another_commit(server, finished):
    for _ in range(2):
        assert push(finished[0], "model", endpoint=server.endpoint) == f"{server.endpoint}/me/model"
    assert len(server.commit_messages) == 2 and len(server.models) == 1


def test_what_cannot_be_pushed_is_refused_in_words(server, finished, tmp_path, monkeypatch):
    run_dir, _ = finished
    monkeypatch.setenv("HF_TOKEN", "bad")
    with pytest.raises(SubmissionError, match=r"127.*/pgolf-sweep-run: cannot be written to; `hf auth login`"):
        push(run_dir, endpoint=server.endpoint)
    with pytest.raises(SubmissionError, match=r"--repo a b"):
        push(run_dir, "a b", endpoint=server.endpoint)
    with pytest.raises(SubmissionError, match=r"--endpoint hub: not the address"):
        push(run_dir, endpoint="hub")
    copy = shutil.copytree(run_dir, tmp_path / "sweep" / "run")
    content = bytearray((copy / ARTIFACT).read_bytes())
    content[-1] ^= 1
    (copy / ARTIFACT).write_bytes(content)
    with pytest.raises(SubmissionError, match="damaged"):
        push(copy, endpoint=server.endpoint)
    assert server.models == {}
    with pytest.raises(SubmissionError, match=r"has no artifact"):
        push(without_file(run_dir, tmp_path / "s" / "r"), endpoint=server.endpoint)


def without_file(run_dir, to):
    """A copy whose result names no artifact."""
    shutil.copytree(run_dir, to)
    write_result(to, replace(read_result(to), artifact_sha256=None))
    assert json.loads((to / "result.json").read_text())["artifact_sha256"] is None
    return to
