"""Names, shapes and configs in both directions, against what transformers writes and reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

import checkpoint
import convert
from checkpoint import CheckpointError
from config import ModelConfig, UserError, YarnConfig
from model import DeepSeekV3

TINY: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "q_lora_rank": 10,
    "kv_lora_rank": 14, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 9, "intermediate_size": 20,
    "moe_intermediate_size": 8, "n_routed_experts": 6, "num_experts_per_tok": 2, "max_position_embeddings": 64,
}  # fmt: skip
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "no q latent": {"q_lora_rank": None},
    "no MTP": {"num_nextn_predict_layers": 0},
    "two MTP layers": {"num_nextn_predict_layers": 2},
    "all dense": {"first_k_dense_replace": 3},
    "no dense, two shared": {"first_k_dense_replace": 0, "n_shared_experts": 2},
    "groups": {"n_group": 3, "topk_group": 2},
    "yarn": {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.5}, "rope_theta": 5e4},
}
TOKENS = {"bos_token_id": 3, "eos_token_id": 4}


def tiny(**changes: Any) -> ModelConfig:
    return ModelConfig(**(TINY | changes))


def random_state(config: ModelConfig) -> dict[str, Tensor]:
    """The model's own tensors, all of them random, router biases too."""
    torch.manual_seed(0)
    return {name: torch.randn_like(tensor) for name, tensor in DeepSeekV3(config).state_dict().items()}


def write(path: Path, state: dict[str, Tensor], config: ModelConfig, *, max_shard_bytes: int = 10**9) -> Path:
    hf = convert.hf_config(config, dtype="float32", **TOKENS)
    files = {"config.json": json.dumps(hf).encode()}
    model = convert.to_checkpoint(state, config)
    return checkpoint.save(path, 1, {"model": model}, files, keep=1, max_shard_bytes=max_shard_bytes)


