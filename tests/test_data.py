import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pgolf_core.config import ROOT, DataConfig
from pgolf_core.data import (
    Batches,
    ByteTable,
    DataError,
    Dataset,
    TokenStream,
    load_sentencepiece,
    read_shard,
    shard_paths,
    validation_tokens,
    write_shard,
)

GOLDEN = Path(__file__).parent / "golden"
TRACE = GOLDEN / "trace"
FINEWEB = ROOT.parent / "shared" / "tokenizers" / "fineweb_8192_bpe.model"
LOADER = json.loads((GOLDEN / "loader.json").read_text())


@pytest.fixture
def folder(tmp_path, embedded):
    """A small whole dataset: three shards and the tokenizer of 1024 pieces."""
    shutil.copy(embedded / "tokenizer.model", tmp_path)
    for name, n in (("train_000000", 500), ("train_000001", 300), ("val_000000", 200)):
        write_shard(tmp_path / f"fineweb_{name}.bin", np.arange(n) * 7 % 1024)
    return tmp_path


# Shards


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


@pytest.mark.parametrize("tokens", [[1, 65536], [-1, 2], [], [[1], [2]], [0.5]])
def test_write_refuses(tmp_path, tokens):
    with pytest.raises(DataError, match=r"x\.bin"):
        write_shard(tmp_path / "x.bin", tokens)
    assert not list(tmp_path.iterdir())


def header_with(index, value):
    def change(content):
        header = np.frombuffer(content[:1024], "<i4").copy()
        header[index] = value
        return header.tobytes() + content[1024:]

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c[:1000], r"1000 bytes are no shard; its header alone has 1024"),
        (lambda c: b"", "0 bytes are no shard"),
        (header_with(0, 7), "begins with 7; .* 20240520"),
        (header_with(1, 2), "version 2; only version 1"),
        (lambda c: c[:-3], r"promises 200 tokens, that is 1424 bytes, and the file has 1421"),
        (lambda c: c + b"\0\0", "promises 200 tokens, .* has 1426; download or build it again"),
        (header_with(2, -5), "promises -5 tokens"),
        (lambda c: header_with(2, 0)(c)[:1024], "holds no tokens"),
    ],
)
def test_damaged_shards(folder, damage, message):
    path = folder / "fineweb_val_000000.bin"
    path.write_bytes(damage(path.read_bytes()))
    for read in (
        read_shard,
        lambda _: Dataset.open(folder, vocab_size=1024),
        lambda _: validation_tokens(folder, 16),
    ):
        with pytest.raises(DataError, match=message) as error:
            read(path)
        assert str(path) in str(error.value)


def test_no_shards(tmp_path):
    with pytest.raises(DataError, match=r"no folder .*nowhere; `pgolf data embedded`"):
        shard_paths(tmp_path / "nowhere", "train")
    with pytest.raises(DataError, match=r"no fineweb_val_\*\.bin in .*`pgolf data embedded`"):
        shard_paths(tmp_path, "val")


# Streams and batches


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


@pytest.mark.parametrize(
    ("seq_len", "max_tokens", "scored"),
    [(16, 0, 192), (199, 0, 199), (100, 0, 100), (16, 100, 96), (16, 96, 96), (16, 10**9, 192), (16, 16, 16)],
)
def test_validation_tokens(folder, seq_len, max_tokens, scored):
    tokens = validation_tokens(folder, seq_len, max_tokens)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == (np.arange(scored + 1) * 7 % 1024).tolist()


def test_validation_tokens_spans_shards(folder):
    write_shard(folder / "fineweb_val_000001.bin", [9] * 100)
    assert validation_tokens(folder, 16)[199:].tolist() == [199 * 7 % 1024] + [9] * 89


@pytest.mark.parametrize(("seq_len", "max_tokens"), [(200, 0), (64, 63)])
def test_validation_too_short(folder, seq_len, max_tokens):
    with pytest.raises(DataError, match=f"200 validation tokens.* no window of {seq_len} and one more"):
        validation_tokens(folder, seq_len, max_tokens)


