"""Processes, devices and precision. GPUs are faked: what is asked of torch, and what is made of the answer."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch import nn

import parallel
from config import Config, UserError
from ops import DTYPES
from parallel import Mesh, peak_flops, pick_device, pick_precision

ROOT = Path(parallel.__file__).parent
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
ALONE = Mesh(0, 1, CPU)


# ---- the mesh


@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 61])
def test_every_row_is_dealt_once_and_shares_differ_by_at_most_one(world_size: int) -> None:
    for rows in (0, 1, 2, 5, 7, 8, 60, 61, 62, 1000, 10**12 + 7):
        shares = [Mesh(rank, world_size, CPU).share(rows) for rank in range(world_size)]
        assert shares[0][0] == 0 and shares[-1][1] == rows
        assert all(before[1] == after[0] for before, after in itertools.pairwise(shares))
        sizes = {end - start for start, end in shares}
        assert max(sizes) - min(sizes) <= 1


def test_one_process_is_the_mesh_without_communication(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with parallel.processes(allow_cpu=True) as mesh:
        assert mesh == ALONE and mesh.is_main
        assert not torch.distributed.is_initialized()
    tensor, value = torch.tensor([1.5, 2.0]), {"a": 1}
    assert mesh.sum(tensor) is tensor and tensor.tolist() == [1.5, 2.0]
    assert mesh.any(True, False) == [True, False]
    state = {"a": torch.ones(2)}
    assert mesh.to_main(state) == [state]
    assert parallel.for_training(mesh, 1.0) is mesh
    assert mesh.from_main(value) is value
    error = UserError("no such file")
    with pytest.raises(UserError) as caught:
        mesh.from_main(error)
    assert caught.value is error
    assert mesh.on_main(lambda: value) is value
    model = nn.Linear(2, 2)
    assert parallel.parallelize(model, mesh) is model
    for last in (False, True):
        with parallel.synchronised(model, last):
            pass


TWO = """
import warnings
warnings.simplefilter("error")
import json, os, time
import torch
import parallel
from config import UserError

def fail():
    time.sleep(2.5)  # longer than a collective waits
    raise UserError("no such file")

if os.environ["RANK"] == "1":  # what ranks left there that torchrun has started again
    left = next(parallel.rendezvous("env://", 1, 2))[0]
    for key, value in (("word", "old"), ("answer", "old gone"), ("heard", "gone")):
        left.set(f"start/{key}/1", value)
with parallel.processes(allow_cpu=True) as mesh:
    found = {"mesh": [mesh.rank, mesh.world_size, str(mesh.device)], "grads": []}
    found["sum"] = mesh.sum(torch.tensor([1.0, 10.0]) * (1 + mesh.rank)).tolist()
    mesh = parallel.for_training(mesh, 60.0)
    found["any"] = mesh.any(False, mesh.rank == 1, mesh.is_main, True)
    found["to main"] = [state["a"].tolist() for state in mesh.to_main({"a": torch.tensor([mesh.rank, 7])})]
    found["from main"] = mesh.from_main({"text": [1, "a"]} if mesh.is_main else None)
    try:
        parallel.for_training(mesh, 2.0).on_main(fail)
    except UserError as error:
        found["error"] = str(error)
    model = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.constant_(model.weight, float(mesh.rank))
    replica = parallel.parallelize(model, mesh)
    found["weight"] = model.weight.tolist()
    for number, last in enumerate((False, False, True)):
        rows = torch.tensor([[1.0 + mesh.rank, 10.0 ** number]])
        with parallel.synchronised(replica, last):
            replica(rows).sum().backward()
        found["grads"].append(model.weight.grad.flatten().tolist())

    layers = [torch.nn.Linear(600, 600, bias=False) for _ in range(4)]
    model, rows = torch.nn.Sequential(*layers), torch.full((2, 600), 1.0 + mesh.rank)
    found["exchanges"] = []
    for fails in ("", "backward", "forward", ""):
        replica = parallel.parallelize(model, mesh)
        replica(rows).sum().backward()  # DDP begins with one bucket, and then makes more
        replica.zero_grad(set_to_none=False)
        fails = mesh.rank and fails
        hook = layers[0].weight.register_hook(lambda grad: 1 / 0) if fails == "backward" else None
        failed = False
        try:
            with parallel.synchronised(replica, True):
                out = replica(rows)
                loss = out.sum() if fails != "forward" else 1 / 0
                loss.backward()
        except ZeroDivisionError:
            failed = True
        if failed:
            found["exchanges"].append(replica.exchange.begun)
            parallel.abandon(replica)
        if hook is not None:
            hook.remove()
        if not mesh.any(failed)[0]:
            found["exchanges"].append([layer.weight.grad.sum().item() for layer in layers])
        del replica
        model.zero_grad(set_to_none=True)
