"""The published repository on the Hugging Face hub at one commit; its files are verified against their checksums."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import (
    HTTPError,  # includes the HTTP client's errors: cut, refused and slow connections
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers

from pgolf_core.files import DataError

REPO = "willdepueoai/parameter-golf"
ENDPOINT = re.compile(r"https?://([\w.-]+|\[[\da-f:.]+\])(:\d+)?(/\S*)?")


@dataclass(frozen=True)
class Snapshot:
    """The repository at one commit of a hub."""

    endpoint: str
    commit: str

    @classmethod
    def resolve(cls, revision: str, endpoint: str | None) -> Snapshot:
        """The present commit of a branch, tag or commit; endpoint None: HF_ENDPOINT. Fails at once if unreachable."""
        endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        if not ENDPOINT.fullmatch(endpoint):
            raise DataError(f"--endpoint {endpoint}: not the address of a server; one begins with https://")
        with _explained(f"{endpoint}/datasets/{REPO}", revision):
            return cls(endpoint, HfApi(endpoint, library_name="pgolf").dataset_info(REPO, revision=revision).sha)

    def url(self, path: str) -> str:
        return hf_hub_url(REPO, path, repo_type="dataset", revision=self.commit, endpoint=self.endpoint)

    def files(self, *paths: str) -> list[RemoteFile]:
        """Sizes and checksums of files. DataError naming a file that does not exist."""
        api = HfApi(self.endpoint, library_name="pgolf")
        with _explained(self.url(paths[0]), self.commit):
            infos = api.get_paths_info(REPO, list(paths), revision=self.commit, repo_type="dataset")
        known = {info.path: (info.size, info.lfs.sha256 if info.lfs else info.blob_id) for info in infos}
        if missing := [path for path in paths if path not in known]:
            raise DataError(f"{self.url(missing[0])}: there is no such file; name another --revision")
        return [RemoteFile(self, path, *known[path]) for path in paths]


@dataclass(frozen=True)
class RemoteFile:
    """A file of a snapshot: size in bytes, checksum in hex (64 digits: sha256 of a large file, 40: git's blob hash)."""

    snapshot: Snapshot
    path: str
    size: int
    checksum: str

    @property
    def url(self) -> str:
        return self.snapshot.url(self.path)

    def partial(self, path: Path) -> Path:
        """Where the first bytes of this file wait until they may be called `path`; another content has another name."""
        return path.with_name(f".{path.name}.{self.checksum[:16]}.partial")

    def fetch(self, partial: Path, end: int) -> None:
        """Continue a file that holds the first bytes of this one, or none, up to byte `end`, with Range requests.

        The hub library's own download begins anew in another process.
        """
        headers = build_hf_headers(library_name="pgolf") | {"Range": f"bytes=0-{end - 1}"}
        headers["Accept-Encoding"] = "identity"  # ranges count stored bytes
        with _explained(self.url, self.snapshot.commit), open(partial, "ab") as f:
            if f.tell() < end:
                http_get(self.url, f, resume_size=f.tell(), headers=headers, expected_size=end)
                os.fsync(f.fileno())

    def download(self, path: Path) -> None:
        """Fetch the file; `path` exists once it is verified. A corrupt copy is fetched once more."""
        partial = self.partial(path)
        for _ in range(2):
            self.fetch(partial, self.size)
            if matches(partial, self.checksum):
                os.replace(partial, path)
                return
            partial.unlink()
        raise DataError(
            f"{self.url}: arrived twice with another checksum than the hub's {self.checksum}; try again later, or "
            "name another --endpoint"
        )

    @contextmanager
    def read_json(self) -> Iterator[dict]:
        """Yield the content; a missing or malformed field inside the block becomes a DataError."""
        with TemporaryDirectory() as folder:
            self.download(path := Path(folder) / "content.json")
            content = path.read_bytes()
        try:
            yield json.loads(content)
        except DataError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise DataError(f"{self.url}: is not as expected ({error!r}); name another --revision") from error


def matches(path: Path, checksum: str) -> bool:
    """True if the file exists and has this checksum, as in RemoteFile."""
    if not path.is_file():
        return False
    blob = f"blob {path.stat().st_size}\0".encode()
    with open(path, "rb") as f:
        digest = hashlib.file_digest(f, hashlib.sha256 if len(checksum) == 64 else lambda: hashlib.sha1(blob))
    return digest.hexdigest() == checksum


@contextmanager
def _explained(url: str, revision: str) -> Iterator[None]:
    """Turn errors of hub, connection and hub library inside the block into one DataError; disk errors pass."""
    try:
        yield
    except RevisionNotFoundError as error:
        raise DataError(f"--revision {revision}: {REPO} has no such branch, tag or commit") from error
    except (HTTPError, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        status = getattr(getattr(error, "response", None), "status_code", 0)
        if isinstance(error, RepositoryNotFoundError) or status in (401, 403):
            why = f"{REPO} does not exist or needs a login; `hf auth login`, or name another --endpoint"
        else:
            reason = f"the answer is status {status}" if status else str(error).partition("\n")[0]
            action = "check the connection and --endpoint, then run the same command again, which resumes"
            why = f"cannot be fetched ({reason or type(error).__name__}); {action}"
        raise DataError(f"{url}: {why}") from error
