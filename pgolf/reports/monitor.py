"""What every run is doing now, from its files alone: whoever trains it, in whichever process, alive or dead.

A run is alive while somebody holds its lock, the one that runs.claim takes; looking takes the lock for an instant
where nobody has it. How far a training is and how fast, the last lines of metrics.jsonl say.
"""

import json
import math
import os
import re
import shutil
import subprocess
import time
from contextlib import suppress
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from statistics import median

import filelock
import pandas as pd
import torch
from matplotlib.figure import Figure
from pandas.io.formats.style import Styler

from pgolf.reports import curves
from pgolf.reports import figures as plots
from pgolf.runs import directory
from pgolf.runs.directory import INTERRUPTED
from pgolf.runs.result import RunError, read_json, read_result

STATES = ("running", "stalled", "dead", "failed", "waiting", "complete")  # as tables order them
TROUBLE = ("stalled", "dead", "failed")
COLUMNS = [
    "sweep", "run", "state", "note", "kind", "step", "of", "bpb", "step_seconds", "seconds_left", "wrote", "started",
    "train_seconds", "train_left", "seconds", "sweep_runs", "path",
]  # fmt: skip

QUIET_SECONDS = 60.0  # without a line, and a training may count as stalled,
USUAL_INTERVALS = 10  # but not before so many of its usual intervals,
SILENT_SECONDS = 600.0  # nor before this where no line is to be expected: start, validation, scoring, storing
BOOT_SECONDS = 120.0  # from the start of a run's notebook to the lock that its kernel takes
RECENT = 20  # lines that the pace is taken from

_FILES = (
    ".lock", "config.json", "result.json", "error.json", "job.json", "metrics.jsonl", "log.txt", "kernel.log",
    "resume.pt", "import.json",
)  # fmt: skip


def state(
    root: str | Path = directory.RUNS, sweep: str = "", hours: float = 12.0, now: float | None = None
) -> pd.DataFrame:
    """A row for each run of a sweep; '' = all sweeps that are incomplete or wrote something in the last hours.

    The sweep that wrote last comes first. Runs that a sweep names are there before they have a directory. state is
    one of STATES; note says the rest in words. bpb: of the raw weights while a run trains, of the file once it is
    complete. step_seconds: the pace of the last lines. seconds_left: of running ones, scoring and export as long as
    in the sweep's complete runs, without them before there are any. seconds: that a complete run took in all.
    wrote, started, now: seconds since 1970. sweep_runs: whether a process runs the sweep. Nothing is written.

    Raises RunError when there is no sweep of that name. '.' = runs that lie in root itself.
    """
    root, now = Path(root), time.time() if now is None else now
    if sweep and not (root / sweep).is_dir():
        there = ", ".join(_folders(root)) or "none"
        raise RunError(f"no sweep {sweep!r} in {root}; there are {there}")
    tables = [_sweep(root, name, now) for name in ([sweep] if sweep else [*_folders(root), "."])]
    recent = [
        table for table in tables
        if len(table) and (sweep or table.state.ne("complete").any() or now - table.wrote.max() < 3600 * hours)
    ]  # fmt: skip
    recent.sort(key=lambda table: -table.wrote.fillna(0).max())
    return pd.concat(recent, ignore_index=True) if recent else pd.DataFrame(columns=COLUMNS)


