"""Tokenizers: raw bytes, and equal bytes of one text by every tokenizer made here."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
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
