"""The byte table and the tokenizer under audit: every miscount that was ever published is found and named."""

import dataclasses
import io
import re

import numpy as np
import pytest
import sentencepiece
import torch
from build_helpers import messages, only
from hypothesis import given, settings
from hypothesis import strategies as st
from support.corpus import MORE_HARD_TEXTS

from pgolf.data import audit as audits
from pgolf.data.audit import audit
from pgolf.data.tokenizers import SPECIAL, Bytes, load
from pgolf_core.config import ROOT

FINEWEB = ROOT.parent / "shared" / "tokenizers" / "fineweb_8192_bpe.model"
BOS = 1


def changed(dataset, **columns):
    """The dataset with some entries of its byte table replaced: column=(mask, values)."""
    new = {name: getattr(dataset.byte_table, name).clone() for name in columns}
    for name, (mask, values) in columns.items():
        new[name][mask] = torch.as_tensor(values, dtype=new[name].dtype)
    return dataclasses.replace(dataset, byte_table=dataclasses.replace(dataset.byte_table, **new))


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


@pytest.fixture(scope="module")
def val_bytes(dataset):
    return audit(dataset, thorough=False).figures["val"]["bytes"]


@pytest.mark.parametrize("miscount", MISCOUNTS)
def test_a_planted_miscount_is_named(dataset, val_bytes, miscount):
    byte = torch.tensor([dataset.tokenizer.processor.is_byte(i) for i in range(1024)])
    planted = changed(dataset, **MISCOUNTS[miscount](dataset.byte_table, byte))
    result = audit(planted, thorough=False, seq_len=64)
    assert not result.ok
    (table,), (text,) = messages(result, "table"), messages(result, "bytes")
    assert re.search(miscount, table)
    wrong = result.figures["val"]["bytes"]
    assert f"counts {wrong:,} bytes, and their text has {val_bytes:,} ({wrong / val_bytes - 1:+.2%})" in text


def test_a_miscount_that_no_document_shows(make_folder, rows):
    dataset = make_folder([[rows[0]]], [[rows[1]]])
    absent = next(i for i in range(300, 1024) if i not in rows[0] and i not in rows[1])
    planted = changed(dataset, is_boundary=(BOS, False), base_bytes=([7, absent], [3, 40]))
    result = audit(planted, seq_len=8)
    found = messages(result, "table")
    assert not messages(result, "bytes") and len(found) == 3
    assert "<0x03> 3 not 1" in found[0] and "<s>" in found[1] and "boundaries" in found[1]


@settings(max_examples=100)
@given(data=st.data())
def test_any_one_wrong_entry_is_found(dataset, data):
    i = data.draw(st.integers(0, 1023))
    column = data.draw(st.sampled_from(["base_bytes", "has_leading_space", "is_boundary"]))
    old = getattr(dataset.byte_table, column)[i].item()
    new = data.draw(st.integers(0, 30).filter(lambda v: v != old)) if column == "base_bytes" else not old
    ((level, message),) = audits._check_table(changed(dataset, **{column: (i, new)}))
    assert level == "error" and "1 of 1,024 tokens" in message
    assert f" {dataset.tokenizer.processor.id_to_piece(i)} " in message


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
def test_no_token_for_a_space(make_folder, embedded, tmp_path, dataset, how):
    path = tmp_path / "other.model"
    path.write_bytes(without_space((embedded / "tokenizer.model").read_bytes(), how))
    text = "a 日 7 x Ω  é and words, which keep their spaces"
    (document,) = load(path).encode([text])
    broken = make_folder([[[BOS, 300, 301]]], [[document]], tokenizer=path)
    for thorough in (True, False):
        message = only(audit(broken, seq_len=8, thorough=thorough), "tokenizer")
        assert message.startswith("no token ▁ in the tokenizer") and "E2 96 81" in message
    assert messages(audit(broken, seq_len=8, documents=[text]), "bytes")[0].startswith("1 of 1 val documents")

    # Shards made by such a tokenizer are found even with an intact tokenizer beside them.
    (space,) = load(embedded / "tokenizer.model").encode(["the words"])
    mixed = make_folder([[[BOS, 300, 301]]], [[document, space]], name="mixed")
    assert "1 of 2 validation documents are not the tokens" in only(audit(mixed, seq_len=8), "tokenizer", "warning")


def test_no_byte_tokens(make_folder, tmp_path):
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
    result = audit(make_folder([[[BOS, 5, 6]]], [documents[:1]], tokenizer=path), seq_len=8, documents=texts[:1])
    assert result.ok and "0 of 256 byte tokens" in only(result, "tokenizer", "warning")
    result = audit(make_folder([[[BOS, 5, 6]]], [documents], name="lossy", tokenizer=path), seq_len=8)
    assert "val: 1 × <unk>, text that is lost; the first in document 1" in messages(result, "documents")[0]


def test_shards_of_another_tokenizer(make_folder, rows, dataset):
    others = [np.where(row < 264, row, 1287 - row).astype(np.uint16) for row in rows[:60]]
    found = messages(audit(make_folder([[rows[100]]], [others])), "tokenizer")
    assert any(message.endswith("the shards were made with another tokenizer") for message in found)

    token = dataset.tokenizer.processor.piece_to_id  # a single document in other tokens is only a warning
    spelled = np.array([BOS, *map(token, "word")], np.uint16)
    result = audit(make_folder([[rows[0]]], [[*rows[1:20], spelled]], name="one"))
    assert "1 of 20 validation documents are not the tokens" in only(result, "tokenizer", "warning")
    assert result.ok


def test_bytes_tokenizer(make_folder, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer = Bytes("nmt_nfkc")
    path.write_text(tokenizer.to_json())
    train, val = tokenizer.encode(["a text", "of training"]), tokenizer.encode([*MORE_HARD_TEXTS, "a val text"])
    dataset = make_folder([train], [val], tokenizer=path)
    result = audit(dataset, seq_len=8, documents=[*MORE_HARD_TEXTS, "a val text"])
    found = {(found.check, found.level) for found in result.findings}
    assert found == {("documents", "note"), ("marks", "note"), ("size", "warning")}  # all true of the hard texts
    (message,) = messages(audit(changed(dataset, base_bytes=(slice(132, None), 3)), seq_len=8), "table")
    assert "U+FFFD" in message and "128 of 260 tokens: token 132 3 not 1" in message


@pytest.mark.skipif(not FINEWEB.exists(), reason=f"no {FINEWEB}")
def test_published_tokenizer_on_hard_texts_and_the_embedded_corpus(make_folder, dataset, rows):
    tokenizer = load(FINEWEB)
    texts = [*MORE_HARD_TEXTS, *dataset.tokenizer.decode([row.tolist() for row in rows])]
    documents = tokenizer.encode(texts)
    published = make_folder([[[BOS, 900, 901]]], [documents[:50], documents[50:]], tokenizer=FINEWEB)
    for sources in (None, texts):
        result = audit(published, documents=sources)
        assert result.ok and not messages(result, "bytes")
        assert not [found for found in result.findings if found.level == "warning"]
    assert result.figures["val"]["bytes"] == sum(len(tokenizer.normalize(text).encode()) for text in texts)
    assert result.figures["val"]["decoded_documents"] == len(texts)

    characters = [0 if piece.boundary else len(piece.text.decode(errors="replace")) for piece in tokenizer.pieces]
    (message,) = messages(audit(changed(published, base_bytes=(slice(None), characters))), "table")
    assert "characters are counted, not their UTF-8 bytes" in message and "▁“ 2 not 4" in message
