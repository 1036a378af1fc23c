import contextlib
import hashlib
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
from pgolf.data.hub import documents, fineweb
from pgolf_core.files import DataError

DOCUMENTS, SIDECAR = hub.DOCUMENTS, hub.DOCUMENTS_ABOUT
TRAIN = "datasets/datasets/fineweb10B_sp1024/fineweb_train_00000{}.bin"
SP = "datasets/datasets/fineweb10B_sp1024"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return published(tmp_path_factory.mktemp("published"))


@pytest.fixture
def server(files, tmp_path, monkeypatch):
    monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda _: None))  # between two attempts
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
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


def names(variant: str, train: int, val: int) -> set[str]:
    shards = {f"fineweb_train_{i:06d}.bin" for i in range(train)} | {f"fineweb_val_{i:06d}.bin" for i in range(val)}
    return shards | {"dataset.json", "tokenizer.model" if variant == "sp1024" else "tokenizer.json"}


def interrupt(server: HubServer, path: str, action) -> None:
    """Let every connection for a file be cut, so that the action fails."""
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
    assert set(present) == names("sp1024", 2, 2) and present["tokenizer.model"] == MODEL.read_bytes()
    assert all(present[name] == files[f"{SP}/{name}"] for name in present if name.endswith(".bin"))
    dataset = Dataset.open(folder, vocab_size=1024)
    assert dataset.description["train_tokens"] == 2 * SHARD and dataset.about["fingerprint"] == dataset.fingerprint
    source = dataset.about["source"]
    assert source["commit"] == server.commit and source["revision"] == "main"
    assert dataset.about["val"]["documents"] == 2 and "documents" not in dataset.about["train"]
    assert {path.name for path in folder.parent.iterdir()} == {"data", "data.lock"}
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith("data: 40,000 training tokens in 2 of 4 shards, 8,000 validation tokens in 2")

    folder = get(1, variant="byte260", name="bytes")
    assert set(contents(folder)) == names("byte260", 1, 1)
    assert Dataset.open(folder, vocab_size=260).about["train"]["documents"] == 290


def test_again_without_the_network(server, get):
    before = contents(get())
    server.log.clear()
    for again in ({}, {"train_shards": 1}, {"revision": server.commit}, {"endpoint": "http://127.0.0.1:9"}):
        assert contents(get(**again)) == before
    assert not server.log


def test_more_shards_of_the_same_commit_later(server, get):
    folder = get(1)
    server.push(server.files | {TRAIN.format(2): b"of a later commit"})
    server.log.clear()
    get(4)
    assert sorted(r.path for r in server.gets() if r.path.endswith(".bin")) == [TRAIN.format(i) for i in (1, 2, 3)]
    assert set(contents(folder)) == names("sp1024", 4, 2)
    assert Dataset.open(folder).about["train"]["documents"] == 290
    assert {path.name for path in folder.parent.iterdir()} == {"data", "data.lock"}


def test_one_commit_though_the_repository_changes(server, get, files, monkeypatch):
    read = download.RemoteFile.read_json

    def pushed(remote):
        server.push(server.files | {TRAIN.format(0): b"new"})
        return read(remote)

    monkeypatch.setattr(download.RemoteFile, "read_json", pushed)
    assert contents(get(1))["fineweb_train_000000.bin"] == files[TRAIN.format(0)]


def test_cut_connections_and_a_corrupt_copy(server, get, files):
    server.cuts[TRAIN.format(0)] = [5000, 0, 0, 12288]
    assert contents(get(1))["fineweb_train_000000.bin"] == files[TRAIN.format(0)]
    assert len(server.gets(TRAIN.format(0))) == 5
    server.corrupt[TRAIN.format(0)] = 1
    assert contents(get(1, name="corrupt"))["fineweb_train_000000.bin"] == files[TRAIN.format(0)]
    assert len(server.gets(TRAIN.format(0))) == 7  # a corrupt copy is fetched once more
    interrupt(server, TRAIN.format(1), lambda: get(2))
    assert set(contents(get(2))) == names("sp1024", 2, 2)
    assert [request.path for request in server.gets() if request.path.endswith(".bin")] == [TRAIN.format(1)]


