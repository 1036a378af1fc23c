"""What several commands of `pgolf` read alike: counts, files, knobs."""

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
    parser.add_argument(
        "-k", dest="knobs", action="append", default=[], metavar="NAME=VALUE", help="a knob of RunConfig"
    )


def knobs_of(pairs: list[str]) -> dict[str, str]:
    """Values stay text, as they are in the environment; RunConfig reads them by the knob's type."""
    if bad := [pair for pair in pairs if "=" not in pair]:
        raise ConfigError(f"-k {' '.join(bad)}: expected NAME=VALUE")
    return dict(pair.split("=", 1) for pair in pairs)
