"""One training step: forward and backward passes, regularizer, clipping, optimizer update."""

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pgolf_core.batches import CPU, Batches, Stream
from pgolf_core.config import RunConfig
from pgolf_core.device import autocast
from pgolf_core.distributed import ALONE, GradientSum, Ranks
from pgolf_core.knobs import TrainConfig
from pgolf_core.model import GPT
from pgolf_core.optim import WeightAverage, make_optimizers, muon_momentum, step_optimizers, wd_factor
from pgolf_core.regularizers import CompressionRegularizer


@dataclass
class TrainState:
    """Everything that training steps read and change, after `step` of them; a resume restores what `stateful` lists."""

    model: GPT
    loss_fn: Callable[[Tensor, Tensor], Tensor]  # model.loss, compiled or not
    optimizers: list[torch.optim.Optimizer]
    regularizer: CompressionRegularizer | None  # None without a penalty
    average: WeightAverage | None  # None without one
    gradients: GradientSum
    batches: Batches
    config: TrainConfig
    grad_accum: int  # passes per step and process
    dtype: torch.dtype  # a step's matrix products run in it, by autocast if not float32
    step: int = 0
    fraction: float = 0.0  # share of the training that is done, for schedules

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def reach(self, fraction: float) -> None:
        """Let schedules know the share of the training that is done."""
        self.fraction = fraction
        self.model.looping = fraction >= self.config.loop_from
        self.batches.enter(self.batches.config.stage(fraction))

    def stateful(self) -> dict:
        """Name -> object with state_dict() and load_state_dict()."""
        optimizers = {f"optimizer{i}": optimizer for i, optimizer in enumerate(self.optimizers)}
        own = {"model": self.model, "batches": self.batches, "random": RandomState(self.device)} | optimizers
        return own if self.average is None else own | {"average": self.average}

    def state_dict(self) -> dict:
        return {name: part.state_dict() for name, part in self.stateful().items()} | {"step": self.step}

    def load_state_dict(self, state: dict) -> None:
        for name, part in self.stateful().items():
            part.load_state_dict(state[name])
        self.step = state["step"]


def make_state(
    config: RunConfig,
    stream: Stream,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    ranks: Ranks = ALONE,
    compiled: bool = False,
    initial: dict[str, Tensor] | None = None,
) -> TrainState:
    """The state before step 0. initial: a state dict for the model, else drawn with the knob seed."""
    torch.manual_seed(config.seed)
    model = GPT(config.model)
    if initial is not None:
        model.load_state_dict(initial)
    model.to(device)
    cast_embedding(model, dtype)
    # Fill the rotary cache before compiling: a graph traced while it is empty would be recompiled on step 2.
    for _, length in config.data.stages:
        model.positions(torch.empty(1, length, 0, device=device))
    if compiled:
        torch._dynamo.reset()  # torch keeps eight graphs per process
    return TrainState(
        model=model,
        loss_fn=compiled_loss(model, device) if compiled else model.loss,
        optimizers=make_optimizers(model, config, ranks),
        regularizer=CompressionRegularizer(model, config) if config.compression_reg_weight else None,
        average=WeightAverage(model, config) if config.ema_decay or config.swa_every else None,
        gradients=GradientSum(model.parameters(), ranks, reused=compiled and device.type == "cuda"),
        batches=Batches(stream, config.data, ranks.rank, device),
        config=config.train,
        grad_accum=config.data.grad_accum,
        dtype=dtype,
    )


def compiled_loss(model: GPT, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """model.loss as one graph; a GPU launches it as a whole, and its gradients are `reused` (GradientSum)."""
    # Inductor's mixed-order reductions put a scale's gradient, a sum over all tokens, and the norm's, sums within one
    # token, into one kernel, which took up to 3.3 ms.
    options: Any = {"triton.cudagraphs": True, "triton.mix_order_reduction": False} if device.type == "cuda" else None
    return torch.compile(model.loss, fullgraph=True, dynamic=False, options=options)


def cast_embedding(model: GPT, dtype: torch.dtype) -> None:
    """Hold a GPU's embedding table in dtype; other tables, linear weights and control parameters stay float32."""
    if model.tok_emb.weight.is_cuda:
        model.tok_emb.to(dtype)


def train_step(state: TrainState, lr_scale: float) -> tuple[Tensor, Tensor]:
    """One optimizer update at base rates × lr_scale; returns this rank's mean loss (nats) and the regularizer's value.

    Both are 0-d tensors on the device: the host does not wait for it.
    """
    loss = accumulate_gradients(state)
    penalty = backward_regularizer(state)
    if state.config.grad_clip_norm:
        torch.nn.utils.clip_grad_norm_(state.model.parameters(), state.config.grad_clip_norm)
    momentum, decay = muon_momentum(state.config, state.step), wd_factor(state.config, state.fraction)
    step_optimizers(state.optimizers, lr_scale, momentum, decay)
    state.step += 1
    if state.average is not None:
        state.average.update(state.step, lr_scale)
    return loss, penalty


def accumulate_gradients(state: TrainState) -> Tensor:
    """Forward and backward passes of one step, gradients averaged over ranks; returns this rank's mean loss, 0-d."""
    total = torch.zeros((), device=state.device)
    for _ in range(state.grad_accum):
        x, y = state.batches.next()
        with autocast(x.device, state.dtype):
            loss = state.loss_fn(x, y) / state.grad_accum
        loss.backward()
        state.gradients.add()
        total += loss.detach()
    state.gradients.finish()
    return total


def backward_regularizer(state: TrainState) -> Tensor:
    """Add the regularizer's gradient; returns its unweighted value, 0-d, which is 0 on steps that sample no tensor."""
    if state.regularizer is None:
        return torch.zeros((), device=state.device)
    penalty, sampled = state.regularizer(state.step)
    if sampled:
        (state.regularizer.config.compression_reg_weight * penalty).backward()
    return penalty


def warm_up(state: TrainState, steps: int) -> None:
    """Compile kernels and allocate memory with a few steps per stage, then restore all state and random numbers."""
    before = copy.deepcopy(state.state_dict())
    switches = state.model.config.loop_extra and state.config.loop_from
    for stage, looping in itertools.product(state.batches.config.stages, (False, True) if switches else (True,)):
        state.batches.enter(stage)
        state.model.looping = looping
        for _ in range(steps):
            train_step(state, 1.0)
    state.load_state_dict(before)


@dataclass(frozen=True)
class RandomState:
    """torch's random number generators: the CPU's, and the GPU's if the model is on one."""

    device: torch.device

    def state_dict(self) -> dict[str, Tensor]:
        cuda = {"cuda": torch.cuda.get_rng_state(self.device)} if self.device.type == "cuda" else {}
        return {"cpu": torch.get_rng_state()} | cuda

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        torch.set_rng_state(state["cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], self.device)
