"""A server on this machine that speaks as much of the Hugging Face hub's protocol as pgolf.data.hub uses.

Like the hub it answers for a large (LFS) file with a redirect to another host, here another port, and for a small one
with a redirect on the same host. What is to go wrong is set on the server: see HubServer.
"""

from __future__ import annotations

import hashlib
import math
import re
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote, unquote

REPO = "willdepueoai/parameter-golf"
PIECE = 4096  # bytes sent at a time
LARGE = (".bin", ".jsonl", ".model")


@dataclass(frozen=True)
class Request:
    method: str
    path: str  # inside the repository
    range: str  # of the header, '' where there is none
    host: str  # 'hub' or 'cdn'
    token: str


class HubServer:
    """Serves `files` (path -> content) as commit `commit` of branch main; a context manager.

    cuts: path -> byte counts; each answer takes the next and closes the connection after so many bytes.
    corrupt: path -> how many answers have a wrong byte in them. status: path -> status of the answer.
    delay: seconds before every PIECE bytes. ranges: whether Range is heeded. log: the requests. sent: bytes of bodies.
    """

    def __init__(self, files: dict[str, bytes]):
        self.commits: dict[str, dict[str, bytes]] = {}
        self.cuts: dict[str, list[int]] = {}
        self.corrupt: dict[str, float] = {}
        self.status: dict[str, int] = {}
        self.delay, self.ranges = 0.0, True
        self.log: list[Request] = []
        self.sent = 0
        self.lock = threading.Lock()
        self.push(files)

    def push(self, files: dict[str, bytes]) -> str:
        """Make them a new commit of main."""
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
        handler = type("Handler", (_Handler,), {"hub": self, "host": name})
        server = _Server(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return server

    def gets(self, path: str = "") -> list[Request]:
        """GETs that were answered with content, of one file or of all."""
        small = [r for r in self.log if r.host == "hub" and r.method == "GET" and not r.path.endswith(LARGE)]
        large = [r for r in self.log if r.host == "cdn" and r.method == "GET"]
        return [request for request in small + large if path in ("", request.path)]


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """A client that was killed is no error."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: HubServer
    host: str

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        hub, url = self.hub, unquote(self.path)
        match = re.fullmatch(r"/(datasets|api/resolve-cache/datasets|cdn)/(.+?/.+?)/(?:resolve/)?([^/]+)/(.+)", url)
        kind, repo, revision, path = match.groups() if match else ("", "", "", url)
        if kind != "api/resolve-cache/datasets":
            told = (self.headers.get("Range", ""), self.host, self.headers.get("Authorization", ""))
            hub.log.append(Request(self.command, path, *told))
        commit = hub.commit if revision == "main" else revision
        if repo != REPO:
            return self.refuse(401, "RepoNotFound")
        if commit not in hub.commits:
            return self.refuse(404, "RevisionNotFound")
        if path not in hub.commits[commit]:
            return self.refuse(404, "EntryNotFound")
        if path in hub.status:
            return self.refuse(hub.status[path], "GatedRepo" if hub.status[path] == 403 else "")
        content = hub.commits[commit][path]
        if kind == "cdn":
            return self.send(path, content, {"ETag": '"of the cdn"'})
        told = {"X-Repo-Commit": commit}
        if path.endswith(LARGE):
            told |= {"X-Linked-Size": len(content), "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"'}
            return self.redirect(302, f"http://127.0.0.1:{hub.cdn.server_port}/cdn/{repo}/{commit}/{path}", told)
        if kind == "datasets":
            return self.redirect(307, f"/api/resolve-cache/datasets/{repo}/{commit}/{path}", told)
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return self.send(path, content, told | {"ETag": f'W/"{git}"'})

    def send(self, path: str, content: bytes, headers: dict) -> None:
        hub = self.hub
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if hub.ranges else None
        begin, end = (
            (int(asked[1]), min(len(content), int(asked[2] or len(content)) + 1)) if asked else (0, len(content))
        )
        if asked and begin >= len(content):
            return self.refuse(416, "")
        with hub.lock:
            cut = math.inf
            if self.command == "GET":
                cut = hub.cuts[path].pop(0) if hub.cuts.get(path) else math.inf
                if hub.corrupt.get(path, 0) > 0:
                    hub.corrupt[path] -= 1
                    middle = (begin + end) // 2
                    content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        self.send_response(206 if asked else 200)
        headers |= {"Content-Length": end - begin, "Accept-Ranges": "bytes"}
        if asked:
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(content)}"
        self.send_told(headers)
        if self.command == "HEAD":
            return None
        stop = min(end, begin + cut)
        for i in range(begin, stop, PIECE):
            time.sleep(hub.delay)
            piece = content[i : min(i + PIECE, stop)]
            try:
                self.wfile.write(piece)
            except OSError:  # the client was killed
                self.close_connection = True
                return None
            with hub.lock:
                hub.sent += len(piece)
        self.close_connection = self.close_connection or stop < end
        return None

    def redirect(self, status: int, location: str, headers: dict) -> None:
        self.send_response(status)
        self.send_told({"Location": quote(location, safe="/:"), "Content-Length": 0} | headers)

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_told({"Content-Length": 0} | ({"X-Error-Code": code} if code else {}))

    def send_told(self, headers: dict) -> None:
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass
