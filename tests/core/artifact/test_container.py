"""Files give back what went in; whatever else is read in their place is refused with one sentence."""

import importlib
import json
import os
import pickle
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pgolf_core.artifact import container
from pgolf_core.artifact.codec import CODECS, encode
from pgolf_core.artifact.container import (
    CHECKSUM,
    DTYPES,
    PREAMBLE,
    ArtifactError,
    decoded_limit,
    pack_arrays,
    unpack_arrays,
)

ABOUT = {"scheme": "test", "steps": [0.5, 1], "nested": {"names": ["é"]}}


def small_model() -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays and their parts: 24 matrices, their scales, four float tensors."""
    rng = np.random.default_rng(0)
    arrays, parts = {}, {}
    for block in range(6):
        for matrix in ("attn.c_q", "attn.proj", "mlp.fc", "mlp.proj"):
            name = f"blocks.{block}.{matrix}.weight"
            arrays[f"q/{name}"] = np.rint(rng.normal(size=(24, 40)) * 2.5).astype(np.int8)
            arrays[f"scale/{name}"] = rng.uniform(0.01, 0.02, size=24).astype(np.float16)
            parts |= {f"q/{name}": "weights", f"scale/{name}": "scales"}
    for name, shape in {"skip_weights": (3, 40), "q_gains": (6, 4), "attn_scales": (6, 40), "one": ()}.items():
        arrays[name], parts[name] = rng.normal(size=shape).astype(np.float32), "float tensors"
    return arrays, parts


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def good(model):
    return pack_arrays(*model, ABOUT, "ans").bytes


def assert_same(unpacked, arrays):
    assert {n: (a.dtype, a.shape, a.tobytes()) for n, a in unpacked.items()} == {
        n: (a.dtype, a.shape, a.tobytes()) for n, a in arrays.items()
    }


def header_of(file: bytes) -> dict:
    _, _, stored, text, _, _ = PREAMBLE.unpack_from(file)
    return json.loads(
        container.decode(file[PREAMBLE.size :][:stored], [(np.dtype("u1"), (text,))], "lzma")[0].tobytes()
    )


def with_header(file: bytes, header: dict | bytes) -> bytes:
    """The file with another header; every length and checksum of it right."""
    magic, version, old, _, size, _ = PREAMBLE.unpack_from(file)
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    stored = encode([np.frombuffer(text, np.uint8)], "lzma")
    preamble = PREAMBLE.pack(magic, version, len(stored), len(text), size + len(stored) - old, zlib.crc32(stored))
    return signed(preamble + stored + file[PREAMBLE.size + old : -CHECKSUM])


def signed(content: bytes) -> bytes:
    return content + container._checksum(content)


@pytest.mark.parametrize("codec", [*CODECS, "auto"])
def test_round_trip_and_account(model, codec):
    arrays, parts = model
    packed = pack_arrays(arrays, parts, ABOUT, codec)
    unpacked = unpack_arrays(packed.bytes)
    assert_same(unpacked.arrays, arrays)
    assert (unpacked.about, unpacked.version) == (ABOUT, 1)
    assert sum(packed.parts.values()) == len(packed.bytes)
    assert (unpacked.parts, unpacked.codecs) == (packed.parts, packed.codecs)
    assert packed.parts.keys() == {*parts.values(), "metadata"}
    for part, name in packed.codecs.items():
        sizes = [unpacked.array_bytes[n] for n in parts if parts[n] == part]
        if name == "ans":
            assert packed.parts[part] - 2 * len(sizes) <= sum(sizes) < packed.parts[part]
        else:
            assert set(sizes) == {None}


named_arrays = st.dictionaries(
    st.text(max_size=12),
    st.sampled_from(DTYPES).flatmap(lambda d: hnp.arrays(np.dtype(d), hnp.array_shapes(min_dims=0, min_side=0))),
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(named_arrays, st.data(), st.sampled_from(["zlib", "ans"]))
def test_any_arrays(arrays, data, codec):
    parts = {name: data.draw(st.sampled_from(["weights", "scales", "x"])) for name in arrays}
    packed = pack_arrays(arrays, parts, {}, codec)
    assert sum(packed.parts.values()) == len(packed.bytes)
    assert_same(unpack_arrays(packed.bytes).arrays, arrays)


def test_auto_is_never_above_a_codec(model):
    auto = pack_arrays(*model, {}, "auto")
    for codec in CODECS:
        other = pack_arrays(*model, {}, codec)
        assert all(size <= other.parts[part] for part, size in auto.parts.items() if part != "metadata")
        assert len(auto.bytes) < len(other.bytes) + 60  # names of several codecs and libraries


def test_equal_arrays_give_equal_files(model, good):
    arrays, parts = model
    backwards = {n: np.array(arrays[n], order="F") for n in reversed(arrays)}
    about = dict(reversed(ABOUT.items()))
    assert pack_arrays(backwards, dict(reversed(parts.items())), about, "ans").bytes == good


def test_header_is_lean(good):
    header = unpack_arrays(good).parts["metadata"]
    assert len(header_of(good)["arrays"][0]) == 52
    assert header < 700


def test_what_cannot_be_stored_is_refused(model):
    arrays, parts = model
    with pytest.raises(ValueError, match="a float64"):
        pack_arrays({"a": np.zeros(3)}, {"a": "x"}, {}, "ans")
    with pytest.raises(ValueError, match="JSON"):
        pack_arrays(arrays, parts, {"loss": float("nan")}, "ans")
    with pytest.raises(ValueError, match="cannot say"):
        pack_arrays({"a": np.zeros(decoded_limit(1000), np.int8)}, {"a": "x"}, {}, "ans")


def test_flipped_bytes_are_refused(good):
    rng = np.random.default_rng(0)
    places = np.concatenate([np.arange(300), rng.integers(0, len(good), 1700)])
    for place in places:
        damaged = bytearray(good)
        damaged[place] ^= 1 << int(rng.integers(8))
        with pytest.raises(ArtifactError):
            unpack_arrays(bytes(damaged))
            pytest.fail(f"read with byte {place} changed")


def test_damage_is_located(good):
    unpacked, header = unpack_arrays(good), PREAMBLE.unpack_from(good)[2]
    for part, place in {
        "header": PREAMBLE.size,
        "float tensors": PREAMBLE.size + header,
        "weights": len(good) - 20,
    }.items():
        damaged = bytearray(good)
        damaged[place] ^= 1
        with pytest.raises(ArtifactError, match=f"damaged.* its {part}"):
            unpack_arrays(bytes(damaged))
    assert list(unpacked.parts) == ["float tensors", "scales", "weights", "metadata"]
    with pytest.raises(ArtifactError, match="damaged: its checksum"):
        unpack_arrays(good[:-1] + bytes([good[-1] ^ 1]))


def test_cut_and_lengthened_files_are_refused(good):
    for size in np.linspace(0, len(good) - 1, 200, dtype=int).tolist():
        with pytest.raises(ArtifactError, match=r"cut short|not a pgolf artifact"):
            unpack_arrays(good[:size])
    with pytest.raises(ArtifactError, match=rf"cut short: 1,000 of {len(good):,} bytes"):
        unpack_arrays(good[:1000])
    with pytest.raises(ArtifactError, match="lengths do not fit"):
        unpack_arrays(good + b"\0")


def test_another_version_is_named(good):
    other = signed(good[:8] + struct.pack("<H", 7) + good[10:-CHECKSUM])
    with pytest.raises(ArtifactError, match="version 7; this reads 1"):
        unpack_arrays(other)


class Bomb:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_other_files_are_recognised_and_not_run(good, tmp_path):
    trace = tmp_path / "was_run"
    torch.save({"bomb": Bomb(trace)}, tmp_path / "saved")
    aliens = {
        "a pickle": pickle.dumps(Bomb(trace)),
        "a zip archive": (tmp_path / "saved").read_bytes(),
        "a zlib stream": zlib.compress(pickle.dumps(Bomb(trace)), 9),
        "line ends were changed": good.replace(b"\r\n", b"\n"),
    }
    for kind, content in aliens.items():
        with pytest.raises(ArtifactError, match=f"not a pgolf artifact; begins like .*{kind}"):
            unpack_arrays(content)
    for content in (b"", b"text", b"\x89PNG\r\n\x1a\n", good[1:]):
        with pytest.raises(ArtifactError, match="not a pgolf artifact"):
            unpack_arrays(content)
    assert not trace.exists()


def test_claims_are_not_believed(good):
    """Headers that are whole and lie: refused before anything is made of them."""
    base = header_of(good)
    names, dtypes, shapes = base["arrays"]
    sections = base["sections"]

    def arrays(**changed):
        fields = {"names": names, "dtypes": dtypes, "shapes": shapes} | changed
        return base | {"arrays": list(fields.values())}

    lies = [
        arrays(shapes=[[10**6, 10**6], *shapes[1:]]),
        arrays(shapes=[[0, 10**30], *shapes[1:]]),
        arrays(shapes=[[-1, -40], *shapes[1:]]),
        arrays(shapes=[[2.0, 60], *shapes[1:]]),
        arrays(shapes=[[True, 60], *shapes[1:]]),
        arrays(shapes=[[1] * 100, *shapes[1:]]),
        arrays(shapes=[[], *shapes[1:]]),
        arrays(shapes=shapes[1:]),
        arrays(shapes=None),
        arrays(dtypes=["object", *dtypes[1:]]),
        arrays(dtypes=[["int8"], *dtypes[1:]]),
        arrays(dtypes=["float16", *dtypes[1:]]),
        arrays(names=[names[1], *names[1:]]),
        arrays(names=[{}, *names[1:]]),
        base | {"sections": []},
        base | {"sections": sections[1:]},
        base | {"sections": [*sections, sections[0]]},
        base | {"sections": [["weights", "ans"]]},
        base | {"sections": [[s[0], "exec", *s[2:]] for s in sections]},
        base | {"sections": [[s[0], ["ans"], *s[2:]] for s in sections]},
        base | {"sections": [["metadata", *s[1:]] for s in sections]},
        base | {"sections": [[*s[:3], s[3] + 1, *s[4:]] for s in sections]},
        base | {"sections": [[*s[:3], -s[3], *s[4:]] for s in sections]},
        base | {"sections": [[*s[:2], 10**12, *s[3:]] for s in sections]},
        base | {"sections": [[s[0], "zlib", *s[2:]] for s in sections]},
        base | {"sections": [[*s[:5], 0] for s in sections]},
        base | {"libraries": {"constriction": "0; evil"}},
        base | {"libraries": ["constriction"]},
        base | {"about": 3},
        {k: v for k, v in base.items() if k != "about"},
        [],
        b"[" * 100_000,
        b"\xff\xfe",
        b"9" * 10_000,
        b"",
    ]
    assert_same(unpack_arrays(with_header(good, base)).arrays, unpack_arrays(good).arrays)
    for lie in lies:
        with pytest.raises(ArtifactError):
            unpack_arrays(with_header(good, lie))
            pytest.fail(f"believed {str(lie)[:300]}")


@pytest.mark.parametrize("codec", ["zlib", "lzma", "brotli"])
def test_bombs_are_not_unfolded(codec):
    bomb = encode([np.zeros(3 * 10**7, np.int8)], codec)
    small = pack_arrays({"a": np.zeros(100, np.int8)}, {"a": "weights"}, {}, codec).bytes
    section = ["weights", codec, 1, len(bomb), zlib.crc32(bomb), 0]
    header = header_of(small) | {"sections": [section]}
    old = unpack_arrays(small).parts["weights"]
    start = with_header(small, header)[: -CHECKSUM - old]
    _, version, stored, text, _, crc = PREAMBLE.unpack_from(start)
    size = len(start) + len(bomb) + CHECKSUM
    start = PREAMBLE.pack(container.MAGIC, version, stored, text, size, crc) + start[PREAMBLE.size :]
    with pytest.raises(ArtifactError, match="does not hold the 100 bytes"):
        unpack_arrays(signed(start + bomb))


def test_hostile_sections_raise_only_artifact_errors(model, good):
    """Damaged within a section, with every checksum made right again."""
    rng = np.random.default_rng(0)
    header = header_of(good)
    start = len(good) - CHECKSUM - sum(s[3] for s in header["sections"])
    for _ in range(80):
        damaged = bytearray(good[start:-CHECKSUM])
        for _ in range(int(rng.integers(1, 5))):
            damaged[int(rng.integers(len(damaged)))] = int(rng.integers(256))
        sections, first = [], 0
        for s in header["sections"]:
            sections.append([*s[:4], zlib.crc32(damaged[first : first + s[3]]), s[5]])
            first += s[3]
        forged = with_header(good[:start] + bytes(damaged) + bytes(CHECKSUM), header | {"sections": sections})
        with pytest.raises(ArtifactError, match=r"cannot be decoded|decode to other bytes"):
            unpack_arrays(forged)


def test_other_bytes_name_both_versions(good):
    header = header_of(good)
    header["libraries"] = {"constriction": "9.9"}
    header["sections"] = [[*s[:5], s[5] ^ 1] for s in header["sections"]]
    with pytest.raises(ArtifactError, match=r"decode to other bytes.* written with constriction 9\.9, here is \d"):
        unpack_arrays(with_header(good, header))


@pytest.mark.parametrize(("codec", "package"), [("ans", "constriction"), ("brotli", "brotli")])
def test_a_missing_library_is_named_with_the_files_version(model, codec, package, monkeypatch):
    file = pack_arrays(*model, {}, codec).bytes
    changed = with_header(file, header_of(file) | {"libraries": {package: "1.2.3"}})

    def absent(module):
        raise ImportError(module)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(ArtifactError, match=rf"pip install {package}==1\.2\.3"):
        unpack_arrays(changed)
