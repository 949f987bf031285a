"""Processes, devices and what they can do. One process is the same path with communication skipped."""

from __future__ import annotations

import contextlib
import functools
import gc
import inspect
import os
import re
import secrets
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

import environment
from config import UserError

T = TypeVar("T")
TORCH_RANGE = "torch>=2.9,<2.14"
PEAK_BUDGET_SEC = 0.2  # of measuring
START_TIMEOUT = timedelta(minutes=30)  # until the first step: rank 0 may list, download and train a tokenizer
BEAT_SEC = 1.0
LEAVE_SEC = 30.0  # for a last word to the store
MEET_SEC = 0.02  # between looks for the other ranks at the start
# Dense 16-bit matrix products with fp32 accumulation, TFLOP/s, from the vendor's data sheets, by the ends of device
# names; whatever else there is (Ti, SUPER, Laptop, PCIe) is measured.
NOMINAL_TFLOPS = {
    r"H200": 989, r"H100 80GB HBM3": 989, r"A100-\S+": 312, r"L40S": 362, r"L4": 121, r"T4": 65, r"V100-SXM2-\S+": 125,
    r"RTX 3060": 25.5, r"RTX 3090": 71, r"RTX 4070": 58, r"RTX 4090": 165,
}  # fmt: skip


@dataclass(frozen=True)
class Mesh:
    """The processes of a run: this one's rank among `world_size`, and its device."""

    rank: int
    world_size: int
    device: torch.device
    group: Any = None  # of the collectives; None: all processes

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor summed over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set on any rank. Over the CPU's backend, so that no GPU is waited for."""
        if self.world_size == 1:
            return list(flags)
        votes = torch.tensor([int(flag) for flag in flags])
        dist.all_reduce(votes, group=self.group)
        return [vote > 0 for vote in votes.tolist()]

    def to_main(self, tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """Every rank's tensors on rank 0, nothing elsewhere; on the CPU, of the same names and shapes on all ranks."""
        if self.world_size == 1:
            return [tensors]
        gathered: list[dict[str, Tensor]] = [{} for _ in range(self.world_size if self.is_main else 0)]
        for name, tensor in tensors.items():
            parts = [torch.empty_like(tensor) for _ in gathered]
            dist.gather(tensor, parts or None, dst=0, group=self.group)
            for state, part in zip(gathered, parts, strict=True):
                state[name] = part
        return gathered

    def least(self, number: int) -> int:
        """The smallest of all ranks' numbers."""
        if self.world_size == 1:
            return number
        numbers = torch.tensor(number)
        dist.all_reduce(numbers, dist.ReduceOp.MIN, group=self.group)
        return int(numbers)

    def from_main(self, value: T | None) -> T:
        """Rank 0's value, on every rank. A UserError there becomes one everywhere: no rank waits for another."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"), group=self.group)
        if isinstance(box[0], UserError):
            raise box[0]
        return box[0]  # type: ignore[return-value]

    def on_main(self, work: Callable[[], T]) -> T:
        """What `work` returns on rank 0, on every rank, as `from_main`; it may take longer than a collective waits."""
        if self.world_size == 1:
            return work()
        if not self.is_main:
            while self.any(False)[0]:
                pass
            return self.from_main(None)
        done, lost = threading.Event(), []

        def tell() -> None:
            try:
                while not done.wait(BEAT_SEC):
                    self.any(True)
            except RuntimeError as error:
                lost.append(error)

        thread = threading.Thread(target=tell, daemon=True)
        thread.start()
        try:
            value: Any = work()
        except UserError as error:
            value = error
        finally:
            done.set()
        thread.join()
        if lost:
            raise lost[0]
        self.any(False)
        return self.from_main(value)

    def share(self, rows: int) -> tuple[int, int]:
        """First and last + 1 of this rank's rows; shares differ by at most one."""
        return self.rank * rows // self.world_size, (self.rank + 1) * rows // self.world_size


@contextlib.contextmanager
def processes(*, allow_cpu: bool) -> Iterator[Mesh]:
    """Join the process group torchrun describes, if any, and leave it at the end."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(int(os.environ.get("LOCAL_RANK", 0)), allow_cpu=allow_cpu)
    if device.type == "cpu":
        environment.keep_freed_memory()
    if world_size > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store, _, _ = next(rendezvous("env://", rank, world_size, timeout=START_TIMEOUT))
        store = PrefixStore(_agreed(store, rank, world_size), store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=START_TIMEOUT)
    try:
        yield Mesh(rank, world_size, device)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _agreed(store: Any, rank: int, world_size: int) -> str:
    """A name that the ranks of this start have in common, and none before.

    torchrun keeps its store when it starts ranks again, and counts starts by machine: one that is quick would read
    where the dead ones could be reached, and wait for them. So rank 0 answers each rank's own random word.
    """
    own, until = secrets.token_hex(8), time.monotonic() + START_TIMEOUT.total_seconds()

    def read(kind: str, other: int) -> str:
        key = f"start/{kind}/{other}"
        return store.get(key).decode() if store.check([key]) else ""

    def pause(other: int) -> None:
        if time.monotonic() > until:
            raise RankError(f"rank {rank}: no word of rank {other} at the start")
        time.sleep(MEET_SEC)

    if rank > 0:
        store.set(f"start/word/{rank}", own)
        while (answer := read("answer", rank).split())[:1] != [own]:
            pause(0)
        store.set(f"start/heard/{rank}", answer[1])
        return answer[1]
    waiting = set(range(1, world_size))
    while waiting := {other for other in waiting if read("heard", other) != own}:
        for other in waiting:
            store.set(f"start/answer/{other}", f"{read('word', other)} {own}")
        pause(min(waiting))
    return own


class RankError(RuntimeError):
    """Another rank hangs or has died."""


class Watch:
    """Names the rank that hangs or has died, and ends this process, with one line, after `timeout_sec`.

    A thread of every rank tells a store on rank 0 that it lives and how far its main thread is. Collectives alone would
    not say whom they wait for. As a context it adds that to a collective's own error.
    """

    def __init__(self, mesh: Mesh, timeout_sec: float, die: Callable[[str], None] | None = None):
        self.mesh, self.timeout_sec = mesh, timeout_sec
        self.die = _die if die is None else die
        self.place, self.since = "the start", time.monotonic()
        self.last: dict[int, _Word] = {}  # of the other ranks
        self.talked = time.monotonic()  # when the store answered last
        self.over = threading.Event()
        if mesh.world_size == 1:
            return
        host, timeout = os.environ.get("MASTER_ADDR", "localhost"), timedelta(seconds=timeout_sec)
        store = dist.TCPStore  # pyright: ignore[reportPrivateImportUsage]
        own = store(host, 0, None, True, timeout, wait_for_workers=False) if mesh.is_main else None
        port = mesh.from_main(None if own is None else own.port)
        assert port is not None
        self.store = own or store(host, port, None, False, timeout, wait_for_workers=False)
        self.last = {rank: _Word("", self.talked, 0.0, "", "") for rank in range(mesh.world_size) if rank != mesh.rank}
        # Two: a store whose process is frozen answers never, and whoever asks it cannot judge.
        self.talker, judge = (threading.Thread(target=does, daemon=True) for does in (self._talk, self._judge))
        self.talker.start()
        judge.start()

    def at(self, place: str) -> None:
        """This rank's main thread has come on to `place`."""
        self.place, self.since = place, time.monotonic()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        told = ""
        if self.mesh.world_size > 1 and isinstance(error, RuntimeError) and re.search("gloo|NCCL|c10d", str(error)):
            time.sleep(min(self.timeout_sec, 7 * BEAT_SEC))  # who is alive has spoken by then
            told = f"rank {self.mesh.rank}, {self.place}: {self.blame()}"
        self.over.set()
        if self.mesh.world_size > 1:
            # The interpreter is not to end while a thread is within the store.
            self.talker.join(LEAVE_SEC if error is None else 2 * BEAT_SEC)
        if told:
            raise RankError(f"{told} ({str(error).splitlines()[0][:200]})") from error

    def blame(self) -> str:
        """The other rank that is silent, or else behind all others, for a message; none where all wait at one place."""
        now = time.monotonic()
        if all(now - word.heard < 2 * BEAT_SEC and word.place == self.place for word in self.last.values()):
            since = min(now - self.since, *(word.age(now) for word in self.last.values()))
            return f"all ranks are alive and have been there for {since:.0f} s; the network between them may be cut"
        there = {rank: word for rank, word in self.last.items() if not word.done} or self.last
        if 0 in there and now - self.talked > 5 * BEAT_SEC:  # no word of anyone: the store's own rank
            there = {0: there[0]}
        rank, word = max(there.items(), key=lambda item: (now - item[1].heard > 5 * BEAT_SEC, item[1].age(now)))
        silent = now - word.heard
        what = f"silent for {silent:.0f} s" if silent > 5 * BEAT_SEC else f"stuck for {word.age(now):.0f} s"
        return f"rank {rank} on {word.host or 'an unknown machine'} is {what}, last seen at {word.place or 'the start'}"

    def _talk(self) -> None:
        mine, host, beat = str(self.mesh.rank), socket.gethostname(), 0
        with contextlib.suppress(RuntimeError):  # the store died with rank 0
            while not self.over.wait(self._pause):
                beat += 1
                self.store.set(mine, f"{beat}|{time.monotonic() - self.since:.1f}|{host}|{self.place}")
                for rank in self.last:
                    self._hear(rank)
                self.talked = time.monotonic()
            self.store.set(mine, f"{beat + 1}|0|{host}|{_DONE}")

    def _judge(self) -> None:
        while not self.over.wait(self._pause):
            now = time.monotonic()
            silent = any(now - word.heard > self.timeout_sec for word in self.last.values() if not word.done)
            # A collective that can, has given up by one and a half.
            if silent or now - self.since > 1.5 * self.timeout_sec:
                self.die(f"rank {self.mesh.rank}, {self.place}: {self.blame()}")
                return

    @property
    def _pause(self) -> float:
        return min(BEAT_SEC, self.timeout_sec / 10)

    def _hear(self, rank: int) -> None:
        raw = self.store.get(str(rank)).decode() if self.store.check([str(rank)]) else ""
        if raw != self.last[rank].raw:
            _, age, host, place = raw.split("|", 3)
            self.last[rank] = _Word(raw, time.monotonic(), float(age), host, place)


_DONE = "the end"


class _Word(NamedTuple):
    """The last a rank told: when it came, how long its main thread had been at its place by then."""

    raw: str
    heard: float
    stuck_sec: float
    host: str
    place: str

    @property
    def done(self) -> bool:
        return self.place == _DONE

    def age(self, now: float) -> float:
        return now - self.heard + self.stuck_sec


def _die(message: str) -> None:
    sys.stderr.write(f"error: {message}\n")
    sys.stderr.flush()
    os._exit(1)


def for_training(mesh: Mesh, timeout_sec: float) -> Mesh:
    """The same ranks with collectives that give up after `timeout_sec`: nobody waits for long once steps begin."""
    if mesh.world_size == 1:
        return mesh
    backend = "cpu:gloo,cuda:nccl" if mesh.device.type == "cuda" else "gloo"
    return replace(mesh, group=dist.new_group(backend=backend, timeout=timedelta(seconds=timeout_sec)))


def pick_device(local_rank: int, *, allow_cpu: bool) -> torch.device:
    """This rank's GPU, or the CPU. Raises UserError where a GPU would go unused for lack of the right torch."""
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"rank {local_rank} of this machine has no GPU: it has {torch.cuda.device_count()}")
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if not allow_cpu and not hidden and _has_nvidia_card():
        built = "is built for the CPU" if torch.version.cuda is None else f"(CUDA {torch.version.cuda}) cannot use it"
        raise UserError(
            f"this machine has an NVIDIA GPU, but torch {torch.__version__} {built}; install one that can: "
            f'pip install --force-reinstall "{TORCH_RANGE}" --index-url https://download.pytorch.org/whl/cu128 '
            "(or go on without the GPU: --allow-cpu)"
        )
    return torch.device("cpu")


