"""Types of what a run's JSON files may hold: each is read through them, whoever wrote it."""

from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, Strict, StringConstraints, TypeAdapter, ValidationError, create_model

from pgolf.disk import read_json
from pgolf_core.config import RunConfig

Int = Annotated[int, Strict(), Field(ge=-(2**63), lt=2**63)]
Float = Annotated[float, Strict()]
Text = Annotated[str, StringConstraints(strict=True, max_length=100_000)]
FolderName = Annotated[str, StringConstraints(strict=True, pattern=r"^[^/\\.\x00][^/\\\x00]{0,254}$")]


class About(BaseModel):
    """sweep.json: what analysis and reports need to know of a sweep's file."""

    name: Text = ""
    question: Text | None = None
    control: Text | None = None  # the baseline
    file: Text = ""
    family: Text = ""  # the transfer study with this sweep as one scale, or the scaling study that it is
    scale: Text = ""  # its name in a transfer study; "" in a scaling study
    runs: list[FolderName] = []
    stages: list[FolderName] = []
    arms: dict[Text, Text] = {}  # run -> its config's name
    changes: dict[Text, list[Text]] = {}  # config -> names of the knobs that it changes


def read_about(folder: Path) -> About | None:
    """The sweep.json in a sweep's folder; None if it is missing or damaged."""
    content = read_json(folder / "sweep.json")
    try:
        return None if content is None else About.model_validate(content)
    except ValidationError:
        return None


def knobs_that_fit(config: dict) -> tuple[dict, dict[str, str]]:
    """The knobs of a config.json whose values have their type; what is wrong with the others, by name."""
    wrong, fields = misfits(_knobs(), config), RunConfig.model_fields  # a property, and slow
    return {k: v for k, v in config.items() if k in fields and k not in wrong}, wrong


def misfits(types: TypeAdapter, content: object) -> dict[str, str]:
    """What is wrong, by field; {} if everything has its type."""
    try:
        types.validate_python(content)
    except ValidationError as error:
        return {str(e["loc"][0] if e["loc"] else ""): e["msg"][0].lower() + e["msg"][1:] for e in error.errors()}
    return {}


@cache
def _knobs() -> TypeAdapter:
    """Types alone: bounds, choices and rules change between versions."""
    plain = {int: Int, float: Float, str: Text, bool: Annotated[bool, Strict()]}
    types = {name: (plain.get(field.annotation, Text), field.default) for name, field in RunConfig.model_fields.items()}
    return TypeAdapter(create_model("Knobs", __config__=ConfigDict(protected_namespaces=()), **types))
