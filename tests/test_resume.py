"""The state beside the weights, and which checkpoint a run goes on from; whole runs are in test_train.py."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import checkpoint
import resume
import train
from config import Config, UserError
from resume import STATE_FILE, TrainState, check_config, check_content, learned, move_aside, pick

CONFIG = Config()
STATE = TrainState(
    learned(CONFIG), "documents", "tokens", "bf16", step=7, tokens=7 * 131072, skipped_steps=1,
    cursor={"row": 7, "places": [[0, 2, 1, 99]]}, loss_scale={"value": 65536.0, "good_steps": 3},
)  # fmt: skip


def changed(**sections: dict[str, Any]) -> Config:
    values = CONFIG.model_dump()
    return Config(**{name: section | sections.get(name, {}) for name, section in values.items()})


def make(root: Path, *steps: int) -> list[Path]:
    """Checkpoints of a run."""
    tensors = {"model": {"weight": torch.zeros(2)}}
    return [checkpoint.save(root / "checkpoints", step, tensors, {}, keep=99) for step in steps]


# ---- the state


def test_the_state_comes_back_equal(tmp_path: Path) -> None:
    (tmp_path / STATE_FILE).write_bytes(STATE.to_json())
    again = TrainState.read(tmp_path)
    assert again == STATE
    assert again.to_json() == STATE.to_json()


def test_the_state_s_bytes_depend_on_its_values_alone() -> None:
    other = TrainState(**{name: getattr(STATE, name) for name in reversed(STATE.__dataclass_fields__)})
    other.config = dict(reversed(STATE.config.items()))
    other.cursor = dict(reversed(STATE.cursor.items()))
    assert other.to_json() == STATE.to_json()
    other.step += 1
    assert other.to_json() != STATE.to_json()


def test_neither_place_nor_name_of_the_run_is_in_the_state() -> None:
    """Two runs that learn the same write the same bytes, wherever they lie and however much they log."""
    elsewhere = changed(
        run={"name": "other", "dir": "far/away"}, log={"every_steps": 3}, eval={"every_steps": 3},
        sample={"prompts": ("x",)}, checkpoint={"keep": 1},
    )  # fmt: skip
    assert learned(elsewhere) == learned(CONFIG)
    assert set(learned(CONFIG)) == {"model", "data", "train", "optim"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"schema": 1}, "of schema 1, this version of the program reads 2 and 3; go on with the version that wrote it"),
        ({}, "of schema None"),
        ({"schema": 2, "step": 3}, "config: Field required"),
        ({"schema": 2, **vars(STATE), "surprise": 1}, "surprise"),
        ([], "not a JSON object"),
    ],
)
def test_a_state_of_another_kind_is_refused(tmp_path: Path, content: object, message: str) -> None:
    (tmp_path / STATE_FILE).write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as caught:
        TrainState.read(tmp_path)
    assert STATE_FILE in str(caught.value) and "\n" not in str(caught.value)


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    (tmp_path / STATE_FILE).write_bytes(STATE.to_json()[:-40])
    with pytest.raises(UserError, match=STATE_FILE):
        TrainState.read(tmp_path)


def test_a_model_from_elsewhere_has_no_state_to_go_on_from(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"train\.init_from=") as caught:
        TrainState.read(tmp_path)
    assert str(tmp_path) in str(caught.value) and "without training state" in str(caught.value)


def draw(number: int) -> list[list[float]]:
    """Of torch, Python and numpy; an odd number of Gaussians leaves one waiting."""
    drawn = [(float(torch.rand(())), random.gauss(), float(np.random.standard_normal())) for _ in range(number)]
    return [list(values) for values in drawn]


def test_generators_of_every_rank_go_on_where_they_were(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        saved, expected = {}, []
        for rank in (0, 1):
            resume.restore_rng(7, None, cpu, rank)
            draw(5)
            saved |= {f"rank{rank}.{key}": value for key, value in resume.rng_state(cpu).items()}
            expected.append(draw(4))
        assert expected[0] != expected[1]
        path = checkpoint.save(tmp_path, 1, {"rng": saved}, {}, keep=1)
        for rank in (0, 1):
            resume.restore_rng(7, path, cpu, rank)
            assert draw(4) == expected[rank]
        resume.restore_rng(7, None, cpu)
        assert draw(9)[5:] == expected[0]  # a new run: from the seed alone
        resume.restore_rng(7, path, cpu, rank=2)  # of a rank that the checkpoint does not know
        assert draw(4) not in expected
        for key, value in (("cpu", torch.zeros(3, dtype=torch.uint8)), ("numpy", saved["rank0.numpy"][:9])):
            path = checkpoint.save(tmp_path / key, 1, {"rng": saved | {f"rank0.{key}": value}}, {}, keep=1)
            with pytest.raises(UserError, match="not as this program writes it"):
                resume.restore_rng(7, path, cpu)
    finally:
        torch.set_rng_state(before[0])
        random.setstate(before[1])
        np.random.set_state(before[2])


def test_a_checkpoint_of_the_version_before_goes_on(tmp_path: Path) -> None:
    """The golden one was written at commit e2d9dba: manifest of schema 1, state of schema 2, one rank's generator."""
    golden = Path(__file__).parent / "fixtures" / "checkpoint-v1"
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    shutil.copytree(golden / "step_00000002", tmp_path / "run" / "checkpoints" / "step_00000002")
    command = ["--config", str(golden / "config.yaml"), f"run.dir={tmp_path / 'run'}"]
    assert train.main([*command, f"data.sources={golden / 'text.txt'}"]) == 0
    lines = {name: (name / "metrics.jsonl").read_text().splitlines() for name in (golden, tmp_path / "run")}
    losses = {name: [json.loads(line)["loss"] for line in lines[name]] for name in lines}
    assert losses[tmp_path / "run"] == pytest.approx(losses[golden][2:], rel=1e-5)
    newest = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert newest is not None and checkpoint.verify(newest)["schema"] == checkpoint.SCHEMA


