import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from pgolf.data import dataset as data
from pgolf.data import documents, prepare, train_tokenizer
from pgolf.data.dataset import Dataset
from pgolf.data.documents import Texts, open_source
from pgolf.data.prepare import build
from pgolf_core.files import DataError
from pgolf_core.shards import read_shard, shard_paths
from pgolf_core.tokens import load

HARD = [
    "",
    " ",
    "   leading, and  multiple   spaces ",
    "tabs\tand\n\nlines\r\n",
    "🐈👩‍👩‍👧 𝕏 日本語の文章 中文 한국어 עברית",
    "\u2581 U+2581 \u2581\u2581 and \u2585 and <0x0A> <s> </s> <unk>",
    "ﬁ ① Å \u00a0\u3000 e\u0301 ½ ２",
    "\x00 \x01\x7f\u200b\ufeff\ufffd",
    "x" * 3000,
]


def words(count, seed=0):
    random = np.random.default_rng(seed)
    some = ["loss", "step", "weight", "byte", "scale", "token", "model", "prune", "round", "trip", "shard", "naïve"]
    return [" ".join(random.choice(some, random.integers(1, 60))) + f" {i}" for i in range(count)]


TEXTS = [*words(60), *HARD, *words(91, seed=1), *HARD]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Name -> file."""
    paths = {}
    for kind, vocab_size in (("bpe", 330), ("bpe", 400), ("unigram", 310), ("bytes", 260)):
        folder = tmp_path_factory.mktemp("tokenizer")
        paths[f"{kind}{vocab_size}"] = train_tokenizer.make(TEXTS, folder, kind, vocab_size)
    return paths


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(documents, "BLOCK_BYTES", 300)
    monkeypatch.setattr(documents, "BLOCK_ROWS", 5)
    monkeypatch.setattr(prepare, "PROGRESS_SECONDS", 0)


def written(path, texts=TEXTS):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8", newline="\n")
    return open_source(path)


def content(directory):
    """Name -> bytes of all that is in a folder but its cache, which knows when files were written."""
    return {path.name: path.read_bytes() for path in Path(directory).iterdir() if path.name != ".shards.json"}


def rows(directory, split):
    """Tokens of each document."""
    tokens = np.concatenate([read_shard(path) for path in shard_paths(directory, split)])
    return [row.tolist() for row in np.split(tokens, np.flatnonzero(tokens == 1)[1:])]


def encoded(directory, texts):
    path = next(path for path in Path(directory).iterdir() if path.name in ("tokenizer.model", "tokenizer.json"))
    return [row.tolist() for row in load(path).encode(texts)]


def chain(texts):
    h = bytes(32)
    for text in texts:
        h = hashlib.sha256(h + hashlib.sha256(text.encode()).digest()).digest()
    return h.hex()


# What is in the folder


@pytest.mark.parametrize("kind", ["bpe", "unigram", "bytes"])
def test_folder(tmp_path, kind, capsys):
    vocab_size = {"bpe": 330, "unigram": 315, "bytes": 260}[kind]
    directory = build(
        written(tmp_path / "docs.jsonl"), tmp_path / "out", kind=kind, vocab_size=vocab_size,
        val_documents=60, keep_overlap=True, tokenizer_documents=100, about={"commit": "abc"},
    )  # fmt: skip
    train, val = TEXTS[60:], TEXTS[:60]
    assert rows(directory, "train") == encoded(directory, train)
    assert rows(directory, "val") == encoded(directory, val)
    about = Dataset.open(directory).about
    assert about["source"]["name"] == "docs.jsonl" and about["commit"] == "abc"
    for split, texts in (("train", train), ("val", val)):
        assert about[split]["documents"] == len(texts) and about[split]["documents_sha256"] == chain(texts)
        assert about[split]["text_bytes"] == sum(len(text.encode()) for text in texts)
        assert about[split]["tokens"] == sum(len(row) for row in rows(directory, split))
    out = capsys.readouterr().out
    assert f"{about['train']['tokens']:,} training tokens of 109 documents" in out
    assert (f"training a tokenizer of {vocab_size} pieces on {100 - 60} documents" in out) == (kind != "bytes")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["docs.jsonl", "out", "out.lock"]

    name = "tokenizer.json" if kind == "bytes" else "tokenizer.model"
    if kind != "bytes":
        expected = train_tokenizer.make(TEXTS[60:100], tmp_path / "made", kind, vocab_size)
        assert (directory / name).read_bytes() == expected.read_bytes()
    # The file itself, given.
    again = build(
        Texts(TEXTS, "same"), tmp_path / "again", tokenizer_path=directory / name, val_documents=60, keep_overlap=True
    )
    assert Dataset.open(again).fingerprint == Dataset.open(directory).fingerprint


@pytest.mark.parametrize("sees_val", [False, True])
def test_documents_of_the_tokenizer(tmp_path, sees_val):
    """The first of the source, also where fewer are taken as documents."""
    directory = build(
        Texts(TEXTS, "x"), tmp_path / "out", vocab_size=330, documents=30, val_documents=20, tokenizer_documents=70,
        tokenizer_sees_val=sees_val, keep_overlap=True,
    )  # fmt: skip
    expected = train_tokenizer.make(TEXTS[0 if sees_val else 20 : 70], tmp_path / "made", "bpe", 330)
    assert (directory / "tokenizer.model").read_bytes() == expected.read_bytes()
    assert Dataset.open(directory).about["train"]["documents"] == 10


def test_same_bytes_for_all_workers_and_blocks(tmp_path, tokenizers, monkeypatch):
    source, built = written(tmp_path / "docs.jsonl"), []
    for workers, size in ((1, 1 << 19), (2, 1), (5, 200), (1, 1000)):
        monkeypatch.setattr(documents, "BLOCK_BYTES", size)
        directory = tmp_path / f"{workers}-{size}"
        build(source, directory, tokenizer_path=tokenizers["bpe330"], val_share=0.2, workers=workers, shard_tokens=700)
        built.append(content(directory))
    assert built[0] == built[1] == built[2] == built[3] and len(built[0]) > 8
    about = json.loads(built[0]["dataset.json"])
    assert [shard["tokens"] for shard in about["train"]["shards"]][:-1] == [700] * (len(about["train"]["shards"]) - 1)


@pytest.mark.parametrize("tokens", [1, 9, 10, 11, 30])
def test_shards_that_end_where_documents_do(tmp_path, tokenizers, tokens):
    source = Texts(["aaaaaaaaa"] * 4, "x")  # ten tokens each
    directory = build(
        source, tmp_path / "out", tokenizer_path=tokenizers["bytes260"], val_documents=1, keep_overlap=True,
        shard_tokens=tokens,
    )  # fmt: skip
    expected = [1, *[4 + ord("a")] * 9]
    assert rows(directory, "train") == [expected] * 3 and rows(directory, "val") == [expected]
    sizes = [len(read_shard(path)) for path in shard_paths(directory, "train")]
    assert sizes == [tokens] * (30 // tokens) + [30 % tokens] * (30 % tokens > 0)


def test_fewer_documents_are_the_first(tmp_path, tokenizers, small_blocks):
    options = dict(tokenizer_path=tokenizers["bpe330"], val_documents=7, keep_overlap=True)
    source = written(tmp_path / "docs.jsonl")
    whole = build(source, tmp_path / "whole", **options)
    for count in (8, 61, len(TEXTS), len(TEXTS) + 1):
        part = build(source, tmp_path / f"{count}", documents=count, **options)
        assert rows(part, "val") == rows(whole, "val")
        assert rows(part, "train") == rows(whole, "train")[: count - 7]


@pytest.mark.parametrize("kind", ["docs.txt", "docs.jsonl.gz", "folder"])
def test_other_sources(tmp_path, tokenizers, small_blocks, kind):
    texts = [text for text in words(40) if text.strip()]
    path = tmp_path / kind
    if kind == "folder":
        path.mkdir()
        for i, text in enumerate(texts):
            (path / f"{i:03}.txt").write_text(text, encoding="utf-8")
    elif kind == "docs.txt":
        path.write_text("\n\n".join(texts), encoding="utf-8")
    else:
        path.write_bytes(gzip.compress("".join(json.dumps({"text": t}) + "\n" for t in texts).encode()))
    directory = build(open_source(path), tmp_path / "out", tokenizer_path=tokenizers["bpe330"], val_documents=3)
    assert rows(directory, "val") + rows(directory, "train") == encoded(directory, texts)


def test_blocks_without_documents(tmp_path, tokenizers, small_blocks):
    (tmp_path / "docs.txt").write_text("\n" * 1000 + "one\n\n" + "\n" * 1000 + "two\n\nthree" + "\n" * 1000)
    directory = build(
        open_source(tmp_path / "docs.txt"), tmp_path / "out", tokenizer_path=tokenizers["bpe330"], val_documents=1
    )
    assert rows(directory, "val") + rows(directory, "train") == encoded(directory, ["one", "two", "three"])


# Splits


def test_overlap_is_left_out(tmp_path, tokenizers, capsys, small_blocks):
    texts = ["a", "b", "a", "c", "b", "a ", "d", "d"]
    options = dict(tokenizer_path=tokenizers["bpe330"], val_documents=3)
    directory = build(Texts(texts, "x"), tmp_path / "out", **options)
    assert rows(directory, "val") == encoded(directory, ["a", "b", "a"])
    assert rows(directory, "train") == encoded(directory, ["c", "d", "d"])  # "a " is spelled as "a" is
    assert Dataset.open(directory).about["train"]["left_out"] == 2
    assert "(2 left out: validation documents too)" in capsys.readouterr().out
    kept = build(Texts(texts, "x"), tmp_path / "kept", keep_overlap=True, **options)
    assert rows(kept, "train") == encoded(kept, ["c", "b", "a ", "d", "d"])


def test_a_share_keeps_equal_texts_together(tmp_path, tokenizers):
    texts = words(1000)
    source = Texts([*texts, *(f" {text} " for text in texts)], "x")  # tokens spell both alike
    directory = build(source, tmp_path / "out", tokenizer_path=tokenizers["bpe330"], val_share=0.1)
    chosen = [text for text in texts if hashlib.sha256(text.encode()).digest()[:8] < (2**64 // 10).to_bytes(8, "big")]
    assert 70 < len(chosen) < 130
    assert rows(directory, "val") == encoded(directory, chosen * 2)
    assert Dataset.open(directory).about["train"]["documents"] == 2000 - 2 * len(chosen)
    more = build(source, tmp_path / "more", tokenizer_path=tokenizers["bpe330"], val_share=0.2)
    there = {tuple(row) for row in rows(more, "val")}
    assert {tuple(row) for row in rows(directory, "val")} < there


# One text, several tokenizers


def test_all_tokenizers_spell_the_same_bytes(tmp_path, tokenizers):
    counts, texts = {}, {}
    for name, path in tokenizers.items():
        directory = build(Texts(TEXTS, "x"), tmp_path / name, tokenizer_path=path, val_documents=80, keep_overlap=True)
        dataset = Dataset.open(directory)
        assert dataset.tokenizer.vocab_size == int(name[-3:])
        counts[name] = []
        for split in data.SPLITS:
            for row in rows(directory, split):
                ids = torch.tensor(row)
                counts[name].append(int(dataset.byte_table.count(ids[:-1], ids[1:])))
        texts[name] = dataset.text_sha256(dataset.validation(1, max_documents=80))
        assert counts[name][len(TEXTS) - 80] == len(dataset.tokenizer.normalize(TEXTS[0]).encode())
    first = counts["bpe330"]
    assert all(of_one == first for of_one in counts.values()), counts
    assert len(set(texts.values())) == 1
    assert len(first) == len(TEXTS) and first[-80 - len(HARD)] == 0 and sum(first) > 10_000


# Again, and going on


def test_done_is_done(tmp_path, tokenizers, capsys, monkeypatch):
    source = written(tmp_path / "docs.jsonl")
    options = dict(tokenizer_path=tokenizers["bpe330"], val_documents=9)
    directory = build(source, tmp_path / "out", **options)
    before = {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}
    capsys.readouterr()
    monkeypatch.setattr(prepare, "_write_shards", None)
    assert build(source, directory, **options) == directory
    assert {path.name: path.stat().st_mtime_ns for path in directory.iterdir()} == before
    assert capsys.readouterr().out.startswith(f"{directory}: ")
    os.utime(tmp_path / "docs.jsonl")
    build(documents.open_source(tmp_path / "docs.jsonl"), directory, **options)
    assert "docs.jsonl was written to since" in capsys.readouterr().out

    with pytest.raises(DataError, match=r"made otherwise: val_documents 9 \(asked: 10\); delete it or name another"):
        build(source, directory, **options | {"val_documents": 10})
    with pytest.raises(DataError, match=r"tokenizer .*'sha256'.*asked: .*'kind': 'bpe'"):
        build(source, directory, val_documents=9)
    with pytest.raises(DataError, match=r"bytes \d+ \(asked: \d+\), sha256 "):
        build(written(tmp_path / "docs.jsonl", TEXTS[1:]), directory, **options)
    (directory / "dataset.json").unlink()
    with pytest.raises(DataError, match="without a complete corpus; delete it"):
        build(source, directory, **options)


class Killed(BaseException):
    pass


def killer(function, calls):
    """The function, until it was called so often; then it is as if the process ended."""
    left = [calls]

    def wrapped(*arguments, **options):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return function(*arguments, **options)

    return wrapped


def undisturbed(folder, source, **options):
    return content(build(source, folder / "undisturbed", **options))


@pytest.mark.parametrize(
    ("module", "name", "calls"),
    [
        *((prepare, "_write_record", calls) for calls in (0, 1, 2, 9, 40)),
        *((prepare._Split, "add", calls) for calls in (1, 31, 98)),
        *((prepare._Split, "close", calls) for calls in (0, 5, 9)),
        (train_tokenizer, "make", 0),
        (data, "describe", 0),
        (Path, "unlink", 0),
        (os, "replace", 10),
        (prepare.os, "replace", 0),
    ],
)
def test_killed_between_two_steps(tmp_path, small_blocks, monkeypatch, module, name, calls):
    source = written(tmp_path / "docs.jsonl")
    options = dict(vocab_size=330, val_share=0.2, shard_tokens=500, workers=2)
    expected = undisturbed(tmp_path, source, **options)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, killer(getattr(module, name), calls))
        with pytest.raises(Killed):
            build(source, tmp_path / "out", **options)
    build(source, tmp_path / "out", **options)
    assert content(tmp_path / "out") == expected
    assert not (tmp_path / "out.unfinished").exists()


def test_written_and_not_recorded(tmp_path, tokenizers, small_blocks, monkeypatch, capsys):
    """Whatever lies in the folder beyond the last record is written again."""
    source = written(tmp_path / "docs.jsonl")
    options = dict(tokenizer_path=tokenizers["bpe330"], val_documents=20, shard_tokens=500)
    expected = undisturbed(tmp_path, source, **options)
    staging = tmp_path / "out.unfinished"
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_write_record", killer(prepare._write_record, 20))
        with pytest.raises(Killed):
            build(source, tmp_path / "out", **options)
    last = max(staging.glob("fineweb_train_*.bin"))
    with open(last, "ab") as f:
        f.write(b"torn")
    last.with_name("fineweb_train_000099.bin").write_bytes(b"later")
    capsys.readouterr()
    build(source, tmp_path / "out", **options)
    assert "going on after" in capsys.readouterr().out and content(tmp_path / "out") == expected


def test_less_there_than_recorded(tmp_path, tokenizers, small_blocks, monkeypatch):
    source = written(tmp_path / "docs.jsonl")
    options = dict(tokenizer_path=tokenizers["bpe330"], val_documents=20, shard_tokens=500)
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_write_record", killer(prepare._write_record, 20))
        with pytest.raises(Killed):
            build(source, tmp_path / "out", **options)
    (tmp_path / "out.unfinished" / "fineweb_train_000000.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"out.unfinished: shard 0 of train is not what was written; delete"):
        build(source, tmp_path / "out", **options)


@pytest.mark.parametrize("change", ["source", "time"])
def test_a_changed_source_starts_anew(tmp_path, tokenizers, small_blocks, monkeypatch, capsys, change):
    source = written(tmp_path / "docs.jsonl")
    options = dict(tokenizer_path=tokenizers["bpe330"], val_documents=20)
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_write_record", killer(prepare._write_record, 20))
        with pytest.raises(Killed):
            build(source, tmp_path / "out", **options)
    with pytest.raises(DataError, match=r"holds \d+ documents of another build \(tokenizer .* delete this folder"):
        build(source, tmp_path / "out", **options | {"tokenizer_path": tokenizers["bytes260"]})
    if change == "source":
        source = written(tmp_path / "docs.jsonl", TEXTS[::-1])
    else:
        os.utime(tmp_path / "docs.jsonl", (1, 1))
    capsys.readouterr()
    build(source, tmp_path / "out", **options)
    said = {"source": "sha256", "time": "modified"}[change]
    out = capsys.readouterr().out
    assert "out.unfinished: of another build (" in out and said in out and "starting anew" in out
    assert content(tmp_path / "out") == undisturbed(tmp_path, source, **options)


SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run as a background job
from pgolf.data import documents, prepare
from pgolf_core.tokens import SentencePiece
documents.BLOCK_BYTES, prepare.PROGRESS_SECONDS = 300, 0
encode = SentencePiece.encode
SentencePiece.encode = lambda self, texts: (time.sleep(0.04), encode(self, texts))[1]
source, out, tokenizer = sys.argv[1:]
prepare.build(
    documents.open_source(source), out, tokenizer_path=tokenizer, val_share=0.2, shard_tokens=500, workers=2
)
"""


