"""Files give back what went in; whatever else is read in their place is refused with one sentence."""

import importlib
import os
import pickle
import zlib
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support.artifacts import file_of, taken_apart, with_sections

from pgolf_core.artifact.codec import CODECS, LIBRARIES, ArtifactError, encode, split
from pgolf_core.artifact.container import CHECKSUM, DTYPES, PREAMBLE, decoded_limit, pack_arrays, unpack_arrays

ABOUT = {"scheme": "test", "steps": [0.5, 1], "nested": {"names": ["é"]}}


@pytest.fixture(scope="module")
def model():
    """Arrays and their parts: twelve matrices, their scales, four float tensors."""
    rng = np.random.default_rng(0)
    arrays, parts = {}, {}
    for name in (f"blocks.{block}.{matrix}.weight" for block in range(6) for matrix in ("attn.c_q", "mlp.fc")):
        arrays[f"q/{name}"] = np.rint(rng.normal(size=(24, 40)) * 2.5).astype(np.int8)
        arrays[f"scale/{name}"] = rng.uniform(0.01, 0.02, size=24).astype(np.float16)
        parts |= {f"q/{name}": "weights", f"scale/{name}": "scales"}
    for name, shape in {"skip_weights": (3, 40), "q_gains": (6, 4), "attn_scales": (6, 40), "one": ()}.items():
        arrays[name], parts[name] = rng.normal(size=shape).astype(np.float32), "float tensors"
    return arrays, parts


@pytest.fixture(scope="module")
def files(model):
    """codec -> file of the model."""
    return {codec: pack_arrays(*model, ABOUT, codec) for codec in (*CODECS, "auto")}


@pytest.fixture(scope="module")
def good(files):
    return files["ans"].bytes


def bits(arrays):
    return {name: (a.dtype, a.shape, a.tobytes()) for name, a in arrays.items()}


@pytest.mark.parametrize("codec", [*CODECS, "auto"])
def test_round_trip_and_account(model, files, codec):
    arrays, parts = model
    packed = files[codec]
    unpacked = unpack_arrays(packed.bytes)
    assert bits(unpacked.arrays) == bits(arrays)
    assert (unpacked.about, unpacked.version) == (ABOUT, 1)
    assert sum(packed.parts.values()) == len(packed.bytes)
    assert (unpacked.parts, unpacked.codecs) == (packed.parts, packed.codecs)
    assert packed.parts.keys() == {*parts.values(), "metadata"}
    for part, name in packed.codecs.items():
        sizes = [unpacked.array_bytes[n] for n in parts if parts[n] == part]
        if name == "ans":
            assert packed.parts[part] - 2 * len(sizes) <= sum(sizes) < packed.parts[part]
        assert name == "ans" or set(sizes) == {None}


any_name = st.text(max_size=12).filter(str.isprintable)
any_array = st.sampled_from(DTYPES).flatmap(
    lambda d: hnp.arrays(np.dtype(d), hnp.array_shapes(min_dims=0, min_side=0, max_side=16))
)


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(any_name, any_array, max_size=3), st.data(), st.sampled_from(CODECS))
def test_any_arrays_round_trip(arrays, data, codec):
    parts = {name: data.draw(st.sampled_from(["weights", "scales", "x"])) for name in arrays}
    packed = pack_arrays(arrays, parts, {}, codec)
    assert sum(packed.parts.values()) == len(packed.bytes)
    assert bits(unpack_arrays(packed.bytes).arrays) == bits(arrays)


def test_equal_arrays_give_equal_files_with_a_lean_header(model, good):
    arrays, parts = model
    big_endian = {n: array.astype(array.dtype.newbyteorder(">"), order="F") for n, array in arrays.items()}
    backwards = dict(reversed(big_endian.items()))
    about = dict(reversed(ABOUT.items()))
    assert pack_arrays(backwards, dict(reversed(parts.items())), about, "ans").bytes == good
    assert len(arrays) == 28 and unpack_arrays(good).parts["metadata"] < 600


