"""The configuration of one run: `RunConfig(**knobs)` takes flat names and gives groups.

A knob not given comes from the environment (`PGOLF_NUM_LAYERS=12`, outside of sweeps also `NUM_LAYERS=12`), then from
the track, then from its default in knobs.py. The groups read as `.model .data .train .regularizer .export .eval`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import reprlib
import warnings
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal, get_args

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from pgolf_core.knobs import DataConfig, EvalConfig, ExportConfig, Group, ModelConfig, RegularizerConfig, TrainConfig
from pgolf_core.rules import RULES
from pgolf_core.tracks import TRACKS

CHECKOUT = Path(__file__).resolve().parents[1]  # the repository, if pyproject.toml is there; site-packages otherwise
MARKER = "pgolf-workspace.json"  # in every folder that `pgolf init` made


def find_root() -> Path | None:
    """PGOLF_ROOT, else the nearest folder of `pgolf init` from the working directory upwards, else the checkout.

    A working directory in the checkout means the checkout. None: installed from a wheel, and there is no such folder.
    """
    if given := os.environ.get("PGOLF_ROOT"):
        return Path(given)
    is_checkout = (CHECKOUT / "pyproject.toml").is_file()
    with suppress(OSError):  # the working directory was deleted
        here = Path.cwd().resolve()
        for folder in (here, *here.parents):
            if (folder / MARKER).is_file() or (is_checkout and folder == CHECKOUT):
                return folder
    return CHECKOUT if is_checkout else None


# Relative paths of knobs and the folders data/, notebooks/, runs/ and reports/ start here, so that a notebook,
# papermill and the command line mean the same file whatever their working directory.
ROOT = find_root() or Path()
PREFIX = "PGOLF_"  # of environment variables that set knobs everywhere, sweeps included

QUOTE = reprlib.Repr()
QUOTE.maxstring, QUOTE.maxother, QUOTE.maxlevel = 100, 100, 2
FIRST_DEFAULTS = {"calibration_tokens": 65_536}  # defaults that have changed since; see hash_of
HASH_EXCLUDED = {"allow_over_cap"}  # left out of the config hash: it does not affect results
# Knob: its subject, and names that other trainers give it; see no_such_knob.
ALIASES = {
    "iterations": ("the number of optimizer steps", "steps num_steps train_steps max_steps max_iters iters epochs"),
    "matrix_lr": ("the matrices' learning rate (embeddings: tied_embed_lr; vectors: scalar_lr)", "lr learning_rate"),
    "train_batch_tokens": ("the batch, in tokens per step,", "batch_size batch tokens_per_batch total_batch_size"),
    "train_seq_len": ("the length of a training sequence", "seq_len sequence_length max_seq_len block_size context "
                      "ctx_len context_length context_size n_ctx"),
    "model_dim": ("the width", "d_model dim width n_embd hidden_size hidden_dim embedding_dim"),
    "num_layers": ("the number of layers", "n_layer n_layers layers depth num_hidden_layers num_blocks"),
    "num_heads": ("the number of query heads", "n_head n_heads heads nhead num_attention_heads"),
    "num_kv_heads": ("the number of key/value heads", "n_kv_head n_kv_heads kv_heads num_key_value_heads"),
    "mlp_mult": ("the MLP's hidden units, in units of model_dim,", "mlp_ratio ffn_mult d_ff ffn_dim intermediate_size"),
    "vocab_size": ("the number of tokens of the tokenizer", "vocab n_vocab vocabulary_size"),
    "tie_embeddings": ("whether the output matrix is the embedding table", "tie_weights tied tie_word_embeddings"),
    "rope_base": ("the base of rotary wavelengths", "rope_theta theta"),
    "muon_wd": ("the matrices' weight decay (embeddings: embed_wd; vectors: adam_wd)", "weight_decay wd"),
    "muon_momentum": ("Muon's momentum", "momentum"),
    "warmdown_iters": ("the fall of learning rates, in last steps,", "warmdown cooldown decay_steps lr_decay_iters"),
    "grad_clip_norm": ("the largest norm of gradients", "clip grad_clip clip_grad max_grad_norm gradient_clip"),
    "grad_accum_steps": ("the number of passes per step", "grad_accum accumulation gradient_accumulation_steps"),
    "max_wallclock_seconds": ("the time limit, in seconds,", "time_limit max_seconds max_time wallclock seconds"),
    "world_size": ("the number of processes, one GPU each,", "gpus n_gpus num_gpus nproc nproc_per_node"),
    "seed": ("the RNG seed of the initial weights", "random_seed rng_seed"),
    "precision": ("the precision of matrix products", "dtype amp fp16 bf16"),
    "cpu_threads": ("the number of CPU threads", "threads num_threads n_threads"),
    "data_path": ("the folder of shards", "data dataset data_dir data_root"),
    "val_loss_every": ("the number of steps between validations", "eval_every eval_interval eval_steps val_every"),
    "train_log_every": ("the number of steps between log lines", "log_every log_interval logging_steps"),
    "cap_bytes": ("the size limit of the file", "cap max_bytes size_limit byte_limit bytes budget"),
    "weight_quantization_bits": ("the number of bits of absmax", "bits n_bits wbits quant_bits"),
    "quantizer": ("the quantizer of matrices", "quant quantization scheme quant_scheme"),
    "codec": ("the compression of the file", "compression compressor compress"),
    "ema_decay": ("the decay of the average of weights", "ema"),
    "eval_stride": ("the number of tokens between two scored windows", "stride"),
}  # fmt: skip


class ConfigError(ValueError):
    """Knobs that cannot work; the message names every one of them and what would be right."""


@lru_cache(maxsize=64)
def _knobs_of(group: type[Group], config: RunConfig) -> Group:
    """The group of the config's knobs, valid already; eval_seq_len is resolved: a scorer needs no other group."""
    values = config.model_dump() | {"eval_seq_len": config.eval_window}
    return group.model_construct(**{name: values[name] for name in group.model_fields})


