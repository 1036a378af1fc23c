"""A run shrunk to a minute on one CPU thread: the same factors, a small shape.

So that every sweep can be tried before it is paid for, and all of them run in an hour on two cores.
"""

from pgolf_core.config import TRACKS, RunConfig

LENGTH = 4  # layers, widths and windows are divided by this,
SIZE = 16  # and what counts weights or bytes by its square
SECONDS = 20  # of a run that a clock ends
LENGTHS = ("num_layers", "num_unique_blocks", "window_size", "eval_seq_len", "eval_stride")
WIDTHS = ("model_dim", "embed_dim")
SIZES = ("int8_residual_budget_bytes", "keep_float_max_numel", "cap_bytes")
SHAPE = ("num_layers", "model_dim", "num_heads", "num_kv_heads")  # of the nano track; a shrunk run has its own
BUDGETS = ("budgets", "caps")  # lists of bytes among the parameters of stages


def at_nano(config: RunConfig, knobs: dict) -> RunConfig:
    """The same experiment in small: batches, steps and validation of the nano track, 2 heads, 1 of keys and values.

    A run under a clock keeps one. knobs are stronger than all of it. Raises ConfigError.
    """
    small = config.model_dump() | {name: value for name, value in TRACKS["nano"].items() if name not in SHAPE}
    small |= {name: _quotient(getattr(config, name), LENGTH, 1) for name in LENGTHS}
    small |= {name: _quotient(getattr(config, name), LENGTH, 4) for name in WIDTHS}  # 2 heads of even width
    small |= {name: _quotient(getattr(config, name), SIZE, 1) for name in SIZES}
    small |= {"track": "nano", "num_heads": 2, "num_kv_heads": 1, "world_size": 1, "grad_accum_steps": 0}
    small |= {"compile": False, "deterministic": False}  # of no use on a CPU
    if config.max_wallclock_seconds:
        small |= {"max_wallclock_seconds": SECONDS, "iterations": config.iterations}
    return RunConfig(**small | knobs)


def budgets_at_nano(parameters: dict) -> dict:
    """A stage's parameters with its lists of bytes shrunk as at_nano shrinks those of a run."""
    return {
        name: [_quotient(size, SIZE, 1) for size in value] if name in BUDGETS else value
        for name, value in parameters.items()
    }


def _quotient(value: int, divisor: int, unit: int) -> int:
    """value / divisor in whole units, at least one; 0, which stands for no limit or a default, stays."""
    return max(1, (2 * value + divisor * unit) // (2 * divisor * unit)) * unit if value else 0
