"""Artifacts taken apart and put together again with right lengths and checksums, whatever they hold."""

import hashlib
import json
import zlib
from collections.abc import Iterator
from functools import reduce
from operator import getitem
from pathlib import Path

import numpy as np

from pgolf_core.artifact import codec, container
from pgolf_core.artifact.codec import decode, encode
from pgolf_core.artifact.container import CHECKSUM, MAGIC, PREAMBLE, unpack_arrays
from pgolf_core.artifact.format import from_arrays, part_of
from pgolf_core.quantization.stored import Quantized

NUMBERS = [-1, 0, 1, 7, 2**30, 2**62, 10**400, 0.5, True, None, "1", [], {}, [[[0]]], float("nan")]
Arrays = dict[str, np.ndarray]


def unpack(file: bytes) -> Quantized:
    """The inverse of pack."""
    unpacked = unpack_arrays(file)
    return from_arrays(unpacked.arrays, unpacked.about)


def taken_apart(file: bytes) -> tuple[dict, list[bytes]]:
    """Header and sections of a whole file."""
    _, _, stored, text, _, _ = PREAMBLE.unpack_from(file)
    start = PREAMBLE.size + stored
    header = json.loads(decode(file[PREAMBLE.size : start], [(np.dtype("u1"), (text,))], "lzma", [])[0].tobytes())
    ends = start + np.cumsum([s[3] for s in header["sections"]])
    return header, [file[end - s[3] : end] for s, end in zip(header["sections"], ends, strict=True)]


def file_of(header: dict | bytes, sections: list[bytes], version: int = 1) -> bytes:
    """A file whose own lengths and checksums are right, whatever the header says of its sections."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    stored = encode([np.frombuffer(text, np.uint8)], "lzma")
    content = b"".join([stored, *sections])
    size = PREAMBLE.size + len(content) + CHECKSUM
    content = PREAMBLE.pack(MAGIC, version, len(stored), len(text), size, zlib.crc32(stored)) + content
    return content + hashlib.sha256(content).digest()[:CHECKSUM]


def with_sections(header: dict, sections: list[bytes]) -> bytes:
    """The file with other sections, and every length and checksum right but those of the arrays."""
    told = [[*s[:3], len(b), zlib.crc32(b), s[5]] for s, b in zip(header["sections"], sections, strict=True)]
    return file_of(header | {"sections": told}, sections)


def packed(arrays: Arrays, about: dict, coder: str = "zlib") -> bytes:
    """The file of these arrays, whatever they are."""
    names = sorted(arrays, key=lambda name: (part_of(name), name))
    sections, blobs = [], []
    for part in sorted({part_of(name) for name in names}):
        members = [arrays[name] for name in names if part_of(name) == part]
        blobs.append(encode(members, coder))
        crcs = zlib.crc32(blobs[-1]), zlib.crc32(b"".join(a.tobytes() for a in members))
        sections.append([part, coder, len(members), len(blobs[-1]), *crcs])
    told = [names, [arrays[name].dtype.name for name in names], [arrays[name].shape for name in names]]
    return file_of({"about": about, "arrays": told, "libraries": {}, "sections": sections}, blobs)


def mutants(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Name and file: one array or note of each small real file changed, in every way of `changed`."""
    for path in sorted(folder.glob("*.pgolf")):
        content = unpack_arrays(path.read_bytes())
        arrays, about = content.arrays, content.about
        kinds = {name.partition("/")[0]: name for name in reversed(arrays)}
        for kind, name in kinds.items():
            for how, array in changed(arrays[name]):
                yield f"{path.stem}: {kind} {how}", packed(arrays | {name: array}, about)
            yield f"{path.stem}: no {kind}", packed({n: a for n, a in arrays.items() if n != name}, about)
            yield f"{path.stem}: orphan {kind}", packed(arrays | {f"{kind}/orphan": arrays[name]}, about)
            yield f"{path.stem}: shared {kind}", packed(arrays | {f"{kind}/": arrays[name]}, about)
            stray = {f"{kind}/{n.partition('/')[2]}": arrays[name] for n in kinds.values()}
            yield f"{path.stem}: {kind} of all", packed(stray | arrays, about)
        yield f"{path.stem}: note orphan", packed(arrays, about | {"note": 1})
        for note, value in about.items():
            for other in NUMBERS:
                if isinstance(value, dict) and value:  # groups, forms
                    yield (
                        f"{path.stem}: {note} each {other!r:.9}",
                        packed(arrays, about | {note: dict.fromkeys(value, other)}),
                    )
                if other != value:
                    yield f"{path.stem}: {note} {other!r:.9}", packed(arrays, about | {note: other})