def _has_nvidia_card() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def pick_precision(wanted: str, device: torch.device) -> str:
    """`wanted`, or for "auto" the fastest that the device computes natively: bf16, fp16 (before Ampere) or fp32."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        if wanted == "bf16" and not native:
            raise UserError("train.precision = bf16: this GPU only emulates bf16; use auto or fp16")
        return wanted if wanted != "auto" else "bf16" if native else "fp16"
    if wanted == "fp16":
        raise UserError("train.precision = fp16: on a CPU it is ten times slower than fp32; use auto, bf16 or fp32")
    return wanted if wanted != "auto" else "bf16" if cpu_has_bf16() else "fp32"


def cpu_has_bf16() -> bool:
    """Whether this CPU has instructions for bf16 products. Emulated ones are many times slower than fp32."""
    if hasattr(torch.cpu, "get_capabilities"):  # torch 2.11
        features = torch.cpu.get_capabilities()
        return bool(features.get("avx512_bf16") or features.get("amx_bf16"))
    return torch.cpu._is_avx512_bf16_supported()


def set_arithmetic(precision: str, device: torch.device, *, deterministic: bool = False) -> None:
    """TF32 for fp32 runs on Ampere and later; in 16-bit runs the router's products stay exact, fp16's sums in fp32.

    `deterministic`: the same numbers every time also on a GPU; an operation that cannot is an error.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if precision == "fp32" else "highest")
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def parallelize(model: nn.Module, mesh: Mesh) -> nn.Module:
    """The module to call in training: under DDP when there are several ranks."""
    if mesh.world_size == 1:
        return model
    # Buffers are router biases, which every rank updates from the same global counts.
    known = inspect.signature(DistributedDataParallel).parameters
    off = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # renamed in torch 2.13
    options: dict[str, Any] = {off: False, "gradient_as_bucket_view": True}
    return Replica(model, mesh.group, **options)


