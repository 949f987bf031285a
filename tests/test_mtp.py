"""Multi-token prediction as transformers uses it: its drafts are our MTP head's, and are accepted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_model import randomise
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM
from transformers.generation.candidate_generator import MTPCandidateGenerator

import checkpoint
import convert
import generate
from config import ModelConfig, OptimConfig
from model import DeepSeekV3, Output, init_weights
from optim import Optimizers, lr_at

VOCAB = 32
TINY: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "q_lora_rank": 16,
    "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16, "intermediate_size": 48,
    "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 128,
}  # fmt: skip


@pytest.fixture
def drafts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor | None, list[int]]]:
    """What transformers drafts: ids with the drafts at the end, their logits, how many were accepted (one entry)."""
    seen: list[tuple[Tensor, Tensor | None, list[int]]] = []
    get, update = MTPCandidateGenerator.get_candidates, MTPCandidateGenerator.update_candidate_strategy

    def recorded_get(self: Any, *args: Any, **kwargs: Any) -> Any:
        ids, logits = get(self, *args, **kwargs)
        seen.append((ids, logits, []))
        return ids, logits

    def recorded_update(self: Any, input_ids: Any, scores: Any, num_matches: int) -> Any:
        seen[-1][2].append(int(num_matches))
        return update(self, input_ids, scores, num_matches)

    monkeypatch.setattr(MTPCandidateGenerator, "get_candidates", recorded_get)
    monkeypatch.setattr(MTPCandidateGenerator, "update_candidate_strategy", recorded_update)
    return seen


def build(**changes: Any) -> DeepSeekV3:
    model = DeepSeekV3(ModelConfig(**(TINY | changes)))
    init_weights(model, seed=0)
    return model


def in_transformers(model: DeepSeekV3, root: Path, monkeypatch: pytest.MonkeyPatch) -> DeepseekV3ForCausalLM:
    """The model through a checkpoint. transformers knows the MTP layer of the 61-layer model only: name ours to it."""
    config = convert.hf_config(model.config, dtype="float32", bos_token_id=None, eos_token_id=None)
    tensors = convert.to_checkpoint(model.state_dict(), model.config)
    path = checkpoint.save(root, 1, {"model": tensors}, {"config.json": json.dumps(config).encode()}, keep=1)
    first = model.config.num_hidden_layers
    layers = [rf"model\.layers\.{first + depth}\..*" for depth in range(model.config.num_nextn_predict_layers)]
    monkeypatch.setattr(DeepseekV3ForCausalLM, "_keys_to_ignore_on_load_unexpected", layers)
    loaded: Any = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    other, info = loaded
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return other.eval()


def hf_generate(model: DeepseekV3ForCausalLM, prompt: Tensor, num_tokens: int, **kwargs: Any) -> list[int]:
    mask = torch.ones_like(prompt)
    out = model.generate(  # type: ignore[misc]
        prompt, attention_mask=mask, max_new_tokens=num_tokens, do_sample=False, pad_token_id=0, **kwargs
    )
    assert isinstance(out, Tensor)
    return out[0, prompt.shape[1] :].tolist()


def mtp_logits(model: DeepSeekV3, tokens: Tensor, depth: int) -> Tensor:
    """Logits of MTP head `depth` at every position that sees `depth` + 1 tokens further."""
    hidden, _ = model.hidden(tokens)
    for d in range(depth + 1):
        hidden, _ = model.mtp[d](hidden[:, :-1], tokens[:, d + 1 :])
    return model.logits(hidden)


def test_positions_reach_the_mtp_layers() -> None:
    """Given to `forward` with targets, they are those of main and MTP layers alike."""
    model = build(num_nextn_predict_layers=2)
    randomise(model)
    tokens = torch.randint(VOCAB, (2, 12))
    positions = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4, 5]).expand(2, -1)
    inputs, targets = tokens[:, :10], tokens[:, 1:]
    out = model(inputs, targets, positions=positions)
    assert isinstance(out, Output)
    state, _ = model.hidden(inputs, positions=positions)
    for depth in range(2):
        state, _ = model.mtp[depth](state, (tokens[:, 1 + depth : 11 + depth]), positions)
        seen = 10 - depth  # the last position of the second head has no target
        wanted = F.cross_entropy(
            model.logits(state)[:, :seen].flatten(0, 1),
            tokens[:, 2 + depth : 2 + depth + seen].flatten(),
            reduction="sum",
        )
        assert out.nats[1 + depth].item() == pytest.approx(wanted.item(), rel=1e-5)
        if depth == 0:
            default, _ = model.mtp[0](model.hidden(inputs, positions=positions)[0], tokens[:, 1:11])
            assert not torch.allclose(default, state)  # it makes a difference


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"q_lora_rank": None, "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_hidden_layers": 3},
        {"rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 16}, "num_nextn_predict_layers": 2},
    ],
    ids=["base", "groups", "yarn, depth 2"],
)
def test_first_drafts_are_our_mtp_logits(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drafts: list[Any]
) -> None:
    model = randomise(build(**({"initializer_range": 0.3} | changes)))
    other = in_transformers(model, tmp_path, monkeypatch)
    prompt = torch.randint(VOCAB, (1, 20), generator=torch.Generator().manual_seed(2))
    hf_generate(other, prompt, 8, use_mtp=True)
    checked = 0
    for ids, logits, _ in drafts:
        if logits is None:  # before the prompt was read
            continue
        num = logits.shape[1]
        assert num == model.config.num_nextn_predict_layers
        for depth in range(num):  # each draft from the tokens before it, earlier drafts among them
            with torch.no_grad():
                ours = mtp_logits(model, ids[:, : ids.shape[1] - num + depth], depth)[:, -1]
            assert ours.abs().max() > 0.5
            assert (ours - logits[:, depth]).abs().max() < 1e-4
            checked += 1
    assert checked >= 4


def train_to_count(model: DeepSeekV3, steps: int) -> None:
    """x[t+1] = x[t] + 1 (mod V), from random starts."""
    config = OptimConfig(lr=1e-2, weight_decay=0.0)
    optimizers = Optimizers(model, config)
    generator = torch.Generator().manual_seed(3)
    for step in range(steps):
        start = torch.randint(VOCAB, (8, 1), generator=generator)
        stream = (start + torch.arange(18)) % VOCAB
        out = model(stream[:, :16], stream[:, 1:])
        assert isinstance(out, Output)
        optimizers.zero_grad()
        out.loss.backward()
        optimizers.step(lr_at(step, steps, config))


def test_counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drafts: list[Any]) -> None:
    """Labels are shifted once, MTP's twice: the model continues +1, its MTP head predicts +2, drafts are accepted."""
    model = build(initializer_range=0.05)
    train_to_count(model, 150)
    prompt = torch.arange(9, 15)[None]
    expected = [(15 + i) % VOCAB for i in range(60)]
    assert generate.generate(model, prompt.tolist(), max_new_tokens=60) == [expected]
    with torch.no_grad():
        tokens = torch.arange(40)[None] % VOCAB
        hidden, _ = model.hidden(tokens[:, :-1])
        state, _ = model.mtp[0](hidden, tokens[:, 1:])
    assert torch.equal(model.logits(hidden).argmax(-1), (tokens[:, :-1] + 1) % VOCAB)
    assert torch.equal(model.logits(state).argmax(-1), (tokens[:, :-1] + 2) % VOCAB)

    other = in_transformers(model, tmp_path, monkeypatch)
    assert hf_generate(other, prompt, 60) == expected
    assert hf_generate(other, prompt, 60, use_mtp=True) == expected
    accepted = [matches[0] for _, logits, matches in drafts if logits is not None]
    assert len(accepted) >= 29 and sum(accepted) >= 0.95 * len(accepted)
