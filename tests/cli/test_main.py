"""The command line: help, refusals of one clear message, and a table that hides no run."""

import errno
import json
import re

import pytest
import torch
import yaml
from support.training import TINY, tiny

from pgolf.cli import main
from pgolf.runs import directory, table
from pgolf.runs.code import code_digest
from pgolf.runs.directory import run_directories, run_name, write_failure
from pgolf.runs.result import Result, read_result, write_result
from pgolf_core.config import RunConfig
from pgolf_core.export import export
from pgolf_core.files import atomic_write


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(directory, "RUNS", tmp_path / "runs")
    return tmp_path / "runs"


def pgolf(capfd, *words):
    """(exit status, stdout, stderr) of a pgolf command."""
    try:
        status = main.main([str(word) for word in words])
    except SystemExit as exit:  # argparse
        status = exit.code
    return status, *capfd.readouterr()


@pytest.fixture
def own(tmp_path):
    """Three hundred documents of one's own."""
    words = ["loss", "step", "weight", "byte", "scale", "token", "model", "prune", "round", "trip", "shard"]
    texts = [" ".join(words[(i * j + i) % 11] for j in range(30)) + f" number {i}." for i in range(300)]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("words", "commands"),
    [
        ((), ("demo", "sweep", "train", "runs", "report", "artifact", "data")),
        (("data",), ("embedded", "fineweb", "docs", "audit")),
    ],
)
def test_alone_it_prints_help(capfd, words, commands):
    status, out, err = pgolf(capfd, *words)
    assert (status, err) == (0, "") and all(f"    {command} " in out for command in commands)


def test_it_says_its_version(capfd):
    status, out, _ = pgolf(capfd, "--version")
    assert status == 0 and re.fullmatch(r"pgolf \d+\.\d+\.\d+\n", out)


@pytest.mark.parametrize("command", [("sweep", __file__), ("demo",), ("worker", "tcp://box:8786")])
def test_the_former_name_of_workers_is_answered_with_the_new_one(capfd, command):
    assert pgolf(capfd, *command, "--slots", 2) == (2, "", "pgolf: --slots is now --workers: use --workers 2\n")


FULL = OSError(errno.ENOSPC, "No space left on device", "/full/config.json")
DENIED = PermissionError(errno.EACCES, "Permission denied")


@pytest.mark.parametrize(
    ("error", "says"),
    [(FULL, "/full/config.json: No space left on device"), (DENIED, "[Errno 13] Permission denied")],
)
def test_a_full_or_closed_disk_ends_with_one_line(capfd, monkeypatch, error, says):
    def fail(*_):
        raise error

    monkeypatch.setattr(table, "load_runs", fail)
    assert pgolf(capfd, "runs") == (2, "", f"pgolf: {says}\n")


