"""Every knob once: its group, type, range, default, unit or reason.

`RunConfig` in config.py is all groups together, `TRACKS` in tracks.py the named sets of values, `RULES` in rules.py
the conditions that hold between knobs.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from pgolf_core.scheme import parse_scheme

MICROBATCHES = 8  # per step: world_size × grad_accum × microbatches per pass
BOS = 1  # token that begins a document
EMBEDDED = ("embedded", "embedded_large")  # values of data_path that are built on first use

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(gt=0)]
Layers = Annotated[int, Field(gt=0, le=10_000)]
Width = Annotated[int, Field(gt=0, le=1_000_000)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Above0 = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _check_quantizer(text: str) -> str:
    if text:
        parse_scheme(text)
    return text


def parse_schedule(text: str) -> list[tuple[int, float]]:
    """(value, until) of '1024@0.1,2048@0.7': 1024 until a tenth of training, 2048 until seven tenths."""
    parts = [part.partition("@") for part in text.split(",") if text]
    with suppress(ValueError):
        steps = [(int(value), float(until)) for value, _, until in parts]
        ends = [0.0, *(until for _, until in steps)]
        if ends == sorted(set(ends)) and ends[-1] <= 1 and all(value > 0 for value, _ in steps):
            return steps
    raise ValueError("write values and the shares of training until which they hold, as 1024@0.1,2048@0.7")


Schedule = Annotated[str, Field(max_length=200), AfterValidator(lambda text: text if parse_schedule(text) else "")]
Quantizer = Annotated[str, AfterValidator(_check_quantizer)]


class Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelConfig(Group):
    vocab_size: int = Field(1024, gt=3, le=65536, description="tokens of the tokenizer; shards are uint16")
    num_layers: Layers = Field(9, description="layers; the first half feeds skip connections to the second")
    num_unique_blocks: Count = Field(0, description="blocks of weights, layer i using block i mod this; 0 = num_layers")
    num_heads: Positive = Field(8, description="query heads; divides model_dim into an even head dimension")
    num_kv_heads: Positive = Field(4, description="key/value heads, shared by groups of query heads; divides num_heads")
    model_dim: Width = Field(512, description="width of the residual stream")
    embed_dim: Count = Field(0, description="width of the embedding table; a smaller one is projected; 0 = model_dim")
    mlp_mult: Layers = Field(2, description="hidden units of an MLP, in units of model_dim")
    window_size: Count = Field(0, description="tokens a query attends to, itself included; 0 = all before it")
    document_mask: bool = Field(False, description="a token sees its own document only, in training and scoring")
    tie_embeddings: bool = Field(True, description="the output matrix is the embedding table; 0 = a head of its own")
    rope_base: Above0 = Field(10000.0, description="base of the rotary embedding's wavelengths")
    logit_softcap: Above0 = Field(30.0, description="logits are cap · tanh(logits / cap)")
    qk_gain_init: Finite = Field(1.5, description="start of the learned gain per query head")
    tied_embed_init_std: Weight = Field(0.005, description="standard deviation of a tied embedding at the start")
    rope_dims: Count = Field(0, description="dimensions per head that are rotated; 0 = all")
    ln_scale: bool = Field(False, description="norms of layer i are multiplied by 1 / √(i + 1)")
    xsa_last: Count = Field(0, description="last layers whose heads drop the part along the token's own value; 0 = off")
    attn_gate: Literal["off", "dense", "sparse", "doubled"] = Field("off", description="heads × σ(W u), u attention's "
                       "input; dense = all of u, sparse = its first entries, doubled = 2σ of these")  # fmt: skip
    attn_gate_width: Positive = Field(12, description="entries of u that a sparse or doubled gate reads")
    attn_gate_scale: Finite = Field(1.0, description="factor of W u in the gates of heads")
    mlp_slope: float = Field(0.0, ge=0, le=1, description="the MLP squares z above 0 and this × z below; 0 = relu²")
    skip_gates: bool = Field(False, description="skips are mixed in by a learned gate, half and half at the start")
    parallel_from: Count = Field(0, description="first layer with MLP beside attention; 0 = all, num_layers = none")
    residual_lanes: int = Field(1, ge=1, le=2, description="2 = own lanes of attention and MLP, from parallel_from on")
    loop_start: Count = Field(0, description="first layer, from 0 = the lowest, of those that loop_extra repeats")
    loop_end: Count = Field(0, description="last layer, from 0 = the lowest, of those that loop_extra repeats")
    loop_extra: int = Field(0, ge=0, le=100, description="more passes through layers loop_start to loop_end; 0 = off")
    halting: Literal["off", "act"] = Field("off", description="act = each token may leave the loops after any pass, by "
        "a learned gate: the states after all passes are weighted by the chance to leave then")  # fmt: skip
    ponder_cost: Weight = Field(0.01, description="halting: nats per token and pass that training adds to the loss")
    halting_eval: Literal["expected", "threshold", "fixed"] = Field("expected", description="passes at scoring: "
        "expected = weighted as in training; threshold = a token leaves once it has probably left; fixed = all take "
        "halting_passes, with or without halting")  # fmt: skip
    halting_threshold: float = Field(0.5, gt=0, lt=1, description="probability of having left at which a token leaves")
    halting_passes: Count = Field(0, description="passes of halting_eval=fixed; 0 = all, 1 + loop_extra")
    smear_gate: Literal["off", "v1", "v2"] = Field("off", description="mix in the embedding of the document's token "
        "before: v1 = by dimension, after the norm; v2 = by a gate on 12 dimensions, before it")  # fmt: skip
    bigram_vocab_size: int = Field(0, ge=0, le=1_000_000, description="rows of a hashed table of token pairs; 0 = off")
    bigram_dim: Width = Field(128, description="width of the table of token pairs")
    ve_last: Count = Field(0, description="last layers whose values get an embedding of the token; 0 = off")
    ve_dim: Width = Field(128, description="width of the table of value embeddings")
    orthogonal_init: bool = Field(False, description="start query, key, value and MLP input matrices orthogonal")
    asymmetric_softcap: bool = Field(False, description="learn logit_softcap, one for logits above 0 and one below")
    weights: Literal["own", "basis", "hypernetwork", "random"] = Field("own", description="matrices of blocks: own; "
        "basis = combinations of weight_bases that all share; hypernetwork = the same, coefficients by a network "
        "on an embedding of the block; random = fixed maps from weight_seed, scales of rows, weight_rank")  # fmt: skip
    weight_bases: Layers = Field(4, description="bases of each kind of matrix; at most the number of blocks")
    weight_coefficients: Literal["free", "legendre"] = Field("free", description="of weights=basis: learned by block "
        "and kind, or Legendre polynomials of depth, which are fixed")  # fmt: skip
    weight_hidden: Width = Field(8, description="width of the hypernetwork and its embedding")
    weight_rank: Count = Field(0, description="rank of what each generated matrix learns for itself; 0 = none")
    weight_row_scale: bool = Field(False, description="learn a scale of each row of a generated matrix")
    weight_seed: int = Field(1, ge=1, le=1_000_000_000, description="RNG seed of the maps of weights=random")

    @property
    def blocks(self) -> int:
        return self.num_unique_blocks or self.num_layers

    def passes(self, looping: bool = True) -> list[int]:
        """Layers in the order in which tokens pass them; looping: with the extra passes."""
        layers = [*range(self.num_layers)]
        band = layers[self.loop_start : self.loop_end + 1]
        return layers[: self.loop_end + 1] + band * (self.loop_extra * looping) + layers[self.loop_end + 1 :]

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads


class DataConfig(Group):
    data_path: str = Field("embedded", description="folder of shards; embedded = the docstring corpus, embedded_large "
                           "= with comments, twice as many tokens")  # fmt: skip
    tokenizer_path: str = Field("", description="tokenizer file; '' = the one beside the shards")
    tokenizer: Literal["", "bpe", "unigram", "bytes"] = Field("", description="for the embedded corpus; '' = bpe")
    text_transform: Literal["", "caseops"] = Field("", description="transform of the embedded corpus's text before its "
                            "tokenizer; caseops = capitals are operators, scored over the original bytes")  # fmt: skip
    shuffle_documents: Count = Field(0, description="RNG seed of the order of training documents; 0 = shard order")
    shuffle_sequences: Count = Field(0, description="RNG seed of the order of whole training sequences; 0 = off")
    coprime_sequences: Count = Field(0, description="RNG seed of a coprime stride through every shard; 0 = off")
    train_batch_tokens: Positive = Field(524_288, description="tokens per step, all processes together")
    train_seq_len: Positive = Field(1024, description="tokens per training sequence")
    train_batch_schedule: Schedule = Field("", description="train_batch_tokens earlier, as train_seq_schedule")
    train_seq_schedule: Schedule = Field("", description="train_seq_len earlier; 512@0.1,1024@0.5 = until 10 %, 50 %")
    world_size: Positive = Field(1, description="processes that train together, one GPU each: 1, 2, 4 or 8")
    grad_accum_steps: Count = Field(0, description="passes per step and process; 0 = 8 / world_size, as the reference")

    @property
    def grad_accum(self) -> int:
        return self.grad_accum_steps or MICROBATCHES // self.world_size

    def stage(self, fraction: float) -> tuple[int, int]:
        """(tokens per step, tokens per sequence) after this share of training."""
        if not (self.train_batch_schedule or self.train_seq_schedule):
            return self.train_batch_tokens, self.train_seq_len
        batch = [value for value, until in parse_schedule(self.train_batch_schedule) if fraction < until]
        length = [value for value, until in parse_schedule(self.train_seq_schedule) if fraction < until]
        return (*batch, self.train_batch_tokens)[0], (*length, self.train_seq_len)[0]

    @property
    def stages(self) -> list[tuple[int, int]]:
        """Every stage of the training, in order."""
        ends = parse_schedule(self.train_batch_schedule) + parse_schedule(self.train_seq_schedule)
        return list(dict.fromkeys(self.stage(f) for f in (0.0, *sorted(until for _, until in ends if until < 1))))

    @property
    def microbatches(self) -> int:
        """Micro-batches that one process trains on in one pass."""
        return MICROBATCHES // (self.world_size * self.grad_accum)


class TrainConfig(Group):
    seed: Count = Field(1337, description="RNG seed of the initial weights")
    iterations: Positive = Field(20_000, description="optimizer steps, at most")
    max_wallclock_seconds: Weight = Field(600.0, description="seconds of training, validation excluded; 0 = no limit")
    warmdown_iters: Count = Field(1200, description="steps over which learning rates fall linearly to 0 at the end")
    warmdown_frac: float = Field(0.0, ge=0, le=1, description="warmdown as a share of training; 0 = warmdown_iters")
    min_lr: float = Field(
        0.0, ge=0, le=1, description="floor of falling learning rates, as a share of full ones; 0 = none"
    )
    loop_from: float = Field(0.0, ge=0, lt=1, description="share of training before loop_extra is on; 0 = always on")
    warmup_steps: Count = Field(20, description="steps run and undone before the timer starts, to build kernels")
    train_log_every: Count = Field(200, description="steps between training log lines; 0 = none")
    val_loss_every: Count = Field(1000, description="steps between validations; 0 = only at the end")
    embed_lr: Weight = Field(0.6, description="Adam's learning rate of an untied embedding")
    head_lr: Weight = Field(0.008, description="Adam's learning rate of an untied head")
    tied_embed_lr: Weight = Field(0.05, description="Adam's learning rate of a tied embedding")
    matrix_lr: Weight = Field(0.04, description="Muon's learning rate of the matrices in the blocks")
    scalar_lr: Weight = Field(0.04, description="Adam's learning rate of control vectors and gains")
    muon_wd: Weight = Field(0.0, description="weight decay of Muon's matrices: W ← W(1 − rate · this); 0 = off")
    embed_wd: Weight = Field(0.0, description="decoupled weight decay of embedding tables; 0 = off")
    adam_wd: Weight = Field(0.0, description="decoupled weight decay of vectors, gains, an untied head; 0 = off")
    wd_taper_start_frac: float = Field(0.7, ge=0, lt=1, description="share of training after which muon_wd is tapered")
    wd_taper_final_mult: Weight = Field(1.0, description="factor of muon_wd at the end, reached linearly; 1 = no taper")
    muon_momentum: float = Field(0.95, ge=0, lt=1, description="Muon's momentum after its warm-up")
    muon_backend_steps: Positive = Field(5, description="Newton–Schulz iterations of each update")
    muon_row_normalize: bool = Field(False, description="divide rows by their norm before Newton–Schulz (MuonEq-R)")
    muon_polar_express: bool = Field(False, description="its Polar Express coefficients, for at most 5 iterations")
    muon_dtype: Literal["auto", "bfloat16", "float32"] = Field("auto", description="Newton–Schulz products; auto = "
                        "bfloat16, but float32 on a CPU without its instructions")  # fmt: skip
    muon_momentum_warmup_start: float = Field(0.85, ge=0, lt=1, description="Muon's momentum at step 0")
    muon_momentum_warmup_steps: Count = Field(500, description="steps over which Muon's momentum rises linearly")
    beta1: float = Field(0.9, ge=0, lt=1, description="Adam's decay of the mean gradient")
    beta2: float = Field(0.95, ge=0, lt=1, description="Adam's decay of the mean squared gradient")
    adam_eps: Above0 = Field(1e-8, description="added to Adam's denominator")
    grad_clip_norm: Weight = Field(0.0, description="gradients are scaled down to this norm; 0 = off")
    ema_decay: float = Field(0.0, ge=0, lt=1, description="decay per step of the average weights to score; 0 = off")
    swa_every: Count = Field(0, description="score and export the mean of weights so many steps apart; 0 = off")
    swa_start_frac: float = Field(0.4, gt=0, le=1, description="swa_every begins when rates fall below this share")
    save_raw_checkpoint: bool = Field(True, description="keep checkpoint.safetensors; without it no later re-export")
    device: str = Field("auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto = cuda if present, else cpu")
    precision: Literal["auto", "float32", "bfloat16", "mixed"] = Field("auto", description="auto = bfloat16 on cuda, "
                        "else float32; mixed = as auto, but a CPU with AMX trains in bfloat16")  # fmt: skip
    compile: bool = Field(False, description="torch.compile the loss; on CUDA only if Triton is installed")
    deterministic: bool = Field(False, description="CUDA kernels that give the same bits each time; CPU ones all do")
    cpu_threads: Count = Field(0, description="threads per run on a CPU; their number affects the bits; 0 = all cores")
    resume_every_seconds: Weight = Field(60.0, description="training lost to a kill, at most; 0 = no resume file")

    def precision_on(self, device: str) -> str:
        """Name of the dtype of scoring's matrix products on a kind of device (cpu, cuda, mps)."""
        usual = "bfloat16" if device == "cuda" else "float32"
        return usual if self.precision in ("auto", "mixed") else self.precision


