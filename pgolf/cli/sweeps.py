"""`pgolf demo`, `sweep`, `transfer`, `scale` and `report`: many runs, and the pages about them."""

import argparse
import sys
from functools import partial
from pathlib import Path

from pgolf.cli.arguments import (
    add_command,
    add_overrides,
    add_running,
    add_workers,
    complete_runs,
    existing_file,
    overrides,
    pool_opener,
)
from pgolf.runs import directory
from pgolf.runs.result import RunError
from pgolf_core.config import ROOT, did_you_mean

DEMO = ROOT / "notebooks" / "sweeps" / "demo.yaml"
RUNNING = "notebooks at a time", "check the files and print what would run, how large it is and how long it takes"


def add_commands(commands) -> None:
    command = partial(add_command, commands)
    text = "build the corpus, run the demo sweep and write reports: five minutes on two cores"
    sub = command(demo, "demo", text, "pgolf demo")
    add_workers(sub, "notebooks at a time")

    sub = command(
        sweep, "sweep", "run what is missing of sweep files, one file after another",
        "pgolf sweep notebooks/sweeps/tour.yaml --dry-run",
        "pgolf sweep notebooks/sweeps/tour.yaml --only control wide",
        "pgolf sweep mine.yaml --seeds 1337 1338 1339 -k iterations=240",
    )  # fmt: skip
    sub.add_argument("files", type=existing_file, nargs="+", metavar="FILE", help="sweep file, YAML")
    add_overrides(sub)
    text = "only these runs, or entries of runs: and grid: with all their seeds; stages wait for the whole sweep"
    sub.add_argument("--only", nargs="+", default=[], metavar="NAME", help=text)
    add_running(sub, *RUNNING)

    sub = command(
        transfer, "transfer", "run a sweep file at several scales, and compare what each arm does there",
        "pgolf transfer notebooks/scales/stack_transfer.yaml --dry-run",
    )  # fmt: skip
    _add_study(sub, "transfer file, YAML: a sweep file and its scales")

    sub = command(
        scale, "scale", "run one recipe at several sizes and lengths, and fit how its score falls with them",
        "pgolf scale notebooks/scales/nano_family.yaml --dry-run",
    )  # fmt: skip
    _add_study(sub, "scaling file, YAML: a recipe, its sizes and lengths")

    text = "write the reports of all runs, or of one sweep: index.html and the pages it links"
    sub = command(report, "report", text, "pgolf report", "pgolf report demo")
    sub.add_argument("sweep", nargs="?", metavar="SWEEP", help="only this sweep").completer = complete_runs
    text = "folder; default: reports, of one sweep reports/<sweep>"
    sub.add_argument("--out", type=Path, metavar="DIR", help=text)


def _add_study(sub, text: str) -> None:
    sub.add_argument("file", type=existing_file, metavar="FILE", help=text)
    text = "run everything once per seed, in place of the file's seeds"
    sub.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help=text)
    add_running(sub, *RUNNING)


def demo(arguments: argparse.Namespace) -> int:
    from pgolf.reports import pages, text
    from pgolf.runs.table import load_runs
    from pgolf.sweeps.runner import load_sweep, run_sweep

    folder = load_sweep(DEMO).directory
    early = pages.EarlyPages(folder.parent)
    failures = run_sweep(DEMO, arguments.workers, ended=early.draw)
    early.wait()
    written = pages.write_reports(root=folder.parent)
    table = load_runs(folder.parent)
    print(text.runs(table[table.sweep == folder.name]))
    print(f"\nReports: {', '.join(map(str, written))}\nEvery run, with its executed notebook: {folder}")
    print(_best(folder))
    return 1 if failures else 0


def sweep(arguments: argparse.Namespace) -> int:
    from pgolf.sweeps.runner import chosen, load_sweep

    # All are checked before the first one runs.
    sweeps = [(file.stem, load_sweep(file, *overrides(arguments))) for file in arguments.files]
    return _run([(file, chosen(whole, arguments.only)) for file, whole in sweeps], arguments)


def transfer(arguments: argparse.Namespace) -> int:
    from pgolf.sweeps.families import load_transfer

    file, sweeps = load_transfer(arguments.file, arguments.seeds)
    return _run([(file.stem, checked) for checked in sweeps], arguments, "transfer")