def _folders(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    except OSError:  # no such folder
        return []


def _sweep(root: Path, sweep: str, now: float) -> pd.DataFrame:
    folder = root / sweep
    try:
        began = (folder / "sweep.json").stat().st_mtime
        about = read_json(folder / "sweep.json") or {}
        named = [str(name) for part in ("runs", "stages") for name in about.get(part) or []]
    except OSError:
        began, named = 0.0, []
    names = named + sorted(set(_folders(folder)) - set(named))
    found = {name: _files(folder / name) for name in names}
    found = {name: files for name, files in found.items() if name in named or files.keys() - {".lock"}}
    found = {name: files for name, files in found.items() if "import.json" not in files}  # trained elsewhere
    sweep_runs = any("result.json" not in files for files in found.values()) and is_held(folder / ".lock")
    rows = [_row(folder / name, files, began if sweep_runs else None, now) for name, files in found.items()]
    table = pd.DataFrame(rows, columns=COLUMNS).assign(sweep="" if sweep == "." else sweep, sweep_runs=sweep_runs)
    figures = COLUMNS[COLUMNS.index("step") : COLUMNS.index("sweep_runs")]
    return _with_seconds_left(table.astype(dict.fromkeys(figures, float)), now)


def _files(run_dir: Path) -> dict[str, float]:
    """Times of the last change of a run's files; none where there is no directory (yet, or any more)."""
    try:
        with os.scandir(run_dir) as entries:
            return {e.name: e.stat().st_mtime for e in entries if e.name in _FILES}
    except OSError:
        return {}


def is_held(lock: Path) -> bool:
    """Whether a process holds this lock file. A missing one is not made, nor is its folder."""
    if not lock.exists():
        return False
    try:
        with filelock.FileLock(lock).acquire(timeout=0):
            return False
    except filelock.Timeout:
        return True
    except OSError:  # somebody else's file, not ours to lock: its lines must say
        return True


def _row(run_dir: Path, files: dict[str, float], began: float | None, now: float) -> dict:
    """began: when the sweep that runs now did; None where none does."""
    row = {"run": run_dir.name, "path": run_dir, "kind": "train"}
    row["wrote"] = max((changed for name, changed in files.items() if name != ".lock"), default=None)
    if "result.json" in files:
        return row | _finished(run_dir, files["result.json"], files.get("job.json"))
    job = read_json(run_dir / "job.json") if "job.json" in files else None
    row["kind"] = Path((job or {}).get("notebook", "train.ipynb")).stem  # a stage's is the name of its notebook
    row["started"] = files.get("job.json", files.get("config.json"))
    config = _config(run_dir, files["config.json"]) if "config.json" in files else {}
    rows = _last_rows(run_dir / "metrics.jsonl") if "metrics.jsonl" in files else []
    row |= _pace(rows, config)

    if ".lock" in files and is_held(run_dir / ".lock"):
        return row | _alive(row, rows, config, now)
    if (run_dir / "result.json").exists():  # since we looked: it ended, and let go of its lock
        return _row(run_dir, _files(run_dir), began, now)
    at = f"at step {row['step']}" if rows else "before its first line"
    again = "goes on from its last resume file" if "resume.pt" in files else "starts anew"
    error = read_json(run_dir / "error.json")
    words = _one_line(f"{error.get('error')}: {error.get('message')}" if error else _last_words(run_dir, files))
    ours = began is not None and files.get("job.json", 0.0) >= began  # the sweep that runs now has had its try
    if began is not None and not ours:
        note = f"failed before: {words}" if words else f"was killed {at}, {again}" if config else ""
        return row | {"state": "waiting", "note": note}
    touched = max((files.get(name, 0.0) for name in ("config.json", "metrics.jsonl", "log.txt")), default=0.0)
    job_time = files.get("job.json", 0.0)
    if ours and not words and now - job_time < BOOT_SECONDS and touched < job_time:
        return row | {"state": "running", "note": "its notebook starts"}
    if words and not words.startswith(("the kernel died", f"{INTERRUPTED}:")):
        return row | {"state": "failed", "note": words}
    if "config.json" not in files and "job.json" not in files:
        return row | {"state": "waiting", "note": "nobody is running its sweep"}
    if "config.json" in files and not config:
        return row | {"state": "failed", "note": "config.json is damaged; delete the directory to run it again"}
    return row | {"state": "dead", "note": f"killed {at}; run again it {again}" + (f" ({words})" if words else "")}


def _finished(run_dir: Path, changed: float, job: float | None) -> dict:
    try:
        row = _result(run_dir, changed)
    except RunError as error:
        return {"state": "failed", "note": _one_line(str(error).removeprefix(f"{run_dir}{os.sep}"))}
    own = row["seconds"]
    return row | {"wrote": changed, "seconds": max(own, changed - job) if job and job < changed else own}


@lru_cache(maxsize=50_000)  # a complete run is read once
def _result(run_dir: Path, changed: float) -> dict:
    result = read_result(run_dir)
    row = {"state": "complete", "note": "", "kind": result.kind, "step": result.steps, "of": result.steps}
    row |= {"bpb": result.val_bpb if result.roundtrip_val_bpb is None else result.roundtrip_val_bpb}
    row |= {"train_seconds": result.train_seconds}
    if result.train_seconds and result.steps:
        row["step_seconds"] = result.train_seconds / result.steps
    row["seconds"] = sum(filter(None, (result.train_seconds, result.eval_seconds, result.export_seconds)))
    if row["bpb"] is not None and math.isnan(row["bpb"]):
        row["note"] = "its score is not a number: the training diverged"
    elif result.fits is False:
        row["note"] = f"over its cap by {result.total_bytes - result.cap_bytes:,} bytes"
    return row


@lru_cache(maxsize=50_000)
def _config(run_dir: Path, changed: float) -> dict:
    return read_json(run_dir / "config.json") or {}


def _last_rows(path: Path) -> list[dict]:
    """The last rows of a metrics file; what is cut, torn or damaged is left out."""
    try:
        with open(path, "rb") as f:
            f.seek(max(0, f.seek(0, os.SEEK_END) - 16_384))
            lines = f.read().splitlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and type(row.get("step")) is int:
            rows.append({k: v for k, v in row.items() if isinstance(v, int | float) and math.isfinite(v)})
    return rows


def _pace(rows: list[dict], config: dict) -> dict:
    """step, of, bpb, step_seconds, train_seconds and train_left: seconds of training after the last row."""
    pace = {"of": config.get("iterations")}
    if not rows:
        return pace
    step = pace["step"] = rows[-1]["step"]
    pace["bpb"] = next((row["val_bpb"] for row in reversed(rows) if "val_bpb" in row), None)
    timed = [(row["step"], row["train_seconds"]) for row in rows if "train_seconds" in row][-RECENT:]
    if not timed:
        return pace
    (first, then), (last, seconds) = timed[0], timed[-1]
    if last > first and seconds > then:
        pace["step_seconds"] = (seconds - then) / (last - first)
    elif last > 0:
        pace["step_seconds"] = seconds / last
    pace["train_seconds"] = seconds
    if pace["of"] and "step_seconds" in pace:
        left = max(0, pace["of"] - step) * pace["step_seconds"]
        clock = config.get("max_wallclock_seconds")
        pace["train_left"] = min(left, max(0.0, clock - seconds)) if clock else left
    return pace


def _alive(row: dict, rows: list[dict], config: dict, now: float) -> dict:
    """running or stalled, and what the run is at."""
    if row["kind"] != "train":
        done = sum((row["path"] / name / "result.json").exists() for name in _folders(row["path"]))
        return {"state": "running", "note": f"a stage: no lines to follow, {done} files so far"}
    every = config.get("val_loss_every")
    if not rows:
        doing = "starting"
    elif "val_bpb" in rows[-1] and row.get("train_left") == 0:
        doing = "scoring and storing"
    elif "val_bpb" not in rows[-1] and (row.get("train_left") == 0 or (every and row["step"] % every == 0)):
        doing = "validating"
    else:
        doing = "training"
    times = [r["train_seconds"] for r in rows if "train_seconds" in r][-RECENT:]
    steps = [b - a for a, b in pairwise(times) if b > a]
    usual = median(steps) if steps else 0.0
    patience = max(QUIET_SECONDS if doing == "training" else SILENT_SECONDS, USUAL_INTERVALS * usual)
    quiet = now - row["wrote"]
    if quiet <= patience:
        return {"state": "running", "note": doing}
    note = f"no line since {clock_time(row['wrote'], now)} ({duration(quiet)}), last {doing}"
    return {"state": "stalled", "note": note + (f"; usually one every {duration(usual)}" if usual else "")}


def _last_words(run_dir: Path, files: dict[str, float]) -> str:
    """Why the run's notebook failed, the last line of what its slot said: 'ForecastError: …'; '' when it said nothing.

    A kernel's warnings end up in the same file.
    """
    if "kernel.log" not in files:
        return ""
    lines = (run_dir / "kernel.log").read_text(encoding="utf-8", errors="replace").splitlines()
    last = next((line for line in reversed(lines) if line.strip()), "")
    return last if re.match(r"[A-Za-z_][\w.]*: |the kernel died", last) else ""


def _one_line(text: str, most: int = 300) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"


def _with_seconds_left(table: pd.DataFrame, now: float) -> pd.DataFrame:
    """Training that is left, less the time since the last line, and what else a run of this sweep takes."""
    live = table[(table.state == "running") & table.train_left.notna()]
    spent = (now - live.started - live.train_seconds).clip(lower=0)  # starting, validating, scoring so far
    training = (live.train_left - (now - live.wrote).clip(lower=0)).clip(lower=0)
    table.loc[live.index, "seconds_left"] = training + (_besides(table) - spent.fillna(0)).clip(lower=0)
    return table


def _besides(table: pd.DataFrame) -> float:
    """Seconds that a run of the sweep takes besides training: the median of its complete ones, 0 before the first."""
    done = table[(table.state == "complete") & (table.kind == "train")]
    return float((done.seconds - done.train_seconds).median()) if len(done) else 0.0


def seconds_left(table: pd.DataFrame) -> float:
    """Of one sweep's rows: as many runs at a time as now, those that wait as long as those before. nan: not known.

    Failed, dead and stalled runs are not counted, nor are stages that have not begun: the files do not name them.
    """
    table = table[table.kind == "train"]
    done, live = table[table.state == "complete"], table[table.state == "running"]
    waiting = int((table.state == "waiting").sum()) if table.sweep_runs.any() else 0
    if not len(live) and not waiting:
        return 0.0
    known = live.seconds_left.dropna()
    whole = (live.train_seconds + live.train_left).dropna() + _besides(table)
    a_run = done.seconds.median() if len(done) else whole.median() if len(whole) else math.nan
    unknown = waiting + len(live) - len(known)
    total = known.sum() + (unknown * a_run if unknown else 0.0)
    longest = max([*known, *([a_run] if unknown else [])])
    return float(max(longest, total / max(len(live), 1)))


def overview(table: pd.DataFrame, now: float | None = None) -> str:
    """Markdown, a line for each sweep: how many runs are complete, at work, in trouble; how long it will take.

    Sweeps of which all is complete share the last line.
    """
    now = time.time() if now is None else now
    lines, whole = [], []
    for sweep, rows in table.groupby("sweep", sort=False):
        counts = rows.state.value_counts()
        if counts.get("complete") == len(rows):
            whole.append(f"{sweep or 'without a sweep'} ({len(rows):,})")
            continue
        words = [f"{counts.get('complete', 0):,} of {len(rows):,} runs complete"]
        words += [f"{counts[name]:,} {name}" for name in STATES[:-1] if name in counts]
        line = f"- **{sweep or 'without a sweep'}**: {', '.join(words)}"
        left = seconds_left(rows)
        if math.isnan(left):
            line += "; how long is known after the first lines"
        elif left:
            done = "" if counts.get("complete") else ", and then the scoring, which no run has come to yet"
            line += f"; about {duration(left)} left, until {clock_time(now + left, now)}{done}"
        elif len(rows) > counts.get("complete", 0) and not rows.sweep_runs.any():
            line += "; nobody is running it: `pgolf sweep` on its file does what is missing"
        lines.append(line + ".")
    if whole:
        more = f" and {len(whole) - 3} more sweeps" if len(whole) > 3 else ""
        lines.append(f"- all runs complete: {', '.join(whole[:3])}{more}.")
    return "\n".join(lines)


def in_words(table: pd.DataFrame, now: float | None = None) -> pd.DataFrame:
    """The table for the reader, those at work first and of the complete ones the last first."""
    now = time.time() if now is None else now
    rank = table.state.map(STATES.index).to_numpy()
    latest = (-table.wrote.fillna(0)).where(table.state == "complete", 0).to_numpy()
    rows = table.assign(rank=rank, latest=latest).sort_values(["rank", "latest"], kind="stable")
    several = rows.sweep.nunique() > 1
    steps = [_steps(step, of) for step, of in zip(rows.step, rows.of, strict=True)]
    ends = ["" if math.isnan(s) else f"{duration(s)}, {clock_time(now + s, now)}" for s in rows.seconds_left]
    return pd.DataFrame(
        {
            "run": [f"{r.sweep}/{r.run}" if several and r.sweep else r.run for r in rows.itertuples()],
            "state": rows.state.to_numpy(),
            "step": steps,
            "bpb": ["" if math.isnan(bpb) else f"{bpb:.4f}" for bpb in rows.bpb],
            "a step": ["" if math.isnan(s) else _pace_words(s) for s in rows.step_seconds],
            "left, until": ends,
            "note": rows.note.to_numpy(),
        }
    )


def _steps(step: float, of: float) -> str:
    if math.isnan(step):
        return ""
    return f"{step:,.0f}" if math.isnan(of) or of == step else f"{step:,.0f} of {of:,.0f}"


def _pace_words(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def styled(table: pd.DataFrame, most: int = 40, now: float | None = None) -> Styler:
    """in_words as a notebook shows it: at most so many rows, the rest counted below."""
    words = in_words(table, now)
    rest = words.state[most:].value_counts()
    words = words[:most]
    colours = {name: f"color: {plots.RED}; font-weight: 600" for name in TROUBLE} | {"running": "font-weight: 600"}
    left = [i for i, name in enumerate(words) if name in ("run", "state", "note")]
    wide = {"white-space": "normal", "overflow-wrap": "anywhere", "min-width": "9em", "max-width": "28em"}
    style = (
        words.style.hide(axis="index")
        .format(escape="html")
        .map(lambda state: colours.get(state, ""), subset=["state"])
        .set_properties(subset=["run", "state", "note"], **{"text-align": "left"})
        .set_properties(**{"white-space": "nowrap"})
        .set_properties(subset=["run", "note"], **wide)
        .set_table_styles(
            [{"selector": "th", "props": "white-space: nowrap"}]
            + [{"selector": f"th.col{i}", "props": "text-align: left"} for i in left]
        )
    )
    if len(rest):
        more = "and " + ", ".join(f"{count:,} more {name}" for name, count in rest.items())
        style = style.set_caption(more).set_table_styles(
            [{"selector": "caption", "props": "caption-side: bottom; text-align: left"}], overwrite=False
        )
    return style


def plot_live(table: pd.DataFrame, most: int = 14, behind: int = 20) -> Figure | None:
    """Curves of training, a line for each run at work, complete runs of its sweep grey.

    None when no run at work has a line yet.
    """
    table = table.reset_index(drop=True)
    live = table[table.state.isin(("running", "stalled")) & table.step.notna()]
    if live.empty:
        return None
    shown = live[:most]
    done = table[(table.state == "complete") & (table.kind == "train") & table.sweep.isin(shown.sweep)]
    figure, axes = curves.panels()
    for run in done.nlargest(behind, "wrote").itertuples():
        curves.draw(axes, run.path, color="0.8", lw=1, zorder=1.5)
    for run in shown.itertuples():
        look = curves.line(run.Index)  # of its place in the table: the same at the next look
        curves.draw(axes, run.path, **look)
        axes[0].plot([], [], label=f"{plots.short(run.run)}  {_steps(run.step, run.of)}", **look)
    if len(done):
        axes[0].plot([], [], color="0.8", lw=1, label="complete" + f", the last {behind}" * (len(done) > behind))
    if len(live) > most:
        axes[0].plot([], [], " ", label=f"and {len(live) - most} more")
    curves.finish(axes)
    figure.legend(loc="outside upper left", ncols=3, fontsize=8)
    return figure


def gpus() -> pd.DataFrame:
    """A row for each GPU of this machine: device, name, used_bytes, total_bytes; whoever uses it. Empty without one.

    nvidia-smi takes no memory on the device; torch.cuda.mem_get_info, the way without it, some 500 MB a GPU.
    """
    rows: list[tuple] = []
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=index,name,memory.used,memory.total", "--format=csv,noheader,nounits"]
        with suppress(OSError, subprocess.TimeoutExpired):  # a driver that hangs must not hide the runs
            rows = _smi_rows(subprocess.run(query, capture_output=True, text=True, timeout=10).stdout)
    elif torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(i)
            rows.append((str(i), torch.cuda.get_device_name(i), total - free, total))
    return pd.DataFrame(rows, columns=["device", "name", "used_bytes", "total_bytes"])


def _smi_rows(said: str) -> list[tuple[str, str, float, float]]:
    """nvidia-smi's csv: index, name, MiB used, MiB in all; a figure that it does not know ('[N/A]') is nan."""
    rows = []
    for line in said.splitlines():
        match [field.strip() for field in line.split(",")]:
            case [device, name, *sizes] if len(sizes) == 2:
                used, total = (2**20 * float(s) if s.replace(".", "", 1).isdigit() else math.nan for s in sizes)
                rows.append((device, name, used, total))
    return rows


def gpu_words(table: pd.DataFrame) -> str:
    """Markdown: memory of each GPU, or that there is none."""
    if table.empty:
        return "No GPU here: what trains on this machine trains on its CPU."
    return "\n".join(
        f"- GPU {gpu.device}, {gpu.name}: {gpu.used_bytes / 2**30:.1f} of {gpu.total_bytes / 2**30:.1f} GiB in use"
        if math.isfinite(gpu.used_bytes + gpu.total_bytes)
        else f"- GPU {gpu.device}, {gpu.name}: memory not known"
        for gpu in table.itertuples()
    )


def duration(seconds: float) -> str:
    """40 s, 12 min, 3 h 05 min, 2 d 4 h."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    hours = round(minutes / 60)
    return f"{hours // 24} d {hours % 24} h"


def clock_time(moment: float, now: float) -> str:
    """14:05, with the day where it is another one."""
    then, today = time.localtime(moment), time.localtime(now)
    return time.strftime("%H:%M" if then[:3] == today[:3] else "%a %d %b %H:%M", then)
