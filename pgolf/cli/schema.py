"""`pgolf schema`: JSON schemas of knobs and of files that commands read, so that editors check YAML."""

import argparse
import json
import re
from pathlib import Path

from pgolf.cli.arguments import add_command
from pgolf_core.config import ROOT, RunConfig
from pgolf_core.files import atomic_write

FOLDER = Path("notebooks", "sweeps", "schema")
DRAFT = "http://json-schema.org/draft-07/schema#"  # the one that editors of YAML know best
KNOBS = "#/definitions/knobs"
NULL = {"type": "null"}


def add_commands(commands) -> None:
    text = "write the JSON schemas of knobs and of files that commands read, so that editors complete and check them"
    sub = add_command(commands, schema, "schema", text, "pgolf schema", "pgolf schema --out .vscode")
    sub.add_argument("--out", type=Path, metavar="DIR", help=f"folder; default: {FOLDER.as_posix()}")
    sub.set_defaults(anywhere=True)


def schema(arguments: argparse.Namespace) -> int:
    folder = arguments.out or ROOT / FOLDER
    paths = [atomic_write(folder / name, text) for name, text in schemas().items()]
    print(*paths, sep="\n")
    print(f"{len(paths)} schemas; a YAML file takes one by its first line: # yaml-language-server: $schema=PATH")
    return 0


def schemas() -> dict[str, str]:
    """File name -> the JSON schema as text."""
    from pgolf.machines.pod import Pod

    found = {
        "knobs.json": _plain(RunConfig.model_json_schema()) | {"title": "Knobs of a run"},
        "sweep.json": _sweep(),
        "search.json": _search(),
        "transfer.json": _family("TransferKeys", "scales", "A file of pgolf transfer"),
        "scale.json": _family("ScaleKeys", "sizes", "A file of pgolf scale"),
        "machine.json": _plain(Pod.model_json_schema()) | {"title": "A rented machine, for pgolf remote"},
    }
    return {
        name: json.dumps({"$schema": DRAFT} | own, indent=1, ensure_ascii=False) + "\n" for name, own in found.items()
    }


def _plain(model: dict) -> dict:
    """A pydantic schema without its titles; a switch may be 0 or 1 too, as everywhere in pgolf."""
    properties = {}
    for name, own in model["properties"].items():
        own = {key: value for key, value in own.items() if key != "title"}
        if own.get("type") == "boolean":
            own = {key: value for key, value in own.items() if key != "type"} | {"enum": [True, False, 0, 1]}
        properties[name] = own
    return model | {"properties": properties}


def _sweep() -> dict:
    """Schema of a sweep file: SweepKeys, with what RunConfig and the stages' check say of their content."""
    from pgolf.sweeps import sweep_file

    knobs = _plain(RunConfig.model_json_schema())
    lists = {
        name: {"type": "array", "minItems": 1, "items": {"$ref": f"{KNOBS}/properties/{name}"}}
        for name in knobs["properties"]
    }
    stage = {
        "type": "object",
        "minProperties": 1,
        "maxProperties": 1,
        "additionalProperties": {"type": ["object", "null"]},
    }
    own = {
        "track": knobs["properties"]["track"],
        "nproc": knobs["properties"]["world_size"],
        "base": {"anyOf": [{"$ref": KNOBS}, NULL]},
        "runs": {"type": "object", "additionalProperties": {"anyOf": [{"$ref": KNOBS}, NULL]}},
        "grid": {"type": "object", "additionalProperties": False, "properties": lists},
        "stages": {"type": "array", "items": {"anyOf": [{"type": "string"}, stage]}},
    }
    return _narrowed(sweep_file.SweepKeys, own, sweep_file.__doc__) | {
        "title": "A sweep file", "description": "One of runs: and grid: at least.",
    }  # fmt: skip


def _search() -> dict:
    """Schema of a search file: SearchKeys, with the knobs that its keys hold."""
    from pgolf.search import search_file

    knobs = _plain(RunConfig.model_json_schema())["properties"]
    lists = {
        name: {"anyOf": [
            {"type": "array", "minItems": 1, "items": {"$ref": f"{KNOBS}/properties/{name}"}},
            {"$ref": "#/$defs/Values"},
        ]}
        for name in knobs
    }  # fmt: skip
    own = {
        "track": knobs["track"],
        "base": {"anyOf": [{"$ref": KNOBS}, NULL]},
        "space": {"type": "object", "additionalProperties": False, "minProperties": 1, "properties": lists},
        "enqueue": {"type": "object", "additionalProperties": {"anyOf": [{"$ref": KNOBS}, NULL]}},
    }
    return _narrowed(search_file.SearchKeys, own, search_file.__doc__) | {
        "title": "A search file", "description": "One of trainings:, hours:, money: and trials: at least.",
    }  # fmt: skip


def _family(keys: str, cases: str, title: str) -> dict:
    """Schema of a file of sweeps at several scales; cases: its key of names and their knobs."""
    from pgolf.sweeps import families

    knobs = {"anyOf": [{"$ref": KNOBS}, NULL]}
    own = {"base": knobs, cases: {"type": "object", "additionalProperties": knobs}}
    return _narrowed(getattr(families, keys), own, families.__doc__) | {"title": title}


def _narrowed(keys: type, own: dict, text: str) -> dict:
    """A file's schema with `own` in place of pydantic's wider types, and each key's meaning from its format's text."""
    model = _plain(keys.model_json_schema())
    properties, meanings = model["properties"] | own, dict(re.findall(r"^(\w+):.*?# (.+)$", text, re.MULTILINE))
    for name in properties.keys() & meanings.keys():
        properties[name] = properties[name] | {"description": meanings[name]}
    knobs = _plain(RunConfig.model_json_schema()) | {"description": "knobs of a run"}
    return model | {"properties": properties, "definitions": {"knobs": knobs}}
