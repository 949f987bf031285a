"""Faults, each applied in a forked child before `train.main` runs. What is ours is wrapped, not replaced."""

from __future__ import annotations

import errno
import functools
import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from shim import Operation, Shim

FULL = {"mkdir", "create", "write", "sync", "flush"}  # what needs room; a deletion does not


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Replace `owner.name` by `around(real, *arguments)`."""
    real = getattr(owner, name)

    @functools.wraps(real)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        return around(real, *arguments, **options)

    setattr(owner, name, wrapped)


# ---- files


def log_operations(root: str, path: str, since: str = "") -> None:
    """One line per operation: kind and path below the root."""
    file = open(path, "w", encoding="utf-8")  # noqa: SIM115  # until the process ends

    def act(number: int, operation: Operation) -> None:
        file.write(f"{operation.kind} {os.path.relpath(operation.path, root)}\n")
        file.flush()

    Shim(root, act, since=since).install()


def kill_at(
    root: str, boundary: int, since: str = "", torn: bool = False, only_rank: int = 0, group: bool = False
) -> None:
    """SIGKILL before the operation of this number; `torn`: after half of what it writes. `group`: to all ranks."""

    def act(number: int, operation: Operation) -> None:
        if number == boundary:
            if torn and ".tmp-" in str(operation.path) and operation.file is not None and operation.data:
                half = operation.data[: len(operation.data) // 2]
                operation.file.write(half.decode() if operation.file.__class__.__name__ == "TextIOWrapper" else half)
                operation.file.flush()
            (os.killpg if group else os.kill)(0 if group else os.getpid(), signal.SIGKILL)

    if rank() == only_rank:
        Shim(root, act, since=since).install()


def disk(root: str, code: str, paths: str = "", first: int = 0, count: int = 10**9, kinds: Sequence[str] = ()) -> None:
    """Operations that need room fail with this errno, where the path matches, from the `first` on, `count` times."""
    import re

    wanted, seen, number_of = re.compile(paths), [0], getattr(errno, code)

    def act(number: int, operation: Operation) -> None:
        chosen = kinds or (FULL if code != "EROFS" else FULL | {"rename", "unlink", "rmdir"})
        if operation.kind in chosen and wanted.search(operation.path):
            seen[0] += 1
            if first < seen[0] <= first + count:
                raise OSError(number_of, os.strerror(number_of), operation.path)

    Shim(root, act).install()


def slow_files(root: str, seconds: float, paths: str = "") -> None:
    """A slow disk: every sync takes this long."""

    def act(number: int, operation: Operation) -> None:
        if operation.kind == "sync" and paths in operation.path:
            time.sleep(seconds)

    Shim(root, act).install()


# ---- signals


def signal_in(
    phase: str, number: int, step: int = 2, to: str = "self", root: str = "", only_rank: int = 0, twice: bool = False
) -> None:
    """A signal in a phase of the step after `step` are done, to this process or to its whole group, once."""
    state = {"step": 0, "done": False, "micro": 0}

    def fire() -> None:
        if state["done"] or state["step"] != step or rank() != only_rank:
            return
        state["done"] = True
        for _ in range(2 if twice else 1):
            os.killpg(0, number) if to == "group" else os.kill(os.getpid(), number)
            time.sleep(0.01)

    import torch

    import evals
    import generate
    import metrics
    import model
    import optim
    import train

    def around_step(real: Any, run: Any, done: int, *rest: Any, **options: Any) -> Any:
        state["step"], state["micro"] = done, 0
        if phase == "step":
            fire()
        return real(run, done, *rest, **options)

    def first(real: Any, *arguments: Any, **options: Any) -> Any:
        fire()
        return real(*arguments, **options)

    def second_micro_batch(real: Any, *arguments: Any, **options: Any) -> Any:
        state["micro"] += 1
        if state["micro"] == 2:
            fire()
        return real(*arguments, **options)

    wrap(train, "train_step", around_step)
    if phase == "forward":
        wrap(model.DeepSeekV3, "forward", first)
    elif phase == "accumulation":
        wrap(model.DeepSeekV3, "forward", second_micro_batch)
    elif phase == "backward":
        wrap(torch.Tensor, "backward", first)
    elif phase == "optimizer":
        wrap(optim.Optimizers, "step", first)
    elif phase == "eval":
        wrap(evals, "evaluate", first)
    elif phase == "sample":
        wrap(generate, "generate", first)
    elif phase == "data":
        state["step"] = step  # it waits before the step begins
        waits = [0]

        def waiting(real: Any, *arguments: Any, **options: Any) -> Any:
            waits[0] += 1
            if waits[0] == step + 1:
                state["step"] = step
                fire()
            return real(*arguments, **options)

        wrap(metrics.Clock, "wait_for", waiting)
    elif phase == "save":

        def act(count: int, operation: Operation) -> None:
            if operation.kind == "sync":
                state["step"] = step
                fire()

        Shim(root, act, since=rf"step_{step:08d}\.tmp-").install()
    elif phase != "step":
        raise ValueError(phase)


def stop_after(step: int) -> None:
    """SIGTERM as the step after this many begins: it is not taken."""
    signal_in("step", signal.SIGTERM, step)


# ---- numbers


def poison(where: str, first: int, count: int, value: str = "nan", only_rank: int = -1) -> None:
    """NaN or infinity in steps `first` .. `first + count - 1` (0 is the first), counted in calls of train_step.

    `where`: gradient, loss, or muon (what goes into Newton-Schulz comes from a gradient of one hidden matrix).
    """
    import model
    import train

    poisoned, calls, current = float(value), [0], [False]

    def around(real: Any, run: Any, *rest: Any, **options: Any) -> Any:
        number, calls[0] = calls[0], calls[0] + 1
        here = first <= number < first + count and only_rank in (-1, rank())
        if not here:
            return real(run, *rest, **options)
        if where == "loss":
            current[0] = True
            try:
                return real(run, *rest, **options)
            finally:
                current[0] = False
        names = dict(run.model.named_parameters())
        key = next(n for n in names if "o_proj" in n) if where == "muon" else next(iter(names))

        def spoil(gradient: Any) -> Any:
            gradient = gradient.clone()
            gradient.view(-1)[0] = poisoned
            return gradient

        hook = names[key].register_hook(spoil)
        try:
            return real(run, *rest, **options)
        finally:
            hook.remove()

    def forward(real: Any, *arguments: Any, **options: Any) -> Any:
        out = real(*arguments, **options)
        return out._replace(loss=out.loss * poisoned, nats=out.nats * poisoned) if current[0] else out

    wrap(train, "train_step", around)
    if where == "loss":
        wrap(model.DeepSeekV3, "forward", forward)


def watch_skips(path: str) -> None:
    """Write down, for every skipped step, whether all state stayed bit for bit as it was."""
    import torch

    import train

    def around(real: Any, run: Any, step: int, *rest: Any, **options: Any) -> Any:
        before = {name: tensor.clone() for name, tensor in (run.model.state_dict() | run.optimizers.state()).items()}
        result = real(run, step, *rest, **options)
        if result is not None and result["skipped"] and rank() == 0:
            after = run.model.state_dict() | run.optimizers.state()
            same = before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "same": same}) + "\n")
        return result

    wrap(train, "train_step", around)


def fp16() -> None:
    """fp16 with its loss scale, on a CPU, which is refused to people for its slowness."""
    import parallel

    parallel.pick_precision = lambda *_: "fp16"  # type: ignore[assignment]


def out_of_memory(step: int, times: int, only_rank: int = -1, where: str = "forward") -> None:
    """The forward pass of a step, or the end of the backward pass, raises torch.OutOfMemoryError, `times` times."""
    import torch

    import model
    import train

    state = {"step": -1, "left": times}

    def around(real: Any, run: Any, done: int, *rest: Any, **options: Any) -> Any:
        state["step"] = done
        return real(run, done, *rest, **options)

    def forward(real: Any, *arguments: Any, **options: Any) -> Any:
        if state["step"] == step and state["left"] and only_rank in (-1, rank()):
            state["left"] -= 1
            if where == "forward":
                raise torch.OutOfMemoryError("CUDA out of memory (injected)")
            hook = arguments[0].model.embed_tokens.weight.register_hook(lambda _: backward(hook))
        return real(*arguments, **options)

    def backward(hook: Any) -> None:
        hook.remove()
        raise torch.OutOfMemoryError("CUDA out of memory (injected)")

    wrap(train, "train_step", around)
    wrap(model.DeepSeekV3, "forward", forward)


# ---- ranks and time


def at_step(step: int, what: str, only_rank: int, seconds: float = 0.0) -> None:
    """At the beginning of a step one rank dies, stops, or is slow."""
    import train

    def around(real: Any, run: Any, done: int, *rest: Any, **options: Any) -> Any:
        if done == step and rank() == only_rank:
            if what == "slow":
                time.sleep(seconds)
            else:
                os.kill(os.getpid(), {"die": signal.SIGKILL, "freeze": signal.SIGSTOP}[what])
        return real(run, done, *rest, **options)

    wrap(train, "train_step", around)


def no_more_data(after: int, only_rank: int) -> None:
    """One rank's loader ends, or fails, after so many batches."""
    import metrics

    seen = [0]

    def waiting(real: Any, clock: Any, loader: Any) -> Any:
        from config import UserError

        seen[0] += 1
        if seen[0] > after and rank() == only_rank:
            raise UserError("injected: no more data on this rank")
        return real(clock, loader)

    wrap(metrics.Clock, "wait_for", waiting)


