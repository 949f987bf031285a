"""Losses as pure functions: cross-entropy through the vocabulary head in chunks, and the sequence-wise balance loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ops import installed, liger_ops

IGNORE = -100  # a target that is not predicted; torch's own convention
# Logits computed at once: guesses at what a CPU's caches hold and at what makes a GPU's products fast.
TILE_LOGITS = {"cpu": 2**21, "cuda": 2**26}
LEAST_ROWS = 512  # of a chunk: the head's gradient is read and written once for each
WORDS = 64  # of a tile, a multiple: rows of products start at cache lines


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes gradients in the forward pass, so that the (N, W) logits never exist (as Liger does).

    A chunk of C rows meets the vocabulary in tiles of U words: first for the logits' exponentials, which are kept, and
    their sum, then for the gradients.
    """

    @staticmethod
    def forward(ctx, hidden_ND, head_WD, target_N, weight_N, rows, width, with_grad):  # type: ignore[override]
        head = head_WD.to(hidden_ND.dtype)
        words = [slice(start, min(start + width, len(head))) for start in range(0, len(head), width)]
        nats_N = torch.empty(len(target_N), dtype=torch.float32, device=hidden_ND.device)
        correct_N = torch.empty(len(target_N), dtype=torch.bool, device=hidden_ND.device)
        grad_hidden_ND = torch.empty_like(hidden_ND) if with_grad else None
        grad_head_WD = torch.zeros_like(head_WD, dtype=torch.float32) if with_grad else None
        # One buffer for all chunks. Without gradients a tile is needed once. A product has the dtype of its operands.
        most, kept_words = min(rows, len(hidden_ND)), len(head) if with_grad else width
        kept = hidden_ND.new_empty(most * kept_words, dtype=torch.float32)
        product = None if head.dtype == torch.float32 else hidden_ND.new_empty(most * width)
        for start in range(0, len(target_N), rows):
            part = slice(start, start + rows)
            hidden_CD, seen_C = hidden_ND[part], target_N[part] != IGNORE
            target_C = target_N[part].clamp(min=0)
            tiles = [_Tile.of(word, target_C, kept, word.start if with_grad else 0) for word in words]
            log_z, largest, wanted_C = [], [], torch.zeros_like(target_C, dtype=torch.float32)
            for tile in tiles:
                logits_CU = tile.exp_CU
                if product is not None:
                    logits_CU = product[: logits_CU.numel()].view_as(logits_CU)
                torch.mm(hidden_CD, head[tile.words].mT, out=logits_CU)
                logit_C = logits_CU.gather(1, tile.place_C1).squeeze(1).float()
                wanted_C = torch.where(tile.inside_C, logit_C, wanted_C)
                largest.append(logits_CU.amax(-1).float())
                tile.exp_CU.copy_(logits_CU).sub_(largest[-1][:, None]).exp_()
                log_z.append(largest[-1] + tile.exp_CU.sum(-1).log())
            log_z_C = torch.stack(log_z).logsumexp(0)
            nats_N[part] = (log_z_C - wanted_C) * seen_C
            correct_N[part] = (wanted_C >= torch.stack(largest).amax(0)) & seen_C
            if grad_hidden_ND is None or grad_head_WD is None:
                continue
            row_weight_C = (weight_N[part] * seen_C).float()
            grad_hidden_CD = torch.zeros_like(hidden_CD, dtype=torch.float32)
            for tile, largest_C in zip(tiles, largest, strict=True):
                grad_CU = tile.exp_CU.mul_((row_weight_C * (largest_C - log_z_C).exp())[:, None])
                grad_CU.scatter_add_(1, tile.place_C1, -(row_weight_C * tile.inside_C)[:, None])
                grad_CU = grad_CU.to(hidden_ND.dtype)
                grad_hidden_CD += grad_CU @ head[tile.words]
                grad_head_UD = grad_head_WD[tile.words]
                if grad_CU.dtype == torch.float32:
                    grad_head_UD.addmm_(grad_CU.mT, hidden_CD)
                else:
                    grad_head_UD.add_(grad_CU.mT @ hidden_CD)
            grad_hidden_ND[part] = grad_hidden_CD
        if grad_hidden_ND is not None and grad_head_WD is not None:
            ctx.grads = grad_hidden_ND, grad_head_WD.to(head_WD.dtype)
        ctx.mark_non_differentiable(nats_N, correct_N)
        return (nats_N * weight_N).sum(), nats_N, correct_N

    @staticmethod
    def backward(ctx, *grads: Tensor):
        if ctx.grads is None:
            raise RuntimeError("the loss gave its gradients away: a second backward needs another forward")
        # Handed on as they are, not as copies: the head's is large.
        (grad_hidden_ND, grad_head_WD), ctx.grads = ctx.grads, None
        if grads[0].device.type != "cpu" or grads[0] != 1:  # asking would wait for a GPU
            grad_hidden_ND.mul_(grads[0].to(grad_hidden_ND.dtype))
            grad_head_WD.mul_(grads[0])
        return grad_hidden_ND, grad_head_WD, None, None, None, None, None


class _Tile(NamedTuple):
    """Some rows' logits for some words; where the targets are among these, and which rows have theirs there."""

    words: slice
    exp_CU: Tensor  # exp(logit - the row's largest), fp32
    place_C1: Tensor
    inside_C: Tensor

    @classmethod
    def of(cls, words: slice, target_C: Tensor, kept: Tensor, start: int) -> _Tile:
        """The exponentials lie in `kept` behind those of `start` words."""
        rows, width = len(target_C), words.stop - words.start
        exp_CU = kept[rows * start : rows * (start + width)].view(rows, width)
        place_C = target_C - words.start
        inside_C = (place_C >= 0) & (place_C < width)
        return cls(words, exp_CU, torch.where(inside_C, place_C, 0)[:, None], inside_C)


def loss_paths(device: torch.device) -> list[str]:
    """Paths worth considering here, the one that "auto" takes first. On a CPU torch's is slower (benchmarks/)."""
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
    tile: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted cross-entropy of `softmax(hidden @ head.T)` without full logits, for X heads (main and MTP) in one pass.

    Args:
        hidden_ND: hidden states of one head after the other, X*N rows; products run in their dtype, softmax and sums
            in fp32. head_WD: the shared head, cast to it.
        target_XN: int64, `IGNORE` for rows without loss. weight_X: fp32 weight of every head (no gradient); it holds
            the fp16 loss scale too, so that small gradients survive the 16-bit products.
        tile: rows and words of the logits that "chunked" computes at once; None: as the device likes it.
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
    if tile is None:
        at_once = TILE_LOGITS[hidden_ND.device.type]
        rows = max(LEAST_ROWS, at_once // head_WD.shape[0])
        num_tiles = -(-head_WD.shape[0] // max(1, at_once // rows))
        tile = rows, -(-head_WD.shape[0] // (num_tiles * WORDS)) * WORDS
    with_grad = torch.is_grad_enabled() and (hidden_ND.requires_grad or head_WD.requires_grad)
    weight_N = weight_X.repeat_interleave(target_XN.shape[1], output_size=target_XN.numel())
    loss, nats_N, correct_N = _LinearCrossEntropy.apply(  # type: ignore[misc]
        hidden_ND, head_WD, target_XN.flatten(), weight_N, *tile, with_grad
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
