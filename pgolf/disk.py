"""Files and disks: free space, locks across processes, disk errors in plain words, checksums, JSON objects."""

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from pgolf_core.files import DataError

MAX_JSON_BYTES = 32 * 2**20


def check_space(directory: str | Path, needed: int, what: str, option: str = "--out") -> None:
    """Raise DataError if the disk of a folder, which the user names with an option, has less than `needed` bytes."""
    parent = Path(directory)
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise DataError(
            f"{directory}: {what} needs {needed:,} bytes and this disk has {free:,} free; make room, or name another "
            f"folder with {option}"
        )


@contextmanager
def exclusive(path: str | Path) -> Iterator[None]:
    """Hold <path>.lock inside the block; a process that has to wait for it says so. The lock file stays."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{path}.lock", is_singleton=True)  # reentrant within a process
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
def removed_on_error(folder: Path) -> Iterator[None]:
    """Remove a folder that the block made if it ends in an error: nothing in it could be gone on with."""
    made = not folder.exists()
    try:
        yield
    except Exception:
        if made:
            shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def explain_disk_errors(directory: str | Path) -> Iterator[None]:
    """Turn a full or write-protected disk inside the block into a DataError that names the folder."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise DataError(f"{error.filename or directory}: cannot be written ({error.strerror})") from error
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataError(
            f"{directory}: the disk is full; make room and run the same command again, which resumes"
        ) from error


@contextmanager
def open_regular(path: str | Path, most: int | None = None) -> Iterator[BinaryIO]:
    """The file, open for reading inside the block.

    OSError if it is no regular file (a pipe blocks, a device never ends) or larger than `most` bytes.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        if most is not None and facts.st_size > most:
            raise OSError(errno.EFBIG, f"larger than {most:,} bytes", str(path))
        yield file


def checksum(path: Path, most: int | None = None) -> str:
    """sha256 of a file, hex. OSError if it is no regular file, or larger than `most` bytes."""
    with open_regular(path, most) as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def read_json(path: Path) -> dict | None:
    """The JSON object in a file; None if the file is missing, damaged, too large or holds another JSON value."""
    try:
        with open_regular(path, MAX_JSON_BYTES) as f:
            return parse_object(f.read().decode())
    except (OSError, UnicodeDecodeError):
        return None


def parse_object(text: str | bytes) -> dict | None:
    """The JSON object in a text; None if it is damaged, holds an integer beyond 64 bits, or is another JSON value."""
    try:
        content = _JSON.decode(text if isinstance(text, str) else text.decode())
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _integer(text: str) -> int:
    if len(text) > 20 or abs(number := int(text)) >= 2**63:
        raise ValueError(f"{text[:20]} … is no 64-bit integer")
    return number


_JSON = json.JSONDecoder(parse_int=_integer)
