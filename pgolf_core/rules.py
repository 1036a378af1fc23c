"""Conditions between knobs that RunConfig checks, each with the message for a config that fails it.

Knobs that change nothing as the others are set are no error, since tracks and grids set them; `without_effect` names
them.
"""

from pgolf_core.knobs import EMBEDDED, MICROBATCHES, ExportConfig, TrainConfig
from pgolf_core.tracks import TRACKS

TAPER_START, SWA_START = (TrainConfig.model_fields[name].default for name in ("wd_taper_start_frac", "swa_start_frac"))

QUANTIZERS = [name for name in ExportConfig.model_fields if name.endswith("quantizer")]

# (knobs involved, condition on a RunConfig c, message)
RULES = [
    ({"model_dim", "num_heads"}, lambda c: c.model_dim % c.num_heads == 0,
     "num_heads={c.num_heads} does not divide model_dim={c.model_dim}"),
    ({"model_dim", "num_heads"}, lambda c: c.model_dim % c.num_heads or c.head_dim % 2 == 0,
     "head dimension model_dim/num_heads={c.head_dim} is odd; rotary embedding needs it even"),
    ({"rope_dims", "model_dim", "num_heads"}, lambda c: c.rope_dims <= c.head_dim and c.rope_dims % 2 == 0,
     "rope_dims={c.rope_dims} is not an even number up to the head dimension model_dim/num_heads={c.head_dim}"),
    ({"xsa_last", "ve_last", "num_layers"}, lambda c: max(c.xsa_last, c.ve_last) <= c.num_layers,
     "xsa_last={c.xsa_last} or ve_last={c.ve_last} is more than num_layers={c.num_layers}"),
    ({"bigram_vocab_size"}, lambda c: c.bigram_vocab_size != 1,
     "bigram_vocab_size=1: one row is for tokens that begin a text, so pairs need another; 0 = off"),
    ({"residual_lanes", "parallel_from", "num_layers"},
     lambda c: c.residual_lanes == 1 or c.parallel_from < c.num_layers,
     "residual_lanes=2 begin at layer parallel_from={c.parallel_from}, and there are num_layers={c.num_layers}"),
    ({"loop_start", "loop_end", "loop_extra", "num_layers"},
     lambda c: not c.loop_extra or c.loop_start <= c.loop_end < c.num_layers,
     "loop_start={c.loop_start} to loop_end={c.loop_end} is no band of layers, of which there are {c.num_layers}"),
    ({"residual_lanes", "parallel_from", "loop_end", "loop_extra"},
     lambda c: c.residual_lanes == 1 or not c.loop_extra or c.loop_end < c.parallel_from,
     "residual_lanes=2 never join again: parallel_from={c.parallel_from} must be after loop_end={c.loop_end}"),
    ({"loop_from", "iterations", "loop_extra"},
     lambda c: not c.loop_extra or c.loop_from * c.iterations <= c.iterations - 1,
     "loop_from={c.loop_from:g} of iterations={c.iterations} is after the last step, so loop_extra is not trained"),
    ({"loop_from", "loop_extra", "train_batch_schedule", "train_seq_schedule"},
     lambda c: not (c.loop_extra and c.loop_from) or len(c.stages) <= 4,
     "loop_from compiles each of the {c.stages} (tokens per step, tokens per sequence) twice: at most 4 of them"),
    ({"halting", "halting_eval", "loop_extra"},
     lambda c: c.loop_extra or (c.halting == "off" and c.halting_eval != "fixed"),
     "halting={c.halting}, halting_eval={c.halting_eval}: there are no loops to leave; set loop_extra, as 2"),
    ({"halting", "halting_eval"}, lambda c: c.halting != "off" or c.halting_eval != "threshold",
     "halting_eval=threshold needs the gate of halting=act; without it, all tokens take as many passes: fixed"),
    ({"halting_passes", "loop_extra"}, lambda c: c.halting_passes <= c.loop_extra + 1,
     "halting_passes={c.halting_passes} is more than the passes of loop_extra={c.loop_extra}, which are that and one"),
    ({"attn_gate_width", "model_dim"}, lambda c: c.attn_gate_width <= c.model_dim or c.attn_gate in ("off", "dense"),
     "attn_gate_width={c.attn_gate_width} is more than model_dim={c.model_dim}"),
    ({"num_heads", "num_kv_heads"}, lambda c: c.num_heads % c.num_kv_heads == 0,
     "num_kv_heads={c.num_kv_heads} does not divide num_heads={c.num_heads}"),
    ({"num_unique_blocks", "num_layers"}, lambda c: c.num_unique_blocks <= c.num_layers,
     "num_unique_blocks={c.num_unique_blocks} is more than num_layers={c.num_layers}; some would never be used"),
    ({"weights", "weight_bases", "num_layers", "num_unique_blocks"},
     lambda c: c.weights in ("own", "random") or c.weight_bases <= c.blocks,
     "weight_bases={c.weight_bases} are more than the {c.blocks} blocks that weights={c.weights} makes of them; set "
     "weight_bases to {c.blocks} or less, or weights=own"),
    ({"weights", "weight_rank"}, lambda c: c.weights != "random" or c.weight_rank,
     "weights=random with weight_rank=0 learns scales of rows alone; set weight_rank, as 8"),
    ({"weights", "weight_rank", "model_dim", "num_heads", "num_kv_heads"},
     lambda c: c.weights == "own" or c.weight_rank < c.num_kv_heads * c.head_dim,
     "weight_rank={c.weight_rank} is no low rank of matrices with num_kv_heads · model_dim / num_heads rows"),
    ({"weights", "mlp_permutation"}, lambda c: c.weights == "own" or not c.mlp_permutation,
     "mlp_permutation sorts the neurons of matrices that blocks hold, not those of weights={c.weights}; leave it 0"),
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
    ({"train_batch_tokens", "train_seq_len", "train_batch_schedule", "train_seq_schedule"},
     lambda c: not (c.train_batch_schedule or c.train_seq_schedule)
     or (len(c.stages) <= 8 and all(batch % (MICROBATCHES * length) == 0 for batch, length in c.stages)),
     "train_batch_schedule and train_seq_schedule give (tokens per step, per sequence) {c.stages}: at most 8 of "
     "them, each first number a multiple of 8 × the second"),
    ({"shuffle_documents", "shuffle_sequences", "coprime_sequences"},
     lambda c: [c.shuffle_documents, c.shuffle_sequences, c.coprime_sequences].count(0) >= 2,
     "shuffle_documents, shuffle_sequences and coprime_sequences: training text has one order; leave the others 0"),
    ({"shuffle_sequences", "coprime_sequences", "train_seq_schedule"},
     lambda c: not ((c.shuffle_sequences or c.coprime_sequences) and c.train_seq_schedule),
     "train_seq_schedule needs running text: leave shuffle_sequences and coprime_sequences 0; use shuffle_documents"),
    ({"eval_stride", "eval_seq_len", "train_seq_len"}, lambda c: c.eval_stride <= c.eval_window,
     "eval_stride={c.eval_stride} is more than the window of {c.eval_window} tokens; targets would be skipped"),
    ({"val_batch_size", "eval_seq_len", "train_seq_len"}, lambda c: c.val_batch_size >= c.eval_window,
     "val_batch_size={c.val_batch_size} holds no window of {c.eval_window} tokens"),
    *(({"eval_seq_len", "train_seq_len", name}, lambda c, name=name: not 0 < getattr(c, name) < c.eval_window,
       f"{name}={{c.{name}}} is less than one window of {{c.eval_window}} tokens")
      for name in ("val_max_tokens", "roundtrip_val_max_tokens")),
    ({"eval_cache_mix_weight", "eval_bigram_mix_weight", "eval_cache_size"},
     lambda c: c.eval_cache_size or not (c.eval_cache_mix_weight or c.eval_bigram_mix_weight),
     "eval_cache_size=0 leaves the n-gram cache's weights without effect; give it the tokens to look back"),
    ({"document_mask", "eval_cache_size"}, lambda c: not (c.document_mask and c.eval_cache_size),
     "document_mask ends a token's sight at its document, and the n-gram cache looks beyond; set eval_cache_size=0"),
    ({"adapt", "eval_cache_size"}, lambda c: c.adapt == "off" or not c.eval_cache_size,
     "adapt={c.adapt} goes without the n-gram cache: set eval_cache_size=0, not {c.eval_cache_size}"),
    ({"adapt", "eval_stride"}, lambda c: c.adapt in ("off", "sgd") or not c.eval_stride,
     "adapt={c.adapt} scores every document by itself, chunk by chunk: leave eval_stride 0, not {c.eval_stride}"),
    ({"adapt_chunk", "adapt", "eval_seq_len", "train_seq_len"},
     lambda c: c.adapt in ("off", "sgd") or c.adapt_chunk <= c.eval_window,
     "adapt_chunk={c.adapt_chunk} is more than the window of {c.eval_window} tokens; set adapt_chunk"),
    ({"embed_quantization_bits"}, lambda c: c.embed_quantization_bits in (0, *range(2, 9), 16),
     "embed_quantization_bits={c.embed_quantization_bits}: input should be 2 to 8, 16 (stays float16) or "
     "0 (weight_quantization_bits)"),
    ({"int8_residual_bits"}, lambda c: c.int8_residual_bits in (*range(2, 9), 16),
     "int8_residual_bits={c.int8_residual_bits}: input should be 2 to 8, or 16 (float16 factors)"),
    ({"allocation", "mlp_permutation"}, lambda c: c.allocation == "fixed" or not c.mlp_permutation,
     "mlp_permutation has no effect with allocation=solve: its codes ignore the order of neurons; leave it 0"),
    ({"mlp_permutation", "int8_residual_rank", "int8_residual_bits"},
     lambda c: not (c.mlp_permutation and c.low_rank_residuals),
     "mlp_permutation cannot be combined with low-rank residuals (int8_residual_rank={c.int8_residual_rank}, "
     "int8_residual_bits={c.int8_residual_bits}), whose statistics are in the trained order of neurons"),
    ({"learn_steps", "allocation", *QUANTIZERS},
     lambda c: not c.learn_steps or c.allocation == "solve"
     or not any(getattr(c, name).startswith("codebook") for name in QUANTIZERS),
     "learn_steps={c.learn_steps} learns levels, and a codebook has none: take another quantizer"),
    ({"learn_steps", "mlp_permutation"}, lambda c: not (c.learn_steps and c.mlp_permutation),
     "mlp_permutation cannot be combined with learn_steps={c.learn_steps}, which compares with the trained order"),
    ({"wd_taper_final_mult", "muon_wd"}, lambda c: c.wd_taper_final_mult == 1 or c.muon_wd,
     "wd_taper_final_mult={c.wd_taper_final_mult:g} tapers muon_wd, which is 0; set muon_wd, as 0.09"),
    ({"wd_taper_start_frac", "wd_taper_final_mult"},
     lambda c: c.wd_taper_final_mult != 1 or c.wd_taper_start_frac == TAPER_START,
     "wd_taper_start_frac={c.wd_taper_start_frac:g} begins no taper: set wd_taper_final_mult, as 0.5, which is 1"),
    ({"min_lr", "warmdown_iters", "warmdown_frac"}, lambda c: not c.min_lr or c.warmdown_iters or c.warmdown_frac,
     "min_lr={c.min_lr:g} is a floor of falling rates, and without warmdown_iters or warmdown_frac none fall"),
    ({"muon_polar_express", "muon_backend_steps"}, lambda c: not c.muon_polar_express or c.muon_backend_steps <= 5,
     "muon_polar_express has coefficients for 5 iterations, fewer than muon_backend_steps={c.muon_backend_steps}"),
    ({"ema_decay", "swa_every"}, lambda c: not (c.ema_decay and c.swa_every),
     "ema_decay={c.ema_decay:g} and swa_every={c.swa_every}: one average is scored; set the other 0"),
    ({"swa_every", "swa_start_frac"}, lambda c: c.swa_every or c.swa_start_frac == SWA_START,
     "swa_start_frac={c.swa_start_frac:g} begins no average: set swa_every, as 50, which is 0"),
    ({"swa_every", "swa_start_frac", "min_lr", "warmdown_iters", "warmdown_frac"},
     lambda c: not c.swa_every or (c.min_lr < c.swa_start_frac and (c.warmdown_iters or c.warmdown_frac)),
     "swa_every={c.swa_every} averages nothing: no warmdown takes rates below swa_start_frac={c.swa_start_frac:g}"),
    ({"tokenizer", "data_path"}, lambda c: not c.tokenizer or c.data_path in EMBEDDED,
     "tokenizer={c.tokenizer} is for the embedded corpus; the shards in data_path={c.data_path} are tokenized already: "
     "leave it empty, or tokenize their documents anew with `pgolf data docs --tokenizer {c.tokenizer}`"),
    ({"text_transform", "tokenizer", "data_path"},
     lambda c: not c.text_transform or (c.data_path in EMBEDDED and c.tokenizer != "bytes"),
     "text_transform={c.text_transform} is for the embedded corpus with tokenizer=bpe or unigram, not for data_path="
     "{c.data_path}, tokenizer={c.tokenizer}; for own documents, `pgolf data docs --transform {c.text_transform}`"),
    ({"tokenizer", "vocab_size"}, lambda c: c.tokenizer != "bytes" or c.vocab_size == 260,
     "tokenizer=bytes has 256 bytes and 4 special tokens: set vocab_size=260, not {c.vocab_size}"),
]  # fmt: skip

