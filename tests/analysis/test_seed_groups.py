"""Configs of synthetic runs: grouping, comparison with the baseline, seed noise, repeats, leaders and their history."""

import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from support.runs import make_config, make_run, only_group, write_sweep

from pgolf.analysis import frontier, seed_groups, statistics
from pgolf.disk import read_json
from pgolf.reports import sentences, tables
from pgolf.runs.result import read_result, write_result
from pgolf_core.config import RunConfig, digest
from pgolf_core.files import atomic_write


def test_configs_are_compared_with_their_baseline(tmp_path):
    rng = np.random.default_rng(0)
    luck = rng.normal(0, 0.01, 5)
    base = 2.5 + luck
    make_config(tmp_path, "control", base)
    make_config(tmp_path, "wide", base - 0.02 + rng.normal(0, 0.001, 5), {"model_dim": 256})
    make_config(tmp_path, "same", base + rng.normal(0, 0.001, 5), {"matrix_lr": 0.05})
    make_config(tmp_path, "narrow", base + 0.02 + rng.normal(0, 0.001, 5), {"model_dim": 128})
    write_sweep(tmp_path, ["control", "wide", "same", "narrow"])
    runs = only_group(tmp_path)
    rows = seed_groups.by_config(runs).set_index("arm")
    assert list(rows.index) == ["control", "wide", "same", "narrow"]
    assert rows.verdict.to_dict() == {"control": "", "wide": "better", "same": "not significant", "narrow": "worse"}
    method = "paired, 5 seeds, 3 configs at once"
    assert rows.seeds["wide"] == [1, 2, 3, 4, 5] and rows.method["wide"] == method
    assert rows.delta["wide"] == pytest.approx(-0.02, abs=0.002) and rows.n["wide"] == 5
    others = ["wide", "same", "narrow"]
    together = statistics.compare(list(rows.samples[others]), rows.samples["control"])
    assert rows.p[others].tolist() == pytest.approx([found.p for found in together])
    assert rows.detectable[others].tolist() == pytest.approx([found.detectable for found in together])
    assert set(seed_groups.by_config(runs[:0]).columns) == {"arm", *rows.columns}
    table = frontier.frontier_table(runs)
    assert set(table.verdict[table.run.str.startswith("wide")]) == {"better"}
    assert table.is_baseline[:5].all() and table.is_baseline.sum() == 5
    notes = set(tables.format_table(table, tables.FRONTIER).note)
    assert f"better ({method})" in notes and any("not significant" in note for note in notes)
    wide, same, narrow = sentences.conclusions(rows.reset_index(), rows[:0])
    assert wide.startswith("**wide** is better than the baseline run: −0.0") and narrow.startswith(
        "**narrow** is worse"
    )
    assert same.startswith("**same**: no difference found, ") and f"{rows.detectable['same']:.4f} would" in same
    files = pd.DataFrame({
        "arm": ["a", "b", "c"], "total_bytes": [10, 20, 30], "verdict": ["worse", "not significant", "equal"],
        "delta": [0.1, 0.002, 0.0], "half": [0.01, 0.003, 0.0],
    })  # fmt: skip
    (said,) = sentences.conclusions(rows[:0].reset_index(), files)
    assert said == "**b** is the smallest file not found worse than its run: 20 bytes, +0.0020 ± 0.0030 bpb."


def test_single_seeds_are_tested_against_the_tracks_noise(tmp_path):
    make_config(tmp_path, "control", [2.50, 2.52, 2.51, 2.49, 2.505])
    make_run(tmp_path, "s/near-s1", bpb=2.49, knobs={"seed": 1, "num_layers": 3})
    make_run(tmp_path, "s/far-s1", bpb=2.30, knobs={"seed": 1, "num_layers": 4})
    write_sweep(tmp_path, ["control", "near", "far"])
    runs = only_group(tmp_path)
    (noise,) = [noise for noise in seed_groups.noise_by_track(runs).values() if noise]
    assert noise.dof == 4 and noise.std == pytest.approx(np.std([2.50, 2.52, 2.51, 2.49, 2.505], ddof=1))
    rows = seed_groups.by_config(runs).set_index("arm")
    assert rows.verdict[["near", "far"]].tolist() == ["not significant", "better"]
    assert rows.method["far"] == "track's seed noise, 4 degrees of freedom, 2 configs at once"
    assert rows.detectable["near"] == rows.detectable["far"] > 0.02


