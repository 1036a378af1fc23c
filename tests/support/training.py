"""A run of seconds on the embedded corpus, and what equal runs must agree in."""

import torch

from pgolf.runs.result import Result
from pgolf_core.config import RunConfig
from pgolf_core.model import skeleton

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


def gaussian_state(config: RunConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """A state dict for the model, Gaussian with one rms."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: t.shape for name, t in skeleton(config.model).state_dict().items()}
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
