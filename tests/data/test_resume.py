"""A build that was killed, interrupted or ran out of disk ends with the bytes of an undisturbed one."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from build_helpers import TEXTS, build, content, undisturbed, words, written

from pgolf.data import dataset as data
from pgolf.data import documents, prepare, shard_writer, train_tokenizer
from pgolf.data.documents import Texts
from pgolf.disk import read_json
from pgolf_core.files import DataError


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


@pytest.mark.parametrize(
    ("module", "name", "calls"),
    [
        *((prepare, "atomic_write", calls) for calls in (0, 1, 2, 9, 40)),
        *((shard_writer.SplitWriter, "add", calls) for calls in (1, 31, 98)),
        *((shard_writer.SplitWriter, "synced", calls) for calls in (0, 55)),
        (train_tokenizer, "train", 0),
        (data, "describe", 0),
        (Path, "unlink", 0),
        (os, "replace", 10),
        (prepare.os, "replace", 0),
    ],
)
def test_killed_between_two_steps(tmp_path, source, small_blocks, monkeypatch, module, name, calls):
    options = dict(vocab_size=330, val_share=0.2, shard_tokens=500, workers=2)
    expected = undisturbed(tmp_path, source, **options)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, killer(getattr(module, name), calls))
        with pytest.raises(Killed):
            build(source, tmp_path / "out", **options)
    build(source, tmp_path / "out", **options)
    assert content(tmp_path / "out") == expected
    assert not (tmp_path / "out.unfinished").exists()


@pytest.fixture
def killed(tmp_path, tokenizers, source, small_blocks, monkeypatch):
    """Options of a build that was killed after its 21st record."""
    options = dict(tokenizer_path=tokenizers["bpe330"], val_documents=20, shard_tokens=500)
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "atomic_write", killer(prepare.atomic_write, 22))
        with pytest.raises(Killed):
            build(source, tmp_path / "out", **options)
    return options


def test_written_and_not_recorded(tmp_path, source, killed, capsys):
    """Everything in the folder beyond the last record is written again."""
    last = max((tmp_path / "out.unfinished").glob("fineweb_train_*.bin"))
    with open(last, "ab") as f:
        f.write(b"torn")
    capsys.readouterr()
    build(source, tmp_path / "out", **killed)
    assert "resuming after" in capsys.readouterr().out
    assert content(tmp_path / "out") == undisturbed(tmp_path, source, **killed)


def test_less_there_than_recorded(tmp_path, source, killed):
    (tmp_path / "out.unfinished" / "fineweb_train_000000.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"fineweb_train_000000.bin: not what was written; delete out.unf"):
        build(source, tmp_path / "out", **killed)


def test_a_build_of_other_options_or_of_a_touched_source_is_not_thrown_away(tmp_path, tokenizers, source, killed):
    with pytest.raises(DataError, match=r"holds \d+ documents of another build \(tokenizer .* delete this folder"):
        build(source, tmp_path / "out", **killed | {"tokenizer_path": tokenizers["bytes260"]})
    os.utime(tmp_path / "docs.jsonl", (1, 1))
    build(source, tmp_path / "out", **killed)
    assert content(tmp_path / "out") == undisturbed(tmp_path, source, **killed)


def test_an_edit_behind_the_first_megabyte_is_no_touch(tmp_path, source, killed):
    progress = tmp_path / "out.unfinished" / "progress.json"
    record = json.loads(progress.read_text())
    progress.write_text(json.dumps(record | {"content": ["0" * 64]}))
    os.utime(tmp_path / "docs.jsonl", (1, 1))
    with pytest.raises(DataError, match=r"holds \d+ documents of another build \(modified .* delete this folder"):
        build(source, tmp_path / "out", **killed)


def test_a_changed_source_starts_over(tmp_path, killed, capsys):
    source = written(tmp_path / "docs.jsonl", TEXTS[::-1])
    build(source, tmp_path / "out", **killed)
    out = capsys.readouterr().out
    assert "out.unfinished: holds" in out and "of another build (sha256" in out and "starting over" in out
    assert content(tmp_path / "out") == undisturbed(tmp_path, source, **killed)


SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run as a background job
from pgolf.data import documents, prepare
from pgolf.data.tokenizers import SentencePiece
documents.BLOCK_BYTES, prepare.PROGRESS_SECONDS = 300, 0
encode = SentencePiece.encode
SentencePiece.encode = lambda self, texts: (time.sleep(0.04), encode(self, texts))[1]
source, out, tokenizer = sys.argv[1:]
request = prepare.BuildRequest(tokenizer_path=tokenizer, val_share=0.2, shard_tokens=500)
prepare.build(documents.open_source(source), out, request, workers=2)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no SIGINT to one process")
def test_a_build_killed_and_interrupted_again_and_again(tmp_path, tokenizers):
    source, record = written(tmp_path / "docs.jsonl"), tmp_path / "out.unfinished" / "progress.json"
    command = [sys.executable, "-c", SLOW, tmp_path / "docs.jsonl", tmp_path / "out", tokenizers["bpe330"]]
    for count, end in ((1, signal.SIGKILL), (90, signal.SIGINT), (9999, None)):
        process = subprocess.Popen(
            command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
            env=os.environ | {"PYTHONUTF8": "1"},
        )  # fmt: skip
        while process.poll() is None and (read_json(record) or {"documents": 0})["documents"] < count:
            time.sleep(0.005)
        if end:
            family, begin = psutil.Process(process.pid).children(recursive=True), time.monotonic()
            process.send_signal(end)
        out, errors = process.communicate(timeout=60)
        assert ("resuming after" in out) == (count > 1)
        assert errors.count("Traceback") == (end == signal.SIGINT)
        assert (process.returncode == 0) == (end is None) == (tmp_path / "out").exists()
        if end:
            assert time.monotonic() - begin < 20  # it does not wait for its work
            assert not psutil.wait_procs(family, timeout=5)[1], "workers outlived their parent"
            (tmp_path / "out.unfinished" / ".progress.json.1-2.tmp").write_text("killed as it wrote this")
    options = dict(tokenizer_path=tokenizers["bpe330"], val_share=0.2, shard_tokens=500, workers=1)
    assert content(tmp_path / "out") == undisturbed(tmp_path, source, **options)


def test_interrupted_while_the_tokenizer_is_made(tmp_path, monkeypatch):
    released = threading.Event()
    monkeypatch.setattr(train_tokenizer, "train", lambda *_: released.wait(30))
    monkeypatch.setattr(prepare, "wait", killer(prepare.wait, 1))
    begin = time.monotonic()
    with pytest.raises(Killed):
        build(Texts(TEXTS, "x"), tmp_path / "out", val_documents=3)
    released.set()
    assert time.monotonic() - begin < 20  # the training would take 30


def test_disk_runs_full(tmp_path, tokenizers, monkeypatch, small_disk):
    disk, resize = small_disk
    monkeypatch.setattr(documents, "BLOCK_BYTES", 4000)
    monkeypatch.setattr(prepare, "PROGRESS_SECONDS", 0)
    source = written(tmp_path / "docs.jsonl", words(4000))
    options = dict(tokenizer_path=tokenizers["bpe330"], val_share=0.1, shard_tokens=30_000)
    for _ in range(2):
        with pytest.raises(DataError, match=r"out: the disk is full; make room and run the same command again"):
            build(source, disk / "out", **options)
    resize("4m")
    build(source, disk / "out", **options)
    assert content(disk / "out") == undisturbed(tmp_path, source, **options)
