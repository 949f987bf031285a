"""Reading from the Hugging Face Hub: commits, a dataset's files, ranges of a file; every failure a `UserError`.

huggingface_hub and datasets are imported only where they are needed. Both try again for most of a minute where there is
no network; `hub_commit` asks once and comes first.
"""

from __future__ import annotations

import email.utils
import io
import json
import random
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

from config import SourceConfig, UserError

PREFIX = "hf://"
TIMEOUT_SEC = 10
RETRY_SEC = 600.0  # how long a read is tried again before the run stops
LONGEST_WAIT_SEC = 60.0
LONGEST_ASKED_SEC = 3600.0  # whatever an answer asks for: its clock may be another than ours
DAMAGED_SEC = 20.0  # how long what came but is no Parquet is asked for again
MOST_PATHS = 500  # of a question for sizes; the Hub answers 1,000 parameters (huggingface_hub #1504)
_T = TypeVar("_T")

retries = 0  # reads of this process that had to be tried again


def beat() -> None:
    """Called wherever this process shows that it is alive; the feeding process puts its heartbeat here."""


class Unreachable(UserError):
    """The Hub did not answer: a copy in the cache may still do."""


def hub_commit(kind: str, repo: str, revision: str | None, *, instead: str) -> str:
    """The commit that `revision` (None: the default branch) of a Hub "model" or "dataset" is at now.

    One request without retries: whatever is missing, barred or unreachable is a UserError at once. `instead`: what
    works without it.
    """
    from huggingface_hub import HfApi, errors

    at = f"Hub {kind} {repo!r}" + (f" at revision {revision!r}" if revision else "")
    try:
        info = HfApi().repo_info(repo, repo_type=kind, revision=revision, timeout=TIMEOUT_SEC)
    except errors.GatedRepoError:
        raise UserError(f"{at} is gated: accept its terms on its Hub page and set HF_TOKEN; {instead}") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{at}: the Hub has no such revision") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise UserError(
            f"{at}: no such repository on the Hub (or it is private: set HF_TOKEN), and no such local path; {instead}"
        ) from None
    except (*_failures(), json.JSONDecodeError) as error:  # a web page: the hotel's network wants a password
        if not isinstance(error, json.JSONDecodeError) and not _may_pass(error):
            raise UserError(f"{at}: {one_line(error)}; {instead}") from None
        raise Unreachable(
            f"{at}: the Hugging Face Hub could not be reached ({one_line(error)}); check the network, HF_ENDPOINT and "
            f"HF_HUB_OFFLINE; {instead}"
        ) from None
    assert info.sha is not None
    return info.sha


def dataset_files(source: SourceConfig, commit: str, *, instead: str) -> list[tuple[str, int]]:
    """The split's files as (hf://datasets/owner/name@commit/path, size in bytes), resolved by `datasets`."""
    import datasets
    from huggingface_hub import HfApi

    where = f"data.sources: Hub dataset {source.path!r}"
    datasets.disable_progress_bars()
    try:
        builder = datasets.load_dataset_builder(source.path, source.name, revision=commit)
    except ValueError as error:  # unknown or missing configuration: the message lists those that exist
        raise UserError(f"{where}, name {source.name!r}: {one_line(error)[:600]}") from None
    except Exception as error:  # noqa: BLE001  # no network, no data files, a script, a gated file
        raise _told(error, where, instead) from None
    splits = builder.config.data_files or {}
    if source.split not in splits:
        raise UserError(f"{where} has no split {source.split!r}; it has: {', '.join(map(str, splits)) or 'none'}")
    names = [str(name) for name in splits[source.split]]
    prefix = f"{PREFIX}datasets/{source.path}@{commit}/"
    for name in names:
        if not name.startswith(prefix):
            raise UserError(f"{where}: its file {name!r} lies outside the repository; {instead}")
    paths = [name.removeprefix(prefix) for name in names]
    sizes: dict[str, int] = {}
    for first in range(0, len(paths), MOST_PATHS):
        asked = paths[first : first + MOST_PATHS]
        options: Any = {"paths": asked, "revision": commit, "repo_type": "dataset"}
        infos = retry(lambda options=options: HfApi().get_paths_info(source.path, **options), where, 20.0)
        sizes |= {info.path: getattr(info, "size", 0) for info in infos}
    if missing := [path for path in paths if path not in sizes]:
        raise UserError(f"{where}: the Hub does not know its file {missing[0]!r}; {instead}")
    return [(prefix + path, sizes[path]) for path in paths]


def arrow_files(source: SourceConfig, commit: str, *, instead: str) -> list[str]:
    """The Arrow files that `datasets` makes of a split which is neither Parquet nor text that can be sought."""
    import datasets

    datasets.disable_progress_bars()
    try:
        split: Any = datasets.load_dataset(source.path, source.name, split=source.split, revision=commit)
    except Exception as error:  # noqa: BLE001  # no network, files it cannot read
        raise _told(error, f"data.sources: Hub dataset {source.path!r}", instead) from None
    return [file["filename"] for file in split.cache_files]


def _told(error: Exception, where: str, instead: str) -> UserError:
    """What `datasets` raised, in one line. It often says only that something happened; the cause says what."""
    kind = Unreachable if _may_pass(error) else UserError
    return kind(f"{where}: {one_line(error.__cause__ or error)[:600]}; {instead}")


_locations: dict[str, str] = {}