def changed(a: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The array in other dtypes and shapes, and with values that mean nothing."""
    for dtype in container.DTYPES:
        if a.dtype != dtype:
            yield dtype, a.astype(dtype)
    for how, other in {
        "column": a.reshape(-1, 1), "row": a.reshape(1, -1), "flat": a.ravel(), "deep": a.reshape(1, 1, -1, 1),
        "one": a.ravel()[:1], "none": a.ravel()[:0], "wide": np.tile(a, 9),
    }.items():  # fmt: skip
        if other.shape != a.shape:
            yield how, other
    for value in (np.nan, np.inf, -np.inf) if a.dtype.kind == "f" else (-1, 127):
        yield f"{value}", np.where(np.arange(a.size).reshape(a.shape) == a.size - 1, np.array(value).astype(a.dtype), a)


def lies(path: Path) -> Iterator[tuple[str, bytes]]:
    """Every value of a header replaced by every kind of JSON value."""
    header, blobs = taken_apart(path.read_bytes())
    paths = [[]]
    for place in paths:
        value = reduce(getitem, place, header)
        if isinstance(value, dict | list):
            paths += [[*place, key] for key in (value if isinstance(value, dict) else range(min(len(value), 2)))]
    for place in paths[1:]:
        for other in NUMBERS:
            copy = json.loads(json.dumps(header))
            reduce(getitem, place[:-1], copy)[place[-1]] = other
            yield f"header {place} {other!r:.9}", file_of(copy, blobs)


def bombs() -> Iterator[tuple[str, bytes]]:
    """Small files that would take gigabytes or minutes."""
    one, half, i8 = np.ones((1, 1), np.int8), np.float16(1), np.int8
    f16 = np.ones(1 << 14, np.float16)
    long = np.zeros((1 << 14, 1), i8)
    none = {"columns": []}
    scaled = {"q/w": one, "scale/w": np.full((), half)}
    yield "scale that broadcasts", packed({"q/w": long, "scale/w": f16}, {"columns": ["w"]})
    yield "outer product", packed(scaled | {"left/w": f16, "right/w": f16}, none)
    group = {"left/w": one, "right/w": one, "left_scale/w": f16[:1, None], "right_scale/w": f16[:1, None]}
    yield "group", packed(scaled | group, none | {"groups": {"w": 2**30}})
    side = np.zeros((3000, 3000), i8)
    scale = np.ones((1, 3000), np.float16)
    factors = {"left/w": side, "right/w": side, "left_scale/w": scale, "right_scale/w": scale.T}
    yield "rank", packed({"q/w": side, "scale/w": scaled["scale/w"]} | factors, none | {"groups": {"w": 4000}})
    book = {"book/": np.ones((2, 1 << 13), np.float16)}
    yield (
        "wide codebook",
        packed(book | {"index/w": np.zeros((1 << 10, 1 << 7), np.uint8), "scale/w": np.full((), half)}, none),
    )
    yield "one long block", packed({"q/w": spotted((1 << 12, 1 << 13)), "scale/w": np.full((), half)}, none, "ans")
    yield "zeros", packed({"q/w": np.zeros((1 << 12, 1 << 13), i8), "scale/w": np.full((), half)}, none)
    yield "long name", packed({"q/" + "w" * 2**20: one, **dict.fromkeys(map("q/{}".format, range(9999)), one)}, none)
    yield "many arrays", packed({f"float/{i}": np.zeros((), np.float16) for i in range(60_000)}, none)
    for what, count, zeros, block in (
        ("blocks", 20_000, np.zeros(40, np.float16), encode([spotted((40,)).astype(np.float16)], "ans")),
        ("tables", 600, np.zeros((64, 2), np.int16), table_block()),
    ):
        header, _ = taken_apart(packed({f"float/{i}": zeros for i in range(count)}, none))
        header["sections"][0][1] = "ans"
        yield f"many {what}", with_sections(header, [block * count])
    for codec_name in ("zlib", "lzma", "brotli", "ans"):
        header, blobs = taken_apart(packed({"float/w": np.arange(99, dtype=np.float16)}, none, codec_name))
        yield f"bytes after the end of {codec_name}", with_sections(header, [blobs[0] + b"\0more"])


def spotted(shape: tuple[int, ...]) -> np.ndarray:
    """int8 zeros but for two elements."""
    a = np.zeros(shape, np.int8)
    a.flat[3], a.flat[-7] = 1, -1
    return a


def table_block() -> bytes:
    """A block of (64, 2) int16 under 'ans' with a million table entries in some 70 bytes."""
    levels = np.arange(64, dtype=np.uint8), np.zeros(2, np.uint8)
    body = codec._body(np.zeros((64, 2), np.int16), codec._Plan(0, levels, np.ones((64, 1 << 14), np.int64), 0, 0))
    return codec._varint(len(body)) + body
