"""Shards byte by byte, batches against recorded ones, streams that give every token in order and go on anywhere."""

import json
from concurrent.futures import wait

import numpy as np
import pytest
import torch
from golden_vectors import golden_path
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.shards import write_shard

from pgolf_core.batches import Batches, DocumentStream, TokenStream, training_stream
from pgolf_core.files import DataError
from pgolf_core.knobs import DataConfig
from pgolf_core.shards import read_shard, shard_paths

RECORDED = json.loads(golden_path("loader.json").read_text())
PATHS = shard_paths(golden_path("shards"), "train")
CORPUS = np.concatenate([read_shard(path) for path in PATHS])


def test_shard_bytes(tmp_path):
    path = write_shard(tmp_path / "x.bin", [1, 0x0203, 65535])
    content = path.read_bytes()
    header = np.frombuffer(content[:1024], "<i4")
    assert header[:3].tolist() == [20240520, 1, 3] and not header[3:].any()
    assert content[1024:] == b"\x01\x00\x03\x02\xff\xff" and read_shard(path).tolist() == [1, 0x0203, 65535]


def test_no_shards(tmp_path):
    with pytest.raises(DataError, match=r"no folder .*nowhere; `pgolf data embedded`"):
        shard_paths(tmp_path / "nowhere", "train")
    with pytest.raises(DataError, match=r"no fineweb_val_\*\.bin in .*`pgolf data embedded`"):
        shard_paths(tmp_path, "val")


def config(**knobs):
    return DataConfig(**{"train_batch_tokens": 128, "train_seq_len": 16} | knobs)


@pytest.mark.parametrize("case", RECORDED["cases"], ids=lambda c: f"{c['rank']}of{c['world_size']}")
def test_golden_batches(case):
    knobs = {name: RECORDED[name] for name in ("train_batch_tokens", "train_seq_len")}
    data = DataConfig(**knobs, world_size=case["world_size"])
    assert data.grad_accum == case["grad_accum_steps"]
    batches = Batches(TokenStream(PATHS), data, case["rank"])
    for first, last, shape in case["batches"]:
        x, y = batches.next()
        assert x.dtype == y.dtype == torch.int64
        assert (x[0, :4].tolist(), y[-1, -4:].tolist(), list(x.shape)) == (first, last, shape)
        assert torch.equal(x.flatten()[1:], y.flatten()[:-1])


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_any_number_of_passes_trains_a_rank_on_the_same_sequences_in_the_same_order(ranks):
    for rank in range(ranks):
        seen = []
        for passes in (8 // ranks, 1):
            data = config(train_batch_tokens=1024, train_seq_len=32, world_size=ranks, grad_accum_steps=passes)
            batches = Batches(TokenStream(PATHS), data, rank)
            steps = [batches.next() for _ in range(2 * passes)]  # two steps
            seen.append([torch.cat(part) for part in zip(*steps, strict=True)])
            assert len(steps[0][0]) == 1024 // 32 // ranks // passes
            assert batches.position == (0, 2 * 8 * (1024 // 8 + 1))
        assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_position_is_of_the_batch_that_was_given_not_of_the_one_made_ahead():
    batches = Batches(TokenStream(PATHS), config())
    assert batches.position == (0, 0)
    for i in range(1, 40):
        batches.next()
        assert batches.position[0] > 0 or batches.position == (0, 17 * i)
    wait([batches._ahead])
    assert batches.stream.position == (batches.position[0], batches.position[1] + 17)
    state = json.loads(json.dumps(batches.state_dict()))
    expected = [batches.next() for _ in range(5)]
    batches.load_state_dict(state)
    for x, y in expected:
        again = batches.next()
        assert torch.equal(x, again[0]) and torch.equal(y, again[1])


# Shuffled documents


@pytest.fixture
def shuffled(tmp_path):
    """Paths of four shards, cut anywhere, and their forty documents: BOS, then 0 to 29 times their own number."""
    rng = np.random.default_rng(0)
    documents = [[1, *[10 + i] * rng.integers(0, 30)] for i in range(40)]
    for i, part in enumerate(np.split(np.concatenate(documents), [37, 38, 200, 399])):
        write_shard(tmp_path / f"fineweb_train_{i:06d}.bin", part)
    return shard_paths(tmp_path, "train"), documents


def test_shuffled_documents_come_once_an_epoch(shuffled):
    paths, documents = shuffled

    def epochs(seed):
        stream, size = DocumentStream(paths, 1, seed), sum(map(len, documents))
        taken = [stream.take(size) for _ in range(2)]
        return [[part.tolist() for part in np.split(tokens, np.flatnonzero(tokens == 1))[1:]] for tokens in taken]

    first, second = epochs(7)
    assert sorted(first) == sorted(second) == sorted(documents)
    assert first != documents and first != second
    assert epochs(7)[0] == first != epochs(8)[0]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(takes=st.lists(st.integers(1, 9000), min_size=1, max_size=8), more=st.integers(1, 5000))
@pytest.mark.parametrize("kind", ["in order", "shuffled"])
def test_a_stream_goes_on_from_its_position(shuffled, kind, takes, more):
    def make():
        return TokenStream(PATHS) if kind == "in order" else DocumentStream(shuffled[0], 1, seed=3)

    stream, other, whole = make(), make(), make().take(sum(takes) + more)
    assert kind == "shuffled" or np.array_equal(whole, np.resize(CORPUS, len(whole)))  # np.resize repeats it
    taken = np.concatenate([stream.take(n) for n in takes])
    other.seek(json.loads(json.dumps(stream.position)))
    assert np.array_equal(np.concatenate([taken, other.take(more)]), whole)
    stream.seek(make().position)
    assert np.array_equal(stream.take(sum(takes)), taken)


def test_text_before_the_first_document_is_one(tmp_path):
    write_shard(tmp_path / "fineweb_train_000000.bin", [7, 8, 1, 9])
    stream = DocumentStream(shard_paths(tmp_path, "train"), 1, seed=1)
    assert sorted([stream.take(2).tolist(), stream.take(2).tolist()]) == [[1, 9], [7, 8]]


def test_the_knob_chooses_the_stream():
    assert isinstance(training_stream(PATHS, config(), 1), TokenStream)
    assert training_stream(PATHS, config(shuffle_documents=5), 1).seed == 5
