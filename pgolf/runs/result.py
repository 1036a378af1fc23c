"""result.json: its schema, and how it is written, read and checked against hand edits."""

import json
import os
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, TypeAdapter

from pgolf.disk import checksum, read_json
from pgolf.runs.schema import Float, Int, Text, misfits
from pgolf_core.config import RunConfig, digest
from pgolf_core.files import atomic_write
from pgolf_core.knobs import EvalConfig, TrainConfig

ARTIFACT = "artifact.pgolf"
CHECKPOINT = "checkpoint.safetensors"
CHECKSUMMED_FILES = ("log.txt", "metrics.jsonl", "environment.json")  # see Result.files
TIME = "%Y-%m-%dT%H:%M:%S"  # UTC
OF_A_SCORE = ("total_bytes", "cap_bytes", "roundtrip_bytes", "roundtrip_tokens", "steps")  # every score has them
SCHEMA = 1  # a version whose results an older one would misread has a higher one


class RunError(ValueError):
    """A run directory that cannot be used as asked; the message names it."""


def _facts(data: dict) -> dict:
    kinds = dict(folder=str, train_tokens=int, val_tokens=int, published=str, scored_fraction=float | int, audit=str)
    kinds |= {"findings": list}
    if data and (wrong := [name for name, kind in kinds.items() if not isinstance(data.get(name), kind)]):
        raise ValueError(f"no {', '.join(wrong)}")
    return data


@dataclass(frozen=True)
class Result:
    """The fields of result.json. bpb is the score of the file on disk; None means the run has no such figure."""

    kind: Text  # train, export, import (a log), checkpoint (imported), or the name of a stage's notebook
    config_hash: Text
    seed: Int | None  # None: an imported log without a seed
    track: Text
    source: Text | None = None  # the run whose checkpoint this one exports
    checkpoint_sha256: Text | None = None  # exports and stages: the checkpoint of their source
    weights: Text | None = None  # scored and exported: raw, ema D, swa of N; None: by a version without averages
    # Bits per byte and nats per token: val_* of these weights unquantized, roundtrip_* of the file read back.
    val_loss: Float | None = None
    val_bpb: Float | None = None
    val_tokens: Int | None = None
    val_bytes: Int | None = None
    raw_val_bpb: Float | None = None  # weights before averaging
    roundtrip_val_loss: Float | None = None
    roundtrip_val_bpb: Float | None = None
    unadapted_val_bpb: Float | None = None  # same file, fixed weights; None without adapt
    mean_passes: Float | None = None  # through the looped layers, of a token of the file's score; see halting
    bpb_by_passes: list[Float] = field(default_factory=list)  # score of the file if all tokens take 1, 2, … passes
    # Sum of the probabilities of all tokens less 1, the largest of some targets; None without n-gram cache and tilt.
    distribution_error: Float | None = None
    roundtrip_tokens: Int | None = None
    roundtrip_bytes: Int | None = None
    prequant_val_bpb: Float | None = None  # unquantized weights on the tokens of the round trip
    # Nats of consecutive parts of that text (evaluate.Score), for paired tests between two files of one checkpoint.
    roundtrip_block_nats: list[Float] = field(default_factory=list)
    prequant_block_nats: list[Float] = field(default_factory=list)
    # Bytes: all entries, code included, sum to total_bytes.
    bytes: dict[Text, Int] = field(default_factory=dict)
    total_bytes: Int | None = None
    cap_bytes: Int | None = None
    forecast_bytes: Int | None = None  # total estimated before training
    forecast_at_tenth: Int | None = None  # total estimated from the weights after a tenth of training
    artifact_sha256: Text | None = None
    script_sha256: Text | None = None  # packed script; its bytes are those of the code
    parameters: Int | None = None
    steps: Int | None = None
    tokens: Int | None = None
    stopped_by: Text | None = None  # iterations, wallclock; checkpoint: trained elsewhere, so steps are not known
    train_seconds: Float | None = None
    # TrainTimer.budget: counted and excluded seconds
    budget: dict[Text, Float | dict[Text, Float]] = field(default_factory=dict)
    peak_memory_bytes: Int | None = None  # rank 0: GPU memory on CUDA, else resident memory
    flops_per_token: Float | None = None  # forward and backward; see flops
    mfu: Float | None = None  # model FLOPs / peak FLOPs of the GPUs, if that is known
    eval_seconds: Float | None = None
    export_seconds: Float | None = None
    resumed: Int = 0  # number of resumes after a kill
    data_fingerprint: Text | None = None  # tokenizer and all shards
    scored_text: Text | None = None  # sha256 of the text of roundtrip_*, for every tokenizer
    data: Annotated[dict, AfterValidator(_facts)] = field(default_factory=dict)  # see training.inputs.data_facts
    protocol: Text | None = None  # see evaluation_protocol
    environment: dict[Text, Text | bool | None] = field(default_factory=dict)
    finished: Text = ""  # UTC, in the format TIME
    # sha256 when the run ended, by name
    files: dict[Literal["log.txt", "metrics.jsonl", "environment.json"], Text] = field(default_factory=dict)
    schema: Int = SCHEMA
    checksum: Text = ""  # over all other fields; detects hand-edited results
    table: list[dict] = field(default_factory=list)  # rows of a stage

    @property
    def fits(self) -> bool | None:
        return None if None in (self.total_bytes, self.cap_bytes) else self.total_bytes <= self.cap_bytes

    @property
    def overtime(self) -> float:
        """Seconds over the wallclock limit; 0 if only the last step crossed it, which the reference allows too."""
        over, step = self.budget.get("over"), (self.train_seconds or 0.0) / (self.steps or 1)
        return over if isinstance(over, float | int) and over > step else 0.0


