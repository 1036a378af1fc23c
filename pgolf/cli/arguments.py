"""Argument types and shared options of the `pgolf` commands."""

import argparse
from pathlib import Path

from pgolf_core.config import ConfigError


def count(text: str) -> int:
    """A whole number, with or without thousands separators."""
    digits = text.replace(",", "").replace("_", "")
    if not digits.isdecimal():
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number, like 50,000")
    return int(digits)


def existing_file(name: str) -> Path:
    if not Path(name).is_file():
        raise argparse.ArgumentTypeError(f"{name}: no such file")
    return Path(name)


def add_knobs(parser: argparse.ArgumentParser) -> None:
    text = "set a knob of RunConfig, like -k num_layers=4; may be repeated"
    parser.add_argument("-k", dest="knobs", action="append", default=[], metavar="NAME=VALUE", help=text)


def knobs_of(pairs: list[str]) -> dict[str, str]:
    """Knobs as text, as in environment variables; RunConfig parses them by each knob's type."""
    if bad := [pair for pair in pairs if "=" not in pair]:
        raise ConfigError(f"-k {' '.join(bad)}: expected NAME=VALUE")
    return dict(pair.split("=", 1) for pair in pairs)


def add_workers(parser: argparse.ArgumentParser, text: str) -> None:
    """--workers N; its former name ends the command with a message."""
    parser.add_argument("--workers", type=int, metavar="N", help=text)
    parser.add_argument("--slots", action=_Renamed, metavar="N", help=argparse.SUPPRESS)


class _Renamed(argparse.Action):
    def __call__(self, parser, namespace, value, option=None):
        parser.exit(2, f"pgolf: --slots is now --workers: use --workers {value}\n")
