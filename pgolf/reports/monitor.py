"""What every run is doing now, read from its files: whoever trains it, in any process, alive or killed.

A run is alive while a process holds its lock (runs.directory.locked). Looking takes a shared lock for an instant, so
that two monitors do not see one another. Progress and pace come from the last lines of metrics.jsonl.
"""

import math
import os
import re
import subprocess
import time
from contextlib import suppress
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from statistics import median
from textwrap import shorten

import pandas as pd
from matplotlib.figure import Figure
from pandas.io.formats.style import Styler

from pgolf.disk import read_json
from pgolf.reports import curves, tables
from pgolf.reports.figures import RED
from pgolf.reports.labels import md, short
from pgolf.reports.sentences import listed
from pgolf.runs.directory import INTERRUPTED, PRUNED, REFUSED, RUNS, is_held, last_words, metric_rows, why_it_failed
from pgolf.runs.result import RunError, read_result
from pgolf.runs.schema import About, knobs_that_fit, read_about

TROUBLE = ("stalled", "dead", "failed")
STATES = ("running", *TROUBLE, "waiting", "refused", "pruned", "complete")  # the order in tables
FINAL = ("refused", "pruned", "complete")  # no command changes them
NUMBERS = ("step", "of", "bpb", "step_seconds", "seconds_left", "wrote", "seconds")
COLUMNS = ["sweep", "run", "state", "note", "kind", *NUMBERS, "sweep_runs", "path"]
FILES = (
    ".lock", "config.json", "result.json", "error.json", "job.json", "metrics.jsonl", "log.txt", "kernel.log",
    "resume.pt", "import.json",
)  # fmt: skip

# A run that is alive is stalled after the longer of two times without a line: USUAL_INTERVALS between lines, and
# QUIET_SECONDS in training, SILENT_SECONDS while it starts, validates, scores or stores and writes no lines.
QUIET_SECONDS, SILENT_SECONDS, USUAL_INTERVALS = 60.0, 600.0, 10
BOOT_SECONDS = 120.0  # start of a run's notebook until its kernel takes the lock
RECENT = 20  # lines that give the pace


def state(root: str | Path = RUNS, sweep: str = "", hours: float = 12.0, now: float | None = None) -> pd.DataFrame:
    """One row per run of a sweep; '' = all sweeps that are incomplete or wrote something in the last hours.

    The sweep that wrote last comes first. Runs that sweep.json names are listed before they have a directory. state:
    one of STATES, with the details in note. bpb: pre-quant while a run trains, of its artifact once it is complete.
    step_seconds: pace of the last lines. seconds_left: of training that runs, without the scoring and export after it.
    seconds: what a complete run took in all. wrote, now: seconds since 1970. sweep_runs: whether a process runs the
    sweep. '.' = runs in root itself. Writes nothing. Raises RunError if there is no sweep of that name.
    """
    root, now = Path(root), time.time() if now is None else now
    if sweep and not (root / sweep).is_dir():
        raise RunError(f"no sweep {sweep!r} in {root}; there are {', '.join(_folders(root)) or 'none'}")
    found = [_sweep(root, name, now) for name in ([sweep] if sweep else [*_folders(root), "."])]
    since = -math.inf if sweep else now - 3600 * hours
    recent = [t for t in found if len(t) and (t.state.ne("complete").any() or t.wrote.max() > since)]
    recent.sort(key=lambda table: -table.wrote.fillna(0).max())
    return pd.concat(recent, ignore_index=True) if recent else pd.DataFrame(columns=COLUMNS)


def _folders(folder: Path) -> list[str]:
    with suppress(OSError), os.scandir(folder) as entries:  # an unknown folder is empty
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    return []


def _file_times(run_dir: Path) -> dict[str, float]:
    """Modification times of a run's files; empty if there is no directory (yet, or any more)."""
    with suppress(OSError), os.scandir(run_dir) as entries:
        return {e.name: e.stat().st_mtime for e in entries if e.name in FILES}
    return {}


