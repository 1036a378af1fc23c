"""A folder of shards with its tokenizer: what it must be, what it is, and which of its text is scored."""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pgolf.disk import checksum
from pgolf_core import tokens as tokenizer
from pgolf_core.batches import TokenStream
from pgolf_core.config import ROOT
from pgolf_core.files import DataError, atomic_write
from pgolf_core.shards import read_shard, shard_paths
from pgolf_core.tokens import ByteTable, Tokenizer

__all__ = ["ByteTable", "DataError", "Dataset", "describe", "validation_tokens"]

DESCRIPTION = "dataset.json"
SPLITS = ("train", "val")


def validation_tokens(
    directory: str | Path, seq_len: int, max_tokens: int = 0, max_documents: int = 0, bos: int = 1
) -> Tensor:
    """The scored stretch of all val shards as (n,) int64: each token but the first is a target.

    Whole windows of seq_len, at most max_tokens (0 = all), and one token more. With max_documents just the first so
    many documents instead, each whole: the same text whatever the tokenizer.
    """
    paths = shard_paths(directory, "val")
    if max_documents:
        return _first_documents(directory, paths, seq_len, max_documents, bos)
    available = sum(len(read_shard(path)) for path in paths)
    scored = min(available - 1, max_tokens or available) // seq_len * seq_len
    if scored < 1:
        raise DataError(
            f"{directory}: {available} validation tokens, at most {max_tokens or 'all'} of them, "
            f"hold no window of {seq_len} and one more; shorten eval_seq_len or train_seq_len"
        )
    return torch.from_numpy(TokenStream(paths).take(scored + 1).astype(np.int64))


def _first_documents(directory: str | Path, paths: list[Path], seq_len: int, count: int, bos: int) -> Tensor:
    parts, left = [], count + 1  # the BOS after the last of them ends it
    for path in paths:
        tokens = read_shard(path)
        starts = np.flatnonzero(tokens == bos)
        if len(starts) >= left:
            parts.append(tokens[: starts[left - 1]])
            left = 0
            break
        parts.append(tokens)
        left -= len(starts)
    if left > 1:
        raise DataError(f"val_max_documents={count}: {directory} has {count + 1 - left} validation documents")
    tokens = np.concatenate(parts)
    if len(tokens) <= seq_len:
        raise DataError(
            f"val_max_documents={count}: these documents of {directory} have {len(tokens)} tokens, which hold no "
            f"window of {seq_len} and one more; score more documents, or shorten eval_seq_len or train_seq_len"
        )
    return torch.from_numpy(tokens.astype(np.int64))


# A folder


