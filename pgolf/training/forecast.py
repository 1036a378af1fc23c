"""Bytes of an artifact before there are weights, and from a checkpoint of an early step.

Nothing is looked up in a table of sizes: weights are drawn as training would leave them, quantised as the knobs say
and really coded. What has to be known is how weights look, and that is simple. A matrix under Muon is what it began
as plus a change that is Gaussian but for the spread of its rows and columns; the change grows with the area under
the learning rates, at first as the area and then as its root. Steps tied to σ see only the spreads, so their size is
sharp before training. Steps of the reference, at least 1/qmax wide whatever σ is, see the growth itself.

The figures below were read off these trainings on the embedded corpus (checkpoints every few steps; 4096 or 8192
tokens a step): 2×192 for 120 steps, 2×160 for 400, 12×384 for 16; the ends of 3×192, 3×176, 4×192 sharing two
blocks, 2×160 for 120 and 6×384 for 240. benchmarks/bench_forecast.py holds forecasts to other runs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from pgolf_core.artifact.codec import encode
from pgolf_core.artifact.container import pack
from pgolf_core.artifact.format import ACCOUNT, PARTS, Quantized, to_arrays
from pgolf_core.config import RunConfig
from pgolf_core.export import code_archive, quantize_tensor, recipe_of, stored_float
from pgolf_core.knobs import ExportConfig, ModelConfig, TrainConfig
from pgolf_core.model import GPT, roles_by_name
from pgolf_core.parameters import Role
from pgolf_core.quantization.allocation import MAX_LEVEL, MAX_REL_STEP, MIN_CAP_FILL
from pgolf_core.quantization.codebook import CodebookTensor
from pgolf_core.quantization.grids import Grid, to_nearest, weighted_grid
from pgolf_core.quantization.lowrank import LowRank
from pgolf_core.quantization.primitives import QuantizedTensor
from pgolf_core.quantization.schemes import Recipe

AREAS = (12, 90, 340)  # full-rate steps at which spreads were read


@dataclass(frozen=True)
class Growth:
    """A kind of matrix. pace: change a full-rate step, in the size of one update. rows, cols: spread at AREAS.

    Spread is ln(root mean square of the matrix) − mean of ln(root mean square of its lines): what contexts of the
    entropy coder can win, in nats a weight.
    """

    pace: float
    rows: tuple[float, float, float]
    cols: tuple[float, float, float]


GROWTH = {
    "attn.c_q.weight": Growth(0.50, (0.007, 0.010, 0.012), (0.005, 0.05, 0.06)),
    "attn.c_k.weight": Growth(0.56, (0.006, 0.005, 0.005), (0.05, 0.14, 0.11)),
    "attn.c_v.weight": Growth(0.58, (0.004, 0.005, 0.006), (0.10, 0.20, 0.18)),
    "attn.proj.weight": Growth(0.52, (0.004, 0.020, 0.035), (0.004, 0.005, 0.010)),
    "mlp.fc.weight": Growth(0.60, (0.045, 0.12, 0.22), (0.003, 0.04, 0.05)),
    "mlp.proj.weight": Growth(0.62, (0.003, 0.003, 0.006), (0.018, 0.10, 0.20)),
    "tok_emb_proj.weight": Growth(0.52, (0.004, 0.020, 0.035), (0.004, 0.005, 0.010)),  # not measured: as attn.proj
    "tok_emb.weight": Growth(0.67, (0.05, 0.022, 0.018), (0.015, 0.010, 0.005)),
    "lm_head.weight": Growth(0.67, (0.05, 0.022, 0.018), (0.015, 0.010, 0.005)),  # not measured: as the embedding
}
CONTROL_PACE = 1.0  # of control vectors: Adam's changes are scalar_lr times the root of the area
COHERENT = 80  # full-rate steps; later ones add up as a random walk
ADAMS = ("tok_emb.weight", "lm_head.weight")  # matrices that Adam trains; Muon has the others
ZEROS = ("attn.proj.weight", "mlp.proj.weight", "lm_head.weight")  # what these are at the start
# Of the 256 pieces for single bytes at the beginning of the vocabulary, English uses few. The others have nothing but
# a low probability to learn, so their rows move together, not far, and codecs that look for repeats win. 120 to 220
# such rows were found; which they are makes no difference here.
IDLE_ROWS = slice(80, 256)
IDLE_LIMIT = 2.9  # root mean square of such a row at most, in learning rates
IDLE_NOISE = 0.06  # what tells them apart, in the root mean square of the change
FLAT = 0.5  # share of Adam's changes that is uniform: kurtosis 2.4 to 2.7 where a Gaussian has 3

# Standard deviation of the logarithm of a line's step under fisher, read off 2×192 after 120 steps.
FISHER_SPREAD = 0.45
FISHER_SPREAD_UNEVEN = 1.2
UNEVEN_ROWS = ("tok_emb.weight", "mlp.fc.weight")  # many of their rows are hardly used

MARGIN = 0.03  # of the artifact, either way; the benchmark's worst run needs 0.02
MARGIN_SEEN = 0.05  # from a checkpoint: rows of an early embedding are not yet as alike as they will be
FISHER_MARGIN = 0.10  # where prices of errors are drawn too
CODEBOOK_MARGIN = 0.25  # downwards: indices are not drawn but bounded by the size of the table
GROWTH_RANGE = (0.15, 1.5)  # times the law: the seed's 14×576 after 300 steps of 32,768 tokens was near the low end
GROWTH_RANGE_SEEN = (0.8, 1.25)  # the same once a tenth of the growth was seen
FEWEST_STEPS = 300  # of a training that a clock ends: the seed's on one RTX 3090

SAMPLES = {"ans": 1 << 22, "zlib": 1 << 20, "lzma": 1 << 19, "brotli": 1 << 18}  # weights coded: a second of each
CHECKPOINT_WEIGHTS = 1 << 23  # weights of a checkpoint's blocks that are looked at


class ForecastError(ValueError):
    """Runs that would miss their caps; the message names them all and what to change."""


@dataclass(frozen=True)
class Forecast:
    """Bytes of artifact and code together, the interval they should fall in, and bytes by part; parts sum to bytes."""

    bytes: int
    low: int
    high: int
    parts: dict[str, int]

    def __str__(self) -> str:
        return f"{self.bytes:,} bytes ({self.low:,} to {self.high:,})"

    def verdict(self, cap: int) -> str:
        """'800,000 bytes (776,000 to 824,000) of 1,000,000: fits'."""
        fits = "fits" if self.high <= cap else "fits, though its high end does not"
        return f"{self} of {cap:,}: {'over' if self.bytes > cap else fits}"


def forecast(config: RunConfig) -> Forecast:
    """Before training, from the knobs alone.

    Under a clock the steps are not known: the interval of absmax reaches from 300 of them to all iterations. Of
    codebooks and residuals only bounds are known; GPTQ counts as rounding to nearest. Equal knobs give equal forecasts.
    """
    train = config.train.model_copy(update={"seed": 0})  # so that it is done once for runs that differ in nothing else
    export = config.export.model_copy(update={"allow_over_cap": False})
    return _before_training(config.model, train, export)


def forecast_from(state: dict[str, Tensor], config: RunConfig, fraction: float, steps: int | None = None) -> Forecast:
    """From the weights after a fraction of the training, which is steps of it (None: that share of the iterations).

    The weights go on growing by the law, as fast as they have grown so far. fraction 1 = as they are.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction={fraction}: a checkpoint of a training is at more than 0 and at most 1 of it")
    steps = max(1, round(fraction * config.iterations)) if steps is None else steps
    total = max(steps, round(steps / fraction))
    after = _area(total, config.warmdown_iters)
    now = after - _area(total - steps, config.warmdown_iters)
    state = {name: t.detach().cpu().float() for name, t in state.items()}
    pace = _pace(state, now, config.model, config.train)
    state, times = _some_blocks(state, config.model.blocks)

    def at(growth: float) -> dict[str, float]:
        generator = torch.Generator().manual_seed(0)
        grown = {
            name: _grow(t, name, now, after, pace * growth, config.model, config.train, generator)
            for name, t in state.items()
        }
        return _sizes(grown, times, config.export)

    slow, fast = GROWTH_RANGE_SEEN if fraction < 1 else (1.0, 1.0)
    margin = MARGIN_SEEN if fraction < 1 else MARGIN
    return _interval(at, (slow, 1.0, fast), margin, state, times, config.export)


