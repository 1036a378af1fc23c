"""Bits per byte of a model on validation tokens: standard windows, sliding windows, sidecar.

bpb = (nats of the scored tokens / ln 2) / (UTF-8 bytes of the text they spell).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgolf_core.config import EvalConfig
from pgolf_core.data import ByteTable


@dataclass(frozen=True)
class Score:
    """val_loss in mean nats a token, val_bpb in bits a byte, over `tokens` targets that spell `bytes` bytes."""

    val_loss: float
    val_bpb: float
    tokens: int
    bytes: int


def windows(targets: int, length: int, stride: int) -> list[tuple[int, int]]:
    """(start, first scored target) of every window over a stream of `targets` targets.

    stride 0: side by side, each scored whole. Otherwise every `stride`, and a last one flush with the end;
    a target is scored in the first window that reaches it, which is the one with the longest context for it.
    """
    if not stride:
        return [(start, start) for start in range(0, targets - length + 1, length)]
    starts = list(range(0, targets - length + 1, stride))
    if starts[-1] + length < targets:
        starts.append(targets - length)
    ends = [0] + [start + length for start in starts]
    return list(zip(starts, ends, strict=False))


def sidecar(logits: Tensor, ids: Tensor, config: EvalConfig) -> Tensor:
    """Raise the logits (B, T, V) of tokens seen lately in ids (B, T), and of what followed the current one.

    Looking back lag = 1..size: the token `lag` back gets cache_mix/lag, and bigram_mix/lag more where the
    token before it equals the current one. Delay 1 does all this one position late, as the reference did:
    it never sees the current token. Source: reference.md, 'Sidecar'.
    """
    B, T = ids.shape
    delay = config.eval_cache_delay
    logits = logits.clone()
    for lag in range(1, min(config.eval_cache_size, T) + 1):
        first = lag - 1 + delay  # the first position whose candidate ids[t - first] exists
        if first >= T:
            break
        weight = torch.full((B, T - first), config.eval_cache_mix_weight / lag, device=ids.device)
        if first + 1 < T:  # the token before the candidate exists from the next position on
            follows = ids[:, lag : T - delay] == ids[:, : T - delay - lag]
            weight[:, 1:] += follows * (config.eval_bigram_mix_weight / lag)
        logits[:, first:].scatter_add_(2, ids[:, : T - first, None], weight[:, :, None].to(logits.dtype))
    return logits


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    tokens: Tensor,
    byte_table: ByteTable,
    config: EvalConfig,
    dtype: torch.dtype = torch.float32,
) -> Score:
    """Score tokens (n,): each but the first is a target. Other dtypes than float32 run under autocast.

    Raises ValueError where tokens hold no whole window.
    """
    L = config.eval_seq_len
    if L == 0:
        raise ValueError("eval_seq_len=0: give the window in tokens, or take RunConfig.eval, which resolves it")
    if tokens.numel() <= L:
        raise ValueError(f"{tokens.numel()} validation tokens hold no window of eval_seq_len={L} and its target")
    device = next(model.parameters()).device
    tokens = tokens.to(device)
    spans = windows(tokens.numel() - 1, L, config.eval_stride)
    batch = config.sw_eval_batch if config.eval_stride else max(1, config.val_batch_size // L)
    training = model.training
    model.eval()
    sums = torch.device("cpu") if device.type == "mps" else device
    byte_table = byte_table.to(sums)
    nats = torch.zeros((), dtype=torch.float64, device=sums)
    byte_count = torch.zeros((), dtype=torch.int64, device=sums)
    count = 0
    offsets = torch.arange(L, device=device)
    for i in range(0, len(spans), batch):
        start, first = torch.tensor(spans[i : i + batch], device=device).unbind(1)
        position = start[:, None] + offsets  # (B, L), the index of each input token
        x, y = tokens[position], tokens[position + 1]
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            logits = model(x)
        logits = logits.float()
        if config.eval_cache_size:
            logits = sidecar(logits, x, config)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none")
        if device.type == "mps":  # has no float64 to sum in
            loss, x, y, position, first = loss.cpu(), x.cpu(), y.cpu(), position.cpu(), first.cpu()
        scored = (position >= first[:, None]).flatten()
        nats += loss[scored].sum(dtype=torch.float64)
        byte_count += byte_table.count(x.flatten()[scored], y.flatten()[scored])
        count += sum(s + L - max(s, f) for s, f in spans[i : i + batch])
    model.train(training)
    val_loss = nats.item() / count
    return Score(val_loss, val_loss / math.log(2) * count / byte_count.item(), count, byte_count.item())
