"""One run = one directory; all runs = one DataFrame.

runs/<sweep>/<run>/  config.json, environment.json, metrics.jsonl, log.txt, checkpoint.safetensors, artifact.*,
                     notebook.ipynb, result.json (last: a directory without it is incomplete)
"""

import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import filelock
import pandas as pd

from pgolf.disk import checksum
from pgolf.processes import end_with_sweep
from pgolf.runs import integrity
from pgolf_core.config import PERMISSIONS, ROOT, ConfigError, RunConfig, digest, environment_knobs
from pgolf_core.files import atomic_write

if TYPE_CHECKING:  # pages and tables need no torch, which takes as long to load as all else of them
    import torch

RUNS = Path(os.environ.get("PGOLF_RUNS", ROOT / "runs"))
ARTIFACT, CHECKPOINT = integrity.ARTIFACT, integrity.CHECKPOINT
TIME = "%Y-%m-%dT%H:%M:%S"
INTERRUPTED = "Interrupted"  # the error of a run that something outside of it ended
LOCK_PATIENCE_SECONDS = 20  # a kernel whose sweep was killed lets go within a few
KNOBS = [name for name in RunConfig.model_fields if name not in PERMISSIONS]  # what makes a run another one
# What two scores must share to be set against each other, as columns of load().
COMPARABLE = ("scored_text", "roundtrip_bytes", "protocol")


class RunError(ValueError):
    """A run directory that cannot be used as asked; the message names it."""


@dataclass(frozen=True)
class Result:
    """What result.json holds. bpb is what the bytes on disk score; None where a run has no such figure."""

    kind: str  # train, export, import, or the name of a stage's notebook
    config_hash: str
    seed: int | None  # None: an imported log that does not tell it
    track: str
    source: str | None = None  # the run whose checkpoint this one exports
    checkpoint_sha256: str | None = None  # of the weights; an export's and a stage's are their source's
    # bits per byte and nats per token; val_* of the raw weights, roundtrip_* of the file read back
    val_loss: float | None = None
    val_bpb: float | None = None
    val_tokens: int | None = None
    val_bytes: int | None = None
    roundtrip_val_loss: float | None = None
    roundtrip_val_bpb: float | None = None
    roundtrip_tokens: int | None = None
    roundtrip_bytes: int | None = None
    prequant_val_bpb: float | None = None  # raw weights on the tokens of the round trip
    # nats of consecutive parts of that text, see evaluate.Score: what tells two files of one checkpoint from luck
    roundtrip_block_nats: list[float] = field(default_factory=list)
    prequant_block_nats: list[float] = field(default_factory=list)
    # bytes; parts and code sum to total
    bytes: dict[str, int] = field(default_factory=dict)
    total_bytes: int | None = None
    cap_bytes: int | None = None
    forecast_bytes: int | None = None  # the total as it was expected before training
    forecast_at_tenth: int | None = None  # and from the weights after a tenth of it
    artifact_sha256: str | None = None
    parameters: int | None = None
    steps: int | None = None
    tokens: int | None = None
    stopped_by: str | None = None  # iterations, wallclock
    train_seconds: float | None = None
    budget: dict = field(default_factory=dict)  # what the clock counts and what not; see clock.Clock.budget
    peak_memory_bytes: int | None = None  # of rank 0: of its GPU's memory, else of the machine's
    flops_per_token: float | None = None  # of the model, forward and backward; see flops
    mfu: float | None = None  # share of the GPUs' peak that training made of it; None where that is not known
    eval_seconds: float | None = None
    export_seconds: float | None = None
    resumed: int = 0  # times a killed training went on from its resume file
    data_fingerprint: str | None = None  # of the tokenizer and all shards
    scored_text: str | None = None  # sha256 of the text behind roundtrip_*: whatever the tokenizer, the same text
    data: dict = field(default_factory=dict)  # see roundtrip.data_facts
    protocol: str | None = None  # how validation text was cut; see evaluation_protocol
    environment: dict = field(default_factory=dict)
    finished: str = ""  # when, in UTC: 2026-03-18T20:34:55
    files: dict[str, str] = field(default_factory=dict)  # sha256 of the small files beside it as they were then
    checksum: str = ""  # of all other fields, so that nobody's slip of the hand becomes a score
    table: list[dict] = field(default_factory=list)  # a stage's rows

    @property
    def fits(self) -> bool | None:
        return None if self.total_bytes is None else self.total_bytes <= self.cap_bytes

    @property
    def overtime(self) -> float:
        """Seconds over the clock, 0 within it: the step that the clock runs out in is within, as in the reference."""
        over = self.budget.get("over", 0.0)
        return over if over and over > self.train_seconds / self.steps else 0.0


