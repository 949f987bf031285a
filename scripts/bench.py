"""Times and weighs this repository beside other code: `python scripts/bench.py step --config quickstart`.

    step       a training step against transformers' DeepseekV3ForCausalLM: every way it computes experts, fp32 and bf16
    memory     the peak memory of those steps, one child process each, above what it held after its imports
    moe        a layer of experts: ours, expert by expert, and a dense SwiGLU of equal active width
    attention  ours, torch's fused kernel and the plain formula
    loss       the vocabulary head with cross-entropy: ours, full logits, torch's and Liger's where there are any
    optim      Muon: ours against torch.optim.Muon over the same matrices one by one

All contenders of a comparison stand in one process with the same weights and tokens, are checked for equal results and
run in turn, so that a machine's moods meet all of them. Printed as a table, written to
`benchmarks/<suite>-<config>-<hardware>.json`. The roof is the best product of large matrices in the same process.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import importlib.metadata
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the modules lie beside this folder

import config as configuration
import environment

environment.prepare()  # as a training run does before torch is imported

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checkpoint
import convert
import data
import losses
import ops
import parallel
import plan
import sources
import tokenizer as tokenizers
from config import Config, ModelConfig, UserError
from model import MLP, DeepSeekV3, LossWeights, count_parameters, flops_per_token, init_weights
from optim import Muon, Optimizers, update_router_bias
from options import Parser

Contenders = dict[str, Callable[[], object]]
SUITES = ("step", "memory", "moe", "attention", "loss", "optim")
LOGITS_TOLERANCE = 1e-4  # fp32, ours against transformers
THEIR_EXPERTS = ("eager", "batched_mm", "grouped_mm")  # transformers' experts_implementation that train without a GPU
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# ------------------------------------------------------------------------------------------------------- the stop-watch


def interleaved(
    contenders: Contenders, device: torch.device, *, repeats: int, warm_up: int = 2, hopeless: float = 5.0
) -> dict[str, list[float]]:
    """Seconds of every run, the contenders taking turns.

    Who takes `hopeless` times as long as the fastest in the last warm-up is not run again: that time is its result. Its
    memory would be the others' page faults.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(warm_up + repeats):
        for name, run in contenders.items():
            if turn >= warm_up and seconds[name][warm_up - 1] > hopeless * min(
                s[warm_up - 1] for s in seconds.values()
            ):
                continue
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: runs[warm_up:] or runs[-1:] for name, runs in seconds.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summary(seconds: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile, milliseconds."""
    cuts = statistics.quantiles(seconds, n=5, method="inclusive") if len(seconds) > 1 else seconds * 4
    return {"median_ms": 1e3 * statistics.median(seconds), "p20_ms": 1e3 * cuts[0], "p80_ms": 1e3 * cuts[3]}


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best product of large square matrices, measured here and now whatever the data sheet says."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = interleaved({"product": lambda: a @ b}, device, repeats=20)["product"]
    return 2 * size**3 / min(seconds)


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = []
    if Path("/proc/cpuinfo").exists():
        names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    return f"{names[0].strip() if names else platform.machine()}, {torch.get_num_threads()} threads"


# ------------------------------------------------------------------------------------------------------------ the bench


@dataclasses.dataclass
class Bench:
    config: Config
    device: torch.device
    dtype: torch.dtype
    repeats: int
    arguments: list[str]

    @functools.cached_property
    def rng(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.config.train.seed)

    def tensor(self, *shape: int, grad: bool = True, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=self.rng) * scale
        return values.to(self.device, dtype or self.dtype).requires_grad_(grad)

    @property
    def tolerance(self) -> float:
        return 1e-4 if self.dtype == torch.float32 else 2e-2

    @property
    def num_tokens(self) -> int:
        return self.config.train.micro_batch * self.config.data.seq_len

    def compare(self, contenders: Contenders, first: str, **facts: Any) -> list[dict[str, Any]]:
        """A row per contender; `times_first` is its median over that of `first`."""
        seconds = interleaved(contenders, self.device, repeats=self.repeats)
        base = statistics.median(seconds[first])
        return [
            {**facts, "name": name, **summary(runs), "runs": len(runs), "times_first": statistics.median(runs) / base}
            for name, runs in seconds.items()
        ]


def must_equal(ours: Tensor, theirs: Tensor, what: str, *, tolerance: float) -> None:
    """Nothing is timed before it is right. `tolerance` is relative to the largest value, where that is above 1."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    difference = float((ours - theirs).abs().max()) / max(1.0, float(theirs.abs().max()))
    if not difference <= tolerance:
        raise UserError(f"{what}: results differ by {difference:.2g}, more than {tolerance:g}; not timed")


# ------------------------------------------------------------------------------------------------------ a training step


def build(model_config: ModelConfig, dtype: torch.dtype, device: torch.device, seed: int) -> DeepSeekV3:
    model = plan.meta_model(model_config, dtype).to_empty(device=device)
    init_weights(model, seed)
    return model


def text_tokens(bench: Bench) -> Tensor:
    """Real text, (rows, T + 2), int64: a micro-batch of the bundled corpus under a BPE trained on it."""
    texts = list(data.training_texts(sources.resolve(configuration.load("quickstart").data.sources), 0, 1 << 20))
    tok = tokenizers.train_bpe(iter(texts), min(bench.config.model.vocab_size, 8192))
    shape = (bench.config.train.micro_batch, bench.config.data.seq_len + 2)
    ids = [token for document in tokenizers.Encoder(tok)(texts) for token in document]
    ids *= -(-shape[0] * shape[1] // len(ids))
    return torch.tensor(ids[: shape[0] * shape[1]]).view(shape).to(bench.device)


def balance(model: DeepSeekV3, tokens: Tensor) -> float:
    """Move the router biases until these tokens spread evenly; the busiest expert's load over the mean that is left."""
    targets = tokens[:, 1:]
    worst = 0.0
    with torch.no_grad():
        for turn in range(60):
            counts_LE = model(tokens[:, :-2], targets).expert_counts
            worst = float((counts_LE.max(1).values / counts_LE.double().mean(1)).max())
            update_router_bias(model, counts_LE, 0.02 * 0.95**turn)
    return worst


def load_theirs(model: DeepSeekV3, experts: str, device: torch.device) -> Any:
    """transformers' model with the same weights, by way of a checkpoint."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        entries = convert.hf_config(model.config, dtype="float32", bos_token_id=0, eos_token_id=0)
        state = convert.to_checkpoint(model.state_dict(), model.config)
        files = {"config.json": (json.dumps(entries) + "\n").encode()}
        checkpoint.write(place, {"model": state}, files)
        theirs: Any = AutoModelForCausalLM.from_pretrained(place, experts_implementation=experts, dtype=torch.float32)
    return theirs.to(device).train()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)


def our_step(model: DeepSeekV3, tokens: Tensor) -> Callable[[], object]:
    optimizer = adamw(model)
    depth = len(model.mtp)
    count = tokens[:, :-2].numel()
    weights = LossWeights(1 / count, (0.3 / count,) * depth, model.config.aux_loss_alpha / len(tokens))

    def step() -> None:
        model(tokens[:, :-2], tokens[:, 1 : tokens.shape[1] - 1 + depth], loss_weights=weights).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def their_step(model: nn.Module, tokens: Tensor, dtype: torch.dtype) -> Callable[[], object]:
    """fp32 masters as ours; 16-bit products by autocast, or where `dtype` is that of the weights, everything in it."""
    optimizer = adamw(model)
    inputs = tokens[:, :-2]
    pure = next(model.parameters()).dtype == dtype

    def step() -> None:
        with torch.autocast(inputs.device.type, dtype, enabled=not pure):
            loss = model(input_ids=inputs, labels=inputs, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def step_contender(bench: Bench, name: str, ours: DeepSeekV3, tokens: Tensor) -> Callable[[], object]:
    """The step that `name` stands for: `ours bf16`, `ours bf16 MTP`, `transformers eager fp32`, `... bf16 weights`."""
    who, *words = name.split()
    if who == "ours":
        mtp = bench.config.model.num_nextn_predict_layers if "MTP" in words else 0
        shape = bench.config.model.model_copy(update={"num_nextn_predict_layers": mtp})
        model = build(shape, DTYPES[words[0]], bench.device, bench.config.train.seed)
        model.load_state_dict(ours.state_dict(), strict=False)
        return our_step(model, tokens)
    theirs = load_theirs(ours, words[0], bench.device)
    dtype = DTYPES[words[1]]
    return their_step(theirs.to(dtype) if words[-1] == "weights" else theirs, tokens, dtype)


def step_names(bench: Bench) -> list[str]:
    dtypes = ["fp32"] + [name for name, dtype in DTYPES.items() if dtype == bench.dtype != torch.float32]
    ours = [f"ours {dtype}{mtp}" for mtp in ("", " MTP") for dtype in reversed(dtypes)]
    theirs = [f"transformers {experts} {dtype}" for experts in THEIR_EXPERTS for dtype in dtypes]
    return ours + theirs + [f"{name} weights" for name in theirs if not name.endswith("fp32")]


def reference_model(bench: Bench, tokens: Tensor, *, balanced: bool) -> tuple[DeepSeekV3, float]:
    """The weights that all contenders share, without MTP, and how uneven its routing is."""
    shape = bench.config.model.model_copy(update={"num_nextn_predict_layers": 0})
    model = build(shape, torch.float32, bench.device, bench.config.train.seed)
    if balanced:
        return model, balance(model, tokens)
    with torch.no_grad():
        counts_LE = model(tokens[:, :-2], tokens[:, 1:]).expert_counts
    return model, float((counts_LE.max(1).values / counts_LE.double().mean(1)).max())


def bench_step(bench: Bench) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    tokens = text_tokens(bench)
    flops = flops_per_token(
        bench.config.model.model_copy(update={"num_nextn_predict_layers": 0}),
        count_parameters(plan.meta_model(bench.config.model.model_copy(update={"num_nextn_predict_layers": 0}))),
        bench.config.data.seq_len,
    )
    for routing in ("balanced", "as initialised"):
        ours, load = reference_model(bench, tokens, balanced=routing == "balanced")
        torch.set_float32_matmul_precision("highest")  # TF32 differs by more than the tolerance
        with torch.no_grad():
            wanted = ours(tokens[:, :-2])
            for experts in THEIR_EXPERTS:
                theirs = load_theirs(ours, experts, bench.device)
                must_equal(wanted, theirs(tokens[:, :-2]).logits, f"transformers {experts}", tolerance=LOGITS_TOLERANCE)
        contenders = {name: step_contender(bench, name, ours, tokens) for name in step_names(bench)}
        first = next(iter(contenders))
        new = bench.compare(contenders, first, routing=routing, busiest_over_mean=round(load, 2))
        for row in new:
            row["tokens_per_sec"] = 1e3 * bench.num_tokens / row["median_ms"]
            if "MTP" not in row["name"]:
                row["tflops"] = row["tokens_per_sec"] * flops / 1e12
        rows += new
        del contenders
        gc.collect()
    return rows


# --------------------------------------------------------------------------------------------------------------- memory


def bench_memory(bench: Bench) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name in step_names(bench):
        command = [sys.executable, __file__, "memory", *bench.arguments, "--only", name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 2:
            raise UserError(f"memory of {name}: {done.stderr.strip().splitlines()[-1]}")
        gib = None if done.returncode else float(done.stdout.split()[-1])
        rows.append(
            {"name": name, "peak_gib": gib, "exit_code": done.returncode}
        )  # not 0: killed, for memory as a rule
    return rows


def memory_of(bench: Bench, name: str) -> float:
    """GiB that three steps of one contender add at their peak to what the process held after its imports."""
    import transformers.models.deepseek_v3.modeling_deepseek_v3  # noqa: F401  # its imports are not its step's memory

    rows, width = bench.config.train.micro_batch, bench.config.data.seq_len + 2
    tokens = torch.randint(bench.config.model.vocab_size, (rows, width), generator=bench.rng).to(bench.device)
    before, _ = _memory(bench.device)
    ours, _ = reference_model(bench, tokens[:1, :4], balanced=False)
    step = step_contender(bench, name, ours, tokens)
    del ours
    gc.collect()
    _forget_peak(bench.device)  # loading is not the step's
    for _ in range(3):
        step()
    _wait(bench.device)
    return _memory(bench.device)[1] - before


def _memory(device: torch.device) -> tuple[float, float]:
    """GiB now and at the peak: allocated on a GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**30, torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if not status.exists():
        raise UserError("memory: on a CPU it is measured on Linux only")
    sizes = dict(re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB", status.read_text(encoding="utf-8"), re.MULTILINE))
    return int(sizes["VmRSS"]) / 2**20, int(sizes["VmHWM"]) / 2**20


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # proc(5): resets the peak


# --------------------------------------------------------------------------------------------------------------- layers


def forward_backward(run: Callable[[], Tensor], leaves: list[Tensor], grad: Tensor) -> Callable[[], object]:
    def both() -> None:
        run().backward(grad)
        for leaf in leaves:
            leaf.grad = None

    return both


def our_experts(*arguments: Tensor) -> Tensor:
    return ops.grouped_experts(*arguments)[0]


def loop_experts(*arguments: Tensor) -> Tensor:
    return ops.grouped_experts_reference(*arguments)[0]


def bench_moe(bench: Bench) -> list[dict[str, Any]]:
    cfg, rows = bench.config.model, []
    experts, active, hidden, width = (
        cfg.n_routed_experts, cfg.num_experts_per_tok, cfg.hidden_size, cfg.moe_intermediate_size
    )  # fmt: skip
    x = bench.tensor(bench.num_tokens, hidden)
    gate_up = bench.tensor(experts, 2 * width, hidden, dtype=torch.float32, scale=hidden**-0.5)
    down = bench.tensor(experts, hidden, width, dtype=torch.float32, scale=width**-0.5)
    weight = torch.full((bench.num_tokens, active), 1 / active, device=bench.device).requires_grad_()
    dense = MLP(hidden, active * width).to(bench.device)
    grad = bench.tensor(bench.num_tokens, hidden, grad=False)
    leaves = [x, gate_up, down, weight, *dense.parameters()]
    for skew in (0.0, 1.0, 3.0):
        logits = torch.randn(bench.num_tokens, experts, generator=bench.rng) + skew * torch.linspace(-1, 1, experts)
        chosen = logits.topk(active).indices.to(bench.device)
        arguments = (x, chosen, weight, gate_up, down)
        must_equal(our_experts(*arguments), loop_experts(*arguments), "experts", tolerance=bench.tolerance)
        counts = torch.bincount(chosen.flatten(), minlength=experts)
        contenders: Contenders = {
            "ours": forward_backward(functools.partial(our_experts, *arguments), leaves, grad),
            "expert by expert": forward_backward(functools.partial(loop_experts, *arguments), leaves, grad),
            "dense, equal active width": forward_backward(functools.partial(dense, x), leaves, grad),
        }
        load = float(counts.max() / counts.double().mean())
        rows += bench.compare(contenders, "ours", busiest_over_mean=round(load, 2))
    return rows


def bench_attention(bench: Bench) -> list[dict[str, Any]]:
    cfg, rows = bench.config.model, []
    scale = cfg.qk_head_dim**-0.5
    for length in sorted({256, 1024, bench.config.data.seq_len}):
        batch = max(1, bench.num_tokens // length)
        shape = (batch, cfg.num_attention_heads, length)
        q, k = (bench.tensor(*shape, cfg.qk_head_dim) for _ in range(2))
        v, grad = bench.tensor(*shape, cfg.v_head_dim), bench.tensor(*shape, cfg.v_head_dim, grad=False)
        functions: dict[str, Callable[..., Tensor]] = {
            "ours": ops.attention,
            "plain": ops.attention_plain,
            "torch": functools.partial(F.scaled_dot_product_attention, is_causal=True),
        }
        runs = {name: functools.partial(function, q, k, v, scale=scale) for name, function in functions.items()}
        for name in ("plain", "torch"):
            must_equal(runs["ours"](), runs[name](), name, tolerance=bench.tolerance)
        contenders = {name: forward_backward(run, [q, k, v], grad) for name, run in runs.items()}
        rows += bench.compare(contenders, "ours", tokens=length, rows=batch)
    return rows


def bench_loss(bench: Bench) -> list[dict[str, Any]]:
    cfg = bench.config.model
    hidden = bench.tensor(bench.num_tokens, cfg.hidden_size)
    head = bench.tensor(cfg.vocab_size, cfg.hidden_size, dtype=torch.float32, scale=cfg.hidden_size**-0.5)
    target = torch.randint(cfg.vocab_size, (bench.num_tokens,), generator=bench.rng).to(bench.device)
    weight = torch.full((bench.num_tokens,), 1 / bench.num_tokens, device=bench.device)
    runs: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: losses.linear_cross_entropy(hidden, head, target, weight)[0],
        "full logits": lambda: losses.linear_cross_entropy_reference(hidden, head, target, weight)[0],
    }
    if hasattr(F, "linear_cross_entropy"):
        runs["torch"] = lambda: F.linear_cross_entropy(hidden, head.to(hidden.dtype), target)
    if bench.device.type == "cuda":
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)
        runs["liger"] = lambda: liger(head.to(hidden.dtype), hidden, target)
    for name, run in runs.items():
        must_equal(runs["ours"](), run(), name, tolerance=bench.tolerance)
    one = torch.ones((), device=bench.device)
    return bench.compare({name: forward_backward(run, [hidden, head], one) for name, run in runs.items()}, "ours")


def bench_optim(bench: Bench) -> list[dict[str, Any]]:
    """Hidden matrices only, bf16 Newton-Schulz on both sides, the same gradients."""
    model = build(bench.config.model, bench.dtype, bench.device, bench.config.train.seed)
    optimizers = Optimizers(model, bench.config.optim.model_copy(update={"name": "muon"}), ns_dtype=torch.bfloat16)
    ours = next(optimizer for optimizer in optimizers.all if isinstance(optimizer, Muon))
    singles: list[nn.Parameter] = []
    generator = bench.rng
    for group in ours.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(bench.device)
            for matrix, grad in zip(_matrices(parameter, group), _matrices(parameter.grad, group), strict=True):
                singles.append(nn.Parameter(matrix.detach().clone()))
                singles[-1].grad = grad.clone()
        group["lr"] = 1e-3
    theirs = torch.optim.Muon(singles, lr=1e-3, adjust_lr_fn="match_rms_adamw", weight_decay=0.1)
    ours.step()
    theirs.step()
    matrices = [m for group in ours.param_groups for p in group["params"] for m in _matrices(p, group)]
    for mine, other in zip(matrices, singles, strict=True):
        must_equal(mine, other, "Muon", tolerance=2e-3)
    contenders: Contenders = {"ours": ours.step, "torch.optim.Muon": theirs.step}
    return bench.compare(contenders, "ours", matrices=len(singles), elements=sum(m.numel() for m in singles))


def _matrices(tensor: Tensor, group: dict[str, Any]) -> list[Tensor]:
    return list(tensor.unflatten(-2, (group["split"], -1)).flatten(0, -3).unbind(0))


RUN: dict[str, Callable[[Bench], list[dict[str, Any]]]] = {
    "step": bench_step, "memory": bench_memory, "moe": bench_moe, "attention": bench_attention, "loss": bench_loss,
    "optim": bench_optim,
}  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- program


def table(rows: list[dict[str, Any]]) -> str:
    """Aligned columns; floats with three digits."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns] + [[_cell(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def versions() -> dict[str, str]:
    names = ("torch", "transformers", "triton", "liger-kernel")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main(arguments: list[str] | None = None) -> int:
    given_arguments = sys.argv[1:] if arguments is None else arguments
    parser = Parser(prog="bench.py", description="Times this repository beside other code; see the top of the file.")
    parser.add_argument("suite", choices=SUITES, help="what to compare")
    parser.add_argument("--config", default="quickstart", metavar="PATH|NAME", help="shapes (default: quickstart)")
    parser.add_argument("--repeats", type=int, default=20, metavar="N", help="runs of each contender (default: 20)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks", metavar="DIR", help="where the JSON goes")
    parser.add_argument("--only", help="with memory: this contender, in this process; prints GiB")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change keys of the configuration")
    try:
        given = parser.parse_intermixed_args(given_arguments)
        if given.repeats < 1:
            raise UserError(f"--repeats {given.repeats} must be at least 1")
        config = configuration.load(given.config, given.overrides)
        device = parallel.pick_device(0, allow_cpu=True)
        precision = parallel.pick_precision(config.train.precision, device)
        parallel.set_arithmetic(precision, device)
        rest = list(given_arguments)
        rest.remove(given.suite)
        bench = Bench(config, device, DTYPES[precision], given.repeats, rest)
        if given.only is not None:
            if given.suite != "memory" or given.only not in step_names(bench):
                raise UserError(f"--only {given.only}: with memory, one of {', '.join(step_names(bench))}")
            print(memory_of(bench, given.only))
            return 0
        roof = product_rate(device, bench.dtype)
        rows = RUN[given.suite](bench)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    where = hardware(device)
    print(f"{given.suite}, {config.run.name}, {precision}, {bench.num_tokens:,} tokens")
    print(f"{where}; best product {roof / 1e12:.2f} TFLOP/s")
    print(table(rows))
    entry = {
        "suite": given.suite, "config": config.run.name, "overrides": given.overrides, "precision": precision,
        "tokens": bench.num_tokens, "hardware": where, "versions": versions(), "repeats": given.repeats,
        "command": " ".join(["python scripts/bench.py", *given_arguments]), "product_tflops": roof / 1e12, "rows": rows,
    }  # fmt: skip
    slug = re.sub(r"[^a-z0-9]+", "-", where.lower()).strip("-")
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / f"{given.suite}-{config.run.name}-{slug}.json"
    path.write_text(json.dumps(entry, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
