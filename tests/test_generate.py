"""generate.py: cache against plain loops, samples against their distribution, loading against transformers, CLI."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

import checkpoint
import convert
import generate
import tokenizer
from config import ModelConfig, UserError
from model import DeepSeekV3, init_weights
from text import prompt_ids, safe_text

ROOT = Path(__file__).resolve().parent.parent
TINY: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "q_lora_rank": 12,
    "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "intermediate_size": 32,
    "moe_intermediate_size": 16, "n_routed_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 64,
    "initializer_range": 0.3,
}  # fmt: skip
YARN = {"factor": 4.0, "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 1.0}
PROMPTS = [[5], [7, 8, 9, 10, 11, 12, 13], [20, 21, 22]]


def build(seed: int = 0, **changes: Any) -> DeepSeekV3:
    """Random weights, router biases not zero."""
    model = DeepSeekV3(ModelConfig(**(TINY | changes)))
    init_weights(model, seed)
    generator = torch.Generator().manual_seed(seed)
    for buffer in model.buffers():
        buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def model() -> DeepSeekV3:
    return build()


def uncached(model: DeepSeekV3, prompt: list[int], num_tokens: int) -> list[int]:
    """Greedy by full forward passes."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(num_tokens):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


# ------------------------------------------------------------------------------------------------------------ generate


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None, "num_nextn_predict_layers": 0}, {"rope_scaling": YARN}])
def test_greedy_on_ragged_rows_equals_the_loop_without_cache(changes: dict[str, Any]) -> None:
    model = build(**changes)
    rows = generate.generate(model, PROMPTS, max_new_tokens=12)
    assert rows == [uncached(model, prompt, 12) for prompt in PROMPTS]
    assert rows == [generate.generate(model, [prompt], max_new_tokens=12)[0] for prompt in PROMPTS]


def test_rows_end_at_eos_one_by_one(model: DeepSeekV3) -> None:
    free = generate.generate(model, PROMPTS, max_new_tokens=20)
    eos = {free[0][3], free[2][9]}
    seen: list[tuple[int, int]] = []
    rows = generate.generate(
        model, PROMPTS, max_new_tokens=20, eos_ids=eos, on_token=lambda *row_token: seen.append(row_token)
    )
    for row, whole in zip(rows, free, strict=True):
        end = next((i for i, token in enumerate(whole) if token in eos), 20)
        assert row == whole[:end]  # without EOS
    assert len({len(row) for row in rows}) > 1
    assert [[token for at, token in seen if at == row] for row in range(3)] == rows
    assert [row for row, _ in seen[:3]] == [0, 1, 2]  # as they come, not row by row


def test_ended_rows_leave_the_batch(model: DeepSeekV3, monkeypatch: pytest.MonkeyPatch) -> None:
    free = generate.generate(model, PROMPTS, max_new_tokens=8)
    sizes = []
    hidden = DeepSeekV3.hidden

    def counted(self: DeepSeekV3, tokens: torch.Tensor, **kwargs: Any) -> Any:
        sizes.append(tokens.shape)
        return hidden(self, tokens, **kwargs)

    monkeypatch.setattr(DeepSeekV3, "hidden", counted)
    generate.generate(model, PROMPTS, max_new_tokens=8, eos_ids={free[1][0]})
    assert sizes[0] == (3, 7) and sizes[1][0] < 3 and all(shape[1] == 1 for shape in sizes[1:])
    sizes.clear()
    generate.generate(model, PROMPTS, max_new_tokens=5)
    assert len(sizes) == 5  # the last token is not fed


def test_what_equals_greedy(model: DeepSeekV3) -> None:
    greedy = generate.generate(model, PROMPTS, max_new_tokens=10)
    same: list[dict[str, Any]] = [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-300}]
    for sampling in same:
        assert generate.generate(model, PROMPTS, max_new_tokens=10, **{"temperature": 1.0, **sampling}) == greedy


