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

import numpy as np
import pytest
from hub_server import HubServer
from tqdm import tqdm

from pgolf.data import download, hub
from pgolf.data.dataset import Dataset
from pgolf.data.hub import documents, fineweb
from pgolf_core.files import DataError
from pgolf_core.shards import write_shard
from pgolf_core.tokens import Bytes

MODEL = Path(__file__).parents[1] / "golden" / "trace" / "sp1024.model"
SHARD = 20_000  # tokens
SP, BYTES = "datasets/datasets/fineweb10B_sp1024", "datasets/datasets/fineweb10B_byte260"
TEXTS = [f"document {i}: naïve 日本語 👩‍👩‍👧‍👦 " + "word " * (i * 37 % 400) for i in range(300)]
JSONL = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS).encode()


def published(folder: Path) -> dict[str, bytes]:
    """A small repository like the published one: two variants and the documents."""
    files = {
        "datasets/tokenizers/fineweb_1024_bpe.model": MODEL.read_bytes(),
        "datasets/tokenizers/fineweb_pure_byte_260.json": Bytes().to_json().encode(),
        "datasets/docs_selected.jsonl": JSONL,
    }
    random = np.random.default_rng(0)
    datasets = []
    for variant, vocab_size, train in (("sp1024", 1024, [SHARD] * 3 + [7_000]), ("byte260", 260, [500])):
        counts = {"train": train, "val": [SHARD // 4, 3_000] if vocab_size == 1024 else [400]}
        for split, sizes in counts.items():
            for i, tokens in enumerate(sizes):
                name = f"fineweb_{split}_{i:06d}.bin"
                row = random.integers(4, vocab_size, tokens)
                row[0] = 1
                files[f"datasets/datasets/fineweb10B_{variant}/{name}"] = write_shard(folder / name, row).read_bytes()
        stats = {f"files_{split}": len(sizes) for split, sizes in counts.items()}
        stats |= {f"tokens_{split}": sum(sizes) for split, sizes in counts.items()}
        stats |= {"docs_val": 2, "docs_train": 290, "docs_total": 292}
        entry = {"name": f"fineweb10B_{variant}", "path": f"datasets/fineweb10B_{variant}", "stats": stats}
        datasets.append(entry | {"tokenizer_name": variant, "vocab_size": vocab_size, "bos_id": 1})
    tokenizers = [
        {"name": "sp1024", "kind": "sentencepiece_bpe", "model_path": "tokenizers/fineweb_1024_bpe.model"},
        {"name": "byte260", "kind": "pure_byte", "path": "tokenizers/fineweb_pure_byte_260.json"},
    ]
    manifest = {"version": "1", "shard_size": SHARD, "tokenizers": tokenizers, "datasets": datasets}
    files["datasets/manifest.json"] = json.dumps(manifest).encode()
    told = {"num_docs": len(TEXTS), "docs_bytes": len(JSONL), "docs_sha256": hashlib.sha256(JSONL).hexdigest()}
    files["datasets/docs_selected.source_manifest.json"] = json.dumps(told).encode()
    return files


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return published(tmp_path_factory.mktemp("published"))


@pytest.fixture
def server(files, monkeypatch):
    monkeypatch.setattr(download, "PAUSE", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with HubServer(files) as server:
        yield server


@pytest.fixture
def get(server, tmp_path):
    """fineweb from the server into a folder."""

    def get(train_shards=2, *, variant="sp1024", name="data", **told):
        return fineweb(variant, train_shards, **{"endpoint": server.endpoint, "directory": get.folder / name} | told)

    get.folder = tmp_path / "folders"
    return get


def contents(folder: Path) -> dict[str, bytes]:
    """All files; the cache of checksums holds times, and is no part of what is fetched."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".shards.json"}


def names(variant: str, train: int, val: int) -> set[str]:
    shards = {f"fineweb_train_{i:06d}.bin" for i in range(train)} | {f"fineweb_val_{i:06d}.bin" for i in range(val)}
    return shards | {"dataset.json", "tokenizer.model" if variant == "sp1024" else "tokenizer.json"}


def change_manifest(server: HubServer, change) -> None:
    manifest = json.loads(server.files["datasets/manifest.json"])
    change(manifest, manifest["datasets"][0])
    server.push(server.files | {"datasets/manifest.json": json.dumps(manifest).encode()})


# Shards


def test_end_to_end(server, get, files, capsys):
    folder = get()
    there = contents(folder)
    assert set(there) == names("sp1024", 2, 2)
    for name, content in there.items():
        if name.endswith(".bin"):
            assert content == files[f"{SP}/{name}"]
    assert there["tokenizer.model"] == MODEL.read_bytes()
    dataset = Dataset.open(folder, vocab_size=1024)
    assert dataset.description["train_tokens"] == 2 * SHARD
    told = dataset.about
    assert told["source"]["commit"] == server.commit and told["source"]["revision"] == "main"
    assert told["val"]["documents"] == 2 and "documents" not in told["train"]
    assert told["fingerprint"] == dataset.fingerprint
    assert {path.name for path in folder.parent.iterdir()} == {"data", "data.lock"}
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith("data: 40,000 training tokens in 2 of 4 shards, 8,000 validation tokens in 2")


def test_byte_tokenizer_and_whole_train_split(get):
    folder = get(1, variant="byte260")
    assert set(contents(folder)) == names("byte260", 1, 1)
    assert Dataset.open(folder, vocab_size=260).about["train"]["documents"] == 290


def test_again_without_the_network(server, get):
    before = contents(get())
    server.log.clear()
    for again in ({}, {"train_shards": 1}, {"revision": server.commit}, {"endpoint": "http://127.0.0.1:9"}):
        assert contents(get(**again)) == before
    assert not server.log


def test_more_shards_later(server, get):
    folder = get(1)
    server.push(server.files | {f"{SP}/fineweb_train_000002.bin": b"of a later commit"})
    server.log.clear()
    get(4)
    assert sorted(r.path for r in server.gets() if r.path.endswith(".bin")) == [
        f"{SP}/fineweb_train_{i:06d}.bin" for i in (1, 2, 3)
    ]
    assert set(contents(folder)) == names("sp1024", 4, 2)
    assert Dataset.open(folder).about["train"]["documents"] == 290
    assert {path.name for path in folder.parent.iterdir()} == {"data", "data.lock"}


def test_one_commit_though_the_repository_changes(server, get, monkeypatch):
    """The manifest's commit is that of every file."""
    before = dict(server.files)
    read = hub.read_json

    def pushed(remote):
        told = read(remote)
        server.push(server.files | {f"{SP}/fineweb_train_000000.bin": b"new"})
        return told

    monkeypatch.setattr(hub, "read_json", pushed)
    assert contents(get(1))["fineweb_train_000000.bin"] == before[f"{SP}/fineweb_train_000000.bin"]


@pytest.mark.parametrize("ranges", [True, False])
def test_cut_connections(server, get, files, ranges):
    server.ranges = ranges
    path = f"{SP}/fineweb_train_000000.bin"
    server.cuts[path] = [5000, 0, 0, 12288]
    there = contents(get(1))
    assert there["fineweb_train_000000.bin"] == files[path]
    got = [int(request.range.partition("=")[2].partition("-")[0]) for request in server.gets(path)]
    assert got == ([0, 5000, 5000, 5000, 17288] if ranges else [0, 5000, 5000, 5000, 12288])


def test_cut_again_and_again(server, get):
    path = f"{SP}/fineweb_train_000000.bin"
    server.cuts[path] = [5000] + [0] * 50
    with pytest.raises(DataError, match=r"fineweb_train_000000\.bin: cannot be fetched .*same command again"):
        get(1)
    server.cuts.clear()
    server.log.clear()
    assert set(contents(get(1))) == names("sp1024", 1, 2)
    assert [request.range[:11] for request in server.gets(path)] == ["bytes=5000-"]


@pytest.mark.parametrize(("size", "asked"), [(50_000, ["0"]), (41_024, ["0"]), (9_000, ["9000", "0"])])
def test_bad_part(server, get, files, size, asked):
    """What an earlier process left is too long, or is not what it should be."""
    path = f"{SP}/fineweb_train_000000.bin"
    server.cuts[path] = [5000] + [0] * 9
    with pytest.raises(DataError, match="cannot be fetched"):
        get(1)
    server.cuts.clear()
    server.log.clear()
    (part,) = get.folder.glob("data.unfinished/.fineweb_train_000000.bin.*.partial")
    part.write_bytes(b"?" * size)
    assert contents(get(1))["fineweb_train_000000.bin"] == files[path]
    assert [request.range[6:].partition("-")[0] for request in server.gets(path)] == asked


CHILD = """
import sys
from pgolf.data.hub import documents, fineweb
kind, endpoint, directory = sys.argv[1:]
if kind == "documents":
    documents(250, endpoint=endpoint, directory=directory)
else:
    fineweb("sp1024", 4, endpoint=endpoint, directory=directory)
"""


def killed_after(server: HubServer, kind: str, folder: Path, sent: int) -> None:
    """Run it in a process of its own, and kill that after so many bytes more."""
    server.sent, deadline = 0, time.monotonic() + 60
    child = subprocess.Popen([sys.executable, "-c", CHILD, kind, server.endpoint, folder], stdout=subprocess.DEVNULL)
    while server.sent < sent and time.monotonic() < deadline and child.poll() is None:
        time.sleep(0.002)
    assert child.poll() is None and server.sent >= sent
    child.kill()
    child.wait()


def test_killed(server, get):
    undisturbed = contents(get(4, name="undisturbed"))
    folder = get.folder / "data"
    server.log.clear()
    server.delay = 0.01
    for sent in (0.1, 0.2, 0.2, 0.15):
        killed_after(server, "shards", folder, int(sent * sum(map(len, undisturbed.values()))))
        assert not folder.exists()
        for path in folder.with_name("data.unfinished").glob("fineweb_*"):
            assert path.read_bytes() == undisturbed[path.name]
    server.delay = 0
    assert contents(get(4)) == undisturbed
    assert not folder.with_name("data.unfinished").exists()
    again = [request for request in server.gets() if request.range and not request.range.startswith("bytes=0-")]
    assert len(again) >= 2


class Killed(BaseException):
    pass


@pytest.mark.parametrize("begun", [0, 1])
def test_stopped_before_any_move(server, get, monkeypatch, begun):
    """A new folder, and one that gets more shards: wherever it stops, the same command ends with the same folder."""
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
        with contextlib.suppress(DataError):  # not there, or not as dataset.json lists
            assert len(Dataset.open(get.folder / f"{moves}").train_shards) in (begun, 4)
        assert contents(get(4, name=f"{moves}")) == undisturbed
    assert moves > 8


def test_changed_while_half_was_there(server, get, files):
    """Whole and partial files of an earlier commit are not taken for those of this one."""
    server.cuts[f"{SP}/fineweb_train_000001.bin"] = [5000] + [0] * 9
    with pytest.raises(DataError, match="cannot be fetched"):
        get()
    server.cuts.clear()
    swapped = {f"{SP}/fineweb_train_{i:06d}.bin": files[f"{SP}/fineweb_train_{1 - i:06d}.bin"] for i in (0, 1)}
    server.push(files | swapped)
    folder = get()
    for i in (0, 1):
        assert contents(folder)[f"fineweb_train_{i:06d}.bin"] == files[f"{SP}/fineweb_train_{1 - i:06d}.bin"]
    assert set(contents(folder)) == names("sp1024", 2, 2)


def test_fewer_shards_than_at_first(server, get, files):
    """What is there of an unfinished download of more shards does not come along."""
    server.cuts[f"{SP}/fineweb_train_000003.bin"] = [0] * 9
    with pytest.raises(DataError):
        get(4)
    assert set(contents(get(1))) == names("sp1024", 1, 2)


@pytest.mark.parametrize("damage", ["byte", "cut", "deleted", "tokenizer", "val", "unlisted"])
def test_damaged_folder_is_mended(server, get, damage):
    folder = get()
    before = contents(folder)
    name = {"tokenizer": "tokenizer.model", "val": "fineweb_val_000001.bin"}.get(damage, "fineweb_train_000001.bin")
    path = folder / name
    content = before[name]
    if damage == "unlisted":
        shutil.copy(path, folder / "fineweb_train_000002.bin")
    elif damage == "deleted":
        path.unlink()
    else:
        path.write_bytes(content[:-100] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    server.log.clear()
    get()
    if damage == "unlisted":
        assert set(contents(folder)) == names("sp1024", 3, 2) and Dataset.open(folder)
        name = "fineweb_train_000002.bin"
    else:
        assert contents(folder) == before
    assert [r.path for r in server.gets()][1:] == [
        "datasets/tokenizers/fineweb_1024_bpe.model" if damage == "tokenizer" else f"{SP}/{name}"
    ]


def test_corrupt_once(server, get, files):
    path = f"{SP}/fineweb_train_000000.bin"
    server.corrupt[path] = 1
    assert contents(get(1))["fineweb_train_000000.bin"] == files[path]
    assert len(server.gets(path)) == 2


def test_bar(server, get, monkeypatch, capsys):
    """Where there is a terminal: it counts every byte, those that come twice too, and not those of an earlier run."""
    bars = []

    def bar(total, name):
        bars.append(tqdm(total=total, desc=name, disable=False))
        return bars[-1]

    monkeypatch.setattr(hub, "progress", bar)
    server.cuts[f"{SP}/fineweb_train_000000.bin"] = [5000] + [0] * 9
    with pytest.raises(DataError):
        get(1)
    server.cuts.clear()
    server.corrupt[f"{SP}/fineweb_val_000000.bin"] = 1
    server.corrupt[f"{SP}/fineweb_train_000000.bin"] = 1
    get(1)
    size = 1024 + 2 * SHARD
    assert bars[0].total - bars[0].n == size - 5000
    assert bars[1].n == bars[1].total == size - 5000 + size
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize("path", [f"{SP}/fineweb_train_000000.bin", "datasets/manifest.json"])
def test_corrupt_always(server, get, path):
    server.corrupt[path] = math.inf
    with pytest.raises(DataError, match=rf"{Path(path).name}: came twice with another checksum than"):
        get(1)
    assert len(server.gets(path)) == 2
    assert not (get.folder / "data").exists()
    assert not list(get.folder.rglob("*train*"))


# What cannot be fetched


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"variant": "sp512"}, r"--variant sp512: is not published; there are byte260, sp1024$"),
        ({"variant": "../sp1024"}, r"--variant \.\./sp1024: this is no name of a variant"),
        ({"train_shards": 5}, r"--train-shards 5: sp1024 has 4 train shards$"),
        ({"train_shards": 0}, r"--train-shards 0: .* one shard at least"),
        ({"revision": "v9"}, r"--revision v9: willdepueoai/parameter-golf has no such branch, tag or commit"),
        ({"endpoint": "http://127.0.0.1:9"}, r"http://127\.0\.0\.1:9/.*manifest\.json: cannot be fetched .*refused"),
        ({"endpoint": "localhost"}, r"--endpoint localhost: is no address of a server; one begins with https://"),
        ({"endpoint": "http://[::1"}, r"--endpoint .* is no address of a server"),
    ],
)
def test_refused(get, told, message):
    start = time.monotonic()
    with pytest.raises(DataError, match=message):
        get(**told)
    assert time.monotonic() - start < 4
    assert not [path for path in get.folder.glob("*") if path.is_dir()]


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        (f"{SP}/fineweb_train_000001.bin", 0, r"fineweb_train_000001\.bin: there is no such file; name another --rev"),
        ("datasets/manifest.json", 0, r"manifest\.json: there is no such file"),
        ("datasets/manifest.json", 403, r"manifest\.json: .* not for you; `hf auth login`"),
        ("datasets/manifest.json", 401, r"manifest\.json: .* not for you; `hf auth login`"),
        ("datasets/manifest.json", 500, r"manifest\.json: cannot be fetched \(the answer is status 500\)"),
    ],
)
def test_not_given(server, get, files, path, status, message):
    if status:
        server.status[path] = status
    else:
        server.push({name: content for name, content in files.items() if name != path})
    with pytest.raises(DataError, match=message):
        get()
    assert not (get.folder / "data").exists()


