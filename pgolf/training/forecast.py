"""Size estimates: bytes of an artifact before there are weights, and from a checkpoint of an early step.

Weights are drawn as training would leave them (`growth`), quantised as the knobs say and coded (`file_size`). A step
size tied to σ makes a size that is known before training; that of the reference, never below 1/qmax, depends on how
far the weights grow, so its interval is wide.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from pgolf.script.compile import estimated_size, packed_script
from pgolf.training.file_size import Sizes
from pgolf.training.growth import Law, initial_state, lr_area, warmdown_steps
from pgolf_core.artifact.format import ACCOUNT
from pgolf_core.config import RunConfig
from pgolf_core.knobs import ExportConfig, ModelConfig, TrainConfig
from pgolf_core.model import roles
from pgolf_core.parameters import tensor_place
from pgolf_core.quantization.allocation import MAX_LEVEL, MIN_CAP_FILL

# Shares of the artifact, either way.
MARGIN = 0.03  # the worst run of benchmarks/bench_forecast.py needs 0.02
MARGIN_SEEN = 0.05  # checkpoints: rows of an early embedding are not yet as alike
FISHER_MARGIN = 0.10  # if the sensitivities are drawn too
BOUND_MARGIN = 0.25  # downwards, for schemes of which only an upper bound is known
GROWTH_RANGE = (0.15, 1.5)  # times the law; the reference after 300 steps is near 0.15
GROWTH_RANGE_SEEN = (0.8, 1.0, 1.25)  # once a tenth of the growth was seen
FEWEST_STEPS = 300  # in a time-limited run; the reference's on one RTX 3090
CODE_MARGIN = 0.05  # share of the script, whose size is estimated before training
CHECKPOINT_WEIGHTS = 1 << 23  # weights of a checkpoint's blocks that are looked at


class ForecastError(ValueError):
    """Runs that would miss their caps; the message names them all and what to change."""


@dataclass(frozen=True)
class Forecast:
    """Bytes of artifact and code together, the interval they should fall in, and bytes by part; parts sum to bytes.

    without: tensors that are no parameters of the model, so that nothing is known of their size. kept: a sentence on
    matrices that are too small to be quantized, if these are most of the file; else ''.
    """

    bytes: int
    low: int
    high: int
    parts: dict[str, int]
    without: tuple[str, ...] = ()
    kept: str = ""

    def __str__(self) -> str:
        without = f", without tensor {', '.join(self.without)}" if self.without else ""
        return f"{self.bytes:,} bytes ({self.low:,} to {self.high:,}){without}"

    def verdict(self, cap: int) -> str:
        """'800,000 bytes (776,000 to 824,000) of 1,000,000: fits'."""
        fits = "fits" if self.high <= cap else "fits, though its high end does not"
        return f"{self} of {cap:,}: {'over' if self.bytes > cap else fits}{self.kept and f'; {self.kept}'}"


def forecast(config: RunConfig) -> Forecast:
    """Before training, from the knobs alone; equal knobs give equal forecasts.

    With a time limit the steps are not known: the interval of absmax reaches from 300 of them to all iterations. Of
    codebooks and residuals only bounds are known; GPTQ counts as rounding to nearest. Raises RoleError naming a
    parameter without a role.
    """
    train = config.train.model_copy(update={"seed": 0})  # runs of several seeds share one forecast
    export = config.export.model_copy(update={"allow_over_cap": False})
    return _before_training(config.model, train, export, estimated_size(config))


@lru_cache(maxsize=256)
def _before_training(model: ModelConfig, train: TrainConfig, export: ExportConfig, code: int) -> Forecast:
    state, law = initial_state(model), Law(model, train)
    sizes = Sizes(
        roles(model), {name: model.blocks if name.startswith("blocks.") else 1 for name in state}, export, code
    )
    most = train.iterations
    fewest = min(most, FEWEST_STEPS) if train.max_wallclock_seconds else most
    scenarios = [(fewest, GROWTH_RANGE[0]), (round(math.sqrt(fewest * most)), 1.0), (most, GROWTH_RANGE[1])]

    def drawn(i: int) -> dict[str, Tensor]:
        steps, generator = scenarios[i][0], torch.Generator().manual_seed(0)
        area = lr_area(steps, warmdown_steps(train, steps), train.min_lr)
        return {name: law.grow(t, sizes.roles[name], 0, area, scenarios[i][1], generator) for name, t in state.items()}

    return _interval(sizes, state, drawn, MARGIN, known=False)


def forecast_from(state: dict[str, Tensor], config: RunConfig, fraction: float, steps: int | None = None) -> Forecast:
    """Size estimate from the weights after a fraction of the training; steps: how many these are (None: of iterations).

    The weights go on growing by the law, as fast as they have grown so far. fraction 1 = as they are.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction={fraction}: a checkpoint of a training is at more than 0 and at most 1 of it")
    steps = max(1, round(fraction * config.iterations)) if steps is None else steps
    total = max(steps, round(steps / fraction))
    schedule = warmdown_steps(config.train, total), config.min_lr
    after = lr_area(total, *schedule)
    now = after - lr_area(total - steps, *schedule)
    model, known = config.model, roles(config.model)
    without = tuple(name for name in state if name not in known)
    state = {name: t.detach().cpu().float() for name, t in state.items() if name in known}
    law = Law(model, config.train)
    pace = min(max(law.observed_pace(state, known, now), GROWTH_RANGE[0]), GROWTH_RANGE[1])
    state, copies = _some_blocks(state, model.blocks)

    def drawn(i: int) -> dict[str, Tensor]:
        generator, growth = torch.Generator().manual_seed(0), pace * GROWTH_RANGE_SEEN[i]
        return {name: law.grow(t, known[name], now, after, growth, generator) for name, t in state.items()}

    margin = MARGIN_SEEN if fraction < 1 else MARGIN
    code = len(packed_script(config)) if fraction == 1 else estimated_size(config)
    sizes = Sizes(known, copies, config.export, code)
    return _interval(sizes, state, drawn, margin, known=fraction == 1, without=without)


