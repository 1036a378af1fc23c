"""Parameter groups, Muon, schedules."""

import functools
from collections import defaultdict
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from pgolf_core.distributed import ALONE, Ranks
from pgolf_core.knobs import TrainConfig
from pgolf_core.model import GPT
from pgolf_core.parameters import roles_of


def newton_schulz_dtype(muon_dtype: str, device: torch.device) -> torch.dtype:
    """Dtype of Newton–Schulz products; auto = bfloat16, but float32 on a CPU that has no instructions for it.

    Such a CPU emulates bfloat16 products, several times slower than float32.
    """
    if muon_dtype != "auto":
        return getattr(torch, muon_dtype)
    known = torch.cpu.get_capabilities
    emulated = device.type == "cpu" and not any(has for name, has in known().items() if name.endswith("bf16"))
    return torch.float32 if emulated else torch.bfloat16


# Coefficients of the quintic a·x + b·x³ + c·x⁵. Keller Jordan's are steep at 0 rather than convergent at 1; those of
# Polar Express (arXiv 2505.16932) are the best for each iteration in turn.
JORDAN = (3.4445, -4.7750, 2.0315)
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def newton_schulz(g: Tensor, steps: int, dtype: torch.dtype = torch.bfloat16, polar_express: bool = False) -> Tensor:
    """Orthogonalise matrices g (..., rows, cols) roughly: singular values to about 1; computed and returned in dtype.

    The order of operations is the reference's: fused forms move the update by 3 %.
    """
    x = g.to(dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    for a, b, c in POLAR_EXPRESS[:steps] if polar_express else [JORDAN] * steps:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(Optimizer):
    """Nesterov momentum, orthogonalised; matrices of one shape share their Newton–Schulz, and ranks divide them.

    m ← μm + g, update = newton_schulz(g + μm) · sqrt(max(1, rows/cols)). torch.optim.Muon averages its
    momentum (m ← μm + (1−μ)g), which is another update while μ rises, and fuses Newton–Schulz's products.
    Groups may set weight_decay (decoupled), row_normalize (rows of norm 1 enter Newton–Schulz) and polar_express.
    """

    def __init__(self, params: list, lr: float, momentum: float, steps: int, ranks=ALONE, dtype=torch.bfloat16):
        options = dict(weight_decay=0.0, row_normalize=False, polar_express=False)
        super().__init__(params, dict(lr=lr, momentum=momentum, steps=steps) | options)
        self.ranks, self.dtype = ranks, dtype
        for p in (p for group in self.param_groups for p in group["params"]):
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = group["params"]
            grads = [p.grad for p in params]
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, grads)
            nesterov: Any = torch._foreach_add(grads, buffers, alpha=group["momentum"])
            if group["row_normalize"]:
                nesterov = [F.normalize(m, dim=1, eps=1e-7) for m in nesterov]
            updates = self._orthogonalised(nesterov, group["steps"], group["polar_express"])
            if decay := group["lr"] * group["weight_decay"]:
                torch._foreach_mul_(params, 1 - decay)
            torch._foreach_add_(params, updates, alpha=-group["lr"])

    def _orthogonalised(self, matrices: list[Tensor], steps: int, polar_express: bool) -> list[Tensor]:
        """Updates newton_schulz · sqrt(max(1, rows/cols)) in the matrices' dtype; every rank computes a part."""
        shapes = tuple(m.shape for m in matrices)
        own = partition(shapes, self.ranks.size)[self.ranks.rank]
        flat = torch.zeros(sum(m.numel() for m in matrices), dtype=self.dtype, device=matrices[0].device)
        sizes = [m.numel() for m in matrices]
        updates = [part.view_as(m) for part, m in zip(flat.split(sizes), matrices, strict=True)]
        for (rows, cols), members in groupby(sorted(own, key=shapes.__getitem__), key=shapes.__getitem__):
            group = list(members)
            stacked = torch.stack([matrices[i] for i in group])
            update = newton_schulz(stacked, steps, self.dtype, polar_express) * max(1, rows / cols) ** 0.5
            torch._foreach_copy_([updates[i] for i in group], list(update))
        self.ranks.add_(flat)  # zero where other ranks' updates go, so the sum is exact
        flat = flat.to(matrices[0].dtype)  # one launch for all matrices
        return [part.view_as(m) for part, m in zip(flat.split(sizes), matrices, strict=True)]


@functools.cache
def partition(shapes: tuple[torch.Size, ...], ranks: int) -> list[list[int]]:
    """Indices of the matrices that each rank orthogonalises: the costliest first, each to the rank with least work."""
    costs = [shape.numel() * min(shape) for shape in shapes]
    work, own = [0] * ranks, [[] for _ in range(ranks)]
    for i in sorted(range(len(shapes)), key=lambda i: -costs[i]):
        least = work.index(min(work))
        work[least] += costs[i]
        own[least].append(i)
    return [sorted(indices) for indices in own]