def evaluation_protocol(config: RunConfig) -> str:
    """Runs are comparable only under one protocol: window and stride decide how much context a target has.

    The sidecar is no part of it: it is a way to predict, scored on the same targets with the same context.
    """
    return f"window {config.eval_window}, stride {config.eval_stride or config.eval_window}"


def environment(device: "torch.device") -> dict:
    """Versions, device, git commit and whether the checkout differs from it."""
    import torch

    packages = ("torch", "numpy", "sentencepiece", "safetensors")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    commit, dirty = _git("rev-parse", "HEAD"), _git("status", "--porcelain")
    if commit is None:  # where `pgolf remote` pushed the code to: as home's git said
        commit, dirty = os.environ.get("PGOLF_GIT_COMMIT"), os.environ.get("PGOLF_GIT_DIRTY")
    return {
        "device": device.type,
        "device_name": name,
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in packages},
        "git_commit": commit,
        "git_dirty": None if dirty is None else bool(dirty),
    }


def _git(*words: str) -> str | None:
    """git's answer about this checkout; None where there is no git or no repository."""
    try:
        answer = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def run_name(config: RunConfig) -> str:
    """A name that says what the run is: the same knobs give the same directory."""
    return f"{config.track or 'run'}-{config.hash}"


@contextmanager
def locked(path: Path, patience_seconds: float, busy: str) -> Iterator[None]:
    """Hold the file's lock inside the block; RunError(busy) when another holds it for longer than our patience."""
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=patience_seconds)
    except filelock.Timeout:
        raise RunError(busy) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def claim(run_dir: str | Path, config: RunConfig) -> Iterator[Path]:
    """Own a run directory: lock it, write config.json, or hold ours against the one there.

    Raises RunError when another process writes it, ConfigError when it was made with other knobs.
    """
    run_dir = Path(run_dir)
    if run_dir.exists() and not run_dir.is_dir():
        raise RunError(f"{run_dir}: is a file; a run needs a directory")
    run_dir.mkdir(parents=True, exist_ok=True)
    busy = f"{run_dir}: another process is writing this run; wait for it or name another run"
    with locked(run_dir / ".lock", LOCK_PATIENCE_SECONDS, busy):
        end_with_sweep()
        check_config(run_dir, config)
        if not (run_dir / "config.json").exists():
            atomic_write(run_dir / "config.json", json.dumps(config.model_dump(), indent=1))
        (run_dir / "error.json").unlink(missing_ok=True)
        for unfinished in run_dir.glob(".*.tmp"):  # of a writer that was killed
            unfinished.unlink()
        yield run_dir


def check_config(run_dir: Path, config: RunConfig) -> None:
    """ConfigError when the directory holds a run of other knobs."""
    path = run_dir / "config.json"
    if not path.exists():
        return
    there = read_json(path)
    if there is None:
        raise RunError(f"{path}: damaged; delete the directory to run it again")
    ours = config.model_dump()
    # A knob that the run does not know came later, and what came later does nothing at its default.
    there = {name: field.default for name, field in RunConfig.model_fields.items()} | there
    differ = {k: (there[k], ours[k]) for k in ours if there[k] != ours[k] and k not in PERMISSIONS}
    if differ:
        changes = ", ".join(f"{k} {old!r} there, {new!r} now" for k, (old, new) in differ.items())
        raise ConfigError(f"{run_dir} was run with other knobs ({changes}); name another run or delete it")


def read_json(path: Path) -> dict | None:
    """The file's mapping; None when it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def write_result(run_dir: Path, result: Result) -> Result:
    """result.json, with the time and the checksums of what lies there now; the result with these."""
    files = {name: checksum(run_dir / name) for name in integrity.TOLD if (run_dir / name).exists()}
    result = replace(result, finished=time.strftime(TIME, time.gmtime()), files=files)
    result = replace(result, checksum=_checksum(asdict(result)))
    atomic_write(run_dir / "result.json", json.dumps(asdict(result), indent=1))
    return result


def read_result(run_dir: str | Path) -> Result | None:
    """The run's result; None where it is incomplete. RunError when result.json is not one."""
    path = Path(run_dir) / "result.json"
    if not path.exists():
        return None
    content = read_json(path) or {}
    required = {f.name for f in fields(Result) if f.default is MISSING and f.default_factory is MISSING}
    if not required <= content.keys() <= {f.name for f in fields(Result)}:
        raise RunError(f"{path}: not a result of this version; delete the directory to run it again")
    if content.get("checksum") and content["checksum"] != _checksum(content):
        raise RunError(f"{path}: changed since the run wrote it; delete the directory to run it again")
    return Result(**content)


