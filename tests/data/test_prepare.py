import hashlib
import json
import os
import threading

import pytest
import torch
from build_helpers import TEXTS, build, chain, content, encoded, rows, words, written
from support.corpus import HARD_TEXTS

from pgolf.data import dataset as data
from pgolf.data import documents, prepare, shard_writer, train_tokenizer
from pgolf.data.dataset import Dataset
from pgolf.data.documents import Texts, open_source
from pgolf.data.prepare import BuildRequest
from pgolf_core.files import DataError
from pgolf_core.shards import read_shard, shard_paths

# Content of the folder


@pytest.mark.parametrize(("kind", "vocab_size"), [("bpe", 330), ("unigram", 315), ("bytes", 260)])
def test_folder(tmp_path, source, kind, vocab_size, capsys):
    options = dict(val_documents=60, keep_overlap=True)
    made = dict(kind=kind, vocab_size=vocab_size, tokenizer_documents=100)
    directory = build(source, tmp_path / "out", about={"commit": "abc"}, **options, **made)
    train, val = TEXTS[60:], TEXTS[:60]
    assert rows(directory, "train") == encoded(directory, train)
    assert rows(directory, "val") == encoded(directory, val)
    about = Dataset.open(directory).about
    assert about["source"]["name"] == "docs.jsonl" and about["commit"] == "abc"
    for split, texts in (("train", train), ("val", val)):
        assert about[split]["documents"] == len(texts) and about[split]["documents_sha256"] == chain(texts)
        assert about[split]["text_bytes"] == sum(len(text.encode()) for text in texts)
        assert about[split]["tokens"] == sum(len(row) for row in rows(directory, split))
    out = capsys.readouterr().out
    assert f"{about['train']['tokens']:,} training tokens of 109 documents" in out
    assert (f"training a tokenizer, vocab_size {vocab_size} …" in out) == (kind != "bytes")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["docs.jsonl", "out", "out.lock"]

    name = "tokenizer.json" if kind == "bytes" else "tokenizer.model"
    if kind != "bytes":
        expected = train_tokenizer.train(TEXTS[60:100], kind, vocab_size)
        assert (directory / name).read_bytes() == expected
    again = build(Texts(TEXTS, "same"), tmp_path / "again", tokenizer_path=directory / name, **options)
    assert Dataset.open(again).fingerprint == Dataset.open(directory).fingerprint


@pytest.mark.parametrize("sees_val", [False, True])
def test_documents_of_the_tokenizer(tmp_path, sees_val):
    """The tokenizer is trained on the first documents of the source, even if fewer are taken."""
    options = dict(documents=30, val_documents=20, tokenizer_documents=70, keep_overlap=True)
    directory = build(Texts(TEXTS, "x"), tmp_path / "out", vocab_size=330, tokenizer_sees_val=sees_val, **options)
    expected = train_tokenizer.train(TEXTS[0 if sees_val else 20 : 70], "bpe", 330)
    assert (directory / "tokenizer.model").read_bytes() == expected
    assert Dataset.open(directory).about["train"]["documents"] == 10


def test_same_bytes_for_all_workers_and_blocks(tmp_path, tokenizers, source, monkeypatch):
    options, built = dict(tokenizer_path=tokenizers["bpe330"], val_share=0.2, shard_tokens=700), []
    for workers, size in ((1, 1 << 19), (2, 1), (5, 200), (1, 1000)):
        monkeypatch.setattr(documents, "BLOCK_BYTES", size)
        built.append(content(build(source, tmp_path / f"{workers}-{size}", workers=workers, **options)))
    assert built[0] == built[1] == built[2] == built[3] and len(built[0]) > 8
    about = json.loads(built[0]["dataset.json"])
    assert [shard["tokens"] for shard in about["train"]["shards"]][:-1] == [700] * (len(about["train"]["shards"]) - 1)