def test_a_run_from_the_command_line(capfd, root, tmp_path, embedded):
    config = tmp_path / "knobs.yaml"
    config.write_text(yaml.safe_dump(TINY | {"iterations": 2}), encoding="utf-8")
    status, out, _ = pgolf(capfd, "train", "--config", config, "-k", "seed=5")
    (run_dir,) = run_directories(root)
    *_, place, answer = out.splitlines()
    assert status == 0 and place == str(run_dir)
    result = read_result(run_dir)
    assert answer.startswith(f"explore/{run_dir.name}: {result.roundtrip_val_bpb:.4f} bpb in {result.total_bytes:,} of")
    assert answer.endswith(" of 1,000,000 bytes, fits")
    status, out, _ = pgolf(capfd, "train", "--config", config, "-k", "seed=5")
    assert status == 0 and out.splitlines()[-1] == answer and "not trained again" in out
    expected = tiny(iterations=2, seed=5)
    assert run_dir == root / "explore" / run_name(expected, run_dir.parent)
    assert read_result(run_dir).config_hash == expected.hash


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train", "-k", "num_layrs=3", "-k", "seed=x"], ["num_layrs: no such knob; did you mean num_", "seed='x'"]),
        (["train", "-k", "seed"], ["-k: seed: expected NAME=VALUE"]),
        (["train", "-k", "data_path=nowhere", "-k", "track=nano"], ["data_path=nowhere: no folder"]),
        (["train", "-k", "device=cuda:63", "-k", "track=nano"], ["device=cuda:63: this machine has none"]),
        (["train", "--config", "nowhere.yaml"], ["nowhere.yaml: no such file"]),
        (["sweep", "nowhere.yaml"], ["nowhere.yaml: no such file"]),
        (["sweep", "BAD"], ["bad.yaml", "run", "num_heads=5"]),
        (["runs", "nothing"], ["has no sweep nothing"]),
        (["plan", "--effect", "-1"], ["--effect: -1: expected a number above 0"]),
        (["plan", "--effect", "0.002", "--runs", "7"], ["no config of any track was trained with several seeds"]),
        (["artifact", __file__], ["test_main.py: not a pgolf artifact"]),
        (["data", "published"], ["published"]),
        (["data", "docs", "nowhere.jsonl"], ["nowhere.jsonl: no such file or folder"]),
        (["data", "docs", "OWN", "--field", "body"], ["no field 'body', only 'text'"]),
        (["data", "docs", "OWN", "--tokenizer", "wordpiece"], ["tokenizer=wordpiece: choose one of bpe, unigram, byt"]),
        (["data", "docs", "OWN", "--transform", "upper"], ["transform=upper: choose caseops, with the tokenizer"]),
        (["data", "docs", "OWN", "--val-documents", "many"], ["many: expected a whole number"]),
        (["data", "docs", "OWN", "--vocab-size", "70000"], ["vocab_size=70000: shards hold tokens of vocab_size <="]),
        (["data", "docs", "OWN", "--vocab-size", "262"], ["vocab_size=262", "Increase vocab_size"]),
        (["data", "docs", "OWN", "--tokenizer", "bytes", "--val-documents", "300"], ["300 documents give 0 for train"]),
        (["data", "docs", "OWN", "--val-documents", "3", "--val-share", "0.1"], ["set either val_documents", "=0.1"]),
        (["data", "fineweb", "--variant", "../x"], ["not the name of a variant"]),
        (["data", "fineweb", "--train-shards", "0"], ["--train-shards 0: training needs at least one shard"]),
        (["data", "fineweb", "--endpoint", "http://127.0.0.1:1"], ["pgolf: http://127.0.0.1:1/", "cannot be fetched"]),
        (["data", "embedded", "--vocab-size", "300", "--tokenizer", "bytes"], ["set vocab_size=260"]),
        (["data", "audit", "nowhere", "--max-tokens", "-3"], ["-3: expected a whole number"]),
        (["swep"], ["swep"]),
    ],
)  # fmt: skip
def test_a_bad_request_ends_with_one_message_and_writes_nothing(capfd, own, tmp_path, root, words, says, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    bad = tmp_path / "bad.yaml"
    bad.write_text("runs: {a: {num_heads: 5}}", encoding="utf-8")
    out = ["--out", tmp_path / "out"] if words[1:2] in (["docs"], ["fineweb"]) else []
    status, _, err = pgolf(capfd, *[{"OWN": own, "BAD": bad}.get(word, word) for word in words], *out)
    assert status == 2
    assert all(text in err for text in says) and "Traceback" not in err
    assert not root.exists()
    assert not [path for path in tmp_path.glob("out*") if path.suffix != ".lock"]


def test_a_model_for_a_gpu_that_nobody_asked_for_is_said_on_a_cpu(capfd, root):
    said = "no track: 9 × 512 for a GPU; -k track=nano takes a minute on a CPU\n"
    for knobs, expected in (((), said), (("-k", "track=nano"), ""), (("-k", "model_dim=64"), "")):
        words = ("train", "-k", "data_path=nowhere", "-k", "device=cpu", *knobs)
        assert pgolf(capfd, *words)[:2] == (2, expected)


def test_another_cap_alone_is_refused_for_fixed_quantizers(capfd, root, finished):
    status, _, err = pgolf(capfd, "export", finished[0], "-k", "cap_bytes=60000")
    assert status == 2 and "cap_bytes alone changes no file of fixed quantizers: add -k allocation=solve" in err
    assert not root.exists()


def test_an_artifact_is_accounted_for(capfd, tmp_path, root):
    config = RunConfig(quantizer="step:0.5", codec="ans", keep_float_max_numel=0).export
    state = {"blocks.0.mlp.fc.weight": torch.randn(64, 32), "q_gains": torch.ones(2, 2)}
    account = export(state, config, tmp_path / "a")
    status, out, _ = pgolf(capfd, "artifact", tmp_path / "a")
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line}
    assert status == 0
    for part in ("weights", "scales", "metadata"):
        assert int(rows[part][-2].replace(",", "")) == account.parts[part]
    assert rows["total"][-1] == f"{account.artifact:,}" and rows["weights"][1] == "ans"
    assert rows["blocks.0.mlp.fc.weight"][1:4] == ["64", "×", "32"]
    assert float(rows["blocks.0.mlp.fc.weight"][-1]) == pytest.approx(3.05, abs=0.3)  # bits of a Gaussian at half σ
    (root / "s" / "run").mkdir(parents=True)
    (root / "s" / "run" / "artifact.pgolf").write_bytes((tmp_path / "a").read_bytes())
    assert pgolf(capfd, "artifact", "s/run") == (0, out, "")
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:-1])
    status, _, err = pgolf(capfd, "artifact", tmp_path / "a")
    assert status == 2 and err.startswith("pgolf: ") and "cut short" in err
    status, _, err = pgolf(capfd, "artifact", tmp_path)
    assert status == 2 and err == f"pgolf: {tmp_path}: not a regular file\n"


