"""The artifact file: named arrays in sections, one per part of the byte account, each under its codec.

    preamble   magic, version, bytes of the header as stored and as text, bytes of the file, crc32 of the header
    header     JSON under lzma: names, dtypes, shapes; sections; versions of the libraries; `about`
    sections   one after the other
    checksum   the first 16 bytes of the sha256 of all before it

Equal arrays give equal bytes, whatever the order of the dicts. Nothing in a file is executed, and every length in it
is checked against the file's own before it is used.
"""

import hashlib
import json
import math
import re
import struct
import zlib
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from importlib import metadata
from typing import Any

import numpy as np

from pgolf_core.artifact.codec import (
    CODECS,
    LIBRARIES,
    ArtifactError,
    Spec,
    decode,
    encode,
    library,
    smallest,
    split,
)

VERSION = 1
MAGIC = b"\x89PGF\r\n\x1a\n"  # like PNG's: not text, and damaged by any change of line ends
PREAMBLE = struct.Struct("<8sHIIQI")
CHECKSUM = 16
DTYPES = ("int8", "uint8", "int16", "float16", "float32")
FILE_LIMIT = 1 << 28  # bytes of a file, at most: a reader holds all of it
HEADER_LIMIT = 1 << 22  # bytes of JSON, at most
SECTIONS, ARRAYS, NAME = 64, 1 << 15, 200  # in a file, and characters in a name, at most
MANY = 512  # arrays whose blocks may have more tables than a reader takes
ALIENS = {
    b"\x80": "a pickle",
    b"PK\x03\x04": "a zip archive, as torch.save writes",
    b"\x78": "a zlib stream, as the scheme int8_zlib writes",
    MAGIC[:4]: "an artifact whose line ends were changed by a transfer as text",
}


@dataclass(frozen=True)
class Packed:
    """bytes: the file. parts: sizes that sum to its length, "metadata" included. codecs: of each other part."""

    bytes: bytes
    parts: dict[str, int]
    codecs: dict[str, str]


@dataclass(frozen=True)
class Unpacked:
    """Content of a file; parts and codecs as in Packed."""

    arrays: dict[str, np.ndarray]
    about: dict[str, Any]
    parts: dict[str, int]
    codecs: dict[str, str]
    array_bytes: dict[str, int | None]  # None if one stream holds several arrays
    version: int
    libraries: dict[str, str]  # package -> version that wrote the file


@dataclass(frozen=True)
class _Section:
    part: str
    codec: str
    count: int  # arrays in it
    length: int
    stored_crc: int
    decoded_crc: int


def decoded_limit(stored: int) -> int:
    """Bytes that a file of `stored` bytes may decompress to: weights never reach 64:1, many never 16:1, a bomb does.

    No tensor dequantizes to more numbers, and tables under 'ans' have at most a quarter as many entries.
    """
    return 2**25 + min(64 * stored, 2**24 + 16 * stored)


