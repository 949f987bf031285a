"""The model against transformers' DeepseekV3ForCausalLM, and the faults found in other re-implementations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

import config as config_module
import losses
import ops
from config import ModelConfig, OpsConfig, Recompute
from model import (
    DeepSeekV3,
    LatentCache,
    LossWeights,
    Output,
    Router,
    arange_positions,
    init_weights,
    moe_layers,
)

TINY: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "q_lora_rank": 20,
    "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16, "intermediate_size": 40,
    "moe_intermediate_size": 16, "n_routed_experts": 8, "num_experts_per_tok": 3, "max_position_embeddings": 256,
    "initializer_range": 0.1,
}  # fmt: skip
YARN = {"factor": 4.0, "original_max_position_embeddings": 32, "mscale": 1.0, "mscale_all_dim": 1.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "no q latent": {"q_lora_rank": None},
    "groups": {"n_group": 4, "topk_group": 2, "n_routed_experts": 16, "num_experts_per_tok": 4},
    "yarn": {"rope_scaling": YARN},
    "yarn, V2-Lite's mscale": {"rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.5}},
    "yarn, no mscale_all_dim": {"rope_scaling": YARN | {"mscale_all_dim": 0.0}},
    "no dense layer": {"first_k_dense_replace": 0},
    "two dense layers": {"first_k_dense_replace": 2},
    "all dense": {"first_k_dense_replace": 3},
    "two shared experts": {"n_shared_experts": 2},
    "wide values": {"qk_nope_head_dim": 5, "qk_rope_head_dim": 6, "v_head_dim": 24},
    "narrow values": {"qk_nope_head_dim": 20, "qk_rope_head_dim": 10, "v_head_dim": 7},
    "odd sizes": {"hidden_size": 37, "moe_intermediate_size": 11, "kv_lora_rank": 9, "n_routed_experts": 5},
    "one head, odd offsets": {"num_attention_heads": 1, "qk_nope_head_dim": 5, "q_lora_rank": 7, "kv_lora_rank": 9},
    "width one": {"qk_nope_head_dim": 1, "qk_rope_head_dim": 2, "v_head_dim": 1, "kv_lora_rank": 1, "q_lora_rank": 1},
    "raw weights": {"norm_topk_prob": False, "routed_scaling_factor": 1.7},
    "one expert": {"n_routed_experts": 2, "num_experts_per_tok": 1},
}


def tiny(**changes: Any) -> ModelConfig:
    return ModelConfig(**(TINY | changes))


def build(cfg: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32, **kwargs: Any) -> DeepSeekV3:
    """A model with random norms and non-zero random router biases."""
    with torch.device("meta"):
        model = DeepSeekV3(cfg, dtype, **kwargs)
    model.to_empty(device="cpu")
    init_weights(model, seed)
    return randomise(model, seed + 1)


def randomise(model: DeepSeekV3, seed: int = 1) -> DeepSeekV3:
    """Norms and router biases that are not what they start with."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
        for buffer in model.buffers():
            buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
    return model


