import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.shards import write_shard

from pgolf.cli import main
from pgolf.data.dataset import Dataset, describe
from pgolf_core.batches import validation_tokens
from pgolf_core.files import DataError
from pgolf_core.shards import read_shard
from pgolf_core.tokens import ByteTable

TRACE = Path(__file__).parents[1] / "golden" / "trace"


@pytest.fixture
def folder(tmp_path, embedded):
    """A small whole dataset: three shards and the tokenizer with vocab_size 1024."""
    shutil.copy(embedded / "tokenizer.model", tmp_path)
    for name, n in (("train_000000", 500), ("train_000001", 300), ("val_000000", 200)):
        write_shard(tmp_path / f"fineweb_{name}.bin", np.arange(n) * 7 % 1024)
    return tmp_path


# Scored text


@pytest.mark.parametrize(
    ("seq_len", "max_tokens", "scored"),
    [(16, 0, 192), (199, 0, 199), (100, 0, 100), (16, 100, 96), (16, 96, 96), (16, 10**9, 192), (16, 16, 16)],
)
def test_validation_tokens(folder, seq_len, max_tokens, scored):
    tokens = validation_tokens(folder, seq_len, max_tokens)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == (np.arange(scored + 1) * 7 % 1024).tolist()


def documents_of(folder, *lengths):
    """A val split of documents of so many tokens, cut into shards of 50."""
    tokens = np.concatenate([[1, *[5 + i] * (n - 1)] for i, n in enumerate(lengths)])
    for i, start in enumerate(range(0, len(tokens), 50)):
        write_shard(folder / f"fineweb_val_{i:06d}.bin", tokens[start : start + 50])
    return tokens


@pytest.mark.parametrize(("count", "tokens"), [(1, 30), (2, 70), (3, 71), (4, 171)])
def test_validation_documents_are_whole(folder, count, tokens):
    expected = documents_of(folder, 30, 40, 1, 100)[:tokens]
    assert validation_tokens(folder, 16, 8, count).tolist() == expected.tolist()


def test_a_text_is_remembered_until_the_shards_change(folder):
    documents_of(folder, 30, 40, 100)
    dataset = Dataset.open(folder)
    text = dataset.scored_text(16, 0, 2)
    assert text == dataset.text_sha256(dataset.validation(16, 0, 2)) != dataset.scored_text(16)
    cache = folder / ".texts.json"
    cache.write_text(cache.read_text().replace(text, "remembered"))
    assert Dataset.open(folder).scored_text(16, 0, 2) == "remembered"
    documents_of(folder, 30, 41, 100)
    assert Dataset.open(folder).scored_text(16, 0, 2) not in (text, "remembered")
    for content in ("no json", "[]"):
        cache.write_text(content)
        Dataset.open(folder).scored_text(16)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ((200,), "its 70 validation tokens with val_max_tokens=all hold no window of 200 and one more"),
        ((64, 63), "its 70 validation tokens with val_max_tokens=63 hold no window of 64 and one more"),
        ((30, 0, 1), "its 70 validation tokens with val_max_documents=1 hold no window of 30 and one more"),
        ((16, 0, 3), "val_max_documents=3: .* has 2 validation documents"),
    ],
)
def test_too_little_to_score(folder, limits, message):
    for path in folder.glob("fineweb_val_*.bin"):
        path.unlink()
    documents_of(folder, 30, 40)
    with pytest.raises(DataError, match=message):
        validation_tokens(folder, *limits)


@pytest.mark.parametrize(("cap", "score"), [("val_max_tokens", "val"), ("roundtrip_val_max_tokens", "roundtrip_val")])
def test_tokens_and_bytes_of_the_reference(cap, score):
    trace = json.loads((TRACE / "trace.json").read_text())
    tokens = validation_tokens(TRACE / "data", int(trace["knobs"]["train_seq_len"]), int(trace["knobs"][cap]))
    count = int(ByteTable.from_sentencepiece(TRACE / "sp1024.model").count(tokens))
    loss, bpb = trace[f"{score}_loss"], trace[f"{score}_bpb"]
    assert loss / math.log(2) / bpb * (len(tokens) - 1) == pytest.approx(count, rel=3e-5)  # val: 4 decimals