def test_no_hub(server, get, monkeypatch):
    monkeypatch.setattr(download, "REPO", "some/other")
    with pytest.raises(DataError, match=r"some/other is not there, or not for you"):
        get()


def test_login_goes_to_the_hub_alone(server, get, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    get(1)
    assert {(request.host, request.token) for request in server.log} == {("hub", "Bearer hf_secret"), ("cdn", "")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, e: e["stats"].update(tokens_val=7999), "it says tokens_val 7999, and there it is 8000"),
        (lambda m, e: e["stats"].update(tokens_train=1), "it says tokens_train 1, and there it is 67000"),
        (lambda m, e: m.update(shard_size=30_000), "tokens in fineweb_train_000000.bin 30000, and there it is 20000"),
        (lambda m, e: e.update(vocab_size=512), "vocab_size of sp1024 512, and there it is 1024"),
        (lambda m, e: e.update(sha256={"fineweb_val_000000.bin": "0" * 64}), "it says sha256 0000"),
        (
            lambda m, e: e["stats"].update(files_train=5),
            "tokens in fineweb_train_000003.bin 20000, and there it is 7000",
        ),
        (lambda m, e: e["stats"].update(files_val=3), r"fineweb_val_000002\.bin: there is no such file"),
        (lambda m, e: e["stats"].pop("tokens_val"), r"is not as expected \(KeyError\('tokens_val'\)\)"),
        (lambda m, e: m.pop("tokenizers"), r"is not as expected \(KeyError\('tokenizers'\)\)"),
    ],
)
def test_stale_manifest(server, get, change, message):
    change_manifest(server, change)
    with pytest.raises(DataError, match=message):
        get(4)
    assert not (get.folder / "data").exists()
    assert not [request for request in server.gets() if "fineweb_train" in request.path]