def start(tmp_path, tokenizers):
    return subprocess.Popen(
        [sys.executable, "-c", SLOW, tmp_path / "docs.jsonl", tmp_path / "out", tokenizers["bpe330"]],
        cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
        env=os.environ | {"PYTHONUTF8": "1"},
    )  # fmt: skip


def wait_for_documents(tmp_path, process, count):
    """Until a record tells of so many."""
    path, recorded = tmp_path / "out.unfinished" / "progress.json", -1
    while recorded < count and process.poll() is None:
        try:
            recorded = json.loads(path.read_text())["documents"]
        except (OSError, ValueError):  # not there yet, or just being replaced
            time.sleep(0.005)


def test_kill_and_go_on(tmp_path, tokenizers):
    source = written(tmp_path / "docs.jsonl")
    expected = undisturbed(
        tmp_path, source, tokenizer_path=tokenizers["bpe330"], val_share=0.2, shard_tokens=500, workers=1
    )
    for i, count in enumerate((1, 90)):
        process = start(tmp_path, tokenizers)
        wait_for_documents(tmp_path, process, count)
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        out, errors = process.communicate(timeout=10)
        assert not psutil.wait_procs(family, timeout=5)[1], "workers outlived their parent"
        assert ("going on after" in out) == (i > 0) and errors == "" and not (tmp_path / "out").exists()
        (tmp_path / "out.unfinished" / ".progress.json.1-2.tmp").write_text("killed as it wrote this")
    process = start(tmp_path, tokenizers)
    assert process.communicate(timeout=60)[1] == "" and process.returncode == 0
    assert content(tmp_path / "out") == expected


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no SIGINT to one process")
def test_interrupted(tmp_path, tokenizers):
    written(tmp_path / "docs.jsonl")
    process = start(tmp_path, tokenizers)
    wait_for_documents(tmp_path, process, 20)
    process.send_signal(signal.SIGINT)
    begin = time.monotonic()
    errors = process.communicate(timeout=10)[1]
    assert time.monotonic() - begin < 3 and process.returncode and errors.count("Traceback") == 1


