"""What is said when the Hub fails, what is tried again, and sources.py against a server on this machine."""

from __future__ import annotations

import email.utils
import io
import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import fake_hub
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import errors

import remote
import sources
from config import SourceConfig, UserError
from remote import Unreachable, arrow_files, dataset_files, hub_commit, one_line, retry

ROOT = Path(__file__).resolve().parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NOW = 1.7e9


def answer(
    status: int, kind: type[errors.HfHubHTTPError] = errors.HfHubHTTPError, **headers: str
) -> errors.HfHubHTTPError:
    """What huggingface_hub raises for a response of this status."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    response: Any = SimpleNamespace(status_code=status, headers=named, request=None)
    return kind(f"status {status}\nand more", response=response)


def fail(error: BaseException) -> NoReturn:
    raise error


class Clock:
    """Stands in for `time`: sleeping is all that takes time."""

    def __init__(self) -> None:
        self.now, self.waits = 0.0, []
        self.time = lambda: NOW

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(remote, "time", clock)
    monkeypatch.setattr(remote, "sleep", clock.sleep)
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
        (json.JSONDecodeError("no JSON", "<html>", 0), "could not be reached (no JSON"),
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
        (answer(403), "status 403 and more"),
        (errors.LocalTokenNotFoundError("no token"), "no token"),
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


def test_sizes_are_asked_for_in_parts(hub_datasets: SimpleNamespace) -> None:
    """The Hub refuses a question for over 1,000 paths; FineWeb-Edu has more."""
    prefix = f"hf://datasets/owner/set@{COMMIT}/"
    hub_datasets.files = {"train": [f"{prefix}data/{i % 10}-{i}.parquet" for i in range(1200)]}
    found = dataset_files(SourceConfig(path="owner/set"), COMMIT, instead="-")
    assert [size for _, size in found] == [100 + i % 10 for i in range(1200)] and len(hub_datasets.asked) == 3


def test_a_file_that_the_hub_does_not_list(hub_datasets: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.HfApi, "get_paths_info", lambda *_, **__: [])
    with pytest.raises(UserError, match=r"the Hub does not know its file 'data/1.parquet'; use a folder$"):
        dataset_files(SourceConfig(path="owner/set"), COMMIT, instead="use a folder")


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def within(error: Exception, context: Exception) -> Exception:
    error.__context__ = context
    return error


@pytest.mark.parametrize(
    ("error", "unreachable"),
    [
        (ConnectionError("no route"), True),
        (errors.HTTPError("closed"), True),
        (answer(503), True),
        (answer(429), True),
        (caused(FileNotFoundError("no such file"), answer(429)), True),
        (caused(RuntimeError("while generating"), errors.HTTPError("no route")), True),
        (within(ConnectionError("no route"), answer(404)), True),  # of the script it looked for and did not find
        (within(FileNotFoundError("no data files"), answer(404)), False),
        (FileNotFoundError("no data files"), False),
        (caused(FileNotFoundError("gated"), answer(403, errors.GatedRepoError)), False),
        (RuntimeError("Dataset scripts are no longer supported"), False),
    ],
    ids=lambda value: f"{type(value).__name__} {value}" if isinstance(value, Exception) else "",
)
def test_only_the_network_is_a_reason_for_a_fallback(
    hub_datasets: SimpleNamespace, error: Exception, unreachable: bool
) -> None:
    source = SourceConfig(path="owner/set")
    hub_datasets.load_dataset_builder = hub_datasets.load_dataset = lambda *_, **__: fail(error)
    for ask in (dataset_files, arrow_files):
        with pytest.raises(UserError, match="Hub dataset 'owner/set'") as caught:
            ask(source, COMMIT, instead="-")
        assert isinstance(caught.value, Unreachable) == unreachable and "\n" not in str(caught.value)


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
    with pytest.raises(
        UserError, match=rf"data\.sources: a\.parquet could not be read .*\(status {status} and more\)"
    ) as caught:
        retry(lambda: fail(answer(status)), "a.parquet")
    assert clock.waits == [] and type(caught.value) is UserError


@pytest.mark.parametrize("error", [KeyError("x"), KeyboardInterrupt(), UserError("no column")])
def test_what_is_no_failure_of_the_hub_passes_through(error: BaseException, clock: Clock) -> None:
    with pytest.raises(type(error)) as caught:
        retry(lambda: fail(error), "file")
    assert caught.value is error and clock.waits == []


def test_waits_grow_and_end(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest waits: doubled up to a minute, all within ten minutes; then the run says how it goes on."""
    monkeypatch.setattr(remote.random, "uniform", lambda low, high: high)
    with pytest.raises(Unreachable, match=r"\(reset\); started again, the run goes on from its last checkpoint$"):
        retry(lambda: fail(OSError("reset")), "file")
    assert clock.waits == [1, 2, 4, 8, 16, 32] + [60] * 8
    assert sum(clock.waits) <= remote.RETRY_SEC < sum(clock.waits) + 60


