import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pgolf.data.tokenizers import NORMALIZATION, Bytes, load
from pgolf_core.config import ROOT
from pgolf_core.files import DataError
from pgolf_core.shards import read_shard, shard_paths
from pgolf_core.tokens import ByteTable

FINEWEB = ROOT.parent / "shared" / "tokenizers" / "fineweb_8192_bpe.model"


def count_row(table, ids):
    ids = torch.tensor(ids)
    return int(table.count(ids[:-1], ids[1:]))


def test_bytes_of_every_validation_document(embedded):
    tokenizer = load(embedded / "tokenizer.model")
    sp, table = tokenizer.processor, ByteTable.of(tokenizer.pieces)
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
    return load(path).processor, ByteTable.from_sentencepiece(path)


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
    tokenizer = load(embedded / "tokenizer.model")
    sp, table = tokenizer.processor, ByteTable.of(tokenizer.pieces)
    the, byte, space, bos, unk = (sp.piece_to_id(p) for p in ("▁the", "<0x0A>", "▁", "<s>", "<unk>"))
    assert len(table.base_bytes) == len(table.is_boundary) == 1024
    assert table.is_boundary.nonzero().flatten().tolist() == [0, 1, 2, 3]
    for row, count in [((the, the), 4), ((bos, the), 3), ((unk, the), 3), ((the, bos), 0), ((the, byte), 1)]:
        assert count_row(table, row) == count
    assert (count_row(table, (the, space)), count_row(table, (bos, space))) == (1, 0)
    ids = torch.tensor([[the, the], [bos, byte]])
    assert int(table.to("cpu").count(ids, ids)) == 4 + 4 + 0 + 1


# Raw bytes


def test_raw_bytes(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(Bytes().to_json())
    tokenizer = load(path)
    (tokens,) = tokenizer.encode(["  é\tx"])
    assert tokens.tolist() == [1, 36, 36, 199, 173, 13, 124] and tokens.dtype == np.uint16
    assert tokenizer.decode([tokens.tolist()]) == ["  é\tx"]
    assert count_row(ByteTable.of(tokenizer.pieces), tokens.tolist()) == 6
    assert (tokenizer.vocab_size, tokenizer.bos) == (260, 1)


PUBLISHED = """{
  "config": {"bos_id": 1, "byte_count": 256, "byte_offset": 4, "eos_id": 2, "pad_id": 0, "unk_id": 3},
  "tokenizer_type": "pure_byte",
  "vocab_size": 260
}"""


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


@given(text=st.text())
def test_bytes_spell_what_sentencepiece_spells(embedded, text):
    """Of one text every tokenizer made here counts the same bytes, so bpb compares."""
    text = text.replace("\u2585", "")  # SentencePiece's own mark for unknown text, which its normalisation keeps
    for tokenizer in (load(embedded / "tokenizer.model"), Bytes(NORMALIZATION)):
        (tokens,) = tokenizer.encode([text])
        spelled = Bytes(NORMALIZATION).normalize(text)
        assert tokenizer.normalize(text) == spelled
        assert count_row(ByteTable.of(tokenizer.pieces), tokens.tolist()) == len(spelled.encode())
