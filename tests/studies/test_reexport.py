"""A finished run's checkpoint exported and scored again under other knobs."""

import shutil
from dataclasses import replace

import pytest
from support.training import tiny

from pgolf.analysis.frontier import comparison_groups
from pgolf.runs.result import RunError, read_result, write_result
from pgolf.runs.table import load_runs
from pgolf.studies.reexport import export_checkpoint
from pgolf.training.run import train
from pgolf_core.config import ConfigError


def test_reexport_with_other_knobs(finished, tmp_path):
    run_dir, source = finished
    same = export_checkpoint(run_dir, tmp_path / "same", weight_quantization_bits=8)
    assert same.artifact_sha256 == source.artifact_sha256 and same.roundtrip_val_bpb == source.roundtrip_val_bpb
    kept = export_checkpoint(run_dir, tmp_path / "kept", weight_quantization_bits=4, embed_quantization_bits=16)
    assert kept.kind == "export" and kept.source == "sweep/run"
    assert kept.prequant_val_bpb == source.prequant_val_bpb
    narrow = export_checkpoint(run_dir, tmp_path / "narrow", eval_seq_len=32)
    assert narrow.prequant_val_bpb != source.prequant_val_bpb and narrow.protocol != source.protocol
    with pytest.raises(RunError, match="only a finished run"):
        export_checkpoint(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"matrix_lr=9\.0: the run was trained with matrix_lr=0\.04"):
        export_checkpoint(run_dir, tmp_path / "out", matrix_lr=9)


def test_scores_of_another_precision_are_another_group(finished, tmp_path):
    """One file, scored in float32 and in bfloat16, is no pair for a test over blocks."""
    run_dir, source = finished
    in_bfloat16 = export_checkpoint(run_dir, tmp_path / "runs" / "s" / "bfloat16", precision="bfloat16")
    assert in_bfloat16.artifact_sha256 == source.artifact_sha256
    assert in_bfloat16.roundtrip_val_bpb != source.roundtrip_val_bpb
    assert in_bfloat16.prequant_val_bpb != source.prequant_val_bpb  # scored again as well
    shutil.copytree(run_dir, tmp_path / "runs" / "s" / "float32")
    assert [key.protocol for key, _ in comparison_groups(load_runs(tmp_path / "runs"))] == [
        "window 64, stride 64", "window 64, stride 64, bfloat16 on cpu",
    ]  # fmt: skip


def test_reexport_of_an_earlier_training_is_refused(finished, tmp_path):
    run_dir = tmp_path / "sweep" / "run"
    train(tiny(iterations=3), run_dir)
    export_checkpoint(run_dir, tmp_path / "out")
    shutil.rmtree(run_dir)
    train(tiny(iterations=4), run_dir)
    with pytest.raises(ConfigError, match="iterations 3 there, 4 now"):
        export_checkpoint(run_dir, tmp_path / "out")
    stale = read_result(run_dir)
    write_result(run_dir, replace(stale, checkpoint_sha256="0" * 64))
    export_checkpoint(run_dir, tmp_path / "other")
    write_result(run_dir, stale)
    with pytest.raises(RunError, match="made from another training"):
        export_checkpoint(run_dir, tmp_path / "other")
