"""A search file → a checked Search: the knobs and values searched, the objective, the budget.

name: search_nano         # folder under runs/; default: the file's name
question: one sentence    # asked by the search
track: nano
cap: 300000               # the knob cap_bytes of every trial; a file over it cannot be the answer
base: {num_layers: 2}     # knobs of all trials
space:                    # knob -> its choices, or its range; a knob whose `when` does not hold keeps base's value
  model_dim: [96, 128]
  matrix_lr: {low: 0.01, high: 0.1, log: true}
  train_seq_len: {low: 32, high: 128, step: 32}
  bigram_vocab_size: [0, 4096]
  bigram_dim: {choices: [32, 64], when: {bigram_vocab_size: 4096}}
enqueue: {stack: {}}      # tried first, by name -> knobs of space; a knob left out is base's. The first is the baseline
objective: bpb            # bpb; bytes, the smallest file of at most max_bpb; both, the Pareto front
max_bpb: 2.5              # bits per byte that a file may have at most, for objective: bytes
trials: 200               # budget: configurations, with those that are never trained; default: 10 × trainings
trainings: 40             # budget: trained configurations; no budget includes the finalists
hours: 8                  # budget: machine hours, summed over all workers
money: 20                 # budget: hours × price_per_hour
price_per_hour: 2.5       # price of one worker's machine
pruner: median            # median, asha or off: stop a training that is worse than others at the same step
finalists: 1              # best configurations that are trained again beside the baseline, once per seed
seeds: [1338, 1339, 1340] # seeds of the finalists, none that the search itself used
sampler_seed: 0           # RNG seed of the sampler
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictInt, ValidationError, create_model
from pydantic import model_validator as check_model

from pgolf.runs import directory
from pgolf.sweeps.sweep_file import Knobs, SweepError, check_names, checked_keys, read_yaml, refuse
from pgolf_core.config import ConfigError, RunConfig, environment_knobs, no_such_knob, shown

TRIALS_PER_TRAINING = 10  # limits configurations over the cap, which cost no training
TAKEN = re.compile(r"trial\d+|search\.journal|sweep\.json")  # names in the folder of a search
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[StrictInt, Field(ge=1)]


class SearchError(ValueError):
    """A search that cannot run, or continue, as its file says; the message says what would be right."""


class Values(BaseModel):
    """The values that a search may give a knob: choices or a range, both only under `when`."""

    model_config = ConfigDict(extra="forbid")
    choices: Annotated[list[Any], Field(min_length=1)] | None = None
    low: int | float | None = None
    high: int | float | None = None
    log: bool = False
    step: Positive | None = None
    when: dict[str, Any] = {}

    @check_model(mode="after")
    def _is_choices_or_range(self):
        if self.choices is not None and {"low", "high", "log", "step"} & self.model_fields_set:
            raise ValueError("give choices, or low and high, not both")
        if self.choices is None and (self.low is None or self.high is None or not self.low < self.high):
            raise ValueError("expected a list of choices, or low below high")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("log: a logarithmic range begins above 0 and has no step")
        return self

    def hold(self, values: dict) -> bool:
        """True if the other knobs have the values that `when` names: one value per knob, or a list."""
        wanted = {knob: own if isinstance(own, list) else [own] for knob, own in self.when.items()}
        return all(values[knob] in own for knob, own in wanted.items())

    def allow(self, value: object) -> bool:
        """True if the value is a choice, or lies in the range and on its steps."""
        if self.choices is not None:
            return value in self.choices
        steps = (value - self.low) / (self.step or 1)
        return self.low <= value <= self.high and (self.step is None or abs(steps - round(steps)) < 1e-9)


def _values(entry: object) -> object:
    return {"choices": entry} if isinstance(entry, list) else entry


class SearchKeys(BaseModel):
    """The keys of a search file and their types; RunConfig checks the knobs."""

    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)
    name: str = ""
    question: str = ""
    track: str = ""
    cap: Count | None = None
    base: Knobs = {}
    space: Annotated[dict[str, Annotated[Values, BeforeValidator(_values)]], Field(min_length=1)]
    enqueue: dict[str, Knobs] = {}
    objective: Literal["bpb", "bytes", "both"] = "bpb"
    max_bpb: Positive | None = None
    trials: Count | None = None
    trainings: Count | None = None
    hours: Positive | None = None
    money: Positive | None = None
    price_per_hour: Positive | None = None
    pruner: Literal["median", "asha", False, "off"] | None = None
    finalists: Annotated[StrictInt, Field(ge=0)] = 0
    seeds: list[Annotated[StrictInt, Field(ge=0)]] = []
    sampler_seed: Annotated[StrictInt, Field(ge=0)] = 0


@dataclass(frozen=True)
class Search:
    """A checked search file: every value of space is one that its knob may have, every enqueued config is valid."""

    name: str
    file: str  # its name without .yaml
    keys: SearchKeys
    base: dict[str, Any]
    outside: dict[str, str]  # knobs from the environment
    enqueued: dict[str, dict]  # run -> value of every active knob of space

    @property
    def directory(self) -> Path:
        return directory.RUNS / self.name

    @property
    def baseline(self) -> str:
        """Name of the first enqueued run; '' = none."""
        return next(iter(self.enqueued), "")

    @property
    def pruner(self) -> str:
        """median, asha or off."""
        default = "median" if self.keys.objective == "bpb" else "off"
        return "off" if self.keys.pruner is False else self.keys.pruner or default

    @property
    def most_trials(self) -> int:
        return self.keys.trials or TRIALS_PER_TRAINING * (self.keys.trainings or 100)

    @cached_property
    def defaults(self) -> dict:
        """Every knob as base and track leave it."""
        return self.config({}).model_dump()

    def config(self, values: dict, **more) -> RunConfig:
        """The config of a trial of these knobs. Raises ConfigError."""
        return RunConfig(self.outside, **self.base | values | more)

    def choose(self, suggest: Callable[[str, Values], Any]) -> dict:
        """The value of every knob whose `when` holds; suggest(knob, values) gives each."""
        chosen = {}
        for knob, values in self.keys.space.items():
            if values.hold(self.defaults | chosen):
                chosen[knob] = suggest(knob, values)
        return chosen

    def over(self, bpb: float, size: int) -> float:
        """Relative excess over cap or max_bpb, the larger; at most 0 if the file can be the answer."""
        cap, most = self.keys.cap, self.keys.max_bpb
        return max(size / cap - 1 if cap else -1.0, bpb / most - 1 if most else -1.0)


def load_search(path: str | Path) -> Search:
    """Read and check a whole search file. Raises FileNotFoundError, or one SweepError that names every problem."""
    path = Path(path)
    keys = checked_keys(SearchKeys, read_yaml(path, "a search is a mapping with space:"), path)
    base = {"track": keys.track} | keys.base | ({"cap_bytes": keys.cap} if keys.cap else {})
    search = Search(keys.name, path.stem, keys, base, environment_knobs(prefixed=True), {})
    refuse([*_check_keys(keys), *_check_space(search)], path)
    enqueued, problems = {}, []
    for run, knobs in keys.enqueue.items():
        try:
            enqueued[run] = _complete(search, knobs)
        except (ConfigError, SweepError) as error:
            problems += [f"enqueue: {run}: {line.removeprefix('  - ')}" for line in str(error).splitlines()]
    refuse(problems, path)
    cap = search.config(next(iter(enqueued.values()), {})).cap_bytes
    keys = keys.model_copy(update={"cap": cap})
    return Search(keys.name, path.stem, keys, base, search.outside, enqueued)


def _check_keys(keys: SearchKeys) -> list[str]:
    problems = []
    if not (keys.trainings or keys.hours or keys.money or keys.trials):
        problems.append("no budget; give trainings:, hours: or money:")
    if keys.money and not keys.price_per_hour:
        problems.append("money: needs price_per_hour, that of one worker's machine")
    if (keys.objective == "bytes") != (keys.max_bpb is not None):
        problems.append("max_bpb: belongs to objective: bytes, which needs it: the smallest file of at most that bpb")
    if keys.objective != "bpb" and keys.pruner in ("median", "asha"):
        problems.append(f"pruner: {keys.pruner} stops by bpb alone; with objective: {keys.objective} it must be off")
    if keys.finalists and not keys.seeds:
        problems.append("finalists: need seeds:, some that the search itself does not use")
    if "cap_bytes" in {*keys.base, *keys.space}:
        problems.append("cap_bytes: give it as cap:, beside base:")
    if "seed" in keys.space:
        problems.append("space: seed: a search over seeds picks luck; give the finalists seeds:")
    check_names(keys.name, [*keys.enqueue], problems)
    taken = [name for name in keys.enqueue if TAKEN.fullmatch(name.lower())]
    return problems + [f"enqueue: {name}: the search itself uses this name; take another" for name in taken]


def _check_space(search: Search) -> list[str]:
    """Problems of base and of space; the values of space are converted to the types of their knobs."""
    problems, seen = [], set()
    for knob, values in search.keys.space.items():
        if knob not in RunConfig.model_fields:
            problems.append(f"space: {no_such_knob(knob)}")
            continue
        problems += [f"space: {knob}: {problem}" for problem in _check_values(knob, values)]
        for other in values.when:
            if other not in RunConfig.model_fields:
                problems.append(f"space: {knob}: when: {no_such_knob(other)}")
            elif other not in seen:
                problems.append(f"space: {knob}: when: {other} must stand above it")
            else:
                problems += [f"space: {knob}: when: {problem}" for problem in _check_when(search, values, other)]
        seen.add(knob)
    try:
        config = search.config({})
    except ConfigError as error:
        return [*problems, *(f"base: {line.removeprefix('  - ')}" for line in str(error).splitlines()[1:])]
    needed = {"final_roundtrip_eval": config.final_roundtrip_eval}
    if search.pruner != "off":
        needed["val_loss_every"] = config.val_loss_every
    problems += [
        f"base: {knob}=0, and a search with pruner: {search.pruner} needs it" for knob in needed if not needed[knob]
    ]
    allowed = {knob: search.keys.space[knob].allow(0) for knob in needed if knob in search.keys.space}
    problems += [f"space: {knob}: 0, and every trial needs it" for knob in allowed if allowed[knob]]
    if config.seed in search.keys.seeds:
        problems.append(f"seeds: {config.seed} is the seed of the search itself, which chose by it; leave it out")
    return problems


def _check_values(knob: str, values: Values) -> list[str]:
    """Problems of a knob's choices or range, whose values are converted to the knob's type."""
    field, found = RunConfig.model_fields[knob], []
    one = create_model("Value", value=(field.annotation, field))
    problems = []
    for value in values.choices if values.choices is not None else [values.low, values.high]:
        try:
            found.append(one(value=value).value)
        except ValidationError as error:
            message = error.errors()[0]["msg"]
            problems.append(f"{shown(value)}: {message[0].lower()}{message[1:]}")
    if problems:
        return problems
    if values.choices is not None:
        values.choices = found
    elif not all(type(end) in (int, float) for end in found):
        return ["has no range; give a list of choices"]
    else:
        values.low, values.high = found
        if type(found[0]) is int and values.step is not None and values.step != int(values.step):
            return [f"step: {values.step:g} is not whole, and the knob is"]
    return []


def _check_when(search: Search, values: Values, other: str) -> list[str]:
    """Problems of the values of another knob of space under which this one is searched; they become its type."""
    wanted = Values(choices=values.when[other] if isinstance(values.when[other], list) else [values.when[other]])
    if problems := _check_values(other, wanted):
        return [f"{other}: {problem}" for problem in problems]
    values.when[other] = wanted.choices
    never = [value for value in wanted.choices if not search.keys.space[other].allow(value)]
    return [f"{other}={shown(value)} is not among the values of space" for value in never]


def _complete(search: Search, knobs: dict) -> dict:
    """Every active knob of space for an enqueued run, from base if left out. Raises SweepError or ConfigError."""
    if others := knobs.keys() - search.keys.space.keys():
        raise SweepError(f"{', '.join(sorted(others))}: not in space; knobs of all trials belong to base")
    whole = search.config(knobs)

    def value(knob: str, values: Values) -> object:
        own = getattr(whole, knob)
        if not values.allow(own):
            raise SweepError(f"{knob}={shown(own)} is not among the values of space")
        return own

    chosen = search.choose(value)
    if idle := knobs.keys() - chosen.keys():
        raise SweepError(f"{', '.join(sorted(idle))}: its `when` does not hold")
    search.config(chosen)
    return chosen