def test_checksums_of_the_manifest(server, get, files):
    path = f"{SP}/fineweb_val_000000.bin"
    sha256 = {"fineweb_val_000000.bin": hashlib.sha256(files[path]).hexdigest()}
    change_manifest(server, lambda manifest, entry: entry.update(sha256=sha256))
    assert contents(get(1))["fineweb_val_000000.bin"] == files[path]


def test_other_folders(get):
    folder = get(1)
    for told, message in [
        ({"variant": "byte260"}, r"data: holds the published sp1024, not the published byte260; name another folder"),
        ({"revision": "v9"}, r"data: is of revision main \(commit [0-9a-f]{40}\), not v9; name another folder"),
    ]:
        with pytest.raises(DataError, match=message):
            get(1, **told)
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
    with pytest.raises(DataError, match=r"data: is there without dataset\.json; name another folder with --out"):
        get(1)


# A full disk


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 256 KiB, and how to change its size."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(*told):
        return subprocess.run(["mount", "-t", "tmpfs", *told, "none", disk], capture_output=True, check=False)

    if not sys.platform.startswith("linux") or mount("-o", "size=256k").returncode:
        pytest.skip("mounting a small disk needs Linux and root")
    yield disk, lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("checked", [True, False])
def test_full_disk(server, get, small_disk, monkeypatch, checked):
    disk, resize = small_disk
    undisturbed = contents(get(4))
    server.log.clear()
    with monkeypatch.context() as patched:
        if not checked:  # somebody else fills the disk meanwhile
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
    assert len(server.gets("datasets/tokenizers/fineweb_1024_bpe.model")) == checked  # whole before the disk was full


