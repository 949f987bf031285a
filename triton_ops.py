"""A grouped matrix product in Triton, for the NVIDIA GPUs (sm_80, sm_86, sm_89) where torch's own waits for the device.

There `F.grouped_mm` copies the counts to the host and multiplies expert by expert (pytorch#161407). Here the host
launches as many programs as the counts could ask for at most; each finds its expert and rows in the counts itself, and
those that are left over return. No atomics: equal inputs give equal bits. Fixed block sizes: no search before the first
step, which could also end differently from run to run.

Tested in Triton's interpreter on a CPU, and compiled for these GPUs. **It was never run on a GPU**: block sizes are
the usual ones for such cards, not measured.

This module needs Triton when it is imported, so it is imported in functions only, and where
`importlib.util.find_spec("triton")` finds something. Shapes are named as in `model.py`; `S` is the number of rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("triton_ops needs Triton, which is made for Linux: pip install triton") from error

DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # all summed in fp32


@triton.jit
def _load_counts(counts, num_experts, EXPERTS: tl.constexpr):
    index_E = tl.arange(0, EXPERTS)
    return tl.load(counts + index_E, mask=index_E < num_experts, other=0)


@triton.jit
def _rows_of(expert, counts_E, EXPERTS: tl.constexpr):
    """First row of an expert, and the first that is not its own any more; int64."""
    index_E = tl.arange(0, EXPERTS)
    begin = tl.sum(tl.where(index_E < expert, counts_E, 0))
    return begin, begin + tl.sum(tl.where(index_E == expert, counts_E, 0))


@triton.jit
def _rows_kernel(
    x, weight, counts, out, num_experts, size_F, size_D, x_s, x_d, weight_e, weight_f, weight_d,
    EXPERTS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[s, f] = sum_d x[s, d] * weight[e, f, d] for BLOCK_S rows of one expert e and BLOCK_F columns."""
    blocks_F = tl.cdiv(size_F, BLOCK_F)
    block = tl.program_id(0) // blocks_F
    counts_E = _load_counts(counts, num_experts, EXPERTS)
    blocks_E = (counts_E + BLOCK_S - 1) // BLOCK_S
    expert = tl.sum((tl.cumsum(blocks_E, 0) <= block).to(tl.int64))
    if expert >= num_experts:
        return
    begin, end = _rows_of(expert, counts_E, EXPERTS)
    first_block, _ = _rows_of(expert, blocks_E, EXPERTS)
    row_S = begin + (block - first_block) * BLOCK_S + tl.arange(0, BLOCK_S)
    column_F = (tl.program_id(0) % blocks_F) * BLOCK_F + tl.arange(0, BLOCK_F)
    row_S1, column_1F, d_D = row_S[:, None], column_F[None, :], tl.arange(0, BLOCK_D)
    x_SD = x + row_S1 * x_s + d_D[None, :] * x_d
    weight_DF = weight + expert * weight_e + column_1F * weight_f + d_D[:, None] * weight_d
    sum_SF = tl.zeros((BLOCK_S, BLOCK_F), tl.float32)
    for start in range(0, size_D, BLOCK_D):
        left = size_D - start
        part_SD = tl.load(x_SD, mask=(row_S1 < end) & (d_D[None, :] < left), other=0)
        part_DF = tl.load(weight_DF, mask=(column_1F < size_F) & (d_D[:, None] < left), other=0)
        sum_SF = tl.dot(part_SD, part_DF, sum_SF, input_precision="ieee")
        x_SD += BLOCK_D * x_d
        weight_DF += BLOCK_D * weight_d
    tl.store(
        out + row_S1 * size_F + column_1F, sum_SF.to(out.dtype.element_ty), mask=(row_S1 < end) & (column_1F < size_F)
    )


