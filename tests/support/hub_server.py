"""A small publication, and a loopback server with the part of the Hugging Face hub's protocol that pgolf.data.hub uses.

Like the hub, it answers for a large (LFS) file with a redirect to another host, here another port, and for a small one
with a redirect on the same host. Faults are set on the server: see HubServer.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote

import numpy as np
from support.shards import write_shard

from pgolf.data.hub import DOCUMENTS, DOCUMENTS_ABOUT
from pgolf.data.tokenizers import Bytes

MODEL = Path(__file__).parents[1] / "golden" / "trace" / "sp1024.model"
SHARD = 20_000  # tokens
TEXTS = [f"document {i}: naïve 日本語 👩‍👩‍👧‍👦 " + "word " * (i * 37 % 400) for i in range(300)]
JSONL = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS).encode()
REPO = "willdepueoai/parameter-golf"
CHUNK = 4096  # bytes sent at a time
LARGE = (".bin", ".jsonl", ".model")


def published(folder: Path) -> dict[str, bytes]:
    """A small repository like the published one: two variants and the documents."""
    files = {
        "datasets/tokenizers/fineweb_1024_bpe.model": MODEL.read_bytes(),
        "datasets/tokenizers/fineweb_pure_byte_260.json": Bytes().to_json().encode(),
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
    return files | published_documents(JSONL)


def published_documents(content: bytes) -> dict[str, bytes]:
    about = {"num_docs": len(TEXTS), "docs_bytes": len(content), "docs_sha256": hashlib.sha256(content).hexdigest()}
    return {DOCUMENTS_ABOUT: json.dumps(about).encode(), DOCUMENTS: content}


@dataclass(frozen=True)
class Request:
    method: str
    path: str  # inside the repository; of the API: "revision", "paths-info"
    range: str  # header; "" without one
    host: str  # "hub" or "cdn"
    token: str
    kind: str  # kind of URL: "cdn" and "api/resolve-cache/datasets" answer with content


class HubServer:
    """Serves `files` (path -> content) as commit `commit` of branch main; a context manager.

    cuts: path -> byte counts; each answer takes the next and closes the connection after so many bytes.
    corrupt: path -> number of answers with a wrong byte. status: path or "revision" -> status of the answer.
    delay: seconds before every CHUNK bytes. log: the requests. sent: bytes of bodies.
    """

    def __init__(self, files: dict[str, bytes]):
        self.commits: dict[str, dict[str, bytes]] = {}
        self.cuts: dict[str, list[int]] = {}
        self.corrupt: dict[str, float] = {}
        self.status: dict[str, int] = {}
        self.delay, self.sent = 0.0, 0
        self.log: list[Request] = []
        self.lock = threading.Lock()
        self.push(files)

    def push(self, files: dict[str, bytes]) -> str:
        """Make the files a new commit of main."""
        self.files = dict(files)
        self.commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[self.commit] = self.files
        return self.commit

    def __enter__(self) -> HubServer:
        self.hub, self.cdn = (self._start(name) for name in ("hub", "cdn"))
        self.endpoint = f"http://127.0.0.1:{self.hub.server_port}"
        return self

    def __exit__(self, *_: object) -> None:
        for server in (self.hub, self.cdn):
            server.shutdown()
            server.server_close()

    def _start(self, name: str) -> ThreadingHTTPServer:
        server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self, "host": name}))
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return server

    def gets(self, path: str = "") -> list[Request]:
        """GET requests that were answered with content, of one file or of all."""
        gets = [r for r in self.log if r.method == "GET" and r.kind in ("cdn", "api/resolve-cache/datasets")]
        return [request for request in gets if path in ("", request.path)]


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """Ignore clients that were killed."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: HubServer
    host: str

    def do_HEAD(self) -> None:
        hub, url = self.hub, unquote(self.path).partition("?")[0]
        pattern = r"/(datasets|api/resolve-cache/datasets|api/datasets|cdn)/(\w[\w-]*/[\w-]+)/(.+)"
        kind, repo, rest = re.fullmatch(pattern, url).groups()
        if kind == "api/datasets":
            path, revision = rest.split("/")
        else:
            revision, path = rest.removeprefix("resolve/").split("/", 1)
        headers = (self.headers.get("Range", ""), self.host, self.headers.get("Authorization", ""))
        hub.log.append(Request(self.command, path, *headers, kind))
        commit = hub.commit if revision == "main" else revision
        if repo != REPO:
            return self.refuse(401, "RepoNotFound")
        if commit not in hub.commits:
            return self.refuse(404, "RevisionNotFound")
        if path in hub.status:
            return self.refuse(hub.status[path], "GatedRepo" if hub.status[path] == 403 else "")
        if kind == "api/datasets":
            return self.answer_api(path, commit)
        if path not in hub.commits[commit]:
            return self.refuse(404, "EntryNotFound")
        content = hub.commits[commit][path]
        if kind == "cdn":
            return self.send(path, content, {"ETag": '"of the cdn"'})
        headers = {"X-Repo-Commit": commit}
        if path.endswith(LARGE):
            headers |= {"X-Linked-Size": len(content), "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"'}
            return self.redirect(302, f"http://127.0.0.1:{hub.cdn.server_port}/cdn/{repo}/{commit}/{path}", headers)
        if kind == "datasets":
            return self.redirect(307, f"/api/resolve-cache/datasets/{repo}/{commit}/{path}", headers)
        return self.send(path, content, headers | {"ETag": f'W/"{_git(content)}"'})

    do_GET = do_POST = do_HEAD

    def answer_api(self, name: str, commit: str) -> None:
        if name == "revision":
            answer = {"id": REPO, "sha": commit}
        else:
            query = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
            files, answer = self.hub.commits[commit], []
            for path in query["paths"]:
                if content := files.get(path):
                    answer.append({"type": "file", "path": path, "size": len(content), "oid": _git(content)})
                    if path.endswith(LARGE):
                        lfs = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
                        answer[-1]["lfs"] = lfs
        self.send(name, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def send(self, path: str, content: bytes, headers: dict) -> None:
        hub, asked = self.hub, re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        begin, end = 0, len(content)
        if asked:
            begin, end = int(asked[1]), min(end, int(asked[2] or end) + 1)
        if asked and begin >= len(content):
            return self.refuse(416, "")
        cut = math.inf
        with hub.lock:
            if self.command == "GET" and hub.cuts.get(path):
                cut = hub.cuts[path].pop(0)
            if self.command == "GET" and hub.corrupt.get(path, 0) > 0:
                hub.corrupt[path] -= 1
                middle = (begin + end) // 2
                content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        self.send_response(206 if asked else 200)
        headers |= {"Content-Length": end - begin, "Accept-Ranges": "bytes"}
        self.send_all(headers | ({"Content-Range": f"bytes {begin}-{end - 1}/{len(content)}"} if asked else {}))
        if self.command == "HEAD":
            return None
        stop = min(end, begin + cut)
        for i in range(begin, stop, CHUNK):
            time.sleep(hub.delay)
            chunk = content[i : min(i + CHUNK, stop)]
            try:
                self.wfile.write(chunk)
            except OSError:  # the client was killed
                self.close_connection = True
                return None
            with hub.lock:
                hub.sent += len(chunk)
        self.close_connection = self.close_connection or stop < end
        return None

    def redirect(self, status: int, location: str, headers: dict) -> None:
        self.send_response(status)
        self.send_all({"Location": quote(location, safe="/:"), "Content-Length": 0} | headers)

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_all({"Content-Length": 0} | ({"X-Error-Code": code} if code else {}))

    def send_all(self, headers: dict) -> None:
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def _git(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
