"""Arrays ↔ bytes: zlib, lzma, brotli, and entropy coding by asymmetric numeral systems ('ans').

ANS needs good symbol frequencies. Rows and columns of a weight matrix differ in rms, so each has a level: the log2 of
its mean |q|, in eighths. The sum of an element's two levels is its class, and each class has a table of frequencies.
How fine the levels are, and whether rows, columns, both or neither have them, is decided by counting bits on one
histogram; `coded_bytes` is that count. All such decisions are made on integers, so under 'ans' equal arrays give
equal bytes on every machine.
"""

import importlib
import lzma
import math
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

CODECS = ("zlib", "lzma", "brotli", "brotli_shuffle", "ans")  # LIBRARIES: codec -> package, version tested
LIBRARIES = {"brotli": ("brotli", "1.2.1"), "brotli_shuffle": ("brotli", "1.2.1"), "ans": ("constriction", "0.5.0")}
# Raw streams, since the container has lengths and checksums. lc=0, pb=0: weights are independent bytes.
LZMA_FILTERS = [{"id": lzma.FILTER_LZMA1, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "pb": 0, "dict_size": 1 << 24}]

# Frequencies sum to 2^24. constriction's Categorical(perfect=False) adds them up, scales by an integer below 2^24 and
# truncates. All of it is exact in float64 on multiples of 2^-24, so it does not depend on a machine's rounding.
PRECISION = 24
# Tables hold square roots of counts in this unit. The root's standard error is ½ whatever the count, so equal steps
# suit all; √3 balances the bits of the table against the 0.7 bit per symbol that its coarseness costs.
ROOT_UNIT = 1.732
SQUARINGS = 3  # the finest levels are 2^-3 of a power of two apart
LEVELS = 48  # lines further below the largest share the lowest level
NONE = 31  # a shift after which one level is left
SHIFTS = [(a, b) for s in range(3) for a in (s, NONE) for b in (s, NONE)]  # (rows, columns)
WAYS = 6  # ways to difference a table: 0 to 2 times by symbol, 0 or 1 by class
CELLS = 1 << 20  # row levels × column levels × symbols, at most
BIT = 4096  # units of cost per bit; no 4096·log2(n) is within 1e-8 of a half
LARGE = 1 << 20  # bytes; to try every codec on more takes seconds
OVERHEAD = 4  # bytes per coded array: way of differencing, coder's state
BLOCK_ENTRIES = 1 << 11  # table entries that take as long to read as the rest of a block, 0.3 ms

Spec = tuple[np.dtype, tuple[int, ...]]  # dtype and shape of an array
Operation = tuple[np.ndarray, np.ndarray | int]  # symbols; their frequencies or, if uniform, their bits


class ArtifactError(ValueError):
    """A file that is not a pgolf artifact, is damaged, or needs a library that is not installed."""


def library(codec: str, version: str | None = None) -> Any:
    """The package behind 'brotli' or 'ans'. Raises ArtifactError that says what to install, `version` if known."""
    package, tested = LIBRARIES[codec]
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ArtifactError(f"codec {codec} needs {package}: pip install {package}=={version or tested}") from error


def encode(arrays: Sequence[np.ndarray], codec: str) -> bytes:
    """One stream of the arrays' little-endian bytes; under 'ans' one block per array."""
    if codec == "ans":
        return b"".join(map(_block, arrays))
    raw = b"".join(map(little_endian, arrays))
    if codec == "zlib":
        return zlib.compress(raw, 9)
    if codec == "lzma":
        small = {"dict_size": min(max(1 << 12, len(raw)), 1 << 24)}  # the same bytes, a hundredth of the time on 1 kB
        return lzma.compress(raw, lzma.FORMAT_RAW, filters=[LZMA_FILTERS[0] | small])
    raw = raw[::2] + raw[1::2] if codec == "brotli_shuffle" else raw
    return library("brotli").compress(raw, quality=11, lgwin=24)