def test_seeds_and_rows_draw_their_own_numbers(model: DeepSeekV3) -> None:
    def sample(prompts: list[list[int]], seed: int) -> list[list[int]]:
        return generate.generate(model, prompts, max_new_tokens=12, temperature=1.5, seed=seed)

    first = sample(PROMPTS, 1)
    assert sample(PROMPTS, 1) == first and sample(PROMPTS, 2) != first and sample(PROMPTS, 1 + 2**32) != first
    assert sample(PROMPTS[:1], 1) == first[:1]  # whatever else is in the batch
    assert sample([PROMPTS[0], [3, 4], [1]], 1)[0] == first[0]
    one, two = sample([[5], [5]], 1)
    assert one != two


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({}, [0.4, 0.3, 0.2, 0.1]),
        ({"temperature": 0.5}, [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_k": 9}, [0.4, 0.3, 0.2, 0.1]),
        ({"top_p": 0.65}, [4 / 7, 3 / 7, 0, 0]),  # the token that crosses the mass is still in
        ({"top_p": 0.75}, [4 / 9, 3 / 9, 2 / 9, 0]),
        ({"top_k": 3, "top_p": 0.5}, [4 / 7, 3 / 7, 0, 0]),  # top-p counts what top-k left: 4/9, 3/9, 2/9
    ],
)
def test_samples_follow_the_distribution(sampling: dict[str, Any], expected: list[float]) -> None:
    """Chi-square: 16.3 is exceeded once in a thousand seeds with 3 degrees of freedom."""
    num, order = 20_000, [2, 0, 3, 1]  # ids from the most to the least likely
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()[torch.tensor(order).argsort()] + 3.0
    source = random.Random(0)
    draws = [source.random() for _ in range(num)]
    how = generate.Sampling(**{"temperature": 1.0, **sampling})
    tokens = generate.choose_tokens(logits.expand(num, -1), draws, how)
    count = Counter(tokens)
    assert all(count[token] == 0 for token, p in zip(order, expected, strict=True) if p == 0)
    chi2 = sum((count[t] - num * p) ** 2 / (num * p) for t, p in zip(order, expected, strict=True) if p)
    assert chi2 < 16.3


def test_extreme_draws_stay_inside() -> None:
    logits = torch.tensor([[0.0, -1.0, -50.0, -1000.0]]).expand(3, -1)
    draws = [0.0, 0.5, 1 - 2**-53]
    for top_p in (1.0, 0.7, 1e-12):
        tokens = generate.choose_tokens(logits, draws, generate.Sampling(1.0, 0, top_p))
        assert tokens[0] == 0 and max(tokens) <= 2


def test_padded_vocabulary_is_never_sampled(model: DeepSeekV3) -> None:
    for temperature in (0.0, 100.0):
        rows = generate.generate(model, PROMPTS, max_new_tokens=30, temperature=temperature, vocab_limit=25)
        assert max(max(row) for row in rows) < 25


def test_training_is_not_disturbed(model: DeepSeekV3) -> None:
    before = torch.get_rng_state()
    for training in (True, False):
        model.train(training)
        generate.generate(model, PROMPTS, max_new_tokens=3, temperature=1.0)
        assert all(module.training == training for module in model.modules())
        with pytest.raises(KeyError):
            generate.generate(model, PROMPTS, max_new_tokens=3, on_token=lambda row, token: {}[row])
        assert model.training == training
    assert torch.equal(torch.get_rng_state(), before) and torch.is_grad_enabled()
    logits = model(torch.tensor([[1, 2]]))
    assert isinstance(logits, torch.Tensor)
    logits.sum().backward()  # no inference tensor was left behind
    model.zero_grad()


def test_limits(model: DeepSeekV3) -> None:
    run = generate.generate
    assert run(model, PROMPTS, max_new_tokens=0) == [[], [], []] and run(model, [], max_new_tokens=5) == []
    assert len(run(model, [[1] * 60], max_new_tokens=4)[0]) == 4
    with pytest.raises(UserError, match="60 tokens and 5 new ones exceed the model's context of 64"):
        run(model, [[1], [1] * 60], max_new_tokens=5)
    with pytest.raises(UserError, match="token 96, the model knows 0 to 95"):
        run(model, [[1, 96]], max_new_tokens=5)
    with pytest.raises(UserError, match="token -1, the model knows 0 to 95"):
        run(model, [[-1, 3]], max_new_tokens=5)
    with pytest.raises(ValueError, match="empty prompt"):
        run(model, [[1], []], max_new_tokens=5)
    bad: dict[str, list[Any]] = {"temperature": [-1, float("nan")], "top_k": [-1], "top_p": [0, 2, float("nan")]}
    for key, values in bad.items():
        for value in values:
            with pytest.raises(UserError, match=key.replace("_", ".")):
                run(model, [[1]], **({"max_new_tokens": 1} | {key: value}))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="max_new_tokens -1"):
        run(model, [[1]], max_new_tokens=-1)


