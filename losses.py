"""Losses as pure functions: cross-entropy through the vocabulary head in chunks, and the sequence-wise balance loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # a target that is not predicted; torch's own convention
# Logits held at once: on a CPU what its caches hold (LOG.md), on a GPU enough for full-speed products (not measured).
CHUNK_LOGITS = {"cpu": 2**21, "cuda": 2**26}


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes gradients chunk by chunk in the forward pass, so that the (N, W) logits never exist (as Liger does)."""

    @staticmethod
    def forward(ctx, hidden_ND, head_WD, target_N, weight_N, rows, with_grad):  # type: ignore[override]
        head = head_WD.to(hidden_ND.dtype)
        nats_N = torch.empty(len(target_N), dtype=torch.float32, device=hidden_ND.device)
        correct_N = torch.empty(len(target_N), dtype=torch.bool, device=hidden_ND.device)
        grad_hidden_ND = torch.empty_like(hidden_ND) if with_grad else None
        grad_head_WD = torch.zeros_like(head_WD, dtype=torch.float32) if with_grad else None
        for start in range(0, len(target_N), rows):
            part = slice(start, start + rows)
            hidden_CD, target_C = hidden_ND[part], target_N[part]
            seen_C = target_C != IGNORE
            target_C = target_C.clamp(min=0)
            logits_CW = F.linear(hidden_CD, head)
            probs_CW = logits_CW.softmax(-1, dtype=torch.float32)
            largest_C = logits_CW.amax(-1).float()
            wanted_C = logits_CW.gather(1, target_C[:, None]).squeeze(1).float()
            # The largest probability is exp(largest - log z) and never underflows.
            nats_N[part] = (largest_C - probs_CW.amax(-1).log() - wanted_C) * seen_C
            correct_N[part] = (wanted_C >= largest_C) & seen_C
            if grad_hidden_ND is not None and grad_head_WD is not None:
                row_weight_C = (weight_N[part] * seen_C).float()
                grad_CW = probs_CW.mul_(row_weight_C[:, None])
                grad_CW.scatter_add_(1, target_C[:, None], -row_weight_C[:, None])
                grad_CW = grad_CW.to(hidden_ND.dtype)
                grad_hidden_ND[part] = grad_CW @ head
                grad_head_WD += grad_CW.mT @ hidden_CD
        if grad_hidden_ND is not None and grad_head_WD is not None:
            ctx.save_for_backward(grad_hidden_ND, grad_head_WD.to(head_WD.dtype))
        ctx.mark_non_differentiable(nats_N, correct_N)
        return (nats_N * weight_N).sum(), nats_N, correct_N

    @staticmethod
    def backward(ctx, *grads: Tensor):
        grad_hidden_ND, grad_head_WD = ctx.saved_tensors
        # Out of place: autograd may keep the saved tensors for another backward.
        return grad_hidden_ND * grads[0].to(grad_hidden_ND.dtype), grad_head_WD * grads[0], None, None, None, None


def linear_cross_entropy(
    hidden_ND: Tensor, head_WD: Tensor, target_N: Tensor, weight_N: Tensor, *, chunk_logits: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted cross-entropy of `softmax(hidden @ head.T)` without full logits.

    Args:
        hidden_ND: hidden states; products run in their dtype, softmax and sums in fp32. head_WD: head, cast to it.
        target_N: int64, `IGNORE` for rows without loss. weight_N: fp32 weight of every row (no gradient); it holds the
            fp16 loss scale too, so that small gradients survive the 16-bit products.
    Returns:
        sum of weight * nats (differentiable), nats per row, whether no token is more likely than the target.
    """
    at_once = CHUNK_LOGITS[hidden_ND.device.type] if chunk_logits is None else chunk_logits
    rows = max(1, at_once // head_WD.shape[0])
    with_grad = torch.is_grad_enabled() and (hidden_ND.requires_grad or head_WD.requires_grad)
    return _LinearCrossEntropy.apply(hidden_ND, head_WD, target_N, weight_N, rows, with_grad)  # type: ignore[return-value]


def linear_cross_entropy_reference(
    hidden_ND: Tensor, head_WD: Tensor, target_N: Tensor, weight_N: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What `linear_cross_entropy` computes, with full logits."""
    logits_NW = F.linear(hidden_ND, head_WD.to(hidden_ND.dtype)).float()
    nats_N = F.cross_entropy(logits_NW, target_N, ignore_index=IGNORE, reduction="none")
    return (nats_N * weight_N).sum(), nats_N.detach(), logits_NW.argmax(-1) == target_N


def balance_loss(scores_BTE: Tensor, expert_BTA: Tensor) -> Tensor:
    """Sum over sequences of DeepSeek-V3's sequence-wise balance loss (Eq. 17-20), without alpha.

    `f` counts the experts really chosen, with the bias (Eq. 18 reads as if without it; implementations use the choice).
    It is 1 per sequence when both load and affinities are uniform.
    """
    num_experts, (_, num_tokens, num_active) = scores_BTE.shape[-1], expert_BTA.shape
    chosen_BE = F.one_hot(expert_BTA.flatten(1), num_experts).sum(1).to(torch.float32)
    f_BE = chosen_BE * (num_experts / (num_active * num_tokens))
    p_BE = (scores_BTE / (scores_BTE.sum(-1, keepdim=True) + 1e-20)).mean(1)
    return (f_BE * p_BE).sum()
