"""Bytes of an artifact of drawn weights, really quantised and coded; one block may stand for several alike."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from pgolf_core.artifact.codec import encode
from pgolf_core.artifact.container import pack
from pgolf_core.artifact.format import ACCOUNT, PARTS, Quantized, to_arrays
from pgolf_core.export import code_archive, quantize_tensor, recipe_of, stored_float
from pgolf_core.knobs import ExportConfig
from pgolf_core.parameters import Role, tensor_place
from pgolf_core.quantization.allocation import MAX_REL_STEP
from pgolf_core.quantization.codebook import CodebookTensor
from pgolf_core.quantization.grids import Grid, to_nearest, weighted_grid
from pgolf_core.quantization.lowrank import LowRank
from pgolf_core.quantization.primitives import QuantizedTensor
from pgolf_core.quantization.schemes import Recipe

SAMPLES = {"ans": 1 << 22, "zlib": 1 << 20, "lzma": 1 << 19, "brotli": 1 << 18}  # weights coded: a second of each
# Standard deviation of the logarithm of a row's or column's step under fisher.
FISHER_RMS = 0.45
FISHER_RMS_UNEVEN = 1.2  # rows of embeddings and of mlp.fc, of which many are hardly used
FOLLOW_SIGMA = {"step", "sdclip", "ternary", "float16", "codebook"}  # schemes whose size does not depend on growth


@dataclass(frozen=True)
class Sizes:
    """Sizes of models by the roles of their tensors; each tensor stands copies[name] times in the file."""

    roles: dict[str, Role]
    copies: dict[str, float]
    config: ExportConfig

    def scheme(self, name: str, t: Tensor) -> Recipe:
        """The export's; under allocation=solve the coarsest step sizes there are."""
        role = self.roles[name]
        if self.config.allocation == "solve":
            return Recipe("float16") if role.is_control else Recipe("step", c=MAX_REL_STEP, per="fisher")
        return recipe_of(t, role, self.config)

    def schemes(self, state: dict[str, Tensor]) -> list[Recipe]:
        return [self.scheme(name, t) for name, t in state.items()]

    def parts(self, state: dict[str, Tensor]) -> dict[str, float]:
        """Bytes by part of the artifact."""
        nearest = self.config.model_copy(update={"gptq": False})
        integers: dict[str, QuantizedTensor] = {}
        floats: dict[str, Tensor] = {}
        parts = dict.fromkeys(ACCOUNT, 0.0)
        for name, t in state.items():
            scheme, role = self.scheme(name, t), self.roles[name]
            if scheme.kind == "float16":
                floats[name] = stored_float(t, role, self.config)
            elif scheme.kind == "codebook":
                parts["weights"] += self.copies[name] * t.numel() * _index_bits(scheme) / 8
                parts["scales"] = max(parts["scales"], 2 * scheme.size * scheme.dimension)  # one book for all
            elif scheme.per == "fisher":
                integers[name] = to_nearest(t, _drawn_fisher_grid(t, role, scheme.c))
            else:
                integers[name] = quantize_tensor(name, t, role, scheme, nearest, None)
        arrays, about = to_arrays(Quantized(integers, {}, floats))
        codec = "ans" if self.config.codec == "auto" else self.config.codec  # the smallest for weights without repeats
        for part in sorted({_part(name) for name in arrays}):
            parts[part] += self._coded({n: a for n, a in arrays.items() if _part(n) == part}, codec)
        parts["residuals"] = self._residuals(integers)
        parts["metadata"] = self._metadata(arrays, about, codec)
        return parts

    def _coded(self, arrays: dict[str, np.ndarray], codec: str) -> float:
        """Bytes of the arrays of one part, of all their copies; of many weights the first rows of each are coded."""
        share = min(1.0, SAMPLES[codec] / max(1, sum(a.size for a in arrays.values())))
        alike: dict[float, list[np.ndarray]] = {}
        for name in sorted(arrays):
            array = np.atleast_1d(arrays[name])
            alike.setdefault(self.copies[_tensor(name)] / share, []).append(array[: math.ceil(share * len(array))])
        return sum(factor * len(encode(samples, codec)) for factor, samples in alike.items())

    def _metadata(self, arrays: dict[str, np.ndarray], about: dict, codec: str) -> int:
        """Bytes of a file's header and frame, from the names of all blocks' arrays and one element of each."""
        blocks = {name: tensor_place(name)[0] for name in self.copies}
        present = {block for block in blocks.values() if block is not None}
        first, depth = min(present), round(max(self.copies.values()) * len(present))
        named = {}
        for name, array in arrays.items():
            if blocks[_tensor(name)] in (None, first):
                of = [None] if blocks[_tensor(name)] is None else range(depth)
                named |= {name.replace(f"blocks.{first}.", f"blocks.{i}."): array.reshape(-1)[:1] for i in of}
        return pack(named, {name: _part(name) for name in named}, about, codec).parts["metadata"]

    def _residuals(self, integers: dict[str, QuantizedTensor]) -> float:
        """Bytes of every residual that there could be, or the whole budget: factors of noise hardly compress."""
        if self.config.allocation == "solve":
            return 0.0  # they compete for the bytes that the solver fills anyway
        lines = sum(self.copies[name] * sum(t.q.shape) for name, t in integers.items() if t.q.ndim == 2)
        factors = self.config.int8_residual_rank * self.config.int8_residual_bits / 8 * lines
        return min(self.config.int8_residual_budget_bytes, factors)


def _tensor(array: str) -> str:
    return array.partition("/")[2]


def _part(array: str) -> str:
    return PARTS[array.partition("/")[0]]


def _drawn_fisher_grid(t: Tensor, role: Role, c: float) -> Grid:
    """Steps as uneven as calibration would make them, with sensitivities drawn."""
    generator = torch.Generator().manual_seed(0)
    rows, cols = (torch.randn(n, generator=generator) for n in t.shape)
    uneven = role.kind == "embedding" or role.quantizer == "mlp_in"
    row_rms = FISHER_RMS_UNEVEN if uneven else FISHER_RMS
    return weighted_grid(t, c, torch.exp(-2 * row_rms * rows), torch.exp(-2 * FISHER_RMS * cols))


def _index_bits(scheme: Recipe) -> float:
    """Bits per weight of codebook indices, at most.

    With a price of λ·σ² per bit the table settles where the slope of a Gaussian's distortion, 2·ln 2·D, is λ; an
    entropy-coded table of few dimensions lies 0.2 bit above that D's rate (Gray & Neuhoff 1998, Quantization).
    """
    most = math.log2(scheme.size) / scheme.dimension
    if not scheme.rate_weight:
        return most
    return min(most, max(0.0, 0.5 * math.log2(2 * math.log(2) / scheme.rate_weight)) + 0.2)


def code_bytes(schemes: Iterable[Recipe], config: ExportConfig) -> int:
    """Bytes of the modules that a reader needs; exact, since they do not depend on the weights."""
    return _code_bytes(any(scheme.kind == "codebook" for scheme in schemes), config.low_rank_residuals)


@lru_cache
def _code_bytes(codebook: bool, low_rank: bool) -> int:
    residuals = {"": LowRank(torch.empty(0), torch.empty(0), None, None, 1)} if low_rank else {}
    indices = {"": CodebookTensor(torch.empty(0), torch.empty(0))} if codebook else {}
    return len(code_archive(Quantized({}, residuals, {}, indices)))