def scale(arguments: argparse.Namespace) -> int:
    from pgolf.sweeps.families import load_scaling

    return _run([(arguments.file.stem, load_scaling(arguments.file, arguments.seeds))], arguments, "scale")


def _run(sweeps: list, arguments: argparse.Namespace, page: str = "") -> int:
    """Run what is missing of checked sweeps, each with its file's name; page: the report page that answers."""
    from pgolf.sweeps.runner import run_checked

    pool, failures = pool_opener(arguments), []
    for file, checked in sweeps:
        if arguments.dry_run:
            _dry_run(checked)
        else:
            failures += run_checked(checked, file, arguments.workers, pool)
            print(_best(checked.directory))
    if failures:
        print(f"pgolf: {len(failures)} failed: {', '.join(f.run for f in failures)}", file=sys.stderr)
        print("the same command tries these again, and nothing else", file=sys.stderr)
    elif page and not arguments.dry_run:
        from pgolf.reports import pages

        print(*pages.write_reports(root=directory.RUNS, only=[page]), sep="\n")
    return 1 if failures else 0


def _best(folder: Path) -> str:
    """The answer of a sweep: its best file, or why there is none."""
    from pgolf.reports import text
    from pgolf.runs.result import read_result
    from pgolf.runs.table import best_training_run, load_runs

    try:
        best = best_training_run(load_runs(folder))
    except RunError as error:
        return f"{folder.name}: {error}"
    return f"best of {folder.name}: {best.run}, {text.answer(read_result(best.path))}"


def _dry_run(checked) -> None:
    from pgolf.analysis.duration import in_words, seconds_of
    from pgolf.runs.table import load_runs
    from pgolf.sweeps.pool import worker_environments
    from pgolf.sweeps.runner import done_by_other_code, missing, said_of_knobs
    from pgolf.sweeps.sweep_file import said_of_environment
    from pgolf.training.forecast import check, over_cap
    from pgolf_core.model import skeleton

    jobs, stages = missing(checked)
    to_run = {job.name for job in jobs} | set(stages)
    status = dict(load_runs(checked.directory)[["run", "status"]].itertuples(index=False))
    print(f"{checked.name}: {checked.question}" if checked.question else checked.name)
    said = [*said_of_environment(), *said_of_knobs(checked), *done_by_other_code(checked)]
    print(*(f"{line}\n" for line in said), sep="", end="")
    parameters = {m: sum(p.numel() for p in skeleton(m).parameters()) for m in {c.model for c in checked.runs.values()}}
    seconds = seconds_of({job.name: job.config for job in jobs}, load_runs(directory.RUNS))
    for name in [*checked.runs, *checked.stages]:
        size = f"{parameters[checked.runs[name].model]:14,} parameters" if name in checked.runs else ""
        time = f"  {in_words(seconds[name])}" if seconds.get(name) is not None else ""
        run = "to run" if name in to_run else ""
        print(f"  {name:32} {status.get(name, 'new'):12} {run:6} {size}{time}".rstrip())
    at_once = len(worker_environments([job.config for job in jobs]))
    unknown = "time unknown, since there is no complete run to go by"
    known = [own for own in seconds.values() if own is not None]
    total = (
        f"{in_words(sum(known) / max(1, min(at_once, len(jobs))))} of training"
        if len(known) == len(seconds)
        else unknown
    )
    try:
        (over_cap if checked.skips_over_cap else check)({job.name: job.config for job in jobs}, print)
    finally:
        print(f"{len(to_run)} to run, {at_once} at a time{f', {total}' if seconds else ''}")


def report(arguments: argparse.Namespace) -> int:
    from pgolf.reports import pages

    root, out = directory.RUNS, arguments.out or ROOT / "reports"
    if arguments.sweep:
        known = {path.relative_to(root).parts[0] for path in directory.run_directories(root)}
        if arguments.sweep not in known:
            nearest = did_you_mean(arguments.sweep, known) or f"; there are {', '.join(sorted(known)) or 'none'}"
            raise RunError(f"{root} has no sweep {arguments.sweep}{nearest}")
        root, out = root / arguments.sweep, arguments.out or ROOT / "reports" / arguments.sweep
    index, *written = pages.write_reports(root=root, out=out)
    print(*written, sep="\n")
    print(f"{len(written)} pages; begin with {index}")
    return 0
