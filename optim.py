"""Muon and AdamW, schedules as pure functions, router biases, the fp16 loss scale.

Muon (kellerjordan.github.io/posts/muon) steps along the orthogonalised Nesterov momentum of a matrix. With Moonlight's
scale 0.2 * sqrt(max(rows, cols)) (2502.16982, Eq. 4) its update has AdamW's usual size, so that both share one learning
rate, schedule and weight decay. `torch.optim.Muon` takes 2-D parameters only, and the `muon-optimizer` package treats a
stacked tensor's fused gate and up as one matrix: ours takes every expert, and gate and up, on its own, in batches.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from config import OptimConfig
from model import DeepSeekV3, moe_layers
from ops import DTYPES

NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # quintic of Keller Jordan's Newton-Schulz iteration
NS_STEPS = 5
NS_BATCH_ELEMENTS = 2**25  # orthogonalised at once, which bounds the temporaries; a single matrix may be larger


def newton_schulz(x_XAB: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrices, roughly: singular values end within about 0.7..1.2.

    Args:
        x_XAB: matrices of Frobenius norm 1 with A <= B; the arithmetic is that of their dtype.
    """
    a, b, c = NS_COEFFICIENTS
    for _ in range(NS_STEPS):
        gram_XAA = torch.bmm(x_XAB, x_XAB.mT)
        poly_XAA = torch.baddbmm(gram_XAA, gram_XAA, gram_XAA, beta=b, alpha=c)
        x_XAB = torch.baddbmm(x_XAB, poly_XAA, x_XAB, beta=a)
    return x_XAB


def as_matrices(parameter: Tensor, split: int) -> Tensor:
    """A view (X, rows, cols) of a 2-D parameter, or of stacked ones whose rows are `split` matrices each."""
    return parameter.unflatten(-2, (split, -1)).flatten(0, -3)


class Muon(torch.optim.Optimizer):
    """Muon over 2-D and stacked 3-D parameters, orthogonalised in batches of equal shape. Needs no process group.

    A group may hold `split`: how many matrices lie below each other in its parameters (2 for fused gate and up).
    """

    def __init__(
        self, params: Iterable, lr: float, *, momentum: float = 0.95, weight_decay: float = 0.1,
        ns_dtype: torch.dtype = torch.bfloat16, momentum_dtype: torch.dtype = torch.float32,
    ):  # fmt: skip
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "split": 1})
        self.ns_dtype, self.momentum_dtype = ns_dtype, momentum_dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        buckets: dict[tuple[int, int], list[_Matrices]] = defaultdict(list)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter, dtype=self.momentum_dtype)
                weight, grad, momentum = (
                    as_matrices(tensor, group["split"]) for tensor in (parameter, parameter.grad, state["momentum"])
                )
                for part in _Matrices(weight, grad, momentum, group).parts():
                    buckets[part.shape].append(part)
        for entries in buckets.values():
            for batch in _batches(entries):
                self._update(batch)

    def _update(self, batch: list[_Matrices]) -> None:
        short, long = batch[0].shape
        x_XAB = batch[0].weight.new_empty(sum(len(part.weight) for part in batch), short, long, dtype=self.ns_dtype)
        places = x_XAB.split([len(part.weight) for part in batch])
        for part, place in zip(batch, places, strict=True):
            nesterov = part.moved_momentum()
            norm_X11 = torch.linalg.matrix_norm(nesterov, keepdim=True).clamp_(min=1e-7)
            place.copy_(part.upright(nesterov.div_(norm_X11)))
        for part, direction in zip(batch, newton_schulz(x_XAB).split([len(place) for place in places]), strict=True):
            lr = part.group["lr"]
            part.weight.mul_(1 - lr * part.group["weight_decay"])
            part.upright(part.weight).add_(direction, alpha=-lr * 0.2 * math.sqrt(long))