class RegularizerConfig(Group):
    compression_reg_weight: Weight = Field(0.0, description="factor of absmax's squared error and the terms; 0 = off")
    compression_reg_interval: Positive = Field(1, description="steps between penalized ones")
    compression_reg_warmup_steps: Count = Field(0, description="first steps without a penalty; 0 = none")
    compression_reg_sample_tensors: Positive = Field(4, description="matrices drawn per penalized step")
    compression_reg_max_cols: Positive = Field(256, description="columns used of each drawn matrix")
    compression_grid_reg_weight: Weight = Field(0.0, description="term: squared distance to the nearest level; 0 = off")
    compression_rank1_reg_weight: Weight = Field(0.0, description="term: error left by a rank-1 residual; 0 = off")
    compression_scale_reg_weight: Weight = Field(0.0, description="term: squared log ratio of next rows' rms; 0 = off")
    ternary_reg_weight: Weight = Field(0.0, description="term: squared distance to 0 and ± the mean magnitude; 0 = off")
    outlier_reg_weight: Weight = Field(0.0, description="term: largest magnitude per row over the mean; 0 = off")


class ExportConfig(Group):
    cap_bytes: Positive = Field(16_000_000, description="bytes of artifact and code together, at most")
    allow_over_cap: bool = Field(False, description="train although the size estimate is over cap_bytes")
    quantizer: Quantizer = Field("absmax", min_length=1, description="quantizer of the matrices, a word and its "
                                 "arguments; `absmax`, `sdclip:BITS:K`, `step:C[:row|:fisher]`, `ternary`, "
                                 "`binary`, `codebook:SIZE:DIMENSION[:RATE]`, `float16`")  # fmt: skip
    embed_quantizer: Quantizer = Field("", description="quantizer of embedding tables; '' = quantizer")
    attn_in_quantizer: Quantizer = Field("", description="quantizer of query, key and value matrices; '' = quantizer")
    attn_out_quantizer: Quantizer = Field("", description="quantizer of attention's output matrix; '' = quantizer")
    mlp_in_quantizer: Quantizer = Field("", description="quantizer of an MLP's first matrix; '' = quantizer")
    mlp_out_quantizer: Quantizer = Field("", description="quantizer of an MLP's second matrix; '' = quantizer")
    head_quantizer: Quantizer = Field("", description="quantizer of an untied head; '' = quantizer")
    weight_quantization_bits: int = Field(8, ge=2, le=8, description="bits of absmax")
    embed_quantization_bits: int = Field(0, description="of tables: 0 = weight_quantization_bits, 16 = stays float16")
    int8_axis_mode: Literal["auto", "row", "col"] = Field("auto", description="absmax: one scale per row or per "
                            "column; auto = whichever has the smaller error")  # fmt: skip
    keep_float_max_numel: Count = Field(65_536, description="matrices of at most this many elements stay float16")
    control_dtype: Literal["float32", "float16"] = Field("float32", description="stored type of control tensors")
    allocation: Literal["fixed", "solve"] = Field("fixed", description="solve = step sizes of every tensor so that the "
                        "file just fits cap_bytes; the quantizer knobs are then not used")  # fmt: skip
    gptq: bool = Field(False, description="GPTQ: round column by column, compensating in the columns not yet rounded")
    gptq_damp: float = Field(0.01, gt=0, le=1, description="GPTQ: fraction of the mean diagonal added to the diagonal")
    gptq_block: Positive = Field(128, description="GPTQ: columns between two updates of all later ones")
    gptq_act_order: bool = Field(True, description="GPTQ: columns of large inputs first")
    calibration_tokens: Positive = Field(32_768, description="tokens of the training split used for calibration")
    learn_steps: int = Field(0, ge=0, le=1_000_000, description="updates of levels and float tensors towards "
                             "the raw model's predictions on training text; 0 = off")  # fmt: skip
    learn_tokens: int = Field(2048, gt=0, le=1_000_000, description="tokens of training text per update of "
                              "learn_steps, rounded up to whole sequences")  # fmt: skip
    learn_labels: float = Field(0.0, ge=0, le=1, description="share of learn_steps that have the text's own "
                                "loss: training that goes on, on the file's levels; 0 = none")  # fmt: skip
    learn_rate: Above0 = Field(0.003, description="Adam's rate of the levels in learn_steps, in steps of the grid")
    int8_residual_rank: int = Field(0, ge=0, le=256, description="rank of residual corrections; 0 = none")
    int8_residual_bits: int = Field(16, description="bits of a residual's factors; 16 = float16")
    int8_residual_group: Positive = Field(64, description="integers of a residual's factor that share a scale")
    int8_residual_budget_bytes: Count = Field(0, description="bytes of all residuals before compression; 0 = none")
    int8_residual_power_iters: Positive = Field(6, description="power iterations of a rank-1 residual")
    int8_targeted_residual_mode: Literal[
        "off", "early_proj_combo", "all_mlp_proj", "early_mlp_proj", "all_attn_proj", "early_combo", "largest_3"
    ] = Field("off", description="matrices that may have a residual: off = all; early_proj_combo = all, output "
              "matrices of blocks 0 to 3 first; largest_3 = the three of the largest quantization error; the others = "
              "only those they name")  # fmt: skip
    mlp_permutation: bool = Field(False, description="sort hidden neurons; same function, fewer bytes under zlib")
    codec: Literal["zlib", "lzma", "brotli", "brotli_shuffle", "ans", "auto"] = Field("zlib", description="compression "
                   "of the artifact's sections; brotli_shuffle = even bytes, then odd ones, as in the records; auto = "
                   "the smallest of the others per section")  # fmt: skip

    @property
    def embed_bits(self) -> int:
        return self.embed_quantization_bits or self.weight_quantization_bits

    @property
    def own_quantizers(self) -> bool:
        """Whether a group of tensors has a quantizer of its own."""
        return any(value for name, value in self if name.endswith("_quantizer"))

    @property
    def low_rank_residuals(self) -> bool:
        """Whether residuals are other than the reference's float16 pair, and so fitted by calibration."""
        rank_one = self.int8_residual_rank == 1 and self.int8_residual_bits == 16
        return bool(self.int8_residual_rank and self.int8_residual_budget_bytes and not rank_one)

    @property
    def needs_calibration(self) -> bool:
        """Whether training text decides how tensors are rounded."""
        if self.gptq or self.low_rank_residuals or self.allocation == "solve":
            return True
        chosen = [value for name, value in self if name.endswith("quantizer") and value]
        return any(parse_scheme(text).needs_calibration for text in chosen)