def check(configs: dict[str, RunConfig], say: Callable[[str], None] | None = None) -> None:
    """Hold runs (name -> config) against their caps; say(line) is given each one's forecast.

    Raises ForecastError naming every run whose forecast is over its cap, unless the run has allow_over_cap or writes
    no artifact. An interval that only reaches over the cap refuses nothing: the reference's int8 has a wide one.
    """
    over = []
    for name, config in configs.items():
        expected = forecast(config)
        if say:
            say(f"{name:24} forecast {expected.verdict(config.cap_bytes)}")
        if expected.bytes > config.cap_bytes and config.final_roundtrip_eval and not config.allow_over_cap:
            over.append(f"{name}: {expected} against cap_bytes={config.cap_bytes:,}")
    if over:
        raise ForecastError(
            "forecast over the cap, so not started:\n"
            + "\n".join(f"  - {line}" for line in over)
            + "\nraise cap_bytes, make the model smaller, take a coarser quantizer, or set allow_over_cap=1"
        )


@lru_cache(maxsize=256)
def _before_training(model: ModelConfig, train: TrainConfig, export: ExportConfig) -> Forecast:
    with torch.device("meta"):
        state = GPT(model).state_dict()
    # Blocks are drawn alike, so one stands for all.
    one = {name: t for name, t in state.items() if _block(name) in (None, 0)}
    times = {name: 1 if _block(name) is None else model.blocks for name in one}
    most = train.iterations
    fewest = min(most, FEWEST_STEPS) if train.max_wallclock_seconds else most
    middle = round(math.sqrt(fewest * most))

    def at(steps_and_growth: tuple[int, float]) -> dict[str, float]:
        steps, growth = steps_and_growth
        area = _area(steps, train.warmdown_iters)
        generator = torch.Generator().manual_seed(0)
        drawn = {
            name: _grow(_initial(name, t.shape, model, generator), name, 0, area, growth, model, train, generator)
            for name, t in one.items()
        }
        return _sizes(drawn, times, export)

    scenarios = ((fewest, GROWTH_RANGE[0]), (middle, 1.0), (most, GROWTH_RANGE[1]))
    return _interval(at, scenarios, MARGIN, one, times, export)