def _location(name: str) -> str:
    """Where the bytes of a file lie: one question per file and process, as the Hub counts these."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    if name in _locations:
        return _locations[name]
    _, owner, repo, path = name.removeprefix(PREFIX).split("/", 3)
    repo, commit = repo.split("@")
    url = hf_hub_url(f"{owner}/{repo}", path, repo_type="dataset", revision=commit)
    place = _locations[name] = get_hf_file_metadata(url, timeout=TIMEOUT_SEC).location
    return place


class HubFile(io.RawIOBase):
    """A file on the Hub, read by ranges: pyarrow asks for whole column chunks, so no more is fetched than it needs."""

    def __init__(self, name: str, size: int):
        super().__init__()
        self.name, self.size_bytes, self.position = name, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size_bytes}[whence]
        return self.position

    def read(self, size: int = -1) -> bytes:
        end = self.size_bytes if size < 0 else min(self.size_bytes, self.position + size)
        data = self._fetch(self.position, end) if end > self.position else b""
        self.position += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _fetch(self, start: int, end: int) -> bytes:
        from huggingface_hub import constants, get_session
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        place = _location(self.name)
        # A signed address needs no token, and another host must not see it.
        ours = urlsplit(place).netloc == urlsplit(constants.ENDPOINT).netloc
        headers = {**(build_hf_headers() if ours else {}), "Range": f"bytes={start}-{end - 1}"}
        response = get_session().get(place, headers=headers, timeout=TIMEOUT_SEC)
        if response.status_code in (401, 403, 404, 410):  # a signed address does not last: the next try asks again
            _locations.pop(self.name, None)
            raise OSError(f"status {response.status_code} for {self.name}")
        hf_raise_for_status(response)
        if len(response.content) != end - start:
            raise OSError(f"{len(response.content)} bytes of {self.name} in place of {end - start}")
        return response.content


def retry(read: Callable[[], _T], what: str, seconds: float = RETRY_SEC) -> _T:
    """Call `read` until it succeeds, waiting longer each time, while the failure may pass and `seconds` last.

    What the server asks for (Retry-After; RateLimit's t=, as the Hub sends it) is waited for, within RETRY_SEC: a Hub
    that answers so has been reached. Raises Unreachable at the end, UserError at once for what no waiting mends.
    """
    global retries
    import pyarrow as pa

    started, wait = time.monotonic(), 1.0
    while True:
        beat()
        try:
            return read()
        except _failures() as error:
            response = response_of(error)
            failed = f"data.sources: {what} could not be read from the Hub ({one_line(error)})"
            if response is not None and not _may_pass(error):
                raise UserError(failed) from None
            asked = asked_wait(response)
            # Jitter: the ranks of a run should not ask in step.
            pause = max(wait * random.uniform(0.5, 1.0), asked and asked + random.uniform(0, 1))
            damaged = isinstance(error, pa.ArrowException)  # HubFile has counted the bytes
            limit = min(seconds, DAMAGED_SEC) if damaged else RETRY_SEC if asked else seconds
            if time.monotonic() - started + pause > limit:
                if damaged:
                    raise UserError(f"{failed}; the file seems to be damaged") from None
                raise Unreachable(f"{failed}; started again, the run goes on from its last checkpoint") from None
        retries += 1
        sleep(pause)
        wait = min(2 * wait, LONGEST_WAIT_SEC)


def _may_pass(error: BaseException | None) -> bool:
    """Whether the network or an overloaded Hub is behind a failure; the outermost error that tells decides.

    huggingface_hub tells a 429 as a file that is not there, caused by it (#3612); datasets raises all within the 404
    of a script that a dataset does not have.
    """
    from huggingface_hub import errors

    client_error: Any = errors.HTTPError  # pyright: ignore[reportPrivateImportUsage]
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return status in (408, 429) or status >= 500
        if isinstance(error, (ConnectionError, TimeoutError, client_error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def response_of(error: BaseException | None) -> Any:
    """The answer behind a failure, or None."""
    while error is not None:
        if getattr(error, "response", None) is not None:
            return error.response  # type: ignore[attr-defined]
        error = error.__cause__ or error.__context__
    return None


def asked_wait(response: Any) -> float:
    """Seconds that an answer asks to wait, 0 if it does not say; at most `LONGEST_ASKED_SEC`.

    Any answer has a RateLimit; only with 429 is it to be waited for.
    """
    headers = getattr(response, "headers", {})
    if response is not None and response.status_code == 429:
        found = re.search(r"\bt\s*=\s*(\d+)", headers.get("ratelimit", ""))
        if found:
            return min(float(found[1]), LONGEST_ASKED_SEC)
    after = headers.get("retry-after", "").strip()
    if after.isdecimal():
        return min(float(after), LONGEST_ASKED_SEC)
    try:
        asked = email.utils.parsedate_to_datetime(after).timestamp() - time.time()
        return min(max(0.0, asked), LONGEST_ASKED_SEC)
    except ValueError:
        return 0.0


def sleep(seconds: float) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        beat()
        time.sleep(min(left, 5.0))


def _failures() -> tuple[type[Exception], ...]:
    """What a read raises when the Hub or the network fails."""
    import pyarrow as pa
    from huggingface_hub import errors

    client_error: type[Exception] = errors.HTTPError  # pyright: ignore[reportPrivateImportUsage]  # httpx's, any version
    return OSError, client_error, pa.ArrowException  # ArrowException: damaged data


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
