"""Atomic writes: a temporary file in the same folder, then a rename, so that no reader sees a part of a file."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class DataError(ValueError):
    """Data that cannot be used; the message names the file or knob and what would be right."""


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; it replaces path when the block ends without an error.

    An OSError, of a full disk say, names path.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        with open(temporary, "rb+") as f:  # data before the name: a power cut leaves no torn file
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(path: str | Path, content: bytes | memoryview | str) -> Path:
    """Write content (text as UTF-8, newlines unchanged) atomically; returns the path."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    return Path(path)
