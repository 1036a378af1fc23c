"""The stored form of a model: quantised tensors ↔ named arrays ↔ the file. What a reader needs, and no more."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pgolf_core.artifact.codec import ArtifactError
from pgolf_core.artifact.container import Packed, Unpacked
from pgolf_core.artifact.container import pack as pack_arrays
from pgolf_core.artifact.container import unpack as unpack_arrays
from pgolf_core.quantization.primitives import QuantizedTensor, RankOne

if TYPE_CHECKING:  # a reader whose file has none of these does without their modules
    from pgolf_core.quantization.codebook import Codebook, CodebookTensor
    from pgolf_core.quantization.lowrank import LowRank

# The part of the account that a stored array counts to, by the prefix of its name.
PARTS = {
    "q": "weights",
    "index": "weights",
    "scale": "scales",
    "rows": "scales",
    "cols": "scales",
    "book": "scales",
    "left": "residuals",
    "right": "residuals",
    "left_scale": "residuals",
    "right_scale": "residuals",
    "float": "float tensors",
}
ACCOUNT = (*dict.fromkeys(PARTS.values()), "metadata")


@dataclass(frozen=True)
class Quantized:
    """A state dict as it will be stored; every tensor's name is in one of integers, indices and floats."""

    integers: dict[str, QuantizedTensor]
    residuals: dict[str, "RankOne | LowRank"]  # names are among the integers', in the order they were chosen
    floats: dict[str, Tensor]
    indices: dict[str, "CodebookTensor"] = field(default_factory=dict)
    codebook: "Codebook | None" = None  # of all indices

    def state_dict(self) -> dict[str, Tensor]:
        """float32 tensors as a reader of the file will have them."""
        state = {name: t.float() for name, t in self.floats.items()}
        for name, t in self.integers.items():
            state[name] = t.dequantize()
            if name in self.residuals:
                state[name] += self.residuals[name].dense()
        if self.indices:
            from pgolf_core.quantization.codebook import decode

            state |= {name: decode(t, self.codebook) for name, t in self.indices.items()}
        return state


def to_arrays(quantized: Quantized) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Named arrays, and what they do not say: which scales are of columns, the group of low-rank factors."""
    tensors = {f"float/{name}": t for name, t in quantized.floats.items()}
    for name, t in quantized.integers.items():
        fields = {"q": t.q, "scale": t.scale, "rows": t.row_exponents, "cols": t.col_exponents}
        tensors |= {f"{kind}/{name}": value for kind, value in fields.items() if value is not None}
    for name, t in quantized.indices.items():
        tensors |= {f"index/{name}": t.indices, f"scale/{name}": t.scale}
    if quantized.codebook is not None:
        tensors["book/"] = quantized.codebook.entries
    groups = {}
    for name, residual in quantized.residuals.items():
        if isinstance(residual, RankOne):
            tensors |= {f"left/{name}": residual.left, f"right/{name}": residual.right}
        else:
            tensors |= {f"{kind}/{name}": t for kind, t in residual.arrays().items()}
            groups[name] = residual.group
    about: dict[str, Any] = {"columns": sorted(name for name, t in quantized.integers.items() if t.axis == 1)}
    if groups:
        about["groups"] = groups
    return {name: t.contiguous().numpy() for name, t in tensors.items()}, about


def from_arrays(arrays: dict[str, np.ndarray], about: dict[str, Any]) -> Quantized:
    """The inverse of to_arrays. Raises KeyError where something is missing."""
    stored: dict[str, dict[str, Tensor]] = {kind: {} for kind in PARTS}
    for name, array in arrays.items():
        kind, _, parameter = name.partition("/")
        stored[kind][parameter] = torch.from_numpy(array)
    integers = {}
    for name, q in stored["q"].items():
        scale = stored["scale"][name]
        axis = None if scale.ndim == 0 else int(name in about["columns"])
        integers[name] = QuantizedTensor(q, scale, axis, stored["rows"].get(name), stored["cols"].get(name))
    residuals: dict[str, Any] = {}
    for name, left in stored["left"].items():
        if left.ndim == 1:
            residuals[name] = RankOne(left, stored["right"][name], 0.0)
            continue
        from pgolf_core.quantization.lowrank import LowRank

        fields = {kind: t[name] for kind, t in stored.items() if kind.startswith(("left", "right")) and name in t}
        residuals[name] = LowRank.from_arrays(fields, about["groups"][name])
    if not stored["book"]:
        return Quantized(integers, residuals, stored["float"])
    from pgolf_core.quantization.codebook import Codebook, CodebookTensor

    indices = {name: CodebookTensor(t, stored["scale"][name]) for name, t in stored["index"].items()}
    return Quantized(integers, residuals, stored["float"], indices, Codebook(stored["book"][""]))


def pack(quantized: Quantized, codec: str) -> Packed:
    """The artifact's bytes; codec as container.pack."""
    arrays, about = to_arrays(quantized)
    return pack_arrays(arrays, {name: PARTS[name.partition("/")[0]] for name in arrays}, about, codec)


def read(path: str | Path) -> Unpacked:
    """An artifact file's arrays and account. Raises ArtifactError naming the file."""
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"{path}: no such artifact")
    try:
        return unpack_arrays(path.read_bytes())
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error


def load(path: str | Path) -> dict[str, Tensor]:
    """Artifact file -> state dict of float32 tensors. Raises ArtifactError naming the file."""
    unpacked = read(path)
    try:
        return from_arrays(unpacked.arrays, unpacked.about).state_dict()
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise ArtifactError(f"{path}: its arrays are not those of a model ({error!r})") from error


def unpack(artifact: bytes) -> dict[str, Tensor]:
    """The bytes of an artifact -> state dict of float32 tensors. Raises ArtifactError."""
    unpacked = unpack_arrays(artifact)
    return from_arrays(unpacked.arrays, unpacked.about).state_dict()
