"""Conditions between knobs that RunConfig checks, each with the message for a config that fails it."""

from pgolf_core.knobs import EMBEDDED, MICROBATCHES

# (knobs involved, condition on a RunConfig c, message)
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
    ({"wd_taper_final_mult", "muon_wd"}, lambda c: c.wd_taper_final_mult == 1 or c.muon_wd,
     "wd_taper_final_mult={c.wd_taper_final_mult:g} tapers muon_wd, which is 0; set muon_wd, as 0.09"),
    ({"muon_polar_express", "muon_backend_steps"}, lambda c: not c.muon_polar_express or c.muon_backend_steps <= 5,
     "muon_polar_express has coefficients for 5 iterations, fewer than muon_backend_steps={c.muon_backend_steps}"),
    ({"ema_decay", "swa_every"}, lambda c: not (c.ema_decay and c.swa_every),
     "ema_decay={c.ema_decay:g} and swa_every={c.swa_every}: one average is scored; set the other 0"),
    ({"swa_every", "swa_start_frac", "min_lr", "warmdown_iters", "warmdown_frac"},
     lambda c: not c.swa_every or (c.min_lr < c.swa_start_frac and (c.warmdown_iters or c.warmdown_frac)),
     "swa_every={c.swa_every} would average nothing: rates never fall below swa_start_frac={c.swa_start_frac:g} with "
     "min_lr={c.min_lr:g}, warmdown_frac={c.warmdown_frac:g}, warmdown_iters={c.warmdown_iters}"),
    ({"tokenizer", "data_path"}, lambda c: not c.tokenizer or c.data_path in EMBEDDED,
     "tokenizer={c.tokenizer} is for the embedded corpus; the shards in data_path={c.data_path} are tokenized already: "
     "leave it empty, or tokenize their documents anew with `pgolf data docs --tokenizer {c.tokenizer}`"),
    ({"tokenizer", "vocab_size"}, lambda c: c.tokenizer != "bytes" or c.vocab_size == 260,
     "tokenizer=bytes has 256 bytes and 4 special tokens: set vocab_size=260, not {c.vocab_size}"),
]  # fmt: skip
