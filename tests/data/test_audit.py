import dataclasses
import json
import os
import re
import shutil

import numpy as np
import pytest
from build_helpers import messages, only
from hypothesis import given, settings
from hypothesis import strategies as st
from support.shards import write_shard

from pgolf.data import audit as audits
from pgolf.data import split_stats
from pgolf.data.audit import audit, audit_folder, format_audit, store, stored
from pgolf.data.dataset import Dataset, describe, validation_tokens
from pgolf_core.files import DataError

BOS, EOS, UNK = 1, 2, 3


# Clean data


@pytest.mark.parametrize("thorough", [True, False])
def test_embedded_corpus(dataset, rows, thorough):
    result = audit(dataset, seq_len=64, thorough=thorough)
    assert result.ok and not result.findings and result.thorough == thorough
    val, train = result.figures["val"], result.figures["train"]
    assert (val["documents"], val["tokens"], val["longest_document"]) == (200, sum(map(len, rows)), max(map(len, rows)))
    assert val["bytes"] == sum(len(text.encode()) for text in dataset.tokenizer.decode([r.tolist() for r in rows]))
    assert train["tokens_read"] == train["tokens"] if thorough else train["tokens_read"] < train["tokens"]
    assert result.figures["overlap_documents"] == 0 and result.figures["published"] == ""
    assert 0.999 < result.figures["scored_fraction"] < 1
    assert json.loads(json.dumps(result.figures)) == result.figures
    assert audit_folder(dataset.directory, seq_len=64, thorough=thorough) == result


# Documents


@pytest.mark.parametrize(
    ("val", "message"),
    [
        ([[300, 301], [BOS, 302]], r"val: begins without BOS \(token 1\)"),
        ([[300, 301], [302]], "val: no BOS"),
        ([[BOS, 300, EOS], [BOS, 302]], "val: 1 × </s>, a control token inside a document; the first in document 0$"),
        ([[BOS, 300], [BOS, 302, UNK, 303, UNK]], "val: 2 × <unk>, text that is lost; the first in document 1$"),
        ([[BOS, 300], [BOS, 0, 0]], "val: 2 × <pad>"),
        ([[BOS, 300, 301, 302]], r"val: 1 documents, and dataset\.json lists 2"),
    ],
)
def test_documents(make_folder, rows, val, message):
    val = [[*document, *range(310, 330)] for document in val]
    result = audit(make_folder([[rows[0]]], [val], val={"documents": 2}), seq_len=8)
    assert any(re.match(message, found) for found in messages(result, "documents"))

    result = audit(make_folder([val], [[rows[0]]], name="train", train={"documents": 2}))  # scores do not depend on it
    level = "error" if "no BOS" in message else "warning"
    expected = message.replace("val:", "train:")
    assert any(re.match(expected, found) for found in messages(result, "documents", level))


def test_empty_documents(make_folder, rows):
    result = audit(make_folder([[[BOS], rows[0]]], [[[BOS], [BOS], rows[1]]]))
    assert result.ok and result.figures["overlap_documents"] == 0
    assert messages(result, "documents", "note") == ["val: 2 empty documents", "train: 1 empty documents"]


def test_training_documents_of_the_whole_publication(make_folder, rows):
    about = dict(train={"documents": 15_000_000}, source={"variant": "sp512"}, val={"documents": 2})
    result = audit(make_folder([[rows[0]]], [rows[1:3]], **about))
    assert not messages(result, "documents", "warning")


