"""What a training step must be for a GPU, seen without one: nothing waits for the device, one graph for all steps."""

import contextlib
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.attention import flex_attention as flex

from pgolf.training import round_trip
from pgolf_core.config import RunConfig
from pgolf_core.layers.attention import window_mask
from pgolf_core.model import GPT
from pgolf_core.optim import make_optimizers, step_optimizers
from pgolf_core.regularizers import CompressionRegularizer

SMALL = dict(track="nano", num_layers=3, model_dim=64, num_heads=4, num_kv_heads=2, train_seq_len=64)
PRESSURE = dict(
    compression_reg_weight=0.005, compression_reg_interval=1, compression_reg_warmup_steps=0, int8_residual_rank=1,
    compression_grid_reg_weight=0.1, compression_rank1_reg_weight=0.1, compression_scale_reg_weight=0.1,
    ternary_reg_weight=0.1, outlier_reg_weight=0.1, int8_residual_budget_bytes=4096,
)  # fmt: skip


def one_step(config: RunConfig, model: GPT, optimizers, regularizer, step: int, loss_of=None) -> torch.Tensor:
    ids = torch.zeros(2, config.train_seq_len, dtype=torch.int64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = (loss_of or model.loss)(ids, ids)
    loss.backward()
    penalty, sampled = regularizer(step)
    if sampled:
        (config.compression_reg_weight * penalty).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    step_optimizers(optimizers, 0.5, config.muon_momentum)
    return loss


@pytest.mark.parametrize("axis", ["auto", "row"])
@pytest.mark.parametrize("window", [0, 16])
def test_no_step_waits_for_the_device(window, axis):
    """Tensors that hold no numbers: whatever reads one, an .item(), a branch, a shape that depends on it, fails."""
    config = RunConfig(**SMALL, **PRESSURE, window_size=window, int8_axis_mode=axis)
    with FakeTensorMode():
        model = GPT(config.model)
        optimizers, regularizer = make_optimizers(model, config), CompressionRegularizer(model, config)
        for step in range(3):
            loss = one_step(config, model, optimizers, regularizer, step)
        with pytest.raises(DataDependentOutputException):
            loss.item()  # the test can fail


@pytest.mark.parametrize("window", [0, 16])
def test_one_graph_serves_every_step(window):
    """Compiled once as a whole; learning rates, the regulariser's choices and validation change nothing of it."""
    config = RunConfig(**SMALL, **PRESSURE, window_size=window)
    model = GPT(config.model)
    optimizers, regularizer = make_optimizers(model, config), CompressionRegularizer(model, config)
    model.positions(torch.empty(1, config.train_seq_len, 0))
    loss_of = torch.compile(model.loss, fullgraph=True, dynamic=False, backend="aot_eager")
    one_step(config, model, optimizers, regularizer, 0, loss_of)
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in range(1, 4):
            one_step(config, model, optimizers, regularizer, step, loss_of)
            with torch.inference_mode():
                model(torch.zeros(step, 32 * step, dtype=torch.int64))  # as validation does, at other lengths
        with pytest.raises(RuntimeError, match="recompile"):
            loss_of(torch.zeros(3, 64, dtype=torch.int64), torch.zeros(3, 64, dtype=torch.int64))


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("head_dim", [16, 70])
def test_blocks_of_flex_attention_see_what_the_mask_sees(heads, head_dim, monkeypatch):
    """As window_mask makes them on a GPU; a CPU computes them as plain operations, forward only."""
    q, k, v = (torch.randn(2, h, 96, head_dim) for h in (heads[0], heads[1], heads[1]))
    mask = window_mask(96, 17, torch.device("cpu"))
    made = []

    def on_cpu(sees, *sizes, device):
        made.append(device)
        return flex_blocks(sees, *sizes, device="cpu")

    flex_blocks = flex.create_block_mask
    monkeypatch.setattr(flex, "create_block_mask", on_cpu)
    monkeypatch.setattr("pgolf_core.layers.attention.find_spec", lambda name: True)
    blocks = window_mask(96, 17, torch.device("cuda"))
    assert made == [torch.device("cuda")]
    with torch.no_grad():
        ours = flex.flex_attention(q, k, v, block_mask=blocks, enable_gqa=heads[0] != heads[1])
        theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=heads[0] != heads[1])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_deterministic_kernels_are_on_inside_only(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.utils.deterministic.fill_uninitialized_memory
    with contextlib.suppress(ZeroDivisionError), round_trip.deterministic_kernels(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
        _ = 1 / 0
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory == before
    with round_trip.deterministic_kernels(False):
        assert not torch.are_deterministic_algorithms_enabled()


def test_a_machine_that_cannot_compile_says_why(monkeypatch):
    asked, gpu, cpu = RunConfig(track="h100"), torch.device("cuda"), torch.device("cpu")
    assert round_trip.not_compiled(asked.with_knobs(compile=False), gpu) == "compile=0"
    monkeypatch.setattr(round_trip, "find_spec", lambda name: None)
    assert round_trip.not_compiled(asked, gpu) == "this machine has no Triton"
    monkeypatch.setattr(round_trip, "find_spec", lambda name: object())
    assert round_trip.not_compiled(asked, gpu) == ""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert round_trip.not_compiled(asked, cpu) == "this machine has no C++ compiler"
