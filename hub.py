"""Checkpoints on the Hugging Face Hub, where `pusher.py` puts them: which is the newest, pulled and verified.

A commit of such a repository holds one whole checkpoint at its root, which so is a model repository, and LATEST.json,
which says whose it is. Nothing that the Hub says is believed: names are checked before anything is written, sizes
before anything is downloaded, contents before a folder gets the name of a checkpoint.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import random
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import checkpoint
import foreign
import remote
from checkpoint import FILE_NAME, MANIFEST, CheckpointError
from config import HubConfig, UserError
from options import shown
from text import clean, keep_secret

if TYPE_CHECKING:
    from huggingface_hub import HfApi

LATEST = "LATEST.json"
SCHEMA = 1  # of LATEST.json
ANSWER_SEC = 120.0  # how long an answer is waited for: a commit of many files takes the Hub a while
ASK_SEC = 10.0  # the same for a question, and for a connection
PULL_RETRY_SEC = 600.0  # how long a read is tried again before the run stops
MOST_FILES = 20_000  # of a repository: more is not looked at
MOST_COMMITS = 100  # that are looked through for an intact checkpoint
MOST_LATEST_BYTES = 4096
MOST_RECORD_BYTES = 2**28
SQUASHED = 5  # pulls begun anew because the history was squashed under their hands

PLACE = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/\w[\w.-]{0,95}", re.ASCII)
MODEL_FILES = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|(generation_)?config\.json"
    r"|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|vocab\.json|merges\.txt"
    r"|chat_template\.jinja"
)
REFUSED = {400, 401, 402, 403, 404, 405, 410, 413, 422}
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
_T = TypeVar("_T")


class Latest(NamedTuple):
    """The newest checkpoint of a repository, as LATEST.json says at `commit`."""

    step: int
    run: str
    manifest_sha256: str
    commit: str
    writer: str  # the process that pushed it


class Gone(Exception):
    """The commit that was read is no more: the history was squashed."""


def plan(state_bytes: int, hub: HubConfig) -> str:
    """What pushing a checkpoint of this size as configured comes to, for a line before training."""
    gib, per_day = state_bytes / 2**30, 24 * 60 / hub.every_minutes
    held = f"{gib:.2f} GiB" if hub.keep == 1 else f"{gib:.2f} to {hub.keep * gib:.2f} GiB"
    seen = "public" if hub.public else "private"
    return (
        f"hub: {hub.repo_id} ({seen}): a state of {gib:.2f} GiB at most every {hub.every_minutes:g} minutes, up to "
        f"{per_day:.0f} pushes and {per_day * gib:.0f} GiB a day; {held} stay there, plus one while it is pushed"
    )


# ------------------------------------------------------------------------------------------------------- talking to it


def connect(repo_id: str) -> HfApi:
    """The Hub's client for a repository; UserError where its name is none. Its token is out of sight from now on."""
    from huggingface_hub import HfApi, get_session, get_token, set_client_factory
    from huggingface_hub.utils import disable_progress_bars
    from huggingface_hub.utils import logging as hub_logging

    if not PLACE.fullmatch(repo_id) or re.search(r"--|\.\.|[.-]$|\.git$", repo_id):
        raise UserError(f"hub.repo_id = {shown(repo_id)} is no name of a repository on the Hub; give owner/name")
    disable_progress_bars()
    hub_logging.set_verbosity_error()  # it tells of each of its own tries; we tell of an outage once
    session: Any = get_session()
    if session.timeout.read is None:  # its default: a server that goes silent would hold a thread for ever
        kind, hooks, limits = type(session), session.event_hooks, (ASK_SEC, ANSWER_SEC, ANSWER_SEC, ASK_SEC)
        set_client_factory(lambda: kind(event_hooks=hooks, follow_redirects=True, timeout=limits))
    keep_secret(token := get_token())
    return HfApi(token=token)


def told(error: BaseException) -> str:
    """A failure on one line, short, without secrets."""
    line = clean(remote.one_line(error))  # before it is cut: half a token is not known for one
    if error.__cause__ is not None and not isinstance(error, UserError) and not hasattr(error, "response"):
        line = f"{line[:150]} ({clean(remote.one_line(error.__cause__))})"
    return line[:300]


def refused(error: BaseException, api: HfApi) -> int:
    """The status of the Hub's own answer behind a failure, where waiting does not mend it; else 0.

    Storage behind the Hub answers 403 for an address that has run out: the next try gets another.
    """
    response = remote.response_of(error)
    if response is None or response.status_code not in REFUSED:
        return 0
    with contextlib.suppress(RuntimeError):  # an answer that knows of no request
        if not str(response.request.url).startswith(api.endpoint):
            return 0
    return response.status_code


