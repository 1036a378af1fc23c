"""Options of the model and of training, as the generic tests turn them on: name -> knobs."""

import random

from pgolf_core.config import ConfigError, RunConfig

BASE = dict(
    track="nano", num_layers=4, model_dim=32, num_heads=4, num_kv_heads=2, train_seq_len=32, train_batch_tokens=512,
    iterations=6, warmdown_iters=3, warmup_steps=1, val_loss_every=0, val_max_tokens=1024,
    roundtrip_val_max_tokens=1024, val_batch_size=1024, calibration_tokens=512, train_log_every=0,
    resume_every_seconds=0.0001, allocation="solve", cap_bytes=64_000, codec="brotli", cpu_threads=1,
)  # fmt: skip
MODEL_OPTIONS = {
    "partial RoPE": dict(rope_dims=4),
    "LN scale": dict(ln_scale=True),
    "XSA": dict(xsa_last=3),
    "LeakyReLU": dict(mlp_slope=0.5),
    "dense head gates": dict(attn_gate="dense"),
    "sparse head gates": dict(attn_gate="sparse", attn_gate_width=5, attn_gate_scale=0.5),
    "doubled head gates": dict(attn_gate="doubled"),
    "skip gates": dict(skip_gates=True),
    "sequential": dict(parallel_from=4),
    "two lanes": dict(parallel_from=3, residual_lanes=2),
    "lanes everywhere": dict(parallel_from=0, residual_lanes=2),
    "loops": dict(loop_start=1, loop_end=2, loop_extra=2),
    "late loops": dict(loop_end=1, loop_extra=1, loop_from=0.5),
    "halting": dict(loop_start=1, loop_end=2, loop_extra=2, halting="act", ponder_cost=0.02),
    "halting by threshold": dict(
        loop_end=1, loop_extra=3, loop_from=0.3, halting="act", halting_eval="threshold", halting_threshold=0.3
    ),
    "fixed passes": dict(loop_start=1, loop_end=1, loop_extra=3, halting_eval="fixed", halting_passes=2),
    "SmearGate v1": dict(smear_gate="v1"),
    "SmearGate v2": dict(smear_gate="v2"),
    "BigramHash": dict(bigram_vocab_size=301, bigram_dim=10),
    "value embeddings": dict(ve_last=2, ve_dim=10),
    "document mask": dict(document_mask=True),
    "window": dict(window_size=7),
    "orthogonal init": dict(orthogonal_init=True),
    "asymmetric soft cap": dict(asymmetric_softcap=True),
    "bases": dict(weights="basis", weight_bases=3, weight_row_scale=True),
    "Legendre bases with own parts": dict(
        weights="basis", weight_bases=3, weight_coefficients="legendre", weight_rank=3
    ),
    "hypernetwork": dict(weights="hypernetwork", weight_bases=4, weight_hidden=5),
    "random maps": dict(weights="random", weight_rank=12, weight_seed=3),
}
TRAINING_OPTIONS = {
    "warmdown": dict(warmdown_frac=0.7, min_lr=0.1),
    "weight decay": dict(muon_wd=0.1, embed_wd=0.1, adam_wd=0.02, wd_taper_start_frac=0.5, wd_taper_final_mult=0.5),
    "MuonEq-R": dict(muon_row_normalize=True),
    "Polar Express": dict(muon_polar_express=True),
    "EMA": dict(ema_decay=0.6),
    "SWA": dict(swa_every=1, swa_start_frac=0.9),
    "learned rounding": dict(learn_steps=4, learn_tokens=64, learn_rate=0.01, learn_labels=0.5),
    "n-gram cache": dict(eval_cache_size=8, eval_cache_mix_weight=0.1, eval_bigram_mix_weight=0.2),
    "n-gram tilt": dict(eval_tilt_boost=2.0, eval_tilt_order=2),
    "low-rank residuals": dict(int8_residual_rank=2, int8_residual_bits=4, int8_residual_budget_bytes=4096),
    "clipping": dict(grad_clip_norm=0.3),
    "shuffled sequences": dict(shuffle_sequences=1),
    "coprime sequences": dict(coprime_sequences=1),
    "batch schedule": dict(train_batch_schedule="256@0.4"),
    "sequence schedule": dict(train_seq_schedule="16@0.5"),
}
OPTIONS = MODEL_OPTIONS | TRAINING_OPTIONS


def combinations(seed: int, options: dict = OPTIONS, size: int = 5) -> list[tuple[str, ...]]:
    """All options, in a random order, in groups of at most `size` that can be on together."""
    names = random.Random(seed).sample(sorted(options), len(options))
    groups: list[tuple[str, ...]] = []
    for name in names:
        fitting = (i for i, group in enumerate(groups) if len(group) < size and _valid((*group, name)))
        if (i := next(fitting, None)) is None:
            groups.append((name,))
        else:
            groups[i] += (name,)
    return groups


def _valid(group: tuple[str, ...]) -> bool:
    try:
        return len(knobs_of(group)) == sum(len(OPTIONS[name]) for name in group) and bool(config_of(group))
    except ConfigError:
        return False


def knobs_of(group: tuple[str, ...]) -> dict:
    return {knob: value for name in group for knob, value in OPTIONS[name].items()}


def config_of(group: tuple[str, ...], **knobs) -> RunConfig:
    """The base with these options on."""
    return RunConfig({}, **BASE | knobs_of(group) | knobs)
