"""The front against brute force; what may be compared; what is shown but not counted; the report page."""

import importlib.util
import json
import os

import matplotlib
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf_core import frontier, runs
from pgolf_core.config import ROOT, RunConfig

matplotlib.use("agg")
from matplotlib import pyplot as plt

from pgolf_core import plots

spec = importlib.util.spec_from_file_location("report_1000", ROOT / "benchmarks" / "report_1000.py")
report_1000 = importlib.util.module_from_spec(spec)
spec.loader.exec_module(report_1000)


def make_run(
    root, place: str, total: int | None = 500_000, bpb: float | None = 2.5, knobs: dict | None = None, **changes
):
    """A complete run directory as train() leaves it; knobs of RunConfig, changes of Result."""
    run_dir = root / place
    run_dir.mkdir(parents=True)
    config = RunConfig(track="nano", **knobs or {})
    fields = dict(
        kind="train", config_hash=config.hash, seed=config.seed, track="nano", roundtrip_val_bpb=bpb,
        prequant_val_bpb=bpb, roundtrip_tokens=65_536, roundtrip_bytes=160_112, total_bytes=total, steps=120,
        bytes={"weights": total - 20_000, "code": 20_000, "total": total} if total else {}, cap_bytes=config.cap_bytes,
        parameters=total, train_seconds=30.0, data_fingerprint="5138ca61" * 8,
        protocol=runs.evaluation_protocol(config),
    )  # fmt: skip
    (run_dir / "config.json").write_text(json.dumps(config.model_dump()))
    (run_dir / "metrics.jsonl").write_text('{"step": 10, "train_loss": 5.0}\n{"step": 120, "val_bpb": 2.4}\n')
    runs.write_result(run_dir, runs.Result(**fields | changes))
    return run_dir


def test_the_control_is_the_one_of_the_sweep_file_seed_by_seed(tmp_path):
    for seed, lift in ((1, 0.0), (2, 0.3)):
        make_run(tmp_path, f"s/base-s{seed}", bpb=2.5 + lift, knobs={"seed": seed})
        make_run(tmp_path, f"s/wide-s{seed}", bpb=2.4 + lift, knobs={"seed": seed, "model_dim": 256})
    (tmp_path / "s" / "sweep.json").write_text('{"control": "base"}')
    rows = frontier.frontier_table(runs.load(tmp_path)).set_index("run")
    assert list(rows.index[:2]) == ["base-s1", "base-s2"] and rows.is_control.sum() == 2
    assert rows.delta_bpb[["wide-s1", "wide-s2"]].tolist() == pytest.approx([-0.1, -0.1])
    assert "base-s1" in frontier.summary(runs.load(tmp_path))


few = st.integers(0, 6)  # so that ties are common


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(few, few, st.booleans()), max_size=30))
def test_pareto_is_the_brute_force_front(points):
    table = pd.DataFrame(points, columns=["total_bytes", "bpb", "over_cap"]).astype({"over_cap": object})
    fitting = [(size, bpb) for size, bpb, over in points if not over]
    expected = [
        not over and not any(s <= size and b <= bpb and (s, b) != (size, bpb) for s, b in fitting)
        for size, bpb, over in points
    ]
    assert frontier.pareto(table).tolist() == expected


def test_pareto_is_fast_and_leaves_out_what_has_no_score():
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"total_bytes": rng.random(200_000), "bpb": rng.random(200_000), "over_cap": False})
    table.loc[::2, "bpb"] = np.nan
    front = frontier.pareto(table)
    assert 0 < front.sum() < 100
    assert not front[::2].any()


