"""scripts/bench.py: every suite runs at small shapes and writes what it printed; wrong results are not timed."""

from __future__ import annotations

import json
import time
from pathlib import Path

import bench
import pytest
import torch

import ops
from config import UserError

SMALL = [
    "model.vocab_size=300", "model.hidden_size=32", "model.num_hidden_layers=2", "model.q_lora_rank=16",
    "model.kv_lora_rank=16", "model.qk_nope_head_dim=8", "model.qk_rope_head_dim=8", "model.v_head_dim=16",
    "model.intermediate_size=32", "model.moe_intermediate_size=16", "model.n_routed_experts=4", "train.micro_batch=2",
    "train.batch_tokens=64", "data.seq_len=32", "train.precision=fp32",
]  # fmt: skip


def run(suite: str, out: Path, *options: str) -> dict:
    assert bench.main([suite, "--repeats", "2", "--out", str(out), *options, *SMALL]) == 0
    (path,) = out.glob(f"{suite}-quickstart-*.json")
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("suite", ["moe", "attention", "loss", "optim"])
def test_a_suite_writes_what_it_measured(suite: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = run(suite, tmp_path)
    printed = capsys.readouterr().out
    assert entry["rows"][0]["name"] == "ours" and entry["rows"][0]["times_first"] == 1
    for row in entry["rows"]:
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["name"] in printed
    assert entry["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert entry["hardware"] and entry["product_tflops"] > 0 and entry["command"].endswith(" ".join(SMALL))


def test_step_meets_transformers_in_every_way(tmp_path: Path) -> None:
    rows = run("step", tmp_path)["rows"]
    names = {row["name"] for row in rows}
    assert names == {"ours fp32", "ours fp32 MTP", *(f"transformers {how} fp32" for how in bench.THEIR_EXPERTS)}
    assert {row["routing"] for row in rows} == {"balanced", "as initialised"}
    assert all(row["tokens_per_sec"] == pytest.approx(64e3 / row["median_ms"]) for row in rows)
    load = {row["routing"]: row["busiest_over_mean"] for row in rows}
    assert load["balanced"] <= load["as initialised"]


def test_memory_is_that_of_a_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "step_names", lambda _: ["ours fp32"])
    (row,) = run("memory", tmp_path)["rows"]
    assert 0 < row["peak_gib"] < 2 and row["exit_code"] == 0


def test_contenders_take_turns() -> None:
    order: list[str] = []
    contenders = {name: lambda name=name: (order.append(name), time.sleep(0.002)) for name in "ab"}
    seconds = bench.interleaved(contenders, torch.device("cpu"), repeats=3, warm_up=1, hopeless=1e9)
    assert order == list("abababab")
    assert all(len(runs) == 3 and min(runs) >= 0.002 for runs in seconds.values())
    slow = {"a": lambda: None, "b": lambda: time.sleep(0.05)}
    seconds = bench.interleaved(slow, torch.device("cpu"), repeats=3)
    assert [len(runs) for runs in seconds.values()] == [3, 1] and seconds["b"][0] >= 0.05
    assert bench.summary([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == {"median_ms": 3500, "p20_ms": 2000, "p80_ms": 5000}


def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"differ by 0\.5"):
        bench.must_equal(torch.ones(2), torch.tensor([1.0, 0.5]), "x", tolerance=0.1)
    with pytest.raises(UserError, match="differ"):
        bench.must_equal(torch.tensor([torch.nan]), torch.ones(1), "x", tolerance=0.1)
    right = ops.attention
    monkeypatch.setattr(ops, "attention", lambda *args, scale: right(*args, scale=2 * scale))
    assert bench.main(["attention", *SMALL]) == 2
    assert "not timed" in capsys.readouterr().err
    assert bench.main(["attention", "--repeats", "0", *SMALL]) == 2
    assert bench.main(["memory", "--only", "bogus", *SMALL]) == 2
    assert "ours fp32 MTP" in capsys.readouterr().err
    assert bench.main(["speed"]) == 2
    assert "invalid choice: 'speed'" in capsys.readouterr().err
