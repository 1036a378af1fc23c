"""One notebook of a sweep as a job: what it needs, how far it is, how it ended."""

import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from pgolf.processes import interactive
from pgolf.runs.code import other_code
from pgolf.runs.directory import last_words, metric_rows, why_it_failed
from pgolf.runs.result import RunError, read_result
from pgolf_core.config import RunConfig

TAIL_BYTES = 8192  # end of metrics.jsonl, with the last validation


@dataclass(frozen=True, eq=False)
class Job:
    """One notebook to execute; nothing is to do once run_dir is complete."""

    name: str
    notebook: Path
    parameters: dict
    run_dir: Path
    config: RunConfig

    @property
    def log(self) -> Path:
        """Output of the kernel process outside the notebook: the last words of a crash."""
        return self.run_dir / "kernel.log"


@dataclass(frozen=True)
class Failure:
    run: str
    reason: str  # one line
    log: Path


def finish(job: Job, returncode: int, seconds: float) -> list[Failure]:
    """Print in one line how the job ended. Only result.json decides whether it is complete."""
    reason = ""
    if returncode:
        ended = "killed" if returncode < 0 else f"exit status {returncode}"
        reason = why_it_failed(job.run_dir) or last_words(job.run_dir) or ended
    try:
        result = read_result(job.run_dir)
    except RunError as error:
        return [failed(job.name, str(error), job.log)]
    if result is None:
        return [failed(job.name, reason or "its notebook ended without a result", job.log)]
    line = f"{job.name:24} "
    if result.kind == "train":
        bpb, size = result.roundtrip_val_bpb, result.total_bytes
        line += f"{result.val_bpb:.4f} bpb before quantisation" if bpb is None else f"{bpb:.4f} bpb"
        line += "" if size is None else f"  {size:>11,} of {result.cap_bytes:,} bytes"
        line += "  over the cap" if result.fits is False else ""
    else:
        line += f"on {result.source}"
    say(f"{line}  {seconds:.0f} s")
    if made := other_code(result):
        say(f"  {job.name}: {made}; its figures are not pooled with runs of that code")
    if reason:
        say(f"  complete, but its notebook ended early: {reason} (see {job.log})")
    return []


def failed(run: str, reason: str, log: Path) -> Failure:
    """Print that a run failed, and return it as a Failure."""
    reason = " ".join(reason.split())
    say(f"{run:24} FAILED: {reason}\n  see {log}")
    return Failure(run, reason, log)


def progress(job: Job) -> tuple[float, str]:
    """Fraction done and 'control 80/120 2.71 bpb', from the last lines of the run's metrics."""
    last: dict = {}
    for row in metric_rows(job.run_dir, TAIL_BYTES):
        last |= row
    if not last:
        return 0.0, job.name
    step, iterations, limit_s = last.get("step", 0), job.config.iterations, job.config.max_wallclock_seconds
    trained = max(step / iterations, last.get("train_seconds", 0.0) / limit_s if limit_s else 0.0)
    bpb = f" {last['val_bpb']:.2f} bpb" if "val_bpb" in last else ""
    return 0.95 * min(trained, 1.0), f"{job.name} {step}/{iterations}{bpb}"  # 5 % for scoring


def say(line: str) -> None:
    """Print a line above the progress bar."""
    tqdm.write(line)
    sys.stdout.flush()


def sweep_bar(name: str, total: int, done: int) -> tqdm:
    """One bar for the whole sweep, in runs; shown only where a person can see it."""
    return tqdm(
        desc=name,
        total=total,
        initial=done,
        smoothing=0,  # average rate: fractions of runs have no meaningful momentary rate
        bar_format="{desc}: {percentage:3.0f}%|{bar:20}| {n:.1f}/{total} [{elapsed}<{remaining}{postfix}]",
        disable=not interactive(),
    )
