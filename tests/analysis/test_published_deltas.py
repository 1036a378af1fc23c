"""Published changes of bits per byte beside our own: the table, the sweeps that try its techniques, the figure."""

import matplotlib
import pytest

matplotlib.use("agg")
from support.runs import make_config, only_group, write_sweep

from pgolf.analysis import published_deltas, seed_groups
from pgolf.reports import sweep_figures, tables
from pgolf.sweeps.sweep_file import NOTEBOOKS, load_sweep


def test_both_stacks_try_the_published_techniques_one_at_a_time():
    table = published_deltas.load()
    assert table.technique.is_unique and (table.low <= table.high).equals(table.low.notna())
    assert (table[["title", "reliability"]] != "").all(axis=None) and (table.source != "")[table.low.notna()].all()
    added = load_sweep(NOTEBOOKS / "sweeps" / "stack_add_one.yaml")
    assert set(added.groups.values()) == {added.baseline, *table.technique}
    away = load_sweep(NOTEBOOKS / "sweeps" / "stack_leave_one_out.yaml")
    assert {f"no_{name}" for name in table.technique} >= set(away.groups.values()) - {away.baseline}
    alone = {"no_" + group: knobs for group, knobs in added.changes.items()}
    alone["no_lanes"] = alone["no_sequential"] = ["parallel_from", "residual_lanes"]
    alone["no_loops"] = ["loop_extra"]
    for arm, knobs in away.changes.items():
        assert set(knobs) <= set(alone.get(arm, [])) | {"attn_gate"}, arm
    stack, reference = away.runs[away.baseline], added.runs[added.baseline]
    used = {knob for knobs in added.changes.values() for knob in knobs} - {"ve_last", "ve_dim"}
    assert stack.differences(reference).keys() == {knob for knob in used if not knob.startswith("bigram")}


@pytest.fixture
def ablations(tmp_path):
    """An arm that helps, one that harms by being taken away, and one that no table names."""
    shifts = {"control": 0.0, "ema": -0.1, "no_xsa": 0.2, "other": 0.3, "no_loops": 0.0001}
    for arm, (name, shift) in enumerate(shifts.items()):
        scores = [2.5 + shift + 0.001 * (seed * arm % 3) for seed in (1, 2, 3)]
        make_config(tmp_path, name, scores, {"matrix_lr": 1 + shift}, (1, 2, 3))
    write_sweep(tmp_path, [*shifts], seeds=(1, 2, 3))
    return published_deltas.ablations(seed_groups.by_config(only_group(tmp_path)))


def test_what_is_taken_away_counts_as_what_having_it_changes(ablations):
    rows = ablations.set_index("technique")
    assert {*rows.index} == {"ema", "xsa", "loops"} and rows.loc["ema", "ours"] == "added"
    assert rows.delta.round(2).to_dict() == {"ema": -0.1, "xsa": -0.2, "loops": 0.0}
    assert (rows.low <= rows.delta).all() and (rows.delta <= rows.high).all()
    assert rows.verdict.to_dict() == {"ema": "helps", "xsa": "helps", "loops": "not significant"}
    text = tables.format_table(ablations, tables.PUBLISHED).set_index("technique")
    assert text.loc["XSA, all layers", "published Δ (other data)"] == "−0.006 to −0.003"


def test_the_figure_shows_both_ranges_on_axes_of_their_own(ablations):
    here, there = sweep_figures.plot_published(ablations).axes
    assert [label.get_text() for label in here.get_yticklabels()] == [*ablations.title][::-1]
    assert "published" in there.get_xlabel() and here.get_shared_y_axes().joined(here, there)
