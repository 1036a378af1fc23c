"""Help with examples in every command, and every mistake answered by one line that names the nearest right thing."""

import argparse
import json
import shlex

import pytest
import safetensors.torch
import torch
from support.runs import make_run

from pgolf.cli import main
from pgolf.cli.arguments import complete_knobs, complete_runs
from pgolf.reports import text
from pgolf.runs import directory
from pgolf.runs.result import Result


def commands(parser, words=("pgolf",)):
    """Words and parser of every command."""
    yield words, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                yield from commands(sub, (*words, name))


COMMANDS = dict(list(commands(main.make_parser()))[1:])


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_commands_help_ends_with_examples_that_parse(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    head, *examples = COMMANDS[words].epilog.splitlines()
    assert head == "examples:" and examples
    for example in examples:
        name, *rest = shlex.split(example)
        for word in rest:
            if "." in word and not word.startswith((".", "-")) and "=" not in word and " " not in word:  # a file
                (tmp_path / word).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / word).touch()
        arguments, unexpected = main.make_parser().parse_known_args(rest)
        assert name == "pgolf" and not unexpected and arguments.command
        assert tuple(rest[: len(words) - 1]) == words[1:]


@pytest.fixture
def runs(tmp_path, monkeypatch):
    root = tmp_path / "runs"
    make_run(root, "demo/momentum")
    make_run(root, "demo/control")
    monkeypatch.setattr(directory, "RUNS", root)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweep.yaml").write_text("track: nano\nruns: {control: {}, wide: {model_dim: 160}}", encoding="utf-8")
    (tmp_path / "bad.yaml").write_text("track: nanno\nbase: {steps: 3}\nruns: {a: {}}", encoding="utf-8")
    safetensors.torch.save_file({"tok_emb.weight": torch.zeros(64, 8)}, tmp_path / "weights.safetensors")
    return root


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("trian", "did you mean train?"),
        ("data dcos", "did you mean docs?"),
        ("train --confg x", "did you mean --config?"),
        ("train track=nano", "a knob is set by -k track=nano"),
        ("train -k track=nano -k data_path=embeded", "did you mean embedded?"),
        ("train -k track=nano -k data_path=doc", "did you mean docs?"),
        ("train -k track=nanno", "did you mean nano?"),
        ("train -k steps=3", "the number of optimizer steps is iterations"),
        ("train -k codec=zlbi", "did you mean zlib?"),
        ("train -k num_layrs=3", "did you mean num_layers?"),
        ("train --config swep.yaml", "did you mean sweep.yaml?"),
        ("sweep swep.yaml", "did you mean sweep.yaml?"),
        ("sweep bad.yaml", "the number of optimizer steps is iterations"),
        ("sweep bad.yaml", "did you mean nano?"),
        ("sweep sweep.yaml --only wied", "did you mean wide?"),
        ("runs dmeo", "did you mean demo?"),
        ("runs --sort bbp", "did you mean bpb?"),
        ("runs --columns run,num_layer", "did you mean num_layers?"),
        ("report dmeo", "did you mean demo?"),
        ("diff demo/momentun demo/control", "did you mean demo/momentum?"),
        ("diff demo/momentum demo/control --claim steps", "the number of optimizer steps is iterations"),
        ("plan --effect 0.1 --track nanno", "did you mean nano?"),
        ("generate demo/momentun", "did you mean demo/momentum?"),
        ("generate demo/momentum", "has no artifact.pgolf"),
        ("export demo/momentun -k codec=ans", "did you mean demo/momentum?"),
        ("export demo/momentum", "as -k codec=ans"),
        ("export demo/momentum -k codek=ans", "did you mean codec?"),
        ("export demo/momentum -k num_layers=3", "train another run for that"),
        ("submission demo/momentun", "did you mean demo/momentum?"),
        ("import-checkpoint wieghts.safetensors", "did you mean weights.safetensors?"),
        ("import-checkpoint weights.safetensors -k track=nano", "missing: "),
        ("import-checkpoint sweep.yaml", "neither a whole .safetensors file nor one of torch.save"),
        ("knobs muon_momentun", "did you mean muon_momentum?"),
        ("tracks nanno", "did you mean nano?"),
        ("data audit rusn", "did you mean runs?"),
    ],
)
def test_a_mistake_is_answered_by_the_nearest_right_thing_and_leaves_nothing(typed, says, runs, capfd):
    before = sorted(path for path in runs.rglob("*") if path.name != ".lock")
    try:
        status = main.main(shlex.split(typed))
    except SystemExit as end:
        status = end.code
    out, err = capfd.readouterr()
    assert status == 2 and says in err and "Traceback" not in out + err
    assert sorted(path for path in runs.rglob("*") if path.name != ".lock") == before


def test_runs_are_sorted_and_printed_in_chosen_columns_and_as_json(runs, capfd):
    make_run(runs, "other/best", bpb=2.25, total=400_000)
    assert main.main(["runs", "--columns", "run,bpb,num_layers", "--sort", "bpb"]) == 0
    lines = [line.split() for line in capfd.readouterr().out.splitlines()]
    assert lines[0] == ["run", "bpb", "num_layers"] and lines[1] == ["best", "2.25", "2"] and len(lines) == 4
    assert main.main(["runs", "--json", "--sort", "total_bytes", "--reverse"]) == 0
    rows = json.loads(capfd.readouterr().out)
    assert [row["total_bytes"] for row in rows] == [500_000, 500_000, 400_000] and rows[-1]["sweep"] == "other"
    assert main.main(["runs", "--json", "--columns", "run,eval_seconds"]) == 0
    assert {row["eval_seconds"] for row in json.loads(capfd.readouterr().out)} == {None}


def test_a_dry_run_of_chosen_runs_estimates_time_by_complete_ones(runs, capfd):
    make_run(runs, "other/best", tokens=120 * 4096, flops_per_token=4e6, knobs=dict(compile=False))
    assert main.main(["sweep", "sweep.yaml", "--dry-run", "--only", "wide"]) == 0
    out = capfd.readouterr().out
    assert "wide" in out and "control" not in out
    (each,) = [line.partition("about")[2] for line in out.splitlines() if line.startswith("  wide")]
    assert out.splitlines()[-1].startswith("1 to run, ") and out.splitlines()[-1].endswith(f"about{each} of training")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "2.5000 bpb in 900 of 1,000 bytes, fits"),
        ({"total_bytes": 1100}, "2.5000 bpb in 1,100 of 1,000 bytes, over its cap by 100 bytes"),
        ({"roundtrip_val_bpb": None, "val_bpb": 2.25}, "2.2500 bpb of the unquantized weights; no file was written"),
    ],
)
def test_the_answer_of_a_run_is_one_sentence(fields, says):
    usual = dict(roundtrip_val_bpb=2.5, total_bytes=900, cap_bytes=1000)
    assert text.answer(Result("train", "x", 1, "nano", **usual | fields)).startswith(says)


def test_the_doctor_finds_what_runs_need(runs, capfd):
    assert main.main(["doctor"]) == 0
    out = capfd.readouterr().out
    assert all(word in out for word in ("cpu", "bfloat16", "cores", "memory", "gpu", "compiler", "disk", "torch"))
    assert out.splitlines()[-1].startswith("all that runs need is here")


def test_a_shell_completes_knobs_and_runs(runs):
    assert "num_layers=" in complete_knobs("num") and complete_runs("") == ["demo/control", "demo/momentum"]
