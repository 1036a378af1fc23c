"""Generated weights: matrices of blocks as combinations of shared bases, or as fixed random maps with a low-rank part.

A block's matrix of one kind is W = s ⊙ M + U V. M is Σ c_j B_j, with bases B_j that all blocks share, or a random map
that its seed reproduces. The row scales s and the low-rank part U V are the block's own. The coefficients c_j are free
parameters, Legendre polynomials of depth, or the outputs of a hypernetwork (Ha et al. 2016,
https://arxiv.org/abs/1609.09106) on an embedding of the block.

Calibration applies each base separately in every block. So in the statistics of B_j each block counts with c_j² and
its scales, and the inputs of U are the outputs of V. Cross terms between bases are neglected, as are those between two
uses of one matrix.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgolf_core.knobs import ModelConfig
from pgolf_core.parameters import CONTROL, declare

KINDS = ("attn.c_q", "attn.c_k", "attn.c_v", "attn.proj", "mlp.fc", "mlp.proj")
PACE = 1 / 8  # factor of learned coefficients: at the full rate of control parameters they would outrun the bases


def legendre(blocks: int, degrees: int) -> Tensor:
    """P_0 to P_(degrees - 1) at depths -1 to 1: (blocks, degrees), a block's sum of squares being 1 on average."""
    depth = torch.linspace(-1, 1, blocks, dtype=torch.float64)
    values = [torch.ones_like(depth), depth]
    for j in range(1, degrees - 1):
        values.append(((2 * j + 1) * depth * values[j] - j * values[j - 1]) / (j + 1))
    table = torch.stack(values[:degrees], dim=1)
    return (table / table.square().sum(1).mean().sqrt()).float()


class Generator(nn.Module):
    """n bases of each kind of matrix, and their coefficients by kind and block.

    Learned coefficients start as in blocks that are shared in turn: block i has 1 for base i mod n, 0 for the others.
    """

    start: Tensor

    def __init__(self, config: ModelConfig, donors: list[nn.Module]):
        """donors: n new blocks; the matrices of donor j become the bases j."""
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
        """Coefficients (n,) of the bases of a kind, an index of KINDS, in a block."""
        if self.config.weights == "hypernetwork":
            return self.start[block] + PACE * self.outputs[kind] @ torch.tanh(self.hidden @ self.embedding[block])
        if self.config.weight_coefficients == "legendre":
            return self.start[block]
        return self.start[block] + PACE * self.table[kind, block]


class Generated(nn.Module):
    """The linear map of one kind in one block, in place of the block's own `linear`."""

    map: Tensor

    def __init__(self, config: ModelConfig, linear: nn.Linear, generator: Generator | None, kind: int, block: int):
        super().__init__()
        (rows, cols), from_zero = linear.weight.shape, KINDS[kind].endswith("proj")
        self.config, self.place, self.scale, self.left = config, (kind, block), None, None
        self.generator = (generator,)  # in a tuple: a submodule would be registered in every block
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
        """(..., cols) -> (..., rows): M x, without scales and low-rank part."""
        if self.config.weights == "random":
            return F.linear(x, self.map)
        (generator,), (kind, block) = self.generator, self.place
        bases: Any = generator.bases[KINDS[kind].replace(".", "_")]
        parts: Any = zip(generator.coefficients(kind, block), bases, strict=True)
        if x.requires_grad and not bases[0].weight.requires_grad:  # calibration: gradients of activations alone
            y: Any = sum(c.to(x.dtype) * base(x) for c, base in parts)
            return y
        weight: Any = sum(c * base.weight for c, base in parts)
        return F.linear(x, weight)


def generate(config: ModelConfig, blocks: nn.ModuleList, donors: list[nn.Module]) -> Generator | None:
    """Replace the blocks' matrices by generated ones; returns their shared bases, None for random maps."""
    generator = None if config.weights == "random" else Generator(config, donors)
    for i, block in enumerate(blocks):
        for kind, path in enumerate(KINDS):
            part, name = path.split(".")
            holder = block.get_submodule(part)
            setattr(holder, name, Generated(config, getattr(holder, name), generator, kind, i))
    return generator
