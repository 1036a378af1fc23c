"""A checkpoint made elsewhere: read without running code, its knobs told by its shapes, a run like any other."""

import pickle

import pytest
import safetensors.torch
import torch
from support.training import TINY, gaussian_state, tiny

from pgolf.runs.result import ARTIFACT, CHECKPOINT, RunError, read_result
from pgolf.runs.table import load_runs
from pgolf.studies.finished_run import open_run
from pgolf.studies.import_checkpoint import PER_BLOCK, import_checkpoint, knobs_of, read_checkpoint
from pgolf.studies.reexport import export_checkpoint
from pgolf.studies.sensitivity import map_sensitivity
from pgolf_core.config import ConfigError, RunConfig
from pgolf_core.model import skeleton

TOLD = ("num_layers", "num_heads", "num_kv_heads", "model_dim")
UNTOLD = {name: value for name, value in TINY.items() if name not in TOLD} | dict(keep_float_max_numel=2000)


@pytest.fixture(scope="module")
def imported(embedded, tmp_path_factory):
    """(file, run directory, result) of an import of a state dict of two layers, as torch.save writes it."""
    folder = tmp_path_factory.mktemp("import")
    torch.save(gaussian_state(tiny(num_layers=2)), folder / "final_model.pt")
    run_dir = folder / "runs" / "imported" / "final_model"
    return folder / "final_model.pt", run_dir, import_checkpoint(folder / "final_model.pt", run_dir, **UNTOLD)


def test_an_import_is_stored_and_scored_under_the_knobs_that_its_shapes_tell(imported):
    path, run_dir, result = imported
    run = open_run(run_dir)
    assert run.config == tiny(num_layers=2, keep_float_max_numel=2000) and result.config_hash == run.config.hash
    assert result.fits and result.roundtrip_val_bpb > 1 and result.steps is None
    row = load_runs(run_dir.parents[1], thorough=True).iloc[0]
    assert (row.status, row.kind, row.source) == ("complete", "checkpoint", path.name)
    assert row.bpb == result.roundtrip_val_bpb
    stored = safetensors.torch.load_file(run_dir / CHECKPOINT)
    assert all(torch.equal(stored[name], t) for name, t in torch.load(path).items())


def test_an_import_is_not_repeated_and_other_weights_do_not_take_its_place(imported, tmp_path):
    path, run_dir, result = imported
    stamp = (run_dir / ARTIFACT).stat().st_mtime_ns
    assert import_checkpoint(path, run_dir, **UNTOLD) == result and (run_dir / ARTIFACT).stat().st_mtime_ns == stamp
    torch.save(gaussian_state(tiny(num_layers=2), seed=1), tmp_path / "other.pt")
    with pytest.raises(RunError, match="holds other weights"):
        import_checkpoint(tmp_path / "other.pt", run_dir, **UNTOLD)


def test_an_imports_weights_are_exported_mapped_and_sampled_like_a_runs(imported, tmp_path):
    _, run_dir, result = imported
    other = export_checkpoint(run_dir, tmp_path / "ans", codec="ans", weight_quantization_bits=4)
    assert read_result(tmp_path / "ans") == other and other.total_bytes < result.total_bytes
    assert other.prequant_val_bpb == pytest.approx(result.prequant_val_bpb)
    mapped = map_sensitivity(run_dir, tmp_path / "map", tokens=128)
    assert {row["tensor"] for row in mapped.table} > {"tok_emb.weight"}
    assert open_run(run_dir).generate("one", tokens=2).startswith("one")


@pytest.mark.parametrize("knobs", [
    dict(), dict(num_layers=4, num_unique_blocks=2), dict(embed_dim=32), dict(tie_embeddings=False, mlp_mult=3),
    dict(bigram_vocab_size=64, bigram_dim=16, skip_gates=True, asymmetric_softcap=True, num_layers=2),
    dict(ve_last=1, ve_dim=16, residual_lanes=2, num_layers=2, smear_gate="v2"), dict(smear_gate="v1", num_heads=4),
])  # fmt: skip
def test_names_and_shapes_tell_the_model(knobs):
    config = tiny(**knobs)
    told = knobs_of(skeleton(config.model).state_dict())
    assert {name: getattr(config, name) for name in told} == told
    assert RunConfig(**UNTOLD | told).model == config.model


