"""The front against brute force; what may be compared; what is shown but not counted; the report page."""

import importlib.util
import json
import os
import subprocess
import sys

import matplotlib
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.runs import make_exports, make_run

from pgolf.analysis import diff, frontier, seed_groups
from pgolf.reports import pages as report
from pgolf.reports import tables
from pgolf.runs.directory import write_failure
from pgolf.runs.table import load_runs
from pgolf_core.config import ROOT, RunConfig
from pgolf_core.files import atomic_write

matplotlib.use("agg")
from matplotlib import pyplot as plt

from pgolf.reports import figures as plots

spec = importlib.util.spec_from_file_location("bench_report", ROOT / "benchmarks" / "bench_report.py")
bench_report = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench_report)


def test_the_control_is_the_one_of_the_sweep_file_seed_by_seed(tmp_path):
    for seed, lift in ((1, 0.0), (2, 0.3)):
        make_run(tmp_path, f"s/base-s{seed}", bpb=2.5 + lift, knobs={"seed": seed})
        make_run(tmp_path, f"s/wide-s{seed}", bpb=2.4 + lift, knobs={"seed": seed, "model_dim": 256})
    arms = {f"{arm}-s{seed}": arm for arm in ("base", "wide") for seed in (1, 2)}
    (tmp_path / "s" / "sweep.json").write_text(json.dumps({"control": "base", "arms": arms}))
    rows = frontier.frontier_table(load_runs(tmp_path)).set_index("run")
    assert list(rows.index[:2]) == ["base-s1", "base-s2"] and rows.is_baseline.sum() == 2
    assert rows.delta_bpb[["wide-s1", "wide-s2"]].tolist() == pytest.approx([-0.1, -0.1])
    assert "base-s1" in tables.summary(load_runs(tmp_path))


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
    table = load_runs(tmp_path)
    panels = frontier.comparison_groups(table)
    assert sorted(panels[0][1].run) == ["control", "sidecar", "wide"]
    assert sorted(run for _, panel in panels[1:] for run in panel.run) == ["elsewhere", "fewer", "slid"]
    title = "160,112 bytes of validation text 5138ca61, window 256, stride 256"
    assert frontier.group_title(panels[0][0]) == title
    with pytest.raises(ValueError, match=r"not comparable: .* stride 64"):
        frontier.frontier_table(table)


def test_a_result_of_before_is_on_the_text_of_its_folder(tmp_path):
    """Older results do not name their text; of one folder as many tokens and bytes are the same."""
    make_run(tmp_path, "a/control")
    make_run(tmp_path, "a/new", bpb=2.4, scored_text="ab" * 32)
    make_run(tmp_path, "a/shorter", bpb=2.3, roundtrip_tokens=1024, roundtrip_bytes=2_500)
    panels = frontier.comparison_groups(load_runs(tmp_path))
    assert [sorted(panel.run) for _, panel in panels] == [["control", "new"], ["shorter"]]


def test_other_shards_are_another_arm(tmp_path):
    make_run(tmp_path, "a/control", scored_text="ab" * 32)
    make_run(tmp_path, "a/control-s2", knobs={"seed": 2}, bpb=2.4, scored_text="ab" * 32, data_fingerprint="f" * 64)
    ((_, panel),) = frontier.comparison_groups(load_runs(tmp_path))
    assert seed_groups.by_config(panel).n.tolist() == [1, 1]


def test_tokenizers_that_spell_one_text_are_in_one_panel(tmp_path):
    text = {"scored_text": "ab" * 32, "roundtrip_bytes": 160_112}
    make_run(tmp_path, "a/control", **text)
    make_run(
        tmp_path, "a/sp4096", bpb=2.4, knobs={"vocab_size": 4096}, data_fingerprint="f" * 64, roundtrip_tokens=48_000,
        **text,
    )  # fmt: skip
    make_run(tmp_path, "a/other", bpb=2.1, scored_text="cd" * 32, roundtrip_bytes=160_112)
    panels = frontier.comparison_groups(load_runs(tmp_path))
    assert [sorted(panel.run) for _, panel in panels] == [["control", "sp4096"], ["other"]]
    rows = frontier.frontier_table(panels[0][1])
    assert rows.set_index("run").delta_bpb["sp4096"] == pytest.approx(2.4 - rows.set_index("run").bpb["control"])
    differs = diff.between(tmp_path / "a/sp4096", tmp_path / "a/control")
    assert diff.judge(differs, ["vocab_size"]) == ""
    differs = diff.between(tmp_path / "a/other", tmp_path / "a/control")
    assert "scored_text" in diff.judge(differs, ["vocab_size"])
    for run in ("control", "sp4096"):  # of a version that did not note the text: it may be another
        result = json.loads((tmp_path / "a" / run / "result.json").read_text())
        (tmp_path / "a" / run / "result.json").write_text(json.dumps(result | {"scored_text": None}))
    differs = diff.between(tmp_path / "a/sp4096", tmp_path / "a/control")
    assert "data_fingerprint" in diff.judge(differs, ["vocab_size"])


