"""Quantizers: one file each in quantization/schemes/, found by the word that a quantizer knob begins with.

docs/extending.md adds one. This module loads no torch, and a scheme's module is loaded when a knob first names it.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from pgolf_core.quantization.gptq import HessianFactor
    from pgolf_core.quantization.stored import Stored

FOLDER = Path(__file__).parent / "quantization" / "schemes"
SCHEMES: dict[str, type[QuantScheme]] = {}  # word -> class, of the modules loaded so far


class ExportError(ValueError):
    """Weights or knobs that cannot be exported; the message names the tensor or knob and what would be right."""

    @classmethod
    def too_large(cls, name: str) -> ExportError:
        limit = "scales and float tensors end at 65,504; lower matrix_lr or scalar_lr"
        return cls(f"tensor {name}: weights too large to store, {limit}")


@dataclass(frozen=True)
class FitContext:
    """Inputs of a scheme besides a tensor's weights (rows, cols)."""

    bits: int = 8  # bits and axis: for schemes whose knob does not say
    axis: Literal["auto", "row", "col"] = "auto"
    row_weight: Tensor | None = None  # (rows,); error² costs row_weight · col_weight, up to a factor
    col_weight: Tensor | None = None  # (cols,); both None without calibration
    factor: HessianFactor | None = None  # None = round to nearest, else by GPTQ
    gptq_block: int = 128  # columns at a time


class QuantScheme:
    """A way to store weights, with its arguments; a frozen dataclass, so that equal knobs give equal schemes."""

    word: ClassVar[str]
    usage: ClassVar[str]  # how to write the knob; shown when its arguments are wrong
    stored: ClassVar[str] = ""  # word of the stored form of `fit`; '' = the scheme's own
    uses_gptq: ClassVar[bool] = False  # rounds by context.factor if gptq=1
    scale_free: ClassVar[bool] = False  # c·w takes as many bytes as w
    per_model: ClassVar[bool] = False  # tensors share arrays: one scheme of this class per model
    needs_calibration: ClassVar[bool] = False  # or a property, if it depends on the arguments

    @classmethod
    def from_args(cls, *args: str) -> QuantScheme:
        """Build from the text after the word, split at colons. Raises ValueError or TypeError if it does not fit."""
        return cls(*args)

    def fit(self, w: Tensor, context: FitContext) -> Stored:
        """The stored form of w (rows, cols)."""
        raise NotImplementedError

    def fit_all(self, weights: dict[str, Tensor], contexts: dict[str, FitContext]) -> dict[str, Stored]:
        """Stored forms of all tensors of a model with this scheme, by name."""
        return {name: self.fit(w, contexts[name]) for name, w in weights.items()}

    def bits_per_weight(self) -> float | None:
        """Upper bound for the size estimate, without `shared_bytes`; None = fit drawn weights and code them."""
        return None

    def shared_bytes(self) -> int:
        """Bytes of arrays that all tensors share, at most."""
        return 0


def register(cls: type[QuantScheme]) -> type[QuantScheme]:
    """Class decorator: the scheme is then found by its word."""
    cls.stored = cls.stored or cls.word
    SCHEMES[cls.word] = cls
    return cls


def scheme_class(word: str) -> type[QuantScheme]:
    """The class of a word, loaded from quantization/schemes if need be. Raises ValueError that lists all words."""
    words = sorted({module.name for module in pkgutil.iter_modules([str(FOLDER)])} | SCHEMES.keys())
    if word not in words:
        raise ValueError("input should begin with " + ", ".join(words))
    if word not in SCHEMES:
        importlib.import_module(f"pgolf_core.quantization.schemes.{word}")
    return SCHEMES[word]


@cache
def parse_scheme(text: str) -> QuantScheme:
    """The scheme of 'word:argument:argument'. Raises ValueError that says what would be right."""
    word, *args = text.split(":")
    scheme = scheme_class(word)
    try:
        return scheme.from_args(*args)
    except (ValueError, TypeError) as error:
        raise ValueError(f"input should be {scheme.usage}") from error


def parse_number(text: str, low: float, high: float) -> float:
    """The number. Raises ValueError if it is none, or not in low..high."""
    if not low <= (value := float(text)) <= high:
        raise ValueError(f"{text} is not in {low}..{high}")
    return value


def parse_int(text: str, low: int, high: int) -> int:
    """The whole number. Raises ValueError as parse_number."""
    parse_number(text, low, high)
    return int(text)
