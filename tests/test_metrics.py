"""The arithmetic of logged numbers."""

from __future__ import annotations

import math
import time

import pytest
import torch
from test_model import build, tiny

import config as configuration
from metrics import Clock, expert_metrics, step_metrics
from model import moe_layers


def test_loss_parts_add_up_to_what_is_optimised() -> None:
    config = configuration.load("quickstart", ["model.aux_loss_alpha=0.5"])
    # nats of the main and the MTP head, correct ones of both, balance; over 8 tokens in 2 rows
    metrics = step_metrics([16.0, 24.0, 4.0, 2.0, 3.0], num_targets=(8, 8), rows=2, mtp_weight=0.3, config=config)
    assert metrics == pytest.approx({
        "loss": 2.0, "accuracy": 0.5, "balance_loss": 1.5, "mtp_loss": 3.0, "mtp_accuracy": 0.25,
        "total_loss": 2.0 + 0.5 * 1.5 + 0.3 * 3.0,
    })  # fmt: skip
    without = configuration.load("quickstart", ["model.num_nextn_predict_layers=0"])
    assert "mtp_loss" not in step_metrics([16.0, 4.0, 3.0], num_targets=(8, 8), rows=2, mtp_weight=0.3, config=without)


def test_what_is_not_finite_is_null() -> None:
    config = configuration.load("quickstart")
    metrics = step_metrics([math.nan, 24.0, 4.0, 2.0, 3.0], num_targets=(8, 8), rows=2, mtp_weight=0.3, config=config)
    assert metrics["loss"] is None and metrics["total_loss"] is None and metrics["mtp_loss"] == 3.0


def test_expert_load() -> None:
    model = build(tiny(num_nextn_predict_layers=0))
    first, second = moe_layers(model)
    first.gate.e_score_correction_bias.copy_(torch.linspace(-0.5, 0.2, 8))
    counts = torch.tensor([[8, 0, 4, 4, 4, 4, 4, 4], [4] * 8], dtype=torch.float64)
    one, two = expert_metrics(model, counts)
    assert (one["max_over_mean"], one["min_over_mean"], one["dead"]) == (2.0, 0.0, 1)
    assert one["busiest"][0] == [0, 8] and len(one["busiest"]) == 3 and one["busiest"][1][1] == 4
    assert (one["bias_min"], one["bias_max"]) == (-0.5, 0.2)
    assert two["entropy"] == pytest.approx(math.log(8), abs=1e-4) and one["entropy"] < two["entropy"]
    assert second.gate.e_score_correction_bias.min().item() == pytest.approx(two["bias_min"], abs=1e-6)


def test_clock_counts_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = Clock()

    def batches():
        while True:
            now[0] += 1  # the data take a second
            yield None

    source = batches()
    for _ in range(2):
        clock.wait_for(source)  # type: ignore[arg-type]
        now[0] += 3
        clock.step_done(100)
        now[0] += 50  # an evaluation
    assert clock.rates() == {"tokens_per_sec": 200 / 8, "steps_per_sec": 2 / 8, "data_wait_sec": 1.0}
    clock.wait_for(source)  # type: ignore[arg-type]
    clock.step_done(100)
    assert clock.rates()["steps_per_sec"] == 1.0  # from anew
