import dataclasses
import io
import json
import os
import re
import shutil

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf.data import audit as audits
from pgolf.data import split_stats
from pgolf.data.audit import audit, audit_folder, format_audit, store, stored
from pgolf.data.dataset import Dataset, describe, validation_tokens
from pgolf_core.config import ROOT
from pgolf_core.files import DataError
from pgolf_core.shards import read_shard, write_shard
from pgolf_core.tokens import SPECIAL, Bytes, ByteTable, load

FINEWEB = ROOT.parent / "shared" / "tokenizers" / "fineweb_8192_bpe.model"
BOS, EOS, UNK = 1, 2, 3
HARD_TEXTS = [
    "",
    "   ",
    "  two  spaces   three ",
    "tabs\tand\nlines\r\n\r\n end\t",
    "naïve café, Ελληνικά, עברית, 日本語の文章。中文没有空格 한국어, 7 日 7 é",
    "👩‍👩‍👧‍👦 🇪🇺 e\u0301 ﬁ ① Å \U0001d54f \U0010ffff",
    "▁ U+2581 ▁▁ and ▅ and <0x0A> <s> </s> <unk> <pad>",
    "\x00\x01\x7f\u00a0\u3000\u200b\u200d\ufeff\ufffd",
    "x" * 5000 + " " + "日" * 300,
]


@pytest.fixture(scope="module")
def dataset(embedded):
    return Dataset.open(embedded)


@pytest.fixture(scope="module")
def rows(dataset):
    """Tokens of the embedded corpus's 200 validation documents."""
    tokens = read_shard(dataset.val_shards[0])
    return np.split(np.array(tokens), np.flatnonzero(tokens == BOS)[1:])


@pytest.fixture
def build(tmp_path, embedded):
    """A folder of shards, each a list of documents (tokens), with a tokenizer and dataset.json."""

    def build(train, val, /, name="folder", tokenizer=embedded / "tokenizer.model", **about):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(tokenizer, folder / f"tokenizer{tokenizer.suffix}")
        for split, shards in (("train", train), ("val", val)):
            for i, documents in enumerate(shards):
                write_shard(folder / f"fineweb_{split}_{i:06d}.bin", np.concatenate(documents))
        return describe(folder, **about)

    return build


def messages(result, check, level="error"):
    return [found.message for found in result.findings if (found.check, found.level) == (check, level)]


def only(result, check, level="error"):
    """The one finding that there is beyond notes."""
    found = [found for found in result.findings if found.level != "note"]
    assert [(f.check, f.level) for f in found] == [(check, level)], result.findings
    return found[0].message


def changed(dataset, **columns):
    """The dataset with some entries of its byte table replaced: column=(mask, values)."""
    new = {name: getattr(dataset.byte_table, name).clone() for name in columns}
    for name, (mask, values) in columns.items():
        new[name][mask] = torch.as_tensor(values, dtype=new[name].dtype)
    return dataclasses.replace(dataset, byte_table=dataclasses.replace(dataset.byte_table, **new))


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