def test_interrupted_while_the_tokenizer_is_made(tmp_path, monkeypatch):
    released = threading.Event()
    monkeypatch.setattr(train_tokenizer, "make", lambda *_: released.wait(30))
    monkeypatch.setattr(prepare, "wait", killer(prepare.wait, 1))
    begin = time.monotonic()
    with pytest.raises(Killed):
        build(Texts(TEXTS, "x"), tmp_path / "out", val_documents=3)
    released.set()
    assert time.monotonic() - begin < 5


# What goes wrong


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(), "set either val_documents .* or val_share"),
        (dict(val_documents=1, val_share=0.1), "set either val_documents"),
        (dict(val_share=1.0), "val_share=1.0: a share"),
        (dict(val_share=-0.1), "val_share=-0.1: a share"),
        (dict(documents=5, val_documents=5), "val_documents=5: no document of documents=5"),
        (dict(val_documents=3, kind="wordpiece"), "tokenizer=wordpiece: choose"),
        (dict(val_documents=3, kind="bytes"), "set vocab_size=260"),
        (dict(val_documents=3, vocab_size=65_537), "vocab_size=65537: shards hold tokens of at most 65536 pieces"),
        (dict(val_documents=3, vocab_size=60_000), "vocab_size=60000: this text gives no more than"),
        (dict(val_documents=50, tokenizer_documents=50), "of its first 50 documents no document is left to train on"),
        (dict(val_documents=3, tokenizer_path="nowhere"), "tokenizer_path: no file nowhere"),
        (dict(val_documents=5000, kind="bytes", vocab_size=260), "x: 169 documents give 0 for training and 169 for"),
        (dict(val_share=1e-9, kind="bytes", vocab_size=260), "169 for training and 0 for validation, and both need"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(DataError, match=message):
        build(Texts(TEXTS, "x"), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", [True, False])
def test_a_bad_line_among_good_ones(tmp_path, tokenizers, given, small_blocks):
    """It is named, at once and without a word of the workers; mended, the build goes through."""
    lines = [json.dumps({"text": text}) for text in words(300)]
    path = tmp_path / "docs.jsonl"
    path.write_text("\n".join([*lines[:200], '{"text": ', *lines[200:]]), encoding="utf-8")
    options = dict(tokenizer_path=tokenizers["bpe330"]) if given else dict(vocab_size=330)
    others = set(threading.enumerate())
    with pytest.raises(DataError, match=r"docs.jsonl, line 201: no JSON") as error:
        build(open_source(path), tmp_path / "out", val_documents=3, workers=2, **options)
    started = [thread for thread in set(threading.enumerate()) - others if thread.name != "tqdm_monitor"]
    assert "\n" not in str(error.value) and not started
    path.write_text("\n".join(lines), encoding="utf-8")
    directory = build(open_source(path), tmp_path / "out", val_documents=3, **options)
    assert rows(directory, "train") == encoded(directory, words(300)[3:])


def test_no_room(tmp_path, tokenizers, monkeypatch):
    source = Texts(words(2000), "x")
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10_000}))
    with pytest.raises(DataError, match=r"out.unfinished: the whole folder, .* needs [\d,]+ bytes and this disk"):
        build(source, tmp_path / "out", tokenizer_path=tokenizers["bpe330"], val_documents=3)
    build(source, tmp_path / "few", tokenizer_path=tokenizers["bpe330"], val_documents=3, documents=20)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a small file system")
