"""step: a step size of C standard deviations, nothing clipped; per tensor, per row, or weighted by sensitivity."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pgolf_core.quantization.schemes import GridScheme
from pgolf_core.scheme import parse_number, register


@register
@dataclass(frozen=True)
class Step(GridScheme):
    word = "step"
    usage = "step:C, step:C:row or step:C:fisher: C·σ of the tensor, of each row, or finer for more sensitive weights"
    scale_free = True
    c: float
    per: str = "tensor"

    @classmethod
    def from_args(cls, c: str, per: str = "tensor") -> Step:
        if per not in ("tensor", "row", "fisher"):
            raise ValueError(f"{per} is none of tensor, row, fisher")
        return cls(parse_number(c, 1e-4, 100), per)

    @property
    def needs_calibration(self) -> bool:
        return self.per == "fisher"

    def grid(self, w, context):
        """A row's rms is stored as a power of 2^(1/4): one byte, some three bits after entropy coding."""
        from pgolf_core.quantization.grids import exponents, rms, step_grid

        if self.per == "fisher":
            return step_grid(w, self.c, context.row_weight, context.col_weight)
        grid = step_grid(w, self.c)
        return grid if self.per == "tensor" else replace(grid, row_exponents=exponents(rms(w, 1) / rms(w)))
