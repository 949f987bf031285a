"""Between memory and DeepSeek-V3 checkpoints in Hugging Face format: names, stacked experts, MTP copies, config.json.

`parameters(config)` is the one table; `to_checkpoint` and `from_checkpoint` read it in both directions. In memory the
routed experts of a layer are stacked, and MTP layer d is `mtp.{d}.` with the main embedding and head, while the file
calls it layer L + d and repeats both.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor

import checkpoint
from checkpoint import CheckpointError
from config import ModelConfig, UserError, YarnConfig
from options import plain, shown

log = logging.getLogger(__name__)

WEIGHTS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # whatever can be promoted to another
BIAS = "mlp.gate.e_score_correction_bias"  # fp32 everywhere: bf16 would round away the balancing steps
# The keys of a config.json, and no others: transformers' own `head_dim` trips llama.cpp's converter.
HF_KEYS = [
    "architectures", "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
    "intermediate_size", "moe_intermediate_size", "n_routed_experts", "n_shared_experts", "num_experts_per_tok",
    "first_k_dense_replace", "moe_layer_freq", "n_group", "topk_group", "topk_method", "scoring_func", "norm_topk_prob",
    "routed_scaling_factor", "moe_router_dtype", "num_nextn_predict_layers", "hidden_act", "rms_norm_eps",
    "attention_bias", "attention_dropout", "tie_word_embeddings", "max_position_embeddings", "rope_theta",
    "rope_scaling", "rope_interleave", "initializer_range", "aux_loss_alpha", "seq_aux", "ep_size", "pretraining_tp",
    "use_cache", "bos_token_id", "eos_token_id", "torch_dtype",
]  # fmt: skip
# Choices this model does not have: written as they are, refused when they differ, taken for granted when absent.
HF_FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "moe_layer_freq": 1,
    "rope_interleave": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}
# Written for readers that ask for them. The router's dtype is vLLM's key; without it vLLM routes in bf16.
HF_CONSTANTS: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "moe_router_dtype": "float32",
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "seq_aux": True,
    "ep_size": 1,
    "pretraining_tp": 1,
    "use_cache": True,
}
# What transformers 5.23 (`DeepseekV3Config`) takes for an absent key; the full-size model's value.
HF_DEFAULTS: dict[str, Any] = {
    "vocab_size": 129280, "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128, "q_lora_rank": 1536,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8,
    "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    "rms_norm_eps": 1e-6, "max_position_embeddings": 4096, "initializer_range": 0.02,
}  # fmt: skip
ROPE_KEYS = set(YarnConfig.model_fields) | {
    "rope_type", "rope_theta", "attention_factor", "truncate", "partial_rotary_factor"
}  # fmt: skip


class Parameter(NamedTuple):
    """A tensor in memory and where its slices lie in a checkpoint."""

    name: str
    shape: tuple[int, ...]
    slices: Sequence[tuple[str, Any]]  # (name in the checkpoint, index into the tensor in memory)


# ------------------------------------------------------------------------------------------------------------- tensors


def parameters(config: ModelConfig) -> Iterator[Parameter]:
    """Every tensor of the model, router biases included, in the order of the layers."""
    vocab, hidden, depth = config.vocab_size, config.hidden_size, config.num_hidden_layers
    top = {"model.embed_tokens": (vocab, hidden), "model.norm": (hidden,), "lm_head": (vocab, hidden)}
    for name, shape in top.items():
        yield Parameter(f"{name}.weight", shape, [(f"{name}.weight", ...)])
    for layer in range(depth + config.num_nextn_predict_layers):
        there = f"model.layers.{layer}."
        here = there if layer < depth else f"mtp.{layer - depth}."
        for name, shape in _block(config, layer).items():
            yield Parameter(here + name, shape, [(there + name, ...)])
        if layer >= config.first_k_dense_replace:
            yield from _experts(config, f"{here}mlp.experts.", f"{there}mlp.experts.")


def _block(config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a layer without its routed experts."""
    hidden, heads, mtp = config.hidden_size, config.num_attention_heads, layer >= config.num_hidden_layers
    latent, rope, value = config.kv_lora_rank, config.qk_rope_head_dim, config.v_head_dim
    weights: dict[str, tuple[int, ...]] = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    if config.q_lora_rank is None:
        weights["self_attn.q_proj"] = (heads * config.qk_head_dim, hidden)
    else:
        weights["self_attn.q_a_proj"] = (config.q_lora_rank, hidden)
        weights["self_attn.q_a_layernorm"] = (config.q_lora_rank,)
        weights["self_attn.q_b_proj"] = (heads * config.qk_head_dim, config.q_lora_rank)
    weights["self_attn.kv_a_proj_with_mqa"] = (latent + rope, hidden)
    weights["self_attn.kv_a_layernorm"] = (latent,)
    weights["self_attn.kv_b_proj"] = (heads * (config.qk_nope_head_dim + value), latent)
    weights["self_attn.o_proj"] = (hidden, heads * value)
    dense = layer < config.first_k_dense_replace
    mlp = "mlp." if dense else "mlp.shared_experts."
    width = config.intermediate_size if dense else config.n_shared_experts * config.moe_intermediate_size
    weights |= {mlp + name: (width, hidden) for name in ("gate_proj", "up_proj")}
    weights[f"{mlp}down_proj"] = (hidden, width)
    if mtp:
        weights |= dict.fromkeys(("enorm", "hnorm", "shared_head.norm"), (hidden,))
        weights["eh_proj"] = (hidden, 2 * hidden)
    if not dense:
        weights["mlp.gate"] = (config.n_routed_experts, hidden)
    bias = {} if dense else {BIAS: (config.n_routed_experts,)}
    return {f"{name}.weight": shape for name, shape in weights.items()} | bias