def test_source_texts(make_folder, rows, dataset):
    texts = dataset.tokenizer.decode([row.tolist() for row in rows[:20]])
    folder = make_folder([[rows[100]]], [rows[:12], rows[12:20]])
    assert audit(folder, documents=[f"  {text}\n\n" for text in texts]).ok  # equal when normalised
    message = only(audit(folder, documents=[*texts[:19], texts[19] + " More."]), "bytes")
    assert message.startswith("1 of 20 val documents: the table counts") and "the first: document 19, " in message
    assert "20 validation documents, and 19 texts" in only(audit(folder, documents=texts[:19]), "bytes")
    assert "20 validation documents, and 21 texts" in only(audit(folder, documents=[*texts, "a"]), "bytes")


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    cuts=st.lists(st.integers(1, 200), max_size=5),
    size=st.sampled_from([1, 7, 50, 1 << 20]),
)
def test_documents_are_whole_wherever_shards_and_batches_end(tmp_path_factory, lengths, cuts, size):
    documents = [np.array([BOS, *range(10 * i + 10, 10 * i + 10 + n)], np.uint16) for i, n in enumerate(lengths)]
    tokens = np.concatenate(documents)
    folder = tmp_path_factory.mktemp("shards")
    parts = [part for part in np.split(tokens, sorted(min(cut, len(tokens)) for cut in cuts)) if len(part)]
    paths = [write_shard(folder / f"fineweb_val_{i:06d}.bin", part) for i, part in enumerate(parts)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split_stats, "BATCH", size)
        batches = list(split_stats.batches(paths, BOS))
    numbered = {batch.first + i: row.tolist() for batch in batches for i, row in enumerate(batch.rows())}
    assert numbered == {i: document.tolist() for i, document in enumerate(documents)}


def test_a_document_without_end_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(split_stats, "BATCH", 10)
    monkeypatch.setattr(split_stats, "LONGEST", 25)
    path = write_shard(tmp_path / "fineweb_val_000000.bin", [BOS, *range(10, 100)])
    rows = [row.tolist() for batch in split_stats.batches([path], BOS) for row in batch.rows()]
    assert max(map(len, rows)) <= 30 and [token for row in rows for token in row] == [BOS, *range(10, 100)]


# Validation text in the training shards


def test_overlap(make_folder, rows, dataset):
    train, val = rows[:30], rows[30:50]
    assert not messages(audit(make_folder([train], [val])), "overlap")
    seen = make_folder([train[:10], [*train[10:], val[7], val[3], train[0]]], [val], name="seen")
    for thorough in (True, False):
        result = audit(seen, thorough=thorough)
        message = only(result, "overlap")
        sizes = [len(text.encode()) for text in dataset.tokenizer.decode([row.tolist() for row in val])]
        assert f"2 of 20 validation documents ({(sizes[7] + sizes[3]) / sum(sizes):.2%} of its bytes)" in message
        assert "val document 3 = train document 31: " in message
        assert dataset.tokenizer.decode([val[3].tolist()])[0][:60] in message
        assert result.figures["overlap_documents"] == 2 and result.figures["overlap_bytes"] == sizes[7] + sizes[3]


def test_overlap_of_a_document_across_shards(make_folder, rows):
    half = len(rows[5]) // 2
    seen = make_folder([[rows[0], rows[5][:half]], [rows[5][half:], rows[1]]], [rows[2:8]])
    message = only(audit(seen), "overlap")
    assert "val document 3 = train document 1: " in message


# How much is scored


