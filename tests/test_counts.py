"""Counts of parameters and FLOPs against published figures."""

from __future__ import annotations

import pytest
import torch
from test_model import build, losses_of, tiny, tokens_for
from torch.utils.flop_counter import FlopCounterMode

import config as config_module
import losses
from config import OpsConfig
from counts import count_parameters, flops_per_token
from model import DeepSeekV3, LossWeights

PUBLISHED = {  # main model, active with head (reference: DeepSeek-V3 and V2 reports, Moonlight's card)
    "671b": ({}, 671_026_404_352, 36.63e9),
    "16b": ({}, 15.71e9, 2.45e9),  # DeepSeek-V2-Lite's dimensions
    "moonlight": ({"vocab_size": 163840, "intermediate_size": 11264}, 15.96e9, 2.24e9 + 163840 * 2048),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_of_published_models(name: str) -> None:
    changes, total, active = PUBLISHED[name]
    cfg = config_module.load("16b" if name == "moonlight" else name, []).model.model_copy(update=changes)
    with torch.device("meta"):
        model = DeepSeekV3(cfg)
    counts = count_parameters(model)
    assert counts.total == total if isinstance(total, int) else counts.total == pytest.approx(total, rel=1e-3)
    assert counts.active_with_head == pytest.approx(active, rel=3e-3)
    if name == "671b":
        assert counts.router_bias == 14_848
        assert flops_per_token(cfg, counts, 4096, causal=True) / 1e9 == pytest.approx(260.6, abs=0.1)


def test_mini_counts_and_flops() -> None:
    cfg = config_module.load("mini", []).model
    with torch.device("meta"):
        counts = count_parameters(DeepSeekV3(cfg))
    assert (counts.total, counts.total + counts.mtp) == (531_803_904, 573_718_784)
    assert sum(counts.parts.values()) == counts.total
    full = [flops_per_token(cfg, counts, length) / 1e9 for length in (1024, 2048, 4096)]
    assert full == pytest.approx([1.14, 1.31, 1.63], abs=0.006)
    assert flops_per_token(cfg, counts, 2048, causal=True) / 1e9 == pytest.approx(1.143, abs=0.001)


def test_flops_are_those_that_torch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a step that is written out: torch does not see products into a buffer, as the chunked loss has them."""
    plain = losses.linear_cross_entropy_reference
    monkeypatch.setattr(losses, "linear_cross_entropy", lambda *args, path: plain(*args))
    cfg = tiny(num_nextn_predict_layers=2, n_shared_experts=2, v_head_dim=24)
    model = build(cfg, paths=OpsConfig(attention="plain", experts="loop"))
    tokens, targets = tokens_for(cfg, length=64), tokens_for(cfg, length=66)
    with FlopCounterMode(display=False) as counter:
        losses_of(model, tokens, targets, loss_weights=LossWeights(1.0, (1.0, 1.0), 1.0)).loss.backward()
    wanted = flops_per_token(cfg, count_parameters(model), seq_len=64) * tokens.numel()
    assert counter.get_total_flops() == pytest.approx(wanted, rel=0.01)
