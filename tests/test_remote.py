"""What is said when the Hub fails, and what is tried again. The way through a server is in test_sources.py."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any, NoReturn

import huggingface_hub
import pyarrow as pa
import pytest
from huggingface_hub import errors

import remote
from config import SourceConfig, UserError
from remote import Unreachable, dataset_files, hub_commit, one_line, retry

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def answer(status: int, kind: type[errors.HfHubHTTPError] = errors.HfHubHTTPError) -> errors.HfHubHTTPError:
    """What huggingface_hub raises for a response of this status."""
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind(f"status {status}\nand more", response=response)


def fail(error: BaseException) -> NoReturn:
    raise error


class Clock:
    """Stands in for `time`: sleeping is all that takes time."""

    def __init__(self) -> None:
        self.now, self.waits = 0.0, []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(remote, "time", clock)
    monkeypatch.setattr(remote, "_sleep", clock.sleep)
    return clock


@pytest.fixture
def repo_info(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The requests `hub_commit` makes; all succeed."""
    requests: list[dict[str, Any]] = []

    def ask(self: object, repo: str, **options: Any) -> SimpleNamespace:
        requests.append({"repo": repo, **options})
        return SimpleNamespace(sha=COMMIT)

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", ask)
    return requests


# ---- one question, asked first


