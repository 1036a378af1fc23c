"""A folder of shards with its tokenizer: checked when opened, its fingerprint, and its scored validation text."""

from __future__ import annotations

import contextlib
import filecmp
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, Field, Strict, StringConstraints, ValidationError
from torch import Tensor

from pgolf.data import tokenizers
from pgolf.data.tokenizers import Tokenizer
from pgolf.disk import checksum, read_json
from pgolf_core.batches import validation_tokens
from pgolf_core.config import ROOT
from pgolf_core.files import DataError, atomic_write
from pgolf_core.shards import read_shard, shard_paths, sidecar_paths
from pgolf_core.tokens import ByteTable

DESCRIPTION = "dataset.json"
Count = Annotated[int, Strict(), Field(ge=0, lt=2**63)]
Text = Annotated[str, StringConstraints(strict=True, max_length=10_000)]
SPLITS = ("train", "val")
SIDECAR = "val_bytes"  # key of the byte sidecar beside those of the splits
LISTED = ("name", "tokens", "sha256")  # facts of a shard in dataset.json


class _Shard(BaseModel):
    name: Annotated[str, StringConstraints(strict=True, pattern=r"^[\w.-]{1,200}$")]  # in the folder
    tokens: Count
    sha256: Text


class _Split(BaseModel):
    shards: list[_Shard] = []
    tokens: Count = 0
    documents: Count = 0
    text_bytes: Count = 0
    documents_sha256: Text = ""


class _Source(BaseModel):
    """The documents, or the published shards, that a folder was made of."""

    kind: Text = ""
    variant: Text = ""
    commit: Text = ""
    manifest: dict = {}
    field: Text = ""
    split: Text = ""
    documents_taken: Count = 0
    val_documents: Count = 0
    val_share: float = 0
    tokenizer: dict = {}
    transform: Text = ""


class _About(BaseModel):
    """dataset.json as far as it is read; other keys may stand beside these."""

    train: _Split = _Split()
    val: _Split = _Split()
    val_bytes: _Split = _Split()
    source: _Source = _Source()
    tokenizer_sha256: Text = ""
    vocab_size: Count = 0
    fingerprint: Text = ""