# Bytes of tokens


def count_row(table, ids):
    ids = torch.tensor(ids)
    return int(table.count(ids[:-1], ids[1:]))


def test_bytes_of_every_validation_document(embedded):
    sp, table = (
        load_sentencepiece(embedded / "tokenizer.model"),
        ByteTable.from_sentencepiece(embedded / "tokenizer.model"),
    )
    tokens = np.concatenate([read_shard(path) for path in shard_paths(embedded, "val")])
    documents = np.split(tokens, np.flatnonzero(tokens == sp.bos_id())[1:])
    assert len(documents) == 200
    total = 0
    for document in documents:
        written = len(sp.decode(document.tolist()).encode())
        assert count_row(table, document.tolist()) == written
        total += written
    assert count_row(table, tokens.tolist()) == total


TEXTS = [
    "",
    " ",
    "a",
    "  two  spaces   three ",
    "tabs\tand\nlines\r\n\r\n end\t",
    "naïve café, Ελληνικά, עברית, 日本語の文章。中文没有空格 한국어",
    "👩‍👩‍👧‍👦 🇪🇺 e\u0301 ﬁ ① Å \U0001d54f \U0010ffff",
    "▁ U+2581 ▁▁ and ▅ and <0x0A> <s> </s> <unk> <pad>",
    "12345 3.14e-10 \x00\x01\x7f\u00a0\u3000\u200b\ufeff\ufffd",
    "x" * 5000 + " " + "日" * 300,
]


@pytest.fixture(scope="module", params=["embedded", "fineweb"])
def tokenizer(request, embedded):
    path = embedded / "tokenizer.model" if request.param == "embedded" else FINEWEB
    if not path.exists():
        pytest.skip(f"no {path}")
    return load_sentencepiece(path), ByteTable.from_sentencepiece(path)


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_of_hard_text(tokenizer, text):
    sp, table = tokenizer
    ids = sp.encode(text, add_bos=True)
    assert count_row(table, ids) == len(sp.decode(ids).encode())


@given(text=st.text())
def test_bytes_of_any_text(tokenizer, text):
    sp, table = tokenizer
    ids = sp.encode(text, add_bos=True)
    assert count_row(table, ids) == len(sp.decode(ids).encode())


def test_byte_table_rules(embedded):
    sp, table = (
        load_sentencepiece(embedded / "tokenizer.model"),
        ByteTable.from_sentencepiece(embedded / "tokenizer.model"),
    )
    the, byte, space, bos, unk = (sp.piece_to_id(p) for p in ("▁the", "<0x0A>", "▁", "<s>", "<unk>"))
    assert len(table.base_bytes) == len(table.is_boundary) == 1024
    assert table.is_boundary.nonzero().flatten().tolist() == [0, 1, 2, 3]
    for row, count in [((the, the), 4), ((bos, the), 3), ((unk, the), 3), ((the, bos), 0), ((the, byte), 1)]:
        assert count_row(table, row) == count
    assert (count_row(table, (the, space)), count_row(table, (bos, space))) == (1, 0)
    ids = torch.tensor([[the, the], [bos, byte]])
    assert int(table.to("cpu").count(ids, ids)) == 4 + 4 + 0 + 1


@pytest.mark.parametrize(("cap", "score"), [("val_max_tokens", "val"), ("roundtrip_val_max_tokens", "roundtrip_val")])
def test_tokens_and_bytes_of_the_reference(cap, score):
    trace = json.loads((TRACE / "trace.json").read_text())
    tokens = validation_tokens(TRACE / "data", int(trace["knobs"]["train_seq_len"]), int(trace["knobs"][cap]))
    count = int(ByteTable.from_sentencepiece(TRACE / "sp1024.model").count(tokens[:-1], tokens[1:]))
    loss, bpb = trace[f"{score}_loss"], trace[f"{score}_bpb"]
    assert loss / math.log(2) / bpb * (len(tokens) - 1) == pytest.approx(count, rel=3e-5)  # val: 4 decimals


# Datasets


