"""`pgolf`: the workbench from the command line."""

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path

from pgolf.cli import cluster, data, legality, remote
from pgolf.cli.arguments import (
    add_command,
    add_knobs,
    add_overrides,
    add_workers,
    count,
    escape_controls,
    existing_file,
    overrides,
    positive,
)
from pgolf.runs import directory
from pgolf.runs.result import RunError
from pgolf_core.config import ROOT, RunConfig

DEMO = ROOT / "notebooks" / "sweeps" / "demo.yaml"


def main(words: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 some runs failed, 2 the request cannot be met, 130 stopped by Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a redirected Windows console cannot encode Δ
            escape_controls(stream, keep="\r" if stream is sys.stderr else "")
    parser = _parser()
    arguments = parser.parse_args(words)
    if "command" not in arguments:
        parser.print_help()
        return 0
    try:
        return arguments.command(arguments)
    except BrokenPipeError:  # the reader closed the pipe: `pgolf runs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        # The packages' own errors are for users: ConfigError, DataError, RunError … Others keep their traceback.
        if isinstance(error, OSError):  # a full disk, a file that may not be written
            problem = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        elif type(error).__module__.startswith(("pgolf.", "pgolf_core.")):
            problem = str(error)
        else:
            raise
        print(f"pgolf: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\npgolf: stopped; the same command goes on where this one was", file=sys.stderr)
        return 130


class _Version(argparse.Action):
    def __call__(self, parser, *_):
        print("pgolf", metadata.version("pgolf"))
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pgolf", description="The lowest bits per byte that fits in N bytes.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version of pgolf")
    commands = parser.add_subparsers(metavar="COMMAND")

    command = partial(add_command, commands)

    sub = command(demo, "demo", "build the corpus, run the demo sweep and write reports: five minutes on two cores")
    add_workers(sub, "notebooks at a time")

    sub = command(sweep, "sweep", "run what is missing of sweep files, one file after another")
    sub.add_argument("files", type=existing_file, nargs="+", metavar="FILE", help="sweep file, YAML")
    add_overrides(sub)
    add_workers(sub, "notebooks at a time; default: as many as fit the cores or GPUs")
    text = "run on the workers of a Dask scheduler that share the runs folder: tcp://host:8786 or its scheduler file"
    sub.add_argument("--cluster", default="", metavar="ADDRESS", help=text)
    sub.add_argument("--dry-run", action="store_true", help="check the files and print what would run")

    sub = command(train, "train", "train one run, without a notebook")
    sub.add_argument("--run-dir", type=Path, metavar="DIR", help="default: runs/explore/<track>-<hash of the knobs>")
    text = "read knobs from YAML or JSON, such as a run's config.json"
    sub.add_argument("--config", type=existing_file, metavar="FILE", help=text)
    add_knobs(sub)

    sub = command(list_runs, "runs", "print all runs in a table")
    sub.add_argument("sweep", nargs="?", metavar="SWEEP", help="only the runs of this sweep")
    sub.add_argument("--verify", action="store_true", help="compare every artifact and checkpoint with its checksum")

    sub = command(import_log, "import-log", "make runs from training logs, naming what is odd about each")
    sub.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="a log, or a folder with logs in it or below")
    text = "name of the sweep; default: the folder that holds submission.json"
    sub.add_argument("--sweep", metavar="NAME", help=text)
    sub.add_argument("--out", type=Path, metavar="RUNS_DIR", help="runs folder; default: runs")

    sub = command(diff, "diff", "print what differs between two runs or logs, and check whether only that was claimed")
    sub.add_argument("runs", nargs=2, metavar="RUN", help="sweep/run below runs/, or a folder")
    sub.add_argument("--claim", nargs="*", metavar="KNOB", help="knobs claimed to be the only change")

    sub = command(plan, "plan", "how many seeds find a difference, from the seed noise of the runs that are there")
    sub.add_argument("--effect", type=positive, required=True, metavar="BPB", help="true difference to be found")
    sub.add_argument(
        "--runs", type=count, default=1, metavar="N", help="configs compared with one baseline; default: 1"
    )
    sub.add_argument("--track", metavar="TRACK", help="only this track; default: all that have several seeds")

    sub = command(report, "report", "write the reports of all runs: index.html and the pages it links")
    sub.add_argument("--out", type=Path, default=ROOT / "reports", metavar="DIR", help="folder; default: reports")

    _add_commands_of_files(command)
    legality.add_commands(commands)
    data.add_commands(commands)
    remote.add_commands(commands)
    cluster.add_commands(commands)
    return parser


