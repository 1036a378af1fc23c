"""Roles of parameters: declared once, where a parameter is created, and read by all that treat them differently.

    self.c_q = declare(nn.Linear(D, D, bias=False), matrix("attn_in"))
    self.q_gains = nn.Parameter(torch.ones(L, H))
    declare(self, CONTROL, "q_gains")

The optimiser, export, calibration, size forecast, regulariser, sensitivity map and tables ask `roles_of(model)`.
The module keeps the declaration, so copies of a model and moves to another device keep it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeVar

if TYPE_CHECKING:  # pages use tensor_place and load no torch
    from torch import nn

M = TypeVar("M", bound="nn.Module")

QUANTIZER_GROUPS = ("embed", "attn_in", "attn_out", "mlp_in", "mlp_out", "head")  # knobs `<one of these>_quantizer`


class RoleError(ValueError):
    """A parameter whose role is unknown or unfit; the message names it and what to write."""


@dataclass(frozen=True)
class Role:
    """Role of one parameter.

    kind: embedding = a table (rows, dim) that token ids look up, trained by Adam at the embedding's rate;
        matrix = (rows, cols), trained by Muon; head = an untied output matrix, trained by Adam at head_lr;
        projection = (rows, cols) behind a table of an option, trained as control, as the published runs did;
        control = vectors and gains of any shape, trained by Adam at scalar_lr and stored in control_dtype.
    quantizer_group: one of QUANTIZER_GROUPS, whose knob may override `quantizer` for this tensor; '' = none may.
    block: index of the block that holds it, filled in by `roles_of`; None outside the blocks.
    """

    kind: Literal["embedding", "matrix", "head", "projection", "control"]
    quantizer_group: str = ""
    block: int | None = None

    def __post_init__(self):
        if self.quantizer_group not in ("", *QUANTIZER_GROUPS):
            known = ", ".join(QUANTIZER_GROUPS)
            raise RoleError(f"quantizer_group={self.quantizer_group!r} is no group; choose one of {known}, or ''")

    @property
    def is_control(self) -> bool:
        return self.kind == "control"


EMBEDDING = Role("embedding", "embed")
HEAD = Role("head", "head")
PROJECTION = Role("projection", "embed")
CONTROL = Role("control")


def matrix(quantizer_group: str = "") -> Role:
    """Role of a matrix under Muon; quantizer_group as in Role."""
    return Role("matrix", quantizer_group)


def declare(module: M, role: Role, *names: str) -> M:
    """Set the role of the named parameters that the module itself holds, by default all. Returns the module."""
    own = [name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))]
    if unknown := [name for name in names if name not in own]:
        raise RoleError(f"{type(module).__name__} has no parameter {unknown[0]}; create it before it is declared")
    module.__dict__.setdefault("parameter_roles", {}).update(dict.fromkeys(names or own, role))
    return module


def roles_of(model: nn.Module) -> dict[str, Role]:
    """Name -> role of every parameter and persistent buffer, in the order of the state dict.

    Raises RoleError naming the first that was not declared, or is declared a matrix and has not two dimensions.
    """
    roles = {}
    for name, value in model.state_dict(keep_vars=True).items():
        path, _, own = name.rpartition(".")
        role = getattr(model.get_submodule(path), "parameter_roles", {}).get(own)
        if role is None:
            raise RoleError(
                f"parameter {name} has no role; declare it where it is created, with "
                "pgolf_core.parameters.declare(module, role): EMBEDDING, matrix(), HEAD or CONTROL"
            )
        if value.ndim != 2 and not role.is_control:
            raise RoleError(f"parameter {name} of shape {tuple(value.shape)}: {role.kind} is a role of (rows, columns)")
        roles[name] = replace(role, block=tensor_place(name)[0])
    return roles


def roles_for(names: Iterable[str], known: dict[str, Role]) -> dict[str, Role]:
    """Roles of tensors by name, from those `known` of a model of any depth: block 7 has those of block 0.

    Raises RoleError naming the first tensor that no known name fits.
    """
    patterns = {_pattern(name): role for name, role in known.items()}
    roles = {}
    for name in names:
        if (role := patterns.get(_pattern(name))) is None:
            raise RoleError(f"tensor {name} is none of the model's parameters, so its role is unknown")
        roles[name] = replace(role, block=tensor_place(name)[0])
    return roles


def _pattern(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


def tensor_place(name: str) -> tuple[int | None, str]:
    """'blocks.3.mlp.fc.weight' -> (3, 'mlp.fc'); outside the blocks (None, name without '.weight')."""
    block, part = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.*?)(?:\.weight)?", name).groups()
    return (None if block is None else int(block)), part