def test_control_headroom_and_over_cap(tmp_path):
    make_run(tmp_path, "a/control", bpb=2.5, prequant_val_bpb=2.49)
    make_run(tmp_path, "a/large", bpb=2.0, total=1_000_001, knobs={"num_layers": 4})
    make_run(tmp_path, "a/full", bpb=2.2, total=1_000_000, knobs={"num_layers": 3})
    make_run(tmp_path, "b/lonely", bpb=2.6)
    ((_, panel),) = frontier.comparison_groups(load_runs(tmp_path))
    rows = frontier.frontier_table(panel).set_index("run")
    assert rows.index[0] == "control"
    assert rows.delta_bpb["full"] == pytest.approx(-0.3)
    assert np.isnan(rows.delta_bpb["lonely"])  # another sweep's control is none of its own
    assert rows.headroom.to_dict() == {"control": 500_000, "large": -1, "full": 0, "lonely": 500_000}
    assert rows.quantisation_bpb["control"] == pytest.approx(0.01)
    assert rows.over_cap.to_dict() == {"control": False, "large": True, "full": False, "lonely": False}
    assert rows.on_front.to_dict() == {"control": True, "large": False, "full": True, "lonely": False}
    (tmp_path / "b" / "sweep.json").write_text('{"control": "lonely"}')
    panel = frontier.comparison_groups(load_runs(tmp_path))[0][1]
    assert frontier.frontier_table(panel).set_index("run").delta_bpb["lonely"] == 0


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
    write_failure(failed, RuntimeError("loss is nan"))
    make_run(tmp_path, "a/stage", bpb=None, total=None, kind="sensitivity", table=[{"tensor": ""}])
    table = load_runs(tmp_path)
    ((_, panel),) = frontier.comparison_groups(table)
    assert list(panel.run) == ["control"]
    assert dict(frontier.not_counted(table)[["run", "why"]].to_numpy()) == {
        "torn": "damaged: result.json",
        "lost": "damaged: config.json",
        "garbled": "damaged: config.json",
        "unscored": "complete, but without a round-trip score (final_roundtrip_eval=0)",
        "killed": "incomplete, last step 10 of 120",
        "early": "incomplete, no step logged",
        "failed": "failed: RuntimeError: loss is nan",
    }
    assert "not complete: counted nowhere" in tables.summary(table)


def test_no_runs_are_no_error(tmp_path):
    table = load_runs(tmp_path / "absent")
    assert frontier.comparison_groups(table) == []
    assert tables.summary(table) == "no runs yet"


@pytest.mark.parametrize("count", [1, 9, 40])
def test_labels_do_not_cover_one_another(tmp_path, count):
    for i in range(count):
        bpb = 2.5 - 0.002 * i + 0.01 * (i % 3)
        make_run(tmp_path, f"a/run-{i}", total=500_000 + 3_000 * i, bpb=bpb, knobs={"iterations": i + 1})
    ((_, panel),) = frontier.comparison_groups(load_runs(tmp_path))
    figure = plots.plot_frontier(frontier.frontier_table(panel))
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts if text.get_text().startswith("run-")]
    assert 1 <= len(boxes) <= 2 * plots.LABELS
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    plt.close(figure)