def _add_commands_of_files(command: Callable) -> None:
    sub = command(artifact, "artifact", "check an artifact file and list its bytes by part and tensor")
    sub.add_argument("file", metavar="FILE", help="artifact.pgolf of a run")

    sub = command(sample, "sample", "print text that a run's artifact writes, read back from disk")
    sub.add_argument("run", metavar="RUN", help="sweep/run below runs/, or a folder")
    sub.add_argument("--prompt", nargs="+", metavar="TEXT", help="texts to go on with; default: three short ones")
    sub.add_argument("--tokens", type=count, default=120, metavar="N", help="tokens each, at most; default: 120")
    text = "logits are divided by it; the lower the likelier each token; default: 0.7"
    sub.add_argument("--temperature", type=positive, default=0.7, metavar="T", help=text)
    sub.add_argument("--seed", type=int, default=1, metavar="N", help="of the draws; default: 1")

    sub = command(submission, "submission", "score runs' artifacts again, audit their data, and write a record folder")
    sub.add_argument("runs", nargs="+", metavar="RUN", help="sweep/run below runs/, or a folder; seeds of one config")
    sub.add_argument("--base", metavar="RUN", help="run whose knobs the README compares with these")
    sub.add_argument("--beats", type=positive, metavar="BPB", help="claimed bits per byte to test the seeds against")
    sub.add_argument("--out", type=Path, metavar="DIR", help="folder; default: reports/submissions/<sweep>_<run>")


# Torch and pandas take seconds to import, so each command imports what it needs.


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
    return 1 if failures else 0


def sweep(arguments: argparse.Namespace) -> int:
    from pgolf.sweeps.runner import load_sweep, run_sweep

    pool = None
    if arguments.cluster:
        from pgolf.machines.cluster import connect

        pool = partial(connect, arguments.cluster)
    # All are checked before the first one runs.
    sweeps = {file: load_sweep(file, *overrides(arguments)) for file in arguments.files}
    failures = []
    for file, checked in sweeps.items():
        if arguments.dry_run:
            _dry_run(checked)
        else:
            failures += run_sweep(file, arguments.workers, *overrides(arguments), open_pool=pool)
    if failures:
        print(f"pgolf: {len(failures)} failed: {', '.join(f.run for f in failures)}", file=sys.stderr)
        print("the same command tries these again, and nothing else", file=sys.stderr)
    return 1 if failures else 0


def _dry_run(checked) -> None:
    from pgolf.runs.table import load_runs
    from pgolf.sweeps.pool import worker_environments
    from pgolf.sweeps.runner import done_by_other_code, missing
    from pgolf.sweeps.sweep_file import said_of_environment
    from pgolf.training.forecast import check, over_cap
    from pgolf_core.model import skeleton

    jobs, stages = missing(checked)
    to_run = {job.name for job in jobs} | set(stages)
    status = dict(load_runs(checked.directory)[["run", "status"]].itertuples(index=False))
    print(f"{checked.name}: {checked.question}" if checked.question else checked.name)
    print(*(f"{line}\n" for line in [*said_of_environment(), *done_by_other_code(checked)]), sep="", end="")
    parameters = {m: sum(p.numel() for p in skeleton(m).parameters()) for m in {c.model for c in checked.runs.values()}}
    for name in [*checked.runs, *checked.stages]:
        size = f"{parameters[checked.runs[name].model]:14,} parameters" if name in checked.runs else ""
        print(f"  {name:32} {status.get(name, 'new'):12} {'to run' if name in to_run else '':6} {size}".rstrip())
    print(f"{len(to_run)} to run, {len(worker_environments([job.config for job in jobs]))} at a time")
    (over_cap if checked.skips_over_cap else check)({job.name: job.config for job in jobs}, print)


