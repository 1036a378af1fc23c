"""ternary: three levels per row."""

from dataclasses import dataclass

from pgolf_core.quantization.schemes import GridScheme
from pgolf_core.scheme import register


@register
@dataclass(frozen=True)
class Ternary(GridScheme):
    word = "ternary"
    usage = "ternary, three levels per row"
    scale_free = True

    def grid(self, w, context):
        """Levels −s, 0, s per row. Weights beyond 0.7 of the row's mean |w| count as large; s is their mean.

        Source: Ternary Weight Networks, Li et al. 2016, https://arxiv.org/abs/1605.04711. Rounding is at s/2, where
        the squared error is least for a given s.
        """
        from pgolf_core.quantization.grids import Grid, stored_scale

        magnitude = w.float().abs()
        large = magnitude > 0.7 * magnitude.mean(1, keepdim=True)
        return Grid(stored_scale((magnitude * large).sum(1) / large.sum(1).clamp_min(1)), 0, 1)
