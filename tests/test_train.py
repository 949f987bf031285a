"""Whole runs: files, exact resume, signals, DDP, and what may not change. Tiny models, a slice of the shipped text."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import config as configuration
import generate
import resume
import signals
import train
from resume import STATE_FILE

ROOT = Path(train.__file__).parent
TINY = """
model:
  vocab_size: 320
  hidden_size: 32
  num_hidden_layers: 2
  num_attention_heads: 2
  q_lora_rank: 16
  kv_lora_rank: 16
  qk_nope_head_dim: 8
  qk_rope_head_dim: 8
  v_head_dim: 16
  intermediate_size: 48
  moe_intermediate_size: 16
  n_routed_experts: 4
  num_experts_per_tok: 2
  max_position_embeddings: 64
  initializer_range: 0.02
data: {tokenizer: bpe, seq_len: 32, val_fraction: 0.1, workers: 0}
train: {steps: 20, micro_batch: 4, batch_tokens: 256, precision: fp32}
optim: {lr: 3e-3, warmup: 0.1}
log: {every_steps: 1}
eval: {every_steps: 10, tokens: 300}
sample: {every_steps: 1000, max_new_tokens: 4, prompts: [Emma]}
checkpoint: {every_steps: 10, keep: 10}
"""


def emma() -> str:
    """120 KB of it."""
    import pyarrow.parquet as pq

    rows = pq.read_table(ROOT / "corpus" / "austen.parquet").to_pylist()
    return "\n\n".join(row["text"] for row in rows[:40])[:120_000]


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Emma in documents of 800 characters: whole ones are evaluated."""
    path, whole = tmp_path_factory.mktemp("text") / "emma.jsonl", emma()
    lines = (json.dumps({"text": whole[start : start + 800]}) + "\n" for start in range(0, len(whole), 800))
    path.write_text("".join(lines), encoding="utf-8")
    return path


def runs_in(folder: Path, text: Path) -> Callable[..., int]:
    """Run `train.main` on the tiny configuration; the run's folder is `folder/<name>`."""
    (folder / "tiny.yaml").write_text(TINY, encoding="utf-8")

    def command(name: str, *arguments: str) -> list[str]:
        overrides = [f"run.dir={folder / name}", f"data.sources={text}"]
        return ["--config", str(folder / "tiny.yaml"), *overrides, *arguments]

    def start(name: str, *arguments: str) -> int:
        return train.main(command(name, *arguments))

    start.command = command  # type: ignore[attr-defined]
    return start


@pytest.fixture
def tiny(tmp_path: Path, text: Path):
    return runs_in(tmp_path, text)


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def learned(run: Path) -> list[tuple[Any, ...]]:
    """What two equal runs must agree on, to the last bit."""
    keys = ("step", "tokens", "loss", "mtp_loss", "balance_loss", "grad_norm", "lr", "val_loss")
    return [tuple(line.get(key) for key in keys) for line in metrics(run)]


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def newest(run: Path) -> Path:
    found = checkpoint.latest(run / "checkpoints")
    assert found is not None
    return found


def test_a_run_and_its_files(tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with mock.patch("resume.model_files", wraps=resume.model_files) as made:
        assert tiny("run") == 0
    made.assert_called_once()  # at the start: later the disk of temporary files may be full
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir()} == {"config.yaml", "metrics.jsonl", "samples.md", "checkpoints"}
    lines = metrics(run)
    assert [line["step"] for line in lines] == list(range(1, 21)) and lines[-1]["tokens"] == 20 * 256
    for key in ("loss", "lr", "grad_norm", "tokens_per_sec", "mfu", "data_wait_sec", "mtp_loss", "accuracy", "experts"):
        assert all(key in line for line in lines), key
    assert [line["step"] for line in lines if "val_bpb" in line] == [10, 20]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    assert len(lines[0]["experts"]) == 2 and sum(n for _, n in lines[0]["experts"][0]["busiest"]) <= 512
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step_00000010", "step_00000020"]
    assert "## Step 20\n\n> **Emma**" in (run / "samples.md").read_text(encoding="utf-8")
    output = capsys.readouterr().out
    assert "step 20/20" in output and "generate.py --checkpoint" in output and "\r" not in output

    directory = newest(run)
    theirs, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"] and theirs.dtype == torch.float32
    tokens = AutoTokenizer.from_pretrained(directory)("Emma was", return_tensors="pt").input_ids
    ours, _ = generate.load(directory)
    with torch.no_grad():
        assert (ours(tokens) - theirs(tokens).logits).abs().max() < 1e-4
    state = json.loads((directory / STATE_FILE).read_text())
    assert state["step"] == 20 and str(tmp_path) not in (directory / "config.json").read_text()


