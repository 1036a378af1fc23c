"""Tokens that leave a looped band of layers after as many passes as each needs.

Adaptive computation time (Graves 2016, https://arxiv.org/abs/1603.08983): what leaves the band is the mean of the
states after every pass, weighted by the probability of leaving then, and a cost of passes is added to the loss.
PonderNet (Banino et al. 2021, https://arxiv.org/abs/2107.05407) lowers the mean of the losses of all exits instead.
That takes the logits of every exit, and a small model's logits are its costliest product. Its probabilities are used
here: a product of conditional ones, so the expected number of passes has a gradient; ACT's count of passes has steps.

Training computes every pass of every token and weighs them: one graph, whichever token leaves when.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pgolf_core.knobs import ModelConfig
from pgolf_core.layers.fused import norm
from pgolf_core.parameters import CONTROL, declare

START = -2.0  # of the bias: an eighth of the tokens leaves after each pass, so training begins near the plain loop


class Exits(NamedTuple):
    """What is known of the tokens after some passes; all (B, T, 1) float32 but the mean."""

    staying: Tensor  # probability that a token has not left
    passes: Tensor  # passes that it has taken, their expected number unless halting_eval=threshold decides them
    mean: Tensor | float = 0.0  # (B, T, D), sum of the states in which it left, times the probability of each


class Halting(nn.Module):
    """A gate σ(w · norm(x) + b) after each pass but the last, whose state all take that are left.

    Scoring follows halting_eval. expected: as training. threshold: a token keeps its state once the probability that
    it has left reaches halting_threshold, so that a program could leave out all but its keys and values. fixed: all
    tokens take halting_passes, and the others are not computed; it needs no gate.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.width, self.count = config.loop_end + 1 - config.loop_start, config.loop_extra + 1  # layers, passes
        self.passes: Tensor | None = None  # of the forward pass that `ponder` ends
        if config.halting != "off":
            self.weight = nn.Parameter(torch.zeros(config.model_dim))
            self.bias = nn.Parameter(torch.tensor(START))
            declare(self, CONTROL)

    def skips(self, step: int) -> bool:
        """Whether all tokens have left the band before this step of a forward pass."""
        if self.training or self.config.halting_eval != "fixed":
            return False
        return 0 < self.config.halting_passes <= self._place(step)[0] < self.count

    def _place(self, step: int) -> tuple[int, int]:
        """Pass and layer of the band, both from 0; the pass is below 0 or beyond the last one outside the band."""
        return divmod(step - self.config.loop_start, self.width)

    def forward(self, step: int, before: Tensor, x: Tensor, exits: Exits | None) -> tuple[Tensor, Exits | None]:
        """The state after a step, all (B, T, D), and the exits; before: the state that it began with."""
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
        """x (B, T, D) -> probability (B, T, 1) that a token which has not left leaves now."""
        return torch.sigmoid((norm(x).float() * self.weight).sum(-1, keepdim=True) + self.bias)

    def ponder(self) -> Tensor | float:
        """The cost of the passes of the forward pass that has just ended; 0 if it took no loops."""
        passes, self.passes = self.passes, None
        return 0.0 if passes is None else self.config.ponder_cost * passes.mean()