def test_of_many_exports_few_are_listed(tmp_path):
    make_exports(tmp_path, "a/control", 40)
    for i in range(4):
        make_run(tmp_path, f"a/run-{i}", bpb=2.6 + 0.01 * i)
    ((_, panel),) = frontier.comparison_groups(load_runs(tmp_path))
    rows = frontier.frontier_table(panel)
    assert rows.on_front.sum() > 15
    shown = frontier.fold(rows, 20)
    assert (shown.kind == "train").sum() == 5 and (shown.kind == "export").sum() == 5
    assert shown[shown.kind == "export"].on_front.all()
    figure = plots.plot_frontier(rows)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert "40 exports of control" in texts and len(texts) <= 8
    assert [text for text in texts if text.startswith("cap ")] == ["cap 1,000,000 B"]  # none of the solver's own
    plt.close(figure)


def test_exports_of_one_checkpoint(tmp_path):
    make_exports(tmp_path, "a/control", 12)
    make_run(tmp_path, "a/again", total=900_000, bpb=2.502, checkpoint_sha256="b" * 64)  # no exports of its own
    ((_, panel),) = frontier.comparison_groups(load_runs(tmp_path))
    ((source, sha256, rows),) = frontier.checkpoints(panel)
    assert (source, sha256, len(rows)) == ("a/control", "a" * 64, 13)
    assert rows.total_bytes.is_monotonic_increasing and rows.variant.iloc[-1] == "as trained"
    assert rows.family.value_counts().to_dict() == {"σ-tied steps": 11, "absmax": 1, "solver": 1}
    assert (
        rows.share.iloc[-1] == 1
        and rows.delta_int8.iloc[-1] == 0
        and rows.delta_prequant.iloc[-1] == pytest.approx(0.002)
    )
    assert list(rows.on_front) == list(frontier.pareto(rows.assign(over_cap=False)))
    against = frontier.within(rows, (1.0, 0.5, 0.2)).set_index("share")
    assert against.limit.to_dict() == {1.0: 900_000, 0.5: 450_000, 0.2: 180_000}
    assert against.solver[1.0] == "file-09" and pd.isna(against.solver[0.5])
    assert against.fixed[1.0] == "as trained" and against.fixed[0.5] == "file-06" and pd.isna(against.fixed[0.2])
    assert against.delta_bpb[1.0] == pytest.approx(0.1 * 0.8**9 + 0.01 - 0.002)
    assert tables.format_table(against.reset_index(), tables.WITHIN).iloc[2, 1] == "–"


@pytest.mark.parametrize(
    ("knobs", "name"),
    [
        ({}, "absmax"), ({"quantizer": "step:0.4:fisher"}, "Fisher steps"), ({"quantizer": "sdclip:6:12"}, "sdclip"),
        ({"quantizer": "step:1", "gptq": True}, "GPTQ"), ({"allocation": "solve", "int8_residual_rank": 4}, "solver"),
        ({"quantizer": "step:1:fisher", "gptq": True}, "GPTQ, Fisher steps"), ({"quantizer": "ternary"}, "ternary"),
        ({"int8_residual_rank": 1, "int8_residual_budget_bytes": 9}, "rank-1 residual"),
        ({"int8_residual_rank": 1, "int8_residual_budget_bytes": 9, "int8_residual_bits": 4}, "LQER"),
        ({"int8_residual_rank": 1}, "absmax"), ({"quantizer": "codebook:32:1"}, "codebook"),
    ],
)  # fmt: skip
def test_every_export_has_a_family_with_a_look_of_its_own(knobs, name):
    assert frontier.family(RunConfig(track="nano").model_dump() | knobs) == name
    assert name in plots.FAMILIES and len(set(plots.FAMILIES.values())) == len(plots.FAMILIES)


def test_export_labels_do_not_cover_one_another(tmp_path):
    make_exports(tmp_path, "a/control", 40)
    ((_, panel),) = frontier.comparison_groups(load_runs(tmp_path))
    ((_, _, rows),) = frontier.checkpoints(panel)
    figure = plots.plot_exports(rows)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert 5 <= len(boxes) <= plots.LABELS + 8
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    plt.close(figure)


