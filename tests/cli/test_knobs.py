"""Knobs and tracks on the command line: each is explained, and whatever a user types leads to the right one."""

import json
import math
import re

import pytest

from pgolf.analysis.records import import_logs
from pgolf.cli import main
from pgolf.cli.knobs import explain, matching, shown
from pgolf.runs.result import read_result
from pgolf.training.tensor_groups import idle_knobs
from pgolf_core.config import ALIASES, TRACKS, ConfigError, RunConfig, knob_of_alias, no_such_knob
from pgolf_core.rules import UNUSED, without_effect

FIELDS = RunConfig.model_fields


@pytest.mark.parametrize("name", FIELDS)
def test_a_knob_says_its_meaning_range_default_and_tracks(name):
    field, text = FIELDS[name], "\n".join(explain(name))
    assert len(field.description.split()) > 2
    if field.annotation in (int, float) and field.default == 0 and field.annotation is not bool:
        assert "0 =" in field.description, "0 stands for something: off, all, or another knob's value"
    assert f"-k {name}=" in text and f"PGOLF_{name.upper()}" in text and shown(field.default) in text
    assert all(track in text for track, knobs in TRACKS.items() if name in knobs)


def test_a_shown_default_is_what_a_user_may_type():
    given = {name: shown(field.default) for name, field in FIELDS.items() if field.default != ""}
    assert RunConfig({}, **given) == RunConfig({})


def test_no_name_of_another_trainer_means_two_knobs_or_is_a_knob():
    names = [name for _, aliases in ALIASES.values() for name in aliases.split()]
    assert len(set(names)) == len(names) and not set(names) & FIELDS.keys() and ALIASES.keys() <= FIELDS.keys()


@pytest.mark.parametrize(
    ("typed", "knob"),
    [
        ("steps", "iterations"), ("max_steps", "iterations"), ("lr", "matrix_lr"), ("learning-rate", "matrix_lr"),
        ("batch_size", "train_batch_tokens"), ("d_model", "model_dim"), ("n_layer", "num_layers"),
        ("vocab", "vocab_size"), ("N_HEAD", "num_heads"),
        ("weight_decay", "muon_wd"), ("num_layrs", "num_layers"), ("quantiser", "quantizer"),
    ],
)  # fmt: skip
def test_a_knob_by_another_name_leads_to_ours(typed, knob):
    assert knob in no_such_knob(typed)
    with pytest.raises(ConfigError, match=f"no such knob.*{knob}"):
        RunConfig(**{typed: 3})
    assert not knob_of_alias(typed) or matching([typed]) == [knob]


def test_a_word_finds_names_and_meanings_and_an_unknown_one_the_nearest(capsys):
    assert {"muon_momentum", "matrix_lr"} <= set(matching(["muon"])) < set(FIELDS)
    assert set(matching(["muon", "decay"])) < set(matching(["muon"])) and matching([]) == [*matching([])]
    assert len(matching([])) == len(FIELDS)
    assert {name for name in FIELDS if name.endswith("_lr")} <= set(matching(["learning", "rate"])) < set(FIELDS)
    with pytest.raises(ConfigError, match="did you mean muon_momentum"):
        matching(["muon_momentun"])
    assert main.main(["tracks", "nano"]) == 0 and "iterations=120" in capsys.readouterr().out
    assert main.main(["tracks", "nona"]) == 2 and "did you mean nano" in capsys.readouterr().err


def test_a_knob_without_effect_is_named_with_the_reason_and_no_track_has_one():
    assert all(without_effect(RunConfig({}, track=track)) == {} for track in ("", *TRACKS))
    named = [name for names, _, _ in UNUSED for name in names.split()]
    assert set(named) <= FIELDS.keys()
    term = dict(compression_grid_reg_weight=0.1)
    assert without_effect(RunConfig({}, **term)).keys() == term.keys()
    assert without_effect(RunConfig({}, **term, compression_reg_weight=0.01)) == {}
    solved = RunConfig({}, allocation="solve", quantizer="ternary", int8_residual_bits=4)
    assert without_effect(solved).keys() == {"quantizer", "int8_residual_bits"}


def test_a_log_says_of_each_tensor_how_it_is_trained_and_stored_and_import_log_reads_no_knob_there(finished, tmp_path):
    text = (finished[0] / "log.txt").read_text(encoding="utf-8")
    groups = [found.groups() for found in re.finditer(r"^(\d+) x (\S+) (\S+), (.*)$", text, re.MULTILINE)]
    assert ("1", "tok_emb.weight", "1024x64", "adam tied_embed_lr, regularised, stored as float16") in groups
    assert ("1", "blocks.*.mlp.fc.weight", "128x64", "muon matrix_lr, regularised, stored as float16") in groups
    sizes = [int(n) * math.prod(map(int, shape.split("x"))) for n, _, shape, _ in groups]
    assert sum(sizes) == read_result(finished[0]).parameters and "has no effect" not in text
    (imported,), _ = import_logs([finished[0] / "log.txt"], "theirs", tmp_path)
    assert not [k for k in json.loads((imported.run_dir / "config.json").read_text()) if "blocks" in k or "emb" in k]


def test_a_run_warns_of_a_knob_without_effect():
    (line,) = idle_knobs(RunConfig({}, ternary_reg_weight=0.5))
    assert line.startswith("warning:ternary_reg_weight=0.5 has no effect: compression_reg_weight")