def test_what_cannot_be_stored_is_refused(model):
    with pytest.raises(ValueError, match="a float64"):
        pack_arrays({"a": np.zeros(3)}, {"a": "x"}, {}, "ans")
    for name in ("a\nb", "a" * 201):
        with pytest.raises(ValueError, match="a name has"):
            pack_arrays({name: np.zeros(3, np.int8)}, {name: "x"}, {}, "ans")
    with pytest.raises(ValueError, match="JSON"):
        pack_arrays(*model, {"loss": float("nan")}, "ans")
    with pytest.raises(ValueError, match="cannot say"):
        pack_arrays({"a": np.zeros(decoded_limit(1000), np.int8)}, {"a": "x"}, {}, "ans")


def test_flipped_bytes_and_cut_files_are_refused(good):
    rng = np.random.default_rng(0)
    for place in [*range(300), *rng.integers(0, len(good), 700).tolist()]:
        damaged = bytearray(good)
        damaged[place] ^= 1 << int(rng.integers(8))
        with pytest.raises(ArtifactError):
            unpack_arrays(bytes(damaged))
            pytest.fail(f"read with byte {place} changed")
    for size in np.linspace(0, len(good) - 1, 200, dtype=int).tolist():
        with pytest.raises(ArtifactError, match=r"cut short|not a pgolf artifact"):
            unpack_arrays(good[:size])


def test_damage_is_located(good):
    header = PREAMBLE.size + PREAMBLE.unpack_from(good)[2]
    assert list(unpack_arrays(good).parts) == ["float tensors", "scales", "weights", "metadata"]

    def changed(place):
        return good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :]

    for file, says in [
        (changed(header - 1), "damaged: its header"),
        (changed(header), "damaged in its float tensors"),
        (changed(len(good) - CHECKSUM - 1), "damaged in its weights"),
        (changed(len(good) - 1), "damaged: its checksum"),
        (good[:1000], rf"cut short: 1,000 of {len(good):,} bytes"),
        (good + b"\0", "lengths do not fit"),
        (file_of(*taken_apart(good), version=7), "version 7; this reads 1"),
    ]:
        with pytest.raises(ArtifactError, match=says):
            unpack_arrays(file)


class Bomb:
    def __reduce__(self):  # leaves a folder behind where it is unpickled
        return os.mkdir, ("was_run",)


def test_other_files_are_recognised_and_not_run(good, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"bomb": Bomb()}, "saved")
    aliens = {
        "a pickle": pickle.dumps(Bomb()), "a zip archive": Path("saved").read_bytes(),
        "a zlib stream": zlib.compress(pickle.dumps(Bomb()), 9),
        "line ends were changed": good.replace(b"\r\n", b"\n"),
    }  # fmt: skip
    for kind, content in aliens.items():
        with pytest.raises(ArtifactError, match=f"not a pgolf artifact; begins like .*{kind}"):
            unpack_arrays(content)
    for content in (b"", b"text", b"\x89PNG\r\n\x1a\n", good[1:]):
        with pytest.raises(ArtifactError, match="not a pgolf artifact"):
            unpack_arrays(content)
    assert not Path("was_run").exists()


def test_claims_are_not_believed(good):
    """Headers that are whole and lie: refused before anything is made of them."""
    base, blobs = taken_apart(good)
    (names, dtypes, shapes), sections = base["arrays"], base["sections"]

    def arrays(names=names, dtypes=dtypes, shapes=shapes):
        return base | {"arrays": [names, dtypes, shapes]}

    lies = [
        *(arrays(shapes=[shape, *shapes[1:]]) for shape in (
            [10**6, 10**6], [0, 10**30], [-1, -40], [2.0, 60], [True, 60], [1] * 100, [],
        )),
        arrays(shapes=shapes[1:]), arrays(shapes=None),
        *(arrays(dtypes=[dtype, *dtypes[1:]]) for dtype in ("object", ["int8"], "float16")),
        arrays(names=[names[1], *names[1:]]), arrays(names=[{}, *names[1:]]),
        *(base | {"sections": other} for other in (
            [], sections[1:], [*sections, sections[0]], [["weights", "ans"]],
            [[s[0], "exec", *s[2:]] for s in sections],
            [[s[0], ["ans"], *s[2:]] for s in sections],
            [["metadata", *s[1:]] for s in sections],
            [[*s[:3], s[3] + 1, *s[4:]] for s in sections],
            [[*s[:3], -s[3], *s[4:]] for s in sections],
            [[*s[:2], 10**12, *s[3:]] for s in sections],
            [[s[0], "zlib", *s[2:]] for s in sections],
            [[*s[:5], 0] for s in sections],
        )),
        base | {"libraries": {"constriction": "0; evil"}}, base | {"libraries": ["constriction"]},
        base | {"about": 3}, {k: v for k, v in base.items() if k != "about"}, [],
        b"[" * 100_000, b"\xff\xfe", b"9" * 10_000, b"",
    ]  # fmt: skip
    assert bits(unpack_arrays(file_of(base, blobs)).arrays) == bits(unpack_arrays(good).arrays)
    for lie in lies:
        with pytest.raises(ArtifactError):
            unpack_arrays(file_of(lie, blobs))
            pytest.fail(f"believed {str(lie)[:300]}")


