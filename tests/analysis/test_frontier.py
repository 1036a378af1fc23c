"""The Pareto front against brute force, comparison groups, exports of a checkpoint, runs that are not counted."""

from dataclasses import replace

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.runs import make_exports, make_run, only_group

from pgolf.analysis import diff, frontier
from pgolf.reports import figures, tables
from pgolf.runs.directory import write_failure
from pgolf.runs.result import read_result, write_result
from pgolf.runs.table import load_runs
from pgolf_core.config import RunConfig

few = st.integers(0, 6)  # so that ties are common


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(few, few | st.none(), st.booleans()), max_size=30))
def test_pareto_is_the_brute_force_front_of_the_scored(points):
    table = pd.DataFrame(points, columns=["total_bytes", "bpb", "over_cap"]).astype({"over_cap": object})
    fitting = [(size, bpb) for size, bpb, over in points if not over and bpb is not None]
    expected = [
        (size, bpb) in fitting
        and not over
        and not any(s <= size and b <= bpb and (s, b) != (size, bpb) for s, b in fitting)
        for size, bpb, over in points
    ]
    assert frontier.pareto(table).tolist() == expected


def test_runs_scored_otherwise_are_in_other_groups(tmp_path):
    make_run(tmp_path, "a/control")
    make_run(tmp_path, "a/wide", bpb=2.4, total=600_000)
    make_run(tmp_path, "a/slid", bpb=2.1, knobs={"eval_stride": 64})
    make_run(tmp_path, "a/fewer", bpb=2.0, roundtrip_tokens=1024, roundtrip_bytes=2_500)
    make_run(tmp_path, "a/elsewhere", bpb=1.9, data_fingerprint="f" * 64)
    old = dict(protocol="window 256, stride 256", environment={"device": "cuda"})  # named neither
    make_run(tmp_path, "a/gpu", bpb=1.8, **old)
    make_run(tmp_path, "a/gpu32", bpb=1.8, knobs={"precision": "float32"}, **old)
    make_run(tmp_path, "a/ngram-cache", bpb=2.3, knobs={"eval_cache_size": 8})  # not part of the protocol
    make_run(tmp_path, "a/new", bpb=2.4, scored_text="ab" * 32)  # older results get the text of their folder
    table = load_runs(tmp_path)
    groups = frontier.comparison_groups(table)
    assert sorted(groups[0][1].run) == ["control", "new", "ngram-cache", "wide"]
    assert sorted(run for _, own in groups[1:] for run in own.run) == ["elsewhere", "fewer", "gpu", "gpu32", "slid"]
    assert frontier.group_title(groups[0][0]) == "160,112 bytes of validation text abababab, window 256, stride 256"
    assert {key.protocol for key, _ in groups} >= {
        f"window 256, stride 256, {p} on cuda" for p in ("bfloat16", "float32")
    }
    with pytest.raises(ValueError, match=r"not comparable: .* stride 64"):
        frontier.frontier_table(table)
    assert frontier.comparison_groups(load_runs(tmp_path / "absent")) == []


def test_tokenizers_scored_on_one_text_are_in_one_group(tmp_path):
    text = {"scored_text": "ab" * 32, "roundtrip_bytes": 160_112}
    shards = {"knobs": {"vocab_size": 4096}, "data_fingerprint": "f" * 64, "roundtrip_tokens": 48_000}
    control, other = make_run(tmp_path, "a/control", **text), make_run(tmp_path, "a/sp4096", bpb=2.4, **text, **shards)
    elsewhere = make_run(tmp_path, "a/other", bpb=2.1, scored_text="cd" * 32, roundtrip_bytes=160_112)
    groups = frontier.comparison_groups(load_runs(tmp_path))
    assert [sorted(own.run) for _, own in groups] == [["control", "sp4096"], ["other"]]
    rows = frontier.frontier_table(groups[0][1]).set_index("run")
    assert rows.delta_bpb["sp4096"] == pytest.approx(2.4 - rows.bpb["control"])
    assert diff.judge(diff.between(other, control), ["vocab_size"]) == ""
    assert "scored_text" in diff.judge(diff.between(elsewhere, control), ["vocab_size"])
    for run_dir in (control, other):  # an older version did not record the text
        write_result(run_dir, replace(read_result(run_dir), scored_text=None))
    assert "data_fingerprint" in diff.judge(diff.between(other, control), ["vocab_size"])


