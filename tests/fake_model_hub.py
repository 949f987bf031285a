"""A Hugging Face Hub of model repositories on a local port: enough HTTP to make one, commit to it and read it back.

Written from the requests that huggingface_hub makes (`log` keeps them). A commit is checked against its parent and
applied whole or not at all. `faults` are answers to come: see `Fault`.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http

import checkpoint
import hub
from pusher import Pusher

TOKEN = "hf_" + "CanaryCanaryCanary" * 2  # what it accepts; the tests look for it where it must not be
NAME = "me/model"
RUN = "run-1"


@dataclass
class Fault:
    """What becomes of the next `times` requests whose "METHOD /path" the pattern is found in.

    kind: a status, with "wait" behind it for a Retry-After of 7 seconds; "reset": the connection is closed before
    anything is done; "lost": after all is done, but without an answer; "lost 500": the same with that answer; "half":
    half of the body, then the connection is closed; "stall": silence for `stall_sec`, then closed; "page": a web page.
    """

    pattern: str
    kind: str
    times: int = 1


@dataclass
class Commit:
    sha: str
    title: str
    files: dict[str, bytes]  # the whole tree


@dataclass
class Repo:
    private: bool
    commits: list[Commit] = field(default_factory=list)  # oldest first
    blobs: dict[str, bytes] = field(default_factory=dict)  # uploaded, by SHA-256

    def commit(self, title: str, files: dict[str, bytes]) -> Commit:
        content = f"{len(self.commits)} {title} {sorted(files)} {time.time_ns()}"
        made = Commit(hashlib.sha1(content.encode()).hexdigest(), title, files)
        self.commits.append(made)
        return made

    @property
    def head(self) -> Commit:
        return self.commits[-1]

    def at(self, revision: str) -> Commit | None:
        if revision == "main":
            return self.head
        return next((commit for commit in self.commits if commit.sha == revision), None)


class FakeModelHub:
    """`with FakeModelHub() as hub:` serves at `hub.endpoint` (HF_ENDPOINT)."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.faults: list[Fault] = []
        self.log: list[str] = []  # "METHOD /path"
        self.lock = threading.RLock()
        self.stall_sec = 1.0
        self.on_request: Callable[[str], None] = lambda line: None  # before anything is done
        self.may_create = True
        self.large = 200  # bytes from which a file goes to the storage of large files

    def __enter__(self) -> FakeModelHub:
        hub = self

        class Handler(_Handler):
            state = hub

        self.server = _Server(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.storage = f"http://localhost:{self.server.server_address[1]}/storage"  # another host: no token goes there
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def make(self, name: str, files: dict[str, bytes] | None = None, *, private: bool = True) -> Repo:
        repo = self.repos[name] = Repo(private)
        repo.commit("initial commit", {".gitattributes": b"", **(files or {})})
        return repo

    def asked(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, line)) for line in self.log)


@contextlib.contextmanager
def served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeModelHub]:
    """A hub that this process's huggingface_hub talks to, without its own waits between tries, and with a token."""
    with FakeModelHub() as server:
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        for module in (constants, file_download):
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(_http, "_HUB_ORIGINS", frozenset({_http._url_origin(server.endpoint)}))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None, time=time.time))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@contextlib.contextmanager
def impatient(monkeypatch: pytest.MonkeyPatch, seconds: float = 0.3) -> Iterator[None]:
    """A client that waits no longer than this for an answer. A client takes half a second to make: not in each test."""
    for name in ("ASK_SEC", "ANSWER_SEC"):
        monkeypatch.setattr(hub, name, seconds)
    huggingface_hub.set_client_factory(_http.default_client_factory)
    yield
    huggingface_hub.set_client_factory(_http.default_client_factory)


def save(root: Path, step: int, *, keep: int = 9, salt: float = 0.0) -> Path:
    """A small checkpoint."""
    tensors = {
        "model": {"a.weight": torch.full((40,), step + salt)},
        "optimizer": {"a.exp_avg": torch.full((100,), float(step))},
    }
    files = {"config.json": b'{"model_type": "deepseek_v3"}', "training_state.json": b'{"step": %d}' % step}
    return checkpoint.save(root, step, tensors, {**files, "tokenizer.json": b"{}"}, keep=keep)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Driven:
    """A pusher without its thread: turns are made here, on a clock that waiting moves."""

    def __init__(self, **options: Any):
        self.clock, self.notes, self.waits = Clock(), [], []
        given = {"run_id": RUN, "every_sec": 300.0, "note": self.notes.append, **options}
        self.push = Pusher(NAME, clock=self.clock, start=False, **given)

    def turns(self, most: int = 60) -> None:
        """Until nothing is left to do."""
        for _ in range(most):
            delay = self.push._turn()
            if delay is None:
                return
            self.waits.append(delay)
            self.clock.now += delay
        raise AssertionError(f"no end after {most} turns: {self.notes}")


