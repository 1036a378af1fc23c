"""Shards: files of tokens.

`fineweb_{train,val}_NNNNNN.bin` is 256 little-endian int32 of header (magic, version, token count, zeros), then
uint16 tokens. Every document starts with BOS and may continue in the next shard. A byte sidecar,
`fineweb_val_bytes_NNNNNN.bin`, holds the bytes of original text per token instead, for tokens that spell altered text.
"""

from pathlib import Path

import numpy as np

from pgolf_core.files import DataError

SHARD_MAGIC, SHARD_VERSION = 20240520, 1
HEADER_BYTES = 256 * 4
SHARD_TOKENS = 100_000_000  # tokens per published shard, except the last of a split


def header(tokens: int) -> bytes:
    """The first HEADER_BYTES of a shard with this number of tokens."""
    numbers = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    numbers[:3] = SHARD_MAGIC, SHARD_VERSION, tokens
    return numbers.tobytes()


def read_shard(path: str | Path) -> np.memmap:
    """Tokens of a shard, (n,) uint16, memory-mapped. Raises DataError on anything but a complete shard."""
    size = Path(path).stat().st_size if Path(path).is_file() else 0
    if size < HEADER_BYTES:
        raise DataError(f"{path}: {size} bytes are no shard; its header alone has {HEADER_BYTES}")
    magic, version, count = (int(v) for v in np.fromfile(path, dtype="<i4", count=3))
    if magic != SHARD_MAGIC:
        raise DataError(f"{path}: begins with {magic}; a shard begins with the magic number {SHARD_MAGIC}")
    if version != SHARD_VERSION:
        raise DataError(f"{path}: shard version {version}; only version {SHARD_VERSION} can be read")
    if size != HEADER_BYTES + 2 * count:
        raise DataError(
            f"{path}: the header promises {count} tokens, that is {HEADER_BYTES + 2 * count} bytes, "
            f"and the file has {size}; download or build it again"
        )
    if count == 0:
        raise DataError(f"{path}: holds no tokens")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,))


def shard_paths(directory: str | Path, split: str) -> list[Path]:
    """Shards of split 'train' or 'val' in reading order. Raises DataError if there are none."""
    if not Path(directory).is_dir():
        raise DataError(f"data_path: no folder {directory}; `pgolf data embedded` builds one")
    paths = [path for path in sorted(Path(directory).glob(f"fineweb_{split}_*.bin")) if "_bytes_" not in path.name]
    if not paths:
        raise DataError(f"data_path: no fineweb_{split}_*.bin in {directory}; `pgolf data embedded` makes some")
    return paths


def sidecar_paths(directory: str | Path) -> list[Path]:
    """Byte sidecar of split 'val' in reading order; [] without one."""
    return sorted(Path(directory).glob("fineweb_val_bytes_*.bin"))
