"""Numbers that are not finite, memory that runs out, and the size of a checkpoint: whole runs of the tiny model."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_train import ROOT, hashes, learned, metrics, newest, stop_after, text, tiny  # noqa: F401

import checkpoint
import config as configuration
import saver
import train
from model import meta_model
from resume import STATE_FILE, TrainState
from run import checkpoint_bytes


def poison(monkeypatch: pytest.MonkeyPatch, bad: set[int]) -> list[tuple[int, bool]]:
    """NaN in a gradient in these calls of `train_step`, counted from 0; what each came to is returned."""
    real, seen = train.train_step, []

    def step(run: Any, number: int, batch: Any) -> Any:
        hook = None
        if len(seen) in bad:
            hook = next(run.model.parameters()).register_hook(lambda grad: grad * float("nan"))
        try:
            result = real(run, number, batch)
        finally:
            if hook is not None:
                hook.remove()
        seen.append((number, result["skipped"]))
        return result

    monkeypatch.setattr(train, "train_step", step)
    return seen


def test_six_in_a_row_go_back_to_a_checkpoint(
    tiny,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Five do not. The checkpoint is one from before the first of them; the data go on past what it failed on."""
    seen = poison(monkeypatch, {3, 4, 5, 6, 7} | {13, 14, 15, 16, 17, 18})
    assert tiny("run", "train.steps=20", "checkpoint.every_steps=2") == 0
    assert [number for number, _ in seen] == [*range(19), *range(12, 20)]
    assert "no finite gradient for 6 steps, the last of them 19: back to step 12" in capsys.readouterr().out
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [*range(1, 21)]
    assert [line["skipped"] for line in lines[:12]] == [False] * 3 + [True] * 5 + [False] * 4
    assert not any(line["skipped"] for line in lines[12:])
    state = TrainState.read(newest(tmp_path / "run"))
    assert (state.rollbacks, state.skipped_steps, state.tokens) == (1, 11, 20 * 256)
    assert state.cursor["row"] == 27 * 8  # every batch was of new rows


