"""The expensive operations of a block, attention and routed experts, in several forms, each beside a plain reference.

Which form ("path") is taken can be given by name; "auto" decides by device, dtype and shape. `probe.py` times those
that are worth considering at the start of a run. Shapes are named as in `model.py`; `S` is the number of keys in
attention and of slots in the experts, `M` = N*A routed (token, expert) pairs.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from config import DTYPE_NAMES

DTYPES: dict[str, torch.dtype] = {ours: getattr(torch, name) for ours, name in DTYPE_NAMES.items()}


@functools.cache
def installed(package: str) -> bool:
    """Whether an optional package can be imported."""
    return importlib.util.find_spec(package) is not None


# -------------------------------------------------------------------------------------------------------- a few tokens

FEW_ROWS = 8  # a guess


def few(x: Tensor) -> bool:
    """Whether these are the rows of a step of generation on a CPU."""
    here = x.device.type == "cpu" and x.dtype != torch.float64
    return here and not torch.is_grad_enabled() and x.numel() <= FEW_ROWS * x.shape[-1]


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`F.linear` with the weight cast to the input's dtype, or for a few rows, in fp32, the input to the weight's.

    These meet the weight as columns, and never alone.
    """
    if weight.dtype != torch.float32 or not few(x):
        return F.linear(x, weight.to(x.dtype))
    x_ND = x.float().reshape(-1, x.shape[-1])
    rows_XD = x_ND if len(x_ND) > 1 else torch.cat((x_ND, x_ND))
    return (weight @ rows_XD.mT)[:, : len(x_ND)].mT.to(x.dtype).reshape(*x.shape[:-1], len(weight))


# ----------------------------------------------------------------------------------------------------------- attention

FUSED = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
PLAIN_TOKENS = 1024  # with AVX512 and bf16 faster than torch's fused CPU kernel up to here (LOG.md)


def attention_paths(device: torch.device, dtype: torch.dtype, num_tokens: int) -> list[str]:
    """Paths worth considering here, the one that "auto" takes first.

    sm_75 has no flash kernel and sm_80 to sm_89 no cuDNN kernel worth a try by what others publish: not measured.
    """
    if device.type == "cpu":
        plain_first = dtype == torch.bfloat16 and num_tokens <= PLAIN_TOKENS
        return ["plain", "sdpa"] if plain_first else ["sdpa", "plain"] if num_tokens <= 2 * PLAIN_TOKENS else ["sdpa"]
    capability = torch.cuda.get_device_capability(device)
    if capability >= (9, 0):
        return ["sdpa", "cudnn", "flash"]
    return ["sdpa", "flash", "efficient"] if capability >= (8, 0) else ["efficient"]


def documents(tokens_BX: Tensor, eos: int) -> tuple[Tensor, Tensor]:
    """The number of each token's document in its row, and its position in that document.

    An `eos` starts a document: the one before it has it as its last target, not as an input.
    """
    starts_BX = tokens_BX == eos
    index_X = torch.arange(tokens_BX.shape[1], device=tokens_BX.device)
    first_BX = torch.where(starts_BX, index_X, 0).cummax(1).values
    return starts_BX.cumsum(1), index_X - first_BX


# fp16's lowest: leaves exactly nothing beside a query's score for itself. Not -inf, with which cuDNN has had trouble
# (torch's convert_boolean_attn_mask_cudnn).
UNSEEN = -65504.0


