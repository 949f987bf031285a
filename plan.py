"""What a run will be, before it runs: parameters, tokens, FLOPs, memory, time and money (`--dry-run`)."""

from __future__ import annotations

import memory
from config import Config, to_yaml
from counts import count_parameters, flops_per_token, num_steps
from model import meta_model
from ops import DTYPES
from tracker import duration


def describe_memory(config: Config, world_size: int = 1) -> list[str]:
    """The predicted peak of one GPU, GiB. Where the configuration leaves it open: one row at a time, and both bf16 and
    fp16, which cards before Ampere take."""
    precisions = ("bf16", "fp16") if config.train.precision == "auto" else (config.train.precision,)
    rows = config.train.micro_batch or 1
    told = [memory.peak(config, dtype=DTYPES[name], rows=rows, world_size=world_size) for name in precisions]
    more = "" if config.train.micro_batch else " (auto: as many as fit)"
    ranks = f" of {world_size}" if world_size > 1 else ""
    phases = " and ".join(dict.fromkeys(peak.phase for peak in told))
    parts = [*told[0].parts, "sum"]
    return [
        f"memory    predicted peak of one GPU{ranks} (cuda), {rows} row{'s' * (rows > 1)} at a time{more}, GiB",
        f"          reached in {phases}; slack and CUDA's own share are assumed, the rest is traced",
        f"  {'':<26}" + "".join(f"{name:>18}" for name in precisions),
        *(
            f"  {part:<26}" + "".join(f"{peak.parts.get(part, peak.total) / 2**30:>18.2f}" for peak in told)
            for part in parts
        ),
    ]


def describe(config: Config, *, tokens_per_sec: float | None, price_per_hour: float | None, world_size: int = 1) -> str:
    """The text of `--dry-run`."""
    counts = count_parameters(meta_model(config.model))
    steps = num_steps(config, counts)
    tokens = steps * config.train.batch_tokens
    seq_len, per_parameter = config.data.seq_len, tokens / counts.active_with_head
    full, causal = (flops_per_token(config.model, counts, seq_len, causal=causal) for causal in (False, True))
    rows = [*counts.parts.items(), ("total", counts.total), ("active per token", counts.active)]
    rows += [("active with head", counts.active_with_head), ("MTP layers", counts.mtp)]
    rows += [("total with MTP", counts.total + counts.mtp), ("router biases", counts.router_bias)]
    lines = [
        to_yaml(config).rstrip(),
        "",
        "parameters",
        *(f"  {name:<26}{number:>18,}" for name, number in rows),
        "",
        f"tokens    {tokens:,} in {steps:,} steps of {config.train.batch_tokens:,}",
        f"          {per_parameter:.1f} per active parameter",
        f"FLOPs     {full / 1e9:.3f} GFLOP per token over all {seq_len} keys, {causal / 1e9:.3f} over the causal half",
        f"          {full * tokens:.2e} in all",
        "",
        *describe_memory(config, world_size),
    ]
    if tokens_per_sec:
        seconds = tokens / tokens_per_sec
        cost = f", {price_per_hour * seconds / 3600:,.2f} at {price_per_hour:g} an hour" if price_per_hour else ""
        lines += [
            "",
            f"time      {duration(seconds)} ({seconds / 3600:.1f} hours) at {tokens_per_sec:,.0f} tokens/s{cost}",
        ]
    else:
        lines += ["", "time      give --tokens-per-sec, and --price-per-hour for the cost"]
    return "\n".join(lines)