def test_with_no_checkpoint_yet_it_begins_again(
    tiny,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = poison(monkeypatch, set(range(6)))
    assert tiny("run", "train.steps=8") == 0
    assert [number for number, _ in seen] == [*range(6), *range(8)]
    assert [line["skipped"] for line in metrics(tmp_path / "run")] == [False] * 8


def test_it_gives_up_after_three_times(
    tiny,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    poison(monkeypatch, set(range(4, 1000)))
    assert tiny("run", "checkpoint.every_steps=2") == train.EXIT_DIVERGED
    told = capsys.readouterr().out
    assert "(3 of 3 times)" in told and "lower optim.lr" in told
    dump = json.loads((tmp_path / "run" / "diverged.json").read_text())
    assert dump["metrics"]["skipped"] and dump["step"] == 10
    assert all(weight > 0 for weight, _ in dump["norms"].values())
    assert [name for name, (_, gradient) in dump["norms"].items() if gradient is None] == ["model.embed_tokens.weight"]
    assert newest(tmp_path / "run").name == "step_00000004"  # and no younger one: nothing was learned since
    assert tiny("run", "checkpoint.every_steps=2") == train.EXIT_DIVERGED  # nor is it stuck in a half-way state


def test_out_of_memory_halves_the_rows_and_loses_no_step(
    tiny,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from model import DeepSeekV3

    assert tiny("whole", "train.steps=3") == 0
    real = DeepSeekV3.forward

    def forward(self: Any, tokens: torch.Tensor, *args: Any, **options: Any) -> Any:
        if self.training and options.get("loss_weights") and len(tokens) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, tokens, *args, **options)

    monkeypatch.setattr(DeepSeekV3, "forward", forward)
    assert tiny("small", "train.steps=3") == 0
    assert capsys.readouterr().out.count("out of memory: ") == 2  # 4 rows, 2, 1
    for ours, theirs in zip(metrics(tmp_path / "small"), metrics(tmp_path / "whole"), strict=True):
        assert ours["step"] == theirs["step"] and ours["tokens"] == theirs["tokens"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)

    # What fits is kept on resume, unless other rows are asked for: equal bits, no step tried in vain.
    stop_after(tiny, "parts", 2, "train.steps=3")
    capsys.readouterr()
    assert tiny("parts", "train.steps=3") == 0
    assert "out of memory" not in capsys.readouterr().out
    assert learned(tmp_path / "parts") == learned(tmp_path / "small")
    assert (newest(tmp_path / "parts") / STATE_FILE).read_bytes() == (
        newest(tmp_path / "small") / STATE_FILE
    ).read_bytes()
    assert tiny("parts", "train.steps=4", "train.micro_batch=2") == 0
    assert capsys.readouterr().out.count("out of memory: ") == 1

    def never(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(DeepSeekV3, "forward", never)
    assert tiny("none") == 2
    assert "out of memory with one row of data.seq_len at a time" in capsys.readouterr().err


def test_out_of_memory_elsewhere_is_one_line(
    tiny,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the optimizer's step, say: weights may have changed, so the checkpoint is what there is."""
    import optim

    def never(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(optim.Muon, "step", never)
    assert tiny("run") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: out of memory; the same command goes on") and error.count("\n") == 1


def test_a_state_that_cannot_be_copied_does_not_change_while_it_is_written(
    tiny,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ("train.steps=3", "checkpoint.every_steps=1")
    assert tiny("whole", *options) == 0
    real = checkpoint.save

    def full(*_: Any) -> Any:
        raise MemoryError

    def slow(*arguments: Any, **named: Any) -> Path:
        time.sleep(0.5)
        return real(*arguments, **named)

    monkeypatch.setattr(saver, "snapshot", full)
    monkeypatch.setattr(checkpoint, "save", slow)
    assert tiny("live", *options) == 0
    assert "too little memory to copy the state of step 1" in capsys.readouterr().out
    assert hashes(tmp_path / "live" / "checkpoints") == hashes(tmp_path / "whole" / "checkpoints")


def test_a_last_checkpoint_that_cannot_be_written_is_an_exit_code(
    tiny,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save", full)
    assert tiny("run", "train.steps=2") == train.EXIT_UNSAVED
    told = capsys.readouterr().out
    assert "the checkpoint of step 2 could not be written: No space left on device; training goes on" in told
    assert "checkpoints could not be written; the newest in" in told


def test_an_optimizer_state_of_another_model_is_one_line(
    tiny,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stop_after(tiny, "run", 1, "train.steps=2")
    real, other = checkpoint.load, {"nowhere.momentum": torch.zeros(1)}
    monkeypatch.setattr(
        checkpoint, "load", lambda path, group="model": other if group == "optimizer" else real(path, group)
    )
    assert tiny("run", "train.steps=2") == 2
    error = capsys.readouterr().err
    assert "step_00000001: no optimizer state" in error and "Traceback" not in error


def test_a_copied_folder_goes_on_and_unsafe_disks_are_told(
    tiny,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stop_after(tiny, "run", 2, "train.steps=4")
    assert "network drive" not in capsys.readouterr().out
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    shutil.rmtree(tmp_path / "run")
    monkeypatch.setattr(checkpoint, "network_drive", lambda _: "fuse")
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
    assert tiny("copy", "train.steps=4") == 0
    told = capsys.readouterr().out
    assert "after step 2" in told and "run.dir is on a network drive (fuse)" in told
    assert "the disk of Colab goes with the session" in told
    assert [line["step"] for line in metrics(tmp_path / "copy")] == [1, 2, 3, 4]


SLOW_WRITER = """
import sys, time
import checkpoint, train

save = checkpoint.save
checkpoint.save = lambda *args, **options: (time.sleep(12), save(*args, **options))[1]
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [("train.max_minutes=0.6", "train.steps=100000"), ("train.steps=2", "train.hang_minutes=0.1")], ids=str
)
def test_all_ranks_wait_for_the_last_checkpoint(tiny, tmp_path: Path, options: tuple[str, ...]) -> None:  # noqa: F811
    """Were one to leave, torchrun would stop the one that writes; nor may it be taken for one that hangs."""
    (tmp_path / "slow.py").write_text(SLOW_WRITER)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(tmp_path / "slow.py")]
    command = [sys.executable, *launcher, *tiny.command("run", *options)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)
    assert newest(tmp_path / "run").name >= "step_00000001", result.stderr
    assert ("exitcode  : 3" if "max" in options[0] else "done: the model is in") in result.stdout + result.stderr


@pytest.mark.parametrize("overrides", [(), ("optim.name=adamw",), ("optim.momentum_dtype=bf16",)])
def test_the_size_of_a_checkpoint(tiny, tmp_path: Path, overrides: tuple[str, ...]) -> None:  # noqa: F811
    """Known before a model is built: a disk that is too small is told at once."""
    assert tiny("run", "train.steps=1", *overrides) == 0
    config = configuration.load(str(tmp_path / "tiny.yaml"), list(overrides))
    found = sum(file.stat().st_size for file in newest(tmp_path / "run").glob("[mo]*.safetensors"))
    assert checkpoint_bytes(config, meta_model(config.model)) == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize("depth", [0, 2])
def test_weights_of_a_model_with_another_number_of_mtp_layers(
    tiny,  # noqa: F811
    tmp_path: Path,
    depth: int,
) -> None:
    """What both have is taken; the layers that are new start as they would without."""
    assert tiny("first", "train.steps=1") == 0
    keys = [f"train.init_from={tmp_path / 'first'}", f"model.num_nextn_predict_layers={depth}"]
    assert tiny("other", *keys, "train.steps=1", "optim.lr=1e-9") == 0
    one, other = (load_file(newest(tmp_path / name) / "model.safetensors") for name in ("first", "other"))
    common = [name for name in one.keys() & other.keys() if "bias" not in name]
    assert "lm_head.weight" in common and len(common) < max(len(one), len(other))
    for name in common:
        torch.testing.assert_close(one[name], other[name], atol=1e-6, rtol=0)
