"""Validation loss and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

import environment
import losses
import ops
from data import Validation
from model import DeepSeekV3
from parallel import Mesh, free_memory
from tracker import CUT_SHORT


@torch.no_grad()
def evaluate(
    model: DeepSeekV3,
    held_out: Validation,
    *,
    rows: int,
    mesh: Mesh,
    eos: int | None = None,
    stop: Callable[[], bool] = lambda: False,
    note: Callable[[str], None] = lambda _: None,
) -> dict[str, float | None]:
    """`val_loss`, nats per token, and `val_bpb`, bits per UTF-8 byte, both of the main head, EOS included.

    `rows` at a time, half as many where memory runs out; every rank takes its share. Empty when there is nothing to
    evaluate or no memory for one row; None where they are not finite. `CUT_SHORT` in their place when `stop`, asked
    each time, says so on any rank before the end. With `eos` documents are isolated, as in training with
    data.document_mask. `note` is told of memory that ran out.
    """
    start, end = mesh.share(len(held_out.tokens))
    sums = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    most, done = math.ceil(len(held_out.tokens) / mesh.world_size), 0
    while done < most:  # equally often on every rank
        part = slice(start + done, min(start + done + rows, end))
        found = torch.zeros_like(sums)
        if part.start < part.stop:
            found = environment.within_memory(_nats, model, held_out, part, mesh, eos)
        stopped, full = mesh.any(stop(), found is None)
        if found is not None and not full:
            sums += found
            done += rows
        elif rows == 1:
            note("out of memory with one row of the evaluation at a time: no validation loss")
            return {}
        else:
            rows //= 2
            free_memory(mesh.device)
            note(f"out of memory: this evaluation takes {rows} rows at a time")
        if stopped and done < most:
            return {CUT_SHORT: True}
    nats, count = mesh.sum(sums).tolist()
    if not count:
        return {}
    scores = {"val_loss": nats / count, "val_bpb": nats / math.log(2) / held_out.num_bytes}
    return {key: value if math.isfinite(value) else None for key, value in scores.items()}


def _nats(model: DeepSeekV3, held_out: Validation, part: slice, mesh: Mesh, eos: int | None) -> Tensor:
    """Nats and targets of some rows, (2,)."""
    tokens, targets = held_out.tokens[part].to(mesh.device), held_out.targets[part].to(mesh.device)
    doc_ids, positions = ops.documents(tokens, eos) if eos is not None else (None, None)
    hidden_BTD, _ = model.hidden(tokens, positions=positions, doc_ids=doc_ids)  # the main head alone
    target_1N = targets[:, : tokens.shape[1]].reshape(1, -1)
    one = torch.ones(1, device=mesh.device)
    _, nats_1, _ = losses.linear_cross_entropy(
        hidden_BTD.flatten(0, 1), model.lm_head.weight, target_1N, one, path=model.paths.loss
    )
    return torch.stack((nats_1[0].double(), (target_1N != losses.IGNORE).sum().double()))
