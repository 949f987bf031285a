"""Which paths a run takes: asked for, stored, or clearly faster."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import config as configuration
import ops
import probe
from config import UserError

CPU = torch.device("cpu")
USUAL = "grouped" if hasattr(torch.nn.functional, "grouped_mm") else "loop"
TINY = (
    "model.hidden_size=32", "model.moe_intermediate_size=16", "model.vocab_size=512", "data.seq_len=16",
    "train.batch_tokens=64", "train.micro_batch=2",
)  # fmt: skip


def chosen(*overrides: str, dtype: torch.dtype = torch.float32, stored: dict[str, str] | None = None):
    return probe.choose(configuration.load("quickstart", [*TINY, *overrides]), CPU, dtype, stored or {})


def test_small_operations_take_the_usual_paths_and_tell() -> None:
    paths, notes = chosen()
    assert paths.model_dump() == {"experts": USUAL, "attention": "sdpa", "loss": "chunked"}
    assert notes == [f"paths: experts {USUAL}, attention sdpa, loss chunked"]
    assert chosen(dtype=torch.bfloat16)[0].attention == "plain"


def test_a_named_path_is_taken_or_refused() -> None:
    assert chosen("ops.experts=loop", "ops.attention=plain")[0].experts == "loop"
    with pytest.raises(
        UserError, match=r"ops\.experts = liger does not work .* on this cpu .*auto takes one of .*loop"
    ):
        chosen("ops.experts=liger")
    if hasattr(torch.nn.functional, "linear_cross_entropy"):
        assert chosen("ops.loss=torch")[0].loss == "torch"  # works, though auto never takes it
    long = ("data.seq_len=512", "train.batch_tokens=1024", "train.micro_batch=1")
    assert chosen("ops.attention=plain", *long)[0].attention == "plain"


def test_a_stored_path_is_kept_where_it_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "fastest", lambda paths, *_: (paths[0], []))
    stored = {"experts": "loop", "attention": "plain", "loss": "chunked"}
    assert chosen(stored=stored)[0].model_dump() == stored
    assert chosen("ops.experts=padded", stored=stored)[0].experts == "padded"  # who asks gets
    paths, notes = chosen(stored=stored | {"experts": "triton"})
    assert paths.experts == USUAL and "experts path, triton, does not work" in notes[0]


def timed(monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float]) -> list[str]:
    """The paths that were run; each takes its `seconds`, told by a clock of its own."""
    ran: list[str] = []
    monkeypatch.setattr(probe, "_time", lambda run, device: run() and seconds[ran[-1]])
    return ran


@pytest.mark.parametrize(
    ("seconds", "winner"),
    [
        ({"a": 1.0, "b": 0.7}, "a"),  # within the margin: a matter of chance
        ({"a": 1.0, "b": 0.6}, "b"),
        ({"a": 1.0, "b": 0.6, "c": 0.5}, "c"),
    ],
)
def test_another_path_must_be_clearly_faster(
    seconds: dict[str, float], winner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = timed(monkeypatch, seconds)
    assert probe.fastest(list(seconds), lambda path: ran.append(path) or [torch.ones(1)], CPU) == (winner, [])
    assert ran.count("a") == 2 + (winner != "a")  # compared, timed, and once more before it is given up


def test_a_moment_of_luck_is_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.0, 0.5, 1.0, 0.9])
    monkeypatch.setattr(probe, "_time", lambda run, device: next(times))
    assert probe.fastest(["a", "b"], lambda path: [torch.ones(1)], CPU) == ("a", [])


def test_nothing_that_is_no_number_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_time", lambda run, device: 1.0 if run() is results["usual"] else 0.1)
    results = {"usual": [torch.ones(2), torch.ones(2)], "broken": [torch.ones(2), torch.tensor([1.0, float("nan")])]}
    path, notes = probe.fastest(["usual", "broken"], results.__getitem__, CPU)
    assert path == "usual" and "broken left out" in notes[0]


@pytest.mark.parametrize("isolated", [False, True])
def test_attention_is_timed_with_the_mask_of_the_run(isolated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "SMALL", 0)
    masked: list[bool] = []
    real = ops.attention
    monkeypatch.setattr(
        ops,
        "attention",
        lambda *args, **kwargs: masked.append(kwargs["mask_B1TS"] is not None) or real(*args, **kwargs),
    )
    chosen(f"data.document_mask={str(isolated).lower()}")
    assert masked and set(masked) == {isolated}


def test_compiled_fp32_does_not_take_the_grouped_product() -> None:
    assert chosen("train.compile=true")[0].experts == "loop"  # torch compiles it for bf16 only
    assert chosen("train.compile=true", dtype=torch.bfloat16)[0].experts == USUAL
    with pytest.raises(UserError, match=r"ops\.experts = grouped does not work .*train\.compile"):
        chosen("train.compile=true", "ops.experts=grouped")
    paths, notes = chosen("train.compile=true", stored={"experts": "grouped"})
    assert paths.experts == "loop" and "experts path, grouped, does not work" in notes[0]


def test_paths_that_fail_or_are_wrong_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = timed(monkeypatch, {"usual": 1.0, "wrong": 0.1, "broken": 0.1, "fast": 0.5})

    def run(path: str) -> list[Tensor]:
        ran.append(path)
        if path == "broken":
            raise RuntimeError("no kernel\nimage")
        return [torch.full((2,), 1.5 if path == "wrong" else 1.0)]

    path, notes = probe.fastest(["usual", "wrong", "broken", "fast"], run, CPU)
    assert path == "fast"
    assert notes == ["wrong left out, it differs from usual by 0.5", "broken left out: no kernel image"]
    with pytest.raises(UserError, match="no path works"):
        probe.fastest(["broken", "broken"], run, CPU)


def test_every_cpu_path_really_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """At shapes where a choice is made, with the real operations: all paths agree and are timed."""
    monkeypatch.setattr(probe, "SMALL", 0)
    seen: list[str] = []
    real = ops.grouped_experts
    monkeypatch.setattr(ops, "grouped_experts", lambda *args: seen.append(args[-1]) or real(*args))
    for dtype in (torch.float32, torch.bfloat16):
        _, notes = chosen(dtype=dtype)
        assert len(notes) == 1, notes
    assert {"padded", "loop"} <= set(seen)
