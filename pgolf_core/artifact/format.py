"""Stored form of a model ↔ named arrays ↔ artifact file. A reader needs this, and no exporter.

An array is named KIND/PARAMETER, such as q/blocks.0.mlp.fc.weight; one that all tensors share is named KIND/. Integer
tensors and codebooks are known by their kinds; any other stored form is named by its word, in `forms`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pgolf_core.artifact.codec import ArtifactError
from pgolf_core.artifact.container import (
    PREAMBLE,
    Packed,
    Unpacked,
    check_preamble,
    decoded_limit,
    pack_arrays,
    unpack_arrays,
)
from pgolf_core.quantization.primitives import QuantizedTensor, RankOne
from pgolf_core.quantization.stored import FLOATS, Quantized, checked, form

# Part of the byte account by kind of array; kinds of other stored forms count as weights.
PARTS = {
    **dict.fromkeys(["q", "index"], "weights"),
    **dict.fromkeys(["scale", "rows", "cols", "book"], "scales"),
    **dict.fromkeys(["left", "right", "left_scale", "right_scale"], "residuals"),
    "float": "float tensors",
}
MAX_SUM = 2.0**48  # of the magnitudes of an array of scales or factors: no product of them overflows float32
ACCOUNT = (*dict.fromkeys(PARTS.values()), "metadata")


def part_of(array: str) -> str:
    """Part of the byte account of an array, by its name."""
    return PARTS.get(array.partition("/")[0], "weights")


def to_arrays(quantized: Quantized) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Named arrays, and what they do not say.

    columns: tensors with one scale per column; groups: of low-rank residuals; forms: word of a tensor's stored form.
    Raises ValueError on a form whose arrays would be read as another's, and on shared arrays that differ.
    """
    tensors = {f"float/{name}": t for name, t in quantized.floats.items()}
    for name, t in quantized.tensors.items():
        for kind, array in t.arrays().items():
            if PARTS.get(kind) in ("residuals", "float tensors"):
                raise ValueError(f"{t.word}: kind {kind} is read as another form's; name the array otherwise")
            key = f"{kind}/" if kind == t.shared else f"{kind}/{name}"
            if key in tensors and not torch.equal(tensors[key], array):
                raise ValueError(f"{key} is shared by all tensors of a file, and that of {name} is another")
            tensors[key] = array
    integers = {name: t for name, t in quantized.tensors.items() if isinstance(t, QuantizedTensor)}
    about: dict[str, Any] = {"columns": sorted(name for name, t in integers.items() if t.axis == 1)}  # type: ignore[attr-defined]
    _note_residuals(quantized, tensors, about)
    _note_forms(quantized, about)
    return {name: t.contiguous().numpy() for name, t in tensors.items()}, about


