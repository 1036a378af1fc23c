"""Floating-point operations of a training step, and the share of a GPU's peak that a run reached (MFU)."""

import re
import sys
from itertools import pairwise

import psutil
import torch

from pgolf_core.config import RunConfig
from pgolf_core.knobs import parse_schedule

# Dense bfloat16 products with float32 sums, 1e12 operations per second, by a part of CUDA's device name; the first
# match counts. V100: float16, it has no bfloat16. Source: the makers' data sheets.
PEAKS = {
    "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200 NVL": 835, "H200": 989, "GH200": 989, "B200": 2250,
    "A100": 312, "L40S": 362, "L40": 181, "L4": 121, "A10": 125,
    "RTX 4090": 165, "RTX 3090 Ti": 80, "RTX 3090": 71, "V100": 125,
}  # fmt: skip


def flops_per_token(config: RunConfig) -> float:
    """Operations of forward and backward: 6 per weight that a token is multiplied with, 12 per pair it attends to.

    Weights of shared blocks count in every layer that uses them, the embedding as output matrix only. Pairs are those
    that causal attention and the window leave, half of those without a mask. The mean over tokens of all stages.
    """
    m = config.model
    kv_dim = m.num_kv_heads * m.head_dim
    layer = m.model_dim * (2 * m.model_dim + 2 * kv_dim + 2 * m.mlp_mult * m.model_dim)
    if m.attn_gate != "off":
        layer += m.num_heads * (m.model_dim if m.attn_gate == "dense" else m.attn_gate_width)
    if m.weights != "own":
        layer *= 2 / 3 if m.weights == "random" else 1  # no gradients of maps
        layer += m.weight_rank * ((8 + 2 * m.mlp_mult) * m.model_dim + 2 * kv_dim)
    embed_dim = m.embed_dim or m.model_dim
    head = m.vocab_size * (embed_dim if m.tie_embeddings else m.model_dim)
    if embed_dim < m.model_dim:
        head += m.model_dim * embed_dim * (2 if m.tie_embeddings else 1)
    head += m.bigram_dim * m.model_dim * bool(m.bigram_vocab_size) + m.ve_dim * kv_dim * bool(m.ve_last)
    ends = [end for text in (config.train_batch_schedule, config.train_seq_schedule) for _, end in parse_schedule(text)]
    total = tokens = 0.0
    for start, end in pairwise(sorted({0.0, *ends, config.loop_from, 1.0})):
        batch, length = config.data.stage(start)
        window = min(m.window_size or length, length)
        seen = window - window * (window - 1) / (2 * length)  # keys a query sees, mean over a sequence's positions
        layers = len(m.passes(start >= config.loop_from))
        tokens += (share := (end - start) * batch)
        total += share * (6 * (layers * layer + head) + 12 * layers * seen * m.model_dim)
    return total / tokens


def peak_flops(device: torch.device) -> float | None:
    """Peak operations per second of the device; None if PEAKS does not know it."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if "MIG" in name:  # a part of a card
        return None
    return next((1e12 * peak for part, peak in PEAKS.items() if re.search(rf"\b{part}\b", name)), None)


def utilisation(config: RunConfig, tokens: int, seconds: float, device: torch.device) -> float | None:
    """MFU: operations of the model over the peak of all ranks' GPUs in these seconds; None if that is not known."""
    peak = peak_flops(device)
    if peak is None or seconds <= 0:
        return None
    return flops_per_token(config) * tokens / seconds / (peak * config.world_size)


def peak_memory(device: torch.device) -> int:
    """Peak memory of this process so far in bytes: GPU memory if there is one, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kibibytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