def train(arguments: argparse.Namespace) -> int:
    from pgolf.training.run import train

    knobs = dict(arguments.knobs)
    config = RunConfig.from_file(arguments.config, **knobs) if arguments.config else RunConfig(**knobs)
    explore = directory.RUNS / "explore"
    run_dir = arguments.run_dir or explore / directory.run_name(config, explore)
    train(config, run_dir)
    print(run_dir)
    return 0


def list_runs(arguments: argparse.Namespace) -> int:
    from pgolf.reports import text
    from pgolf.runs.table import load_runs

    table = load_runs(directory.RUNS, arguments.verify)
    if arguments.sweep:
        sweeps = sorted(set(table.sweep))
        if arguments.sweep not in sweeps:
            raise RunError(f"{directory.RUNS} has no sweep {arguments.sweep}; it has {', '.join(sweeps) or 'none'}")
        table = table[table.sweep == arguments.sweep]
    if table.empty:
        print(f"no runs in {directory.RUNS} yet; `pgolf demo` makes some")
        return 0
    print(text.runs(table))
    return 0


def import_log(arguments: argparse.Namespace) -> int:
    from pgolf.analysis import records
    from pgolf.reports import text

    imported, remarks = records.import_logs(arguments.paths, arguments.sweep, arguments.out or directory.RUNS)
    print(*text.imports(imported), *remarks, sep="\n")
    return 0


def diff(arguments: argparse.Namespace) -> int:
    """Exit status 1 if --claim is given and does not hold."""
    from pgolf.analysis import diff

    rows = diff.between(*map(_run_dir, arguments.runs))
    for row in rows.itertuples():
        print(f"{row.kind:9} {row.setting:32} {row.ours!r}  {row.theirs!r}")
    knobs = int((rows.kind == "knob").sum())
    words = f"{knobs} knobs differ" if knobs > 1 else "1 knob differs"
    print(words if knobs else "no knob differs: whatever their scores, no change of a knob made them")
    if arguments.claim is None:
        return 0
    problem = diff.judge(rows, arguments.claim)
    print(f"not a clean comparison: {problem}" if problem else "just what is claimed")
    return 1 if problem else 0


def _run_dir(name: str) -> Path:
    """The folder of that name, else the run below runs/."""
    return Path(name) if Path(name).is_dir() else directory.RUNS / name


def plan(arguments: argparse.Namespace) -> int:
    from pgolf.analysis.plan import plan

    print(*plan(directory.RUNS, arguments.effect, arguments.runs, arguments.track), sep="\n")
    return 0


def report(arguments: argparse.Namespace) -> int:
    from pgolf.reports import pages

    print(*pages.write_reports(root=directory.RUNS, out=arguments.out), sep="\n")
    return 0


def artifact(arguments: argparse.Namespace) -> int:
    from pgolf.reports import text
    from pgolf_core.artifact.format import read

    print(text.artifact(read(arguments.file)))
    return 0


def sample(arguments: argparse.Namespace) -> int:
    from pgolf.reports.labels import printable
    from pgolf.studies.sample import PROMPTS, sample

    settings = (arguments.tokens, arguments.temperature, arguments.seed)
    for row in sample(_run_dir(arguments.run), arguments.prompt or PROMPTS, *settings):
        print(*map(printable, row["text"].splitlines()), sep="\n", end="\n\n")
    return 0


def submission(arguments: argparse.Namespace) -> int:
    from pgolf.submission.submit import submit

    base = _run_dir(arguments.base) if arguments.base else None
    print(submit([_run_dir(run) for run in arguments.runs], arguments.out, base, arguments.beats))
    return 0


def console() -> None:
    """The command `pgolf` of the shell: end the process with main's exit status."""
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if status == 130:  # without joining threads: SentencePiece may run in one and would abort
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    console()
