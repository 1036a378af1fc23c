"""The published FineWeb shards and documents, from the Hugging Face hub: checked, and gone on with where they stopped.

Everything is fetched at one commit, which the manifest's answer names.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from pgolf.data import download
from pgolf.data.dataset import DESCRIPTION, SPLITS, Dataset, describe
from pgolf.data.download import (
    Remote,
    chunks,
    fetch,
    head,
    holds,
    mapping,
    progress,
    read_json,
    say,
    stale,
    with_checksum,
)
from pgolf.disk import check_space, exclusive, explain_disk_errors
from pgolf_core import tokens as tokenizer
from pgolf_core.config import ROOT
from pgolf_core.files import DataError, atomic_write
from pgolf_core.shards import HEADER_BYTES, read_shard

MANIFEST = "datasets/manifest.json"
DOCUMENTS, SIDECAR = "datasets/docs_selected.jsonl", "datasets/docs_selected.source_manifest.json"
BLOCK = 2**20  # bytes that are asked for at least when looking for the end of a document


# Shards


def fineweb(
    variant: str = "sp1024",
    train_shards: int = 1,
    revision: str = "main",
    endpoint: str | None = None,
    directory: str | Path | None = None,
) -> Path:
    """Folder of published shards with their tokenizer: the first train_shards of train, all of val.

    Default folder: data/fineweb10B_<variant>. One that has them is only checked, without the network; one that has
    fewer gets more of the commit it is from; a damaged file is fetched again. Raises DataError.
    """
    if not re.fullmatch(r"\w+", variant):
        raise DataError(f"--variant {variant}: this is no name of a variant; one is sp1024")
    if train_shards < 1:
        raise DataError(f"--train-shards {train_shards}: training needs one shard at least")
    directory = ROOT / (directory or f"data/fineweb10B_{variant}")
    with explain_disk_errors(directory), exclusive(directory):
        about = _about(directory, variant, revision)
        dataset = _whole(directory) if about else None
        if dataset is None or len(dataset.train_shards) < train_shards:
            _complete(directory, about, variant, train_shards, revision, download.checked_endpoint(endpoint))
            dataset = Dataset.open(directory)
    told, source = dataset.description, dataset.about["source"]
    print(
        f"{directory}: {told['train_tokens']:,} training tokens in {len(told['train'])} of "
        f"{source['manifest']['files_train']} shards, {told['val_tokens']:,} validation tokens in {len(told['val'])}"
    )
    return directory


def _about(directory: Path, variant: str, revision: str) -> dict:
    """dataset.json of a folder of this variant and revision; {} where there is no folder."""
    path = directory / DESCRIPTION
    if not path.exists():
        if directory.exists():
            raise DataError(f"{directory}: is there without {DESCRIPTION}; name another folder with --out or delete it")
        return {}
    about = mapping(path.read_bytes(), path)
    source = about.get("source", {})
    if source.get("kind") != "hub" or source["variant"] != variant:
        holds = f"the published {source['variant']}" if source.get("kind") == "hub" else "something else"
        raise DataError(f"{directory}: holds {holds}, not the published {variant}; name another folder with --out")
    _check_revision(directory, source, revision, "--out")
    return about


def _whole(directory: Path) -> Dataset | None:
    """The folder where it is as dataset.json lists. A damaged one, or a killed run's, gets what it lacks."""
    try:
        dataset = Dataset.open(directory)
    except DataError:
        return None
    return dataset if dataset.fingerprint == dataset.about["fingerprint"] else None


