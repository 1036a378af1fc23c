"""How many seeds find a difference, before anything is trained."""

import math
from collections.abc import Iterator
from pathlib import Path

from pgolf.analysis import frontier, seed_groups, statistics
from pgolf.runs.result import RunError
from pgolf.runs.table import load_runs

SEEDS = (3, 5, 10)


def plan(root: Path, effect: float, configs: int, track: str | None = None) -> Iterator[str]:
    """Lines that say which seeds find a true difference of `effect` bpb between each of the configs and a baseline.

    The noise is that of the runs below root, by comparison group, track and time limit. Raises RunError if no config of
    the track was trained with several seeds.
    """
    if configs < 1:
        raise RunError(f"--runs {configs}: expected at least 1 config beside the baseline")
    found = False
    for key, group in frontier.comparison_groups(load_runs(root)):
        for (name, limit), noise in seed_groups.noise_by_track(group).items():
            if noise is None or noise.repeats or track not in (None, name):
                continue
            found = True
            trained = group[(group.track == name) & (group.max_wallclock_seconds.astype(float) == limit)]
            hours = trained.train_seconds.astype(float).mean() / 3600
            limited = f", limit {limit:g} s" if limit else ""
            yield f"{name or 'no track'}{limited}; {frontier.group_title(key)}"
            yield f"  seed noise {noise.std:.4f} bpb, {noise.dof} degrees of freedom from {noise.configs} configs"
            seeds = statistics.seeds_needed(effect, noise.std, configs)
            runs = (
                f"{seeds} seeds each, {seeds * (configs + 1):,} runs, {seeds * (configs + 1) * hours:.1f} h of training"
            )
            if math.isinf(seeds):
                runs = f"more than {statistics.MAX_SEEDS:,} seeds each"
            yield f"  {effect:g} bpb, {configs} against a baseline, found with {statistics.POWER:.0%}: {runs}"
            sizes = (f"{statistics.detectable(n, noise.std, configs):.4f} with {n}" for n in SEEDS)
            yield f"  found with {statistics.POWER:.0%}: {', '.join(sizes)} seeds each"
    if not found:
        wanted = f"track {track}" if track else "any track"
        raise RunError(f"{root}: no config of {wanted} was trained with several seeds, so the seed noise is not known")