CHILD = """
import sys
from huggingface_hub import constants
from pgolf.data.hub import documents, fineweb
constants.DOWNLOAD_CHUNK_SIZE = 1000
kind, endpoint, directory = sys.argv[1:]
if kind == "documents":
    documents(250, endpoint=endpoint, directory=directory)
else:
    fineweb("sp1024", 4, endpoint=endpoint, directory=directory)
"""


def killed_after(server: HubServer, kind: str, folder: Path, sent: int) -> None:
    """Run it in a process of its own and kill that after so many more bytes."""
    server.sent, deadline = 0, time.monotonic() + 60
    child = subprocess.Popen([sys.executable, "-c", CHILD, kind, server.endpoint, folder], stdout=subprocess.DEVNULL)
    while server.sent < sent and time.monotonic() < deadline and child.poll() is None:
        time.sleep(0.002)
    assert child.poll() is None and server.sent >= sent
    child.kill()
    child.wait()


@pytest.mark.slow
def test_killed_shards_go_on(server, get):
    undisturbed = contents(get(4, name="undisturbed"))
    folder = get.folder / "data"
    server.log.clear()
    server.delay = 0.01
    for sent in (60_000, 110_000, 110_000):
        killed_after(server, "shards", folder, sent)
        assert not folder.exists()
        for path in folder.with_name("data.unfinished").glob("fineweb_*"):
            assert path.read_bytes() == undisturbed[path.name]
    server.delay = 0
    assert contents(get(4)) == undisturbed
    assert not folder.with_name("data.unfinished").exists()
    whole = [path for path in {r.path for r in server.gets() if "fineweb" in r.path} if len(server.gets(path)) == 1]
    assert len(whole) >= 3  # fetched once, before or between the kills


class Killed(BaseException):
    pass


@pytest.mark.parametrize("begun", [0, 1])
def test_stopped_before_any_move(server, get, monkeypatch, begun):
    """A new folder, or one that gets more shards, is complete after the same command, wherever the first stopped."""
    if begun:
        get(begun, name="whole")
    undisturbed = contents(get(4, name="whole"))
    real, stopped = os.replace, True

    def stop_at(moves):
        def replace(*paths):
            nonlocal moves, stopped
            moves -= 1
            if moves < 0:
                stopped = True
                raise Killed
            real(*paths)

        return replace

    for moves in range(100):
        if not stopped:
            break
        if begun:
            get(begun, name=f"{moves}")
        stopped = False
        with monkeypatch.context() as patched, contextlib.suppress(Killed):
            patched.setattr(os, "replace", stop_at(moves))
            get(4, name=f"{moves}")
        with contextlib.suppress(DataError):  # missing, or not as dataset.json lists
            assert len(Dataset.open(get.folder / f"{moves}").train_shards) in (begun, 4)
        assert contents(get(4, name=f"{moves}")) == undisturbed
    assert moves > 8


def test_unfinished_files_of_another_request(server, get, files):
    """Files of an earlier commit are not taken for those of this one; shards of a larger request do not stay."""
    interrupt(server, TRAIN.format(3), lambda: get(4))
    server.push(files | {TRAIN.format(i): files[TRAIN.format(1 - i)] for i in (0, 1)})
    folder = get()
    for i in (0, 1):
        assert contents(folder)[f"fineweb_train_{i:06d}.bin"] == files[TRAIN.format(1 - i)]
    assert set(contents(folder)) == names("sp1024", 2, 2)


