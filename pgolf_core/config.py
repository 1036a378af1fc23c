"""Every knob once: typed, frozen, with its unit or reason.

`RunConfig(**knobs)` takes flat names; a knob not given comes from the environment
(`NUM_LAYERS=12`), then from the track, then from the default here. The groups read as
`.model .data .train .regularizer .export .eval`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from pgolf_core.quantization import schemes

# The checkout (editable install). Relative paths of knobs and the runs/ and reports/ folders start here,
# so that a notebook, papermill and the command line mean the same file whatever their working directory.
ROOT = Path(os.environ.get("PGOLF_ROOT", Path(__file__).resolve().parents[1]))

HASH_EXCLUDED = {
    "allow_over_cap"
}  # knobs that let a run go on and change no bit of it: with or without, it is the same
EMBEDDED = ("embedded", "embedded_large")  # values of data_path that are built where they are not there
MICROBATCHES = 8  # the reference cuts every step into 8 micro-batches: world_size × accumulation

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(gt=0)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Bits = Annotated[int, Field(ge=2, le=8)]


def _embedding_bits(bits: int) -> int:
    if bits not in (0, *range(2, 9), 16):
        raise ValueError("input should be 2 to 8, 16 (stays fp16) or 0 (as the weights)")
    return bits


def _residual_bits(bits: int) -> int:
    if bits not in (*range(2, 9), 16):
        raise ValueError("input should be 2 to 8, or 16 (float16 factors)")
    return bits


def _quantizer(text: str) -> str:
    if text:
        schemes.parse(text)
    return text


Quantizer = Annotated[str, AfterValidator(_quantizer)]


class ConfigError(ValueError):
    """Knobs that cannot work; the message names every one of them and what would be right."""


class Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelConfig(Group):
    vocab_size: Annotated[int, Field(gt=3, le=65536, description="tokens; shards are uint16")] = 1024
    num_layers: Positive = 9
    num_unique_blocks: Annotated[int, Field(ge=0, description="0 = num_layers; layer i uses block i mod this")] = 0
    num_heads: Positive = 8
    num_kv_heads: Positive = 4
    model_dim: Positive = 512
    embed_dim: Annotated[int, Field(ge=0, description="0 = model_dim; smaller factorises the embedding")] = 0
    mlp_mult: Positive = 2
    window_size: Annotated[int, Field(ge=0, description="tokens a query sees, itself included; 0 = all")] = 0
    tie_embeddings: bool = True
    rope_base: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 10000.0
    logit_softcap: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 30.0
    qk_gain_init: Annotated[float, Field(allow_inf_nan=False)] = 1.5
    tied_embed_init_std: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.005

    @property
    def blocks(self) -> int:
        return self.num_unique_blocks or self.num_layers

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads


class DataConfig(Group):
    data_path: Annotated[
        str,
        Field(description="folder of shards; embedded = the docstring corpus, embedded_large = comments too, and more"),
    ] = "embedded"
    tokenizer_path: Annotated[str, Field(description="'' = the tokenizer beside the shards")] = ""
    tokenizer: Annotated[
        Literal["", "bpe", "unigram", "bytes"],
        Field(description="of the embedded corpus, which is cut by it; '' = bpe. A folder of shards has its own"),
    ] = ""
    shuffle_documents: Annotated[
        int, Field(ge=0, description="seed of the order of training documents; 0 = as they lie in the shards")
    ] = 0
    train_batch_tokens: Annotated[int, Field(gt=0, description="tokens a step, all processes together")] = 524_288
    train_seq_len: Annotated[int, Field(gt=0, description="tokens")] = 1024
    world_size: Annotated[
        int, Field(gt=0, description="processes that train together, a GPU each; train() starts them, or torchrun did")
    ] = 1
    grad_accum_steps: Annotated[
        int,
        Field(
            ge=0, description="passes a step and process; 0 = 8 / world_size, as the reference. Fewer: larger, faster"
        ),
    ] = 0

    @property
    def grad_accum(self) -> int:
        return self.grad_accum_steps or MICROBATCHES // self.world_size

    @property
    def microbatches(self) -> int:
        """Of all MICROBATCHES, those that one process trains on in one pass."""
        return MICROBATCHES // (self.world_size * self.grad_accum)


class TrainConfig(Group):
    seed: Count = 1337
    iterations: Annotated[int, Field(gt=0, description="optimiser steps at most")] = 20_000
    max_wallclock_seconds: Annotated[
        float,
        Field(ge=0, allow_inf_nan=False, description="seconds of training, validation apart; 0 = no clock"),
    ] = 600.0
    warmdown_iters: Count = 1200
    warmup_steps: Annotated[int, Field(ge=0, description="steps run and undone, so that kernels are built")] = 20
    train_log_every: Annotated[int, Field(ge=0, description="steps; 0 = never")] = 200
    val_loss_every: Annotated[int, Field(ge=0, description="steps; 0 = only at the end")] = 1000
    embed_lr: Rate = 0.6
    head_lr: Rate = 0.008
    tied_embed_lr: Rate = 0.05
    matrix_lr: Rate = 0.04
    scalar_lr: Rate = 0.04
    muon_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    muon_backend_steps: Annotated[int, Field(gt=0, description="Newton–Schulz iterations")] = 5
    muon_dtype: Annotated[
        Literal["auto", "bfloat16", "float32"],
        Field(
            description="Newton–Schulz products; auto = bfloat16, but float32 on a CPU without bfloat16 instructions"
        ),
    ] = "auto"
    muon_momentum_warmup_start: Annotated[float, Field(ge=0, lt=1)] = 0.85
    muon_momentum_warmup_steps: Count = 500
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    adam_eps: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-8
    grad_clip_norm: Annotated[float, Field(ge=0, allow_inf_nan=False, description="0 = off")] = 0.0
    save_raw_checkpoint: bool = True
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto = cuda, else cpu")] = "auto"
    precision: Annotated[
        Literal["auto", "float32", "bfloat16"],
        Field(description="auto = bfloat16 autocast on cuda, float32 elsewhere"),
    ] = "auto"
    compile: Annotated[bool, Field(description="torch.compile the loss; on CUDA where there is Triton")] = False
    deterministic: Annotated[
        bool, Field(description="kernels on CUDA that give the same bits each time; on a CPU all do")
    ] = False
    cpu_threads: Annotated[
        int,
        Field(ge=0, description="threads of one run on a CPU, part of what makes it repeatable; 0 = all cores"),
    ] = 0
    resume_every_seconds: Annotated[
        float,
        Field(ge=0, allow_inf_nan=False, description="training lost to a kill at most; 0 = no resume file"),
    ] = 60.0


class RegularizerConfig(Group):
    compression_reg_weight: Annotated[float, Field(ge=0, allow_inf_nan=False, description="0 = off")] = 0.0
    compression_reg_interval: Annotated[int, Field(gt=0, description="steps")] = 1
    compression_reg_warmup_steps: Count = 0
    compression_reg_sample_tensors: Positive = 4
    compression_reg_max_cols: Positive = 256
    compression_grid_reg_weight: Weight = 0.0
    compression_rank1_reg_weight: Weight = 0.0
    compression_scale_reg_weight: Weight = 0.0
    ternary_reg_weight: Weight = 0.0
    outlier_reg_weight: Weight = 0.0


class ExportConfig(Group):
    cap_bytes: Annotated[int, Field(gt=0, description="bytes of artifact and code together")] = 16_000_000
    allow_over_cap: Annotated[bool, Field(description="train although its forecast is over cap_bytes")] = False
    quantizer: Annotated[Quantizer, Field(min_length=1, description="how tensors are quantised; forms in recipe")] = (
        "absmax"
    )
    embed_quantizer: Annotated[Quantizer, Field(description="of the embedding; '' = quantizer, as below")] = ""
    attn_in_quantizer: Annotated[Quantizer, Field(description="of queries, keys and values")] = ""
    attn_out_quantizer: Annotated[Quantizer, Field(description="of attention's projection")] = ""
    mlp_in_quantizer: Quantizer = ""
    mlp_out_quantizer: Quantizer = ""
    head_quantizer: Annotated[Quantizer, Field(description="of a head of its own (tie_embeddings=0)")] = ""
    weight_quantization_bits: Annotated[Bits, Field(description="of absmax")] = 8
    embed_quantization_bits: Annotated[
        int, AfterValidator(_embedding_bits), Field(description="of absmax; 0 = as the weights, 16 = stays fp16")
    ] = 0
    int8_axis_mode: Annotated[Literal["auto", "row", "col"], Field(description="of absmax")] = "auto"
    keep_float_max_numel: Annotated[int, Field(ge=0, description="matrices up to so many elements stay float16")] = (
        65_536
    )
    control_dtype: Annotated[Literal["float32", "float16"], Field(description="of control vectors")] = "float32"
    allocation: Annotated[
        Literal["fixed", "solve"],
        Field(
            description="solve = steps of every tensor so that the file just fits cap_bytes; no quantizer knob counts"
        ),
    ] = "fixed"
    gptq: Annotated[bool, Field(description="round column by column, mending the next for the errors so far")] = False
    gptq_damp: Annotated[float, Field(gt=0, le=1, description="share of the mean diagonal added to it")] = 0.01
    gptq_block: Positive = 128
    gptq_act_order: Annotated[bool, Field(description="columns of large inputs first")] = True
    calibration_tokens: Annotated[int, Field(gt=0, description="of the training split")] = 65_536
    int8_residual_rank: Annotated[int, Field(ge=0, le=256)] = 0
    int8_residual_bits: Annotated[
        int, AfterValidator(_residual_bits), Field(description="of the factors; 16 = float16")
    ] = 16
    int8_residual_group: Annotated[int, Field(gt=0, description="integers of a factor that share a scale")] = 64
    int8_residual_budget_bytes: Annotated[int, Field(ge=0, description="of factors before compression")] = 0
    int8_residual_power_iters: Positive = 6
    int8_targeted_residual_mode: Literal[
        "off", "early_proj_combo", "all_mlp_proj", "early_mlp_proj", "all_attn_proj", "early_combo"
    ] = "off"
    mlp_permutation: Annotated[bool, Field(description="sort hidden units; same function, fewer bytes")] = False
    codec: Annotated[
        Literal["zlib", "lzma", "brotli", "ans", "auto"], Field(description="auto = the smallest of them")
    ] = "zlib"

    @property
    def embed_bits(self) -> int:
        return self.embed_quantization_bits or self.weight_quantization_bits

    @property
    def low_rank_residuals(self) -> bool:
        """Residuals other than the reference's float16 pair: fitted by calibration."""
        rank_one = self.int8_residual_rank == 1 and self.int8_residual_bits == 16
        return bool(self.int8_residual_rank and self.int8_residual_budget_bytes and not rank_one)

    @property
    def needs_calibration(self) -> bool:
        """Whether training text decides how tensors are rounded."""
        fisher = any(value.endswith(":fisher") for name, value in self if name.endswith("quantizer"))
        return self.gptq or fisher or self.low_rank_residuals or self.allocation == "solve"