found["left"] = not torch.distributed.is_initialized()
with open(f"{os.environ['OUT']}/{mesh.rank}.json", "w") as file:
    json.dump(found, file)
"""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes of torchrun's find, in the order of their ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "two.py").write_text(TWO, encoding="utf-8")
    env = {
        **os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "OUT": str(folder),
    }  # fmt: skip
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [sys.executable, *launcher, str(folder / "two.py")], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.dist
def test_two_processes(two_ranks: list[dict[str, Any]]) -> None:
    """Reductions over gloo, rank 0's error everywhere, and gradients averaged in a step's last micro-batch only."""
    for rank, found in enumerate(two_ranks):
        assert found["mesh"] == [rank, 2, "cpu"] and found["left"]
        assert found["sum"] == [3.0, 30.0] and found["any"] == [False, True, True, True]
        assert found["to main"] == ([[0, 7], [1, 7]] if rank == 0 else [])
        assert found["from main"] == {"text": [1, "a"]} and found["error"] == "no such file"
        assert found["weight"] == [[0.0, 0.0]]  # rank 0's
        own = 1.0 + rank
        assert found["grads"] == [[own, 1.0], [2 * own, 11.0], [4.5, 111.0]]


@pytest.mark.dist
def test_a_rank_that_fails_in_the_exchange_of_gradients_holds_up_nobody(two_ranks: list[dict[str, Any]]) -> None:
    ours, theirs = (found["exchanges"] for found in two_ranks)
    assert len(ours) == 2 and ours[0] == ours[1]  # a new replica adds up as the first one did
    assert theirs[0] == theirs[3] == ours[0]
    assert theirs[1:3] == [1, 0]  # of two buckets


def test_no_rank_is_blamed_where_all_wait_at_one_place() -> None:
    watch = parallel.Watch(ALONE, 60.0)
    now = time.monotonic()
    watch.place, watch.since = "step 3, saving", now - 40

    def word(rank: int, heard: float, place: str) -> None:
        watch.last[rank] = parallel._Word("", now - heard, 30.0, f"host{rank}", place)

    word(1, 0.5, watch.place)
    word(2, 1.0, watch.place)
    assert re.match("all ranks are alive and have been there for 3[01] s", watch.blame())
    word(2, 1.0, "step 2, saving")
    assert watch.blame().startswith("rank 2 on host2 is stuck")
    word(2, 9.0, watch.place)
    assert watch.blame().startswith("rank 2 on host2 is silent")


# ---- devices


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that this torch, a build for the CPU, does not use."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(parallel, "_has_nvidia_card", lambda: True)


@pytest.mark.parametrize(("cuda", "said"), [(None, "for the CPU"), ("13.0", "13.0")])  # the driver may be too old
def test_a_card_that_torch_cannot_use(
    cuda: str | None, said: str, no_cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says what to install, of the versions that requirements.txt names."""
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(UserError) as caught:
        pick_device(0, allow_cpu=False)
    message = str(caught.value)
    assert "NVIDIA GPU" in message and said in message and "--allow-cpu" in message and "\n" not in message
    pattern = r'pip install --force-reinstall "(\S+)" --index-url https://download\.pytorch\.org/whl/cu\d+ '
    command = re.search(pattern, message)
    assert command is not None
    assert f"\n{command[1]}" in (ROOT / "requirements.txt").read_text(encoding="utf-8")
    assert pick_device(0, allow_cpu=True) == CPU


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_a_card_that_is_hidden_on_purpose(hidden: str, no_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert pick_device(0, allow_cpu=False) == CPU
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(UserError):
        pick_device(0, allow_cpu=False)


def test_without_a_card_the_cpu_it_is(no_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "_has_nvidia_card", lambda: False)
    assert pick_device(3, allow_cpu=False) == CPU


def test_a_card_shows_in_its_driver_or_its_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    for driver, tool in ((False, None), (True, None), (False, "nvidia-smi")):
        monkeypatch.setattr(Path, "exists", lambda path, driver=driver: driver and path.parent.name == "nvidia")
        monkeypatch.setattr(parallel.shutil, "which", lambda name, tool=tool: tool if name == "nvidia-smi" else None)
        assert parallel._has_nvidia_card() == (driver or tool is not None)


@pytest.fixture
def full_precision() -> Iterator[None]:
    """fp32 products in full, and so again afterwards."""
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision("highest")


def test_tf32_is_for_fp32_runs(full_precision: None) -> None:
    """In 16-bit runs the router's fp32 products stay exact."""
    for precision, products in (("fp32", "high"), ("bf16", "highest"), ("fp16", "highest")):
        parallel.set_arithmetic(precision, GPU)
        assert torch.get_float32_matmul_precision() == products
    parallel.set_arithmetic("fp32", CPU)
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_rank_takes_its_own_card(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert pick_device(1, allow_cpu=False) == torch.device("cuda", 1) and chosen == [1]
    with pytest.raises(UserError, match="rank 2 of this machine has no GPU: it has 2"):
        pick_device(2, allow_cpu=True)
    assert chosen == [1]


# ---- precision


@pytest.mark.parametrize(
    ("features", "auto"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, "bf16"),
        ({"avx512_bf16": False, "amx_bf16": True}, "bf16"),
        ({"avx512_bf16": False, "avx512_f": True}, "fp32"),
        ({}, "fp32"),
    ],
)
def test_precision_on_a_cpu(features: dict[str, bool], auto: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    assert [pick_precision(wanted, CPU) for wanted in ("auto", "fp32", "bf16")] == [auto, "fp32", "bf16"]
    with pytest.raises(UserError, match=r"^train\.precision = fp16: .*use auto, bf16 or fp32"):
        pick_precision("fp16", CPU)


def test_precision_where_torch_does_not_tell_the_cpu_s_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.9 and 2.10."""
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    for native, auto in ((False, "fp32"), (True, "bf16")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native, raising=False)
        assert pick_precision("auto", CPU) == auto and pick_precision("bf16", CPU) == "bf16"


@pytest.mark.parametrize(("native", "auto"), [(True, "bf16"), (False, "fp16")])
def test_precision_on_a_gpu(native: bool, auto: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """sm_80 and sm_75: there torch says that bf16 is supported, unless emulation is ruled out."""

    def is_bf16_supported(including_emulation: bool = True) -> bool:
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    assert [pick_precision(wanted, GPU) for wanted in ("auto", "fp32", "fp16")] == [auto, "fp32", "fp16"]
    if native:
        assert pick_precision("bf16", GPU) == "bf16"
    else:
        with pytest.raises(UserError, match=r"^train\.precision = bf16: .*emulates.*use auto or fp16"):
            pick_precision("bf16", GPU)


def test_every_precision_of_the_configuration_has_a_dtype() -> None:
    named = set(get_args(type(Config().train).model_fields["precision"].annotation))
    assert named - {"auto"} == set(DTYPES)


# ---- what a device can do


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("Tesla T4", 65), ("NVIDIA GeForce RTX 3060", 25.5), ("NVIDIA GeForce RTX 4070", 58),
        ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H200", 989), ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362), ("NVIDIA A100-SXM4-80GB", 312), ("Tesla V100-SXM2-16GB", 125),
    ],
)  # fmt: skip
def test_peak_from_the_data_sheet(name: str, tflops: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    for dtype in (torch.bfloat16, torch.float16):
        peak, source = peak_flops(GPU, dtype)
        assert peak == pytest.approx(tflops * 1e12) and name in source and "data sheet" in source


@pytest.fixture
def small_products(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Products of small matrices on the CPU, whatever was asked for: the sizes and dtypes that were."""
    asked: list[Any] = []
    real = torch.randn

    def randn(*size: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        asked.append((size, device.type, dtype))
        return real(4, 4)

    monkeypatch.setattr(torch, "randn", randn)
    return asked


@pytest.mark.parametrize(("name", "dtype"), [("NVIDIA Future", torch.bfloat16), ("NVIDIA H100", torch.float32)])
def test_peak_is_measured_where_no_data_sheet_holds(
    name: str, dtype: torch.dtype, small_products: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data sheets' figures are those of 16-bit products."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    _, source = peak_flops(GPU, dtype)
    assert name in source and "measured" in source and "data sheet" not in source
    assert small_products == [((4096, 4096), "cuda", dtype)] * 2


def test_the_smallest_of_all_ranks_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `micro_batch=auto` fits into: the memory of the smallest card."""
    assert Mesh(0, 1, CPU).least(7) == 7
    asked = []
    monkeypatch.setattr(parallel.dist, "all_reduce", lambda tensor, op, group: asked.append(op) or tensor.fill_(3))
    assert Mesh(0, 2, CPU).least(2**40) == 3 and asked == [parallel.dist.ReduceOp.MIN]


def test_peak_of_this_cpu() -> None:
    """Against a product timed here: of the same order, whatever else this machine does."""
    peak, source = peak_flops(CPU, torch.float32)
    assert "CPU" in source and "measured" in source
    a = torch.randn(512, 512)
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - start)
    assert 1 / 30 < peak * best / (2 * 512**3) < 30


def test_peak_memory_is_that_of_the_process() -> None:
    """Against what Linux tells elsewhere."""
    status = Path("/proc/self/status")
    told = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    if told is None:
        pytest.skip("needs /proc/self/status")
    assert parallel.peak_memory_gib(CPU) == pytest.approx(int(told[1]) / 2**20, rel=0.05)


@pytest.mark.parametrize(("platform", "unit"), [("linux", 2**10), ("darwin", 1)])
def test_peak_memory_in_the_unit_of_the_system(platform: str, unit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """getrusage(2): kilobytes on Linux, bytes on macOS."""
    usage = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda _: SimpleNamespace(ru_maxrss=3 * 2**29 // unit))
    monkeypatch.setitem(sys.modules, "resource", usage)
    monkeypatch.setattr(sys, "platform", platform)
    assert parallel.peak_memory_gib(CPU) == 1.5


def test_peak_memory_of_a_gpu_is_what_torch_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 3 * 2**29)
    assert parallel.peak_memory_gib(GPU) == 1.5


def test_peak_memory_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    assert parallel.peak_memory_gib(CPU) is None


@pytest.mark.parametrize(
    "name", ["RTX A1000", "L40", "GeForce RTX 4070 Ti SUPER", "T400 4GB", "GeForce RTX 3060 Ti", "H100 PCIe"]
)
def test_a_card_with_a_similar_name_is_measured(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.randn
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: f"NVIDIA {name}")
    monkeypatch.setattr(torch, "randn", lambda *shape, device, dtype: real(4, 4))
    assert "measured" in parallel.peak_flops(torch.device("cuda", 0), torch.float16)[1]


def test_deterministic_arithmetic_is_torch_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is put back
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    parallel.set_arithmetic("fp32", CPU)
    assert not torch.are_deterministic_algorithms_enabled() and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    try:
        parallel.set_arithmetic("fp32", CPU, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(sys.platform != "linux", reason="the C library is glibc's")
def test_a_run_on_a_cpu_keeps_the_memory_it_frees() -> None:
    """Else each step would meet fresh pages, which the kernel has to find and clear."""
    code = """
import resource, torch, parallel
with parallel.processes(allow_cpu=True):
    for _ in range(10):  # the first few still meet them
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    root, environment = Path(parallel.__file__).parent, {**os.environ, "CUDA_VISIBLE_DEVICES": "-1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2**24 * 4 // 4096 / 10