def test_damaged_folder_is_repaired(server, get):
    folder = get()
    before = contents(folder)
    for damage, name, expected in (
        ("byte", "fineweb_train_000001.bin", TRAIN.format(1)),
        ("cut", "fineweb_val_000001.bin", f"{SP}/fineweb_val_000001.bin"),
        ("deleted", "tokenizer.model", "datasets/tokenizers/fineweb_1024_bpe.model"),
    ):
        damaged = {"byte": before[name][:-1] + b"?", "cut": before[name][:-100], "deleted": b""}[damage]
        (folder / name).write_bytes(damaged)
        if not damaged:
            (folder / name).unlink()
        server.log.clear()
        get()
        assert contents(folder) == before
        assert [r.path for r in server.gets()] == ["datasets/manifest.json", expected]
    shutil.copy(folder / "fineweb_train_000001.bin", folder / "fineweb_train_000002.bin")  # not listed: replaced
    get()
    assert set(contents(folder)) == names("sp1024", 3, 2) and Dataset.open(folder)


@pytest.mark.parametrize("path", [TRAIN.format(0), "datasets/manifest.json"])
def test_corrupt_always(server, get, path):
    server.corrupt[path] = math.inf
    with pytest.raises(DataError, match=rf"{Path(path).name}: arrived twice with another checksum than"):
        get(1)
    assert len(server.gets(path)) == 2
    assert not (get.folder / "data").exists()
    assert not list(get.folder.rglob("*train*"))


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
    assert time.monotonic() - start < 4
    assert not [path for path in get.folder.glob("*") if path.is_dir()]


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        (TRAIN.format(1), 0, r"fineweb_train_000001\.bin: there is no such file; name another --rev"),
        ("datasets/manifest.json", 0, r"manifest\.json: there is no such file"),
        ("datasets/manifest.json", 403, r"manifest\.json: .* needs a login; `hf auth login`"),
        ("datasets/manifest.json", 401, r"manifest\.json: .* needs a login; `hf auth login`"),
        ("revision", 401, r"needs a login; `hf auth login`"),
        ("revision", 500, r"cannot be fetched \(the answer is status 500\)"),
        ("", 401, r"some/other does not exist or needs a login"),
    ],
)
def test_not_given(server, get, files, monkeypatch, path, status, message):
    if not path:
        monkeypatch.setattr(download, "REPO", "some/other")
    elif status:
        server.status[path] = status
    else:
        server.push({name: content for name, content in files.items() if name != path})
    with pytest.raises(DataError, match=message):
        get()
    assert not (get.folder / "data").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, e: e["stats"].update(tokens_val=7999), "it states tokens_val 7999, but it is 8000"),
        (lambda m, e: e["stats"].update(tokens_train=1), "it states tokens_train 1, but it is 67000"),
        (lambda m, e: e["stats"].update(files_val=3), r"fineweb_val_000002\.bin: there is no such file"),
        (lambda m, e: e["stats"].pop("tokens_val"), r"is not as expected \(KeyError\('tokens_val'\)\)"),
        (lambda m, e: m.pop("tokenizers"), r"is not as expected \(KeyError\('tokenizers'\)\)"),
    ],
)
def test_stale_manifest(server, get, change, message):
    manifest = json.loads(server.files["datasets/manifest.json"])
    change(manifest, manifest["datasets"][0])
    server.push(server.files | {"datasets/manifest.json": json.dumps(manifest).encode()})
    with pytest.raises(DataError, match=message):
        get(4)
    assert not (get.folder / "data").exists()
    assert not [request for request in server.gets() if "fineweb_train" in request.path]