def document_mask(doc_ids_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 1, T, T), what to add to scores: 0 where query t may see key s, not after it and of its document, or UNSEEN.

    B * T * T numbers in the queries' dtype, which all layers share: of booleans torch would make and keep a copy in
    every layer, as it does of rows that are no multiple of 8 long for the efficient kernel.
    """
    seen_BTT = (doc_ids_BT[:, :, None] == doc_ids_BT[:, None, :]).tril_()
    added_BTT = torch.full(seen_BTT.shape, UNSEEN, dtype=dtype, device=seen_BTT.device)
    return added_BTT.masked_fill_(seen_BTT, 0)[:, None]


def attention(
    q_BHTK: Tensor,
    k_BHSK: Tensor,
    v_BHSV: Tensor,
    *,
    scale: float,
    path: str = "auto",
    mask_B1TS: Tensor | None = None,
) -> Tensor:
    """Causal softmax attention, (B, H, T, V).

    Fused kernels want equal query, key and value widths; where they differ, the narrower side is padded with zeros,
    which changes neither scores nor values. The scale is explicit, so padding does not change it either.

    Args:
        path: "plain" (all scores in memory), "sdpa" (torch's fused attention), one of `FUSED` to insist on, or "auto".
        mask_B1TS: added to the scores in place of the causal mask (`document_mask`). The flash kernel takes none, and
            gives way to "efficient".
    """
    if path == "auto":
        path = attention_paths(q_BHTK.device, q_BHTK.dtype, q_BHTK.shape[2])[0]
    if path == "plain":
        return attention_plain(q_BHTK, k_BHSK, v_BHSV, scale=scale, mask_B1TS=mask_B1TS)
    if path == "flash" and mask_B1TS is not None:
        path = "efficient"
    key_width, value_width = k_BHSK.shape[-1], v_BHSV.shape[-1]
    width = max(key_width, value_width)
    if key_width < width:
        q_BHTK, k_BHSK = F.pad(q_BHTK, (0, width - key_width)), F.pad(k_BHSK, (0, width - key_width))
    if value_width < width:
        v_BHSV = F.pad(v_BHSV, (0, width - value_width))
    seen: dict[str, Any] = {"is_causal": True} if mask_B1TS is None else {"attn_mask": mask_B1TS}
    with contextlib.nullcontext() if path == "sdpa" else sdpa_kernel(FUSED[path]):
        out_BHTV = F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSV, scale=scale, **seen)
    return out_BHTV[..., :value_width]


def attention_plain(
    q_BHTK: Tensor, k_BHSK: Tensor, v_BHSV: Tensor, *, scale: float, mask_B1TS: Tensor | None = None
) -> Tensor:
    """What `attention` computes, with all scores in memory, in the input's dtype; softmax's arithmetic is fp32."""
    (batch, heads, num_queries, _), num_keys = q_BHTK.shape, k_BHSK.shape[2]
    if mask_B1TS is None:
        hidden_TS = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q_BHTK.device).triu(1)
        mask_B1TS = q_BHTK.new_zeros(num_queries, num_keys).masked_fill_(hidden_TS, float("-inf"))[None, None]
    q_XTK, k_XSK, v_XSV = q_BHTK.flatten(0, 1), k_BHSK.flatten(0, 1), v_BHSV.flatten(0, 1)
    mask_XTS = mask_B1TS.expand(batch, heads, -1, -1).flatten(0, 1)  # of documents: a copy for every head
    scores_XTS = torch.baddbmm(mask_XTS, q_XTK, k_XSK.mT, alpha=scale)
    del mask_XTS
    out_XTV = scores_XTS.softmax(-1) @ v_XSV
    return out_XTV.unflatten(0, (batch, heads))


# --------------------------------------------------------------------------------------------------------------- norms


class _RMSNorm(torch.autograd.Function):
    """Root-mean-square norm in fp32 that keeps one number per row for backward: less traffic than `F.rms_norm`."""

    @staticmethod
    def forward(ctx, x_ND: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        norm_N1 = torch.linalg.vector_norm(x_ND, dim=-1, keepdim=True)
        inverse_N1 = (norm_N1.square_() / x_ND.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x_ND, weight_D, inverse_N1)
        return (x_ND * inverse_N1).mul_(weight_D).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x_ND, weight_D, inverse_N1 = ctx.saved_tensors
        grad_ND = grads[0].to(x_ND.dtype)
        product_ND = grad_ND * x_ND
        along_N1 = (product_ND @ weight_D)[:, None] * inverse_N1.pow(3) / x_ND.shape[-1]
        grad_x_ND = (grad_ND * weight_D).mul_(inverse_N1).addcmul_(x_ND, along_N1, value=-1)
        return grad_x_ND, inverse_N1.squeeze(1) @ product_ND, None, None


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """`x / rms(x) * weight` over the last dimension, in fp32, as `dtype`; equals `F.rms_norm`."""
    if x.device.type == "cpu" and not few(x):
        return _RMSNorm.apply(x.float().flatten(0, -2), weight_D.float(), eps, dtype).view_as(x)  # type: ignore[union-attr]
    return F.rms_norm(x.float(), weight_D.shape, weight_D.float(), eps).to(dtype)


# ------------------------------------------------------------------------------------------------------------- experts


MOST_PADDING = 1.6  # rows with padding over rows; a guess for sm_75 by what others publish, not measured


def experts_paths(device: torch.device, dtype: torch.dtype, hidden: int, width: int) -> list[str]:
    """Paths worth considering here, the one that "auto" takes first (GPUs: by what others publish)."""
    grouped = ["grouped"] if _has_grouped_product(dtype, hidden, width) else []
    if device.type == "cpu":  # padding grows with the busiest expert's load
        return [*grouped, "loop", "padded"]
    capability = torch.cuda.get_device_capability(device)
    if dtype != torch.bfloat16 or capability < (8, 0):
        return ["padded", "loop"]
    # Before sm_90 torch's grouped product copies the counts to the host and multiplies expert by expert. "liger" is
    # taken by name only: it adds up the router's gradient in any order, and equal runs are to end with equal bits.
    triton = ["triton"] if installed("triton") else []
    return [*grouped, *triton] if capability >= (9, 0) and grouped else [*triton, "padded"]


def liger_ops() -> Any:
    """Liger's kernels. Raises RuntimeError where there are none."""
    if not installed("liger_kernel"):
        raise RuntimeError("liger-kernel is not installed: pip install liger-kernel, on Linux")
    if not torch.cuda.is_available():
        raise RuntimeError("liger-kernel needs a GPU")
    import liger_kernel.ops

    return liger_kernel.ops


def _has_grouped_product(dtype: torch.dtype, *sizes: int) -> bool:
    """Whether `F.grouped_mm` (torch 2.10) takes these: fp32 and bf16, rows of whole 16 bytes, forward and backward."""
    aligned = all(size * dtype.itemsize % 16 == 0 for size in sizes)
    return aligned and dtype in (torch.float32, torch.bfloat16) and hasattr(F, "grouped_mm")


class _ToSlots(torch.autograd.Function):
    """Row s of the result is the token of slot s. Gathers both ways: no gradient needs an atomic addition."""

    @staticmethod
    def forward(ctx, x_ND: Tensor, slot_NA: Tensor, token_S: Tensor) -> Tensor:
        ctx.save_for_backward(slot_NA)
        return x_ND.index_select(0, token_S)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _sum_slots(grads[0], *ctx.saved_tensors), None, None


class _FromSlots(torch.autograd.Function):
    """The sum over a token's A slots, (N, D)."""

    @staticmethod
    def forward(ctx, y_SD: Tensor, slot_NA: Tensor, token_S: Tensor) -> Tensor:
        ctx.save_for_backward(token_S)
        return _sum_slots(y_SD, slot_NA)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(0, *ctx.saved_tensors), None, None


def _sum_slots(y_SD: Tensor, slot_NA: Tensor) -> Tensor:
    """Sum of rows in fp32, rounded once."""
    num_active = slot_NA.shape[1]
    if y_SD.device.type != "cpu":
        return y_SD.index_select(0, slot_NA.flatten()).unflatten(0, (-1, num_active)).sum(1)
    first_N, *others = slot_NA.t().contiguous().unbind(0)
    out_ND = y_SD.index_select(0, first_N)
    if num_active > 2 and y_SD.dtype.itemsize < 4:  # two addends are rounded once as they are
        out_ND = out_ND.float()
    for slot_N in others:
        out_ND += y_SD.index_select(0, slot_N).to(out_ND.dtype)  # a mixed sum is slow on a CPU
    return out_ND.to(y_SD.dtype)


class WeightedSwiGLU(torch.autograd.Function):
    """weight * silu(gate) * up, row by row, the weight being 1 if None; keeps its inputs only."""

    @staticmethod
    def forward(ctx, gate_up_XG: Tensor, weight_X1: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate_up_XG, weight_X1)
        gate_XF, up_XF = gate_up_XG.chunk(2, dim=-1)
        out_XF = F.silu(gate_XF).mul_(up_XF)
        if weight_X1 is None:
            return out_XF
        out_XF.mul_(weight_X1)
        # Padding weighs 0, and may overflow where its expert never saw such a token: 0 * inf is no 0.
        return out_XF.masked_fill_(weight_X1 == 0, 0) if out_XF.dtype == torch.float16 else out_XF

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor | None]:
        gate_up_XG, weight_X1 = ctx.saved_tensors
        gate_XF, up_XF = gate_up_XG.chunk(2, dim=-1)
        silu_XF, grad_XF, grad_weight_X1 = F.silu(gate_XF), grads[0], None
        if weight_X1 is not None:
            out_XF = silu_XF * up_XF
            if out_XF.dtype == torch.float16:  # small gradients would vanish in rounded terms
                out_XF = out_XF.float()
            grad_weight_X1 = (out_XF * grad_XF).sum(-1, keepdim=True).to(weight_X1.dtype)
            del out_XF
            grad_XF = grad_XF * weight_X1
        grad_gate_up_XG = torch.empty_like(gate_up_XG)
        grad_gate_XF, grad_up_XF = grad_gate_up_XG.chunk(2, dim=-1)
        torch.mul(grad_XF, silu_XF, out=grad_up_XF)
        del silu_XF
        torch.ops.aten.silu_backward.grad_input(grad_XF * up_XF, gate_XF, grad_input=grad_gate_XF)
        if weight_X1 is not None and gate_up_XG.dtype == torch.float16:
            grad_gate_up_XG.masked_fill_(weight_X1 == 0, 0)
        return grad_gate_up_XG, grad_weight_X1


