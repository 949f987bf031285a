"""The two expensive operations of a block, attention and routed experts, each beside a plain reference.

Shapes are named as in `model.py`; `S` is the number of keys, `M` = N*A routed (token, expert) pairs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def attention(q_BHTK: Tensor, k_BHSK: Tensor, v_BHSV: Tensor, *, scale: float) -> Tensor:
    """Causal softmax attention, (B, H, T, V).

    Fused kernels want equal query, key and value widths; where they differ, the narrower side is padded with zeros,
    which changes neither scores nor values. The scale is explicit, so padding does not change it either.
    """
    key_width, value_width = k_BHSK.shape[-1], v_BHSV.shape[-1]
    if q_BHTK.device.type == "cpu" and q_BHTK.dtype == torch.bfloat16 and q_BHTK.shape[2] <= 512:
        # Measured on AVX512-bf16: half the time of torch's fused CPU kernel up to here, forward and backward (LOG.md).
        return attention_plain(q_BHTK, k_BHSK, v_BHSV, scale=scale)
    width = max(key_width, value_width)
    if key_width < width:
        q_BHTK, k_BHSK = F.pad(q_BHTK, (0, width - key_width)), F.pad(k_BHSK, (0, width - key_width))
    if value_width < width:
        v_BHSV = F.pad(v_BHSV, (0, width - value_width))
    return F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSV, is_causal=True, scale=scale)[..., :value_width]


def attention_plain(q_BHTK: Tensor, k_BHSK: Tensor, v_BHSV: Tensor, *, scale: float) -> Tensor:
    """What `attention` computes, with all scores in memory; products in the input's dtype, softmax in fp32."""
    (batch, heads, num_queries, _), num_keys = q_BHTK.shape, k_BHSK.shape[2]
    hidden_TS = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q_BHTK.device).triu(1)
    mask_TS = q_BHTK.new_zeros(num_queries, num_keys).masked_fill_(hidden_TS, float("-inf"))
    q_XTK, k_XSK, v_XSV = (q_BHTK * scale).flatten(0, 1), k_BHSK.flatten(0, 1), v_BHSV.flatten(0, 1)
    scores_XTS = torch.baddbmm(mask_TS.expand(batch * heads, -1, -1), q_XTK, k_XSK.mT)
    out_XTV = scores_XTS.softmax(-1, dtype=torch.float32).to(v_XSV.dtype) @ v_XSV
    return out_XTV.unflatten(0, (batch, heads))


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
    if x.device.type == "cpu":  # with and without gradients alike: recomputation has to route as the first pass did
        return _RMSNorm.apply(x.float().flatten(0, -2), weight_D.float(), eps, dtype).view_as(x)  # type: ignore[union-attr]
    return F.rms_norm(x.float(), weight_D.shape, weight_D.float(), eps).to(dtype)


class _ToSlots(torch.autograd.Function):
    """Copy token n to the slots of its A pairs. A gather in backward, so that no gradient needs an atomic addition."""

    @staticmethod
    def forward(ctx, x_ND: Tensor, slot_NA: Tensor, num_slots: int) -> Tensor:
        ctx.save_for_backward(slot_NA)
        out_SD = x_ND.new_zeros(num_slots, x_ND.shape[1])
        for slot_N in slot_NA.unbind(1):  # slots are distinct: A plain copies, no (M, D) temporary
            out_SD.index_copy_(0, slot_N, x_ND)
        return out_SD

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None]:
        (slot_NA,) = ctx.saved_tensors
        # Sums in fp32, rounded once.
        grad_ND = grads[0].index_select(0, slot_NA[:, 0]).to(torch.promote_types(grads[0].dtype, torch.float32))
        for slot_N in slot_NA.unbind(1)[1:]:
            grad_ND += grads[0].index_select(0, slot_N)
        return grad_ND.to(grads[0].dtype), None, None


class _FromSlots(torch.autograd.Function):
    """Weighted sum over the A slots of every token: no (N, A, D) temporary, no atomic addition."""

    @staticmethod
    def forward(ctx, y_SD: Tensor, slot_NA: Tensor, weight_NA: Tensor) -> Tensor:
        ctx.save_for_backward(y_SD, slot_NA, weight_NA)
        wide = torch.promote_types(y_SD.dtype, torch.float32)  # sums in fp32, rounded once
        out_ND = y_SD.new_zeros(slot_NA.shape[0], y_SD.shape[1], dtype=wide)
        for slot_N, weight_N in zip(slot_NA.unbind(1), weight_NA.unbind(1), strict=True):
            out_ND.addcmul_(y_SD.index_select(0, slot_N), weight_N[:, None])
        return out_ND.to(y_SD.dtype)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, Tensor]:
        y_SD, slot_NA, weight_NA = ctx.saved_tensors
        grad_SD, grad_weight_NA = torch.zeros_like(y_SD), torch.empty_like(weight_NA)
        for place, (slot_N, weight_N) in enumerate(zip(slot_NA.unbind(1), weight_NA.unbind(1), strict=True)):
            grad_SD.index_copy_(0, slot_N, grads[0] * weight_N[:, None])
            # A product, not a sum of rounded terms: small fp16 gradients would vanish in them.
            grad_weight_NA[:, place] = (grads[0][:, None] @ y_SD.index_select(0, slot_N)[:, :, None]).flatten()
        return grad_SD, None, grad_weight_NA


