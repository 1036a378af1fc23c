"""A submission is written only when the file scores what the run says, on all of audited data."""

import json
import shutil

import numpy as np
import pytest

from pgolf.cli import main
from pgolf.data import audit, split_stats
from pgolf.data.dataset import describe
from pgolf.runs.result import ARTIFACT, read_result
from pgolf.submission import submit as submission
from pgolf.submission.submit import SubmissionError, submit
from pgolf.training import inputs
from pgolf.training.run import train
from pgolf_core.config import RunConfig
from pgolf_core.files import DataError
from pgolf_core.shards import read_shard, shard_paths, write_shard

TINY = dict(
    track="nano", num_layers=1, model_dim=64, num_heads=2, num_kv_heads=1, train_seq_len=64, train_batch_tokens=1024,
    iterations=3, val_loss_every=0, val_max_tokens=0, roundtrip_val_max_tokens=0, val_batch_size=2048,
)  # fmt: skip


def whole_documents(path, count):
    tokens = read_shard(path)
    return tokens[: np.flatnonzero(tokens == 1)[count]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, embedded):
    """Real shards: eight validation documents, sixty training ones."""
    folder = tmp_path_factory.mktemp("data") / "small"
    folder.mkdir()
    shutil.copy(embedded / "tokenizer.model", folder)
    for split, count in (("train", 60), ("val", 8)):
        write_shard(folder / f"fineweb_{split}_000000.bin", whole_documents(shard_paths(embedded, split)[0], count))
    describe(folder, val={"documents": 8}, train={"documents": 60})
    return folder


def trained(run_dir, folder, **knobs):
    train(RunConfig(**TINY | {"data_path": str(folder)} | knobs), run_dir)
    return run_dir


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, folder):
    return trained(tmp_path_factory.mktemp("runs") / "sweep" / "run", folder)


def test_submission(run_dir, tmp_path):
    out = submit(run_dir, tmp_path / "mine")
    claims = json.loads((out / "submission.json").read_text())
    result = read_result(run_dir)
    assert claims["name"] == "sweep/run"
    assert claims["val_bpb"] == result.roundtrip_val_bpb == claims["run"]["val_bpb"]
    assert claims["bytes_model"] == (out / ARTIFACT).stat().st_size
    assert claims["bytes_code"] == (out / "code.tar.xz").stat().st_size
    assert claims["bytes_model"] + claims["bytes_code"] == claims["bytes_total"] == result.total_bytes
    assert claims["audit"]["figures"]["scored_fraction"] > 0.99
    assert {"audit.txt", "config.json", "log.txt"} <= {path.name for path in out.iterdir()}
    with pytest.raises(SubmissionError, match="is there already"):
        submit(run_dir, out)


@pytest.mark.parametrize("limit", [{"roundtrip_val_max_tokens": 1024}, {"roundtrip_val_max_documents": 2}])
def test_a_part_of_the_split_is_no_number_to_publish(run_dir, folder, tmp_path, limit):
    """The same training, scored on a part: the submission's figure is of all of it."""
    part = trained(tmp_path / "s" / "part", folder, **limit)
    claims, whole = (
        json.loads((submit(run, tmp_path / run.name) / "submission.json").read_text()) for run in (part, run_dir)
    )
    assert claims["val_bpb"] == whole["val_bpb"] != claims["run"]["val_bpb"]
    assert claims["val_tokens"] == whole["val_tokens"] > 2 * claims["run"]["val_tokens"]


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"cap_bytes": 20_000, "allow_over_cap": True}, r"bytes are over the cap of 20,000"),
        ({"final_roundtrip_eval": False}, "has no artifact with a score"),
    ],
)
def test_refused(folder, tmp_path, knobs, says):
    run = trained(tmp_path / "s" / "r", folder, **knobs)
    with pytest.raises(SubmissionError, match=says):
        submit(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("field", "by", "says"),
    [
        ("roundtrip_val_bpb", -1e-6, r"scored again the file has \d\.\d+ bpb, the run says"),
        ("roundtrip_val_loss", -1e-6, r"scored again the file has \d\.\d+ nats a token, the run says"),
        ("roundtrip_bytes", 1, r"scored again these are [\d,]+ tokens of [\d,]+ bytes, the run says"),
    ],
)
def test_a_score_that_the_file_does_not_have(run_dir, tmp_path, field, by, says):
    run = shutil.copytree(run_dir, tmp_path / "s" / "r")
    content = json.loads((run / "result.json").read_text())
    content[field] += by
    content["environment"]["git_commit"] = "another commit, the same machine"
    content["checksum"] = ""  # older versions wrote none
    (run / "result.json").write_text(json.dumps(content))
    with pytest.raises(SubmissionError, match=says):
        submit(run, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_other_data(folder, run_dir, tmp_path, embedded):
    moved = shutil.copytree(folder, tmp_path / "data")
    run = trained(tmp_path / "s" / "r", moved)
    write_shard(moved / "fineweb_train_000000.bin", whole_documents(shard_paths(embedded, "train")[0], 61))
    describe(moved)
    with pytest.raises(SubmissionError, match="is not the data that was scored: its fingerprint is another"):
        submit(run, tmp_path / "out")


def test_validation_text_in_training(folder, tmp_path, monkeypatch):
    """Too far behind for the fast audit of a run; the thorough one finds it, and from then on no run is possible."""
    monkeypatch.setattr(audit, "FAST_READ", 1000)
    monkeypatch.setattr(split_stats, "BATCH", 1000)
    leaky = shutil.copytree(folder, tmp_path / "data")
    tokens = [read_shard(leaky / f"fineweb_{split}_000000.bin") for split in ("train", "val")]
    write_shard(leaky / "fineweb_train_000000.bin", np.concatenate(tokens))
    describe(leaky)
    run = trained(tmp_path / "s" / "r", leaky)
    with pytest.raises(SubmissionError, match=r"nothing to submit\n  - 8 of 8 validation documents"):
        submit(run, tmp_path / "out")
    inputs._data_facts.cache_clear()
    with pytest.raises(DataError, match="8 of 8 validation documents"):
        trained(tmp_path / "s" / "another", leaky)


def test_command(run_dir, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(submission, "SUBMISSIONS", tmp_path)
    assert main.main(["submission", str(run_dir)]) == 0
    out, _ = capfd.readouterr()
    assert out.strip().endswith("sweep_run") and (tmp_path / "sweep_run" / "submission.json").exists()
    assert main.main(["submission", str(run_dir)]) == 2
    assert "is there already" in capfd.readouterr().err