def test_dataset(folder):
    dataset = Dataset.open(folder, vocab_size=1024)
    assert [p.name for p in dataset.train_shards] == ["fineweb_train_000000.bin", "fineweb_train_000001.bin"]
    assert (dataset.description["train_tokens"], dataset.description["val_tokens"]) == (800, 200)
    assert dataset.tokenizer_path == folder / "tokenizer.model"
    json.dumps(dataset.description)


def test_fingerprint(folder, tmp_path_factory):
    fingerprint = Dataset.open(folder, vocab_size=1024).fingerprint
    moved = shutil.copytree(folder, tmp_path_factory.mktemp("moved") / "elsewhere", copy_function=shutil.copyfile)
    assert Dataset.open(moved, vocab_size=1024).fingerprint == fingerprint

    first, second = sorted(moved.glob("fineweb_train*"))
    first.rename(moved / "aside")
    second.rename(first)
    (moved / "aside").rename(second)
    swapped = Dataset.open(moved, vocab_size=1024).fingerprint

    write_shard(second, np.arange(500) * 7 % 1024 + (np.arange(500) == 3))
    changed = Dataset.open(moved, vocab_size=1024).fingerprint

    tokenizer = folder / "tokenizer.model"
    tokenizer.write_bytes(tokenizer.read_bytes() + b"\xa0\x06\x01")  # a field SentencePiece does not know
    other_tokenizer = Dataset.open(folder, vocab_size=1024).fingerprint
    assert len({fingerprint, swapped, changed, other_tokenizer}) == 4


def test_hashes_are_remembered_until_a_shard_changes(folder):
    Dataset.open(folder, vocab_size=1024)
    cache = folder / ".shards.json"
    facts = json.loads(cache.read_text())
    facts["fineweb_val_000000.bin"]["sha256"] = "remembered"
    cache.write_text(json.dumps(facts))
    assert Dataset.open(folder, vocab_size=1024).description["val"][0]["sha256"] == "remembered"
    write_shard(folder / "fineweb_val_000000.bin", [5] * 200)
    assert Dataset.open(folder, vocab_size=1024).description["val"][0]["sha256"] != "remembered"
    cache.write_text("no json")
    Dataset.open(folder, vocab_size=1024)
    assert json.loads(cache.read_text())


def test_folder_that_cannot_be_written(folder):
    (folder / ".shards.json").mkdir()  # as good as read-only, and stops root too
    before = sorted(folder.iterdir())
    assert Dataset.open(folder, vocab_size=1024).description["val_tokens"] == 200
    assert sorted(folder.iterdir()) == before


def test_wrong_vocabulary(folder):
    with pytest.raises(DataError, match=r"vocab_size=4096, .* has 1024 pieces; set vocab_size=1024"):
        Dataset.open(folder, vocab_size=4096)


def test_token_outside_the_vocabulary(folder):
    write_shard(folder / "fineweb_train_000001.bin", [3, 1024, 5])
    with pytest.raises(DataError, match=r"fineweb_train_000001\.bin: holds token 1024, .* last is 1023"):
        Dataset.open(folder, vocab_size=1024)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x0a\x05<unk>" * 50, None])
def test_no_sentencepiece_model(folder, content):
    (folder / "tokenizer.model").unlink()
    if content is not None:
        (folder / "tokenizer.model").write_bytes(content)
    message = r"tokenizer_path: (no file .*tokenizer\.model|.*tokenizer\.model is no SentencePiece model)"
    with pytest.raises(DataError, match=message):
        Dataset.open(folder, vocab_size=1024)
    with pytest.raises(DataError, match=message):
        ByteTable.from_sentencepiece(folder / "tokenizer.model")


def test_truncated_sentencepiece_model(folder):
    path = folder / "tokenizer.model"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match="is no SentencePiece model"):
        Dataset.open(folder, vocab_size=1024)


def test_tokenizer_elsewhere(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("tokenizer") / "t.model"
    shutil.move(folder / "tokenizer.model", elsewhere)
    assert Dataset.open(folder, elsewhere, vocab_size=1024).tokenizer_path == elsewhere