# Folders


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
    for read in (read_shard, lambda path: Dataset.open(path.parent)):
        with pytest.raises(DataError, match=message) as error:
            read(path)
        assert str(path) in str(error.value)


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
    (folder / ".shards.json").mkdir()  # cannot be written, even by root
    before = sorted(folder.iterdir())
    assert Dataset.open(folder, vocab_size=1024).description["val_tokens"] == 200
    assert sorted(folder.iterdir()) == before


def test_description(folder):
    dataset = describe(folder, source={"kind": "test"}, val={"documents": 3})
    about = json.loads((folder / "dataset.json").read_text())
    assert about == dataset.about
    assert (about["source"], about["fingerprint"], about["vocab_size"]) == ({"kind": "test"}, dataset.fingerprint, 1024)
    assert (about["val"]["documents"], about["val"]["tokens"], about["train"]["tokens"]) == (3, 200, 800)
    assert [shard["name"] for shard in about["train"]["shards"]] == [p.name for p in dataset.train_shards]


def test_shards_must_be_those_described(folder):
    describe(folder)
    content = (folder / "fineweb_train_000001.bin").read_bytes()
    write_shard(folder / "fineweb_train_000001.bin", [5] * 300)
    with pytest.raises(DataError, match=r"fineweb_train_000001\.bin: not as dataset\.json lists"):
        Dataset.open(folder)
    (folder / "fineweb_train_000001.bin").unlink()
    write_shard(folder / "fineweb_val_000001.bin", [5] * 300)
    with pytest.raises(DataError, match=r"train_000001\.bin: missing, not as .*\n.*val_000001\.bin: not as"):
        Dataset.open(folder)
    (folder / "fineweb_val_000001.bin").unlink()
    (folder / "fineweb_train_000001.bin").write_bytes(content)
    Dataset.open(folder)
    (folder / "dataset.json").write_text("{")
    with pytest.raises(DataError, match=r"dataset\.json: damaged"):
        Dataset.open(folder)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x0a\x05<unk>" * 50, "truncated", None])
def test_no_sentencepiece_model(folder, content):
    path = folder / "tokenizer.model"
    model = path.read_bytes()
    path.unlink()
    if content is not None:
        path.write_bytes(model[:5000] if content == "truncated" else content)
    message = r"tokenizer_path: (no file .*tokenizer\.model|.*tokenizer\.model is no SentencePiece model)"
    with pytest.raises(DataError, match=message):
        Dataset.open(folder)
    with pytest.raises(DataError, match=message):
        ByteTable.from_sentencepiece(folder / "tokenizer.model")


def test_tokenizer_elsewhere(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("tokenizer") / "t.model"
    shutil.move(folder / "tokenizer.model", elsewhere)
    assert Dataset.open(folder, elsewhere, vocab_size=1024).tokenizer_path == elsewhere
    with pytest.raises(DataError, match=r"vocab_size=4096, .* has vocab_size=1024; set vocab_size=1024"):
        Dataset.open(folder, elsewhere, vocab_size=4096)


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ({"train": None}, "train"), ({"train": {"shards": {}}}, "train.shards"), ({"source": "text"}, "source"),
        ({"val": {"shards": [{"name": "../../x.bin", "tokens": 1, "sha256": ""}]}}, "val.shards.0.name"),
        ({"val": {"shards": [{"name": 7, "tokens": 1, "sha256": ""}]}}, "val.shards.0.name"),
        ({"val": {"shards": [{"tokens": 1, "sha256": ""}]}}, "val.shards.0.name"), ({"vocab_size": "x"}, "vocab_size"),
        ({"val": {"documents": 1.5}}, "val.documents"), ({"source": {"val_documents": []}}, "source.val_documents"),
        ({"tokenizer_sha256": ["a"]}, "tokenizer_sha256"), ({"source": {"manifest": 3}}, "source.manifest"),
    ],
)  # fmt: skip
def test_a_dataset_json_of_wrong_types_names_the_field(folder, content, field):
    (folder / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=rf"dataset.json, {field}: .*; build or download the folder again"):
        Dataset.open(folder)


@pytest.mark.parametrize("about", [None, {}, {"source": {"name": "docs.jsonl"}}])
def test_an_audit_of_documents_without_a_description_says_so(folder, about, capfd):
    if about is not None:
        (folder / "dataset.json").write_text(json.dumps(about))
    (folder / "docs.jsonl").write_text('{"text": "a"}\n')
    assert main.main(["data", "audit", str(folder), "--source", str(folder / "docs.jsonl")]) == 2
    assert "has no dataset.json that says which documents are in it" in capfd.readouterr().err
