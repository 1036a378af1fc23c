"""Proxy runs, `--scale nano`: a run shrunk to a minute on one CPU thread, with the same factors in a small shape.

Every sweep can be tried before it is paid for; all of them together take an hour on two cores.
"""

from pgolf_core.config import RunConfig
from pgolf_core.tracks import TRACKS

LENGTH = 4  # divisor of layers, widths and windows
SIZE = 16  # divisor of counts of weights or bytes: the square of LENGTH
STEPS = 64  # divisor of the steps that a mean of weights spans
SECONDS = 20  # wallclock limit of a time-limited run
CALIBRATION = 4096  # most tokens of calibration, which counts toward that limit
LENGTHS = (
    "num_layers", "num_unique_blocks", "window_size", "eval_seq_len", "eval_stride", "xsa_last", "ve_last",
    "parallel_from", "loop_start", "loop_end", "bigram_vocab_size",
)  # fmt: skip
WIDTHS = ("model_dim", "embed_dim", "bigram_dim", "ve_dim")  # in fours: 2 heads of even width
SIZES = ("int8_residual_budget_bytes", "keep_float_max_numel", "cap_bytes")
SHAPE = ("num_layers", "model_dim", "num_heads", "num_kv_heads")  # not taken from the nano track
BUDGETS = ("budgets", "caps")  # parameters of stages that are lists of bytes


def proxy_config(config: RunConfig, knobs: dict) -> RunConfig:
    """The same experiment in small: batches, steps and validation of the nano track, 2 heads, 1 of keys and values.

    Bands of layers shrink with the layers, the mean of weights with the steps; vocabulary, rates, quantizers and shares
    of training stay. A time-limited run stays one. knobs override all of it. Raises ConfigError.
    """
    small = config.model_dump() | {name: value for name, value in TRACKS["nano"].items() if name not in SHAPE}
    for names, divisor, unit in ((LENGTHS, LENGTH, 1), (WIDTHS, LENGTH, 4), (SIZES, SIZE, 1)):
        small |= {name: _quotient(getattr(config, name), divisor, unit) for name in names}
    small |= {"track": "nano", "num_heads": 2, "num_kv_heads": 1, "world_size": 1, "grad_accum_steps": 0}
    small |= {"compile": False, "deterministic": False}  # no use on a CPU
    small["swa_every"] = _quotient(config.swa_every, STEPS, 1)
    small["ema_decay"] = config.ema_decay and max(0.5, round(1 - STEPS * (1 - config.ema_decay), 6))
    if config.max_wallclock_seconds:
        small |= {"max_wallclock_seconds": SECONDS, "iterations": config.iterations}
        small["calibration_tokens"] = min(config.calibration_tokens, CALIBRATION)
    return RunConfig(**small | knobs)


def proxy_parameters(parameters: dict) -> dict:
    """A stage's parameters, with its lists of bytes divided as proxy_config divides those of a run."""
    lists = {name: [_quotient(size, SIZE, 1) for size in parameters[name]] for name in BUDGETS if name in parameters}
    return parameters | lists


def _quotient(value: int, divisor: int, unit: int) -> int:
    """value / divisor rounded to whole units, at least one; 0, which means no limit or a default, stays 0."""
    return max(1, (2 * value + divisor * unit) // (2 * divisor * unit)) * unit if value else 0