def test_runs_scored_otherwise_are_in_panels_of_their_own(tmp_path):
    make_run(tmp_path, "a/control")
    make_run(tmp_path, "a/wide", bpb=2.4, total=600_000)
    make_run(tmp_path, "a/slid", bpb=2.1, knobs={"eval_stride": 64})
    make_run(tmp_path, "a/fewer", bpb=2.0, roundtrip_tokens=1024, roundtrip_bytes=2_500)
    make_run(tmp_path, "a/elsewhere", bpb=1.9, data_fingerprint="f" * 64)
    make_run(tmp_path, "a/sidecar", bpb=2.3, knobs={"eval_cache_size": 8})  # a way to predict, the same protocol
    table = runs.load(tmp_path)
    panels = frontier.comparable(table)
    assert sorted(panels[0][1].run) == ["control", "sidecar", "wide"]
    assert sorted(run for _, panel in panels[1:] for run in panel.run) == ["elsewhere", "fewer", "slid"]
    assert frontier.panel_title(panels[0][0]) == (
        "65,536 tokens = 160,112 bytes of val text, window 256, stride 256, data 5138ca61"
    )
    with pytest.raises(ValueError, match=r"not comparable: .* stride 64"):
        frontier.frontier_table(table)


def test_control_headroom_and_over_cap(tmp_path):
    make_run(tmp_path, "a/control", bpb=2.5, prequant_val_bpb=2.49)
    make_run(tmp_path, "a/large", bpb=2.0, total=1_000_001)
    make_run(tmp_path, "a/full", bpb=2.2, total=1_000_000)
    make_run(tmp_path, "b/lonely", bpb=2.6)
    ((_, panel),) = frontier.comparable(runs.load(tmp_path))
    rows = frontier.frontier_table(panel).set_index("run")
    assert rows.index[0] == "control"
    assert rows.delta_bpb["full"] == pytest.approx(-0.3)
    assert np.isnan(rows.delta_bpb["lonely"])  # another sweep's control is none of its own
    assert rows.headroom.to_dict() == {"control": 500_000, "large": -1, "full": 0, "lonely": 500_000}
    assert rows.quantisation_bpb["control"] == pytest.approx(0.01)
    assert rows.over_cap.to_dict() == {"control": False, "large": True, "full": False, "lonely": False}
    assert rows.on_front.to_dict() == {"control": True, "large": False, "full": True, "lonely": False}
    (tmp_path / "b" / "sweep.json").write_text('{"control": "lonely"}')
    panel = frontier.comparable(runs.load(tmp_path))[0][1]
    assert frontier.frontier_table(panel).set_index("run").delta_bpb["lonely"] == 0


def test_noise_is_the_spread_of_seeds_alone(tmp_path):
    make_run(tmp_path, "a/control", bpb=2.50)
    make_run(tmp_path, "a/control-2", bpb=2.53, knobs={"seed": 2})
    make_run(tmp_path, "a/control-3", bpb=2.51, knobs={"seed": 3})
    make_run(tmp_path, "a/again", bpb=2.50)  # the same seed says nothing
    make_run(tmp_path, "a/deep", bpb=2.2, knobs={"seed": 4, "num_layers": 4})
    ((_, panel),) = frontier.comparable(runs.load(tmp_path))
    (seeds,) = frontier.noise(panel).itertuples()
    assert (seeds.n, seeds.spread) == (3, pytest.approx(0.03))
    text = frontier.summary(runs.load(tmp_path))
    assert [line.split()[-1] for line in text.splitlines() if "control-2" in line] == ["noise"]
    assert "noise" not in next(line for line in text.splitlines() if "deep" in line)