def hf_model(cfg: ModelConfig) -> DeepseekV3ForCausalLM:
    values = cfg.model_dump(exclude={"rope_scaling", "rope_theta", "num_nextn_predict_layers"})
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": cfg.rope_theta}
    if cfg.rope_scaling is not None:
        rope |= cfg.rope_scaling.model_dump(exclude={"type"}) | {"rope_type": "yarn"}
    hf_config = DeepseekV3Config(
        **values,
        num_key_value_heads=cfg.num_attention_heads,
        rope_parameters=rope,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    return DeepseekV3ForCausalLM(hf_config).eval()


def tokens_for(cfg: ModelConfig, batch: int = 2, length: int = 24, seed: int = 5) -> Tensor:
    return torch.randint(cfg.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def losses_of(model: DeepSeekV3, tokens: Tensor, targets: Tensor, **kwargs: Any) -> Output:
    out = model(tokens, targets, **kwargs)
    assert isinstance(out, Output)
    return out


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_gradients_equal_transformers(name: str) -> None:
    cfg = tiny(**VARIANTS[name], num_nextn_predict_layers=0)
    ours, theirs = build(cfg), hf_model(cfg)
    theirs.load_state_dict(ours.state_dict())  # HF holds the same names in memory, experts stacked alike
    tokens = tokens_for(cfg, length=48)
    logits = ours(tokens)
    assert (logits - theirs(tokens).logits).abs().max() < 1e-4
    targets = torch.cat((tokens[:, 1:], tokens[:, :1]), 1)
    losses_of(ours, tokens, targets).loss.backward()
    F.cross_entropy(theirs(tokens).logits.flatten(0, 1), targets.flatten()).backward()
    others = dict(theirs.named_parameters())
    assert others.keys() == dict(ours.named_parameters()).keys()
    for key, parameter in ours.named_parameters():
        other = others[key]
        assert parameter.grad is not None
        if other.grad is None:  # transformers leaves experts nobody chose without a gradient
            assert parameter.grad.abs().max() == 0
        else:
            assert (parameter.grad - other.grad).abs().max() < 1e-4, key


def test_half_rotated_rope_would_fail() -> None:
    cfg = tiny(num_nextn_predict_layers=0)
    ours, theirs = build(cfg), hf_model(cfg)
    theirs.load_state_dict(ours.state_dict())
    theirs.config.rope_interleave = False
    tokens = tokens_for(cfg)
    assert (ours(tokens) - theirs(tokens).logits).abs().max() > 1e-2


def test_bias_steers_selection_only() -> None:
    cfg = tiny()
    model = build(cfg)
    router = moe_layers(model)[0].gate
    assert "e_score_correction_bias" in dict(router.named_buffers())
    assert router.e_score_correction_bias.dtype == torch.float32
    x = torch.randn(40, cfg.hidden_size)
    router.e_score_correction_bias.zero_()
    expert, weight, _ = router(x)
    router.e_score_correction_bias.fill_(7.0)  # the same for all: nothing changes
    assert all(torch.equal(a, b) for a, b in zip((expert, weight), router(x)[:2], strict=True))
    router.e_score_correction_bias[3] = 100.0
    expert, weight, scores = router(x)
    assert (expert == 3).any(1).all()
    plain = scores.gather(1, expert)
    torch.testing.assert_close(weight, plain / plain.sum(1, keepdim=True) * cfg.routed_scaling_factor)


def test_no_token_is_dropped_when_all_choose_one_expert() -> None:
    cfg = tiny(num_experts_per_tok=1)
    model = build(cfg)
    moe = moe_layers(model)[0]
    moe.gate.e_score_correction_bias.zero_()[2] = 100.0
    x = torch.randn(2, 30, cfg.hidden_size)
    y, routing = moe(x)
    assert routing.counts_E.tolist() == [0, 0, 60, 0, 0, 0, 0, 0]
    gate_up, down = moe.experts.gate_up_proj[2], moe.experts.down_proj[2]
    gate, up = F.linear(x, gate_up).chunk(2, -1)
    expected = F.linear(F.silu(gate) * up, down) * cfg.routed_scaling_factor + moe.shared_experts(x)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)


def test_last_token_changes_no_earlier_logit_of_any_head() -> None:
    cfg = tiny(num_nextn_predict_layers=2)
    model = build(cfg)
    tokens = tokens_for(cfg, length=20)
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % cfg.vocab_size
    with torch.no_grad():
        for depth, (one, two) in enumerate(zip(head_logits(model, tokens), head_logits(model, changed), strict=True)):
            last = tokens.shape[1] - 1 - depth  # MTP head d sees d tokens further
            assert (one[:, :last] - two[:, :last]).abs().max() < 1e-5
            assert (one[:, last:] - two[:, last:]).abs().max() > 1e-3


def head_logits(model: DeepSeekV3, tokens: Tensor) -> list[Tensor]:
    """Logits of the main head and of each MTP head, every one as long as what it can see."""
    hidden, _ = model.hidden(tokens)
    logits = [model.logits(hidden)]
    for depth, mtp in enumerate(model.mtp, 1):
        hidden, _ = mtp(hidden[:, :-1], tokens[:, depth:])
        logits.append(model.logits(hidden))
    return logits


def test_last_token_gets_exactly_no_gradient_from_earlier_losses() -> None:
    cfg = tiny(num_nextn_predict_layers=1)
    model = build(cfg)
    tokens = torch.arange(10)[None]  # every token once, so that an embedding row stands for a position
    targets = torch.tensor([[11, 12, 13, 14, 15, 16, 17, 18, losses.IGNORE, losses.IGNORE]])
    losses_of(model, tokens, targets, loss_weights=LossWeights(1.0, (1.0,))).loss.backward()
    gradient = model.model.embed_tokens.weight.grad
    assert gradient is not None
    assert gradient[8:10].abs().max() == 0 and gradient[:8].abs().amin(1).sum() != 0


def test_targets_are_shifted_once_and_mtp_sees_one_further() -> None:
    """The losses equal plain cross-entropies of the heads' logits at i -> i+1 and i -> i+2, i+3."""
    cfg = tiny(num_nextn_predict_layers=2)
    model = build(cfg)
    stream = tokens_for(cfg, length=23)
    tokens, targets = stream[:, :20], stream[:, 1:]
    out = losses_of(model, tokens, targets)
    hidden, _ = model.hidden(tokens)
    for depth in range(3):
        if depth:
            hidden, _ = model.mtp[depth - 1](hidden, stream[:, depth : depth + 20])
        expected = F.cross_entropy(model.logits(hidden).flatten(0, 1), stream[:, depth + 1 : depth + 21].flatten())
        torch.testing.assert_close(out.nats[depth] / out.num_targets[depth], expected)
    short = losses_of(model, tokens, stream[:, 1:21])  # without the tail MTP predicts one and two fewer
    assert short.num_targets.tolist() == [40, 38, 36] and out.num_targets.tolist() == [40, 40, 40]


def test_ignored_targets_count_nowhere() -> None:
    cfg = tiny()
    model = build(cfg)
    tokens, targets = tokens_for(cfg), tokens_for(cfg, length=25, seed=9)
    targets[:, 10:] = losses.IGNORE
    out = losses_of(model, tokens, targets)
    cut = losses_of(model, tokens[:, :10], targets[:, :10])
    torch.testing.assert_close(out.nats, cut.nats)
    assert torch.equal(out.num_targets, cut.num_targets)


@pytest.mark.parametrize("name", ["base", "no q latent", "yarn", "narrow values", "groups"])
def test_cached_logits_equal_full_ones(name: str) -> None:
    """Prefill, one token, several tokens; rows of unequal length."""
    cfg = tiny(**VARIANTS[name])
    model = build(cfg).eval()
    tokens = tokens_for(cfg, batch=3, length=30)
    with torch.no_grad():
        full = model(tokens)
        cache = LatentCache(cfg, 3, 30, device="cpu", dtype=torch.float32)
        steps = [model(tokens[:, :11], cache=cache), model(tokens[:, 11:12], cache=cache)]
        steps += [model(tokens[:, 12:20], cache=cache), model(tokens[:, 20:], cache=cache)]
    assert (torch.cat(steps, 1) - full).abs().max() < 1e-4


def test_cached_logits_of_ragged_rows() -> None:
    cfg = tiny()
    model = build(cfg).eval()
    lengths, total = [4, 9, 6], 16
    tokens = tokens_for(cfg, batch=3, length=total)
    with torch.no_grad():
        full = model(tokens)
        cache = LatentCache(cfg, 3, total, device="cpu", dtype=torch.float32)
        padded = tokens[:, :9].clone()
        for row, length in enumerate(lengths):
            padded[row, length:] = 0
        prefill = model(padded, cache=cache)
        for row, length in enumerate(lengths):
            assert (prefill[row, :length] - full[row, :length]).abs().max() < 1e-4
        for step in range(6):
            positions = torch.tensor(lengths)[:, None] + step
            logits = model(tokens.gather(1, positions), positions=positions, cache=cache)
            assert (logits - full.gather(1, positions[..., None].expand(-1, -1, cfg.vocab_size))).abs().max() < 1e-4


def test_mtp_runs_with_a_cache() -> None:
    cfg = tiny()
    model = build(cfg).eval()
    tokens = tokens_for(cfg, length=12)
    with torch.no_grad():
        hidden, _ = model.hidden(tokens)
        full, _ = model.mtp[0](hidden[:, :-1], tokens[:, 1:])
        cache = LatentCache(cfg, 2, 12, device="cpu", dtype=torch.float32, mtp=True)
        positions = arange_positions(tokens[:, 1:])
        first, _ = model.mtp[0](hidden[:, :5], tokens[:, 1:6], cache=cache)  # from position 0 on
        cache.length = 5
        rest, _ = model.mtp[0](hidden[:, 5:-1], tokens[:, 6:], positions[:, 5:], cache)
    assert (torch.cat((first, rest), 1) - full).abs().max() < 1e-4


def test_init_sets_every_parameter_and_buffer() -> None:
    cfg = tiny()
    with torch.device("meta"):
        model = DeepSeekV3(cfg)
    model.to_empty(device="cpu")
    tensors = [*model.parameters(), *model.buffers()]
    with torch.no_grad():
        for tensor in tensors:
            tensor.fill_(math.nan)
    init_weights(model, seed=3)
    assert all(tensor.isfinite().all() for tensor in tensors)
    tokens = tokens_for(cfg)
    assert torch.isfinite(model(tokens)).all()
    embedding = model.model.embed_tokens.weight
    assert 0.9 * cfg.initializer_range < embedding.std() < 1.1 * cfg.initializer_range
    again = DeepSeekV3(cfg)
    init_weights(again, seed=3)
    assert torch.equal(embedding, again.model.embed_tokens.weight)


@pytest.mark.parametrize("preset", ["quickstart", "30m"])
def test_loss_at_init_is_ln_of_the_vocabulary(preset: str) -> None:
    cfg = config_module.load(preset, []).model
    with torch.device("meta"):
        model = DeepSeekV3(cfg)
    model.to_empty(device="cpu")
    init_weights(model, seed=0)
    tokens = tokens_for(cfg, length=66)
    with torch.no_grad():
        out = losses_of(model, tokens[:, :64], tokens[:, 1:])
    assert ((out.nats / out.num_targets) - math.log(cfg.vocab_size)).abs().max() < 0.3


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_changes_nothing_and_routes_once(recompute: Recompute, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = tiny()
    tokens, targets = tokens_for(cfg), tokens_for(cfg, length=25, seed=9)
    plain, again = build(cfg), build(cfg, recompute=recompute)
    one = losses_of(plain, tokens, targets)
    one.loss.backward()
    routed, multiplied = [], []
    choose, experts = Router._choose, ops.grouped_experts
    monkeypatch.setattr(Router, "_choose", lambda *args: routed.append(1) or choose(*args))
    monkeypatch.setattr(ops, "grouped_experts", lambda *args: multiplied.append(1) or experts(*args))
    two = losses_of(again, tokens, targets)
    assert torch.equal(one.loss, two.loss)
    two.loss.backward()
    assert len(routed) == 3 and len(multiplied) == 6  # 2 MoE layers and MTP
    assert torch.equal(one.expert_counts, two.expert_counts)  # counted once
    assert one.expert_counts.sum(1).tolist() == [tokens.numel() * cfg.num_experts_per_tok] * 3
    for left, right in zip(plain.parameters(), again.parameters(), strict=True):
        assert left.grad is not None and right.grad is not None and torch.equal(left.grad, right.grad)


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="needs torch 2.10")
@pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::DeprecationWarning:torch")  # of its own tracing
@pytest.mark.parametrize(("recompute", "isolated", "backend"), [
        *(pytest.param(recompute, isolated, "aot_eager", marks=pytest.mark.slow)
          for recompute in ("none", "full") for isolated in (False, True)),
        ("none", False, "eager"),
    ],
)  # fmt: skip
def test_blocks_compile_without_a_graph_break(recompute: Recompute, isolated: bool, backend: str) -> None:
    """Traced by torch.compile, and differentiated (aot_eager). What Inductor makes of it takes minutes."""
    cfg = tiny(num_hidden_layers=2, hidden_size=32, moe_intermediate_size=16)
    tokens, targets = tokens_for(cfg), tokens_for(cfg, length=25, seed=9)
    paths = OpsConfig(experts="grouped", attention="sdpa", loss="chunked")
    plain, compiled = (build(cfg, dtype=torch.bfloat16, recompute=recompute, paths=paths) for _ in range(2))
    compiled.compile_blocks(fullgraph=True, backend=backend)
    doc_ids, positions = ops.documents(targets[:, :24], eos=int(targets[0, 7])) if isolated else (None, None)
    for model in (plain, compiled):
        losses_of(model, tokens, targets, positions=positions, doc_ids=doc_ids).loss.backward()
    for left, right in zip(plain.parameters(), compiled.parameters(), strict=True):
        assert left.grad is not None and right.grad is not None
        assert (left.grad - right.grad).abs().max() <= 1e-4 * left.grad.abs().max()


# --- documents in a row ---

EOS, WIDTH = 0, 24
STARTS = (  # of each row's documents
    (0, 7, 8, 15),  # one of a single token
    (5, WIDTH),  # starts amid a document, and ends with one
    (),  # nothing but the middle of one
    (0, 10, WIDTH - 1, WIDTH + 1),  # one or two tokens are left of the last
)


def packed(cfg: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, WIDTH + 1 + depth wide, with their documents and positions."""
    width = WIDTH + 1 + cfg.num_nextn_predict_layers
    rows = 1 + torch.randint(cfg.vocab_size - 1, (len(STARTS), width), generator=torch.Generator().manual_seed(7))
    for row, starts in zip(rows, STARTS, strict=True):
        row[[start for start in starts if start < width]] = EOS
    return rows, *ops.documents(rows, EOS)


def apart(rows: Tensor) -> list[tuple[int, slice, Tensor, Tensor]]:
    """Row and place, inputs and targets of every document alone. Its last target is the EOS after it."""
    found = []
    for number, row in enumerate(rows):
        starts = sorted({0, *(row == EOS).nonzero().flatten().tolist()})
        for start, stop in zip(starts, [*starts[1:], len(row)], strict=True):
            if start < WIDTH:
                part = slice(start, min(stop, WIDTH))
                found.append((number, part, row[None, part], row[None, start + 1 : stop + 1]))
    return found


ISOLATED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "depth 0": ({"num_nextn_predict_layers": 0}, {}),
    "depth 1, no q latent": ({"q_lora_rank": None}, {}),
    "depth 2": ({"num_nextn_predict_layers": 2}, {}),
    "yarn": ({"rope_scaling": YARN | {"original_max_position_embeddings": 4}}, {}),
    "padded values": (VARIANTS["narrow values"], {}),
    "plain": ({"num_nextn_predict_layers": 2}, {"paths": OpsConfig(attention="plain")}),
    "plain, yarn": ({"rope_scaling": YARN}, {"paths": OpsConfig(attention="plain")}),
    "selective": ({}, {"recompute": "selective"}),
    "full": ({"num_nextn_predict_layers": 2}, {"recompute": "full"}),
}


@pytest.mark.parametrize("name", ISOLATED)
def test_isolated_documents_equal_documents_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits, every head's losses and targets, and gradients."""
    changes, options = ISOLATED[name]
    cfg = tiny(**changes)
    depth = cfg.num_nextn_predict_layers
    together, alone = build(cfg, **options), build(cfg, **options)
    rows, doc_ids, positions = packed(cfg)
    tokens, positions = rows[:, :WIDTH], positions[:, :WIDTH]
    weights = LossWeights(1.0, (0.7,) * depth)
    masks: list[int] = []
    make = ops.document_mask
    with monkeypatch.context() as patch:
        patch.setattr(ops, "document_mask", lambda *args: masks.append(1) or make(*args))
        out = losses_of(together, tokens, rows[:, 1:], positions=positions, doc_ids=doc_ids, loss_weights=weights)
    assert len(masks) == 1  # for all layers, main and MTP
    out.loss.backward()
    documents = apart(rows)
    assert len(documents) == 10
    parts = [losses_of(alone, inputs, targets, loss_weights=weights) for *_, inputs, targets in documents]
    torch.stack([part.loss for part in parts]).sum().backward()
    torch.testing.assert_close(out.nats, torch.stack([part.nats for part in parts]).sum(0), atol=1e-5, rtol=1e-5)
    for key in ("num_targets", "num_correct"):
        assert torch.equal(getattr(out, key), torch.stack([getattr(part, key) for part in parts]).sum(0)), key
    main = len(moe_layers(together)) - depth  # an MTP layer also routes what predicts nothing
    assert torch.equal(out.expert_counts[:main], torch.stack([part.expert_counts for part in parts]).sum(0)[:main])
    for (key, left), right in zip(together.named_parameters(), alone.parameters(), strict=True):
        assert left.grad is not None and right.grad is not None
        assert (left.grad - right.grad).abs().max() <= 1e-5 * right.grad.abs().max().clamp(min=1), key
    with torch.no_grad():
        logits = together(tokens, positions=positions, doc_ids=doc_ids)
        for row, part, inputs, _ in documents:
            assert (logits[row, part] - alone(inputs)[0]).abs().max() < 1e-5
        assert (logits - together(tokens)).abs().max() > 1e-2  # it makes a difference


@pytest.mark.parametrize("path", ["plain", "sdpa"])
def test_isolated_documents_in_bf16(path: str) -> None:
    """Dense layers: the router would choose other experts here and there."""
    cfg = tiny(initializer_range=0.05, first_k_dense_replace=3, num_nextn_predict_layers=0)
    model = build(cfg, dtype=torch.bfloat16, paths=OpsConfig(attention=path))  # type: ignore[arg-type]
    rows, doc_ids, positions = packed(cfg)
    with torch.no_grad():
        logits = model(rows[:, :WIDTH], positions=positions[:, :WIDTH], doc_ids=doc_ids)
        for row, part, inputs, _ in apart(rows):
            assert (logits[row, part] - model(inputs)[0]).abs().max() < 0.03 * logits.abs().max()


@pytest.mark.parametrize("name", ["base", "yarn"])
def test_isolated_documents_equal_transformers(name: str) -> None:
    cfg = tiny(**VARIANTS[name], num_nextn_predict_layers=0)
    ours, theirs = build(cfg), hf_model(cfg)
    theirs.load_state_dict(ours.state_dict())
    rows, doc_ids, positions = packed(cfg)
    with torch.no_grad():
        logits = ours(rows[:, :WIDTH], positions=positions[:, :WIDTH], doc_ids=doc_ids)
        for row, part, inputs, _ in apart(rows):
            assert (logits[row, part] - theirs(inputs).logits[0]).abs().max() < 1e-4


@pytest.mark.parametrize("path", ["plain", "sdpa"])
def test_exactly_no_gradient_reaches_another_document(path: str) -> None:
    cfg = tiny(num_nextn_predict_layers=2)
    model = build(cfg, paths=OpsConfig(attention=path))  # type: ignore[arg-type]
    row = torch.arange(1, 16)[None]  # every token once, so that an embedding row stands for a position
    doc_ids = torch.tensor([[0] * 4 + [1] * 5 + [2] * 6])
    positions = torch.tensor([[*range(4), *range(5), *range(3)]])
    targets = row[:, 1:].clone()
    out = losses_of(model, row[:, :12], targets, positions=positions, doc_ids=doc_ids)
    assert out.num_targets.tolist() == [12, 3 + 4 + 3, 2 + 3 + 3]
    cut = losses_of(model, row[:, :12], targets, positions=positions, doc_ids=doc_ids[:, :12])
    assert cut.num_targets.tolist() == [12, 3 + 4 + 2, 2 + 3 + 1]  # what is not known is another document's
    # What predicts the tokens 6 to 10, the last of which starts the third document, is of the second one.
    targets[(targets < 6) | (targets > 10)] = losses.IGNORE
    losses_of(model, row[:, :12], targets, positions=positions, doc_ids=doc_ids).loss.backward()
    gradient = model.model.embed_tokens.weight.grad
    assert gradient is not None
    assert gradient[5:10].abs().amax(1).min() > 0
    assert gradient[:5].abs().max() == 0 and gradient[10:].abs().max() == 0


def test_zero_weights_keep_every_parameter_in_the_graph() -> None:
    cfg = tiny()
    model = build(cfg)
    out = losses_of(model, tokens_for(cfg), tokens_for(cfg, length=25), loss_weights=LossWeights(1.0, (0.0,), 0.0))
    out.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_one_token_of_one_head_at_an_odd_offset_has_gradients() -> None:
    """There the gradient of the rotated half is a slice that `contiguous` does not copy."""
    cfg = tiny(num_attention_heads=1, qk_nope_head_dim=5)
    model = build(cfg)
    losses_of(model, tokens_for(cfg, 1, 1), tokens_for(cfg, 1, 2)).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_bf16_follows_fp32() -> None:
    cfg = tiny(initializer_range=0.05)
    tokens = tokens_for(cfg)
    exact, rough = build(cfg), build(cfg, dtype=torch.bfloat16)
    assert rough(tokens).dtype == torch.float32
    assert (exact(tokens) - rough(tokens)).abs().max() < 0.05 * exact(tokens).abs().max()


def test_cache_bytes_per_token() -> None:
    mini = config_module.load("mini", []).model
    cache = LatentCache(mini, 1, 1, device="meta", dtype=torch.bfloat16)
    assert cache.bytes_per_token == 12 * 640  # 12 layers of (256 + 64) bf16
