"""Local run directories of a remote job: what they lack, and why their runs ended."""

from pathlib import Path

from pgolf.machines.pod import RemoteError
from pgolf.runs import directory, integrity
from pgolf.runs.directory import INTERRUPTED, read_failure
from pgolf.runs.result import RunError, read_result
from pgolf.sweeps.sweep_file import Sweep


def shortfalls(sweep: Sweep, all_ran: bool) -> tuple[list[str], list[str]]:
    """(what forbids the teardown, runs without a result), in sentences. all_ran: the attempt's exit status was 0."""
    problems, failed = [], []
    for run_dir in sweep.run_dirs:
        name, stage = f"{sweep.name}/{run_dir.name}", run_dir.name not in sweep.runs
        if not run_dir.is_dir() or not any(path.name != ".lock" for path in run_dir.iterdir()):
            if stage and not all_ran:
                failed.append(f"{name}: was not run, since runs before it failed")
            else:
                problems.append(f"{name}: there are no files of it")
            continue
        try:
            result = read_result(run_dir)
        except RunError as error:
            problems.append(str(error))
            continue
        if result is None:
            if read_failure(run_dir) is None:
                said = directory.last_words(run_dir) or "ended without a result and a message"
                directory.write_failure(run_dir, RemoteError(said))
            failed.append(f"{name}: " + " ".join(directory.why_it_failed(run_dir).split()))
        elif damage := integrity.damage(run_dir, vars(result), thorough=True):
            problems.append(f"{name}: damaged: {damage}")
        if lacking := integrity.lacking(run_dir, training=not stage):
            problems.append(f"{name}: has no {', '.join(lacking)}")
    return problems, failed


def interrupt(run_dirs: list[Path], why: str) -> str:
    """Mark runs that began and have neither a result nor an error of their own; returns their names, or 'no run'."""
    marked = []
    for run_dir in run_dirs:
        if (run_dir / "config.json").exists() and _error(run_dir) in ("", INTERRUPTED):
            directory.write_interruption(run_dir, why)
            marked.append(f"{run_dir.parent.name}/{run_dir.name}")
    return ", ".join(marked) or "no run"


def forget_errors(run_dirs: list[Path], interruptions_only: bool = False) -> None:
    """Delete error.json of runs without a result: they are tried again, or were not interrupted after all."""
    for run_dir in run_dirs:
        if (error := _error(run_dir)) == INTERRUPTED or (error and not interruptions_only):
            (run_dir / "error.json").unlink()


def _error(run_dir: Path) -> str | None:
    """Kind of the error that ended a run, '' without one; None for a run with a result."""
    return None if (run_dir / "result.json").exists() else (read_failure(run_dir) or [""])[0]
