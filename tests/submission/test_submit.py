"""A submission is written only when the file scores what the run says, on all of audited data."""

import json
import shutil

import numpy as np
import pytest
from support.alone import final_bpb, run_alone
from support.shards import write_shard
from support.training import tiny

from pgolf.cli import main
from pgolf.data import audit, split_stats
from pgolf.data.dataset import describe
from pgolf.runs.result import read_result
from pgolf.submission import submit as submission
from pgolf.submission.submit import SubmissionError, submit
from pgolf.training import inputs
from pgolf.training.run import train
from pgolf_core.config import digest
from pgolf_core.files import DataError
from pgolf_core.shards import read_shard, shard_paths

pytestmark = pytest.mark.usefixtures("real_scripts")


def write_documents(folder, embedded, split, count):
    tokens = read_shard(shard_paths(embedded, split)[0])
    write_shard(folder / f"fineweb_{split}_000000.bin", tokens[: np.flatnonzero(tokens == 1)[count]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, embedded):
    """Real shards: eight validation documents, sixty training ones."""
    folder = tmp_path_factory.mktemp("data") / "small"
    folder.mkdir()
    shutil.copy(embedded / "tokenizer.model", folder)
    write_documents(folder, embedded, "train", 60)
    write_documents(folder, embedded, "val", 8)
    describe(folder, val={"documents": 8}, train={"documents": 60})
    return folder


def trained(run_dir, folder, **knobs):
    short = dict(iterations=2, val_loss_every=0, val_max_tokens=0, roundtrip_val_max_tokens=0, data_path=str(folder))
    train(tiny(**short | knobs), run_dir)
    return run_dir


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, folder):
    return trained(tmp_path_factory.mktemp("runs") / "sweep" / "run", folder)


def test_a_record_folder_holds_scripts_files_and_scores_and_is_never_overwritten(
    run_dir, folder, tmp_path, capfd, monkeypatch
):
    monkeypatch.setattr(submission, "SUBMISSIONS", tmp_path)
    other = trained(tmp_path / "s" / "other", folder, seed=7)
    base = trained(tmp_path / "s" / "base", folder, matrix_lr=0.01)
    words = ["submission", str(run_dir), str(other), "--base", str(base), "--beats", "9"]
    assert main.main(words) == 0
    out, results = tmp_path / "sweep_run", [read_result(run) for run in (run_dir, other)]
    assert capfd.readouterr().out.strip().endswith("sweep_run")
    claims, script = json.loads((out / "submission.json").read_text()), (out / "train_gpt.py").read_bytes()
    scores = [result.roundtrip_val_bpb for result in results]
    assert claims["name"] == "sweep/run" and claims["val_bpb"] == pytest.approx(sum(scores) / 2)
    assert claims["val_bpb_std"] == pytest.approx(abs(scores[0] - scores[1]) / 2**0.5)
    assert claims["bytes_code"] == len(script) == results[0].bytes["code"]
    for result in results:
        own, artifact = claims["seeds"][str(result.seed)], out / f"artifact_seed{result.seed}.pgolf"
        assert own["val_bpb"] == result.roundtrip_val_bpb
        assert own["bytes_total"] == result.total_bytes == artifact.stat().st_size + len(script)
        assert "_roundtrip_exact" in (out / f"train_seed{result.seed}.log").read_text()
        output = run_alone(out / "train_gpt.py", folder, "--eval", str(artifact))
        assert final_bpb(output) == f"{own['val_bpb']:.8f}"
    assert claims["bytes_total"] == max(result.total_bytes for result in results)
    assert claims["audit"]["figures"]["scored_fraction"] > 0.99
    readme = (out / "README.md").read_text()
    assert "| matrix_lr | 0.01 | 0.04 |" in readme and "and it holds" in readme and "one-sided t-test" in readme
    assert {line.partition("==")[0] for line in (out / "requirements.txt").read_text().split()} == {
        "numpy", "sentencepiece", "torch",
    }  # fmt: skip
    assert main.main(["submission", str(run_dir)]) == 2
    assert "is there already" in capfd.readouterr().err


