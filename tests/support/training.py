"""A run of seconds on the embedded corpus, and what equal runs must agree in."""

from pgolf.runs.result import Result
from pgolf_core.config import RunConfig

TINY = dict(
    track="nano", num_layers=1, model_dim=64, num_heads=2, num_kv_heads=1, train_seq_len=64, train_batch_tokens=1024,
    iterations=12, val_loss_every=5, val_max_tokens=2048, roundtrip_val_max_tokens=4096, val_batch_size=2048,
    train_log_every=1, compression_reg_warmup_steps=2,
)  # fmt: skip
VARYING = {  # fields of Result that may differ between equal runs
    "train_seconds", "eval_seconds", "export_seconds", "budget", "peak_memory_bytes", "resumed", "environment",
    "finished", "files", "checksum",
}  # fmt: skip


def what_counts(result: Result) -> dict:
    """The result without the fields that may differ between equal runs."""
    return {name: value for name, value in vars(result).items() if name not in VARYING}


def tiny(**knobs) -> RunConfig:
    return RunConfig(**TINY | knobs)