# Documents


def source_of(path: Path) -> dict:
    return json.loads(path.with_name(f"{path.name}.source.json").read_text())


@pytest.mark.parametrize("block", [1000, 2**20])
@pytest.mark.parametrize("count", [1, 17, 250, 300])
def test_first_documents(server, tmp_path, monkeypatch, count, block):
    monkeypatch.setattr(hub, "BLOCK", block)
    path = documents(count, endpoint=server.endpoint, directory=tmp_path)
    expected = b"".join(JSONL.splitlines(keepends=True)[:count])
    assert path.name == f"docs_selected.first{count}.jsonl" and path.read_bytes() == expected
    assert [json.loads(line)["text"] for line in path.open(encoding="utf-8")] == TEXTS[:count]
    told = source_of(path)
    assert (told["documents"], told["bytes"], told["commit"]) == (count, len(expected), server.commit)
    assert told["sha256"] == hashlib.sha256(expected).hexdigest()
    assert told["source_manifest"]["num_docs"] == 300
    if block == 1000 and count <= 17:
        assert server.sent < len(JSONL) / 4
    server.log.clear()
    documents(count, endpoint=server.endpoint, directory=tmp_path)
    assert not server.log


def test_documents_without_a_last_newline(server, tmp_path, files):
    content = JSONL.rstrip(b"\n")
    told = {"num_docs": 300, "docs_bytes": len(content), "docs_sha256": hashlib.sha256(content).hexdigest()}
    changed = {"datasets/docs_selected.source_manifest.json": json.dumps(told).encode()}
    server.push(files | changed | {"datasets/docs_selected.jsonl": content})
    assert documents(300, endpoint=server.endpoint, directory=tmp_path).read_bytes() == content