def test_a_dry_run_says_what_would_run_and_does_not(capfd, tmp_path, root):
    path = tmp_path / "s.yaml"
    path.write_text("question: why?\ntrack: nano\nruns: {a: {}, b: {seed: 2}}\nstages: [sensitivity]", encoding="utf-8")
    (root / "s" / "a").mkdir(parents=True)
    config = RunConfig(track="nano")
    (root / "s" / "a" / "config.json").write_text(json.dumps(config.model_dump()), encoding="utf-8")
    made = {"code": code_digest()}
    write_result(root / "s" / "a", Result("train", config.hash, seed=1337, track="nano", environment=made))
    status, out, _ = pgolf(capfd, "sweep", path, "--dry-run")
    words = [line.split() for line in out.splitlines()]
    assert status == 0 and words[0] == ["s:", "why?"]
    assert words[1] == ["a", "complete", "714,440", "parameters"] and words[3] == ["sensitivity", "new", "to", "run"]
    assert words[2] == ["b", "new", "to", "run", "714,440", "parameters"]
    assert "order of the files" not in out
    assert words[-1][:3] == ["2", "to", "run,"] and words[-1][-2:] == ["go", "by"] and not (root / "s" / "b").exists()


def test_the_table_shows_every_run(capfd, root):
    status, out, _ = pgolf(capfd, "runs")
    assert status == 0 and "no runs" in out
    for name in ("fits", "over", "failed", "killed"):
        (root / "s" / name).mkdir(parents=True)
        config = RunConfig(track="nano", cap_bytes=1000)
        (root / "s" / name / "config.json").write_text(json.dumps(config.model_dump()), encoding="utf-8")
    for name, size in (("fits", 900), ("over", 1100)):
        result = Result(
            kind="train", config_hash=config.hash, seed=1, track="nano", roundtrip_val_bpb=2.5, total_bytes=size,
            cap_bytes=1000, train_seconds=61.4, bytes={"code": 100}, roundtrip_bytes=9, roundtrip_tokens=3, steps=1,
        )  # fmt: skip
        write_result(root / "s" / name, result)
    write_failure(root / "s" / "failed", RuntimeError("out of\nmemory"))
    status, out, _ = pgolf(capfd, "runs", "s")
    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == ["sweep", "run", "status", "bpb", "bytes", "cap", "seconds"]
    assert ["s", "fits", "complete", "2.5000", "900", "1,000", "61"] in rows
    assert ["s", "over", "complete", "2.5000", "1,100", "1,000", "61", "over", "its", "cap"] in rows
    assert ["s", "killed", "incomplete", "1,000"] in rows
    assert ["s", "failed", "failed", "1,000", "RuntimeError:", "out", "of", "memory"] in rows
    assert out.splitlines()[-1] == "4 runs: 2 complete, 1 failed, 1 incomplete"


