"""The published FineWeb shards and documents, from the Hugging Face hub, all files of a folder at one commit."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from itertools import islice
from pathlib import Path

from pgolf.data import tokenizers
from pgolf.data.dataset import DESCRIPTION, SPLITS, Dataset, describe, listed_shards, read_about
from pgolf.data.download import REPO, RemoteFile, Snapshot, matches
from pgolf.disk import check_space, exclusive, explain_disk_errors, parse_object, read_json
from pgolf_core.config import ROOT
from pgolf_core.files import DataError, atomic_write

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
        about, present = _about(directory, variant, revision), 0
        with contextlib.suppress(DataError):  # new, damaged, or a process was killed while it added shards
            present = len(Dataset.open(directory).train_shards)
        if present < train_shards:
            snapshot = Snapshot.resolve(about["source"]["commit"] if about else revision, endpoint)
            _complete(directory, about, snapshot, variant, train_shards, revision)
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
    content = f"the published {source['variant']}" if source.get("kind") == "hub" else "something else"
    if about and content != f"the published {variant}":
        raise DataError(f"{directory}: holds {content}, not the published {variant}; name another folder with --out")
    _check_revision(directory, source, revision, "--out")
    return about


def _complete(directory: Path, about: dict, snapshot: Snapshot, variant: str, train_shards: int, revision: str) -> None:
    """Fetch missing files into <directory>.unfinished, then move them; about: dataset.json, {} for a new folder."""
    repo_folder, tokenizer, stats = _published(snapshot, variant)
    train, val = ([f"fineweb_{split}_{i:06d}.bin" for i in range(stats[f"files_{split}"])] for split in SPLITS)
    if train_shards > len(train):
        raise DataError(f"--train-shards {train_shards}: {variant} has {len(train)} train shards")
    # Some are perhaps of a killed process; a byte sidecar is the user's.
    present = {path.name for path in directory.glob("fineweb_*.bin") if "_bytes_" not in path.name}
    if strange := sorted(present - {*train, *val}):
        raise DataError(f"{directory / strange[0]}: is none of the published shards; move it away")
    present |= listed_shards(about).keys()
    train = train[: max([train_shards] + [i + 1 for i, name in enumerate(train) if name in present])]
    names = [tokenizers.NAMES[tokenizer.endswith(".json")], *val, *train]
    files = snapshot.files(tokenizer, *(f"{repo_folder}/{name}" for name in names[1:]))
    remotes = dict(zip(names, files, strict=True))
    missing = {name: file for name, file in remotes.items() if not matches(directory / name, file.checksum)}
    unfinished = directory.with_name(f"{directory.name}.unfinished")
    _fetch(missing, unfinished, directory)

    source = {"kind": "hub", "repo": REPO, "variant": variant, "revision": revision}
    source |= {"commit": snapshot.commit, "manifest": stats}
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


def _published(snapshot: Snapshot, variant: str) -> tuple[str, str, dict]:
    """Folder and tokenizer of a variant in the repository, and its figures, as the published manifest has them."""
    (file,) = snapshot.files(MANIFEST)
    with file.read_json() as content:
        entries = {entry["name"].removeprefix("fineweb10B_"): entry for entry in content["datasets"]}
        if variant not in entries:
            raise DataError(f"--variant {variant}: is not published; there are {', '.join(sorted(entries))}")
        entry, stats = entries[variant], entries[variant]["stats"]
        stats |= {key: int(stats[key]) for key in (f"{a}_{b}" for a in ("docs", "files") for b in SPLITS)}
        paths = {each["name"]: each.get("model_path") or each["path"] for each in content["tokenizers"]}
        return f"datasets/{entry['path']}", f"datasets/{paths[entry['tokenizer_name']]}", stats


def _fetch(missing: dict[str, RemoteFile], unfinished: Path, directory: Path) -> None:
    """Fetch these files into a folder in which a killed process may have left some of them, or a part of one."""
    unfinished.mkdir(exist_ok=True)
    keep = {each for name, file in missing.items() for each in (unfinished / name, file.partial(unfinished / name))}
    for path in set(unfinished.iterdir()) - keep:  # another commit, a larger request, or a killed process
        path.unlink()
    have = sum(path.stat().st_size for path in unfinished.iterdir())
    check_space(directory, sum(file.size for file in missing.values()) - have, "the download")
    for name, file in missing.items():
        if not matches(unfinished / name, file.checksum):
            print(f"{directory.name}/{name}: {file.size:,} bytes", flush=True)
            file.download(unfinished / name)


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
        about = read_json(about_path) or {}
        _check_revision(path, about, revision, "--download")
        same = about and path.exists() and path.stat().st_size == about["bytes"]
        if same and path.stat().st_mtime_ns >= about_path.stat().st_mtime_ns:
            same = matches(path, about["sha256"])
        if not same:
            snapshot = Snapshot.resolve(about.get("commit", revision), endpoint)
            about = {"repo": REPO, "revision": about.get("revision", revision), "commit": snapshot.commit}
            about |= _fetch_documents(path, count, snapshot)
            atomic_write(about_path, json.dumps(about, indent=1))
    print(f"{path}: {about['documents']:,} documents, {about['bytes']:,} bytes")
    return path


def _fetch_documents(path: Path, count: int, snapshot: Snapshot) -> dict:
    file, remote = snapshot.files(DOCUMENTS_ABOUT, DOCUMENTS)
    with file.read_json() as published:
        number, mean = int(published["num_docs"]), int(published["docs_bytes"]) // int(published["num_docs"]) + 1
    if count > number:
        raise DataError(f"documents={count}: there are {number:,}")
    partial = remote.partial(path)
    for other in path.parent.glob(f".{path.name}.*.partial"):
        if other != partial:  # a part of another commit
            other.unlink()
    sha256 = remote.checksum
    if count or not matches(path, sha256):  # complete if a process was killed before it said so
        have = partial.stat().st_size if partial.exists() else 0
        check_space(path.parent, max(0, (count or number) * mean - have), "the download", "--download")
        if count:
            sha256 = _fetch_lines(remote, partial, count, mean)
            os.replace(partial, path)
        else:
            remote.download(path)
    facts = {"source_manifest": published, "documents": count or number}
    return facts | {"bytes": path.stat().st_size, "sha256": sha256}


def _fetch_lines(remote: RemoteFile, partial: Path, count: int, mean: int) -> str:
    """Make a file the first `count` lines of a published one, of about `mean` bytes each; returns its sha256.

    The hub has no checksum of a part of a file, so the lines of a part are parsed instead.
    """
    lines = have = 0
    while lines < count and have < remote.size:
        remote.fetch(partial, min(remote.size, have + max(BLOCK, (count - lines) * mean)))
        with open(partial, "rb") as f:
            lines = sum(block.count(b"\n") for block in iter(lambda: f.read(BLOCK), b""))
            have = f.tell()
    digest, good = hashlib.sha256(), 0
    with open(partial, "rb+") as f:
        for line in islice(f, count):
            digest.update(line)
            good += parse_object(line) is not None
        f.truncate(f.tell())
        os.fsync(f.fileno())
    if good < count:
        partial.unlink()
        raise DataError(f"{remote.url}: does not begin with {count} documents of JSON; run the same command again")
    return digest.hexdigest()


def _check_revision(path: Path, source: dict, revision: str, option: str) -> None:
    """DataError if a download of this source, {} for a new one, is of another revision."""
    if source and revision not in ("main", source["revision"], source["commit"]):
        raise DataError(
            f"{path}: is of revision {source['revision']} (commit {source['commit']}), not {revision}; name another "
            f"folder with {option}"
        )
