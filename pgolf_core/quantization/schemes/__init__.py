"""One scheme per file, named by its word; pgolf_core/scheme.py says what a file holds.

The files here import torch when they fit, not when they are loaded: every config is parsed by them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pgolf_core.scheme import FitContext, QuantScheme

if TYPE_CHECKING:
    from torch import Tensor

    from pgolf_core.quantization.grids import Grid
    from pgolf_core.quantization.primitives import QuantizedTensor


class GridScheme(QuantScheme):
    """A scheme that is a grid; only `grid(w, context)` is left to define."""

    stored = "int"
    uses_gptq = True

    def grid(self, w: Tensor, context: FitContext) -> Grid:
        raise NotImplementedError

    def fit(self, w: Tensor, context: FitContext) -> QuantizedTensor:
        from pgolf_core.quantization.grids import round_to

        return round_to(self.grid(w, context), w, context)