def _checksum(content: dict) -> str:
    """12 hex digits over a result's fields but this one."""
    return digest({name: value for name, value in content.items() if name != "checksum"})


def write_environment(run_dir: Path, device: "torch.device") -> None:
    """environment.json: what a run is computed with, known from its start: a failed one has no result to tell it."""
    packages = {d.metadata["Name"]: d.version for d in metadata.distributions() if d.metadata["Name"]}
    content = environment(device) | {"knobs": environment_knobs(), "packages": dict(sorted(packages.items()))}
    atomic_write(run_dir / "environment.json", json.dumps(content, indent=1))


def write_failure(run_dir: Path, error: BaseException) -> None:
    """error.json: why a run ended without a result. A later try removes it."""
    _write_error(run_dir, type(error).__name__, str(error))


def write_interruption(run_dir: Path, why: str) -> None:
    """error.json of a run that something outside of it ended: a lost machine, a killed process."""
    _write_error(run_dir, INTERRUPTED, why)


def _write_error(run_dir: Path, error: str, message: str) -> None:
    atomic_write(Path(run_dir) / "error.json", json.dumps({"error": error, "message": message}, indent=1))


def directories(root: str | Path = RUNS) -> list[Path]:
    """Every run directory under root, in name order: those with a config.json, or a result that lost it."""
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))  # .remote: what is on its way
        if "config.json" in files or "result.json" in files:
            found.append(Path(folder))
    return found


def metric_rows(run_dir: str | Path) -> list[dict]:
    """Lines of metrics.jsonl; one torn by a kill, or damaged, is left out."""
    path = Path(run_dir) / "metrics.jsonl"
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def metrics(run_dir: str | Path) -> pd.DataFrame:
    """metrics.jsonl as a table: step, train_loss (nats a token), val_bpb, train_seconds, …"""
    return pd.DataFrame(metric_rows(run_dir))


def load(root: str | Path = RUNS, thorough: bool = False) -> pd.DataFrame:
    """All runs under root, a row each: place, status, result, then every knob.

    status: complete; failed (error.json says why); interrupted (its machine was lost, or it was killed); damaged (a
    file is not what the run wrote, see integrity; thorough checks every checksum); incomplete. Only complete rows
    carry figures. bpb is roundtrip_val_bpb, over_cap whether total_bytes exceeds the cap, control the run of the sweep
    that this one is compared with (of its own seed, where the control has several), arm what the run is in its sweep
    file, apart from seed and repeat, flags what is odd about an imported log or about a run's clock, in sentences.
    """
    root = Path(root)
    rows = [_row(root, run_dir, thorough) for run_dir in directories(root)]
    columns = ["sweep", "run", "status", "problem", "bpb", "over_cap", "flags", *(f.name for f in fields(Result))]
    knobs = [name for name in RunConfig.model_fields if name not in columns]
    table = pd.DataFrame(rows, columns=[*columns, *knobs, "path"])
    table["scored_text"] = _texts(table)
    about = {sweep: read_json(root / sweep / "sweep.json") or {} for sweep in set(table.sweep)}
    arms = {sweep: told.get("arms") or {} for sweep, told in about.items()}
    named = {sweep: told.get("control") or "control" for sweep, told in about.items()}
    there = set(zip(table.sweep, table.run, strict=True))
    table["arm"] = [arms[sweep].get(run, run) for sweep, run in zip(table.sweep, table.run, strict=True)]
    same = [  # the control's run of the same seed and repeat, which its name ends with
        named[sweep] + run.removeprefix(arm) for sweep, run, arm in zip(table.sweep, table.run, table.arm, strict=True)
    ]
    table["control"] = [
        own if (sweep, own) in there else named[sweep] for sweep, own in zip(table.sweep, same, strict=True)
    ]
    return table


