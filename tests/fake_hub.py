"""A Hugging Face Hub of one dataset on a local port: enough of its HTTP interface to list, resolve and read by ranges.

Written from the requests huggingface_hub and datasets make (`log` keeps them); faults are injected through `faults`.
"""

from __future__ import annotations

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
        self.repo, self.files = repo, files
        self.log: list[tuple[str, str, str | None]] = []  # method, path, Range header
        # One per coming read of a data range: "429", "429 wait" (with Retry-After), "503", "403" (an address that has
        # run out), "reset", "truncate", "stall" (longer than the client's patience), "" (none).
        self.faults: list[str] = []
        self.stall_sec = 1.5
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
        repo = re.escape(self.state.repo)
        if match := re.fullmatch(rf"/datasets/{repo}/resolve/([^/]+)/(.*)", path):
            self._file(match[1], match[2])
        elif match := re.fullmatch(r"/cdn/(.*)", path):
            self._range(match[1])
        elif match := re.fullmatch(rf"/api/datasets/{repo}(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?", path):
            self._api(match[1] or "revision", match[2] or "main", match[3] or "")
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _api(self, what: str, revision: str, folder: str) -> None:
        if revision not in ("main", COMMIT):
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if what == "revision":
            siblings = [{"rfilename": name} for name in self.state.files]
            answer: object = {"id": self.state.repo, "sha": COMMIT, "siblings": siblings, "private": False}
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
        folders = {name.rsplit("/", i)[0] for name in self.state.files for i in range(1, name.count("/") + 1)}
        listed: list[dict[str, Any]] = [
            {"type": "directory", "path": name, "oid": "0" * 40} for name in sorted(folders)
        ]
        for name, data in self.state.files.items():
            listed.append({"type": "file", "path": name, "oid": hashlib.sha1(data).hexdigest(), "size": len(data)})
        return listed

    def _file(self, revision: str, name: str) -> None:
        """The Hub tells where the bytes lie; small files are fetched from here by some of its clients."""
        data = self.state.files.get(name)
        if data is None or revision not in ("main", COMMIT):
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if name.endswith(".parquet"):
            headers |= {"X-Linked-Size": str(len(data)), "Location": f"{self.state.endpoint}/cdn/{name}"}
            return self._send(302, b"", headers)
        return self._send(200, data, headers)

    def _range(self, name: str) -> None:
        data = self.state.files[name]
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not span:
            return self._send(200, data)
        fault = self.state.faults.pop(0) if self.state.faults else ""
        if fault[:3] in ("429", "503", "403"):
            return self._send(int(fault[:3]), b"busy", {"Retry-After": "1"} if "wait" in fault else None)
        if fault == "stall":
            time.sleep(self.state.stall_sec)
        start, last = int(span[1]), min(int(span[2] or len(data)), len(data) - 1)
        return self._send(206, data[start : last + 1], {"Content-Range": f"bytes {start}-{last}/{len(data)}"}, fault)

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
            self.wfile.write(sent)
            self.state.sent_bytes += len(sent)
            self.close_connection = fault == "truncate"
