"""The stored form of a model: what an artifact holds, before it is bytes. A reader needs no more of quantization.

A stored form is a class with `arrays() -> {kind: tensor}`, `from_arrays(arrays)`, `dequantize() -> float32` and, so
that a hostile file is refused before any arithmetic, `shape` of what it dequantizes to. `from_arrays` takes each array
by `checked`.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pgolf_core.quantization.lowrank import LowRank
    from pgolf_core.quantization.primitives import RankOne

INTEGERS, FLOATS = (torch.int8, torch.int16), (torch.float16, torch.float32)  # dtypes of levels, of scales

FORMS: dict[str, type[Stored]] = {}  # word -> class, of the modules loaded so far


class Stored(Protocol):
    """One tensor as it is stored. word, shared: set by `stored_form`."""

    word: ClassVar[str]
    shared: ClassVar[str]

    @classmethod
    def from_arrays(cls, arrays: dict[str, Tensor]) -> Stored: ...
    def arrays(self) -> dict[str, Tensor]: ...
    def dequantize(self) -> Tensor: ...


def checked(arrays: dict[str, Tensor], kind: str, dtypes: tuple[torch.dtype, ...], *shape: int) -> Tensor:
    """The array of a kind. Raises KeyError if there is none, ValueError on another dtype or shape; -1 = any length."""
    t = arrays[kind]
    if (
        t.dtype not in dtypes
        or t.ndim != len(shape)
        or any(n not in (-1, m) for n, m in zip(shape, t.shape, strict=True))
    ):
        raise ValueError(f"{kind} is {t.dtype} of shape {tuple(t.shape)}")
    return t


def stored_form(word: str, shared: str = "") -> Callable[[type], type]:
    """Class decorator: artifacts name the form by this word. shared: kind of array that all tensors of a file share."""

    def decorate(cls):
        cls.word, cls.shared = word, shared
        FORMS[word] = cls
        return cls

    return decorate


def form(word: str) -> type[Stored]:
    """The class of a form, loaded from schemes/<word>.py if need be. Raises KeyError or ImportError."""
    if word not in FORMS and re.fullmatch("[a-z][a-z0-9_]*", word):
        importlib.import_module(f"pgolf_core.quantization.schemes.{word}")
    return FORMS[word]


@dataclass(frozen=True)
class Quantized:
    """A state dict as it will be stored: every tensor is in `tensors` or, if kept in float, in `floats`."""

    tensors: dict[str, Stored]
    residuals: dict[str, RankOne | LowRank]  # added to some `tensors`, in the order they were chosen
    floats: dict[str, Tensor]

    def state_dict(self) -> dict[str, Tensor]:
        """float32 tensors as a reader of the file will have them."""
        state = {name: t.float() for name, t in self.floats.items()}
        for name, t in self.tensors.items():
            state[name] = t.dequantize()
            if name in self.residuals:
                state[name] += self.residuals[name].dequantize()
        return state
