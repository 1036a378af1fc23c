"""Stored form of a model ↔ named arrays ↔ artifact file. A reader needs this, and no exporter.

An array is named KIND/PARAMETER, such as q/blocks.0.mlp.fc.weight; one that all tensors share is named KIND/. Integer
tensors and codebooks are known by their kinds; any other stored form is named by its word, in `forms`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from pgolf_core.artifact.codec import ArtifactError
from pgolf_core.artifact.container import Packed, Unpacked, pack_arrays, unpack_arrays
from pgolf_core.quantization.primitives import QuantizedTensor, RankOne
from pgolf_core.quantization.stored import Quantized, form

# Part of the byte account by kind of array; kinds of other stored forms count as weights.
PARTS = {
    **dict.fromkeys(["q", "index"], "weights"),
    **dict.fromkeys(["scale", "rows", "cols", "book"], "scales"),
    **dict.fromkeys(["left", "right", "left_scale", "right_scale"], "residuals"),
    "float": "float tensors",
}
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
    for name, residual in quantized.residuals.items():
        tensors |= {f"{kind}/{name}": t for kind, t in residual.arrays().items()}
    integers = {name: t for name, t in quantized.tensors.items() if isinstance(t, QuantizedTensor)}
    about: dict[str, Any] = {"columns": sorted(name for name, t in integers.items() if t.axis == 1)}
    if groups := {n: r.group for n, r in quantized.residuals.items() if not isinstance(r, RankOne)}:
        about["groups"] = groups
    if forms := {n: t.word for n, t in quantized.tensors.items() if t.word not in ("int", "codebook")}:
        about["forms"] = forms
    return {name: t.contiguous().numpy() for name, t in tensors.items()}, about


def from_arrays(arrays: dict[str, np.ndarray], about: dict[str, Any]) -> Quantized:
    """The inverse of to_arrays. Raises KeyError if something is missing."""
    stored: dict[str, dict[str, torch.Tensor]] = {}  # parameter -> kind -> tensor
    for name, array in arrays.items():
        kind, _, parameter = name.partition("/")
        stored.setdefault(parameter, {})[kind] = torch.from_numpy(array)
    shared = stored.pop("", {})
    quantized = Quantized({}, {}, {})
    for name, own in stored.items():
        if "float" in own:
            quantized.floats[name] = own["float"]
        elif word := about.get("forms", {}).get(name) or ("codebook" if "index" in own else ""):
            quantized.tensors[name] = form(word).from_arrays(own | shared)
        else:
            quantized.tensors[name] = QuantizedTensor.from_arrays(own, name in about["columns"])
        if "left" in own and own["left"].ndim == 1:
            quantized.residuals[name] = RankOne(own["left"], own["right"])
        elif "left" in own:
            from pgolf_core.quantization.lowrank import LowRank  # only a file that has some brings its code

            quantized.residuals[name] = LowRank.from_arrays(own, about["groups"][name])
    return quantized


def pack(quantized: Quantized, codec: str) -> Packed:
    """The artifact's bytes; codec as pack_arrays. Raises ValueError as to_arrays and pack_arrays."""
    arrays, about = to_arrays(quantized)
    return pack_arrays(arrays, {name: part_of(name) for name in arrays}, about, codec)


def unpack(artifact: bytes) -> Quantized:
    """The inverse of pack. Raises ArtifactError."""
    unpacked = unpack_arrays(artifact)
    return from_arrays(unpacked.arrays, unpacked.about)


def read(path: str | Path) -> Unpacked:
    """An artifact file's arrays and byte account. Raises ArtifactError naming the file."""
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"{path}: no such artifact")
    try:
        return unpack_arrays(path.read_bytes())
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error


def load(path: str | Path) -> dict[str, torch.Tensor]:
    """Artifact file -> state dict of float32 tensors. Raises ArtifactError naming the file."""
    unpacked = read(path)
    try:
        return from_arrays(unpacked.arrays, unpacked.about).state_dict()
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError, ImportError) as error:
        raise ArtifactError(f"{path}: its arrays are not those of a model ({error!r})") from error
