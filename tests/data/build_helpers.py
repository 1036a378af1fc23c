"""Helpers of the tests that build folders of shards: documents, and what a folder holds."""

import hashlib
import json
from pathlib import Path

import numpy as np
from support.corpus import HARD_TEXTS

from pgolf.data import prepare
from pgolf.data.documents import open_source
from pgolf.data.prepare import BuildRequest
from pgolf.data.tokenizers import load
from pgolf_core.shards import read_shard, shard_paths


def words(count, seed=0):
    random = np.random.default_rng(seed)
    some = ["loss", "step", "weight", "byte", "scale", "token", "model", "prune", "round", "trip", "shard", "naïve"]
    return [" ".join(random.choice(some, random.integers(1, 60))) + f" {i}" for i in range(count)]


def build(source, directory, *, workers=0, about=None, **options):
    return prepare.build(source, directory, BuildRequest(**options), workers, about)


TEXTS = [*words(60), *HARD_TEXTS, *words(91, seed=1), *HARD_TEXTS]


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


def undisturbed(folder, source, **options):
    return content(build(source, folder / "undisturbed", **options))


def messages(result, check, level="error"):
    return [found.message for found in result.findings if (found.check, found.level) == (check, level)]


def only(result, check, level="error"):
    """The one finding that there is beyond notes, and beyond the size of a split made for a test."""
    found = [found for found in result.findings if found.level != "note" and found.check != "size"]
    assert [(f.check, f.level) for f in found] == [(check, level)], result.findings
    return found[0].message