def test_bytes_tokenizer(build, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer = Bytes("nmt_nfkc")
    path.write_text(tokenizer.to_json())
    train, val = tokenizer.encode(["a text", "of training"]), tokenizer.encode([*HARD_TEXTS, "a val text"])
    dataset = build([train], [val], tokenizer=path)
    result = audit(dataset, seq_len=8, documents=[*HARD_TEXTS, "a val text"])
    assert result.ok and {found.level for found in result.findings} == {"note"}  # empty documents
    (message,) = messages(audit(changed(dataset, base_bytes=(slice(132, None), 3)), seq_len=8), "table")
    assert "U+FFFD" in message and "128 of 260 tokens: token 132 3 not 1" in message


@pytest.mark.skipif(not FINEWEB.exists(), reason=f"no {FINEWEB}")
def test_published_tokenizer_on_hard_texts_and_the_embedded_corpus(build, dataset, rows):
    tokenizer = load(FINEWEB)
    texts = [*HARD_TEXTS, *dataset.tokenizer.decode([row.tolist() for row in rows])]
    documents = tokenizer.encode(texts)
    published = build([[[BOS, 900, 901]]], [documents[:50], documents[50:]], tokenizer=FINEWEB)
    for sources in (None, texts):
        result = audit(published, documents=sources)
        assert result.ok and not messages(result, "bytes")
        assert not [found for found in result.findings if found.level == "warning"]
    assert result.figures["val"]["bytes"] == sum(len(tokenizer.normalize(text).encode()) for text in texts)
    assert result.figures["val"]["decoded_documents"] == len(texts)

    characters = [0 if piece.boundary else len(piece.text.decode(errors="replace")) for piece in tokenizer.pieces]
    (message,) = messages(audit(changed(published, base_bytes=(slice(None), characters))), "table")
    assert "characters are counted, not their UTF-8 bytes" in message and "▁“ 2 not 4" in message


# The byte table


def lone_space(table):
    return table.has_leading_space & (table.base_bytes == 0)


def leading(table):
    return table.has_leading_space


MISCOUNTS = {  # message -> the planted columns, of the true table and the mask of byte tokens
    "leading spaces are counted twice": lambda t, byte: {"base_bytes": (leading(t), t.base_bytes[leading(t)] + 1)},
    r"byte tokens are counted as U\+FFFD \(3 bytes\)": lambda t, byte: {"base_bytes": (byte, 3)},
    r"as their names \(6\)": lambda t, byte: {"base_bytes": (byte, 6)},
    "the token ▁, a lone space, is counted as 0 bytes": lambda t, byte: {"has_leading_space": (lone_space(t), False)},
    "leading spaces are not counted": lambda t, byte: {"has_leading_space": (~lone_space(t), False)},
    "the mark ▁ is counted as its own 3 bytes": lambda t, byte: {
        "base_bytes": (leading(t), t.base_bytes[leading(t)] + 3)
    },
    "bytes are miscounted": lambda t, byte: {"base_bytes": (slice(300, 400), 40)},
}


@pytest.mark.parametrize("miscount", MISCOUNTS)
def test_a_planted_miscount_is_named(dataset, miscount):
    byte = torch.tensor([dataset.tokenizer.processor.is_byte(i) for i in range(1024)])
    planted = changed(dataset, **MISCOUNTS[miscount](dataset.byte_table, byte))
    result = audit(planted, thorough=False, seq_len=64)
    assert not result.ok
    (table,), (text,) = messages(result, "table"), messages(result, "bytes")
    assert re.search(miscount, table) and table.partition(";")[0] in text
    wrong, right = (audit(data, thorough=False).figures["val"]["bytes"] for data in (planted, dataset))
    assert f"counts {wrong:,} bytes, and their text has {right:,} ({wrong / right - 1:+.2%})" in text


def test_a_miscount_that_no_document_shows(build, rows):
    dataset = build([[rows[0]]], [[rows[1]]])
    absent = next(i for i in range(300, 1024) if i not in rows[0] and i not in rows[1])
    planted = changed(dataset, is_boundary=(BOS, False), base_bytes=([7, absent], [3, 40]))
    result = audit(planted, seq_len=8)
    found = messages(result, "table")
    assert not messages(result, "bytes") and len(found) == 3
    assert "<0x03> 3 not 1" in found[0] and "<s>" in found[1] and "boundaries" in found[1]


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_one_wrong_entry_is_found(dataset, data):
    i = data.draw(st.integers(0, 1023))
    column = data.draw(st.sampled_from(["base_bytes", "has_leading_space", "is_boundary"]))
    old = getattr(dataset.byte_table, column)[i].item()
    new = data.draw(st.integers(0, 30).filter(lambda v: v != old)) if column == "base_bytes" else not old
    ((level, message),) = audits._check_table(changed(dataset, **{column: (i, new)}))
    assert level == "error" and "1 of 1,024 tokens" in message
    assert f" {dataset.tokenizer.processor.id_to_piece(i)} " in message


def test_table_of_another_size(dataset):
    small = ByteTable(*(getattr(dataset.byte_table, f.name)[:1000] for f in dataclasses.fields(ByteTable)))
    result = audit(dataclasses.replace(dataset, byte_table=small))
    assert "1000 and 1000 and 1000 entries, and the tokenizer 1024 tokens" in only(result, "table")
    assert "overlap    not checked" in format_audit(result)


# The tokenizer


def without_space(content, how):
    """A model whose token ▁ is renamed or marked unused. It is an entry of field 1, whose own field 1 is the text."""
    piece = b"\n\x03" + "▁".encode()
    at = content.index(piece)
    length = content[at - 1]
    if how == "renamed":
        return content.replace(piece, b"\n\x03" + "☃".encode())
    unused = content[at : at + length] + b"\x18\x05"  # field 3, the type
    return content[: at - 1] + bytes([len(unused)]) + unused + content[at + length :]


@pytest.mark.parametrize("how", ["renamed", "unused"])
def test_no_token_for_a_space(build, embedded, tmp_path, dataset, how):
    path = tmp_path / "other.model"
    path.write_bytes(without_space((embedded / "tokenizer.model").read_bytes(), how))
    text = "a 日 7 x Ω  é and words, which keep their spaces"
    (document,) = load(path).encode([text])
    broken = build([[[BOS, 300, 301]]], [[document]], tokenizer=path)
    for thorough in (True, False):
        message = only(audit(broken, seq_len=8, thorough=thorough), "tokenizer")
        assert message.startswith("no token ▁ in the tokenizer") and "E2 96 81" in message and "5 × in val" in message
    assert messages(audit(broken, seq_len=8, documents=[text]), "bytes")[0].startswith("1 of 1 val documents")

    # Shards made by such a tokenizer are found even with an intact tokenizer beside them.
    (space,) = load(embedded / "tokenizer.model").encode(["the words"])
    mixed = build([[[BOS, 300, 301]]], [[document, space]], name="mixed")
    assert any("a token ▁ in the tokenizer" in message for message in messages(audit(mixed, seq_len=8), "tokenizer"))


def test_no_byte_tokens(build, tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["one text and another text, and more"] * 20),
        model_writer=model,
        vocab_size=40,
        hard_vocab_limit=False,
        add_dummy_prefix=True,
        minloglevel=2,
        **SPECIAL,
    )
    path = tmp_path / "other.model"
    path.write_bytes(model.getvalue())
    texts = ["one text, more or more", "another text and 日"]
    documents = load(path).encode(texts)
    result = audit(build([[[BOS, 5, 6]]], [documents[:1]], tokenizer=path), seq_len=8, documents=texts[:1])
    assert result.ok and "0 of 256 byte tokens" in only(result, "tokenizer", "warning")
    result = audit(build([[[BOS, 5, 6]]], [documents], name="lossy", tokenizer=path), seq_len=8)
    assert "val: 1 × <unk>, text that is lost; the first in document 1" in messages(result, "documents")[0]


