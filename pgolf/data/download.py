"""Files of the hub, each at one commit: checked, and gone on with where a killed process left them.

The hub's ETag is a file's checksum: sha256 of a large one, git's own of a small one. What is left of a file goes on
with a Range request; the hub library's hf_hub_download begins it anew.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HTTPError,  # of the library's HTTP client, whichever that is: cut, refused and slow connections
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff
from tqdm import tqdm

from pgolf.processes import interactive
from pgolf_core.files import DataError

REPO = "willdepueoai/parameter-golf"
TRIES = 5  # connections in a row that bring nothing
PAUSE = 1.0  # seconds before the next of them


@dataclass(frozen=True)
class Remote:
    """A file at a commit, as the hub tells of it."""

    url: str
    commit: str
    size: int
    checksums: tuple[str, ...]  # hex; the ETag first: 64 digits are sha256, 40 are git's of a blob

    def partial(self, path: Path) -> Path:
        """Where a part of it is kept until it is whole."""
        return path.with_name(f".{path.name}.{self.checksums[0][:16]}.partial")

    def left(self, path: Path) -> int:
        """Bytes that are still to come."""
        partial = self.partial(path)
        have = partial.stat().st_size if partial.exists() else 0
        return self.size - (have if have <= self.size else 0)


def checked_endpoint(endpoint: str | None) -> str:
    """The endpoint without its last slash; None is the hub library's, which HF_ENDPOINT sets."""
    endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
    try:
        parts = urlsplit(endpoint)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise DataError(f"--endpoint {endpoint}: is no address of a server; one begins with https://")
    return endpoint


def head(path: str, revision: str, endpoint: str, retry: bool = True) -> Remote:
    """What the hub tells of a file; retry: not of the first, so that a hub out of reach is known at once."""
    url = hf_hub_url(REPO, path, repo_type="dataset", revision=revision, endpoint=endpoint)
    try:
        told = get_hf_file_metadata(url, headers=_headers(), endpoint=endpoint, retry_on_errors=retry)
    except (HTTPError, OSError) as error:
        raise _explanation(error, url, revision) from error
    if not told.commit_hash or told.size is None or not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", told.etag or ""):
        raise DataError(f"{url}: the answer tells no commit, size or checksum; --endpoint is to name a hub")
    return Remote(url, told.commit_hash, told.size, (told.etag,))


def chunks(remote: Remote, have: int, end: int) -> Iterator[bytes]:
    """Bytes have..end of a file as they arrive, whatever cuts the connection; DataError where no more come."""
    tries = 0
    while have < end:
        asked = _headers() | {"Range": f"bytes={have}-{end - 1}"}
        try:
            with http_stream_backoff(
                "GET", remote.url, headers=asked, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT, retry_on_exceptions=()
            ) as response:
                hf_raise_for_status(response)
                at = have if response.status_code == 206 else 0  # a server without ranges sends all
                for chunk in response.iter_bytes():
                    fresh = chunk[max(0, have - at) : end - at]
                    at += len(chunk)
                    have += len(fresh)
                    if fresh:
                        tries = 0
                        yield fresh
                    if have == end:
                        return
            error = EOFError("the answer ended early")
        except HfHubHTTPError as error:
            raise _explanation(error, remote.url, remote.commit) from error
        except (HTTPError, OSError) as cut:
            error = cut
        tries += 1
        if tries > TRIES:
            raise _explanation(error, remote.url, remote.commit) from error
        time.sleep(PAUSE)


def fetch(remote: Remote, path: Path, bar: tqdm) -> None:
    """Download a file, going on with a part that is here already; it has its name once it has its checksum."""
    partial = remote.partial(path)
    say(bar, f"{path.name}: {remote.size:,} bytes")
    for _ in range(2):
        have = remote.size - remote.left(path)
        with open(partial, "ab" if have else "wb") as f:
            for chunk in chunks(remote, have, remote.size):
                f.write(chunk)
                bar.update(len(chunk))
            f.flush()
            os.fsync(f.fileno())
        if holds(partial, *remote.checksums):
            os.replace(partial, path)
            return
        partial.unlink()
        bar.total += remote.size
    raise _damaged(remote)


def read_json(remote: Remote) -> dict:
    """A small file of JSON."""
    for _ in range(2):
        content = b"".join(chunks(remote, 0, remote.size))
        if all(_digest(io.BytesIO(content), len(content), checksum) == checksum for checksum in remote.checksums):
            return mapping(content, remote.url)
    raise _damaged(remote)


def _damaged(remote: Remote) -> DataError:
    return DataError(
        f"{remote.url}: came twice with another checksum than {remote.checksums[0]}, which the hub tells; try again "
        "later, or name another --endpoint"
    )


def _headers() -> dict[str, str]:
    return build_hf_headers(library_name="pgolf") | {"Accept-Encoding": "identity"}  # ranges are of the bytes as stored


def _explanation(error: Exception, url: str, revision: str) -> DataError:
    if isinstance(error, RevisionNotFoundError):
        return DataError(f"--revision {revision}: {REPO} has no such branch, tag or commit")
    if isinstance(error, EntryNotFoundError):
        return DataError(f"{url}: there is no such file; name another --revision")
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    if isinstance(error, RepositoryNotFoundError) or status in (401, 403):
        return DataError(f"{url}: {REPO} is not there, or not for you; `hf auth login`, or name another --endpoint")
    reason = f"the answer is status {status}" if status else str(error).partition("\n")[0] or type(error).__name__
    return DataError(
        f"{url}: cannot be fetched ({reason}); look to the connection and --endpoint, then run the same command again, "
        "which goes on from here"
    )


def with_checksum(remote: Remote, sha256: str | None) -> Remote:
    """With a checksum that the publisher tells, too."""
    if not sha256 or sha256 == remote.checksums[0]:
        return remote
    if len(remote.checksums[0]) == 64:
        raise stale(remote, "sha256", sha256, remote.checksums[0])
    return replace(remote, checksums=(*remote.checksums, sha256))


def stale(file: Remote, what: str, told: object, there: object) -> DataError:
    return DataError(
        f"{file.url}: does not belong to the files that it tells of: it says {what} {told}, and there it is {there}; "
        "name another --revision, or wait until the publisher mends it"
    )


def _digest(f: BinaryIO, size: int, like: str) -> str:
    """sha256 of a file, or git's checksum of it where `like` is one."""
    kind = hashlib.sha256 if len(like) == 64 else lambda: hashlib.sha1(f"blob {size}\0".encode())
    return hashlib.file_digest(f, kind).hexdigest()


def holds(path: Path, *checksums: str) -> bool:
    """Whether a file is there and has all these checksums."""
    if not path.is_file():
        return False
    for checksum in checksums:
        with open(path, "rb") as f:
            if _digest(f, path.stat().st_size, checksum) != checksum:
                return False
    return True


def mapping(content: bytes, name: object) -> dict:
    try:
        told = json.loads(content)
    except ValueError:
        told = None
    if not isinstance(told, dict):
        raise DataError(f"{name}: damaged, it holds no JSON object; delete it, or name another --revision")
    return told


def progress(total: int, name: str) -> tqdm:
    """Of all bytes to come; whoever has no terminal gets a line a file instead."""
    return tqdm(total=total, desc=name, unit="B", unit_scale=True, disable=not interactive())


def say(bar: tqdm, line: str) -> None:
    if bar.disable:
        print(line, flush=True)
