"""The lab's stages on a small trained checkpoint: every figure against a file of its own."""

import json

import pandas as pd
import pytest

from pgolf.analysis import frontier
from pgolf.analysis.record_exports import NEAR, beside_records
from pgolf.runs.result import ARTIFACT, RunError, read_result
from pgolf.runs.table import best_training_run, load_runs, training_run_named
from pgolf.studies.export_lab import allocate_residuals, export_lab, residual_variants
from pgolf.training.inputs import open_dataset
from pgolf.training.round_trip import score_model
from pgolf.training.run import train
from pgolf_core.artifact.format import load
from pgolf_core.config import ConfigError, RunConfig
from pgolf_core.device import pick_device
from pgolf_core.export_inputs import model_of
from pgolf_core.quantization.schemes import codebook

KNOBS = dict(
    track="nano", num_layers=1, model_dim=96, mlp_mult=8, num_heads=2, num_kv_heads=1, train_seq_len=64,
    train_batch_tokens=1024, iterations=12, val_max_tokens=1024, roundtrip_val_max_tokens=1024, val_batch_size=1024,
    calibration_tokens=1024,
)  # fmt: skip


@pytest.fixture(scope="module")
def allocated(source, tmp_path_factory):
    """Folder of a residual study, and its result."""
    folder = tmp_path_factory.mktemp("study") / "alloc"
    return folder, allocate_residuals(source, folder, budgets=[4000])


def test_allocation_scores_real_files(source, allocated):
    folder, result = allocated
    rows = {row["variant"]: row for row in result.table}
    solved = f"solve {rows['plain']['total_bytes']}"
    assert set(rows) == set(residual_variants([4000])) | {solved}
    assert 0.998 < rows[solved]["share"] <= 1
    plain = read_result(source)
    assert rows["plain"]["bpb"] == plain.roundtrip_val_bpb and rows["plain"]["total_bytes"] == plain.total_bytes
    code = rows["all_attn_proj-4000"]["delta_bytes"]  # no attention matrix of this model is quantised
    assert 0 < code < 700  # of residuals in the script
    early, most = (rows[name]["delta_bytes"] - code for name in ("early_mlp_proj-4000", "global-4000"))
    assert 0 < early < most <= 4000 + 200
    stored = load_runs(folder.parent)
    variants = stored[stored.kind == "export"]
    assert len(variants) == len(rows) and (variants.path / ARTIFACT).map(lambda path: path.is_file()).all()
    assert set(variants.bpb) == {row["bpb"] for row in rows.values()}
    assert (variants.source == "sweep/run").all()


def test_interrupted_allocation_does_only_what_is_missing(source, allocated):
    folder, first = allocated
    (folder / "result.json").unlink()
    (folder / "plain" / "result.json").unlink()
    stamps = {p: p.stat().st_mtime_ns for p in folder.rglob("result.json")}
    assert allocate_residuals(source, folder, budgets=[4000]).table == first.table
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in stamps.items())


def test_best_run_is_legal(source):
    table = load_runs(source.parents[1])
    assert best_training_run(table).run == "run"
    with pytest.raises(RunError, match="over its cap"):
        best_training_run(table.assign(over_cap=True))
    two = pd.concat([table, table.assign(run="other", protocol="window 32, stride 32")], ignore_index=True)
    with pytest.raises(RunError, match="in different windows"):
        best_training_run(two)
    with pytest.raises(RunError, match="no complete training run 'nowhere' here; there are run"):
        training_run_named(table, "nowhere")
    with pytest.raises(RunError, match="no complete training run"):
        best_training_run(table.assign(status="incomplete"))


@pytest.mark.slow
def test_variants_of_a_run_whose_export_learned_do_not_learn(tmp_path):
    trained = RunConfig(**KNOBS, allocation="solve", codec="ans", cap_bytes=60_000, learn_steps=2, learn_rate=0.01)
    train(trained, tmp_path / "learned")
    rows = allocate_residuals(tmp_path / "learned", tmp_path / "study", budgets=[1800]).table
    assert any(row["variant"].startswith("solve") for row in rows)
    assert not any(json.loads(path.read_text())["learn_steps"] for path in tmp_path.rglob("study/*/config.json"))


def test_source_must_be_finished(tmp_path):
    with pytest.raises(RunError, match="only a finished run"):
        export_lab(tmp_path / "nothing", tmp_path / "lab", steps=[0.4])


@pytest.mark.slow
def test_the_lab_seeks_files_of_a_records_loss(source, tmp_path, monkeypatch):
    monkeypatch.setattr(codebook, "LLOYD_STEPS", 3)
    result = export_lab(source, tmp_path / "lab", steps=[], codecs=["ans"], shares=[])
    for record in beside_records(frontier.exports(pd.DataFrame(result.table))).itertuples():
        assert f"solve {record.bytes}" in {row["variant"] for row in result.table} and 0 < record.share <= NEAR


def test_lab_scores_a_file_of_every_kind(source, tmp_path, monkeypatch):
    monkeypatch.setattr(codebook, "LLOYD_STEPS", 3)
    lab = dict(steps=[0.4], codecs=["zlib", "ans"], learn_steps=2, equal_loss=False)
    first = export_lab(source, tmp_path / "lab", **lab, shares=[1.0])
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("result.json")}
    assert export_lab(source, tmp_path / "lab", **lab, shares=[1.0]) == first
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in stamps.items())
    result = export_lab(source, tmp_path / "lab", **lab, shares=[1.0, 0.4])  # another question
    rows = {row["variant"]: row for row in result.table}
    assert len(rows) == len(result.table) and rows.keys() >= {row["variant"] for row in first.table[:15]}
    assert rows["int8 zlib"]["total_bytes"] == rows["plain"]["total_bytes"] > rows["int8 ans"]["total_bytes"]
    assert rows["int8 ans"]["bpb"] == rows["plain"]["bpb"]  # the same integers, scored once
    same = [read_result(tmp_path / "lab" / name) for name in ("plain", "int8-zlib", "int8-ans")]
    assert len({one.eval_seconds for one in same}) == 1 and len({one.artifact_sha256 for one in same}) == 2
    assert rows["step 0.4"]["total_bytes"] < rows["plain"]["total_bytes"]
    # Three files hold the integers of another: int8 under its codecs, and what two steps do not improve.
    assert len({row["bpb"] for row in rows.values()}) >= len(rows) - 3
    assert len({rows[name]["bpb"] for name in rows if name[:5] in ("solve", "learn")}) >= 3
    for share in (1.0, 0.4):
        row = rows[f"solve {int(share * rows['plain']['total_bytes'])}"]
        assert rows[row["variant"].replace("solve", "learn")]["total_bytes"] <= share * rows["plain"]["total_bytes"]
        assert 0.998 * share < row["share"] <= share and sum(row["bytes"].values()) == 2 * row["total_bytes"]
    config = RunConfig.from_file(tmp_path / "lab" / "step-0.4-gptq-fisher" / "config.json")
    loaded = load(tmp_path / "lab" / "step-0.4-gptq-fisher" / ARTIFACT)
    model = model_of(loaded, config, pick_device(config.train))
    score = score_model(model, config, open_dataset(config), roundtrip=True)
    assert score.val_bpb == rows["step 0.4 gptq fisher"]["bpb"]
    with pytest.raises(ConfigError, match="was trained with num_layers=1"):
        export_lab(source, tmp_path / "other", **lab, num_layers=2)
