"""`pgolf legality` of runs: a clean one holds every rule, and each planted violation is named by its rule."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import torch
from support.shards import write_shard
from support.training import tiny

from pgolf.cli import main
from pgolf.data import audit
from pgolf.data.dataset import describe
from pgolf.runs.result import ARTIFACT, RunError, read_result, write_result
from pgolf.submission import legality
from pgolf.submission.conditions import FAIL, NOT_TESTED
from pgolf.submission.legality import of_run, of_runs, sentence
from pgolf.training import round_trip
from pgolf.training.run import train
from pgolf_core.config import RunConfig
from pgolf_core.shards import read_shard, shard_paths
from pgolf_core.tokens import ByteTable

KNOBS = dict(
    iterations=2, val_loss_every=0, roundtrip_val_max_tokens=0, max_wallclock_seconds=600, warmup_steps=0,
    ema_decay=0.5, gptq=True, calibration_tokens=256, document_mask=True, keep_float_max_numel=1000,
)  # fmt: skip


def documents(folder, embedded, split, count):
    tokens = read_shard(shard_paths(embedded, split)[0])
    return write_shard(folder / f"fineweb_{split}_000000.bin", tokens[: np.flatnonzero(tokens == 1)[count]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, embedded):
    """Shards of eight validation and sixty training documents."""
    folder = tmp_path_factory.mktemp("data") / "small"
    folder.mkdir()
    shutil.copy(embedded / "tokenizer.model", folder)
    documents(folder, embedded, "train", 60)
    documents(folder, embedded, "val", 8)
    describe(folder, val={"documents": 8}, train={"documents": 60})
    return folder


def trained(run_dir, folder, **knobs):
    train(tiny(**KNOBS | {"data_path": str(folder)} | knobs), run_dir)
    return run_dir


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, folder):
    return trained(tmp_path_factory.mktemp("runs") / "sweep" / "s1337", folder)


def copied(run_dir, tmp_path, knobs=None, **changes):
    """A copy of a run with other content in config.json and result.json, and checksums that fit."""
    run = shutil.copytree(run_dir, tmp_path / "s" / run_dir.name)
    config = json.loads((run / "config.json").read_text()) | (knobs or {})
    (run / "config.json").write_text(json.dumps(config))
    if knobs:
        changes = {"config_hash": RunConfig(**config).hash} | changes
        log = (run / "log.txt").read_text()
        (run / "log.txt").write_text(log.replace(read_result(run_dir).config_hash, changes["config_hash"]))
    write_result(run, dataclasses.replace(read_result(run_dir), **changes))
    return run


def broken(run):
    return {v.rule: v.found for v in of_run(run) if v.outcome == FAIL}


def test_a_clean_run_holds_every_rule_and_each_is_tested(run_dir, capfd):
    verdicts = of_run(run_dir)
    assert [f"{v.rule}: {v.found}" for v in verdicts if v.outcome != "pass"] == []
    assert all(v.how and v.found for v in verdicts)
    assert sentence(verdicts) == f"legal: {len(verdicts)} of {len(verdicts)} rules hold"
    assert main.main(["legality", str(run_dir)]) == 0
    assert capfd.readouterr().out.splitlines()[-1] == sentence(verdicts)


def test_a_run_on_a_part_of_the_split_is_not_legal(run_dir, folder, tmp_path):
    part = trained(tmp_path / "s" / "part", folder, roundtrip_val_max_tokens=1024)
    assert set(broken(part)) == {"whole validation split"}
    assert "1,024 of" in broken(part)["whole validation split"]
    assert sentence(of_run(part)) == "not legal: whole validation split"


@pytest.mark.parametrize(
    ("rule", "change", "says"),
    [
        ("training clock", {"over": 9.0, "counted": 609.0}, "over by 9.0 s: 609.0 s of 600 s"),
        ("evaluation clock", {"eval_seconds": 601.0}, "601.0 s of 600 s"),
        ("config, seed and log of one run", {"seed": 42}, "seed 1337 in config.json, 42 in the result"),
        ("score of the file", {"roundtrip_val_bpb": 1.0}, "the result says 1.00000000 bpb"),
        ("size", {"code": 5}, r"bytes, and [\d,]+ are counted"),
    ],
)
def test_a_claim_that_the_files_do_not_bear_out_is_named(run_dir, tmp_path, rule, change, says, monkeypatch):
    monkeypatch.setattr(legality, "examine", lambda *_: [])
    result = read_result(run_dir)
    if rule == "training clock":
        change = {"budget": result.budget | change}
    elif rule == "size":
        change = {"bytes": result.bytes | {"code": result.bytes["code"] - 5}, "total_bytes": result.total_bytes - 5}
    assert_named(copied(run_dir, tmp_path, **change), rule, says)


def assert_named(run, rule, says):
    found = broken(run)
    assert rule in found
    assert re.search(says, found[rule])


def test_a_file_over_the_cap_by_one_byte_is_named_and_one_at_the_cap_is_not(run_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(legality, "examine", lambda *_: [])
    total = read_result(run_dir).total_bytes
    over = copied(run_dir, tmp_path / "over", {"cap_bytes": total - 1}, cap_bytes=total - 1)
    assert broken(over) == {"size": f"{total:,} bytes are over the cap of {total - 1:,} by 1"}
    assert broken(copied(run_dir, tmp_path / "at", {"cap_bytes": total}, cap_bytes=total)) == {}


def test_the_log_of_another_run_is_named(run_dir, tmp_path):
    run = copied(run_dir, tmp_path)
    log = (run / "log.txt").read_text().replace("config:", "config:0")
    (run / "log.txt").write_text(log)
    write_result(run, read_result(run_dir))
    assert "log.txt is of another run" in broken(run)["config, seed and log of one run"]


def test_a_changed_file_is_named_and_nothing_else_is_taken_from_it(run_dir, tmp_path):
    run = copied(run_dir, tmp_path)
    (run / ARTIFACT).write_bytes((run / ARTIFACT).read_bytes()[:-1] + b"?")
    verdicts = of_run(run)
    assert [v.rule for v in verdicts if v.outcome == FAIL] == ["files as the run wrote them"]
    assert verdicts[-1].outcome == NOT_TESTED


def test_validation_documents_in_training_are_named(folder, tmp_path, monkeypatch):
    leaky = shutil.copytree(folder, tmp_path / "data")
    (leaky / audit.STORED).unlink(missing_ok=True)
    run = trained(tmp_path / "s" / "r", leaky)
    tokens = [read_shard(leaky / f"fineweb_{split}_000000.bin") for split in ("train", "val")]
    write_shard(leaky / "fineweb_train_000000.bin", np.concatenate(tokens))
    describe(leaky, train={"documents": 68})
    assert "8 of 8 validation documents" in broken(run)["no validation text in training"]


def test_a_validation_split_that_was_cut_is_named(folder, tmp_path, embedded):
    short = shutil.copytree(folder, tmp_path / "data")
    run = trained(tmp_path / "s" / "r", short)
    documents(short, embedded, "val", 6)
    assert "whole validation split" in broken(run)


@pytest.mark.parametrize(
    ("miscount", "says"),
    [("spaces", "leading spaces are counted twice"), ("marks", "control tokens must be boundaries")],
)
def test_miscounted_bytes_are_named(run_dir, folder, monkeypatch, miscount, says):
    monkeypatch.setattr(audit, "stored", lambda _: None)
    monkeypatch.setattr(audit, "store", lambda *_: None)
    monkeypatch.setattr(legality, "examine", lambda *_: [])
    of = ByteTable.of

    def wrong(pieces):
        table = of(pieces)
        if miscount == "spaces":
            return dataclasses.replace(table, base_bytes=table.base_bytes + table.has_leading_space)
        marks = {"base_bytes": table.base_bytes + 3 * table.is_boundary}
        return dataclasses.replace(table, **marks, is_boundary=torch.zeros_like(table.is_boundary))

    monkeypatch.setattr(ByteTable, "of", wrong)
    found = broken(run_dir)
    assert says in found["bytes as decoded"]
    assert "score of the file" in found


def test_a_calibration_on_validation_text_is_named(folder, tmp_path, monkeypatch):
    honest = round_trip.calibration_of

    def on_validation(state, config, shards, device, tokens=0):
        return honest(state, config, shard_paths(folder, "val"), device, tokens)

    monkeypatch.setattr(round_trip, "calibration_of", on_validation)
    run = trained(tmp_path / "s" / "r", folder)
    monkeypatch.setattr(round_trip, "calibration_of", honest)
    assert set(broken(run)) == {"calibration text"}


def test_averaged_weights_claimed_and_raw_ones_in_the_file_are_named(run_dir, folder, tmp_path):
    raw = trained(tmp_path / "s" / "raw", folder, ema_decay=0)
    said = read_result(raw)
    names = [f.name for f in dataclasses.fields(said) if f.name.startswith(("roundtrip_", "artifact_"))]
    own = {name: getattr(said, name) for name in [*names, "bytes", "total_bytes"]}
    run = copied(run_dir, tmp_path / "mixed")
    shutil.copy(raw / ARTIFACT, run)
    write_result(run, dataclasses.replace(read_result(run_dir), **own))
    assert "control tensors of the file are not the checkpoint's" in broken(run)["weights scored are weights shipped"]
    claimed = copied(raw, tmp_path / "claimed", {"ema_decay": 0.5})
    assert "the knobs ask for ema weights, and raw ones" in broken(claimed)["weights scored are weights shipped"]


def test_runs_of_one_configuration_and_several_seeds_belong_together(run_dir, folder, tmp_path):
    other = trained(tmp_path / "s" / "s42", folder, seed=42)
    assert sentence(of_runs([run_dir, other])) == "no violation found: 3 of 3 rules hold"
    lower = trained(tmp_path / "s" / "lower", folder, seed=7, matrix_lr=0.01)
    verdict = of_runs([run_dir, other, lower])[0]
    assert verdict.outcome == FAIL
    assert "s1337 and lower: matrix_lr 0.04 and 0.01" in verdict.found
    twice = shutil.copytree(run_dir, tmp_path / "s" / "again")
    assert sentence(of_runs([run_dir, twice])) == "not legal: every seed once, a log and a file per seed"


def test_a_run_without_a_score_of_its_file_cannot_be_judged(tmp_path, folder):
    run = trained(tmp_path / "s" / "r", folder, final_roundtrip_eval=0)
    with pytest.raises(RunError, match="train it with final_roundtrip_eval=1"):
        of_run(run)
