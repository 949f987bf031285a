"""The numbers of a logged step: parts of the loss, balance of the experts, rates."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from config import Config
from data import Loader
from model import DeepSeekV3, moe_layers
from stream import Batch


def step_metrics(
    sums: list[float], num_targets: Sequence[int], rows: int, mtp_weight: float, config: Config
) -> dict[str, Any]:
    """The parts of the loss, over all micro-batches and ranks: nats per target; the balance loss per sequence.

    Args:
        num_targets: of the main head and each MTP head.
    """
    depth = config.model.num_nextn_predict_layers
    nats = [part / max(1, count) for part, count in zip(sums, num_targets, strict=False)]
    correct = [part / max(1, count) for part, count in zip(sums[1 + depth :], num_targets, strict=False)]
    balance = sums[-1] / rows
    metrics: dict[str, Any] = {"loss": nats[0], "accuracy": correct[0], "balance_loss": balance}
    total = metrics["loss"] + config.model.aux_loss_alpha * balance
    if depth:
        metrics["mtp_loss"] = sum(nats[1:]) / depth
        metrics["mtp_accuracy"] = sum(correct[1:]) / depth
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


def data_metrics(batch: Batch, loader: Loader) -> dict[str, Any]:
    """The supply of data since this process began; of packed rows, the shares of positions used and tokens cropped."""
    tally = batch.tally
    metrics = {
        "epoch": batch.epoch,
        "cursor": batch.cursor.to_dict(),
        "data_queue": loader.depth,
        "data_retries": batch.retries,
        "data_restarts": loader.restarts,
        "skipped_documents": tally.skipped,
    }
    if tally.tokens:
        metrics["packing_used"] = 1 - tally.padding / tally.positions
        metrics["packing_cropped"] = tally.cropped / tally.tokens
    return metrics


class Clock:
    """Seconds and tokens of training since the last log entry; evaluation, samples and saves do not count."""

    def __init__(self) -> None:
        self._laps: deque[float] = deque(maxlen=50)
        self._lap = time.monotonic()
        self.reset()

    def reset(self) -> None:
        self.tokens, self.steps, self.train_sec, self.wait_sec = 0, 0, 0.0, 0.0
        self._start = time.perf_counter()

    def lap(self) -> float:
        """Called once per step: the longest of the last ones, all that lies between them included."""
        now = time.monotonic()
        self._laps.append(now - self._lap)
        self._lap = now
        return max(self._laps)

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
