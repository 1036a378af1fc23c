"""The processes that train one run together (ranks): sums, broadcasts, and gradients added in one order.

DDP adds gradients in the order of its rings. Here they are added in the order in which one process would add them,
for the same bytes on the wire, so the result of a run does not depend on the number of processes.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """One process's rank among those that train a run. `ALONE` is a single process; its methods cost nothing."""

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
        """Rank 0's content on every rank, sent between hosts: no rank waits for its GPU."""
        box = [content]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def barrier(self) -> None:
        """Wait for every rank."""
        self.share(None)

    def share_float(self, value: float) -> float:
        """Rank 0's number on every rank; cheaper than `share`, for every step."""
        if self.size == 1:
            return value
        box = torch.tensor(value, dtype=torch.float64)  # on the host
        dist.broadcast(box, src=0)
        return box.item()

    def hold_same(self, tensors: Iterable[Tensor]) -> bool:
        """True if every rank's tensors have the same bits (compared by the sum of each tensor's bits as integers)."""
        if self.size == 1:
            return True
        integers = {2: torch.int16, 4: torch.int32}
        sums = torch.stack([t.detach().view(integers[t.element_size()]).sum(dtype=torch.int64) for t in tensors])
        extremes = torch.cat([sums, -sums])
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
        return torch.equal(extremes[: len(sums)], -extremes[len(sums) :])


ALONE = Ranks()


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0)) if under_torchrun() else 0


class GradientSum:
    """The mean gradient of all ranks, summed in the order of micro-batches that a single process has.

    Every rank owns a slice of all gradients. After each backward pass the ranks exchange slices, and each adds the
    ones it receives in order of rank; after the last pass the sums go to all. With one pass per step that sends as
    many bytes as all-reduce, 2 · (n − 1)/n of the gradients. reused: a pass writes its gradients where the one before
    wrote them, as CUDA graphs do.
    """

    def __init__(self, parameters: Iterable[Tensor], ranks: Ranks, reused: bool = False):
        self.ranks = ranks
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for p in filter(Tensor.numel, parameters):  # with one layer skip_weights is empty
            by_dtype.setdefault(p.dtype, []).append(p)
        self.groups = list(by_dtype.values()) if ranks.size > 1 or reused else []  # []: autograd adds them up
        self.sums: list[Tensor | None] = [None] * len(self.groups)

    def add(self) -> None:
        """Take the gradients of the backward pass that has just ended."""
        n = self.ranks.size
        for i, group in enumerate(self.groups):
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in group]  # None: not yet used
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            if n > 1:
                sent = F.pad(flat, (0, -flat.numel() % n))
                dist.all_to_all_single(flat := torch.empty_like(sent), sent)
            for part in flat.view(n, -1):
                self.sums[i] = part.clone() if self.sums[i] is None else self.sums[i].add_(part)
            for p in group:
                p.grad = None

    def finish(self) -> None:
        """Give every parameter its mean gradient and start over."""
        n = self.ranks.size
        for i, group in enumerate(self.groups):
            whole = self.sums[i]
            if n > 1:
                whole = whole.new_empty(n * whole.numel())
                dist.all_gather(list(whole.view(n, -1)), self.sums[i])
                whole /= n
            sizes = [p.numel() for p in group]
            for p, gradient in zip(group, whole[: sum(sizes)].split(sizes), strict=True):
                p.grad = gradient.view_as(p)
            self.sums[i] = None