def test_diff_says_what_differs_and_whether_it_was_claimed(capfd, root):
    for name, knobs in (("a", {}), ("b", {"num_layers": 3, "seed": 2})):
        config = RunConfig(track="nano", **knobs)
        atomic_write(root / "s" / name / "config.json", json.dumps(config.model_dump()))
    status, out, _ = pgolf(capfd, "diff", "s/b", root / "s" / "a", "--claim", "num_layers")
    lines = out.splitlines()
    assert status == 0 and lines[-1] == "just what is claimed" and "1 knob differs" in lines
    assert "num_layers" in out and "seed" in out
    status, out, _ = pgolf(capfd, "diff", "s/b", "s/a", "--claim", "matrix_lr")
    assert status == 1 and "claimed and not changed: matrix_lr; changed and not claimed: num_layers" in out
    status, _, err = pgolf(capfd, "diff", "s/b", "s/none")
    assert status == 2 and "s/none: no such run" in err and "Traceback" not in err


def test_own_documents_become_a_run(capfd, own, tmp_path, root):
    words = ("data", "docs", own, "--vocab-size", 320, "--val-share", 0.2, "--out", tmp_path / "shards")
    status, out, _ = pgolf(capfd, *words)
    assert status == 0 and "training tokens of" in out
    before = {path.name: path.read_bytes() for path in (tmp_path / "shards").glob("*.bin")}
    assert pgolf(capfd, *words)[0] == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "shards").glob("*.bin")} == before

    status, out, _ = pgolf(capfd, "data", "audit", tmp_path / "shards")
    assert status == 0 and "no findings" in out
    knobs = TINY | {"vocab_size": 320, "data_path": tmp_path / "shards", "iterations": 2}
    knobs |= {"val_max_tokens": 0, "roundtrip_val_max_tokens": 0}
    pairs = [word for name, value in knobs.items() for word in ("-k", f"{name}={value}")]
    assert pgolf(capfd, "train", *pairs)[0] == 0
    (run_dir,) = run_directories(root)
    told = read_result(run_dir).data
    assert (told["folder"], told["audit"], told["findings"], told["published"]) == ("shards", "thorough", [], "")
    assert told["scored_fraction"] > 0.95

    (shard,) = (tmp_path / "shards").glob("fineweb_val_*.bin")
    shard.write_bytes(shard.read_bytes()[:-3])
    status, out, _ = pgolf(capfd, "data", "audit", tmp_path / "shards")
    assert status == 1 and "fineweb_val_000000.bin: the header promises" in " ".join(out.split())


def test_fewer_documents_are_fewer_for_the_tokenizer_too(capfd, own, tmp_path):
    words = ("data", "docs", own, "--vocab-size", 320, "--val-share", 0.2, "--documents", 100)
    assert pgolf(capfd, *words, "--out", tmp_path / "few")[0] == 0
    source = json.loads((tmp_path / "few" / "dataset.json").read_text(encoding="utf-8"))["source"]
    assert (source["documents_taken"], source["tokenizer"]["documents"]) == (100, 100)
    assert pgolf(capfd, *words, "--tokenizer-documents", 200, "--out", tmp_path / "more")[0] == 0
    source = json.loads((tmp_path / "more" / "dataset.json").read_text(encoding="utf-8"))["source"]
    assert source["tokenizer"]["documents"] == 200


def test_control_characters_never_reach_the_terminal(capfd):
    status, _, said = pgolf(capfd, "train", "-k", "quantizer=\x1b]0;title\x07\x1b[2J\u202e\x9b1A")
    assert status == 2 and "title" in said
    assert not set("\x1b\x07\x9b\u202e") & set(said)
