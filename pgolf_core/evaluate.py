"""Bits per byte of a model on validation tokens: standard windows, sliding windows, n-gram cache, n-gram tilt.

bpb = (nats of the scored tokens / ln 2) / (UTF-8 bytes of the text they spell).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgolf_core.device import autocast
from pgolf_core.knobs import EvalConfig
from pgolf_core.tilt import hints_of, tilted
from pgolf_core.tokens import ByteTable

BLOCKS = 64  # parts whose losses a score keeps, for tests of differences
CPU_TOKENS = 2048  # tokens per batch on a CPU: activations stay in its caches
MAX_LOGITS = 1 << 29  # float32 logits per batch: 2 GB, and 2 GB in cross-entropy


@dataclass(frozen=True)
class Score:
    """val_loss in mean nats per token, val_bpb in bits per byte, over `tokens` targets that spell `bytes` bytes.

    block_nats: nats of up to BLOCKS consecutive parts of the windows; they sum to val_loss · tokens.
    """

    val_loss: float
    val_bpb: float
    tokens: int
    bytes: int
    block_nats: tuple[float, ...]


def windows(targets: int, length: int, stride: int) -> list[tuple[int, int]]:
    """(start, first scored target) of every window over a stream of `targets` targets.

    Windows begin every `stride` targets (0: side by side), and a last one ends flush with the stream. A target is
    scored in the first window that reaches it, the one with the longest context for it.
    """
    starts = list(range(0, targets - length + 1, stride or length))
    if starts[-1] + length < targets:
        starts.append(targets - length)
    ends = [0] + [start + length for start in starts]
    return list(zip(starts, ends, strict=False))


def all_windows(tokens: Tensor, config: EvalConfig) -> list[tuple[int, int]]:
    """`windows` over tokens (n,), each but the first a target. Raises ValueError if not one is whole."""
    L = config.eval_seq_len
    if L == 0:
        raise ValueError("eval_seq_len=0: give the window in tokens, or take RunConfig.eval, which resolves it")
    if tokens.numel() <= L:
        raise ValueError(f"{tokens.numel()} validation tokens hold no window of eval_seq_len={L} and its target")
    return windows(tokens.numel() - 1, L, config.eval_stride)


def ngram_cache(logits: Tensor, ids: Tensor, config: EvalConfig) -> Tensor:
    """Raise the logits (B, T, V) of recent tokens in ids (B, T), and of tokens that followed the current one.

    For lag = 1..size the token `lag` back gets cache_mix/lag, and bigram_mix/lag more if the token before it equals
    the current one. Delay 1 does all this one position late, as the reference did: it never sees the current token.
    """
    B, T = ids.shape
    delay = config.eval_cache_delay
    logits = logits.clone()
    for lag in range(1, min(config.eval_cache_size, T) + 1):
        first = lag - 1 + delay  # the first position whose candidate ids[t - first] exists
        if first >= T:
            break
        weight = torch.full((B, T - first), config.eval_cache_mix_weight / lag, device=ids.device)
        if first + 1 < T:  # candidates of later positions have a token before them
            follows = ids[:, lag : T - delay] == ids[:, : T - delay - lag]
            weight[:, 1:] += follows * (config.eval_bigram_mix_weight / lag)
        logits[:, first:].scatter_add_(2, ids[:, : T - first, None], weight[:, :, None].to(logits.dtype))
    return logits


@dataclass(frozen=True)
class Batch:
    """Windows that are scored together; scored and bytes are on summing_device."""

    ids: Tensor  # (B, T)
    targets: Tensor  # (B, T)
    scored: Tensor  # (B·T,) bool, whether a target counts
    tokens: int  # targets that count
    bytes: Tensor  # UTF-8 bytes of these, () int64
    windows: slice  # place among all windows
    hints: Tensor | None  # (B, T) of the n-gram tilt


def batches(
    tokens: Tensor, byte_table: ByteTable, config: EvalConfig, device: torch.device, every: int = 1, ranks=None
) -> Iterator[Batch]:
    """Batches of every `every`-th window of tokens (n,), smaller than the knobs say if CPU_TOKENS or MAX_LOGITS asks.

    ranks: distributed.Ranks; the batches are dealt out to them in turn, and this rank makes its own alone.
    """
    L = config.eval_seq_len
    spans = all_windows(tokens, config)[::every]
    tokens = tokens.to(device)
    sums = summing_device(device)
    sizes = byte_table.sizes(tokens).to(sums)
    hints = hints_of(tokens, config) if config.eval_tilt_boost else None
    batch = config.sw_eval_batch if config.eval_stride else config.val_batch_size // L
    most = min(MAX_LOGITS // len(byte_table.base_bytes), CPU_TOKENS if device.type == "cpu" else MAX_LOGITS)
    batch = max(1, min(batch, most // L))
    offsets = torch.arange(L, device=device)
    rank, size = (ranks.rank, ranks.size) if ranks else (0, 1)
    for i in range(rank * batch, len(spans), size * batch):
        start, first = torch.tensor(spans[i : i + batch], device=device).unbind(1)
        index = start[:, None] + offsets  # (B, L), of each input token
        x, y = tokens[index], tokens[index + 1]
        scored = (index >= first[:, None]).flatten().to(sums)
        byte_count = sizes[index.flatten().to(sums)[scored]].sum(dtype=torch.int64)
        count = sum(s + L - max(s, f) for s, f in spans[i : i + batch])
        yield Batch(x, y, scored, count, byte_count, slice(i, i + len(x)), None if hints is None else hints[index])


def summing_device(device: torch.device) -> torch.device:
    """Device of float64 sums: the model's own, except for mps, which has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def scored_logits(logits: Tensor, batch: Batch, config: EvalConfig) -> Tensor:
    """The model's logits (B, T, V) in float32, with n-gram cache and tilt: their softmax is what is scored."""
    logits = logits.float()
    if config.eval_cache_size:
        logits = ngram_cache(logits, batch.ids, config)
    if config.eval_tilt_boost:
        logits = tilted(logits, batch.hints, config.eval_tilt_boost)
    return logits


