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

from pgolf_core.batches import Batches, DocumentStream, SequenceStream, TokenStream, training_stream
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
@pytest.mark.parametrize("kind", ["in order", "documents", "sequences", "coprime"])
def test_a_stream_goes_on_from_its_position(shuffled, kind, takes, more):
    def make():
        if kind == "documents":
            return DocumentStream(shuffled[0], 1, seed=3)
        return TokenStream(PATHS) if kind == "in order" else SequenceStream(shuffled[0], 16, 3, kind == "coprime")

    stream, other, whole = make(), make(), make().take(sum(takes) + more)
    assert kind != "in order" or np.array_equal(whole, np.resize(CORPUS, len(whole)))  # np.resize repeats it
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
    for coprime, name in enumerate(("shuffle_sequences", "coprime_sequences")):
        stream = training_stream(PATHS, config(**{name: 5}), 1)
        assert (stream.seed, stream.sequence, stream.coprime) == (5, 16, coprime)


# Orders of sequences


@pytest.fixture
def numbered(tmp_path):
    """Paths of three shards of consecutive numbers, of 1,000, 10 and 3,000 tokens."""
    for i, part in enumerate(np.split(np.arange(4010), [1000, 1010])):
        write_shard(tmp_path / f"fineweb_train_{i:06d}.bin", part)
    return shard_paths(tmp_path, "train")


def starts_of_epochs(paths, coprime, seed, epochs=2):
    """First tokens of every sequence of 16 and its last target, epoch by epoch; each sequence is consecutive."""
    stream, starts = SequenceStream(paths, 16, seed, coprime), [[] for _ in range(epochs)]
    while stream.epoch < epochs and not (stream.epoch == epochs - 1 and stream.done == len(stream.firsts)):
        if stream.done == len(stream.firsts):
            stream.seek((stream.epoch + 1, 0, 0))
        epoch, tokens = stream.epoch, stream.take(17)
        assert np.array_equal(tokens, tokens[0] + np.arange(17))
        starts[epoch].append(int(tokens[0]))
    return starts


@pytest.mark.parametrize("coprime", [False, True])
def test_sequences_come_once_an_epoch_whole_and_within_their_shard(numbered, coprime):
    first, second = starts_of_epochs(numbered, coprime, seed=7)
    assert first != second and first != sorted(first)
    assert starts_of_epochs(numbered, coprime, seed=7)[0] == first != starts_of_epochs(numbered, coprime, seed=8)[0]
    for starts in (first, second):
        for begin, end in ((0, 1000), (1010, 4010)):  # the shard between is shorter than a sequence
            own = sorted(s for s in starts if begin <= s < end)
            assert np.all(np.diff(own) == 16) and own[0] < begin + 16
            assert len(own) == (end - begin - 1 - (own[0] - begin)) // 16 and own[-1] + 17 <= end
        assert len(starts) == len(set(starts))


def test_coprime_order_is_a_stride_through_every_shard_and_mixes_them(numbered):
    (starts,) = starts_of_epochs(numbered, True, seed=7, epochs=1)
    for begin, end in ((0, 1000), (1010, 4010)):
        own = np.array([s for s in starts if begin <= s < end])
        places = (own - own.min()) // 16
        strides = np.unique(np.diff(places) % len(own))
        assert len(strides) == 1 and np.gcd(strides[0], len(own)) == 1
    early = np.array(starts[: len(starts) // 4])
    assert 0.2 < (early < 1000).mean() < 0.3  # a quarter of all tokens


@pytest.mark.parametrize("ranks", [1, 2])
def test_batches_of_whole_sequences_keep_each_with_its_own_last_target(numbered, ranks):
    seen = []
    for rank in range(ranks):
        data = config(train_batch_tokens=256, world_size=ranks, shuffle_sequences=7)
        batches = Batches(SequenceStream(numbered, 16, 7, False), data, rank)
        parts = [batches.next() for _ in range(data.grad_accum)]
        assert all(torch.equal(x + 1, y) and x.shape == (2, 16) for x, y in parts)
        seen += [x[:, 0] for x, _ in parts]
        assert batches.tokens == 256
    stream = SequenceStream(numbered, 16, 7, False)
    assert sorted(torch.cat(seen).tolist()) == sorted(int(stream.take(17)[0]) for _ in range(16))


def test_shards_too_short_for_a_sequence_are_refused(numbered):
    with pytest.raises(DataError, match=r"train_seq_len=3000: no shard beside .* is longer than one sequence"):
        SequenceStream(numbered, 3000, 1, False)


# Schedules of batch size and sequence length


def test_stages_hold_until_their_share_of_training():
    c = config(train_batch_schedule="256@0.5", train_seq_schedule="4@0.1,8@0.7,16@1.0")
    assert [c.stage(f) for f in (0, 0.1, 0.5, 0.69, 0.7, 1)] == [
        (256, 4), (256, 8), (128, 8), (128, 8), (128, 16), (128, 16)
    ]  # fmt: skip
    assert c.stages == [(256, 4), (256, 8), (128, 8), (128, 16)]
    assert config().stages == [(128, 16)]


def test_a_new_stage_goes_on_with_the_next_token_in_its_own_shape():
    batches = Batches(TokenStream(PATHS), config(train_seq_schedule="8@0.5", train_batch_schedule="64@0.5"))
    taken = []
    for fraction in (0.0, 0.2, 0.5, 0.9):
        batches.enter(batches.config.stage(fraction))
        taken.append(batches.next()[0])
    assert [tuple(x.shape) for x in taken] == [(1, 8), (1, 8), (1, 16), (1, 16)]
    assert torch.equal(torch.cat([x.flatten() for x in taken]), torch.from_numpy(CORPUS[:52].astype(np.int64))[
        torch.tensor([*range(8), *range(9, 17), *range(18, 34), *range(35, 51)])
    ])  # fmt: skip
    assert batches.tokens == 48
