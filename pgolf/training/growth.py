"""How weights grow in training, by role: needed to forecast formats whose step size does not follow σ (absmax).

A matrix under Muon is its initial value plus a change that is Gaussian but for the spread of its rows and columns.
The change grows with the area under the learning rates, at first as the area and then as its root. The constants
were fitted to runs on the embedded corpus; benchmarks/bench_forecast.py compares forecasts with other runs.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pgolf_core.knobs import ModelConfig, TrainConfig
from pgolf_core.model import GPT
from pgolf_core.parameters import Role, tensor_place

AREAS = (12, 90, 340)  # full-rate steps at which spreads were measured


@dataclass(frozen=True)
class Growth:
    """pace: change per full-rate step, in units of one update. rows, cols: spread at AREAS.

    Spread is ln(rms of the matrix) − mean ln(rms of its rows or columns): nats per weight that contexts of the
    entropy coder can win.
    """

    pace: float
    rows: tuple[float, float, float]
    cols: tuple[float, float, float]


DEFAULT = Growth(0.52, (0.004, 0.020, 0.035), (0.004, 0.005, 0.010))  # measured on attention's output matrices
GROWTH = {
    "attn_in": Growth(0.535, (0.006, 0.008, 0.009), (0.04, 0.11, 0.10)),
    "mlp_in": Growth(0.60, (0.045, 0.12, 0.22), (0.003, 0.04, 0.05)),
    "mlp_out": Growth(0.62, (0.003, 0.003, 0.006), (0.018, 0.10, 0.20)),
}
BY_ADAM = Growth(0.67, (0.05, 0.022, 0.018), (0.015, 0.010, 0.005))  # embeddings, and heads as if they were
COHERENT = 80  # full-rate steps; later ones add up as a random walk
# English uses few of the 256 byte tokens at the beginning of a vocabulary. The others learn only a low probability:
# their rows move together, not far, and codecs that find repeats win. 120 to 220 such rows were found.
IDLE_ROWS = slice(80, 256)
IDLE_LIMIT = 2.9  # rms of such a row at most, in learning rates
IDLE_NOISE = 0.06  # rms of differences between such rows, in rms of the change
FLAT = 0.5  # uniform share of Adam's changes: kurtosis 2.4 to 2.7


def lr_area(steps: int, warmdown: float, min_lr: float = 0.0) -> float:
    """Sum of lr_factor over a training of so many steps without a time limit, in full-rate steps."""
    last = min(steps, int(warmdown))
    least = min(last, int(min_lr * warmdown))  # steps at min_lr
    return steps - last + least * min_lr + (last * (last + 1) - least * (least + 1)) / (2 * max(warmdown, 1))


def warmdown_steps(train: TrainConfig, steps: int) -> float:
    """Steps of falling rates in a training of so many steps."""
    return train.warmdown_frac * steps or train.warmdown_iters


def initial_state(model: ModelConfig) -> dict[str, Tensor]:
    """State dict of a new GPT, of whose blocks only block 0 is made; global random numbers are left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return GPT(model.model_copy(update={"num_unique_blocks": 1})).state_dict()


def growth_of(role: Role) -> Growth:
    return GROWTH.get(role.quantizer_group, DEFAULT) if role.kind == "matrix" else BY_ADAM


@dataclass(frozen=True)
class Law:
    """Growth of a model's weights under these knobs."""

    model: ModelConfig
    train: TrainConfig

    def change(self, role: Role, shape: torch.Size, area: float) -> float:
        """Root mean square of what training adds to a parameter until this area."""
        (rate, decay), pace = self.rates(role), growth_of(role).pace
        if shrink := 2 * rate * decay:  # weight decay forgets old changes
            area = -math.expm1(-shrink * area) / shrink
        if role.kind != "matrix":
            return (1 if role.is_control else pace) * rate * math.sqrt(area)
        rows, cols = shape
        update = rate * math.sqrt(max(1, rows / cols) / max(rows, cols))  # Muon: singular values near 1
        return pace * update * area / math.sqrt(1 + area / COHERENT)

    def rates(self, role: Role) -> tuple[float, float]:
        """Learning rate and weight decay of a parameter, as optim.make_optimizers sets them."""
        train = self.train
        return {
            "matrix": (train.matrix_lr, train.muon_wd),
            "embedding": (train.tied_embed_lr if self.model.tie_embeddings else train.embed_lr, train.embed_wd),
            "head": (train.head_lr, train.adam_wd),
        }.get(role.kind, (train.scalar_lr, train.adam_wd))

    def grow(
        self, w: Tensor, role: Role, before: float, after: float, pace: float, generator: torch.Generator
    ) -> Tensor:
        """The parameter w as training from area `before` to `after` leaves it, growing `pace` times the law."""
        was, grown = (pace * self.change(role, w.shape, area) for area in (before, after))
        if grown <= was:
            return w
        noise = torch.randn(w.shape, generator=generator)
        if not role.is_control:
            growth, by_adam = growth_of(role), role.kind != "matrix"
            if by_adam:
                flat = (2 * torch.rand(w.shape, generator=generator) - 1) * math.sqrt(3)
                noise = math.sqrt(1 - FLAT) * noise + math.sqrt(FLAT) * flat
            noise *= _line_rms(w.size(0), growth.rows, after, generator)[:, None]
            noise *= _line_rms(w.size(1), growth.cols, after, generator)
            if role.kind in ("embedding", "head") and w.size(0) == self.model.vocab_size >= 2 * IDLE_ROWS.stop:
                idle = noise[IDLE_ROWS]
                share = min(1.0, IDLE_LIMIT * self.rates(role)[0] / grown)
                noise[IDLE_ROWS] = share * idle[:1] + IDLE_NOISE * idle
        return w + math.sqrt(grown**2 - was**2) * noise

    def observed_pace(self, state: dict[str, Tensor], roles: dict[str, Role], area: float) -> float:
        """Median ratio of observed to predicted change of a checkpoint's matrices that began at zero; 1 without any."""
        from_zero = {tensor_place(name)[1] for name, t in initial_state(self.model).items() if not t.any()}
        ratios = [
            t.square().mean().sqrt().item() / self.change(roles[name], t.shape, area)
            for name, t in state.items()
            if tensor_place(name)[1] in from_zero and not roles[name].is_control
        ]
        return float(np.median(ratios)) if ratios else 1.0


def _line_rms(count: int, spreads: tuple[float, ...], area: float, generator: torch.Generator) -> Tensor:
    """(count,) rms of lines, log-normal, of rms 1 and with this spread at the area."""
    spread = float(np.interp(math.log(area), np.log(AREAS), spreads))
    return torch.exp(math.sqrt(spread) * torch.randn(count, generator=generator) - spread)
