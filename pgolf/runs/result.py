"""result.json: its schema, and how it is written, read and checked against hand edits."""

import json
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from pgolf.disk import checksum, read_json
from pgolf_core.config import RunConfig, digest
from pgolf_core.files import atomic_write
from pgolf_core.knobs import EvalConfig, TrainConfig

ARTIFACT = "artifact.pgolf"
CHECKPOINT = "checkpoint.safetensors"
CHECKSUMMED_FILES = ("log.txt", "metrics.jsonl", "environment.json")  # their sha256 stands in result.json
TIME = "%Y-%m-%dT%H:%M:%S"  # UTC


class RunError(ValueError):
    """A run directory that cannot be used as asked; the message names it."""


@dataclass(frozen=True)
class Result:
    """The fields of result.json. bpb is the score of the file on disk; None means the run has no such figure."""

    kind: str  # train, export, import, or the name of a stage's notebook
    config_hash: str
    seed: int | None  # None: an imported log without a seed
    track: str
    source: str | None = None  # the run whose checkpoint this one exports
    checkpoint_sha256: str | None = None  # exports and stages: the checkpoint of their source
    # Bits per byte and nats per token: val_* of the raw weights, roundtrip_* of the file read back.
    val_loss: float | None = None
    val_bpb: float | None = None
    val_tokens: int | None = None
    val_bytes: int | None = None
    roundtrip_val_loss: float | None = None
    roundtrip_val_bpb: float | None = None
    roundtrip_tokens: int | None = None
    roundtrip_bytes: int | None = None
    prequant_val_bpb: float | None = None  # raw weights on the tokens of the round trip
    # Nats of consecutive parts of that text (evaluate.Score), for paired tests between two files of one checkpoint.
    roundtrip_block_nats: list[float] = field(default_factory=list)
    prequant_block_nats: list[float] = field(default_factory=list)
    # Bytes: all entries, code included, sum to total_bytes.
    bytes: dict[str, int] = field(default_factory=dict)
    total_bytes: int | None = None
    cap_bytes: int | None = None
    forecast_bytes: int | None = None  # total estimated before training
    forecast_at_tenth: int | None = None  # total estimated from the weights after a tenth of training
    artifact_sha256: str | None = None
    parameters: int | None = None
    steps: int | None = None
    tokens: int | None = None
    stopped_by: str | None = None  # iterations, wallclock
    train_seconds: float | None = None
    budget: dict = field(default_factory=dict)  # TrainTimer.budget: counted and excluded seconds
    peak_memory_bytes: int | None = None  # rank 0: GPU memory on CUDA, else resident memory
    flops_per_token: float | None = None  # forward and backward; see flops
    mfu: float | None = None  # model FLOPs / peak FLOPs of the GPUs, if that is known
    eval_seconds: float | None = None
    export_seconds: float | None = None
    resumed: int = 0  # number of resumes after a kill
    data_fingerprint: str | None = None  # tokenizer and all shards
    scored_text: str | None = None  # sha256 of the text of roundtrip_*, for every tokenizer
    data: dict = field(default_factory=dict)  # see training.inputs.data_facts
    protocol: str | None = None  # see evaluation_protocol
    environment: dict = field(default_factory=dict)
    finished: str = ""  # UTC, in the format TIME
    files: dict[str, str] = field(default_factory=dict)  # sha256 of CHECKSUMMED_FILES when the run ended
    checksum: str = ""  # over all other fields; detects hand-edited results
    table: list[dict] = field(default_factory=list)  # rows of a stage

    @property
    def fits(self) -> bool | None:
        return None if self.total_bytes is None else self.total_bytes <= self.cap_bytes

    @property
    def overtime(self) -> float:
        """Seconds over the wallclock limit; 0 if only the last step crossed it, which the reference allows too."""
        over = self.budget.get("over", 0.0)
        return over if over and over > self.train_seconds / self.steps else 0.0


def evaluation_protocol(config: EvalConfig, train: TrainConfig, device: str) -> str:
    """How a kind of device (cpu, cuda, mps) scores; only equal ones are comparable.

    Window and stride decide the context of each target. Precision and device, named unless they are float32 and cpu,
    round all losses alike: a paired test would call that a difference. The n-gram cache is not part of it: it predicts
    the same targets from the same context.
    """
    window = f"window {config.eval_seq_len}, stride {config.eval_stride or config.eval_seq_len}"
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
    result = replace(result, checksum=_checksum(asdict(result)))
    atomic_write(run_dir / "result.json", json.dumps(asdict(result), indent=1))
    return result


def read_result(run_dir: str | Path) -> Result | None:
    """The run's result; None while it is incomplete. RunError if result.json is of another version or was edited."""
    path = Path(run_dir) / "result.json"
    if not path.exists():
        return None
    content = read_json(path) or {}
    try:
        result = Result(**content)
    except TypeError:  # unknown or missing fields
        raise RunError(f"{path}: not a result of this version; delete the directory to run it again") from None
    if content.get("checksum") and content["checksum"] != _checksum(content):
        raise RunError(f"{path}: changed since the run wrote it; delete the directory to run it again")
    return result


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


def _checksum(content: dict) -> str:
    """12 hex digits over all fields except `checksum`."""
    return digest({name: value for name, value in content.items() if name != "checksum"})
