"""binary: two levels per row."""

from dataclasses import dataclass

from pgolf_core.scheme import QuantScheme, register


@register
@dataclass(frozen=True)
class Binary(QuantScheme):
    word = "binary"
    usage = "binary, two levels per row"
    stored = "int"
    scale_free = True

    def fit(self, w, context):
        """Levels −s and s per row, by the sign; s is the mean |w|, of least squared error.

        Source: XNOR-Net, Rastegari et al. 2016, https://arxiv.org/abs/1603.05279.
        """
        import torch

        from pgolf_core.quantization.grids import stored_scale
        from pgolf_core.quantization.primitives import QuantizedTensor

        levels = torch.where(w < 0, -1, 1).to(torch.int8)
        return QuantizedTensor(levels, stored_scale(w.float().abs().mean(1)), 0)
