"""Floating-point operations of a training step, and the share of a GPU's peak that a run reached (MFU)."""

import re

import torch

from pgolf_core.config import RunConfig

# Dense bfloat16 products with float32 sums, operations per second, by a part of CUDA's device name. Source: the
# makers' data sheets; the first match counts.
PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090 Ti": 80e12,
    "RTX 3090": 71e12,
    "V100": 125e12,  # float16: it has no bfloat16
}


def flops_per_token(config: RunConfig) -> float:
    """Operations of forward and backward: 6 per weight that a token is multiplied with, 12 per pair it attends to.

    Weights of shared blocks count in every layer that uses them, the embedding as output matrix only. Pairs are those
    that causal attention and the window leave: half as many as in formulas without a mask.
    """
    m = config.model
    kv_dim = m.num_kv_heads * m.head_dim
    layer = m.model_dim * (2 * m.model_dim + 2 * kv_dim + 2 * m.mlp_mult * m.model_dim)
    embed_dim = m.embed_dim or m.model_dim
    head = m.vocab_size * (embed_dim if m.tie_embeddings else m.model_dim)
    if embed_dim < m.model_dim:
        head += m.model_dim * embed_dim * (2 if m.tie_embeddings else 1)
    length = config.train_seq_len
    window = min(m.window_size or length, length)
    seen = window - window * (window - 1) / (2 * length)  # keys a query sees, mean over the positions of a sequence
    return 6 * (m.num_layers * layer + head) + 12 * m.num_layers * seen * m.model_dim


def peak_flops(device: torch.device) -> float | None:
    """Peak operations per second of the device; None if PEAKS does not know it."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if "MIG" in name:  # a part of a card
        return None
    return next((peak for part, peak in PEAKS.items() if re.search(rf"\b{part}\b", name)), None)


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
    import psutil

    info = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"):  # Windows
        return info.peak_wset
    import resource  # not on Windows

    unit = 1 if torch.backends.mps.is_built() else 1024  # macOS counts bytes, Linux kibibytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