def _complete(directory: Path, about: dict, variant: str, train_shards: int, revision: str, endpoint: str) -> None:
    """Fetch what a folder lacks into another beside it, check it and move it; about: dataset.json, {} for a new one."""
    manifest = head(MANIFEST, about["source"]["commit"] if about else revision, endpoint, retry=False)
    entry = Entry.read(manifest, variant)
    stats = entry.stats
    if train_shards > stats["files_train"]:
        raise DataError(f"--train-shards {train_shards}: {variant} has {stats['files_train']} train shards")
    val, train = (
        [f"fineweb_{split}_{i:06d}.bin" for i in range(stats[f"files_{split}"])] for split in ("val", "train")
    )
    known = {shard["name"]: shard["sha256"] for split in SPLITS for shard in about.get(split, {}).get("shards", [])}
    there = {path.name for path in directory.glob("fineweb_*.bin")}  # some maybe of a killed run
    if strange := sorted(there - {*val, *train}):
        raise DataError(f"{directory / strange[0]}: is none of the published shards; move it away")
    train = train[: max([train_shards] + [i + 1 for i, name in enumerate(train) if name in known or name in there])]
    own = tokenizer.NAMES[entry.tokenizer.endswith(".json")]
    known[own] = about.get("tokenizer_sha256", "")

    missing, sizes = {}, {}
    for name in [own, *val, *train]:
        path = directory / name
        if known.get(name) and holds(path, known[name]):
            sizes[name] = path.stat().st_size
            continue
        remote = head(entry.tokenizer if name == own else f"{entry.folder}/{name}", manifest.commit, endpoint)
        remote = with_checksum(remote, entry.sha256.get(name))
        sizes[name] = remote.size
        if not holds(path, *remote.checksums):
            missing[name] = remote
    # A shard's size tells its tokens: this is known before a shard is fetched.
    _check_tokens(manifest, entry, {name: (sizes[name] - HEADER_BYTES) // 2 for name in [*val, *train]})

    unfinished = directory.with_name(f"{directory.name}.unfinished")
    done = {name for name, remote in missing.items() if holds(unfinished / name, *remote.checksums)}
    needed = sum(remote.left(unfinished / name) for name, remote in missing.items() if name not in done)
    check_space(directory, needed, "the download")
    unfinished.mkdir(exist_ok=True)
    ours = done | {remote.partial(unfinished / name).name for name, remote in missing.items()}
    for path in list(unfinished.iterdir()):
        if path.name not in ours:  # of another commit, or more than is asked for now
            path.unlink()
    with progress(needed, directory.name) as bar:
        for name, remote in missing.items():
            if name not in done:
                fetch(remote, unfinished / name, bar)
            if name != own:
                read_shard(unfinished / name)
            elif (pieces := tokenizer.load(unfinished / name).vocab_size) != entry.vocab_size:
                raise stale(manifest, f"vocab_size of {variant}", entry.vocab_size, pieces)

    source = {"kind": "hub", "repo": download.REPO, "variant": variant, "revision": revision, "commit": manifest.commit}
    facts = {"source": about.get("source") or source | {"manifest": stats}, "val": {"documents": stats["docs_val"]}}
    if len(train) == stats["files_train"]:  # the manifest does not tell how many documents fewer shards have
        facts["train"] = {"documents": stats["docs_train"]}
    if about:
        for name in missing:
            os.replace(unfinished / name, directory / name)
        shutil.rmtree(unfinished)
        describe(directory, **facts)
    else:
        describe(unfinished, **facts)
        os.replace(unfinished, directory)


@dataclass(frozen=True)
class Entry:
    """What the manifest says of a variant. Paths are those in the repository."""

    folder: str
    tokenizer: str
    vocab_size: int
    shard_size: int  # tokens of every train shard but the last; 0 where it is not told
    stats: dict[str, int]
    sha256: dict[str, str]  # of shards; the published manifest has none

    @classmethod
    def read(cls, file: Remote, variant: str) -> Entry:
        manifest = read_json(file)
        with _understood(file):
            entries = {entry["name"].removeprefix("fineweb10B_"): entry for entry in manifest["datasets"]}
            if variant not in entries:
                raise DataError(f"--variant {variant}: is not published; there are {', '.join(sorted(entries))}")
            entry = entries[variant]
            stats = entry["stats"]
            stats |= {key: int(stats[key]) for key in (f"{a}_{b}" for a in ("docs", "files", "tokens") for b in SPLITS)}
            paths = {told["name"]: told.get("model_path") or told["path"] for told in manifest["tokenizers"]}
            return cls(
                folder=f"datasets/{entry['path']}",
                tokenizer=f"datasets/{paths[entry['tokenizer_name']]}",
                vocab_size=int(entry["vocab_size"]),
                shard_size=int(manifest.get("shard_size") or 0),
                stats=stats,
                sha256=dict(entry.get("sha256") or {}),
            )


def _check_tokens(file: Remote, entry: Entry, tokens: dict[str, int]) -> None:
    """DataError where the manifest (file) tells other tokens than each shard has."""
    stats, last = entry.stats, f"fineweb_train_{entry.stats['files_train'] - 1:06d}.bin"
    for name, there in tokens.items():
        if "_train_" in name and name != last and entry.shard_size not in (0, there):
            raise stale(file, f"tokens in {name}", entry.shard_size, there)
    for split in SPLITS if last in tokens else ("val",):
        there = sum(tokens[name] for name in tokens if f"_{split}_" in name)
        if there != stats[f"tokens_{split}"]:
            raise stale(file, f"tokens_{split}", stats[f"tokens_{split}"], there)


@contextlib.contextmanager
def _understood(file: Remote) -> Iterator[None]:
    """A manifest or sidecar that lacks something inside the block is a DataError."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file.url}: is not as expected ({error!r}); name another --revision") from error


# Documents


def documents(
    count: int = 0, revision: str = "main", endpoint: str | None = None, directory: str | Path | None = None
) -> Path:
    """File of the first count documents, a line of JSON each, or (0) of all of them: 48 GB.

    Default folder: data/docs. `<file>.source.json` beside it says where it is from, and that it is whole. The hub has
    no checksum of a part; its lines must be JSON. Raises DataError.
    """
    if count < 0:
        raise DataError(f"documents={count}: choose a number of documents, or 0 for all")
    folder = ROOT / (directory or "data/docs")
    path = folder / (f"docs_selected.first{count}.jsonl" if count else "docs_selected.jsonl")
    about_path = path.with_name(f"{path.name}.source.json")
    with explain_disk_errors(folder), exclusive(path):
        about = mapping(about_path.read_bytes(), about_path) if about_path.exists() else {}
        if about:
            _check_revision(path, about, revision, "--download")
        if not about or not _unchanged(path, about_path, about):
            revision = about.get("revision", revision)
            about = _fetch_documents(path, count, about.get("commit", revision), download.checked_endpoint(endpoint))
            atomic_write(about_path, json.dumps({"repo": download.REPO, "revision": revision} | about, indent=1))
    print(f"{path}: {about['documents']:,} documents, {about['bytes']:,} bytes")
    return path


def _unchanged(path: Path, about_path: Path, about: dict) -> bool:
    """Whether the file is as described; its checksum is looked at where it is younger than that."""
    if not path.exists() or path.stat().st_size != about["bytes"]:
        return False
    return path.stat().st_mtime_ns < about_path.stat().st_mtime_ns or holds(path, about["sha256"])


def _fetch_documents(path: Path, count: int, revision: str, endpoint: str) -> dict:
    sidecar = head(SIDECAR, revision, endpoint, retry=False)
    told = read_json(sidecar)
    remote = head(DOCUMENTS, sidecar.commit, endpoint)
    with _understood(sidecar):
        size, number, sha256 = int(told["docs_bytes"]), int(told["num_docs"]), str(told["docs_sha256"])
        mean = size // number
    if size != remote.size:
        raise stale(sidecar, "docs_bytes", size, remote.size)
    if count > number:
        raise DataError(f"documents={count}: there are {number:,}")
    remote = with_checksum(remote, sha256)
    for partial in path.parent.glob(f".{path.name}.*.partial"):
        if partial != remote.partial(path):  # of another commit
            partial.unlink()
    if count or not holds(path, *remote.checksums):  # whole where a run was killed before it could say so
        needed = max(0, remote.left(path) - (size - count * size // number if count else 0))
        check_space(path.parent, needed, "the download", "--download")
        with progress(needed, path.name) as bar:
            if count:
                sha256 = _fetch_first(remote, path, count, mean, bar)
            else:
                fetch(remote, path, bar)
    about = {"commit": remote.commit, "source_manifest": told, "documents": count or number}
    return about | {"bytes": path.stat().st_size, "sha256": sha256}


def _fetch_first(remote: Remote, path: Path, count: int, mean: int, bar: tqdm) -> str:
    """The first count lines, of about mean bytes each, as path; returns their sha256."""
    partial = remote.partial(path)
    say(bar, f"{path.name}: about {count * mean:,} bytes")
    with open(partial, "ab+") as f:
        f.seek(0)
        lines = sum(block.count(b"\n") for block in iter(lambda: f.read(BLOCK), b""))
        while lines < count and f.tell() < remote.size:
            end = min(remote.size, f.tell() + max(BLOCK, (count - lines) * mean))
            for chunk in chunks(remote, f.tell(), end):
                parts = chunk.split(b"\n", count - lines)
                if len(parts) > count - lines:  # the last document ends here
                    chunk = chunk[: len(chunk) - len(parts[-1])]
                f.write(chunk)
                bar.update(len(chunk))
                lines += len(parts) - 1
                if lines == count:
                    break
        f.flush()
        os.fsync(f.fileno())
    digest, documents = hashlib.sha256(), 0
    with open(partial, "rb") as f, contextlib.suppress(ValueError):
        for line in f:
            digest.update(line)
            documents += isinstance(json.loads(line), dict)
    if documents != count:
        partial.unlink()
        raise DataError(f"{remote.url}: does not begin with {count} documents of JSON; run the same command again")
    os.replace(partial, path)
    return digest.hexdigest()


def _check_revision(path: Path, source: dict, revision: str, option: str) -> None:
    if revision not in ("main", source["revision"], source["commit"]):
        raise DataError(
            f"{path}: is of revision {source['revision']} (commit {source['commit']}), not {revision}; name another "
            f"folder with {option}"
        )
