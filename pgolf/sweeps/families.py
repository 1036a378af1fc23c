"""Files of `pgolf transfer` and `pgolf scale` → ordinary checked sweeps, which reports read as any other.

name: stack_transfer               # the study, and how its sweeps' folders begin; default: the file's name
question: one sentence             # asked by the study

sweep: stack_add_one.yaml          # transfer: the sweep file whose arms run at every scale, beside this file
base: {iterations: 40}             # knobs over that sweep's base, at every scale
scales: {own: {}, wide: {model_dim: 128}}  # a sweep <name>-<scale> each; its knobs over base, an arm's over them
seeds: [1337, 1338, 1339]          # default: those of the sweep

track: nano                        # scale: the recipe, by track and base
base: {num_layers: 2}
sizes: {d48: {model_dim: 48}, d96: {model_dim: 96}}  # every size at every length: d48-60 …
lengths: [60, 120, 180]            # iterations
tokens: [61440]                    # in place of lengths: tokens of training, whole batches
"""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StrictInt

from pgolf.sweeps.sweep_file import (
    Knobs,
    Sweep,
    SweepError,
    SweepKeys,
    check_names,
    checked_keys,
    read_yaml,
    refuse,
    sweep_of,
)
from pgolf_core.config import ConfigError, RunConfig

Counts = list[Annotated[StrictInt, Field(ge=1)]]


class TransferKeys(BaseModel):
    """The keys of a transfer file."""

    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)
    name: str = ""
    sweep: str
    question: str = ""
    base: Knobs = {}
    scales: dict[str, Knobs] = Field(min_length=2)
    seeds: list[StrictInt] = []


class ScaleKeys(BaseModel):
    """The keys of a scaling file."""

    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)
    name: str = ""
    question: str = ""
    track: str = ""
    base: Knobs = {}
    sizes: dict[str, Knobs] = Field(min_length=1)
    lengths: Counts = []
    tokens: Counts = []
    seeds: list[StrictInt] = []


def load_transfer(path: Path, seeds: list[int] | None = None) -> tuple[Path, list[Sweep]]:
    """Path of the sweep file, and its sweep at each scale, without stages. Raises SweepError naming every problem."""
    keys = checked_keys(TransferKeys, read_yaml(path, "a transfer file is a mapping with sweep: and scales:"), path)
    file = path.parent / keys.sweep
    if not file.is_file():
        raise SweepError(f"{path}: sweep: {keys.sweep}: no such file beside it")
    content = checked_keys(SweepKeys, read_yaml(file), file)
    if not content.control:
        raise SweepError(f"{file}: names no control:, and effects are differences to it")
    problems = ["scales: one has no name"] * ("" in keys.scales)
    check_names(keys.name, [scale for scale in keys.scales if scale], problems)
    refuse(problems, path)
    sweeps = []
    for scale, knobs in keys.scales.items():
        base, nproc = content.base | keys.base | knobs, content.nproc
        if nproc is not None:
            nproc = base.pop("world_size", nproc)
        own = {"name": f"{keys.name}-{scale}", "base": base, "nproc": nproc, "stages": []}
        own |= {"question": keys.question or content.question, "seeds": keys.seeds or content.seeds}
        sweep = sweep_of(content.model_dump() | own, f"{path}: scales: {scale}", seeds=seeds)
        sweeps.append(replace(sweep, family=keys.name, scale=scale))
    for a, b in itertools.combinations(sweeps, 2):
        if a.runs == b.runs:
            raise SweepError(f"{path}: scales {a.scale} and {b.scale} have the same knobs; one is enough")
    return file, sweeps


def load_scaling(path: Path, seeds: list[int] | None = None) -> Sweep:
    """The sweep of every size at every length. Raises SweepError naming every problem."""
    keys = checked_keys(ScaleKeys, read_yaml(path, "a scaling file is a mapping with sizes: and lengths:"), path)
    if bool(keys.lengths) == bool(keys.tokens):
        raise SweepError(f"{path}: give lengths:, in iterations, or tokens:, one of them")
    if "iterations" in keys.base:
        raise SweepError(f"{path}: base: sets iterations, and the lengths give them")
    runs = {}
    for (size, knobs), length in itertools.product(keys.sizes.items(), keys.lengths or keys.tokens):
        if "iterations" in knobs:
            raise SweepError(f"{path}: sizes: {size}: sets iterations, which lengths: or tokens: sets; leave it out")
        runs[f"{size}-{length}"] = knobs | {"iterations": length // (_batch(keys, knobs, path) if keys.tokens else 1)}
    given = keys.model_dump(include={"name", "question", "track", "base", "seeds"}) | {"runs": runs}
    return replace(sweep_of(given, path, seeds=seeds), family=keys.name)


def _batch(keys: ScaleKeys, knobs: dict, path: Path) -> int:
    """Tokens per step of a size."""
    try:
        return RunConfig({}, **{"track": keys.track} | keys.base | knobs).train_batch_tokens
    except ConfigError as error:
        raise SweepError(f"{path}: {error}") from error
