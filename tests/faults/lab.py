"""Runs of a tiny model in forked processes, and what is compared: every tensor's SHA-256, the state, the losses."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from driver import free_port

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
STEPS = 8
TINY = """
model:
  vocab_size: 264
  hidden_size: 16
  num_hidden_layers: 1
  first_k_dense_replace: 0
  num_attention_heads: 2
  q_lora_rank: 8
  kv_lora_rank: 8
  qk_nope_head_dim: 4
  qk_rope_head_dim: 4
  v_head_dim: 4
  intermediate_size: 16
  moe_intermediate_size: 8
  n_routed_experts: 4
  num_experts_per_tok: 2
  max_position_embeddings: 32
  initializer_range: 0.02
data: {tokenizer: bytes, seq_len: 16, val_fraction: 0.1, workers: 0}
train: {steps: 8, micro_batch: 4, batch_tokens: 64, precision: fp32}
optim: {lr: 3e-3, warmup: 0.1}
log: {every_steps: 1}
eval: {every_steps: 1000, tokens: 40}
sample: {every_steps: 1000, max_new_tokens: 2, prompts: [Emma]}
checkpoint: {every_steps: 2, keep: 3}
"""
Fault = tuple[str, dict[str, Any]]


@dataclass(repr=False)
class Result:
    """How a run ended, by rank: exit codes, negative where a signal ended it; seconds from its start."""

    codes: list[int]
    seconds: list[float]
    output: str  # path, without the rank

    @property
    def code(self) -> int:
        return self.codes[0]

    def out(self, rank: int = 0) -> str:
        return Path(f"{self.output}.out{rank}").read_text(encoding="utf-8")

    def err(self, rank: int = 0) -> str:
        return Path(f"{self.output}.err{rank}").read_text(encoding="utf-8")

    def __repr__(self) -> str:
        texts = [f"rank {rank}: {self.out(rank)[-1500:]}\n{self.err(rank)[-3000:]}" for rank in range(len(self.codes))]
        return f"exit codes {self.codes}\n" + "\n".join(texts)


class Driver:
    """The forking process; see driver.py."""

    def __init__(self) -> None:
        arguments = [sys.executable, str(HERE / "driver.py")]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(arguments, env=environment, start_new_session=True, **pipes)
        self._answer()

    def start(self, job: dict[str, Any]) -> list[int]:
        return self._ask({"do": "start", **job})["pids"]

    def wait(self, pid: int) -> dict[str, Any]:
        return self._ask({"do": "wait", "pid": pid})

    def close(self) -> None:
        self.process.communicate(timeout=60)

    def _ask(self, command: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.communicate(timeout=60)
            raise RuntimeError(f"the driver ended with {self.process.returncode}; its words are above")
        return json.loads(line)


@dataclass
class Running:
    lab: Lab
    pids: list[int]
    output: str
    started: float = field(default_factory=time.monotonic)

    def out(self, rank: int = 0) -> str:
        """What it has printed so far."""
        path = Path(f"{self.output}.out{rank}")
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def wait(self) -> Result:
        answer = self.lab.driver.wait(self.pids[0])
        result = Result(answer["codes"], answer["seconds"], self.output)
        if answer["timed_out"]:
            raise TimeoutError(f"a run went on for too long\n{result}")
        return result


@dataclass
class Lab:
    """Starts runs below a folder: `lab.run("name", "section.key=value", faults=[...])`."""

    folder: Path
    text: Path
    driver: Driver
    count: int = 0
    references: dict[tuple[str, ...], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        (self.folder / "tiny.yaml").write_text(TINY, encoding="utf-8")

    def __getitem__(self, name: str) -> Path:
        """A run's folder."""
        return self.folder / name

    def arguments(self, name: str, *overrides: str) -> list[str]:
        places = [f"run.dir={self[name]}", f"data.sources={self.text}"]
        return ["--config", str(self.folder / "tiny.yaml"), *places, *overrides]

    def start(
        self, name: str, *overrides: str, faults: Sequence[Fault] = (), ranks: int = 1, timeout: float = 180,
        linger: float | None = None,
    ) -> Running:  # fmt: skip
        """`linger`: so long after the first rank's end the others are killed."""
        return self._start("train:main", [self.arguments(name, *overrides)], faults, ranks, timeout, linger)

    def run(self, name: str, *overrides: str, **options: Any) -> Result:
        return self.start(name, *overrides, **options).wait()

    def call(self, function: str, *arguments: Any, faults: Sequence[Fault] = (), timeout: float = 120) -> Result:
        """A function of a module here, as `module:name`, in a child; it may fork."""
        return self._start(function, list(arguments), faults, 1, timeout, None).wait()

    def _start(
        self, call: str, arguments: list[Any], faults: Sequence[Fault], ranks: int, timeout: float,
        linger: float | None,
    ) -> Running:  # fmt: skip
        self.count += 1
        output = str(self.folder / f"output-{self.count}")
        job = {
            "call": call, "arguments": arguments, "faults": [list(fault) for fault in faults], "ranks": ranks,
            "timeout": timeout, "linger": linger, "cwd": str(self.folder), "output": output,
        }  # fmt: skip
        return Running(self, self.driver.start(job), output)

    def reference(self, *overrides: str, **options: Any) -> str:
        """The name of an uninterrupted run that keeps every checkpoint; made once for each set of options."""
        key = (*overrides, json.dumps(options, sort_keys=True, default=str))
        if key not in self.references:
            name = f"reference-{len(self.references)}"
            result = self.run(name, *overrides, "checkpoint.keep=1000", **options)
            assert result.codes == [0] * len(result.codes), result
            self.references[key] = name
        return self.references[key]