class EvalConfig(Group):
    val_batch_size: Annotated[int, Field(gt=0, description="tokens")] = 524_288
    val_max_tokens: Annotated[int, Field(ge=0, description="0 = all, but for the rest of a window at the end")] = 0
    roundtrip_val_max_tokens: Annotated[int, Field(ge=0, description="the same of the file's score")] = 0
    val_max_documents: Annotated[
        int,
        Field(ge=0, description="score the first documents, whole, instead of tokens: the same text by any tokenizer"),
    ] = 0
    roundtrip_val_max_documents: Annotated[int, Field(ge=0, description="the same of the file's score")] = 0
    final_roundtrip_eval: Annotated[bool, Field(description="export, read back from disk and score")] = True
    eval_seq_len: Annotated[int, Field(ge=0, description="tokens; 0 = train_seq_len")] = 0
    eval_stride: Annotated[int, Field(ge=0, description="tokens; 0 = windows do not overlap")] = 0
    sw_eval_batch: Annotated[int, Field(gt=0, description="sliding windows a batch")] = 32
    eval_cache_mix_weight: Weight = 0.0
    eval_bigram_mix_weight: Weight = 0.0
    eval_cache_size: Annotated[int, Field(ge=0, description="tokens the n-gram cache looks back")] = 0
    eval_cache_delay: Annotated[
        int, Field(ge=0, le=1, description="0 = aligned; 1 = the reference's, one position late")
    ] = 0