def test_shards_of_another_tokenizer(build, rows, dataset):
    others = [np.where(row < 264, row, 1287 - row).astype(np.uint16) for row in rows[:60]]
    found = messages(audit(build([[rows[100]]], [others])), "tokenizer")
    assert any(message.endswith("the shards were made with another tokenizer") for message in found)

    token = dataset.tokenizer.processor.piece_to_id  # a single document in other tokens is only a warning
    spelled = np.array([BOS, *map(token, "word")], np.uint16)
    result = audit(build([[rows[0]]], [[*rows[1:20], spelled]], name="one"))
    assert "1 of 20 validation documents are not the tokens" in only(result, "tokenizer", "warning")
    assert result.ok


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
def test_documents(build, rows, val, message):
    val = [[*document, *range(310, 330)] for document in val]
    result = audit(build([[rows[0]]], [val], val={"documents": 2}), seq_len=8)
    assert any(re.match(message, found) for found in messages(result, "documents"))

    result = audit(build([val], [[rows[0]]], name="train", train={"documents": 2}))  # scores do not depend on it
    level = "error" if "no BOS" in message else "warning"
    expected = message.replace("val:", "train:")
    assert any(re.match(expected, found) for found in messages(result, "documents", level))


def test_empty_documents(build, rows):
    result = audit(build([[[BOS], rows[0]]], [[[BOS], [BOS], rows[1]]]))
    assert result.ok and result.figures["overlap_documents"] == 0
    assert messages(result, "documents", "note") == ["val: 2 empty documents", "train: 1 empty documents"]


