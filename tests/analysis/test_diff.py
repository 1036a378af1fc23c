"""Config diffs of two runs, and the claims they support."""

import json

import pytest
from support.runs import make_import, make_run, only_group

from pgolf.analysis import diff, seed_groups
from pgolf.disk import read_json
from pgolf.reports import sentences
from pgolf.runs.result import RunError
from pgolf_core.files import atomic_write

MADE = {"git_commit": "a" * 40, "torch": "2.13.0", "device_name": "x"}


@pytest.mark.parametrize(
    ("changes", "claimed", "problem"),
    [
        ({"knobs": {"model_dim": 256, "seed": 7}}, ["model_dim"], ""),
        ({"knobs": {"model_dim": 256}}, [], "changed and not claimed: model_dim"),
        ({"knobs": {"model_dim": 256}}, ["matrix_lr"],
         "claimed and not changed: matrix_lr; changed and not claimed: model_dim"),
        ({"knobs": {"seed": 2}}, ["model_dim"], "no knob differs, only seed"),
        ({"knobs": {"seed": 2}}, ["seed"], ""),
        ({"knobs": {"seed": 2, "model_dim": 256}}, ["seed"], "changed and not claimed: model_dim"),
        ({}, ["seed"], "no knob differs"),
        ({"knobs": {"model_dim": 256}, "data_fingerprint": "f" * 64, "environment": {"git_commit": "b", "torch": "2"}},
         ["model_dim"], "outside of the knobs: data_fingerprint, code, torch"),
        ({"knobs": {"matrix_lr": 0.05}, "total": 600_000}, ["matrix_lr"], "outside of the knobs: parameters"),
        ({"knobs": {"model_dim": 256}, "total": 600_000}, ["model_dim"], ""),
        ({"knobs": {"model_dim": 256}, "environment": MADE | {"code": "e" * 64}},
         ["model_dim"], "outside of the knobs: code"),
    ],
)  # fmt: skip
def test_a_claim_holds_or_is_refused_in_words(tmp_path, changes, claimed, problem):
    a = make_run(tmp_path, "s/control", environment=MADE)
    b = make_run(tmp_path, "s/other", **{"environment": MADE} | changes)
    assert diff.judge(diff.between(b, a), claimed) == problem


def test_two_scores_are_subtracted_where_one_text_was_scored_in_one_way(tmp_path):
    a, b = (make_run(tmp_path, f"s/{bpb}", total=500_000, bpb=bpb) for bpb in (2.5, 2.6))
    other = make_run(tmp_path, "s/other", bpb=2.7, protocol="another window")
    unscored = make_run(tmp_path, "s/unscored", bpb=None)
    assert diff.scores(b, a) == "2.6000 bpb in 500,000 bytes against 2.5000 bpb in 500,000 bytes: +0.1000 bpb"
    assert diff.scores(other, a).endswith("bytes: not comparable, other text or protocol")
    assert diff.scores(unscored, a).startswith("no scores to compare")


def test_uncommitted_changes_of_unknown_content_are_no_clean_comparison(tmp_path):
    changed = MADE | {"git_dirty": True}
    a, b = (make_run(tmp_path, f"s/{n}", environment=changed, knobs={"model_dim": n}) for n in (192, 256))
    assert diff.judge(diff.between(b, a), ["model_dim"]) == "outside of the knobs: code"


def test_older_configs_have_the_defaults_of_later_knobs(tmp_path):
    a, b = make_run(tmp_path, "s/control"), make_run(tmp_path, "s/old", knobs={"num_layers": 3, "seed": 7})
    config = read_json(b / "config.json")
    del config["mlp_permutation"]
    (b / "config.json").write_text(json.dumps(config))
    rows = sorted(diff.between(b, a).values.tolist())
    assert rows == [["num_layers", 3, 2, "knob"], ["seed", 7, 1337, "chance"]]


def test_two_imported_logs_differ_in_what_they_logged(tmp_path):
    common = {"num_layers": 11, "clip": 12.0, "data_dir": "/d/sp8192", "seed": 1, "run_id": "a", "logfile": "l/a.txt"}
    other = {"clip": 9.0, "data_dir": "../sp8192", "seed": 5, "run_id": "b", "logfile": "l/b.txt"}
    make_import(tmp_path, "first/log", 1.0660, **common)
    make_import(tmp_path, "second/log", 1.0650, **common | other)
    rows = diff.between(tmp_path / "second" / "log", tmp_path / "first" / "log").set_index("setting")
    kinds = {"clip": "knob", "data_dir": "identity", "seed": "chance", "run_id": "identity", "logfile": "identity"}
    assert rows.kind.to_dict() == kinds and (rows.ours["clip"], rows.theirs["clip"]) == (9.0, 12.0)


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
        "**wide-s2: not a clean comparison**: outside of the knobs: code.",
        "**wide: made by several versions of the code**, not pooled: wide-s1 (commit aaaaaaaa); "
        "wide-s2 (commit bbbbbbbb).",
    ]
