"""Muon against torch.optim.Muon and the muon-optimizer package; schedules, clipping, router biases, loss scale."""

from __future__ import annotations

import itertools
import math
from typing import Any

import muon as muon_package
import pytest
import torch
from test_model import build, losses_of, tiny, tokens_for

import optim
from config import OptimConfig
from model import moe_layers
from optim import LossScale, Muon, Optimizers, clip_gradients, lr_at, newton_schulz, update_router_bias, uses_muon


def matrices(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_muon_equals_torch_optim_muon(shape: tuple[int, int]) -> None:
    ours, theirs = (torch.nn.Parameter(matrices(*shape)) for _ in range(2))
    our = Muon([ours], lr=0.02, momentum=0.95, weight_decay=0.1)
    their = torch.optim.Muon([theirs], lr=0.02, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(5):
        ours.grad = matrices(*shape, seed=step + 1)
        theirs.grad = ours.grad.clone()
        our.step()
        their.step()
        # both iterate in bf16; the products' order of summation differs
        torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0)


def test_muon_equals_the_muon_optimizer_package() -> None:
    """Same momentum and iteration; the package scales by sqrt(max(1, rows / cols)) and matches no learning rate."""
    ours, theirs = (torch.nn.Parameter(matrices(40, 24)) for _ in range(2))
    our = Muon([ours], lr=0.02, momentum=0.95, weight_decay=0.0)
    scale = 0.2 * math.sqrt(40) / math.sqrt(40 / 24)
    their = muon_package.SingleDeviceMuon([theirs], lr=0.02 * scale, momentum=0.95, weight_decay=0.0)
    for step in range(5):
        ours.grad = matrices(40, 24, seed=step + 1)
        theirs.grad = ours.grad.clone()
        our.step()
        their.step()
        torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0)


def test_stacked_experts_and_fused_halves_move_like_single_matrices() -> None:
    stacked = torch.nn.Parameter(matrices(3, 16, 12))
    singles = [torch.nn.Parameter(part.clone()) for expert in stacked.data for part in expert.chunk(2)]
    one = Muon([{"params": [stacked], "split": 2}], lr=0.05, ns_dtype=torch.float32)
    many = Muon(singles, lr=0.05, ns_dtype=torch.float32)
    for step in range(3):
        stacked.grad = matrices(3, 16, 12, seed=step + 1)
        parts = [part for expert in stacked.grad for part in expert.chunk(2)]
        for single, part in zip(singles, parts, strict=True):
            single.grad = part.clone()
        one.step()
        many.step()
    moved = torch.stack([single.detach() for single in singles])
    torch.testing.assert_close(stacked.detach().view(6, 8, 12), moved, atol=1e-5, rtol=1e-5)


def test_newton_schulz_orthogonalises() -> None:
    matrix = matrices(4, 16, 30)
    values = torch.linalg.svdvals(newton_schulz(matrix / torch.linalg.matrix_norm(matrix, keepdim=True)))
    assert values.min() > 0.5 and values.max() < 1.3


def updated(grads: list[torch.Tensor], **options: Any) -> torch.Tensor:
    """Four stacked matrices after a step of Muon per gradient."""
    parameter = torch.nn.Parameter(matrices(4, 16, 30))
    muon = Muon([parameter], lr=0.05, weight_decay=0.0, **({"ns_dtype": torch.float32} | options))
    for grad in grads:
        parameter.grad = grad.clone()
        muon.step()
    assert muon.state[parameter]["momentum"].dtype == options.get("momentum_dtype", torch.float32)
    return parameter.detach()


def test_muon_ignores_the_scale_of_gradients_and_survives_none() -> None:
    grad = matrices(4, 16, 30, seed=1)
    torch.testing.assert_close(updated([grad * 1e-6]), updated([grad]), atol=1e-4, rtol=1e-3)
    assert torch.equal(updated([torch.zeros_like(grad)]), matrices(4, 16, 30))


def test_batches_are_bounded_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    grads = [matrices(4, 16, 30, seed=seed) for seed in (1, 2)]
    whole = updated(grads)
    sizes = []
    monkeypatch.setattr(optim, "NS_BATCH_ELEMENTS", 3 * 16 * 30)
    monkeypatch.setattr(optim, "newton_schulz", lambda x: sizes.append(len(x)) or newton_schulz(x))
    torch.testing.assert_close(updated(grads), whole)
    assert sizes == [3, 1] * 2


def test_momentum_in_16_bits_follows_fp32() -> None:
    grads = [matrices(4, 16, 30, seed=seed) for seed in range(1, 9)]
    exact, rough = updated(grads), updated(grads, momentum_dtype=torch.bfloat16)
    moved = (exact - matrices(4, 16, 30)).norm()
    assert 0 < (rough - exact).norm() < 0.01 * moved


def test_every_parameter_has_the_right_optimizer() -> None:
    model = build(tiny())
    names = {name for name, parameter in model.named_parameters() if uses_muon(name, parameter)}
    assert {
        "mtp.0.eh_proj.weight",
        "model.layers.1.mlp.experts.down_proj",
        "model.layers.0.mlp.up_proj.weight",
    } <= names
    others = dict(model.named_parameters()).keys() - names
    assert all("norm" in n or "embed" in n or "lm_head" in n or n.endswith("gate.weight") for n in others)
    optimizers = Optimizers(model, OptimConfig())
    assert sum(len(group["params"]) for opt in optimizers.all for group in opt.param_groups) == len(names) + len(others)
    assert len(Optimizers(model, OptimConfig(name="adamw")).all) == 1


