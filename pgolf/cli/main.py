"""`pgolf`: the workbench from the command line."""

import argparse
import os
import sys
from pathlib import Path

from pgolf.cli import cluster, data, remote
from pgolf.cli.arguments import add_knobs, existing_file, knobs_of
from pgolf_core.config import ROOT, RunConfig

DEMO = ROOT / "notebooks" / "sweeps" / "demo.yaml"


def main(words: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 some runs failed, 2 the request cannot be met, 130 stopped by Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a redirected Windows console cannot say Δ
    arguments = _parser().parse_args(words)
    if "command" not in arguments:
        _parser().print_help()
        return 0
    try:
        return arguments.command(arguments)
    except BrokenPipeError:  # the reader of our output has seen enough: `pgolf runs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        # Ours are for users: ConfigError, DataError, RunError, SweepError, TrainError … Others keep their traceback.
        if not type(error).__module__.startswith(("pgolf.", "pgolf_core.")):
            raise
        print(f"pgolf: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\npgolf: stopped; the same command goes on where this one was", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pgolf", description="The lowest bits per byte that fits in N bytes.")
    commands = parser.add_subparsers(metavar="COMMAND")

    def command(function, name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=function)
        return sub

    sub = command(demo, "demo", "corpus, demo sweep and report: ten minutes on two cores")
    sub.add_argument("--slots", type=int, metavar="N", help="notebooks at a time")

    sub = command(sweep, "sweep", "run what is missing of sweep files, one after the other")
    sub.add_argument("files", type=existing_file, nargs="+", metavar="FILE")
    sub.add_argument("--scale", default="", metavar="nano", help="nano = each run shrunk to a minute on one CPU thread")
    sub.add_argument(
        "--seeds", type=int, nargs="+", metavar="SEED", help="every run once for each; what is there stays"
    )
    sub.add_argument("--slots", type=int, metavar="N", help="notebooks at a time; default: what the cores or GPUs hold")
    sub.add_argument(
        "--cluster",
        default="",
        metavar="ADDRESS",
        help="on the workers of a Dask scheduler: tcp://host:8786 or its file",
    )
    sub.add_argument("--dry-run", action="store_true", help="check the file and say what would run")
    add_knobs(sub)

    sub = command(train, "train", "one run, without a notebook")
    sub.add_argument("--run-dir", type=Path, metavar="DIR", help="default: runs/explore/<track>-<hash of the knobs>")
    sub.add_argument(
        "--config", type=existing_file, metavar="FILE", help="knobs as YAML or JSON; a run's config.json too"
    )
    add_knobs(sub)

    sub = command(list_runs, "runs", "all runs in a table")
    sub.add_argument("sweep", nargs="?", metavar="SWEEP")
    sub.add_argument("--verify", action="store_true", help="hold every artifact and checkpoint to its checksum")

    sub = command(import_log, "import-log", "make runs of training logs, with what is odd about each")
    sub.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="a log, or a folder with logs in it or below")
    sub.add_argument("--sweep", metavar="NAME", help="default: the name of the folder that holds submission.json")
    sub.add_argument("--out", type=Path, metavar="RUNS_DIR", help="default: runs")

    sub = command(diff, "diff", "what differs between two runs or imported logs, and whether that is what is claimed")
    sub.add_argument("runs", nargs=2, metavar="RUN", help="sweep/run below runs/, or a folder")
    sub.add_argument("--claim", nargs="*", metavar="KNOB", help="knobs that are said to be the only change")

    sub = command(report, "report", "write the reports of all runs: index.html and the pages it links")
    sub.add_argument("--out", type=Path, default=ROOT / "reports", metavar="DIR")

    sub = command(artifact, "artifact", "check an artifact file and account for its bytes")
    sub.add_argument("file", type=existing_file, metavar="FILE")

    sub = command(submission, "submission", "score a run's file again, audit its data, and pack what it claims")
    sub.add_argument("run", metavar="RUN", help="sweep/run below runs/, or a folder")
    sub.add_argument("--out", type=Path, metavar="DIR", help="default: reports/submissions/<sweep>_<run>")

    data.add_commands(commands)
    remote.add_commands(commands)
    cluster.add_commands(commands)
    return parser


# Torch takes seconds to import, so what needs it is imported where it is used.


def demo(arguments: argparse.Namespace) -> int:
    from pgolf.reports import pages as report
    from pgolf.reports import tables
    from pgolf.runs import directory
    from pgolf.runs.table import load_runs
    from pgolf.sweeps.runner import load_sweep, run_sweep

    failures = run_sweep(DEMO, arguments.slots)
    pages = report.write_reports(root=directory.RUNS, out=ROOT / "reports")
    table = load_runs(directory.RUNS)
    folder = load_sweep(DEMO).directory
    print(tables.summary(table[table.sweep == folder.name]))
    print(f"\nThe reports: {', '.join(map(str, pages))}\nEvery run, with its executed notebook: {folder}")
    return 1 if failures else 0


def sweep(arguments: argparse.Namespace) -> int:
    from pgolf.sweeps.runner import load_sweep, run_sweep

    knobs, failures = knobs_of(arguments.knobs), []
    for file in arguments.files:  # what is wrong with any of them is said before the first one runs
        load_sweep(file, knobs, arguments.scale, arguments.seeds)
    for file in arguments.files:
        if arguments.dry_run:
            _dry_run(load_sweep(file, knobs, arguments.scale, arguments.seeds))
        else:
            failures += run_sweep(file, arguments.slots, knobs, arguments.scale, arguments.seeds, arguments.cluster)
    if failures:
        print(f"pgolf: {len(failures)} failed: {', '.join(f.run for f in failures)}", file=sys.stderr)
        print("the same command tries these again, and nothing else", file=sys.stderr)
    return 1 if failures else 0


def _dry_run(checked) -> None:
    from pgolf.runs.table import load_runs
    from pgolf.sweeps.runner import missing, plan, slot_environments
    from pgolf.training.forecast import check

    jobs, stages = missing(checked)
    to_run = {job.name for job in jobs} | {stage.notebook for stage in stages}
    status = dict(load_runs(checked.directory)[["run", "status"]].itertuples(index=False))
    print(f"{checked.name}: {checked.question}" if checked.question else checked.name)
    for name in [job.name for job in plan(checked)] + [stage.notebook for stage in checked.stages]:
        print(f"  {name:32} {status.get(name, 'new'):12} {'to run' if name in to_run else ''}".rstrip())
    slots = len(slot_environments([job.config for job in jobs]))
    print(f"{len(to_run)} to run, {slots} at a time")
    check({job.name: job.config for job in jobs}, print)


def train(arguments: argparse.Namespace) -> int:
    from pgolf.runs import directory
    from pgolf.runs.directory import run_name
    from pgolf.training.run import train

    knobs = knobs_of(arguments.knobs)
    config = RunConfig.from_file(arguments.config, **knobs) if arguments.config else RunConfig(**knobs)
    run_dir = arguments.run_dir or directory.RUNS / "explore" / run_name(config)
    train(config, run_dir)
    print(run_dir)
    return 0


def list_runs(arguments: argparse.Namespace) -> int:
    from pgolf.runs import directory
    from pgolf.runs.result import RunError
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
    print(_table(table))
    return 0


def _table(table) -> str:
    """A DataFrame of runs as text; a figure that a run does not have stays empty."""

    def figures(column: str, form: str) -> list[str]:
        return ["" if value != value else format(value, form) for value in table[column].astype(float)]

    over = ["over its cap" if value is True else "" for value in table.over_cap]
    late = ["; ".join(flags) if kind == "train" else "" for flags, kind in zip(table["flags"], table.kind, strict=True)]
    notes = [" ".join(" ".join(words).split()) for words in zip(over, late, table.problem, strict=True)]
    columns = [
        ["sweep", *table.sweep],
        ["run", *table.run],
        ["status", *table.status],
        ["bpb", *figures("bpb", ".4f")],
        ["bytes", *figures("total_bytes", ",.0f")],
        ["cap", *figures("cap_bytes", ",.0f")],
        ["seconds", *figures("train_seconds", ".0f")],
    ]
    numbers = ("bpb", "bytes", "cap", "seconds")
    widths = [max(map(len, column)) for column in columns]
    padded = [
        [cell.rjust(width) if column[0] in numbers else cell.ljust(width) for cell in column]
        for column, width in zip(columns, widths, strict=True)
    ]
    return "\n".join("  ".join(row).rstrip() for row in zip(*padded, ["", *notes], strict=True))


def import_log(arguments: argparse.Namespace) -> int:
    from pgolf.analysis import records
    from pgolf.runs import directory

    imported, remarks = records.import_logs(arguments.paths, arguments.sweep, arguments.out or directory.RUNS)
    names = [f"{run.run_dir.parent.name}/{run.run_dir.name}" for run in imported]
    for run, name in zip(imported, names, strict=True):
        bpb = "no final score" if run.bpb is None else f"{run.bpb:.8f} bpb"
        size = "size unknown" if run.total_bytes is None else f"{run.total_bytes:,} bytes"
        again = "  was imported before" if run.again else ""
        print(f"{name:{max(map(len, names))}}  {run.status:10}  {bpb:14}  {size:>16}{again}")
        for remark in run.remarks:
            print(f"    {remark}")
    for remark in remarks:
        print(remark)
    return 0


def diff(arguments: argparse.Namespace) -> int:
    """Exit status 1 where --claim is given and does not hold."""
    from pgolf.analysis import diff as difference

    rows = difference.between(*map(_run_dir, arguments.runs))
    for row in rows.itertuples():
        print(f"{row.kind:9} {row.setting:32} {row.ours!r}  {row.theirs!r}")
    knobs = list(rows.setting[rows.kind == "knob"])
    print(
        f"{len(knobs)} knob{'s' * (len(knobs) > 1)} differ{'s' * (len(knobs) == 1)}"
        if knobs
        else "no knob differs: whatever their scores, no change of a knob made them"
    )
    if arguments.claim is None:
        return 0
    problem = difference.judge(rows, arguments.claim)
    print(f"not a clean comparison: {problem}" if problem else "just what is claimed")
    return 1 if problem else 0


def _run_dir(name: str) -> Path:
    """The folder of that name, else the run below runs/."""
    from pgolf.runs import directory

    return Path(name) if Path(name).is_dir() else directory.RUNS / name


def report(arguments: argparse.Namespace) -> int:
    from pgolf.reports import pages as report
    from pgolf.runs import directory

    for page in report.write_reports(root=directory.RUNS, out=arguments.out):
        print(page)
    return 0


def artifact(arguments: argparse.Namespace) -> int:
    from pgolf_core.artifact.format import read

    print(_account(read(arguments.file)))
    return 0


def _account(unpacked) -> str:
    """Every byte of a file, for a terminal: by part, then by tensor where the codec tells."""
    from pgolf_core.artifact.format import ACCOUNT, PARTS

    total = sum(unpacked.parts.values())
    versions = ", ".join(f"{package} {version}" for package, version in unpacked.libraries.items())
    lines = [f"artifact version {unpacked.version}, {len(unpacked.arrays)} arrays; whole, checksums right"]
    lines += [f"written with {versions}"] if versions else []
    lines += ["", f"{'part':14} {'codec':8} {'arrays':>7} {'decoded':>12} {'stored':>12} {'share':>7}"]
    for part in [*ACCOUNT, *sorted(unpacked.parts.keys() - set(ACCOUNT))]:
        if part in unpacked.parts:
            members = [a for name, a in unpacked.arrays.items() if PARTS.get(name.partition("/")[0]) == part]
            decoded = f"{sum(a.nbytes for a in members):,}" if members else ""
            figures = f"{len(members) or '':>7} {decoded:>12} {unpacked.parts[part]:>12,}"
            lines.append(f"{part:14} {unpacked.codecs.get(part, ''):8} {figures} {unpacked.parts[part] / total:>7.1%}")
    lines += [f"{'total':14} {'':8} {len(unpacked.arrays):>7} {'':>12} {total:>12,}"]
    matrices = {name: a for name, a in unpacked.arrays.items() if name.startswith(("q/", "index/"))}
    if matrices:
        width = max(len(name) for name in matrices) - 2
        lines += ["", f"{'tensor':{width}} {'shape':>14} {'levels':>7} {'stored':>12} {'bits each':>10}"]
    for name, a in matrices.items():
        stored = unpacked.array_bytes[name]
        size = ("", "") if stored is None else (f"{stored:,}", f"{8 * stored / max(a.size, 1):.2f}")
        levels = int(a.max()) - int(a.min()) + 1 if a.size else 0
        shape = " × ".join(map(str, a.shape))
        lines.append(f"{name.partition('/')[2]:{width}} {shape:>14} {levels:>7,} {size[0]:>12} {size[1]:>10}".rstrip())
    return "\n".join(lines)


def submission(arguments: argparse.Namespace) -> int:
    from pgolf.submission.submit import submit

    print(submit(_run_dir(arguments.run), arguments.out))
    return 0


def console() -> None:
    """Of the shell: `main`, and its exit status."""
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if status == 130:  # without waiting for threads: SentencePiece may be at work in one, and would abort
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    console()
