"""Attention and experts against their plain references, forward and backward."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor

import ops

TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}


def leaf(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    return values.to(dtype).requires_grad_()


def gradients(function, leaves: list[Tensor]) -> list[Tensor]:
    out = function(*leaves)
    out = out[0] if isinstance(out, tuple) else out
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]


def assert_close(ours: list[Tensor], theirs: list[Tensor], dtype: torch.dtype) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        scale = max(1.0, float(other.abs().max()))
        assert (mine.double() - other.double()).abs().max() <= TOLERANCE[dtype] * scale


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("widths", [(16, 16), (24, 8), (10, 20)])
@pytest.mark.parametrize("length", [1, 33, 600])
def test_attention_equals_the_reference(dtype: torch.dtype, widths: tuple[int, int], length: int) -> None:
    key, value = widths
    shapes = [(2, 2, length, key), (2, 2, length, key), (2, 2, length, value)]
    leaves = [leaf(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes)]
    exact = [tensor.detach().double().requires_grad_() for tensor in leaves]

    def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.mT * 0.3).masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
        return scores.softmax(-1) @ v

    theirs = gradients(written_out, exact)
    for path in ("auto", "plain", "sdpa"):
        ours = gradients(lambda q, k, v, path=path: ops.attention(q, k, v, scale=0.3, path=path), leaves)
        assert_close(ours, theirs, dtype)


def test_documents_start_at_eos() -> None:
    tokens = torch.randint(4, (5, 40), generator=torch.Generator().manual_seed(0))
    tokens[0, 0], tokens[1, 0], tokens[2, -1] = 3, 0, 3
    tokens[3], tokens[4] = 0, 3  # none, and nothing else
    doc_ids, positions = ops.documents(tokens, eos=3)
    for row, ids, places in zip(tokens.tolist(), doc_ids.tolist(), positions.tolist(), strict=True):
        document, place = 0, -1
        for token, found in zip(row, zip(ids, places, strict=True), strict=True):
            document, place = (document + 1, 0) if token == 3 else (document, place + 1)
            assert found == (document, place)
    assert doc_ids.dtype == positions.dtype == torch.int64


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("widths", [(16, 16), (24, 8)])
@pytest.mark.parametrize("lengths", [[[7], [7]], [[1, 5, 1], [3, 4]], [[600, 13, 1], [1, 613]]])
def test_attention_within_documents(dtype: torch.dtype, widths: tuple[int, int], lengths: list[list[int]]) -> None:
    """Equals each document's own attention."""
    total = sum(lengths[0])
    shapes = [(2, 2, total, width) for width in (widths[0], *widths)]
    leaves = [leaf(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes)]
    exact = [tensor.detach().double().requires_grad_() for tensor in leaves]

    def apart(*qkv: Tensor) -> Tensor:
        rows = []
        for row, counts in enumerate(lengths):
            parts = zip(*(tensor[row : row + 1].split(counts, dim=2) for tensor in qkv), strict=True)
            rows.append(torch.cat([ops.attention_plain(*part, scale=0.3) for part in parts], 2))
        return torch.cat(rows)

    ids = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths])
    mask = ops.document_mask(ids, dtype)
    assert mask.shape == (2, 1, total, total) and mask.dtype == dtype and mask.isfinite().all()
    theirs = gradients(apart, exact)
    for path in ("auto", "plain", "sdpa"):
        ours = gradients(lambda *qkv, path=path: ops.attention(*qkv, scale=0.3, path=path, mask_B1TS=mask), leaves)
        assert_close(ours, theirs, dtype)


def test_the_layout_of_a_fused_result_is_that_of_the_queries() -> None:
    """model.py flattens the heads behind the tokens without a copy."""
    queries, keys, values = (torch.randn(2, 5, 3, 8).transpose(1, 2) for _ in range(3))
    assert ops.attention(queries, keys, values, scale=0.3, path="sdpa").transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(("path", "masked", "used"), [
    ("flash", False, "flash"), ("flash", True, "efficient"), ("efficient", True, "efficient"), ("cudnn", True, "cudnn"),
])  # fmt: skip
def test_the_kernel_that_is_asked_for(path: str, masked: bool, used: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(ops, "sdpa_kernel", lambda backend: asked.append(backend) or contextlib.nullcontext())
    q = leaf(1, 2, 6, 8)
    mask = ops.document_mask(torch.zeros(1, 6, dtype=torch.int64), q.dtype) if masked else None
    out = ops.attention(q, q, q, scale=0.3, path=path, mask_B1TS=mask)
    assert asked == [ops.FUSED[used]]
    torch.testing.assert_close(out, ops.attention_plain(q, q, q, scale=0.3))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 48)])
