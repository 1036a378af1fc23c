"""State dict → artifact file, with an account of every byte.

A tensor stays float (small ones, control tensors) or is stored by the scheme that the quantizer knobs name;
`artifact` is the way back. With the default knobs this is the reference's format: absmax int8 under zlib.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from pgolf_core.artifact.container import Packed
from pgolf_core.artifact.format import ACCOUNT, pack, to_arrays
from pgolf_core.artifact.format import load as load  # the inverse of `export`, and a stable entry point here
from pgolf_core.files import atomic_write
from pgolf_core.knobs import ExportConfig
from pgolf_core.model import roles_by_name
from pgolf_core.parameters import Role, roles_for
from pgolf_core.quantization.allocation import solve
from pgolf_core.quantization.calibration import Calibration
from pgolf_core.quantization.gptq import factorize_hessian
from pgolf_core.quantization.learning import Teacher
from pgolf_core.quantization.permutation import neuron_permutations, permute
from pgolf_core.quantization.residuals import choose_residuals
from pgolf_core.quantization.schemes.absmax import Absmax
from pgolf_core.quantization.schemes.float16 import Float16
from pgolf_core.quantization.stored import Quantized, Stored
from pgolf_core.scheme import ExportError, FitContext, QuantScheme, parse_scheme

State = dict[str, Tensor]
Roles = dict[str, Role] | None  # None = by the names of GPT's parameters


@dataclass(frozen=True)
class ByteAccount:
    """Bytes by part. parts sum to artifact; total = artifact + code is compared with the cap."""

    parts: dict[str, int]
    artifact: int
    code: int
    cap: int
    payload: int  # bytes of the arrays before compression
    residual_tensors: tuple[str, ...] = ()
    codecs: dict[str, str] | None = None  # part -> codec

    @property
    def total(self) -> int:
        return self.artifact + self.code

    @property
    def fits(self) -> bool:
        return self.total <= self.cap

    def rows(self) -> dict[str, int]:
        return {**self.parts, "code": self.code, "total": self.total}


def export_name(config: ExportConfig) -> str:
    """A name for logs: 'int8_zlib' for the reference's format."""
    if config.allocation == "solve":
        return f"solve_{config.codec}"
    absmax = config.quantizer == "absmax"
    kind = f"int{config.weight_quantization_bits}" if absmax else config.quantizer.replace(":", "-")
    return f"{kind}{'_gptq' if config.gptq else ''}_{config.codec}"


def export(
    state: State, config: ExportConfig, path: str | Path, calibration: Calibration | None = None, roles: Roles = None,
    teacher: Teacher | None = None, code_bytes: int = 0,
) -> ByteAccount:  # fmt: skip
    """Quantize, write the artifact in one move, account for its bytes. Arguments and errors as quantize_state.

    teacher: needed if config.learn_steps. code_bytes: of what has to ship with the file; cap_bytes includes them.
    """
    quantized, packed = write_artifact(state, config, path, calibration, roles, teacher, code_bytes)
    return ByteAccount(
        parts={part: packed.parts.get(part, 0) for part in ACCOUNT},
        artifact=len(packed.bytes),
        code=code_bytes,
        cap=config.cap_bytes,
        payload=sum(array.nbytes for array in to_arrays(quantized)[0].values()),
        residual_tensors=tuple(quantized.residuals),
        codecs=packed.codecs,
    )


def write_artifact(
    state: State, config: ExportConfig, path: str | Path, calibration: Calibration | None = None, roles: Roles = None,
    teacher: Teacher | None = None, code_bytes: int = 0,
) -> tuple[Quantized, Packed]:  # fmt: skip
    """Quantize and write the artifact in one move; returns both forms. Arguments and errors as export."""
    if config.learn_steps and teacher is None:
        raise ExportError(f"learn_steps={config.learn_steps} needs the model and training text")
    quantized, packed = _quantize(state, config, calibration, roles, teacher, code_bytes)
    packed = packed or pack(quantized, config.codec)
    atomic_write(path, packed.bytes)
    return quantized, packed


def quantize_state(
    state: State, config: ExportConfig, calibration: Calibration | None = None, roles: Roles = None
) -> Quantized:
    """The stored form of a state dict, residuals included, before learn_steps.

    calibration: needed if config.needs_calibration. roles: of every tensor, as `model.roles` gives them. Raises
    ExportError on NaN, infinity and weights too large for float16 scales, AllocationError on a cap that
    allocation=solve cannot meet, RoleError on a tensor without a role.
    """
    return _quantize(state, config, calibration, roles)[0]