@dataclass(frozen=True)
class Dataset:
    """A checked folder of shards with its tokenizer."""

    directory: Path
    tokenizer_path: Path
    tokenizer: Tokenizer
    train_shards: list[Path]
    val_shards: list[Path]
    byte_table: ByteTable
    description: dict  # tokenizer_sha256; train, val: name, tokens, sha256 a shard; train_tokens, val_tokens
    about: dict  # dataset.json, of whoever made the folder; {} where there is none

    @classmethod
    def open(cls, directory: str | Path, tokenizer_path: str | Path = "", *, vocab_size: int = 0) -> Dataset:
        """Check all of a folder; '' as tokenizer is the one in it, 0 as vocab_size any. Raises DataError."""
        dataset = cls._read(ROOT / directory, tokenizer_path, vocab_size)
        listed = {s["name"]: s for split in SPLITS for s in dataset.about.get(split, {}).get("shards", [])}
        there = {s["name"]: s for split in SPLITS for s in dataset.description[split]}
        names = sorted(name for name in listed | there if listed.get(name) != there.get(name)) if listed else []
        if dataset.about.get("tokenizer_sha256", found := dataset.description["tokenizer_sha256"]) != found:
            names.append(dataset.tokenizer_path.name)
        if names:
            raise DataError(
                f"{dataset.directory}: {', '.join(names)} not as dataset.json lists; the same `pgolf data` command "
                "makes the folder whole again"
            )
        return dataset

    @classmethod
    def _read(cls, directory: Path, tokenizer_path: str | Path = "", vocab_size: int = 0) -> Dataset:
        """What is there, whatever dataset.json says of it."""
        shards = {split: shard_paths(directory, split) for split in SPLITS}
        own = next((directory / name for name in tokenizer.NAMES if (directory / name).exists()), None)
        tokenizer_path = ROOT / tokenizer_path if tokenizer_path else own or directory / tokenizer.NAMES[0]
        loaded = tokenizer.load(tokenizer_path)
        if own and own.read_bytes() != tokenizer_path.read_bytes():
            raise DataError(
                f"tokenizer_path: {tokenizer_path} is not the tokenizer of the shards in {directory}, which lies "
                "beside them; leave tokenizer_path empty"
            )
        if vocab_size and loaded.vocab_size != vocab_size:
            raise DataError(
                f"vocab_size={vocab_size}, but the tokenizer {tokenizer_path} has {loaded.vocab_size} pieces; "
                f"set vocab_size={loaded.vocab_size} or name another tokenizer_path"
            )
        facts = _shard_facts(directory, shards["train"] + shards["val"])
        for name, fact in facts.items():
            if fact["max_token"] >= loaded.vocab_size:
                raise DataError(
                    f"{directory / name}: holds token {fact['max_token']}, and the tokenizer's last is "
                    f"{loaded.vocab_size - 1} (vocab_size={loaded.vocab_size}); shards and tokenizer do not belong "
                    "together"
                )
        description = {"tokenizer_sha256": checksum(tokenizer_path)}
        for split, paths in shards.items():
            listed = [{"name": path.name} | facts[path.name] for path in paths]
            description[split] = [{key: shard[key] for key in ("name", "tokens", "sha256")} for shard in listed]
            description[f"{split}_tokens"] = sum(shard["tokens"] for shard in listed)
        about = read_about(directory)
        byte_table = ByteTable.of(loaded)
        return cls(directory, tokenizer_path, loaded, shards["train"], shards["val"], byte_table, description, about)

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of the tokenizer and of every shard in order; names and places do not matter."""
        hashes = {split: [shard["sha256"] for shard in self.description[split]] for split in SPLITS}
        content = json.dumps([self.description["tokenizer_sha256"], hashes["val"], hashes["train"]])
        return hashlib.sha256(content.encode()).hexdigest()

    def validation(self, seq_len: int, max_tokens: int = 0, max_documents: int = 0) -> Tensor:
        """validation_tokens of this folder."""
        return validation_tokens(self.directory, seq_len, max_tokens, max_documents, self.tokenizer.bos)

    def text_sha256(self, tokens: Tensor) -> str:
        """Of the text that tokens (n,) spell, document by document: two tokenizers of one text have the same."""
        digest = hashlib.sha256()
        rows = np.split(tokens.numpy(), np.flatnonzero(tokens.numpy() == self.tokenizer.bos))
        for i in range(0, len(rows), 1000):  # bounded memory: a million tokens as Python integers are 30 MB
            for text in self.tokenizer.decode([row.tolist() for row in rows[i : i + 1000] if len(row)]):
                content = text.encode()
                digest.update(len(content).to_bytes(8, "little") + content)
        return digest.hexdigest()

    def scored_text(self, seq_len: int, max_tokens: int = 0, max_documents: int = 0) -> str:
        """text_sha256 of what `validation` gives, remembered beside the shards: 455,010 tokens take 0.1 s to decode."""
        path = self.directory / ".texts.json"
        shards = [self.description["tokenizer_sha256"], *(shard["sha256"] for shard in self.description["val"])]
        key = hashlib.sha256(json.dumps([shards, seq_len, max_tokens, max_documents]).encode()).hexdigest()
        cache = _read_cache(path)
        if key not in cache:
            cache[key] = self.text_sha256(self.validation(seq_len, max_tokens, max_documents))
            with contextlib.suppress(OSError):
                atomic_write(path, json.dumps(cache, indent=1))
        return cache[key]


def describe(directory: str | Path, **about: object) -> Dataset:
    """Write dataset.json into a complete folder: `about`, what is in it now, and its fingerprint.

    A split's own figures go in as train={…} and val={…}, and its shards are added to them.
    """
    directory = Path(directory)
    for torn in directory.glob(f".{DESCRIPTION}.*.tmp"):  # of a process that was killed as it wrote
        torn.unlink()
    dataset = Dataset._read(directory)
    for split in SPLITS:
        shards = dataset.description[split]
        about[split] = about.get(split, {}) | {"tokens": dataset.description[f"{split}_tokens"], "shards": shards}
    about |= {"vocab_size": dataset.tokenizer.vocab_size, "tokenizer_sha256": dataset.description["tokenizer_sha256"]}
    about |= {"fingerprint": dataset.fingerprint}
    atomic_write(directory / DESCRIPTION, json.dumps(about, indent=1))
    return Dataset.open(directory)


def read_about(directory: Path) -> dict:
    """dataset.json, {} where there is none; DataError where it is damaged."""
    path = directory / DESCRIPTION
    if not path.exists():
        return {}
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        about = None
    if not isinstance(about, dict):
        raise DataError(f"{path}: damaged; build or download the folder again")
    return about


def _shard_facts(directory: Path, paths: list[Path]) -> dict[str, dict]:
    """Name -> size, mtime_ns, tokens, max_token, sha256. Headers are read each time, whole files once."""
    cache_path = directory / ".shards.json"
    cache, facts = _read_cache(cache_path), {}
    for path in paths:
        tokens = read_shard(path)
        stat = path.stat()
        key = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        known = cache.get(path.name, {})
        if key.items() <= known.items():
            facts[path.name] = known
            continue
        facts[path.name] = key | {"tokens": len(tokens), "max_token": int(tokens.max()), "sha256": checksum(path)}
    if facts != cache:
        with contextlib.suppress(OSError):  # a folder that we may not write to works too, only slower
            atomic_write(cache_path, json.dumps(facts, indent=1))
    return facts


def _read_cache(path: Path) -> dict:
    """{} where there is none that can be read: then what it holds is made again."""
    try:
        cache = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return cache if isinstance(cache, dict) else {}
