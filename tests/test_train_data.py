"""Whole runs on each kind of data: exact resume, the end of epochs, shards in place of text, a fallback, two ranks."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import inspect_data
import prepare_data
import pytest
from test_train import ROOT, TINY, emma, hashes, learned, metrics, newest, text, tiny  # noqa: F401  # fixtures

import checkpoint
import config as configuration
import journal
import sources
import train
from dataset import open_dataset
from remote import Unreachable
from resume import STATE_FILE
from stream import Cursor

QUICK = ("train.micro_batch=8", "eval.every_steps=1000")  # whole steps; held-out rows at the end only
PACKED = ("data.packing=best_fit", "data.document_mask=true")


@pytest.fixture
def two_texts(tmp_path: Path) -> str:
    """Two weighted sources for the command line."""
    whole = emma()
    for name, part in (("a", whole[:60_000]), ("b", whole[60_000:])):
        (tmp_path / f"{name}.txt").write_text(part, encoding="utf-8")
    return f"data.sources=[{{path: {tmp_path}/a.txt, weight: 0.7}}, {{path: {tmp_path}/b.txt, weight: 0.3}}]"


@pytest.fixture
def quick(tiny):  # noqa: F811
    return lambda name, *options: tiny(name, *QUICK, *options)


@pytest.fixture(scope="module")
def undisturbed(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A run on the plain configuration, to compare with or to go on from a copy of."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "tiny.yaml").write_text(TINY, encoding="utf-8")
    arguments = ["--config", str(folder / "tiny.yaml"), f"run.dir={folder / 'run'}", f"data.sources={text}"]
    assert train.main([*arguments, *QUICK]) == 0
    return folder / "run"


def back_to(run: Path, step: int) -> None:
    """The run as it was when it had just saved this step."""
    for path in (run / "checkpoints").iterdir():
        if path.name > f"step_{step:08d}":
            shutil.rmtree(path)


@pytest.mark.parametrize(
    "options", [("data.packing=best_fit",), PACKED, ("data.document_mask=true", "data.workers=2"), ("MIXED",)], ids=str
)
def test_each_kind_of_rows_resumes_exactly(quick, tmp_path: Path, two_texts: str, options) -> None:
    options = tuple(two_texts if option == "MIXED" else option for option in options)
    if "data.packing=best_fit" in options:
        options = (*options, f"data.sources={tmp_path / 'a.txt'}")
    options = (*options, "train.steps=12", "checkpoint.every_steps=6")
    assert quick("run", *options, "data.workers=0") == 0
    run = tmp_path / "run"
    wanted, tensors = learned(run), hashes(newest(run))
    assert wanted[-1][2] < wanted[0][2] - 0.3
    if "data.packing=best_fit" in options:
        last = metrics(run)[-1]
        assert last["packing_used"] > 0.9 and 0.5 < last["packing_cropped"] < 1  # documents of 8 KB in rows of 32
    back_to(run, 6)
    assert quick("run", *options) == 0
    assert learned(run) == wanted and hashes(newest(run)) == tensors


@pytest.mark.slow
@pytest.mark.dist
def test_two_ranks_equal_one_on_packed_rows(tiny, tmp_path: Path, two_texts: str) -> None:  # noqa: F811
    """What counts in the loss differs from row to row, and from rank to rank."""
    options = (*PACKED, two_texts, "train.batch_tokens=160", "train.steps=8", "optim.ns_dtype=fp32", "optim.eps=1e-6")
    options = (*options, "train.micro_batch=1")
    assert tiny("one", *options) == 0
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *launcher, str(ROOT / "train.py"), *tiny.command("two", *options)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    for key in ("loss", "mtp_loss", "grad_norm", "val_loss"):
        values = [[line[key] for line in lines if key in line] for lines in (one, two)]
        assert values[1] == pytest.approx(values[0], rel=1e-5) and values[0], key
    assert [line["cursor"] for line in one] == [line["cursor"] for line in two]


# ---- the end of the data


def test_the_last_epoch_ends_a_run(quick, tmp_path: Path, two_texts: str, capsys) -> None:
    for name in "ab":
        path = tmp_path / f"{name}.txt"
        path.write_text(path.read_text(encoding="utf-8")[:12_000], encoding="utf-8")
    once = two_texts.replace("}", ", epochs: 1}")
    assert quick("run", once, "train.steps=100000", "checkpoint.every_steps=100000") == 0
    told = capsys.readouterr().out
    run = tmp_path / "run"
    end = metrics(run)[-1]["step"]
    assert f"the sources' last epoch ended at step {end} of 100000: this run is complete" in told
    assert 30 < end < 200 and "val_bpb" in metrics(run)[-1] and "**Emma**" in (run / "samples.md").read_text()
    assert newest(run).name == f"step_{end:08d}" and "done: the model is in" in told
    before = hashes(run)
    assert quick("run", once, "train.steps=100000") == 0
    assert "is finished" in capsys.readouterr().out and hashes(run) == before
    twice = two_texts.replace("}", ", epochs: 2}")
    assert quick("run", twice, f"train.steps={end + 3}") == 0
    assert metrics(run)[-1]["step"] == end + 3


def test_weights_must_stay(quick, tmp_path: Path, two_texts: str, capsys) -> None:
    assert quick("run", two_texts, "train.steps=2") == 0
    capsys.readouterr()
    assert quick("run", two_texts.replace("0.7", "0.6"), "train.steps=4") == 2
    told = capsys.readouterr().err
    assert "the weights of data.sources: the checkpoint was trained with [0.7, 0.3]" in told and told.count("\n") == 1
    for option in ("data.packing=best_fit", "data.document_mask=true", "data.seq_len=16"):
        assert quick("run", two_texts, "train.steps=4", option) == 2
        assert option.split("=")[0] in capsys.readouterr().err


# ---- shards and cache


def test_shards_and_text_may_take_each_other_s_place(quick, tmp_path: Path, text: Path, undisturbed) -> None:  # noqa: F811
    run = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    wanted, tensors = learned(run), hashes(newest(run))
    out = tmp_path / "shards"
    arguments = ["--config", str(tmp_path / "tiny.yaml"), "--out", str(out), f"data.sources={text}"]
    assert prepare_data.main(arguments) == 0
    mapped = (f"data.sources={out}", f"data.tokenizer={out / 'tokenizer'}")
    assert quick("mapped", *mapped) == 0
    assert [line[2:] for line in learned(tmp_path / "mapped")] == [line[2:] for line in wanted]
    back_to(run, 10)
    assert quick("run", f"data.sources={out}") == 0
    assert learned(run) == wanted
    found = hashes(newest(run))
    same = {name for name in tensors if tensors[name] == found[name]}
    assert {name for name in tensors if name.endswith(".safetensors")} <= same


def test_the_cache_changes_nothing(quick, tmp_path: Path) -> None:
    """Filled while the text comes round, then read."""
    lines = (json.dumps({"text": emma()[start : start + 80]}) + "\n" for start in range(0, 4000, 80))
    (tmp_path / "short.jsonl").write_text("".join(lines), encoding="utf-8")
    settings = ("train.steps=3", f"data.sources={tmp_path / 'short.jsonl'}")
    assert quick("plain", *settings) == 0
    for name in ("first", "second"):
        assert quick(name, f"data.cache={tmp_path / 'cache'}", *settings) == 0
        assert learned(tmp_path / name) == learned(tmp_path / "plain")
    (folder,) = (tmp_path / "cache").iterdir()
    assert (folder / "unit-00000000.safetensors").is_file()


# ---- a Hub out of reach


def test_a_fallback_is_stored_and_never_left(quick, tmp_path: Path, text: Path, monkeypatch, capsys) -> None:  # noqa: F811
    real, reachable = sources.resolve, []

    def resolve(listed, cache=None):
        if listed[0].path == "owner/set" and not reachable:
            raise Unreachable("Hub dataset 'owner/set': the Hugging Face Hub could not be reached")
        if listed[0].path == "owner/set":
            pytest.fail("a resumed run looked for its first sources")
        return real(listed, cache)

    monkeypatch.setattr(sources, "resolve", resolve)
    options = ("data.sources=owner/set", f"data.fallback={text}")
    assert quick("run", *options, "train.steps=2") == 0
    assert "could not be reached; training on data.fallback = " in capsys.readouterr().out
    assert json.loads((newest(tmp_path / "run") / STATE_FILE).read_text())["fallback"] is True
    reachable.append(True)
    assert quick("run", *options, "train.steps=3") == 0
    assert metrics(tmp_path / "run")[-1]["step"] == 3


def test_a_run_is_inspected_by_its_own_files(quick, tmp_path: Path, text: Path, monkeypatch, capsys) -> None:  # noqa: F811
    """One that trained on its fallback and was moved aside; its first sources, and its old place, are others' now."""
    other = tmp_path / "other.txt"
    other.write_text("something else\n\n" * 9000, encoding="utf-8")
    real, reachable = sources.resolve, []

    def resolve(listed, cache=None):
        if listed[0].path != "owner/set":
            return real(listed, cache)
        if not reachable:
            raise Unreachable("Hub dataset 'owner/set': the Hugging Face Hub could not be reached")
        return real([listed[0].model_copy(update={"path": str(other)})], cache)

    monkeypatch.setattr(sources, "resolve", resolve)
    options = ("data.sources=owner/set", f"data.fallback={text}", "train.steps=3")
    assert quick("run", *options) == 0
    moved = (tmp_path / "run").rename(tmp_path / "run.1")
    reachable.append(True)
    assert quick("run", f"data.sources={text}", "train.steps=3", "train.seed=9") == 0
    with (moved / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "cur')  # the end of a run that was killed
    capsys.readouterr()
    assert inspect_data.main(["trace", "--config", str(moved), "--step", "3"]) == 0
    told = capsys.readouterr().out
    assert told.count(" of step 3: 32 tokens") == 8 and told.count(f" of {text}, bytes ") >= 8 and "other" not in told
    config = configuration.load(str(moved / "config.yaml"), [])
    before = Cursor.from_dict(metrics_of(moved)[1]["cursor"])
    batch = next(open_dataset(config, newest(moved), fallback=True).feed(config, before).batches())
    ids = open_dataset(config, newest(moved), fallback=True).tokenizer.decode(batch.tokens[0][:16].tolist())
    assert repr(" ".join(str(ids).split()))[1:20] in told.splitlines()[1]


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """But for a line that is not whole."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]


def test_a_supply_below_demand_is_told(quick, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(journal, "MOST_WAITING", -1.0)
    assert quick("run", "train.steps=3", "data.workers=1") == 0
    told = capsys.readouterr().out
    assert told.count("the data come too slowly: ") == 2  # not of the first line, when everything starts
    assert quick("run", "train.steps=5", "data.workers=1") == 0
    assert capsys.readouterr().out.count("the data come too slowly: ") == 1
    last = metrics(tmp_path / "run")[-1]
    assert last["data_queue"] >= 0 and last["data_restarts"] == last["data_retries"] == last["skipped_documents"] == 0
    assert checkpoint.latest(tmp_path / "run" / "checkpoints") is not None


def test_minutes_end_a_run_and_it_goes_on(quick, tmp_path: Path, monkeypatch, capsys, undisturbed) -> None:
    assert quick("run", "train.max_minutes=1e-9") == train.EXIT_TIME
    assert metrics(tmp_path / "run") == [] and "are over: stopped after step 0 of 20" in capsys.readouterr().out
    real = train.train_step

    def slow(run, step, batch):
        if step == 6:
            monkeypatch.setattr(train.time, "monotonic", lambda: 1e9)
        return real(run, step, batch)

    monkeypatch.setattr(train, "train_step", slow)
    assert quick("run", "train.max_minutes=60") == train.EXIT_TIME
    assert newest(tmp_path / "run").name == "step_00000007"
    monkeypatch.undo()
    assert quick("run") == 0 and learned(tmp_path / "run") == learned(undisturbed)