@dataclass
class _Exchange:
    """How many of DDP's buckets of gradients this rank has begun to add up over ranks in a step."""

    group: Any
    begun: int = 0


def _add_up(exchange, bucket):  # DDP takes annotations for objects
    future = allreduce_hook(exchange.group, bucket)
    exchange.begun += 1
    return future


class Replica(DistributedDataParallel):
    """The model under DDP, which tells how far the exchange of gradients is."""

    def __init__(self, model: nn.Module, group: Any, **options: Any):
        super().__init__(model, process_group=group, **options)
        self.exchange = _Exchange(group)
        self.register_comm_hook(self.exchange, _add_up)


def synchronised(model: nn.Module, last: bool) -> AbstractContextManager:
    """Around a micro-batch: gradients are reduced over ranks in the last one of a step only."""
    if not isinstance(model, Replica):
        return contextlib.nullcontext()
    if not last:
        return model.no_sync()
    model.exchange.begun = 0
    return contextlib.nullcontext()


def abandon(model: nn.Module) -> None:
    """After this rank failed in a step's last micro-batch: no rank waits for it, since it takes part with zeros in what
    of the exchange is left. The step's gradients are lost, and so is the replica: all ranks need a new one."""
    if isinstance(model, Replica):
        free_memory(next(model.parameters()).device)
        buckets = model.reducer._get_zeros_like_grad_buckets()[model.exchange.begun :]
        for future in [model.reducer._run_comm_hook(bucket) for bucket in buckets]:
            future.wait()


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Floating-point operations per second this device can do, and whose figure that is."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    if device.type == "cuda" and dtype != torch.float32:
        for pattern, tflops in NOMINAL_TFLOPS.items():
            if re.search(rf" {pattern}$", name):
                return tflops * 1e12, f"{name}, data sheet"
    size = 4096 if device.type == "cuda" else 1024
    return product_flops(device, dtype, size), f"{name}, measured product of {size}x{size} matrices"


@functools.cache
def product_flops(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Floating-point operations per second of a product of square matrices, the best of up to 20."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds: list[float] = []
    while len(seconds) < 20 and sum(seconds) < PEAK_BUDGET_SEC:
        start = time.perf_counter()
        F.linear(a, b)[0, 0].item()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def usable_memory(device: torch.device) -> int:
    """Bytes of a GPU that this process may take: all, or its fraction; 0 on a CPU. What others hold now does not count:
    a run's shape should not depend on it."""
    if device.type == "cpu":
        return 0
    fraction = torch.cuda.get_per_process_memory_fraction(device)
    return int(torch.cuda.get_device_properties(device).total_memory * fraction)


def free_memory(device: torch.device) -> None:
    """What nobody holds any more, for others to take."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_memory_gib(device: torch.device) -> float | None:
    """The largest memory so far: allocated on a GPU, resident on a CPU; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    with contextlib.suppress(ImportError):
        import resource  # not on Windows
        import sys

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    return None
