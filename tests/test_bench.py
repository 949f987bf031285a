"""scripts/bench.py: every suite runs at small shapes and writes what it printed; wrong results are not timed."""

from __future__ import annotations

import gc
import json
import os
import runpy
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bench
import duels
import pytest
import torch

import config
import ops
from config import UserError

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    "model.vocab_size=300", "model.hidden_size=32", "model.num_hidden_layers=2", "model.q_lora_rank=16",
    "model.kv_lora_rank=16", "model.qk_nope_head_dim=8", "model.qk_rope_head_dim=8", "model.v_head_dim=16",
    "model.intermediate_size=32", "model.moe_intermediate_size=16", "model.n_routed_experts=4", "train.micro_batch=2",
    "train.batch_tokens=64", "data.seq_len=32", "train.precision=fp32",
]  # fmt: skip
THEIRS = [f"transformers {experts} fp32" for experts in bench.THEIR_EXPERTS]


@pytest.fixture(autouse=True, scope="module")
def _collector_looks_at_new_things_only() -> Iterator[None]:
    """Each duel ends with a collection, which otherwise walks through all that torch and transformers hold."""
    import transformers.models.deepseek_v3.modeling_deepseek_v3  # noqa: F401

    gc.freeze()
    yield
    gc.unfreeze()


def small(precision: str = "fp32", *overrides: str, name: str = "quickstart") -> duels.Bench:
    return duels.Bench(config.load(name, overrides or SMALL), torch.device("cpu"), precision, repeats=2, arguments=[])


def random_tokens(suite: duels.Bench) -> torch.Tensor:
    """In place of text, whose tokenizer takes a second or two to train."""
    return torch.randint(300, (2, 34), generator=suite.rng)


def run(suite: str, out: Path, *options: str) -> dict:
    assert bench.main([suite, "--repeats", "2", "--out", str(out), *options, *SMALL]) == 0
    (path,) = out.glob(f"{suite}-quickstart-*.json")
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("suite", ["moe", "attention", "loss", "optim"])
def test_a_suite_writes_what_it_measured(suite: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = run(suite, tmp_path)
    printed = capsys.readouterr()
    assert entry["rows"][0]["name"] == "ours" and entry["rows"][0]["times_first"] == 1
    for row in entry["rows"]:
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] and row["runs"] >= 1
        assert row["name"] in printed.out
        assert row["name"] == "ours" or f"{row['name']}: " in printed.err
    parts = {"moe": "result x gate_up down weight", "attention": "result q k v", "loss": "result hidden head"}
    other = {"moe": "expert by expert", "attention": "torch", "loss": "full logits"}
    compared = {f"{other[suite]}, {part}" for part in parts[suite].split()} if suite in parts else set()
    assert entry["checks"] and compared <= entry["checks"].keys()
    assert all(difference <= 0.1 for difference in entry["checks"].values())
    assert entry["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert entry["hardware"] and entry["product_tflops"]["fp32"] > 0 and entry["command"].endswith(" ".join(SMALL))


def test_step_meets_transformers_in_every_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = run("step", tmp_path)
    rows = entry["rows"]
    assert {row["name"] for row in rows} == {"ours fp32", "ours fp32 MTP", *THEIRS}
    assert {row["routing"] for row in rows} == {"balanced", "as initialised"}
    assert all(row["tokens_per_sec"] == pytest.approx(64e3 / row["median_ms"]) for row in rows)
    roof = entry["product_tflops"]["fp32"]
    assert all(row["share_of_product"] == pytest.approx(row["tflops"] / roof) for row in rows)
    load = {row["routing"]: row["busiest_over_mean"] for row in rows}
    assert load["balanced"] <= load["as initialised"]
    (mtp, _) = (row for row in rows if "mtp_times" in row)
    assert mtp["name"] == "ours fp32 MTP" and mtp["mtp_times"] == mtp["times_first"]
    assert 1.3 < mtp["mtp_flops_times"] < 2.5  # of two layers and a head there is one more
    for experts in bench.THEIR_EXPERTS:
        assert entry["checks"][f"transformers {experts}, rows with a token routed otherwise"] == 0
        assert 0 <= entry["checks"][f"transformers {experts}, gradients"] < 1e-5
    assert "Loading weights" not in capsys.readouterr().err


def test_who_copies_gigabytes_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = str(ROOT / "benchmarks" / "55m.yaml")  # 5 * 4,096 pairs, 3 * 384 * 256 weights each
    names, left_out = bench.step_names(small("bf16", "train.micro_batch=8", name=shape))
    assert names[0] == "ours bf16" and not any("batched_mm" in name for name in names)
    assert left_out["transformers batched_mm fp32"] == "copies 22.5 GiB of expert weights"
    assert left_out["transformers batched_mm bf16 weights"] == "copies 11.2 GiB of expert weights"
    monkeypatch.setattr(bench, "text_tokens", random_tokens)
    monkeypatch.setattr(bench, "MOST_COPIES_GIB", 0.0)
    monkeypatch.setattr(bench, "THEIR_EXPERTS", ("batched_mm",))
    entry = run("step", tmp_path)
    assert entry["rows"][-1]["left_out"].startswith("copies ") and entry["checks"] == {}
    assert "batched_mm" not in capsys.readouterr().err


def test_the_ladder_changes_one_thing_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "text_tokens", random_tokens)
    monkeypatch.setattr(bench.DeepSeekV3, "compile_blocks", lambda self: compiled.append(self))  # takes a minute
    monkeypatch.setattr(bench.shutil, "which", lambda _: "/usr/bin/g++")
    met, compiled = list[str](), list[object]()
    plain, grouped = bench.losses.linear_cross_entropy_reference, ops.grouped_experts
    monkeypatch.setattr(bench.losses, "linear_cross_entropy_reference", lambda *a: met.append("full") or plain(*a))
    monkeypatch.setattr(ops, "grouped_experts", lambda *a: met.append(a[-1]) or grouped(*a))
    rows = bench.bench_ladder(small("bf16"))
    others = ops.experts_paths(torch.device("cpu"), torch.bfloat16, 32, 16)[1:]
    names = ["ours", *(f"experts {path}" for path in others), "attention sdpa", "full logits", "recompute selective"]
    assert [row["name"] for row in rows] == [*names, "recompute full", "compile", "fp32"]
    assert {"full", "auto", *others} == set(met) and len(compiled) == 1