# Named budgets over the same knobs. The seed's tracks are as its author ran them (one RTX 3090, 180 s).
_SEED_SHAPE = dict(num_layers=12, model_dim=384, num_heads=6, num_kv_heads=3)
_SEED_SWEEP = dict(
    compile=True, train_batch_tokens=32_768, val_batch_size=32_768, warmup_steps=0,
    compression_reg_interval=4, compression_reg_warmup_steps=32, compression_reg_max_cols=128,
    int8_residual_rank=1, int8_residual_budget_bytes=65_536,
)  # fmt: skip
TRACKS: dict[str, dict] = {
    "nano": dict(  # about a minute a run on one CPU thread, so two runs at a time on two cores
        num_layers=2, model_dim=192, num_heads=4, num_kv_heads=2,
        train_seq_len=256, train_batch_tokens=4096, iterations=120, max_wallclock_seconds=0, warmup_steps=0,
        warmdown_iters=60, muon_momentum_warmup_steps=60, train_log_every=10, val_loss_every=40,
        val_batch_size=8192, val_max_tokens=65_536, roundtrip_val_max_tokens=65_536,
        compression_reg_interval=4, compression_reg_warmup_steps=16, compression_reg_max_cols=128,
        cap_bytes=1_000_000, cpu_threads=1, resume_every_seconds=5,
    ),
    "quick": dict(
        **_SEED_SHAPE, **_SEED_SWEEP, max_wallclock_seconds=180, val_max_tokens=1_048_576, final_roundtrip_eval=False
    ),
    "roundtrip": dict(
        **_SEED_SHAPE, **_SEED_SWEEP, max_wallclock_seconds=180,
        val_max_tokens=524_288, roundtrip_val_max_tokens=262_144,
    ),
    "fixed_step": dict(
        **_SEED_SHAPE, **_SEED_SWEEP, iterations=300, max_wallclock_seconds=0, deterministic=True,
        val_max_tokens=524_288, roundtrip_val_max_tokens=262_144,
    ),
    "h100": dict(num_layers=9, model_dim=512, num_heads=8, num_kv_heads=4, max_wallclock_seconds=600, compile=True),
}  # fmt: skip


