"""What the loss feels of each weight: second moments of its inputs and gradients, from one pass over training text.

The gradient of a weight is a sum over tokens of (gradient of the output) ⊗ (input). With labels drawn from the
model itself its mean square is the Fisher information, which is the curvature of the loss where the model fits
its data, so half of Fisher · (change)² predicts what a change of the weight costs, in nats a token.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgolf.data.dataset import Dataset
from pgolf_core.batches import TokenStream
from pgolf_core.config import RunConfig
from pgolf_core.model import GPT
from pgolf_core.parameters import roles_of

CALIBRATION_BATCH_TOKENS = 8192  # activations and gradients of so many are held at a time


@dataclass
class Statistics:
    """Of one weight (rows, cols), summed over `tokens` tokens; float32, on the CPU once calibrate returns.

    row_fisher (rows,): squares of the gradient, token by token, summed over each row.
    fisher (rows, cols): the same, not summed; None where the second moments are collected.
    hessian (cols, cols): second moments of the inputs, each token weighted by its gradient's squared norm.
    """

    row_fisher: Tensor
    fisher: Tensor | None
    hessian: Tensor | None
    tokens: int = 0

    @property
    def row_weight(self) -> Tensor:
        """(rows,): the Fisher information of row i is nearly row_weight[i] · hessian."""
        return self.row_fisher / self.hessian.diagonal().sum().clamp_min(1e-30)

    def cost(self, change: Tensor) -> float:
        """Predicted rise of the loss in nats a token when the weight changes by (rows, cols)."""
        change = change.float()
        if self.hessian is None:
            return 0.5 * (self.fisher * change.square()).sum().item() / self.tokens
        return 0.5 * (self.row_weight @ (change @ self.hessian * change).sum(1)).item() / self.tokens


Calibration = dict[str, Statistics]


def calibrate(
    model: GPT, config: RunConfig, dataset: Dataset, tokens: int, hessians: bool = True, seed: int = 0
) -> Calibration:
    """Statistics of every 2-D weight from the first `tokens` tokens of the training split, in one pass.

    With hessians the second moments are collected, which rounding needs; without them the whole diagonal of the
    Fisher information, which is enough to estimate and cheaper. Tokens are rounded up to whole sequences of
    train_seq_len.
    """
    device = next(model.parameters()).device
    calibration: Calibration = {}
    roles = roles_of(model)
    for name, parameter in model.named_parameters():
        if not roles[name].is_control:
            rows, cols = parameter.shape
            fisher = None if hessians else torch.zeros(rows, cols, device=device)
            hessian = torch.zeros(cols, cols, device=device) if hessians else None
            calibration[name] = Statistics(torch.zeros(rows, device=device), fisher, hessian)
    generator = torch.Generator().manual_seed(seed)
    with _recording(model, calibration):
        for ids in _sequences(config, dataset, tokens):
            _one_batch(model, ids.to(device), calibration, generator)
    for statistics in calibration.values():
        for name in ("row_fisher", "fisher", "hessian"):
            value = getattr(statistics, name)
            setattr(statistics, name, None if value is None else value.cpu())
    return calibration


def _sequences(config: RunConfig, dataset: Dataset, tokens: int) -> Iterator[Tensor]:
    """(B, T) token ids in the order of the training stream."""
    stream, length = TokenStream(dataset.train_shards), config.train_seq_len
    left = -(-tokens // length)
    while left:
        count = min(left, max(1, CALIBRATION_BATCH_TOKENS // length))
        yield torch.from_numpy(stream.take(count * length).astype("int64")).view(count, length)
        left -= count


def _one_batch(model: GPT, ids: Tensor, calibration: Calibration, generator: torch.Generator) -> None:
    """Forward, labels from the model's own distribution, backward; the hooks see the rest."""
    hidden = model.hidden(ids)
    logits = model.head(hidden)
    logits.retain_grad()
    probabilities = logits.detach().float().softmax(-1).flatten(0, 1)
    drawn = torch.multinomial(probabilities.cpu(), 1, generator=generator).flatten().to(ids.device)
    F.cross_entropy(logits.float().flatten(0, 1), drawn, reduction="sum").backward()
    cap = model.config.logit_softcap
    before_cap = (logits.grad * (1 - (logits.detach() / cap).square())).flatten(0, 1).float()
    if model.lm_head is None:
        inputs = hidden.detach().flatten(0, 1).float()
        if model.tok_emb_proj is not None:  # used a second time, transposed
            projection = model.tok_emb_proj.weight.detach().float()
            inner = before_cap @ model.tok_emb.weight.detach().float()
            _add(calibration["tok_emb_proj.weight"], inputs, inner)
            inputs = inputs @ projection
        _add(calibration["tok_emb.weight"], before_cap, inputs)
    else:
        _add(calibration["lm_head.weight"], before_cap, hidden.detach().flatten(0, 1).float())
    for statistics in calibration.values():
        statistics.tokens += ids.numel()
    model.zero_grad(set_to_none=True)


def _add(statistics: Statistics, rows: Tensor, cols: Tensor) -> None:
    """Gradients of n tokens, each rows (n, R) ⊗ cols (n, C), into the sums."""
    squares = rows.square()
    statistics.row_fisher.addmv_(squares.T, cols.square().sum(1))
    if statistics.fisher is not None:
        statistics.fisher.addmm_(squares.T, cols.square())
    if statistics.hessian is not None:
        weighted = cols * squares.sum(1, keepdim=True)
        statistics.hessian.addmm_(weighted.T, cols)


@contextmanager
def _recording(model: GPT, calibration: Calibration) -> Iterator[None]:
    """Inside the block every linear layer and the embedding record inputs and gradients as they are used."""

    def linear(name: str):
        def after_forward(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            seen = inputs[0].detach().flatten(0, -2)
            output.register_hook(
                lambda gradient: _add(calibration[name], gradient.flatten(0, -2).float(), seen.float())
            )

        return after_forward

    def embedding(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        def after_backward(gradient: Tensor) -> None:
            statistics, ids = calibration["tok_emb.weight"], inputs[0].flatten()
            gradient = gradient.flatten(0, -2).float()
            squares = gradient.square()
            statistics.row_fisher.index_add_(0, ids, squares.sum(1))  # the rows of a lookup are one-hot
            if statistics.fisher is not None:
                statistics.fisher.index_add_(0, ids, squares)
            if statistics.hessian is not None:
                statistics.hessian.addmm_(gradient.T, gradient)

        output.register_hook(after_backward)

    handles = [model.tok_emb.register_forward_hook(embedding)]
    for name, module in model.named_modules():
        # A separate head gets its gradient before the soft cap from _one_batch, as the tied one does.
        if isinstance(module, nn.Linear) and module is not model.lm_head:
            handles.append(module.register_forward_hook(linear(f"{name}.weight")))
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
