"""'ans' against the entropy, sizes told without coding, the smallest codec. test_container: any arrays, and damage."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf_core.artifact import codec
from pgolf_core.artifact.codec import CODECS, coded_bytes, decode, encode, smallest, split
from pgolf_core.artifact.container import DTYPES as NAMES

DTYPES = [np.dtype(name) for name in NAMES]
SHAPES = [(48, 375), (192, 384), (20_000,)]


def assert_decodes(blob, arrays, name):
    decoded = decode(blob, [(a.dtype, a.shape) for a in arrays], name, [10**9])
    assert [(a.dtype, a.shape, a.tobytes()) for a in decoded] == [(a.dtype, a.shape, a.tobytes()) for a in arrays]


def entropy_bytes(arrays) -> float:
    """Order-0 entropy, each array by itself."""
    counts = [np.unique(array, return_counts=True)[1] for array in arrays]
    return -sum((n * np.log2(n / n.sum())).sum() / 8 for n in counts)


def tensors(draw, spread: float, seed: int = 0, dtype=np.int8) -> list[np.ndarray]:
    """Integers of a small model: rounded draws at one step for all."""
    rng = np.random.default_rng(seed)
    limit = np.iinfo(dtype).max
    return [np.rint(getattr(rng, draw)(size=s) * spread).clip(-limit, limit).astype(dtype) for s in SHAPES]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(DTYPES[:3]), st.integers(0, 40), st.integers(1, 80), st.integers(0, 999), st.floats(0.01, 1e4))
def test_lines_that_differ_in_rms_round_trip_and_their_bytes_are_known_without_coding(dtype, rows, cols, seed, rms):
    rng = np.random.default_rng(seed)
    scales = rms * np.exp(rng.normal(size=(rows, 1))) * np.exp(rng.normal(size=cols))
    info = np.iinfo(dtype)
    q = np.rint(rng.laplace(size=(rows, cols)) * scales).clip(info.min, info.max).astype(dtype)
    blob = encode([q], "ans")
    assert_decodes(blob, [q], "ans")
    assert abs(coded_bytes(q) - len(blob)) <= max(6, 0.001 * len(blob))


@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes_and_constants(dtype):
    info = np.iinfo(dtype) if dtype.kind in "iu" else np.finfo(dtype)
    rng = np.random.default_rng(0)
    arrays = [
        np.resize(np.array([info.min, info.max], dtype), (50, 51)),
        np.full((40, 40), info.max, dtype),
        np.zeros((3, 0), dtype),
        rng.integers(0, 256, 4096 * dtype.itemsize, dtype=np.uint8).view(dtype).reshape(64, 64),
        np.zeros((64, 64), dtype),
        np.array(info.min, dtype),
    ]
    blob = encode(arrays, "ans")
    assert_decodes(blob, arrays, "ans")
    sizes = [len(body) for body in split(blob, len(arrays))]
    assert all(size <= a.nbytes for size, a in zip(sizes, arrays, strict=True))
    assert sizes[0] < 400  # a bit for each of 2,550
    assert sizes[1] < 40
    assert sizes[4] == 0


@pytest.mark.parametrize("draw", ["normal", "laplace"])
@pytest.mark.parametrize("spread", [0.05, 0.8, 2.5, 12.0])
def test_ans_comes_near_the_entropy_and_its_bytes_are_known_without_coding(draw, spread):
    narrow, wide = tensors(draw, spread), tensors(draw, 5 * spread, dtype=np.int16)[1:]
    for arrays, near in ((narrow, 1.005), (wide, 1.01)):
        sizes = [len(encode([q], "ans")) for q in arrays]
        assert all(abs(coded_bytes(q) - n) <= max(6, 0.001 * n) for q, n in zip(arrays, sizes, strict=True))
        assert spread == 0.05 or sum(sizes) < near * entropy_bytes(arrays)


def test_lines_of_unequal_spread_and_floats_cost_less_than_their_entropy():
    rng = np.random.default_rng(0)
    rows, cols = rng.normal(size=(256, 1)), rng.normal(size=256)
    for scales in (np.exp(rows), np.exp(cols), np.exp(0.6 * (rows + cols))):
        q = np.rint(rng.normal(size=(256, 256)) * scales * 2).clip(-127, 127).astype(np.int8)
        assert len(encode([q], "ans")) < 0.93 * entropy_bytes([q])
    for dtype in (np.float16, np.float32):
        values = (1 + 0.1 * rng.normal(size=20_000)).astype(dtype)
        assert len(encode([values], "ans")) < 0.9 * values.nbytes


@pytest.mark.parametrize("large", [codec.LARGE, 1000])
def test_smallest_is_never_above_another(large, monkeypatch):
    """In large sections zlib and lzma are tried only if brotli finds repeats."""
    monkeypatch.setattr(codec, "LARGE", large)
    normal = tensors("normal", 2.5)
    text = np.frombuffer(b"the same words over and over " * 400, np.uint8)
    for arrays in (normal, [text], [np.resize(normal[0], 40_000)], [normal[0][:3, :7] > 0]):
        arrays = [a.astype(np.int8) for a in arrays]
        name, blob = smallest(arrays)
        assert len(blob) == min(len(encode(arrays, c)) for c in CODECS if c != "brotli_shuffle")
        assert_decodes(blob, arrays, name)


def test_ans_bytes_stay_as_they_are():
    """Files outlive versions: of this library, numpy, constriction and machines."""
    n = np.arange(12_000, dtype=np.int64)
    bells = [(n * n * k % 251 + n * n * n * k % 241 - 245) // 25 for k in (3, 5)]
    arrays = [np.outer(1 + np.arange(60) // 8, np.ones(100, int)) * bells[0][:6000].reshape(60, 100), bells[1]]
    arrays = [a.astype(np.int8) for a in arrays] + [(bells[0][:500] / 8).astype(np.float16)]
    digest = hashlib.sha256(encode(arrays, "ans")).hexdigest()
    assert digest[:16] == "f58261a00ed41e2d"


def test_costs_round_alike_on_every_machine():
    """The claim at codec.BIT, for all frequencies up to 2^20: libraries' logarithms differ by some 1e-12 at most."""
    scaled = codec.BIT * np.log2(np.arange(1, 2**20, dtype=np.float64))
    assert np.abs(scaled % 1 - 0.5).min() > 1e-8