def test_one_seed_on_each_side_gives_no_verdict(tmp_path):
    make_run(tmp_path, "s/control", bpb=2.5)
    make_run(tmp_path, "s/wide", bpb=2.1, knobs={"model_dim": 256})
    rows = seed_groups.by_config(only_group(tmp_path)).set_index("arm")
    assert (rows.verdict["wide"], rows.method["wide"]) == ("not known", "one seed each")
    shown = tables.format_table(frontier.frontier_table(only_group(tmp_path)), tables.FRONTIER)
    assert "± ?" in shown["Δ baseline"].iloc[1]


def test_equal_knobs_and_seed_are_repeats_in_any_sweep(tmp_path):
    made = {"device_name": "x", "torch": "2.13", "python": "3.11"}
    for place in ("s/control", "t/base_a", "t/base_b"):
        make_run(tmp_path, place, bpb=2.5, environment=made)
    make_run(tmp_path, "t/elsewhere", bpb=2.6, environment=made | {"device_name": "y"})
    make_run(tmp_path, "t/other", bpb=2.7, environment=made, knobs={"seed": 2})
    for name, bpb in (("a", 2.5), ("b", 2.53)):
        make_run(tmp_path, f"t/limited_{name}", bpb=bpb, environment=made, knobs={"max_wallclock_seconds": 20})
    rows = seed_groups.repeats(only_group(tmp_path))
    assert rows.n.tolist() == [3, 2] and rows.spread.tolist() == [0, pytest.approx(0.03)]
    assert rows.places[0] == ["s/control", "t/base_a", "t/base_b"]
    lines = sentences.describe_repeats(rows)
    assert any("fixed steps" in line and "zero spread" in line for line in lines)
    assert any("time-limited" in line and "differ by up to 0.0300" in line for line in lines)


def test_the_leader_is_the_lowest_mean_that_fits(tmp_path):
    make_config(tmp_path, "control", [2.50, 2.51, 2.49], seeds=(1, 2, 3))
    make_config(tmp_path, "lucky", [2.40, 2.70, 2.69], {"num_layers": 3}, (1, 2, 3))  # the best single run
    make_config(tmp_path, "good", [2.4500, 2.4622, 2.4391], {"num_layers": 4}, (1, 2, 3))
    make_config(tmp_path, "large", [2.20, 2.213, 2.191], {"num_layers": 5}, (1, 2, 3), total=1_000_001)
    write_sweep(tmp_path, ["control", "lucky", "good", "large"], seeds=(1, 2, 3))
    runs = only_group(tmp_path)
    rows = seed_groups.candidates(runs)
    leaders = seed_groups.leaders(runs, rows)
    (leader,) = leaders.itertuples()
    assert rows.arm[leader.config] == "good" and rows.arm[leader.second] == "control" and leader.candidates == 3
    assert leader.delta == pytest.approx(0.0496, abs=1e-4) and leader.verdict == "worse" and leader.record
    lines = sentences.describe_leaders(leaders, rows, runs)
    assert "good-s2 (seed 2) 2.4622" in lines[0] and "The lead is significant" in lines[1]


def test_one_lucky_run_does_not_lead(tmp_path):
    make_config(tmp_path, "control", [2.50, 2.51, 2.49], seeds=(1, 2, 3))
    make_run(tmp_path, "s/lucky-s1", bpb=2.493, knobs={"seed": 1, "num_layers": 3})
    write_sweep(tmp_path, ["control", "lucky"], seeds=(1, 2, 3))
    runs = only_group(tmp_path)
    rows = seed_groups.candidates(runs)
    (leader,) = seed_groups.leaders(runs, rows).itertuples()
    assert rows.bpb[leader.second] < rows.bpb[leader.config] < leader.bound
    make_run(tmp_path, "s/far-s1", bpb=2.30, knobs={"seed": 1, "num_layers": 4})
    runs = only_group(tmp_path)
    rows = seed_groups.candidates(runs)
    leaders = seed_groups.leaders(runs, rows)
    assert "from one seed" in sentences.describe_leaders(leaders, rows, runs)[0]