@pytest.mark.parametrize("codec", CODECS)
def test_another_number_of_bytes_is_refused_and_a_bomb_not_unfolded(files, codec):
    header, sections = taken_apart(files[codec].bytes)
    names, dtypes, shapes = header["arrays"]
    for other in ([[3], *shapes[1:]], [*shapes[:-1], [25, 40]], [*shapes[:-1], [23, 40]]):
        with pytest.raises(ArtifactError, match=r"cannot be decoded|decode to other bytes"):
            unpack_arrays(file_of(header | {"arrays": [names, dtypes, other]}, sections))
    if codec != "ans":
        header, _ = taken_apart(pack_arrays({"a": np.zeros(100, np.int8)}, {"a": "weights"}, {}, codec).bytes)
        with pytest.raises(ArtifactError, match="does not hold the 100 bytes"):
            unpack_arrays(with_sections(header, [encode([np.zeros(3 * 10**6, np.int8)], codec)]))


@pytest.mark.parametrize("codec", CODECS)
def test_hostile_sections_raise_only_artifact_errors(files, codec):
    """Damaged within a section, half of it in the heads of arrays, with every checksum but the last made right."""
    rng = np.random.default_rng(0)
    header, sections = taken_apart(files[codec].bytes)
    heads = {i: np.cumsum([0, *(len(body) + 2 for body in split(b, header["sections"][i][2])[:-1])])
             for i, b in enumerate(sections) if codec == "ans"}  # fmt: skip
    for trial in range(200 if codec == "ans" else 60):
        damaged = bytearray(sections[trial % 3])
        for _ in range(1 + trial % 4):
            near = int(rng.choice(heads.get(trial % 3, [0])) + rng.integers(40))
            place = near if trial % 2 else int(rng.integers(len(damaged)))
            damaged[min(place, len(damaged) - 1)] ^= int(rng.integers(1, 256))
        damaged = damaged[: len(damaged) - (trial % 5 == 0)]
        forged = with_sections(header, [damaged if i == trial % 3 else b for i, b in enumerate(sections)])
        with pytest.raises(ArtifactError, match=r"cannot be decoded|decode to other bytes"):
            unpack_arrays(forged)
            pytest.fail(f"believed trial {trial}")


def test_other_bytes_name_both_versions(good):
    header, blobs = taken_apart(good)
    sections = [[*s[:5], s[5] ^ 1] for s in header["sections"]]
    with pytest.raises(ArtifactError, match=r"decode to other bytes.* written with constriction 9\.9, here is \d"):
        unpack_arrays(file_of(header | {"libraries": {"constriction": "9.9"}, "sections": sections}, blobs))


@pytest.mark.parametrize("codec", LIBRARIES)
def test_a_missing_library_is_named_with_the_files_version(files, codec, monkeypatch):
    (header, sections), (package, tested) = taken_apart(files[codec].bytes), LIBRARIES[codec]
    monkeypatch.setattr(importlib, "import_module", Mock(side_effect=ImportError))
    for libraries, version in (({package: "1.2.3"}, "1.2.3"), ({}, tested)):
        with pytest.raises(ArtifactError, match=f"codec {codec} needs {package}: pip install {package}=={version}"):
            unpack_arrays(file_of(header | {"libraries": libraries}, sections))
