"""State dict → artifact file, with an account of every byte. Which tensor is stored how.

Large matrices become integers with steps (`quantize`, `grids`, `gptq`) or indices into a codebook, the rest stays
float; `artifact` is the way back. As the knobs stand by default this is the seed's scheme: absmax int8 under zlib.
"""

import functools
import io
import lzma
import math
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pgolf_core.artifact.format import ACCOUNT, Quantized, pack, to_arrays
from pgolf_core.artifact.format import load as load  # the other half, where users look for it
from pgolf_core.files import atomic_write
from pgolf_core.knobs import ExportConfig
from pgolf_core.model import roles_by_name
from pgolf_core.parameters import Role, roles_for
from pgolf_core.quantization import codebook, grids, schemes
from pgolf_core.quantization.allocation import fit_residual, solve
from pgolf_core.quantization.calibration import Calibration
from pgolf_core.quantization.gptq import factorize_hessian, gptq
from pgolf_core.quantization.lowrank import LowRank, weighted_sq_error
from pgolf_core.quantization.primitives import QuantizedTensor, RankOne, quantize, rank_one
from pgolf_core.quantization.schemes import Recipe

EARLY_BLOCKS = 4  # 'early' in the names of residual modes

# What a reader of an artifact needs: to build the model, decode the file and score it; a test holds the list to what
# Python imports. Where a file has low-rank residuals or a codebook, their modules too.
CODE_MODULES = (
    "__init__",
    "artifact/__init__",
    "artifact/codec",
    "artifact/container",
    "artifact/format",
    "evaluate",
    "files",
    "knobs",
    "layers/__init__",
    "layers/attention",
    "model",
    "parameters",
    "quantization/__init__",
    "quantization/primitives",
    "quantization/schemes",
    "tokens",
)


@dataclass(frozen=True)
class ByteAccount:
    """Bytes by part. parts sum to artifact; total = artifact + code is what the cap is held against."""

    parts: dict[str, int]
    artifact: int
    code: int
    cap: int
    payload: int  # of the arrays before compression
    residual_tensors: tuple[str, ...] = ()
    codecs: dict[str, str] | None = None  # part -> codec

    @property
    def total(self) -> int:
        return self.artifact + self.code

    @property
    def fits(self) -> bool:
        return self.total <= self.cap

    def rows(self) -> dict[str, int]:
        """Part -> bytes, code as a row of its own, then the total."""
        return {**self.parts, "code": self.code, "total": self.total}


def scheme(config: ExportConfig) -> str:
    """A name for logs: 'int8_zlib' for the seed's."""
    if config.allocation == "solve":
        return f"solve_{config.codec}"
    kind = config.quantizer.replace(":", "-")
    kind = f"int{config.weight_quantization_bits}" if kind == "absmax" else kind
    return f"{kind}{'_gptq' if config.gptq else ''}_{config.codec}"


def quantize_state(
    state: dict[str, Tensor],
    config: ExportConfig,
    calibration: Calibration | None = None,
    roles: dict[str, Role] | None = None,
) -> Quantized:
    """Decide for every tensor of the state dict and quantise; residuals by benefit a byte within the budget.

    calibration: needed where config.needs_calibration. roles: of every tensor, as `model.roles` gives them; None =
    by the names of GPT's parameters. Raises ValueError on NaN or infinity, on a cap that allocation=solve cannot
    meet and, as RoleError, on a tensor without a role.
    """
    roles = roles_by_name(state) if roles is None else roles_for(state, roles)
    state = {name: t.detach().cpu() for name, t in state.items()}
    for name, t in state.items():
        if not torch.isfinite(t).all():
            raise ValueError(f"tensor {name} holds NaN or infinity; this checkpoint cannot be exported")
    if config.needs_calibration and calibration is None:
        raise ValueError(
            "these export knobs need calibration: gptq, fisher steps, low-rank residuals, allocation=solve"
        )
    if config.allocation == "solve":
        floats = {name: stored_float(t, roles[name], config) for name, t in state.items() if name not in calibration}
        weights = {name: state[name] for name in calibration}
        return solve(weights, floats, calibration, config, lambda quantized: len(code_archive(quantized)))
    recipes = {name: recipe_of(t, roles[name], config) for name, t in state.items()}
    floats = {n: stored_float(t, roles[n], config) for n, t in state.items() if recipes[n].kind == "float16"}
    by_codebook = {n: r for n, r in recipes.items() if r.kind == "codebook"}
    if len(set(by_codebook.values())) > 1:
        raise ValueError(f"one codebook at a time: {', '.join(sorted({str(r) for r in by_codebook.values()}))}")
    book, indices = None, {}
    for shared in set(by_codebook.values()):
        book = codebook.learn([state[name] for name in by_codebook], shared.size, shared.dimension, shared.rate_weight)
        indices = {name: codebook.encode(state[name], book, shared.rate_weight) for name in by_codebook}
    integers = {
        name: quantize_tensor(name, state[name], roles[name], r, config, calibration)
        for name, r in recipes.items()
        if name not in floats and name not in indices
    }
    orders = neuron_permutations(integers) if config.mlp_permutation else {}
    integers |= {name: _reorder(integers[name], *order) for name, order in orders.items()}
    weights = {n: state[n].index_select(orders[n][1], orders[n][0]) if n in orders else state[n] for n in integers}
    return Quantized(integers, _choose_residuals(weights, integers, roles, config, calibration), floats, indices, book)