def titles(server: FakeModelHub) -> list[str]:
    return [commit.title for commit in server.repos[NAME].commits]


def tree_is_whole(server: FakeModelHub, folder: Path) -> int:
    """Write the head's tree down as a reader would see it; its step, after verification."""
    files = server.repos[NAME].head.files
    latest = json.loads(files["LATEST.json"])
    target = folder / f"step_{latest['step']:08d}"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name in (name for name in files if name not in ("LATEST.json", ".gitattributes")):
        (target / name).write_bytes(files[name])
    assert checkpoint.verify(target)["step"] == latest["step"]
    return latest["step"]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *_: object) -> None:
        """A client that was killed."""


class _Handler(BaseHTTPRequestHandler):
    state: FakeModelHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or headers and body, sent apart, cost 40 ms each time

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    do_GET = do_POST = do_PUT = do_HEAD

    def _answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self._chunks()
        path = unquote(urlsplit(self.path).path)
        line = f"{self.command} {path}"
        self.state.log.append(line)
        self.state.on_request(line)
        kind = self._fault(line)
        if kind == "stall":
            time.sleep(self.state.stall_sec)
        if kind in ("reset", "stall"):
            self.close_connection = True
        elif kind[:3].isdecimal():
            wait = {"Retry-After": "7"} if kind.endswith("wait") else {}
            self._send(int(kind[:3]), b'{"error": "as asked"}', wait)
        elif kind == "page":
            self._send(200, b"<html>pay for the network</html>", {"Content-Type": "text/html"})
        else:
            status, body, headers = self._route(path)
            if kind.startswith("lost"):
                if kind == "lost":
                    self.close_connection = True
                else:
                    self._send(int(kind[5:]), b"{}", {})
            else:
                self._send(status, body, headers, half=kind == "half")

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _fault(self, line: str) -> str:
        with self.state.lock:
            for fault in self.state.faults:
                if fault.times > 0 and re.search(fault.pattern, line):
                    fault.times -= 1
                    return fault.kind
        return ""

    def _send(self, status: int, body: bytes, headers: dict[str, str], *, half: bool = False) -> None:
        with contextlib.suppress(ConnectionError):
            self.send_response(status)
            for key, value in {"Content-Type": "application/json", **headers}.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[: len(body) // 2] if half else body)
            self.close_connection = half

    # --- what a request comes to: status, body, headers ---

    def _route(self, path: str) -> tuple[int, bytes, dict[str, str]]:
        if path.startswith("/storage/"):  # signed addresses
            assert "Authorization" not in self.headers, "the token has left the Hub"
            return self._stored(path.removeprefix("/storage/"))
        with self.state.lock:
            if path == "/api/validate-yaml":
                bad = "!bad" in json.loads(self.body)["content"]
                return self._json({"errors": [{"message": "bad"}], "warnings": []}, 400 if bad else 200)
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self._json({"error": "Invalid credentials in Authorization header"}, 401)
            if path == "/api/repos/create":
                return self._create()
            match = re.fullmatch(r"/(api/models/)?([^/]+/[^/]+?)(?:\.git)?(?:/(.*))?", path)
            repo = self.state.repos.get(match[2]) if match else None
            if match is None or repo is None:
                return self._json({}, 404, {"X-Error-Code": "RepoNotFound"})
            self.name, rest = match[2], match[3] or ""
            if not match[1]:
                if rest == "info/lfs/objects/batch":
                    return self._batch(repo)
                what, revision, name = (*rest.split("/", 2), "", "")[:3]
                return self._resolve(repo, revision, name)
            what, revision, name = (*rest.split("/", 2), "", "")[:3]
            if what == "super-squash":
                title = json.loads(self.body)["message"]
                repo.commits[:] = [Commit(hashlib.sha1(repo.head.sha.encode()).hexdigest(), title, repo.head.files)]
                return self._json({})
            if what == "commit":
                return self._commit(repo)
            found = repo.at(revision or "main")
            if found is None:
                return self._json({}, 404, {"X-Error-Code": "RevisionNotFound"})
            return self._api(repo, what, found)

    def _json(
        self, value: object, status: int = 200, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes, dict[str, str]]:
        return status, json.dumps(value).encode(), headers or {}

    def _create(self) -> tuple[int, bytes, dict[str, str]]:
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.state.repos:
            return self._json({"error": "You already created this model repo", "url": f"/{name}"}, 409)
        if not self.state.may_create:
            return self._json({"error": "You don't have the rights to create a model there"}, 403)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.state.make(name, private=private)
        return self._json({"url": f"{self.state.endpoint}/{name}"})

    def _api(self, repo: Repo, what: str, commit: Commit) -> tuple[int, bytes, dict[str, str]]:
        if what in ("", "revision"):
            siblings = [{"rfilename": name} for name in commit.files]
            info = {"id": self.name, "sha": commit.sha, "private": repo.private, "siblings": siblings}
            return self._json(info)
        if what == "tree":
            return self._json([self._entry(name, content) for name, content in sorted(commit.files.items())])
        if what == "paths-info":
            text = self.body.decode()
            paths = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text).get("paths", [])
            return self._json([self._entry(name, commit.files[name]) for name in paths if name in commit.files])
        if what == "commits":
            known = repo.commits[: repo.commits.index(commit) + 1]
            date = "2026-01-01T00:00:00.000Z"
            told = [{"id": c.sha, "authors": [], "date": date, "title": c.title, "message": ""} for c in known]
            return self._json(told[::-1])
        if what == "preupload":
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["size"] >= self.state.large else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(self.body)["files"]
            ]
            return self._json({"files": files})
        return self._json({"error": what}, 404)

    def _entry(self, name: str, content: bytes) -> dict[str, Any]:
        entry = {"type": "file", "path": name, "oid": hashlib.sha1(content).hexdigest(), "size": len(content)}
        if len(content) >= self.state.large:
            digest = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
        return entry

    def _batch(self, repo: Repo) -> tuple[int, bytes, dict[str, str]]:
        objects = []
        for asked in json.loads(self.body)["objects"]:
            told = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in repo.blobs:
                href = f"{self.state.storage}/{self.name}/{asked['oid']}"
                told["actions"] = {"upload": {"href": href, "header": {}}}
            objects.append(told)
        return self._json({"transfer": "basic", "objects": objects})

    def _stored(self, rest: str) -> tuple[int, bytes, dict[str, str]]:
        name, _, digest = rest.rpartition("/")
        repo = self.state.repos[name]
        if self.command == "PUT":
            if hashlib.sha256(self.body).hexdigest() != digest:
                return self._json({"error": "not these bytes"}, 400)
            repo.blobs[digest] = self.body
            return 200, b"", {}
        return self._content(repo.blobs[digest], {})

    def _commit(self, repo: Repo) -> tuple[int, bytes, dict[str, str]]:
        header, *lines = (json.loads(line) for line in self.body.splitlines())
        parent = header["value"].get("parentCommit")
        if parent is not None and parent != repo.head.sha:
            return self._json({"error": "A commit has happened since. Please refresh and try again."}, 412)
        files = dict(repo.head.files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in repo.blobs:
                    return self._json({"error": "LFS pointer pointed to a file that does not exist"}, 400)
                files[value["path"]] = repo.blobs[value["oid"]]
            elif line["key"] == "deletedFile" and files.pop(value["path"], None) is None:
                return self._json({"error": "A file with this name doesn't exist"}, 404)
        made = repo.commit(header["value"]["summary"], files)
        return self._json({"commitUrl": f"{self.state.endpoint}/{self.name}/commit/{made.sha}", "commitOid": made.sha})

    def _resolve(self, repo: Repo, revision: str, name: str) -> tuple[int, bytes, dict[str, str]]:
        commit = repo.at(revision)
        if commit is None:
            return self._json({}, 404, {"X-Error-Code": "RevisionNotFound"})
        content = commit.files.get(name)
        if content is None:
            return self._json({}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit.sha})
        headers = {"X-Repo-Commit": commit.sha}
        if len(content) >= self.state.large:
            digest = hashlib.sha256(content).hexdigest()
            repo.blobs[digest] = content
            location = f"{self.state.storage}/{self.name}/{digest}"
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{digest}"', "Location": location}
            return 302, b"", headers
        return self._content(content, {**headers, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'})

    def _content(self, content: bytes, headers: dict[str, str]) -> tuple[int, bytes, dict[str, str]]:
        span = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        headers = {**headers, "Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
        if span and int(span[1]) < len(content):
            start = int(span[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            return 206, content[start:], headers
        return 200, content, headers
