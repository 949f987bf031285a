"""Reading from the Hugging Face Hub: commits, a dataset's files, ranges of a file; every failure a `UserError`.

huggingface_hub and datasets are imported only where they are needed. Both try again for most of a minute where there is
no network; `hub_commit` asks once and comes first.
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

from config import SourceConfig, UserError

PREFIX = "hf://"
TIMEOUT_SEC = 10
RETRY_SEC = 600.0  # how long a read is tried again before the run stops
_T = TypeVar("_T")


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
    except _failures() as error:
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
    except Exception as error:  # noqa: BLE001  # no data files, a gated file, a Hub that stopped answering
        raise UserError(f"{where}: {one_line(error)}; {instead}") from None
    splits = builder.config.data_files or {}
    if source.split not in splits:
        raise UserError(f"{where} has no split {source.split!r}; it has: {', '.join(map(str, splits)) or 'none'}")
    names = [str(name) for name in splits[source.split]]
    prefix = f"{PREFIX}datasets/{source.path}@{commit}/"
    for name in names:
        if not name.startswith(prefix):
            raise UserError(f"{where}: its file {name!r} lies outside the repository; {instead}")
    paths = [name.removeprefix(prefix) for name in names]
    infos = retry(lambda: HfApi().get_paths_info(source.path, paths, revision=commit, repo_type="dataset"), where, 20.0)
    sizes: dict[str, int] = {info.path: getattr(info, "size", 0) for info in infos}
    return [(prefix + path, sizes[path]) for path in paths]


@functools.cache
def _filesystem() -> Any:
    from huggingface_hub import HfFileSystem

    return HfFileSystem()


def open_file(name: str, size: int) -> Any:
    """A readable, seekable file. pyarrow asks for whole column chunks: a request is exactly what it needs, no more."""
    return _filesystem().open(name.removeprefix(PREFIX), "rb", size=size, cache_type="none")


def retry(read: Callable[[], _T], what: str, seconds: float = RETRY_SEC) -> _T:
    """Call `read` until it succeeds, waiting longer each time, while the failure may pass and `seconds` last."""
    started, wait = time.monotonic(), 1.0
    while True:
        try:
            return read()
        except _failures() as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            barred = status is not None and 400 <= status < 500 and status not in (408, 429)
            if barred or time.monotonic() - started + wait > seconds:
                raise UserError(
                    f"data.sources: {what} could not be read from the Hub ({one_line(error)}); "
                    "started again, the run goes on from its last checkpoint"
                ) from None
        time.sleep(wait * random.uniform(0.5, 1.0))  # jitter: the ranks of a run should not ask in step
        wait = min(2 * wait, 60.0)


def _failures() -> tuple[type[Exception], ...]:
    """What a read raises when the Hub or the network fails."""
    import pyarrow as pa
    from huggingface_hub import errors

    client_error: type[Exception] = errors.HTTPError  # pyright: ignore[reportPrivateImportUsage]  # httpx's, any version
    return OSError, client_error, pa.ArrowException  # ArrowException: a truncated answer


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
