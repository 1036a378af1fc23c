"""Tensors to few bits and back: schemes, rounding, calibration, the solver."""


def __getattr__(name: str):
    if name == "quantize":  # on first use: configs name schemes without loading torch
        from pgolf_core.quantization.primitives import quantize

        return quantize
    raise AttributeError(f"module 'pgolf_core.quantization' has no attribute {name!r}")