def test_frontier_table_has_headroom_caps_and_the_own_sweeps_baseline(tmp_path):
    make_run(tmp_path, "a/control", bpb=2.5, prequant_val_bpb=2.49)
    make_run(tmp_path, "a/large", bpb=2.0, total=1_000_001, knobs={"num_layers": 4})
    make_run(tmp_path, "a/full", bpb=2.2, total=1_000_000, knobs={"num_layers": 3})
    make_run(tmp_path, "b/lonely", bpb=2.6)
    runs = only_group(tmp_path)
    rows = frontier.frontier_table(runs).set_index("run")
    assert rows.index[0] == "control"
    assert rows.delta_bpb["full"] == pytest.approx(-0.3)
    assert pd.isna(rows.delta_bpb["lonely"])  # another sweep's baseline does not count
    assert rows.headroom.to_dict() == {"control": 500_000, "large": -1, "full": 0, "lonely": 500_000}
    assert rows.quantisation_bpb["control"] == pytest.approx(0.01)
    assert rows.over_cap.to_dict() == {"control": False, "large": True, "full": False, "lonely": False}
    assert rows.on_front.to_dict() == {"control": True, "large": False, "full": True, "lonely": False}
    (tmp_path / "b" / "sweep.json").write_text('{"control": "lonely"}')
    rows = frontier.frontier_table(only_group(tmp_path)).set_index("run")
    assert rows.delta_bpb["lonely"] == 0 and rows.is_baseline[["control", "lonely"]].all()


def test_unfinished_and_damaged_runs_are_listed_and_not_counted(tmp_path):
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
    ((_, runs),) = frontier.comparison_groups(table)
    assert list(runs.run) == ["control"]
    assert dict(frontier.not_counted(table)[["run", "why"]].to_numpy()) == {
        "torn": "damaged: result.json: holds no JSON object",
        "lost": "damaged: config.json",
        "garbled": "damaged: config.json",
        "unscored": "complete, but without a round-trip score (final_roundtrip_eval=0)",
        "killed": "incomplete, last step 10 of 120",
        "early": "incomplete, no step logged",
        "failed": "failed: RuntimeError: loss is nan",
    }


def test_fold_keeps_five_of_many_exports(tmp_path):
    make_exports(tmp_path, "a/control", 40)
    for i in range(4):
        make_run(tmp_path, f"a/run-{i}", bpb=2.6 + 0.01 * i)
    runs = only_group(tmp_path)
    rows = frontier.frontier_table(runs)
    assert rows.on_front.sum() > 15
    shown = frontier.fold(rows, 20)
    assert (shown.kind == "train").sum() == 5 and (shown.kind == "export").sum() == 5
    assert shown[shown.kind == "export"].on_front.all()


def test_exports_of_one_checkpoint(tmp_path):
    make_exports(tmp_path, "a/control", 12)
    make_run(tmp_path, "a/again", total=900_000, bpb=2.502, checkpoint_sha256="b" * 64)  # no exports of its own
    runs = only_group(tmp_path)
    ((source, sha256, rows),) = frontier.checkpoints(runs)
    assert (source, sha256, len(rows)) == ("a/control", "a" * 64, 13)
    assert rows.total_bytes.is_monotonic_increasing and rows.variant.iloc[-1] == "as trained"
    assert rows.family.value_counts().to_dict() == {"σ-tied steps": 11, "absmax": 1, "solver": 1}
    last = rows.iloc[-1]
    assert (last.share, last.delta_int8, last.delta_prequant) == (1, 0, pytest.approx(0.002))
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
        ({"quantizer": "binary"}, "binary"),
        ({"int8_residual_rank": 1, "int8_residual_budget_bytes": 9}, "rank-1 residual"),
        ({"int8_residual_rank": 1, "int8_residual_budget_bytes": 9, "int8_residual_bits": 4}, "LQER"),
        ({"int8_residual_rank": 1}, "absmax"), ({"quantizer": "codebook:32:1"}, "codebook"),
        ({"allocation": "solve", "learn_steps": 9}, "learned"), ({"quantizer": "ternary", "learn_steps": 9}, "learned"),
    ],
)  # fmt: skip
def test_every_export_has_a_family_with_its_own_colour(knobs, name):
    assert frontier.family(RunConfig(track="nano").model_dump() | knobs) == name
    assert name in figures.FAMILIES and len(set(figures.FAMILIES.values())) == len(figures.FAMILIES)
