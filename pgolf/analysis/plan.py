"""How many seeds find a difference, before anything is trained."""

import math
from collections.abc import Iterator
from pathlib import Path

from pgolf.analysis import duration, frontier, seed_groups, statistics
from pgolf.runs.result import RunError
from pgolf.runs.table import load_runs
from pgolf_core.config import RunConfig

SEEDS = (3, 5, 10)


def plan(
    root: Path, effect: float, configs: int, track: str | None = None, arms: dict[str, RunConfig] | None = None,
    price: float = 0.0,
) -> Iterator[str]:  # fmt: skip
    """Lines that say which seeds find a true difference of `effect` bpb between each of the configs and a baseline.

    The noise is that of the runs below root, by comparison group, track and time limit. arms: of a sweep file, the
    baseline's config too; their time is duration's estimate, else the mean of these runs. price: of an hour of
    training. Raises RunError if no config of the track was trained with several seeds.
    """
    if configs < 1:
        raise RunError(f"--runs {configs}: expected at least 1 config beside the baseline")
    runs, found = load_runs(root), False
    estimates = duration.seconds_of(arms or {}, runs).values()
    estimated = 0.0 if None in estimates else sum(estimates) / 3600
    limits = {arm.max_wallclock_seconds for arm in (arms or {}).values()}
    for key, group in frontier.comparison_groups(runs):
        for (name, limit), noise in seed_groups.noise_by_track(group).items():
            if noise is None or noise.repeats or track not in (None, name) or (limits and limit not in limits):
                continue
            found = True
            trained = group[(group.track == name) & (group.max_wallclock_seconds.astype(float) == limit)]
            hours = estimated or trained.train_seconds.astype(float).mean() / 3600 * (configs + 1)
            limited = f", limit {limit:g} s" if limit else ""
            yield f"{name or 'no track'}{limited}; {frontier.group_title(key)}"
            yield f"  seed noise {noise.std:.4f} bpb, {noise.dof} degrees of freedom from {noise.configs} configs"
            seeds = statistics.seeds_needed(effect, noise.std, configs)
            cost = f", {seeds * hours * price:,.2f} at {price:g} per hour" if price else ""
            needed = f"{seeds} seeds each, {seeds * (configs + 1):,} runs, {duration.in_words(seeds * hours * 3600)}"
            needed += f" of training{cost}"
            if math.isinf(seeds):
                needed = f"more than {statistics.MAX_SEEDS:,} seeds each"
            yield f"  {effect:g} bpb, {configs} against a baseline, found with {statistics.POWER:.0%}: {needed}"
            sizes = (f"{statistics.detectable(n, noise.std, configs):.4f} with {n}" for n in SEEDS)
            yield f"  found with {statistics.POWER:.0%}: {', '.join(sizes)} seeds each"
    if not found:
        wanted = f"track {track}" if track else "any track"
        makes = "a sweep on that track with" if track else "`pgolf demo`, or a sweep with"
        raise RunError(
            f"{root}: no config of {wanted} was trained with several seeds, so the seed noise is not known; "
            f"{makes} seeds: [1337, 1338, 1339], makes such runs"
        )