@dataclass(frozen=True)
class Dataset:
    """A checked folder of shards with its tokenizer."""

    directory: Path
    tokenizer_path: Path
    tokenizer: Tokenizer
    train_shards: list[Path]
    val_shards: list[Path]
    byte_table: ByteTable
    description: dict  # measured: tokenizer_sha256; train, val: [{name, tokens, sha256}]; train_tokens, val_tokens
    about: dict  # content of dataset.json; {} without one

    @classmethod
    def open(cls, directory: str | Path, tokenizer_path: str | Path = "", *, vocab_size: int = 0) -> Dataset:
        """Open and check a folder. tokenizer_path "": the tokenizer beside the shards. vocab_size 0: any.

        Raises DataError with a line per damaged shard, wrong tokenizer or difference from dataset.json.
        """
        directory = ROOT / directory
        return cls._read(directory, read_about(directory), tokenizer_path, vocab_size)

    @classmethod
    def _read(cls, directory: Path, about: dict, tokenizer_path: str | Path = "", vocab_size: int = 0) -> Dataset:
        """The folder's content, compared with what `about` lists."""
        shards = {split: shard_paths(directory, split) for split in SPLITS}
        own = tokenizers.beside(directory)
        tokenizer_path = ROOT / tokenizer_path if tokenizer_path else own or directory / tokenizers.NAMES[0]
        tokenizer = tokenizers.load(tokenizer_path)
        if own and not filecmp.cmp(own, tokenizer_path, shallow=False):
            raise DataError(
                f"tokenizer_path: {tokenizer_path} is not the tokenizer of the shards in {directory}, which lies "
                "beside them; leave tokenizer_path empty"
            )
        if vocab_size and tokenizer.vocab_size != vocab_size:
            raise DataError(
                f"vocab_size={vocab_size}, but the tokenizer {tokenizer_path} has vocab_size={tokenizer.vocab_size}; "
                f"set vocab_size={tokenizer.vocab_size} or name another tokenizer_path"
            )
        if sidecar := sidecar_paths(directory):
            shards[SIDECAR] = sidecar
        facts, problems = _shard_facts(directory, [path for paths in shards.values() for path in paths])
        for path in shards["train"] + shards["val"]:
            if (last := facts.get(path.name, {}).get("max_token", 0)) >= tokenizer.vocab_size:
                problems[path.name] = (
                    f"{path}: holds token {last}, and the tokenizer's last is {tokenizer.vocab_size - 1} "
                    f"(vocab_size={tokenizer.vocab_size}); shards and tokenizer do not belong together"
                )
        listed = listed_shards(about)
        # A sidecar may come later to a folder of published shards, which lists none.
        named = listed | {name: fact for name, fact in facts.items() if SIDECAR in about or SIDECAR not in name}
        for name in named if listed else ():
            fact = facts.get(name, {})
            if name not in problems and any(fact.get(key) != listed.get(name, {}).get(key) for key in LISTED):
                problems[name] = _not_as_listed(directory / name)
        sha256 = checksum(tokenizer_path)
        if about.get("tokenizer_sha256", sha256) != sha256:
            problems["tokenizer"] = _not_as_listed(tokenizer_path)
        if problems:
            raise DataError("\n".join(problems.values()))
        description = {"tokenizer_sha256": sha256}
        for split, paths in shards.items():
            description[split] = [{key: facts[path.name][key] for key in LISTED} for path in paths]
            description[f"{split}_tokens"] = sum(shard["tokens"] for shard in description[split])
        table = ByteTable.of(tokenizer.pieces)
        if sidecar:
            if description[f"{SIDECAR}_tokens"] != description["val_tokens"]:
                raise DataError(
                    f"{sidecar[0]}: the byte sidecar states the bytes of {description[f'{SIDECAR}_tokens']:,} tokens, "
                    f"and the validation split has {description['val_tokens']:,}; get the one of these shards"
                )
            table = table.with_sidecar(directory)
        return cls(directory, tokenizer_path, tokenizer, shards["train"], shards["val"], table, description, about)

    @property
    def shards(self) -> dict[str, dict]:
        """Name -> name, tokens, sha256 of every shard, as measured."""
        return {shard["name"]: shard for key in (*SPLITS, SIDECAR) for shard in self.description.get(key, [])}

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the tokenizer and of every shard in order, hex; independent of names and places."""
        keys = [key for key in ("val", "train", SIDECAR) if key in self.description]
        hashes = [[shard["sha256"] for shard in self.description[key]] for key in keys]
        content = json.dumps([self.description["tokenizer_sha256"], *hashes])
        return hashlib.sha256(content.encode()).hexdigest()

    def validation(self, seq_len: int, max_tokens: int = 0, max_documents: int = 0) -> Tensor:
        """validation_tokens of this folder."""
        return validation_tokens(self.directory, seq_len, max_tokens, max_documents, self.tokenizer.bos)

    def text_sha256(self, tokens: Tensor) -> str:
        """sha256 of the decoded documents of tokens (n,), hex; the same for every tokenizer of one text."""
        digest = hashlib.sha256()
        rows = np.split(tokens.numpy(), np.flatnonzero(tokens.numpy() == self.tokenizer.bos))
        for i in range(0, len(rows), 1000):  # bounds memory: 1,000,000 tokens are 30 MB of Python integers
            for text in self.tokenizer.decode([row.tolist() for row in rows[i : i + 1000] if len(row)]):
                content = text.encode()
                digest.update(len(content).to_bytes(8, "little") + content)
        return digest.hexdigest()

    def scored_text(self, seq_len: int, max_tokens: int = 0, max_documents: int = 0) -> str:
        """text_sha256 of `validation`, cached beside the shards: decoding 455,010 tokens takes 0.1 s."""
        path = self.directory / ".texts.json"
        shards = [self.description["tokenizer_sha256"], *(shard["sha256"] for shard in self.description["val"])]
        key = hashlib.sha256(json.dumps([shards, seq_len, max_tokens, max_documents]).encode()).hexdigest()
        here = [_identity(each) for each in (self.tokenizer_path, *self.val_shards)]
        cache = read_json(path) or {}
        if cache.get("files") != here:
            cache = {"files": here}
        if key not in cache:
            cache[key] = self.text_sha256(self.validation(seq_len, max_tokens, max_documents))
            _write_cache(path, cache)
        return cache[key]


def describe(directory: str | Path, **about: object) -> Dataset:
    """Write dataset.json into a complete folder: `about`, the shards as measured, and the fingerprint.

    Figures of a split are passed as train={…} and val={…}; its shards are added to them.
    """
    directory = Path(directory)
    for torn in directory.glob(".*.tmp"):  # left by a killed process
        torn.unlink()
    dataset = Dataset._read(directory, {})
    for split in [key for key in (*SPLITS, SIDECAR) if key in dataset.description]:
        shards = dataset.description[split]
        about[split] = about.get(split, {}) | {"tokens": dataset.description[f"{split}_tokens"], "shards": shards}
    about |= {"vocab_size": dataset.tokenizer.vocab_size, "tokenizer_sha256": dataset.description["tokenizer_sha256"]}
    about |= {"fingerprint": dataset.fingerprint}
    atomic_write(directory / DESCRIPTION, json.dumps(about, indent=1))
    return Dataset.open(directory)


def read_about(directory: Path) -> dict:
    """Content of a folder's dataset.json; {} without one. DataError if it is damaged."""
    path = directory / DESCRIPTION
    if not path.exists():
        return {}
    about = read_json(path)
    if about is None:
        raise DataError(f"{path}: damaged; build or download the folder again")
    try:
        _About.model_validate(about)
    except ValidationError as error:
        wrong = error.errors()[0]
        field = ".".join(map(str, wrong["loc"]))[:100]
        raise DataError(f"{path}, {field}: {wrong['msg']}; build or download the folder again") from None
    return about


