"""Fixtures of the data tests."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
from build_helpers import TEXTS, written
from support.shards import write_shard

from pgolf.data import documents, prepare, train_tokenizer
from pgolf.data.dataset import Dataset, describe
from pgolf.data.tokenizers import NAMES
from pgolf_core.shards import read_shard


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 300 KiB, and a function that changes its size."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(*options):
        return subprocess.run(["mount", "-t", "tmpfs", *options, "none", disk], capture_output=True, check=False)

    if not sys.platform.startswith("linux") or mount("-o", "size=300k").returncode:
        pytest.skip("mounting a small disk needs Linux and root")
    yield disk, lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)
    subprocess.run(["umount", disk], check=True)


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory):
    """Name -> file."""
    paths = {}
    for kind, vocab_size in (("bpe", 330), ("bpe", 400), ("unigram", 310), ("bytes", 260)):
        path = tmp_path_factory.mktemp("tokenizer") / NAMES[kind == "bytes"]
        path.write_bytes(train_tokenizer.train(TEXTS, kind, vocab_size))
        paths[f"{kind}{vocab_size}"] = path
    return paths


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(documents, "BLOCK_BYTES", 300)
    monkeypatch.setattr(documents, "BLOCK_ROWS", 5)
    monkeypatch.setattr(prepare, "PROGRESS_SECONDS", 0)


@pytest.fixture
def source(tmp_path):
    return written(tmp_path / "docs.jsonl")


@pytest.fixture(scope="session")
def dataset(embedded):
    return Dataset.open(embedded)


@pytest.fixture(scope="session")
def rows(dataset):
    """Tokens of the embedded corpus's 200 validation documents."""
    tokens = read_shard(dataset.val_shards[0])
    return np.split(np.array(tokens), np.flatnonzero(tokens == 1)[1:])


@pytest.fixture
def make_folder(tmp_path, embedded):
    """A folder of shards, each a list of documents (tokens), with a tokenizer and dataset.json."""

    def make(train, val, /, name="folder", tokenizer=embedded / "tokenizer.model", **about):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(tokenizer, folder / f"tokenizer{tokenizer.suffix}")
        for split, shards in (("train", train), ("val", val)):
            for i, rows in enumerate(shards):
                write_shard(folder / f"fineweb_{split}_{i:06d}.bin", np.concatenate(rows))
        return describe(folder, **about)

    return make