def evaluation_protocol(config: EvalConfig, train: TrainConfig, device: str) -> str:
    """How a kind of device (cpu, cuda, mps) scores; only equal ones are comparable.

    Window, stride, adaptation and n-gram tilt decide what each target is predicted from. Precision and device, named
    unless they are float32 and cpu, round all losses alike: a paired test would call that a difference. The n-gram
    cache is not part of it: it predicts the same targets from the same context.
    """
    window = f"window {config.eval_seq_len}, stride {config.eval_stride or config.eval_seq_len}"
    window += "" if config.adapt == "off" else f", adapted by {config.adapt}"
    window += ", tilted" if config.eval_tilt_boost else ""
    return f"{window}{computed_in(train.precision_on(device), device)}"


def computed_in(precision: str, device: str) -> str:
    """The end of a protocol: '' or ', bfloat16 on cuda'."""
    return "" if (precision, device) == ("float32", "cpu") else f", {precision} on {device}"


def whole_protocol(result: Result, precision: str) -> str | None:
    """The result's protocol; precision (the knob) and device end it in results of versions that left them out."""
    device = result.environment.get("device") if isinstance(result.environment, dict) else None
    if result.kind == "import" or not isinstance(device, str) or " on " in str(result.protocol):
        return result.protocol
    end = computed_in(TrainConfig.model_construct(precision=precision).precision_on(device), device)
    return f"{result.protocol or 'window unknown'}{end}" if end else result.protocol


def write_result(run_dir: Path, result: Result) -> Result:
    """Write result.json with the time and the checksums of CHECKSUMMED_FILES; returns the result with these."""
    files = {name: checksum(run_dir / name) for name in CHECKSUMMED_FILES if (run_dir / name).exists()}
    result = replace(result, finished=time.strftime(TIME, time.gmtime()), files=files)
    result = replace(result, checksum=result_checksum(asdict(result)))
    atomic_write(run_dir / "result.json", json.dumps(asdict(result), indent=1))
    return result


def read_result(run_dir: str | Path) -> Result | None:
    """The run's result; None while it is incomplete.

    Fields that this version does not know are ignored. RunError if result.json is damaged, was edited, or is of a
    newer version that says it cannot be read so.
    """
    path = Path(run_dir) / "result.json"
    if not os.path.lexists(path):
        return None
    content, again = read_json(path), "delete the directory to run it again"
    if content is None:
        raise RunError(f"{path}: holds no JSON object; {again}")
    if type(content.get("schema")) is int and content["schema"] > SCHEMA:
        raise RunError(f"{path}: written by a newer version of the workbench; update the workbench")
    if wrong := misfits(_RESULT, content):
        field, why = next(iter(wrong.items()))
        raise RunError(f"{path}: not what a run writes ({field}: {why}); {again}")
    if not content.get("checksum"):
        raise RunError(f"{path}: has no checksum, so nothing says that the run wrote it; {again}")
    if content["checksum"] != result_checksum(content):
        raise RunError(f"{path}: changed since the run wrote it; {again}")
    result = Result(**{field.name: content[field.name] for field in fields(Result) if field.name in content})
    if result.kind != "import" and result.roundtrip_val_bpb is not None:
        needed = [name for name in OF_A_SCORE if name != "steps" or result.stopped_by != "checkpoint"]
        lacking = [name for name in needed if not isinstance(value := vars(result)[name], int) or value <= 0]
        if lacking or result.seed is None or "code" not in result.bytes:
            named = ", ".join(lacking) or "seed or bytes of code"
            raise RunError(f"{path}: not what a run writes (a score without {named}); {again}")
    return result


_RESULT = TypeAdapter(Result)


def finished_run(run_dir: Path) -> tuple[Result, RunConfig]:
    """A run's result and config. RunError if it is incomplete."""
    result = read_result(run_dir)
    if result is None:
        raise RunError(f"{run_dir}: incomplete or not there; only a finished run can be studied")
    return result, RunConfig.from_file(run_dir / "config.json")


def stored_result(run_dir: Path, source_dir: Path, source: Result) -> Result | None:
    """The result in run_dir, if any. RunError if it was made from another training of its source."""
    result = read_result(run_dir)
    if result is not None and result.checkpoint_sha256 != source.checkpoint_sha256:
        raise RunError(f"{run_dir}: made from another training of {source_dir.name}; delete that folder")
    return result


def result_checksum(content: dict) -> str:
    """12 hex digits over all fields except `checksum`."""
    return digest({name: value for name, value in content.items() if name != "checksum"})