# (knobs, condition on a RunConfig c under which they count, why they do not otherwise)
UNUSED = [
    ("compression_reg_interval compression_reg_warmup_steps compression_reg_sample_tensors compression_reg_max_cols "
     "compression_grid_reg_weight compression_rank1_reg_weight compression_scale_reg_weight ternary_reg_weight "
     "outlier_reg_weight", lambda c: c.compression_reg_weight, "compression_reg_weight, the factor of all, is 0"),
    ("compression_rank1_reg_weight", lambda c: c.int8_residual_rank and c.int8_residual_budget_bytes,
     "int8_residual_rank or int8_residual_budget_bytes is 0, so no residual is stored"),
    ("int8_residual_bits int8_residual_group int8_residual_budget_bytes int8_residual_power_iters "
     "int8_targeted_residual_mode", lambda c: c.int8_residual_rank, "int8_residual_rank is 0"),
    ("int8_residual_rank", lambda c: c.int8_residual_budget_bytes, "int8_residual_budget_bytes is 0"),
    ("gptq_damp gptq_act_order", lambda c: c.needs_calibration,
     "no export knob needs calibration, as gptq=1 or allocation=solve do"),
    ("gptq_block", lambda c: c.gptq or c.allocation == "solve", "gptq is 0"),
    ("learn_tokens learn_labels learn_rate", lambda c: c.learn_steps, "learn_steps is 0"),
    (" ".join(QUANTIZERS),
     lambda c: c.allocation != "solve", "allocation=solve chooses step sizes itself"),
    ("attn_gate_width", lambda c: c.attn_gate in ("sparse", "doubled"), "attn_gate is not sparse or doubled"),
    ("attn_gate_scale", lambda c: c.attn_gate != "off", "attn_gate is off"),
    ("bigram_dim", lambda c: c.bigram_vocab_size, "bigram_vocab_size is 0"),
    ("weight_bases weight_row_scale", lambda c: c.weights in ("basis", "hypernetwork"),
     "weights is neither basis nor hypernetwork"),
    ("weight_coefficients", lambda c: c.weights == "basis", "weights is not basis"),
    ("weight_hidden", lambda c: c.weights == "hypernetwork", "weights is not hypernetwork"),
    ("weight_rank", lambda c: c.weights != "own", "weights is own"),
    ("weight_seed", lambda c: c.weights == "random", "weights is not random"),
    ("orthogonal_init", lambda c: c.weights != "random", "weights is random"),
    ("ve_dim", lambda c: c.ve_last, "ve_last is 0"),
    ("loop_start loop_end loop_from", lambda c: c.loop_extra, "loop_extra is 0"),
    ("ponder_cost", lambda c: c.halting != "off", "halting is off"),
    ("halting_threshold", lambda c: c.halting_eval == "threshold", "halting_eval is not threshold"),
    ("halting_passes", lambda c: c.halting_eval == "fixed", "halting_eval is not fixed"),
    ("tied_embed_lr tied_embed_init_std", lambda c: c.tie_embeddings, "tie_embeddings is 0"),
    ("embed_lr head_lr head_quantizer", lambda c: not c.tie_embeddings, "tie_embeddings is 1"),
    ("warmdown_iters", lambda c: not c.warmdown_frac, "warmdown_frac takes its place"),
    ("eval_cache_size eval_cache_delay", lambda c: c.eval_cache_mix_weight or c.eval_bigram_mix_weight,
     "eval_cache_mix_weight and eval_bigram_mix_weight are 0"),
    ("eval_tilt_order", lambda c: c.eval_tilt_boost, "eval_tilt_boost is 0"),
    ("adapt_chunk", lambda c: c.adapt != "off", "adapt is off"),
    ("adapt_rank adapt_lr", lambda c: c.adapt in ("lora", "phased"), "adapt is not lora or phased"),
    ("adapt_base_lr adapt_epochs", lambda c: c.adapt in ("sgd", "phased"), "adapt is not sgd or phased"),
    ("adapt_phases adapt_phase_documents", lambda c: c.adapt == "phased", "adapt is not phased"),
    ("sw_eval_batch", lambda c: c.eval_stride, "eval_stride is 0"),
    ("roundtrip_val_max_tokens roundtrip_val_max_documents", lambda c: c.final_roundtrip_eval,
     "final_roundtrip_eval is 0"),
]  # fmt: skip


def without_effect(c) -> dict[str, str]:
    """Knob -> why it changes nothing, for each that neither its default nor the track of the RunConfig c sets so."""
    fields, track = type(c).model_fields, TRACKS.get(c.track, {})
    return {
        name: why
        for names, counts, why in reversed(UNUSED)  # the first reason of a knob stays
        if not counts(c)
        for name in names.split()
        if getattr(c, name) not in (fields[name].default, track.get(name))
    }
