"""Tokenizers' byte tables, shards, token streams, batches.

A shard is `fineweb_{train,val}_NNNNNN.bin`: 256 little-endian int32 of header (magic, version, token count,
zeros), then uint16 tokens. Every document starts with BOS.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from torch import Tensor

from pgolf_core.config import ROOT, DataConfig
from pgolf_core.files import whole_file, write_whole

MAGIC, VERSION = 20240520, 1
HEADER_BYTES = 256 * 4


class DataError(ValueError):
    """Data that cannot be used; the message names the file or knob and what would be right."""


# Shards


def write_shard(path: str | Path, tokens: np.ndarray | list[int]) -> Path:
    """Write tokens (n,), each 0..65535, in one move."""
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or tokens.size == 0 or tokens.dtype.kind not in "iu":
        raise DataError(f"{path}: a shard is a row of integers, not {tokens.shape} of {tokens.dtype}")
    if tokens.min() < 0 or tokens.max() > 65535:
        raise DataError(f"{path}: tokens {tokens.min()}..{tokens.max()} do not fit uint16 (0..65535)")
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    with whole_file(path) as temporary, open(temporary, "wb") as f:
        f.write(header.tobytes())
        f.write(tokens.astype("<u2").data)
    return Path(path)


def read_shard(path: str | Path) -> np.memmap:
    """Tokens of a shard, (n,) uint16, mapped, not copied. DataError for anything but a whole shard."""
    size = Path(path).stat().st_size
    if size < HEADER_BYTES:
        raise DataError(f"{path}: {size} bytes are no shard; its header alone has {HEADER_BYTES}")
    magic, version, count = (int(v) for v in np.fromfile(path, dtype="<i4", count=3))
    if magic != MAGIC:
        raise DataError(f"{path}: begins with {magic}; a shard begins with the magic number {MAGIC}")
    if version != VERSION:
        raise DataError(f"{path}: shard version {version}; only version {VERSION} can be read")
    if size != HEADER_BYTES + 2 * count:
        raise DataError(
            f"{path}: the header promises {count} tokens, that is {HEADER_BYTES + 2 * count} bytes, "
            f"and the file has {size}; download or build it again"
        )
    if count == 0:
        raise DataError(f"{path}: holds no tokens")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,))


def shard_paths(directory: str | Path, split: str) -> list[Path]:
    """Shards of split 'train' or 'val' in reading order; DataError when there are none."""
    if not Path(directory).is_dir():
        raise DataError(f"data_path: no folder {directory}; `pgolf data embedded` builds one")
    paths = sorted(Path(directory).glob(f"fineweb_{split}_*.bin"))
    if not paths:
        raise DataError(f"data_path: no fineweb_{split}_*.bin in {directory}; `pgolf data embedded` makes some")
    return paths


# Streams and batches


class TokenStream:
    """Tokens of shards in order, from the first again after the last, for ever."""

    def __init__(self, paths: Iterable[str | Path]):
        self.paths = list(paths)
        assert self.paths, "a stream needs a shard"
        self.seek((0, 0))

    @property
    def position(self) -> tuple[int, int]:
        """(shard, offset in tokens): `seek` goes back to it."""
        return self.index, self.offset

    def seek(self, position: tuple[int, int]) -> None:
        self.index, self.offset = position
        self.tokens = read_shard(self.paths[self.index])  # one mapped at a time: macOS allows 256 open files
        assert 0 <= self.offset <= len(self.tokens), f"position {position} of {len(self.tokens)} tokens"

    def take(self, n: int) -> np.ndarray:
        """The next n tokens, (n,) uint16."""
        assert n > 0, n
        parts = []
        while n:
            if self.offset == len(self.tokens):
                self.seek(((self.index + 1) % len(self.paths), 0))
            part = self.tokens[self.offset : self.offset + n]
            parts.append(part)
            self.offset += len(part)
            n -= len(part)
        return np.concatenate(parts)


class Batches:
    """Micro-batches of one process.

    All processes together take world_size * (local + 1) tokens off the stream; rank r owns the r-th span of
    local + 1. Give every rank a stream of its own: each walks over the others' spans.
    """

    def __init__(self, stream: TokenStream, config: DataConfig, rank: int = 0):
        assert 0 <= rank < config.world_size, f"rank {rank} of {config.world_size}"
        self.stream, self.config, self.rank = stream, config, rank
        self.local = config.train_batch_tokens // (config.world_size * config.grad_accum)
        assert self.local and self.local % config.train_seq_len == 0, (self.local, config.train_seq_len)

    def next(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets, both (local / train_seq_len, train_seq_len) int64 on the CPU."""
        spans = self.stream.take(self.config.world_size * (self.local + 1)).reshape(-1, self.local + 1)
        span = torch.from_numpy(spans[self.rank].astype(np.int64))
        return span[:-1].view(-1, self.config.train_seq_len), span[1:].view(-1, self.config.train_seq_len)


def validation_tokens(directory: str | Path, seq_len: int, max_tokens: int = 0) -> Tensor:
    """All val shards as (n,) int64: whole windows of seq_len, at most max_tokens (0 = all), and one more."""
    paths = shard_paths(directory, "val")
    available = sum(len(read_shard(path)) for path in paths)
    scored = min(available - 1, max_tokens or available) // seq_len * seq_len
    if scored < 1:
        raise DataError(
            f"{directory}: {available} validation tokens, at most {max_tokens or 'all'} of them, "
            f"hold no window of {seq_len} and one more; shorten eval_seq_len or train_seq_len"
        )
    return torch.from_numpy(TokenStream(paths).take(scored + 1).astype(np.int64))


# Bytes of tokens


