"""A run and its copy on the Hub: whole runs against a stand-in, with the real client."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from fake_model_hub import TOKEN, FakeModelHub, Fault
from test_train import hashes, learned, metrics, newest, stop_after, text, tiny  # noqa: F401

import checkpoint
import environment
import generate
import mirror
import train
from counts import count_parameters
from model import meta_model

REPO = "hub.repo_id=someone/model"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of huggingface_hub to its client


@pytest.fixture
def hub(server: FakeModelHub, monkeypatch: pytest.MonkeyPatch) -> FakeModelHub:
    """What a run waits for at its end is short."""
    monkeypatch.setattr(mirror, "FLUSH_SEC", 30.0)
    return server


def test_an_empty_machine_goes_on_from_the_hub(
    tiny,  # noqa: F811
    hub: FakeModelHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Stopped, its disk lost, started again by the same command: the bits of a run that was never stopped."""
    assert tiny("whole", "train.steps=12") == 0
    stop_after(tiny, "run", 5, "train.steps=12", REPO)
    repo = hub.repos["someone/model"]
    assert repo.private and {"config.json", "manifest.json", "LATEST.json", "README.md"} <= repo.head.files.keys()
    shutil.rmtree(tmp_path / "run")
    pull = mirror.hub.pull

    def dies(*arguments: Any, **options: Any) -> None:
        pull(*arguments, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # as soon as the checkpoint is here
        patch.setattr(mirror.hub, "pull", dies)
        assert tiny("run", "train.steps=12", REPO) == 130
    assert tiny("run", "train.steps=12", REPO) == 0
    told = capsys.readouterr()
    assert "hub: fetching step 5 of someone/model" in told.out and "after step 5" in told.out
    assert learned(tmp_path / "run") == learned(tmp_path / "whole")  # the metrics of before came with it
    samples = (tmp_path / "run" / "samples.md").read_text(encoding="utf-8")
    assert samples == (tmp_path / "whole" / "samples.md").read_text(encoding="utf-8")
    ours, theirs = newest(tmp_path / "run"), newest(tmp_path / "whole")
    assert hashes(ours) == hashes(theirs)
    for name, content in repo.head.files.items():
        if (ours / name).exists():
            assert (ours / name).read_bytes() == content, name
    assert "hub_lag_steps" in metrics(tmp_path / "run")[-1]
    assert TOKEN not in told.out + told.err
    assert not any(TOKEN.encode() in file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file())
    # What is on the Hub is a model for others, too; what a run left there is not another run's.
    monkeypatch.chdir(tmp_path)
    assert generate.main(["--checkpoint", "someone/model", "--prompt", "Emma", "--max-new-tokens", "2"]) == 0
    assert tiny("other", "train.steps=12", "train.seed=7", REPO) == 2
    assert "train.seed" in capsys.readouterr().err
    assert tiny("whole", "train.steps=14", REPO) == 2
    assert "holds another run than" in capsys.readouterr().err
    assert tiny("run", "train.steps=12", REPO) == 0  # finished


def test_a_hub_out_of_reach(
    tiny,  # noqa: F811
    hub: FakeModelHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With nothing here, a run could be there; with a checkpoint here it goes on, and says what is missing."""
    monkeypatch.setattr(mirror, "FLUSH_SEC", 0.5)
    stop_after(tiny, "run", 2, "train.steps=3")
    hub.faults.append(Fault("", "503", 10**6))
    monkeypatch.setenv("HF_REPO_ID", "someone/model")
    assert tiny("nothing") == 2
    error = capsys.readouterr().err
    assert "to start afresh: --resume never" in error and error.count("\n") == 1
    assert not (tmp_path / "nothing").exists()
    assert tiny("run", "train.steps=3") == train.EXIT_UNPUSHED
    told = capsys.readouterr().out
    assert "going on from" in told and "the newest checkpoint is not on the Hub" in told
    assert newest(tmp_path / "run").name == "step_00000003"
    hub.faults.clear()
    assert tiny("run", "train.steps=3") == 0  # finished, but not pushed yet
    assert json.loads(hub.repos["someone/model"].head.files["LATEST.json"])["step"] == 3


def test_a_repository_of_another_run_is_refused_before_anything_changes(
    tiny,  # noqa: F811
    hub: FakeModelHub,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stop_after(tiny, "run", 2, "train.steps=3", REPO)
    before = hashes(tmp_path / "run")
    assert tiny("run", "train.steps=3", "--resume", "never", REPO) == 2
    assert "another run" in capsys.readouterr().err
    assert hashes(tmp_path / "run") == before and not (tmp_path / "run.1").exists()
    assert tiny("other", "train.steps=3", "run.name=other", REPO) == 2
    assert "holds the run 'tiny', this one is 'other'" in capsys.readouterr().err
    assert tiny("other", "train.steps=3", "model.hidden_size=48", REPO) == 2
    assert "model.hidden_size" in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_of_two_checkpoints_the_newer_one_wins(tiny, hub: FakeModelHub, tmp_path: Path) -> None:  # noqa: F811
    stop_after(tiny, "run", 2, "train.steps=4", REPO)
    shutil.copytree(tmp_path / "run", tmp_path / "old")
    stop_after(tiny, "run", 3, "train.steps=4", REPO)
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "old").rename(tmp_path / "run")
    seen = []
    real = checkpoint.verify
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "verify", lambda path: seen.append(path.name[:13]) or real(path))
        assert tiny("run", "train.steps=4", REPO) == 0
    # Each was read once: here, as it was pulled, and after it was written; as links, before it is pushed.
    assert sorted(seen) == ["step_00000002", "step_00000003", "step_00000004", "step_00000004"]
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4]
    assert json.loads((tmp_path / "run" / "hub.json").read_text())["run"]


def test_a_checkpoint_that_is_named_wins(
    tiny,  # noqa: F811
    hub: FakeModelHub,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On an empty machine: over a newer one in the repository, which has to be of this run."""
    stop_after(tiny, "run", 2, "train.steps=4", REPO)
    shutil.copytree(newest(tmp_path / "run"), tmp_path / "step_00000002")
    stop_after(tiny, "run", 3, "train.steps=4", REPO)
    shutil.rmtree(tmp_path / "run")
    named = ("train.steps=4", REPO, "--resume", str(tmp_path / "step_00000002"))
    assert tiny("run", *named, "run.name=other") == 2
    assert "holds the run 'tiny', this one is 'other'" in capsys.readouterr().err
    assert tiny("run", *named, "train.seed=7") == 2
    assert not (tmp_path / "run").exists()
    assert tiny("run", *named) == 0
    assert "holds step 3 of this run; it goes on from" in capsys.readouterr().out
    assert [line["step"] for line in metrics(tmp_path / "run")] == [3, 4]
    assert json.loads(hub.repos["someone/model"].head.files["LATEST.json"])["step"] == 4
    assert tiny("run", *named, "train.steps=5") == 0  # and again, on the branch
    assert json.loads(hub.repos["someone/model"].head.files["LATEST.json"])["step"] == 5


def test_without_a_repository_nothing_is_asked(hub: FakeModelHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_REPO_ID", raising=False)
    assert environment.hub_repository() is None
    copy = mirror.Mirror(None, train.Config(), count_parameters(meta_model(train.Config().model)), 0, set())
    copy.fetch("auto", "fp32", lambda: None)
    copy.start()
    assert copy.metrics() == {} and copy.finish(lambda: False, hurried=True) and copy.catch_up() and hub.log == []
