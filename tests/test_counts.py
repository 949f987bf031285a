"""Counts of parameters and FLOPs against published figures."""

from __future__ import annotations

import pytest
import torch

import config as config_module
from counts import count_parameters, flops_per_token
from model import DeepSeekV3

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