def test_training_documents_of_the_whole_publication(build, rows):
    about = dict(train={"documents": 15_000_000}, source={"variant": "sp512"}, val={"documents": 2})
    result = audit(build([[rows[0]]], [rows[1:3]], **about))
    assert not messages(result, "documents", "warning")


def test_source_texts(build, rows, dataset):
    texts = dataset.tokenizer.decode([row.tolist() for row in rows[:20]])
    folder = build([[rows[100]]], [rows[:12], rows[12:20]])
    assert audit(folder, documents=[f"  {text}\n\n" for text in texts]).ok  # as normalised
    message = only(audit(folder, documents=[*texts[:19], texts[19] + " More."]), "bytes")
    assert message.startswith("1 of 20 val documents: the table counts") and "the first: document 19, " in message
    assert "20 validation documents, and 19 texts" in only(audit(folder, documents=texts[:19]), "bytes")
    assert "20 validation documents, and 21 texts" in only(audit(folder, documents=[*texts, "a"]), "bytes")


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


def test_overlap(build, rows, dataset):
    train, val = rows[:30], rows[30:50]
    assert not messages(audit(build([train], [val])), "overlap")
    seen = build([train[:10], [*train[10:], val[7], val[3], train[0]]], [val], name="seen")
    for thorough in (True, False):
        result = audit(seen, thorough=thorough)
        message = only(result, "overlap")
        sizes = [len(text.encode()) for text in dataset.tokenizer.decode([row.tolist() for row in val])]
        assert f"2 of 20 validation documents ({(sizes[7] + sizes[3]) / sum(sizes):.2%} of its bytes)" in message
        assert "val document 3 = train document 31: " in message
        assert dataset.tokenizer.decode([val[3].tolist()])[0][:60] in message
        assert result.figures["overlap_documents"] == 2 and result.figures["overlap_bytes"] == sizes[7] + sizes[3]


def test_overlap_of_a_document_across_shards(build, rows):
    half = len(rows[5]) // 2
    seen = build([[rows[0], rows[5][:half]], [rows[5][half:], rows[1]]], [rows[2:8]])
    message = only(audit(seen), "overlap")
    assert "val document 3 = train document 1: " in message


def test_repeated_validation_documents(build, rows):
    result = audit(build([[rows[0], rows[2]]], [[rows[1], rows[2], rows[1], rows[2]]]))
    assert messages(result, "overlap", "note") == ["2 validation documents repeat an earlier one"]
    assert "2 of 4 validation documents" in only(result, "overlap")


# How much is scored