def test_leaders_change_as_runs_finish(tmp_path):
    """b beats a; c is over its cap; d is worse."""
    runs = [("a", 2.6, 500_000), ("b", 2.5, 500_000), ("c", 2.1, 2_000_000), ("d", 2.55, 100_000)]
    for i, (name, bpb, total) in enumerate(runs):
        make_run(tmp_path, f"s/{name}", bpb=bpb, total=total, knobs={"num_layers": i + 1})
    runs = only_group(tmp_path).sort_values("run").assign(finished=["00:00", "00:01", "00:02", "00:03"])
    rows = seed_groups.candidates(runs)
    steps = seed_groups.history(runs, rows)
    assert [rows.arm[config] for config in steps.config] == ["a", "b"]
    assert steps.finished.tolist() == ["00:00", "00:01"]


def test_equal_knobs_of_two_sweeps_are_one_candidate(tmp_path):
    """Equal knobs of two sweeps form one candidate, so the luckier sweep neither leads alone nor beats the other."""
    limit = {"max_wallclock_seconds": 20}
    for sweep, scores in (("a", [2.400, 2.405, 2.410]), ("b", [2.500, 2.505, 2.510])):
        for i, bpb in enumerate(scores):
            make_run(tmp_path, f"{sweep}/x_{i}", bpb=bpb, knobs=limit, roundtrip_val_loss=bpb)
    make_run(tmp_path, "b/other", bpb=2.46, knobs=limit | {"num_layers": 3}, roundtrip_val_loss=2.46)
    runs = only_group(tmp_path)
    rows = seed_groups.candidates(runs)
    leaders = seed_groups.leaders(runs, rows)
    (leader,) = leaders.itertuples()
    assert leader.candidates == 2 and len(rows.runs[leader.config]) == 6
    assert rows.bpb[leader.config] == pytest.approx(2.455)
    assert leader.verdict == "not significant" and not leader.record
    assert "asks for several seeds" in sentences.describe_leaders(leaders, rows, runs)[1]


def test_an_export_of_the_luckiest_seed_does_not_lead(tmp_path):
    make_config(tmp_path, "good", [2.50, 2.60], seeds=(2, 3))
    make_config(tmp_path, "better", [2.47, 2.48, 2.49], {"num_layers": 3}, (1, 2, 3))
    nats = np.random.default_rng(0).normal(2500, 200, 64)
    same = dict(knobs={"seed": 1}, checkpoint_sha256="a" * 64, roundtrip_val_loss=3.84)
    make_run(tmp_path, "s/good-s1", bpb=2.40, roundtrip_block_nats=list(nats), **same)
    same |= dict(knobs={"seed": 1, "weight_quantization_bits": 6}, kind="export", source="s/good-s1")
    make_run(tmp_path, "s/lab/int6", bpb=2.41, roundtrip_block_nats=list(nats + np.tile([1, 2], 32)), **same)
    runs = only_group(tmp_path)
    rows = seed_groups.candidates(runs)
    (leader,) = seed_groups.leaders(runs, rows).itertuples()
    assert rows.arm[leader.config] == "better-s1" and set(rows.kind) == {"train"}
    table = seed_groups.by_config(runs)
    export = table[table.kind == "export"].iloc[0]
    assert export.delta > 0 and export.method == "paired, 64 blocks of text"


def test_seed_noise_is_per_time_limit(tmp_path):
    for seconds, scores in ((600, [2.3, 2.3003, 2.2997]), (20, [2.5])):
        for i, bpb in enumerate(scores):
            make_run(tmp_path, f"s/at{seconds}_{i}", bpb=bpb, knobs={"max_wallclock_seconds": seconds})
    make_run(tmp_path, "s/control", bpb=2.51, knobs={"max_wallclock_seconds": 20, "num_layers": 3})
    rows = seed_groups.by_config(only_group(tmp_path)).set_index("arm")
    assert set(rows.verdict[rows.time_limit == 20]) <= {"", "not known"}


