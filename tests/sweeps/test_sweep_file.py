"""Sweep files that YAML reads otherwise than they look, and hostile ones: one short message, at once."""

import time

import pytest

from pgolf.analysis.record_exports import RECORD_EXPORTS
from pgolf.cli import main
from pgolf.machines.pod import RemoteError, load_pod
from pgolf.search.search_file import load_search
from pgolf.sweeps.sweep_file import NOTEBOOKS, SweepError, load_sweep

LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 15))
CHAIN = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 2000))
GRID = "track: nano\ngrid: {" + ", ".join(f"{knob}: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]" for knob in (
    "iterations", "seed", "num_layers", "mlp_mult", "window_size", "warmup_steps")) + "}"  # fmt: skip


def load(tmp_path, text):
    path = tmp_path / "s.yaml"
    path.write_text(text, encoding="utf-8")
    return load_sweep(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("runs:\n  a: {grid: [1, 2}\n", ", line 2, column 18: expected ',' or ']'"),
        ("name: x\n  runs: 3\n", ", line 2, column 7: mapping values are not allowed here"),
        ('name: "x\nruns:\n', "unexpected end of stream while scanning a quoted scalar, begun in line 1"),
        ("name: \x01\n", ": unacceptable character"),
    ],
)
def test_broken_yaml_is_named_by_file_line_and_column_in_one_line(tmp_path, text, said):
    path = tmp_path / "s.yaml"
    path.write_text(text, encoding="utf-8")
    for read in (load_sweep, load_search):
        with pytest.raises(SweepError) as raised:
            read(path)
        message = str(raised.value)
        assert message.startswith(str(path)) and said in message and "\n" not in message and "<unicode" not in message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("runs:\n  a: {iterations: 0100}", 'line 2: 0100 is 64 in YAML: write that, or "0100"'),
        ("runs:\n  a: {iterations: 2:00}", 'line 2: 2:00 is 120 in YAML: write that, or "2:00"'),
        ("runs:\n  on: {}", 'line 2: the key on is True in YAML: write "on"'),
        ("runs:\n  010: {}", 'line 2: 010 is 8 in YAML: write that, or "010"'),
        ("runs:\n  a: {seed: {{ x }}}", "line 2: a key must be text"),
        ("runs:\n  ? [a, b]\n  : {}", "line 2: a key must be text"),
        ("runs:\n  a: {seed: !!int x}", "line 2: 'x' is no int"),
        ("runs:\n  a: {seed: 2024-99-99}", "line 2: '2024-99-99' is no timestamp"),
        ("runs:\n  a: {seed: " + "9" * 9000 + "}", "is no int"),
        ("runs:\n  a: {seed: 0x" + "f" * 9000 + "}", "larger than any knob"),
        (LAUGHS, "values"),
        (CHAIN, "levels"),
        ("runs: &a\n  b: *a", "line 2: *a holds itself"),
        ("runs: " + "[" * 100_000, "line 1: nested more than"),
        ("a:\n" + "".join(" " * i + f"b{i}:\n" for i in range(1, 900)), "levels"),
        ("#" * 2_000_000, "1,000,000 bytes"),
        (GRID, "1000000 runs by grid"),
        ("track: nano\nruns: {a: {num_layers: [1], seed: {b: 1}}}", "num_layers=[1]"),
        ("track: nano\nruns: {a: {num_layers: 1000000000}}", "num_layers=1000000000: input should be less than"),
        ("track: nano\nruns: {a: {model_dim: 1" + "0" * 400 + "}}", "larger than any knob"),
        ("? " + "x" * 10_000 + "\n: 1", "key xxx"),
        ("runs: {a: {seed: " + "x" * 10_000 + "}}", "seed='xxx"),
        ("runs: " + "x" * 10_000, "found 'xxx"),
        ("runs: {" + ", ".join(f"a{i}: {{seed: x}}" for i in range(900)) + "}", "run a0, a1, a2"),
    ],
    ids=range(24),
)
def test_files_that_are_not_what_they_look_like_are_refused_shortly_and_at_once(tmp_path, text, says):
    start = time.monotonic()
    with pytest.raises(SweepError) as refusal:
        load(tmp_path, text)
    assert says in str(refusal.value) and len(str(refusal.value)) < 2500
    assert time.monotonic() - start < 5


def test_merge_keys_and_quoted_names_are_read(tmp_path):
    merged = "runs:\n  a: &a {num_layers: 3}\n  b: &b {<<: *a, num_layers: 2}\nbase:\n  <<: *b\n  matrix_lr: 0.03\n"
    runs = load(tmp_path, "track: nano\n" + merged + "seeds: [1_337]").runs
    assert (runs["a"].num_layers, runs["b"].num_layers, runs["b"].matrix_lr, runs["b"].seed) == (3, 2, 0.03, 1337)
    quoted = 'track: nano\nruns: {"on": {iterations: "0100", compile: off}, 7: {matrix_lr: 4e-2}}'
    runs = load(tmp_path, quoted).runs
    assert list(runs) == ["on", "7"] and (runs["on"].iterations, runs["7"].matrix_lr) == (100, 0.04)


@pytest.mark.parametrize("text", ["[" * 100_000, LAUGHS + "host: *a14\n"], ids=["deep", "aliases"])
def test_a_pod_file_that_unfolds_without_end_is_refused_shortly(tmp_path, text):
    (tmp_path / "pod.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(RemoteError) as refusal:
        load_pod(tmp_path / "pod.yaml")
    assert len(str(refusal.value)) < 10_000


RECORDS = {"1019": "27,067,484", "1218": "34,401,371", "1855": "35,945,671"}


@pytest.mark.parametrize("record", RECORDS)
def test_records_have_the_published_parameters_and_shrink(record, capfd):
    path = NOTEBOOKS / "sweeps" / f"record_{record}.yaml"
    assert main.main(["sweep", str(path), "--dry-run"]) == 0
    assert f"to run {RECORDS[record]:>14} parameters" in capfd.readouterr().out
    (run,), (nano,) = load_sweep(path).runs.values(), load_sweep(path, scale="nano").runs.values()
    assert RECORD_EXPORTS.get(f"record {record}", {}).items() <= run.model_dump().items()
    assert (nano.num_layers, nano.model_dim, nano.xsa_last, nano.vocab_size) == (3, 128, 3, run.vocab_size)
    bands = (nano.parallel_from, nano.loop_start, nano.loop_end, nano.loop_extra)
    assert bands == ((2, 1, 1, 2) if run.loop_extra else (3, 0, 0, 0))
    assert 0.7 < nano.ema_decay < 0.9 and nano.calibration_tokens == 4096
