"""Weights that blocks do not hold: combinations of bases that all blocks share, or fixed random maps that learn little.

A block's matrix of one kind is W = s ⊙ M + U V. M is Σ c_j B_j, its bases B_j held by the generator, or a random map
that a seed makes again. The scales s of rows and the low-rank part U V are the block's own. Coefficients c_j are
learned freely, are Legendre polynomials of depth, or come from a small network on an embedding of the block.

Calibration sees a base in a product of its own for every block. So the inputs of B_j count with c_j² and each block's
scales, and those of U are the outputs of V. Cross terms between bases are left out, as those between two uses are.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgolf_core.knobs import ModelConfig
from pgolf_core.parameters import CONTROL, declare

KINDS = ("attn.c_q", "attn.c_k", "attn.c_v", "attn.proj", "mlp.fc", "mlp.proj")
PACE = 1 / 8  # of learned coefficients; at the rate of other control parameters they would outrun the bases


def legendre(blocks: int, degrees: int) -> Tensor:
    """P_0 to P_(degrees - 1) at depths from -1 to 1, (blocks, degrees), over the root of their mean sum of squares."""
    depth = torch.linspace(-1, 1, blocks, dtype=torch.float64)
    values = [torch.ones_like(depth), depth]
    for j in range(1, degrees - 1):
        values.append(((2 * j + 1) * depth * values[j] - j * values[j - 1]) / (j + 1))
    table = torch.stack(values[:degrees], dim=1)
    return (table / table.square().sum(1).mean().sqrt()).float()


class Generator(nn.Module):
    """Bases of each kind of matrix, and their coefficients by kind and block.

    Learned coefficients begin as those of shared blocks: 1 of base i mod n in block i, 0 of the others.
    """

    start: Tensor

    def __init__(self, config: ModelConfig, donors: list[nn.Module]):
        """donors: n blocks that are left to it; the matrices of donor j become the bases j."""
        super().__init__()
        self.config, kinds, n = config, len(KINDS), len(donors)
        self.bases = nn.ModuleDict(
            {kind.replace(".", "_"): nn.ModuleList(donor.get_submodule(kind) for donor in donors) for kind in KINDS}
        )
        start = torch.eye(n)[torch.arange(config.blocks) % n]
        if config.weights == "hypernetwork":
            width = config.weight_hidden
            self.embedding = nn.Parameter(torch.randn(config.blocks, width))
            self.hidden = nn.Parameter(torch.randn(width, width) / width**0.5)
            self.outputs = nn.Parameter(torch.zeros(kinds, n, width))
        elif config.weight_coefficients == "legendre":
            start = legendre(config.blocks, n)
        else:
            self.table = nn.Parameter(torch.zeros(kinds, config.blocks, n))
        declare(self, CONTROL)
        self.register_buffer("start", start, persistent=False)

    def coefficients(self, kind: int, block: int) -> Tensor:
        """(n,) of the bases of this kind, a place in KINDS."""
        if self.config.weights == "hypernetwork":
            return self.start[block] + PACE * self.outputs[kind] @ torch.tanh(self.hidden @ self.embedding[block])
        if self.config.weight_coefficients == "legendre":
            return self.start[block]
        return self.start[block] + PACE * self.table[kind, block]


class Generated(nn.Module):
    """The linear map of a kind and block, in place of `linear`, which a block was made with."""

    map: Tensor

    def __init__(self, config: ModelConfig, linear: nn.Linear, generator: Generator | None, kind: int, block: int):
        super().__init__()
        (rows, cols), from_zero = linear.weight.shape, KINDS[kind].endswith("proj")
        self.config, self.place, self.scale, self.left = config, (kind, block), None, None
        self.generator = (generator,)  # no submodule: the model alone registers it
        if config.weights == "random":
            seeded = torch.Generator().manual_seed((config.weight_seed << 20) + len(KINDS) * block + kind)
            drawn = torch.empty(rows, cols).uniform_(-(cols**-0.5), cols**-0.5, generator=seeded)
            self.register_buffer("map", drawn, persistent=False)
        if config.weights == "random" or config.weight_row_scale:
            unscaled = torch.zeros if from_zero and config.weights == "random" else torch.ones
            self.scale = nn.Parameter(unscaled(rows))
            declare(self, CONTROL, "scale")
        if config.weight_rank:
            role = vars(linear)["parameter_roles"]["weight"]
            self.right = declare(nn.Linear(cols, config.weight_rank, bias=False), role)
            self.left = declare(nn.Linear(config.weight_rank, rows, bias=False), role)
            nn.init.zeros_(self.left.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., cols) -> (..., rows)."""
        y = self.shared(x)
        if self.scale is not None:
            y = self.scale.to(y.dtype) * y
        return y if self.left is None else y + self.left(self.right(x))

    def shared(self, x: Tensor) -> Tensor:
        """M x."""
        if self.config.weights == "random":
            return F.linear(x, self.map)
        (generator,), (kind, block) = self.generator, self.place
        bases: Any = generator.bases[KINDS[kind].replace(".", "_")]
        parts: Any = zip(generator.coefficients(kind, block), bases, strict=True)
        if x.requires_grad and not bases[0].weight.requires_grad:  # activations alone have gradients: calibration
            y: Any = sum(c.to(x.dtype) * base(x) for c, base in parts)
            return y
        weight: Any = sum(c * base.weight for c, base in parts)
        return F.linear(x, weight)


def generate(config: ModelConfig, blocks: nn.ModuleList, donors: list[nn.Module]) -> Generator | None:
    """Replace the blocks' matrices by generated ones; returns what they share, None for random maps."""
    generator = None if config.weights == "random" else Generator(config, donors)
    for i, block in enumerate(blocks):
        for kind, path in enumerate(KINDS):
            part, name = path.split(".")
            holder = block.get_submodule(part)
            setattr(holder, name, Generated(config, getattr(holder, name), generator, kind, i))
    return generator
