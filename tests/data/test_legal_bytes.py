"""What the bytes of a score stand for: marks of altered text, byte sidecars, thin validation splits, foreign caches."""

import gzip
import io
import json
import shutil

import numpy as np
import pytest
import sentencepiece
from build_helpers import build, messages, words, written
from support.shards import write_shard

from pgolf.data import documents
from pgolf.data.audit import audit, audit_folder
from pgolf.data.dataset import Dataset
from pgolf.data.documents import first_texts, open_source
from pgolf.data.tokenizers import load
from pgolf.training.round_trip import evaluate
from pgolf_core.config import RunConfig
from pgolf_core.files import DataError
from pgolf_core.model import GPT

BOS, CAPITAL = 1, "\ue001"
ORIGINAL = [text.title() for text in words(60, seed=5)]


def marked(text, mark=CAPITAL):
    return "".join(mark + letter.lower() if letter.isupper() else letter for letter in text)


def trained(texts, **options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=330, byte_fallback=True,
        add_dummy_prefix=False, pad_id=0, bos_id=1, eos_id=2, unk_id=3, hard_vocab_limit=False, minloglevel=2,
        normalization_rule_name="identity", **options,
    )  # fmt: skip
    return model.getvalue()


@pytest.fixture
def operators(tmp_path, make_folder):
    """A folder of text with marks for capitals, and the true bytes of each of its validation tokens."""
    path = tmp_path / "marks.model"
    path.write_bytes(trained(map(marked, ORIGINAL), user_defined_symbols=[CAPITAL]))
    tokenizer = load(path)
    val, train = (tokenizer.encode([marked(text) for text in texts]) for texts in (ORIGINAL[:40], ORIGINAL[40:]))
    folder = make_folder([train], [val], tokenizer=path)
    mark = tokenizer.processor.piece_to_id(CAPITAL)
    tokens = np.concatenate(val)
    pieces = tokenizer.pieces
    counts = np.array([0 if i in (BOS, mark) else len(pieces[i].text) + pieces[i].leads for i in tokens])
    assert counts.sum() == sum(len(text.encode()) for text in ORIGINAL[:40])
    return folder.directory, counts


@pytest.mark.parametrize("thorough", [True, False])
def test_marks_are_found_with_their_effect(operators, thorough):
    directory, counts = operators
    result = audit_folder(directory, seq_len=64, thorough=thorough)
    (message,) = messages(result, "marks")
    counted = result.figures["val"]["bytes"]
    assert f"U+E001 × {(counted - counts.sum()) // 3:,}" in message
    assert f"{1 - counts.sum() / counted:.2%} too low" in message and not result.ok


@pytest.mark.parametrize("mark", ["\uf8ff", "\U000f0000", "\x01", "\ufdd0"])
def test_every_kind_of_mark_is_found_however_it_is_spelled(make_folder, rows, dataset, mark):
    val = dataset.tokenizer.decode([row.tolist() for row in rows[:30]])
    spelled = [f"<0x{byte:02X}>" for byte in mark.encode()]
    tokens = [dataset.tokenizer.processor.piece_to_id(piece) for piece in spelled]
    assert all(tokens) and val
    result = audit(make_folder([[rows[40]]], [[np.append(row, tokens * 90) for row in rows[:30]]]), seq_len=64)
    assert f"U+{ord(mark):04X} × 2,700" in messages(result, "marks")[0]


def test_marks_that_the_source_text_has_are_no_error(operators):
    directory, _ = operators
    own = [marked(text) for text in ORIGINAL[:40]]
    for texts, ok in ((own, True), (ORIGINAL[:40], False)):
        result = audit(Dataset.open(directory), seq_len=64, documents=texts)
        assert result.ok == ok and bool(messages(result, "marks", "note")) == ok


def test_a_byte_sidecar_counts_and_is_no_validation_shard(operators):
    directory, counts = operators
    before = Dataset.open(directory)
    write_shard(directory / "fineweb_val_bytes_000000.bin", counts)
    dataset = Dataset.open(directory)
    assert dataset.val_shards == before.val_shards and dataset.fingerprint != before.fingerprint
    result = audit(dataset, seq_len=64)
    assert result.ok and result.figures["val"]["bytes"] == counts.sum()
    (note,) = messages(result, "bytes", "note")
    change = counts.sum() / before.byte_table.count(before.validation(1)) - 1
    assert f"{counts.sum():,} bytes, {change:+.2%} against the table" in note
    assert audit(dataset, seq_len=64, documents=ORIGINAL[:40]).ok
    longer = [f"{text} and more" for text in ORIGINAL[:40]]
    assert "byte sidecar counts" in messages(audit(dataset, documents=longer), "bytes")[0]


