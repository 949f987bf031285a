"""Losses as pure functions: cross-entropy through the vocabulary head in chunks, and the sequence-wise balance loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ops import installed, liger_ops

IGNORE = -100  # a target that is not predicted; torch's own convention
# Logits held at once: on a CPU what its caches hold (LOG.md), on a GPU enough for full-speed products (not measured).
CHUNK_LOGITS = {"cpu": 2**21, "cuda": 2**26}
LEAST_ROWS = 128  # of a chunk, for each byte of a number: 256 in 16 bits, 512 in fp32


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
                if grad_CW.dtype == torch.float32:
                    grad_head_WD.addmm_(grad_CW.mT, hidden_CD)
                else:
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


def loss_paths(device: torch.device) -> list[str]:
    """Paths worth considering here, the one that "auto" takes first. On a CPU torch's is many times slower (LOG.md)."""
    if device.type == "cpu":
        return ["chunked"]
    liger = torch.cuda.get_device_capability(device) >= (8, 0) and installed("liger_kernel")
    return ["chunked", *["liger"] * liger]  # torch's does not count right tokens: by name only


def linear_cross_entropy(
    hidden_ND: Tensor,
    head_WD: Tensor,
    target_XN: Tensor,
    weight_X: Tensor,
    *,
    path: str = "auto",
    chunk_logits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted cross-entropy of `softmax(hidden @ head.T)` without full logits, for X heads (main and MTP) in one pass.

    Args:
        hidden_ND: hidden states of one head after the other, X*N rows; products run in their dtype, softmax and sums
            in fp32. head_WD: the shared head, cast to it.
        target_XN: int64, `IGNORE` for rows without loss. weight_X: fp32 weight of every head (no gradient); it holds
            the fp16 loss scale too, so that small gradients survive the 16-bit products.
        path: "chunked" (ours), "torch" (`F.linear_cross_entropy`, torch 2.13), "liger", or "auto".
    Returns:
        sum of weight * nats (differentiable); nats per head; targets that no token is more likely than, per head, NaN
        where a path does not tell.
    """
    if path in ("torch", "liger"):
        one_head = {"torch": _torch_cross_entropy, "liger": _liger_cross_entropy}[path]
        head_WD = head_WD.to(hidden_ND.dtype)
        parts = [
            one_head(hidden_ND.unflatten(0, target_XN.shape)[x], head_WD, target_XN[x]) for x in range(len(target_XN))
        ]
        nats_X, correct_X = (torch.stack(values) for values in zip(*parts, strict=True))
        return (nats_X * weight_X).sum(), nats_X.detach(), correct_X
    at_once = CHUNK_LOGITS[hidden_ND.device.type] if chunk_logits is None else chunk_logits
    rows = max(1, at_once // head_WD.shape[0])
    if chunk_logits is None:  # the head's gradient is read and written once a chunk: few rows are dear (LOG.md)
        rows = max(rows, LEAST_ROWS * hidden_ND.dtype.itemsize)
    with_grad = torch.is_grad_enabled() and (hidden_ND.requires_grad or head_WD.requires_grad)
    weight_N = weight_X.repeat_interleave(target_XN.shape[1], output_size=target_XN.numel())
    loss, nats_N, correct_N = _LinearCrossEntropy.apply(  # type: ignore[misc]
        hidden_ND, head_WD, target_XN.flatten(), weight_N, rows, with_grad
    )
    return loss, nats_N.view_as(target_XN).sum(1), correct_N.view_as(target_XN).sum(1)


def _torch_cross_entropy(hidden_ND: Tensor, head_WD: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
    """Nats and NaN for the count. Row by row: a sum would be rounded to 16 bits, or overflow them."""
    options = torch.nn.LinearCrossEntropyOptions(acc_policy="accurate")
    nats_N = F.linear_cross_entropy(
        hidden_ND, head_WD, target_N, reduction="none", ignore_index=IGNORE, options=options
    )
    nats = nats_N.float().sum()
    return nats, torch.full_like(nats, float("nan"))


def _liger_cross_entropy(hidden_ND: Tensor, head_WD: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
    nats, _, accuracy, _ = liger_ops().LigerFusedLinearCrossEntropyFunction.apply(
        hidden_ND, head_WD, target_N, None, None, IGNORE, 0.0, 0.0, "sum", None, False, torch.float32, False, True
    )
    return nats.float(), (accuracy * (target_N != IGNORE).sum()).round()


def linear_cross_entropy_reference(
    hidden_ND: Tensor, head_WD: Tensor, target_XN: Tensor, weight_X: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What `linear_cross_entropy` computes, with full logits."""
    logits_NW = F.linear(hidden_ND, head_WD.to(hidden_ND.dtype)).float()
    nats_N = F.cross_entropy(logits_NW, target_XN.flatten(), ignore_index=IGNORE, reduction="none")
    nats_X = nats_N.view_as(target_XN).sum(1)
    return (nats_X * weight_X).sum(), nats_X.detach(), (logits_NW.argmax(-1).view_as(target_XN) == target_XN).sum(1)


def balance_loss(scores_BTE: Tensor, expert_BTA: Tensor) -> Tensor:
    """Sum over sequences of DeepSeek-V3's sequence-wise balance loss (Eq. 17-20), without alpha.

    `f` counts the experts really chosen, with the bias (Eq. 18 reads as if without it; implementations use the choice).
    It is 1 per sequence when both load and affinities are uniform.
    """
    num_experts, (_, num_tokens, num_active) = scores_BTE.shape[-1], expert_BTA.shape
    chosen_BE = scores_BTE.new_zeros(len(scores_BTE), num_experts)
    chosen_BE.scatter_add_(1, expert_BTA.flatten(1), torch.ones_like(expert_BTA, dtype=chosen_BE.dtype).flatten(1))
    f_BE = chosen_BE * (num_experts / (num_active * num_tokens))
    p_BE = (scores_BTE / (scores_BTE.sum(-1, keepdim=True) + 1e-20)).mean(1)
    return (f_BE * p_BE).sum()