def test_disk_runs_full(tmp_path, tokenizers, monkeypatch):
    monkeypatch.setattr(documents, "BLOCK_BYTES", 4000)
    monkeypatch.setattr(prepare, "PROGRESS_SECONDS", 0)
    source = written(tmp_path / "docs.jsonl", words(4000))
    options = dict(tokenizer_path=tokenizers["bpe330"], val_share=0.1, shard_tokens=30_000)
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("may not mount")
    try:
        with monkeypatch.context() as patch:
            patch.setattr(prepare, "check_space", lambda *_: None)
            for _ in range(2):
                with pytest.raises(DataError, match=r"out: the disk is full; make room and run the same command again"):
                    build(source, disk / "out", **options)
        subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
        build(source, disk / "out", **options)
        assert content(disk / "out") == undisturbed(tmp_path, source, **options)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_memory_stays_small(tmp_path, tokenizers, monkeypatch):
    """Read ahead is what the workers need, not the source."""
    monkeypatch.setattr(documents, "BLOCK_BYTES", 1000)
    source, read, most = written(tmp_path / "docs.jsonl", words(2000)), [0, 0], [0]
    blocks, add = documents.Files.blocks, prepare._Split.add

    def counted(self, *arguments):
        for block in blocks(self, *arguments):
            read[0] += 1
            most[0] = max(most[0], read[0] - read[1])
            yield block

    def added(self, *arguments):
        read[1] += self.name == "val"
        return add(self, *arguments)

    monkeypatch.setattr(documents.Files, "blocks", counted)
    monkeypatch.setattr(prepare._Split, "add", added)
    build(source, tmp_path / "out", tokenizer_path=tokenizers["bpe330"], val_share=0.1, workers=2)
    assert read[0] == read[1] > 100 and most[0] <= 6