def load_sentencepiece(path: str | Path) -> sentencepiece.SentencePieceProcessor:
    if not Path(path).is_file():
        raise DataError(f"tokenizer_path: no file {path}; name a SentencePiece .model")
    content = Path(path).read_bytes()
    try:
        if content:  # of no bytes SentencePiece makes a model of no pieces
            return sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError:
        pass
    raise DataError(f"tokenizer_path: {path} is no SentencePiece model")


@dataclass(frozen=True)
class ByteTable:
    """UTF-8 bytes that each token stands for; three tensors of (vocab_size,).

    base_bytes: of the decoded piece without its leading space. has_leading_space: one byte more, unless the
    previous token is a boundary. is_boundary: control, unknown and unused pieces, which stand for no text.
    """

    base_bytes: Tensor
    has_leading_space: Tensor
    is_boundary: Tensor

    @classmethod
    def from_sentencepiece(cls, path: str | Path) -> ByteTable:
        sp = load_sentencepiece(path)
        base_bytes, has_leading_space, is_boundary = [], [], []
        for i in range(sp.vocab_size()):
            boundary = sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i)
            text = sp.id_to_piece(i).replace("▁", " ")
            leads = text.startswith(" ") and not boundary
            if boundary:
                length = 0
            elif sp.is_byte(i):  # its piece is a name like <0x0A>
                length = 1
            else:
                length = len(text.encode()) - leads
            base_bytes.append(length)
            has_leading_space.append(leads)
            is_boundary.append(boundary)
        base_bytes = torch.tensor(base_bytes, dtype=torch.int16)
        return cls(base_bytes, torch.tensor(has_leading_space), torch.tensor(is_boundary))

    def to(self, device: torch.device | str) -> ByteTable:
        return ByteTable(self.base_bytes.to(device), self.has_leading_space.to(device), self.is_boundary.to(device))

    def count(self, previous_ids: Tensor, target_ids: Tensor) -> Tensor:
        """Bytes of all targets together, () int64; previous_ids[...] comes right before target_ids[...]."""
        spaces = self.has_leading_space[target_ids] & ~self.is_boundary[previous_ids]
        return (self.base_bytes[target_ids] + spaces).sum(dtype=torch.int64)


# A folder of shards


@dataclass(frozen=True)
class Dataset:
    """A checked folder of shards with its tokenizer."""

    directory: Path
    tokenizer_path: Path
    train_shards: list[Path]
    val_shards: list[Path]
    byte_table: ByteTable
    description: dict  # tokenizer_sha256; train, val: name, tokens, sha256 a shard; train_tokens, val_tokens

    @classmethod
    def open(cls, directory: str | Path, tokenizer_path: str | Path = "", *, vocab_size: int) -> Dataset:
        """Check all of a folder; '' as tokenizer is the tokenizer.model in it. Raises DataError."""
        directory = ROOT / directory
        shards = {split: shard_paths(directory, split) for split in ("train", "val")}
        tokenizer_path = ROOT / tokenizer_path if tokenizer_path else directory / "tokenizer.model"
        byte_table = ByteTable.from_sentencepiece(tokenizer_path)
        own = directory / "tokenizer.model"
        if own.exists() and own.read_bytes() != tokenizer_path.read_bytes():
            raise DataError(
                f"tokenizer_path: {tokenizer_path} is not the tokenizer of the shards in {directory}, which lies "
                "beside them; leave tokenizer_path empty"
            )
        pieces = len(byte_table.base_bytes)
        if pieces != vocab_size:
            raise DataError(
                f"vocab_size={vocab_size}, but the tokenizer {tokenizer_path} has {pieces} pieces; "
                f"set vocab_size={pieces} or name another tokenizer_path"
            )
        facts = _shard_facts(directory, shards["train"] + shards["val"])
        for name, fact in facts.items():
            if fact["max_token"] >= vocab_size:
                raise DataError(
                    f"{directory / name}: holds token {fact['max_token']}, and the tokenizer's last is "
                    f"{vocab_size - 1} (vocab_size={vocab_size}); shards and tokenizer do not belong together"
                )
        description = {"tokenizer_sha256": hashlib.sha256(tokenizer_path.read_bytes()).hexdigest()}
        for split, paths in shards.items():
            listed = [{"name": path.name} | facts[path.name] for path in paths]
            description[split] = [{key: shard[key] for key in ("name", "tokens", "sha256")} for shard in listed]
            description[f"{split}_tokens"] = sum(shard["tokens"] for shard in listed)
        return cls(directory, tokenizer_path, shards["train"], shards["val"], byte_table, description)

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of the tokenizer and of every shard in order; names and places do not matter."""
        hashes = {split: [shard["sha256"] for shard in self.description[split]] for split in ("val", "train")}
        content = json.dumps([self.description["tokenizer_sha256"], hashes["val"], hashes["train"]])
        return hashlib.sha256(content.encode()).hexdigest()


def _shard_facts(directory: Path, paths: list[Path]) -> dict[str, dict]:
    """Name -> size, mtime_ns, tokens, max_token, sha256. Headers are read each time, whole files once."""
    cache_path = directory / ".shards.json"
    try:
        cache = json.loads(cache_path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a cache: without it the shards are read again
        cache = {}
    facts = {}
    for path in paths:
        tokens = read_shard(path)
        stat = path.stat()
        key = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        known = cache.get(path.name, {})
        if key.items() <= known.items():
            facts[path.name] = known
            continue
        with open(path, "rb") as f:
            digest = hashlib.file_digest(f, "sha256").hexdigest()
        facts[path.name] = key | {"tokens": len(tokens), "max_token": int(tokens.max()), "sha256": digest}
    if facts != cache:
        with contextlib.suppress(OSError):  # a folder that we may not write to works too, only slower
            write_whole(cache_path, json.dumps(facts, indent=1))
    return facts
