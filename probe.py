"""Which form the expensive operations take in this run: the one asked for, the checkpoint's, or a clearly faster one.

Every operation has a usual path for a device ("auto" in `ops.py` and `losses.py`). Where there are others, all are run
at the shapes of this run, forward and backward, and another one is taken if it is faster by `MARGIN`, twice: less would
be a matter of chance, and a run started twice should end with the same bits. Every checkpoint stores the choice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import losses
import ops
from config import Config, OpsConfig, UserError

MARGIN = {"cpu": 1.5, "cuda": 1.1}  # a CPU's timings depend on what else it does
SMALL = 2**28  # multiplications forward; what has fewer is not worth a choice
BUDGET_SEC = 1.0  # of timing per operation, first runs included
RUNS = 5
TOLERANCE = 0.05  # of results, relative to the largest: a kernel that is off by more is broken here
MOST_TOKENS = {"cpu": 2048, "cuda": 8192}


def choose(
    config: Config, device: torch.device, dtype: torch.dtype, stored: Mapping[str, str]
) -> tuple[OpsConfig, list[str]]:
    """The paths of a run, none of them "auto", and what there is to tell about them.

    `stored` are those of the checkpoint that is resumed. Raises UserError where a path is asked for by name that does
    not work for this device, dtype or shape.
    """
    cfg = config.model
    rows = max(1, min(config.micro_rows, MOST_TOKENS[device.type] // config.data.seq_len))
    candidates = {
        "experts": ops.experts_paths(device, dtype, cfg.hidden_size, cfg.moe_intermediate_size),
        "attention": ops.attention_paths(device, dtype, config.data.seq_len),
        "loss": losses.loss_paths(device),
    }
    tokens = rows * config.data.seq_len
    work = {
        "experts": 3 * tokens * cfg.num_experts_per_tok * cfg.hidden_size * cfg.moe_intermediate_size,
        "attention": tokens * config.data.seq_len * cfg.num_attention_heads * (cfg.qk_head_dim + cfg.v_head_dim),
        "loss": (1 + cfg.num_nextn_predict_layers) * tokens * cfg.vocab_size * cfg.hidden_size,
    }
    runs = {"experts": _experts_run, "attention": _attention_run, "loss": _loss_run}
    barred: dict[str, str] = {}
    if config.train.compile and dtype == torch.float32:
        barred["grouped"] = "train.compile=true compiles it for bf16 only"
        candidates["experts"] = [path for path in candidates["experts"] if path not in barred]
    probe = (config, rows, device, dtype)
    chosen: dict[str, str] = {}
    notes: list[str] = []
    for name, paths in candidates.items():
        given = getattr(config.ops, name)
        wanted = given if given != "auto" else stored.get(name)
        if (
            wanted is not None
            and wanted not in paths
            and (problem := barred.get(wanted) or _problem(wanted, runs[name], probe))
        ):
            if given != "auto":
                raise UserError(
                    f"ops.{name} = {given} does not work for {dtype} on this {device.type} ({problem}); "
                    f"auto takes one of {', '.join(paths)}"
                )
            notes.append(f"the checkpoint's {name} path, {wanted}, does not work on this device ({problem})")
            wanted = None
        if wanted is None and len(paths) > 1 and work[name] >= SMALL:
            wanted, told = fastest(paths, runs[name](*probe), device)
            notes += [f"{name}: {line}" for line in told]
        chosen[name] = wanted or paths[0]
    notes.append("paths: " + ", ".join(f"{name} {path}" for name, path in chosen.items()))
    return OpsConfig(**chosen), notes  # type: ignore[arg-type]


Run = Callable[[str], list[Tensor]]  # a path's forward and backward: result and gradients


def fastest(paths: list[str], run: Run, device: torch.device) -> tuple[str, list[str]]:
    """The first path, or the fastest if it beats the first by `MARGIN`; and which failed or were wrong."""
    best: dict[str, float] = {}
    notes: list[str] = []
    wanted: list[Tensor] | None = None
    for path in paths:
        try:
            results = run(path)
            if wanted is None:
                wanted = results
            elif not (off := _difference(results, wanted)) <= TOLERANCE:  # NaN is wrong, too
                notes.append(f"{path} left out, it differs from {next(iter(best))} by {off:.2g}")
                continue
            best[path] = _time(lambda path=path: run(path), device)
        except Exception as error:  # noqa: BLE001  # whatever a kernel raises here, another one will do
            notes.append(f"{path} left out: {' '.join(str(error).split())[:200]}")
            continue
    if not best:
        raise UserError(f"no path works on this {device.type}: {'; '.join(notes)}")
    usual, winner = next(iter(best)), min(best, key=lambda path: best[path])
    for again in (False, True):
        if again:
            best = {path: _time(lambda path=path: run(path), device) for path in (usual, winner)}
        if best[winner] * MARGIN[device.type] > best[usual]:
            return usual, notes
    return winner, notes


def _difference(results: list[Tensor], wanted: list[Tensor]) -> float:
    parts = [
        (one.float() - other.float()).abs().max() / other.float().abs().max().clamp(min=1e-6)
        for one, other in zip(results, wanted, strict=True)
    ]
    return float(torch.stack(parts).max())


def _problem(path: str, make: Callable[..., Run], probe: tuple[Any, ...]) -> str:
    """Why a path that nobody would choose here does not even work; empty where it does."""
    try:
        make(*probe)(path)
    except Exception as error:  # noqa: BLE001  # whatever a kernel raises here
        return " ".join(str(error).split())[:200] or type(error).__name__
    return ""


def _time(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of a few runs."""
    seconds: list[float] = []
    while len(seconds) < RUNS and sum(seconds) < BUDGET_SEC:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _leaf(shape: tuple[int, ...], seed: int, device: torch.device, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale
    return values.to(device, dtype).requires_grad_()


def _gradients(out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    grad = torch.ones_like(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def _experts_run(config: Config, rows: int, device: torch.device, dtype: torch.dtype) -> Run:
    """Routing as it is at the start of training: by chance."""
    cfg, tokens = config.model, rows * config.data.seq_len
    x_ND = _leaf((tokens, cfg.hidden_size), 1, device, dtype)
    gate_up, down = (
        (cfg.n_routed_experts, 2 * cfg.moe_intermediate_size, cfg.hidden_size),
        (cfg.n_routed_experts, cfg.hidden_size, cfg.moe_intermediate_size),
    )
    gate_up_EGD = _leaf(gate_up, 2, device, torch.float32, gate_up[-1] ** -0.5)
    down_EDF = _leaf(down, 3, device, torch.float32, down[-1] ** -0.5)
    generator = torch.Generator().manual_seed(0)
    affinity_NE = torch.rand(tokens, cfg.n_routed_experts, generator=generator).to(device)
    weight_NA, expert_NA = affinity_NE.topk(cfg.num_experts_per_tok, -1)
    leaves = [x_ND, weight_NA.requires_grad_(), gate_up_EGD, down_EDF]

    def run(path: str) -> list[Tensor]:
        return _gradients(ops.grouped_experts(x_ND, expert_NA, weight_NA, gate_up_EGD, down_EDF, path)[0], leaves)

    return run


def _attention_run(config: Config, rows: int, device: torch.device, dtype: torch.dtype) -> Run:
    cfg = config.model
    shape, scale = (rows, cfg.num_attention_heads, config.data.seq_len), cfg.qk_head_dim**-0.5
    widths = (cfg.qk_head_dim, cfg.qk_head_dim, cfg.v_head_dim)
    q, k, v = (_leaf((*shape, width), seed, device, dtype) for seed, width in enumerate(widths))
    mask = None
    if config.data.document_mask:  # what it hides changes no timing
        mask = ops.document_mask(torch.zeros(rows, config.data.seq_len, dtype=torch.int64, device=device), dtype)
    return lambda path: _gradients(ops.attention(q, k, v, scale=scale, path=path, mask_B1TS=mask), [q, k, v])


def _loss_run(config: Config, rows: int, device: torch.device, dtype: torch.dtype) -> Run:
    cfg, tokens = config.model, rows * config.data.seq_len
    heads = 1 + cfg.num_nextn_predict_layers
    hidden_ND = _leaf((heads * tokens, cfg.hidden_size), 1, device, dtype)
    head_WD = _leaf((cfg.vocab_size, cfg.hidden_size), 2, device, torch.float32, cfg.hidden_size**-0.5)
    generator = torch.Generator().manual_seed(0)
    target_XN = torch.randint(cfg.vocab_size, (heads, tokens), generator=generator).to(device)
    weight_X = torch.full((heads,), 1 / tokens, device=device)

    def run(path: str) -> list[Tensor]:
        loss, *_ = losses.linear_cross_entropy(hidden_ND, head_WD, target_XN, weight_X, path=path)
        return _gradients(loss, [hidden_ND, head_WD])

    return run
