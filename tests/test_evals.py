"""Validation loss and bits per byte against a plain computation over the documents' text."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_model import build, tiny
from torch import Tensor

import data
import sources
import tokenizer
import tracker
from config import OpsConfig, SourceConfig
from data import Validation
from evals import evaluate
from model import DeepSeekV3
from parallel import Mesh

SEQ_LEN = 8
DOCUMENTS = ["Emma Woodhouse, handsome, clever, and rich", "naïve café — “quoted”", "x", "a comfortable home"]
CPU = torch.device("cpu")
ALONE = Mesh(0, 1, CPU)


@pytest.fixture(scope="module")
def model() -> DeepSeekV3:
    return build(tiny(vocab_size=300))


@pytest.fixture(scope="module")
def tok() -> Any:
    return tokenizer.train_bpe(DOCUMENTS, 300)


@pytest.fixture(scope="module")
def held_out(tok: Any, tmp_path_factory: pytest.TempPathFactory) -> Validation:
    """Every document is held out; the last row is only partly filled."""
    folder: Path = tmp_path_factory.mktemp("documents")
    for number, text in enumerate(DOCUMENTS):
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    manifest = sources.resolve([SourceConfig(path=str(folder))])
    encoder = tokenizer.Encoder(tok)
    found = data.validation(manifest, threshold=2**64, encoder=encoder, seq_len=SEQ_LEN, extra=2, tokens=10**6)
    assert found.num_documents == len(DOCUMENTS) and found.num_tokens % SEQ_LEN
    return found


def test_loss_and_bits_per_byte_of_the_documents(model: DeepSeekV3, tok: Any, held_out: Validation) -> None:
    """From the text, without rows, padding or the chunked head: the first EOS is context, all after it is predicted."""
    stream = [tok.eos_token_id]
    for text in DOCUMENTS:
        stream += [*tok.encode(text, add_special_tokens=False), tok.eos_token_id]
    nats, predicted = 0.0, 0
    for start in range(0, len(stream) - 1, SEQ_LEN):
        targets = torch.tensor(stream[start + 1 : start + 1 + SEQ_LEN])
        with torch.no_grad():
            logits = model(torch.tensor([stream[start : start + len(targets)]]))
        assert isinstance(logits, Tensor)
        nats += F.cross_entropy(logits[0].double(), targets, reduction="sum").item()
        predicted += len(targets)
    assert predicted == len(stream) - 1
    num_bytes = sum(len(text.encode("utf-8")) for text in DOCUMENTS)
    assert num_bytes > sum(map(len, DOCUMENTS))  # bytes are not characters here

    scores = evaluate(model, held_out, rows=2, mesh=ALONE)
    expected = {"val_loss": nats / predicted, "val_bpb": nats / math.log(2) / num_bytes}
    assert scores == pytest.approx(expected, rel=1e-5)


def test_isolated_documents(model: DeepSeekV3, tok: Any, held_out: Validation) -> None:
    """A row's documents one by one: each begins at its EOS, or at the row's start, and sees nothing before."""
    stream = [tok.eos_token_id]
    for text in DOCUMENTS:
        stream += [*tok.encode(text, add_special_tokens=False), tok.eos_token_id]
    nats, parts = 0.0, 0
    for row in range(0, len(stream) - 1, SEQ_LEN):
        end = min(row + SEQ_LEN, len(stream) - 1)
        starts = [row, *(at for at in range(row + 1, end) if stream[at] == tok.eos_token_id)]
        for start, stop in zip(starts, [*starts[1:], end], strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([stream[start:stop]]))
            assert isinstance(logits, Tensor)
            targets = torch.tensor(stream[start + 1 : stop + 1])
            nats += F.cross_entropy(logits[0].double(), targets, reduction="sum").item()
            parts += 1
    assert parts > len(held_out.tokens)
    scores = evaluate(model, held_out, rows=3, mesh=ALONE, eos=tok.eos_token_id)
    assert scores["val_loss"] == pytest.approx(nats / (len(stream) - 1), rel=1e-5)
    crossing = evaluate(model, held_out, rows=3, mesh=ALONE)
    assert scores["val_loss"] != pytest.approx(crossing["val_loss"], rel=1e-3)


def counted(model: DeepSeekV3, seen: list[int]) -> Any:
    """The model, noting how many rows it is given at a time."""

    def hidden(tokens: Tensor, **_: object) -> Any:
        seen.append(len(tokens))
        return model.hidden(tokens)

    return SimpleNamespace(hidden=hidden, lm_head=model.lm_head, paths=model.paths)


def test_rows_at_a_time_change_nothing(model: DeepSeekV3, held_out: Validation) -> None:
    seen: list[int] = []
    counting = counted(model, seen)

    count = len(held_out.tokens)
    whole = evaluate(model, held_out, rows=1000, mesh=ALONE)
    by_rows = evaluate(counting, held_out, rows=3, mesh=ALONE)  # type: ignore[arg-type]
    assert seen == [3] * (count // 3) + [count % 3] and count % 3 and count > 3  # the last batch is smaller
    assert by_rows == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("ranks", ["alone", "others"])
def test_memory_that_runs_out_halves_the_rows(model: DeepSeekV3, held_out: Validation, ranks: str) -> None:
    """Here, or on another rank alone; with not even one row fitting there is no score, and no end of the run."""
    seen: list[int] = []
    told: list[str] = []

    def hidden(tokens: Tensor, **_: object) -> Any:
        seen.append(len(tokens))
        if ranks == "alone" and len(tokens) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return model.hidden(tokens)

    class Others(OneOfSeveral):
        def any(self, *flags: bool) -> list[bool]:
            return [flags[0], flags[1] or seen[-1] > most]

    mesh = ALONE if ranks == "alone" else Others(0, 1, CPU)
    short: Any = SimpleNamespace(hidden=hidden, lm_head=model.lm_head, paths=model.paths)
    whole, most = evaluate(model, held_out, rows=2, mesh=ALONE), 2
    assert evaluate(short, held_out, rows=8, mesh=mesh, note=told.append) == whole
    assert seen[:3] == [min(8, len(held_out.tokens)), 4, 2] and len(told) == 2 and "2 rows at a time" in told[1]
    most = 0
    assert evaluate(short, held_out, rows=2, mesh=mesh, note=told.append) == {}
    assert "no validation loss" in told[-1]


def test_nothing_is_left_behind(model: DeepSeekV3, held_out: Validation) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generators = torch.get_rng_state()
    evaluate(model, held_out, rows=4, mesh=ALONE)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), generators) and model.training


@dataclass(frozen=True)
class OneOfSeveral(Mesh):
    """A rank alone: what it would reduce is kept for the test to add up."""

    partial: list[Tensor] = field(default_factory=list)

    def sum(self, tensor: Tensor) -> Tensor:
        self.partial.append(tensor.clone())
        return tensor

    def any(self, *flags: bool) -> list[bool]:
        return list(flags)


@pytest.mark.parametrize("world_size", [3, 11])
def test_ranks_share_the_rows(model: DeepSeekV3, held_out: Validation, world_size: int) -> None:
    """Every rank makes the same collective call, even one without rows; together they see each row once."""
    assert world_size == 3 or world_size > len(held_out.tokens)
    sums = torch.zeros(2, dtype=torch.float64)

    for rank in range(world_size):
        mesh = OneOfSeveral(rank, world_size, CPU)
        evaluate(model, held_out, rows=1, mesh=mesh)
        assert len(mesh.partial) == 1
        sums += mesh.partial[0]
    assert sums[1] == held_out.num_tokens
    whole = evaluate(model, held_out, rows=4, mesh=ALONE)
    assert (sums[0] / sums[1]).item() == pytest.approx(whole["val_loss"], rel=1e-6)


def test_no_held_out_document_is_no_score() -> None:
    def uncalled(*_: Tensor) -> Any:
        raise AssertionError("there is nothing to evaluate")

    nothing = Validation(torch.zeros(0, 8, dtype=torch.int64), torch.zeros(0, 9, dtype=torch.int64), 0, 0, 0)
    assert evaluate(uncalled, nothing, rows=4, mesh=ALONE) == {}  # type: ignore[arg-type]


def test_scores_that_are_not_finite_are_null(tmp_path: Path) -> None:
    """A model on its way to infinity still gets its metrics line and its checkpoint."""
    model: Any = SimpleNamespace(
        paths=OpsConfig(),
        hidden=lambda tokens, **_: (torch.full((1, 2, 3), float("inf")), []),
        lm_head=torch.nn.Linear(3, 5),
    )
    rows = torch.zeros(1, 2, dtype=torch.int64)
    mesh = Mesh(0, 1, torch.device("cpu"))
    scores = evaluate(model, Validation(rows, rows, 1, 1, 1), rows=1, mesh=mesh)
    assert scores == {"val_loss": None, "val_bpb": None}
    told = tracker.Tracker(tmp_path, total_steps=2, first_step=0, out=io.StringIO())
    told.log(1, scores)
    assert tracker.cut_short(tmp_path, 1) == []  # or each start would evaluate again
    held_out = Validation(rows.repeat(2, 1), rows.repeat(2, 1), 1, 1, 1)
    told.log(2, evaluate(model, held_out, rows=1, mesh=mesh, stop=lambda: True))
    assert tracker.cut_short(tmp_path, 2) == [tracker.METRICS]
    tracker.score(tmp_path, 2, scores)
    assert tracker.cut_short(tmp_path, 2) == [] and tracker.logged(tmp_path, 2)[1] == {"step": 2, **scores}