def test_all_documents(server, tmp_path):
    server.cuts["datasets/docs_selected.jsonl"] = [4096, 0, 8192]
    path = documents(endpoint=server.endpoint, directory=tmp_path)
    assert path.name == "docs_selected.jsonl" and path.read_bytes() == JSONL
    assert source_of(path)["documents"] == 300
    server.log.clear()
    documents(endpoint="http://127.0.0.1:9", directory=tmp_path)
    path.write_bytes(JSONL[:-2] + b"?\n")
    documents(endpoint=server.endpoint, directory=tmp_path)
    assert path.read_bytes() == JSONL
    assert len(server.gets("datasets/docs_selected.jsonl")) == 1


def test_killed_documents(server, tmp_path):
    server.delay = 0.01
    for _ in range(3):
        killed_after(server, "documents", tmp_path, 40_000)
        assert not [path for path in tmp_path.iterdir() if path.suffix in (".jsonl", ".json")]
    server.delay = 0
    path = documents(250, endpoint=server.endpoint, directory=tmp_path)
    assert path.read_bytes() == b"".join(JSONL.splitlines(keepends=True)[:250])
    begun = [int(r.range[6:].partition("-")[0]) for r in server.gets("datasets/docs_selected.jsonl")]
    assert begun == sorted(begun) and len(set(begun)) == 4
    assert {p.name for p in tmp_path.iterdir()} == {path.name, f"{path.name}.lock", f"{path.name}.source.json"}


