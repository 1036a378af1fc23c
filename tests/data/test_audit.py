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
from pgolf.data.dataset import Dataset

BOS, EOS, UNK = 1, 2, 3


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


@pytest.mark.parametrize("thorough", [True, False])
def test_overlap(make_folder, rows, dataset, thorough):
    train, val, half = rows[:30], rows[30:50], len(rows[33]) // 2
    seen = make_folder([[*train, val[3][:half]], [val[3][half:], val[7], val[3], train[0]]], [val])
    result = audit(seen, thorough=thorough)
    sizes = [len(text.encode()) for text in dataset.tokenizer.decode([row.tolist() for row in val])]
    message = only(result, "overlap")
    assert f"2 of 20 validation documents ({(sizes[7] + sizes[3]) / sum(sizes):.2%} of its bytes)" in message
    assert "val document 3 = train document 30: " in message
    assert dataset.tokenizer.decode([val[3].tolist()])[0][:60] in message
    assert result.figures["overlap_documents"] == 2 and result.figures["overlap_bytes"] == sizes[7] + sizes[3]


def split_of(documents, tokens):
    rng = np.random.default_rng(0)
    return [np.array([BOS, *rng.integers(300, 900, n)]) for n in [tokens // documents - 1] * documents]


@pytest.fixture
def published(monkeypatch):
    """Published splits that are small."""
    monkeypatch.setattr(audits, "PUBLISHED", {"fineweb10B_sp1024": (1024, 64, 640), "old": (1024, 64, 1280)})
    monkeypatch.setattr(audits, "NOT_COMPARABLE", ("old",))


@pytest.mark.parametrize(
    ("source", "val_documents", "seen", "level"),
    [
        ({}, 20, slice(3, 4), "warning"),  # published: nobody who uses it can change it
        ({}, 19, slice(3, 4), "error"),  # one's own
        ({"keep_overlap": True}, 19, slice(3, 4), "warning"),
        ({}, 20, slice(4, 20), "error"),  # too much
    ],
)
def test_a_small_overlap_of_a_published_split_or_one_kept_on_request_is_a_warning(
    make_folder, published, rows, source, val_documents, seen, level
):
    val = split_of(20, 660)
    val[3], val[4] = np.array([BOS, *([500] * 4)]), np.array([BOS, *([501] * 60)])
    result = audit(make_folder([[rows[0], *val[seen]]], [val[:val_documents]], source=source), seq_len=16)
    assert [found.level for found in result.findings if found.check == "overlap"] == [level]


@pytest.mark.parametrize(
    ("name", "source", "documents", "tokens", "known", "missing"),
    [
        ("fineweb10B_sp1024", {}, 20, 660, "fineweb10B_sp1024", False),
        ("mine", {"variant": "sp1024"}, 20, 660, "fineweb10B_sp1024", False),
        ("mine", {"variant": "sp1024"}, 2, 66, "", True),
        ("fineweb10B_sp1024", {}, 20, 560, "", True),
        ("mine", {}, 2, 66, "", False),
        ("fineweb10B_sp1024", {}, 20, 1300, "old", False),
    ],
)
def test_published(make_folder, published, rows, name, source, documents, tokens, known, missing):
    dataset = make_folder([[rows[0]]], [split_of(documents, tokens)], name=name, source=source)
    result = audit(dataset, seq_len=16)
    assert result.figures["published"] == known
    message = f"a part of the published validation split is missing: {tokens} tokens, and fineweb10B_sp1024 has 640 in"
    assert [found.startswith(message) for found in messages(result, "published")] == [True] * missing
    assert len(messages(result, "published", "note")) == (known == "old")


# Reports, folders that cannot be opened, and stored audits


def test_report_of_a_tenth_of_the_split(dataset, rows):
    result = audit(dataset, max_tokens=sum(map(len, rows)) // 10, thorough=False)
    message = only(result, "scored", "warning")
    assert result.ok and message.endswith("not a number to publish")
    assert re.match(r"[\d.]+% of the validation split is scored \([\d,]+ of [\d,]+ tokens, [\d,]+ of 200 doc", message)
    assert f"{result.figures['scored_fraction']:.2%}" in message and 0.09 < result.figures["scored_fraction"] < 0.11
    lines = format_audit(result).splitlines()
    assert lines[0].startswith("audit of embedded_sp1024 (fast: ") and lines[0].endswith("): 1 warning")
    checks = lines[2 : lines.index("", 2)]
    assert [line.split()[0] for line in checks] == list(audits.CHECKS)
    assert "  bytes      ok: every document counts the bytes it decodes to" in checks
    assert f"  scored     warning: {message}" in checks
    assert any(line.split() == ["val", "documents", "200"] for line in lines)
    assert "has 200 validation documents" in only(audit(dataset, max_documents=201, thorough=False), "scored")


def test_every_reason_why_a_folder_cannot_be_opened_is_a_finding(make_folder, rows):
    folder = make_folder([[rows[0]], [rows[1]]], [[rows[2]]]).directory
    for i in range(2):
        path = folder / f"fineweb_train_{i:06d}.bin"
        path.write_bytes(path.read_bytes()[:-7])
    result = audit_folder(folder)
    assert (
        not result.ok
        and [f"train_{i:06d}.bin: the header" in result.findings[i].message for i in range(2)] == [True] * 2
    )
    report = format_audit(result)
    assert "documents  not checked" in report and report.startswith("audit of folder (fast")


def test_content_that_changed_though_its_time_did_not(make_folder, rows):
    dataset = make_folder([rows[:3]], [rows[3:6]])
    path = dataset.train_shards[0]
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[2000] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert audit(dataset, thorough=False).ok  # a fast audit reads no checksums
    assert "sha256 is not as dataset.json lists" in only(audit(dataset), "shards")


def test_stored(make_folder, rows, monkeypatch):
    dataset = make_folder([rows[:3]], [rows[3:6]])
    assert stored(dataset) is None
    result = audit(dataset)
    store(dataset, result)
    assert stored(dataset) == stored(Dataset.open(dataset.directory)) == result
    assert audit(dataset) == result  # the file is not part of the data
    assert stored(dataclasses.replace(dataset, about=dataset.about | {"val": {"documents": 4}})) is None
    with monkeypatch.context() as context:
        context.setattr(audits, "VERSION", 0)
        assert stored(dataset) is None
    for content in ("", "[]", "{}"):
        (dataset.directory / "audit.json").write_text(content)
        assert stored(dataset) is None
    store(dataset, result)
    write_shard(dataset.train_shards[0], rows[7])
    (dataset.directory / "dataset.json").unlink()
    assert stored(Dataset.open(dataset.directory)) is None
    shutil.rmtree(dataset.directory)
    dataset.directory.write_text("a file where the folder was")
    store(dataset, result)  # nothing is written, and nothing breaks
