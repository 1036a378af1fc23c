import contextlib
import hashlib
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants, file_download
from support.hub_server import JSONL, MODEL, SHARD, HubServer, published, published_documents

from pgolf.data import download, hub
from pgolf.data.dataset import Dataset
from pgolf.data.hub import DOCUMENTS, MANIFEST, documents, fineweb
from pgolf_core.files import DataError

SP = "datasets/datasets/fineweb10B_sp1024"
TRAIN = SP + "/fineweb_train_00000{}.bin"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return published(tmp_path_factory.mktemp("published"))


@pytest.fixture
def server(files, monkeypatch):
    monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda _: None))  # between two attempts
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with HubServer(files) as server:
        yield server


@pytest.fixture
def get(server, tmp_path):
    """fineweb from the server into a folder."""

    def get(train_shards=2, *, variant="sp1024", name="data", **options):
        return fineweb(variant, train_shards, **{"endpoint": server.endpoint, "directory": get.folder / name} | options)

    get.folder = tmp_path / "folders"
    return get


@pytest.fixture
def get_documents(server, tmp_path):
    def get(count=0, **options):
        return documents(count, **{"endpoint": server.endpoint, "directory": tmp_path / "docs"} | options)

    get.folder = tmp_path / "docs"
    return get


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the cache of checksums, which holds times."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".shards.json"}


def names(train: int, val: int = 2, tokenizer: str = "tokenizer.model") -> set[str]:
    shards = {f"fineweb_train_{i:06d}.bin" for i in range(train)} | {f"fineweb_val_{i:06d}.bin" for i in range(val)}
    return shards | {"dataset.json", tokenizer}


def interrupt(server: HubServer, path: str, action) -> None:
    """Let every connection for a file be cut after 5,000 bytes, so that the action fails."""
    server.cuts[path] = [5000] + [0] * 20
    with pytest.raises(DataError, match=r"cannot be fetched .*same command again"):
        action()
    server.cuts.clear()
    server.log.clear()


# Shards


