"""The score of the bytes on disk: export, read the file back, evaluate."""

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pgolf.data.dataset import Dataset
from pgolf.disk import checksum
from pgolf.runs.result import RunError, evaluation_protocol
from pgolf.training.device import deterministic_kernels, pick_device, pick_dtype
from pgolf.training.inputs import data_facts, scored_tokens
from pgolf.training.timer import seconds_since
from pgolf_core.batches import sequences
from pgolf_core.config import RunConfig
from pgolf_core.distributed import ALONE, Ranks
from pgolf_core.evaluate import Score, evaluate
from pgolf_core.export import ByteAccount, export, load
from pgolf_core.knobs import MICROBATCHES
from pgolf_core.model import GPT, roles, skeleton
from pgolf_core.quantization.calibration import Calibration, calibrate
from pgolf_core.quantization.learning import CHECKED_BATCHES, Student, Teacher
from pgolf_core.quantization.primitives import quantize
from pgolf_core.quantization.stored import Quantized
from pgolf_core.train import cast_embedding

Scored = dict[str, tuple[Score, float]]  # SHA-256 of the weights -> their score and the seconds it took


@dataclass(frozen=True)
class RoundTrip:
    account: ByteAccount
    score: Score
    artifact_sha256: str
    calibration_seconds: float  # and learn_steps; counts toward the wallclock limit: both read training text
    export_seconds: float  # without these
    eval_seconds: float


def round_trip(
    state: dict[str, Tensor], config: RunConfig, dataset: Dataset, path: Path, calibration: Calibration | None = None,
    ranks: Ranks = ALONE, scored: Scored | None = None,
) -> RoundTrip:  # fmt: skip
    """Export to path, load that file into a fresh model, score it on the round trip's validation tokens.

    calibration: of the same weights and knobs; made here if None and needed. scored: files of the same knobs of eval,
    to which this one is added; one that holds the same weights is not scored again. Rank 0 writes the file and reads
    it back; all ranks score what it read. Raises RunError if the score is not finite.
    """
    device, made = pick_device(config.train), None
    start = time.perf_counter()
    if ranks.first:
        calibration = calibration or calibration_of(state, config, dataset, device)
        teacher = teacher_of(state, config, dataset, device)
        calibrated = time.perf_counter()
        with deterministic_kernels(device.type == "cuda"):
            account = export(state, config.export, path, calibration, roles(config.model), teacher)
        learning = teacher.seconds if teacher else 0.0
        seconds = calibrated - start + learning, time.perf_counter() - calibrated - learning
        made = load(path), account, checksum(path), *seconds
    read, account, sha256, calibration_seconds, export_seconds = ranks.share(made)
    exported = time.perf_counter()
    scored, weights = ({}, "") if scored is None else (scored, hashlib.sha256(safetensors.torch.save(read)).hexdigest())
    if weights not in scored:
        score = score_model(model_of(read, config, device), config, dataset, roundtrip=True, ranks=ranks)
        scored[weights] = score, time.perf_counter() - exported
    score, eval_seconds = scored[weights]
    if not math.isfinite(score.val_loss):
        raise RunError(
            f"{path}: the file scores {score.val_loss}, so it is no result: the weights are too large for their "
            "numbers; lower matrix_lr or scalar_lr, or take a finer quantizer"
        )
    return RoundTrip(account, score, sha256, calibration_seconds, export_seconds, eval_seconds)


def calibration_of(
    state: dict[str, Tensor], config: RunConfig, dataset: Dataset, device: torch.device, tokens: int = 0
) -> Calibration | None:
    """Statistics of the weights on training text; None if the export knobs need none. tokens: 0 = calibration_tokens.

    In float32 with deterministic kernels: equal weights and knobs give equal statistics, and so equal files.
    Raises RunError as model_of.
    """
    if not config.export.needs_calibration:
        return None
    text = sequences(dataset.train_shards, tokens or config.calibration_tokens, config.train_seq_len)
    with deterministic_kernels(device.type == "cuda"):
        return calibrate(_float32_model(state, config, device), text)


