"""Halting: each token leaves a looped band of layers after a number of passes of its own.

Output and loss are those of adaptive computation time (ACT; Graves 2016, https://arxiv.org/abs/1603.08983): the band's
output is the mean of the states after each pass, weighted by the probability p_n of leaving after pass n, and a ponder
cost is added to the loss. The probabilities are those of PonderNet (Banino et al. 2021,
https://arxiv.org/abs/2107.05407): p_n = λ_n · Π_(j<n) (1 − λ_j), with λ = 1 at the last pass. So the cost is the
expected number of passes, which has a gradient everywhere; ACT's count has steps. PonderNet's loss, the mean of the
losses of all exits, is not used: it needs the logits of every exit, the costliest product of a small model.

Training computes every pass of every token, so there is one graph, whichever token leaves when.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pgolf_core.knobs import ModelConfig
from pgolf_core.layers.fused import norm
from pgolf_core.parameters import CONTROL, declare

START = -2.0  # bias of the gate: λ starts at 0.12, so training starts near the plain loop


class Exits(NamedTuple):
    """State of all tokens after some passes; (B, T, 1) float32 but for the mean."""

    staying: Tensor  # Π (1 − λ): probability that a token has not left
    passes: Tensor  # passes taken: their expected number, or with halting_eval=threshold their number
    mean: Tensor | float = 0.0  # (B, T, D): Σ p_n · state after pass n


class Halting(nn.Module):
    """The gate λ = σ(w · norm(x) + b) after each pass but the last, at which all remaining tokens leave.

    Scoring follows halting_eval. expected: as in training. threshold: a token keeps its state once the probability that
    it has left reaches halting_threshold; of its later passes only keys and values would be needed. fixed: all tokens
    take halting_passes passes, and the others are not computed; it needs no gate.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.width, self.count = config.loop_end + 1 - config.loop_start, config.loop_extra + 1  # layers, passes
        self.passes: Tensor | None = None  # those of the last training forward, until `ponder` takes them
        if config.halting != "off":
            self.weight = nn.Parameter(torch.zeros(config.model_dim))
            self.bias = nn.Parameter(torch.tensor(START))
            declare(self, CONTROL)

    def skips(self, step: int) -> bool:
        """True if all tokens have left the band before this step of a forward pass."""
        if self.training or self.config.halting_eval != "fixed":
            return False
        return 0 < self.config.halting_passes <= self._place(step)[0] < self.count

    def _place(self, step: int) -> tuple[int, int]:
        """Pass and layer of the band, both from 0; outside the band the pass is negative or at least `count`."""
        return divmod(step - self.config.loop_start, self.width)

    def forward(self, step: int, before: Tensor, x: Tensor, exits: Exits | None) -> tuple[Tensor, Exits | None]:
        """The state (B, T, D) after a step, and the exits. before, x: states before the step and after its layer."""
        (loop, layer), config = self._place(step), self.config
        way = "expected" if self.training else config.halting_eval
        if config.halting == "off" or way == "fixed" or not 0 <= loop < self.count:
            return x, exits
        if exits is None:
            zeros = x[..., :1].float() * 0
            exits = Exits(zeros + 1, zeros)
        staying, passes, mean = exits
        share = staying
        if way == "threshold":
            share = (staying > 1 - config.halting_threshold).float()
            x = torch.where(share > 0, x, before)
        if layer == self.width - 1:
            last, passes = loop == self.count - 1, passes + share
            leaving = torch.ones_like(share) if last else self.leaving(x)
            if way == "expected":
                mean = mean + (staying * leaving).to(x.dtype) * x
                x = mean if last else x
            staying = staying * (1 - leaving)
        if self.training:
            self.passes = passes
        return x, Exits(staying, passes, mean)

    def leaving(self, x: Tensor) -> Tensor:
        """λ: x (B, T, D) -> probability (B, T, 1) that a token which has not left leaves now."""
        return torch.sigmoid((norm(x).float() * self.weight).sum(-1, keepdim=True) + self.bias)

    def ponder(self) -> Tensor | float:
        """Ponder cost of the last training forward, in nats per token, and forget it; 0 if that had no loops."""
        passes, self.passes = self.passes, None
        return 0.0 if passes is None else self.config.ponder_cost * passes.mean()