def explained(error: BaseException, repo_id: str, api: HfApi) -> UserError:
    """A failure as the user's mistake where it is one; `Unreachable` where it may pass."""
    if isinstance(error, UserError):
        return error
    status = refused(error, api)
    where = f"hub.repo_id = {repo_id!r}"
    if status == 401:
        has = "does not accept the token" if api.token else "wants a token"
        return UserError(f"{where}: the Hub {has}; set HF_TOKEN (or .env) to one with write access to it")
    if status == 403:
        return UserError(f"{where}: the Hub refuses: the token may not do this, or the account is full ({told(error)})")
    if status:
        return UserError(f"{where}: the Hub refuses ({told(error)})")
    return remote.Unreachable(f"{where}: the Hugging Face Hub could not be reached ({told(error)})")


def read(api: HfApi, repo_id: str, commit: str, name: str, most: int = foreign.MAX_JSON_BYTES) -> bytes | None:
    """A small file at a commit, CheckpointError where it has more than `most` bytes; None where there is none."""
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    url = hf_hub_url(repo_id, name, revision=commit, endpoint=api.endpoint)
    headers = build_hf_headers(token=api.token)
    with get_session().stream("GET", url, headers=headers, timeout=ASK_SEC) as response:
        if response.status_code >= 400:
            response.read()
            code = response.headers.get("X-Error-Code")
            if code == "EntryNotFound":
                return None
            if code == "RevisionNotFound":
                raise Gone
            hf_raise_for_status(response)
        content = bytearray()
        for chunk in response.iter_bytes():
            content += chunk
            if len(content) > most:
                raise CheckpointError(f"{repo_id}/{name}: larger than {most} bytes")
    return bytes(content)


def latest_at(api: HfApi, repo_id: str, commit: str) -> Latest | None:
    content = read(api, repo_id, commit, LATEST, MOST_LATEST_BYTES)
    if content is None:
        return None
    try:
        found = json.loads(content)
        step, run, writer, digest = (found[key] for key in ("step", "run", "writer", "manifest_sha256"))
        good = type(step) is int and 0 <= step < 10**8 and isinstance(run, str) and isinstance(writer, str)
        if found["schema"] != SCHEMA or not good or not re.fullmatch("[0-9a-f]{64}", digest):
            raise ValueError
    except (ValueError, TypeError, KeyError, RecursionError):
        raise CheckpointError(f"{repo_id}/{LATEST} at commit {commit[:8]} is none of this program") from None
    return Latest(step, run[:200], digest, commit, writer[:64])


def failures() -> tuple[type[Exception], ...]:
    """What the client raises when the Hub, the network or the disk fails."""
    from huggingface_hub import errors

    client_error: type[Exception] = errors.HTTPError  # pyright: ignore[reportPrivateImportUsage]  # httpx's, any version
    return OSError, client_error, json.JSONDecodeError


def _patiently(ask: Callable[[], _T], api: HfApi, repo_id: str, note: Callable[[str], None] | None = None) -> _T:
    """Call until it succeeds, while the failure may pass and PULL_RETRY_SEC last; `note` is told of the first one."""
    started, wait = time.monotonic(), 1.0
    while True:
        try:
            return ask()
        except failures() as error:
            if isinstance(error, OSError) and error.errno in NO_ROOM:
                raise UserError(f"{error.filename}: {error.strerror}") from None
            pause = max(wait * random.uniform(0.5, 1.0), remote.asked_wait(remote.response_of(error)))
            if refused(error, api) or time.monotonic() - started + pause > PULL_RETRY_SEC:
                raise explained(error, repo_id, api) from None
            if note is not None:
                note(f"hub: {told(error)}; trying again for {PULL_RETRY_SEC / 60:.0f} minutes")
                note = None
        remote.sleep(pause)
        wait = min(2 * wait, 60.0)


def read_record(repo_id: str, commit: str, name: str) -> bytes | None:
    """A file of at most MOST_RECORD_BYTES at a commit, None where it has none; UserError where it cannot be had."""
    api = connect(repo_id)
    try:
        return _patiently(lambda: read(api, repo_id, commit, name, MOST_RECORD_BYTES), api, repo_id)
    except Gone:
        return None


# ---------------------------------------------------------------------------------------------------------------- pull


