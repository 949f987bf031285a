"""scripts/export.py: what it writes, from what, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import checkpoint
import convert
from config import ModelConfig
from model import DeepSeekV3

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "export.py"
CONFIG = ModelConfig(
    vocab_size=64, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, q_lora_rank=10, kv_lora_rank=14,
    qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=9, intermediate_size=20, moe_intermediate_size=8,
    n_routed_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
)  # fmt: skip


def load_script() -> Any:
    spec = importlib.util.spec_from_file_location("export_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_script()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with one checkpoint: random weights and router biases, a tokenizer, training state."""
    torch.manual_seed(0)
    state = {name: torch.randn_like(tensor) for name, tensor in DeepSeekV3(CONFIG).state_dict().items()}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))).save_pretrained(
        tmp_path / "tokenizer"
    )
    files = {file.name: file.read_bytes() for file in (tmp_path / "tokenizer").iterdir()}
    hf = convert.hf_config(CONFIG, dtype="float32", bos_token_id=1, eos_token_id=2)
    files |= {"config.json": json.dumps(hf).encode(), "generation_config.json": b'{"bos_token_id": 1}'}
    tensors = {"model": convert.to_checkpoint(state, CONFIG), "optimizer": {"momentum": torch.ones(3)}}
    checkpoint.save(tmp_path / "run" / "checkpoints", 7, tensors, files | {"training_state.json": b"{}"}, keep=1)
    return tmp_path / "run"


def export(*arguments: object) -> int:
    return script.main([str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_dtypes(run: Path, tmp_path: Path, name: str, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "out"
    assert export("--checkpoint", run, "--out", out, "--dtype", name) == 0
    assert str(out) in capsys.readouterr().out
    source = checkpoint.load(run / "checkpoints" / "step_00000007")
    written = checkpoint.load(out)
    assert written.keys() == source.keys()
    for key, tensor in written.items():
        wanted = torch.float32 if key.endswith("e_score_correction_bias") else dtype
        assert tensor.dtype == wanted
        assert torch.equal(tensor, source[key].to(wanted))
    hf = checkpoint.read_json(out / "config.json")
    assert hf["torch_dtype"] == str(dtype).removeprefix("torch.")
    assert hf["num_nextn_predict_layers"] == 1
    assert (hf["bos_token_id"], hf["eos_token_id"]) == (1, 2)
    loaded: Any = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    model, info = loaded
    assert model.dtype == dtype
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert AutoTokenizer.from_pretrained(out).vocab_size == 2


def test_without_mtp_and_training_state(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()  # empty: welcome
    assert export("--checkpoint", run / "checkpoints" / "step_00000007", "--out", out, "--no-mtp") == 0
    names = {path.name for path in out.iterdir()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip
    config, state = convert.load(out)
    assert config == CONFIG.model_copy(update={"num_nextn_predict_layers": 0})
    assert all(tensor.dtype == torch.bfloat16 for name, tensor in state.items() if not name.endswith("bias"))
    assert checkpoint.read_json(out / "config.json")["num_nextn_predict_layers"] == 0
    assert not any(convert._layer(name) >= 2 for name in checkpoint.load(out))


def test_from_a_model_directory_of_transformers(run: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(run / "checkpoints" / "step_00000007").save_pretrained(tmp_path / "theirs")
    assert export("--checkpoint", tmp_path / "theirs", "--out", tmp_path / "out", "--dtype", "fp32") == 0
    hf = checkpoint.read_json(tmp_path / "out" / "config.json")
    assert list(hf) == convert.HF_KEYS
    assert hf["num_nextn_predict_layers"] == 0
    source = checkpoint.load(run / "checkpoints" / "step_00000007")
    for name, tensor in checkpoint.load(tmp_path / "out").items():
        assert torch.equal(tensor, source[name])


def test_refusals(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(reason: str, *arguments: object) -> None:
        before = sorted(tmp_path.rglob("*"))
        assert export(*arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert reason in error
        assert sorted(tmp_path.rglob("*")) == before

    out = tmp_path / "out"
    refused("is the working directory", "--checkpoint", run, "--out", ".")
    refused("too long", "--checkpoint", run, "--out", "a" * 300)
    refused("too long", "--checkpoint", "a" * 300, "--out", out)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    refused("not an empty directory", "--checkpoint", run, "--out", tmp_path / "full")
    refused("not an empty directory", "--checkpoint", run, "--out", tmp_path / "full" / "thesis.txt")
    refused("no such directory", "--checkpoint", tmp_path / "nothing", "--out", out)
    refused("no model here", "--checkpoint", tmp_path / "full", "--out", out)
    refused("--out", "--checkpoint", run, "--out", tmp_path / "full" / "thesis.txt" / "below")
    refused("invalid choice: 'int4'", "--checkpoint", run, "--out", out, "--dtype", "int4")

    large = tmp_path / "large"
    shutil.copytree(run / "checkpoints" / "step_00000007", large)
    (large / "manifest.json").unlink()
    tensors = checkpoint.load(large)
    tensors["model.norm.weight"] = torch.full((24,), 70_000.0)
    (large / "model.safetensors").unlink()
    checkpoint.write(large, {"model": tensors}, {})
    refused(
        "model.norm.weight has values beyond 65504; use bf16", "--checkpoint", large, "--out", out, "--dtype", "fp16"
    )
    (large / "config.json").write_text('{"model_type": "llama"}')
    refused("only 'deepseek_v3'", "--checkpoint", large, "--out", out)
    shutil.copyfile(SCRIPT, run / "checkpoints" / "step_00000007" / "model.safetensors")
    refused("all of them damaged", "--checkpoint", run, "--out", out)


def test_as_a_program(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--checkpoint", "nothing", "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: nothing: no such directory"), done.stderr