def _experts(config: ModelConfig, here: str, there: str) -> Iterator[Parameter]:
    num, width, hidden = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
    gate = [(f"{there}{e}.gate_proj.weight", (e, slice(None, width))) for e in range(num)]
    up = [(f"{there}{e}.up_proj.weight", (e, slice(width, None))) for e in range(num)]
    down = [(f"{there}{e}.down_proj.weight", e) for e in range(num)]
    yield Parameter(f"{here}gate_up_proj", (num, 2 * width, hidden), gate + up)
    yield Parameter(f"{here}down_proj", (num, hidden, width), down)


def _mtp_copies(config: ModelConfig) -> dict[str, str]:
    """Names of the repeated embedding and head in a file: the name of the original."""
    copies = {}
    for layer in range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers):
        copies[f"model.layers.{layer}.embed_tokens.weight"] = "model.embed_tokens.weight"
        copies[f"model.layers.{layer}.shared_head.head.weight"] = "lm_head.weight"
    return copies


def to_checkpoint(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Tensors under their official names: views of `state`, nothing is copied. KeyError if `state` is incomplete."""
    tensors = {there: state[p.name][index] for p in parameters(config) for there, index in p.slices}
    tensors |= {name: tensor.float() for name, tensor in tensors.items() if name.endswith(BIAS)}
    return tensors | {copy: tensors[original] for copy, original in _mtp_copies(config).items()}


def from_checkpoint(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Tensors under their names in memory, in the file's dtype (router biases fp32); stacked experts are new tensors.

    Raises CheckpointError naming what is missing, unknown or of another shape than `config` says.
    """
    # Some bytes of config.json can ask for millions of tensors: refused before they are listed.
    moe = config.num_hidden_layers - config.first_k_dense_replace + config.num_nextn_predict_layers
    wanted = config.num_hidden_layers + 3 * config.n_routed_experts * moe
    if len(tensors) < wanted and (tensors or wanted > 2**20):
        raise CheckpointError(
            f"{len(tensors)} tensors, too few for the {config.num_hidden_layers} layers and {config.n_routed_experts} "
            "experts of the config"
        )
    table = list(parameters(config))
    _check_names(tensors, {there for p in table for there, _ in p.slices}, config)
    for p in table:
        if math.prod(p.shape) >= 2**48:  # beyond any model, and in the end beyond what torch can count
            raise CheckpointError(f"{p.name} would have shape {list(p.shape)} by the config: too large")
        like = torch.empty(p.shape, device="meta")
        for there, index in p.slices:
            if tensors[there].shape != like[index].shape:
                raise CheckpointError(
                    f"{there} has shape {list(tensors[there].shape)}, the config wants {list(like[index].shape)}"
                )
            if tensors[there].dtype not in WEIGHTS:
                raise CheckpointError(f"{there} is of {tensors[there].dtype}, which holds no weights")
    for copy, original in _mtp_copies(config).items():
        same = copy not in tensors or tensors[copy].dtype == tensors[original].dtype
        if not same or (copy in tensors and not torch.equal(tensors[copy], tensors[original])):
            log.warning("%s differs from %s, which is used in its place", copy, original)
    state = {}
    for p in table:
        if len(p.slices) == 1 and p.slices[0][1] is ...:
            tensor = tensors[p.slices[0][0]]
        else:
            dtype = reduce(torch.promote_types, {tensors[there].dtype for there, _ in p.slices})
            tensor = torch.empty(p.shape, dtype=dtype)
            for there, index in p.slices:
                tensor[index] = tensors[there]
        state[p.name] = tensor.float() if p.name.endswith(BIAS) else tensor
    return state


def _check_names(tensors: Iterable[str], wanted: set[str], config: ModelConfig) -> None:
    found = set(tensors)
    if missing := wanted - found:
        raise CheckpointError(f"{len(missing)} tensors are missing: {_first(missing)}")
    unknown = {name for name in found - wanted - _mtp_copies(config).keys() if not name.endswith("rotary_emb.inv_freq")}
    if not config.num_nextn_predict_layers:
        unknown = {name for name in unknown if _layer(name) < config.num_hidden_layers}
    if unknown:
        raise CheckpointError(f"{len(unknown)} tensors have no place in the configured model: {_first(unknown)}")


def _first(names: set[str]) -> str:
    return ", ".join(map(plain, sorted(names)[:3])) + (", ..." if len(names) > 3 else "")


def _layer(name: str) -> int:
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return int(match[1]) if match else -1


# -------------------------------------------------------------------------------------------------------------- config


def hf_config(
    config: ModelConfig, *, dtype: str, bos_token_id: int | None, eos_token_id: int | list[int] | None
) -> dict[str, Any]:
    """`config.json`, with exactly the official keys; `dtype` ("float32") is what the file holds.

    The legacy keys `rope_theta`, `rope_scaling` and `torch_dtype`: everything reads them, the new ones not yet.
    """
    given = {"torch_dtype": dtype, "bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
    values = config.model_dump() | HF_FIXED | HF_CONSTANTS | given | {"num_key_value_heads": config.num_attention_heads}
    return {key: values[key] for key in HF_KEYS}


def model_config(hf: Mapping[str, Any], names: Iterable[str] | None = None) -> ModelConfig:
    """The model that a `config.json` describes, in the legacy form or in that of transformers 5.

    `names` are the tensors of the file: without a tensor of an MTP layer among them the depth is 0, whatever the config
    says (transformers saves the number but drops the layers). Raises UserError for what this model cannot represent.
    """
    if hf.get("model_type") != "deepseek_v3":
        raise UserError(f"config.json: model_type is {shown(hf.get('model_type'))}, only 'deepseek_v3' is supported")
    if hf.get("quantization_config"):
        raise UserError("config.json: quantization_config is set; convert the quantised weights to bf16 first")
    values = {key: hf.get(key, default) for key, default in HF_DEFAULTS.items()}
    for key, only in (HF_FIXED | {"num_key_value_heads": values["num_attention_heads"]}).items():
        if hf.get(key, only) != only and not (key == "num_key_value_heads" and hf[key] is None):
            raise UserError(f"config.json: {key} is {shown(hf[key])}, only {only!r} is supported")
    dense, layers = values["first_k_dense_replace"], values["num_hidden_layers"]
    if isinstance(dense, int) and isinstance(layers, int) and dense > layers > 0:
        values["first_k_dense_replace"] = layers  # all dense
    depth = hf.get("num_nextn_predict_layers", hf.get("num_mtp_layers", 1)) or 0
    values |= {"num_nextn_predict_layers": depth, "aux_loss_alpha": hf.get("aux_loss_alpha") or 0.0} | _rope(hf)
    try:
        config = ModelConfig(**values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        where = f"config.json: {key} is {shown(first['input'])}: " if key else "config.json: "
        raise UserError(where + first["msg"].removeprefix("Value error, ").replace("model.", "")) from None
    if names is not None and not any(_layer(name) >= config.num_hidden_layers for name in names):
        config = config.model_copy(update={"num_nextn_predict_layers": 0})
    return config


def _rope(hf: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, from legacy keys or transformers 5's `rope_parameters`, with its defaults."""
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    unknown = set(rope) - ROPE_KEYS if isinstance(rope, dict) else {shown(rope)}
    if unknown:
        raise UserError(f"config.json: {_first(unknown)} in the rotary parameters is not supported")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "yarn"):
        raise UserError(f"config.json: rotary type {shown(kind)} is not supported, only 'default' and 'yarn'")
    for key, only in {"attention_factor": None, "truncate": True, "partial_rotary_factor": 1}.items():
        if rope.get(key, hf.get(key, only)) != only:
            raise UserError(f"config.json: {key} of the rotary embedding is not supported, only {only!r}")
    theta = rope.get("rope_theta", hf.get("rope_theta", 10000.0))
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    longest = hf.get("max_position_embeddings", HF_DEFAULTS["max_position_embeddings"])
    original = hf.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings") or longest
    mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim") or 0.0
    yarn = {
        "factor": rope.get("factor"),
        "original_max_position_embeddings": original,
        "beta_fast": rope.get("beta_fast") or 32,
        "beta_slow": rope.get("beta_slow") or 1,
        # transformers ignores either of the two without the other for cos and sin; DeepSeek's default for mscale is 1
        "mscale": (0.0 if all_dim else 1.0) if mscale is None else mscale,
        "mscale_all_dim": all_dim,
    }
    return {"rope_theta": theta, "rope_scaling": yarn}


# --------------------------------------------------------------------------------------------------------- directories


def load(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Configuration and weights, under their names in memory, of a checkpoint or any DeepSeek-V3 model directory."""
    hf, tensors = checkpoint.read_json(path / "config.json"), checkpoint.load(path)
    embedding = tensors.get("model.embed_tokens.weight")
    if hf.get("tie_word_embeddings") and embedding is not None:
        tensors.setdefault("lm_head.weight", embedding.clone())  # ours is untied: two tensors, equal at first
    try:
        config = model_config(hf, tensors)
        return config, from_checkpoint(tensors, config)
    except UserError as error:
        raise type(error)(f"{path}: {error}") from None
