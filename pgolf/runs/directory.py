"""One run = one directory: names, lock, config check, environment, errors, metric rows.

runs/<sweep>/<run>/  config.json, environment.json, metrics.jsonl, log.txt, checkpoint.safetensors, artifact.*,
                     notebook.ipynb, result.json (written last: a directory without it is incomplete)
"""

import json
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import filelock

from pgolf.disk import open_regular, parse_object, read_json
from pgolf.processes import SWEEP_PID, end_with_sweep
from pgolf.runs.code import check_code, code_digest
from pgolf.runs.result import RunError
from pgolf.runs.schema import knobs_that_fit
from pgolf_core.config import (
    FIRST_DEFAULTS,
    HASH_EXCLUDED,
    MARKER,
    ROOT,
    ConfigError,
    RunConfig,
    did_you_mean,
    environment_knobs,
    shown,
)
from pgolf_core.files import atomic_write

try:
    import fcntl
except ImportError:  # Windows has no shared locks
    fcntl = None
if TYPE_CHECKING:  # the CLI needs this module without torch, which takes seconds
    import torch

RUNS = Path(os.environ.get("PGOLF_RUNS") or ROOT / "runs")
INTERRUPTED = "Interrupted"  # error.json of a run that was ended from outside
REFUSED = "Refused"  # and of one that was not trained, since its file would not fit its cap
PRUNED = "Pruned"  # and of a search's trial that was stopped, since others were better at the same step
LOCK_PATIENCE_SECONDS = 20  # a killed sweep's kernel holds its lock for some seconds
MAX_DEPTH = 5  # folders below runs/: sweep, run, the files of a lab
MAX_LOG_BYTES = 256 * 2**20
MAX_WORDS, TAIL_BYTES = 2000, 65_536  # a failure's characters, its log's last bytes


def describe_environment(device: "torch.device", studies: bool = False) -> dict:
    """Versions, device, digest of the code (see code_digest), git commit, and whether the checkout differs from it.

    Raises RunError if the code was edited since this process loaded it.
    """
    import torch

    check_code(studies)
    packages = ("torch", "numpy", "sentencepiece", "safetensors")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    commit, dirty = git("rev-parse", "HEAD"), git("status", "--porcelain")
    if commit is None:  # no .git: `pgolf remote` passes what the local git says
        commit, dirty = os.environ.get("PGOLF_GIT_COMMIT"), os.environ.get("PGOLF_GIT_DIRTY")
    return {
        "device": device.type,
        "device_name": name,
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in packages},
        "code": code_digest(studies=studies),
        "git_commit": commit,
        "git_dirty": None if dirty is None else bool(dirty),
    }


def git(*words: str) -> str | None:
    """Output of git in this checkout; None if there is no git or no repository, or ROOT was made by `pgolf init`."""
    if (ROOT / MARKER).is_file():  # a repository around it does not hold the code
        return None
    try:
        answer = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def run_name(config: RunConfig, folder: Path) -> str:
    """Directory name derived from the knobs, or the name that an older version gave to a run of these knobs there."""
    prefix = config.track or "run"
    if not (folder / f"{prefix}-{config.hash}").exists():
        for other in sorted(folder.glob(f"{prefix}-{'[0-9a-f]' * 12}")):
            with suppress(ConfigError, RunError):
                check_config(other, config)
                if (other / "config.json").exists():
                    return other.name
    return f"{prefix}-{config.hash}"


def folder_name(name: str) -> str:
    """The nearest name that is valid for a folder on every system; a valid name is its own."""
    name = re.sub(r"[^A-Za-z0-9_.+=-]+", "-", name).lstrip(".+=-")[:100].rstrip(".") or "log"
    return f"_{name}"[:100] if re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", name.lower()) else name


@contextmanager
def hold_lock(path: Path, patience_seconds: float, busy: str) -> Iterator[None]:
    """Hold the lock file inside the block; RunError(busy) if another process still holds it after patience_seconds."""
    with ExitStack() as stack:
        try:
            stack.enter_context(filelock.FileLock(path, timeout=patience_seconds))
        except filelock.Timeout:
            raise RunError(busy) from None
        yield