def test_generate_writes_the_same_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "text_tokens", random_tokens)
    monkeypatch.setattr(bench, "NEW_TOKENS", 6)
    rows = run("generate", tmp_path)["rows"]
    assert [row["name"] for row in rows] == ["ours fp32", *THEIRS]
    assert all(row["same_tokens"] == 6 for row in rows)
    assert rows[0]["tokens_per_sec"] == pytest.approx(6e3 / rows[0]["median_ms"])


def test_another_token_is_allowed_after_a_near_tie_only() -> None:
    model = small().build(small().plain)
    order = model(torch.tensor([[1, 2, 7]]))[0, -1].argsort(descending=True).tolist()
    assert bench.same_tokens(model, [1, 2], [7, order[0]], [7, order[0]], "x") == 2
    with pytest.raises(UserError, match="x: token 1 is another"):
        bench.same_tokens(model, [1, 2], [7, order[0]], [7, order[-1]], "x")
    with torch.no_grad():
        model.lm_head.weight[order[1]] = model.lm_head.weight[order[0]] * (1 - 1e-6)
    assert bench.same_tokens(model, [1, 2], [7, order[0]], [7, order[1]], "x") == 1


@pytest.mark.slow
def test_memory_is_that_of_a_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left_out = {"transformers batched_mm fp32": "copies 9 GiB of expert weights"}
    monkeypatch.setattr(bench, "step_names", lambda _: (["ours fp32"], left_out))
    row, other = run("memory", tmp_path, "--repeats", "1")["rows"]
    assert 0 < row["peak_gib"] < 2 and row["times_first"] == 1
    assert other == {"name": "transformers batched_mm fp32", "left_out": "copies 9 GiB of expert weights"}


