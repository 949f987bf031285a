"""Chunked cross-entropy against torch's, and the balance loss against the paper's formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import losses


def problem(dtype: torch.dtype, rows: int = 21, vocabulary: int = 37, heads: int = 2):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(heads * rows, 8, generator=generator).to(dtype).requires_grad_()
    head = torch.randn(vocabulary, 8, generator=generator).requires_grad_()
    target = torch.randint(vocabulary, (heads, rows), generator=generator)
    target[0, [2, 7]] = losses.IGNORE
    weight = torch.rand(heads, generator=generator)
    return hidden, head, target, weight


def assert_equals_plain(dtype: torch.dtype, *, counted: bool = True, device: str = "cpu", **options: Any) -> None:
    hidden, head, target, weight = (tensor.to(device) for tensor in problem(dtype))
    hidden, head = hidden.detach().requires_grad_(), head.detach().requires_grad_()
    loss, nats, correct = losses.linear_cross_entropy(hidden, head, target, weight, **options)
    with torch.no_grad():
        assert torch.equal(losses.linear_cross_entropy(hidden, head, target, weight, **options)[1], nats)
    plain_loss, plain_nats, plain_correct = losses.linear_cross_entropy_reference(hidden, head, target, weight)
    atol, rtol = (1e-4, 1e-5) if dtype == torch.float32 else (4e-2, 1e-2)
    torch.testing.assert_close(loss, plain_loss, atol=atol, rtol=rtol)
    torch.testing.assert_close(nats, plain_nats, atol=atol, rtol=rtol)
    assert torch.equal(correct, plain_correct) if counted else correct.isnan().all()
    ours = torch.autograd.grad(loss * 3, (hidden, head))  # an incoming gradient other than 1
    theirs = torch.autograd.grad(plain_loss * 3, (hidden, head))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4 if dtype == torch.float32 else 0.15, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tile", [(1, 1), (5, 37), (8, 10), (99, 11), (99, 99)])
def test_chunked_equals_plain(dtype: torch.dtype, tile: tuple[int, int]) -> None:
    assert_equals_plain(dtype, path="chunked", tile=tile)


def test_a_large_vocabulary_is_met_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a run: the sizes follow from the device."""
    monkeypatch.setitem(losses.TILE_LOGITS, "cpu", 64)
    monkeypatch.setattr(losses, "LEAST_ROWS", 6)
    monkeypatch.setattr(losses, "WORDS", 4)
    of, met = losses._Tile.of, list[tuple[int, int]]()
    monkeypatch.setattr(losses._Tile, "of", lambda *args: met.append((args[0].start, args[0].stop)) or of(*args))
    assert_equals_plain(torch.float32)
    assert met[:4] == [(0, 12), (12, 24), (24, 36), (36, 37)]


@pytest.mark.skipif(not hasattr(torch.nn.functional, "linear_cross_entropy"), reason="needs torch 2.13")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_equals_plain(dtype: torch.dtype) -> None:
    assert_equals_plain(dtype, counted=False, path="torch")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_path_of_a_gpu_equals_plain(dtype: torch.dtype) -> None:
    for path in losses.loss_paths(torch.device("cuda")):
        assert_equals_plain(dtype, counted=path != "torch", device="cuda", path=path)
    assert_equals_plain(dtype, device="cuda", path="chunked", tile=(8, 10))


def test_rows_without_a_target_cost_nothing() -> None:
    hidden, head, target, weight = problem(torch.float32)
    loss, nats, _ = losses.linear_cross_entropy(hidden, head, target, weight)
    kept = target[0] != losses.IGNORE
    alone = losses.linear_cross_entropy(hidden[:21][kept], head, target[:1, kept], weight[:1])[1]
    torch.testing.assert_close(nats[0], alone[0])
    (gradient,) = torch.autograd.grad(loss, (hidden,))
    assert gradient[[2, 7]].abs().max() == 0


def test_extreme_logits_stay_finite() -> None:
    hidden = torch.tensor([[1000.0, 0.0], [0.0, 0.0]], requires_grad=True)
    head = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.5, 0.0]])
    loss, nats, _ = losses.linear_cross_entropy(hidden, head, torch.tensor([[1], [0]]), torch.ones(2))
    assert nats[0] == 2000 and nats[1] == pytest.approx(1.0986, abs=1e-4)
    loss.backward()
    assert hidden.grad is not None and hidden.grad.isfinite().all()


def test_gradients_are_given_away() -> None:
    """Not copied, scaled in place if at all, and gone then: a second backward is an error, not half a gradient."""
    hidden, head, target, weight = problem(torch.float32)
    loss = losses.linear_cross_entropy(hidden, head, target, weight)[0]
    place = loss.grad_fn.grads[1].data_ptr()  # type: ignore[union-attr]
    loss.backward(retain_graph=True)
    assert head.grad is not None and head.grad.data_ptr() == place
    with pytest.raises(RuntimeError, match="another forward"):
        loss.backward()


def test_no_gradient_is_computed_where_none_is_wanted() -> None:
    hidden, head, target, weight = problem(torch.float32)
    with torch.no_grad():
        loss, *_ = losses.linear_cross_entropy(hidden, head, target, weight)
    assert not loss.requires_grad


def test_balance_loss_is_the_papers() -> None:
    """alpha * sum_i f_i P_i per sequence (2412.19437, Eq. 17-20), written out for one sequence."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(2, 10, 6, generator=generator, requires_grad=True)
    chosen = scores.detach().topk(2, -1).indices
    expected = torch.zeros(())
    for sequence in range(2):
        normed = scores[sequence] / scores[sequence].sum(-1, keepdim=True)
        for expert in range(6):
            f = 6 / (2 * 10) * (chosen[sequence] == expert).sum()
            expected = expected + f * normed[:, expert].mean()
    value = losses.balance_loss(scores, chosen)
    torch.testing.assert_close(value, expected)
    ours, theirs = (torch.autograd.grad(loss, (scores,), retain_graph=True)[0] for loss in (value, expected))
    torch.testing.assert_close(ours, theirs)
    even = losses.balance_loss(torch.full((1, 6, 6), 0.5), torch.arange(12).view(1, 6, 2) % 6)
    assert even == pytest.approx(1.0)