def _texts(table: pd.DataFrame) -> pd.Series:
    """scored_text, also of imported logs, and of results that older versions wrote without it."""
    same = [
        f"{data}, {tokens} tokens, {size} bytes"
        for data, tokens, size in zip(
            table.data_fingerprint, table.roundtrip_tokens, table.roundtrip_bytes, strict=True
        )
    ]
    named = table.scored_text.notna()
    # Of one folder as many tokens and bytes are one text.
    known = {key: text for key, text, there in zip(same, table.scored_text, named, strict=True) if there}
    return table.scored_text.where(named, [known.get(key, key) for key in same])


def best(runs_table: pd.DataFrame) -> pd.Series:
    """The trained run of lowest bpb that fits its cap.

    Raises RunError when no complete run does, or when their scores or caps are not comparable.
    """
    table = runs_table[(runs_table.status == "complete") & (runs_table.kind == "train") & runs_table.bpb.notna()]
    if table.empty:
        raise RunError(
            "no complete training run with a round-trip score here; run the training first, "
            "with final_roundtrip_eval=1 and save_raw_checkpoint=1"
        )
    if table.groupby([*COMPARABLE, "cap_bytes"], dropna=False).ngroups > 1:
        raise RunError(
            f"the runs {', '.join(table.run[:5])} … were scored on different text, in different windows or under "
            "different caps, so none of them is the best; name the run you mean"
        )
    legal = table[~table.over_cap.astype(bool)]
    if legal.empty:
        sizes = ", ".join(f"{r.run} {r.total_bytes:.0f} of {r.cap_bytes:.0f}" for r in table.itertuples())
        raise RunError(
            f"every complete run is over its cap (bytes): {sizes}; make the model smaller or raise cap_bytes"
        )
    return legal.loc[legal.bpb.astype(float).idxmin()]


def named(runs_table: pd.DataFrame, run: str) -> pd.Series:
    """The trained run of that name, the last of several. RunError saying what is there, or why it has no score."""
    trained = runs_table[runs_table.kind == "train"]
    found = trained[trained.run == run]
    if found.empty:
        raise RunError(f"no complete training run {run!r} here; there are {', '.join(trained.run) or 'none'}")
    if pd.isna(found.iloc[-1].bpb):
        raise RunError(f"{found.iloc[-1].path}: has no round-trip score, it was run with final_roundtrip_eval=0")
    return found.iloc[-1]


def _row(root: Path, run_dir: Path, thorough: bool) -> dict:
    place = run_dir.relative_to(root).parts
    row = {"sweep": place[0] if len(place) > 1 else "", "run": "/".join(place[1:] or place), "path": run_dir}
    row |= {"status": "incomplete", "problem": "", "flags": []}
    config = read_json(run_dir / "config.json")
    if config is None:
        return row | {"status": "damaged", "problem": "config.json"}
    row |= {k: v for k, v in config.items() if k in RunConfig.model_fields}
    if not (run_dir / "import.json").exists():  # what came later than the run does nothing at its default
        row = {name: field.default for name, field in RunConfig.model_fields.items()} | row
    if (imported := read_json(run_dir / "import.json")) is not None:
        row |= {"kind": "import", "flags": imported.get("flags") or []}
    try:
        result = read_result(run_dir)
    except RunError:
        return row | {"status": "damaged", "problem": "result.json"}
    if result is None:
        error = read_json(run_dir / "error.json")
        if error is not None:
            if error.get("error") == INTERRUPTED:
                row |= {"status": "interrupted", "problem": str(error.get("message"))}
            else:
                row |= {"status": "failed", "problem": f"{error.get('error')}: {error.get('message')}"}
        return row
    same = result.kind == "import" or result.config_hash == digest(
        {k: v for k, v in config.items() if k not in PERMISSIONS}
    )
    if problem := integrity.damage(run_dir, vars(result), thorough) if same else "config.json":
        return row | {"status": "damaged", "problem": problem}
    row |= vars(result) | {"status": "complete", "bpb": result.roundtrip_val_bpb}
    if not result.finished:  # of a version that did not note it
        row["finished"] = time.strftime(TIME, time.gmtime((run_dir / "result.json").stat().st_mtime))
    if result.fits is not None:
        row["over_cap"] = not result.fits
    if result.overtime:
        row["flags"] = [f"over its clock by {result.overtime:.1f} s"]
    return row
