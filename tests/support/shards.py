"""Shards of given tokens."""

from pathlib import Path

import numpy as np

from pgolf_core.shards import header


def write_shard(path: Path, tokens) -> Path:
    """Write tokens (n,), each 0..65535; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header(len(tokens)) + np.asarray(tokens, "<u2").tobytes())
    return path