def _sort_pairs(expert_NA: Tensor, counts_E: Tensor, width: int | None) -> Tensor:
    """The slot of every pair, (N, A): pairs sorted by expert, each expert's padded to `width` if that is given."""
    expert_M = expert_NA.flatten()
    order_M = expert_M.argsort(stable=True)
    rank_M = torch.empty_like(order_M)
    rank_M[order_M] = torch.arange(len(order_M), device=order_M.device)
    if width is not None:
        start_E = counts_E.cumsum(0) - counts_E
        rank_M = expert_M * width + (rank_M - start_E[expert_M])
    return rank_M.view_as(expert_NA)


def _has_grouped_product(x_ND: Tensor, gate_up_EGD: Tensor) -> bool:
    """Whether `F.grouped_mm` (torch 2.10) takes these: fp32 and bf16, rows of whole 16 bytes, forward and backward."""
    aligned = all(size * x_ND.element_size() % 16 == 0 for size in (x_ND.shape[1], gate_up_EGD.shape[1] // 2))
    return aligned and x_ND.dtype in (torch.float32, torch.bfloat16) and hasattr(F, "grouped_mm")


def _grouped_product(x_SD: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
    return F.grouped_mm(x_SD, weight_EFD.mT, offs=counts_E.cumsum(0).to(torch.int32))


def _split_product(x_SD: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
    """Row s times the weight of its expert, one expert after the other."""
    parts = zip(x_SD.split(counts_E.tolist()), weight_EFD.unbind(0), strict=True)
    return torch.cat([F.linear(part, weight) for part, weight in parts])


def grouped_experts(
    x_ND: Tensor, expert_NA: Tensor, weight_NA: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor
) -> tuple[Tensor, Tensor]:
    """Routed SwiGLU experts: `sum_a weight[n, a] * expert[n, a](x[n])`, (N, D), and the tokens per expert, (E,).

    No loop, and no token is dropped. Pairs are sorted by expert; each expert's rows are padded to the longest and
    multiplied as one batched product, the fastest form for small experts. When routing is so uneven that padding
    costs more, the unpadded rows go through a grouped product, or where torch has none for them, expert by expert.

    Args:
        expert_NA: chosen experts, int64. weight_NA: their weights, fp32.
        gate_up_EGD: (E, 2F, D), gate rows first. down_EDF: (E, D, F). Both are cast to x's dtype.
    """
    num_experts, num_pairs = gate_up_EGD.shape[0], expert_NA.numel()
    counts_E = torch.bincount(expert_NA.flatten(), minlength=num_experts)
    gate_up_EGD, down_EDF = gate_up_EGD.to(x_ND.dtype), down_EDF.to(x_ND.dtype)
    width = int(counts_E.max())
    grouped = _has_grouped_product(x_ND, gate_up_EGD)
    most = 1.25 if grouped and x_ND.device.type == "cpu" else 2.0  # measured on AVX512-bf16; on a GPU a guess
    if num_experts * width > most * num_pairs + 8 * num_experts:
        slot_NA = _sort_pairs(expert_NA, counts_E, None)
        x_SD = _ToSlots.apply(x_ND, slot_NA, num_pairs)
        product = _grouped_product if grouped else _split_product
        y_SD = product(swiglu(product(x_SD, gate_up_EGD, counts_E)), down_EDF, counts_E)
    else:
        slot_NA = _sort_pairs(expert_NA, counts_E, width)
        x_EWD = _ToSlots.apply(x_ND, slot_NA, num_experts * width).view(num_experts, width, -1)
        y_SD = (swiglu(x_EWD @ gate_up_EGD.mT) @ down_EDF.mT).flatten(0, 1)
    return _FromSlots.apply(y_SD, slot_NA, weight_NA.to(x_ND.dtype)), counts_E  # type: ignore[return-value]


def grouped_experts_reference(
    x_ND: Tensor, expert_NA: Tensor, weight_NA: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor
) -> tuple[Tensor, Tensor]:
    """What `grouped_experts` computes, expert by expert."""
    y_ND = torch.zeros_like(x_ND)
    for expert, (gate_up_GD, down_DF) in enumerate(zip(gate_up_EGD, down_EDF, strict=True)):
        weight_N = (weight_NA * (expert_NA == expert)).sum(1, keepdim=True)
        out_ND = F.linear(swiglu(F.linear(x_ND, gate_up_GD.to(x_ND.dtype))), down_DF.to(x_ND.dtype))
        y_ND = y_ND + weight_N.to(x_ND.dtype) * out_ND
    return y_ND, torch.bincount(expert_NA.flatten(), minlength=gate_up_EGD.shape[0])


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up over the last dimension, whose first half is the gate."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
