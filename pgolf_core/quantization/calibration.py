"""Per-weight loss sensitivity: second moments of inputs and of gradients, from one pass over training text.

The gradient of a weight is a sum over tokens of (gradient of the output) ⊗ (input). If the logits' gradients are
random with the Fisher information as their second moments (`fisher_root`), so is the mean square of the weight's: the
curvature of the loss where the model fits its data. Half of Fisher · (change)² then predicts what a change of the
weight costs, in nats per token.

Weights are recorded by use: each lookup in a declared table and each product of activations with a declared matrix,
however often and by whichever module it is called, adds token by token to that weight's statistics; cross terms
between two uses are left out. Any other use (a weight that generates weights, one that is cut or summed) is recorded
as the squared gradient of a whole sequence: unbiased too, since the logits' gradients are independent, but noisier.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pgolf_core.device import autocast
from pgolf_core.parameters import RoleError, roles_of

PIECE = 1024  # tokens of a backward pass on a CPU: activations stay in its caches
PANEL = 128  # rows of second moments that are added at a time
PRODUCTS = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)


@dataclass
class Statistics:
    """Sums over `tokens` tokens for one weight (rows, cols); float32.

    row_fisher (rows,): squares of the gradient, token by token, summed over each row.
    hessian (cols, cols): second moments of the inputs, each token weighted by its gradient's squared norm.
    """

    row_fisher: Tensor
    hessian: Tensor
    tokens: int = 0

    @property
    def row_weight(self) -> Tensor:
        """(rows,): the Fisher information of row i is nearly row_weight[i] · hessian."""
        return self.row_fisher / self.hessian.diagonal().sum().clamp_min(1e-30)

    def cost(self, change: Tensor) -> float:
        """Predicted rise of the loss in nats per token when the weight changes by (rows, cols)."""
        change = change.float()
        return 0.5 * (self.row_weight @ (change @ self.hessian * change).sum(1)).item() / self.tokens

    def add_product(self, rows: Tensor, cols: Tensor) -> None:
        """Add gradients of n tokens, each rows (n, R) ⊗ cols (n, C); below its diagonal hessian is left incomplete.

        In float32: rounded to bfloat16, sums of few tokens have no Cholesky factor.
        """
        rows, cols = rows.flatten(0, -2).float(), cols.flatten(0, -2).float()
        squares = rows.square()
        self.row_fisher.addmv_(squares.T, cols.square().sum(1))
        weighted = cols * squares.sum(1, keepdim=True)
        for i in range(0, cols.size(1), PANEL):  # the upper triangle, since it is symmetric
            self.hessian[i : i + PANEL, i:].addmm_(weighted[:, i : i + PANEL].T, cols[:, i:])

    def add_lookup(self, ids: Tensor, cols: Tensor) -> None:
        """Add gradients of n lookups: cols (n, C) in the row of each id."""
        ids, cols = ids.flatten(), cols.flatten(0, -2).float()
        self.row_fisher.index_add_(0, ids, cols.square().sum(1))
        self.hessian.addmm_(cols.T, cols)


Calibration = dict[str, Statistics]


def calibrate(
    model: nn.Module, sequences: Iterable[Tensor], seed: int = 0, dtype: torch.dtype = torch.float32
) -> Calibration:
    """Statistics, on the CPU, of every declared weight that is no control parameter.

    sequences: token ids, (B, T) int64 each. seed: of the signs. dtype: of matrix products, by autocast if it is not
    float32. The model is run in evaluation mode and left as it was. Raises RoleError naming a weight that it does not
    use.
    """
    device, generator = next(model.parameters()).device, torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {
        name: model.get_parameter(name) for name, role in roles_of(model).items() if not role.is_control
    }
    zeros = partial(torch.zeros, device=device)
    sums = {name: Statistics(zeros(len(w)), zeros(w.size(1), w.size(1))) for name, w in weights.items()}
    batches = list(sequences)
    with _without_weight_gradients(model):
        with _Recorder(weights, sums) as probe, autocast(device, dtype):
            model(batches[0][:1].to(device))
        recorder = _Recorder({name: weights[name] for name in probe.used}, sums)
        by_sequence = {name: w.requires_grad_() for name, w in weights.items() if name not in probe.used}
        for part in (part for batch in batches for part in batch.split(1 if by_sequence else len(batch))):
            few = max(1, PIECE // part.size(1)) if device.type == "cpu" else len(part)
            for ids in part.split(few):
                with recorder, autocast(device, dtype):
                    logits = model(ids.to(device)).float().flatten(0, 1)
                logits.backward(fisher_root(logits.detach(), generator))
            for name, weight in by_sequence.items():
                if weight.grad is None:
                    raise RoleError(f"weight {name} is declared, but the model does not use it")
                sums[name].add_lookup(torch.arange(len(weight), device=device), weight.grad)
                weight.grad = None
    tokens = sum(batch.numel() for batch in batches)
    whole = {name: (s.hessian.triu() + s.hessian.triu(1).T).cpu() for name, s in sums.items()}
    return {name: Statistics(s.row_fisher.cpu(), whole[name], tokens) for name, s in sums.items()}


def fisher_root(logits: Tensor, generator: torch.Generator) -> Tensor:
    """(n, V): random vectors whose second moments are the Fisher information of logits (n, V), diag(p) - p pᵀ.

    Random signs s (Hutchinson, 1989) make it √p·s - p·Σ√p·s. Gradients e_label - p of labels drawn from p have the same
    second moments; where p is peaked, their norms vary more.
    """
    p = logits.softmax(-1)
    signs = 1 - 2 * torch.randint(2, p.shape, generator=generator, dtype=torch.int8)
    root = p.sqrt().mul_(signs.to(p.device))
    return root.addcmul_(p, root.sum(1, keepdim=True), value=-1)


@contextmanager
def _without_weight_gradients(model: nn.Module) -> Iterator[None]:
    """Inside the block only activations have gradients, and the model is in evaluation mode."""
    training, wanted = model.training, {p: p.requires_grad for p in model.parameters()}
    model.eval().requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        model.train(training)
        for parameter, requires_grad in wanted.items():
            parameter.requires_grad_(requires_grad)


class _Recorder(TorchFunctionMode):
    """Inside `with`, lookups in and products with the weights (name -> parameter) will add to their statistics.

    A product counts if its other side has a gradient, which begins at the lookups: then it is made of activations.
    `used` names the weights that were seen.
    """

    def __init__(self, weights: dict[str, Tensor], calibration: Calibration):
        super().__init__()
        self.calibration, self.used = calibration, set()
        self.known = {_memory(w.mT): (name, True) for name, w in weights.items()}  # whether transposed
        self.known |= {_memory(w): (name, False) for name, w in weights.items()}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func is F.embedding or func is F.linear or func in PRODUCTS:
            left, right = _operands(*args, **kwargs)
            if func in PRODUCTS and right.ndim > 1:
                right = right.mT
            for name, add in self.uses(func, left, right):
                self.used.add(name)
                if not output.requires_grad:  # a lookup; its copy may be changed in place
                    output = output.requires_grad_().clone()
                output.register_hook(add)
        return output

    def uses(self, func: Callable, left: Tensor, right: Tensor) -> Iterator[tuple[str, Callable[[Tensor], None]]]:
        """Name of each side that is a weight, and the function that adds a gradient of the output to its statistics.

        The output is left @ right.T, whose transpose is right @ left.T, or the rows left of the table right.
        """
        for x, weight, flipped in ((left, right, False), (right, left, True)):
            name, transposed = self.known.get(_memory(weight), ("", False))
            if name and func is F.embedding:
                yield name, partial(self.calibration[name].add_lookup, x)
            elif name and x.requires_grad:
                yield name, partial(self.add_product, name, transposed, flipped, x.detach())

    def add_product(self, name: str, transposed: bool, flipped: bool, x: Tensor, gradient: Tensor) -> None:
        """Add a gradient of x @ weight.T, or x @ weight if transposed; if flipped, of that product's transpose."""
        rows, cols = gradient.mT if flipped else gradient, x
        self.calibration[name].add_product(*((cols, rows) if transposed else (rows, cols)))


def _operands(input: Tensor, other: Tensor | None = None, *args, weight: Tensor | None = None, **kwargs) -> tuple:
    return input, other if weight is None else weight


def _memory(t: Tensor) -> tuple:
    """Equal for a weight and a whole view of it."""
    return t.data_ptr(), t.shape, t.stride()
