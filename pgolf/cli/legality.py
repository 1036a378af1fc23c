"""`pgolf legality`: runs and record folders held against the challenge's rules, on the terminal and as a page."""

import argparse
import html
from pathlib import Path
from typing import TYPE_CHECKING

from pgolf.cli.arguments import add_command
from pgolf.runs import directory
from pgolf.runs.result import RunError

if TYPE_CHECKING:
    from pgolf.submission.conditions import Verdict

TOGETHER = "these runs together"
COLOURS = {"pass": "#1a7f37", "fail": "#b00020", "not tested": "#666"}
CELL = '<td class="text" style="white-space:normal;vertical-align:top;{}">{}</td>'


def add_commands(commands) -> None:
    text = "test runs and record folders against the challenge's rules; exit status 1 if one is violated"
    sub = add_command(commands, legality, "legality", text, "pgolf legality demo/momentum-s1337 --html legality.html")
    text = "sweep/run below runs/, a run's folder, or a record folder with submission.json and logs; several runs are "
    sub.add_argument("paths", nargs="+", metavar="RUN|DIR", help=f"{text}held against each other too")
    sub.add_argument("--html", type=Path, metavar="FILE", help="write a page that also says how each rule was tested")


def legality(arguments: argparse.Namespace) -> int:
    """Exit status 1 if a rule is violated."""
    from pgolf.submission.legality import of_run, of_runs, sentence
    from pgolf.submission.record_folder import of_folder

    paths = [Path(name) if Path(name).is_dir() else directory.RUNS / name for name in arguments.paths]
    if missing := [path for path in paths if not path.is_dir()]:
        raise RunError(f"{missing[0]}: no such folder; name a run as sweep/run, or a record folder")
    runs = [path for path in paths if _is_run(path)]
    tested = {path: of_run(path) if path in runs else of_folder(path) for path in paths}
    subjects = {f"{path.resolve().parent.name}/{path.resolve().name}": verdicts for path, verdicts in tested.items()}
    if len(runs) > 1:
        subjects[TOGETHER] = of_runs(runs)
    said = sentence([verdict for verdicts in subjects.values() for verdict in verdicts])
    for name, verdicts in subjects.items():
        print(name, *verdict_lines(verdicts), "", sep="\n")
    print(said)
    if arguments.html:
        print(write_page(arguments.html, subjects, said))
    return int(said.startswith("not legal"))


def _is_run(path: Path) -> bool:
    """True for a run of pgolf, finished or not; an imported log is a record, and a record may keep a run's config."""
    run = (path / "result.json").exists() or (
        (path / "config.json").exists() and not (path / "submission.json").exists()
    )
    return run and not (path / "import.json").exists()


def verdict_lines(verdicts: "list[Verdict]") -> list[str]:
    """A line per rule: outcome, rule, what was found."""
    width = max(len(verdict.rule) for verdict in verdicts)
    return [f"  {v.outcome:10}  {v.rule:{width}}  {v.found}" for v in verdicts]


def write_page(path: Path, subjects: "dict[str, list[Verdict]]", said: str) -> Path:
    """An HTML page: the sentence, then a table of rule, verdict, test and figures per subject."""
    from pgolf.reports.labels import printable
    from pgolf.reports.pages import PAGE
    from pgolf_core.files import atomic_write

    def cell(value: str, style: str = "") -> str:
        return CELL.format(style, html.escape(printable(value)))

    body = [f"<h1>Legality</h1><p><b>{html.escape(printable(said))}</b></p>"]
    head = "".join(f'<th class="text">{word}</th>' for word in ("rule", "verdict", "how it was tested", "figures"))
    for name, verdicts in subjects.items():
        rows = ""
        for v in verdicts:
            verdict = cell(v.outcome, f"color:{COLOURS[v.outcome]};font-weight:600;white-space:nowrap")
            rows += f"<tr>{cell(v.rule)}{verdict}{cell(v.how)}{cell(v.found)}</tr>"
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        body.append(f"<h2>{html.escape(printable(name))}</h2>{table}")
    return atomic_write(path, PAGE.substitute(title="Legality", nav="pgolf legality", body="\n".join(body)))