def swiglu(x: Tensor, gate_FD: Tensor, up_FD: Tensor) -> Tensor:
    """`silu(x @ gate.T) * (x @ up.T)`; for training both as one product, of which less is kept."""
    if not torch.is_grad_enabled():
        return F.silu(linear(x, gate_FD)) * linear(x, up_FD)
    gate_up = linear(x, torch.cat((gate_FD.to(x.dtype), up_FD.to(x.dtype))))
    return WeightedSwiGLU.apply(gate_up, None)  # type: ignore[return-value]


def _slots(expert_NA: Tensor, counts_E: Tensor, width: int | None) -> tuple[Tensor, Tensor]:
    """The slot of every pair, (N, A), and the token of every slot, (S): pairs sorted by expert.

    With `width` each expert has that many slots. What is left over repeats token 0, and is to weigh nothing.
    """
    expert_M, num_active = expert_NA.flatten(), expert_NA.shape[1]
    order_M = expert_M.argsort(stable=True)
    place_M = torch.arange(len(order_M), device=order_M.device)
    slot_M = torch.empty_like(order_M).scatter_(0, order_M, place_M)
    if width is None:
        return slot_M.view_as(expert_NA), order_M // num_active
    start_E = counts_E.cumsum(0) - counts_E
    slot_M += expert_M * width - start_E[expert_M]
    token_S = order_M.new_zeros(len(counts_E) * width).scatter_(0, slot_M, place_M // num_active)
    return slot_M.view_as(expert_NA), token_S


Product = Callable[[Tensor, Tensor, Tensor], Tensor]


def _grouped_product(x_SD: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
    return F.grouped_mm(x_SD, weight_EFD.mT, offs=counts_E.cumsum(0).to(torch.int32))


def _split_product(x_SD: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
    """Row s times the weight of its expert, one expert after the other."""
    parts = zip(x_SD.split(counts_E.tolist()), weight_EFD.unbind(0), strict=True)
    return torch.cat([F.linear(part, weight) for part, weight in parts])


def _padded_product(x_SD: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
    return (x_SD.unflatten(0, (len(counts_E), -1)) @ weight_EFD.mT).flatten(0, 1)


def _product(path: str) -> Product:
    if path == "triton":
        if not installed("triton"):
            raise RuntimeError("triton is not installed: it comes with torch for CUDA, on Linux")
        from triton_ops import grouped_product

        return grouped_product
    return {"padded": _padded_product, "grouped": _grouped_product, "loop": _split_product}[path]


def grouped_experts(
    x_ND: Tensor, expert_NA: Tensor, weight_NA: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor, path: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Routed SwiGLU experts: `sum_a weight[n, a] * expert[n, a](x[n])`, (N, D), and the tokens per expert, (E,).

    Pairs are sorted by expert, multiplied, and gathered; no token is dropped, no addition atomic (but in "liger").

    Args:
        expert_NA: chosen experts, int64. weight_NA: their weights, fp32.
        gate_up_EGD: (E, 2F, D), gate rows first. down_EDF: (E, D, F). Both are cast to x's dtype, but for a `few`.
        path: "padded" (one batched product, each expert's rows padded to the busiest's; where routing is so uneven that
            this costs more, "loop"), "grouped" (`F.grouped_mm`), "loop" (expert by expert), "triton" (our kernel),
            "liger" (a kernel of Liger's), or "auto".
    """
    num_experts, hidden, width = down_EDF.shape
    counts_E = expert_NA.new_zeros(num_experts)  # torch.bincount would wait for a GPU
    counts_E = counts_E.scatter_add_(0, expert_NA.flatten(), torch.ones_like(expert_NA).flatten())
    if few(x_ND):
        return _chosen_experts(x_ND, expert_NA, weight_NA, gate_up_EGD, down_EDF), counts_E
    gate_up_EGD, down_EDF = gate_up_EGD.to(x_ND.dtype), down_EDF.to(x_ND.dtype)
    if path == "auto":
        paths = experts_paths(x_ND.device, x_ND.dtype, hidden, width)
        # torch compiles the grouped product for bf16 only
        path = paths["grouped" in paths[:1] and x_ND.dtype == torch.float32 and torch.compiler.is_compiling()]
    if path == "liger":
        experts = liger_ops().LigerFusedMoEFunction.apply
        return experts(x_ND, gate_up_EGD, down_EDF, expert_NA.to(torch.int32), weight_NA), counts_E
    longest = None
    if path == "padded":
        longest = int(counts_E.max())
        if num_experts * longest > MOST_PADDING * expert_NA.numel() + 8 * num_experts:
            path, longest = "loop", None
    product = _product(path)
    slot_NA, token_S = _slots(expert_NA, counts_E, longest)
    weight_S = weight_NA.new_zeros(len(token_S)).scatter(0, slot_NA.flatten(), weight_NA.flatten()).to(x_ND.dtype)
    x_SD = _ToSlots.apply(x_ND, slot_NA, token_S)
    h_SF = WeightedSwiGLU.apply(product(x_SD, gate_up_EGD, counts_E), weight_S[:, None])  # type: ignore[arg-type]
    return _FromSlots.apply(product(h_SF, down_EDF, counts_E), slot_NA, token_S), counts_E  # type: ignore[arg-type]


def _chosen_experts(
    x_ND: Tensor, expert_NA: Tensor, weight_NA: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor
) -> Tensor:
    """Only those that a few tokens have chosen are touched."""
    y_ND = torch.zeros_like(x_ND, dtype=torch.float32)
    for expert in sorted(set(expert_NA.flatten().tolist())):
        token_X, slot_X = (expert_NA == expert).nonzero(as_tuple=True)
        gate_XF, up_XF = linear(x_ND[token_X], gate_up_EGD[expert]).chunk(2, dim=-1)
        out_XD = linear(F.silu(gate_XF) * up_XF, down_EDF[expert])
        y_ND.index_add_(0, token_X, out_XD * weight_NA[token_X, slot_X, None])
    return y_ND.to(x_ND.dtype)


def grouped_experts_reference(
    x_ND: Tensor, expert_NA: Tensor, weight_NA: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor
) -> tuple[Tensor, Tensor]:
    """What `grouped_experts` computes, expert by expert."""
    y_ND = torch.zeros_like(x_ND)
    for expert, (gate_up_GD, down_DF) in enumerate(zip(gate_up_EGD, down_EDF, strict=True)):
        weight_N = (weight_NA * (expert_NA == expert)).sum(1, keepdim=True)
        gate_NF, up_NF = F.linear(x_ND, gate_up_GD.to(x_ND.dtype)).chunk(2, dim=-1)
        out_ND = F.linear(F.silu(gate_NF) * up_NF, down_DF.to(x_ND.dtype))
        y_ND = y_ND + weight_N.to(x_ND.dtype) * out_ND
    return y_ND, torch.bincount(expert_NA.flatten(), minlength=gate_up_EGD.shape[0])
