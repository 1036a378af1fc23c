"""State dict → artifact file → state dict, with an account of every byte. Scheme `int8_zlib`.

Large matrices become integers with one float16 scale a row or column, the rest stays float; the tensors
are written as safetensors and compressed by zlib. Nothing is pickled, so nothing in a file can run.
"""

import io
import json
import lzma
import math
import re
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from pgolf_core.config import ExportConfig
from pgolf_core.files import write_whole
from pgolf_core.model import is_control
from pgolf_core.quantize import QuantizedTensor, RankOne, quantize, rank_one

SCHEME = "int8_zlib"
KEEP_FLOAT_MAX_NUMEL = 65_536  # tensors up to this many elements stay float
EARLY_BLOCKS = 4  # 'early' in the names of residual modes

# What a reader of an artifact needs: to build the model, decode the file and score it. A test holds the list
# to what Python imports.
CODE_MODULES = ("__init__", "config", "data", "evaluate", "export", "files", "model", "quantize")

# The part of the account that a stored tensor counts to, by the prefix of its name.
PARTS = {
    "q": "weights",
    "scale": "scales",
    "left": "residuals",
    "right": "residuals",
    "float": "float tensors",
}


class ArtifactError(ValueError):
    """A file that is no artifact of ours, or a damaged one."""


@dataclass(frozen=True)
class Quantized:
    """A state dict as it will be stored."""

    integers: dict[str, QuantizedTensor]
    residuals: dict[str, RankOne]  # names are among the integers', in the order they were chosen
    floats: dict[str, Tensor]

    def state_dict(self) -> dict[str, Tensor]:
        """float32 tensors as a reader of the file will have them."""
        state = {name: t.float() for name, t in self.floats.items()}
        for name, t in self.integers.items():
            state[name] = t.dequantize()
            if name in self.residuals:
                state[name] += self.residuals[name].dense()
        return state


@dataclass(frozen=True)
class ByteAccount:
    """Bytes by part. parts sum to artifact; total = artifact + code is what the cap is held against."""

    parts: dict[str, int]
    artifact: int
    code: int
    cap: int
    payload: int  # of the tensors before compression
    residual_tensors: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        return self.artifact + self.code

    @property
    def fits(self) -> bool:
        return self.total <= self.cap

    def rows(self) -> dict[str, int]:
        """Part -> bytes, code as a row of its own, then the total."""
        return {**self.parts, "code": self.code, "total": self.total}


def quantize_state(state: dict[str, Tensor], config: ExportConfig) -> Quantized:
    """Decide for every tensor of the state dict and quantise; residuals by benefit a byte within the budget."""
    integers, floats = {}, {}
    for name, t in state.items():
        t = t.detach().cpu()
        if not torch.isfinite(t).all():
            raise ValueError(f"tensor {name} holds NaN or infinity; this checkpoint cannot be exported")
        bits = config.embed_bits if name == "tok_emb.weight" else config.weight_quantization_bits
        if t.numel() <= KEEP_FLOAT_MAX_NUMEL or bits == 16:
            floats[name] = t.to(torch.float32 if is_control(name) else torch.float16).contiguous()
        else:
            integers[name] = quantize(t, bits, config.int8_axis_mode)
    quantized = Quantized(integers, _choose_residuals(state, integers, config), floats)
    return permute_mlp(quantized) if config.mlp_permutation else quantized


def _choose_residuals(
    state: dict[str, Tensor], integers: dict[str, QuantizedTensor], config: ExportConfig
) -> dict[str, RankOne]:
    """The residuals that fit the budget, taken by (priority, benefit a byte, benefit), largest first."""
    if not (config.int8_residual_rank and config.int8_residual_budget_bytes):
        return {}
    mode = config.int8_targeted_residual_mode
    fitted = []
    for name, t in integers.items():
        if t.q.ndim != 2 or not _is_candidate(name, mode):
            continue
        residual = state[name].detach().cpu().float() - t.dequantize()
        fitted.append((name, rank_one(residual, config.int8_residual_power_iters)))
    prioritised = mode == "early_proj_combo"
    fitted.sort(
        key=lambda nr: (
            prioritised and _is_early(nr[0], "attn|mlp"),
            nr[1].benefit / nr[1].bytes,
            nr[1].benefit,
        ),
        reverse=True,
    )
    chosen: dict[str, RankOne] = {}
    left = config.int8_residual_budget_bytes
    for name, residual in fitted:
        if residual.benefit > 0 and residual.bytes <= left:
            chosen[name] = residual
            left -= residual.bytes
    return chosen


def _is_early(name: str, part: str) -> bool:
    match = re.fullmatch(rf"blocks\.(\d+)\.({part})\.proj\.weight", name)
    return bool(match) and int(match[1]) < EARLY_BLOCKS


def _is_candidate(name: str, mode: str) -> bool:
    """The seed's variants restrict who may have a residual; off and early_proj_combo let all compete."""
    match mode:
        case "all_mlp_proj":
            return name.endswith("mlp.proj.weight")
        case "all_attn_proj":
            return name.endswith("attn.proj.weight")
        case "early_mlp_proj":
            return _is_early(name, "mlp")
        case "early_combo":
            return _is_early(name, "attn|mlp")
    return True


def permute_mlp(quantized: Quantized) -> Quantized:
    """Sort each block's hidden units so that alike rows are neighbours: the same function, fewer coded bytes."""
    integers, residuals = dict(quantized.integers), dict(quantized.residuals)
    for name in quantized.integers:
        if not (match := re.fullmatch(r"(blocks\.\d+\.mlp\.)fc\.weight", name)):
            continue
        fc, proj = name, match[1] + "proj.weight"
        if proj not in integers:
            continue
        order = _hidden_order(integers[fc], integers[proj])
        integers[fc] = _reorder(integers[fc], order, axis=0)
        integers[proj] = _reorder(integers[proj], order, axis=1)
        if fc in residuals:
            r = residuals[fc]
            residuals[fc] = RankOne(r.left[order], r.right, r.benefit)
        if proj in residuals:
            r = residuals[proj]
            residuals[proj] = RankOne(r.left, r.right[order], r.benefit)
    return Quantized(integers, residuals, quantized.floats)


