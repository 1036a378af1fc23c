"""Attention on a GPU: milliseconds of forward and backward by kernel, of windows and of document masks.

    python benchmarks/bench_attention.py
    python benchmarks/bench_attention.py --json FILE

bfloat16, grouped-query, causal, made-up heads. A shape is sequences × heads / key heads × positions × dimensions.
Medians of 20 after 5 to warm up, timed by the device. Rate: operations of causal attention alone, 14 per pair and
dimension forward and backward together, whatever a mask leaves out.
"""

import argparse
import json
import statistics
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, flex_attention, sdpa_kernel

from pgolf_core.device import deterministic_kernels
from pgolf_core.layers.attention import attention, compiled_flex_attention, window_mask

SHAPES = {"9x512": (64, 8, 4, 1024, 64), "12x384": (32, 6, 3, 1024, 64), "record": (48, 8, 4, 2048, 64)}
BACKENDS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION")
REPEATS = 20


def milliseconds(function, q: Tensor, k: Tensor, v: Tensor) -> float:
    """Median of forward and backward together."""
    grad, times = torch.randn_like(q), []
    for repeat in range(REPEATS + 5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function(q, k, v).backward(grad)
        end.record()
        q.grad = k.grad = v.grad = None
        torch.cuda.synchronize()
        if repeat >= 5:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def pinned(backend: str, repeated: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """scaled_dot_product_attention by one kernel; repeated: keys and values copied for each query head."""
    if repeated:
        k, v = (t.repeat_interleave(q.size(1) // k.size(1), 1) for t in (k, v))
    with sdpa_kernel(getattr(SDPBackend, backend)):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=not repeated)


def flex(mask: flex_attention.BlockMask, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return compiled_flex_attention()(q, k, v, block_mask=mask, enable_gqa=True)


def ways(B: int, T: int, device: torch.device) -> dict:
    """Name -> (function of q, k and v, deterministic kernels or not)."""
    documents = (torch.rand(B, T, device=device) < 1 / 400).cumsum(1)  # a mean of 400 tokens
    sdpa = {
        f"{backend.split('_')[0].lower()}{', repeated' * repeated}": (partial(pinned, backend, repeated), False)
        for backend in BACKENDS
        for repeated in (False, True)
    }
    windows = {f"flex, window {w}": (partial(flex, window_mask(T, w, device)), False) for w in (128, 256, 512, T)}
    return {
        "the model's": (partial(attention, mask=None), False),
        "the model's, deterministic": (partial(attention, mask=None), True),
        **sdpa,
        "cudnn, deterministic": (partial(pinned, "CUDNN_ATTENTION", False), True),
        **windows,
        "flex, documents": (partial(flex, window_mask(T, T, device, documents)), False),
    }


def measure(shape: tuple[int, ...]) -> dict[str, float | str]:
    """Way -> milliseconds, or why this machine cannot."""
    B, H, K, T, C = shape
    device, done = torch.device("cuda"), {}
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, heads, T, C, device=device, dtype=torch.bfloat16).requires_grad_() for heads in (H, K, K))
    for name, (function, deterministic) in ways(B, T, device).items():
        try:
            with deterministic_kernels(True) if deterministic else nullcontext():
                done[name] = milliseconds(function, q, k, v)
        except RuntimeError as error:
            done[name] = str(error).splitlines()[0]
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_attention.py measures a GPU's kernels, and this machine has no CUDA device")
    told = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "shapes": {}}
    for name, (B, H, K, T, C) in SHAPES.items():
        print(f"{name}: {B} × {H}/{K} × {T} × {C}")
        told["shapes"][name] = measure(SHAPES[name])
        for way, value in told["shapes"][name].items():
            rate = "" if isinstance(value, str) else f"{14 * B * H * C * T * T / 2 / value / 1e9:6.0f} TFLOP/s"
            print(f"  {way:28} {value if isinstance(value, str) else f'{value:8.3f} ms'} {rate}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