def _quantize(
    state: State,
    config: ExportConfig,
    calibration: Calibration | None,
    roles: Roles,
    teacher: Teacher | None = None,
    code_bytes: int = 0,
) -> tuple[Quantized, Packed | None]:
    """The stored form as quantize_state gives it, and its file if it was packed on the way."""
    roles = _all_roles(state, roles)
    state = {name: t.detach().cpu() for name, t in state.items()}
    if broken := [name for name, t in state.items() if not torch.isfinite(t).all()]:
        raise ExportError(f"tensor {broken[0]} holds NaN or infinity; this checkpoint cannot be exported")
    if broken := [name for name, s in (calibration or {}).items() if not torch.isfinite(s.hessian).all()]:
        raise ExportError.too_large(broken[0])
    if config.needs_calibration and calibration is None:
        needs = "gptq, fisher steps, low-rank residuals, allocation=solve"
        raise ExportError(f"these export knobs need calibration: {needs}")
    last: tuple[Quantized | None, Packed | None] = None, None

    def file_bytes(quantized: Quantized) -> int:
        nonlocal last
        last = quantized, pack(quantized, config.codec)
        return len(last[1].bytes) + code_bytes

    if config.allocation == "solve":
        floats = {name: stored_float(t, roles[name], config) for name, t in state.items() if name not in calibration}
        quantized = solve({name: state[name] for name in calibration}, floats, calibration, config, file_bytes)
    else:
        quantized = _quantize_fixed(state, config, calibration, roles)
    if config.learn_steps and teacher is not None:
        quantized = teacher.learn(_storable(quantized), config, file_bytes)
    return _storable(quantized), last[1] if last[0] is quantized else None


def _quantize_fixed(state: State, config: ExportConfig, calibration: Calibration | None, roles: Roles) -> Quantized:
    """The stored form by the quantizer knobs; arguments as quantize_state, of tensors on the CPU."""
    schemes = {name: scheme_of(t, roles[name], config) for name, t in state.items()}
    floats = {name: stored_float(t, roles[name], config) for name, t in state.items() if schemes[name] is None}
    weights = {name: t for name, t in state.items() if name not in floats}
    tensors = _fit(weights, schemes, roles, config, calibration or {})
    _storable(Quantized(tensors, {}, floats))  # residuals are fitted to finite errors
    if config.mlp_permutation:
        for name, (order, axis) in neuron_permutations(tensors).items():
            weights[name] = weights[name].index_select(axis, order)
            tensors[name] = permute(tensors[name], order, axis)  # type: ignore[arg-type, assignment]
    return Quantized(tensors, choose_residuals(weights, tensors, roles, config, calibration), floats)


def _all_roles(state: State, roles: Roles) -> dict[str, Role]:
    return roles_by_name(state) if roles is None else roles_for(state, roles)


def _storable(quantized: Quantized) -> Quantized:
    """The same. ExportError naming a tensor with a number that float16 could not hold."""
    arrays = {name: (t,) for name, t in quantized.floats.items()}
    for stored in (quantized.tensors, quantized.residuals):
        arrays |= {name: (*arrays.get(name, ()), *form.arrays().values()) for name, form in stored.items()}
    for name, own in arrays.items():
        if not all(torch.isfinite(t).all() for t in own):
            raise ExportError.too_large(name)
    return quantized


def scheme_of(t: Tensor, role: Role, config: ExportConfig) -> QuantScheme | None:
    """The scheme that the knobs name for this tensor; None = it stays float."""
    if t.numel() <= config.keep_float_max_numel or role.is_control:
        return None
    if t.ndim != 2:
        return Absmax()
    own = config.own_quantizers and role.quantizer_group and getattr(config, f"{role.quantizer_group}_quantizer")
    chosen = parse_scheme(own or config.quantizer)
    float_embedding = chosen == Absmax() and role.kind == "embedding" and config.embed_bits == 16
    return None if float_embedding or isinstance(chosen, Float16) else chosen


def stored_float(t: Tensor, role: Role, config: ExportConfig) -> Tensor:
    """The tensor in the float type that the knobs name."""
    dtype = getattr(torch, config.control_dtype) if role.is_control else torch.float16
    return t.to(dtype).contiguous()


def _fit(
    weights: State, schemes: dict[str, QuantScheme | None], roles: Roles, config: ExportConfig, calibration: Calibration
) -> dict[str, Stored]:
    """All tensors in their stored forms, in the order of weights."""
    stored: dict[str, Stored] = {}
    used = dict.fromkeys(schemes[name] for name in weights)
    for scheme in used:
        if scheme.per_model and sum(type(other) is type(scheme) for other in used) > 1:
            raise ExportError(f"one {scheme.word} per model: the tensors with it share its arrays; use equal arguments")
        own = {name: w for name, w in weights.items() if schemes[name] == scheme}
        contexts = {name: fit_context(name, w, scheme, roles[name], config, calibration) for name, w in own.items()}
        stored |= scheme.fit_all(own, contexts)
    return {name: stored[name] for name in weights}


def fit_context(
    name: str, w: Tensor, scheme: QuantScheme, role: Role, config: ExportConfig, calibration: Calibration
) -> FitContext:
    """Inputs of the scheme for this tensor. Raises ExportError if it needs statistics and there are none."""
    bits = config.embed_bits if role.kind == "embedding" else config.weight_quantization_bits
    context = FitContext(bits, config.int8_axis_mode, gptq_block=config.gptq_block)
    gptq = config.gptq and scheme.uses_gptq and w.ndim == 2
    if not gptq and not scheme.needs_calibration:
        return context
    if (statistics := calibration.get(name)) is None:
        raise ExportError(f"tensor {name} was not seen in calibration, which gptq and fisher steps need")
    factor = factorize_hessian(statistics.hessian, config.gptq_damp, config.gptq_act_order)
    rows, cols = statistics.row_weight, factor.column_weight
    return replace(context, row_weight=rows, col_weight=cols, factor=factor if gptq else None)
