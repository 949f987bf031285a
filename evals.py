"""Validation loss and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from data import Validation
from model import DeepSeekV3, Output
from parallel import Mesh


@torch.no_grad()
def evaluate(
    model: DeepSeekV3, held_out: Validation, *, rows: int, mesh: Mesh, stopped: Callable[[], bool]
) -> dict[str, float | None]:
    """`val_loss`, nats per token, and `val_bpb`, bits per UTF-8 byte, both of the main head, EOS included.

    `rows` at a time; every rank takes its share. Empty when there is nothing to evaluate or `stopped` says so.
    """
    start, end = mesh.share(len(held_out.tokens))
    sums = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    most = math.ceil(len(held_out.tokens) / mesh.world_size)
    for batch in range(math.ceil(most / rows)):  # equally many on every rank
        if stopped():
            return {}
        part = slice(start + batch * rows, min(start + (batch + 1) * rows, end))
        if part.start < part.stop:
            tokens, targets = held_out.tokens[part].to(mesh.device), held_out.targets[part].to(mesh.device)
            out = model(tokens, targets)
            assert isinstance(out, Output)
            sums += torch.stack((out.nats[0].double(), out.num_targets[0].double()))
    nats, count = mesh.sum(sums).tolist()
    if not count:
        return {}
    scores = {"val_loss": nats / count, "val_bpb": nats / math.log(2) / held_out.num_bytes}
    return {key: value if math.isfinite(value) else None for key, value in scores.items()}