def make_optimizers(model: GPT, config: TrainConfig, ranks: Ranks = ALONE) -> list[Optimizer]:
    """Adam on embeddings, on controls and projections, on an untied head; Muon on matrices; decoupled decay.

    Groups carry their `base_lr` and `base_wd`, which schedules scale. Raises RoleError naming an undeclared parameter.
    """
    roles = roles_of(model)
    of_kind: dict[str, list] = defaultdict(list)
    for name, parameter in model.named_parameters():
        kind = roles[name].kind
        of_kind["control" if kind == "projection" else kind].append(parameter)
    embed_lr = config.tied_embed_lr if model.config.tie_embeddings else config.embed_lr
    rates = [(embed_lr, config.embed_wd), (config.scalar_lr, config.adam_wd), (config.head_lr, config.adam_wd)]
    adam: dict[str, Any] = dict(
        betas=(config.beta1, config.beta2), eps=config.adam_eps, fused=True
    )  # one kernel per group
    optimizers: list[Optimizer] = [
        torch.optim.Adam(of_kind[kind], lr, **adam, weight_decay=decay, decoupled_weight_decay=True)
        for kind, (lr, decay) in zip(("embedding", "control", "head"), rates, strict=True)
        if of_kind[kind]
    ]
    dtype = newton_schulz_dtype(config.muon_dtype, next(model.parameters()).device)
    options = dict(row_normalize=config.muon_row_normalize, polar_express=config.muon_polar_express)
    matrices = dict(params=of_kind["matrix"], weight_decay=config.muon_wd, **options)
    steps = config.muon_backend_steps
    optimizers.append(Muon([matrices], config.matrix_lr, config.muon_momentum, steps, ranks, dtype))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"], group["base_wd"] = group["lr"], group["weight_decay"]
    return optimizers


def step_optimizers(optimizers: list[Optimizer], lr_factor: float, momentum: float, wd_factor: float = 1.0) -> None:
    """One update at base_lr × lr_factor, Muon at this momentum and base_wd × wd_factor; gradients are cleared."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * lr_factor
            if isinstance(optimizer, Muon):
                group["momentum"], group["weight_decay"] = momentum, group["base_wd"] * wd_factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


class WeightAverage:
    """Average of a model's weights in float32; `count` of them are in it, 0 = there is none.

    EMA: e ← d·e + (1 − d)·w after every step, from the initial weights on. SWA: the mean after every swa_every-th step
    at which the rates' factor is below swa_start_frac.
    """

    def __init__(self, model: GPT, config: TrainConfig):
        self.config, self.count, self.parameters = config, 0, list(model.parameters())
        on = config.ema_decay or config.swa_every
        self.values = [p.detach().float().clone() for p in self.parameters] if on else []

    @torch.no_grad()
    def update(self, step: int, lr_factor: float) -> None:
        if not (self.config.ema_decay or self.config.swa_every):
            return
        decay, every = self.config.ema_decay, self.config.swa_every
        if decay or (every and step % every == 0 and lr_factor < self.config.swa_start_frac):
            self.count += 1
            weights = [p.float() for p in self.parameters]
            torch._foreach_lerp_(self.values, weights, 1 - decay if decay else 1 / self.count)

    @torch.no_grad()
    def replace_weights(self) -> None:
        torch._foreach_copy_(self.parameters, self.values)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"ema {self.config.ema_decay:g}" if self.config.ema_decay else f"swa of {self.count}"

    def state_dict(self) -> dict:
        return {"values": self.values, "count": self.count}

    def load_state_dict(self, state: dict) -> None:
        self.count = state["count"]
        for value, stored in zip(self.values, state["values"], strict=True):
            value.copy_(stored)


def lr_factor(config: TrainConfig, step: int, elapsed_seconds: float, reserve_seconds: float = 0.0) -> float:
    """Factor of the learning rates at this step, elapsed_seconds of training after the start.

    1, then a linear fall to 0, or no further than min_lr, over the last warmdown_frac of training: of the steps or of
    the wallclock limit, whichever is nearer to its end. With warmdown_iters instead: over the last of so many steps,
    with a limit in time at the mean step time so far. reserve_seconds of the limit are not for training.
    """
    limit = config.max_wallclock_seconds - reserve_seconds
    remaining, warmdown = max(0.0, limit - elapsed_seconds), config.warmdown_iters
    if config.warmdown_frac:
        left = min(1 - step / config.iterations, remaining / limit if config.max_wallclock_seconds else 1.0)
        factor = left / config.warmdown_frac
    elif not config.max_wallclock_seconds:
        factor = (config.iterations - step) / warmdown if warmdown else 1.0
    else:
        seconds = warmdown * elapsed_seconds / max(step, 1)
        factor = remaining / seconds if seconds else 1.0
    return max(config.min_lr, min(1.0, factor))


def wd_factor(config: TrainConfig, fraction: float) -> float:
    """Factor of muon_wd after a fraction of training: 1, then linear to wd_taper_final_mult at the end."""
    if config.wd_taper_final_mult == 1:
        return 1.0
    tapered = max(0.0, fraction - config.wd_taper_start_frac) / (1 - config.wd_taper_start_frac)
    return 1 + tapered * (config.wd_taper_final_mult - 1)


def muon_momentum(config: TrainConfig, step: int) -> float:
    """Momentum at this step: a linear rise from muon_momentum_warmup_start over muon_momentum_warmup_steps."""
    if not config.muon_momentum_warmup_steps:
        return config.muon_momentum
    done = min(1.0, step / config.muon_momentum_warmup_steps)
    return (1 - done) * config.muon_momentum_warmup_start + done * config.muon_momentum
