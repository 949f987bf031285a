"""How `bench.py` measures: contenders in turn, in one process, compared before they are timed."""

from __future__ import annotations

import dataclasses
import functools
import gc
import importlib.metadata
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules lie beside this folder

import torch
from torch import Tensor

import parallel
from config import Config, ModelConfig, UserError
from model import DeepSeekV3, init_weights, meta_model
from ops import DTYPES

Rows = list[dict[str, Any]]
Run = Callable[[], Any]
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2}  # relative to the largest value


def interleaved(
    contenders: Mapping[str, Run], device: torch.device, *, repeats: int, warm_up: int = 2, hopeless: float = 5.0
) -> dict[str, list[float]]:
    """Seconds of every run, the contenders taking turns.

    Who takes `hopeless` times as long as the fastest while warming up is not run again: the last time is its result.
    """
    wait = functools.partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(warm_up + repeats):
        for name, run in contenders.items():
            runs = seconds[name]
            if turn >= warm_up and min(runs) > hopeless * min(min(others) for others in seconds.values()):
                continue
            wait()
            start = time.perf_counter()
            run()
            wait()
            runs.append(time.perf_counter() - start)
    return {name: runs[warm_up:] or runs[-1:] for name, runs in seconds.items()}


def summary(seconds: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile, milliseconds, and how many runs these are of."""
    cuts = statistics.quantiles(seconds, n=5, method="inclusive") if len(seconds) > 1 else seconds * 4
    median = statistics.median(seconds)
    return {"median_ms": 1e3 * median, "p20_ms": 1e3 * cuts[0], "p80_ms": 1e3 * cuts[3], "runs": len(seconds)}


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", info.read_text("utf-8"), re.MULTILINE) if info.exists() else []
    name = names[0].strip() if names else platform.machine()
    instructions = torch.backends.cpu.get_cpu_capability() + " with bf16" * parallel.cpu_has_bf16()
    return f"{name}, {torch.get_num_threads()} threads, {instructions}"


@dataclasses.dataclass
class Bench:
    config: Config
    device: torch.device
    precision: str
    repeats: int
    arguments: list[str]
    roofs: dict[str, float] = dataclasses.field(default_factory=dict)  # TFLOP/s of the best product, by dtype
    checks: dict[str, float] = dataclasses.field(default_factory=dict)  # what was compared, and how it differed

    def __post_init__(self) -> None:
        self.dtypes = list(dict.fromkeys([self.precision, "fp32"]))
        self.num_tokens = self.config.micro_rows * self.config.data.seq_len
        self.plain = self.config.model.model_copy(update={"num_nextn_predict_layers": 0})  # without MTP
        self.rng = torch.Generator().manual_seed(self.config.train.seed)

    def find_roofs(self) -> None:
        """The best products so far, whatever a data sheet says: other work may disturb a moment, not all of them."""
        size = 8192 if self.device.type == "cuda" else 1024
        for name in self.dtypes:
            flops = parallel.product_flops(self.device, DTYPES[name], size)
            self.roofs[name] = max(self.roofs.get(name, 0.0), flops / 1e12)

    def tensor(self, *shape: int, grad: bool = True, dtype: str | None = None, scale: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=self.rng) * scale
        return values.to(self.device, DTYPES[dtype or self.precision]).requires_grad_(grad)

    def build(self, config: ModelConfig, dtype: str = "fp32", **options: Any) -> DeepSeekV3:
        model = meta_model(config, DTYPES[dtype], **options).to_empty(device=self.device)
        init_weights(model, self.config.train.seed)
        return model

    def check(self, what: str, ours: Tensor, theirs: Tensor, tolerance: float, detail: str = "") -> None:
        """Nothing is timed before it is right. Differences are relative to the largest value; the largest is kept."""
        ours, theirs = ours.detach().float(), theirs.detach().float()
        difference = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))
        if not difference <= tolerance:
            raise UserError(f"{what}{detail} differ by {difference:.2g}, more than {tolerance:g}; not timed")
        self.checks[what] = max(difference, self.checks.get(what, 0.0))

    def duels(self, makers: Mapping[str, Callable[[], Run]], **facts: Any) -> Rows:
        """A row per contender; `times_first` is the ratio of the medians in its duel with the first.

        Others are made for their duel and dropped after it: two are alive at most. The first's row is of all duels.
        """
        self.find_roofs()
        first, *others = makers
        run, runs, rows = makers[first](), [], []
        for name in others:
            print(*(f"{key} {fact}," for key, fact in facts.items()), f"{name}: ", end="", file=sys.stderr, flush=True)
            seconds = interleaved({first: run, name: makers[name]()}, self.device, repeats=self.repeats)
            gc.collect()
            runs += seconds[first]
            ratio = statistics.median(seconds[name]) / statistics.median(seconds[first])
            rows.append({**facts, "name": name, **summary(seconds[name]), "times_first": ratio})
            print(f"{rows[-1]['median_ms']:.4g} ms, {ratio:.2f} times {first}", file=sys.stderr)
        return [{**facts, "name": first, **summary(runs), "times_first": 1.0}, *rows]


def table(rows: Rows) -> str:
    """Aligned columns; floats with three digits."""

    def cell(value: object) -> str:
        digits = ",.0f" if isinstance(value, float) and abs(value) >= 1000 else ".3g"
        return format(value, digits) if isinstance(value, float) else str(value)

    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns] + [[cell(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)


def versions() -> dict[str, str]:
    installed = {each.name.lower().replace("_", "-"): each.version for each in importlib.metadata.distributions()}
    wanted = {"torch", "transformers", "triton", "liger-kernel", "tokenizers", "fastokens", "numpy", "pyarrow"}
    wanted &= installed.keys()
    return {"python": platform.python_version(), **{name: installed[name] for name in sorted(wanted)}}
