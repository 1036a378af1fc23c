"""What a training step must be for a GPU, seen without one: nothing waits for the device, one graph for all steps."""

import contextlib
import platform
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.attention import flex_attention as flex

from pgolf_core import device as devices
from pgolf_core.config import RunConfig
from pgolf_core.distributed import ALONE, GradientSum
from pgolf_core.layers import attention
from pgolf_core.model import GPT
from pgolf_core.optim import WeightAverage, make_optimizers
from pgolf_core.regularizers import CompressionRegularizer
from pgolf_core.train import TrainState, train_step

SMALL = dict(track="nano", num_layers=2, model_dim=64, num_heads=4, num_kv_heads=2, train_seq_len=64)
PRESSURE = dict(
    compression_reg_weight=0.005, compression_reg_interval=1, compression_reg_warmup_steps=0, int8_residual_rank=1,
    grad_clip_norm=1.0,
    compression_grid_reg_weight=0.1, compression_rank1_reg_weight=0.1, compression_scale_reg_weight=0.1,
    ternary_reg_weight=0.1, outlier_reg_weight=0.1, int8_residual_budget_bytes=4096,
)  # fmt: skip

EVERY_STEP = dict(muon_wd=0.1, muon_row_normalize=True, muon_polar_express=True, ema_decay=0.9)


class Zeros:
    """Batches of token 0."""

    def __init__(self, length: int):
        self.ids = torch.zeros(2, length, dtype=torch.int64)

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.ids, self.ids


def small_state(config: RunConfig) -> TrainState:
    """As make_state, on batches that need no file; bfloat16, one pass per step."""
    model = GPT(config.model)
    model.positions(torch.empty(1, config.train_seq_len, 0))
    return TrainState(
        model=model, loss_fn=model.loss, optimizers=make_optimizers(model, config),
        regularizer=CompressionRegularizer(model, config), average=WeightAverage(model, config),
        gradients=GradientSum(model.parameters(), ALONE), batches=Zeros(config.train_seq_len), config=config.train,
        grad_accum=1, dtype=torch.bfloat16,
    )  # fmt: skip


@pytest.mark.parametrize("axis", ["auto", "row"])
@pytest.mark.parametrize("window", [0, 16])
def test_train_step_never_waits_for_the_device(window, axis):
    """Tensors without numbers: whatever reads one, an .item(), a branch, a shape that depends on it, fails."""
    with FakeTensorMode():
        knobs = dict(window_size=window, int8_axis_mode=axis, document_mask=bool(window), **EVERY_STEP)
        state = small_state(RunConfig(**SMALL, **PRESSURE, **knobs))
        for _ in range(2):
            loss, _ = train_step(state, 0.5)
        with pytest.raises(DataDependentOutputException):
            loss.item()  # the test can fail


@pytest.fixture
def blocks_of_a_gpu(monkeypatch):
    """window_mask as a GPU has it: FlexAttention's blocks, which a CPU computes as plain operations, forward only."""
    make, sees, gpu = flex.create_block_mask, attention.window_mask, torch.device("cuda")
    monkeypatch.setattr(flex, "create_block_mask", lambda *of, device: make(*of, device="cpu"))
    monkeypatch.setattr(attention, "TRITON", True)
    return lambda length, window, device, document=None: sees(length, window, gpu, document)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("head_dim", [16, 70])
@pytest.mark.parametrize("documents", [False, True])
def test_blocks_of_flex_attention_see_what_the_mask_sees(heads, head_dim, documents, blocks_of_a_gpu):
    q, k, v = (torch.randn(2, h, 96, head_dim) for h in (heads[0], heads[1], heads[1]))
    document = torch.randint(8, (2, 96)).eq(0).cumsum(1) if documents else None
    mask = attention.window_mask(96, 17, torch.device("cpu"), document)
    blocks = blocks_of_a_gpu(96, 17, torch.device("cuda"), document)
    with torch.no_grad():
        ours = flex.flex_attention(q, k, v, block_mask=blocks, enable_gqa=heads[0] != heads[1])
        theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=heads[0] != heads[1])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_blocks_of_documents_are_made_inside_the_one_graph(blocks_of_a_gpu, monkeypatch):
    """The model is compiled as a whole, and other documents do not compile it again."""
    model, batches = GPT(RunConfig(**SMALL, document_mask=True).model), torch.randint(1, 9, (3, 2, 64))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.1)
        expected = [model(ids) for ids in batches]
        monkeypatch.setattr(attention, "window_mask", blocks_of_a_gpu)
        compiled = torch.compile(model.forward, fullgraph=True, dynamic=False, backend="aot_eager")
        torch.testing.assert_close(compiled(batches[0]), expected[0], rtol=1e-4, atol=1e-4)
        with torch.compiler.set_stance("fail_on_recompile"):
            for ids, logits in zip(batches[1:], expected[1:], strict=True):
                torch.testing.assert_close(compiled(ids), logits, rtol=1e-4, atol=1e-4)


def test_deterministic_kernels_are_on_inside_only(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.utils.deterministic.fill_uninitialized_memory
    with contextlib.suppress(ZeroDivisionError), devices.deterministic_kernels(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
        _ = 1 / 0
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory == before
    with devices.deterministic_kernels(False):
        assert not torch.are_deterministic_algorithms_enabled()


def test_a_machine_that_cannot_compile_says_why(monkeypatch):
    asked, gpu, cpu = RunConfig(track="h100"), torch.device("cuda"), torch.device("cpu")
    assert devices.not_compiled(asked.with_knobs(compile=False).train, gpu) == "compile=0"
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    assert devices.not_compiled(asked.train, gpu) == "this machine has no Triton"
    monkeypatch.setattr(devices, "find_spec", lambda name: object())
    assert devices.not_compiled(asked.train, gpu) == ""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert devices.not_compiled(asked.train, cpu) == "this machine has no C++ compiler"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc alone is set")
def test_memory_that_a_step_frees_serves_the_next_step():
    """In a process of its own, for malloc is the process's: 64 MiB freed and taken a third time fault few pages in."""
    code = """
import resource, torch
from pgolf_core.device import keep_freed_memory
keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [torch.ones(2**20) for _ in range(16)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print([faults() for _ in range(3)][-1])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 4000  # the memory has 16,384 pages
