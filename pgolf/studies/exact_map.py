"""Score of the model with one tensor changed at a time, exact and estimated.

The exact scores are those of `evaluate` for each such model, to the last bit. Outputs of the blocks before the first
use of the changed one are recorded once and replayed. The estimate needs no evaluation: the change times the
gradient, plus half its square times the Fisher information.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import count

import torch
from torch import Tensor
from torch.func import functional_call

from pgolf_core.evaluate import Score, batches, evaluating, score_of, scored_nats
from pgolf_core.knobs import EvalConfig
from pgolf_core.model import GPT
from pgolf_core.parameters import roles_of
from pgolf_core.quantization.calibration import Calibration
from pgolf_core.tokens import ByteTable

Changes = dict[str, Tensor]  # parameter name -> tensor of its shape

GRADIENT_WINDOWS = 2  # the estimate's gradient is of every second window
GRADIENT_BATCH_TOKENS = 4096  # activations of so many are held at a time


def exact_scores(
    model: GPT,
    changes: Changes,
    tokens: Tensor,
    byte_table: ByteTable,
    config: EvalConfig,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Score]:
    """Name -> score of the model with that one tensor changed, and '' -> its own; bit-equal to `evaluate`'s.

    Other arguments as in `evaluate`. The model is left as it was.
    Memory: evaluating a batch, plus an output (B, T, D) per layer. Raises ValueError on a tensor that the model has
    not, or not of that shape.
    """
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    if wrong := [name for name, changed in changes.items() if shapes.get(name) != changed.shape]:
        raise ValueError(f"the model has no tensor {wrong[0]} of shape {tuple(changes[wrong[0]].shape)}")
    nats, text_bytes, targets = {name: [] for name in ("", *changes)}, 0, 0
    with evaluating(model) as device:
        casting = partial(torch.autocast, device.type, dtype=dtype, enabled=dtype != torch.float32)
        for batch in batches(tokens, byte_table, config, device):
            for name, logits in _variants(model, changes, batch.ids, casting):
                nats[name].append(scored_nats(logits, batch, config))
            text_bytes += batch.bytes
            targets += batch.tokens
    return {name: score_of(torch.cat(parts), targets, text_bytes.item()) for name, parts in nats.items()}


def _variants(
    model: GPT, changes: Changes, ids: Tensor, casting: Callable[[], AbstractContextManager]
) -> Iterator[tuple[str, Tensor]]:
    """Logits (B, T, V) of ids (B, T): unchanged under '', then with each tensor changed under its name.

    Any order of blocks is right, since the order is that of the calls the unchanged model makes. A change outside
    the blocks replays nothing, but for the head, which replays all. Each pass has an autocast of its own, because
    autocast keeps the weights that it has cast.
    """
    roles, used, outputs = roles_of(model), [], []

    def record(block: int, forward: Callable, *inputs):
        used.append(block)
        outputs.append(forward(*inputs))
        return outputs[-1]

    with _blocks_called_by(record, model), casting():
        logits = model(ids)
    yield "", logits
    for name, changed in changes.items():
        block = roles[name].block
        if block is None:
            first = len(used) if roles[name].kind == "head" else 0
        else:
            first = used.index(block) if block in used else len(used)
        calls = count()

        def replay(block: int, forward: Callable, *inputs, first: int = first, calls: Iterator[int] = calls):
            call = next(calls)
            return outputs[call] if call < first else forward(*inputs)

        with _blocks_called_by(replay, model), casting():
            logits = functional_call(model, {name: changed.to(model.get_parameter(name))}, ids)
        yield name, logits


@contextmanager
def _blocks_called_by(call: Callable, model: GPT) -> Iterator[None]:
    """Inside the block, block b of the model run on inputs is call(b, its own forward, *inputs)."""
    for index, block in enumerate(model.blocks):
        block.forward = partial(call, index, block.forward)
    try:
        yield
    finally:
        for block in model.blocks:
            del block.forward  # the class's own is visible again


def estimated_rises(
    model: GPT, changes: Changes, tokens: Tensor, byte_table: ByteTable, config: EvalConfig, calibration: Calibration
) -> dict[str, float]:
    """Name -> predicted rise in bits per byte on tokens (n,) when that one tensor of the float32 model is changed.

    First order: gradient · change of the scored loss, on every second window of these very tokens. Second order:
    half of Fisher · change², from `calibrate` on training text. An export never sees the former:
    it is most of what there is in small changes and in late layers.
    Limits: the first order is half a sample, so rises below about 1e-4 bpb (8 bits) come in no reliable order. The
    second order takes weights and positions for independent and the loss for a parabola; it is two to five times
    too low for mlp.fc, and worse for changes that ruin the model.
    """
    windows = max(1, GRADIENT_BATCH_TOKENS // config.eval_seq_len)
    small = config.model_copy(update={"val_batch_size": GRADIENT_BATCH_TOKENS, "sw_eval_batch": windows})
    device, targets, text_bytes = next(model.parameters()).device, 0, 0
    for batch in batches(tokens, byte_table, small, device, every=GRADIENT_WINDOWS):
        scored_nats(model(batch.ids), batch, small).sum().backward()
        targets += batch.tokens
        text_bytes += batch.bytes.item()
    bpb_per_nat = targets / text_bytes / math.log(2)
    rises = {}
    for name, changed in changes.items():
        weight = model.get_parameter(name)
        change = changed.float().cpu() - weight.detach().float().cpu()
        first = (weight.grad.cpu() / targets * change).sum(dtype=torch.float64).item()
        second = calibration[name].cost(change) if name in calibration else 0.0
        rises[name] = (first + second) * bpb_per_nat
    model.zero_grad()
    return rises