def is_held(lock: Path) -> bool:
    """True if a process holds this lock file exclusively. A missing file is not created."""
    if not lock.is_file():
        return False
    try:
        if fcntl is not None:
            with open(lock, "rb") as file:  # closing it releases the shared lock
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        else:
            with filelock.FileLock(lock).acquire(timeout=0):
                pass
    except FileNotFoundError:
        return False
    except (OSError, filelock.Timeout):  # held, or another user's file, whose lines must tell
        return True
    return False


@contextmanager
def locked(run_dir: str | Path, config: RunConfig) -> Iterator[Path]:
    """Lock a run directory inside the block; check config.json, and write it anew while nothing was made by it.

    Raises RunError when another process holds the lock, ConfigError when the directory has other knobs.
    """
    run_dir = Path(run_dir)
    if run_dir.exists() and not run_dir.is_dir():
        raise RunError(f"{run_dir}: is a file; a run needs a directory")
    run_dir.mkdir(parents=True, exist_ok=True)
    busy = f"{run_dir}: another process is writing this run; wait for it or name another run"
    with hold_lock(run_dir / ".lock", LOCK_PATIENCE_SECONDS, busy):
        end_with_sweep()
        check_config(run_dir, config)
        made = any((run_dir / name).exists() for name in ("result.json", "resume.pt"))
        if not made or not (run_dir / "config.json").exists():  # a run's own stays
            atomic_write(run_dir / "config.json", json.dumps(config.model_dump(), indent=1))
        (run_dir / "error.json").unlink(missing_ok=True)
        for unfinished in run_dir.glob(".*.tmp"):  # left by a killed writer
            unfinished.unlink()
        yield run_dir


def check_config(run_dir: Path, config: RunConfig) -> None:
    """ConfigError when the directory holds a run of other knobs; a default that changed is none if it is not read."""
    path = run_dir / "config.json"
    if not path.exists():
        return
    stored = with_defaults(read_config(run_dir))
    if unknown := stored.keys() - RunConfig.model_fields.keys():
        names = ", ".join(sorted(map(str, unknown)))[:200]
        raise RunError(f"{path}: has knobs that this version does not know ({names}); update the workbench")
    ours = config.model_dump()
    differ = {k: (stored[k], ours[k]) for k in ours if stored[k] != ours[k] and k not in HASH_EXCLUDED}
    defaults = {k: v for k, v in FIRST_DEFAULTS.items() if differ.get(k) == (v, RunConfig.model_fields[k].default)}
    if not config.export.needs_calibration:  # these runs read no knob whose default has changed
        differ = {k: v for k, v in differ.items() if k not in defaults}
    if differ:
        changes = ", ".join(f"{k} {shown(old)} there, {shown(new)} now" for k, (old, new) in differ.items())
        own = defaults if differ.keys() <= defaults.keys() else {}
        way = "".join(f"set {k}={v}, once its default, or " for k, v in own.items())
        raise ConfigError(f"{run_dir} was run with other knobs ({changes}); {way}name another run or delete it")


def read_config(run_dir: Path) -> dict:
    """Content of a run's config.json. RunError naming it if it is damaged, or a knob's value is of another type."""
    path = run_dir / "config.json"
    content = read_json(path)
    wrong = {"": "no JSON object"} if content is None else knobs_that_fit(content)[1]
    if wrong:
        why = " ".join(next(iter(wrong.items())))
        raise RunError(f"{path}: damaged ({why.strip()}); delete the directory to run it again")
    return content


def with_defaults(stored: dict) -> dict:
    """Content of a config.json; fields that an old one lacks take their first defaults, the old behaviour."""
    return {name: field.default for name, field in RunConfig.model_fields.items()} | FIRST_DEFAULTS | stored


def outside_knobs() -> dict[str, str]:
    """Knobs that this run may have from the environment; in a sweep only by prefixed names."""
    return environment_knobs(prefixed=SWEEP_PID in os.environ)


def write_environment(run_dir: Path, device: "torch.device") -> None:
    """environment.json, written at the start, since a failed run has no result to hold it."""
    content = describe_environment(device) | {"knobs": outside_knobs(), "packages": _installed()}
    atomic_write(run_dir / "environment.json", json.dumps(content, indent=1))