def test_runs_older_than_a_knob_stay_in_their_config(tmp_path):
    make_config(tmp_path, "control", [2.5, 2.51, 2.52], seeds=(1, 2, 3))
    path = tmp_path / "s" / "control-s1" / "config.json"
    config = read_json(path)
    del config["mlp_permutation"]
    atomic_write(path, json.dumps(config))
    result = read_result(path.parent)
    del config["allow_over_cap"]  # excluded from the hash
    write_result(path.parent, replace(result, config_hash=digest(config)))
    assert seed_groups.by_config(only_group(tmp_path)).n.tolist() == [3]


def test_files_of_one_checkpoint_are_compared_by_their_text(tmp_path):
    rng = np.random.default_rng(1)
    nats = rng.normal(2500, 200, 64)
    same = dict(checkpoint_sha256="a" * 64, prequant_block_nats=list(nats))
    make_run(tmp_path, "s/control", bpb=2.5, roundtrip_block_nats=list(nats), **same)
    worse = list(nats + rng.normal(3, 1, 64))
    make_run(tmp_path, "s/int4", bpb=2.51, knobs={"weight_quantization_bits": 4}, roundtrip_block_nats=worse, **same)
    row = seed_groups.by_config(only_group(tmp_path)).set_index("arm").loc["int4"]
    assert (row.verdict, row.method) == ("worse", "paired, 64 blocks of text")
    expected = 64 * 3 / math.log(2) / 160_112
    assert row.low < expected < row.high


def test_all_knobs_but_the_seed_and_the_shards_make_a_config():
    table = pd.DataFrame([RunConfig(track="nano", seed=s, num_layers=n).model_dump() for s in (1, 2) for n in (2, 3)])
    table = table.assign(data_fingerprint="ab" * 32, environment=[{}] * 4)
    assert seed_groups.same_knobs(table).nunique() == 2 and seed_groups.same_knobs(table, ()).nunique() == 4
    assert seed_groups.same_knobs(table, ("seed", "num_layers")).nunique() == 1
    assert seed_groups.same_knobs(table.assign(data_fingerprint=["a", "a", "b", "b"])).nunique() == 4


def test_seeds_of_other_code_are_not_pooled_and_the_page_says_so(tmp_path):
    """Two uncommitted edits have one commit and one flag; only the digest of the code tells them apart."""
    for seed, code in ((1, "aa" * 32), (2, "aa" * 32), (3, "bb" * 32)):
        made = {"environment": {"code": code, "git_commit": "c" * 40, "git_dirty": True}}
        make_config(tmp_path, "control", [2.5 + 0.001 * seed], seeds=[seed], **made)
        make_config(tmp_path, "wide", [2.4 + 0.001 * seed], {"model_dim": 256}, [seed], **made)
    write_sweep(tmp_path, ["control", "wide"], seeds=(1, 2, 3))
    runs = only_group(tmp_path)
    table = seed_groups.by_config(runs)
    assert sorted(zip(table.arm, table.seeds.map(tuple), strict=True)) == [
        ("control", (1, 2)), ("control", (3,)), ("wide", (1, 2)), ("wide", (3,)),
    ]  # fmt: skip
    own = seed_groups.baseline_of(table, table[table.arm == "wide"])
    assert [table.code[label] for label in own] == list(table.code[own.index])
    said = sentences.unclean_comparisons(table, runs, {"wide": ["model_dim"]})
    split = (
        "made by several versions of the code**, not pooled: control-s1, control-s2 (code aaaaaaaa); control-s3 (code"
    )
    assert len(said) == 2 and split in said[0]
    noise = seed_groups.noise_by_track(runs)[("nano", 0.0)]
    assert noise.dof == 2  # one pair of seeds per config
    again = [make_run(tmp_path, f"again/{n}", environment={"code": n * 64}, knobs={"seed": 9}) for n in "ab"]
    assert len(again) == 2 and seed_groups.repeats(only_group(tmp_path)).empty
