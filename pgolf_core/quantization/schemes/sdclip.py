"""sdclip: equal levels over a range of K standard deviations per row, clipped beyond."""

from __future__ import annotations

from dataclasses import dataclass

from pgolf_core.quantization.schemes import GridScheme
from pgolf_core.scheme import parse_int, parse_number, register


@register
@dataclass(frozen=True)
class SDClip(GridScheme):
    word = "sdclip"
    usage = "sdclip:BITS:K, levels over ±K·σ of each row, BITS 2 to 8"
    scale_free = True
    bits: int
    k: float

    @classmethod
    def from_args(cls, bits: str, k: str) -> SDClip:
        return cls(parse_int(bits, 2, 8), parse_number(k, 0.1, 1000))

    def grid(self, w, context):
        """2^bits − 1 levels per row. Size depends on bits and k, not on how large weights grew."""
        from pgolf_core.quantization.grids import Grid, rms, stored_scale

        qmax = 2 ** (self.bits - 1) - 1
        return Grid(stored_scale(self.k * rms(w, 1) / qmax), 0, qmax)