class _TrackSource(PydanticBaseSettingsSource):
    """The track's knobs, weaker than keyword and environment, stronger than defaults."""

    def get_field_value(self, field, field_name):
        raise NotImplementedError  # the base class asks for it; __call__ gives all fields at once

    def __call__(self) -> dict:
        return TRACKS.get(self.current_state.get("track", ""), {})


class RunConfig(BaseSettings, ModelConfig, DataConfig, TrainConfig, RegularizerConfig, ExportConfig, EvalConfig):
    """All knobs of one run, flat. Raises ConfigError naming every bad knob of the call at once.

    `RunConfig(track="nano", num_layers=6)`; unset knobs come from the environment, then the track, then
    the defaults. Frozen; `config.with_knobs(seed=2)` is another one.
    """

    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_ignore_empty=True)

    track: Literal["", "nano", "quick", "roundtrip", "fixed_step", "h100"] = ""

    def __init__(self, **knobs):
        unknown = [name for name in knobs if name not in RunConfig.model_fields]
        problems = [_unknown(name) for name in unknown]
        known = {name: value for name, value in knobs.items() if name not in unknown}
        bad: dict[str, str] = {}
        try:
            super().__init__(**known)
        except ValidationError as error:
            for e in error.errors():
                name = str(e["loc"][0]).lower()
                source = "" if name in known else f" (from the environment, {name.upper()})"
                bad[name] = f"{name}={e['input']!r}{source}: {e['msg'][0].lower()}{e['msg'][1:]}"
            # The other knobs are still held against each other, so that one message says it all.
            super().__init__(**known | {name: RunConfig.model_fields[name].default for name in bad})
        problems += bad.values()
        problems += [
            message.format(c=self) for names, holds, message in RULES if not bad.keys() & names and not holds(self)
        ]
        if problems:
            raise ConfigError("these knobs cannot work:\n" + "\n".join(f"  - {p}" for p in problems))
        _warn_of_misspelt_environment()

    @classmethod
    def settings_customise_sources(
        cls, settings_cls, init_settings, env_settings, dotenv_settings, file_secret_settings
    ):
        return init_settings, env_settings, _TrackSource(settings_cls)

    @classmethod
    def from_file(cls, path: str | Path, **knobs) -> RunConfig:
        """Knobs of a YAML or JSON file (a run's config.json too); keywords are stronger."""
        try:
            loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not YAML or JSON ({' '.join(str(error).split())})") from error
        if not isinstance(loaded, dict):
            raise ConfigError(f"{path}: expected a mapping of knobs, found {type(loaded).__name__}")
        loaded = {str(name): value for name, value in loaded.items()}
        resolved = cls.model_fields.keys() <= loaded.keys()  # a run's config.json: a track has nothing to give
        if resolved and knobs.get("track", loaded.get("track")) != loaded.get("track"):
            raise ConfigError(f"track={knobs['track']}: {path} sets every knob, so a track would only rename the run")
        return cls(**loaded | knobs)

    def with_knobs(self, **knobs) -> RunConfig:
        return RunConfig(**self.model_dump() | knobs)

    @property
    def model(self) -> ModelConfig:
        return self._group(ModelConfig)

    @property
    def data(self) -> DataConfig:
        return self._group(DataConfig)

    @property
    def train(self) -> TrainConfig:
        return self._group(TrainConfig)

    @property
    def regularizer(self) -> RegularizerConfig:
        return self._group(RegularizerConfig)

    @property
    def export(self) -> ExportConfig:
        return self._group(ExportConfig)

    @property
    def eval(self) -> EvalConfig:
        """eval_seq_len resolved: a scorer needs no other group."""
        return self._group(EvalConfig).model_copy(update={"eval_seq_len": self.eval_window})

    def _group(self, group):
        return group(**{name: getattr(self, name) for name in group.model_fields})

    @property
    def eval_window(self) -> int:
        """Tokens of context a validation window holds."""
        return self.eval_seq_len or self.train_seq_len

    @property
    def hash(self) -> str:
        """12 hex digits that name these knobs."""
        return digest(self.model_dump(exclude=HASH_EXCLUDED))

    def differences(self, other: RunConfig) -> dict[str, tuple]:
        """Knob -> (here, there) where the two differ."""
        ours, theirs = self.model_dump(), other.model_dump()
        return {k: (v, theirs[k]) for k, v in ours.items() if v != theirs[k]}