def test_what_came_whole_and_cannot_be_read_is_damaged(clock: Clock) -> None:
    """Asked for again a few times, and not taken for a Hub that is away."""
    with pytest.raises(
        UserError, match=r"a\.parquet could not be read .*\(no magic\); the file seems to be damaged"
    ) as e:
        retry(lambda: fail(pa.ArrowInvalid("no magic")), "a.parquet")
    assert type(e.value) is UserError and len(clock.waits) > 2 and clock.now <= remote.DAMAGED_SEC


def later(seconds: float) -> str:
    return email.utils.formatdate(NOW + seconds, usegmt=True)


@pytest.mark.parametrize(
    ("error", "low", "high"),
    [
        (answer(429, retry_after="7"), 7, 8),
        (answer(503, retry_after=" 7 "), 7, 8),
        (answer(429, ratelimit='"resolvers";r=0;t=42'), 42, 43),
        (answer(429, ratelimit='"api";r=0;t = 250', retry_after="1"), 250, 251),  # the Hub's own windows: five minutes
        (caused(FileNotFoundError("hidden"), answer(429, retry_after="9")), 9, 10),
        (answer(503, ratelimit='"resolvers";r=100;t=42'), 0.5, 1),  # there is room: not what it waits for
        (answer(429, retry_after=later(30)), 30, 31),
        (answer(429, retry_after=later(-30)), 0.5, 1),
        (answer(429, retry_after="soon"), 0.5, 1),
        (answer(429), 0.5, 1),
    ],
)
def test_what_the_hub_asks_for_is_waited_for(error: Exception, low: float, high: float, clock: Clock) -> None:
    faults = [error]
    before = remote.retries
    assert retry(lambda: fail(faults.pop()) if faults else "data", "file", seconds=5) == "data"
    assert len(clock.waits) == 1 and low <= clock.waits[0] <= high and remote.retries == before + 1


def test_more_than_a_run_can_wait_is_not_waited_for(clock: Clock) -> None:
    with pytest.raises(Unreachable, match="status 429"):
        retry(lambda: fail(answer(429, retry_after="3000")), "file")
    assert clock.waits == []


def test_a_long_wait_shows_that_it_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """The feeding process is replaced when it is silent: five seconds at most between two beats."""
    clock, beats = Clock(), []
    monkeypatch.setattr(remote, "time", clock)
    monkeypatch.setattr(remote, "beat", lambda: beats.append(clock.now))
    faults: list[Exception] = [answer(429, retry_after="32"), OSError("reset")]
    assert retry(lambda: fail(faults.pop()) if faults else "data", "file") == "data"
    assert clock.now > 32 and beats[0] == 0 and beats[-1] == clock.now
    assert max(after - before for before, after in itertools.pairwise(beats)) < 5.001


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


def test_an_answer_that_is_too_short_is_no_damaged_file(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    response = SimpleNamespace(status_code=206, content=b"abc", raise_for_status=lambda: None, headers={}, request=None)
    session = SimpleNamespace(get=lambda *_, **__: response)
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: session)
    monkeypatch.setattr(remote, "_location", lambda name: "https://cdn.example.org/a")
    file = remote.HubFile("hf://datasets/o/s@c/a.parquet", 100)
    with pytest.raises(Unreachable, match=r"\(3 bytes of hf://datasets/o/s@c/a.parquet in place of 100\)"):
        retry(file.read, "a.parquet")


