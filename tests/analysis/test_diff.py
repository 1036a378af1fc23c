"""Config diffs of two runs, and the claims they support."""

import json

import pytest
from support.runs import make_import, make_run, only_group

from pgolf.analysis import diff, seed_groups
from pgolf.disk import read_json
from pgolf.reports import sentences
from pgolf.runs.result import RunError
from pgolf.runs.table import load_runs
from pgolf_core.files import atomic_write

MADE = {"git_commit": "a" * 40, "torch": "2.13.0", "device_name": "x"}


def test_a_clean_comparison_changes_what_it_claims(tmp_path):
    a = make_run(tmp_path, "s/control", environment=MADE)
    b = make_run(tmp_path, "s/wide", environment=MADE, knobs={"model_dim": 256, "seed": 7})
    rows = diff.between(b, a)
    assert sorted(rows.values.tolist()) == [["model_dim", 256, 192, "knob"], ["seed", 7, 1337, "chance"]]
    assert diff.judge(rows, ["model_dim"]) == ""
    assert diff.judge(rows, ["matrix_lr"]) == ("claimed and not changed: matrix_lr; changed and not claimed: model_dim")
    assert diff.judge(rows, []) == "changed and not claimed: model_dim"


def test_a_diff_without_knobs_says_so(tmp_path):
    a = make_run(tmp_path, "s/control", environment=MADE)
    b = make_run(tmp_path, "s/better", environment=MADE, knobs={"seed": 2})
    assert diff.judge(diff.between(b, a), ["model_dim"]) == "no knob differs, only seed"


def test_another_commit_or_text_is_outside_of_the_knobs(tmp_path):
    a = make_run(tmp_path, "s/control", environment=MADE)
    b = make_run(
        tmp_path, "s/wide", knobs={"model_dim": 256}, data_fingerprint="f" * 64,
        environment=MADE | {"git_commit": "b" * 40, "device_name": "y"},
    )  # fmt: skip
    problem = diff.judge(diff.between(b, a), ["model_dim"])
    assert problem.startswith("outside of the knobs: ") and {"git_commit", "data_fingerprint"} <= set(
        problem.removeprefix("outside of the knobs: ").split(", ")
    )


def test_older_configs_have_the_defaults_of_later_knobs(tmp_path):
    a, b = make_run(tmp_path, "s/control"), make_run(tmp_path, "s/old", knobs={"num_layers": 3})
    config = read_json(b / "config.json")
    del config["mlp_permutation"]
    (b / "config.json").write_text(json.dumps(config))
    assert set(diff.between(b, a).setting) == {"num_layers"}


def test_records_are_paired_with_the_nearest_configuration(tmp_path):
    common = {"num_layers": 11, "clip": 12.0, "data_dir": "/d/sp8192"}
    make_import(tmp_path, "first/seed1", 1.0660, seed=1, run_id="a", logfile="logs/a.txt", **common)
    make_import(tmp_path, "second/seed5", 1.0650, seed=5, run_id="b", logfile="logs/b.txt", **common)
    make_import(
        tmp_path,
        "third/seed1",
        1.0500,
        seed=1,
        run_id="c",
        logfile="logs/c.txt",
        **common | {"clip": 9.0, "data_dir": "../sp8192"},
    )
    pairs = diff.nearest(load_runs(tmp_path))
    texts = [sentences.describe_pair(pair) for pair in pairs.itertuples()]
    assert "**second/seed5** against first/seed1: −0.00100 ± ? bpb over all logs of both, one seed each" in texts[0]
    assert "differ in nothing but seed, run_id, logfile" in texts[0]
    assert "1 setting differs: `clip` `12.0` → `9.0`" in texts[1]


def test_a_run_without_config_cannot_be_compared(tmp_path):
    a = make_run(tmp_path, "s/control")
    (tmp_path / "s" / "empty").mkdir()
    with pytest.raises(RunError, match=r"config\.json: missing or damaged"):
        diff.between(tmp_path / "s" / "empty", a)


def test_every_seed_of_a_config_is_checked_against_its_claimed_changes(tmp_path):
    """A claimed change may not happen: at nano scale 14 and 15 layers are both 4."""
    for seed in (1, 2):
        make_run(tmp_path, f"s/control-s{seed}", environment=MADE, knobs={"seed": seed})
        commit = MADE | ({"git_commit": "b" * 40} if seed == 2 else {})
        make_run(tmp_path, f"s/wide-s{seed}", environment=commit, knobs={"seed": seed, "model_dim": 256})
        make_run(tmp_path, f"s/deep-s{seed}", environment=MADE, knobs={"seed": seed, "matrix_lr": 0.05})
    names = {f"{arm}-s{seed}": arm for arm in ("control", "wide", "deep") for seed in (1, 2)}
    changes = {"control": [], "wide": ["model_dim"], "deep": ["matrix_lr", "num_layers"]}
    atomic_write(tmp_path / "s" / "sweep.json", json.dumps({"control": "control", "arms": names}))
    runs = only_group(tmp_path)
    lines = sorted(sentences.unclean_comparisons(seed_groups.by_config(runs), runs, changes))
    assert lines == [
        "**deep-s1, deep-s2: not a clean comparison**: claimed and not changed: num_layers.",
        "**wide-s2: not a clean comparison**: outside of the knobs: git_commit.",
    ]