def pack_arrays(arrays: dict[str, np.ndarray], parts: dict[str, str], about: dict[str, Any], codec: str) -> Packed:
    """The file of these arrays. parts: array -> part of the account; codec: one of CODECS, or "auto" for the smallest.

    Raises ValueError on other dtypes than DTYPES, on names that do not print, on an `about` that is not JSON, and on
    arrays that are larger or more than a reader takes.
    """
    if alien := [f"{name} {a.dtype}" for name, a in arrays.items() if a.dtype.name not in DTYPES]:
        raise ValueError(f"cannot store {', '.join(alien)}; dtypes are {', '.join(DTYPES)}")
    names = sorted(arrays, key=lambda name: (parts[name], name))
    if unfit := [name for name in names if not name.isprintable() or len(name) > NAME]:
        raise ValueError(f"cannot store {unfit[0][:80]!r}: a name has up to {NAME} printable characters")
    sections, blobs = [], []
    for part in sorted({parts[name] for name in names}):
        members = [arrays[name] for name in names if parts[name] == part]
        chosen, blob = smallest(members) if codec == "auto" else (codec, encode(members, codec))
        sections.append(_Section(part, chosen, len(members), len(blob), zlib.crc32(blob), _crc(members)))
        blobs.append(blob)
    packages = sorted({LIBRARIES[s.codec][0] for s in sections if s.codec in LIBRARIES})
    header = {
        "about": about,
        "arrays": [names, [arrays[n].dtype.name for n in names], [arrays[n].shape for n in names]],
        "libraries": {package: metadata.version(package) for package in packages},
        "sections": [astuple(s) for s in sections],
    }
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    stored = encode([np.frombuffer(text, np.uint8)], "lzma")
    size = PREAMBLE.size + len(stored) + sum(map(len, blobs)) + CHECKSUM
    decoded = _decoded_bytes([(a.dtype, a.shape) for a in arrays.values()])
    if len(text) > HEADER_LIMIT or len(names) > ARRAYS or decoded > decoded_limit(size):
        raise ValueError(f"{size:,} bytes cannot say that they hold {decoded:,} of arrays, {len(text):,} of header")
    if size > FILE_LIMIT:
        raise ValueError(f"an artifact of {size:,} bytes; a reader takes at most {FILE_LIMIT:,}")
    preamble = PREAMBLE.pack(MAGIC, VERSION, len(stored), len(text), size, zlib.crc32(stored))
    file = b"".join([preamble, stored, *blobs])
    file += _checksum(file)
    _check_blocks(file, names)
    account = {s.part: s.length for s in sections} | {"metadata": size - sum(map(len, blobs))}
    return Packed(file, account, {s.part: s.codec for s in sections})


def _check_blocks(file: bytes, names: list[str]) -> None:
    """Raise ArtifactError if the arrays have more blocks than a reader takes."""
    if len(names) > MANY:
        unpack_arrays(file)


