"""The numbers of a logged step: parts of the loss, balance of the experts, rates."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from config import Config
from data import Batch
from model import DeepSeekV3, moe_layers


def step_metrics(sums: list[float], tokens: int, rows: int, mtp_weight: float, config: Config) -> dict[str, Any]:
    """The parts of the loss, over all micro-batches and ranks: nats per token; the balance loss per sequence."""
    depth = config.model.num_nextn_predict_layers
    nats, correct, balance = sums[: 1 + depth], sums[1 + depth : 2 * (1 + depth)], sums[-1] / rows
    metrics: dict[str, Any] = {"loss": nats[0] / tokens, "accuracy": correct[0] / tokens, "balance_loss": balance}
    total = metrics["loss"] + config.model.aux_loss_alpha * balance
    if depth:
        metrics["mtp_loss"] = sum(nats[1:]) / depth / tokens
        metrics["mtp_accuracy"] = sum(correct[1:]) / depth / tokens
        total += mtp_weight * metrics["mtp_loss"]
    metrics["total_loss"] = total
    return {key: value if math.isfinite(value) else None for key, value in metrics.items()}


def expert_metrics(model: DeepSeekV3, counts_LE: Tensor) -> list[dict[str, Any]]:
    """Per MoE layer (MTP layers last): how evenly a step's tokens fell on the experts, and the router biases' range."""
    layers = []
    for moe, counts_E in zip(moe_layers(model), counts_LE.cpu(), strict=True):
        share_E = counts_E / counts_E.sum()
        most = counts_E.argsort(descending=True)[:3].tolist()
        layers.append({
            "max_over_mean": round(float(counts_E.max() / counts_E.mean()), 4),
            "min_over_mean": round(float(counts_E.min() / counts_E.mean()), 4),
            "entropy": round(float(-(share_E * share_E.clamp(min=1e-30).log()).sum()), 4),
            "dead": int((counts_E == 0).sum()),
            "busiest": [[expert, int(counts_E[expert])] for expert in most],
            "bias_min": round(float(moe.gate.e_score_correction_bias.min()), 6),
            "bias_max": round(float(moe.gate.e_score_correction_bias.max()), 6),
        })  # fmt: skip
    return layers


class Clock:
    """Seconds and tokens of training since the last log entry; evaluation, samples and saves do not count."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.tokens, self.steps, self.train_sec, self.wait_sec = 0, 0, 0.0, 0.0
        self._start = time.perf_counter()

    def wait_for(self, batches: Iterator[Batch]) -> Batch:
        self._start = time.perf_counter()
        batch = next(batches)
        self.wait_sec += time.perf_counter() - self._start
        return batch

    def step_done(self, tokens: int) -> None:
        self.train_sec += time.perf_counter() - self._start
        self.tokens += tokens
        self.steps += 1

    def rates(self) -> dict[str, float]:
        """Since the last call."""
        rates = {
            "tokens_per_sec": self.tokens / self.train_sec,
            "steps_per_sec": self.steps / self.train_sec,
            "data_wait_sec": self.wait_sec / self.steps,
        }
        self.reset()
        return rates