@contextlib.contextmanager
def torchrun(
    lab: Lab, name: str, *overrides: str, restarts: int = 0, machines: int = 1
) -> Iterator[list[subprocess.Popen[str]]]:
    """The real one, with two ranks, of one machine or of two, which are both this one; one process a machine. Nothing
    of it is left afterwards."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={machines}", "--rdzv-backend=c10d"]
    command += [f"--nproc_per_node={2 // machines}", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-id=lab"]
    command += [f"--max-restarts={restarts}", "--local-addr=127.0.0.1", str(ROOT / "train.py")]
    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    processes = [
        subprocess.Popen([*command, *lab.arguments(name, *overrides)], start_new_session=True, **pipes)
        for _ in range(machines)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            for pid in [process.pid, *children(process.pid)]:  # ranks have sessions of their own
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.communicate()


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


# ---- what is compared


def checkpoints(run: Path) -> list[str]:
    """Names of what lies in a run's `checkpoints`, leftovers included."""
    folder = run / "checkpoints"
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def newest(run: Path) -> Path | None:
    """The newest checkpoint that verifies."""
    import checkpoint

    return checkpoint.latest(run / "checkpoints")


def tensors(path: Path) -> dict[str, str]:
    """SHA-256 of every tensor of a checkpoint, of its dtype and shape too; and of the state beside them."""
    from safetensors import safe_open

    found = {"state": hashlib.sha256((path / "training_state.json").read_bytes()).hexdigest()}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118  # no mapping
                tensor = handle.get_tensor(name)
                content = tensor.contiguous().reshape(-1).view(torch_uint8()).numpy().tobytes()
                described = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
                found[f"{file.name}:{name}"] = hashlib.sha256(described + content).hexdigest()
    return found


def torch_uint8() -> Any:
    import torch

    return torch.uint8


def lines(run: Path) -> list[dict[str, Any]]:
    """The objects of metrics.jsonl."""
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def losses(run: Path, step: int) -> dict[int, dict[str, Any]]:
    """What was learned up to a step."""
    keys = ("tokens", "loss", "mtp_loss", "balance_loss", "grad_norm", "lr", "skipped_steps", "loss_scale", "val_loss")
    found = {line["step"]: {key: line[key] for key in keys if key in line} for line in lines(run)}
    return {number: values for number, values in found.items() if number <= step}


def differences(run: Path, reference: Path) -> str:
    """How a run's newest checkpoint and its losses differ from those of another at the same step; empty: not a bit."""
    found = newest(run)
    if found is None:
        return f"{run.name}: no intact checkpoint among {checkpoints(run)}"
    other = reference / "checkpoints" / found.name
    if not other.is_dir():
        return f"{found.name}: the reference has no such step"
    mine, theirs = tensors(found), tensors(other)
    if wrong := sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)):
        return f"{found.name}: {len(wrong)} of {len(theirs)} tensors differ, {wrong[0]} first"
    step = int(found.name[5:])
    ours, wanted = losses(run, step), losses(reference, step)
    if ours.keys() != wanted.keys():
        return f"steps {sorted(ours)} were logged, not {sorted(wanted)}"
    for number, values in wanted.items():
        evaluated = "val_loss" in values and "val_loss" in ours[number]  # not every run has as many
        mine, theirs = (
            {k: v for k, v in line.items() if k != "val_loss" or evaluated} for line in (ours[number], values)
        )
        if mine != theirs:
            return f"step {number}: {mine} is not {theirs}"
    return ""


def same_end(run: Path, reference: Path) -> str:
    """As `differences`, and the run has come as far as the reference."""
    last = max(name for name in checkpoints(reference) if name.startswith("step_"))
    found = newest(run)
    if found is None or found.name != last:
        return f"{run.name} ended with {found and found.name} of {checkpoints(run)}, not {last}"
    return differences(run, reference)


@contextlib.contextmanager
def stopwatch() -> Iterator[list[float]]:
    seconds = [0.0]
    start = time.monotonic()
    try:
        yield seconds
    finally:
        seconds[0] = time.monotonic() - start
