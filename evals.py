"""Validation loss and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

import losses
import ops
from data import Validation
from model import DeepSeekV3
from parallel import Mesh


@torch.no_grad()
def evaluate(
    model: DeepSeekV3,
    held_out: Validation,
    *,
    rows: int,
    mesh: Mesh,
    eos: int | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float | None]:
    """`val_loss`, nats per token, and `val_bpb`, bits per UTF-8 byte, both of the main head, EOS included.

    `rows` at a time; every rank takes its share. Empty when there is nothing to evaluate, or `stop`, asked each time,
    says so on any rank. With `eos` documents are isolated, as in training with data.document_mask.
    """
    start, end = mesh.share(len(held_out.tokens))
    one = torch.ones(1, device=mesh.device)
    sums = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    most = math.ceil(len(held_out.tokens) / mesh.world_size)
    for batch in range(math.ceil(most / rows)):  # equally many on every rank
        if any(mesh.any(stop())):
            return {}
        part = slice(start + batch * rows, min(start + (batch + 1) * rows, end))
        if part.start < part.stop:
            tokens, targets = held_out.tokens[part].to(mesh.device), held_out.targets[part].to(mesh.device)
            doc_ids, positions = ops.documents(tokens, eos) if eos is not None else (None, None)
            hidden_BTD, _ = model.hidden(tokens, positions=positions, doc_ids=doc_ids)  # the main head alone
            target_1N = targets[:, : tokens.shape[1]].reshape(1, -1)
            _, nats_1, _ = losses.linear_cross_entropy(
                hidden_BTD.flatten(0, 1), model.lm_head.weight, target_1N, one, path=model.paths.loss
            )
            sums += torch.stack((nats_1[0].double(), (target_1N != losses.IGNORE).sum().double()))
    nats, count = mesh.sum(sums).tolist()
    if not count:
        return {}
    scores = {"val_loss": nats / count, "val_bpb": nats / math.log(2) / held_out.num_bytes}
    return {key: value if math.isfinite(value) else None for key, value in scores.items()}
