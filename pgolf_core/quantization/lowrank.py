"""Low-rank residuals in few bits: the quantization error of a matrix, approximated by a product of thin factors.

LQER (Zhang et al. 2024, arXiv 2402.02446): the error is scaled by the magnitude of the inputs before its SVD, and the
factors are quantized too. Here the second-moment matrix of the inputs weighs the columns, an importance the
rows, and the right factor is the least-squares solution for the stored left one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pgolf_core.quantization.stored import FLOATS, INTEGERS, checked

DAMPING = 0.01  # times the mean, added to second moments and row weights: bounds rows and columns never seen
CUTOFF = 1e-4  # relative to the stored left factor's largest singular value: float16's rounding is below
MAX_GROUP = 2**20  # integers that share a scale, at most; no matrix has as many in a row
CLIPS = [0.4 + 0.025 * i for i in range(25)]  # ranges to try, relative to a group's largest magnitude


@dataclass(frozen=True)
class LowRank:
    """left (rows, rank) and right (rank, cols): int8 with scales, or float16 without.

    left_scale (rows / group, rank) and right_scale (rank, cols / group), rounded up, float16: one scale per `group`
    integers along the long axis.
    """

    left: Tensor
    right: Tensor
    left_scale: Tensor | None
    right_scale: Tensor | None
    group: int

    def dequantize(self) -> Tensor:
        """float32 (rows, cols), the same bits on every machine: a matrix product does not promise that, so ranks are
        added one at a time, each product and sum rounded by itself."""
        left = dequantize_factor(self.left, self.left_scale, self.group, dim=0)
        right = dequantize_factor(self.right, self.right_scale, self.group, dim=1)
        total = left.new_zeros(self.shape)
        product = torch.empty_like(total)  # allocated once: a quarter of the time
        for column, row in zip(left.unbind(1), right.unbind(0), strict=True):
            total += torch.outer(column, row, out=product)
        return total

    def arrays(self) -> dict[str, Tensor]:
        """Kind -> tensor; the group size is kept beside them."""
        factors = {"left": self.left, "right": self.right}
        if self.left_scale is None:
            return factors
        return factors | {"left_scale": self.left_scale, "right_scale": self.right_scale}

    @classmethod
    def from_arrays(cls, arrays: dict[str, Tensor], group: int) -> "LowRank":
        """Raises KeyError or ValueError on arrays that do not fit each other or the group size."""
        dtypes = INTEGERS[:1] if "left_scale" in arrays else FLOATS[:1]
        left = checked(arrays, "left", dtypes, -1, -1)
        rows, rank = left.shape
        right = checked(arrays, "right", dtypes, rank, -1)
        cols = right.size(1)
        if rank > min(rows, cols) or type(group) is not int or not 0 < group <= MAX_GROUP:
            raise ValueError(f"rank is {rank}, group is {str(group)[:80]}")
        if "left_scale" not in arrays:
            return cls(left, right, None, None, group)
        left_scale = checked(arrays, "left_scale", FLOATS[:1], -(-rows // group), rank)
        return cls(left, right, left_scale, checked(arrays, "right_scale", FLOATS[:1], rank, -(-cols // group)), group)

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.size(0), self.right.size(1)


def low_rank(residual: Tensor, rank: int, bits: int, group: int, hessian: Tensor, row_weight: Tensor) -> LowRank:
    """The pair of factors, rounded, that minimises Σ row_weight · r H rᵀ over the rows r of what they leave.

    A higher rank lowers it further; only at 2 bits may rounding under uneven weights cost more than a rank gains.
    residual (rows, cols). H: hessian (cols, cols), the inputs' second moments up to a factor. row_weight (rows,) >= 0.
    rank: 1 to min(rows, cols). bits: 2 to 8 for integers, 16 for float16 factors.
    """
    root = (normalized(row_weight, row_weight) + DAMPING).sqrt()[:, None]  # (rows, 1)
    weighted = root * residual.detach().double()
    damped = normalized(hessian, hessian.diagonal())
    damped.diagonal().add_(DAMPING)
    u, s, _ = torch.linalg.svd(weighted @ torch.linalg.cholesky(damped), full_matrices=False)
    left, left_scale = quantize_factor(u[:, :rank] * s[:rank].sqrt() / root, bits, group, dim=0)
    # Least squares for the left factor as it is stored. The hessian's root has chosen the columns of u; on the right of
    # both sides it would cancel.
    stored = root * dequantize_factor(left, left_scale, group, dim=0)
    solved = torch.linalg.pinv(stored, rtol=CUTOFF) @ weighted  # (rank, rows) @ (rows, cols)
    right, right_scale = quantize_factor(solved, bits, group, dim=1)
    return LowRank(left, right, left_scale, right_scale, min(group, MAX_GROUP))


def quantize_factor(x: Tensor, bits: int, group: int, dim: int) -> tuple[Tensor, Tensor | None]:
    """x -> int8 of its shape, float16 scales, one per `group` numbers along dim; at 16 bits float16 and None.

    Each group takes the range in CLIPS with the least squared error, or zeros: at 2 bits a range as wide as the
    largest number would round most others to zero.
    """
    if bits == 16:
        return x.half().contiguous(), None
    if dim == 0:
        q, scale = quantize_factor(x.T, bits, group, dim=1)
        return q.T.contiguous(), scale.T.contiguous()
    rows, n = x.shape
    largest_q = 2 ** (bits - 1) - 1
    groups = torch.nn.functional.pad(x, (0, -n % group)).view(rows, -1, group)
    largest = groups.abs().amax(dim=2, keepdim=True)  # (rows, n / group, 1), as are scale and cost
    q, scale, cost = torch.zeros_like(groups), torch.zeros_like(largest), groups.square().sum(dim=2, keepdim=True)
    for clip in CLIPS:
        tried_scale = (clip * largest / largest_q).half().to(x.dtype)
        tried = torch.round(groups / tried_scale).clamp(-largest_q, largest_q)
        tried_cost = (groups - tried * tried_scale).square().sum(dim=2, keepdim=True)
        better = tried_cost < cost  # false if a group or its scale is zero
        q, scale = torch.where(better, tried, q), torch.where(better, tried_scale, scale)
        cost = torch.where(better, tried_cost, cost)
    return q.view(rows, -1)[:, :n].to(torch.int8).contiguous(), scale[:, :, 0].half()


def dequantize_factor(q: Tensor, scale: Tensor | None, group: int, dim: int) -> Tensor:
    """float32 of q's shape; exact, since 7 bits of integer times 11 bits of scale fit into its 24."""
    if scale is None:
        return q.float()
    group = min(group, q.size(dim))
    return q.float() * scale.float().repeat_interleave(group, dim).narrow(dim, 0, q.size(dim))


def normalized(weight: Tensor, averaged: Tensor) -> Tensor:
    """Float64 weights over a mean of theirs; all zero if no token reached the matrix."""
    return weight.double() / averaged.double().mean().clamp_min(1e-300)
