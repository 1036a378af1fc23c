"""Tracks: named budgets, as values of knobs.

quick, roundtrip and fixed_step are the reference's, as its author ran them (one RTX 3090, 180 s).
"""

REFERENCE_SHAPE = dict(num_layers=12, model_dim=384, num_heads=6, num_kv_heads=3)
REFERENCE_SWEEP = dict(
    compile=True, train_batch_tokens=32_768, val_batch_size=32_768, warmup_steps=0,
    compression_reg_interval=4, compression_reg_warmup_steps=32, compression_reg_max_cols=128,
    int8_residual_rank=1, int8_residual_budget_bytes=65_536,
)  # fmt: skip
TRACKS: dict[str, dict] = {
    "nano": dict(  # about a minute per run on one CPU thread
        num_layers=2, model_dim=192, num_heads=4, num_kv_heads=2,
        train_seq_len=256, train_batch_tokens=4096, iterations=120, max_wallclock_seconds=0, warmup_steps=0,
        warmdown_iters=60, muon_momentum_warmup_steps=60, train_log_every=10, val_loss_every=40,
        val_batch_size=8192, val_max_tokens=65_536, roundtrip_val_max_tokens=65_536,
        compression_reg_interval=4, compression_reg_warmup_steps=16, compression_reg_max_cols=128,
        cap_bytes=1_000_000, cpu_threads=1, precision="mixed", resume_every_seconds=5,
    ),
    "quick": dict(
        **REFERENCE_SHAPE, **REFERENCE_SWEEP, max_wallclock_seconds=180, val_max_tokens=1_048_576,
        final_roundtrip_eval=False,
    ),
    "roundtrip": dict(
        **REFERENCE_SHAPE, **REFERENCE_SWEEP, max_wallclock_seconds=180,
        val_max_tokens=524_288, roundtrip_val_max_tokens=262_144,
    ),
    "fixed_step": dict(
        **REFERENCE_SHAPE, **REFERENCE_SWEEP, iterations=300, max_wallclock_seconds=0, deterministic=True,
        val_max_tokens=524_288, roundtrip_val_max_tokens=262_144,
    ),
    "h100": dict(num_layers=9, model_dim=512, num_heads=8, num_kv_heads=4, max_wallclock_seconds=600,
                 eval_seconds_cap=600, compile=True),
}  # fmt: skip