def test_other_folders(get):
    folder = get(1)
    for options, message in [
        ({"variant": "byte260"}, r"data: holds the published sp1024, not the published byte260; name another folder"),
        ({"revision": "v9"}, r"data: is of revision main \(commit [0-9a-f]{40}\), not v9; name another folder"),
    ]:
        with pytest.raises(DataError, match=message):
            get(1, **options)
    (folder / "fineweb_train_000009.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"fineweb_train_000009\.bin: is none of the published shards; move it away"):
        get(1)
    (folder / "dataset.json").write_text("[]")
    with pytest.raises(DataError, match=r"dataset\.json: damaged"):
        get(1)
    (folder / "dataset.json").write_text('{"source": {"kind": "other"}}')
    with pytest.raises(DataError, match=r"data: holds something else, not the published sp1024"):
        get(1)
    (folder / "dataset.json").unlink()
    with pytest.raises(DataError, match=r"data: exists without dataset\.json; name another folder with --out"):
        get(1)


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
        assert [request.path for request in server.gets()] == ["datasets/manifest.json"]
    server.log.clear()
    resize("4m")
    assert contents(get(4, directory=disk / "data")) == undisturbed
    assert len(server.gets("datasets/tokenizers/fineweb_1024_bpe.model")) == checked  # fetched before the disk was full


# Documents


def first(count: int) -> bytes:
    return b"".join(JSONL.splitlines(keepends=True)[:count])


def source_of(path: Path) -> dict:
    return json.loads(path.with_name(f"{path.name}.source.json").read_text())


@pytest.mark.parametrize("block", [1000, 2**20])
@pytest.mark.parametrize("count", [1, 17, 250, 300])
def test_first_documents(server, get_documents, monkeypatch, count, block):
    monkeypatch.setattr(hub, "BLOCK", block)
    path = get_documents(count)
    assert path.name == f"docs_selected.first{count}.jsonl" and path.read_bytes() == first(count)
    about = source_of(path)
    assert (about["documents"], about["bytes"], about["commit"]) == (count, len(first(count)), server.commit)
    assert about["sha256"] == hashlib.sha256(first(count)).hexdigest()
    assert about["source_manifest"]["num_docs"] == 300
    if block == 1000 and count <= 17:
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
    get_documents()
    assert path.read_bytes() == JSONL and len(server.gets(DOCUMENTS)) == 1
    path.unlink()
    server.corrupt[DOCUMENTS] = 1
    with pytest.raises(DataError, match="arrived with another checksum; run the same command again"):
        get_documents()
    assert get_documents().read_bytes() == JSONL


@pytest.mark.slow
def test_killed_documents_go_on(server, get_documents):
    server.delay = 0.01
    for _ in range(3):
        killed_after(server, "documents", get_documents.folder, 40_000)
        assert not [path for path in get_documents.folder.iterdir() if path.suffix in (".jsonl", ".json")]
    server.delay = 0
    path = get_documents(250)
    assert path.read_bytes() == first(250)
    begun = [int(r.range[6:].partition("-")[0]) for r in server.gets(DOCUMENTS)]
    assert begun == sorted(begun) and len(set(begun)) == 4
    assert {p.name for p in path.parent.iterdir()} == {path.name, f"{path.name}.lock", f"{path.name}.source.json"}


def test_documents_killed_at_the_very_end(server, get_documents, monkeypatch):
    """All of them are there, but no .source.json says so yet."""

    def killed(*_):
        raise Killed

    for count in (0, 20):
        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(hub, "atomic_write", killed)
            get_documents(count)
        server.log.clear()
        path = get_documents(count)
        assert path.read_bytes() == first(count or 300)
        assert source_of(path)["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert len(server.gets(DOCUMENTS)) == bool(count)


def test_a_bad_part_and_a_later_commit(server, get_documents, files):
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
    for count, message in [(301, "documents=301: there are 300"), (-1, "documents=-1: choose a number")]:
        with pytest.raises(DataError, match=message):
            get_documents(count)
    for key, value in [("docs_sha256", "0" * 64), ("num_docs", "many")]:
        server.push(files | {SIDECAR: json.dumps(json.loads(files[SIDECAR]) | {key: value}).encode()})
        with pytest.raises(DataError, match=r"does not fit the files|is not as expected"):
            get_documents()
    server.push(files | published_documents(b"<html>\n" * (len(JSONL) // 7)))
    with pytest.raises(DataError, match="does not begin with 3 documents of JSON"):
        get_documents(3)
    folder = get_documents.folder
    assert not list(folder.glob("*.jsonl")) and not list(folder.glob("*json")) and not list(folder.glob(".*partial"))
