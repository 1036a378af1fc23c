"""The disk that data is made on: room for it, one process at a time, and what goes wrong there in words."""

import errno
import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from pgolf_core.files import DataError


def check_space(directory: str | Path, needed: int, what: str, option: str = "--out") -> None:
    """DataError where the disk that holds a folder, which an option names, has fewer bytes free than are needed."""
    there = Path(directory)
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < needed:
        raise DataError(
            f"{directory}: {what} needs {needed:,} bytes and this disk has {free:,} free; make room, or name another "
            f"folder with {option}"
        )


@contextmanager
def alone(path: str | Path) -> Iterator[None]:
    """One process at a time for a file or folder; whoever waits says so. <path>.lock stays."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{path}.lock", is_singleton=True)  # so that whoever holds it may take it again
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"{path}: another process is making it; waiting …", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def explained(directory: str | Path) -> Iterator[None]:
    """A disk that runs full inside the block, or may not be written, is a DataError that says so."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise DataError(f"{error.filename or directory}: cannot be written ({error.strerror})") from error
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataError(
            f"{directory}: the disk is full; make room and run the same command again, which goes on from here"
        ) from error


def checksum(path: Path) -> str:
    """sha256 of a file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