def slow_steps(seconds: float) -> None:
    import train

    def around(real: Any, *arguments: Any, **options: Any) -> Any:
        time.sleep(seconds)
        return real(*arguments, **options)

    wrap(train, "train_step", around)


def settings(module: str, **values: Any) -> None:
    """Constants of ours that are minutes in life."""
    import importlib

    for name, value in values.items():
        owner = importlib.import_module(module)
        if not hasattr(owner, name):
            raise AttributeError(f"{module} has no {name}")
        setattr(owner, name, value)


def note_building(path: str) -> None:
    """A file appears as soon as a model's weights are made or loaded."""
    import model

    def around(real: Any, *arguments: Any, **options: Any) -> Any:
        Path(path).write_text("", encoding="utf-8")
        return real(*arguments, **options)

    wrap(model, "init_weights", around)
    wrap(model.DeepSeekV3, "to_empty", around)


def little_room(num_bytes: int) -> None:
    """A disk with so much left."""
    import shutil

    real = shutil.disk_usage
    shutil.disk_usage = lambda path: real(path)._replace(free=num_bytes)


def nudge_optimizer() -> None:
    """A resume that loses the last bit of one momentum."""
    import torch

    import optim

    def around(real: Any, optimizers: Any, state: Any) -> Any:
        state = dict(state)
        name = next(key for key in sorted(state) if key.endswith("momentum"))
        tensor = state[name].clone()
        tensor.view(-1)[:1].view(torch.int32).bitwise_xor_(1)
        return real(optimizers, state | {name: tensor})

    wrap(optim.Optimizers, "load", around)


