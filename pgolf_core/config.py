"""The configuration of one run: `RunConfig(**knobs)` takes flat names and gives groups.

A knob not given comes from the environment (`NUM_LAYERS=12`), then from the track, then from its default in
knobs.py. The groups read as `.model .data .train .regularizer .export .eval`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import reprlib
import warnings
from collections.abc import Iterable
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, InitSettingsSource, SettingsConfigDict

from pgolf_core.knobs import DataConfig, EvalConfig, ExportConfig, Group, ModelConfig, RegularizerConfig, TrainConfig
from pgolf_core.rules import RULES
from pgolf_core.tracks import TRACKS

# The checkout (editable install). Relative paths of knobs and the runs/ and reports/ folders start here,
# so that a notebook, papermill and the command line mean the same file whatever their working directory.
ROOT = Path(os.environ.get("PGOLF_ROOT", Path(__file__).resolve().parents[1]))

QUOTE = reprlib.Repr()
QUOTE.maxstring, QUOTE.maxother, QUOTE.maxlevel = 100, 100, 2
HASH_EXCLUDED = {"allow_over_cap"}  # left out of the config hash: it does not affect results


class ConfigError(ValueError):
    """Knobs that cannot work; the message names every one of them and what would be right."""


@lru_cache(maxsize=64)
def _knobs_of(group: type[Group], config: RunConfig) -> Group:
    """The group of the config's knobs, valid already; eval_seq_len is resolved: a scorer needs no other group."""
    values = config.model_dump() | {"eval_seq_len": config.eval_window}
    return group.model_construct(**{name: values[name] for name in group.model_fields})


class RunConfig(BaseSettings, ModelConfig, DataConfig, TrainConfig, RegularizerConfig, ExportConfig, EvalConfig):
    """All knobs of one run, flat. Raises ConfigError naming every bad knob of the call at once.

    `RunConfig(track="nano", num_layers=6)`; unset knobs come from the environment, then the track, then
    the defaults. Frozen; `config.with_knobs(seed=2)` returns another one.
    """

    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_ignore_empty=True)

    track: Literal["", "nano", "quick", "roundtrip", "fixed_step", "h100"] = Field(
        "", description="named set of values for knobs that are not given otherwise; '' = none"
    )

    def __init__(self, **knobs):
        known = {name: value for name, value in knobs.items() if name in RunConfig.model_fields}
        unknown = [name for name in knobs if name not in known]
        bad = {name: f"{name[:100]}: no such knob{did_you_mean(name, RunConfig.model_fields)}" for name in unknown}
        try:
            super().__init__(**known)
        except ValidationError as error:
            for e in error.errors():
                name = str(e["loc"][0]).lower()
                source = "" if name in known else f" (from the environment, {name.upper()})"
                bad[name] = f"{name}={shown(e['input'])}{source}: {e['msg'][0].lower()}{e['msg'][1:]}"
            # With defaults in place of the bad knobs the rules are still checked, so that one message says it all.
            super().__init__(**known | {n: f.default for n, f in RunConfig.model_fields.items() if n in bad})
        broken = [message for names, holds, message in RULES if not bad.keys() & names and not holds(self)]
        problems = [*bad.values(), *(message.format(c=self) for message in broken)]
        if problems:
            raise ConfigError("these knobs cannot work:\n" + "\n".join(f"  - {p}" for p in problems))
        for variable, knob in _misspelt(tuple(os.environ)).items():
            warnings.warn(f"environment variable {variable} is no knob; did you mean {knob}?", stacklevel=2)

    @classmethod
    def settings_customise_sources(cls, settings_cls, init_settings, env_settings, **unused):
        track = init_settings.init_kwargs.get("track", env_settings.env_vars.get("track", ""))
        return init_settings, env_settings, InitSettingsSource(settings_cls, TRACKS.get(track, {}))

    @classmethod
    def from_file(cls, path: str | Path, **knobs) -> RunConfig:
        """Knobs from a YAML or JSON file (also a run's config.json); keywords override them."""
        try:
            loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            raise ConfigError(f"{path}: not YAML or JSON ({' '.join(str(error).split())})") from error
        if not isinstance(loaded, dict):
            raise ConfigError(f"{path}: expected a mapping of knobs, found {type(loaded).__name__}")
        loaded = {str(name): value for name, value in loaded.items()}
        resolved = cls.model_fields.keys() <= loaded.keys()  # a run's config.json leaves nothing to a track
        if resolved and knobs.get("track", loaded.get("track")) != loaded.get("track"):
            raise ConfigError(f"track={knobs['track']}: {path} sets every knob, so a track would only rename the run")
        return cls(**loaded | knobs)

    def with_knobs(self, **knobs) -> RunConfig:
        return RunConfig(**self.model_dump() | knobs)

    model = property(partial(_knobs_of, ModelConfig))
    data = property(partial(_knobs_of, DataConfig))
    train = property(partial(_knobs_of, TrainConfig))
    regularizer = property(partial(_knobs_of, RegularizerConfig))
    export = property(partial(_knobs_of, ExportConfig))
    eval = property(partial(_knobs_of, EvalConfig))

    @property
    def eval_window(self) -> int:
        """Tokens of context a validation window holds."""
        return self.eval_seq_len or self.train_seq_len

    @property
    def hash(self) -> str:
        """12 hex digits that name these knobs."""
        return digest(self.model_dump(exclude=HASH_EXCLUDED))

    def differences(self, other: RunConfig) -> dict[str, tuple]:
        """Knob -> (value here, value in other) for each knob in which the two differ."""
        ours, theirs = self.model_dump(), other.model_dump()
        return {k: (v, theirs[k]) for k, v in ours.items() if v != theirs[k]}


def digest(content: dict) -> str:
    """12 hex digits of a JSON object's content, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def shown(value: object) -> str:
    """A value as a message quotes it: its repr, of anything long only the ends."""
    try:
        return QUOTE.repr(value)
    except ValueError:  # Python writes no number of more than 4,300 digits
        return "a number of thousands of digits"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """'; did you mean X?' with the most similar known name, '' if none is similar."""
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def environment_knobs() -> dict[str, str]:
    """Knobs that the environment sets now: name -> text."""
    by_torchrun = {"WORLD_SIZE"} if "TORCHELASTIC_RUN_ID" in os.environ else set()
    given = {name.lower(): value for name, value in os.environ.items() if value and name not in by_torchrun}
    return {name: value for name, value in given.items() if name in RunConfig.model_fields}


@lru_cache(maxsize=8)
def _misspelt(variables: tuple[str, ...]) -> dict[str, str]:
    """Environment variable -> the knob whose name it nearly is. Cached: the search takes tens of milliseconds."""
    names = [name.upper() for name in RunConfig.model_fields if "_" in name]
    candidates = [v for v in variables if "_" in v and v.lower() not in RunConfig.model_fields]
    nearest = {v: difflib.get_close_matches(v, names, n=1, cutoff=0.88) for v in candidates}
    return {variable: found[0] for variable, found in nearest.items() if found}