def recipe_of(t: Tensor, role: Role, config: ExportConfig) -> Recipe:
    """How the knobs say that this tensor is to be stored; float16 stands for float32 too, where that is kept."""
    if t.numel() <= config.keep_float_max_numel or role.is_control:
        return Recipe("float16")
    if t.ndim != 2:
        return Recipe("absmax")
    chosen = schemes.parse_scheme(
        (role.quantizer and getattr(config, f"{role.quantizer}_quantizer")) or config.quantizer
    )
    if chosen.kind == "absmax" and not chosen.bits and role.kind == "embedding" and config.embed_bits == 16:
        return Recipe("float16")
    return chosen


def stored_float(t: Tensor, role: Role, config: ExportConfig) -> Tensor:
    dtype = getattr(torch, config.control_dtype) if role.is_control else torch.float16
    return t.to(dtype).contiguous()


def quantize_tensor(
    name: str, w: Tensor, role: Role, r: Recipe, config: ExportConfig, calibration: Calibration | None
) -> QuantizedTensor:
    """One tensor by its recipe, rounded to nearest or by GPTQ."""
    bits = r.bits or (config.embed_bits if role.kind == "embedding" else config.weight_quantization_bits)
    statistics = calibration.get(name) if calibration else None
    if r.kind == "absmax" and not (config.gptq and statistics):
        return quantize(w, bits, config.int8_axis_mode)
    by_fisher = r.per == "fisher"
    order = None
    if config.gptq or by_fisher:
        if statistics is None:
            raise ValueError(f"tensor {name} was not seen in calibration, which gptq and fisher steps need")
        order = factorize_hessian(statistics.hessian, config.gptq_damp, config.gptq_act_order)
    match r.kind:
        case "absmax":
            grid = grids.absmax_grid(w, bits, config.int8_axis_mode)
        case "sdclip":
            grid = grids.sdclip_grid(w, bits, r.k)
        case "ternary":
            grid = grids.ternary_grid(w)
        case "step" if by_fisher:
            grid = grids.weighted_grid(w, r.c, statistics.row_weight, order.column_weight)
        case "step":
            grid = grids.step_grid(w, r.c, r.per)
    if config.gptq:
        return grid.with_levels(gptq(w, grid.step_size(), order, grid.qmax, config.gptq_block))
    return grids.to_nearest(w, grid)


def _choose_residuals(
    state: dict[str, Tensor],
    integers: dict[str, QuantizedTensor],
    roles: dict[str, Role],
    config: ExportConfig,
    calibration: Calibration | None,
) -> dict[str, RankOne | LowRank]:
    """The residuals that fit the budget, taken by (priority, benefit a byte, benefit), largest first.

    Rank 1 in float16 is the reference's; any other is low-rank, its benefit in calibrated cost.
    """
    if not (config.int8_residual_rank and config.int8_residual_budget_bytes):
        return {}
    mode = config.int8_targeted_residual_mode
    fitted: list[tuple[str, RankOne | LowRank, int, float]] = []
    for name, t in integers.items():
        if t.q.ndim != 2 or not _is_candidate(roles[name], mode):
            continue
        residual = state[name].float() - t.dequantize()
        fitted.append((name, *_fit(name, residual, config, calibration)))
    prioritised = mode == "early_proj_combo"
    fitted.sort(
        key=lambda entry: (
            prioritised and _is_early(roles[entry[0]], "attn_out", "mlp_out"),
            entry[3] / entry[2],
            entry[3],
        ),
        reverse=True,
    )
    chosen: dict[str, RankOne | LowRank] = {}
    left = config.int8_residual_budget_bytes
    for name, fit, size, benefit in fitted:
        if benefit > 0 and size <= left:
            chosen[name] = fit
            left -= size
    return chosen