def newest(repo_id: str, revision: str | None = None) -> Latest | None:
    """The newest checkpoint of a repository (at a branch, tag or commit); None where it, or that, does not exist.

    Raises `remote.Unreachable` where the Hub does not answer, UserError where it refuses.
    """
    api = connect(repo_id)
    commit = _commit(api, repo_id, revision)
    try:
        return latest_at(api, repo_id, commit) if commit else None
    except (Gone, *failures()) as error:
        raise explained(error, repo_id, api) from None


def _commit(api: HfApi, repo_id: str, revision: str | None) -> str | None:
    from huggingface_hub import errors

    try:
        return api.repo_info(repo_id, revision=revision, timeout=ASK_SEC).sha
    except errors.RevisionNotFoundError:
        raise UserError(f"hub.repo_id = {repo_id!r}: the Hub has no revision {shown(revision)}") from None
    except failures() as error:
        if isinstance(error, errors.RepositoryNotFoundError) and refused(error, api) == 404:
            return None
        raise explained(error, repo_id, api) from None


def pull(repo_id: str, root: Path, *, note: Callable[[str], None], revision: str | None = None) -> Path | None:
    """Download the newest intact checkpoint into `root/step_XXXXXXXX`; None where there is none.

    Everything is read at one commit; where that holds a damaged checkpoint, at the commits before it. What is there
    already, intact and the same, is left as it is; another folder of that step is moved aside as checkpoint.py does.
    Raises UserError where no checkpoint is intact, or the Hub refuses or stays away.
    """
    api = connect(repo_id)
    for _ in range(SQUASHED):
        commit = _commit(api, repo_id, revision)
        if commit is None:
            return None
        try:
            return _pull(api, repo_id, root, commit, note)
        except Gone:
            note(f"hub: the history of {repo_id} was squashed while it was read; from the start")
    raise UserError(f"hub.repo_id = {repo_id!r}: its history changes faster than a checkpoint can be read; try again")


def _pull(api: HfApi, repo_id: str, root: Path, head: str, note: Callable[[str], None]) -> Path | None:
    run, seen = None, set()
    for commit in _history(api, repo_id, head):
        try:
            found = _patiently(lambda commit=commit: latest_at(api, repo_id, commit), api, repo_id)
            if found is None and commit == head:
                return None
            if found is None or found.manifest_sha256 in seen or found.run != (run or found.run):
                continue
            run = found.run
            seen.add(found.manifest_sha256)
            return _fetch(api, repo_id, root, found, note)
        except CheckpointError as error:
            note(f"hub: {told(error)}; looking at the commit before")
    raise CheckpointError(f"hub.repo_id = {repo_id!r}: no intact checkpoint in its history")


def _history(api: HfApi, repo_id: str, commit: str) -> Iterator[str]:
    yield commit
    from huggingface_hub import errors

    def ask() -> list[Any]:
        try:
            return api.list_repo_commits(repo_id, revision=commit)
        except errors.RevisionNotFoundError:
            raise Gone from None

    for entry in _patiently(ask, api, repo_id)[:MOST_COMMITS]:
        if entry.commit_id != commit:
            yield entry.commit_id


def _fetch(api: HfApi, repo_id: str, root: Path, latest: Latest, note: Callable[[str], None]) -> Path:
    """One checkpoint at one commit: first what it should be, then its files into a temporary folder, then its name."""
    where = f"{repo_id} at commit {latest.commit[:8]}"
    final = root / f"step_{latest.step:08d}"
    with contextlib.suppress(CheckpointError, OSError):
        same = checkpoint.key_of(final)[1] == latest.manifest_sha256
        if same and checkpoint.verify(final):
            return final
    manifest = _patiently(lambda: read(api, repo_id, latest.commit, MANIFEST), api, repo_id)
    if manifest is None or hashlib.sha256(manifest).hexdigest() != latest.manifest_sha256:
        raise CheckpointError(f"{where}: {MANIFEST} is not the one that {LATEST} names")
    sizes = _sizes(manifest, where)
    _check_remote(api, repo_id, latest.commit, sizes, where)
    root.mkdir(parents=True, exist_ok=True)
    need = sum(size for size, _ in sizes.values())
    # By the manifest: a pull that was killed goes on in its folder. checkpoint.py takes the folder for a dead save.
    temporary = final.with_name(f"{final.name}.tmp-{latest.manifest_sha256[:8]}")
    there = sum(file.stat().st_size for file in temporary.rglob("*") if file.is_file()) if temporary.is_dir() else 0
    if shutil.disk_usage(root).free < need - there:
        raise UserError(f"{root}: too little room for step {latest.step} of {repo_id}, {need / 2**30:.2f} GiB")
    note(f"hub: step {latest.step} from {where}, {need / 2**30:.2f} GiB")
    temporary.mkdir(exist_ok=True)
    for name in sizes:
        _patiently(lambda name=name: _download(api, repo_id, latest.commit, name, temporary), api, repo_id, note)
    (temporary / MANIFEST).write_bytes(manifest)
    shutil.rmtree(temporary / ".cache", ignore_errors=True)
    try:
        checkpoint.verify(temporary)
    except CheckpointError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync(temporary)
    if final.exists():
        os.rename(final, final.with_name(f"{final.name}.old-{secrets.token_hex(4)}"))
    os.rename(temporary, final)
    checkpoint.sync_directory(root)
    return final