class EvalConfig(Group):
    val_batch_size: Positive = Field(524_288, description="tokens scored per batch, without stride")
    val_max_tokens: Count = Field(0, description="validation tokens scored in training; 0 = all whole windows")
    roundtrip_val_max_tokens: Count = Field(0, description="validation tokens of the artifact's score; 0 = all")
    val_max_documents: Count = Field(0, description="whole documents scored, equal text for any tokenizer; 0 = off")
    roundtrip_val_max_documents: Count = Field(0, description="the same for the artifact's score; 0 = off")
    final_roundtrip_eval: bool = Field(True, description="export, read the file back from disk and score it")
    eval_seq_len: Count = Field(0, description="tokens per scored window; 0 = train_seq_len")
    eval_stride: Count = Field(0, description="tokens between two windows; 0 = windows do not overlap")
    sw_eval_batch: Positive = Field(32, description="sliding windows per batch")
    eval_cache_mix_weight: Weight = Field(0.0, description="n-gram cache: gain of the logits of recent tokens; 0 = off")
    eval_bigram_mix_weight: Weight = Field(0.0, description="n-gram cache: gain of what followed this token; 0 = off")
    eval_cache_size: Count = Field(0, description="n-gram cache: tokens it looks back; 0 = off")
    eval_cache_delay: int = Field(0, ge=0, le=1, description="n-gram cache: 0 = aligned; 1 = late, as the reference")
    eval_tilt_boost: Weight = Field(0.0, description="n-gram tilt: added to the logit of what followed the same tokens "
        "in the text scored so far, as 2; 0 = off")  # fmt: skip
    eval_tilt_order: int = Field(8, ge=2, le=16, description="n-gram tilt: tokens that must be the same, at least")
    adapt: Literal["off", "sgd", "lora", "phased"] = Field("off", description="what learns from text that is "
        "scored: lora = adapters, reset per document; sgd = all weights, by chunk; phased = both")  # fmt: skip
    adapt_chunk: Positive = Field(128, description="tokens scored between two updates")
    adapt_rank: Positive = Field(8, description="rank of the adapters of every matrix")
    adapt_lr: Above0 = Field(0.005, description="Adam's learning rate of the adapters")
    adapt_base_lr: Above0 = Field(0.1, description="SGD's learning rate of all weights, in sgd and phased")
    adapt_epochs: Positive = Field(1, description="times that all weights learn from a text, in sgd and phased")
    adapt_phases: Positive = Field(3, description="times that all weights learn, in phased")
    adapt_phase_documents: Positive = Field(64, description="documents between these times")
    eval_seconds_cap: Weight = Field(0.0, description="seconds that the artifact's score may take; 0 = no limit")