def test_runs_of_two_configurations_or_one_seed_are_no_record(run_dir, folder, tmp_path):
    other = trained(tmp_path / "s" / "other", folder, seed=7, matrix_lr=0.03)
    with pytest.raises(SubmissionError, match="s/other is another configuration: matrix_lr"):
        submit([run_dir, other], tmp_path / "out")
    with pytest.raises(SubmissionError, match="seed 1337 is that of two runs"):
        submit([run_dir, run_dir], tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("limit", [{"roundtrip_val_max_tokens": 1024}, {"roundtrip_val_max_documents": 2}])
def test_a_run_scored_on_a_part_is_submitted_with_the_score_of_the_whole_split(run_dir, folder, tmp_path, limit):
    part = trained(tmp_path / "s" / "part", folder, **limit)
    claims, whole = json.loads((submit(part, tmp_path / "out") / "submission.json").read_text()), read_result(run_dir)
    assert claims["val_bpb"] == whole.roundtrip_val_bpb != claims["seeds"]["1337"]["run_val_bpb"]
    assert claims["val_tokens"] == whole.roundtrip_tokens > 2 * claims["seeds"]["1337"]["run_val_tokens"]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"artifact_sha256": None}, "has no artifact with a score"),
        ({"cap_bytes": 20_000}, r"bytes are over the cap of 20,000"),
        (
            {"script_sha256": "0"},
            r"the script of this version has [\d,]+ bytes, that of the run [\d,]+, .*: check out its commit another",
        ),
        ({"script_sha256": "0", "commit": None}, r"another content: run it again with this version of pgolf"),
        ({"data_fingerprint": "0"}, "is not the data that was scored: its fingerprint is another"),
        ({"roundtrip_val_bpb": -1e-6}, r"scored again the file has \d\.\d+ bpb"),
        ({"roundtrip_val_loss": -1e-6}, r"scored again the file has \d\.\d+ bpb, \d\.\d+ nats per token"),
        ({"roundtrip_bytes": 1}, r"[\d,]+ tokens of [\d,]+ bytes; the run says \d\.\d+ bpb"),
    ],
)
def test_a_claim_that_does_not_hold_is_named_and_nothing_is_written(run_dir, tmp_path, changed, says):
    run = shutil.copytree(run_dir, tmp_path / "s" / "r")
    content = json.loads((run / "result.json").read_text())
    content["environment"]["git_commit"] = changed.get("commit", "another commit, the same machine")
    field, value = next(iter(changed.items()))
    content[field] = content[field] + value if field.startswith("roundtrip") else value
    del content["checksum"]
    content["checksum"] = digest(content)
    (run / "result.json").write_text(json.dumps(content))
    with pytest.raises(SubmissionError, match=says):
        submit(run, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_validation_text_in_training_is_found_by_the_thorough_audit_and_refused_from_then_on(
    folder, tmp_path, monkeypatch
):
    """Too far behind for the fast audit of a run."""
    monkeypatch.setattr(audit, "FAST_READ", 1000)
    monkeypatch.setattr(split_stats, "BATCH", 1000)
    leaky = shutil.copytree(folder, tmp_path / "data")
    tokens = [read_shard(leaky / f"fineweb_{split}_000000.bin") for split in ("train", "val")]
    write_shard(leaky / "fineweb_train_000000.bin", np.concatenate(tokens))
    describe(leaky)
    run = trained(tmp_path / "s" / "r", leaky)
    with pytest.raises(SubmissionError, match=r"this run cannot be submitted:\n  - 8 of 8 validation documents"):
        submit(run, tmp_path / "out")
    inputs._data_facts.cache_clear()
    with pytest.raises(DataError, match="8 of 8 validation documents"):
        trained(tmp_path / "s" / "another", leaky)
