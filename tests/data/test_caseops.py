"""CaseOps: exact on adversarial text and on every document of a folder; scores divide by the original bytes."""

import json
import re

import numpy as np
import pytest
from build_helpers import build, content, messages, words, written
from hypothesis import example, given
from hypothesis import strategies as st
from support.corpus import MORE_HARD_TEXTS
from support.training import tiny

from pgolf.cli import main
from pgolf.data import caseops, embedded_corpus, prepare
from pgolf.data.audit import audit, audit_folder
from pgolf.data.dataset import Dataset
from pgolf.data.documents import Texts
from pgolf.data.prepare import BuildRequest
from pgolf.data.tokenizers import CaseOps, load
from pgolf.studies.sample import sample
from pgolf.submission.submit import submit
from pgolf.training.run import train
from pgolf_core.config import RunConfig
from pgolf_core.files import DataError
from pgolf_core.shards import read_shard, sidecar_paths

TITLE, ALLCAPS, CAPNEXT, ESC = caseops.OPERATORS
ADVERSARIAL = [
    *MORE_HARD_TEXTS,
    "ǅ ǈungla Ǆ ﬁne ﬀ İstanbul ıI ẞß ŉ Ω ſ K Å",  # titlecase, ligatures, letters whose case changes their length
    "A\u0301 E\u0302E\u0302 N\u0303O a\u0345 \u0301A\u200dB",  # combining marks after capitals
    "\ue000\ue001\ue002\ue003\ue004\ue005\uf8ff\U000f0000",
    f"{ESC}_{ESC}{ESC}_ {TITLE}the{ALLCAPS}A{CAPNEXT}{ESC}\u2581_\u2581\u2581a\u2581B",
    "A I The THE tHE ThE iPhone XMLHttpRequest camelCase HTTP2Server A1B2 ABc aB É Éa aÉB NASA's O'Neil __INIT__",
]
TEXTS = [*words(40, seed=3), *ADVERSARIAL, *(text.title() for text in words(40, seed=5)), *ADVERSARIAL[-4:]]
LETTERS = st.sampled_from([*"aAbBzZ _1\n", "é", "É", "ǅ", "ﬁ", "\u0301", "\u2581", "\ue000", *caseops.OPERATORS])
TEXT = st.text(LETTERS) | st.text(st.characters(exclude_categories=["Cs"]))


@pytest.mark.parametrize(
    ("text", "spelled"),
    [
        ("all lower", "all lower"),
        ("NASA", f"{ALLCAPS}nasa"),
        ("I am The", f"{TITLE}i am {TITLE}the"),
        ("McDonald iPhone", f"{TITLE}mc{CAPNEXT}donald i{CAPNEXT}phone"),
        ("ABc aBCD", f"{TITLE}a{CAPNEXT}bc a{CAPNEXT}b{CAPNEXT}c{CAPNEXT}d"),
        ("HTTP2X É", f"{ALLCAPS}http2{TITLE}x É"),
        (f"{TITLE}{ESC}\u2581", f"{ESC}{TITLE}{ESC}{ESC}{ESC}_"),
    ],
)
def test_the_published_rules(text, spelled):
    assert caseops.encode(text) == spelled and caseops.decode(spelled) == text


@given(TEXT)
@example("\n".join(ADVERSARIAL))
def test_the_inverse_is_exact_and_no_capital_is_left(text):
    spelled = caseops.encode(text)
    assert caseops.decode(spelled) == text
    assert not re.search("[A-Z\u2581]", spelled)


@given(TEXT)
def test_any_text_that_a_model_may_write_is_read(text):
    assert isinstance(caseops.decode(text), str)