# ---- whether the configuration fits it


def fits(config: Config, *, sources: str = "documents", tokenizer: str = "tokens", precision: str = "bf16") -> None:
    check_config(STATE, config, precision)
    check_content(STATE, config, sources=sources, tokenizer=tokenizer)


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {
            "train": {
                "steps": 9,
                "tokens_per_active_param": 40.0,
                "micro_batch": 1,
                "recompute": "full",
                "init_from": "x",
            }
        },
        {"data": {"workers": 0, "sources": ("copy.parquet",)}},  # the same documents, elsewhere
        {"log": {"every_steps": 1}, "eval": {"tokens": 1}, "sample": {"top_k": 1}, "checkpoint": {"every_steps": 1}},
    ],
    ids=["nothing", "length and comfort", "data", "what is told"],
)
def test_what_may_change(sections: dict[str, Any]) -> None:
    fits(changed(**sections))


@pytest.mark.parametrize(
    ("sections", "key", "before", "now"),
    [
        ({"model": {"q_lora_rank": None}}, "model.q_lora_rank", "512", "None"),
        ({"data": {"val_fraction": 0.02}}, "data.val_fraction", "0.01", "0.02"),
        ({"data": {"shuffle_window": 2}}, "data.shuffle_window", "8", "2"),
        ({"optim": {"decay": 0.2}}, "optim.decay", "0.3", "0.2"),
        ({"train": {"mtp_weight": 0.5, "seed": 2}}, "train.mtp_weight", "0.3", "0.5"),  # the first in the alphabet
    ],
)
def test_what_must_not_change_is_named_with_both_values(
    sections: dict[str, Any], key: str, before: str, now: str
) -> None:
    with pytest.raises(UserError) as caught:
        fits(changed(**sections))
    message = str(caught.value)
    assert message.startswith(key) and before in message and now in message
    assert message.index(before, len(key)) < message.rindex(now) and "run.name=" in message and "\n" not in message


def test_other_documents_behind_the_same_name() -> None:
    """A file that was edited: naming the equal values would help nobody."""
    with pytest.raises(UserError, match=r"^data\.sources: the documents are not those the checkpoint was trained on"):
        fits(CONFIG, sources="others")


def test_other_documents_under_another_name() -> None:
    with pytest.raises(UserError, match=r"^data\.sources: .*fineweb-edu.*other\.txt"):
        fits(changed(data={"sources": ("other.txt",)}), sources="others")


def test_another_tokenizer_behind_the_same_name() -> None:
    with pytest.raises(
        UserError, match=r"^data\.tokenizer: 'openai-community/gpt2@.* is not the checkpoint's tokenizer"
    ):
        fits(CONFIG, tokenizer="others")


def test_precision_follows_a_new_card_only_when_left_to_it() -> None:
    fits(CONFIG, precision="fp16")
    fits(changed(train={"precision": "bf16"}), precision="bf16")
    with pytest.raises(UserError, match=r"^train\.precision: .*'bf16'.*'fp16'"):
        fits(changed(train={"precision": "fp16"}), precision="fp16")


# ---- which checkpoint


def test_a_new_run_starts_from_nothing(tmp_path: Path) -> None:
    assert pick(tmp_path / "run", "auto") is None and pick(tmp_path / "run", "never") is None
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)  # stopped before its first checkpoint
    assert pick(tmp_path / "run", "auto") is None