def scored_nats(logits: Tensor, batch: Batch, config: EvalConfig) -> Tensor:
    """Sum of the loss over each window's scored targets, (B,) float64, from logits (B, T, V)."""
    logits = scored_logits(logits, batch, config)
    loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
    loss = loss.to(batch.scored.device).where(batch.scored, 0)
    return loss.view(batch.ids.shape).sum(1, dtype=torch.float64)


def score_of(nats: Tensor, tokens: int, text_bytes: int) -> Score:
    """The score of all windows: nats (windows,) float64 as scored_nats gives them."""
    blocks = tuple(part.sum().item() for part in nats.cpu().tensor_split(min(BLOCKS, len(nats))))
    val_loss = math.fsum(blocks) / tokens
    return Score(val_loss, val_loss / math.log(2) * tokens / text_bytes, tokens, text_bytes, blocks)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation and inference mode inside the block; yields the model's device."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield next(model.parameters()).device
    finally:
        model.train(training)


def evaluate(
    model: nn.Module, tokens: Tensor, byte_table: ByteTable, config: EvalConfig, dtype=torch.float32, ranks=None
) -> Score:
    """Score tokens (n,): each but the first is a target. Other dtypes than float32 run under autocast.

    ranks: distributed.Ranks with the same model; each scores its share of the batches, and all get the same score.
    Raises ValueError if tokens hold no whole window.
    """
    with evaluating(model) as device:
        nats = torch.zeros(len(all_windows(tokens, config)), dtype=torch.float64, device=summing_device(device))
        counts = torch.zeros(2, dtype=torch.int64, device=nats.device)  # tokens, bytes
        for batch in batches(tokens, byte_table, config, device, ranks=ranks):
            with autocast(device, dtype):
                logits = model(batch.ids)
            nats[batch.windows] = scored_nats(logits, batch, config)
            counts[0] += batch.tokens
            counts[1] += batch.bytes
        if ranks:  # windows of other ranks are zeros, so the sum is exact
            ranks.add_(nats)
            ranks.add_(counts)
    return score_of(nats, *counts.tolist())