def require_root() -> None:
    """ConfigError if find_root() found no folder."""
    if find_root() is None:
        raise ConfigError(
            f"{ROOT.absolute()}: neither it nor a folder above was made by `pgolf init`; `pgolf init DIR` makes one "
            "with the notebooks and sweeps, then work in DIR, or let PGOLF_ROOT name it"
        )


class RunConfig(ModelConfig, DataConfig, TrainConfig, RegularizerConfig, ExportConfig, EvalConfig):
    """All knobs of one run, flat and frozen. Raises ConfigError naming every bad knob of the call at once."""

    track: Literal["", "nano", "quick", "roundtrip", "fixed_step", "h100"] = Field(
        "", description="named set of values for knobs that are not given otherwise; '' = none"
    )

    def __init__(self, environment: dict[str, str] | None = None, /, **knobs):
        """environment: knobs from outside; None = environment_knobs(), and the number of processes under torchrun."""
        outside = environment_knobs(torchrun=True) if environment is None else environment
        known = {name: value for name, value in knobs.items() if name in RunConfig.model_fields}
        unknown = [name for name in knobs if name not in known]
        bad = {name: no_such_knob(name) for name in unknown}
        given = TRACKS.get(str((outside | known).get("track", "")), {}) | outside | known
        try:
            super().__init__(**given)
        except ValidationError as error:
            for e in error.errors():
                name = str(e["loc"][0])
                source = "" if name in known else f" (from the environment, {_variable(name)})"
                choices = get_args(RunConfig.model_fields[name].annotation) if e["type"] == "literal_error" else ()
                nearest = did_you_mean(str(e["input"]), choices)
                bad[name] = f"{name}={shown(e['input'])}{source}: {e['msg'][0].lower()}{e['msg'][1:]}{nearest}"
            # With defaults in place of the bad knobs the rules are still checked, so that one message says it all.
            super().__init__(**{name: value for name, value in given.items() if name not in bad})
        broken = [message for names, holds, message in RULES if not bad.keys() & names and not holds(self)]
        problems = [*bad.values(), *(message.format(c=self) for message in broken)]
        if problems:
            raise ConfigError("these knobs cannot work:\n" + "\n".join(f"  - {p}" for p in problems))
        for variable, knob in _misspelt(tuple(os.environ)).items():
            warnings.warn(f"environment variable {variable} is no knob; did you mean {knob}?", stacklevel=2)

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
        return hash_of(self.model_dump())

    def taken_from(self, environment: dict[str, str]) -> dict[str, str]:
        """The part of environment_knobs() that this config took: not what a keyword overrode."""
        took = {}
        for name, text in environment.items():
            with suppress(ValidationError):
                if TypeAdapter(RunConfig.model_fields[name].annotation).validate_python(text) == getattr(self, name):
                    took[name] = text
        return took

    def differences(self, other: RunConfig) -> dict[str, tuple]:
        """Knob -> (value here, value in other) for each knob in which the two differ."""
        ours, theirs = self.model_dump(), other.model_dump()
        return {k: (v, theirs[k]) for k, v in ours.items() if v != theirs[k]}