def test_documents_killed_at_the_very_end(server, tmp_path, monkeypatch):
    """All of them are there, but nothing says so yet."""

    def killed(*_):
        raise Killed

    for count in (0, 20):
        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(hub, "atomic_write", killed)
            documents(count, endpoint=server.endpoint, directory=tmp_path)
        server.log.clear()
        path = documents(count, endpoint=server.endpoint, directory=tmp_path)
        assert path.read_bytes() == b"".join(JSONL.splitlines(keepends=True)[: count or None])
        assert source_of(path)["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert len(server.gets("datasets/docs_selected.jsonl")) == bool(count)


def test_documents_of_a_later_commit(server, tmp_path, files):
    """A part of other documents is not gone on with, and does not stay."""
    name = "datasets/docs_selected.jsonl"
    server.cuts[name] = [5000] + [0] * 9
    with pytest.raises(DataError, match="cannot be fetched"):
        documents(endpoint=server.endpoint, directory=tmp_path)
    server.cuts.clear()
    content = JSONL[::-1]
    told = {"num_docs": 300, "docs_bytes": len(content), "docs_sha256": hashlib.sha256(content).hexdigest()}
    server.push(files | {"datasets/docs_selected.source_manifest.json": json.dumps(told).encode(), name: content})
    assert documents(endpoint=server.endpoint, directory=tmp_path).read_bytes() == content
    assert not list(tmp_path.glob(".*partial"))


def test_documents_refused(server, tmp_path, files):
    for count, message in [(301, "documents=301: there are 300"), (-1, "documents=-1: choose a number")]:
        with pytest.raises(DataError, match=message):
            documents(count, endpoint=server.endpoint, directory=tmp_path)
    sidecar = "datasets/docs_selected.source_manifest.json"
    for key, value in [("docs_sha256", "0" * 64), ("docs_bytes", 5), ("num_docs", "many")]:
        told = json.loads(files[sidecar]) | {key: value}
        server.push(files | {sidecar: json.dumps(told).encode()})
        with pytest.raises(DataError, match=r"does not belong to the files|is not as expected"):
            documents(endpoint=server.endpoint, directory=tmp_path)
    assert not list(tmp_path.glob("*.jsonl"))


def test_documents_that_are_no_documents(server, tmp_path, files):
    content = b"<html>\n" * (len(JSONL) // 7)
    told = {"num_docs": 300, "docs_bytes": len(content), "docs_sha256": hashlib.sha256(content).hexdigest()}
    changed = {"datasets/docs_selected.source_manifest.json": json.dumps(told).encode()}
    server.push(files | changed | {"datasets/docs_selected.jsonl": content})
    with pytest.raises(DataError, match="does not begin with 3 documents of JSON"):
        documents(3, endpoint=server.endpoint, directory=tmp_path)
    assert not list(tmp_path.glob("*.jsonl*json")) and not list(tmp_path.glob(".*partial"))