@cache
def _installed() -> dict[str, str]:
    """Packages and their versions, by name, the first of each on the path; a third of a second, so once a process."""
    packages: dict[str, str] = {}
    for distribution in metadata.distributions():
        described = distribution.metadata
        if described["Name"]:
            packages.setdefault(described["Name"], described["Version"])
    return {name: packages[name] for name in sorted(packages)}


def write_failure(run_dir: Path, error: BaseException) -> None:
    """error.json: why a run ended without a result. The next attempt removes it."""
    write_interruption(run_dir, str(error), type(error).__name__)


def write_interruption(run_dir: Path, why: str, error: str = INTERRUPTED) -> None:
    """error.json of a run that was ended from outside: lost machine, killed process, cap (REFUSED), search (PRUNED)."""
    atomic_write(Path(run_dir) / "error.json", json.dumps({"error": error, "message": why}, indent=1))


def read_failure(run_dir: Path) -> tuple[str, str] | None:
    """Name of the error and its message from error.json; None without one."""
    content = read_json(run_dir / "error.json")
    return tuple(str(content.get(name))[:MAX_WORDS] for name in ("error", "message")) if content else None


def why_it_failed(run_dir: Path) -> str:
    """'TrainError: training loss is nan …' from error.json; '' without one."""
    return ": ".join(read_failure(run_dir) or ())


def last_words(run_dir: Path) -> str:
    """The last line of kernel.log that is no warning of the kernel itself; '' without one."""
    with suppress(OSError):  # a shared disk lags
        with open_regular(run_dir / "kernel.log") as f:
            f.seek(max(0, f.seek(0, os.SEEK_END) - TAIL_BYTES))
            text = f.read().decode(errors="replace")
        said = [line.strip() for line in text.split("\n") if "[IPKernelApp]" not in line]
        return next(filter(None, reversed(said)), "")[:MAX_WORDS]
    return ""


def run_directories(root: str | Path = RUNS) -> list[Path]:
    """Every run directory under root, in name order: each folder with a config.json or a result.json.

    Links to folders are followed, each folder is seen once, and none deeper than MAX_DEPTH.
    """
    found, seen = [], set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        place = Path(folder)
        with suppress(OSError):  # removed since
            facts = place.stat()
            if (again := (facts.st_dev, facts.st_ino) in seen) or len(place.relative_to(root).parts) >= MAX_DEPTH:
                subfolders.clear()
            seen.add((facts.st_dev, facts.st_ino))
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))  # skip .remote, in transfer
            if not again and ("config.json" in files or "result.json" in files):
                found.append(place)
    return found


def run_names() -> list[str]:
    """Names `sweep/run` of all runs below RUNS."""
    return [path.relative_to(RUNS).as_posix() for path in run_directories(RUNS)]


def find_run(name: str | Path) -> Path:
    """The folder of that name, else the run below RUNS. RunError naming the nearest run if there is neither."""
    for folder in (Path(name), RUNS / name):
        if folder.is_dir():
            return folder
    raise RunError(f"{name}: no such run{did_you_mean(str(name), run_names()) or '; `pgolf runs` lists them'}")


def metric_rows(
    run_dir: str | Path, tail_bytes: int | None = None, most: int | None = MAX_LOG_BYTES
) -> list[dict[str, float]]:
    """The numbers of each row of metrics.jsonl that names a step, without torn lines.

    tail_bytes: only rows that lie whole in so many last bytes. [] without the file, and if more than `most` bytes of
    it would be read.
    """
    try:
        with open_regular(Path(run_dir) / "metrics.jsonl", most if tail_bytes is None else None) as f:
            if tail_bytes is not None:
                f.seek(max(0, f.seek(0, os.SEEK_END) - tail_bytes))
            text = f.read().decode(errors="replace")
    except OSError:
        return []
    rows = [row for line in text.splitlines() if (row := parse_object(line)) is not None]
    return [{k: v for k, v in row.items() if type(v) in (int, float)} for row in rows if type(row.get("step")) is int]