def test_auto_takes_the_newest_intact_one(tmp_path: Path) -> None:
    first, second, third = make(tmp_path, 9, 10, 100)
    assert pick(tmp_path, "auto") == third
    (third / "model.safetensors").write_bytes(b"x")
    assert pick(tmp_path, "auto") == second
    (second / "manifest.json").unlink()
    assert pick(tmp_path, "auto") == first


def test_never_moves_every_earlier_run_aside(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        make(tmp_path / "run", number)
        assert pick(tmp_path / "run", "never") is None and (tmp_path / "run").exists()
        move_aside(tmp_path / "run")
        assert not (tmp_path / "run").exists()
        assert [path.name for path in (tmp_path / f"run.{number}" / "checkpoints").iterdir()] == [f"step_{number:08d}"]
    (tmp_path / "run").mkdir()
    move_aside(tmp_path / "run")
    assert not (tmp_path / "run.4").exists()  # an empty folder is no run


def test_a_path_is_a_checkpoint_a_run_or_a_model(tmp_path: Path) -> None:
    older, newer = make(tmp_path / "other", 1, 2)
    run = tmp_path / "run"
    assert pick(run, str(older)) == older  # a branch
    assert pick(run, str(tmp_path / "other")) == newer
    assert pick(tmp_path / "other", str(newer)) == newer  # its own newest
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "model.safetensors").write_bytes(b"")
    assert pick(run, str(foreign)) == foreign


def test_a_path_does_not_overtake_what_a_run_has(tmp_path: Path) -> None:
    older, newer = make(tmp_path / "run", 1, 2)
    (elsewhere,) = make(tmp_path / "other", 3)
    with pytest.raises(UserError, match=f"has a later checkpoint, {newer.name}; branch to another run.name"):
        pick(tmp_path / "run", str(older))
    with pytest.raises(UserError, match=r"has checkpoints of its own; branch to another run\.name"):
        pick(tmp_path / "run", str(elsewhere))
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {older.name, newer.name}


def test_a_damaged_checkpoint_is_not_gone_on_from(tmp_path: Path) -> None:
    (path,) = make(tmp_path / "other", 1)
    (path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=r"model\.safetensors: 1 bytes, the manifest says"):
        pick(tmp_path / "run", str(path))


def test_the_free_keys_are_keys() -> None:
    """A renamed key must not silently become one that may not change."""
    assert set(resume.FREE_SECTIONS) < set(Config.model_fields)
    for key in (*resume.FREE_KEYS, *resume.ORDER):
        section, name = key.split(".")
        assert name in type(getattr(CONFIG, section)).model_fields


def test_a_run_that_was_killed_has_the_room_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What dead processes left goes, and the oldest checkpoints make room, as they would have without the kill."""
    root, size = tmp_path / "checkpoints", 2**20
    left = {"step_00000003.tmp-0123abcd", "step_00000001.trash-0123abcd", "step_00000002.hub-0123abcd"}
    kept = {
        "step_00000001",
        "step_00000002",
        "step_00000003",
        "step_00000002.bad-damaged",
        "step_00000003.old-0123abcd",
    }
    for name in left | kept:
        (root / name).mkdir(parents=True)
        with open(root / name / "model.safetensors", "wb") as file:
            file.truncate(size)

    def usage(_: Path) -> SimpleNamespace:
        return SimpleNamespace(free=6 * size - sum(file.stat().st_size for file in root.rglob("*.safetensors")))

    monkeypatch.setattr(checkpoint.shutil, "disk_usage", usage)
    checkpoint.preflight(tmp_path, 2 * size)
    assert {path.name for path in root.iterdir()} == kept
    with pytest.raises(UserError, match="are free, a checkpoint of this run takes"):
        checkpoint.preflight(tmp_path, 2 * size + 1)


def test_a_first_save_that_died_is_no_damaged_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step_00000010.tmp-0a1b2c3d").mkdir(parents=True)
    assert pick(tmp_path, "auto") is None


@pytest.mark.parametrize("wanted", ["auto", "never"])
def test_a_run_folder_that_is_a_file(tmp_path: Path, wanted: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        pick(tmp_path / "file", wanted)


def test_only_a_run_is_moved_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        move_aside(Path())
    assert (tmp_path / "thesis.tex").exists()


def test_a_section_that_appears_is_named_as_a_whole() -> None:
    before = Config()
    values = before.model_dump()
    values["model"]["rope_scaling"] = {"factor": 4.0}
    saved = TrainState(learned(before), "a", "b", "fp32")
    with pytest.raises(UserError, match=r"^model\.rope_scaling: .*None.*4\.0"):
        check_config(saved, Config(**values), "fp32")


def test_a_state_of_wrong_types(tmp_path: Path) -> None:
    values = json.loads(TrainState(learned(Config()), "a", "b", "fp32").to_json()) | {"step": "3"}
    (tmp_path / "training_state.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="step"):
        TrainState.read(tmp_path)