def listed_shards(about: dict) -> dict[str, dict]:
    """Name -> name, tokens, sha256 of every shard that a dataset.json lists."""
    return {shard["name"]: shard for key in (*SPLITS, SIDECAR) for shard in about.get(key, {}).get("shards", [])}


def _not_as_listed(path: Path) -> str:
    command = "the same `pgolf data` command makes the folder whole again"
    return f"{path}: {'' if path.exists() else 'missing, '}not as {DESCRIPTION} lists; {command}"


def _shard_facts(directory: Path, paths: list[Path]) -> tuple[dict[str, dict], dict[str, str]]:
    """name -> name, size, mtime_ns, tokens, max_token, sha256 of each shard; name -> what is wrong with a damaged one.

    Files whose identity on this machine is cached are not read again, headers are: a cache that came with a copied
    folder vouches for nothing.
    """
    cache_path = directory / ".shards.json"
    cache, facts, errors = read_json(cache_path) or {}, {}, {}
    for path in paths:
        try:
            tokens = read_shard(path)
        except DataError as error:
            errors[path.name] = str(error)
            continue
        fact, known = _identity(path), cache.get(path.name)
        if not isinstance(known, dict) or not fact.items() <= known.items():
            known = fact | {"tokens": len(tokens), "max_token": int(tokens.max()), "sha256": checksum(path)}
        facts[path.name] = known
    if facts != cache:
        _write_cache(cache_path, facts)
    return {name: {"name": name} | fact for name, fact in facts.items()}, errors


def _identity(path: Path) -> dict[str, int]:
    """A file of this machine: another file there, or another content, has other numbers."""
    stat = path.stat()
    return {key: getattr(stat, f"st_{key}") for key in ("dev", "ino", "size", "mtime_ns", "ctime_ns")}


def _write_cache(path: Path, content: dict) -> None:
    with contextlib.suppress(OSError):  # a read-only folder works without a cache
        atomic_write(path, json.dumps(content, indent=1))