def equal(ours: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return ours.keys() == others.keys() and all(
        ours[k].dtype == others[k].dtype and torch.equal(ours[k], others[k]) for k in ours
    )


# ------------------------------------------------------------------------------------------------------------- tensors


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_the_table_is_the_model(changes: dict[str, Any]) -> None:
    config = tiny(**changes)
    with torch.device("meta"):
        state = DeepSeekV3(config).state_dict()
    assert {p.name: p.shape for p in convert.parameters(config)} == {name: tuple(t.shape) for name, t in state.items()}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_there_and_back(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = tiny(**changes)
    state = random_state(config)
    assert equal(convert.from_checkpoint(convert.to_checkpoint(state, config), config), state)
    loaded_config, loaded = convert.load(write(tmp_path, state, config))
    assert loaded_config == config
    assert equal(loaded, state)


def test_official_names_and_shapes() -> None:
    """Written out: layer 0 dense, layer 1 MoE, layer 2 MTP."""
    config = tiny(num_hidden_layers=2)
    found = {name: tuple(t.shape) for name, t in convert.to_checkpoint(random_state(config), config).items()}
    attention = {
        "input_layernorm": (24,), "post_attention_layernorm": (24,), "self_attn.q_a_proj": (10, 24),
        "self_attn.q_a_layernorm": (10,), "self_attn.q_b_proj": (20, 10), "self_attn.kv_a_proj_with_mqa": (18, 24),
        "self_attn.kv_a_layernorm": (14,), "self_attn.kv_b_proj": (30, 14), "self_attn.o_proj": (24, 18),
    }  # fmt: skip
    dense = {"mlp.gate_proj": (20, 24), "mlp.up_proj": (20, 24), "mlp.down_proj": (24, 20)}
    moe: dict[str, tuple[int, ...]] = {"mlp.gate": (6, 24)}
    for mlp in ["mlp.shared_experts", *(f"mlp.experts.{e}" for e in range(6))]:
        moe |= {f"{mlp}.gate_proj": (8, 24), f"{mlp}.up_proj": (8, 24), f"{mlp}.down_proj": (24, 8)}
    mtp = {"enorm": (24,), "hnorm": (24,), "shared_head.norm": (24,), "eh_proj": (24, 48)}
    mtp |= {"embed_tokens": (61, 24), "shared_head.head": (61, 24)}
    wanted = {"model.embed_tokens.weight": (61, 24), "model.norm.weight": (24,), "lm_head.weight": (61, 24)}
    for layer, parts in enumerate((attention | dense, attention | moe, attention | moe | mtp)):
        wanted |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in parts.items()}
    wanted |= {f"model.layers.{layer}.mlp.gate.e_score_correction_bias": (6,) for layer in (1, 2)}
    assert found == wanted


def test_official_tensor_count() -> None:
    """DeepSeek-V3's own files hold 91,991 tensors, an FP8 scale beside each quantised matrix."""
    config = ModelConfig(num_hidden_layers=61, n_routed_experts=256, first_k_dense_replace=3)
    names = [there for p in convert.parameters(config) for there, _ in p.slices] + list(convert._mtp_copies(config))
    quantised = [n for n in names if ".self_attn." in n or ".mlp." in n]
    quantised = [n for n in quantised if "layernorm" not in n and ".mlp.gate." not in n]
    assert len(names) == len(set(names))
    assert len(names) + len(quantised) == 91_991


def test_conversion_copies_nothing_and_biases_stay_fp32() -> None:
    config = tiny()
    state = {name: t.bfloat16() for name, t in random_state(config).items()}
    tensors = convert.to_checkpoint(state, config)
    stacked = state["mtp.0.mlp.experts.gate_up_proj"]
    part = tensors["model.layers.3.mlp.experts.5.up_proj.weight"]
    assert part.untyped_storage().data_ptr() == stacked.untyped_storage().data_ptr()
    assert torch.equal(part, stacked[5, 8:])
    for name, tensor in (tensors | convert.from_checkpoint(tensors, config)).items():
        assert tensor.dtype == (torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16)


def test_missing_unknown_and_misshapen_tensors() -> None:
    config = tiny()
    tensors = convert.to_checkpoint(random_state(config), config)

    def without(*names: str) -> dict[str, Tensor]:
        return {name: t for name, t in tensors.items() if name not in names}

    with pytest.raises(CheckpointError, match=r"1 tensors are missing: model\.norm\.weight$"):
        convert.from_checkpoint(without("model.norm.weight"), config)
    with pytest.raises(CheckpointError, match=r"\d+ tensors are missing: lm_head\.weight, .*, \.\.\.$"):
        convert.from_checkpoint({}, config)
    with pytest.raises(CheckpointError, match=r"have no place .*model\.layers\.0\.self_attn\.q_proj\.bias"):
        convert.from_checkpoint(tensors | {"model.layers.0.self_attn.q_proj.bias": torch.ones(1)}, config)
    for name in ("model.norm.weight", "model.layers.1.mlp.experts.2.up_proj.weight"):
        with pytest.raises(CheckpointError, match=rf"{name} has shape \[2, 3\], the config wants \["):
            convert.from_checkpoint(tensors | {name: torch.ones(2, 3)}, config)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is of torch\.int64, which holds no weights"):
        convert.from_checkpoint(tensors | {"model.norm.weight": torch.ones(24, dtype=torch.int64)}, config)
    with pytest.raises(KeyError):
        convert.to_checkpoint({}, config)


@pytest.mark.parametrize("claim", [{"n_routed_experts": 10**12}, {"num_hidden_layers": 10**12}])
def test_a_config_that_claims_too_much_is_refused_at_once(claim: dict[str, int]) -> None:
    """Some bytes of config.json must not make us list a trillion names."""
    config = tiny()
    tensors = convert.to_checkpoint(random_state(config), config)
    with pytest.raises(CheckpointError, match="too few for the"):
        convert.from_checkpoint(tensors, config.model_copy(update=claim))


def test_tensors_that_may_be_there_or_not(caplog: pytest.LogCaptureFixture) -> None:
    config = tiny()
    state = random_state(config)
    tensors = convert.to_checkpoint(state, config)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    del tensors["model.layers.3.embed_tokens.weight"]
    assert equal(convert.from_checkpoint(tensors, config), state)
    assert not caplog.records
    tensors["model.layers.3.shared_head.head.weight"] = torch.zeros(61, 24)
    assert equal(convert.from_checkpoint(tensors, config), state)
    assert "model.layers.3.shared_head.head.weight differs from lm_head.weight" in caplog.text
    without_mtp = {name: t for name, t in state.items() if not name.startswith("mtp.")}
    assert equal(convert.from_checkpoint(tensors, tiny(num_nextn_predict_layers=0)), without_mtp)


def test_experts_of_different_dtypes_lose_nothing() -> None:
    config = tiny()
    tensors = convert.to_checkpoint(random_state(config), config)
    name = "model.layers.1.mlp.experts.0.down_proj.weight"
    tensors[name] = tensors[name].bfloat16()
    stacked = convert.from_checkpoint(tensors, config)["model.layers.1.mlp.experts.down_proj"]
    assert stacked.dtype == torch.float32
    assert torch.equal(stacked[1], tensors[name.replace("experts.0", "experts.1")])


# -------------------------------------------------------------------------------------------------------- transformers


def main_part(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without MTP our names are those of transformers in memory, stacked experts included."""
    return {name: t for name, t in state.items() if not name.startswith("mtp.")}


def hf_model(config: ModelConfig, **changes: Any) -> DeepseekV3ForCausalLM:
    """A transformers model with random weights and random router biases."""
    keys = config.model_dump(exclude={"aux_loss_alpha"}, exclude_none=True) | {"q_lora_rank": config.q_lora_rank}
    hf = DeepseekV3Config(**keys, num_key_value_heads=config.num_attention_heads, **changes)
    torch.manual_seed(1)
    model = DeepseekV3ForCausalLM(hf)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.normal_()
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_widths_that_transformers_takes(dtype: torch.dtype) -> None:
    """As configs/README.md has them."""
    for widths, implementation in (((24, 8), "grouped_mm"), ((18, 6), "eager")):
        config = tiny(hidden_size=widths[0], moe_intermediate_size=widths[1])
        model = hf_model(config, experts_implementation=implementation).to(dtype)  # type: ignore[arg-type]
        assert model.config._experts_implementation == implementation
        assert model(torch.arange(8)[None]).logits.shape == (1, 8, config.vocab_size)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_transformers_reads_what_we_write(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = tiny(**changes)
    state = random_state(config)
    path = write(tmp_path, state, config, max_shard_bytes=9_000)
    assert len(list(path.glob("model-*.safetensors"))) > 1
    loaded: Any = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    model, info = loaded
    assert isinstance(model, DeepseekV3ForCausalLM)
    assert model.dtype == torch.float32
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert not info["error_msgs"]
    assert all(convert._layer(name) >= config.num_hidden_layers for name in info["unexpected_keys"])
    assert equal(dict(model.state_dict()), main_part(state))
    assert (model.config.bos_token_id, model.config.eos_token_id) == (3, 4)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_we_read_what_transformers_writes(tmp_path: Path, changes: dict[str, Any]) -> None:
    """`save_pretrained` drops the MTP layers and keeps their number; and back again, bit for bit."""
    config = tiny(**changes)
    theirs = hf_model(config)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    loaded, state = convert.load(tmp_path / "theirs")
    unused = {"num_nextn_predict_layers": 0, "aux_loss_alpha": 0.0}  # neither is in what transformers saved
    assert loaded == config.model_copy(update=unused)
    assert equal(state, dict(theirs.state_dict()))
    again = AutoModelForCausalLM.from_pretrained(write(tmp_path, state, loaded))
    assert equal(dict(again.state_dict()), dict(theirs.state_dict()))
    tokens = torch.arange(12)[None]
    assert torch.equal(again(tokens).logits, theirs.eval()(tokens).logits)


def test_tied_embeddings_become_two_tensors(tmp_path: Path) -> None:
    theirs = hf_model(tiny(), tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path / "theirs")
    assert "lm_head.weight" not in checkpoint.load(tmp_path / "theirs")
    config, state = convert.load(tmp_path / "theirs")
    head, embedding = state["lm_head.weight"], state["model.embed_tokens.weight"]
    assert torch.equal(head, embedding)
    assert head.data_ptr() != embedding.data_ptr()
    assert equal(dict(AutoModelForCausalLM.from_pretrained(write(tmp_path, state, config)).state_dict()), state)


def test_bf16_directory(tmp_path: Path) -> None:
    hf_model(tiny()).bfloat16().save_pretrained(tmp_path)
    _, state = convert.load(tmp_path)
    for name, tensor in state.items():
        assert tensor.dtype == (torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16)


def test_errors_name_the_directory(tmp_path: Path) -> None:
    config = tiny()
    path = write(tmp_path, random_state(config), config)
    hf = json.loads((path / "config.json").read_text())
    for change, reason in (({"hidden_act": "gelu"}, "hidden_act"), ({"n_routed_experts": 3}, "have no place")):
        (path / "config.json").write_text(json.dumps(hf | change))
        with pytest.raises(UserError, match=rf"step_00000001: .*{reason}"):
            convert.load(path)


# -------------------------------------------------------------------------------------------------------------- config


def test_config_json_of_mini() -> None:
    """Key by key and in the official order."""
    wanted = """{"architectures":["DeepseekV3ForCausalLM"],"model_type":"deepseek_v3","vocab_size":50304,
    "hidden_size":768,
    "num_hidden_layers":12,"num_attention_heads":8,"num_key_value_heads":8,"q_lora_rank":512,"kv_lora_rank":256,
    "qk_nope_head_dim":64,"qk_rope_head_dim":64,"v_head_dim":128,"intermediate_size":1792,"moe_intermediate_size":256,
    "n_routed_experts":64,"n_shared_experts":1,"num_experts_per_tok":6,"first_k_dense_replace":1,"moe_layer_freq":1,
    "n_group":1,"topk_group":1,"topk_method":"noaux_tc","scoring_func":"sigmoid","norm_topk_prob":true,
    "routed_scaling_factor":2.446,"moe_router_dtype":"float32","num_nextn_predict_layers":1,"hidden_act":"silu",
    "rms_norm_eps":1e-06,"attention_bias":false,"attention_dropout":0.0,"tie_word_embeddings":false,
    "max_position_embeddings":4096,"rope_theta":10000.0,"rope_scaling":null,"rope_interleave":true,
    "initializer_range":0.006,"aux_loss_alpha":0.0001,"seq_aux":true,"ep_size":1,"pretraining_tp":1,"use_cache":true,
    "bos_token_id":50256,"eos_token_id":50256,"torch_dtype":"float32"}"""
    hf = convert.hf_config(ModelConfig(), dtype="float32", bos_token_id=50256, eos_token_id=50256)
    assert json.dumps(hf) == json.dumps(json.loads(wanted))


def test_config_with_yarn() -> None:
    yarn = YarnConfig(factor=40, original_max_position_embeddings=4096)
    hf = convert.hf_config(ModelConfig(rope_scaling=yarn), dtype="bfloat16", bos_token_id=None, eos_token_id=[1, 2])
    official = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "type": "yarn"}
    assert hf["rope_scaling"] == official | {"original_max_position_embeddings": 4096}
    assert (hf["torch_dtype"], hf["bos_token_id"], hf["eos_token_id"]) == ("bfloat16", None, [1, 2])


def test_absent_keys_mean_what_transformers_takes_them_for() -> None:
    theirs = DeepseekV3Config().to_dict()
    assert convert.model_config(theirs) == convert.model_config({"model_type": "deepseek_v3"})
    assert {key: theirs[key] for key in convert.HF_DEFAULTS} == convert.HF_DEFAULTS
    ours = convert.model_config({"model_type": "deepseek_v3"})
    assert (ours.num_nextn_predict_layers, ours.rope_theta, ours.rope_scaling) == (1, 10000.0, None)


@pytest.mark.parametrize(
    ("rope", "wanted"),
    [
        ({"rope_theta": 5e4}, (5e4, None)),
        ({"rope_scaling": None, "rope_theta": 5e4}, (5e4, None)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}, (5e4, None)),
        ({"rope_scaling": {"type": "default", "rope_theta": 7.0}, "rope_theta": 5e4}, (7.0, None)),
        ({"rope_scaling": {"type": "yarn"} | YARN}, (1e4, YARN | {"mscale_all_dim": 0})),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 9.0} | YARN}, (9.0, YARN | {"mscale_all_dim": 0})),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2, "mscale_all_dim": 1, "beta_fast": None, "truncate": True}},
            (1e4, {"factor": 2, "original_max_position_embeddings": 4096, "mscale": 0, "mscale_all_dim": 1}),
        ),
        (
            {"rope_scaling": YARN | {"type": "yarn"}, "original_max_position_embeddings": 99},
            (1e4, {"factor": 4, "original_max_position_embeddings": 99, "mscale_all_dim": 0}),
        ),
    ],
)
def test_rotary_forms(rope: dict[str, Any], wanted: tuple[float, dict[str, Any] | None]) -> None:
    config = convert.model_config({"model_type": "deepseek_v3"} | rope)
    theta, yarn = wanted
    assert config.rope_theta == theta
    assert config.rope_scaling == (YarnConfig(**yarn) if yarn else None)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "deepseek_v2"}, "model_type is 'deepseek_v2'"),
        ({"model_type": None}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', only 'silu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"scoring_func": "softmax"}, "scoring_func"),
        ({"topk_method": "greedy"}, "topk_method"),
        ({"rope_interleave": False}, "rope_interleave"),
        ({"moe_layer_freq": 2}, "moe_layer_freq"),
        ({"num_key_value_heads": 1}, "num_key_value_heads is 1, only 2"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rotary type 'linear'"),
        ({"rope_scaling": {"type": "yarn", "factor": None}}, "rope_scaling.factor is null"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "attention_factor": 1.5}}, "attention_factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "truncate": False}}, "truncate"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "full_attention"),
        ({"rope_scaling": "yarn"}, "'yarn'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_size": -3}, "hidden_size is -3"),
        ({"n_shared_experts": None}, "n_shared_experts is null"),
        ({"num_hidden_layers": "many"}, "num_hidden_layers is 'many'"),
        ({"n_group": 4}, "n_routed_experts.*6.*n_group.*4"),
    ],
)
def test_what_the_model_cannot_represent(change: dict[str, Any], named: str) -> None:
    hf = convert.hf_config(tiny(), dtype="float32", **TOKENS)
    assert convert.model_config(hf) == tiny()
    with pytest.raises(UserError, match=named) as error:
        convert.model_config(hf | change)
    assert "\n" not in str(error.value)


def test_mtp_depth_follows_the_tensors() -> None:
    hf = convert.hf_config(tiny(), dtype="float32", **TOKENS)
    main, mtp = "model.layers.2.eh_proj.weight", "model.layers.3.eh_proj.weight"

    def depth(names: list[str] | None, **changes: Any) -> int:
        return convert.model_config(hf | changes, names).num_nextn_predict_layers

    assert depth(None) == depth([main, mtp]) == 1
    assert depth([main]) == 0
    assert depth([mtp], num_nextn_predict_layers=2) == 2
    assert depth([mtp], num_nextn_predict_layers=0) == 0
    del hf["num_nextn_predict_layers"]
    assert depth(None) == depth([mtp]) == 1
    assert depth([main]) == 0
    assert depth([mtp], num_mtp_layers=3) == 3
