"""`pgolf knobs` and `pgolf tracks`: every knob with its range, default and meaning; every named budget."""

import argparse
from typing import Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from pgolf.cli.arguments import add_command
from pgolf.reports.text import aligned
from pgolf_core import config
from pgolf_core.config import ConfigError, RunConfig, did_you_mean, knob_of_alias

GROUPS = {
    "Model": config.ModelConfig,
    "Data": config.DataConfig,
    "Training": config.TrainConfig,
    "Regulariser": config.RegularizerConfig,
    "Export": config.ExportConfig,
    "Evaluation": config.EvalConfig,
}
BOUNDS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}


def add_commands(commands) -> None:
    text = "list every knob: what it takes, its default, its meaning, the tracks that set it"
    sub = add_command(commands, knobs, "knobs", text, "pgolf knobs", "pgolf knobs learning rate", "pgolf knobs muon_wd")
    text = "only knobs with all of these words in name or meaning; one whole name: all about that knob"
    sub.add_argument("words", nargs="*", metavar="WORD", help=text).completer = lambda **_: RunConfig.model_fields
    sub.set_defaults(anywhere=True)
    text = "list every track: a named budget, as values of knobs"
    sub = add_command(commands, tracks, "tracks", text, "pgolf tracks", "pgolf tracks nano")
    sub.add_argument("track", nargs="?", metavar="TRACK", help="only this one").completer = lambda **_: config.TRACKS
    sub.set_defaults(anywhere=True)


def takes(field: FieldInfo) -> str:
    """Type or choices of a knob, and its bounds."""
    kind = field.annotation
    if get_origin(kind) is Literal:
        return ", ".join(choice or "''" for choice in get_args(kind))
    name = kind.__name__ if isinstance(kind, type) else str(kind)
    bounds = [
        f"{sign} {value:g}"
        for rule in field.metadata
        for attribute, sign in BOUNDS.items()
        if (value := getattr(rule, attribute, None)) is not None
    ]
    return " ".join([name, ", ".join(bounds)]).strip()


def shown(value: object) -> str:
    """A value as a user would type it."""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, int) and value >= 10_000:
        return f"{value:_}"
    return "''" if value == "" else str(value)


def group_of(name: str) -> str:
    """Title of the knob's group; the track is of none."""
    return next((title for title, group in GROUPS.items() if name in group.model_fields), "Budget")


def knobs(arguments: argparse.Namespace) -> int:
    found = matching(arguments.words)
    if len(found) == 1:
        print("\n".join(explain(found[0])))
        return 0
    fields, rows = RunConfig.model_fields, [("knob", "takes", "default", "meaning")]
    for name in found:
        field = fields[name]
        what = takes(field)
        rows.append((name, what if len(what) < 24 else "a choice", shown(field.default), _plain(field)))
    print(*aligned(rows, "<<<<"), sep="\n")
    print(f"\n{len(found)} of {len(fields)} knobs; `pgolf knobs NAME` says all about one")
    return 0


def matching(words: list[str]) -> list[str]:
    """Knobs, in the order of groups, that have every word in name, meaning or ALIASES; a whole name is that knob alone.

    Raises ConfigError naming the nearest knob if none has.
    """
    fields = {n: f for group in GROUPS.values() for n, f in group.model_fields.items()} | RunConfig.model_fields
    whole = "_".join(words).lower().replace("-", "_")
    if whole in fields:
        return [whole]
    if len(words) == 1 and (knob := knob_of_alias(whole)):
        return [knob]
    text = {
        name: " ".join([name, field.description, *config.ALIASES.get(name, ())]).lower()
        for name, field in fields.items()
    }
    found = [name for name in fields if all(word.lower() in text[name] for word in words)]
    if not found:
        nearest = did_you_mean(whole, fields) or "; `pgolf knobs` lists all"
        raise ConfigError(f"{' '.join(words)}: in no knob's name or meaning{nearest}")
    return found


def _plain(field: FieldInfo) -> str:
    return (field.description or "").replace("`", "")


def explain(name: str) -> list[str]:
    """Lines that say all about one knob."""
    field = RunConfig.model_fields[name]
    tracks = [f"{track} {shown(values[name])}" for track, values in config.TRACKS.items() if name in values]
    subject, aliases = config.ALIASES.get(name, ("", ""))
    rows = [
        ("meaning", _plain(field)),
        ("takes", takes(field)),
        ("default", shown(field.default)),
        ("tracks", ", ".join(tracks) or "none sets it"),
        (
            "set it",
            f"-k {name}={shown(field.default)}, {name}: in a sweep file, PGOLF_{name.upper()} in the environment",
        ),
        *([("elsewhere", aliases.replace(" ", ", "))] if subject else []),
    ]
    return [f"{name} ({group_of(name)})", *aligned([("", *row) for row in rows], "<<<")]


def tracks(arguments: argparse.Namespace) -> int:
    known, wanted, listed = config.TRACKS, arguments.track, ", ".join(config.TRACKS)
    if wanted and wanted not in known:
        raise ConfigError(f"{wanted}: no such track{did_you_mean(wanted, known) or f'; there are {listed}'}")
    for track in [wanted] if wanted else known:
        own = RunConfig({}, track=track)
        limit = f"{own.max_wallclock_seconds:g} s" if own.max_wallclock_seconds else f"{own.iterations:,} steps"
        print(f"{track}: {own.num_layers} layers of width {own.model_dim}, {limit}, cap {own.cap_bytes:,} bytes")
        print(*(f"  {name}={shown(value)}" for name, value in known[track].items()), sep="\n", end="\n\n")
    print("`-k track=NAME` takes one; a knob given beside it wins")
    return 0
