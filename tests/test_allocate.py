"""Sensitivity and residual allocation on a small trained checkpoint: every figure against a file of its own."""

import pandas as pd
import pytest
import torch

from pgolf_core import runs
from pgolf_core.allocate import allocate_residuals, map_sensitivity, protect, residual_variants, tensor_place
from pgolf_core.config import RunConfig
from pgolf_core.export import load, pack, quantize_state
from pgolf_core.roundtrip import load_checkpoint, model_of, open_dataset, pick_device, score_model
from pgolf_core.train import train

KNOBS = dict(
    track="nano", num_layers=1, model_dim=96, mlp_mult=8, num_heads=2, num_kv_heads=1, train_seq_len=64,
    train_batch_tokens=1024, iterations=12, val_max_tokens=1024, roundtrip_val_max_tokens=4096, val_batch_size=2048,
)  # fmt: skip
QUANTISED = {"tok_emb.weight", "blocks.0.mlp.fc.weight", "blocks.0.mlp.proj.weight"}


@pytest.fixture(scope="module")
def source(embedded, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "sweep" / "run"
    train(RunConfig(**KNOBS), run_dir)
    return run_dir


def test_sensitivity_is_what_a_file_with_one_float_tensor_scores(source, tmp_path):
    result = map_sensitivity(source, tmp_path / "map", tokens=2048)
    assert result.kind == "sensitivity" and result.source == "sweep/run"
    rows = {row["tensor"]: row for row in result.table}
    assert set(rows) == QUANTISED | {""}
    config = RunConfig(**KNOBS | dict(roundtrip_val_max_tokens=2048))
    state = load_checkpoint(source / runs.CHECKPOINT)
    name = "blocks.0.mlp.proj.weight"
    artifact, _, _ = pack(protect(quantize_state(state, config.export), state, name))
    (tmp_path / "file").write_bytes(artifact)
    loaded = load(tmp_path / "file")
    assert torch.equal(loaded[name], state[name].half().float())
    score = score_model(model_of(loaded, config, pick_device(config)), config, open_dataset(config), 2048)
    assert rows[name]["bytes"] == len(artifact)
    assert rows[name]["bpb"] == score.val_bpb
    assert rows[name]["delta_bpb"] == score.val_bpb - rows[""]["bpb"]
    assert rows[name]["delta_bytes"] > 0 and (rows[name]["layer"], rows[name]["part"]) == (0, "mlp.proj")
    stamp = (tmp_path / "map" / "result.json").stat().st_mtime_ns
    assert map_sensitivity(source, tmp_path / "map", tokens=2048) == result
    assert (tmp_path / "map" / "result.json").stat().st_mtime_ns == stamp


def test_allocation_scores_real_files(source, tmp_path):
    result = allocate_residuals(source, tmp_path / "alloc", budgets=[1800, 4000])
    rows = {row["variant"]: row for row in result.table}
    assert set(rows) == set(residual_variants([1800, 4000]))
    plain = runs.read_result(source)
    assert rows["plain"]["bpb"] == plain.roundtrip_val_bpb and rows["plain"]["total_bytes"] == plain.total_bytes
    assert rows["all_attn_proj-4000"]["delta_bytes"] == 0  # no attention matrix of this model is quantised
    assert 0 < rows["early_mlp_proj-4000"]["delta_bytes"] < rows["global-4000"]["delta_bytes"] <= 4000 + 200
    stored = runs.load(tmp_path)
    variants = stored[stored.kind == "export"]
    assert len(variants) == len(rows) and set(variants.bpb) == {row["bpb"] for row in rows.values()}
    assert (variants.source == "sweep/run").all()


def test_interrupted_allocation_does_only_what_is_missing(source, tmp_path):
    first = allocate_residuals(source, tmp_path / "alloc", budgets=[1800])
    (tmp_path / "alloc" / "result.json").unlink()
    (tmp_path / "alloc" / "plain" / "result.json").unlink()
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("result.json")}
    assert allocate_residuals(source, tmp_path / "alloc", budgets=[1800]).table == first.table
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in stamps.items())


def test_best_run_is_legal(source):
    table = runs.load(source.parents[1])
    assert runs.best(table).run == "run"
    with pytest.raises(runs.RunError, match="over its cap"):
        runs.best(table.assign(over_cap=True))
    two = pd.concat([table, table.assign(run="other", protocol="window 32, stride 32")], ignore_index=True)
    with pytest.raises(runs.RunError, match="in different windows"):
        runs.best(two)
    with pytest.raises(runs.RunError, match="no complete training run 'nowhere' here; there are run"):
        runs.named(table, "nowhere")
    with pytest.raises(runs.RunError, match="no complete training run"):
        runs.best(table.assign(status="incomplete"))


def test_source_must_be_finished(tmp_path):
    with pytest.raises(runs.RunError, match="only a finished run"):
        map_sensitivity(tmp_path / "nothing", tmp_path / "map")


def test_tensor_place():
    assert tensor_place("blocks.3.mlp.fc.weight") == (3, "mlp.fc")
    assert tensor_place("tok_emb.weight") == (None, "tok_emb")