@pytest.mark.parametrize("tokens", [1, 9, 10, 11, 30])
def test_shards_that_end_where_documents_do(tmp_path, tokenizers, tokens):
    source = Texts(["aaaaaaaaa"] * 4, "x")  # ten tokens each
    options = dict(tokenizer_path=tokenizers["bytes260"], val_documents=1, keep_overlap=True)
    directory = build(source, tmp_path / "out", shard_tokens=tokens, **options)
    expected = [1, *[4 + ord("a")] * 9]
    assert rows(directory, "train") == [expected] * 3 and rows(directory, "val") == [expected]
    sizes = [len(read_shard(path)) for path in shard_paths(directory, "train")]
    assert sizes == [tokens] * (30 // tokens) + [30 % tokens] * (30 % tokens > 0)


def test_fewer_documents_are_the_first(tmp_path, tokenizers, source, small_blocks):
    options = dict(tokenizer_path=tokenizers["bpe330"], val_documents=7, keep_overlap=True)
    whole = build(source, tmp_path / "whole", **options)
    for count in (8, 61, len(TEXTS), len(TEXTS) + 1):
        part = build(source, tmp_path / f"{count}", documents=count, **options)
        assert rows(part, "val") == rows(whole, "val")
        assert rows(part, "train") == rows(whole, "train")[: count - 7]


def test_blocks_without_a_document(tmp_path, tokenizers, small_blocks):
    texts = words(9)
    (tmp_path / "docs.txt").write_text(("\n" * 1000).join(texts), encoding="utf-8")
    options = dict(tokenizer_path=tokenizers["bpe330"], val_documents=3)
    directory = build(open_source(tmp_path / "docs.txt"), tmp_path / "out", **options)
    assert rows(directory, "val") + rows(directory, "train") == encoded(directory, texts)


# Splits


def test_overlap_is_left_out(tmp_path, tokenizers, capsys, small_blocks):
    texts = ["a", "b", "a", "c", "b", "a ", "d", "d"]
    options = dict(tokenizer_path=tokenizers["bpe330"], val_documents=3)
    directory = build(Texts(texts, "x"), tmp_path / "out", **options)
    assert rows(directory, "val") == encoded(directory, ["a", "b", "a"])
    assert rows(directory, "train") == encoded(directory, ["c", "d", "d"])  # "a " is spelled as "a" is
    assert Dataset.open(directory).about["train"]["left_out"] == 2
    assert "2 training documents left out: validation documents too" in capsys.readouterr().out
    kept = build(Texts(texts, "x"), tmp_path / "kept", keep_overlap=True, **options)
    assert rows(kept, "train") == encoded(kept, ["c", "b", "a ", "d", "d"])


def test_a_share_keeps_equal_texts_together(tmp_path, tokenizers):
    texts = words(1000)
    source = Texts([*texts, *(f" {text} " for text in texts)], "x")  # tokens spell both alike
    directory = build(source, tmp_path / "out", tokenizer_path=tokenizers["bpe330"], val_share=0.1)
    chosen = [text for text in texts if hashlib.sha256(text.encode()).digest()[:8] < (2**64 // 10).to_bytes(8, "big")]
    assert 70 < len(chosen) < 130
    assert rows(directory, "val") == encoded(directory, chosen * 2)
    assert Dataset.open(directory).about["train"]["documents"] == 2000 - 2 * len(chosen)
    more = build(source, tmp_path / "more", tokenizer_path=tokenizers["bpe330"], val_share=0.2)
    there = {tuple(row) for row in rows(more, "val")}
    assert {tuple(row) for row in rows(directory, "val")} < there


# One text, several tokenizers


def test_all_tokenizers_spell_the_same_bytes(tmp_path, tokenizers):
    counts, texts = {}, {}
    for name, path in tokenizers.items():
        directory = build(Texts(TEXTS, "x"), tmp_path / name, tokenizer_path=path, val_documents=80, keep_overlap=True)
        dataset = Dataset.open(directory)
        assert dataset.tokenizer.vocab_size == int(name[-3:])
        counts[name] = []
        for split in data.SPLITS:
            for row in rows(directory, split):
                ids = torch.tensor(row)
                counts[name].append(int(dataset.byte_table.count(ids)))
        texts[name] = dataset.text_sha256(dataset.validation(1, max_documents=80))
        assert counts[name][len(TEXTS) - 80] == len(dataset.tokenizer.normalize(TEXTS[0]).encode())
    first = counts["bpe330"]
    assert all(of_one == first for of_one in counts.values()), counts
    assert len(set(texts.values())) == 1
    assert len(first) == len(TEXTS) and first[-80 - len(HARD_TEXTS)] == 0 and sum(first) > 10_000


# Again, and resumed


def test_done_is_done(tmp_path, tokenizers, source, capsys, monkeypatch):
    options = dict(tokenizer_path=tokenizers["bpe330"], val_documents=9)
    directory = build(source, tmp_path / "out", **options)
    before = {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}
    capsys.readouterr()
    monkeypatch.setattr(prepare, "_write_shards", None)
    assert build(source, directory, **options) == directory
    assert {path.name: path.stat().st_mtime_ns for path in directory.iterdir()} == before
    assert capsys.readouterr().out.startswith(f"{directory}: ")
    os.utime(tmp_path / "docs.jsonl")
    build(open_source(tmp_path / "docs.jsonl"), directory, **options)
    assert "docs.jsonl was written to since" in capsys.readouterr().out

    with pytest.raises(
        DataError, match=r"made otherwise: val_documents 9 \(asked: 10\); delete .*/out, or name another"
    ):
        build(source, directory, **options | {"val_documents": 10})
    with pytest.raises(DataError, match=r"val_documents 9 \(asked: none\), val_share none \(asked: 0\.1\); delete"):
        build(source, directory, tokenizer_path=tokenizers["bpe330"], val_share=0.1)
    with pytest.raises(DataError, match=r"tokenizer .*'sha256'.*asked: .*'kind': 'bpe'"):
        build(source, directory, val_documents=9)
    with pytest.raises(DataError, match=r"bytes \d+ \(asked: \d+\), sha256 "):
        build(written(tmp_path / "docs.jsonl", TEXTS[1:]), directory, **options)
    (directory / "dataset.json").unlink()
    with pytest.raises(DataError, match="without a complete corpus; delete"):
        build(source, directory, **options)


def test_a_folder_of_the_old_code_is_as_asked_for(tmp_path, tokenizers, source):
    """The keys under `source` in a dataset.json decide if a folder is built again."""
    directory = build(source, tmp_path / "out", vocab_size=330, val_documents=20, tokenizer_documents=100)
    asked = Dataset.open(directory).about["source"]
    assert asked == {
        **source.about(),
        **{"documents_taken": 0, "val_documents": 20, "keep_overlap": False, "shard_tokens": 100_000_000},
        "tokenizer": {"kind": "bpe", "vocab_size": 330, "documents": 100, "sees_val": False},
    }
    share = BuildRequest(val_share=0.1, kind="bytes", vocab_size=260).describe(source)
    assert share["val_share"] == 0.1 and "keep_overlap" not in share
    assert share["tokenizer"] == {"kind": "bytes", "vocab_size": 260}


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(), "set either val_documents .* or val_share"),
        (dict(val_documents=1, val_share=0.1), "val_documents=1 and val_share=0.1: set either val_documents"),
        (dict(val_share=1.0), "val_share=1.0: set"),
        (dict(val_share=-0.1), "val_share=-0.1: set"),
        (dict(documents=5, val_documents=5), "val_documents=5: no document of documents=5"),
        (dict(val_documents=3, kind="wordpiece"), "tokenizer=wordpiece: choose"),
        (dict(val_documents=3, kind="bytes"), "set vocab_size=260"),
        (dict(val_documents=3, vocab_size=65_537), "vocab_size=65537: shards hold tokens of vocab_size <= 65536"),
        (dict(val_documents=3, vocab_size=60_000), "vocab_size=60000: this text gives no more than"),
        (dict(val_documents=50, tokenizer_documents=50), "no document of tokenizer_documents=50 is left to train on"),
        (dict(val_documents=3, tokenizer_path="nowhere"), "tokenizer_path: no file nowhere"),
        (dict(val_documents=5000, kind="bytes", vocab_size=260), "x: 169 documents give 0 for training and 169 for"),
        (dict(val_share=1e-9, kind="bytes", vocab_size=260), "169 for training and 0 for validation, and both need"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(DataError, match=message):
        build(Texts(TEXTS, "x"), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", [True, False])
def test_a_bad_line_among_good_ones(tmp_path, tokenizers, given, small_blocks):
    """The line is named in one message, no worker outlives the error, and the build goes through once it is fixed."""
    lines = [json.dumps({"text": text}) for text in words(300)]
    path = tmp_path / "docs.jsonl"
    path.write_text("\n".join([*lines[:200], '{"text": ', *lines[200:]]), encoding="utf-8")
    options = dict(tokenizer_path=tokenizers["bpe330"]) if given else dict(vocab_size=330)
    others = set(threading.enumerate())
    with pytest.raises(DataError, match=r"docs.jsonl, line 201: not JSON") as error:
        build(open_source(path), tmp_path / "out", val_documents=3, workers=2, **options)
    started = [thread for thread in set(threading.enumerate()) - others if thread.name != "tqdm_monitor"]
    assert "\n" not in str(error.value) and not started
    path.write_text("\n".join(lines), encoding="utf-8")
    directory = build(open_source(path), tmp_path / "out", val_documents=3, **options)
    assert rows(directory, "train") == encoded(directory, words(300)[3:])


def test_memory_stays_small(tmp_path, tokenizers, monkeypatch):
    """Blocks are read ahead only as far as the workers need."""
    monkeypatch.setattr(documents, "BLOCK_BYTES", 1000)
    source, read, most = written(tmp_path / "docs.jsonl", words(2000)), [0, 0], [0]
    blocks, add = documents.Files.blocks, shard_writer.SplitWriter.add

    def counted(self, *arguments):
        for block in blocks(self, *arguments):
            read[0] += 1
            most[0] = max(most[0], read[0] - read[1])
            yield block

    def added(self, *arguments):
        read[1] += self.name == "val"
        return add(self, *arguments)

    monkeypatch.setattr(documents.Files, "blocks", counted)
    monkeypatch.setattr(shard_writer.SplitWriter, "add", added)
    build(source, tmp_path / "out", tokenizer_path=tokenizers["bpe330"], val_share=0.1, workers=2)
    assert read[0] == read[1] > 100 and most[0] <= 6