MAP = [
    dict(
        tensor=tensor, change="step:2", bpb=2.5 + rise, bytes=900 - saved, tensor_bytes=saved, delta_bpb=rise,
        delta_half=0.001,
        estimated_delta_bpb=0.8 * rise, delta_bytes=-saved, bpb_per_kb=1000 * rise / saved if saved else 0.0,
    )
    for tensor, rise, saved in [
        ("", 0.0, 0), ("blocks.0.mlp.fc.weight", 0.01, 900), ("blocks.1.mlp.fc.weight", -0.001, 900),
        ("tok_emb.weight", 0.2, 3000),
    ]
]  # fmt: skip


def test_report_of_synthetic_runs(tmp_path):
    bench_report.make_runs(tmp_path / "runs", 40, sweeps=3)
    make_run(tmp_path / "runs", "sweep00/torn").joinpath("result.json").write_text("{")
    stale = tmp_path / "out" / "figures" / "frontier_9.png"
    atomic_write(stale, b"")
    os.utime(stale, (0, 0))
    page = report.write_report(tmp_path / "runs", tmp_path / "out")
    text = page.read_text(encoding="utf-8")
    for words in ("Not complete: counted nowhere", "damaged: result.json", "over cap", "on the front"):
        assert words in text, words
    for key, _ in frontier.comparison_groups(load_runs(tmp_path / "runs")):
        assert frontier.group_title(key) in text
    figures = {path.name: path for path in (tmp_path / "out" / "figures").iterdir()}
    assert {"frontier_1.png", "frontier_1_bytes.png", "frontier_1_curves.png"} <= figures.keys()
    assert "frontier_9.png" not in figures
    for path in figures.values():
        assert plt.imread(path)[..., :3].std() > 0.05
    csv = pd.read_csv(tmp_path / "out" / "tables" / "frontier.csv")
    assert len(csv) == len(frontier.scored(load_runs(tmp_path / "runs")))
    assert not (csv.on_front & csv.over_cap).any()


def test_report_of_exports(tmp_path):
    make_exports(tmp_path / "runs", "a/control", 50)
    stage = dict(bpb=None, total=None, source="a/control", checkpoint_sha256="a" * 64)
    make_run(tmp_path / "runs", "a/map", kind="sensitivity", table=MAP, **stage)
    make_run(tmp_path / "runs", "a/old-map", kind="sensitivity", table=[{"tensor": "", "bpb": 2.5}], **stage)
    make_run(tmp_path / "runs", "a/lab", kind="export_lab", table=[{"variant": "plain"}], **stage)
    stale, other = (tmp_path / "out" / "figures" / f"{page}_9.png" for page in ("export", "frontier"))
    for figure in (stale, other):
        atomic_write(figure, b"")
        os.utime(figure, (0, 0))
    text = report.write_report(tmp_path / "runs", tmp_path / "out", "export").read_text(encoding="utf-8")
    words = ("51 files, here the fronts", "a/control", "file-00", "as trained", "best of the others")
    for word in (*words, "Spearman", "tok_emb.weight", "older version", "a/lab/notebook.ipynb"):
        assert word in text, word
    assert "file-41" not in text  # neither on a front nor the seed's
    assert not stale.exists() and other.exists()
    for name in ("export_1_a_control", "export_map_1_a_control", "export_map_1_a_control_estimates"):
        assert plt.imread(tmp_path / "out" / "figures" / f"{name}.png")[..., :3].std() > 0.05
    assert len(pd.read_csv(tmp_path / "out" / "tables" / "export.csv")) == 51


def test_pages_load_no_torch():
    """It takes as long as all else that they load."""
    code = "import sys; from pgolf.analysis import diff, reference_results; "
    code += "from pgolf.reports import curves, monitor, notebook, pages, sentences, sweep_figures; "
    code += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_reports_of_no_runs_say_so(tmp_path):
    index, *pages = report.write_reports(tmp_path / "runs", tmp_path / "out")
    assert index.name == "index.html" and "0 runs: none yet" in index.read_text(encoding="utf-8")
    assert [page.stem for page in pages] == list(report.PAGES)
    texts = {page.stem: page.read_text(encoding="utf-8") for page in pages}
    for name, text in texts.items():
        assert "yet" in text, name
        assert f'href="{name}.html"' in index.read_text(encoding="utf-8") and 'href="index.html"' in text
    assert "export_lab.ipynb" in texts["export"] and "no maps of a checkpoint" in texts["export"]