def test_memory_says_whose_child_died(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    died = subprocess.CompletedProcess([], -9, stdout="", stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: died)
    rows = run("memory", tmp_path)["rows"]
    assert {row["left_out"] for row in rows} == {"exit code -9"}
    assert "ours fp32: exit code -9" in capsys.readouterr().err


def test_contenders_take_turns() -> None:
    order: list[str] = []
    contenders = {name: lambda name=name: (order.append(name), time.sleep(0.002)) for name in "ab"}
    seconds = duels.interleaved(contenders, torch.device("cpu"), repeats=3, warm_up=1, hopeless=1e9)
    assert order == list("abababab")
    assert all(len(runs) == 3 and min(runs) >= 0.002 for runs in seconds.values())
    slow = {"a": lambda: None, "b": lambda: time.sleep(0.05)}
    seconds = duels.interleaved(slow, torch.device("cpu"), repeats=3)
    assert [len(runs) for runs in seconds.values()] == [3, 1] and seconds["b"][0] >= 0.05
    expected = {"median_ms": 3500, "p20_ms": 2000, "p80_ms": 5000, "runs": 6}
    assert duels.summary([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == expected


def test_two_contenders_live_at_most() -> None:
    class Contender:
        def __init__(self, milliseconds: int) -> None:
            self.milliseconds, self.itself = milliseconds, self  # only the collector frees it
            alive.add(self)

        def __call__(self) -> None:
            most.append(len(alive))
            time.sleep(self.milliseconds / 1000)

    alive: weakref.WeakSet[Contender] = weakref.WeakSet()
    most: list[int] = []
    makers: dict[str, Callable[[], Any]] = {
        name: lambda ms=ms: Contender(ms) for name, ms in {"a": 10, "b": 25, "c": 45, "d": 2}.items()
    }
    rows = small().duels(makers, rows=7)
    assert max(most) == 2
    assert [(row["name"], row["rows"], row["runs"]) for row in rows] == [("a", 7, 6), *((name, 7, 2) for name in "bcd")]
    ratios = [row["times_first"] for row in rows]
    assert ratios[0] == 1 and ratios[2] > ratios[1] > 1 > ratios[3]
    del makers
    gc.collect()


def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    suite = small()
    suite.check("x", torch.tensor([2.0, 1.0]), torch.tensor([2.0, 1.1]), 0.1)
    assert suite.checks == {"x": pytest.approx(0.05)}
    with pytest.raises(UserError, match=r"x of y differ by 0\.5"):
        suite.check("x", torch.ones(2), torch.tensor([1.0, 0.5]), 0.1, " of y")
    with pytest.raises(UserError, match="differ"):
        suite.check("x", torch.tensor([torch.nan]), torch.ones(1), 0.1)
    right = ops.attention

    def half_a_gradient(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float) -> torch.Tensor:
        return right(q, k, (v + v.detach()) / 2, scale=scale)

    for wrong, part in ((lambda *args, scale: right(*args, scale=2 * scale), "result"), (half_a_gradient, "v")):
        monkeypatch.setattr(ops, "attention", wrong)
        assert bench.main(["attention", *SMALL]) == 2
        assert f"error: plain, {part} differ by" in capsys.readouterr().err
    assert bench.main(["attention", "--repeats", "0", *SMALL]) == 2
    assert bench.main(["memory", "--only", "bogus", *SMALL]) == 2
    assert "ours fp32 MTP" in capsys.readouterr().err
    assert bench.main(["speed"]) == 2
    assert "invalid choice: 'speed'" in capsys.readouterr().err


def test_models_are_compared_but_for_near_ties(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite, load = small(), bench.load_theirs
    tokens = random_tokens(suite)
    folder = bench.save(suite.build(suite.plain), str(tmp_path))

    def wrong_in(change: Callable[[Any], object]) -> None:
        def theirs(*args: Any) -> Any:
            model = load(*args)
            change(model)
            return model

        monkeypatch.setattr(bench, "load_theirs", theirs)
        bench.check_theirs(suite, folder, "eager", tokens)

    def reroute(router: Any, inputs: Any, result: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        chosen = result[2].clone()
        chosen[40, 0] = next(expert for expert in range(4) if expert not in chosen[40])
        return *result[:2], chosen

    with pytest.raises(UserError, match="transformers eager, logits differ"):
        wrong_in(lambda model: model.model.norm.weight.data.mul_(1.001))
    with pytest.raises(UserError, match=r"transformers eager, gradients of model\.layers\.1\.mlp\.gate\.weight differ"):
        wrong_in(lambda model: model.model.layers[1].mlp.gate.weight.register_hook(lambda grad: 1.001 * grad))
    with pytest.raises(UserError, match="in 1 of 2 rows a token is routed otherwise"):
        wrong_in(lambda model: model.model.layers[1].mlp.gate.register_forward_hook(reroute))
    monkeypatch.setattr(bench, "MOST_FLIPS", 1 / 64)
    wrong_in(lambda model: model.model.layers[1].mlp.gate.register_forward_hook(reroute))
    assert suite.checks["transformers eager, rows with a token routed otherwise"] == 1
    assert suite.checks["transformers eager, gradients"] < 1e-5


def test_env_is_read_by_the_program_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("HF_TOKEN=from-file\n")
    before = dict(os.environ)
    runpy.run_path(str(ROOT / "scripts" / "bench.py"), run_name="imported")
    assert dict(os.environ) == before
    (tmp_path / ".env").write_bytes(b"HF_TOKEN=\xff\n")
    program = [sys.executable, "-X", "importtime", str(ROOT / "scripts" / "bench.py"), "moe"]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    imported, said = [], []
    for line in done.stderr.splitlines():
        (imported if line.startswith("import time:") else said).append(line.rpartition("|")[2].strip())
    assert (done.returncode, done.stdout, len(said)) == (2, "", 1)
    assert said[0].startswith("error: .env: no plain UTF-8 text")
    assert "config" in imported and "torch" not in imported