def test_logits_that_are_not_finite_are_told() -> None:
    broken = build()
    with torch.no_grad():
        broken.lm_head.weight[3, 0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        generate.generate(broken, [[1]], max_new_tokens=1, temperature=1.0)


# ---------------------------------------------------------------------------------------------------------------- load


def theirs(dtype: torch.dtype = torch.float32, **changes: Any) -> DeepseekV3ForCausalLM:
    torch.manual_seed(3)
    config = DeepseekV3Config(
        **{**TINY, "num_key_value_heads": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, **changes}
    )
    model = DeepseekV3ForCausalLM(config).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("bias"):
            buffer.normal_(std=0.3)
    return model.to(dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes", [{}, {"rope_parameters": YARN | {"rope_type": "yarn", "rope_theta": 10000.0}}], ids=["plain", "yarn"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_directory_of_transformers(tmp_path: Path, dtype: torch.dtype, changes: dict[str, Any]) -> None:
    other = theirs(dtype, **changes)
    other.save_pretrained(tmp_path)
    model, tok = generate.load(tmp_path)
    assert tok is None and not model.training and {p.dtype for p in model.parameters()} == {dtype}
    assert model.dtype == dtype and {b.dtype for b in model.buffers()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in model.parameters())
    tokens = torch.randint(TINY["vocab_size"], (2, 40), generator=torch.Generator().manual_seed(0))
    logits, expected = model(tokens), other(tokens).logits
    assert isinstance(logits, torch.Tensor) and logits.dtype == torch.float32 and logits.shape == (2, 40, 96)
    if dtype == torch.float32:
        assert (logits - expected).abs().max() < 1e-4
    else:  # both round, at different places
        assert (logits - expected.float()).abs().mean() < 0.05 * expected.float().abs().mean()


def save(model: DeepSeekV3, root: Path, step: int, tok: Any = None) -> Path:
    config = convert.hf_config(model.config, dtype="float32", bos_token_id=0, eos_token_id=0)
    files = {"config.json": json.dumps(config).encode()}
    path = checkpoint.save(
        root / "checkpoints", step, {"model": convert.to_checkpoint(model.state_dict(), model.config)}, files, keep=9
    )
    if tok is not None:
        tokenizer.save(tok, path)
    return path


def test_a_run_or_a_checkpoint(tmp_path: Path) -> None:
    models = [build(seed) for seed in (1, 2)]
    old, _ = [save(model, tmp_path, step) for step, model in enumerate(models, 1)]
    tokens = torch.arange(20)[None]
    state = torch.get_rng_state()
    for path, model in ((tmp_path, models[1]), (str(old), models[0])):
        loaded, _ = generate.load(path)
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert torch.equal(loaded(tokens), model(tokens))  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), state)
    assert (AutoModelForCausalLM.from_pretrained(old)(tokens).logits - models[0](tokens)).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bf16", "fp16"])
def test_another_dtype(tmp_path: Path, dtype: torch.dtype | str) -> None:
    model = build()
    save(model, tmp_path, 1)
    loaded, _ = generate.load(tmp_path, dtype=dtype)
    wanted = torch.float16 if dtype == "fp16" else torch.bfloat16
    assert loaded.dtype == wanted and {p.dtype for p in loaded.parameters()} == {wanted}
    for ours, theirs in zip(loaded.buffers(), model.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    assert len(generate.generate(loaded, PROMPTS, max_new_tokens=4)[1]) == 4


def test_stored_dtypes_that_differ_lose_nothing(tmp_path: Path) -> None:
    """An fp32 model whose embedding is stored in bf16 computes in fp32."""
    model = build()
    tensors = convert.to_checkpoint(model.state_dict(), model.config)
    entries = convert.hf_config(model.config, dtype="float32", bos_token_id=None, eos_token_id=None)
    dtypes = {"model.embed_tokens.weight": torch.bfloat16}
    checkpoint.write(tmp_path, {"model": tensors}, {"config.json": json.dumps(entries).encode()}, dtypes=dtypes)
    loaded, _ = generate.load(tmp_path)
    assert loaded.dtype == torch.float32
    tokens = torch.arange(9)[None]
    their_logits = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(tokens).logits
    assert (loaded(tokens) - their_logits).abs().max() < 1e-4


def test_loaded_weights_do_not_hang_on_the_files(tmp_path: Path) -> None:
    path = save(build(), tmp_path, 1)
    model, _ = generate.load(path)
    before = model(torch.arange(9)[None])
    for file in path.glob("*.safetensors"):
        file.write_bytes(b"\0" * file.stat().st_size)
    assert torch.equal(model(torch.arange(9)[None]), before)  # type: ignore[arg-type]


def test_weights_we_cannot_compute_with(tmp_path: Path) -> None:
    theirs().double().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="float64 are not supported"):
        generate.load(tmp_path)


