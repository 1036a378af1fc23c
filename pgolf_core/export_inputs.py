"""What an export takes besides the weights: statistics and text from training shards, and the seconds they cost.

Both read training text, so they count toward the wallclock limit. `model_of` is the model that a file's weights make.
"""

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pgolf_core.batches import sequences
from pgolf_core.config import RunConfig
from pgolf_core.device import deterministic_kernels, pick_dtype, training_dtype
from pgolf_core.knobs import MICROBATCHES
from pgolf_core.model import GPT, roles, skeleton
from pgolf_core.quantization.calibration import Calibration, calibrate
from pgolf_core.quantization.learning import CHECKED_BATCHES, Student, Teacher
from pgolf_core.quantization.primitives import quantize
from pgolf_core.quantization.stored import Quantized
from pgolf_core.timer import TrainTimer, seconds_since
from pgolf_core.train import cast_embedding

RESERVE_FACTOR = 1.25  # reserved calibration time / time measured before training

State = dict[str, Tensor]
Shards = list[Path]  # of the training split


class WeightsError(ValueError):
    """Weights that are not those of the config's model; the message names tensors and shapes."""


def calibration_of(
    state: State, config: RunConfig, shards: Shards, device: torch.device, tokens: int = 0
) -> Calibration | None:
    """Statistics of the weights on training text; None if the export knobs need none. tokens: 0 = calibration_tokens.

    By deterministic kernels: equal weights and knobs give equal statistics, and so equal files, on one kind of machine.
    Raises WeightsError.
    """
    if not config.export.needs_calibration:
        return None
    text = sequences(shards, tokens or config.calibration_tokens, config.train_seq_len)
    with deterministic_kernels(device.type == "cuda"):
        return calibrate(_float32_model(state, config, device), text, dtype=_products(config, device))


def teacher_of(state: State, config: RunConfig, shards: Shards, device: torch.device, steps: int = 0) -> Teacher | None:
    """The raw model and the text of learn_steps; None if that is 0. Raises WeightsError.

    steps: updates that the text is for; 0 = learn_steps. It is what follows where `iterations` steps of the full batch
    through the shards in order end.
    """
    if not config.learn_steps:
        return None
    length = config.train_seq_len
    per_step = -(-config.learn_tokens // length) * length
    trained = config.iterations * (config.train_batch_tokens + MICROBATCHES)  # each ends with one more target
    text = sequences(shards, (steps or config.learn_steps) * per_step, length, per_step, after=trained)
    return Teacher(_float32_model(state, config, device), list(text), _products(config, device))


def learning_seconds(state: State, config: RunConfig, shards: Shards, device: torch.device) -> float:
    """Seconds that learn_steps will take, timed on the second of two updates of int8 levels; 0 if learn_steps is."""
    if not config.learn_steps:
        return 0.0
    teacher = teacher_of(state, config, shards, device, steps=2)
    levels: dict[str, Any] = {
        name: quantize(state[name].cpu()) for name, role in roles(config.model).items() if not role.is_control
    }
    student = Student(teacher.model, Quantized(levels, {}, {}))
    with deterministic_kernels(device.type == "cuda"):
        for step in range(2):
            began = time.perf_counter()
            teacher.add_gradients(student, step, 0.0)  # the slower kind
            seconds = seconds_since(began, device)
    return seconds * (config.learn_steps + 2 * CHECKED_BATCHES)


def reserve_seconds(state: State, config: RunConfig, shards: Shards, device: torch.device, timer: TrainTimer) -> float:
    """Seconds of the wallclock limit to reserve for calibration and learn_steps, measured outside the timer."""
    if not (config.max_wallclock_seconds and config.final_roundtrip_eval):
        return 0.0
    if not (config.export.needs_calibration or config.learn_steps):
        return 0.0
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # a new model draws random numbers
        calibration_of(state, config, shards, device, tokens=1)  # builds kernels
        with timer.excluded("warmup"):
            began = time.perf_counter()
            calibration_of(state, config, shards, device)
            seconds = seconds_since(began, device) + learning_seconds(state, config, shards, device)
    return RESERVE_FACTOR * seconds


def _products(config: RunConfig, device: torch.device) -> torch.dtype:
    """The dtype of matrix products of calibration and learning: on a CPU that of training, else float32."""
    return training_dtype(config.train, device) if device.type == "cpu" else torch.float32


def _float32_model(state: State, config: RunConfig, device: torch.device) -> GPT:
    _check_weights(state, config)
    model = GPT(config.model).to(device)
    model.load_state_dict(state)
    return model.eval()


def model_of(state: State, config: RunConfig, device: torch.device) -> GPT:
    """A model with these weights, its embedding in the precision that training holds it in. Raises WeightsError."""
    _check_weights(state, config)
    model = GPT(config.model).to(device)
    cast_embedding(model, pick_dtype(config.train, device))
    model.load_state_dict(state)
    return model


def _check_weights(state: State, config: RunConfig) -> None:
    """Compare names and shapes with the model's before it takes memory; as model_of."""
    try:
        skeleton(config.model).load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise WeightsError(
            f"the weights are not those of the run's config: {' '.join(str(error).split())[:300]}"
        ) from error
