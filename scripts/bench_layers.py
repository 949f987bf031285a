"""The suites of `bench.py` for one operation: moe, attention, loss, optim."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules lie beside this folder

import torch
import torch.nn.functional as F
from duels import TOLERANCE, Bench, Rows, Run
from torch import Tensor, nn

import losses
import ops
from model import MLP
from ops import DTYPES
from optim import Muon, Optimizers, as_matrices


def layer_duels(
    bench: Bench, runs: Mapping[str, Run], leaves: Mapping[str, Tensor], grad: Tensor, unlike: str = "", **facts: Any
) -> Rows:
    """Forward and backward of each. Before, results and gradients of all but `unlike` are compared with the first's."""

    def both(run: Run) -> tuple[Any, ...]:
        result = run()
        return result, *torch.autograd.grad(result, list(leaves.values()), grad, allow_unused=True)

    first, *others = runs
    wanted = both(runs[first])
    for name in others:
        for part, ours, theirs in zip(("result", *leaves), wanted, both(runs[name]), strict=True):
            if name != unlike and ours is not None:
                bench.check(f"{name}, {part}", ours, theirs, TOLERANCE[bench.precision])
    makers = {name: lambda run=run: functools.partial(both, run) for name, run in runs.items()}
    return bench.duels(makers, **facts)


def bench_moe(bench: Bench) -> Rows:
    cfg, num, rows, dense = bench.config.model, bench.num_tokens, [], "dense, equal active width"
    hidden, width = cfg.hidden_size, cfg.moe_intermediate_size
    experts, active = cfg.n_routed_experts, cfg.num_experts_per_tok
    x, grad = bench.tensor(num, hidden), bench.tensor(num, hidden, grad=False)
    weight = bench.tensor(num, active, dtype="fp32")
    gate_up = bench.tensor(experts, 2 * width, hidden, dtype="fp32", scale=hidden**-0.5)
    down = bench.tensor(experts, hidden, width, dtype="fp32", scale=width**-0.5)
    mlp = MLP(hidden, active * width).to(bench.device)
    leaves = {"x": x, "gate_up": gate_up, "down": down, "weight": weight, **dict(mlp.named_parameters())}
    for skew in (0.0, 1.0, 3.0):
        logits = torch.randn(num, experts, generator=bench.rng) + skew * torch.linspace(-1, 1, experts)
        chosen = logits.topk(active).indices.to(bench.device)
        arguments = (x, chosen, weight, gate_up, down)
        runs: dict[str, Run] = {
            "ours": lambda arguments=arguments: ops.grouped_experts(*arguments)[0],
            "expert by expert": lambda arguments=arguments: ops.grouped_experts_reference(*arguments)[0],
            dense: functools.partial(mlp, x),
        }
        counts = torch.bincount(chosen.flatten(), minlength=experts)
        load = round(float(counts.max() / counts.double().mean()), 2)
        rows += layer_duels(bench, runs, leaves, grad, unlike=dense, busiest_over_mean=load)
    return rows


def bench_attention(bench: Bench) -> Rows:
    cfg, rows, scale = bench.config.model, [], bench.config.model.qk_head_dim**-0.5
    for length in sorted({256, 1024, bench.config.data.seq_len}):
        batch = max(1, bench.num_tokens // length)
        shape = (batch, cfg.num_attention_heads, length)
        q, k = (bench.tensor(*shape, cfg.qk_head_dim) for _ in range(2))
        v, grad = bench.tensor(*shape, cfg.v_head_dim), bench.tensor(*shape, cfg.v_head_dim, grad=False)
        torchs = functools.partial(F.scaled_dot_product_attention, is_causal=True)
        functions = {"ours": ops.attention, "plain": ops.attention_plain, "torch": torchs}
        runs = {name: functools.partial(function, q, k, v, scale=scale) for name, function in functions.items()}
        rows += layer_duels(bench, runs, {"q": q, "k": k, "v": v}, grad, tokens=length, rows=batch)
    return rows


def bench_loss(bench: Bench) -> Rows:
    cfg, num = bench.config.model, bench.num_tokens
    hidden = bench.tensor(num, cfg.hidden_size)
    head = bench.tensor(cfg.vocab_size, cfg.hidden_size, dtype="fp32", scale=cfg.hidden_size**-0.5)
    target = torch.randint(cfg.vocab_size, (1, num), generator=bench.rng).to(bench.device)
    arguments = (hidden, head, target, torch.full((1,), 1 / num, device=bench.device))
    runs: dict[str, Run] = {
        "ours": lambda: losses.linear_cross_entropy(*arguments)[0],
        "full logits": lambda: losses.linear_cross_entropy_reference(*arguments)[0],
    }
    torchs = ["torch"] if hasattr(F, "linear_cross_entropy") else []  # on a CPU too, where it is no path of ours
    for path in dict.fromkeys([*losses.loss_paths(bench.device)[1:], *torchs]):
        runs[path] = lambda path=path: losses.linear_cross_entropy(*arguments, path=path)[0]
    return layer_duels(bench, runs, {"hidden": hidden, "head": head}, torch.ones((), device=bench.device))


def bench_optim(bench: Bench) -> Rows:
    """Hidden matrices only, the same gradients; Newton-Schulz in the same precision on both sides."""
    model = bench.build(bench.config.model)
    optimizers = Optimizers(model, bench.config.optim.model_copy(update={"name": "muon", "ns_dtype": bench.precision}))
    ours = next(optimizer for optimizer in optimizers.all if isinstance(optimizer, Muon))
    views, singles = list[Tensor](), list[nn.Parameter]()
    for group in ours.param_groups:
        group["lr"] = 1.0  # what is compared is the update
        for parameter in group["params"]:
            parameter.grad = torch.randn(parameter.shape, generator=bench.rng).to(bench.device)
            matrices, grads = (as_matrices(t.detach(), group["split"]) for t in (parameter, parameter.grad))
            views += matrices
            for matrix, grad in zip(matrices, grads, strict=True):
                singles.append(nn.Parameter(matrix.clone()))
                singles[-1].grad = grad.clone()
    theirs = torch.optim.Muon(singles, lr=1.0, adjust_lr_fn="match_rms_adamw", weight_decay=0.1)

    def their_step() -> None:
        with mock.patch.object(torch.Tensor, "bfloat16", lambda tensor: tensor.to(DTYPES[bench.precision], copy=True)):
            theirs.step()  # it iterates in bf16, whatever it is given

    ours.step()
    their_step()
    for mine, other in zip(views, singles, strict=True):
        bench.check("torch.optim.Muon, updates", mine, other, 0.1)  # bf16 iterations leave up to 0.06
    makers = {"ours": lambda: ours.step, "torch.optim.Muon": lambda: their_step}
    return bench.duels(makers, matrices=len(singles), elements=sum(matrix.numel() for matrix in singles))