def _sweep(root: Path, sweep: str, now: float) -> pd.DataFrame:
    folder = root / sweep
    about = read_about(folder) or About()
    named = [*about.runs, *about.stages]
    found = {name: _file_times(folder / name) for name in dict.fromkeys([*named, *_folders(folder)])}
    sweep_runs = any("result.json" not in files for files in found.values()) and is_held(folder / ".lock")
    began = None
    if sweep_runs:
        began = 0.0
        with suppress(OSError):  # not written yet
            began = (folder / "sweep.json").stat().st_mtime
    rows = [
        _row(folder / name, files, began, now) for name, files in found.items()
        if (name in named or files.keys() - {".lock"}) and "import.json" not in files  # imported: trained elsewhere
    ]  # fmt: skip
    table = pd.DataFrame(rows, columns=COLUMNS).assign(sweep="" if sweep == "." else sweep, sweep_runs=sweep_runs)
    return table.astype(dict.fromkeys(NUMBERS, float))


def _row(run_dir: Path, files: dict[str, float], began: float | None, now: float) -> dict:
    """began: when the sweep that is running started; None if none is running."""
    row = {"run": run_dir.name, "path": run_dir, "kind": "train"}
    row["wrote"] = max((changed for name, changed in files.items() if name != ".lock"), default=None)
    if "result.json" in files:
        return row | _finished(run_dir, files["result.json"], files.get("job.json"))
    job, config = read_json(run_dir / "job.json") or {}, knobs_that_fit(read_json(run_dir / "config.json") or {})[0]
    rows = _last_rows(run_dir)
    row["kind"] = Path(str(job.get("notebook", "train.ipynb"))).stem  # a stage is named after its notebook
    row |= _pace(rows, config)
    if is_held(run_dir / ".lock"):
        state, note = _alive(row, rows, config, now)
    elif (run_dir / "result.json").exists():  # it ended, and released its lock, since we listed its files
        return _row(run_dir, _file_times(run_dir), began, now)
    else:
        state, note = _ended(row, files, config, began, now)
    left = row.get("seconds_left") if state == "running" else None
    left = None if left is None else max(0.0, left - max(0.0, now - row["wrote"]))
    return row | {"state": state, "note": note, "seconds_left": left}


@lru_cache(maxsize=50_000)  # a complete run is read once
def _finished(run_dir: Path, changed: float, job: float | None) -> dict:
    try:
        result = read_result(run_dir)
    except RunError as error:
        return {"state": "failed", "note": shorten(str(error).removeprefix(f"{run_dir}{os.sep}"), 300)}
    own = sum(filter(None, (result.train_seconds, result.eval_seconds, result.export_seconds)))
    bpb = result.val_bpb if result.roundtrip_val_bpb is None else result.roundtrip_val_bpb
    note = f"over its cap by {result.total_bytes - result.cap_bytes:,} bytes" if result.fits is False else ""
    if bpb is not None and math.isnan(bpb):
        note = "its score is not a number: the training diverged"
    return {
        "state": "complete", "note": note, "kind": result.kind, "step": result.steps, "of": result.steps, "bpb": bpb,
        "step_seconds": (result.train_seconds or math.nan) / (result.steps or math.nan), "wrote": changed,
        "seconds": max(own, changed - (job or changed)),
    }  # fmt: skip


def _last_rows(run_dir: Path) -> list[dict]:
    """The last rows of a run's metrics that name a step; their finite numbers."""
    rows = metric_rows(run_dir, tail_bytes=16_384)
    return [{k: v for k, v in row.items() if math.isfinite(v)} for row in rows]


def _pace(rows: list[dict], config: dict) -> dict:
    """of, and as far as the rows tell: step, bpb, step_seconds, seconds_left (of training, after the last row)."""
    pace, limit = {"of": config.get("iterations")}, config.get("max_wallclock_seconds")
    if rows:
        bpb = next((row["val_bpb"] for row in reversed(rows) if "val_bpb" in row), None)
        pace |= {"step": rows[-1]["step"], "bpb": bpb}
    timed = [(0, 0.0), *((row["step"], row["train_seconds"]) for row in rows if "train_seconds" in row)]
    (first, then), (last, seconds) = timed[-RECENT:][0], timed[-1]
    if last > first:
        pace["step_seconds"] = (seconds - then) / (last - first)
        left = max(0, (pace["of"] or 0) - pace["step"]) * pace["step_seconds"]
        pace["seconds_left"] = min(left, max(0.0, limit - seconds)) if limit else left
    return pace


