"""The score of the bytes on disk: export, read the file back, evaluate."""

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pgolf.data.dataset import Dataset
from pgolf.disk import checksum
from pgolf.runs.result import RunError, evaluation_protocol
from pgolf.script.compile import packed_script
from pgolf.training.inputs import data_facts, scored_tokens
from pgolf_core.adapt import evaluate_shipped
from pgolf_core.config import RunConfig
from pgolf_core.device import autocast, deterministic_kernels, pick_device, pick_dtype
from pgolf_core.distributed import ALONE, Ranks
from pgolf_core.evaluate import Score, batches, evaluate, evaluating, scored_logits
from pgolf_core.export import ByteAccount, export, load
from pgolf_core.export_inputs import calibration_of, model_of, teacher_of
from pgolf_core.model import GPT, roles
from pgolf_core.quantization.calibration import Calibration

Scored = dict[str, tuple[Score, float, dict]]  # SHA-256 of the weights -> score, the seconds it took, `details_of`
SUMMED = 64  # targets whose distributions are summed


@dataclass(frozen=True)
class RoundTrip:
    account: ByteAccount
    score: Score
    artifact_sha256: str
    calibration_seconds: float  # and learn_steps; counts toward the wallclock limit: both read training text
    export_seconds: float  # without these
    eval_seconds: float
    unadapted: Score | None = None  # of the file by a model with fixed weights, with config.adapt
    details: dict = field(default_factory=dict)  # see details_of


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
        calibration = calibration or calibration_of(state, config, dataset.train_shards, device)
        teacher = teacher_of(state, config, dataset.train_shards, device)
        calibrated = time.perf_counter()
        with deterministic_kernels(device.type == "cuda"):
            code = len(packed_script(config))
            account = export(state, config.export, path, calibration, roles(config.model), teacher, code)
        learning = teacher.seconds if teacher else 0.0
        seconds = calibrated - start + learning, time.perf_counter() - calibrated - learning
        made = load(path), account, checksum(path), *seconds
    read, account, sha256, calibration_seconds, export_seconds = ranks.share(made)
    exported = time.perf_counter()
    scored, weights = ({}, "") if scored is None else (scored, hashlib.sha256(safetensors.torch.save(read)).hexdigest())
    if weights not in scored:
        model = model_of(read, config, device)
        taken = count_passes(model)
        score = score_model(model, config, dataset, roundtrip=True, ranks=ranks, shipped=True)
        seconds = time.perf_counter() - exported
        scored[weights] = score, seconds, details_of(read, config, dataset, taken, ranks)
    score, eval_seconds, details = scored[weights]
    unadapted = None
    if config.adapt != "off":
        unadapted = score_model(model_of(read, config, device), config, dataset, roundtrip=True, ranks=ranks)
    if not math.isfinite(score.val_loss):
        raise RunError(
            f"{path}: the file scores {score.val_loss}, so it is no result: the weights are too large for their "
            "numbers; lower matrix_lr or scalar_lr, or take a finer quantizer"
        )
    return RoundTrip(account, score, sha256, calibration_seconds, export_seconds, eval_seconds, unadapted, details)


def count_passes(model: GPT) -> list[tuple[float, int]]:
    """A list to which each later forward adds its batch's (passes, tokens); it stays empty without halting."""
    taken: list[tuple[float, int]] = []

    def note(halting, inputs, output) -> None:
        if inputs[0] == model.config.loop_start + halting.width * halting.count - 1 and output[1] is not None:
            passes = output[1].passes.detach()
            taken.append((passes.sum(dtype=torch.float32).item(), passes.numel()))

    if model.halting is not None:
        model.halting.register_forward_hook(note)
    return taken