def test_state_round_trip_continues_identically() -> None:
    cfg = tiny()
    tokens, targets = tokens_for(cfg), tokens_for(cfg, length=25, seed=9)
    left, right = build(cfg), build(cfg)
    one = Optimizers(left, OptimConfig(ns_dtype="bf16"))
    two = Optimizers(right, OptimConfig(ns_dtype="bf16"))

    def train(model, optimizers) -> None:
        optimizers.zero_grad()
        losses_of(model, tokens, targets).loss.backward()
        optimizers.step(1e-2)

    train(left, one)
    right.load_state_dict(left.state_dict())
    two.load({name: tensor.clone() for name, tensor in one.state().items()})
    train(left, one)
    train(right, two)
    assert all(torch.equal(a, b) for a, b in zip(left.parameters(), right.parameters(), strict=True))
    assert one.state().keys() == two.state().keys()
    with pytest.raises(ValueError, match="nowhere"):
        two.load(one.state() | {"nowhere.weight.momentum": torch.zeros(1)})
    with pytest.raises(ValueError, match="shape"):
        two.load(one.state() | {"lm_head.weight.exp_avg": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"lm_head\.weight\.momentum, which its optimizer does not have"):
        two.load(one.state() | {"lm_head.weight.momentum": torch.zeros(97, 48)})
    whole = one.state()
    del whole["lm_head.weight.exp_avg"]
    with pytest.raises(ValueError, match=r"no optimizer state lm_head\.weight\.exp_avg"):
        two.load(whole)
    two.load({})  # before the first step
    assert two.state() == {}


def test_clip_gradients_equals_torch() -> None:
    ours, theirs = ([torch.nn.Parameter(torch.zeros(5, 4)), torch.nn.Parameter(torch.zeros(7))] for _ in range(2))
    for factor in (0.01, 10.0):
        for a, b in zip(ours, theirs, strict=True):
            b.grad = matrices(*b.shape) * factor
            a.grad = b.grad * 256
        norm = clip_gradients(ours, 1.0, scale=256)
        torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs, 1.0))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-5)


def test_schedules() -> None:
    wsd = OptimConfig(lr=1.0, warmup=0.1, decay=0.2, min_lr=0.1, schedule="wsd")
    values = [lr_at(step, 100, wsd) for step in range(100)]
    assert values[0] == pytest.approx(0.1) and values[9] == 1.0 and values[10:80] == [1.0] * 70
    assert values[80] == pytest.approx(0.1 + 0.9 * 0.95) and values[99] == pytest.approx(0.1)
    cosine = OptimConfig(lr=1.0, warmup=0.1, min_lr=0.1, schedule="cosine")
    values = [lr_at(step, 100, cosine) for step in range(100)]
    assert values[10] == 1.0 and values[99] == pytest.approx(0.1) and values == sorted(values[:10]) + values[10:]
    assert all(a >= b for a, b in itertools.pairwise(values[10:]))
    assert lr_at(0, 1, cosine) == 1.0


@pytest.mark.parametrize("decay", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
def test_without_warmup_a_run_starts_at_the_peak_even_if_it_is_one_step(schedule: str, decay: float) -> None:
    config = OptimConfig(lr=0.5, warmup=0.0, decay=decay, min_lr=0.0, schedule=schedule)  # type: ignore[arg-type]
    assert [lr_at(0, steps, config) for steps in (1, 2, 7)] == [0.5] * 3


def test_router_bias_moves_once_towards_the_mean() -> None:
    model = build(tiny())
    for layer in moe_layers(model):
        layer.gate.e_score_correction_bias.zero_()
    counts = torch.tensor([[8, 0, 4, 4, 4, 4, 4, 4]]).repeat(3, 1)
    update_router_bias(model, counts, 0.01)
    for layer in moe_layers(model):  # the MTP layer's, too
        assert layer.gate.e_score_correction_bias.tolist() == pytest.approx([-0.01, 0.01, 0, 0, 0, 0, 0, 0])


def test_loss_scale_halves_and_grows() -> None:
    scale = LossScale(dynamic=True, value=1024.0, growth_interval=2)
    scale.update(finite=False)
    assert (scale.value, scale.good_steps) == (512.0, 0)
    scale.update(finite=True)
    scale.update(finite=True)
    assert (scale.value, scale.good_steps) == (1024.0, 0)
    fixed = LossScale()
    fixed.update(finite=False)
    assert fixed == LossScale()


def test_overfits_one_batch_to_near_zero() -> None:
    cfg = tiny(vocab_size=31, hidden_size=32)
    model = build(cfg)
    optimizers = Optimizers(model, OptimConfig(weight_decay=0.0))
    tokens = tokens_for(cfg, batch=2, length=18)
    out = losses_of(model, tokens[:, :16], tokens[:, 1:])
    for step in range(60):
        optimizers.zero_grad()
        out = losses_of(model, tokens[:, :16], tokens[:, 1:])
        out.loss.backward()
        optimizers.step(2e-2 * (1 - step / 60))
    assert (out.nats / out.num_targets).max() < 0.05