def test_download_of_a_part_and_of_all(server, get, files, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    folder = get()
    assert {(request.host, request.token) for request in server.log} == {("hub", "Bearer hf_secret"), ("cdn", "")}
    present = contents(folder)
    assert set(present) == names(2) and present["tokenizer.model"] == MODEL.read_bytes()
    assert all(present[name] == files[f"{SP}/{name}"] for name in present if name.endswith(".bin"))
    dataset = Dataset.open(folder, vocab_size=1024)
    assert dataset.description["train_tokens"] == 2 * SHARD and dataset.about["fingerprint"] == dataset.fingerprint
    source = dataset.about["source"]
    assert source["commit"] == server.commit and source["revision"] == "main"
    assert dataset.about["val"]["documents"] == 2 and "documents" not in dataset.about["train"]
    assert {path.name for path in folder.parent.iterdir()} == {"data", "data.lock"}
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith("data: 40,000 training tokens in 2 of 4 shards, 8,000 validation tokens in 2")
    server.log.clear()
    for again in ({}, {"train_shards": 1}, {"revision": server.commit}, {"endpoint": "http://127.0.0.1:9"}):
        assert contents(get(**again)) == present
    assert not server.log  # without the network

    folder = get(1, variant="byte260", name="bytes")
    assert set(contents(folder)) == names(1, 1, "tokenizer.json")
    assert Dataset.open(folder, vocab_size=260).about["train"]["documents"] == 290


def test_more_shards_of_the_same_commit_later(server, get, files, monkeypatch):
    files_of = download.Snapshot.files

    def pushed(snapshot, *paths):
        """The repository changes while it is read, too."""
        server.push(server.files | {TRAIN.format(i): b"of a later commit" for i in (0, 2)})
        return files_of(snapshot, *paths)

    monkeypatch.setattr(download.Snapshot, "files", pushed)
    assert contents(get(1))["fineweb_train_000000.bin"] == files[TRAIN.format(0)]
    server.log.clear()
    folder = get(4)
    assert sorted(r.path for r in server.gets() if r.path.endswith(".bin")) == [TRAIN.format(i) for i in (1, 2, 3)]
    assert set(contents(folder)) == names(4)
    assert Dataset.open(folder).about["train"]["documents"] == 290
    assert {path.name for path in folder.parent.iterdir()} == {"data", "data.lock"}


def test_cut_connections_and_a_corrupt_copy(server, get, files):
    server.cuts[TRAIN.format(0)] = [5000, 0, 0, 12288]
    assert contents(get(1))["fineweb_train_000000.bin"] == files[TRAIN.format(0)]
    assert len(server.gets(TRAIN.format(0))) == 5
    server.corrupt[TRAIN.format(0)] = 1
    assert contents(get(1, name="corrupt"))["fineweb_train_000000.bin"] == files[TRAIN.format(0)]
    assert len(server.gets(TRAIN.format(0))) == 7  # a corrupt copy is fetched once more
    interrupt(server, TRAIN.format(1), lambda: get(2))
    assert set(contents(get(2))) == names(2)
    (request,) = [request for request in server.gets() if request.path.endswith(".bin")]
    assert request.path == TRAIN.format(1) and request.range.startswith("bytes=5000-")


@pytest.mark.parametrize("path", [TRAIN.format(0), MANIFEST])
def test_corrupt_always(server, get, path):
    server.corrupt[path] = math.inf
    with pytest.raises(DataError, match=rf"{Path(path).name}: arrived twice with another checksum than"):
        get(1)
    assert len(server.gets(path)) == 2
    assert not (get.folder / "data").exists() and not list(get.folder.rglob("*train*"))


CHILD = """
import sys
from huggingface_hub import constants
from pgolf.data.hub import documents, fineweb
constants.DOWNLOAD_CHUNK_SIZE = 1000
kind, endpoint, directory = sys.argv[1:]
where = dict(endpoint=endpoint, directory=directory)
documents(250, **where) if kind == "documents" else fineweb("sp1024", 4, **where)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["shards", "documents"])
def test_killed_twice_a_download_goes_on(server, get, get_documents, files, kind):
    folder = get.folder / "data" if kind == "shards" else get_documents.folder
    server.delay = 0.01
    for _ in range(2):
        server.sent, deadline = 0, time.monotonic() + 60
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, kind, server.endpoint, folder], stdout=subprocess.DEVNULL
        )
        while server.sent < 40_000 and time.monotonic() < deadline and child.poll() is None:
            time.sleep(0.002)
        assert child.poll() is None and server.sent >= 40_000
        child.kill()
        child.wait()
        assert not [path for path in folder.glob("[!.]*") if path.suffix != ".lock"]  # nothing that looks complete
    server.delay = 0
    if kind == "shards":
        present = contents(get(4))
        assert present.items() >= {name: files[f"{SP}/{name}"] for name in names(4) if name.endswith(".bin")}.items()
        assert {path.name for path in folder.parent.iterdir()} == {"data", "data.lock"}
    else:
        path = get_documents(250)
        assert path.read_bytes() == first(250)
        assert {p.name for p in folder.iterdir()} == {path.name, f"{path.name}.lock", f"{path.name}.source.json"}
    for path in {request.path for request in server.gets()} - {MANIFEST, hub.DOCUMENTS_ABOUT}:
        begun = [int(request.range[6:].partition("-")[0]) for request in server.gets(path)]
        assert begun == sorted(set(begun))  # no byte is fetched twice


class Killed(BaseException):
    pass


@pytest.mark.parametrize("begun", [0, 1])
def test_stopped_before_any_move(server, get, monkeypatch, begun):
    """A new folder, or one that gets more shards, is complete after the same command, wherever the first stopped."""
    if begun:
        get(begun, name="whole")
    undisturbed = contents(get(2, name="whole"))
    real = os.replace
    for moves in itertools.count():
        name, left = f"stopped after {moves}", iter(range(moves))
        if begun:
            get(begun, name=name)

        def replace(*paths, left=left):
            if next(left, None) is None:
                raise Killed
            real(*paths)

        with monkeypatch.context() as patched, contextlib.suppress(Killed):
            patched.setattr(os, "replace", replace)
            get(2, name=name)
            break
        with contextlib.suppress(DataError):  # missing, or not as dataset.json lists
            assert len(Dataset.open(get.folder / name).train_shards) in (begun, 2)
        assert contents(get(2, name=name)) == undisturbed
    assert moves > 4


def test_unfinished_files_of_another_request(server, get, files):
    """Files of an earlier commit are not taken for those of this one; shards of a larger request do not stay."""
    interrupt(server, TRAIN.format(3), lambda: get(4))
    server.push(files | {TRAIN.format(i): files[TRAIN.format(1 - i)] for i in (0, 1)})
    folder = get()
    for i in (0, 1):
        assert contents(folder)[f"fineweb_train_{i:06d}.bin"] == files[TRAIN.format(1 - i)]
    assert set(contents(folder)) == names(2)


def test_damaged_folder_is_repaired(server, get):
    folder = get()
    before = contents(folder)
    for name, damaged, expected in (
        ("fineweb_train_000001.bin", before["fineweb_train_000001.bin"][:-1] + b"?", TRAIN.format(1)),
        ("fineweb_val_000001.bin", before["fineweb_val_000001.bin"][:-100], f"{SP}/fineweb_val_000001.bin"),
        ("tokenizer.model", None, "datasets/tokenizers/fineweb_1024_bpe.model"),
    ):
        (folder / name).unlink()
        if damaged:
            (folder / name).write_bytes(damaged)
        server.log.clear()
        get()
        assert contents(folder) == before
        assert [r.path for r in server.gets()] == [MANIFEST, expected]
    shutil.copy(folder / "fineweb_train_000001.bin", folder / "fineweb_train_000002.bin")  # not listed: replaced
    get()
    assert set(contents(folder)) == names(3) and Dataset.open(folder)


# Refusals and missing files


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "sp512"}, r"--variant sp512: is not published; there are byte260, sp1024$"),
        ({"variant": "../sp1024"}, r"--variant \.\./sp1024: not the name of a variant"),
        ({"train_shards": 5}, r"--train-shards 5: sp1024 has 4 train shards$"),
        ({"train_shards": 0}, r"--train-shards 0: .* at least one shard"),
        ({"revision": "v9"}, r"--revision v9: willdepueoai/parameter-golf has no such branch, tag or commit"),
        ({"endpoint": "http://127.0.0.1:9"}, r"http://127\.0\.0\.1:9/.*: cannot be fetched .*refused"),
        ({"endpoint": "localhost"}, r"--endpoint localhost: not the address of a server; one begins with https://"),
        ({"endpoint": "http://[::1"}, r"--endpoint .* not the address of a server"),
    ],
)
def test_refused(get, options, message):
    start = time.monotonic()
    with pytest.raises(DataError, match=message):
        get(**options)
    assert time.monotonic() - start < 20  # no name is asked for again and again
    assert not [path for path in get.folder.glob("*") if path.is_dir()]


def without(path):
    return lambda files: {name: content for name, content in files.items() if name != path}


def manifest_with(**changes):
    """The publication with another manifest."""
    return lambda files: files | {MANIFEST: json.dumps(json.loads(files[MANIFEST]) | changes).encode()}


@pytest.mark.parametrize(
    ("new", "status", "message"),
    [
        (without(TRAIN.format(1)), {}, r"fineweb_train_000001\.bin: there is no such file; name another --rev"),
        (without(MANIFEST), {}, r"manifest\.json: there is no such file"),
        (manifest_with(tokenizers=[]), {}, r"manifest\.json: is not as expected \(KeyError\('sp1024'\)\)"),
        (lambda files: files | {MANIFEST: b"<html>"}, {}, r"manifest\.json: is not as expected"),
        (dict, {MANIFEST: 403}, r"manifest\.json: .* needs a login; `hf auth login`"),
        (dict, {"revision": 401}, r"needs a login; `hf auth login`"),
        (dict, {"revision": 500}, r"cannot be fetched \(the answer is status 500\)"),
    ],
)
def test_what_the_hub_does_not_give(server, get, files, new, status, message):
    server.push(new(files))
    server.status = status
    with pytest.raises(DataError, match=message):
        get()
    assert not (get.folder / "data").exists()
    assert not [request for request in server.gets() if "fineweb_train" in request.path]


def test_other_repositories_and_folders(get, monkeypatch):
    with (
        monkeypatch.context() as patched,
        pytest.raises(DataError, match=r"some/other does not exist or needs a login"),
    ):
        patched.setattr(download, "REPO", "some/other")
        get()
    folder = get(1)

    def refused(message, **options):
        with pytest.raises(DataError, match=message):
            get(1, **options)

    message = r"data: holds the published sp1024, not the published byte260; name another folder"
    refused(message, variant="byte260")
    refused(r"data: is of revision main \(commit [0-9a-f]{40}\), not v9; name another folder", revision="v9")
    (folder / "fineweb_train_000009.bin").write_bytes(b"")
    refused(r"fineweb_train_000009\.bin: is none of the published shards; move it away")
    (folder / "dataset.json").write_text("[]")
    refused(r"dataset\.json: damaged")
    (folder / "dataset.json").write_text('{"source": {"kind": "other"}}')
    refused(r"data: holds something else, not the published sp1024")
    (folder / "dataset.json").unlink()
    refused(r"data: exists without dataset\.json; name another folder with --out")


@pytest.mark.filterwarnings("ignore:Not enough free disk space")
@pytest.mark.parametrize("checked", [True, False])
def test_full_disk(server, get, small_disk, monkeypatch, checked):
    disk, resize = small_disk
    undisturbed = contents(get(4))
    server.log.clear()
    with monkeypatch.context() as patched:
        if not checked:  # another process fills the disk meanwhile
            patched.setattr(hub, "check_space", lambda *_: None)
        message = r"the download needs [\d,]+ bytes and this disk has" if checked else "the disk is full; make room"
        with pytest.raises(DataError, match=message):
            get(4, directory=disk / "data")
    assert not (disk / "data").exists()
    if checked:
        assert [request.path for request in server.gets()] == [MANIFEST]
    server.log.clear()
    resize("4m")
    assert contents(get(4, directory=disk / "data")) == undisturbed
    assert len(server.gets("datasets/tokenizers/fineweb_1024_bpe.model")) == checked  # fetched before the disk was full


# Documents


def first(count: int) -> bytes:
    return b"".join(JSONL.splitlines(keepends=True)[:count])


def source_of(path: Path) -> dict:
    return json.loads(path.with_name(f"{path.name}.source.json").read_text())


@pytest.mark.parametrize(("count", "block"), [(1, 1000), (17, 1000), (250, 1000), (250, 2**20), (300, 1000)])
def test_first_documents(server, get_documents, monkeypatch, count, block):
    monkeypatch.setattr(hub, "BLOCK", block)
    path = get_documents(count)
    assert path.name == f"docs_selected.first{count}.jsonl" and path.read_bytes() == first(count)
    about = source_of(path)
    assert (about["documents"], about["bytes"], about["commit"]) == (count, len(first(count)), server.commit)
    assert about["sha256"] == hashlib.sha256(first(count)).hexdigest()
    assert about["source_manifest"]["num_docs"] == 300
    if count <= 17:
        assert server.sent < len(JSONL) / 4
    server.log.clear()
    get_documents(count)
    assert not server.log


def test_documents_without_a_last_newline(server, get_documents, files):
    content = JSONL.rstrip(b"\n")
    server.push(files | published_documents(content))
    assert get_documents(300).read_bytes() == content


def test_all_documents(server, get_documents):
    server.cuts[DOCUMENTS] = [4096, 0, 8192]
    path = get_documents()
    assert path.name == "docs_selected.jsonl" and path.read_bytes() == JSONL
    assert source_of(path)["documents"] == 300
    server.log.clear()
    get_documents(endpoint="http://127.0.0.1:9")
    path.write_bytes(JSONL[:-2] + b"?\n")
    server.corrupt[DOCUMENTS] = 1
    assert get_documents().read_bytes() == JSONL and len(server.gets(DOCUMENTS)) == 2


@pytest.mark.parametrize("count", [0, 20])
def test_documents_killed_at_the_very_end(server, get_documents, monkeypatch, count):
    """All of them are there, but no .source.json says so yet."""

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(hub, "atomic_write", killed)
        get_documents(count)
    server.log.clear()
    path = get_documents(count)
    assert path.read_bytes() == first(count or 300)
    assert source_of(path)["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert len(server.gets(DOCUMENTS)) == bool(count)


def test_a_part_of_the_documents_and_a_later_commit(server, get_documents, files):
    """A part is continued; one of other documents is not, and does not stay."""
    interrupt(server, DOCUMENTS, get_documents)
    assert get_documents().read_bytes() == JSONL and server.gets(DOCUMENTS)[0].range.startswith("bytes=5000-")
    for path in get_documents.folder.glob("docs*"):
        path.unlink()
    interrupt(server, DOCUMENTS, get_documents)
    server.push(files | published_documents(JSONL[::-1]))
    assert get_documents().read_bytes() == JSONL[::-1]
    assert not list(get_documents.folder.glob(".*partial"))


def test_documents_refused(server, get_documents, files):
    def refused(message, count):
        with pytest.raises(DataError, match=message):
            get_documents(count)

    refused("documents=301: there are 300", 301)
    refused("documents=-1: choose a number", -1)
    server.push(files | {hub.DOCUMENTS_ABOUT: b'{"num_docs": "many", "docs_bytes": 1}'})
    refused("is not as expected", 0)
    server.push(files | published_documents(b"<html>\n" * (len(JSONL) // 7)))
    refused("does not begin with 3 documents of JSON", 3)
    assert {path.suffix for path in get_documents.folder.iterdir()} == {".lock"}