def over_cap(configs: dict[str, RunConfig], say: Callable[[str], None] | None = None) -> dict[str, str]:
    """Runs (name -> config) whose forecast is over their cap, and how far; say(line) is given each one's forecast.

    Those with allow_over_cap, or that write no artifact, are never named. An interval that only reaches over the cap
    names none: the reference's int8 has a wide one.
    """
    over = {}
    for name, config in configs.items():
        expected = forecast(config)
        if say:
            say(f"{name:24} forecast {expected.verdict(config.cap_bytes)}")
        if expected.bytes > config.cap_bytes and config.final_roundtrip_eval and not config.allow_over_cap:
            kept = expected.kept and f"; {expected.kept}"
            over[name] = f"{expected} against cap_bytes={config.cap_bytes:,}{kept}"
    return over


def check(configs: dict[str, RunConfig], say: Callable[[str], None] | None = None) -> None:
    """Raises ForecastError naming every run that is over_cap, with what to change."""
    if over := over_cap(configs, say):
        raise ForecastError(
            "forecast over the cap, so not started:\n"
            + "\n".join(f"  - {name}: {far}" for name, far in over.items())
            + "\nraise cap_bytes, make the model smaller, take a coarser quantizer, or set allow_over_cap=1"
        )


def _interval(
    sizes: Sizes, state: dict[str, Tensor], drawn: Callable[[int], dict[str, Tensor]], margin: float, known: bool,
    without: tuple[str, ...] = (),
) -> Forecast:  # fmt: skip
    """The middle of three scenarios with its margin; known = the scenarios do not differ.

    drawn(0, 1 or 2): the weights in the low, middle and high scenario. The outer two count only if a scheme's step
    size does not follow σ.
    """
    config, schemes = sizes.config, [scheme for name, t in state.items() if (scheme := sizes.scheme(name, t))]
    parts = sizes.parts(drawn(1))
    artifact, code = sum(parts.values()), sizes.code
    if any(scheme.needs_calibration for scheme in schemes):
        margin = max(margin, FISHER_MARGIN)
    low, high = artifact * (1 - margin), artifact * (1 + margin)
    if any(scheme.bits_per_weight() is not None for scheme in schemes):
        low = artifact * (1 - BOUND_MARGIN)
    if not known and not all(scheme.scale_free for scheme in schemes):
        ends = [sum(sizes.parts(drawn(i)).values()) for i in (0, 2)]
        low, high = min(low, *ends), max(high, *ends)
    if not known:
        low, high = low - CODE_MARGIN * code, high + CODE_MARGIN * code
    if config.allocation == "solve" and artifact + code < config.cap_bytes:
        # These are the coarsest steps. The solver fills its cap, unless even the finest steps do not reach it.
        finest = 2.05 + math.log2(MAX_LEVEL / 6)  # bits per weight of a Gaussian whose largest is at 6 σ
        weights = sum(sizes.copies[n] * t.numel() for n, t in state.items() if not sizes.roles[n].is_control)
        room = min(config.cap_bytes - code - artifact, weights * finest / 8)
        parts["weights"] += room
        artifact += room
        low, high = artifact * MIN_CAP_FILL, artifact
    whole = {part: round(parts.get(part, 0)) for part in ACCOUNT} | {"code": code}
    kept = _kept_float(sizes, state, artifact)
    return Forecast(sum(whole.values()), round(low) + code, round(high) + code, whole, without, kept)


def _kept_float(sizes: Sizes, state: dict[str, Tensor], artifact: float) -> str:
    """Forecast.kept of an artifact of so many bytes."""
    most = sizes.config.keep_float_max_numel
    matrices = {n: t for n, t in state.items() if t.ndim == 2 and not sizes.roles[n].is_control}
    small = [n for n, t in matrices.items() if t.numel() <= most and sizes.scheme(n, t) is None]
    if sum(2 * sizes.copies[n] * matrices[n].numel() for n in small) < artifact / 2:
        return ""
    few, all_of_them = (round(sum(sizes.copies[n] for n in names)) for names in (small, matrices))
    return f"{few} of {all_of_them} matrices stay float16 (keep_float_max_numel={most})"


def _some_blocks(state: dict[str, Tensor], blocks: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Tensors of blocks spread evenly over the depth, with all others; and how many tensors each stands for."""
    block = {name: tensor_place(name)[0] for name in state}
    weights = sum(t.numel() for name, t in state.items() if block[name] is not None)
    count = min(blocks, max(1, CHECKPOINT_WEIGHTS * blocks // max(1, weights)))
    chosen = {None, *((2 * i + 1) * blocks // (2 * count) for i in range(count))}
    kept = {name: t for name, t in state.items() if block[name] in chosen}
    return kept, {name: 1 if block[name] is None else blocks / count for name in kept}
