"""Menus of the explore notebook: what they choose, what a press of the button does, and their absence."""

import shutil

import matplotlib
import pytest

matplotlib.use("agg")
from support.runs import make_run

from pgolf.analysis import frontier
from pgolf.reports import menus
from pgolf.runs import directory
from pgolf.runs.table import best_training_run, load_runs
from pgolf_core.config import RunConfig


@pytest.fixture
def shown(monkeypatch):
    """Everything that a menu displays."""
    found = []
    monkeypatch.setattr(menus, "display", found.append)
    monkeypatch.setattr(menus, "clear_output", lambda wait: None)
    return found


@pytest.mark.parametrize("name", menus.QUANTIZERS)
def test_every_quantizer_of_the_menu_is_a_set_of_knobs(name):
    config = RunConfig(track="nano")
    assert config.with_knobs(**menus.QUANTIZERS[name]) != config or name.startswith("absmax, 8")


def test_without_menus_the_first_choices_stand(tmp_path, shown, monkeypatch):
    make_run(tmp_path, "s/a", bpb=2.4)
    make_run(tmp_path, "s/b", bpb=2.5)
    monkeypatch.setattr(menus, "find_spec", lambda name: None)
    table = load_runs(tmp_path)
    menu = menus.Menu(table, best_training_run(table))
    assert (menu.chosen.run, menu.knobs, shown) == ("a", {"weight_quantization_bits": 6}, [])


def test_a_choice_changes_run_cap_and_knobs(tmp_path, shown, monkeypatch):
    pytest.importorskip("ipywidgets")
    monkeypatch.setattr(menus, "interactive", lambda: True)
    make_run(tmp_path, "s/a", bpb=2.4)
    make_run(tmp_path, "s/b", bpb=2.5, knobs={"cap_bytes": 700_000})
    make_run(tmp_path, "s/stage", kind="export", source="s/a")
    table = load_runs(tmp_path)
    menu = menus.Menu(table, table[table.run == "a"].iloc[0])
    run, cap, quantizer, *_ = shown[0].children
    assert len(run.options) == 2 and cap.value == 1_000_000
    run.value = next(name for name in run.options if name.startswith("s/b"))
    assert (menu.chosen.run, menu.cap, cap.value) == ("b", 700_000, 700_000) and "cap_bytes" not in menu.knobs
    cap.value, quantizer.value = 200_000, next(name for name in quantizer.options if "solver" in name)
    assert menu.knobs == {"allocation": "solve", "codec": "ans", "cap_bytes": 200_000}


def test_a_stored_file_is_compared_and_drawn_and_a_refusal_is_said(finished, tmp_path, shown, monkeypatch, capsys):
    monkeypatch.setattr(directory, "RUNS", tmp_path)
    shutil.copytree(finished[0], tmp_path / "sweep" / "run")
    monkeypatch.setattr(menus, "find_spec", lambda name: None)
    table = load_runs(tmp_path)
    menu = menus.Menu(table, best_training_run(table))
    menu.quantizer = next(name for name in menus.QUANTIZERS if name.startswith("steps of 0.4 σ, ANS"))
    menu.store()
    said = capsys.readouterr().out
    (exported,) = frontier.scored(load_runs(tmp_path)).query("kind == 'export'").itertuples()
    assert f"stored so:    {exported.bpb:.4f} bpb in {exported.total_bytes:,.0f} of" in said and "against it:" in said
    assert shown[0].data.count("<a class=") == 2 and "href=" not in shown[0].data
    monkeypatch.setitem(menus.QUANTIZERS, menu.quantizer, {"num_layers": 3})
    menu.store()
    assert "train another run for that" in capsys.readouterr().out and len(shown) == 1