def _download(api: HfApi, repo_id: str, commit: str, name: str, folder: Path) -> None:
    from huggingface_hub import errors

    try:
        api.hf_hub_download(repo_id, name, revision=commit, local_dir=folder)
    except errors.RevisionNotFoundError:
        raise Gone from None
    except errors.EntryNotFoundError as error:
        if isinstance(error, errors.LocalEntryNotFoundError):  # no network
            raise
        raise CheckpointError(f"{repo_id} at commit {commit[:8]}: {name} is missing") from None


def _sizes(manifest: bytes, where: str) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of the files that a manifest names, each the plain name of a file."""
    files = foreign.json_object(Path(where, MANIFEST), manifest).get("files")
    if not isinstance(files, dict) or len(files) > MOST_FILES:
        raise CheckpointError(f"{where}: {MANIFEST} names no files, or more than {MOST_FILES}")
    try:
        sizes = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (TypeError, KeyError):
        raise CheckpointError(f"{where}: {MANIFEST} is damaged") from None
    for name, (size, digest) in sizes.items():
        if not FILE_NAME.fullmatch(name) or name == MANIFEST or type(size) is not int or size < 0:
            raise CheckpointError(f"{where}: {MANIFEST} has a bad entry {shown(name)}")
        if not isinstance(digest, str):
            raise CheckpointError(f"{where}: {MANIFEST} has no SHA-256 of {name}")
    if len({name.lower() for name in sizes}) < len(sizes):  # one file on some disks
        raise CheckpointError(f"{where}: {MANIFEST} names a file twice, in capitals and not")
    return sizes


def _check_remote(api: HfApi, repo_id: str, commit: str, sizes: dict[str, tuple[int, str]], where: str) -> None:
    """What the Hub says of the files, before any is downloaded: size, and SHA-256 of the large ones."""
    from huggingface_hub import errors

    names = sorted(sizes)
    for first in range(0, len(names), remote.MOST_PATHS):
        asked = names[first : first + remote.MOST_PATHS]

        def ask(asked: list[str] = asked) -> list[Any]:
            try:
                return api.get_paths_info(repo_id, asked, revision=commit)
            except errors.RevisionNotFoundError:
                raise Gone from None

        infos = {info.path: info for info in _patiently(ask, api, repo_id)}
        for name in asked:
            size, digest = sizes[name]
            info = infos.get(name)
            if info is None or getattr(info, "size", None) != size:
                raise CheckpointError(f"{where}: {name} is missing, or not of {size} bytes")
            large = getattr(info, "lfs", None)
            if large is not None and large.sha256 != digest:
                raise CheckpointError(f"{where}: {name} is not the file that {MANIFEST} names")


def _sync(folder: Path) -> None:
    for path in folder.iterdir():
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    checkpoint.sync_directory(folder)


def download_model(repo_id: str, revision: str | None = None) -> Path:
    """A folder with the weights, configuration and tokenizer of a model on the Hub, in its cache; `owner/name@revision`
    will do, too. No optimizer state, and no file of any other kind."""
    repo_id, _, given = repo_id.partition("@")
    revision = revision or given or None
    api = connect(repo_id)
    instead = "or give a folder"
    commit = remote.hub_commit("model", repo_id, revision, instead=instead)
    listed = _patiently(
        lambda: [*itertools.islice(api.list_repo_tree(repo_id, revision=commit), MOST_FILES)], api, repo_id
    )
    names = sorted(entry.path for entry in listed if MODEL_FILES.fullmatch(entry.path))
    weights = [name for name in names if name.startswith("model")]
    if not weights or "config.json" not in names:
        missing = "weights (model.safetensors)" if not weights else "config.json"
        raise UserError(f"Hub model {repo_id!r} has no {missing} at its root; {instead}")
    paths = [
        Path(_patiently(lambda name=name: api.hf_hub_download(repo_id, name, revision=commit), api, repo_id))
        for name in names
    ]
    return paths[0].parent
