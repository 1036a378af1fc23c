import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.shards import write_shard

from pgolf_core.files import DataError
from pgolf_core.shards import read_shard, shard_paths


@settings(deadline=None)
@given(st.lists(st.integers(0, 65535), min_size=1, max_size=300))
def test_shard_round_trip(tmp_path_factory, tokens):
    path = write_shard(tmp_path_factory.mktemp("shard") / "fineweb_val_000000.bin", tokens)
    assert read_shard(path).tolist() == tokens
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_shard_bytes(tmp_path):
    content = write_shard(tmp_path / "x.bin", [1, 0x0203]).read_bytes()
    header = np.frombuffer(content[:1024], "<i4")
    assert header[:3].tolist() == [20240520, 1, 2] and not header[3:].any()
    assert content[1024:] == b"\x01\x00\x03\x02"


def test_no_shards(tmp_path):
    with pytest.raises(DataError, match=r"no folder .*nowhere; `pgolf data embedded`"):
        shard_paths(tmp_path / "nowhere", "train")
    with pytest.raises(DataError, match=r"no fineweb_val_\*\.bin in .*`pgolf data embedded`"):
        shard_paths(tmp_path, "val")
