"""What the bytes on disk score: export, read the file back, evaluate; and runs that re-export a checkpoint."""

import functools
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pgolf.data import audit, embedded_corpus
from pgolf.data.dataset import Dataset
from pgolf.disk import checksum
from pgolf.runs import directory
from pgolf.runs.directory import locked
from pgolf.runs.result import ARTIFACT, CHECKPOINT, Result, RunError, evaluation_protocol, read_result, write_result
from pgolf.training.launch import local_rank
from pgolf_core.batches import sequences
from pgolf_core.config import ConfigError, RunConfig
from pgolf_core.distributed import ALONE, Ranks
from pgolf_core.evaluate import Score, evaluate
from pgolf_core.export import ByteAccount, export, load
from pgolf_core.files import DataError
from pgolf_core.knobs import EvalConfig, ExportConfig
from pgolf_core.model import GPT, roles
from pgolf_core.quantization.calibration import Calibration, calibrate

# Deterministic kernels need it, and cuBLAS looks once, at the first product of the process.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@dataclass(frozen=True)
class RoundTrip:
    account: ByteAccount
    score: Score
    artifact_sha256: str
    calibration_seconds: float  # reading training text, which a clock counts
    export_seconds: float  # without it
    eval_seconds: float


def pick_device(config: RunConfig) -> torch.device:
    """device='auto' is cuda where there is one, else cpu; each rank has a GPU of its own. Raises ConfigError."""
    device = torch.device(config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    if device == torch.device("cuda") and torch.cuda.is_available():
        if local_rank() >= torch.cuda.device_count():
            raise ConfigError(
                f"world_size={config.world_size}: rank {local_rank()} of this machine finds no GPU of its own, there "
                f"are {torch.cuda.device_count()}; start as many processes"
            )
        return torch.device("cuda", local_rank())
    present = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available, "cpu": lambda: True}
    if not present[device.type]():
        raise ConfigError(f"device={config.device}: this machine has none; use device=auto or cpu")
    return device


def pick_dtype(config: RunConfig, device: torch.device) -> torch.dtype:
    """What matrix products run in: precision='auto' is bfloat16 on cuda, float32 elsewhere."""
    if config.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, config.precision)


def not_compiled(config: RunConfig, device: torch.device) -> str:
    """Why the model is not compiled here, '' where it is."""
    if not config.compile:
        return "compile=0"
    if device.type == "cuda":
        return "" if find_spec("triton") else "this machine has no Triton"
    compilers = ("c++", "g++", "clang++", "cl")
    return "" if any(map(shutil.which, compilers)) else "this machine has no C++ compiler"


@contextmanager
def deterministic_kernels(on: bool) -> Iterator[None]:
    """Inside the block CUDA gives the same bits each time, where on; an operation that cannot is an error."""
    if not on:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what nobody wrote
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


