"""Tokenizers: raw bytes, and equal bytes of one text by every tokenizer made here."""

import os
import time

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pgolf.data.tokenizers import NORMALIZATION, Bytes, load
from pgolf_core.files import DataError
from pgolf_core.tokens import ByteTable

PUBLISHED = """{
  "config": {"bos_id": 1, "byte_count": 256, "byte_offset": 4, "eos_id": 2, "pad_id": 0, "unk_id": 3},
  "tokenizer_type": "pure_byte",
  "vocab_size": 260
}"""


def count_bytes(tokenizer, tokens) -> int:
    ids = torch.from_numpy(tokens.astype(np.int64))
    return int(ByteTable.of(tokenizer.pieces).count(ids))


def test_raw_bytes(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(Bytes().to_json())
    tokenizer = load(path)
    (tokens,) = tokenizer.encode(["  é\tx"])
    assert tokens.tolist() == [1, 36, 36, 199, 173, 13, 124] and tokens.dtype == np.uint16
    assert tokenizer.decode([tokens.tolist()]) == ["  é\tx"]
    assert count_bytes(tokenizer, tokens) == 6
    assert (tokenizer.vocab_size, tokenizer.bos) == (260, 1)


def test_published_byte_tokenizer(tmp_path):
    (tmp_path / "t.json").write_text(PUBLISHED)
    assert load(tmp_path / "t.json").normalize(" ﬁ  ") == " ﬁ  "


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", PUBLISHED.replace("260", "300"), PUBLISHED.replace('"pure_byte"', '"char"'),
                PUBLISHED.replace('"vocab', '"normalization_rule_name": "shout", "vocab')],
)  # fmt: skip
def test_no_byte_tokenizer(tmp_path, content):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(DataError, match=r"t\.json is no tokenizer of 260 bytes"):
        load(tmp_path / "t.json")


@settings(max_examples=50, deadline=None)
@given(text=st.text())
def test_of_one_text_every_tokenizer_made_here_counts_the_same_bytes(embedded, text):
    text = text.replace("\u2585", "")  # SentencePiece's own mark for unknown text, which its normalisation keeps
    for tokenizer in (load(embedded / "tokenizer.model"), Bytes(NORMALIZATION)):
        (tokens,) = tokenizer.encode([text])
        spelled = Bytes(NORMALIZATION).normalize(text)
        assert tokenizer.normalize(text) == spelled
        assert count_bytes(tokenizer, tokens) == len(spelled.encode())


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_model_is_loaded_or_refused(tokenizers, tmp_path, data):
    """Bytes cut, changed and put in anywhere: nothing but a DataError, whatever then is encoded and decoded."""
    content = bytearray(tokenizers["bpe330"].read_bytes())
    at = data.draw(st.integers(0, len(content)))
    content[at : at + data.draw(st.integers(0, 200))] = data.draw(st.binary(max_size=50))
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content[: data.draw(st.sampled_from([None, None, at]))])
    try:
        tokenizer = load(path)
        ByteTable.of(tokenizer.pieces)
        tokenizer.decode([row.tolist() for row in tokenizer.encode(["Ein Text, é 漢字 \u2028"])])
        tokenizer.normalize("ﬁ ")
    except DataError as error:
        assert "tokenizer_path: " in str(error)


def pieces(count: int, text: str = "p{}") -> bytes:
    """A model of so many pieces and nothing else."""
    rows = (b"\x0a" + len(name).to_bytes(1) + name for name in (text.format(i).encode() for i in range(count)))
    return b"".join(b"\x0a" + len(row).to_bytes(1) + row for row in rows)


@pytest.mark.parametrize("kind", ["empty", "large", "pieces", "long piece"])
def test_a_model_of_absurd_size_is_refused_at_once(kind, tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(pieces(70_000) if kind == "pieces" else b"")
    if kind == "large":
        os.truncate(path, 20 * 2**30)
    if kind == "long piece":
        row = b"\x0a\x80\x80\x04" + b"p" * 2**16
        path.write_bytes(b"\x0a\x84\x80\x04" + row)
    start = time.process_time()
    with pytest.raises(DataError, match="is no SentencePiece model of at most 65,536 pieces"):
        load(path)
    assert time.process_time() - start < 3