def _fit(
    name: str, residual: Tensor, config: ExportConfig, calibration: Calibration | None
) -> tuple[RankOne | LowRank, int, float]:
    """A residual's stored form, its bytes before compression, and what it wins."""
    if not config.low_rank_residuals:
        fit = rank_one(residual, config.int8_residual_power_iters)
        return fit, fit.bytes, fit.benefit
    statistics = calibration.get(name) if calibration else None
    fit, size = fit_residual(residual, statistics, config)
    hessian, row_weight = (statistics.hessian, statistics.row_weight) if statistics else (None, None)
    before, after = (weighted_sq_error(r, hessian, row_weight) for r in (residual, residual - fit.dense()))
    return fit, size, before - after


def _is_early(role: Role, *quantizers: str) -> bool:
    return role.quantizer in quantizers and role.block is not None and role.block < EARLY_BLOCKS


def _is_candidate(role: Role, mode: str) -> bool:
    """The reference's variants restrict who may have a residual; off and early_proj_combo let all compete."""
    match mode:
        case "all_mlp_proj":
            return role.quantizer == "mlp_out"
        case "all_attn_proj":
            return role.quantizer == "attn_out"
        case "early_mlp_proj":
            return _is_early(role, "mlp_out")
        case "early_combo":
            return _is_early(role, "attn_out", "mlp_out")
    return True


def neuron_permutations(integers: dict[str, QuantizedTensor]) -> dict[str, tuple[Tensor, int]]:
    """Name -> (order, axis) that sorts each block's hidden units, so that alike rows are neighbours.

    Applied to both matrices of an MLP it leaves the function as it is, and zlib needs fewer bytes.
    """
    orders = {}
    for fc in integers:
        if match := re.fullmatch(r"(blocks\.\d+\.mlp\.)fc\.weight", fc):
            proj = match[1] + "proj.weight"
            if proj in integers:
                order = _neuron_permutation(integers[fc], integers[proj])
                orders |= {fc: (order, 0), proj: (order, 1)}
    return orders


def _neuron_permutation(fc: QuantizedTensor, proj: QuantizedTensor) -> Tensor:
    """(hidden,) indices by (fc scale, proj scale, Σ|q| of fc row, of proj column, four entries of the row)."""
    hidden, width = fc.q.shape
    keys = [
        fc.scale.float() if fc.axis == 0 else torch.zeros(hidden),
        proj.scale.float() if proj.axis == 1 else torch.zeros(hidden),
        fc.q.abs().sum(dim=1),
        proj.q.abs().sum(dim=0),
        *(fc.q[:, i] for i in range(0, width, math.ceil(width / 4))),
    ]
    order = torch.arange(hidden)
    for key in reversed(keys):  # stable sorts from the last key to the first make a lexicographic one
        order = order[torch.argsort(key[order], stable=True)]
    return order


def _reorder(t: QuantizedTensor, order: Tensor, axis: int) -> QuantizedTensor:
    exponents = {"row_exponents": t.row_exponents, "col_exponents": t.col_exponents}
    turned = "col_exponents" if axis else "row_exponents"
    if exponents[turned] is not None:
        exponents[turned] = exponents[turned][order]
    scale = t.scale[order] if t.axis == axis else t.scale
    return QuantizedTensor(t.q.index_select(axis, order).contiguous(), scale, t.axis, **exponents)


def export(
    state: dict[str, Tensor],
    config: ExportConfig,
    path: str | Path,
    calibration: Calibration | None = None,
    roles: dict[str, Role] | None = None,
) -> ByteAccount:
    """Quantise, write the artifact in one move, account for its bytes. Arguments and errors as quantize_state."""
    quantized = quantize_state(state, config, calibration, roles)
    packed = pack(quantized, config.codec)
    code = len(code_archive(quantized))
    atomic_write(path, packed.bytes)
    return ByteAccount(
        parts={part: packed.parts.get(part, 0) for part in ACCOUNT},
        artifact=len(packed.bytes),
        code=code,
        cap=config.cap_bytes,
        payload=sum(array.nbytes for array in to_arrays(quantized)[0].values()),
        residual_tensors=tuple(quantized.residuals),
        codecs=packed.codecs,
    )


def code_archive(quantized: Quantized | None = None) -> bytes:
    """The modules that a reader of this model needs, as an lzma-compressed archive; the same bytes on every machine."""
    modules = CODE_MODULES
    if quantized is not None:
        modules += ("quantization/codebook",) if quantized.indices else ()
        modules += (
            ("quantization/lowrank",) if any(isinstance(r, LowRank) for r in quantized.residuals.values()) else ()
        )
    return _archive(modules)


@functools.cache
def _archive(modules: tuple[str, ...]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for module in modules:
            source = (Path(__file__).parent / f"{module}.py").read_bytes().replace(b"\r\n", b"\n")
            entry = tarfile.TarInfo(f"pgolf_core/{module}.py")
            entry.size = len(source)
            archive.addfile(entry, io.BytesIO(source))
    return lzma.compress(buffer.getvalue(), preset=9 | lzma.PRESET_EXTREME)
