"""How long runs would train, before they are started: by the pace of complete ones, and by their time limits."""

import pandas as pd

from pgolf.training.flops import flops_per_token
from pgolf_core.config import RunConfig


def seconds_of(configs: dict[str, RunConfig], runs: pd.DataFrame) -> dict[str, float | None]:
    """Run -> seconds of training; None if it has no time limit and there is no complete run to go by.

    The pace, in operations per second, is that of the complete run on the same threads and processes whose operations
    per token are nearest. runs: as load_runs gives them. Scoring and export are not in it.
    """
    done = runs[(runs.status == "complete") & (runs.kind == "train") & runs.train_seconds.gt(0)]
    return {name: _seconds(config, done) for name, config in configs.items()}


def _seconds(config: RunConfig, done: pd.DataFrame) -> float | None:
    limit, own = config.max_wallclock_seconds or None, flops_per_token(config)
    like = done[(done.cpu_threads == config.cpu_threads) & (done.world_size == config.world_size)]
    like = like[like.flops_per_token.gt(0) & (like.compile == config.compile)]
    if like.empty:
        return limit
    each = like.flops_per_token.astype(float)
    nearest = like.loc[(each / own).where(each > own, own / each).idxmin()]
    pace = nearest.flops_per_token * nearest.tokens / nearest.train_seconds
    seconds = own * config.train_batch_tokens * config.iterations / pace
    return min(seconds, limit) if limit else seconds


def in_words(seconds: float) -> str:
    """'about 40 s', 'about 7 min', 'about 3.2 h'."""
    if seconds < 100:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 6000 else f"about {seconds / 3600:.1f} h"
