"""Bytes of tokens: those of the text that SentencePiece decodes from them."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.corpus import MORE_HARD_TEXTS

from pgolf.data.tokenizers import load
from pgolf_core.config import ROOT
from pgolf_core.shards import read_shard, shard_paths
from pgolf_core.tokens import ByteTable

FINEWEB = ROOT.parent / "shared" / "tokenizers" / "fineweb_8192_bpe.model"


@pytest.fixture(scope="module", params=["embedded", "fineweb"])
def tokenizer(request, embedded):
    """The SentencePiece processor and the byte table of one model."""
    path = embedded / "tokenizer.model" if request.param == "embedded" else FINEWEB
    if not path.exists():
        pytest.skip(f"no {path}")
    return load(path).processor, ByteTable.from_sentencepiece(path)


def count_row(table, ids):
    ids = torch.tensor(ids)
    return int(table.count(ids))


@settings(max_examples=50, deadline=None)
@given(text=st.text())
def test_bytes_of_any_text(tokenizer, text):
    sp, table = tokenizer
    ids = sp.encode(text, add_bos=True)
    assert count_row(table, ids) == len(sp.decode(ids).encode())


for hard in MORE_HARD_TEXTS:
    test_bytes_of_any_text = example(text=hard)(test_bytes_of_any_text)


@pytest.mark.parametrize("tokenizer", ["embedded"], indirect=True)
def test_bytes_of_every_validation_document(tokenizer, embedded):
    sp, table = tokenizer
    tokens = np.concatenate([read_shard(path) for path in shard_paths(embedded, "val")])
    documents = [d.tolist() for d in np.split(tokens, np.flatnonzero(tokens == sp.bos_id())[1:])]
    assert len(documents) == 200
    written = [len(sp.decode(document).encode()) for document in documents]
    assert [count_row(table, document) for document in documents] == written
    assert count_row(table, tokens.tolist()) == sum(written)


@pytest.mark.parametrize("tokenizer", ["embedded"], indirect=True)
def test_byte_table_rules(tokenizer):
    sp, table = tokenizer
    the, byte, space, bos, unk = (sp.piece_to_id(p) for p in ("▁the", "<0x0A>", "▁", "<s>", "<unk>"))
    assert len(table.base_bytes) == len(table.is_boundary) == 1024
    assert table.is_boundary.nonzero().flatten().tolist() == [0, 1, 2, 3]
    rows = {
        (the, the): 4, (bos, the): 3, (unk, the): 3, (the, bos): 0, (the, byte): 1, (the, space): 1, (bos, space): 0,
    }  # fmt: skip
    assert {row: count_row(table, row) for row in rows} == rows
    counted_elsewhere = dataclasses.replace(table, sidecar=torch.tensor([0, 9, 2, 7]))
    assert counted_elsewhere.count(torch.tensor([bos, the, space])) == 9 + 2
