"""A small publication, and a loopback server with the part of the Hugging Face hub's protocol that pgolf uses.

Like the hub, it answers for a large (LFS) file with a redirect to another host, here another port. Faults are set on
the server: see HubServer.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import threading
import time
from base64 import b64decode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, quote, unquote

import numpy as np
import yaml
from support.shards import write_shard

from pgolf.data.download import REPO
from pgolf.data.hub import DOCUMENTS, DOCUMENTS_ABOUT
from pgolf.data.tokenizers import Bytes

MODEL = Path(__file__).parents[1] / "golden" / "trace" / "sp1024.model"
SHARD = 20_000  # tokens
TEXTS = [f"document {i}: naïve 日本語 👩‍👩‍👧‍👦 " + "word " * (i * 37 % 400) for i in range(300)]
JSONL = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS).encode()
CHUNK = 4096  # bytes sent at a time
LARGE = (".bin", ".jsonl", ".model")
VARIANTS = {  # vocab_size, tokenizer, tokens of each shard
    "sp1024": (1024, "fineweb_1024_bpe.model", {"train": [SHARD] * 3 + [7_000], "val": [SHARD // 4, 3_000]}),
    "byte260": (260, "fineweb_pure_byte_260.json", {"train": [500], "val": [400]}),
}


def published(folder: Path) -> dict[str, bytes]:
    """A small repository like the published one: two variants and the documents."""
    contents = MODEL.read_bytes(), Bytes().to_json().encode()
    random, files, datasets, tokenizers = np.random.default_rng(0), {}, [], []
    for content, (variant, (vocab_size, file, shards)) in zip(contents, VARIANTS.items(), strict=True):
        stats = {"docs_val": 2, "docs_train": 290}
        for split, sizes in shards.items():
            stats[f"files_{split}"] = len(sizes)
            for i, tokens in enumerate(sizes):
                name = f"fineweb_{split}_{i:06d}.bin"
                path = write_shard(folder / name, [1, *random.integers(4, vocab_size, tokens - 1)])
                files[f"datasets/datasets/fineweb10B_{variant}/{name}"] = path.read_bytes()
        names = {"name": f"fineweb10B_{variant}", "path": f"datasets/fineweb10B_{variant}", "tokenizer_name": variant}
        datasets.append(names | {"stats": stats})
        tokenizers.append({"name": variant, "path" if variant == "byte260" else "model_path": f"tokenizers/{file}"})
        files[f"datasets/tokenizers/{file}"] = content
    files["datasets/manifest.json"] = json.dumps({"tokenizers": tokenizers, "datasets": datasets}).encode()
    return files | published_documents(JSONL)


def published_documents(content: bytes) -> dict[str, bytes]:
    about = {"num_docs": len(TEXTS), "docs_bytes": len(content)}
    return {DOCUMENTS_ABOUT: json.dumps(about).encode(), DOCUMENTS: content}


class Request(NamedTuple):
    kind: str  # of URL: "api/datasets", "datasets", "cdn"
    path: str  # inside the repository; of the API: "revision", "paths-info"
    host: str  # "hub" or "cdn"
    range: str  # header; "" without one
    token: str


class HubServer:
    """Serves `files` (path -> content) as commit `commit` of branch main; a context manager.

    cuts: path -> byte counts; each answer takes the next and closes the connection after so many bytes.
    corrupt: path -> number of answers with a wrong byte. status: path or "revision" -> status of the answer.
    delay: seconds before every CHUNK bytes. log: the requests. sent: bytes of bodies.

    models: repository -> its files, written by clients that send the token "good". private: those created so.
    commit_messages: of all commits to models, in order.
    """

    def __init__(self, files: dict[str, bytes]):
        self.commits: dict[str, dict[str, bytes]] = {}
        self.cuts: dict[str, list[int]] = {}
        self.corrupt: dict[str, float] = {}
        self.status: dict[str, int] = {}
        self.delay, self.sent = 0.0, 0
        self.models: dict[str, dict[str, bytes]] = {}
        self.large: dict[str, bytes] = {}  # sha256 -> content of an upload
        self.private: set[str] = set()
        self.commit_messages: list[str] = []
        self.log: list[Request] = []
        self.lock = threading.Lock()
        self.push(files)

    def push(self, files: dict[str, bytes]) -> None:
        """Make the files a new commit of main."""
        self.files = dict(files)
        self.commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[self.commit] = self.files

    def __enter__(self) -> HubServer:
        self.servers = [
            ThreadingHTTPServer(("127.0.0.1", 0), type("", (_Handler,), {"hub": self, "host": host}))
            for host in ("hub", "cdn")
        ]
        for server in self.servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        self.endpoint, self.cdn = (f"http://127.0.0.1:{server.server_port}" for server in self.servers)
        return self

    def __exit__(self, *_: object) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def gets(self, path: str = "") -> list[Request]:
        """Requests that were answered with content, of one file or of all."""
        gets = [r for r in self.log if r.kind == ("cdn" if r.path.endswith(LARGE) else "datasets")]
        return [request for request in gets if path in ("", request.path)]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: HubServer
    host: str

    def do_GET(self) -> None:
        hub, url = self.hub, unquote(self.path).partition("?")[0]
        kind, repo, rest = re.fullmatch(r"/(datasets|api/datasets|cdn)/(\w[\w-]*/[\w-]+)/(.+)", url).groups()
        first, _, second = rest.removeprefix("resolve/").partition("/")
        path, revision = (first, second) if kind == "api/datasets" else (second, first)
        given = (self.headers.get(name, "") for name in ("Range", "Authorization"))
        hub.log.append(Request(kind, path, self.host, *given))
        commit = hub.commit if revision == "main" else revision
        if repo != REPO:
            self.answer(401, {"X-Error-Code": "RepoNotFound"})
        elif commit not in hub.commits:
            self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        elif path in hub.status:
            self.answer(hub.status[path], {"X-Error-Code": "GatedRepo"} if hub.status[path] == 403 else {})
        elif path == "revision":
            self.send(path, json.dumps({"id": REPO, "sha": commit}).encode())
        elif path == "paths-info":
            query = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
            known = [path for path in query["paths"] if path in hub.commits[commit]]
            self.send(path, json.dumps([_info(path, hub.commits[commit][path]) for path in known]).encode())
        elif kind == "datasets" and path.endswith(LARGE):
            self.answer(302, {"Location": f"{hub.cdn}/cdn/{repo}/{commit}/{quote(path)}"})
        else:
            self.send(path, hub.commits[commit][path])

    def do_POST(self) -> None:
        hub, url = self.hub, unquote(self.path).partition("?")[0]
        if "datasets" in url:
            self.do_GET()
            return
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != "Bearer good":
            self.answer(401, {})
        elif url == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            answer = {"url": f"{hub.endpoint}/{repo}", "id": repo}
            known = repo in hub.models
            hub.models.setdefault(repo, {})
            hub.private |= {repo} if asked.get("visibility") == "private" or asked.get("private") else set()
            self.reply(answer, 409 if known else 200)
        elif url == "/api/validate-yaml":
            front = json.loads(body)["content"].split("---")[1]
            self.reply({"errors": [] if isinstance(yaml.safe_load(front), dict) else [{"message": "no mapping"}]})
        elif found := re.fullmatch(r"/api/models/(.+)/preupload/main", url):
            modes = {True: "lfs", False: "regular"}
            paths = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": p, "uploadMode": modes[p.endswith(".pgolf")], "shouldIgnore": False} for p in paths]
            self.reply({"files": files})
        elif found := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", url):
            objects = json.loads(body)["objects"]
            to = {o["oid"]: {"upload": {"href": f"{hub.cdn}/upload/{o['oid']}"}} for o in objects}
            self.reply({"transfer": "basic", "objects": [o | {"actions": to[o["oid"]]} for o in objects]})
        elif found := re.fullmatch(r"/api/models/(.+)/commit/main", url):
            self.commit(found[1], [json.loads(line) for line in body.splitlines()])
        else:
            self.answer(404, {})

    def commit(self, repo: str, lines: list[dict]) -> None:
        """Take a commit of regular and of uploaded files."""
        for line in lines:
            own = line["value"]
            if line["key"] == "header":
                self.hub.commit_messages.append(own["summary"])
            elif line["key"] == "file":
                self.hub.models[repo][own["path"]] = b64decode(own["content"])
            else:
                self.hub.models[repo][own["path"]] = self.hub.large[own["oid"]]
        oid = hashlib.sha1(repr(sorted(self.hub.models[repo].items())).encode()).hexdigest()
        self.reply({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{repo}/commit/{oid}"})

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.large[hashlib.sha256(content).hexdigest()] = content
        self.answer(200, {})

    def reply(self, content: dict, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.answer(status, {"Content-Type": "application/json"}, len(body))
        self.wfile.write(body)

    def send(self, path: str, content: bytes) -> None:
        """Answer with the range of the content that was asked for, and with the faults that were set for the path."""
        hub, asked = self.hub, re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        begin, end = (int(asked[1]), min(len(content), int(asked[2]) + 1)) if asked else (0, len(content))
        with hub.lock:
            cut = hub.cuts[path].pop(0) if hub.cuts.get(path) else math.inf
            if hub.corrupt.get(path, 0) > 0:
                hub.corrupt[path] -= 1
                middle = (begin + end) // 2
                content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        self.answer(206 if asked else 200, {"Content-Range": f"bytes {begin}-{end - 1}/{len(content)}"}, end - begin)
        stop = min(end, begin + cut)
        for i in range(begin, stop, CHUNK):
            time.sleep(hub.delay)
            chunk = content[i : min(i + CHUNK, stop)]
            self.wfile.write(chunk)
            with hub.lock:
                hub.sent += len(chunk)
        self.close_connection = self.close_connection or stop < end

    def answer(self, status: int, headers: dict[str, str], length: int = 0) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(length)}).items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def _info(path: str, content: bytes) -> dict:
    """The API's answer for a file."""
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    lfs = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    info = {"type": "file", "path": path, "size": len(content), "oid": oid}
    return info | {"lfs": lfs} if path.endswith(LARGE) else info