def test_unfinished_and_damaged_runs_are_shown_and_not_counted(tmp_path):
    make_run(tmp_path, "a/control")
    (make_run(tmp_path, "a/torn") / "result.json").write_text('{"kind": "tra')
    (make_run(tmp_path, "a/lost") / "config.json").unlink()
    (make_run(tmp_path, "a/garbled") / "config.json").write_text("[]")
    make_run(tmp_path, "a/unscored", bpb=None, total=None)
    killed = make_run(tmp_path, "a/killed")
    (killed / "result.json").unlink()
    (killed / "metrics.jsonl").write_bytes(b'{"step": 10, "train_loss": 5}\n7\n\xff\xfe{"step": 20, "tra')
    early = make_run(tmp_path, "a/early")
    (early / "result.json").unlink()
    (early / "metrics.jsonl").unlink()
    failed = make_run(tmp_path, "a/failed")
    (failed / "result.json").unlink()
    runs.write_failure(failed, RuntimeError("loss is nan"))
    make_run(tmp_path, "a/stage", bpb=None, total=None, kind="sensitivity", table=[{"tensor": ""}])
    table = runs.load(tmp_path)
    ((_, panel),) = frontier.comparable(table)
    assert list(panel.run) == ["control"]
    assert dict(frontier.not_counted(table)[["run", "why"]].to_numpy()) == {
        "torn": "damaged: result.json cannot be read",
        "lost": "damaged: config.json cannot be read",
        "garbled": "damaged: config.json cannot be read",
        "unscored": "complete, but without a round-trip score (final_roundtrip_eval=0)",
        "killed": "incomplete, last step 10 of 120",
        "early": "incomplete, no step logged",
        "failed": "failed: RuntimeError: loss is nan",
    }
    assert "not complete: counted nowhere" in frontier.summary(table)


def test_no_runs_are_no_error(tmp_path):
    table = runs.load(tmp_path / "absent")
    assert frontier.comparable(table) == []
    assert frontier.summary(table) == "no runs yet"


@pytest.mark.parametrize("count", [1, 9, 40])
def test_labels_do_not_cover_one_another(tmp_path, count):
    for i in range(count):
        make_run(tmp_path, f"a/run-{i}", total=500_000 + 3_000 * i, bpb=2.5 - 0.002 * i + 0.01 * (i % 3))
    ((_, panel),) = frontier.comparable(runs.load(tmp_path))
    figure, ax = plt.subplots(figsize=(10, 5), layout="constrained")
    plots.plot_frontier(panel, ax)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in ax.texts if text.get_text().startswith("run-")]
    assert 1 <= len(boxes) <= 2 * plots.LABELS
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    plt.close(figure)


def test_report_of_synthetic_runs(tmp_path):
    report_1000.make_runs(tmp_path / "runs", 40, sweeps=3)
    make_run(tmp_path / "runs", "sweep00/torn").joinpath("result.json").write_text("{")
    rows = [{"tensor": t, "delta_bpb": -0.01, "delta_bytes": 900, "bpb_per_kb": 0.011} for t in ("", "mlp.fc")]
    make_run(tmp_path / "runs", "sweep00/stage", bpb=None, total=None, kind="sensitivity", table=rows)
    stale = tmp_path / "out" / "figures" / "frontier_9.png"
    runs.write_whole(stale, b"")
    os.utime(stale, (0, 0))
    page = frontier.write_report(tmp_path / "runs", tmp_path / "out")
    text = page.read_text(encoding="utf-8")
    for words in ("Not complete: counted nowhere", "damaged: result.json", "over cap", "on the front", "sweep00/stage"):
        assert words in text, words
    for key, _ in frontier.comparable(runs.load(tmp_path / "runs")):
        assert frontier.panel_title(key) in text
    figures = {path.name: path for path in (tmp_path / "out" / "figures").iterdir()}
    assert {"frontier_1.png", "frontier_1_bytes.png", "frontier_1_curves.png"} <= figures.keys()
    assert "frontier_sensitivity_sweep00_stage.png" in figures and "frontier_9.png" not in figures
    for path in figures.values():
        assert plt.imread(path)[..., :3].std() > 0.05
    csv = pd.read_csv(tmp_path / "out" / "tables" / "frontier.csv")
    assert len(csv) == len(frontier.scored(runs.load(tmp_path / "runs")))
    assert not (csv.on_front & csv.over_cap).any()


def test_report_of_no_runs_says_so(tmp_path):
    page = frontier.write_report(tmp_path / "runs", tmp_path / "out")
    assert "There are no runs in" in page.read_text(encoding="utf-8")