def _note_residuals(quantized: Quantized, tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
    """Add residuals to tensors, and what they do not say to about."""
    for name, residual in quantized.residuals.items():
        tensors |= {f"{kind}/{name}": t for kind, t in residual.arrays().items()}
    if groups := {n: r.group for n, r in quantized.residuals.items() if not isinstance(r, RankOne)}:
        about["groups"] = groups


def _note_forms(quantized: Quantized, about: dict[str, Any]) -> None:
    if forms := {n: t.word for n, t in quantized.tensors.items() if t.word not in ("int", "codebook")}:
        about["forms"] = forms


def from_arrays(arrays: dict[str, np.ndarray], about: dict[str, Any]) -> Quantized:
    """The inverse of to_arrays; dequantizes nothing.

    Raises KeyError, TypeError, ValueError … on whatever to_arrays would not have made, with finite numbers.
    """
    stored: dict[str, dict[str, torch.Tensor]] = {}  # parameter -> kind -> tensor
    for name, array in arrays.items():
        kind, _, parameter = name.partition("/")
        t = stored.setdefault(parameter, {})[kind] = torch.from_numpy(array)
        if t.is_floating_point() and not t.abs().sum(dtype=torch.float64) < (math.inf if kind == "float" else MAX_SUM):
            raise ValueError(f"{name[:80]} holds NaN, infinity or numbers as large")
    shared, columns = stored.pop("", {}), set(about["columns"])
    quantized = Quantized({}, {}, {})
    for name, own in stored.items():
        try:
            _read_tensor(quantized, name, own, shared, name in columns, about)
        except (KeyError, ValueError) as error:
            raise ValueError(f"{name[:80]}: {str(error)[:80]}") from error
    used = {t.shared for t in quantized.tensors.values()}
    noted = {*about.get("forms", ()), *columns} - quantized.tensors.keys()
    noted |= {*about.get("groups", ())} - quantized.residuals.keys() | about.keys() - {"columns", "forms", "groups"}
    if strays := shared.keys() - used | noted:
        raise ValueError(f"no tensor has {min(strays)[:80]}")
    return quantized


def _bounded(quantized: Quantized, size: int) -> Quantized:
    """The model of a file of `size` bytes. Raises ValueError if dequantizing it takes more than weights can take."""
    sizes = [math.prod(getattr(t, "shape", ())) for t in quantized.tensors.values()]
    work = [r.left.numel() * r.shape[1] for r in quantized.residuals.values()]
    if max(sum(sizes), sum(work) // 32) > decoded_limit(size):
        raise ValueError("more numbers than a file of its size can mean")
    return quantized


def _read_tensor(
    quantized: Quantized, name: str, own: dict[str, torch.Tensor], shared: dict, axis_1: bool, about: dict[str, Any]
) -> None:
    """Add a parameter of these arrays to the model. Errors as from_arrays."""
    if "float" in own:
        quantized.floats[name] = checked(own, "float", FLOATS, *own["float"].shape)
        known: Any = {"float"}
    else:
        word = _word_of(name, own, about)
        t = form(word).from_arrays(own | shared) if word else QuantizedTensor.from_arrays(own, axis_1)
        quantized.tensors[name], known = t, t.arrays().keys()  # type: ignore[assignment]
    if "left" in own:
        known = {*known, *_read_residual(quantized, name, own, about)}
    if strays := own.keys() - known:
        raise ValueError(f"no tensor has {min(strays)[:80]}")


def _read_residual(quantized: Quantized, name: str, own: dict[str, torch.Tensor], about: dict[str, Any]) -> Iterable:
    """Add the residual of a parameter to the model; returns the kinds of its arrays."""
    if own["left"].ndim == 1:
        residual: RankOne | LowRank = RankOne.from_arrays(own)
    else:
        from pgolf_core.quantization.lowrank import LowRank  # only a file that has some brings its code

        residual = LowRank.from_arrays(own, about["groups"][name])
    if getattr(quantized.tensors[name], "shape", residual.shape) != residual.shape:
        raise ValueError(f"residual is of shape {residual.shape}")
    quantized.residuals[name] = residual
    return residual.arrays()


def _word_of(name: str, own: dict[str, torch.Tensor], about: dict[str, Any]) -> str:
    """Word of a tensor's stored form; '' = integers."""
    return about.get("forms", {}).get(name) or ("codebook" if "index" in own else "")


def pack(quantized: Quantized, codec: str) -> Packed:
    """The artifact's bytes; codec as pack_arrays. Raises ValueError as to_arrays and pack_arrays."""
    arrays, about = to_arrays(quantized)
    packed = pack_arrays(arrays, {name: part_of(name) for name in arrays}, about, codec)
    _bounded(quantized, len(packed.bytes))
    return packed


def read(path: str | Path) -> Unpacked:
    """A model's arrays and byte account. Raises ArtifactError naming the file."""
    return _read(path)[0]


def read_model(path: str | Path) -> Quantized:
    """A model as it is stored. Raises ArtifactError naming the file."""
    return _read(path)[1]


def load(path: str | Path) -> dict[str, torch.Tensor]:
    """Artifact file -> state dict of float32 tensors. Raises ArtifactError naming the file."""
    return _read(path, Quantized.state_dict)[1]


def _read(path: str | Path, use: Callable[[Quantized], Any] | None = None) -> tuple[Unpacked, Any]:
    """A file's arrays, and what `use` makes of their model.

    The kind of file is looked at before it is opened, its first bytes and its length before the rest is read.
    """
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"{path}: " + ("not a regular file" if path.exists() else "no such artifact"))
    try:
        with path.open("rb") as f:
            check_preamble(f.read(PREAMBLE.size), path.stat().st_size)
            f.seek(0)
            unpacked = unpack_arrays(f.read())
        return unpacked, _model(unpacked, use)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error


def _model(unpacked: Unpacked, use: Callable[[Quantized], Any] | None = None) -> Any:
    try:
        quantized = _bounded(from_arrays(unpacked.arrays, unpacked.about), sum(unpacked.parts.values()))
        return use(quantized) if use else quantized
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, ImportError) as error:
        raise ArtifactError(f"its arrays are not those of a model ({repr(error)[:200]})") from error