def unpack_arrays(blob: bytes) -> Unpacked:
    """The inverse of pack_arrays. Raises ArtifactError on anything but a complete artifact."""
    header_size, text_size, crc = check_preamble(blob[: PREAMBLE.size], len(blob))
    start = PREAMBLE.size + header_size
    if zlib.crc32(blob[PREAMBLE.size : start]) != crc:
        raise ArtifactError("damaged: its header is not what was written")
    text = decode(blob[PREAMBLE.size : start], [(np.dtype(np.uint8), (text_size,))], "lzma", [])[0].tobytes()
    try:
        names, specs, sections, about, libraries = _parse(text)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ArtifactError(f"its header is not an artifact's ({str(error)[:100]})") from error
    blobs = []
    for s in sections:
        blobs.append(blob[start : start + s.length])
        start += s.length
    if start + CHECKSUM != len(blob):
        raise ArtifactError("its sections do not add up to its length")
    if _decoded_bytes(specs) > decoded_limit(len(blob)):
        raise ArtifactError(f"it claims to hold {_decoded_bytes(specs):,} bytes of arrays in {len(blob):,}")
    if damaged := [s.part for s, stored in zip(sections, blobs, strict=True) if zlib.crc32(stored) != s.stored_crc]:
        raise ArtifactError("damaged in its " + " and ".join(damaged))
    if _checksum(blob[:-CHECKSUM]) != blob[-CHECKSUM:]:
        raise ArtifactError("damaged: its checksum is not that of its bytes")
    arrays, sizes, entries = {}, {}, [decoded_limit(len(blob)) // 4]
    for s, stored in zip(sections, blobs, strict=True):
        members, own = names[len(arrays) :][: s.count], specs[len(arrays) :][: s.count]
        arrays |= zip(members, _decode(stored, own, s, libraries, entries), strict=True)
        sizes |= zip(members, map(len, split(stored, s.count)) if s.codec == "ans" else [None] * s.count, strict=True)
    account = {s.part: s.length for s in sections}
    account["metadata"] = len(blob) - sum(account.values())
    return Unpacked(arrays, about, account, {s.part: s.codec for s in sections}, sizes, VERSION, libraries)


def _decoded_bytes(specs: Sequence[Spec]) -> int:
    """Bytes of arrays; a length of 0 counts as 1, so that the other lengths of an empty array are bounded too."""
    return sum(dtype.itemsize * math.prod(max(n, 1) for n in shape) for dtype, shape in specs)


def _checksum(file: bytes) -> bytes:
    return hashlib.sha256(file).digest()[:CHECKSUM]


def _crc(arrays: Sequence[np.ndarray]) -> int:
    return zlib.crc32(b"".join(a.astype(a.dtype.newbyteorder("<"), copy=False).tobytes() for a in arrays))


def check_preamble(start: bytes, length: int) -> tuple[int, int, int]:
    """Bytes of the header as stored and as text, and its crc, from the first bytes of a file of this length.

    Raises ArtifactError on another kind of file, another length and one that is too large.
    """
    if not start.startswith(MAGIC):
        like = next((kind for begin, kind in ALIENS.items() if start.startswith(begin)), "")
        raise ArtifactError("not a pgolf artifact" + (f"; begins like {like}" if like else ""))
    if len(start) < PREAMBLE.size:
        raise ArtifactError(f"cut short: {len(start)} bytes, the beginning alone has {PREAMBLE.size}")
    _, version, header_size, text_size, size, crc = PREAMBLE.unpack(start)
    if version != VERSION:
        raise ArtifactError(f"version {version}; this reads {VERSION}")
    if length < size:
        raise ArtifactError(f"cut short: {length:,} of {size:,} bytes")
    if length > size or PREAMBLE.size + header_size + CHECKSUM > size or text_size > HEADER_LIMIT:
        raise ArtifactError(f"damaged: its lengths do not fit its {length:,} bytes")
    if length > FILE_LIMIT:
        raise ArtifactError(f"{length:,} bytes are more than the {FILE_LIMIT:,} that an artifact may have")
    return header_size, text_size, crc


def _parse(text: bytes) -> tuple[list[str], list[Spec], list[_Section], dict, dict[str, str]]:
    """The header's contents, every type looked at. Raises ValueError, TypeError, KeyError or RecursionError."""
    header = json.loads(text)
    names, dtypes, shapes = header["arrays"]
    about, libraries = {**header["about"]}, {**header["libraries"]}
    sections = [_Section(*fields) for fields in header["sections"]]
    specs = [(np.dtype(DTYPES[DTYPES.index(d)]), tuple(shape)) for d, shape in zip(dtypes, shapes, strict=True)]
    numbers = [n for s in sections for n in (s.count, s.length, s.stored_crc, s.decoded_crc)]
    numbers += [n for _, shape in specs for n in (*shape, 64 - len(shape))]  # numpy knows 64 dimensions
    words = [*names, *libraries.values(), *(s.part for s in sections)]
    numbers += [SECTIONS - len(sections), ARRAYS - len(names), *(NAME - len(w) for w in words)]
    if any(type(n) is not int or not 0 <= n < 2**48 for n in numbers) or not all(map(str.isprintable, words)):
        raise ValueError("a number or name out of range")
    if any(s.codec not in CODECS for s in sections):
        raise ValueError("an unknown codec")
    if not all(re.fullmatch(r"[\w.+]{1,40}", v) for v in libraries.values()):  # we tell users to install it
        raise ValueError("a library's version is none")
    if len(set(names)) != len(names) or not len(names) == len(specs) == sum(s.count for s in sections):
        raise ValueError("its arrays do not add up")
    if len({s.part for s in sections} - {"metadata"}) != len(sections):
        raise ValueError("a part comes twice")
    return names, specs, sections, about, libraries


def _decode(
    stored: bytes, specs: list[Spec], section: _Section, libraries: dict[str, str], entries: list[int]
) -> list[np.ndarray]:
    """The arrays of a section, with both checksums. Raises ArtifactError that names the part."""
    written = ""
    if section.codec in LIBRARIES:
        package, _ = LIBRARIES[section.codec]
        library(section.codec, libraries.get(package))
        written = f"; it was written with {package} {libraries.get(package)}, here is {metadata.version(package)}"
    try:
        arrays = decode(stored, specs, section.codec, entries)
    except ArtifactError as error:
        raise ArtifactError(f"its {section.part} cannot be decoded: {error}{written}") from error
    if _crc(arrays) != section.decoded_crc:
        raise ArtifactError(f"its {section.part} decode to other bytes than were stored{written}")
    return arrays
