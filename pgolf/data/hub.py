"""The published FineWeb shards and documents, from the Hugging Face hub, all files of a folder at one commit."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from pgolf.data import tokenizers
from pgolf.data.dataset import DESCRIPTION, SPLITS, Dataset, describe, listed_shards, read_about
from pgolf.data.download import REPO, RemoteFile, Snapshot, matches
from pgolf.disk import check_space, exclusive, explain_disk_errors, read_json
from pgolf_core.config import ROOT
from pgolf_core.files import DataError, atomic_write
from pgolf_core.shards import HEADER_BYTES

MANIFEST = "datasets/manifest.json"
DOCUMENTS, DOCUMENTS_ABOUT = "datasets/docs_selected.jsonl", "datasets/docs_selected.source_manifest.json"
BLOCK = 2**20  # bytes; smallest request for documents


def fineweb(
    variant: str = "sp1024",
    train_shards: int = 1,
    revision: str = "main",
    endpoint: str | None = None,
    directory: str | Path | None = None,
) -> Path:
    """Folder of published shards with their tokenizer: the first train_shards of train, all of val.

    Default folder: data/fineweb10B_<variant>. A complete folder is only checked, without the network. One with fewer
    shards gets more from its own commit; a damaged file is fetched again. Raises DataError.
    """
    if not re.fullmatch(r"\w+", variant):
        raise DataError(f"--variant {variant}: not the name of a variant; one is sp1024")
    if train_shards < 1:
        raise DataError(f"--train-shards {train_shards}: training needs at least one shard")
    directory = ROOT / (directory or f"data/fineweb10B_{variant}")
    with explain_disk_errors(directory), exclusive(directory):
        about, dataset = _about(directory, variant, revision), None
        if about:
            with contextlib.suppress(DataError):  # damaged, or a process was killed while it added shards
                dataset = Dataset.open(directory)
        if dataset is None or dataset.fingerprint != about["fingerprint"] or len(dataset.train_shards) < train_shards:
            snapshot = Snapshot.resolve(about["source"]["commit"] if about else revision, endpoint)
            _complete(directory, about, Manifest.read(snapshot, variant), train_shards, revision)
            dataset = Dataset.open(directory)
    measured, stats = dataset.description, dataset.about["source"]["manifest"]
    print(
        f"{directory}: {measured['train_tokens']:,} training tokens in {len(measured['train'])} of "
        f"{stats['files_train']} shards, {measured['val_tokens']:,} validation tokens in {len(measured['val'])}"
    )
    return directory


def _about(directory: Path, variant: str, revision: str) -> dict:
    """dataset.json of an existing folder; {} for a new one. DataError if it holds something else."""
    about = read_about(directory)
    if not about and directory.exists():
        raise DataError(f"{directory}: exists without {DESCRIPTION}; name another folder with --out or delete it")
    source = about.get("source", {})
    if about and (source.get("kind") != "hub" or source["variant"] != variant):
        content = f"the published {source['variant']}" if source.get("kind") == "hub" else "something else"
        raise DataError(f"{directory}: holds {content}, not the published {variant}; name another folder with --out")
    _check_revision(directory, source, revision, "--out")
    return about


@dataclass(frozen=True)
class Manifest:
    """The published manifest's entry of a variant. Paths are those in the repository."""

    file: RemoteFile
    variant: str
    folder: str
    tokenizer: str
    stats: dict[str, int]

    @classmethod
    def read(cls, snapshot: Snapshot, variant: str) -> Manifest:
        (file,) = snapshot.files(MANIFEST)
        content = file.read_json()
        with _understood(file):
            entries = {entry["name"].removeprefix("fineweb10B_"): entry for entry in content["datasets"]}
            if variant not in entries:
                raise DataError(f"--variant {variant}: is not published; there are {', '.join(sorted(entries))}")
            entry, stats = entries[variant], entries[variant]["stats"]
            stats |= {key: int(stats[key]) for key in (f"{a}_{b}" for a in ("docs", "files", "tokens") for b in SPLITS)}
            paths = {each["name"]: each.get("model_path") or each["path"] for each in content["tokenizers"]}
            tokenizer = f"datasets/{paths[entry['tokenizer_name']]}"
            return cls(file, variant, f"datasets/{entry['path']}", tokenizer, stats)

    def shards(self, split: str) -> list[str]:
        return [f"fineweb_{split}_{i:06d}.bin" for i in range(self.stats[f"files_{split}"])]

    def remotes(self, train: list[str]) -> dict[str, RemoteFile]:
        """Name in the folder -> published file: tokenizer, train shards, all of val; token counts are as stated."""
        names = [*self.shards("val"), *train]
        tokenizer, *shards = self.file.snapshot.files(self.tokenizer, *(f"{self.folder}/{name}" for name in names))
        remotes = dict(zip(names, shards, strict=True))
        for split in SPLITS if train == self.shards("train") else ("val",):  # not stated of fewer train shards
            stated = self.stats[f"tokens_{split}"]
            actual = sum((remotes[name].size - HEADER_BYTES) // 2 for name in self.shards(split))
            if actual != stated:
                raise _stale(self.file, f"tokens_{split}", stated, actual)
        return {tokenizers.NAMES[self.tokenizer.endswith(".json")]: tokenizer} | remotes


def _complete(directory: Path, about: dict, manifest: Manifest, train_shards: int, revision: str) -> None:
    """Fetch missing files into <directory>.unfinished, then move them; about: dataset.json, {} for a new folder."""
    stats = manifest.stats
    if train_shards > stats["files_train"]:
        raise DataError(f"--train-shards {train_shards}: {manifest.variant} has {stats['files_train']} train shards")
    train = manifest.shards("train")
    present = {path.name for path in directory.glob("fineweb_*.bin")}  # some perhaps of a killed process
    if strange := sorted(present - {*train, *manifest.shards("val")}):
        raise DataError(f"{directory / strange[0]}: is none of the published shards; move it away")
    present |= listed_shards(about).keys()
    train = train[: max([train_shards] + [i + 1 for i, name in enumerate(train) if name in present])]
    remotes = manifest.remotes(train).items()
    missing = {name: file for name, file in remotes if not matches(directory / name, file.checksum)}
    unfinished = directory.with_name(f"{directory.name}.unfinished")
    _fetch(missing, unfinished, directory)

    source = {"kind": "hub", "repo": REPO, "variant": manifest.variant, "revision": revision}
    source |= {"commit": manifest.file.snapshot.commit, "manifest": stats}
    facts = {"source": about.get("source") or source, "val": {"documents": stats["docs_val"]}}
    if len(train) == stats["files_train"]:  # the manifest does not state the documents of fewer shards
        facts["train"] = {"documents": stats["docs_train"]}
    if about:
        for name in missing:
            os.replace(unfinished / name, directory / name)
        shutil.rmtree(unfinished)
        describe(directory, **facts)
    else:
        describe(unfinished, **facts)
        os.replace(unfinished, directory)


def _fetch(missing: dict[str, RemoteFile], unfinished: Path, directory: Path) -> None:
    left = {name: remote for name, remote in missing.items() if not matches(unfinished / name, remote.checksum)}
    check_space(directory, sum(remote.size for remote in left.values()), "the download")
    unfinished.mkdir(exist_ok=True)
    for path in list(unfinished.iterdir()):
        if path.name not in missing.keys() - left.keys():  # another commit, a larger request, or a killed process
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name, remote in left.items():
        print(f"{directory.name}/{name}: {remote.size:,} bytes", flush=True)
        remote.download(unfinished / name)


def documents(
    count: int = 0, revision: str = "main", endpoint: str | None = None, directory: str | Path | None = None
) -> Path:
    """File of the first `count` published documents, one JSON object per line; 0: all of them, 48 GB.

    Default folder: data/docs. `<file>.source.json` beside it states the source and that the file is complete. Raises
    DataError.
    """
    if count < 0:
        raise DataError(f"documents={count}: choose a number of documents, or 0 for all")
    folder = ROOT / (directory or "data/docs")
    path = folder / (f"docs_selected.first{count}.jsonl" if count else "docs_selected.jsonl")
    about_path = path.with_name(f"{path.name}.source.json")
    with explain_disk_errors(folder), exclusive(path):
        about = read_json(about_path)
        if about is None and about_path.exists():
            raise DataError(f"{about_path}: damaged; delete it")
        _check_revision(path, about or {}, revision, "--download")
        same = about and path.exists() and path.stat().st_size == about["bytes"]
        if same and path.stat().st_mtime_ns >= about_path.stat().st_mtime_ns:
            same = matches(path, about["sha256"])
        if not same:
            snapshot = Snapshot.resolve(about["commit"] if about else revision, endpoint)
            about = {"repo": REPO, "revision": about["revision"] if about else revision, "commit": snapshot.commit}
            about |= _fetch_documents(path, count, snapshot)
            atomic_write(about_path, json.dumps(about, indent=1))
    print(f"{path}: {about['documents']:,} documents, {about['bytes']:,} bytes")
    return path


def _fetch_documents(path: Path, count: int, snapshot: Snapshot) -> dict:
    file, remote = snapshot.files(DOCUMENTS_ABOUT, DOCUMENTS)
    published = file.read_json()
    with _understood(file):
        number, mean = int(published["num_docs"]), int(published["docs_bytes"]) // int(published["num_docs"]) + 1
        if published["docs_sha256"] != remote.checksum:
            raise _stale(file, "docs_sha256", published["docs_sha256"], remote.checksum)
    if count > number:
        raise DataError(f"documents={count}: there are {number:,}")
    partial = path.with_name(f".{path.name}.{remote.checksum[:16]}.partial")
    for other in path.parent.glob(f".{path.name}.*.partial"):
        if other != partial:  # a part of another commit
            other.unlink()
    sha256 = remote.checksum
    if count or not matches(path, sha256):  # complete if a process was killed before it said so
        have = partial.stat().st_size if partial.exists() else 0
        check_space(path.parent, max(0, (count or number) * mean - have), "the download", "--download")
        with open(partial, "ab+") as f:
            if count:
                sha256 = _fetch_lines(remote, f, count, mean)
            else:
                remote.append(f, remote.size)
        if not (sha256 if count else matches(partial, sha256)):
            partial.unlink()
            what = f"does not begin with {count} documents of JSON" if count else "arrived with another checksum"
            raise DataError(f"{remote.url}: {what}; run the same command again")
        os.replace(partial, path)
    about = {"source_manifest": published, "documents": count or number}
    return about | {"bytes": path.stat().st_size, "sha256": sha256}


def _fetch_lines(remote: RemoteFile, f: BinaryIO, count: int, mean: int) -> str:
    """Make f the first `count` lines, of about `mean` bytes each. Returns their sha256, "" if one is not JSON.

    The hub has no checksum of a part of a file, so the lines of a part are parsed instead.
    """
    while True:
        f.seek(0)
        lines = sum(block.count(b"\n") for block in iter(lambda: f.read(BLOCK), b""))
        if lines >= count or f.tell() == remote.size:
            break
        remote.append(f, min(remote.size, f.tell() + max(BLOCK, (count - lines) * mean)))
    f.seek(0)
    digest, size, good = hashlib.sha256(), 0, 0
    with contextlib.suppress(ValueError):
        for line in islice(f, count):
            digest.update(line)
            size += len(line)
            good += isinstance(json.loads(line), dict)
    f.truncate(size)
    os.fsync(f.fileno())
    return digest.hexdigest() if good == count else ""


def _stale(file: RemoteFile, what: str, stated: object, actual: object) -> DataError:
    """Error for a manifest that does not fit the files it describes."""
    return DataError(
        f"{file.url}: does not fit the files that it describes: it states {what} {stated}, but it is {actual}; name "
        "another --revision, or wait for the publisher to correct it"
    )


def _check_revision(path: Path, source: dict, revision: str, option: str) -> None:
    if source and revision not in ("main", source["revision"], source["commit"]):
        raise DataError(
            f"{path}: is of revision {source['revision']} (commit {source['commit']}), not {revision}; name another "
            f"folder with {option}"
        )


@contextlib.contextmanager
def _understood(file: RemoteFile) -> Iterator[None]:
    """Turn a missing or malformed field of a manifest inside the block into a DataError."""
    try:
        yield
    except DataError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{file.url}: is not as expected ({error!r}); name another --revision") from error
