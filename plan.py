"""What a run will be, before it runs: parameters, tokens, FLOPs, memory, time and money (`--dry-run`)."""

from __future__ import annotations

import math
from typing import Any

import torch

from config import Config, ModelConfig, to_yaml
from counts import Counts, count_parameters, flops_per_token
from losses import CHUNK_LOGITS
from model import DeepSeekV3
from optim import uses_muon
from tracker import duration


def meta_model(config: ModelConfig, dtype: torch.dtype = torch.float32, **options: Any) -> DeepSeekV3:
    with torch.device("meta"):
        return DeepSeekV3(config, dtype, **options)


def num_steps(config: Config, counts: Counts) -> int:
    """`train.steps`, or as many as `train.tokens_per_active_param` asks for."""
    if config.train.steps is not None:
        return config.train.steps
    return math.ceil(config.train.tokens_per_active_param * counts.active_with_head / config.train.batch_tokens)


def memory_gib(config: Config, model: DeepSeekV3, *, compute_bytes: int) -> dict[str, float]:
    """Estimated peak memory of one rank by part, GiB: from tensor sizes, not measured on any device.

    fp32 weights, gradients and optimizer states; cast weights; activations that autograd keeps for one micro-batch.
    """
    cfg = config.model
    sizes = {"weights": 0, "gradients": 0, "optimizer": 0, "weights cast for products": 0}
    for name, parameter in model.named_parameters():
        num = parameter.numel()
        muon = config.optim.name == "muon" and uses_muon(name, parameter)
        sizes["weights"] += 4 * num
        sizes["gradients"] += 4 * num
        sizes["optimizer"] += (4 if muon else 8) * num
        if compute_bytes < 4 and parameter.dim() > 1:
            sizes["weights cast for products"] += compute_bytes * num
    tokens = config.train.micro_batch * config.data.seq_len
    layers = cfg.num_hidden_layers + cfg.num_nextn_predict_layers
    heads = cfg.num_attention_heads * (4 * cfg.qk_head_dim + 3 * cfg.v_head_dim)
    latents = 2 * ((cfg.q_lora_rank or 0) + cfg.kv_lora_rank + cfg.qk_rope_head_dim)
    experts = cfg.num_experts_per_tok * (2 * cfg.hidden_size + 5 * cfg.moe_intermediate_size)
    shared = 5 * cfg.n_shared_experts * cfg.moe_intermediate_size
    block = compute_bytes * (heads + latents + experts + shared + 4 * cfg.hidden_size) + 4 * 4 * cfg.hidden_size
    if config.train.recompute == "full":  # one block at a time
        sizes["weights cast for products"] //= layers
    kept = 4 * cfg.hidden_size * layers + block if config.train.recompute else block * layers
    heads_state = (1 + cfg.num_nextn_predict_layers) * compute_bytes * 2 * cfg.hidden_size
    sizes["activations"] = tokens * (kept + heads_state)
    sizes["logits and head gradient"] = (4 + 2 * compute_bytes) * CHUNK_LOGITS[
        "cuda"
    ] + 4 * cfg.vocab_size * cfg.hidden_size
    return {part: size / 2**30 for part, size in sizes.items()}


def describe(config: Config, *, tokens_per_sec: float | None, price_per_hour: float | None) -> str:
    """The text of `--dry-run`."""
    model = meta_model(config.model)
    counts = count_parameters(model)
    steps = num_steps(config, counts)
    tokens = steps * config.train.batch_tokens
    seq_len, per_parameter = config.data.seq_len, tokens / counts.active_with_head
    full, causal = (flops_per_token(config.model, counts, seq_len, causal=causal) for causal in (False, True))
    rows = [*counts.parts.items(), ("total", counts.total), ("active per token", counts.active)]
    rows += [("active with head", counts.active_with_head), ("MTP layers", counts.mtp)]
    rows += [("total with MTP", counts.total + counts.mtp), ("router biases", counts.router_bias)]
    memory = memory_gib(config, model, compute_bytes=4 if config.train.precision == "fp32" else 2)
    lines = [
        to_yaml(config).rstrip(),
        "",
        "parameters",
        *(f"  {name:<26}{number:>18,}" for name, number in rows),
        "",
        f"tokens    {tokens:,} in {steps:,} steps of {config.train.batch_tokens:,}",
        f"          {per_parameter:.1f} per active parameter",
        f"FLOPs     {full / 1e9:.3f} GFLOP per token over all {seq_len} keys, {causal / 1e9:.3f} over the causal half",
        f"          {full * tokens:.2e} in all",
        "",
        "memory    estimated from tensor sizes, GiB",
        *(f"  {part:<26}{size:>18.2f}" for part, size in [*memory.items(), ("sum", sum(memory.values()))]),
    ]
    if tokens_per_sec:
        seconds = tokens / tokens_per_sec
        cost = f", {price_per_hour * seconds / 3600:,.2f} at {price_per_hour:g} an hour" if price_per_hour else ""
        lines += [
            "",
            f"time      {duration(seconds)} ({seconds / 3600:.1f} hours) at {tokens_per_sec:,.0f} tokens/s{cost}",
        ]
    else:
        lines += ["", "time      give --tokens-per-sec, and --price-per-hour for the cost"]
    return "\n".join(lines)
