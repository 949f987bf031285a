"""How much memory a training step takes at its peak: the step is run on tensors without storage, and counted.

`peak` runs the real forward and backward pass, clipping and optimizers on device `meta`, where operations compute
shapes only, and adds up the storages that live after each of them. The caching allocator's rounding is counted in, what
an operation allocates and frees within itself is not. What no trace can see is stated as `CONTEXT` and `SLACK`.

It is the peak of training; validation and samples keep no gradients and take less. `train.compile` is left out: it
saves some.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ops
from config import Config, ModelConfig, OpsConfig, UserError
from model import DeepSeekV3, LossWeights
from optim import Optimizers, clip_gradients

META = torch.device("meta")
# Assumptions: nothing here was measured on a GPU. Which experts tokens choose is not known beforehand: the busiest gets
# this many times the mean. CUDA's context takes 0.4 to 0.6 GiB, the allocator about 8% more than is in use
# (published by others), and cuBLAS a workspace of 32 MiB on sm_90, of 8 before.
BUSIEST = 1.5
CONTEXT = 2**29 + 2**25
SLACK = 0.08
UNIT = {"cuda": 512, "cpu": 1}  # bytes, of which an allocation takes a multiple
LIVE: tuple[str, ...] = ("weights", "gradients", "optimizer state", "activations, temporaries")


class Peak(NamedTuple):
    """The most memory of a step, bytes. `parts` add up to `total`; `phase` is forward, backward or optimizer."""

    total: int
    parts: dict[str, int]
    phase: str

    @property
    def allocated(self) -> int:
        """Without slack and context: what `torch.cuda.max_memory_allocated` tells, but for cuBLAS's workspace."""
        return sum(self.parts[part] for part in LIVE)