def decode(blob: bytes, specs: Sequence[Spec], codec: str, entries: list[int]) -> list[np.ndarray]:
    """The inverse of encode. Raises ArtifactError on a blob that does not hold exactly these arrays.

    entries: how many table entries blocks may still have, one number for all sections of a file; counted down.
    """
    if codec == "ans":
        return [_read_body(body, *spec, entries) for body, spec in zip(split(blob, len(specs)), specs, strict=True)]
    ends = np.cumsum([dtype.itemsize * math.prod(shape) for dtype, shape in specs], dtype=np.int64).tolist()
    raw = _decompress(blob, ends[-1] if ends else 0, codec)
    if codec == "brotli_shuffle":
        raw = np.frombuffer(raw + bytes(len(raw) % 2), np.uint8).reshape(2, -1).T.tobytes()
    return [_from_bytes(raw[a:b], *spec) for a, b, spec in zip([0, *ends], ends, specs, strict=False)]


def smallest(arrays: Sequence[np.ndarray]) -> tuple[str, bytes]:
    """The codec of fewest bytes, and its blob.

    zlib and lzma gain from repeats, as brotli does: if brotli does not beat ans on a large section, they are not
    tried. On 16 MB of weights that saves a minute.
    """
    with ThreadPoolExecutor(1) as pool:  # brotli releases the GIL
        brotli = pool.submit(encode, arrays, "brotli")
        blobs = {"ans": encode(arrays, "ans"), "brotli": brotli.result()}
    if len(blobs["brotli"]) < len(blobs["ans"]) or sum(a.nbytes for a in arrays) < LARGE:
        blobs |= {codec: encode(arrays, codec) for codec in ("lzma", "zlib")}
    return min(blobs.items(), key=lambda pair: len(pair[1]))


def coded_bytes(q: np.ndarray) -> int:
    """Bytes of an integer array under 'ans', exact to a few bytes, without coding it."""
    size = min(q.nbytes, _plan(_matrix(q)).bytes) if q.any() else 0
    return len(_varint(size)) + size


def split(blob: bytes, count: int) -> list[bytes]:
    """The bodies of the `count` blocks of an 'ans' blob. Raises ArtifactError."""
    bodies, start = [b""] * count, 0
    for i in range(count):
        bodies[i], start = _next_body(blob, start)
    if start != len(blob):
        raise ArtifactError("an ans section is longer than its arrays")
    return bodies


def _decompress(blob: bytes, size: int, codec: str) -> bytes:
    """Exactly `size` bytes; never decompresses more than one byte beyond."""
    errors: Any = {"zlib": zlib.error, "lzma": (lzma.LZMAError, EOFError)}.get(codec) or library(codec).error
    try:
        if codec in LIBRARIES:
            stream = library(codec).Decompressor()  # refuses bytes after the end
            raw, whole = stream.process(blob, output_buffer_limit=size + 1), stream.is_finished()
        else:
            lzma_stream = codec == "lzma" and lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=LZMA_FILTERS)
            stream = lzma_stream or zlib.decompressobj()
            raw, whole = stream.decompress(blob, size + 1), stream.eof and not stream.unused_data
    except errors as error:
        raise ArtifactError(f"a {codec} section cannot be decoded ({error})") from error
    if len(raw) != size or not whole:
        raise ArtifactError(f"a {codec} section does not hold the {size:,} bytes that its arrays take, and no more")
    return raw