@contextmanager
def cpu_threads(config: RunConfig) -> Iterator[None]:
    """torch runs on config.cpu_threads threads inside the block (0 = as many as before)."""
    before = torch.get_num_threads()
    torch.set_num_threads(config.cpu_threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def open_dataset(config: RunConfig) -> Dataset:
    directory = embedded_corpus.resolve(config.data, config.vocab_size)
    return Dataset.open(directory, config.tokenizer_path, vocab_size=config.vocab_size)


def data_facts(config: RunConfig, dataset: Dataset) -> tuple[dict, str]:
    """What a result says of its data, and the sha256 of the text behind its round trip. Raises DataError.

    folder; train_tokens, val_tokens; published: the name of the published split that this is, or ''; scored_fraction
    of the validation split's bytes; audit: fast, or thorough where that was done before; findings, in sentences.
    """
    limits = config.roundtrip_val_max_tokens, config.roundtrip_val_max_documents
    return _data_facts(dataset.directory, dataset.fingerprint, config.tokenizer_path, config.train_seq_len, *limits)


@functools.cache  # one for all exports of a lab
def _data_facts(
    directory: Path, fingerprint: str, tokenizer_path: str, seq_len: int, max_tokens: int, max_documents: int
) -> tuple[dict, str]:
    dataset = Dataset.open(directory, tokenizer_path)
    assert dataset.fingerprint == fingerprint, f"{directory} changed while a run used it"
    text = dataset.scored_text(seq_len, max_tokens, max_documents)
    found = audit.audit(dataset, seq_len=seq_len, max_tokens=max_tokens, max_documents=max_documents, thorough=False)
    whole = audit.stored(dataset)
    errors = [f.message for one in (found, whole) if one for f in one.findings if f.level == "error"]
    if errors:
        listed = "".join(f"\n  - {message}" for message in dict.fromkeys(errors))
        raise DataError(f"{directory}: data that gives false numbers; `pgolf data audit` says all about it{listed}")
    facts = {
        "folder": directory.name,
        "train_tokens": dataset.description["train_tokens"],
        "val_tokens": dataset.description["val_tokens"],
        "published": found.figures["published"],
        "scored_fraction": found.figures["scored_fraction"],
        "audit": "thorough" if whole else "fast",
        "findings": [finding.message for finding in found.findings if finding.level == "warning"],
    }
    return facts, text


def check_scored(config: RunConfig, dataset: Dataset) -> None:
    """DataError where the validation split does not hold what the knobs want to score."""
    of_file = config.roundtrip_val_max_tokens, config.roundtrip_val_max_documents
    for limits in {(config.val_max_tokens, config.val_max_documents), of_file}:  # mostly the same: read once
        tokens = len(dataset.validation(config.train_seq_len, *limits))
        if tokens <= config.eval_window:
            raise DataError(
                f"{dataset.directory}: {tokens:,} tokens are to be scored, and a window has {config.eval_window}; "
                "shorten eval_seq_len, or score more"
            )


def load_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """A run's raw weights. RunError naming the file when there is none or it is damaged."""
    path = Path(path)
    if not path.is_file():
        raise RunError(f"{path}: no checkpoint; was the run made with save_raw_checkpoint=0, or is it incomplete?")
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise RunError(f"{path}: not a whole checkpoint ({error})") from error


def model_of(state: dict[str, Tensor], config: RunConfig, device: torch.device) -> GPT:
    """A model holding this state dict, its parameters in the precision that training keeps them."""
    model = GPT(config.model).to(device)
    to_precision(model, pick_dtype(config, device))
    model.load_state_dict(state)
    return model


def to_precision(model: GPT, dtype: torch.dtype) -> None:
    """Under bfloat16 the embedding is held in it too; linear weights and control tensors stay float32."""
    model.tok_emb.to(dtype)


def round_trip(
    state: dict[str, Tensor],
    config: RunConfig,
    dataset: Dataset,
    path: Path,
    calibration: Calibration | None = None,
    ranks: Ranks = ALONE,
) -> RoundTrip:
    """Export to path, load that file into a fresh model, score it on the round trip's validation tokens.

    Raises RunError where the score is no number.

    calibration: where the export needs one and it was made before; otherwise it is made here. Rank 0 writes the file
    and reads it back; all ranks score what it read.
    """
    device = pick_device(config)
    start = time.perf_counter()
    if ranks.first:
        calibration = calibration or calibration_of(state, config, dataset, device)
        calibrated = time.perf_counter()
        account = export(state, config.export, path, calibration, roles(config.model))
        exported = time.perf_counter()
        made = load(path), account, checksum(path), calibrated - start, exported - calibrated
    else:
        made = None
    read, account, sha256, calibration_seconds, export_seconds = ranks.share(made)
    exported = time.perf_counter()
    model = model_of(read, config, device)
    score = score_model(model, config, dataset, roundtrip=True, ranks=ranks)
    if not math.isfinite(score.val_loss):
        raise RunError(
            f"{path}: the file scores {score.val_loss}, so it is no result: the weights are too large for their "
            "numbers; lower matrix_lr or scalar_lr, or take a finer quantizer"
        )
    eval_seconds = time.perf_counter() - exported
    return RoundTrip(account, score, sha256, calibration_seconds, export_seconds, eval_seconds)


def calibration_of(
    state: dict[str, Tensor], config: RunConfig, dataset: Dataset, device: torch.device
) -> Calibration | None:
    """What the export knobs need to know of training text; None where that is nothing. In float32, so repeatable."""
    if not config.export.needs_calibration:
        return None
    model = GPT(config.model).to(device)
    model.load_state_dict(state)
    return calibrate(model, sequences(dataset.train_shards, config.calibration_tokens, config.train_seq_len))


def scored_tokens(config: RunConfig, dataset: Dataset, roundtrip: bool = False) -> Tensor:
    """The stretch of the validation split that the knobs choose, (n,) int64; roundtrip: for the file's score."""
    if roundtrip:
        return dataset.validation(
            config.train_seq_len, config.roundtrip_val_max_tokens, config.roundtrip_val_max_documents
        )
    return dataset.validation(config.train_seq_len, config.val_max_tokens, config.val_max_documents)


def score_model(
    model: GPT, config: RunConfig, dataset: Dataset, roundtrip: bool = False, ranks: Ranks = ALONE
) -> Score:
    tokens = scored_tokens(config, dataset, roundtrip)
    device = next(model.parameters()).device
    return evaluate(model, tokens, dataset.byte_table, config.eval, pick_dtype(config, device), ranks)


# What a finished run may be scored again with; all else describes the training that it had.
SCORING_KNOBS = {
    *ExportConfig.model_fields,
    *EvalConfig.model_fields,
    *("data_path", "tokenizer_path", "device", "precision", "cpu_threads"),
}


def finished(source_dir: Path) -> tuple[Result, RunConfig]:
    """A run's result and config. RunError when it is incomplete."""
    result = read_result(source_dir)
    if result is None:
        raise RunError(f"{source_dir}: incomplete or not there; only a finished run can be studied")
    return result, RunConfig.from_file(source_dir / "config.json")


def scoring_config(config: RunConfig, knobs: dict) -> RunConfig:
    """A finished run's config with other knobs. ConfigError naming those that only its training could follow."""
    changed = config.with_knobs(**knobs)
    if trained := sorted(config.differences(changed).keys() - SCORING_KNOBS):
        raise ConfigError(
            f"{', '.join(f'{k}={getattr(changed, k)!r}' for k in trained)}: the run was trained with "
            f"{', '.join(f'{k}={getattr(config, k)!r}' for k in trained)}; train another run for that"
        )
    return changed


def stored(run_dir: Path, source_dir: Path, source: Result) -> Result | None:
    """The result there, if any. RunError when it was made from another training of its source."""
    result = read_result(run_dir)
    if result is not None and result.checkpoint_sha256 != source.checkpoint_sha256:
        raise RunError(f"{run_dir}: made from another training of {source_dir.name}; delete that folder")
    return result


def export_checkpoint(
    source_dir: str | Path, run_dir: str | Path, calibration: Calibration | None = None, **knobs
) -> Result:
    """A run that exports and scores another run's checkpoint with other export or eval knobs.

    calibration: of that checkpoint, by the same knobs, where it was made before. Returns the stored result when
    the directory is complete. Raises RunError or ConfigError.
    """
    source_dir, run_dir = Path(source_dir), Path(run_dir)
    source, source_config = finished(source_dir)
    config = scoring_config(source_config, knobs)
    with locked(run_dir, config), cpu_threads(config):
        if (result := stored(run_dir, source_dir, source)) is not None:
            return result
        dataset, device = open_dataset(config), pick_device(config)
        state = load_checkpoint(source_dir / CHECKPOINT)
        trip = round_trip(state, config, dataset, run_dir / ARTIFACT, calibration)
        raw_bpb, raw_nats = source.prequant_val_bpb, source.prequant_block_nats
        was = (source.data_fingerprint, source.environment["device"], source_config.precision, source_config.eval)
        same = was == (dataset.fingerprint, device.type, config.precision, config.eval)
        if not (raw_nats and same and source.roundtrip_tokens == trip.score.tokens):
            model = model_of(state, config, device)
            raw = score_model(model, config, dataset, roundtrip=True)
            raw_bpb, raw_nats = raw.val_bpb, raw.block_nats
        result = replace(
            source,
            kind="export",
            source=f"{source_dir.parent.name}/{source_dir.name}",
            config_hash=config.hash,
            environment=directory.describe_environment(device),
            **roundtrip_fields(trip, raw_bpb, raw_nats, dataset, config),
        )
        return write_result(run_dir, result)


def roundtrip_fields(
    trip: RoundTrip, raw_bpb: float, raw_nats: Sequence[float], dataset: Dataset, config: RunConfig
) -> dict:
    """The part of a Result that a round trip decides; raw_* are of the unquantised weights on the same tokens."""
    facts, text = data_facts(config, dataset)
    return dict(
        roundtrip_val_loss=trip.score.val_loss,
        roundtrip_val_bpb=trip.score.val_bpb,
        roundtrip_tokens=trip.score.tokens,
        roundtrip_bytes=trip.score.bytes,
        scored_text=text,
        data=facts,
        prequant_val_bpb=raw_bpb,
        roundtrip_block_nats=list(trip.score.block_nats),
        prequant_block_nats=list(raw_nats),
        bytes=trip.account.rows(),
        total_bytes=trip.account.total,
        cap_bytes=trip.account.cap,
        artifact_sha256=trip.artifact_sha256,
        export_seconds=trip.export_seconds,
        eval_seconds=trip.eval_seconds,
        data_fingerprint=dataset.fingerprint,
        protocol=evaluation_protocol(config),
    )


def write_stage(
    run_dir: Path,
    kind: str,
    source_dir: Path,
    source: Result,
    config: RunConfig,
    fingerprint: str,
    rows: list[dict],
) -> Result:
    """A stage's result: its table, and nothing that a frontier would take for a score of its own."""
    result = Result(
        kind=kind,
        config_hash=config.hash,
        seed=source.seed,
        track=source.track,
        source=f"{source_dir.parent.name}/{source_dir.name}",
        checkpoint_sha256=source.checkpoint_sha256,
        data_fingerprint=fingerprint,
        protocol=evaluation_protocol(config),
        environment=directory.describe_environment(pick_device(config)),
        table=rows,
    )
    return write_result(run_dir, result)