@pytest.mark.slow
def test_a_score_counts_the_sidecar_in_every_window(operators):
    directory, counts = operators
    without = Dataset.open(directory)
    write_shard(directory / "fineweb_val_bytes_000000.bin", counts)
    dataset = Dataset.open(directory)
    for stride in (0, 24):
        config = RunConfig(track="nano", vocab_size=330, train_seq_len=64, eval_stride=stride)
        tokens = dataset.validation(64)
        scores = [evaluate(GPT(config.model), tokens, each.byte_table, config.eval) for each in (without, dataset)]
        assert scores[1].bytes == counts[1 : len(tokens)].sum() < scores[0].bytes


def test_a_sidecar_of_other_text_is_refused(operators):
    directory, counts = operators
    path = directory / "fineweb_val_bytes_000000.bin"
    write_shard(path, counts[:-1])
    with pytest.raises(DataError, match=r"val_bytes_000000\.bin: the byte sidecar states the bytes of [\d,]+ tokens"):
        Dataset.open(directory)
    write_shard(path, np.roll(counts, 700))
    assert "the byte sidecar counts" in messages(audit_folder(directory), "bytes")[0]
    inflated = Dataset.open(directory).tokenizer.encode([marked(text) for text in ORIGINAL[:40]])
    write_shard(path, [len(piece.encode()) for row in inflated for piece in [f"{i:04d}" for i in row]])
    assert "the byte sidecar counts" in messages(audit_folder(directory), "bytes")[0]
    write_shard(path, counts)
    assert audit_folder(directory).ok


def test_characters_that_the_source_has_not_are_named(make_folder, dataset):
    texts = words(30)
    val = dataset.tokenizer.encode([text.replace("e", "^e") for text in texts])
    result = audit(make_folder([val[:1]], [val[1:]]), documents=texts[1:])
    count = sum(text.count("e") for text in texts[1:])
    assert f"the source has not: U+005E × {count:,}" in messages(result, "bytes")[0]


@pytest.mark.parametrize(
    ("sizes", "thin"), [([43, 12, 12, 11, 11, 11], True), ([30] * 40, False), ([900] + [9] * 99, True)]
)
def test_a_thin_validation_split_is_said(make_folder, rows, sizes, thin):
    val = [np.array([BOS, *np.random.default_rng(i).integers(300, 900, n)]) for i, n in enumerate(sizes)]
    found = messages(audit(make_folder([[rows[0]]], [val]), seq_len=8), "size", "warning")
    assert [f"{len(sizes)} documents, the largest" in message for message in found] == [True] * thin


def test_a_tokenizer_without_bos_is_refused_in_words(tmp_path, make_folder, rows):
    folder = make_folder([rows[:2]], [rows[2:4]]).directory
    (folder / "dataset.json").unlink()
    (folder / "tokenizer.model").write_bytes(trained(words(60), user_defined_symbols=["<s>"]))
    with pytest.raises(DataError, match=r"tokenizer\.model has no BOS: .* train one with bos_id=1"):
        Dataset.open(folder)
    assert not audit_folder(folder).ok


def test_caches_that_came_with_a_copied_folder_vouch_for_nothing(make_folder, rows, tmp_path):
    dataset = make_folder([rows[:3]], [rows[3:9]])
    dataset.scored_text(8)
    for name in (".shards.json", ".texts.json"):
        cache = dataset.directory / name
        content = json.loads(cache.read_text())
        forged = {key: value | {"sha256": "f" * 64} if ".bin" in key else value for key, value in content.items()}
        forged = {key: "f" * 64 if isinstance(value, str) else value for key, value in forged.items()}
        cache.write_text(json.dumps(forged))
    copied = shutil.copytree(dataset.directory, tmp_path / "copied", copy_function=shutil.copy2)
    (copied / "dataset.json").unlink()
    arrived = Dataset.open(copied)
    assert (arrived.fingerprint, arrived.scored_text(8)) == (
        dataset.fingerprint,
        dataset.text_sha256(dataset.validation(8)),
    )
    for hostile in ("[]", '{"fineweb_val_000000.bin": 3, "files": {}}', "[" * 100_000):
        (copied / ".shards.json").write_text(hostile)
        (copied / ".texts.json").write_text(hostile)
        assert Dataset.open(copied).scored_text(8) == arrived.scored_text(8)


def test_a_compressed_document_without_end_is_read_to_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "LONGEST", 1 << 21)
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(gzip.compress(bytes(1 << 26)))
    with pytest.raises(DataError, match=r"bomb\.jsonl\.gz: the document at unpacked byte 0 is longer than 2,097,152 b"):
        list(first_texts(open_source(path)))


def test_skipped_files_are_said_with_their_kinds(tmp_path, capsys):
    folder = tmp_path / "own"
    (folder / ".git").mkdir(parents=True)
    written(folder / "docs.jsonl", words(40))
    for name in ("a.pdf", "b.PDF", "c.html", "Makefile", ".hidden.txt", ".git/config"):
        (folder / name).write_text("x")
    build(open_source(folder), tmp_path / "out", val_share=0.3, kind="bytes", vocab_size=260)
    assert "own: 5 files skipped: 2 .pdf, 2 hidden, 1 without suffix" in capsys.readouterr().out