def _hidden_order(fc: QuantizedTensor, proj: QuantizedTensor) -> Tensor:
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
    scale = t.scale[order] if t.axis == axis else t.scale
    return QuantizedTensor(t.q.index_select(axis, order).contiguous(), scale, t.axis)


def pack(quantized: Quantized) -> tuple[bytes, dict[str, int], int]:
    """The artifact's bytes, the stored bytes of each part, and the bytes of the tensors before compression."""
    tensors: dict[str, Tensor] = {f"float/{name}": t for name, t in quantized.floats.items()}
    for name, t in quantized.integers.items():
        tensors[f"q/{name}"], tensors[f"scale/{name}"] = t.q, t.scale
    for name, r in quantized.residuals.items():
        tensors[f"left/{name}"], tensors[f"right/{name}"] = r.left, r.right
    # One metadata entry: safetensors writes several in no fixed order, and equal runs must give equal bytes.
    columns = sorted(name for name, t in quantized.integers.items() if t.axis == 1)
    metadata = {"pgolf": json.dumps({"scheme": SCHEME, "version": 1, "column_scales": columns})}
    compressed, parts = _compress(safetensors.torch.save(tensors, metadata))
    return compressed, parts, sum(t.numel() * t.element_size() for t in tensors.values())


def export(state: dict[str, Tensor], config: ExportConfig, path: str | Path) -> ByteAccount:
    """Quantise, write the artifact in one move, account for its bytes. Raises ValueError on NaN or infinity."""
    quantized = quantize_state(state, config)
    artifact, parts, payload = pack(quantized)
    write_whole(path, artifact)
    return ByteAccount(
        parts=parts,
        artifact=len(artifact),
        code=len(code_archive()),
        cap=config.cap_bytes,
        payload=payload,
        residual_tensors=tuple(quantized.residuals),
    )


def _compress(blob: bytes) -> tuple[bytes, dict[str, int]]:
    """zlib stream of a safetensors file, and the stored bytes of each part.

    The stream is flushed where one part ends and the next begins (some five times in a file, about five
    bytes each), so that every stored byte belongs to one part and the account adds up to the file.
    """
    header_size, header = _header(blob)
    spans = sorted((tuple(entry["data_offsets"]), name) for name, entry in header.items())
    sections = [("metadata", 0, header_size)]
    for (start, end), name in spans:
        part = PARTS[name.split("/")[0]]
        if sections[-1][0] == part:
            sections[-1] = (part, sections[-1][1], header_size + end)
        else:
            sections.append((part, header_size + start, header_size + end))
    compressor = zlib.compressobj(9)
    parts = dict.fromkeys(("weights", "scales", "residuals", "float tensors", "metadata"), 0)
    stream = b""
    for i, (part, start, end) in enumerate(sections):
        last = i == len(sections) - 1
        chunk = compressor.compress(blob[start:end]) + compressor.flush(zlib.Z_FINISH if last else zlib.Z_SYNC_FLUSH)
        parts[part] += len(chunk)
        stream += chunk
    return stream, parts


def _header(blob: bytes) -> tuple[int, dict]:
    """Bytes before the first tensor, and the safetensors header without its metadata."""
    size = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8 : 8 + size])
    header.pop("__metadata__", None)
    return 8 + size, header


def load(path: str | Path) -> dict[str, Tensor]:
    """Artifact file -> state dict of float32 tensors. Raises ArtifactError naming the file."""
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"{path}: no such artifact")
    try:
        return unpack(path.read_bytes())
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error


def unpack(artifact: bytes) -> dict[str, Tensor]:
    """The bytes of an artifact -> state dict of float32 tensors. Raises ArtifactError."""
    try:
        blob = zlib.decompress(artifact)
        size = int.from_bytes(blob[:8], "little")
        about = json.loads(json.loads(blob[8 : 8 + size])["__metadata__"]["pgolf"])
        tensors = safetensors.torch.load(blob)
    except (zlib.error, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise ArtifactError(f"not a whole {SCHEME} artifact ({error})") from error
    if (about["scheme"], about["version"]) != (SCHEME, 1):
        raise ArtifactError(f"scheme {about['scheme']} version {about['version']}; this reads {SCHEME} 1")
    stored: dict[str, dict[str, Tensor]] = {kind: {} for kind in PARTS}
    for name, t in tensors.items():
        kind, _, parameter = name.partition("/")
        stored[kind][parameter] = t
    integers = {}
    for name, q in stored["q"].items():
        axis = None if q.ndim != 2 else int(name in about["column_scales"])
        integers[name] = QuantizedTensor(q, stored["scale"][name], axis)
    residuals = {name: RankOne(left, stored["right"][name], 0.0) for name, left in stored["left"].items()}
    return Quantized(integers, residuals, stored["float"]).state_dict()


def code_archive() -> bytes:
    """The modules a reader needs, as an lzma-compressed archive; the same bytes on every machine."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for module in CODE_MODULES:
            source = Path(__file__).with_name(f"{module}.py").read_bytes().replace(b"\r\n", b"\n")
            entry = tarfile.TarInfo(f"pgolf_core/{module}.py")
            entry.size = len(source)
            archive.addfile(entry, io.BytesIO(source))
    return lzma.compress(buffer.getvalue(), preset=9 | lzma.PRESET_EXTREME)