@pytest.mark.slow
def test_the_inverse_is_exact_on_every_document_of_the_large_embedded_corpus():
    texts = [document.text for document in embedded_corpus.embedded_documents(large=True)]
    assert len(texts) > 5000 and all(caseops.decode(caseops.encode(text)) == text for text in texts)


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def folder(request, tmp_path_factory):
    options = dict(val_share=0.4, kind=request.param, vocab_size=340, transform="caseops")
    return build(Texts(TEXTS, "own"), tmp_path_factory.mktemp("data") / "own", tokenizer_documents=0, **options)


def documents_of(folder):
    """Original text and bytes by the sidecar of every validation document."""
    dataset = Dataset.open(folder)
    (sizes,), (tokens,) = map(read_shard, sidecar_paths(folder)), map(read_shard, dataset.val_shards)
    starts = np.flatnonzero(tokens == 1)
    texts = dataset.tokenizer.decode([row.tolist() for row in np.split(tokens, starts[1:])])
    return texts, np.add.reduceat(sizes, starts, dtype=np.int64).tolist()


def test_every_document_comes_back_from_its_tokens_and_the_sidecar_counts_its_bytes(folder):
    texts, sizes = documents_of(folder)
    asked = Dataset.open(folder).about["source"]
    assert texts == list(prepare.validation_texts(Texts(TEXTS, "own"), asked)) and asked["transform"] == "caseops"
    assert sizes == [len(text.encode()) for text in texts]
    assert sum(sizes) == Dataset.open(folder).about["val"]["text_bytes"]


@given(st.lists(TEXT, min_size=1, max_size=5))
@example(ADVERSARIAL)
def test_tokens_invert_and_count_the_bytes_of_any_text(folder, texts):
    tokenizer = load(folder / "tokenizer.model")
    rows = tokenizer.encode(texts)
    assert isinstance(tokenizer, CaseOps) and tokenizer.decode([row.tolist() for row in rows]) == texts
    for text, row in zip(texts, rows, strict=True):
        counts = tokenizer.text_bytes(row)
        assert counts.sum() == len(text.encode())
        for at in range(1, len(row) + 1):  # each token's own: the bytes that it adds to the original
            (begun,) = tokenizer.decode([row[:at].tolist()])
            whole = text.startswith(begun) and "\ufffd" not in begun and row[at - 1] not in tokenizer.operators
            assert not whole or counts[:at].sum() == len(begun.encode())
    assert [tokenizer.normalize(text) for text in texts] == texts


def test_the_audit_compares_with_the_original_and_misses_a_sidecar(folder, tmp_path):
    dataset = Dataset.open(folder)
    texts = list(prepare.validation_texts(Texts(TEXTS, "own"), dataset.about["source"]))
    for documents in (None, texts):
        found = audit(dataset, seq_len=16, documents=documents)
        assert found.ok and found.figures["val"]["bytes"] == sum(len(text.encode()) for text in texts)
        assert not messages(found, "bytes", "warning")
    other = audit(dataset, seq_len=16, documents=[text.lower() + "x" for text in texts])
    assert "the byte sidecar counts" in messages(other, "bytes")[0]
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in folder.iterdir():
        if "val_bytes" not in path.name and path.suffix in (".bin", ".model"):
            (bare / path.name).write_bytes(path.read_bytes())
    assert "put a byte sidecar of the original text" in messages(audit_folder(bare, seq_len=16), "marks")[0]