def peak(config: Config, *, dtype: torch.dtype, rows: int, device_type: str = "cuda", world_size: int = 1) -> Peak:
    """The peak of one rank, at most `rows` at a time. Takes seconds: every operation of the step is run."""
    most = config.rank_rows(world_size)
    turns = -(-most // rows)
    rows = -(-most // turns)  # as train.micro_batches cuts them
    seq_len, depth = config.data.seq_len, config.model.num_nextn_predict_layers
    paths = _paths(config.ops, dtype, device_type)
    with META:
        model = DeepSeekV3(config.model, dtype, recompute=config.train.recompute, paths=paths)
    parameters, weights = list(model.parameters()), [*model.parameters(), *model.buffers()]
    ledger = _Ledger(UNIT[device_type], loads(config.model, rows * seq_len))
    with _standing_for(device_type, ledger):
        for tensor in weights:
            ledger.enter(tensor)
        optimizers = Optimizers(model, config.optim)
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizers.step(0.0)  # from the second step on its state is there all the time
        if turns == 1 and world_size == 1:
            optimizers.zero_grad()
        # DDP's buckets are the gradients, but lie beside them until the first reduction: resumed, with the state there.
        buckets = [torch.zeros_like(parameter) for parameter in parameters if turns > 1 and world_size > 1]
        ledger.begin("forward")
        tokens = torch.empty(rows, seq_len + 1 + depth, dtype=torch.int64, device=device_type)
        doc_ids, positions = ops.documents(tokens, 0) if config.data.document_mask else (None, None)
        out = model(
            tokens[:, :seq_len], tokens[:, 1:], loss_weights=LossWeights(1.0, (1.0,) * depth, 1.0), doc_ids=doc_ids,
            positions=None if positions is None else positions[:, :seq_len],
        )  # fmt: skip
        ledger.phase = "backward"
        # Not `out.loss.backward()`: torch takes function modes off while it runs a function that they may override.
        torch.autograd.Variable._execution_engine.run_backward(
            (out.loss,), (torch.ones_like(out.loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
        )
        in_buckets = ledger.at_peak(buckets)
        del buckets
        ledger.phase = "optimizer"
        clip_gradients(parameters, config.train.grad_clip)
        optimizers.step(0.0)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        known = [ledger.at_peak(tensors) for tensors in (weights, gradients, optimizers.state().values())]
    if ledger.peak_phase != "optimizer":
        known[1] += in_buckets
    parts: dict[str, int] = dict(zip(LIVE, (*known, ledger.peak - sum(known)), strict=True))
    if device_type == "cuda":
        parts |= {"allocator's slack": round(SLACK * ledger.peak), "CUDA context, cuBLAS": CONTEXT}
    return Peak(sum(parts.values()), parts, ledger.peak_phase)


def largest_micro_batch(
    config: Config, *, dtype: torch.dtype, available: int, device_type: str = "cuda", world_size: int = 1
) -> int:
    """The most rows at a time whose peak fits `available` bytes, CUDA's context among them. Raises UserError if one row
    does not fit. A number of rows that train.micro_batches would cut into smaller parts is not considered.
    """
    most = config.rank_rows(world_size)
    choices = sorted({-(-most // turns) for turns in range(1, most + 1)})
    trace = functools.partial(peak, config, dtype=dtype, device_type=device_type, world_size=world_size)
    first = trace(rows=1)
    if first.total > available:
        again = "" if config.train.recompute == "full" else "train.recompute=full, "
        raise UserError(
            f"one row of data.seq_len = {config.data.seq_len} takes {first.total / 2**30:.1f} GiB by the estimate, "
            f"{(first.total - available) / 2**30:.1f} more than there are: try {again}a smaller data.seq_len or preset"
        )
    low, high = 0, len(choices)  # choices[low] fits, choices[high] does not
    guess = bisect.bisect_right(choices, 8) - 1
    totals = {choices[0]: first.total}
    while high - low > 1:
        rows = choices[min(max(guess, low + 1), high - 1)]
        totals[rows] = trace(rows=rows).total
        if totals[rows] <= available:
            low = choices.index(rows)
        else:
            high = choices.index(rows)
        # Memory is nearly a line in rows: the next guess is where the one through the largest two meets the limit.
        before, last = sorted(totals)[-2:]
        slope = max(1.0, (totals[last] - totals[before]) / (last - before))
        guess = bisect.bisect_right(choices, last + (available - totals[last]) / slope) - 1
    return choices[low]


def loads(config: ModelConfig, tokens: int) -> list[int]:
    """Tokens per expert, as assumed: the busiest has `BUSIEST` times the mean, the others share the rest evenly."""
    pairs, others = tokens * config.num_experts_per_tok, config.n_routed_experts - 1
    busiest = min(tokens, math.ceil(BUSIEST * pairs / config.n_routed_experts))
    return [busiest, *((pairs - busiest + other) // others for other in range(others))]


def _paths(paths: OpsConfig, dtype: torch.dtype, device_type: str) -> OpsConfig:
    """Forms that run on `meta` and keep the same tensors, or more, as those of `paths`.

    Triton's and Liger's kernels cannot run there; like "auto" where bf16 is native they do without padding. Liger's and
    torch's losses take smaller chunks than ours.
    """
    if device_type == "cpu":
        return paths
    auto = "grouped" if dtype == torch.bfloat16 else "padded"
    experts = {"auto": auto, "triton": "grouped", "liger": "grouped"}.get(paths.experts, paths.experts)
    attention = "plain" if paths.attention == "plain" else "sdpa"
    return OpsConfig(experts=experts, attention=attention, loss="chunked")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ standing for a device


def _grouped_mm(x_SD: Tensor, weight_EDF: Tensor, *, offs: Tensor) -> Tensor:
    """Of the right shapes, also the gradients'. torch 2.9 has none, later ones are particular on `meta`."""
    return x_SD @ weight_EDF[0]


def _attention(
    q_BHTK: Tensor,
    k_BHSK: Tensor,
    v_BHSV: Tensor,
    *,
    scale: float,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
) -> Tensor:
    """All fused kernels keep inputs, output, a number per query and the mask that they are given."""
    aten, inputs = torch.ops.aten, (q_BHTK, k_BHSK, v_BHSV)
    if q_BHTK.device.type == "cpu":
        operation = aten._scaled_dot_product_flash_attention_for_cpu
        return operation(*inputs, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]
    if attn_mask is None:
        return aten._scaled_dot_product_flash_attention(*inputs, 0.0, is_causal, False, scale=scale)[0]
    mask_BHTS = attn_mask.expand(-1, q_BHTK.shape[1], -1, -1)
    return aten._scaled_dot_product_efficient_attention(*inputs, mask_BHTS, True, scale=scale)[0]


def _rms_norm(x_BTD: Tensor, shape: tuple[int, ...], weight_D: Tensor, eps: float) -> Tensor:
    """CUDA's norm keeps inputs and a number per row, this one two."""
    return F.layer_norm(x_BTD, shape, weight_D, None, eps)


class _ToMeta(TorchFunctionMode):
    """What is created on a device, or moved to one, goes to `meta`."""

    def __init__(self, loads: list[int]):
        super().__init__()
        self.loads = loads

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.tolist:  # only the tokens per expert are ever asked for
            return list(self.loads)
        if kwargs.get("device") is not None:
            kwargs = kwargs | {"device": META}
        return func(*(META if isinstance(arg, torch.device) else arg for arg in args), **kwargs)


class _Ledger(TorchDispatchMode):
    """Storages on `meta` as they come and go, and the most that lived at once."""

    def __init__(self, unit: int, loads: list[int]):
        super().__init__()
        self.unit, self.loads, self.inside = unit, loads, False
        self.storages: dict[int, tuple[weakref.ref, int, int]] = {}  # by identity: the storage, its bytes, its birth
        self.live = self.clock = 0
        self.begin("start")

    def begin(self, phase: str) -> None:
        """Forget the peak so far."""
        self.phase = self.peak_phase = phase
        self.peak, self.peak_clock = self.live, self.clock

    def enter(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self.storages:
            return
        size = -(-storage.nbytes() // self.unit) * self.unit
        self.storages[key] = (weakref.ref(storage, lambda _: self._leave(key)), size, self.clock)
        self.live += size
        if self.live > self.peak:
            self.peak, self.peak_clock, self.peak_phase = self.live, self.clock, self.phase

    def _leave(self, key: int) -> None:
        self.live -= self.storages.pop(key)[1]

    def at_peak(self, tensors: Iterable[Tensor]) -> int:
        """Bytes of these tensors, all alive now, that lived at the peak."""
        found = [self.storages[id(tensor.untyped_storage())] for tensor in tensors if tensor.is_meta]
        return sum(size for _, size, birth in found if birth <= self.peak_clock)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.clock += 1
        if func is torch.ops.aten._local_scalar_dense.default and not args[0].is_floating_point():
            return self.loads[0]  # only the busiest expert's tokens are ever asked for
        self.inside = True
        try:
            out = func(*args, **(kwargs or {}))
        finally:
            self.inside = False
        for tensor in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self.enter(tensor)
        return out


@contextlib.contextmanager
def _standing_for(device_type: str, ledger: _Ledger) -> Iterator[None]:
    """Tensors on `meta` say that they are on the device: the code asks them which form an operation takes.

    torch's own fake tensors do so, too, but without CUDA built in its autograd cannot run on those.
    """
    told = property(lambda tensor: META if ledger.inside else torch.device(device_type))
    stand_ins = {"grouped_mm": _grouped_mm, "scaled_dot_product_attention": _attention, "rms_norm": _rms_norm}
    with (
        mock.patch.multiple(F, create=True, **stand_ins),
        mock.patch.object(Tensor, "device", told, create=True),
        _ToMeta(ledger.loads),
        ledger,
    ):
        yield
