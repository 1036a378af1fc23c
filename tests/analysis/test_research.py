"""Research models against their control: what they win at what cost, whatever way they are scored in."""

import json

import pytest
from support.runs import make_config

from pgolf.analysis import research
from pgolf.reports import pages
from pgolf.reports.sweep_figures import plot_costs
from pgolf.runs.table import load_runs

SEEDS = (1, 2, 3)
SCORES = {"off": [2.50, 2.51, 2.49], "lora": [2.30, 2.31, 2.29], "tilt": [2.501, 2.5099, 2.4905]}


@pytest.fixture
def root(tmp_path):
    """Runs of a sweep: a control, an arm scored in another way in 5 × its time, one that does nothing; other text."""
    costs = dict(train_seconds=10.0, eval_seconds=2.0, seeds=SEEDS)
    make_config(tmp_path, "off", SCORES["off"], **costs)
    make_config(tmp_path, "lora", SCORES["lora"], {"adapt": "lora"}, **costs | dict(eval_seconds=10.0), total=510_000)
    make_config(tmp_path, "tilt", SCORES["tilt"], {"eval_tilt_boost": 2.0}, **costs, distribution_error=2e-7)
    make_config(tmp_path, "other", [1.0] * 3, {"val_max_tokens": 4096}, roundtrip_bytes=9_000, **costs)
    arms = {f"{name}-s{seed}": name for name in (*SCORES, "other") for seed in SEEDS}
    about = {"control": "off", "arms": arms, "file": "adaptation", "question": "What does it gain?"}
    (tmp_path / "s" / "sweep.json").write_text(json.dumps(about))
    return tmp_path


def test_arms_stand_beside_their_control_by_the_same_text_and_seeds(root):
    rows = research.arms(load_runs(root)).set_index("arm")
    assert list(rows.index) == ["off", "lora", "tilt"]
    assert rows.delta["lora"] == pytest.approx(-0.2) and rows.verdict["lora"] == "better" and rows.n["lora"] == 3
    assert rows.verdict["tilt"] == "not significant"
    assert (rows.times_eval_seconds["lora"], rows.times_train_seconds["lora"]) == (5, 1)
    assert rows.distribution_error["tilt"] == 2e-7
    said = research.describe(rows.reset_index())
    assert said[0].startswith("lora wins 0.2000") and "5.00 × the scoring time and 1.020 × the bytes of off" in said[0]
    assert "not significant" in said[1] and "bytes" not in said[1]


def test_a_sweep_without_its_control_has_no_arms(root):
    runs = load_runs(root)
    assert research.arms(runs[runs.arm != "off"]).empty


def test_its_page_is_written_where_such_a_sweep_is_and_nowhere_else(root):
    _, page = pages.write_reports(root, root / "out", only=["research"])
    text = page.read_text(encoding="utf-8")
    assert "What does it gain?" in text and "lora wins 0.2000" in text and "sum to 1 within 2.0e-07" in text
    assert (root / "out" / "figures" / "research_s.png").stat().st_size > 10_000
    (root / "s" / "sweep.json").unlink()
    assert pages.write_reports(root, root / "other", only=["research"]) == [root / "other" / "index.html"]


def test_costs_that_are_not_known_are_not_told(tmp_path):
    for name, bpb, knobs in (("off", 2.5, {}), ("lora", 2.3, {"adapt": "lora"})):
        make_config(tmp_path, name, [bpb], knobs, seeds=(1,), train_seconds=10.0)
    about = {"control": "off", "arms": {"off-s1": "off", "lora-s1": "lora"}, "file": "adaptation"}
    (tmp_path / "s" / "sweep.json").write_text(json.dumps(about))
    rows = research.arms(load_runs(tmp_path))
    assert research.describe(rows) == ["lora −0.2000 bpb, not known, at 1.00 × the training time of off"]
    assert plot_costs(rows).axes