def unguarded() -> None:
    """An update that takes the gradients times 0 where they are not finite, as some trainers do."""
    import optim
    import train

    def around(real: Any, run: Any, *rest: Any, **options: Any) -> Any:
        result = real(run, *rest, **options)
        if result is not None and result["skipped"]:
            for parameter in run.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(0)
            optim.Optimizers.step(run.optimizers, 1e-3)
        return result

    wrap(train, "train_step", around)


def die_in_call(call: int) -> None:
    """SIGKILL as the training step is called for this time, however often the run went back."""
    import train

    calls = [0]

    def around(real: Any, *arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            time.sleep(0.5)  # what is being saved gets saved
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)

    wrap(train, "train_step", around)


def break_saving(step: int) -> None:
    """The writer of a step's checkpoint has a bug."""
    import checkpoint

    def around(real: Any, root: Any, number: int, *rest: Any, **options: Any) -> Any:
        if number == step:
            raise RuntimeError("injected: the writer fails")
        return real(root, number, *rest, **options)

    wrap(checkpoint, "save", around)


def hub_at(endpoint: str, token: str, cache: str, every_sec: float) -> None:
    """The Hub is a server on this machine, and pushes follow each other faster than a configuration allows."""
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _http

    import mirror
    import pusher

    name = "HUGGINGFACE_CO_URL_TEMPLATE"
    for module in (constants, file_download):
        if hasattr(module, name):
            setattr(module, name, endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    constants.ENDPOINT = endpoint
    constants.HF_HUB_DISABLE_XET = True
    constants.HF_HUB_CACHE = cache
    if hasattr(_http, "_HUB_ORIGINS"):
        _http._HUB_ORIGINS = frozenset({_http._url_origin(endpoint)})
    os.environ["HF_TOKEN"] = token
    mirror.FLUSH_SEC = 5.0

    def around(real: Any, *arguments: Any, **options: Any) -> Any:
        return real(*arguments, **options | {"every_sec": every_sec})

    wrap(pusher.Pusher, "__init__", around)


def jumping_clock() -> None:
    """The wall clock: an hour back, a day on, in turns."""
    real, calls = time.time, [0]

    def jumped() -> float:
        calls[0] += 1
        return real() + (-3600.0 if calls[0] % 2 else 86400.0)

    time.time = jumped
