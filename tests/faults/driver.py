"""A process that has imported all that a run imports and forks one child per run: a start takes a fraction of a second.

Commands come as lines of JSON on standard input, answers go to standard output. Children get a process group of their
own and report by exit code, files and their redirected output. Started by `lab.Driver`; nothing is forked in pytest.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import math
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
POLL_SEC = 0.002
PARENT = os.getppid()


class Job:
    """The forked processes of one run."""

    def __init__(self, pids: list[int], timeout: float, linger: float | None):
        self.pids, self.codes, self.linger = pids, dict.fromkeys(pids), linger
        self.started = time.monotonic()
        self.deadline, self.timed_out = self.started + timeout, False
        self.ended: dict[int, float] = {}

    def wait(self) -> dict[str, Any]:
        """Exit codes by rank, negative for signals; past the deadline all are killed. With `linger` that is so many
        seconds after the first has ended by itself."""
        while any(code is None for code in self.codes.values()):
            for pid, code in self.codes.items():
                if code is None and (found := os.waitpid(pid, os.WNOHANG))[0]:
                    self.codes[pid] = os.waitstatus_to_exitcode(found[1])
                    self.ended[pid] = time.monotonic() - self.started
                    if self.linger is not None and self.codes[pid] != -signal.SIGKILL:
                        self.deadline = min(self.deadline, time.monotonic() + self.linger)
            if time.monotonic() > self.deadline or os.getppid() != PARENT:  # nobody waits any more
                self.timed_out = self.linger is None or not self.ended
                self.deadline = math.inf
                os.killpg(self.pids[0], signal.SIGKILL)
            time.sleep(POLL_SEC)
        with contextlib.suppress(ProcessLookupError):  # data processes that outlive a killed run for a moment
            os.killpg(self.pids[0], signal.SIGKILL)
        seconds = [self.ended[pid] for pid in self.pids]
        return {"codes": [self.codes[pid] for pid in self.pids], "seconds": seconds, "timed_out": self.timed_out}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def fork(job: dict[str, Any]) -> Job:
    sys.stdout.flush()
    ranks, pids, port = job["ranks"], [], free_port()
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            _child(job, rank, port, pids[0] if pids else 0)
        pids.append(pid)
        os.setpgid(pid, pids[0])  # both do it, whoever is first
    return Job(pids, job["timeout"], job["linger"])


def _child(job: dict[str, Any], rank: int, port: int, group: int) -> None:
    """Never returns."""
    code = 1
    try:
        os.setpgid(0, group)
        for descriptor, name in ((1, "out"), (2, "err")):
            target = os.open(f"{job['output']}.{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(target, descriptor)
            os.close(target)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(job["cwd"])
        if job["ranks"] > 1:
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job["ranks"]), MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo",
            )  # fmt: skip
        module, _, function = job["call"].partition(":")
        for name, options in job["faults"]:
            getattr(importlib.import_module("power" if name == "record" else "injected"), name)(**options)
        code = getattr(importlib.import_module(module), function)(*job["arguments"]) or 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001  # as the interpreter would
        traceback.print_exc()
    finally:
        _leave(code)


def _leave(code: int) -> None:
    """What the interpreter's end does, without the slow part: threads are joined, exit functions run."""
    import atexit
    import threading

    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def import_all() -> None:
    """What runs import, so that children need not. Nothing is run here: threads would be lost in a fork."""
    for path in sorted(ROOT.glob("*.py")):
        with contextlib.suppress(ImportError):  # triton_ops, without Triton
            importlib.import_module(path.stem)
    import dotenv  # noqa: F401
    import torch._dynamo  # noqa: F401
    from transformers import PreTrainedTokenizerFast  # noqa: F401

    import parallel

    parallel.product_flops = lambda *_: 1e12  # measured for a fifth of a second, for nothing but MFU
    gc.collect()
    gc.freeze()  # or a child's collections would copy every page
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        raise RuntimeError(f"{threads} threads before any fork: what is imported starts threads of its own")


def main() -> None:
    """Commands: start (answers with pids), wait, quit."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints, the answers stay alone
    commands = os.fdopen(os.dup(0), "r")
    sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]
    import_all()
    jobs: dict[int, Job] = {}
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in commands:
        command = json.loads(line)
        if command["do"] == "start":
            job = fork(command)
            jobs[job.pids[0]] = job
            answer: dict[str, Any] = {"pids": job.pids}
        else:
            answer = jobs.pop(command["pid"]).wait()
        print(json.dumps(answer), file=answers, flush=True)
    for job in jobs.values():
        job.deadline = 0
        job.wait()


if __name__ == "__main__":
    main()
