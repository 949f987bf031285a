"""Numbers of parameters and floating-point operations of a model. Works on device `meta`, so for any size."""

from __future__ import annotations

import math
from typing import NamedTuple

from config import Config, ModelConfig
from model import DeepSeekV3


class Counts(NamedTuple):
    """Numbers of parameters. Router biases are buffers, counted apart; the MTP file's copies are counted nowhere."""

    total: int  # main model with embedding and head
    active: int  # used for one token: no embedding, no head, A of E routed experts
    head: int
    embedding: int
    mtp: int  # all MTP layers
    mtp_active: int
    router_bias: int  # entries, of the main model
    parts: dict[str, int]  # of the main model

    @property
    def active_with_head(self) -> int:
        return self.active + self.head


PARTS = ("embedding", "attention", "dense MLP", "routed experts", "shared experts", "router", "norms", "head")


def _part(name: str) -> str:
    if "layernorm" in name or "norm." in name:
        return "norms"
    for key, part in (
        ("embed_tokens", "embedding"), ("lm_head", "head"), ("self_attn", "attention"),
        ("shared_experts", "shared experts"), ("mlp.experts", "routed experts"), ("mlp.gate.", "router"),
    ):  # fmt: skip
        if key in name:
            return part
    return "dense MLP"


def count_parameters(model: DeepSeekV3) -> Counts:
    """Counts by part; works on `meta`."""
    parts: dict[str, int] = dict.fromkeys(PARTS, 0)
    idle = {"main": 0.0, "mtp": 0.0}
    mtp = 0
    unused = 1 - model.config.num_experts_per_tok / model.config.n_routed_experts
    for name, parameter in model.named_parameters():
        part, is_mtp = _part(name), name.startswith("mtp.")
        if is_mtp:
            mtp += parameter.numel()
        else:
            parts[part] += parameter.numel()
        if part == "routed experts":
            idle["mtp" if is_mtp else "main"] += parameter.numel() * unused
    total = sum(parts.values())
    return Counts(
        total=total,
        active=round(total - parts["embedding"] - parts["head"] - idle["main"]),
        head=parts["head"],
        embedding=parts["embedding"],
        mtp=mtp,
        mtp_active=round(mtp - idle["mtp"]),
        router_bias=sum(buffer.numel() for name, buffer in model.named_buffers() if not name.startswith("mtp.")),
        parts=parts,
    )


def flops_per_token(config: ModelConfig, counts: Counts, seq_len: int, *, causal: bool = False) -> float:
    """Floating-point operations of forward and backward per token, MTP included: 6 per active weight, and attention.

    Attention counts all T keys per query, as PaLM and torchtitan do, or with `causal` half of them. Excluded:
    embedding look-up, softmax, recomputation, the optimizer.
    """
    depth = config.num_nextn_predict_layers
    matrices = counts.active_with_head + counts.mtp_active + depth * counts.head
    attention = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim) * seq_len
    return 6.0 * (matrices + (config.num_hidden_layers + depth) * attention * (0.5 if causal else 1.0))


def num_steps(config: Config, counts: Counts) -> int:
    """`train.steps`, or as many as `train.tokens_per_active_param` asks for."""
    if config.train.steps is not None:
        return config.train.steps
    return math.ceil(config.train.tokens_per_active_param * counts.active_with_head / config.train.batch_tokens)