def test_a_killed_build_ends_with_the_same_bytes(tmp_path, small_blocks, monkeypatch):
    options = dict(val_share=0.4, vocab_size=400, transform="caseops", shard_tokens=300)
    whole = content(build(written(tmp_path / "docs.jsonl", TEXTS), tmp_path / "whole", **options))
    writes, encode = [], prepare._encode

    def killed(*given):
        writes.append(1)
        if len(writes) == 4:
            raise KeyboardInterrupt
        return encode(*given)

    monkeypatch.setattr(prepare, "_encode", killed)
    source = written(tmp_path / "docs.jsonl", TEXTS)
    with pytest.raises(KeyboardInterrupt):
        build(source, tmp_path / "own", workers=1, **options)
    assert content(build(source, tmp_path / "own", **options)) == whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transform": "lower"}, "transform=lower: choose caseops"),
        ({"transform": "caseops", "kind": "bytes", "vocab_size": 260}, "with the tokenizer bpe or unigram"),
        ({"transform": "caseops", "tokenizer_path": "bpe400"}, "no case operators for --transform caseops"),
        ({"tokenizer_path": "own"}, "has the case operators: add --transform caseops"),
    ],
)
def test_what_does_not_fit_is_refused(folder, tokenizers, options, message):
    paths = {**tokenizers, "own": folder / "tokenizer.model"}
    options = options | ({"tokenizer_path": paths[options["tokenizer_path"]]} if "tokenizer_path" in options else {})
    with pytest.raises(DataError, match=message):
        BuildRequest(val_share=0.4, **options)


def test_the_embedded_corpus_with_operators_scores_the_text_of_its_other_tokenizers(tmp_path, monkeypatch):
    texts = [text.title() if i % 2 else text for i, text in enumerate([*words(300, seed=9), *ADVERSARIAL])]
    documents = [embedded_corpus.Document("", text) for text in reversed(texts)]
    monkeypatch.setattr(embedded_corpus, "ROOT", tmp_path)
    monkeypatch.setattr(embedded_corpus, "embedded_documents", lambda large: documents)
    configs = [RunConfig(vocab_size=400, text_transform=transform) for transform in ("", "caseops")]
    folders = [embedded_corpus.resolve(config.data, 400) for config in configs]
    assert [folder.name for folder in folders] == ["embedded_sp400", "embedded_caseops_sp400"]
    plain, marked = map(Dataset.open, folders)
    assert plain.scored_text(1, max_documents=200) == marked.scored_text(1, max_documents=200)
    sizes = [each.byte_table.count(each.validation(1, max_documents=200)) for each in (plain, marked)]
    assert sizes[0] == sizes[1] and audit(marked).ok
    with pytest.raises(DataError, match="built for transform=caseops, not "):
        embedded_corpus.build_embedded(400, folders[1])


def test_documents_to_a_score_and_a_submission_over_original_bytes(tmp_path, capfd):
    """From the command to a submission: the bytes are those of the scored original documents."""
    texts = [text.title() for text in words(400, seed=7)]
    written(tmp_path / "own.jsonl", texts)
    made = ["--vocab-size", "370", "--val-share", "0.3", "--transform", "caseops", "--out", str(tmp_path / "shards")]
    assert main.main(["data", "docs", str(tmp_path / "own.jsonl"), *made]) == 0
    source = ["--source", str(tmp_path / "own.jsonl")]
    assert main.main(["data", "audit", str(tmp_path / "shards"), "--seq-len", "32", *source]) == 0
    knobs = dict(data_path=str(tmp_path / "shards"), vocab_size=370, val_max_tokens=0, roundtrip_val_max_tokens=0)
    result = train(tiny(**knobs, roundtrip_val_max_documents=9, val_max_documents=9), tmp_path / "sweep" / "run")
    originals, _ = documents_of(tmp_path / "shards")
    size = sum(len(text.encode()) for text in originals[:9])
    assert result.roundtrip_bytes == size
    bits = result.roundtrip_val_loss * result.roundtrip_tokens / np.log(2)
    assert result.roundtrip_val_bpb == pytest.approx(bits / size)
    for row in sample(tmp_path / "sweep" / "run", prompts=["Th", "NASA Mc"], tokens=5):
        assert row["text"].startswith(row["prompt"])
    claims = json.loads((submit(tmp_path / "sweep" / "run", tmp_path / "out") / "submission.json").read_text())
    whole = sum(len(text.encode()) for text in originals)
    last = len(originals[-1].encode())
    assert whole - last < claims["val_bytes"] <= whole
    capfd.readouterr()