def test_a_tenth_of_the_split(dataset, rows):
    result = audit(dataset, max_tokens=sum(map(len, rows)) // 10, thorough=False)
    assert result.ok
    message = only(result, "scored", "warning")
    assert re.match(r"[\d.]+% of the validation split is scored \([\d,]+ of [\d,]+ tokens, ", message)
    assert message.endswith("not a number to publish")
    assert f"{result.figures['scored_fraction']:.2%}" in message and 0.09 < result.figures["scored_fraction"] < 0.11


@settings(max_examples=25)
@given(
    seq_len=st.sampled_from([7, 64, 1024]),
    max_tokens=st.sampled_from([0, 3, 1000, 30_000, 10**9]),
    max_documents=st.sampled_from([0, 1, 5, 20, 21]),
)
def test_scored_is_what_evaluation_gets(scored_folder, seq_len, max_tokens, max_documents):
    limits = dict(seq_len=seq_len, max_tokens=max_tokens, max_documents=max_documents)
    result = audit(scored_folder, thorough=False, **limits)
    try:
        tokens = validation_tokens(scored_folder.directory, **limits)
    except DataError:
        assert messages(result, "scored") and not result.ok
        return
    count = int(scored_folder.byte_table.count(tokens[:-1], tokens[1:]))
    assert (result.figures["scored_tokens"], result.figures["scored_bytes"]) == (len(tokens) - 1, count)
    assert result.figures["scored_documents"] == int((tokens == BOS).sum())
    complete = len(tokens) - 1 >= (result.figures["val"]["tokens"] - 1) // seq_len * seq_len
    assert bool(messages(result, "scored", "warning")) == (not complete)


@pytest.fixture(scope="module")
def scored_folder(tmp_path_factory, embedded, rows):
    folder = tmp_path_factory.mktemp("scored")
    shutil.copy(embedded / "tokenizer.model", folder)
    write_shard(folder / "fineweb_train_000000.bin", rows[100])
    write_shard(folder / "fineweb_val_000000.bin", np.concatenate(rows[:12])[:-100])
    write_shard(folder / "fineweb_val_000001.bin", np.concatenate([rows[11][-100:], *rows[12:20]]))
    return describe(folder)


# Published splits


@pytest.fixture
def published(monkeypatch):
    """Published splits that are small."""
    splits = [("fineweb10B_sp1024", 1024, 64, 640, 20, ""), ("old", 1024, 64, 1280, 0, "an earlier published split")]
    monkeypatch.setattr(audits, "PUBLISHED", [audits.PublishedSplit(*split) for split in splits])
    monkeypatch.setattr(audits, "PUBLISHED_DOCUMENTS", 20)


def test_a_few_published_documents_in_training_are_a_warning(make_folder, published, rows):
    """Nobody who uses what others published can change it; in their own data it is an error."""
    val = split_of(20, 660)
    val[3] = np.array([BOS, *([500] * 4)])
    val[4] = np.array([BOS, *([501] * 60)])
    for name, training, documents, level in (
        ("published", [rows[0], val[3]], val, "warning"),
        ("mine", [rows[0], val[3]], val[:-1], "error"),
        ("published_much", [rows[0], *val[4:]], val, "error"),
    ):
        result = audit(make_folder([training], [documents], name=name), seq_len=16)
        assert [found.level for found in result.findings if found.check == "overlap"] == [level]


def test_overlap_that_was_kept_on_request_is_a_warning(make_folder, rows):
    source = {"val_documents": 150, "keep_overlap": True}
    result = audit(make_folder([[rows[160], rows[0]]], [rows[:150]], source=source))
    assert [found.level for found in result.findings if found.check == "overlap"] == ["warning"]


def test_content_that_changed_though_its_time_did_not(make_folder, rows):
    dataset = make_folder([rows[:3]], [rows[3:6]])
    path = dataset.train_shards[0]
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[2000] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert audit(dataset, thorough=False).ok  # a fast audit reads no checksums
    assert "sha256 is not as dataset.json lists" in only(audit(dataset), "shards")


def split_of(documents, tokens):
    rng = np.random.default_rng(0)
    return [np.array([BOS, *rng.integers(300, 900, n)]) for n in [tokens // documents - 1] * documents]


@pytest.mark.parametrize(
    ("name", "source", "documents", "tokens", "known", "missing"),
    [
        ("fineweb10B_sp1024", {}, 20, 660, "fineweb10B_sp1024", ""),
        ("mine", {}, 20, 660, "fineweb10B_sp1024", ""),
        ("mine", {"variant": "sp1024"}, 20, 660, "fineweb10B_sp1024", ""),
        ("mine", {"variant": "sp1024"}, 2, 66, "", "2 documents and 66 tokens, .* 20 documents and 640 tokens in"),
        ("fineweb10B_sp1024", {}, 20, 560, "", "20 documents and 560 tokens"),
        ("fineweb10B_sp1024", {}, 10, 660, "", "10 documents and 660 tokens"),
        ("fineweb10B_sp512", {}, 2, 66, "", "fineweb10B_sp512 has 20 documents in"),
        ("fineweb10B_sp512", {}, 20, 560, "", ""),
        ("mine", {}, 2, 66, "", ""),
        ("fineweb10B_sp1024", {}, 20, 1300, "old", ""),
    ],
)
def test_published(make_folder, published, rows, name, source, documents, tokens, known, missing):
    dataset = make_folder([[rows[0]]], [split_of(documents, tokens)], name=name, source=source)
    result = audit(dataset, seq_len=16)
    assert result.figures["published"] == known
    found = messages(result, "published")
    assert bool(found) == bool(missing)
    if missing:
        pattern = rf"a part of the published validation split is missing: .*{missing}"
        assert re.match(pattern, found[0])
    assert bool(messages(result, "published", "note")) == (known == "old")


# Folders that cannot be opened


def test_every_broken_shard_is_named(make_folder, rows):
    folder = make_folder([[row] for row in rows[:5]], [[rows[5]], [rows[6]]]).directory
    content = {path.name: path.read_bytes() for path in sorted(folder.glob("*.bin"))}
    names = list(content)
    (folder / names[0]).write_bytes(b"\0\0\0\0" + content[names[0]][4:])
    (folder / names[1]).write_bytes(content[names[1]][:-7])
    write_shard(folder / names[2], [1, 500, 1023, 1024, 5000])
    write_shard(folder / names[3], [1, 500])
    (folder / names[4]).unlink()
    write_shard(folder / "fineweb_val_000002.bin", [1, 500])
    expected = [
        "begins with 0; a shard begins with the magic number",
        "the header promises",
        "holds token 5000, and the tokenizer's last is 1023",
        "not as dataset.json lists",
        "missing, not as dataset.json lists",
        "not as dataset.json lists",
    ]
    result = audit_folder(folder)
    assert not result.ok and len(result.findings) == 6
    for name, message in zip([*names[:5], "fineweb_val_000002.bin"], expected, strict=True):
        assert [f.message for f in result.findings if f"{name}: {message}" in f.message], (name, result.findings)
    report = format_audit(result)
    assert "documents  not checked" in report and report.startswith("audit of folder (fast")


@pytest.mark.parametrize(
    ("name", "message"), [("tokenizer.model", "tokenizer_path: no file"), ("fineweb_val_000000.bin", "no fineweb_val_")]
)
def test_folder_that_cannot_be_opened(make_folder, rows, name, message):
    folder = make_folder([[rows[0]]], [[rows[1]]]).directory
    (folder / name).unlink()
    result = audit_folder(folder)
    assert not result.ok and message in result.findings[0].message


# Reports and stored audits


def test_report(dataset, rows):
    lines = format_audit(audit(dataset, max_tokens=sum(map(len, rows)) // 10, thorough=False)).splitlines()
    assert lines[0].startswith("audit of embedded_sp1024 (fast: ") and lines[0].endswith("): 1 warning")
    checks = lines[2 : lines.index("", 2)]
    assert [line.split()[0] for line in checks] == list(audits.CHECKS)
    assert "  bytes      ok: every document counts the bytes it decodes to" in checks
    assert any(line.startswith("  scored     warning: ") for line in checks)
    assert any(line.split() == ["val", "documents", "200"] for line in lines)


def test_stored(make_folder, rows, monkeypatch):
    dataset = make_folder([rows[:3]], [rows[3:6]])
    assert stored(dataset) is None
    result = audit(dataset)
    assert store(dataset, result).name == "audit.json"
    assert stored(dataset) == result and stored(Dataset.open(dataset.directory)) == result
    assert audit(dataset) == result  # the file is not part of the data

    wrong = dataset.byte_table.base_bytes.clone()
    wrong[500] = 9
    planted = dataclasses.replace(dataset, byte_table=dataclasses.replace(dataset.byte_table, base_bytes=wrong))
    assert stored(planted) is None
    assert stored(dataclasses.replace(dataset, about=dataset.about | {"val": {"documents": 4}})) is None
    with monkeypatch.context() as context:
        context.setattr(audits, "VERSION", 0)
        assert stored(dataset) is None
    store(planted, audit(planted))  # with a table that is not the dataset's own
    assert stored(dataset) is None
    for content in ("", "[]", "{}"):
        (dataset.directory / "audit.json").write_text(content)
        assert stored(dataset) is None
    store(dataset, result)
    write_shard(dataset.train_shards[0], rows[7])
    (dataset.directory / "dataset.json").unlink()
    assert stored(Dataset.open(dataset.directory)) is None
    with pytest.raises(AssertionError):
        store(dataset, dataclasses.replace(result, thorough=False))
    shutil.rmtree(dataset.directory)
    dataset.directory.write_text("a file where the folder was")
    assert store(dataset, result) is None
