"""Argument types and shared options of the `pgolf` commands."""

import argparse
import math
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NoReturn, TextIO

from pgolf.runs import directory
from pgolf_core.config import RunConfig, did_you_mean

# Whatever a terminal obeys; not its "one line up", by which progress bars draw.
CONTROLS = re.compile("(?!\x1b\\[A)[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def escape_controls(stream: TextIO, keep: str) -> None:
    """From now on the stream writes control characters, which a log or a name may bring, as `\\x1b`."""
    if "write" in vars(stream):
        return
    write = stream.write

    def as_text(found: re.Match) -> str:
        return found[0] if found[0] in keep else repr(found[0])[1:-1]

    stream.write = lambda text: write(CONTROLS.sub(as_text, text))


class Parser(argparse.ArgumentParser):
    """A parser whose errors name the nearest right command or option."""

    def error(self, message: str) -> NoReturn:
        if found := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            known = re.findall(r"[\w-]+", found[2])
            self.exit(
                2, f"pgolf: {found[1]}: no such command{did_you_mean(found[1], known)}; `{self.prog}` lists them\n"
            )
        super().error(message)

    def refuse(self, words: list[str]) -> NoReturn:
        """End the process: none of these words is an option or argument of this command."""
        known = [option for action in self._actions for option in action.option_strings]
        name, given, _ = words[0].partition("=")
        nearest = did_you_mean(name, known) if name.startswith("-") else ""
        if given and name in RunConfig.model_fields:
            nearest = f"; a knob is set by -k {words[0]}"
        nearest = nearest or f"; `{self.prog} --help` says what it takes"
        self.exit(2, f"pgolf: {words[0]}: unexpected{nearest}\n")


def add_command(commands, function: Callable, name: str, text: str, *examples: str) -> Parser:
    """A subcommand: its function takes the parsed arguments and returns the exit status. examples end its help."""
    epilog = "\n".join(["examples:", *(f"  {example}" for example in examples)]) if examples else None
    raw = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser(name, help=text, description=text, epilog=epilog, formatter_class=raw)
    parser.set_defaults(command=function, parser=parser)
    return parser


def complete_runs(prefix: str, **_) -> Iterable[str]:
    """Names of runs, for the shell."""
    return directory.run_names()


def complete_knobs(prefix: str, **_) -> Iterable[str]:
    """`NAME=` of every knob, for the shell."""
    return [f"{name}=" for name in RunConfig.model_fields]


def add_run(parser: argparse.ArgumentParser, text: str = "sweep/run below runs/, or a folder", **options) -> None:
    """The argument RUN."""
    parser.add_argument("run", metavar="RUN", help=text, **options).completer = complete_runs


def count(text: str) -> int:
    """A whole number, with or without thousands separators."""
    digits = text.replace(",", "").replace("_", "")
    if not digits.isdecimal():
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number, like 50,000")
    return int(digits)


def positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: expected a number above 0, like 0.002")
    return number


def existing_file(name: str) -> Path:
    path = Path(name)
    if path.is_file():
        return path
    beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    raise argparse.ArgumentTypeError(f"{name}: no such file{did_you_mean(path.name, beside)}")


def _pair(text: str) -> tuple[str, str]:
    if "=" not in text:
        raise argparse.ArgumentTypeError(f"{text}: expected NAME=VALUE")
    return tuple(text.split("=", 1))


def add_knobs(parser: argparse.ArgumentParser) -> None:
    """-k NAME=VALUE: pairs of text, as in environment variables; RunConfig parses them by each knob's type."""
    text = "set a knob of RunConfig, like -k num_layers=4; may be repeated"
    option = parser.add_argument("-k", dest="knobs", action="append", type=_pair, default=[], metavar="NAME=VALUE",
                                 help=text)  # fmt: skip
    option.completer = complete_knobs


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """--scale, --seeds and -k: what replaces parts of a sweep file."""
    text = "nano: shrink each run to a minute on one CPU thread"
    parser.add_argument("--scale", default="", metavar="nano", help=text)
    text = "run everything once per seed; runs that are complete stay"
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help=text)
    add_knobs(parser)


def overrides(arguments: argparse.Namespace) -> tuple[dict[str, str], str, list[int] | None]:
    """Arguments `knobs`, `scale` and `seeds` of load_sweep."""
    return dict(arguments.knobs), arguments.scale, arguments.seeds


def add_running(parser: argparse.ArgumentParser, workers: str, dry_run: str) -> None:
    """--workers, --cluster and --dry-run. workers: help on what is counted; dry_run: help on what is printed."""
    add_workers(parser, f"{workers}; default: as many as fit the cores or GPUs")
    text = "run on the workers of a Dask scheduler that share the runs folder: tcp://host:8786 or its scheduler file"
    parser.add_argument("--cluster", default="", metavar="ADDRESS", help=text)
    parser.add_argument("--dry-run", action="store_true", help=dry_run)


def pool_opener(arguments: argparse.Namespace) -> Callable | None:
    """A function of a sweep that opens the pool of --cluster; None without it."""
    if not arguments.cluster:
        return None
    from pgolf.machines.cluster import connect

    return partial(connect, arguments.cluster)


def add_workers(parser: argparse.ArgumentParser, text: str) -> None:
    """--workers N; its former name ends the command with a message."""
    parser.add_argument("--workers", type=int, metavar="N", help=text)
    parser.add_argument("--slots", action=_Renamed, metavar="N", help=argparse.SUPPRESS)


class _Renamed(argparse.Action):
    def __call__(self, parser, namespace, value, option=None):
        parser.exit(2, f"pgolf: --slots is now --workers: use --workers {value}\n")