# ---- through a server

CARD = b"""---
configs:
- config_name: default
  data_files: [{split: train, path: data/*}]
- config_name: sample-10BT
  data_files: [{split: train, path: sample/10BT/*}]
- config_name: csv
  data_files: [{split: train, path: csv/*}]
---
"""
HUB_CLIENT = """
import json, sys
import remote, sources
from config import SourceConfig, UserError
from documents import read_unit
remote.TIMEOUT_SEC = 2
remote.sleep = lambda seconds: None  # how long it waits is seen without a server
results = []
for settings in json.loads(sys.argv[1]):
    if "made_in" in settings:
        import datasets
        datasets.config.HF_DATASETS_CACHE = settings.pop("made_in")
    try:
        manifest = sources.resolve([SourceConfig(**settings)])
        documents = [text for unit in manifest.units for text in read_unit(unit).items]
        results.append([manifest.fingerprint, [unit.path for unit in manifest.units], documents])
    except UserError as error:
        results.append(f"{type(error).__name__}: {error}")
print(json.dumps(results))
"""


def ask_hub(settings, endpoint, home, **extra):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **extra}
    env["HF_ENDPOINT"] = endpoint
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", HUB_CLIENT, json.dumps(settings)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=50)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def parquet_bytes(values):
    stream = io.BytesIO()
    ballast = [os.urandom(4000) for _ in values]  # a column that must not be fetched
    pq.write_table(pa.table({"ballast": ballast, "text": values}), stream, row_group_size=20)
    return stream.getvalue()


def test_hub_row_groups_stream_by_ranges_through_faults(tmp_path):
    documents = [f"document {i}" for i in range(90)]
    shards = {"000": parquet_bytes(documents[:50]), "001": parquet_bytes(documents[50:])}
    files = {f"sample/10BT/{name}_00000.parquet": data for name, data in shards.items()}
    files |= {"README.md": CARD, "data/0.parquet": parquet_bytes(["full"]), "csv/a.csv": b"text\nx\n"}
    base = {"path": "owner/set", "name": "sample-10BT"}
    asked = [
        base,
        {**base, "revision": fake_hub.COMMIT},
        {**base, "name": "sample-1BT"},
        {**base, "split": "test"},
        {**base, "text_field": "body"},
        {**base, "revision": "nope"},
        {**base, "path": "owner/other"},
    ]
    with fake_hub.FakeHub("owner/set", files) as hub:
        hub.faults = ["", "", "429", "503", "reset", "truncate", "short", "403", "stall", "429 wait", "", "429 limit"]
        hub.resolve_faults = ["429 limit", "503"]
        first, pinned, *problems = ask_hub(asked, hub.endpoint, tmp_path)
        log, sent_bytes = hub.log, hub.sent_bytes
    assert not hub.faults and not hub.resolve_faults
    assert first[2] == pinned[2] == documents and first[0] == pinned[0]
    assert first[1][0] == f"hf://datasets/owner/set@{fake_hub.COMMIT}/sample/10BT/000_00000.parquet"
    ranges = [path for method, path, span in log if span]
    assert len(ranges) == 2 + 2 * 5 + 9  # footers once, a request for each row group, nine tried again
    assert not [path for method, path, span in log if method == "GET" and path.endswith(".parquet") and not span]
    resolved = Counter(path for _, path, _ in log if "/resolve/" in path and path.endswith("_00000.parquet"))
    listing = [path for _, path, _ in log][: [path in resolved for _, path, _ in log].index(True)]
    assert len(listing) <= 12 and not [path for path in listing if path.endswith(".parquet")]  # as many for any number
    assert sum(resolved.values()) == 2 + 1 + 2  # once a file, again where the address had run out, two tried again
    assert sent_bytes < 0.8 * sum(map(len, shards.values()))  # mostly the footers' 64 KiB
    messages = [
        "'sample-1BT': BuilderConfig 'sample-1BT' not found. Available: ['default', 'sample-10BT', 'csv']",
        "has no split 'test'; it has: train",
        "no text column 'body'",
        "no such revision",
        "no such repository on the Hub",
    ]
    for problem, message in zip(problems, messages, strict=True):
        assert message in problem and "\n" not in problem and problem.startswith("UserError")


