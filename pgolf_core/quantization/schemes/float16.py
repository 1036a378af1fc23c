"""float16: not quantized."""

from dataclasses import dataclass

from pgolf_core.scheme import QuantScheme, register


@register
@dataclass(frozen=True)
class Float16(QuantScheme):
    """The exporter keeps the tensor among the float ones."""

    word = "float16"
    usage = "float16, not quantized"