def test_a_tenth_of_the_split(dataset, rows):
    result = audit(dataset, max_tokens=sum(map(len, rows)) // 10, thorough=False)
    assert result.ok
    message = only(result, "scored", "warning")
    assert re.match(r"[\d.]+% of the validation split is scored \([\d,]+ of [\d,]+ tokens, ", message)
    assert message.endswith("not a number to publish")
    assert f"{result.figures['scored_fraction']:.2%}" in message and 0.09 < result.figures["scored_fraction"] < 0.11


@settings(max_examples=25, deadline=None)
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
    """As if published splits were small."""
    splits = [("fineweb10B_sp1024", 1024, 64, 640, 20, ""), ("old", 1024, 64, 1280, 0, "an earlier published split")]
    monkeypatch.setattr(audits, "PUBLISHED", [audits.PublishedSplit(*split) for split in splits])
    monkeypatch.setattr(audits, "PUBLISHED_DOCUMENTS", 20)


def test_a_few_published_documents_in_training_are_a_warning(build, published, rows):
    """Nobody who uses what others published can change it; in their own data it is an error."""
    val = split_of(20, 660)
    val[3] = np.array([BOS, *([500] * 4)])
    val[4] = np.array([BOS, *([501] * 60)])
    for name, training, documents, level in (
        ("published", [rows[0], val[3]], val, "warning"),
        ("mine", [rows[0], val[3]], val[:-1], "error"),
        ("published_much", [rows[0], *val[4:]], val, "error"),
    ):
        result = audit(build([training], [documents], name=name), seq_len=16)
        assert [found.level for found in result.findings if found.check == "overlap"] == [level]


def test_overlap_that_was_kept_on_request_is_a_warning(build, rows):
    source = {"val_documents": 150, "keep_overlap": True}
    result = audit(build([[rows[160], rows[0]]], [rows[:150]], source=source))
    assert [found.level for found in result.findings if found.check == "overlap"] == ["warning"]


def test_content_that_changed_though_its_time_did_not(build, rows):
    dataset = build([rows[:3]], [rows[3:6]])
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
def test_published(build, published, rows, name, source, documents, tokens, known, missing):
    dataset = build([[rows[0]]], [split_of(documents, tokens)], name=name, source=source)
    result = audit(dataset, seq_len=16)
    assert result.figures["published"] == known
    found = messages(result, "published")
    assert bool(found) == bool(missing)
    if missing:
        pattern = rf"a part of the published validation split is missing: .*{missing}"
        assert re.match(pattern, found[0])
    assert bool(messages(result, "published", "note")) == (known == "old")


# Folders that cannot be opened


def test_every_broken_shard_is_named(build, rows):
    folder = build([[row] for row in rows[:5]], [[rows[5]], [rows[6]]]).directory
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
    ("damage", "message"),
    [
        (lambda folder: (folder / "tokenizer.model").unlink(), "tokenizer_path: no file"),
        (lambda folder: (folder / "tokenizer.model").write_bytes(b"no model"), "is no SentencePiece model"),
        (lambda folder: (folder / "dataset.json").write_text("no json"), r"dataset\.json: damaged"),
        (lambda folder: (folder / "fineweb_val_000000.bin").unlink(), r"no fineweb_val_\*\.bin in"),
        (lambda folder: shutil.rmtree(folder), "no folder"),
    ],
)
def test_folder_that_cannot_be_opened(build, rows, damage, message):
    folder = build([[rows[0]]], [[rows[1]]]).directory
    damage(folder)
    result = audit_folder(folder)
    assert not result.ok and re.search(message, result.findings[0].message)


def test_shard_that_breaks_after_opening(build, rows):
    dataset = build([[rows[0]]], [[rows[1]]])
    write_shard(dataset.val_shards[0], [1, 5, 2000])
    assert "sha256 is not as" in only(audit(dataset), "shards")


# Reports and stored audits


def test_report(dataset, rows):
    lines = format_audit(audit(dataset, max_tokens=sum(map(len, rows)) // 10, thorough=False)).splitlines()
    assert lines[0].startswith("audit of embedded_sp1024 (fast: ") and lines[0].endswith("): 1 warning")
    checks = lines[2 : lines.index("", 2)]
    assert [line.split()[0] for line in checks] == list(audits.CHECKS)
    assert "  bytes      ok: every document counts the bytes it decodes to" in checks
    assert any(line.startswith("  scored     warning: ") for line in checks)
    assert any(line.split() == ["val", "documents", "200"] for line in lines)


def test_stored(build, rows, monkeypatch):
    dataset = build([rows[:3]], [rows[3:6]])
    assert stored(dataset) is None
    result = audit(dataset)
    assert store(dataset, result).name == "audit.json"
    assert stored(dataset) == result and stored(Dataset.open(dataset.directory)) == result
    assert audit(dataset) == result  # the file is not part of the data

    planted = changed(dataset, base_bytes=(500, 9))
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