def teacher_of(state: dict[str, Tensor], config: RunConfig, dataset: Dataset, device: torch.device) -> Teacher | None:
    """The raw model in float32 and the text of learn_steps; None if that is 0. Raises RunError as model_of.

    The text is what follows where `iterations` steps of the full batch through the shards in order end.
    """
    if not config.learn_steps:
        return None
    length = config.train_seq_len
    per_step = -(-config.learn_tokens // length) * length
    trained = config.iterations * (config.train_batch_tokens + MICROBATCHES)  # each ends with one more target
    text = sequences(dataset.train_shards, config.learn_steps * per_step, length, per_step, after=trained)
    return Teacher(_float32_model(state, config, device), list(text))


def learning_seconds(state: dict[str, Tensor], config: RunConfig, dataset: Dataset, device: torch.device) -> float:
    """Seconds that learn_steps will take, timed on the second of two updates of int8 levels; 0 if learn_steps is."""
    if not config.learn_steps:
        return 0.0
    teacher = teacher_of(state, config.with_knobs(learn_steps=2), dataset, device)
    levels = {name: quantize(state[name].cpu()) for name, role in roles(config.model).items() if not role.is_control}
    student = Student(teacher.model, Quantized(levels, {}, {}))
    with deterministic_kernels(device.type == "cuda"):
        for ids in teacher.text:
            began = time.perf_counter()
            teacher.add_gradients(student, ids)
            seconds = seconds_since(began, device)
    return seconds * (config.learn_steps + 2 * CHECKED_BATCHES)


def _float32_model(state: dict[str, Tensor], config: RunConfig, device: torch.device) -> GPT:
    _check_weights(state, config)
    model = GPT(config.model).to(device)
    model.load_state_dict(state)
    return model.eval()


def load_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """A run's unquantized weights. RunError naming the file if it is missing or damaged."""
    path = Path(path)
    if not path.is_file():
        raise RunError(f"{path}: no checkpoint; was the run made with save_raw_checkpoint=0, or is it incomplete?")
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise RunError(f"{path}: not a whole checkpoint ({error})") from error


def model_of(state: dict[str, Tensor], config: RunConfig, device: torch.device) -> GPT:
    """A model with these weights, its embedding in the precision that training holds it in.

    Raises RunError if they are not the weights of such a model.
    """
    _check_weights(state, config)
    model = GPT(config.model).to(device)
    cast_embedding(model, pick_dtype(config.train, device))
    model.load_state_dict(state)
    return model


def _check_weights(state: dict[str, Tensor], config: RunConfig) -> None:
    """Compare names and shapes with the model's before it takes memory; as model_of."""
    try:
        skeleton(config.model).load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise RunError(
            f"the weights are not those of the run's config: {' '.join(str(error).split())[:300]}"
        ) from error


def score_model(
    model: GPT, config: RunConfig, dataset: Dataset, roundtrip: bool = False, ranks: Ranks = ALONE
) -> Score:
    """The model's score on the validation tokens of the knobs; roundtrip: on those of the file's score."""
    tokens = scored_tokens(dataset, config.train_seq_len, config.eval, roundtrip)
    dtype = pick_dtype(config.train, next(model.parameters()).device)
    return evaluate(model, tokens, dataset.byte_table, config.eval, dtype, ranks)


def roundtrip_fields(
    trip: RoundTrip, prequant_bpb: float, prequant_nats: Sequence[float], dataset: Dataset, config: RunConfig
) -> dict:
    """The fields of a Result that a round trip decides; prequant_*: of the unquantized weights on the same tokens."""
    facts, text = data_facts(dataset, config.train_seq_len, config.eval)
    score, account = trip.score, trip.account
    return dict(
        roundtrip_val_loss=score.val_loss, roundtrip_val_bpb=score.val_bpb, prequant_val_bpb=prequant_bpb,
        roundtrip_tokens=score.tokens, roundtrip_bytes=score.bytes,
        scored_text=text, protocol=evaluation_protocol(config.eval, config.train, pick_device(config.train).type),
        roundtrip_block_nats=list(score.block_nats), prequant_block_nats=list(prequant_nats),
        bytes=account.rows(), total_bytes=account.total, cap_bytes=account.cap, artifact_sha256=trip.artifact_sha256,
        export_seconds=trip.export_seconds, eval_seconds=trip.eval_seconds,
        data=facts, data_fingerprint=dataset.fingerprint,
    )  # fmt: skip
