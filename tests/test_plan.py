"""What `--dry-run` tells: the steps, the figures of the default run, memory, time and money."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from test_model import TINY

import config as configuration
import memory
import plan
import train
from config import Config
from counts import count_parameters, num_steps
from model import meta_model

MINI = configuration.load("mini")


def small(**changes: Any) -> Config:
    """The tiny model of test_model.py; `changes` are sections, each with its keys."""
    sections: dict[str, Any] = {
        "model": TINY,
        "data": {"seq_len": 32},
        "train": {"steps": 5, "micro_batch": 2, "batch_tokens": 256, "precision": "fp32"},
    }
    return Config(**{name: sections.get(name, {}) | changes.get(name, {}) for name in {*sections, *changes}})


def test_steps_of_the_default_run() -> None:
    """20 tokens for each of 116,862,720 active parameters, in steps of 131,072, rounded up."""
    counts = count_parameters(meta_model(MINI.model))
    assert counts.active_with_head == 116_862_720
    assert num_steps(MINI, counts) == 17_832
    assert 17_831 * 131_072 < 20 * 116_862_720 <= 17_832 * 131_072 == 2_337_275_904


@pytest.mark.parametrize(
    ("override", "steps"),
    [
        ("train.steps=7", 7),
        ("train.tokens_per_active_param=40", 35_664),
        ("train.batch_tokens=262144", 8_916),
        ("train.tokens_per_active_param=1e-6", 1),  # never none
    ],
)
def test_steps_follow_the_configuration(override: str, steps: int) -> None:
    config = configuration.load("mini", [override])
    assert num_steps(config, count_parameters(meta_model(config.model))) == steps


@pytest.mark.parametrize(
    ("train", "world_size", "dtypes", "rows", "heading"),
    [
        ({}, 1, {"fp32": torch.float32}, 2, "one GPU (cuda), 2 rows at a time, GiB"),
        (
            {"precision": "auto", "micro_batch": 1}, 8, {"bf16": torch.bfloat16, "fp16": torch.float16}, 1,
            "one GPU of 8 (cuda), 1 row at a time, GiB",
        ),
        ({"precision": "fp16", "micro_batch": "auto"}, 1, {"fp16": torch.float16}, 1, "(auto: as many as fit), GiB"),
    ],
)  # fmt: skip
def test_memory_says_what_it_stands_for(
    train: dict[str, Any], world_size: int, dtypes: dict[str, torch.dtype], rows: int, heading: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    asked = list[dict[str, Any]]()

    def peak(config: Config, **options: Any) -> memory.Peak:
        asked.append(options)
        return memory.Peak(3 * 2**30, {"weights": 2**30, "slack": 2**31}, ["backward", "optimizer"][len(asked) - 1])

    monkeypatch.setattr(memory, "peak", peak)
    lines = plan.describe_memory(small(train=train), world_size)
    assert asked == [{"dtype": dtype, "rows": rows, "world_size": world_size} for dtype in dtypes.values()]
    assert heading in lines[0]
    assert ("in backward and optimizer;" if len(dtypes) > 1 else "in backward;") in lines[1]
    columns = len(dtypes)
    table = [["weights", "1.00"], ["slack", "2.00"], ["sum", "3.00"]]
    wanted = [list(dtypes), *([name, *[gib] * columns] for name, gib in table)]
    assert [line.split() for line in lines[2:]] == wanted


def test_only_the_first_rank_prints_the_plan(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `torchrun --nproc_per_node=2 train.py --dry-run` starts them."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, heading in (("0", "one GPU of 2 (cuda)"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        assert train.main(["--dry-run", "--config", "quickstart"]) == 0
        out = capsys.readouterr().out
        assert heading in out and bool(out) == bool(heading)


@pytest.fixture(scope="module")
def told() -> str:
    """But for its memory, which takes seconds to trace."""
    with mock.patch.object(memory, "peak", return_value=memory.Peak(2**30, {"weights": 2**30}, "forward")):
        return plan.describe(MINI, tokens_per_sec=30_000, price_per_hour=0.5)


def test_the_default_run_in_figures(told: str) -> None:
    rows = dict(re.findall(r"(?m)^  (\S.*?) {2,}([\d,.]+)$", told))
    assert rows["total"] == "531,803,904" and rows["total with MTP"] == "573,718,784"
    assert rows["active per token"] == "78,229,248" and rows["active with head"] == "116,862,720"
    assert rows["MTP layers"] == "41,914,880" and rows["router biases"] == "704"
    parts = ("embedding", "attention", "dense MLP", "routed experts", "shared experts", "router", "norms", "head")
    assert sum(int(rows[part].replace(",", "")) for part in parts) == 531_803_904
    for figure in ("2,337,275,904 in 17,832 steps of 131,072", "20.0 per active parameter"):
        assert figure in told
    # Over all keys, as the device's utilisation is told; over half of them; and all of the run's.
    for figure in ("1.306 GFLOP per token over all 2048 keys", "1.143 over the causal half", "3.05e+18"):
        assert figure in told
    peak = memory.peak(MINI, dtype=torch.float16, rows=MINI.micro_rows)
    assert sum(peak.parts.values()) == peak.total < 10 * 2**30  # of a card's 12 GB, as the README has it


def test_the_configuration_it_prints_can_be_loaded(told: str, tmp_path: Path) -> None:
    """All that stands above the table is the resolved configuration, every key of it."""
    (tmp_path / "again.yaml").write_text(told.partition("\n\nparameters\n")[0])
    assert configuration.load(str(tmp_path / "again.yaml")) == MINI


def test_hours_and_cost(told: str) -> None:
    hours = 2_337_275_904 / 30_000 / 3600
    assert f"{hours:.1f}" == "21.6" and f"{hours / 2:.2f}" == "10.82"
    assert told.splitlines()[-1] == "time      21h38m (21.6 hours) at 30,000 tokens/s, 10.82 at 0.5 an hour"
    config = small()  # 5 steps of 256 tokens
    last = plan.describe(config, tokens_per_sec=10, price_per_hour=None).splitlines()[-1]
    assert last == "time      2m08s (0.0 hours) at 10 tokens/s"
    last = plan.describe(config, tokens_per_sec=None, price_per_hour=2).splitlines()[-1]
    assert "--tokens-per-sec" in last and "--price-per-hour" in last


@pytest.mark.parametrize(
    "arguments",
    [
        ["--dry-run", "train.steps=3", "--tokens-per-sec", "1e4", "optim.lr=1e-3", "--config", "quickstart"],
        ["optim.lr=1e-3", "--config", "quickstart", "--tokens-per-sec=1e4", "train.steps=3", "--dry-run"],
    ],
)
def test_the_command_takes_its_options_in_any_order(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "describe_memory", lambda *_: ["as above"])
    assert train.main(arguments) == 0
    config = configuration.load("quickstart", ["train.steps=3", "optim.lr=1e-3"])
    output = capsys.readouterr()
    assert output.out == plan.describe(config, tokens_per_sec=1e4, price_per_hour=None) + "\n"
    assert output.err == "" and "in 3 steps of" in output.out and "lr: 0.001" in output.out
    assert not list(tmp_path.iterdir())  # a plan leaves nothing behind


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        *(
            (["--tokens-per-sec", value], f"{value!r} is not a number from 1e-6")
            for value in ("nan", "0", "1e-320", "fast")
        ),
        (["--tokens-per-sec", "-5"], "is not a number"),
        (["--dryrun"], "did you mean --dry-run?"),
        (["--config"], "expected one argument"),
        (["--resume", "bogus"], "allowed: auto, never, or a checkpoint's path"),
    ],
    ids=str,
)
def test_a_mistake_on_the_command_line_is_one_line(wrong: list[str], line: str, capsys: pytest.CaptureFixture) -> None:
    assert train.main(["--dry-run", *wrong]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and line in err and err.count("\n") == 1
