"""The grouped product against products in fp64: in Triton's interpreter, on a GPU; and compiled without one.

Triton reads TRITON_INTERPRET when it is imported, and a compiler without a GPU wants another driver. So each of these
is a process of its own, which runs this file as a program: it prints how far every result is beyond what is allowed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
ROUNDING = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-7}  # bf16: the interpreter cuts off
SUM = 1e-5  # of the largest value: fp32 sums in another order
CASES = {  # rows per expert, D, F
    "usual": ([10, 0, 30, 23], 48, 40),
    "odd": ([65, 1, 0, 63, 64], 33, 71),
    "one row": ([0, 1, 0], 33, 7),
    "one of three experts": ([0, 150, 0], 96, 80),
    "one expert": ([20], 16, 16),
    "no rows": ([0, 0], 16, 16),
    "more experts than rows": ([0] * 6 + [1, 0, 1] + [0] * 3, 16, 16),
    "large blocks": ([515, 0, 257], 257, 260),
    "mini": ([768 + 40 * (expert % 9 - 4) for expert in range(64)], 768, 512),
    "large and odd": ([3000, 0, 1, 517], 520, 1031),
}
LAYOUTS = {  # how a (rows, columns) tensor lies in memory
    "dense": lambda make, rows, columns: make(rows, columns),
    "transposed": lambda make, rows, columns: make(columns, rows).mT,
    "expanded": lambda make, rows, columns: make(1, 1).expand(rows, columns),  # the gradient of a sum
}
SMALL = [  # case, dtype, how the gradient lies
    *((case, torch.float32, "dense") for case in list(CASES)[:7]),
    *((case, torch.bfloat16, "dense") for case in ("usual", "odd", "no rows")),
    *(("usual", dtype, layout) for layout in ("transposed", "expanded") for dtype in (torch.float32, torch.bfloat16)),
    ("usual", torch.float16, "dense"),
    ("large blocks", torch.bfloat16, "dense"),
]
LARGE = [(case, dtype, layout) for case in ("mini", "large and odd") for dtype in ROUNDING for layout in LAYOUTS]


def exact_product(x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    return torch.cat([F.linear(part, each) for part, each in zip(x.split(counts), weight, strict=True)])


def beyond(case: str, dtype: torch.dtype, layout: str, device: str) -> list[float]:
    """How far output and both gradients differ by more than fp32 sums and one rounding may; right if not above 0."""
    from triton_ops import grouped_product

    counts, hidden, width = CASES[case]
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    x = LAYOUTS["transposed" if layout == "transposed" else "dense"](make, sum(counts), hidden).requires_grad_()
    weight = make(len(counts), width, hidden).requires_grad_()
    grad = LAYOUTS[layout](make, sum(counts), width)
    out = grouped_product(x, weight, torch.tensor(counts, device=device))
    ours = [out, *torch.autograd.grad(out, (x, weight), grad)]
    leaves = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    exact = exact_product(*leaves, counts)
    differences = []
    for mine, other in zip(ours, (exact, *torch.autograd.grad(exact, leaves, grad.double())), strict=True):
        assert mine.shape == other.shape and mine.dtype == dtype
        allowed = ROUNDING[dtype] * other.abs() + SUM * (other.abs().max() if other.numel() else 0)
        differences.append(((mine - other).abs() - allowed).max().item() if other.numel() else 0.0)
    assert not any(grad.any() for grad, count in zip(ours[2], counts, strict=True) if count == 0)
    return differences


def name_of(case: str, dtype: torch.dtype, layout: str) -> str:
    return f"{case}, {str(dtype).removeprefix('torch.')}, {layout}"


# --- the programs ---


def interpret() -> Iterator[tuple[str, list[float]]]:
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    as_it_is = InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        """The interpreter has no bf16 product: it would multiply the bits (triton#11584)."""
        a, b = (self.cast_impl(each, tl.float32) if each.dtype == tl.bfloat16 else each for each in (a, b))
        return as_it_is(self, a, b, *rest)

    InterpreterBuilder.create_dot = create_dot
    for case, dtype, layout in SMALL:
        yield name_of(case, dtype, layout), beyond(case, dtype, layout, "cpu")


def compile_for(capability: int) -> Iterator[tuple[str, list[float]]]:
    """Shared memory in bytes of the kernels for mini's sizes. The tensors have no values: to read one would raise."""
    import triton
    from triton.backends.compiler import GPUTarget

    import triton_ops

    class Driver:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", capability, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda _: 0)

    class Compiled:
        """Takes the place of a kernel: compiled for the same arguments, not launched."""

        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            return lambda *args, **options: made.append(self.kernel.warmup(*args, grid=grid, **options))

    triton.runtime.driver.set_active(Driver())  # type: ignore[arg-type]
    for kernel in ("_rows_kernel", "_weight_kernel"):
        setattr(triton_ops, kernel, Compiled(getattr(triton_ops, kernel)))
    made: list[Any] = []
    x = torch.empty(49152, 768, dtype=torch.bfloat16, device="meta", requires_grad=True)
    weight = torch.empty(64, 512, 768, dtype=torch.bfloat16, device="meta", requires_grad=True)
    out = triton_ops.grouped_product(x, weight, torch.empty(64, dtype=torch.int64, device="meta"))
    out.backward(torch.empty_like(out))
    assert all("mma.sync" in kernel.asm["ptx"] and "cp.async" in kernel.asm["ptx"] for kernel in made)
    yield "shared", [kernel.metadata.shared for kernel in made]


def on_gpu() -> Iterator[tuple[str, list[float]]]:
    from triton_ops import grouped_product

    for case, dtype, layout in (*SMALL, *LARGE):
        yield name_of(case, dtype, layout), beyond(case, dtype, layout, "cuda")
    counts, hidden, width = CASES["mini"]
    x = torch.randn(sum(counts), hidden, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(len(counts), width, hidden, device="cuda", dtype=torch.bfloat16).requires_grad_()
    counts_E, grad = torch.tensor(counts, device="cuda"), torch.randn_like(x[:, :width])
    runs = []
    torch.cuda.set_sync_debug_mode("error")  # the host raises where it waits for the device
    for _ in range(2):
        out = grouped_product(x, weight, counts_E)
        runs.append([out, *torch.autograd.grad(out, (x, weight), grad)])
    torch.cuda.set_sync_debug_mode("default")
    yield "same bits", [0.0 if torch.equal(one, other) else 1.0 for one, other in zip(*runs, strict=True)]


PROGRAMS = {"interpret": interpret, "compile": lambda: compile_for(int(sys.argv[2])), "gpu": on_gpu}


# --- the tests ---


def installed(package: str) -> Version:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}: pip install {package}")
    return Version(importlib.metadata.version(package))


def run(tmp_path: Path, *arguments: str, interpreted: bool = False) -> dict[str, list[float]]:
    installed("triton")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    environment["TRITON_INTERPRET"] = "1" if interpreted else "0"
    command = [sys.executable, __file__, *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_product_and_gradients_in_the_interpreter(tmp_path: Path) -> None:
    if installed("triton") < Version("3.7") and installed("numpy") >= Version("2.4"):
        pytest.skip("the interpreter of Triton before 3.7 cannot loop with NumPy 2.4")
    results = run(tmp_path, "interpret", interpreted=True)
    assert set(results) == {name_of(*compared) for compared in SMALL}
    beyond_allowed = {name: found for name, found in results.items() if max(found) > 0}
    assert not beyond_allowed


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 89])
def test_kernels_compile_for_the_cards(capability: int, tmp_path: Path) -> None:
    """For tensor cores, with asynchronous copies, in sm_86's and sm_89's shared memory; the host reads no value."""
    shared = run(tmp_path, "compile", str(capability))["shared"]
    assert len(shared) == 3 and max(shared) <= 99 * 1024


@pytest.mark.gpu
def test_product_and_gradients_on_a_gpu(tmp_path: Path) -> None:
    """Large and small; the same bits twice, and the host never waits."""
    for compared, differences in run(tmp_path, "gpu").items():
        assert all(difference <= 0 for difference in differences), (compared, differences)


def test_what_does_not_fit_is_refused() -> None:
    pytest.importorskip("triton")
    from triton_ops import grouped_product

    x, weight, counts = torch.zeros(3, 4), torch.zeros(2, 5, 4), torch.tensor([1, 2])
    for wrong in ((x.T, weight, counts), (x, weight, counts[:1]), (x[0], weight, counts), (x, weight[0], counts)):
        with pytest.raises(ValueError, match=r"takes \(S, D\), \(E, F, D\)"):
            grouped_product(*wrong)
    with pytest.raises(ValueError, match="contiguous"):
        grouped_product(x, weight, counts[:1].expand(2))
    for wrong in ((x.double(), weight.double(), counts), (x, weight.bfloat16(), counts), (x, weight, counts.int())):
        with pytest.raises(ValueError, match="int64, not"):
            grouped_product(*wrong)


if __name__ == "__main__":
    print(json.dumps(dict(PROGRAMS[sys.argv[1]]())))