def little_endian(array: np.ndarray) -> bytes:
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def _from_bytes(raw: bytes, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(raw, dtype.newbyteorder("<")).reshape(shape).astype(dtype)


def _varint(n: int) -> bytes:
    """Seven bits per byte, lowest first; the eighth bit says that more follow."""
    return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + _varint(n >> 7)


def _next_body(blob: bytes, start: int) -> tuple[bytes, int]:
    """The body of the block at `start`, and where the next block begins."""
    size = shift = 0
    more = True
    while more and start < len(blob) and shift < 63:
        size |= (blob[start] & 127) << shift
        more = blob[start] >= 128
        start, shift = start + 1, shift + 7
    if more or size > len(blob) - start:
        raise ArtifactError("an ans section is shorter than its arrays")
    return blob[start : start + size], start + size


# A block is the length of its body, then the body. The body is empty for an array of zeros, and the array's own bytes
# if coding gains nothing; the reader recognises both by the length. Else it is: way of differencing, lowest symbol,
# number of symbols less one, the levels of rows and columns as two blocks (if there are several rows), and the coder's
# words without their trailing zero bytes.


def _matrix(array: np.ndarray) -> np.ndarray:
    """The integers to code, (rows, cols); for floats their bytes by significance, (itemsize, n)."""
    if array.dtype.kind == "f":
        return np.frombuffer(little_endian(array), np.uint8).reshape(-1, array.itemsize).T
    return array.reshape(len(array) if array.ndim > 1 else 1, -1)


def _block(array: np.ndarray) -> bytes:
    body = little_endian(array)
    if not body.strip(b"\0"):
        body = b""
    elif (plan := _plan(_matrix(array), planes=array.dtype.kind == "f")).bytes < len(body):
        body = min(body, _body(_matrix(array), plan), key=len)  # its own bytes on a tie, as the reader assumes
    return _varint(len(body)) + body


@dataclass(frozen=True)
class _Plan:
    low: int  # smallest q; symbols are q - low
    levels: tuple[np.ndarray, np.ndarray]  # uint8, for rows and for columns
    roots: np.ndarray  # (classes in use, symbols) int64
    way: int  # see _difference
    bytes: int  # length of the body


def _plan(q: np.ndarray, planes: bool = False) -> _Plan:
    """The cheapest way found to code q (rows, cols). With `planes` each row may be a class of its own."""
    low = int(q.min())
    symbols = int(q.max()) - low + 1
    rows, cols = (np.zeros(n, np.uint8) for n in q.shape)
    if planes:
        rows += np.arange(len(rows), dtype=np.uint8)
    elif min(q.shape) >= 8:
        magnitude = np.abs(q.astype(np.int32))
        rows, cols = _levels(magnitude.sum(1) * 256 // len(cols)), _levels(magnitude.sum(0) * 256 // len(rows))
    while (grid := (int(rows.max()) + 1, int(cols.max()) + 1))[0] * grid[1] * symbols > max(CELLS, symbols):
        rows, cols = rows >> 1, cols >> 1  # type: ignore[assignment]
    keys = ((rows.astype(np.int64) * grid[1])[:, None] + cols) * symbols + q - low
    joint = np.bincount(keys.ravel(), minlength=grid[0] * grid[1] * symbols).reshape(-1, symbols)
    plans = []
    most = [(n - 1).bit_length() for n in grid]  # a larger shift leaves one level too
    level_bytes = cache(lambda axis, shift: coded_bytes((rows, cols)[axis] >> shift))
    for a, b in sorted({(min(a, most[0]), min(b, most[1])) for a, b in SHIFTS}):
        classes = np.add.outer(np.arange(grid[0]) >> a, np.arange(grid[1]) >> b).ravel()
        order = np.argsort(classes, kind="stable")
        counts = np.add.reduceat(joint[order], np.flatnonzero(np.diff(classes[order], prepend=-1)))
        counts = counts[counts.any(axis=1)]
        roots, levels = _roots(counts), (rows >> a, cols >> b)
        table, way = min((_number_cost(_difference(roots, way)), way) for way in range(WAYS))
        size = (table + int(_cost(counts, _frequencies(roots**2)).sum())) // (8 * BIT) + OVERHEAD + 2 * q.itemsize
        size += level_bytes(0, a) + level_bytes(1, b) if len(rows) > 1 else 0
        plans.append(_Plan(low, levels, roots, way, size))
    return min(plans, key=lambda plan: plan.bytes)


def _levels(magnitude: np.ndarray) -> np.ndarray:
    """Levels >= 0 of rows or columns with these integer magnitudes: the exponent of the 2^SQUARINGS-th power."""
    power = np.maximum(magnitude, 1).astype(np.float64)
    for _ in range(SQUARINGS):
        power *= power  # products round alike on every machine, logarithms do not
    exponent = np.frexp(power)[1]
    return np.maximum(exponent - max(exponent.min(), exponent.max() - LEVELS), 0).astype(np.uint8)


def _roots(counts: np.ndarray) -> np.ndarray:
    """(classes, symbols) counts -> table entries; 0 only for symbols that do not occur."""
    roots = np.maximum(np.rint(np.sqrt(counts) / ROOT_UNIT).astype(np.int64), counts > 0)
    # A table that gains less than its own bits, some two per symbol, is made uniform, which costs almost none.
    uniform = np.full(roots.shape, 2**PRECISION // roots.shape[1])
    gain = _cost(counts, uniform) - _cost(counts, _frequencies(roots**2))
    roots[gain < 2 * BIT * (counts > 0).sum(axis=1)] = 1
    return roots


def _frequencies(weights: np.ndarray) -> np.ndarray:
    """Integer weights along the last axis -> frequencies >= 1 that sum to 2^PRECISION."""
    edges = np.cumsum(weights, axis=-1)
    edges = edges * (2**PRECISION - weights.shape[-1]) // edges[..., -1:]
    return _steps(edges) + 1


def _steps(a: np.ndarray) -> np.ndarray:
    """np.diff(a, prepend=0), in a third of its time on small arrays."""
    steps = a.copy()
    steps[..., 1:] -= a[..., :-1]
    return steps


def _cost(counts: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """Bits per table (last axis) to code symbols that occur `counts` times, in units of 1/BIT, integer."""
    return (counts * (PRECISION * BIT - np.rint(BIT * np.log2(frequencies)).astype(np.int64))).sum(axis=-1)


def _difference(roots: np.ndarray, way: int) -> np.ndarray:
    """(classes, symbols) -> flat integers >= 0: differences d as 2d, or -2d - 1 if negative."""
    d = _steps(roots.T).T if way // 3 else roots
    for _ in range(way % 3):
        d = _steps(d)
    return np.where(d < 0, -2 * d - 1, 2 * d).ravel()


def _undifference(values: np.ndarray, way: int) -> np.ndarray:
    """The inverse of _difference, with values (classes, symbols)."""
    roots = np.where(values % 2, -(values + 1) // 2, values // 2)
    for _ in range(way % 3):
        roots = np.cumsum(roots, axis=1)
    return np.cumsum(roots, axis=0) if way // 3 else roots


# Numbers are written as their bit lengths, entropy coded, and the bits below each one's highest. The table of
# lengths has four bits per length: the log2 of how much rarer it is than the most frequent; 15 = does not occur.


def _lengths(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bit lengths of numbers >= 0, how many have each length, and the table."""
    lengths = np.frexp(numbers.astype(np.float64))[1]
    counts = np.bincount(lengths, minlength=2)  # constriction has no model of one symbol
    rarity = np.rint(np.log2(counts.max() / np.maximum(counts, 1))).clip(0, 14)
    return lengths, counts, np.where(counts > 0, rarity, 15).astype(np.int32)


def _length_frequencies(rarity: np.ndarray) -> np.ndarray:
    return _frequencies((1 << 15 - rarity.astype(np.int64)) & ~1)


def _number_cost(numbers: np.ndarray) -> int:
    _, counts, rarity = _lengths(numbers)
    below = np.maximum(np.arange(len(counts)) - 1, 0)
    return int(BIT * (5 + 4 * len(counts) + (counts * below).sum()) + _cost(counts, _length_frequencies(rarity)))


def _number_operations(numbers: np.ndarray) -> list[Operation]:
    lengths, counts, rarity = _lengths(numbers)
    operations: list[Operation] = [(np.array([len(counts)]), 5), (rarity, 4), (lengths, _length_frequencies(rarity))]
    return operations + [(numbers[lengths == n] - (1 << n - 1), n - 1) for n in range(2, len(counts))]


def _symbol_model(frequencies: np.ndarray | int) -> Any:
    """constriction's model for frequencies, or uniform for that many bits."""
    model = library("ans").stream.model
    uniform = isinstance(frequencies, int)
    return model.Uniform(1 << frequencies) if uniform else model.Categorical(frequencies / 2**PRECISION, perfect=False)


def _classes(levels: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Indices of a matrix's flat elements sorted by class, and the number of elements per class that occurs."""
    classes = np.add.outer(*(n.astype(np.uint16) for n in levels)).ravel()
    counts = np.convolve(*map(np.bincount, levels))  # type: ignore[call-overload]
    return np.argsort(classes, kind="stable"), counts[counts > 0]


def _body(q: np.ndarray, plan: _Plan) -> bytes:
    coder = library("ans").stream.stack.AnsCoder()
    symbols = plan.roots.shape[1]
    if symbols > 1:
        order, counts = _classes(plan.levels)
        parts = np.split(q.ravel()[order].astype(np.int32) - plan.low, np.cumsum(counts[:-1]))
        operations = _number_operations(_difference(plan.roots, plan.way))
        operations += zip(parts, _frequencies(plan.roots**2), strict=True)
        for part, frequencies in reversed(operations):  # a stack: the part read first is pushed last
            coder.encode_reverse(part.astype(np.int32), _symbol_model(frequencies))
    low = (plan.low % 256**q.itemsize).to_bytes(q.itemsize, "little")
    head = bytes([plan.way]) + low + (symbols - 1).to_bytes(q.itemsize, "little")
    levels = b"".join(map(_block, plan.levels)) if len(q) > 1 else b""
    return head + levels + coder.get_compressed().astype("<u4").tobytes().rstrip(b"\0")


def _read_body(body: bytes, dtype: np.dtype, shape: tuple[int, ...], entries: list[int]) -> np.ndarray:
    """The array of a block's body. Raises ArtifactError."""
    count = math.prod(shape)
    if len(body) == dtype.itemsize * count:
        return _from_bytes(body, dtype, shape)
    if not body:
        return np.zeros(shape, dtype)
    try:
        if dtype.kind == "f":
            planes = _read_matrix(body, np.dtype(np.uint8), (dtype.itemsize, count), entries)
            return _from_bytes(planes.T.tobytes(), dtype, shape)
        rows = shape[0] if len(shape) > 1 else 1
        return _read_matrix(body, dtype, (rows, count // max(rows, 1)), entries).reshape(shape)
    except ArtifactError:  # raised by the blocks of levels, and by too many entries
        raise
    except (ValueError, IndexError) as error:
        raise ArtifactError(f"an ans block cannot be decoded ({error})") from error


def _read_matrix(body: bytes, dtype: np.dtype, shape: tuple[int, int], entries: list[int]) -> np.ndarray:
    """(rows, cols) from the body of one that is coded. Raises ValueError or IndexError."""
    size = dtype.itemsize
    way, start = body[0], 1 + 2 * size
    low = int(np.frombuffer(body[1 : 1 + size], dtype.newbyteorder("<"))[0])
    symbols = int.from_bytes(body[1 + size : start], "little") + 1
    levels = [np.zeros(n, np.uint8) for n in shape]
    if shape[0] > 1:  # a block of levels is one row, which ends the recursion
        for i, level in enumerate(levels):
            part, start = _next_body(body, start)
            levels[i] = _read_body(part, level.dtype, level.shape, entries)
    order, counts = _classes(levels)
    if way >= WAYS or low + symbols - 1 > np.iinfo(dtype).max or len(counts) * symbols > max(CELLS, symbols):
        raise ValueError("its head is wrong")
    if body[start:].endswith(b"\0"):
        raise ValueError("zero bytes follow it")
    entries[0] -= BLOCK_ENTRIES + len(counts) * symbols
    if entries[0] < 0:
        raise ArtifactError("more numbers than a file of its size can mean")
    words = body[start:] + bytes(-(len(body) - start) % 4)
    coder = library("ans").stream.stack.AnsCoder(np.frombuffer(words, "<u4").astype(np.uint32))
    flat = np.full(math.prod(shape), low, dtype)
    if symbols > 1:
        numbers = _read_numbers(coder, len(counts) * symbols).reshape(-1, symbols)
        roots = _undifference(numbers, way)
        weights = roots.clip(0, 2**19) ** 2
        if roots.min() < 0 or not 0 < weights.sum(axis=1).min() <= weights.sum(axis=1).max() < 2**39:
            raise ValueError("its tables are wrong")
        for f, places in zip(_frequencies(weights), np.split(order, np.cumsum(counts[:-1])), strict=True):
            flat[places] = coder.decode(_symbol_model(f), len(places)) + low
    if not coder.is_empty():
        raise ValueError("it is longer than its array")
    return flat.reshape(shape)


def _read_numbers(coder: Any, count: int) -> np.ndarray:
    """The `count` numbers written by `_number_operations`, int64. Raises ValueError."""
    kinds = int(coder.decode(_symbol_model(5), 1)[0])
    if not 2 <= kinds <= PRECISION or (rarity := coder.decode(_symbol_model(4), kinds)).min() == 15:
        raise ValueError("its tables are wrong")
    lengths = coder.decode(_symbol_model(_length_frequencies(rarity)), count)
    numbers = np.minimum(lengths, 1).astype(np.int64)
    for n in range(2, kinds):
        here = lengths == n
        numbers[here] = coder.decode(_symbol_model(n - 1), int(here.sum())) + (1 << n - 1)
    return numbers