# ----------------------------------------------------------------------------------------------------------------- CLI


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a tokenizer of 257 tokens, whose vocabulary is padded to 300."""
    root = tmp_path_factory.mktemp("runs") / "small"
    tok = tokenizer.train_bpe(["ab"], 257)
    save(build(vocab_size=300), root, 7, tok)
    return root


def main(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = generate.main([*map(str, arguments)])
    captured = capfd.readouterr()
    return code, captured.out, captured.err


def test_cli_streams_what_the_library_generates(run_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    common = ("--max-new-tokens", 20, "--greedy", "--device", "cpu")
    code, out, err = main(capfd, "--checkpoint", run_dir, "--prompt", "ab\x1b", *common)
    assert code == 0, err
    model, tok = generate.load(run_dir)
    assert tok is not None
    prompt = prompt_ids(tok, "ab\x1b")
    [row] = generate.generate(model, [prompt], max_new_tokens=20, eos_ids=[0], vocab_limit=257)
    assert out == "ab\\x1b" + safe_text(str(tok.decode(row))) + "\n"
    assert "20 tokens in" in err and err.count("\n") == 1


def test_cli_batches(run_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("first ä\r\n\n second\n".encode("utf-8-sig"))
    common = ("--checkpoint", run_dir, "--max-new-tokens", 6)
    code, out, _ = main(capfd, *common, "--prompts-file", file, "--num-samples", 2, "--seed", 3)
    assert code == 0
    headers = [line for line in out.split("\n") if line.startswith("--- ")]
    assert headers == [f"--- prompt {p}, sample {s}" for p in (1, 2) for s in (1, 2)]
    assert out.count("\nfirst ä") == 2 and out.count("\n second") == 2
    assert main(capfd, *common, "--prompts-file", file, "--num-samples", 2, "--seed", 3)[1] == out
    assert main(capfd, *common, "--prompts-file", file, "--num-samples", 2, "--seed", 4)[1] != out
    code, out, _ = main(capfd, *common, "--prompt", "")
    assert code == 0 and len(out) > 1


def test_cli_reads_standard_input(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("eins\nzwä\n".encode()), "ascii"))
    code, out, _ = main(capfd, "--checkpoint", run_dir, "--prompts-file", "-", "--max-new-tokens", 2)
    assert code == 0 and "\neins" in out and "\nzwä" in out


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_cli_output_that_cannot_be_written(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        code, _, err = main(capfd, "--checkpoint", run_dir, "--prompt", "ab", "--max-new-tokens", 2)
    assert code == 2 and err == "error: standard output cannot be written: No space left on device\n"


class FullDisk(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_cli_a_speed_that_cannot_be_told_is_no_failure(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", FullDisk())
    code, out, _ = main(capfd, "--checkpoint", run_dir, "--prompt", "ab", "--max-new-tokens", 2)
    assert code == 0 and out.startswith("ab")


def test_cli_fills_the_context_unless_told(run_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, _, err = main(capfd, "--checkpoint", run_dir, "--prompt", "x" * 60, "--top-k", 0)
    assert code == 0 and int(err.split()[0]) <= 4


def test_cli_ends_at_the_eos_of_the_directory(run_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, tok = generate.load(run_dir)
    assert tok is not None
    folder = save(model, tmp_path, 1, tok)
    [row] = generate.generate(model, [prompt_ids(tok, "ab")], max_new_tokens=9, vocab_limit=257)
    for ids in (row[4], [row[4], 299]):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        _, _, err = main(capfd, "--checkpoint", folder, "--prompt", "ab", "--greedy")
        assert int(err.split()[0]) == row.index(row[4])
    for wrong in ("x", [[1]]):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
        code, _, err = main(capfd, "--checkpoint", folder, "--prompt", "ab", "--greedy")
        assert code == 2 and "eos_token_id" in err and err.count("\n") == 1


def test_cli_rejects_bad_input_in_one_line(run_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    empty, bare, binary = tmp_path / "empty", tmp_path / "bare", tmp_path / "binary"
    (empty / "checkpoints").mkdir(parents=True)
    save(build(), bare, 1)
    binary.write_bytes(b"\xff\xfe")
    blank = tmp_path / "blank"
    blank.write_text("\n \n")
    ok = ("--checkpoint", run_dir, "--prompt", "a")
    cases: dict[tuple[object, ...], str] = {
        ("--checkpoint", run_dir.parent / "smal", "--prompt", "a"): f"did you mean {run_dir}?",
        ("--checkpoint", tmp_path / "nothing", "--prompt", "a"): "no such directory",
        ("--checkpoint", "x" * 300, "--prompt", "a"): "too long",
        ("--checkpoint", empty, "--prompt", "a"): "no model here",
        ("--checkpoint", ROOT / "configs", "--prompt", "a"): "no model here",
        ("--checkpoint", binary, "--prompt", "a"): "no such directory",
        ("--checkpoint", bare, "--prompt", "a"): "has no tokenizer",
        ("--checkpoint", run_dir): "--prompt",
        ("--prompt", "a"): "--checkpoint",
        (*ok, "--prompts-file", "-"): "not allowed with",
        ("--checkpoint", run_dir, "--prompt", "x" * 64): "64 tokens and 1 new ones exceed",
        (*ok, "--max-new-tokens", "64"): "1 tokens and 64 new ones exceed",
        ("--checkpoint", run_dir, "--prompts-file", tmp_path / "none"): "cannot be read",
        ("--checkpoint", run_dir, "--prompts-file", tmp_path): "cannot be read",
        ("--checkpoint", run_dir, "--prompts-file", binary): "cannot be read",
        ("--checkpoint", run_dir, "--prompts-file", blank): "only blank lines",
        ("--checkpoint", run_dir, "--prompt", "caf\udce9"): "not valid UTF-8",
        (*ok, "--temperature", "-1"): "temperature -1.0 must be at least 0",
        (*ok, "--temperature", "hot"): "invalid float value",
        (*ok, "--top-p", "0"): "top-p 0.0 must be above 0",
        (*ok, "--top-p", "2"): "at most 1",
        (*ok, "--top-k", "-3"): "top-k -3",
        (*ok, "--num-samples", "0"): "--num-samples 0 must be at least 1",
        (*ok, "--max-new-tokens", "-1"): "--max-new-tokens -1",
        (*ok, "--device", "tpu"): "--device tpu is not supported",
        (*ok, "--device", "cuda:99"): "try --device cpu",
        (*ok, "--dtype", "int8"): "invalid choice",
        (*ok, "--nonsense\n\x1b[2J"): "unrecognized arguments",
    }
    for arguments, message in cases.items():
        code, out, err = main(capfd, *arguments)
        assert code == 2 and out == "", (arguments, out)
        assert err.startswith("error: ") and message in err and err.count("\n") == 1 and "\x1b" not in err, err


def test_cli_mistakes_end_the_process_before_torch_is_imported() -> None:
    code = (
        "import sys, generate; code = generate.main(['--checkpoint', 'a', '--prompt', 'b', '--top-p', '3'])\n"
        "sys.exit(code if not {'torch', 'transformers'} & set(sys.modules) else 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (
        done.returncode == 2 and done.stderr == "error: top-p 3.0 must be above 0 and at most 1\n" and not done.stdout
    )


def test_cli_ctrl_c(run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=SimpleNamespace(read=interrupted)))
    assert generate.main(["--checkpoint", str(run_dir), "--prompts-file", "-"]) == 130
    assert capsys.readouterr().out == ""


def test_env_file_is_read_and_real_variables_win(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".env").write_text("NEW_ONE=from_file\nREAL_ONE=from_file\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NEW_ONE", "")  # so that monkeypatch removes it again
    monkeypatch.delenv("NEW_ONE")
    monkeypatch.setenv("REAL_ONE", "from_shell")
    assert main(capfd, "--checkpoint", run_dir, "--prompt", "a", "--max-new-tokens", "0")[:2] == (0, "a\n")
    assert os.environ["NEW_ONE"] == "from_file" and os.environ["REAL_ONE"] == "from_shell"