def details_of(
    state: dict[str, Tensor], config: RunConfig, dataset: Dataset, taken: list[tuple[float, int]], ranks: Ranks = ALONE
) -> dict:
    """Result fields of halting (mean_passes, bpb_by_passes) and of n-gram cache and tilt (distribution_error).

    taken: of count_passes, while the file was scored.
    """
    details: dict = {}
    if config.halting != "off" or config.halting_eval == "fixed":
        passes, tokens = ranks.add_(torch.tensor([[0.0, 0.0], *taken], dtype=torch.float64).sum(0)).tolist()
        details["mean_passes"] = passes / tokens if tokens else float(config.halting_passes or config.loop_extra + 1)
        details["bpb_by_passes"] = scores = []
        for count in range(1, config.loop_extra + 2):
            fixed = config.with_knobs(halting_eval="fixed", halting_passes=count, adapt="off")
            model = model_of(state, fixed, pick_device(config.train))
            scores.append(score_model(model, fixed, dataset, roundtrip=True, ranks=ranks).val_bpb)
    if config.eval_cache_size or config.eval_tilt_boost:
        details["distribution_error"] = distribution_error(state, config, dataset)
    return details


def distribution_error(state: dict[str, Tensor], config: RunConfig, dataset: Dataset) -> float:
    """The largest |Σ p − 1| of the first batch's SUMMED targets; p: exp(−nats) that each token would have scored."""
    tokens = scored_tokens(dataset, config.train_seq_len, config.eval, roundtrip=True)
    model = model_of(state, config, pick_device(config.train))
    with evaluating(model) as device:
        batch, dtype = next(batches(tokens, dataset.byte_table, config.eval, device)), pick_dtype(config.train, device)
        with autocast(device, dtype):
            logits = scored_logits(model(batch.ids), batch, config.eval).flatten(0, 1)
        rows = logits[:: max(1, len(logits) // SUMMED)].log_softmax(-1).cpu()
    return (rows.double().exp().sum(-1) - 1).abs().max().item()


def load_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """A run's unquantized weights. RunError naming the file if it is missing or damaged."""
    path = Path(path)
    if not path.is_file():
        raise RunError(f"{path}: no checkpoint; was the run made with save_raw_checkpoint=0, or is it incomplete?")
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise RunError(f"{path}: not a whole checkpoint ({error})") from error


def score_model(
    model: GPT, config: RunConfig, dataset: Dataset, roundtrip: bool = False, ranks: Ranks = ALONE, shipped=False
) -> Score:
    """The model's score on the validation tokens of the knobs; roundtrip: on those of the file's score.

    shipped: as the file's score counts, with config.adapt.
    """
    tokens = scored_tokens(dataset, config.train_seq_len, config.eval, roundtrip)
    dtype = pick_dtype(config.train, next(model.parameters()).device)
    score = evaluate_shipped if shipped else evaluate
    return score(model, tokens, dataset.byte_table, config.eval, dtype, ranks)


def roundtrip_fields(
    trip: RoundTrip, prequant_bpb: float, prequant_nats: Sequence[float], dataset: Dataset, config: RunConfig
) -> dict:
    """The fields of a Result that a round trip decides; prequant_*: of the unquantized weights on the same tokens."""
    facts, text = data_facts(dataset, config.train_seq_len, config.eval)
    score, account, unadapted = trip.score, trip.account, trip.unadapted
    return dict(
        roundtrip_val_loss=score.val_loss, roundtrip_val_bpb=score.val_bpb, prequant_val_bpb=prequant_bpb,
        unadapted_val_bpb=unadapted and unadapted.val_bpb, roundtrip_tokens=score.tokens, roundtrip_bytes=score.bytes,
        scored_text=text, protocol=evaluation_protocol(config.eval, config.train, pick_device(config.train).type),
        roundtrip_block_nats=list(score.block_nats), prequant_block_nats=list(prequant_nats),
        bytes=account.rows(), total_bytes=account.total, cap_bytes=account.cap,
        artifact_sha256=trip.artifact_sha256, script_sha256=hashlib.sha256(packed_script(config)).hexdigest(),
        export_seconds=trip.export_seconds, eval_seconds=trip.eval_seconds, **trip.details,
        data=facts, data_fingerprint=dataset.fingerprint,
    )  # fmt: skip