class _Matrices(NamedTuple):
    """Views (X, rows, cols) of one parameter, or of some of its stacked matrices."""

    weight: Tensor
    grad: Tensor
    momentum: Tensor
    group: dict[str, Any]

    @property
    def shape(self) -> tuple[int, int]:
        """The shorter side, the longer."""
        rows, cols = self.weight.shape[-2:]
        return min(rows, cols), max(rows, cols)

    def upright(self, matrices: Tensor) -> Tensor:
        """With the shorter side first."""
        return matrices if self.weight.shape[-2] <= self.weight.shape[-1] else matrices.mT

    def parts(self) -> Iterator[_Matrices]:
        """Few enough at a time for NS_BATCH_ELEMENTS."""
        at_once = max(1, NS_BATCH_ELEMENTS // (self.shape[0] * self.shape[1]))
        for start in range(0, len(self.weight), at_once):
            part = slice(start, start + at_once)
            yield _Matrices(self.weight[part], self.grad[part], self.momentum[part], self.group)

    def moved_momentum(self) -> Tensor:
        """Move the momentum; the Nesterov direction, fp32."""
        share = 1 - self.group["momentum"]
        if self.momentum.dtype == self.grad.dtype:
            return torch.lerp(self.momentum.lerp_(self.grad, share), self.grad, share)
        momentum = self.momentum.float().lerp_(self.grad, share)
        self.momentum.copy_(momentum)
        return momentum.lerp_(self.grad, share)


def _batches(entries: list[_Matrices]) -> Iterator[list[_Matrices]]:
    batch, size = [], 0
    for entry in entries:
        if batch and size + entry.weight.numel() > NS_BATCH_ELEMENTS:
            yield batch
            batch, size = [], 0
        batch.append(entry)
        size += entry.weight.numel()
    yield batch


def uses_muon(name: str, parameter: Tensor) -> bool:
    """Hidden matrices; not embedding, head, router and norms."""
    return parameter.dim() >= 2 and not any(key in name for key in ("embed_tokens", "lm_head", "mlp.gate.weight"))


class Optimizers:
    """The optimizers of a model as one: one learning rate, state keyed by parameter name."""

    def __init__(self, model: DeepSeekV3, config: OptimConfig):
        self.names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        ns_dtype = model.dtype if config.ns_dtype == "auto" else DTYPES[config.ns_dtype]
        muon, adamw = [], []
        for parameter, name in self.names.items():
            if config.name == "muon" and uses_muon(name, parameter):
                muon.append({"params": [parameter], "split": 2 if name.endswith("experts.gate_up_proj") else 1})
            else:
                adamw.append(
                    {"params": [parameter], "weight_decay": config.weight_decay if parameter.dim() > 1 else 0.0}
                )
        self.all: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(adamw, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
        ]
        if muon:
            muon_options = {"momentum": config.momentum, "weight_decay": config.weight_decay, "ns_dtype": ns_dtype}
            self.all.append(Muon(muon, config.lr, **muon_options, momentum_dtype=DTYPES[config.momentum_dtype]))

    def step(self, lr: float) -> None:
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()

    def zero_grad(self, *, set_to_none: bool = True) -> None:
        for optimizer in self.all:
            optimizer.zero_grad(set_to_none=set_to_none)

    def state(self) -> dict[str, Tensor]:
        """`<parameter name>.<state name>` -> tensor: momentum, or exp_avg, exp_avg_sq and step."""
        return {
            f"{self.names[parameter]}.{key}": value
            for optimizer in self.all
            for parameter, state in optimizer.state.items()
            for key, value in state.items()
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state`. Raises ValueError where tensors and parameters do not belong together.

        No tensor at all is the state before the first step.
        """
        parameters = {name: parameter for parameter, name in self.names.items()}
        owner = {parameter: opt for opt in self.all for group in opt.param_groups for parameter in group["params"]}
        keys = {opt: {"momentum"} if isinstance(opt, Muon) else {"step", "exp_avg", "exp_avg_sq"} for opt in self.all}
        wanted = {f"{name}.{key}" for name, parameter in parameters.items() for key in keys[owner[parameter]]}
        if tensors and (missing := wanted - tensors.keys()):
            raise ValueError(f"no optimizer state {min(missing)}")
        for optimizer in self.all:
            optimizer.state.clear()
        for full_name, tensor in tensors.items():
            name, _, key = full_name.rpartition(".")
            if name not in parameters:
                raise ValueError(f"optimizer state of {name}, which the model does not have")
            if full_name not in wanted:
                raise ValueError(f"optimizer state {full_name}, which its optimizer does not have")
            parameter = parameters[name]
            if key != "step" and tensor.shape != parameter.shape:
                raise ValueError(
                    f"optimizer state {full_name} has shape {tuple(tensor.shape)}, not {tuple(parameter.shape)}"
                )
            # A copy: what the checkpoint's reader returns is mapped from its file.
            owner[parameter].state[parameter][key] = tensor.to(parameter.device, copy=True)


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, scale: float = 1.0) -> Tensor:
    """Divide gradients by the loss `scale`, limit their global norm, and return the norm before limiting, fp32 ().

    Under a norm that is not finite the gradients stay as they are: the caller skips the step, and may look at them.
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm(grads) / scale
    factor = torch.where(norm.isfinite(), max_norm / norm.clamp(min=max_norm) / scale, 1.0)
    for grad in grads:
        grad.mul_(factor)
    return norm


def lr_at(step: int, steps: int, config: OptimConfig) -> float:
    """The learning rate of step 0..steps-1: linear warm-up, then cosine, or constant and a linear end (WSD)."""
    warmup = round(config.warmup * steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "cosine":
        done = (step - warmup) / max(1, steps - 1 - warmup)
        fall = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    else:
        decay = min(round(config.decay * steps), steps - 1)  # a run starts at the peak, if it is one step
        fall = min(1.0, (steps - 1 - step) / decay) if decay else 1.0
    return config.lr * (config.min_lr + (1 - config.min_lr) * fall)


@torch.no_grad()
def update_router_bias(model: DeepSeekV3, counts_LE: Tensor, speed: float) -> None:
    """Auxiliary-loss-free balancing (2408.15664): raise the bias of experts below the mean load, lower it above.

    Args:
        counts_LE: tokens per expert of the whole step, over micro-batches and ranks, in the order of `moe_layers`.
    """
    for layer, counts_E in zip(moe_layers(model), counts_LE.float(), strict=True):
        bias_E = layer.gate.e_score_correction_bias
        bias_E += speed * torch.sign(counts_E.mean() - counts_E)


@dataclass
class LossScale:
    """Dynamic loss scale of fp16: halved when a gradient overflows, doubled after `growth_interval` good steps.

    With `dynamic` false it stays 1, for the other precisions.
    """

    dynamic: bool = False
    value: float = 1.0
    good_steps: int = 0
    growth_interval: int = 500

    def update(self, finite: bool) -> None:
        if not self.dynamic:
            return
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.value = max(self.value / 2, 1.0)
        elif self.good_steps == self.growth_interval:
            self.value, self.good_steps = self.value * 2, 0
