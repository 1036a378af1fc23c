"""A scheme of a few lines, defined here alone, works from its knob to the reader of its file."""

from dataclasses import dataclass

import pytest
import torch
from support.alone import final_bpb, run_alone
from support.artifacts import unpack
from torch import Tensor

from pgolf.runs.result import ARTIFACT, read_result
from pgolf.script.compile import script_of
from pgolf.studies.reexport import export_checkpoint
from pgolf.training.forecast import forecast
from pgolf.training.run import train
from pgolf_core.artifact.format import pack, read_model
from pgolf_core.config import ConfigError, RunConfig
from pgolf_core.export import quantize_state
from pgolf_core.quantization.stored import Quantized, form, stored_form
from pgolf_core.scheme import FitContext, QuantScheme, parse_int, parse_scheme, register

pytestmark = pytest.mark.usefixtures("real_scripts")


@stored_form("mine")
@dataclass(frozen=True)
class MineTensor:
    levels: Tensor
    largest: Tensor

    def arrays(self):
        return {"levels": self.levels, "largest": self.largest}

    @classmethod
    def from_arrays(cls, arrays):
        return cls(arrays["levels"], arrays["largest"])

    def dequantize(self):
        return self.levels.float() * self.largest.float()


@register
@dataclass(frozen=True)
class Mine(QuantScheme):
    word, usage = "mine", "mine:K, K levels above zero and K below, K 1 to 99"
    k: int

    @classmethod
    def from_args(cls, k):
        return cls(parse_int(k, 1, 99))

    def fit(self, w, context):
        largest = (w.abs().max() / self.k).half().clamp_min(1e-4)
        return MineTensor((w / largest.float()).round().to(torch.int8), largest)


TINY = dict(
    track="nano", num_layers=1, model_dim=64, num_heads=2, num_kv_heads=1, train_seq_len=64, train_batch_tokens=1024,
    iterations=1, val_loss_every=0, val_max_tokens=512, roundtrip_val_max_tokens=0, val_batch_size=4096,
    keep_float_max_numel=0,
)  # fmt: skip


def test_a_scheme_defined_in_a_test_works_from_config_to_reader(few_documents, tmp_path):
    for text in ("mine", "mine:0", "mine:3:4"):
        with pytest.raises(ConfigError, match="input should be mine:K, K levels"):
            RunConfig(**TINY, quantizer=text)
    config = RunConfig(
        **TINY, data_path=str(few_documents), quantizer="mine:3", mlp_out_quantizer="step:0.3", codec="ans"
    )
    result = train(config, tmp_path / "s" / "run")
    estimate = forecast(config)
    assert estimate.bytes == pytest.approx(result.total_bytes, rel=0.15)
    file = read_model(tmp_path / "s" / "run" / ARTIFACT)
    coded = {name: t for name, t in file.tensors.items() if isinstance(t, MineTensor)}
    assert len(coded) == 6 and all(t.levels.abs().max() <= 3 for t in coded.values())
    plain = script_of(config.with_knobs(quantizer="step:0.3"))
    assert result.bytes["weights"] > 0 and result.bytes["code"] == len(script_of(config).packed) > len(plain.packed)
    finer = export_checkpoint(tmp_path / "s" / "run", tmp_path / "s" / "lab", quantizer="mine:40")
    assert finer.total_bytes > result.total_bytes and finer == read_result(tmp_path / "s" / "lab")
    _reads_alone(tmp_path / "s" / "run", config, few_documents, tmp_path)


def _reads_alone(run_dir, config, data, folder):
    """The run's script, without this file and without the packages, scores its artifact alike."""
    (folder / "train_gpt.py").write_bytes(script_of(config).packed)
    output = run_alone(folder / "train_gpt.py", data, "--eval", str(run_dir / ARTIFACT))
    assert final_bpb(output) == f"{read_result(run_dir).roundtrip_val_bpb:.8f}"


def test_all_schemes_round_trip_and_use_their_context():
    w = {"blocks.0.mlp.fc.weight": torch.randn(24, 16), "blocks.0.mlp.proj.weight": torch.randn(16, 24)}
    schemes = "absmax absmax:5 sdclip:6:12 step:0.4 step:0.4:row ternary binary codebook:16:2 mine:3"
    for text in schemes.split():
        config = RunConfig(quantizer=text, keep_float_max_numel=0).export
        quantized = quantize_state(w, config)
        read_back, scheme = unpack(pack(quantized, "ans").bytes), parse_scheme(text)
        assert (
            {type(t) for t in read_back.tensors.values()}
            == {form(scheme.stored)}
            == {type(t) for t in quantized.tensors.values()}
        )
        expected = scheme.fit_all(w, dict.fromkeys(w, FitContext()))
        assert all(torch.equal(t.dequantize(), expected[n].dequantize()) for n, t in read_back.tensors.items())
    assert not quantize_state(w, RunConfig(quantizer="float16", keep_float_max_numel=0).export).tensors
    two = RunConfig(quantizer="codebook:16:2", mlp_in_quantizer="codebook:8:1", keep_float_max_numel=0).export
    with pytest.raises(ValueError, match="one codebook per model"):
        quantize_state(w, two)
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.fc\.weight was not seen in calibration"):
        quantize_state(w, RunConfig(quantizer="step:0.4:fisher", keep_float_max_numel=0).export, {})


def test_a_binary_weight_takes_about_one_bit_and_none_becomes_zero():
    w = torch.randn(200, 300)
    w[0], w[1, ::2] = 0, 0
    t = parse_scheme("binary").fit(w, FitContext())
    assert (t.q.abs() == 1).all() and torch.equal(t.q < 0, w < 0)
    torch.testing.assert_close(t.dequantize().abs()[:, 0], w.abs().mean(1), rtol=1e-3, atol=1e-5)
    size = pack(Quantized({"w": t}, {}, {}), "ans").parts["weights"]
    assert w.numel() / 8 <= size < 1.01 * w.numel() / 8