def test_a_finished_run_is_left_alone(tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny("run", "train.steps=3") == 0
    before = hashes(tmp_path / "run")
    capsys.readouterr()
    assert tiny("run", "train.steps=3") == 0
    assert hashes(tmp_path / "run") == before
    output = capsys.readouterr().out
    assert "finished" in output and "train.steps=N" in output and "generate.py" in output and "--resume never" in output
    assert tiny("run", "train.steps=5") == 0  # extended
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5]


def test_paths_are_told_stored_and_kept(tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def stored() -> dict[str, str]:
        return json.loads((newest(tmp_path / "run") / "training_state.json").read_text(encoding="utf-8"))["ops"]

    assert tiny("run", "train.steps=1", "ops.experts=loop", "ops.attention=plain") == 0
    assert "paths: experts loop, attention plain, loss chunked" in capsys.readouterr().out
    assert tiny("run", "train.steps=2") == 0
    assert stored() == {"experts": "loop", "attention": "plain", "loss": "chunked"}
    assert tiny("run", "train.steps=3", "ops.experts=padded") == 0  # who asks gets
    assert stored()["experts"] == "padded"
    assert tiny("run", "ops.experts=triton") == 2
    assert "ops.experts = triton does not work" in capsys.readouterr().err


def test_micro_batch_auto_is_resolved(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "CPU_MICRO_TOKENS", 64)  # two rows
    assert tiny("run", "train.steps=1", "train.micro_batch=auto") == 0
    config = configuration.load(str(tmp_path / "run" / "config.yaml"))
    assert config.train.micro_batch == 2


def test_profile(tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny("run", "train.steps=4", "--profile") == 0
    assert {"profile.json", "profile.txt"} <= {path.name for path in (tmp_path / "run").iterdir()}
    assert "aten::" in capsys.readouterr().out
    assert tiny("run", "train.steps=4", "--resume", "never") == 0  # they belong to the run that is moved aside


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        (),  # and many more in tests/faults
        pytest.param(("train.precision=bf16", "optim.name=adamw", "train.recompute=full"), marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed_equals_uninterrupted(tiny, tmp_path: Path, options: tuple[str, ...]) -> None:
    """SIGKILL after the checkpoint of step 10, in another process; twice resumed; equal to the last bit."""
    if sys.platform == "win32":
        pytest.skip("SIGKILL")
    options = (*options, "train.steps=24", "data.workers=1")
    assert tiny("whole", *options) == 0
    command = [sys.executable, str(ROOT / "train.py"), *tiny.command("killed", *options)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True) as process:
        run = tmp_path / "killed"
        deadline = time.time() + 120
        while not (run / "checkpoints" / "step_00000010").exists() and time.time() < deadline:
            time.sleep(0.002)
        process.kill()
    assert newest(run).name != "step_00000024", "killed too late to show anything"
    assert tiny("killed", *options, "checkpoint.every_steps=7") == 0
    assert learned(run) == learned(tmp_path / "whole")
    one, two = newest(run), newest(tmp_path / "whole")
    assert one.name == two.name == "step_00000024"
    for name in ("model.safetensors", "optimizer.safetensors", "rng.safetensors", STATE_FILE):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


@pytest.mark.slow
def test_three_chained_resumes_drop_later_metrics(tiny, tmp_path: Path) -> None:
    assert tiny("whole") == 0
    for last in (4, 9, 15):
        stop_after(tiny, "chain", last)
        with open(tmp_path / "chain" / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(
                json.dumps({"step": last + 1, "loss": 0.0}) + '\n{"step": 99, "lo'
            )  # past the checkpoint; half a line
    assert tiny("chain") == 0
    assert learned(tmp_path / "chain") == learned(tmp_path / "whole")
    names = ("model.safetensors", "optimizer.safetensors", "rng.safetensors", STATE_FILE)
    one, two = newest(tmp_path / "chain"), newest(tmp_path / "whole")
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)


def stop_after(tiny, name: str, step: int, *options: str) -> None:
    """Run until `step` steps are done, then signal this process in the middle of the next."""
    real = train.train_step

    def interrupted(run, number, batch):
        if number == step:
            signal.raise_signal(signal.SIGTERM)
        return real(run, number, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", interrupted)
        assert tiny(name, *options) == 128 + signal.SIGTERM


def test_a_signal_saves_the_last_completed_step(tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    stop_after(tiny, "run", 6)
    assert newest(tmp_path / "run").name == "step_00000006"
    assert "stopped by SIGTERM after step 6 of 20" in capsys.readouterr().out
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_signal_while_waiting_for_data(tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A Hub that does not answer is waited for, for minutes; a signal is answered at once."""
    from metrics import Clock

    real = Clock.wait_for

    def silent(clock, loader):
        if len(metrics(tmp_path / "run")) == 3:
            signal.raise_signal(signal.SIGTERM)
            time.sleep(60)
            pytest.fail("went on waiting")
        return real(clock, loader)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Clock, "wait_for", silent)
        patch.setattr(signals, "PATIENCE_SEC", 0.2)
        assert tiny("run") == 128 + signal.SIGTERM
    assert newest(tmp_path / "run").name == "step_00000003"


def test_a_branch_off_a_finished_run_needs_more_steps(tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny("run", *SHORT) == 0
    assert tiny("branch", *SHORT, "--resume", str(tmp_path / "run")) == 2
    assert "is step 4 already; to branch off, give train.steps above it" in capsys.readouterr().err
    assert not (tmp_path / "branch").exists()
    assert tiny("branch", *SHORT, "train.steps=5", "--resume", str(tmp_path / "run")) == 0
    assert newest(tmp_path / "branch").name == "step_00000005"


def test_a_branch_started_again_goes_on(tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny("run", *SHORT) == 0
    command = (*SHORT, "train.steps=8", "--resume", str(tmp_path / "run" / "checkpoints" / "step_00000004"))
    stop_after(tiny, "branch", 6, *command)
    assert tiny("branch", *command) == 0
    assert newest(tmp_path / "branch").name == "step_00000008"
    assert tiny("branch", *command) == 0 and "is finished" in capsys.readouterr().out
    assert tiny("run", *SHORT, "run.name=other", "train.steps=5") == 0
    assert tiny("branch", *command[:-1], str(tmp_path / "run")) == 2  # step 5: not what it branched off from
    assert "has checkpoints of its own" in capsys.readouterr().err


def test_a_finished_run_is_not_one_of_other_data(tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny("run", *SHORT) == 0
    assert tiny("run", *SHORT, "data.sources=corpus/austen.parquet") == 2
    error = capsys.readouterr().err
    assert "data.sources" in error and "emma.jsonl" in error and "austen.parquet" in error


def test_a_stored_configuration_takes_another_name(
    tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    base = ["--config", "tiny.yaml", f"data.sources={text}", *SHORT]
    assert train.main([*base, "run.name=a"]) == 0
    assert train.main(["--config", "runs/a/config.yaml", "run.name=b"]) == 0
    assert learned(tmp_path / "runs" / "b") == learned(tmp_path / "runs" / "a")


@pytest.mark.parametrize("name", ["checkpoints", "config.yaml", "metrics.jsonl"])
def test_a_folder_that_cannot_be_written_is_told_before_training(
    name: str, tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    if name == "checkpoints":
        (tmp_path / "run" / name).touch()
    else:
        (tmp_path / "run" / name).mkdir()
    assert tiny("run", *SHORT) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: run.dir = ") and name in error and error.count("\n") == 1


@pytest.mark.parametrize("key", ["run.dir", "data.sources", "train.init_from", "data.tokenizer"])
def test_a_name_that_is_too_long_is_one_line(key: str, tiny, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny("run", *SHORT, f"{key}={'a' * 300}") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "too long" in error and error.count("\n") == 1


def test_a_tokenizer_out_of_sight_does_not_matter_on_resume(
    tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tiny("first", *SHORT) == 0
    monkeypatch.chdir(tmp_path)
    os.rename(newest(tmp_path / "first"), tmp_path / "tok")
    options = (*SHORT, "data.tokenizer=./tok", "train.steps=2")
    assert tiny("run", *options) == 0
    os.rename(tmp_path / "tok", tmp_path / "gone")
    assert tiny("run", *options, "train.steps=3") == 0


@pytest.fixture(scope="module")
def stopped(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was stopped after its first step."""
    folder = tmp_path_factory.mktemp("stopped")
    stop_after(runs_in(folder, text), "run", 1)
    return folder


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ("model.hidden_size=48", ["model.hidden_size", "32", "48"]),
        ("data.seq_len=16", ["data.seq_len", "32", "16"]),
        ("data.sources=corpus/austen.parquet", ["data.sources", "austen.parquet", "emma.jsonl"]),
        ("train.seed=7", ["train.seed", "1337", "7"]),
        ("optim.lr=1e-3", ["optim.lr", "0.003", "0.001"]),
        ("optim.name=adamw", ["optim.name", "muon", "adamw"]),
        ("train.batch_tokens=512", ["train.batch_tokens", "256", "512"]),
        ("train.precision=bf16", ["train.precision", "fp32", "bf16"]),
        ("data.tokenizer=openai-community/gpt2", ["data.tokenizer", "bpe", "openai-community/gpt2"]),
    ],
)
def test_what_must_not_change(
    stopped: Path, text: Path, capsys: pytest.CaptureFixture[str], change: str, parts: list[str]
) -> None:
    before = hashes(stopped)
    assert runs_in(stopped, text)("run", change) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(part in error for part in parts), error
    assert hashes(stopped) == before


def test_what_may_change(tiny, tmp_path: Path, text: Path) -> None:
    stop_after(tiny, "run", 2)
    (tmp_path / "moved").mkdir()
    moved = tmp_path / "moved" / "emma.jsonl"
    moved.write_bytes(text.read_bytes())
    changes = ("train.steps=4", "train.micro_batch=2", "log.every_steps=2", "eval.every_steps=3", "checkpoint.keep=1")
    assert tiny("run", f"data.sources={moved}", "data.workers=1", "train.precision=auto", *changes) == 0
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"step_00000002", "step_00000004"}


def test_a_finished_run_still_tells_what_must_not_change(
    tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tiny("run", "train.steps=2") == 0
    assert tiny("run", "train.steps=2", "optim.lr=1e-4") == 2
    assert "optim.lr" in capsys.readouterr().err


def test_a_start_afresh_that_fails_moves_nothing(tiny, tmp_path: Path) -> None:
    assert tiny("run", "train.steps=2") == 0
    before = hashes(tmp_path / "run")
    assert tiny("run", "--resume", "never", "data.sources=nowhere.txt") == 2
    assert hashes(tmp_path / "run") == before and not (tmp_path / "run.1").exists()


def test_the_data_going_away_saves_what_was_learned(tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    real = train.next_batch

    def gone(clock, loader, stop):
        batch = real(clock, loader, stop)
        return train.UserError("the Hub is gone") if batch.cursor.places[0].offset > 1500 else batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "next_batch", gone)
        assert tiny("run") == 2
    assert "the Hub is gone" in capsys.readouterr().err
    assert newest(tmp_path / "run").name == f"step_{len(metrics(tmp_path / 'run')):08d}" != "step_00000020"


def test_a_precision_that_follows_the_card(tiny, tmp_path: Path) -> None:
    """bf16, then fp16 with a loss scale of its own, bf16 again: `auto` on changing cards."""
    import parallel

    for name, step in (("bf16", 1), ("fp16", 2), ("bf16", 3), ("fp16", 4)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(parallel, "pick_precision", lambda *_, name=name: name)
            stop_after(tiny, "run", step, "train.precision=auto", *SHORT, "train.steps=5")
    scales = [line["loss_scale"] for line in metrics(tmp_path / "run")]
    assert scales == [1.0, 2.0**13, 1.0, 2.0**13]


def test_resume_never_and_from_a_path(tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny("run", "train.steps=20") == 0
    old = hashes(tmp_path / "run")
    assert tiny("run", "train.steps=2", "--resume", "never") == 0
    assert hashes(tmp_path / "run.1") == old and newest(tmp_path / "run").name == "step_00000002"
    ten = str(tmp_path / "run.1" / "checkpoints" / "step_00000010")
    assert tiny("branch", "--resume", ten) == 0
    assert learned(tmp_path / "branch") == learned(tmp_path / "run.1")[10:]
    capsys.readouterr()
    assert tiny("run.1", "train.steps=30", "--resume", ten) == 2
    assert "step_00000020" in capsys.readouterr().err
    assert tiny("run.1", "--resume", str(tmp_path / "nowhere")) == 2
    assert "nowhere" in capsys.readouterr().err


def test_damaged_checkpoints(tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny("run") == 0
    with open(newest(tmp_path / "run") / "model.safetensors", "r+b") as file:
        file.seek(5000)
        file.write(b"\xff\xff\xff\xff")
    assert tiny("run") == 0  # from step 10 again
    assert newest(tmp_path / "run").name == "step_00000020"
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        (path / "manifest.json").write_text("{}")
    assert tiny("run") == 2
    assert "no intact checkpoint" in capsys.readouterr().err


def test_init_from_takes_weights_only(tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny("first") == 0
    assert tiny("second", f"train.init_from={tmp_path / 'first'}", "train.steps=1", "optim.lr=1e-9") == 0
    one, two = (load_file(newest(tmp_path / name) / "model.safetensors") for name in ("first", "second"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=2e-3 if "bias" in name else 1e-6, rtol=0)
    assert metrics(tmp_path / "second")[0]["loss"] < metrics(tmp_path / "first")[0]["loss"] - 0.5
    tokenizers = [(newest(tmp_path / name) / "tokenizer.json").read_bytes() for name in ("first", "second")]
    assert tokenizers[0] == tokenizers[1]  # the embeddings mean its tokens
    capsys.readouterr()
    assert tiny("third", f"train.init_from={tmp_path / 'first'}", "model.hidden_size=48") == 2
    assert "model.hidden_size" in capsys.readouterr().err
    assert tiny("third", "train.init_from=nothing") == 2
    assert "train.init_from = 'nothing': nothing: no such directory" in capsys.readouterr().err


GOLDEN = [
    5.787, 5.7642, 5.7306, 5.7032, 5.6445, 5.5857, 5.5293, 5.4559, 5.3961, 5.284,
    5.234, 5.1587, 5.0972, 5.012, 4.9285, 4.8471, 4.8394, 4.7813, 4.7596, 4.7532,
]  # fmt: skip


def test_golden_losses(tiny, tmp_path: Path) -> None:
    """Twenty losses of this seed, on this text. They change only on purpose, with an entry in LOG.md."""
    (tmp_path / "emma.txt").write_text(emma(), encoding="utf-8")
    assert tiny("run", f"data.sources={tmp_path / 'emma.txt'}") == 0
    assert [round(line["loss"], 4) for line in metrics(tmp_path / "run")] == pytest.approx(GOLDEN, abs=2e-3)


def test_a_step_without_finite_gradients_changes_nothing(tiny, tmp_path: Path) -> None:
    real, seen = train.train_step, []

    def poisoned(run, number, batch):
        if number == 3:
            parameter = next(run.model.parameters())
            hook = parameter.register_hook(lambda grad: grad * float("nan"))
            before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
            state = {name: tensor.clone() for name, tensor in run.optimizers.state().items()}
            result = real(run, number, batch)
            hook.remove()
            assert all(torch.equal(tensor, before[name]) for name, tensor in run.model.state_dict().items())
            assert all(torch.equal(tensor, state[name]) for name, tensor in run.optimizers.state().items())
            seen.append(result)
            return result
        return real(run, number, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", poisoned)
        assert tiny("run", "train.steps=6") == 0
    assert seen[0]["skipped"] and metrics(tmp_path / "run")[-1]["skipped_steps"] == 1
    assert [line["grad_norm"] is None for line in metrics(tmp_path / "run")] == [False] * 3 + [True] + [False] * 2


SHORT = ("train.steps=4", "train.batch_tokens=64", "train.micro_batch=2", "eval.tokens=10")  # fp16 is slow on a CPU


def test_fp16_with_its_loss_scale_follows_fp32_and_resumes_exactly(tiny, tmp_path: Path) -> None:
    """The path of a T4, on the CPU, which computes fp16 slowly but rightly."""
    import parallel

    assert tiny("exact", *SHORT) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "pick_precision", lambda *_: "fp16")
        assert tiny("half", "train.precision=auto", *SHORT) == 0
        stop_after(tiny, "parts", 2, "train.precision=auto", *SHORT)
        assert tiny("parts", "train.precision=auto", *SHORT) == 0
    exact, half = metrics(tmp_path / "exact"), metrics(tmp_path / "half")
    assert all(line["loss_scale"] == 2.0**13 and not line["skipped"] for line in half)
    for key, tolerance in (("loss", 0.02), ("grad_norm", 0.1)):
        assert [line[key] for line in half] == pytest.approx([line[key] for line in exact], rel=tolerance)
    assert learned(tmp_path / "parts") == learned(tmp_path / "half")
    one, two = newest(tmp_path / "parts"), newest(tmp_path / "half")
    for name in ("model.safetensors", "optimizer.safetensors", STATE_FILE):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_an_overflow_halves_the_scale_and_touches_no_state(tiny, tmp_path: Path) -> None:
    import parallel
    import run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "pick_precision", lambda *_: "fp16")
        patch.setattr(run, "FIRST_SCALE", 2.0**40)
        assert tiny("run", "train.precision=auto", *SHORT) == 0
    lines = metrics(tmp_path / "run")
    assert [line["skipped"] for line in lines] == [True] * 4 and lines[-1]["loss_scale"] == 2.0**36
    assert not load_file(newest(tmp_path / "run") / "optimizer.safetensors")
    assert lines[0]["experts"][0]["bias_max"] == 0.0


@pytest.mark.dist
@pytest.mark.slow  # tests/faults/test_exact.py has it in forked processes
@pytest.mark.parametrize("batch_tokens", [160, 256])
def test_two_ranks_equal_one(tiny, tmp_path: Path, batch_tokens: int) -> None:
    """torchrun with gloo DDP against one process on the same global batch; 160 tokens are 5 rows, dealt 2 and 3."""
    options = (f"train.batch_tokens={batch_tokens}", "train.micro_batch=1", "optim.ns_dtype=fp32", "optim.eps=1e-6")
    assert tiny("one", *options) == 0
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "train.py"), *tiny.command("two", *options)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    for key in ("loss", "mtp_loss", "balance_loss", "grad_norm", "val_loss"):
        values = [[line[key] for line in lines if key in line] for lines in (one, two)]
        assert values[1] == pytest.approx(values[0], rel=1e-5) and values[0], key
    assert [line["experts"] for line in one] == [line["experts"] for line in two]
    assert (
        json.loads((newest(tmp_path / "one") / STATE_FILE).read_text())["cursor"]
        == (json.loads((newest(tmp_path / "two") / STATE_FILE).read_text())["cursor"])
    )


def test_micro_batches_differ_by_at_most_one_row() -> None:
    assert train.micro_batches(5, 2) == [slice(0, 2), slice(2, 5)]
    assert train.micro_batches(2, 3) == [slice(0, 0), slice(0, 1), slice(1, 2)]


def test_the_hub_out_of_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The default run without a network: what could not be reached, what to do, exit code 2."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    assert train.main([f"run.dir={tmp_path / 'run'}"]) == 2
    told = capsys.readouterr()
    assert told.err.count("\n") == 1 and ("could not" in told.err or "cannot" in told.err), told.err
    assert "no GPU found" in told.out or torch.cuda.is_available()
    assert not (tmp_path / "run").exists()


def test_too_small_a_vocabulary_and_a_missing_file(tiny, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny("run", "data.sources=nowhere.txt") == 2
    assert "nowhere.txt" in capsys.readouterr().err
    assert tiny("run", "train.precision=fp16") == 2
    assert "fp16" in capsys.readouterr().err
