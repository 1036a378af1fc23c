"""Our training step against the public baseline's, alternating in one process: milliseconds and their ratio.

    python benchmarks/bench_step.py                      # nano on one thread, 6 x 384 with 8,192 tokens on all
    python benchmarks/bench_step.py --shapes nano --rounds 20

The baseline is its model in blocks one after the other, Adam, and Muon with one bfloat16 Newton–Schulz per matrix.
Both run eager, on the same random tokens. Ours takes the dtype of precision=mixed, bfloat16 on a CPU with AMX. The
baseline runs in float32, and there once more with bfloat16 products by autocast. Below 1 means that ours is faster.
"""

import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgolf_core.batches import TokenStream
from pgolf_core.config import RunConfig
from pgolf_core.device import autocast, cpu_threads, keep_freed_memory, training_dtype
from pgolf_core.shards import header
from pgolf_core.train import TrainState, make_state, train_step

MEDIUM = dict(num_layers=6, model_dim=384, num_heads=6, num_kv_heads=3, cpu_threads=0)
SHAPES = {"nano": {}, "6x384": MEDIUM | dict(train_batch_tokens=8192, train_seq_len=1024)}


class BaselineBlock(nn.Module):
    """Attention, then MLP on its output."""

    def __init__(self, c: RunConfig):
        super().__init__()
        D, self.heads, self.kv_heads = c.model_dim, c.num_heads, c.num_kv_heads
        kv = self.kv_heads * D // self.heads
        shapes = dict(q=(D, D), k=(D, kv), v=(D, kv), o=(D, D), fc=(D, c.mlp_mult * D), out=(c.mlp_mult * D, D))
        self.m = nn.ModuleDict({name: nn.Linear(*shape, bias=False) for name, shape in shapes.items()})
        self.q_gain = nn.Parameter(torch.full((self.heads,), 1.5))
        self.attn_scale, self.mlp_scale = nn.Parameter(torch.ones(D)), nn.Parameter(torch.ones(D))
        self.mix = nn.Parameter(torch.stack((torch.ones(D), torch.zeros(D))))

    def forward(self, x: Tensor, x0: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = self.mix[0] * x + self.mix[1] * x0
        h, (B, T, D) = F.rms_norm(x, (x.size(-1),)), x.shape
        q, k, v = (self.m[n](h).reshape(B, T, -1, D // self.heads).transpose(1, 2) for n in "qkv")
        q, k = (rotated(F.rms_norm(t, (t.size(-1),)), cos, sin) for t in (q, k))
        q = q * self.q_gain[None, :, None, None]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.kv_heads != self.heads)
        x = x + self.attn_scale * self.m["o"](y.transpose(1, 2).contiguous().reshape(B, T, D))
        return x + self.mlp_scale * self.m["out"](torch.relu(self.m["fc"](F.rms_norm(x, (D,)))).square())


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x1 * -sin + x2 * cos), dim=-1)


class Baseline(nn.Module):
    """The public baseline with a tied embedding."""

    def __init__(self, c: RunConfig):
        super().__init__()
        self.c, self.half = c, c.num_layers // 2
        self.embed = nn.Embedding(c.vocab_size, c.model_dim)
        nn.init.normal_(self.embed.weight, std=c.tied_embed_init_std)
        self.skip = nn.Parameter(torch.ones(self.half, c.model_dim))
        self.blocks = nn.ModuleList(BaselineBlock(c) for _ in range(c.num_layers))
        angle = torch.arange(c.train_seq_len)[:, None] / c.rope_base ** (torch.arange(0, c.head_dim, 2) / c.head_dim)
        self.cos, self.sin = angle.cos(), angle.sin()

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = x0 = F.rms_norm(self.embed(ids), (self.c.model_dim,))
        skips = []
        for i, block in enumerate(self.blocks):
            if i >= self.half and skips:
                x = x + self.skip[i - self.half] * skips.pop()
            x = block(x, x0, self.cos, self.sin)
            if i < self.half:
                skips.append(x)
        logits = F.linear(F.rms_norm(x, (x.size(-1),)).flatten(0, 1), self.embed.weight)
        logits = self.c.logit_softcap * torch.tanh(logits / self.c.logit_softcap)
        return F.cross_entropy(logits.float(), targets.flatten())


@torch.no_grad()
def baseline_muon(params: list[Tensor], buffers: list[Tensor], lr: float, momentum: float) -> None:
    for p, buffer in zip(params, buffers, strict=True):
        buffer.mul_(momentum).add_(p.grad)
        x = p.grad.add(buffer, alpha=momentum).bfloat16()
        x /= x.norm() + 1e-7
        if tall := x.size(0) > x.size(1):
            x = x.T
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        p.add_((x.T if tall else x).to(p.dtype), alpha=-lr * max(1, p.size(0) / p.size(1)) ** 0.5)
        p.grad = None


def baseline_step(c: RunConfig, dtype: torch.dtype):
    """A function that takes one step of the baseline on the batches that it is given."""
    model = Baseline(c)
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2 and p.size(0) > 2]
    vectors = [model.skip, *(p for p in model.blocks.parameters() if p.ndim == 1 or p.size(0) == 2)]
    adam = dict(betas=(c.beta1, c.beta2), eps=c.adam_eps, fused=True)
    groups = (([model.embed.weight], c.tied_embed_lr), (vectors, c.scalar_lr))
    adams = [torch.optim.Adam(params, lr, **adam) for params, lr in groups]
    buffers = [torch.zeros_like(p) for p in matrices]

    def step(batches) -> None:
        for _ in range(c.grad_accum):
            with autocast(torch.device("cpu"), dtype):
                loss = model(*batches.next()) / c.grad_accum
            loss.backward()
        for optimizer in adams:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        baseline_muon(matrices, buffers, c.matrix_lr, c.muon_momentum)

    return step


def measure(c: RunConfig, rounds: int) -> dict[str, tuple[float, float]]:
    """Median milliseconds of a step of ours and of the baseline's in each dtype, and the median ratio of ours to it."""
    ours = training_dtype(c.train, torch.device("cpu"))
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder, cpu_threads(c.cpu_threads):
        tokens = np.random.default_rng(0).integers(0, c.vocab_size, 1_000_000, dtype=np.uint16)
        shard = Path(folder) / "fineweb_train_000000.bin"
        shard.write_bytes(header(len(tokens)) + tokens.tobytes())
        state: TrainState = make_state(c, TokenStream([shard]), dtype=ours)
        steps = {f"ours, {name(ours)}": lambda: train_step(state, 1.0)}
        for dtype in dict.fromkeys((torch.float32, ours)):
            steps[f"baseline, {name(dtype)}"] = partial(baseline_step(c, dtype), state.batches)
        seconds = {label: [] for label in steps}
        for _ in range(2 + rounds):
            for label, step in steps.items():
                began = time.perf_counter()
                step()
                seconds[label].append(time.perf_counter() - began)
        state.batches.load_state_dict(state.batches.state_dict())  # wait for the thread that reads the file
    own = next(iter(seconds.values()))
    return {
        label: (
            1000 * statistics.median(times[2:]),
            statistics.median(a / b for a, b in zip(own[2:], times[2:], strict=True)),
        )
        for label, times in seconds.items()
    }


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print(f"CPU capability {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}")
    for shape in arguments.shapes:
        config = RunConfig(**dict(track="nano") | SHAPES[shape])
        for label, (milliseconds, ratio) in measure(config, arguments.rounds).items():
            print(f"{shape:6}  {label:18} {milliseconds:8.1f} ms  ours to it {ratio:.3f}")


if __name__ == "__main__":
    main()