def hash_of(knobs: dict) -> str:
    """12 hex digits of the knobs that differ from their first defaults: a run that was made keeps its hash."""
    defaults = {name: field.default for name, field in RunConfig.model_fields.items()} | FIRST_DEFAULTS
    changed = {name: v for name, v in knobs.items() if name not in defaults or v != defaults[name]}
    return digest({name: v for name, v in changed.items() if name not in HASH_EXCLUDED})


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


def knob_of_alias(name: str) -> str:
    """The knob that other trainers call so; '' if none."""
    name = name.lower().replace("-", "_")
    return next((knob for knob, (_, aliases) in ALIASES.items() if name in aliases.split()), "")


def no_such_knob(name: str) -> str:
    """'steps: no such knob; the number of optimizer steps is iterations', or the knob that is spelled most alike."""
    knob = knob_of_alias(name)
    hint = f"; {ALIASES[knob][0]} is {knob}" if knob else did_you_mean(name, RunConfig.model_fields)
    return f"{name[:100]}: no such knob{hint or '; `pgolf knobs` lists them'}"


def environment_knobs(prefixed: bool = False, torchrun: bool = False) -> dict[str, str]:
    """Knobs that the environment sets now: name -> text.

    prefixed: only by variables that begin with PREFIX, since anything may have set SEED or DEVICE. torchrun: with
    the WORLD_SIZE that torchrun sets for its processes.
    """
    given = {name.lower(): value for name, value in os.environ.items() if value}
    if "torchelastic_run_id" in given and not torchrun:
        given.pop("world_size", "")
    ours = {name: given[PREFIX.lower() + name] for name in RunConfig.model_fields if PREFIX.lower() + name in given}
    return ours if prefixed else {name: given[name] for name in RunConfig.model_fields if name in given} | ours


def _variable(knob: str) -> str:
    """The environment variable that sets a knob."""
    names = {name.lower(): name for name, value in os.environ.items() if value}
    return names.get(PREFIX.lower() + knob) or names.get(knob, knob.upper())


@lru_cache(maxsize=8)
def _misspelt(variables: tuple[str, ...]) -> dict[str, str]:
    """Environment variable -> the knob whose name it nearly is. Cached: the search takes tens of milliseconds."""
    names = [name.upper() for name in RunConfig.model_fields if "_" in name]
    candidates = {v: v.removeprefix(PREFIX) for v in variables if "_" in v.removeprefix(PREFIX)}
    unknown = {v: name for v, name in candidates.items() if name.lower() not in RunConfig.model_fields}
    nearest = {v: difflib.get_close_matches(name, names, n=1, cutoff=0.88) for v, name in unknown.items()}
    return {variable: found[0] for variable, found in nearest.items() if found}