def _alive(row: dict, rows: list[dict], config: dict, now: float) -> tuple[str, str]:
    """State and note of a run whose lock is held: running or stalled, and what it is doing."""
    if row["kind"] != "train":
        done = sum((row["path"] / name / "result.json").exists() for name in _folders(row["path"]))
        return "running", f"a stage: no lines to follow, {done} files so far"
    every, trained = config.get("val_loss_every"), row.get("seconds_left") == 0
    doing = "training" if rows else "starting"
    if rows and "val_bpb" in rows[-1]:
        doing = "scoring and storing" if trained else doing
    elif rows and (trained or (every and row["step"] % every == 0)):
        doing = "validating"
    times = [r["train_seconds"] for r in rows if "train_seconds" in r][-RECENT:]
    usual = median([b - a for a, b in pairwise(times) if b > a] or [0.0])
    wrote = row["wrote"] or now  # a run whose only file is its lock has just begun
    if now - wrote <= max(QUIET_SECONDS if doing == "training" else SILENT_SECONDS, USUAL_INTERVALS * usual):
        return "running", doing
    note = f"no line since {clock_time(wrote)} ({duration(now - wrote)}), last {doing}"
    return "stalled", note + (f"; usually one every {duration(usual)}" if usual else "")


def _ended(row: dict, files: dict[str, float], config: dict, began: float | None, now: float) -> tuple[str, str]:
    """State and note of a run that nobody holds and that has no result."""
    said = last_words(row["path"])
    said = said if re.match(r"[A-Za-z_][\w.]*: |the kernel died", said) else ""  # an error, and no warning
    why = shorten(why_it_failed(row["path"]) or said, 300, placeholder=" …")
    at = f"at step {row['step']}" if "step" in row else "before its first line"
    again = "goes on from its last resume file" if "resume.pt" in files else "starts anew"
    job = files.get("job.json", 0.0)
    touched = max(files.get(name, 0.0) for name in ("config.json", "metrics.jsonl", "log.txt"))
    for said, state in ((REFUSED, "refused"), (PRUNED, "pruned")):
        if why.startswith(f"{said}:"):
            return state, why.removeprefix(f"{said}: ")
    if began is not None and job < began:  # the running sweep has not come to it yet
        return "waiting", f"failed before: {why}" if why else f"was killed {at}, {again}" if config else ""
    if began is not None and not why and now - job < BOOT_SECONDS and touched < job:
        return "running", "its notebook starts"
    if why and not why.startswith(("the kernel died", f"{INTERRUPTED}:")):
        return "failed", why
    if "config.json" in files and not config:
        return "failed", "config.json is damaged; delete the directory to run it again"
    if not files.keys() & {"config.json", "job.json"}:
        return "waiting", "nobody is running its sweep"
    return "dead", f"killed {at}; run again it {again}" + (f" ({why})" if why else "")


def seconds_left(table: pd.DataFrame) -> float:
    """Seconds left for the rows of one sweep, with as many runs at a time as now; nan if not known yet.

    A waiting run takes as long as the complete ones took, else as long as those at work train. Failed, dead and stalled
    runs are not counted, nor are stages that have not begun.
    """
    table = table[table.kind == "train"]
    done, live = table[table.state == "complete"], table[table.state == "running"]
    waiting = int((table.state == "waiting").sum()) if table.sweep_runs.any() else 0
    if not len(live) and not waiting:
        return 0.0
    known = live.seconds_left.dropna()
    whole = done.seconds.median() if len(done) else (live.step_seconds * live.of).median()
    times = [*known, *[whole] * (waiting + len(live) - len(known))]
    return float(max(*times, sum(times) / max(len(live), 1)))


def overview(table: pd.DataFrame, now: float | None = None) -> str:
    """Markdown, one line per sweep: runs complete, at work, in trouble; time left. Complete sweeps share a line."""
    now, lines, whole = time.time() if now is None else now, [], []
    for sweep, rows in table.groupby("sweep", sort=False):
        name, counts, left = md(sweep or "without a sweep"), rows.state.value_counts(), seconds_left(rows)
        complete, more = counts.get("complete", 0), ""
        if complete == len(rows):
            whole.append(f"{name} ({complete:,})")
            continue
        words = [f"{complete:,} of {len(rows):,} runs complete"]
        words += [f"{counts[state]:,} {state}" for state in STATES[:-1] if state in counts]
        if math.isnan(left):
            more = "; time left is known after the first lines"
        elif left > 0:
            more = f"; about {duration(left)} left, until {clock_time(now + left)}"
        elif not rows.sweep_runs.any() and not rows.state.isin(FINAL).all():
            more = f"; nobody is running it: {_how_to_go_on(rows.path.iloc[0].parent)}"
        lines.append(f"- **{name}**: {', '.join(words)}{more}.")
    return "\n".join([*lines, f"- all runs complete: {listed(whole, 3)}."] if whole else lines)


