import json
from concurrent.futures import wait
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pgolf_core.batches import Batches, DocumentStream, TokenStream, training_stream
from pgolf_core.knobs import DataConfig
from pgolf_core.shards import read_shard, shard_paths, write_shard

GOLDEN = Path(__file__).parents[1] / "golden"
LOADER = json.loads((GOLDEN / "loader.json").read_text())


@pytest.mark.parametrize("case", LOADER["cases"], ids=lambda c: f"{c['rank']}of{c['world_size']}")
def test_golden_batches(case):
    config = DataConfig(
        train_batch_tokens=LOADER["train_batch_tokens"],
        train_seq_len=LOADER["train_seq_len"],
        world_size=case["world_size"],
    )
    assert config.grad_accum == case["grad_accum_steps"]
    batches = Batches(TokenStream(shard_paths(GOLDEN / "shards", "train")), config, case["rank"])
    for first, last, shape in case["batches"]:
        x, y = batches.next()
        assert x.dtype == y.dtype == torch.int64
        assert (x[0, :4].tolist(), y[-1, -4:].tolist(), list(x.shape)) == (first, last, shape)
        assert torch.equal(x.flatten()[1:], y.flatten()[:-1])


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_fewer_passes_hold_the_same_spans(ranks):
    """Every number of passes a step trains each rank on the same sequences, in the same order."""
    knobs = dict(train_batch_tokens=1024, train_seq_len=32, world_size=ranks)
    for rank in range(ranks):
        seen = []
        for passes in (8 // ranks, 1):
            config = DataConfig(**knobs, grad_accum_steps=passes)
            batches = Batches(TokenStream(shard_paths(GOLDEN / "shards", "train")), config, rank)
            steps = [batches.next() for _ in range(2 * passes)]  # two steps
            seen.append([torch.cat(part) for part in zip(*steps, strict=True)])
            assert len(steps[0][0]) == 1024 // 32 // ranks // passes
            position = batches.position
        assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
        assert position == (0, 2 * 8 * (1024 // 8 + 1))


@given(st.lists(st.integers(1, 9000), min_size=1, max_size=8), st.integers(1, 5000))
def test_seek_goes_on_with_the_same_tokens(takes, more):
    paths = shard_paths(GOLDEN / "shards", "train")
    corpus = np.concatenate([read_shard(path) for path in paths])
    stream = TokenStream(paths)
    taken = np.concatenate([stream.take(n) for n in takes])
    assert np.array_equal(taken, np.resize(corpus, len(taken)))  # np.resize repeats it for ever, too
    position = json.loads(json.dumps(stream.position))
    expected = stream.take(more)
    other = TokenStream(paths)
    other.seek(position)
    assert np.array_equal(other.take(more), expected)
    stream.seek((0, 0))
    assert np.array_equal(stream.take(sum(takes)), taken)


# The next batch, made ahead


def config(**knobs):
    return DataConfig(**{"train_batch_tokens": 128, "train_seq_len": 16} | knobs)


def test_position_is_of_the_batch_that_was_given():
    batches = Batches(TokenStream(shard_paths(GOLDEN / "shards", "train")), config())
    assert batches.position == (0, 0)
    for i in range(1, 40):
        batches.next()
        assert batches.position[0] > 0 or batches.position == (0, 17 * i)
    wait([batches._ahead])
    assert batches.stream.position == (batches.position[0], batches.position[1] + 17)  # the next one is made
    position = json.loads(json.dumps(batches.position))
    expected = [batches.next() for _ in range(5)]
    batches.seek(position)
    for x, y in expected:
        again = batches.next()
        assert torch.equal(x, again[0]) and torch.equal(y, again[1])


def test_batches_are_the_tokens_in_order():
    paths = shard_paths(GOLDEN / "shards", "train")
    corpus = np.concatenate([read_shard(path) for path in paths]).astype(np.int64)
    batches = Batches(TokenStream(paths), config())
    for i in range(3 * len(corpus) // 17):
        x, y = batches.next()
        expected = np.take(corpus, range(17 * i, 17 * i + 17), mode="wrap")
        assert x.flatten().tolist() == expected[:-1].tolist() and y.flatten().tolist() == expected[1:].tolist()


# Shuffled documents


@pytest.fixture
def shuffled(tmp_path):
    """Forty documents of one to thirty tokens, BOS first and then their own number, cut into shards anywhere."""
    rng = np.random.default_rng(0)
    documents = [[1, *[10 + i] * rng.integers(0, 30)] for i in range(40)]
    tokens = np.concatenate(documents)
    for i, part in enumerate(np.split(tokens, [37, 38, 200, 399])):
        write_shard(tmp_path / f"fineweb_train_{i:06d}.bin", part)
    return shard_paths(tmp_path, "train"), documents, len(tokens)


def split(tokens):
    return [part.tolist() for part in np.split(tokens, np.flatnonzero(tokens == 1)) if len(part)]


def test_shuffled_documents_come_once_an_epoch(shuffled):
    paths, documents, size = shuffled
    stream = DocumentStream(paths, 1, seed=7)
    first, second = split(stream.take(size)), split(stream.take(size))
    assert sorted(first) == sorted(second) == sorted(documents)
    assert first != documents and first != second
    assert split(DocumentStream(paths, 1, seed=7).take(size)) == first
    assert split(DocumentStream(paths, 1, seed=8).take(size)) != first


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(takes=st.lists(st.integers(1, 700), min_size=1, max_size=8))
def test_shuffled_stream_seeks(shuffled, takes):
    paths, *_ = shuffled
    stream, whole = DocumentStream(paths, 1, seed=3), DocumentStream(paths, 1, seed=3)
    expected = whole.take(sum(takes) + 100)
    taken = np.concatenate([stream.take(n) for n in takes])
    other = DocumentStream(paths, 1, seed=3)
    other.seek(json.loads(json.dumps(stream.position)))
    assert np.array_equal(np.concatenate([taken, other.take(100)]), expected)


def test_text_before_the_first_document_is_one(tmp_path):
    write_shard(tmp_path / "fineweb_train_000000.bin", [7, 8, 1, 9])
    stream = DocumentStream(shard_paths(tmp_path, "train"), 1, seed=1)
    assert sorted([stream.take(2).tolist(), stream.take(2).tolist()]) == [[1, 9], [7, 8]]


def test_the_knob_chooses_the_stream(shuffled):
    paths, *_ = shuffled
    assert isinstance(training_stream(paths, config(), 1), TokenStream)
    assert training_stream(paths, config(shuffle_documents=5), 1).seed == 5