def test_norm_equals_torchs(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    leaves = [leaf(*shape, dtype=dtype, scale=3), leaf(shape[-1], seed=1)]
    exact = [tensor.detach().double().requires_grad_() for tensor in leaves]
    ours = gradients(lambda x, weight: ops.rms_norm(x, weight, 0.1, dtype), leaves)
    theirs = gradients(lambda x, weight: torch.nn.functional.rms_norm(x, weight.shape, weight, 0.1), exact)
    assert ours[0].dtype == ours[1].dtype == dtype and ours[2].dtype == torch.float32
    assert_close(ours, theirs, dtype)
    with torch.no_grad():
        again = ops.rms_norm(*leaves, 0.1, dtype)
        if not ops.few(leaves[0]):  # bit for bit: validation is to route as training does
            assert torch.equal(again, ours[0])
        assert_close([again], theirs[:1], dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 12), (1, 1, 12), (2, 1, 12), (8, 12), (9, 12), (0, 12)])
def test_a_few_rows_times_a_weight(shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = leaf(*shape, dtype=dtype), leaf(20, 12, seed=1)
    with torch.no_grad(), monkeypatch.context() as patch:
        if len(x) < 9:
            patch.setattr(torch.nn.functional, "linear", None)
        ours = ops.linear(x, weight)
    theirs = torch.nn.functional.linear(x.double(), weight.double()).detach()
    assert ours.dtype == dtype and ours.shape == theirs.shape
    if len(x):
        assert_close([ours], [theirs], dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("chosen", [[[3, 1]], [[0, 2], [0, 1], [3, 0]], [[2, 1]] * 8])
def test_a_few_tokens_of_experts(chosen: list[list[int]], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Generation's path: no gradients, only the chosen experts."""
    expert = torch.tensor(chosen)
    x, weight = leaf(len(chosen), 16, dtype=dtype), leaf(*expert.shape, seed=1)
    gate_up, down = leaf(4, 12, 16, seed=2, scale=0.3), leaf(4, 16, 6, seed=3, scale=0.3)
    exact = (weight.double(), gate_up.double(), down.double())
    with torch.no_grad():
        with monkeypatch.context() as patch:
            patch.setattr(ops, "_slots", None)
            ours, counts = ops.grouped_experts(x, expert, weight, gate_up, down)
        theirs, wanted = ops.grouped_experts_reference(x.double(), expert, *exact)
        plain = ops.grouped_experts(x.repeat(9, 1), expert.repeat(9, 1), weight.repeat(9, 1), gate_up, down)[0]
    assert ours.dtype == dtype and torch.equal(counts, wanted)
    assert_close([ours, plain[: len(x)]], [theirs, theirs], dtype)


EXPERTS = {  # tokens, hidden, width, experts, active
    "usual": (50, 16, 8, 6, 2), "one token": (1, 16, 8, 4, 2), "all experts": (9, 8, 8, 3, 3), "odd": (23, 7, 5, 5, 3),
    "many experts, most empty": (4, 8, 8, 64, 2),
}  # fmt: skip


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("routing", ["random", "one expert", "skewed"])
@pytest.mark.parametrize("name", EXPERTS)
def test_experts_equal_the_loop(name: str, routing: str, dtype: torch.dtype) -> None:
    tokens, hidden, width, experts, active = EXPERTS[name]
    generator = torch.Generator().manual_seed(1)
    affinity = torch.rand(tokens, experts, generator=generator)
    if routing == "one expert":
        affinity[:, 0] += 10
    elif routing == "skewed":
        affinity += torch.linspace(2, 0, experts)
    chosen = affinity.topk(active, -1).indices
    leaves = [leaf(tokens, hidden, dtype=dtype), leaf(tokens, active, seed=2)]
    leaves += [leaf(experts, 2 * width, hidden, seed=3, scale=0.3), leaf(experts, hidden, width, seed=4, scale=0.3)]

    def run(function, x, weight, gate_up, down, *path):
        return function(x, chosen, weight, gate_up, down, *path)

    theirs = gradients(lambda *args: run(ops.grouped_experts_reference, *args), leaves)
    paths = ops.experts_paths(torch.device("cpu"), dtype, hidden, width)
    assert {"padded", "loop"} <= set(paths)
    for path in ("auto", *paths):
        ours = gradients(lambda *args, path=path: run(ops.grouped_experts, *args, path), leaves)
        assert_close(ours, theirs, dtype)
    counts = run(ops.grouped_experts, *leaves)[1]
    assert counts.tolist() == torch.bincount(chosen.flatten(), minlength=experts).tolist()
    assert counts.sum() == tokens * active  # nothing is dropped


def test_padding_that_overflows_in_fp16_poisons_nothing() -> None:
    """Padding repeats token 0 at experts that it did not choose, where its activation may be anything."""
    x = leaf(9, 4, dtype=torch.float16).detach().abs().requires_grad_()
    chosen = torch.tensor([[0]] * 5 + [[1]] * 4)
    weight = torch.ones(9, 1)
    with torch.no_grad():
        x[:5] *= 100
        x[5:] *= 0.01
    gate_up, down = torch.ones(2, 8, 4, requires_grad=True), torch.ones(2, 4, 4, requires_grad=True)
    with torch.no_grad():
        gate_up[0] *= 1e-3
        gate_up[1] *= 3
    out = ops.grouped_experts(x, chosen, weight, gate_up, down, "padded")[0]
    assert out.isfinite().all()
    for gradient in torch.autograd.grad(out.float().sum(), (x, gate_up, down)):
        assert gradient.isfinite().all()


def test_many_experts_are_summed_in_fp32() -> None:
    """Eight bf16 outputs rounded once: within a rounding of the exact sum, forward and backward."""
    tokens, active, hidden = 64, 8, 32
    y = leaf(tokens * active, hidden, dtype=torch.bfloat16)
    slots = torch.randperm(tokens * active, generator=torch.Generator().manual_seed(2)).view(tokens, active)
    token_of = torch.empty(tokens * active, dtype=torch.int64)
    token_of[slots.flatten()] = torch.arange(tokens).repeat_interleave(active)
    exact = y.double()[slots].sum(1).float().bfloat16()
    assert torch.equal(ops._FromSlots.apply(y, slots, token_of), exact)
    x = leaf(tokens, hidden, dtype=torch.bfloat16, seed=3)
    grad = leaf(tokens * active, hidden, dtype=torch.bfloat16, seed=4).detach()
    ops._ToSlots.apply(x, slots, token_of).backward(grad)
    assert x.grad is not None and torch.equal(x.grad, grad.double()[slots].sum(1).float().bfloat16())


@pytest.mark.parametrize(("path", "expert", "used"), [
    ("auto", 0, "grouped" if hasattr(torch.nn.functional, "grouped_mm") else "split"),
    ("padded", 0, "split"),  # padding would make 16 times the rows
    ("padded", None, "padded"),
])  # fmt: skip
def test_the_product_that_is_taken(path: str, expert: int | None, used: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    for name in ("grouped", "split", "padded"):
        real = getattr(ops, f"_{name}_product")
        monkeypatch.setattr(ops, f"_{name}_product", lambda *args, n=name, f=real: taken.append(n) or f(*args))
    x, weight = leaf(64, 16), leaf(64, 1)
    gate_up, down = leaf(16, 16, 16, seed=3), leaf(16, 16, 8, seed=4)
    chosen = (torch.arange(64) % 16 if expert is None else torch.full((64,), expert))[:, None]
    expected = ops.grouped_experts_reference(x, chosen, weight, gate_up, down)[0]
    out = ops.grouped_experts(x, chosen, weight, gate_up, down, path)[0]
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    assert taken == [used] * 2
