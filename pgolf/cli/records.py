"""`pgolf import-log` and `import-record`: what others trained, as runs."""

import argparse
from functools import partial
from pathlib import Path

from pgolf.cli.arguments import add_command
from pgolf.cli.legality import verdict_lines
from pgolf.runs import directory


def add_commands(commands) -> None:
    command = partial(add_command, commands)
    text = "make runs from lone training logs, naming what is odd about each"
    sub = command(
        import_log, "import-log", text, "pgolf import-log train.log", "pgolf import-log records/ --sweep theirs"
    )
    sub.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="a log, or a folder with logs in it or below")
    _add_places(sub, "the folder that holds submission.json")

    text = "read public record folders whole: runs with their claims, findings, and a sweep file that repeats each"
    sub = command(
        import_record, "import-record", text, "pgolf import-record records/2026-04-27_SP8192_1.0611",
        "pgolf import-record records/ --out runs",
    )  # fmt: skip
    text = "a folder with submission.json, README.md, logs, train_gpt.py; or a folder of such folders"
    sub.add_argument("folders", type=Path, nargs="+", metavar="DIR", help=text)
    _add_places(sub, "the record's folder")


def _add_places(sub: argparse.ArgumentParser, default: str) -> None:
    sub.add_argument("--sweep", metavar="NAME", help=f"name of the sweep; default: {default}")
    sub.add_argument("--out", type=Path, metavar="RUNS_DIR", help="runs folder; default: runs")


def import_log(arguments: argparse.Namespace) -> int:
    from pgolf.analysis import records
    from pgolf.reports import text

    imported, remarks = records.import_logs(arguments.paths, arguments.sweep, arguments.out or directory.RUNS)
    print(*text.imports(imported), *remarks, sep="\n")
    return 0


def import_record(arguments: argparse.Namespace) -> int:
    """Exit status 1 if some of several folders cannot be imported."""
    from pgolf.analysis.training_logs import LogError
    from pgolf.reports import text
    from pgolf.submission.import_record import import_record, records_in
    from pgolf.submission.legality import sentence

    folders = list(dict.fromkeys(folder for start in arguments.folders for folder in records_in(start)))
    failed = 0
    for folder in folders:
        try:
            record = import_record(folder, arguments.sweep, arguments.out or directory.RUNS)
        except LogError as error:
            if len(folders) == 1:
                raise
            failed += 1
            print(f"not imported: {error}", end="\n\n")
            continue
        print(folder, *text.imports(record.runs), *record.remarks, *verdict_lines(record.verdicts), sep="\n")
        print(sentence(record.verdicts), record.sweep, record.said, sep="\n", end="\n\n")
    if len(folders) > 1:
        print(f"{len(folders) - failed} of {len(folders)} records imported")
    return int(failed > 0)