def test_the_baselines_parameters_per_block_become_ours_and_its_blocks_sequential(tmp_path):
    state = gaussian_state(tiny(num_layers=3))
    theirs = {name: t for name, t in state.items() if name not in PER_BLOCK.values()}
    for part, name in PER_BLOCK.items():
        theirs |= {f"blocks.{i}.{part}": t for i, t in enumerate(state[name])}
    theirs = {f"_orig_mod.{name}": t.bfloat16() for name, t in theirs.items()}
    torch.save({"model": theirs, "step": 7, "optimizer": {"state": {}}}, tmp_path / "model.pth")
    read = read_checkpoint(tmp_path / "model.pth")
    assert read.knobs["parallel_from"] == read.knobs["num_layers"] == 3
    assert all(torch.equal(read.state[name], t.bfloat16().float()) for name, t in state.items())
    assert read.state.keys() == state.keys()


class Evil:
    def __reduce__(self):
        return print, ("ran",)


def test_a_file_that_would_run_code_is_refused_and_does_not(tmp_path, capsys):
    torch.save({"model": {"tok_emb.weight": torch.zeros(4, 4)}, "hook": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps(Evil()))
    for name in ("evil.pt", "old.pt"):
        with pytest.raises(RunError, match=f"{name}: (holds objects besides tensors|neither a whole)"):
            read_checkpoint(tmp_path / name)
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "knobs", "says"),
    [
        (lambda s: s.pop("blocks.0.mlp.fc.weight"), {}, "missing: blocks.0.mlp.fc.weight"),
        (lambda s: s.update(extra=torch.ones(3)), {}, r"not in the model of these knobs: extra \(3,\)"),
        (lambda s: s, {"model_dim": "128"}, "model_dim=128 was given, and the shapes say -k model_dim=64"),
        (lambda s: s, {"num_layers": 3}, "num_layers=3 was given, and the shapes say -k num_layers=2"),
        (lambda s: s.update({"tok_emb.weight": torch.full((1024, 64), torch.nan)}), {}, "holds NaN or infinity"),
        (lambda s: s.update(ids=torch.ones(3, dtype=torch.int64)), {}, "ids holds torch.int64"),
        (lambda s: [s.pop(n) for n in [*s]] and s.update({"wte.weight": torch.ones(4, 4)}), {}, "none of the model's"),
        (lambda s: s.update(big=torch.zeros(1).expand(10**9)), {}, "unfold to far more"),
        (lambda s: s.update(sparse=torch.eye(4).to_sparse()), {}, r"tensor sparse holds .*sparse_coo"),
        (lambda s: s.update({"model": s}) or [s.pop(n) for n in [*s][:-1]], {}, "holds no tensors by name"),
        (
            lambda s: s.update({"blocks.0.q": torch.ones(1), "blocks.1.attn_scale": torch.ones(1)}),
            {},
            "not in the model",
        ),
        (lambda s: s.clear(), {}, "holds no tensors by name"),
        (lambda s: s, {"final_roundtrip_eval": 0}, "leave both 1"),
        (lambda s: s, {"learning_rate": 1}, "is matrix_lr"),
    ],
)
def test_weights_that_do_not_fit_are_refused_with_the_reason_and_leave_nothing(tmp_path, change, knobs, says):
    state = gaussian_state(tiny(num_layers=2))
    change(state)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises((RunError, ConfigError), match=says):
        import_checkpoint(tmp_path / "w.pt", tmp_path / "runs" / "w", **UNTOLD | knobs)
    assert not (tmp_path / "runs").exists()
