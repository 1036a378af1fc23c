"""Exact score of the model with one tensor changed at a time.

The scores are those of `evaluate` for each such model, to the last bit. Outputs of the blocks before the first use of
the changed one are recorded once and replayed.
"""

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
from pgolf_core.tokens import ByteTable

Changes = dict[str, Tensor]  # parameter name -> tensor of its shape


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
