"""The processes that train one run together: sums over them, and gradients added in one order.

DDP adds gradients in the order of its rings. Here they are added in the order in which one process would add them,
for the same bytes on the wire, so a run does not depend on how many processes train it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """One process's place among those that train a run. `ALONE` is the only one; its methods cost nothing."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def add_(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def share(self, content: Any) -> Any:
        """Rank 0's content on every rank, through the hosts: nobody waits for a GPU."""
        if self.size == 1:
            return content
        box = [content]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def clock(self, seconds: float) -> float:
        """Rank 0's reading on every rank."""
        if self.size == 1:
            return seconds
        reading = torch.tensor(seconds, dtype=torch.float64)
        dist.broadcast(reading, src=0)
        return reading.item()  # a tensor of the host


ALONE = Ranks()


class GradientSum:
    """The mean gradient of all ranks' micro-batches, summed in the order of their spans: that of a single process.

    Every rank owns a slice of all gradients. After each backward pass the ranks exchange slices and each adds what it
    gets, rank by rank; after the last one the sums go to everybody. For one pass a step that is as many bytes as
    all-reduce sends, 2 · (n − 1)/n of the gradients.
    """

    def __init__(self, parameters: Iterable[Tensor], ranks: Ranks):
        self.ranks = ranks
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for p in filter(Tensor.numel, parameters):  # one layer has no skip weights, and they no gradient
            by_dtype.setdefault(p.dtype, []).append(p)
        self.groups = list(by_dtype.values()) if ranks.size > 1 else []
        self.sums: list[Tensor | None] = [None] * len(self.groups)

    def add(self) -> None:
        """Take the gradients of the micro-batch that has just gone backward."""
        n = self.ranks.size
        for i, group in enumerate(self.groups):
            flat = torch.cat([p.grad.flatten() for p in group])
            flat = F.pad(flat, (0, -flat.numel() % n))
            received = torch.empty_like(flat)
            dist.all_to_all_single(received, flat)
            for part in received.view(n, -1):
                self.sums[i] = part.clone() if self.sums[i] is None else self.sums[i].add_(part)
            for p in group:
                p.grad = None

    def finish(self) -> None:
        """Give every parameter its mean gradient; the next `add` begins anew."""
        for i, group in enumerate(self.groups):
            whole = self.sums[i].new_empty(self.ranks.size * self.sums[i].numel())
            dist.all_gather(list(whole.view(self.ranks.size, -1)), self.sums[i])
            whole /= self.ranks.size
            sizes = [p.numel() for p in group]
            for p, gradient in zip(group, whole[: sum(sizes)].split(sizes), strict=True):
                p.grad = gradient.view_as(p)
            self.sums[i] = None
