"""Bytes of an artifact of drawn weights, really quantised and coded; one block may stand for several alike."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pgolf_core.artifact.codec import encode
from pgolf_core.artifact.container import pack_arrays
from pgolf_core.artifact.format import ACCOUNT, part_of, to_arrays
from pgolf_core.export import fit_context, scheme_of, stored_float
from pgolf_core.knobs import ExportConfig
from pgolf_core.parameters import Role, tensor_place
from pgolf_core.quantization.allocation import MAX_REL_STEP
from pgolf_core.quantization.schemes.step import Step
from pgolf_core.quantization.stored import Quantized
from pgolf_core.scheme import FitContext, QuantScheme

SAMPLES = dict(ans=1 << 22, zlib=1 << 20, lzma=1 << 19, brotli=1 << 18, brotli_shuffle=1 << 18)  # weights coded in 1 s
# Standard deviation of the logarithm of a row's or column's step under fisher.
FISHER_RMS = 0.45
FISHER_RMS_UNEVEN = 1.2  # embeddings and mlp.fc: many rows are hardly used


@dataclass(frozen=True)
class Sizes:
    """Sizes of models by the roles of their tensors; each tensor stands copies[name] times in the file."""

    roles: dict[str, Role]
    copies: dict[str, float]
    config: ExportConfig
    code: int  # bytes of the run's script

    def scheme(self, name: str, t: Tensor) -> QuantScheme | None:
        """The export's, None = float; under allocation=solve the coarsest step sizes there are."""
        role = self.roles[name]
        if self.config.allocation == "solve":
            return None if role.is_control else Step(MAX_REL_STEP, "fisher")
        return scheme_of(t, role, self.config)

    def context(self, name: str, t: Tensor, scheme: QuantScheme) -> FitContext:
        """The export's, but rounding to nearest, and with sensitivities drawn as uneven as calibration finds them."""
        role = self.roles[name]
        if not scheme.needs_calibration:
            return fit_context(name, t, scheme, role, self.config.model_copy(update={"gptq": False}), {})
        generator = torch.Generator().manual_seed(0)
        rows, cols = (torch.randn(n, generator=generator) for n in t.shape)
        uneven = role.kind == "embedding" or role.quantizer_group == "mlp_in"
        row_rms = FISHER_RMS_UNEVEN if uneven else FISHER_RMS
        return FitContext(row_weight=torch.exp(-2 * row_rms * rows), col_weight=torch.exp(-2 * FISHER_RMS * cols))

    def parts(self, state: dict[str, Tensor]) -> dict[str, float]:
        """Bytes by part of the artifact."""
        stored, parts = Quantized({}, {}, {}), dict.fromkeys(ACCOUNT, 0.0)
        for name, t in state.items():
            scheme = self.scheme(name, t)
            if scheme is None:
                stored.floats[name] = stored_float(t, self.roles[name], self.config)
            elif (bits := scheme.bits_per_weight()) is not None:
                parts["weights"] += self.copies[name] * t.numel() * bits / 8
                parts["scales"] = max(parts["scales"], scheme.shared_bytes())
            else:
                stored.tensors.update(scheme.fit_all({name: t}, {name: self.context(name, t, scheme)}))
        arrays, about = to_arrays(stored)
        codec = "ans" if self.config.codec == "auto" else self.config.codec  # the smallest for weights without repeats
        for part in sorted({part_of(name) for name in arrays}):
            parts[part] += self._coded({n: a for n, a in arrays.items() if part_of(n) == part}, codec)
        parts["residuals"] = self._residuals([name for name in stored.tensors if state[name].ndim == 2], state)
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
        first, depth = min(present, default=0), round(max(self.copies.values()) * len(present))
        named = {}
        for name, array in arrays.items():
            if blocks[_tensor(name)] in (None, first):
                of = [None] if blocks[_tensor(name)] is None else range(depth)
                named |= {name.replace(f"blocks.{first}.", f"blocks.{i}."): array.reshape(-1)[:1] for i in of}
        return pack_arrays(named, {name: part_of(name) for name in named}, about, codec).parts["metadata"]

    def _residuals(self, names: list[str], state: dict[str, Tensor]) -> float:
        """Bytes of all possible residuals, or the whole budget: factors of noise hardly compress."""
        if self.config.allocation == "solve":
            return 0.0  # they compete for the bytes that the solver fills
        lines = sum(self.copies[name] * sum(state[name].shape) for name in names)
        factors = self.config.int8_residual_rank * self.config.int8_residual_bits / 8 * lines
        return min(self.config.int8_residual_budget_bytes, factors)


def _tensor(array: str) -> str:
    return array.partition("/")[2]
