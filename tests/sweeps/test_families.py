"""Files of `pgolf transfer` and `pgolf scale` become ordinary checked sweeps."""

import json

import pytest

from pgolf.cli import main
from pgolf.sweeps.families import load_scaling, load_transfer
from pgolf.sweeps.sweep_file import NOTEBOOKS, SweepError

ARMS = """
track: nano
control: control
base: {num_layers: 2, iterations: 60, model_dim: 64}
runs: {control: {}, slope: {mlp_slope: 0.5}, narrow: {model_dim: 32}}
seeds: [1, 2]
stages: [sensitivity]
"""


def write(folder, name, text):
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def transfer_file(tmp_path, text):
    write(tmp_path, "arms.yaml", ARMS)
    return write(tmp_path, "t.yaml", text)


def test_every_scale_is_a_sweep_whose_arms_override_the_scale(tmp_path):
    text = "sweep: arms.yaml\nbase: {iterations: 40}\nscales: {own: {}, wide: {model_dim: 128}}"
    file, (own, wide) = load_transfer(transfer_file(tmp_path, text))
    assert file.stem == "arms" and (own.name, wide.name) == ("t-own", "t-wide")
    assert [(sweep.family, sweep.scale, len(sweep.runs), sweep.stages) for sweep in (own, wide)] == [
        ("t", "own", 6, {}), ("t", "wide", 6, {}),
    ]  # fmt: skip
    assert (own.runs["slope-s2"].model_dim, wide.runs["slope-s2"].model_dim) == (64, 128)
    assert wide.runs["narrow-s1"].model_dim == 32 and wide.runs["narrow-s1"].iterations == 40
    assert own.changes == wide.changes == {"control": [], "slope": ["mlp_slope"], "narrow": ["model_dim"]}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sweep: arms.yaml\nscales: {own: {}}", "scales: dictionary should have at least 2 items"),
        ("sweep: arms.yaml\nscales: {a: {}, b: {}}", "scales a and b have the same knobs"),
        ("sweep: arm.yaml\nscales: {a: {}, b: {}}", "sweep: arm.yaml: no such file beside it"),
        ("sweep: arms.yaml\nscale: {}\nscales: {a: {}, b: {}}", "key scale: no such; did you mean scales?"),
        ("sweep: arms.yaml\nscales: {a: {}, b: {model_dimm: 3}}", "scales: b:\n  - every run: model_dimm: no such"),
        ("sweep: arms.yaml\nscales: {a: {}, A: {num_layers: 5}}", "name A: used twice (as a)"),
        ("sweep: arms.yaml\nscales: {a: {}, '': {num_layers: 5}}", "scales: one has no name"),
        ("", "a transfer file is a mapping with sweep: and scales:"),
    ],
)
def test_a_transfer_file_that_cannot_run_is_refused_by_its_key(tmp_path, text, says):
    with pytest.raises(SweepError) as refusal:
        load_transfer(transfer_file(tmp_path, text))
    assert says in str(refusal.value)


def test_ranks_of_a_scale_keep_the_global_batch(tmp_path):
    text = "sweep: arms.yaml\nscales: {one: {}, two: {world_size: 2}}"
    _, (one, two) = load_transfer(transfer_file(tmp_path, text))
    assert (one.runs["slope-s1"].world_size, two.runs["slope-s1"].world_size) == (1, 2)
    assert one.runs["slope-s1"].train_batch_tokens == two.runs["slope-s1"].train_batch_tokens


def test_a_scaling_study_has_every_size_at_every_length(tmp_path):
    sizes = "track: nano\nsizes: {a: {model_dim: 32}, b: {model_dim: 64, train_batch_tokens: 2048}}\n"
    sweep = load_scaling(write(tmp_path, "s.yaml", sizes + "lengths: [20, 40]\nseeds: [1, 2]"))
    assert (sweep.family, sweep.scale, len(sweep.runs)) == ("s", "", 8)
    assert {sweep.runs[f"{size}-40-s2"].iterations for size in "ab"} == {40}
    by_tokens = load_scaling(write(tmp_path, "s.yaml", sizes + "tokens: [40960]")).runs
    assert [(run.iterations, run.train_batch_tokens) for run in by_tokens.values()] == [(10, 4096), (20, 2048)]
    for text in ("", "lengths: [20]\ntokens: [40960]"):
        with pytest.raises(SweepError, match="one of them"):
            load_scaling(write(tmp_path, "s.yaml", sizes + text))
    with pytest.raises(SweepError, match="base: sets iterations"):
        load_scaling(write(tmp_path, "s.yaml", sizes + "base: {iterations: 7}\nlengths: [20]"))


def test_the_studies_of_the_house_are_valid():
    _, sweeps = load_transfer(NOTEBOOKS / "scales" / "stack_transfer.yaml")
    assert [len(sweep.runs) for sweep in sweeps] == [69, 69]
    assert len(load_scaling(NOTEBOOKS / "scales" / "nano_family.yaml").runs) == 24


def test_a_dry_run_of_a_study_lists_the_runs_of_every_scale(tmp_path, capsys):
    path = transfer_file(tmp_path, "sweep: arms.yaml\nscales: {own: {}, wide: {model_dim: 128}}")
    assert main.main(["transfer", str(path), "--seeds", "1", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.count("to run   ") == 2 * 3 and out.index("t-own") < out.index("t-wide")


def test_sweep_json_names_the_study_and_its_scale(tmp_path, monkeypatch):
    from pgolf.runs import directory
    from pgolf.sweeps import runner

    monkeypatch.setattr(directory, "RUNS", tmp_path / "runs")
    text = "sweep: arms.yaml\nscales: {own: {}, wide: {model_dim: 128}}"
    file, (_, wide) = load_transfer(transfer_file(tmp_path, text))
    wide.directory.mkdir(parents=True)
    runner.write_about(wide, file.stem)
    about = json.loads((wide.directory / "sweep.json").read_text())
    assert (about["family"], about["scale"], about["file"]) == ("t", "wide", "arms")