def _how_to_go_on(folder: Path) -> str:
    """The command that does what is missing of a sweep, a search or single trainings in a folder."""
    if (folder / "search.journal").exists():
        return "`pgolf search` on its file goes on while there is budget"
    if (folder / "sweep.json").exists():
        return "`pgolf sweep` on its file does what is missing"
    return "the same `pgolf train` command again goes on with it"


def format_state(table: pd.DataFrame, now: float | None = None) -> pd.DataFrame:
    """The table as text, runs at work first; complete ones last, the latest of them first."""
    now = time.time() if now is None else now
    age = (-table.wrote.fillna(0)).where(table.state == "complete", 0)
    rows = table.assign(rank=table.state.map(STATES.index), age=age).sort_values(["rank", "age"], kind="stable")
    columns = [
        ("run", tables.names_of, ""), ("state", "state", ""),
        ("step", lambda rows: map(_steps, rows.step, rows.of), ""), tables.BPB4, ("per step", "step_seconds", duration),
        ("training left, until", "seconds_left", lambda left: f"{duration(left)}, {clock_time(now + left)}"),
        ("note", "note", ""),
    ]  # fmt: skip
    return tables.format_table(rows, columns)


def _steps(step: float, of: float) -> str:
    """'10 of 100'; '100' at the end."""
    return tables.format_number(step, ",.0f") + (f" of {of:,.0f}" if step < of else "")


def styled(table: pd.DataFrame, most: int = 40, now: float | None = None) -> Styler:
    """format_state for a notebook: at most so many rows, the rest counted below."""
    text = format_state(table, now)
    looks = dict.fromkeys(TROUBLE, f"color: {RED}; font-weight: 600") | {"running": "font-weight: 600"}
    style = tables.styled(text[:most], ["run", "state", "note"])
    style = style.map(lambda name: looks.get(name, ""), subset=["state"])
    if rest := [f"{count:,} more {name}" for name, count in text.state[most:].value_counts().items()]:
        below = [{"selector": "caption", "props": "caption-side: bottom; text-align: left"}]
        style = style.set_caption("and " + ", ".join(rest)).set_table_styles(below, overwrite=False)
    return style


def plot_live(table: pd.DataFrame, most: int = 14, behind: int = 20) -> Figure | None:
    """Training curves of the runs at work, complete runs of their sweeps grey; None if none has a line yet."""
    table = table.reset_index(drop=True)
    live = table[table.state.isin(("running", "stalled")) & table.step.notna()]
    done = table[(table.state == "complete") & (table.kind == "train") & table.sweep.isin(live.sweep[:most])]
    if live.empty:
        return None
    lines = [(path, dict(color="0.8", lw=1, zorder=1.5)) for path in done.nlargest(behind, "wrote").path]
    for run in live[:most].itertuples():  # the place in the table decides the look: the same at the next look
        look = {"label": f"{short(run.run)}  {_steps(run.step, run.of)}"} | curves.line_style(run.Index)
        lines.append((run.path, look))
    title = f"{most} of {len(live)} runs at work" if len(live) > most else None
    return curves.plot_lines(lines, loc="outside upper left", ncols=3, title=title)


def gpus() -> str:
    """Markdown: memory of each GPU of this machine, whoever uses it, as nvidia-smi lists it."""
    query, said = ["nvidia-smi", "--query-gpu=index,name,memory.used,memory.total", "--format=csv"], ""
    with suppress(OSError, subprocess.TimeoutExpired):  # not installed, or its driver hangs: that hides no runs
        said = subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.strip()
    return f"```\n{said}\n```" if said else "nvidia-smi lists no GPU here: runs on this machine train on its CPU."


def duration(seconds: float) -> str:
    """0.12 s, 40 s, 12 min, 3.1 h, 2.2 d."""
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.{0 if seconds >= 10 * size else 1}f} {unit}"
    return f"{seconds:.2g} s"


def clock_time(moment: float) -> str:
    return time.strftime("%a %H:%M", time.localtime(moment))
