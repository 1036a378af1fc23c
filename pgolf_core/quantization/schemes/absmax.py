"""absmax, the reference's quantizer: levels up to the largest |w| of each row or column."""

from __future__ import annotations

from dataclasses import dataclass

from pgolf_core.scheme import QuantScheme, parse_int, register


@register
@dataclass(frozen=True)
class Absmax(QuantScheme):
    word = "absmax"
    usage = "absmax or absmax:BITS, the reference's: levels up to the largest |w| of a row or column, BITS 2 to 8"
    stored = "int"
    uses_gptq = True
    bits: int | None = None  # None = as the bits knobs say

    @classmethod
    def from_args(cls, bits: str | None = None) -> Absmax:
        return cls(None if bits is None else parse_int(bits, 2, 8))

    def fit(self, w, context):
        """Any shape; GPTQ rounds to the same levels."""
        from pgolf_core.quantization.grids import Grid
        from pgolf_core.quantization.primitives import quantize

        bits = self.bits or context.bits
        nearest = quantize(w, bits, context.axis)
        if context.factor is None:
            return nearest
        return Grid(nearest.scale, nearest.axis, 2 ** (bits - 1) - 1).round(w, context.factor, context.gptq_block)