def test_a_hub_dataset_of_other_files_goes_through_datasets(tmp_path):
    lines = "".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(30)).encode()
    files = {"README.md": CARD, "data/0.jsonl": lines, "sample/10BT/a.jsonl": b"{x\n"}
    asked = [
        {"path": "owner/set"},
        {"path": "owner/set", "text_field": "body"},
        {"path": "owner/set", "name": "sample-10BT"},
        {"path": "owner/script"},
        {"path": "owner/gated"},
        {"path": "owner/empty"},
        {"path": "owner/csv"},
        {"path": "owner/set", "made_in": str(tmp_path / "again")},  # the rows are the same, wherever they are made
    ]
    with fake_hub.FakeHub("owner/set", files) as hub:
        hub.repos |= {"owner/script": {"script.py": b""}, "owner/gated": None, "owner/empty": {"README.md": b"# Empty"}}
        hub.repos["owner/csv"] = {"a.csv": b"text\none\ntwo\n"}
        found, no_column, broken, script, gated, empty, csv, again = ask_hub(asked, hub.endpoint, tmp_path)
    assert found[2] == [f"line {i}" for i in range(30)] and found[1][0].endswith(".arrow") and again[0] == found[0]
    assert again[1] != found[1] and str(tmp_path / "again") in again[1][0]
    assert f"owner/set@{fake_hub.COMMIT} has no text column 'body'" in no_column
    assert "Hub dataset 'owner/set': JSON parse error" in broken
    assert "'owner/script': Dataset scripts are no longer supported, but found script.py" in script
    assert "Hub dataset 'owner/gated' is gated: accept its terms" in gated
    assert "Hub dataset 'owner/empty': " in empty
    for problem in (no_column, broken, script, gated, empty):  # nothing that data.fallback is for
        assert problem.startswith("UserError: ") and "\n" not in problem
    assert csv[2] == ["one", "two"]


@pytest.mark.parametrize("setting", [{"ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": True}], ids=str)
def test_without_the_hub_one_line_says_what_to_do(setting, monkeypatch):
    for name, value in setting.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    with pytest.raises(Unreachable) as caught:
        sources.resolve([SourceConfig(path="HuggingFaceFW/fineweb-edu")])
    problem = str(caught.value)
    assert "Hub dataset 'HuggingFaceFW/fineweb-edu': the Hugging Face Hub could not be reached" in problem
    assert "data.sources=FILE" in problem and "--config quickstart" in problem and "\n" not in problem


def test_a_hub_that_goes_away_while_files_are_listed_is_unreachable(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(remote.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(remote, "sleep", lambda wait: clock.__setitem__(0, clock[0] + wait))
    monkeypatch.setattr(remote, "hub_commit", lambda *_, **__: "c")
    monkeypatch.setattr(remote, "dataset_files", lambda *_, **__: [("hf://datasets/o/s@c/a.parquet", 1000)])

    def away(name):
        raise errors.HTTPError("connection refused")

    monkeypatch.setattr(remote, "_location", away)
    with pytest.raises(remote.Unreachable, match=r"a\.parquet could not be read from the Hub \(connection refused\)"):
        sources.resolve([SourceConfig(path="o/s")])
    assert 10 < clock[0] <= 30


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7), ({"retry-after": "9" * 20}, 3600), ({"ratelimit": "r=0;t=300"}, 300),
        ({"ratelimit": f"r=0;t={'9' * 400}"}, 3600), ({"retry-after": "Fri, 31 Dec 9999 23:59:59 GMT"}, 3600),
        ({"retry-after": "Thu, 01 Jan 1970 00:00:00 GMT"}, 0), ({"retry-after": "soon"}, 0), ({}, 0),
    ],
)  # fmt: skip
def test_no_answer_puts_a_run_off_for_ever(headers: dict[str, str], seconds: float) -> None:
    """Nor a clock of ours that went back, where the answer has a date."""
    assert remote.asked_wait(SimpleNamespace(status_code=429, headers=headers)) == seconds
