"""A Hugging Face Hub of a few datasets on a local port: enough HTTP to list, resolve and read by ranges.

Written from the requests huggingface_hub and datasets make (`log` keeps them); faults are injected through `faults`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """`with FakeHub("owner/name", {"README.md": b"..."}) as hub:` serves at `hub.endpoint` (HF_ENDPOINT)."""

    def __init__(self, repo: str, files: dict[str, bytes]):
        self.repos: dict[str, dict[str, bytes] | None] = {repo: files}  # None: gated
        self.log: list[tuple[str, str, str | None]] = []  # method, path, Range header
        # One per coming read of a data range: "429", "429 wait" (with Retry-After), "429 limit" (with RateLimit),
        # "503", "403" (an address that has run out), "reset", "truncate", "short" (and says so), "stall" (longer than
        # the client waits), "".
        self.faults: list[str] = []
        self.resolve_faults: list[str] = []  # the same for questions where a Parquet file lies
        self.stall_sec = 2.5
        self.sent_bytes = 0

    def __enter__(self) -> FakeHub:
        hub = self

        class Handler(_Handler):
            state = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.thread.start()
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.state.log.append((self.command, path, self.headers.get("Range")))
        match = re.fullmatch(r"/(api/datasets|datasets|cdn)/([^/]+/[^/]+)(?:/(.*))?", path)
        if not match or match[2] not in self.state.repos:
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        where, self.repo, rest = match[1], match[2], match[3] or "revision/main"
        files = self.state.repos[self.repo]
        if files is None:
            return self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        self.files = files
        if where == "cdn":
            return self._range(rest)
        what, revision, name = (*rest.split("/", 2), "")[:3]
        return self._file(revision, name) if where == "datasets" else self._api(what, revision, name)

    def _api(self, what: str, revision: str, folder: str) -> None:
        if revision not in ("main", COMMIT):
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if what == "revision":
            siblings = [{"rfilename": name} for name in self.files]
            answer: object = {"id": self.repo, "sha": COMMIT, "siblings": siblings, "private": False}
        elif what == "tree":
            answer = [entry for entry in self._entries() if entry["path"].startswith(folder and folder + "/")]
            if not answer:
                return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        else:
            text = self.body.decode()
            asked = json.loads(text)["paths"] if text.startswith("{") else re.findall(r"paths=([^&]*)", unquote(text))
            answer = [entry for entry in self._entries() if entry["path"] in asked]
        return self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _entries(self) -> list[dict[str, Any]]:
        folders = {name.rsplit("/", i)[0] for name in self.files for i in range(1, name.count("/") + 1)}
        listed: list[dict[str, Any]] = [
            {"type": "directory", "path": name, "oid": "0" * 40} for name in sorted(folders)
        ]
        for name, data in self.files.items():
            listed.append({"type": "file", "path": name, "oid": hashlib.sha1(data).hexdigest(), "size": len(data)})
        return listed

    def _file(self, revision: str, name: str) -> None:
        """The Hub tells where the bytes lie; small files are fetched from here by some of its clients."""
        data = self.files.get(name)
        if data is None or revision not in ("main", COMMIT):
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if name.endswith(".parquet"):
            if self._failed(self.state.resolve_faults)[:3].isdecimal():
                return None
            headers |= {"X-Linked-Size": str(len(data)), "Location": f"{self.state.endpoint}/cdn/{self.repo}/{name}"}
            return self._send(302, b"", headers)
        return self._send(200, data, headers)

    def _range(self, name: str) -> None:
        data = self.files[name]
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not span:
            return self._send(200, data)
        fault = self._failed(self.state.faults)
        if fault[:3].isdecimal():
            return None
        start, last = int(span[1]), min(int(span[2] or len(data)), len(data) - 1)
        sent = data[start : last + 1]
        sent = sent[: len(sent) // 2] if fault == "short" else sent
        return self._send(206, sent, {"Content-Range": f"bytes {start}-{last}/{len(data)}"}, fault)

    def _failed(self, faults: list[str]) -> str:
        """The next fault; one that is a status has been answered."""
        fault = faults.pop(0) if faults else ""
        asks = {"wait": {"Retry-After": "1"}, "limit": {"RateLimit": '"resolvers";r=0;t=2'}}
        if fault[:3].isdecimal():
            self._send(int(fault[:3]), b"busy", asks.get(fault[4:]))
        elif fault == "stall":
            time.sleep(self.state.stall_sec)
        return fault

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None, fault: str = "") -> None:
        if fault == "reset":
            self.close_connection = True
            return
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            sent = body[: len(body) // 2] if fault == "truncate" else body
            with contextlib.suppress(ConnectionError):  # whoever asked lost patience
                self.wfile.write(sent)
            self.state.sent_bytes += len(sent)
            self.close_connection = fault == "truncate"