def _interval(
    at: Callable,
    scenarios: tuple,
    margin: float,
    state: dict[str, Tensor],
    times: dict[str, float],
    config: ExportConfig,
) -> Forecast:
    """at(scenario) -> bytes by part. The middle of three with its margin; the outer two where steps do not follow σ."""
    recipes = {name: _recipe(name, t, config) for name, t in state.items()}
    kinds = {r.kind for r in recipes.values()}
    parts = at(scenarios[1])
    artifact, code = sum(parts.values()), _code_bytes("codebook" in kinds, config.low_rank_residuals)
    margin = max(margin, FISHER_MARGIN) if any(r.per == "fisher" for r in recipes.values()) else margin
    low, high = artifact * (1 - margin), artifact * (1 + margin)
    if "codebook" in kinds:
        low = artifact * (1 - CODEBOOK_MARGIN)
    if "absmax" in kinds and scenarios[0] != scenarios[2]:
        ends = [sum(at(scenario).values()) for scenario in (scenarios[0], scenarios[2])]
        low, high = min(low, *ends), max(high, *ends)
    if config.allocation == "solve" and artifact + code < config.cap_bytes:
        # These are the coarsest steps. The solver fills its cap, unless the finest steps do not even reach it.
        finest = 2.05 + math.log2(MAX_LEVEL / 6)  # bits a weight: the entropy of a Gaussian whose largest is at 6 σ
        weights = sum(times[name] * state[name].numel() for name, r in recipes.items() if r.kind == "step")
        room = min(config.cap_bytes - code - artifact, weights * finest / 8)
        parts["weights"] += room
        artifact += room
        low, high = artifact * MIN_CAP_FILL, artifact
    whole = {part: round(parts.get(part, 0)) for part in ACCOUNT} | {"code": code}
    return Forecast(sum(whole.values()), round(low) + code, round(high) + code, whole)


# Weights as training leaves them


def _area(steps: int, warmdown: int) -> float:
    """Sum of lr_factor over a training of so many steps: full-rate steps that it amounts to."""
    last = min(steps, warmdown)
    return steps - last + last * (last + 1) / (2 * max(warmdown, 1))


def _initial(name: str, shape: torch.Size, model: ModelConfig, generator: torch.Generator) -> Tensor:
    """As GPT begins; which control parameters begin at 0 rather than 1 makes no byte."""
    if _role(name).is_control:
        return torch.ones(shape)
    if name.endswith(ZEROS):
        return torch.zeros(shape)
    if name == "tok_emb.weight":
        spread = model.tied_embed_init_std if model.tie_embeddings else 1.0
        return spread * torch.randn(shape, generator=generator)
    return (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(shape[1])  # nn.Linear's


def _change(name: str, shape: torch.Size, area: float, model: ModelConfig, train: TrainConfig) -> float:
    """Root mean square of what training adds to a weight until this area."""
    if _role(name).is_control:
        return CONTROL_PACE * train.scalar_lr * math.sqrt(area)
    growth = _growth(name)
    if name in ADAMS:
        return growth.pace * _adam_rate(name, model, train) * math.sqrt(area)
    rows, cols = shape
    update = train.matrix_lr * math.sqrt(max(1, rows / cols) / max(rows, cols))  # see Muon: singular values near 1
    return growth.pace * update * area / math.sqrt(1 + area / COHERENT)


def _adam_rate(name: str, model: ModelConfig, train: TrainConfig) -> float:
    if name == "lm_head.weight":
        return train.head_lr
    return train.tied_embed_lr if model.tie_embeddings else train.embed_lr


def _growth(name: str) -> Growth:
    return next(growth for end, growth in GROWTH.items() if name.endswith(end))


def _grow(
    w: Tensor,
    name: str,
    before: float,
    after: float,
    pace: float,
    model: ModelConfig,
    train: TrainConfig,
    generator: torch.Generator,
) -> Tensor:
    """w (any shape) as the training between two areas leaves it, growing `pace` times as fast as the law says."""
    grown = pace * _change(name, w.shape, after, model, train)
    was = pace * _change(name, w.shape, before, model, train)
    if grown <= was:
        return w
    noise = torch.randn(w.shape, generator=generator)
    if not _role(name).is_control:
        growth = _growth(name)
        if name in ADAMS:
            flat = (2 * torch.rand(w.shape, generator=generator) - 1) * math.sqrt(3)
            noise = math.sqrt(1 - FLAT) * noise + math.sqrt(FLAT) * flat
        noise *= _lines(w.size(0), growth.rows, after, generator)[:, None]
        noise *= _lines(w.size(1), growth.cols, after, generator)
        if name in ADAMS and w.size(0) >= 2 * IDLE_ROWS.stop:
            idle = noise[IDLE_ROWS]
            share = min(1.0, IDLE_LIMIT * _adam_rate(name, model, train) / grown)
            noise[IDLE_ROWS] = share * idle[:1] + IDLE_NOISE * idle
    return w + math.sqrt(grown**2 - was**2) * noise


def _lines(count: int, spreads: tuple[float, ...], area: float, generator: torch.Generator) -> Tensor:
    """(count,) spreads of lines, log-normal of root mean square 1, whose mean logarithm is that much below 0."""
    spread = float(np.interp(math.log(area), np.log(AREAS), spreads))
    return torch.exp(math.sqrt(spread) * torch.randn(count, generator=generator) - spread)


def _pace(state: dict[str, Tensor], area: float, model: ModelConfig, train: TrainConfig) -> float:
    """How fast a checkpoint's weights grew, over the law's, by the matrices that began at 0: all they are is growth."""
    seen = [
        t.square().mean().sqrt().item() / _change(name, t.shape, area, model, train)
        for name, t in state.items()
        if name.endswith(ZEROS)
    ]
    return min(max(float(np.median(seen)), GROWTH_RANGE[0]), GROWTH_RANGE[1])


# Bytes of weights


def _block(name: str) -> int | None:
    return int(name.split(".")[1]) if name.startswith("blocks.") else None


def _some_blocks(state: dict[str, Tensor], blocks: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Tensors to look at, of blocks spread evenly over the depth, and how many tensors each stands for."""
    weights = sum(t.numel() for name, t in state.items() if _block(name) is not None)
    count = min(blocks, max(1, CHECKPOINT_WEIGHTS * blocks // weights))
    chosen = {None, *((2 * i + 1) * blocks // (2 * count) for i in range(count))}
    kept = {name: t for name, t in state.items() if _block(name) in chosen}
    return kept, {name: 1 if _block(name) is None else blocks / count for name in kept}


@lru_cache
def _role(name: str) -> Role:
    return roles_by_name([name])[name]


def _recipe(name: str, t: Tensor, config: ExportConfig) -> Recipe:
    """As export has it; under allocation=solve the coarsest steps there are."""
    if config.allocation == "solve":
        return Recipe("step", c=MAX_REL_STEP, per="fisher") if name.endswith(".weight") else Recipe("float16")
    return recipe_of(t, _role(name), config)


def _weighted_grid(name: str, t: Tensor, c: float) -> Grid:
    """As fine where it pays as calibration would have it, with prices drawn."""
    generator = torch.Generator().manual_seed(0)
    rows, cols = (torch.randn(n, generator=generator) for n in t.shape)
    rows *= FISHER_SPREAD_UNEVEN if name.endswith(UNEVEN_ROWS) else FISHER_SPREAD
    return weighted_grid(t, c, torch.exp(-2 * rows), torch.exp(-2 * FISHER_SPREAD * cols))


def _sizes(state: dict[str, Tensor], times: dict[str, float], config: ExportConfig) -> dict[str, float]:
    """Bytes by part of an artifact in which each of these tensors stands `times` times."""
    nearest = config.model_copy(update={"gptq": False})
    integers: dict[str, QuantizedTensor] = {}
    floats: dict[str, Tensor] = {}
    parts = dict.fromkeys(ACCOUNT, 0.0)
    for name, t in state.items():
        recipe = _recipe(name, t, config)
        if recipe.kind == "float16":
            floats[name] = stored_float(t, _role(name), config)
        elif recipe.kind == "codebook":
            parts["weights"] += times[name] * t.numel() * _index_bits(recipe) / 8
            parts["scales"] = max(parts["scales"], 2 * recipe.size * recipe.dimension)  # one book for all
        elif recipe.per == "fisher":
            integers[name] = to_nearest(t, _weighted_grid(name, t, recipe.c))
        else:
            integers[name] = quantize_tensor(name, t, _role(name), recipe, nearest, None)
    arrays, about = to_arrays(Quantized(integers, {}, floats))
    codec = "ans" if config.codec == "auto" else config.codec  # the smallest, for weights that repeat nothing
    for part in sorted({PARTS[_kind(name)] for name in arrays}):
        parts[part] += _coded({n: a for n, a in arrays.items() if PARTS[_kind(n)] == part}, times, codec)
    parts["residuals"] = _residual_bytes(integers, times, config)
    parts["metadata"] = _metadata(arrays, about, times, codec)
    return parts


def _kind(array: str) -> str:
    return array.partition("/")[0]


def _coded(arrays: dict[str, np.ndarray], times: dict[str, float], codec: str) -> float:
    """Bytes of the arrays of one part, of all their copies; of many weights the first rows of each are coded."""
    share = min(1.0, SAMPLES[codec] / max(1, sum(a.size for a in arrays.values())))
    alike: dict[float, list[np.ndarray]] = {}
    for name in sorted(arrays):
        array = np.atleast_1d(arrays[name])
        sample = array[: math.ceil(share * len(array))]
        alike.setdefault(times[name.partition("/")[2]] / share, []).append(sample)
    return sum(factor * len(encode(samples, codec)) for factor, samples in alike.items())


def _metadata(arrays: dict[str, np.ndarray], about: dict, times: dict[str, float], codec: str) -> int:
    """Bytes of a file's header and frame, from the names of all blocks' arrays and one element of each."""
    blocks = round(max(times.values()) * len({_block(name) for name in times} - {None}))
    first = min(b for b in map(_block, times) if b is not None)
    named = {}
    for name, array in arrays.items():
        of = range(blocks) if _block(name.partition("/")[2]) == first else [None]
        if _block(name.partition("/")[2]) in (None, first):
            named |= {name.replace(f"blocks.{first}.", f"blocks.{i}."): array.reshape(-1)[:1] for i in of}
    return pack(named, {name: PARTS[_kind(name)] for name in named}, about, codec).parts["metadata"]


def _index_bits(recipe: Recipe) -> float:
    """Bits a weight of codebook indices, at most.

    With a price of λ·σ² a bit the table settles where the slope of a Gaussian's distortion, 2·ln 2·D, is λ; an
    entropy-coded table of few dimensions lies 0.2 bit above that D's rate (Gray & Neuhoff 1998, Quantization).
    """
    most = math.log2(recipe.size) / recipe.dimension
    if not recipe.rate_weight:
        return most
    return min(most, max(0.0, 0.5 * math.log2(2 * math.log(2) / recipe.rate_weight)) + 0.2)


def _residual_bytes(integers: dict[str, QuantizedTensor], times: dict[str, float], config: ExportConfig) -> float:
    """Every residual that there could be, or the whole budget: factors of noise hardly compress."""
    if config.allocation == "solve":
        return 0.0  # they compete for the bytes that the solver fills anyway
    rank, bits = config.int8_residual_rank, config.int8_residual_bits
    lines = sum(times[name] * sum(t.q.shape) for name, t in integers.items() if t.q.ndim == 2)
    return min(config.int8_residual_budget_bytes, rank * bits / 8 * lines)


@lru_cache
def _code_bytes(codebook: bool, low_rank: bool) -> int:
    """Of the modules that a reader needs; exact, for they do not hang on the weights."""
    residuals = {"": LowRank(torch.empty(0), torch.empty(0), None, None, 1)} if low_rank else {}
    indices = {"": CodebookTensor(torch.empty(0), torch.empty(0))} if codebook else {}
    return len(code_archive(Quantized({}, residuals, {}, indices)))
