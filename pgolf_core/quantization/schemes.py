"""How a tensor is to be quantised, as a knob says it: 'absmax', 'sdclip:6:12.5', 'step:0.4', 'codebook:256:2' …"""

from dataclasses import dataclass

# What each needs after its name, as the user reads it.
FORMS = {
    "absmax": "absmax or absmax:BITS, the reference's: levels up to the largest |w| of a row or column, BITS 2 to 8",
    "sdclip": "sdclip:BITS:K, levels over ±K·σ of each row, BITS 2 to 8",
    "step": "step:C, step:C:row or step:C:fisher: of C·σ of the tensor, of each row, or finer where it pays",
    "ternary": "ternary, three levels a row",
    "codebook": "codebook:SIZE:DIMENSION or codebook:SIZE:DIMENSION:RATE, one table of up to SIZE ≤ 4096 vectors of "
    "weights for all tensors that have it; RATE prices a bit in σ² (0.06 suits 2.5 bits a weight)",
    "float16": "float16, not quantised",
}


@dataclass(frozen=True)
class Recipe:
    kind: str
    bits: int = 0  # of absmax and sdclip; 0 = as the bits knobs say
    c: float = 0.0  # of step, in σ
    per: str = "tensor"  # of step: tensor, row, fisher
    k: float = 0.0  # of sdclip, in σ
    size: int = 0  # of codebook
    dimension: int = 0
    rate_weight: float = 0.0

    @property
    def needs_calibration(self) -> bool:
        return self.per == "fisher"


def parse_scheme(text: str) -> Recipe:
    """Raises ValueError that says what would be right."""
    kind, *rest = text.split(":")
    if kind not in FORMS:
        raise ValueError("input should begin with " + ", ".join(FORMS))
    try:
        match kind, rest:
            case ("absmax", []) | ("ternary", []) | ("float16", []):
                return Recipe(kind)
            case "absmax", [bits]:
                return Recipe(kind, bits=_between(int(bits), 2, 8))
            case "sdclip", [bits, k]:
                return Recipe(kind, bits=_between(int(bits), 2, 8), k=_between(float(k), 0.1, 1000))
            case "step", [c]:
                return Recipe(kind, c=_between(float(c), 1e-4, 100))
            case "step", [c, ("tensor" | "row" | "fisher") as per]:
                return Recipe(kind, c=_between(float(c), 1e-4, 100), per=per)
            case "codebook", [size, dimension]:
                return Recipe(kind, size=_between(int(size), 2, 4096), dimension=_between(int(dimension), 1, 16))
            case "codebook", [size, dimension, rate]:
                of = {"size": _between(int(size), 2, 4096), "dimension": _between(int(dimension), 1, 16)}
                return Recipe(kind, **of, rate_weight=_between(float(rate), 0, 10))
    except ValueError:
        pass
    raise ValueError(f"input should be {FORMS[kind]}")


def _between(value: float, low: float, high: float) -> float:
    if not low <= value <= high:
        raise ValueError
    return value
