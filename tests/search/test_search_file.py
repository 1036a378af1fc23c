"""Search files are checked whole, and every error names its key."""

import pytest
import yaml

from pgolf.search.search_file import load_search
from pgolf.sweeps.sweep_file import SweepError
from pgolf_core.config import ROOT

SOUND = {
    "track": "nano", "trainings": 3, "space": {"matrix_lr": {"low": 0.01, "high": 0.1, "log": True}},
}  # fmt: skip
LR = {"low": 0.01, "high": 0.1}


def _write(tmp_path, content):
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"space": {"matrix_lrr": LR}}, "space: matrix_lrr: no such knob; did you mean matrix_lr"),
        ({"space": {}}, "space: "),
        ({"space": {"matrix_lr": {"low": 0.1, "high": 0.01}}}, "space: matrix_lr: expected a list of choices, or low"),
        ({"space": {"matrix_lr": {"low": 0, "high": 0.1, "log": True}}}, "a logarithmic range begins above 0"),
        ({"space": {"num_layers": ["two"]}}, "space: num_layers: 'two': input should be a valid integer"),
        ({"space": {"num_layers": {"low": 1, "high": 3, "step": 0.5}}}, "space: num_layers: step: 0.5 is not whole"),
        ({"space": {"smear_gate": {"low": 1, "high": 3}}}, "space: smear_gate: 1: input should be"),
        ({"space": {"matrix_lr": {"choices": [0.1], "low": 0.1}}}, "choices, or low and high, not both"),
        ({"space": {"matrix_lr": LR | {"steps": 0.1}}}, "matrix_lr: steps: no such"),
        ({"space": {"matrix_lr": LR | {"when": {"beta": 1}}}}, "space: matrix_lr: when: beta: no such knob"),
        ({"space": {"matrix_lr": LR | {"when": {"beta2": 0.9}}, "beta2": [0.9]}}, "when: beta2 must stand above it"),
        ({"space": {"num_layers": {"choices": [1, 2], "when": {"beta2": 0.9}}}}, "when: beta2 must stand above it"),
        (
            {"space": {"num_heads": [2, 4], "num_layers": {"choices": [1, 2], "when": {"num_heads": 3}}}},
            "space: num_layers: when: num_heads=3 is not among the values of space",
        ),
        ({"space": {"val_loss_every": [0, 20]}}, "space: val_loss_every: 0, and every trial needs it"),
        ({"space": {"seed": [1, 2]}}, "space: seed: a search over seeds picks luck"),
        ({"space": {"cap_bytes": [1, 2]}}, "cap_bytes: give it as cap:"),
        ({"base": {"num_layer": 2}}, "base: num_layer: no such knob"),
        ({"enqueue": {"a": {"matrix_lr": 1.0}}}, "enqueue: a: matrix_lr=1.0 is not among the values of space"),
        ({"enqueue": {"a": {"num_layers": 2}}}, "enqueue: a: num_layers: not in space"),
        ({"enqueue": {"a/b": {}}}, "name 'a/b': cannot be a folder"),
        ({"enqueue": {"a": {}, "A": {}}}, "name A: used twice (as a)"),
        ({"enqueue": {"trial001": {}}}, "enqueue: trial001: the search itself uses this name"),
        ({"trainings": None}, "no budget"),
        ({"money": 3}, "money: needs price_per_hour"),
        ({"objective": "bytes"}, "max_bpb: belongs to objective: bytes"),
        ({"objective": "both", "pruner": "asha"}, "pruner: asha stops by bpb alone"),
        ({"objective": "loss"}, "objective: "),
        ({"base": {"val_loss_every": 0}}, "base: val_loss_every=0, and a search with pruner: median needs it"),
        ({"finalists": 1}, "finalists: need seeds:"),
        ({"finalists": 1, "seeds": [1337]}, "seeds: 1337 is the seed of the search itself"),
        ({"finalists": 1, "seeds": [-1]}, "seeds: 0: input should be greater than or equal to 0"),
        ({"trial": 3}, "key trial: no such; did you mean trials"),
    ],
)
def test_a_bad_search_file_names_its_key(tmp_path, change, words):
    assert load_search(_write(tmp_path, SOUND)).keys.trainings == 3
    with pytest.raises(SweepError) as error:
        load_search(_write(tmp_path, SOUND | change))
    assert words in str(error.value) and "s.yaml" in str(error.value)


def test_every_committed_search_is_sound():
    files = sorted((ROOT / "notebooks" / "searches").glob("*.yaml"))
    assert files and all(load_search(file).enqueued for file in files)


def test_a_conditional_knob_is_chosen_only_where_its_condition_holds(tmp_path):
    space = {"bigram_vocab_size": [0, 4096], "bigram_dim": {"choices": [32, 64], "when": {"bigram_vocab_size": 4096}}}
    search = load_search(_write(tmp_path, SOUND | {"space": space, "base": {"bigram_dim": 16}, "enqueue": {"a": {}}}))
    assert search.enqueued == {"a": {"bigram_vocab_size": 0}}
    with_table = search.choose(lambda knob, values: values.choices[-1])
    assert with_table == {"bigram_vocab_size": 4096, "bigram_dim": 64}
    assert search.config({"bigram_vocab_size": 0}).bigram_dim == 16
    space["bigram_dim"]["when"] = {"bigram_vocab_size": "4096"}  # becomes the knob's type
    assert "bigram_dim" in load_search(_write(tmp_path, SOUND | {"space": space})).choose(lambda knob, own: 4096)
    with pytest.raises(SweepError, match="enqueue: a: bigram_dim: its `when` does not hold"):
        load_search(_write(tmp_path, SOUND | {"space": space, "enqueue": {"a": {"bigram_dim": 32}}}))
