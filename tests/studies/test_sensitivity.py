"""Sensitivity maps of a run: the estimate against the exact map, the rows against files."""

import pytest
import torch

from pgolf.runs.result import CHECKPOINT, RunError
from pgolf.studies import sensitivity
from pgolf.studies.sensitivity import map_sensitivity, protect
from pgolf.training.inputs import open_dataset
from pgolf.training.round_trip import load_checkpoint, score_model
from pgolf_core.artifact.format import load, pack
from pgolf_core.config import ConfigError, RunConfig
from pgolf_core.device import pick_device
from pgolf_core.evaluate import evaluate
from pgolf_core.export import quantize_state
from pgolf_core.export_inputs import model_of
from pgolf_core.model import GPT

KNOBS = dict(
    track="nano", num_layers=2, model_dim=64, num_heads=2, num_kv_heads=1, train_seq_len=64, train_batch_tokens=1024,
    iterations=40, val_max_tokens=1024, roundtrip_val_max_tokens=4096, val_batch_size=2048, keep_float_max_numel=2000,
    precision="float32",
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(source):
    config = RunConfig.from_file(source / "config.json")
    return load_checkpoint(source / CHECKPOINT), config, open_dataset(config)


def spearman(rows: list[dict]) -> float:
    columns = torch.tensor([[row["delta_bpb"], row["estimated_delta_bpb"]] for row in rows], dtype=torch.float64)
    return torch.corrcoef(columns.argsort(0).argsort(0).double().T)[0, 1].item()


def test_estimate_ranks_as_the_exact_map(trained):
    rows = sensitivity.sensitivity(*trained)[1:]
    assert len(rows) == 13 and spearman(rows) >= 0.9
    worst = max(rows, key=lambda row: row["delta_bpb"])
    assert worst["tensor"] == "tok_emb.weight"
    assert worst["estimated_delta_bpb"] == pytest.approx(worst["delta_bpb"], rel=0.5)


def test_estimate_of_a_small_change_is_its_derivative(trained, monkeypatch):
    """With the gradient of every window, and a change so small that the second order is nothing."""
    monkeypatch.setattr("pgolf.studies.sensitivity.GRADIENT_WINDOWS", 1)
    state, config, dataset = trained
    name = "blocks.1.attn.c_v.weight"
    tokens = dataset.validation(64, 2048)
    direction = torch.randn(state[name].shape, generator=torch.Generator().manual_seed(1))
    model = GPT(config.model)

    def scored(step: float) -> float:
        model.load_state_dict(state | {name: state[name] + step * direction})
        return evaluate(model, tokens, dataset.byte_table, config.eval).val_bpb

    changes = {name: state[name] + 1e-5 * direction}
    derivative = (scored(1e-2) - scored(-1e-2)) / 2e-2
    rise = sensitivity.estimate(state, changes, config, dataset, tokens)[name]
    assert rise == pytest.approx(1e-5 * derivative, rel=0.03)


def test_map_of_one_tensor_rounded(trained, source, tmp_path, capsys):
    state, config, dataset = trained
    result = map_sensitivity(source, tmp_path / "map", tokens=2048, change="step:1.5", codec="ans")
    assert result.kind == "sensitivity" and result.source == "sweep/run"
    assert len(capsys.readouterr().out.splitlines()) == len(result.table) == 14
    rows = {row["tensor"]: row for row in result.table}
    raw = model_of(state, config, pick_device(config.train))
    assert rows[""]["bpb"] == score_model(raw, config.with_knobs(val_max_tokens=2048), dataset).val_bpb
    name = "blocks.1.mlp.proj.weight"
    row, export = rows[name], config.with_knobs(quantizer="step:1.5").export
    quantized = quantize_state(state, export)
    changed = model_of(state | {name: quantized.state_dict()[name]}, config, pick_device(config.train))
    assert row["bpb"] == score_model(changed, config.with_knobs(val_max_tokens=2048), dataset).val_bpb
    assert (row["layer"], row["part"], row["change"]) == (1, "mlp.proj", "step:1.5")
    counts = quantized.tensors[name].q.unique(return_counts=True)[1]
    entropy = -(counts * (counts / counts.sum()).log2()).sum().item() / 8
    assert row["tensor_bytes"] == pytest.approx(entropy, rel=0.15)
    assert row["delta_bytes"] == row["bytes"] - rows[""]["bytes"] < row["tensor_bytes"] - 1.5 * state[name].numel()
    assert row["bpb_per_kb"] == -1000 * row["delta_bpb"] / row["delta_bytes"]
    stamp = (tmp_path / "map" / "result.json").stat().st_mtime_ns
    assert map_sensitivity(source, tmp_path / "map", tokens=2048, change="step:1.5", codec="ans") == result
    assert (tmp_path / "map" / "result.json").stat().st_mtime_ns == stamp
    with pytest.raises(RunError, match=r"a map of change=step:1\.5, not protect"):
        map_sensitivity(source, tmp_path / "map", tokens=2048, change="protect", codec="ans")


def test_map_of_one_tensor_protected_is_what_its_file_scores(trained, source, tmp_path):
    state, config, dataset = trained
    knobs = dict(quantizer="step:1", mlp_permutation=True)  # the map leaves the permutation out
    rows = {
        row["tensor"]: row for row in map_sensitivity(source, tmp_path / "map", 2048, change="protect", **knobs).table
    }
    export = config.with_knobs(quantizer="step:1").export
    quantized, name = quantize_state(state, export), "tok_emb.weight"  # the one that surely loses
    for tensor, stored in (("", quantized), (name, protect(quantized, name, state[name].half()))):
        path = tmp_path / f"file{tensor}"
        path.write_bytes(pack(stored, export.codec).bytes)
        score = score_model(
            model_of(load(path), config, pick_device(config.train)), config.with_knobs(val_max_tokens=2048), dataset
        )
        assert (rows[tensor]["bpb"], rows[tensor]["bytes"]) == (score.val_bpb, path.stat().st_size)
    assert torch.equal(load(path)[name], state[name].half().float())
    assert rows[name]["delta_bpb"] < 0 < rows[name]["delta_bytes"] and rows[name]["bpb_per_kb"] > 0


@pytest.mark.slow
def test_codebooks_and_the_exports_own_knobs(trained):
    state, config, dataset = trained
    config = config.with_knobs(roundtrip_val_max_tokens=1024, mlp_out_quantizer="float16")
    solved = config.with_knobs(allocation="solve", cap_bytes=60_000)
    learned = solved.with_knobs(learn_steps=2)  # its levels are mapped as they were before
    maps = [sensitivity.sensitivity(state, own, dataset, "quantise") for own in (solved, learned)]
    assert maps[0] == maps[1]
    for change, count in (("codebook:16:2", 13), ("quantise", 11), ("protect", 11)):
        rows = sensitivity.sensitivity(state, config, dataset, change)
        assert len(rows) == 1 + count
        assert all((row["delta_bytes"] > 0) == (change == "protect") for row in rows[1:])


def test_errors(trained, source, tmp_path):
    state, config, dataset = trained
    with pytest.raises(RunError, match="only a finished run"):
        map_sensitivity(tmp_path / "nothing", tmp_path / "map")
    with pytest.raises(ConfigError, match="quantizer='halve'"):
        map_sensitivity(source, tmp_path / "map", change="halve")
    with pytest.raises(ConfigError, match="train another run"):
        map_sensitivity(source, tmp_path / "map", num_layers=3)
    with pytest.raises(ValueError, match="no tensor of this model is quantised"):
        sensitivity.sensitivity(state, config, dataset, "float16")