def digest(content: dict) -> str:
    """12 hex digits that name what a JSON object says, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


# (knobs named, what must hold, what to say when it does not)
RULES = [
    ({"model_dim", "num_heads"}, lambda c: c.model_dim % c.num_heads == 0,
     "num_heads={c.num_heads} does not divide model_dim={c.model_dim}"),
    ({"model_dim", "num_heads"}, lambda c: c.model_dim % c.num_heads or c.head_dim % 2 == 0,
     "head dimension model_dim/num_heads={c.head_dim} is odd; rotary embedding needs it even"),
    ({"num_heads", "num_kv_heads"}, lambda c: c.num_heads % c.num_kv_heads == 0,
     "num_kv_heads={c.num_kv_heads} does not divide num_heads={c.num_heads}"),
    ({"num_unique_blocks", "num_layers"}, lambda c: c.num_unique_blocks <= c.num_layers,
     "num_unique_blocks={c.num_unique_blocks} is more than num_layers={c.num_layers}; some would never be used"),
    ({"embed_dim", "model_dim"}, lambda c: c.embed_dim <= c.model_dim,
     "embed_dim={c.embed_dim} is more than model_dim={c.model_dim}"),
    ({"world_size"}, lambda c: MICROBATCHES % c.world_size == 0,
     "world_size={c.world_size} does not divide 8; use 1, 2, 4 or 8 processes"),
    ({"world_size", "device"}, lambda c: c.world_size == 1 or c.device in ("auto", "cpu", "cuda"),
     "device={c.device} is one device, and world_size={c.world_size} processes need one each: auto, cuda or cpu"),
    ({"world_size", "grad_accum_steps"},
     lambda c: MICROBATCHES % c.world_size or not c.grad_accum_steps
     or MICROBATCHES // c.world_size % c.grad_accum_steps == 0,
     "grad_accum_steps={c.grad_accum_steps} does not divide 8 / world_size={c.world_size}; 0 is the reference's"),
    ({"train_batch_tokens", "train_seq_len"}, lambda c: c.train_batch_tokens % (MICROBATCHES * c.train_seq_len) == 0,
     "train_batch_tokens={c.train_batch_tokens} is not a multiple of 8 × train_seq_len={c.train_seq_len} "
     "(world size × accumulation is 8)"),
    ({"eval_stride", "eval_seq_len", "train_seq_len"}, lambda c: c.eval_stride <= c.eval_window,
     "eval_stride={c.eval_stride} is more than the window of {c.eval_window} tokens; targets would be skipped"),
    ({"val_batch_size", "eval_seq_len", "train_seq_len"}, lambda c: c.val_batch_size >= c.eval_window,
     "val_batch_size={c.val_batch_size} holds no window of {c.eval_window} tokens"),
    ({"eval_seq_len", "train_seq_len", "val_max_tokens"}, lambda c: not 0 < c.val_max_tokens < c.eval_window,
     "val_max_tokens={c.val_max_tokens} is less than one window of {c.eval_window} tokens"),
    ({"eval_seq_len", "train_seq_len", "roundtrip_val_max_tokens"},
     lambda c: not 0 < c.roundtrip_val_max_tokens < c.eval_window,
     "roundtrip_val_max_tokens={c.roundtrip_val_max_tokens} is less than one window of {c.eval_window} tokens"),
    ({"eval_cache_mix_weight", "eval_bigram_mix_weight", "eval_cache_size"},
     lambda c: c.eval_cache_size or not (c.eval_cache_mix_weight or c.eval_bigram_mix_weight),
     "eval_cache_size=0 leaves the n-gram cache's weights without effect; give it the tokens to look back"),
    ({"allocation", "mlp_permutation"}, lambda c: c.allocation == "fixed" or not c.mlp_permutation,
     "mlp_permutation has no effect with allocation=solve, whose codes know no order of units; leave it 0"),
    ({"mlp_permutation", "int8_residual_rank", "int8_residual_bits"},
     lambda c: not (c.mlp_permutation and c.low_rank_residuals),
     "mlp_permutation cannot be combined with low-rank residuals (int8_residual_rank={c.int8_residual_rank}, "
     "int8_residual_bits={c.int8_residual_bits}), whose statistics know the hidden units by the trained order"),
    ({"tokenizer", "data_path"}, lambda c: not c.tokenizer or c.data_path in EMBEDDED,
     "tokenizer={c.tokenizer} is for the embedded corpus; the shards in data_path={c.data_path} are cut already: leave "
     "it empty, or cut their documents anew with `pgolf data docs --tokenizer {c.tokenizer}`"),
    ({"tokenizer", "vocab_size"}, lambda c: c.tokenizer != "bytes" or c.vocab_size == 260,
     "tokenizer=bytes has 256 bytes and 4 special tokens: set vocab_size=260, not {c.vocab_size}"),
]  # fmt: skip


def _unknown(name: str) -> str:
    return f"{name}: no such knob" + did_you_mean(name, RunConfig.model_fields)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """'; did you mean X?' with the most similar known name, '' if none is similar."""
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def environment_knobs() -> dict[str, str]:
    """Knobs that the environment sets now: name -> text."""
    started = {"WORLD_SIZE"} if "TORCHELASTIC_RUN_ID" in os.environ else set()  # torchrun's, not the user's
    return {
        k.lower(): v for k, v in os.environ.items() if k.lower() in RunConfig.model_fields and v and k not in started
    }


def _warn_of_misspelt_environment() -> None:
    names = [name.upper() for name in RunConfig.model_fields if "_" in name]
    for variable in os.environ:
        if "_" not in variable or variable.lower() in RunConfig.model_fields:
            continue
        if nearest := difflib.get_close_matches(variable, names, n=1, cutoff=0.88):
            warnings.warn(f"environment variable {variable} is no knob; did you mean {nearest[0]}?", stacklevel=3)