def test_a_commit_is_one_bounded_request(repo_info: list[dict[str, Any]]) -> None:
    assert hub_commit("dataset", "owner/name", "v1", instead="-") == COMMIT
    (request,) = repo_info
    assert (request["repo"], request["repo_type"], request["revision"]) == ("owner/name", "dataset", "v1")
    assert 0 < request["timeout"] <= 30


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConnectionError("connection\n  refused"), "could not be reached (connection refused)"),
        (TimeoutError(), "could not be reached (TimeoutError)"),
        (errors.HTTPError("name resolution"), "could not be reached (name resolution)"),
        (answer(503), "could not be reached (status 503 and more)"),
        (errors.OfflineModeIsEnabled("offline"), "could not be reached (offline)"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_hub_that_does_not_answer(error: Exception, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own type, as a copy in the cache may still do; a UserError for all others."""
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *_, **__: fail(error))
    with pytest.raises(Unreachable) as caught:
        hub_commit("model", "owner/name", "v1", instead="use a folder")
    message = str(caught.value)
    assert message.startswith("Hub model 'owner/name' at revision 'v1': ") and said in message
    assert "check the network, HF_ENDPOINT and HF_HUB_OFFLINE" in message
    assert message.endswith("; use a folder") and "\n" not in message
    assert isinstance(caught.value, UserError)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (answer(403, errors.GatedRepoError), "is gated: accept its terms on its Hub page and set HF_TOKEN; use"),
        (answer(404, errors.RepositoryNotFoundError), "no such repository on the Hub (or it is private: set HF_TOKEN)"),
        (errors.HFValidationError("bad name"), "no such repository on the Hub"),
        (answer(404, errors.RevisionNotFoundError), "the Hub has no such revision"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_an_answer_that_no_cache_makes_good(error: Exception, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *_, **__: fail(error))
    with pytest.raises(UserError) as caught:
        hub_commit("dataset", "owner/name", None, instead="use a folder")
    assert not isinstance(caught.value, Unreachable)
    message = str(caught.value)
    assert message.startswith("Hub dataset 'owner/name'") and said in message and "\n" not in message


def test_a_mistake_of_ours_is_not_blamed_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *_, **__: fail(KeyError("x")))
    with pytest.raises(KeyError):
        hub_commit("dataset", "owner/name", None, instead="-")


# ---- a split's files


@pytest.fixture
def hub_datasets(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """`datasets` (slow to import) with a builder of two files, whose sizes the Hub knows in another order."""
    prefix = f"hf://datasets/owner/set@{COMMIT}/"
    files = {"train": [prefix + "data/1.parquet", prefix + "data/0.parquet"]}
    fake = SimpleNamespace(
        files=files,
        asked=[],
        disable_progress_bars=lambda: None,
        load_dataset_builder=lambda *_, **__: SimpleNamespace(config=SimpleNamespace(data_files=fake.files)),
    )

    def sizes(self: object, repo: str, paths: list[str], **options: Any) -> list[SimpleNamespace]:
        fake.asked.append((repo, options))
        return [SimpleNamespace(path=path, size=100 + int(path[5])) for path in sorted(paths)]

    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.setattr(huggingface_hub.HfApi, "get_paths_info", sizes)
    return fake


def test_a_split_s_files_in_its_own_order(hub_datasets: SimpleNamespace) -> None:
    found = dataset_files(SourceConfig(path="owner/set"), COMMIT, instead="-")
    prefix = f"hf://datasets/owner/set@{COMMIT}/data/"
    assert found == [(prefix + "1.parquet", 101), (prefix + "0.parquet", 100)]
    assert hub_datasets.asked == [("owner/set", {"revision": COMMIT, "repo_type": "dataset"})]


@pytest.mark.parametrize(("files", "listed"), [({"test": [], "dev": []}, "test, dev"), ({}, "none"), (None, "none")])
def test_a_split_that_is_not_there(hub_datasets: SimpleNamespace, files: Any, listed: str) -> None:
    hub_datasets.files = files
    with pytest.raises(UserError, match=f"'owner/set' has no split 'train'; it has: {listed}$"):
        dataset_files(SourceConfig(path="owner/set"), COMMIT, instead="-")


def test_what_datasets_raises_is_one_line(hub_datasets: SimpleNamespace) -> None:
    hub_datasets.load_dataset_builder = lambda *_, **__: fail(ValueError("no 'b'\navailable: " + "x" * 5000))
    with pytest.raises(UserError, match=r"'owner/set', name 'b': no 'b' available: x+$") as caught:
        dataset_files(SourceConfig(path="owner/set", name="b"), COMMIT, instead="-")
    assert len(str(caught.value)) < 1000
    hub_datasets.load_dataset_builder = lambda *_, **__: fail(FileNotFoundError("no data\nfiles"))
    with pytest.raises(UserError, match=r"'owner/set': no data files; use a folder$"):
        dataset_files(SourceConfig(path="owner/set"), COMMIT, instead="use a folder")


# ---- trying again


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_what_may_pass_is_tried_again(status: int, clock: Clock) -> None:
    faults = [answer(status), OSError("reset"), errors.HTTPError("closed"), pa.ArrowInvalid("truncated"), None]

    def read() -> bytes:
        fault = faults.pop(0)
        return b"data" if fault is None else fail(fault)

    assert retry(read, "file") == b"data" and len(clock.waits) == 4


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 416])
def test_what_stays_is_not_tried_again(status: int, clock: Clock) -> None:
    with pytest.raises(UserError, match=rf"data\.sources: a\.parquet could not be read .*\(status {status} and more\)"):
        retry(lambda: fail(answer(status)), "a.parquet")
    assert clock.waits == []


@pytest.mark.parametrize("error", [KeyError("x"), KeyboardInterrupt(), UserError("no column")])
def test_what_is_no_failure_of_the_hub_passes_through(error: BaseException, clock: Clock) -> None:
    with pytest.raises(type(error)) as caught:
        retry(lambda: fail(error), "file")
    assert caught.value is error and clock.waits == []


def test_waits_grow_and_end(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest waits: doubled up to a minute, all within ten minutes; then the run says how it goes on."""
    monkeypatch.setattr(remote.random, "uniform", lambda low, high: high)
    with pytest.raises(UserError, match=r"\(reset\); started again, the run goes on from its last checkpoint$"):
        retry(lambda: fail(OSError("reset")), "file")
    assert clock.waits == [1, 2, 4, 8, 16, 32] + [60] * 8
    assert sum(clock.waits) <= remote.RETRY_SEC < sum(clock.waits) + 60


def test_ranks_do_not_ask_in_step(clock: Clock) -> None:
    """Eight ranks that lost the Hub at once come back at eight times, none much sooner or later than meant."""
    first = []
    for _ in range(8):
        clock.waits.clear()
        with pytest.raises(UserError):
            retry(lambda: fail(OSError("reset")), "file", seconds=3)
        first.append(clock.waits[0])
    assert len(set(first)) == 8 and all(0.5 <= wait <= 1 for wait in first)


def test_one_line_is_never_empty() -> None:
    assert one_line(OSError("a\n  b\tc ")) == "a b c"
    assert one_line(TimeoutError()) == "TimeoutError"


@pytest.mark.parametrize(
    ("file", "answer", "message"),
    [
        ("hf://datasets/o/s@c/a.parquet", ConnectionError("reset"), "reset"),
        ("https://example.org/a.parquet", None, "outside the repository"),
    ],
)
def test_files_that_cannot_be_had(
    monkeypatch: pytest.MonkeyPatch, file: str, answer: Exception | None, message: str
) -> None:
    def infos(*_: object, **__: object) -> list[object]:
        if answer is not None:
            raise answer
        return []

    builder = SimpleNamespace(config=SimpleNamespace(data_files={"train": [file]}))
    library = SimpleNamespace(disable_progress_bars=lambda: None, load_dataset_builder=lambda *_, **__: builder)
    monkeypatch.setitem(sys.modules, "datasets", library)
    monkeypatch.setattr(huggingface_hub.HfApi, "get_paths_info", infos)
    monkeypatch.setattr(remote.time, "sleep", lambda _: None)
    monkeypatch.setattr(remote.time, "monotonic", iter(range(0, 10**6, 5)).__next__)
    with pytest.raises(UserError, match=message):
        dataset_files(SourceConfig(path="o/s"), "c", instead="-")