@triton.jit
def _weight_kernel(
    grad, x, counts, out, num_experts, size_F, size_D, grad_s, grad_f, x_s, x_d,
    EXPERTS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[e, f, d] = sum_s grad[s, f] * x[s, d] over the rows of one expert e, for BLOCK_F by BLOCK_D places."""
    blocks_F, blocks_D = tl.cdiv(size_F, BLOCK_F), tl.cdiv(size_D, BLOCK_D)
    expert = (tl.program_id(0) // (blocks_F * blocks_D)).to(tl.int64)
    counts_E = _load_counts(counts, num_experts, EXPERTS)
    begin, end = _rows_of(expert, counts_E, EXPERTS)
    f_F1 = ((tl.program_id(0) // blocks_D % blocks_F) * BLOCK_F + tl.arange(0, BLOCK_F))[:, None]
    d_1D = ((tl.program_id(0) % blocks_D) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    s_S = tl.arange(0, BLOCK_S)
    grad_FS = grad + (begin + s_S)[None, :] * grad_s + f_F1 * grad_f
    x_SD = x + (begin + s_S)[:, None] * x_s + d_1D * x_d
    sum_FD = tl.zeros((BLOCK_F, BLOCK_D), tl.float32)
    for start in range(begin, end, BLOCK_S):  # type: ignore[arg-type]
        left = end - start  # type: ignore[operator]
        part_FS = tl.load(grad_FS, mask=(s_S[None, :] < left) & (f_F1 < size_F), other=0)
        part_SD = tl.load(x_SD, mask=(s_S[:, None] < left) & (d_1D < size_D), other=0)
        sum_FD = tl.dot(part_FS, part_SD, sum_FD, input_precision="ieee")
        grad_FS += BLOCK_S * grad_s
        x_SD += BLOCK_S * x_s
    place_FD = (expert * size_F + f_F1) * size_D + d_1D
    tl.store(out + place_FD, sum_FD.to(out.dtype.element_ty), mask=(f_F1 < size_F) & (d_1D < size_D))


def _options(blocks: str, rows: int, columns: int, num_experts: int, dtype: torch.dtype) -> dict[str, Any]:
    """How to launch a kernel; `blocks` names the output's rows, its columns, and the dimension that is summed."""
    most = 64 if dtype == torch.float32 else 128  # fp32 goes without tensor cores
    sizes = [most if size >= 256 else 64 for size in (rows, columns)] + [128 // dtype.itemsize]
    named = {f"BLOCK_{name}": size for name, size in zip(blocks, sizes, strict=True)}
    warps = 8 if sizes[:2] == [128, 128] else 4
    return {**named, "EXPERTS": triton.next_power_of_2(num_experts), "num_warps": warps, "num_stages": 3}


def _rows(x_SD: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
    (num_rows, _), (num_experts, size_F, size_D) = x_SD.shape, weight_EFD.shape
    out_SF = x_SD.new_empty(num_rows, size_F)
    options = _options("SFD", num_rows // num_experts, size_F, num_experts, x_SD.dtype)
    most_blocks = triton.cdiv(num_rows, options["BLOCK_S"]) + num_experts  # every expert's last may be partly empty
    _rows_kernel[(most_blocks * triton.cdiv(size_F, options["BLOCK_F"]),)](
        x_SD, weight_EFD, counts_E, out_SF, num_experts, size_F, size_D,
        x_SD.stride(0), x_SD.stride(1), weight_EFD.stride(0), weight_EFD.stride(1), weight_EFD.stride(2), **options,
    )  # fmt: skip
    return out_SF


def _weight_grad(grad_SF: Tensor, x_SD: Tensor, counts_E: Tensor) -> Tensor:
    num_experts, size_F, size_D = len(counts_E), grad_SF.shape[1], x_SD.shape[1]
    out_EFD = x_SD.new_empty(num_experts, size_F, size_D)
    options = _options("FDS", size_F, size_D, num_experts, x_SD.dtype)
    blocks_F, blocks_D = triton.cdiv(size_F, options["BLOCK_F"]), triton.cdiv(size_D, options["BLOCK_D"])
    _weight_kernel[(num_experts * blocks_F * blocks_D,)](
        grad_SF, x_SD, counts_E, out_EFD, num_experts, size_F, size_D,
        grad_SF.stride(0), grad_SF.stride(1), x_SD.stride(0), x_SD.stride(1), **options,
    )  # fmt: skip
    return out_EFD


class _GroupedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_SD: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_SD, weight_EFD, counts_E)
        return _rows(x_SD, weight_EFD, counts_E)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_SD, weight_EFD, counts_E = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        grad_x_SD = _rows(grads[0], weight_EFD.mT, counts_E) if needs_x else None
        return grad_x_SD, _weight_grad(grads[0], x_SD, counts_E) if needs_weight else None, None


def grouped_product(x_SD: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
    """Row s times the weight of its expert, `out[s] = weight[e] @ x[s]`, (S, F); the host never waits for the device.

    Differentiable once, in x and weight. Sums are in fp32, rounded once; an expert without rows gets a zero gradient.
    Any strides will do, also those of an expanded gradient.

    Args:
        x_SD: rows sorted by expert; bf16, fp16 or fp32 (which is multiplied as such, not as TF32).
        weight_EFD: of the same dtype.
        counts_E: rows of each expert, int64, contiguous, with the sum S. The sum is not checked: it is on the device.

    Raises:
        ValueError: other dtypes, or shapes that do not fit.
    """
    fits = x_SD.ndim == 2 and weight_EFD.ndim == 3 and weight_EFD.shape[2] == x_SD.shape[1]
    if not fits or counts_E.shape != weight_EFD.shape[:1] or not counts_E.is_contiguous():
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (x_SD, weight_EFD, counts_E))
        raise ValueError(f"grouped_product takes (S, D), (E, F, D) and contiguous (E,), not {shapes}")
    if x_SD.dtype not in DTYPES or weight_EFD.dtype != x_SD.dtype or counts_E.dtype != torch.int64:
        dtypes = ", ".join(str(tensor.dtype) for tensor in (x_SD, weight_EFD, counts_E))
        raise ValueError(f"grouped_product takes twice bf16, fp16 or fp32, and int64, not {dtypes}")
    return _GroupedProduct.apply(x_SD, weight_EFD, counts_E)  # type: ignore[return-value]
