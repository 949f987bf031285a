"""Times and weighs this repository beside other code: `python scripts/bench.py step --config quickstart`.

    step       a training step against transformers' DeepseekV3ForCausalLM: every way it computes experts, fp32 and bf16
    memory     the peak memory of those steps, one child process each, above what it held after its imports
    generate   greedy tokens with a KV cache against transformers' `generate`, fp32 and bf16
    moe        a layer of experts: ours, expert by expert, and a dense SwiGLU of equal active width
    attention  ours, torch's fused kernel and the plain formula
    loss       the vocabulary head with cross-entropy: ours, full logits, torch's and Liger's where there are any
    optim      Muon: ours against torch.optim.Muon over the same matrices one by one

Each contender meets the first in a duel: one process, the same weights and tokens, run in turn, so that a machine's
moods meet both; before, results and gradients are compared. The table goes to standard output and, as JSON, to
`benchmarks/<suite>-<config>-<hardware>.json`, progress to standard error. Products are the best of large matrices.
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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the modules lie beside this folder

import config as configuration
import environment
from config import Config, ModelConfig, UserError

if __name__ == "__main__":  # before torch is imported, as a training run does; who imports this file changes nothing
    try:
        environment.prepare()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checkpoint
import convert
import data
import generate
import losses
import ops
import parallel
import plan
import sources
import tokenizer as tokenizers
from counts import count_parameters, flops_per_token
from model import MLP, DeepSeekV3, LossWeights, init_weights
from ops import DTYPES
from optim import Muon, Optimizers, as_matrices, update_router_bias
from options import Parser

Rows = list[dict[str, Any]]
Run = Callable[[], Any]
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2}  # relative to the largest value
MOST_FLIPS = 1e-3  # rows with a token routed otherwise, as a share of all tokens
MOST_COPIES_GIB = 4.0
PROMPT_TOKENS, NEW_TOKENS = 16, 64
THEIR_EXPERTS = ("eager", "batched_mm", "grouped_mm")  # transformers' experts_implementation that train without a GPU


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


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best product of large square matrices, measured here and now whatever the data sheet says."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = interleaved({"product": lambda: a @ b}, device, repeats=20)["product"]
    return 2 * size**3 / min(seconds)


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", info.read_text("utf-8"), re.MULTILINE) if info.exists() else []
    return f"{names[0].strip() if names else platform.machine()}, {torch.get_num_threads()} threads"


# ------------------------------------------------------------------------------------------------------------ the bench


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

    def tensor(self, *shape: int, grad: bool = True, dtype: str | None = None, scale: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=self.rng) * scale
        return values.to(self.device, DTYPES[dtype or self.precision]).requires_grad_(grad)

    def build(self, config: ModelConfig, dtype: str = "fp32") -> DeepSeekV3:
        model = plan.meta_model(config, DTYPES[dtype]).to_empty(device=self.device)
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


# ------------------------------------------------------------------------------------------------------ a training step


def text_tokens(bench: Bench) -> Tensor:
    """Real text, (rows, T + 2), int64: a micro-batch of the bundled corpus under a BPE trained on it."""
    texts = list(data.training_texts(sources.resolve(configuration.load("quickstart").data.sources), 0, 1 << 20))
    tok = tokenizers.train_bpe(iter(texts), min(bench.config.model.vocab_size, 8192))
    shape = (bench.config.micro_rows, bench.config.data.seq_len + 2)
    ids = [token for document in tokenizers.Encoder(tok)(texts) for token in document]
    ids *= -(-shape[0] * shape[1] // len(ids))
    return torch.tensor(ids[: shape[0] * shape[1]]).view(shape).to(bench.device)


def reference_model(bench: Bench, tokens: Tensor, *, balanced: bool) -> tuple[DeepSeekV3, float]:
    """The weights that all share, without MTP, their routing `balanced` for these tokens, and its busiest over mean."""
    model, load = bench.build(bench.plain), 0.0
    for turn in range(60 if balanced else 1):
        with torch.no_grad():
            counts_LE = torch.stack([routing.counts_E for routing in model.hidden(tokens)[1]])
        load = float((counts_LE.amax(1) / counts_LE.double().mean(1)).max())
        if balanced:
            update_router_bias(model, counts_LE, 0.02 * 0.95**turn)
    return model, load


def save(model: DeepSeekV3, folder: str) -> Path:
    """The model in Hugging Face format, without tokens that begin or end a text."""
    entries = convert.hf_config(model.config, dtype="float32", bos_token_id=None, eos_token_id=None)
    files = {"config.json": (json.dumps(entries) + "\n").encode()}
    checkpoint.write(Path(folder), {"model": convert.to_checkpoint(model.state_dict(), model.config)}, files)
    return Path(folder)


def load_theirs(bench: Bench, folder: Path, experts: str, dtype: str) -> Any:
    """transformers' model."""
    import transformers

    gc.collect()  # the one before it
    transformers.utils.logging.disable_progress_bar()
    options: dict[str, Any] = {"experts_implementation": experts, "dtype": DTYPES[dtype]}
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    return theirs.to(bench.device)


def step_contender(bench: Bench, name: str, folder: Path, tokens: Tensor) -> Run:
    """The step that `name` stands for: `ours bf16`, `ours bf16 MTP`, `transformers eager bf16`, `... bf16 weights`.

    Masters are fp32 and products bf16, for transformers by autocast; with `weights` everything is bf16. AdamW does all
    its arithmetic at a learning rate of 0, so that the routing stays as it is.
    """
    who, *words = name.split()
    dtype, inputs = next(word for word in words if word in DTYPES), tokens[:, :-2]
    if who == "ours":
        model: Any = bench.build(bench.config.model if "MTP" in words else bench.plain, dtype)
        model.load_state_dict(convert.load(folder)[1], strict=False)
        share, depth = 1 / inputs.numel(), len(model.mtp)
        weights = LossWeights(share, (0.3 * share,) * depth, model.config.aux_loss_alpha / len(tokens))
        targets = tokens[:, 1 : inputs.shape[1] + 1 + depth]
        forward = functools.partial(model, inputs, targets, loss_weights=weights)
    else:
        model = load_theirs(bench, folder, words[0], dtype if "weights" in words else "fp32").train()
        forward = functools.partial(model, input_ids=inputs, labels=inputs, use_cache=False)
    cast = who != "ours" and next(model.parameters()).dtype != DTYPES[dtype]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def step() -> None:
        with torch.autocast(bench.device.type, DTYPES[dtype], enabled=cast):
            loss = forward().loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def step_names(bench: Bench) -> tuple[list[str], dict[str, str]]:
    """Who takes part; who does not, and why."""
    cfg = bench.config.model
    ours = [f"ours {dtype}{mtp}" for mtp in ("", " MTP")[: 1 + cfg.num_nextn_predict_layers] for dtype in bench.dtypes]
    theirs = [f"transformers {experts} {dtype}" for experts in THEIR_EXPERTS for dtype in bench.dtypes]
    names = ours + theirs + [f"{name} weights" for name in theirs if not name.endswith("fp32")]
    # `batched_mm` copies an expert's weights for each of its tokens, and autograd keeps the copies of all layers.
    pairs = bench.num_tokens * cfg.num_experts_per_tok * (cfg.num_hidden_layers - cfg.first_k_dense_replace)
    numbers = pairs * 3 * cfg.hidden_size * cfg.moe_intermediate_size
    sizes = {name: numbers * (2 if "weights" in name else 4) / 2**30 for name in names if "batched_mm" in name}
    out = {name: f"copies {gib:.1f} GiB of expert weights" for name, gib in sizes.items() if gib > MOST_COPIES_GIB}
    return [name for name in names if name not in out], out


def choices(model: nn.Module) -> list[Tensor]:
    """The experts that each router of the model chooses from now on, sorted, (N, A), layer by layer."""
    found: list[Tensor] = []
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):  # a result of either's router holds indices, int64, and affinities
            module.register_forward_hook(
                lambda _, __, result: found.append(next(t for t in result if t.dtype == torch.int64).sort(-1).values)
            )
    return found


def check_theirs(bench: Bench, folder: Path, experts: str, tokens: Tensor) -> None:
    """Logits and the gradients of all parameters, fp32, ours against transformers.

    Where affinities are equal but for rounding, two right programs may choose different experts. What depends on such a
    token, itself and the rest of its row, is not compared; few rows may have one.
    """
    what, inputs = f"transformers {experts}", tokens[:, :-2]
    print(f"comparing with {what}", file=sys.stderr)
    ours: Any = generate.load_model(folder, bench.device, None)
    theirs = load_theirs(bench, folder, experts, "fp32")
    chosen, their_chosen = choices(ours), choices(theirs)
    with torch.no_grad():
        logits, their_logits = ours(inputs), theirs(input_ids=inputs, use_cache=False).logits
    flipped_N = torch.stack([(a != b).any(-1) for a, b in zip(chosen, their_chosen, strict=True)]).any(0)
    same_BT = flipped_N.view_as(inputs).cumsum(1) == 0
    flips = int((~same_BT[:, -1]).sum())
    bench.checks[f"{what}, rows with a token routed otherwise"] = flips
    if flips > MOST_FLIPS * inputs.numel():
        raise UserError(f"{what}: in {flips} of {len(inputs)} rows a token is routed otherwise; not timed")
    bench.check(f"{what}, logits", logits[same_BT], their_logits[same_BT], TOLERANCE["fp32"])
    targets = inputs[:, 1:].masked_fill(~same_BT[:, :-1], losses.IGNORE)
    ours(inputs, F.pad(targets, (0, 1), value=losses.IGNORE)).loss.backward()
    theirs(input_ids=inputs, labels=F.pad(targets, (1, 0), value=losses.IGNORE), use_cache=False).loss.backward()
    others = dict(theirs.named_parameters())
    for name, mine in ours.named_parameters():
        bench.check(f"{what}, gradients", mine.grad, others[name].grad, TOLERANCE["fp32"], f" of {name}")


def bench_step(bench: Bench) -> Rows:
    rows, tokens, (names, left_out) = Rows(), text_tokens(bench), step_names(bench)
    for routing in ("balanced", "as initialised"):
        ours, load = reference_model(bench, tokens[:, :-2], balanced=routing == "balanced")
        with tempfile.TemporaryDirectory() as place:
            folder = save(ours, place)
            del ours
            precision = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")  # TF32 differs by more than the tolerance
            for experts in THEIR_EXPERTS:
                if f"transformers {experts} fp32" in names:
                    check_theirs(bench, folder, experts, tokens)
            torch.set_float32_matmul_precision(precision)
            makers = {name: functools.partial(step_contender, bench, name, folder, tokens) for name in names}
            new = bench.duels(makers, routing=routing, busiest_over_mean=round(load, 2))
        add_rates(bench, new)
        rows += new
    return rows + [{"name": name, "left_out": reason} for name, reason in left_out.items()]


def add_rates(bench: Bench, rows: Rows) -> None:
    """Tokens and FLOP/s, as a share of the best product, too; what MTP costs in time, and in FLOPs."""
    shapes, seq_len = {False: bench.plain, True: bench.config.model}, bench.config.data.seq_len
    flops = {mtp: flops_per_token(s, count_parameters(plan.meta_model(s)), seq_len) for mtp, s in shapes.items()}
    times = {row["name"]: row["times_first"] for row in rows}
    for row in rows:
        plain = row["name"].removesuffix(" MTP")
        mtp = plain != row["name"]
        row["tokens_per_sec"] = 1e3 * bench.num_tokens / row["median_ms"]
        row["tflops"] = row["tokens_per_sec"] * flops[mtp] / 1e12
        row["share_of_product"] = row["tflops"] / bench.roofs[next(w for w in plain.split() if w in DTYPES)]
        if mtp:
            row |= {"mtp_times": row["times_first"] / times[plain], "mtp_flops_times": flops[True] / flops[False]}


def bench_memory(bench: Bench) -> Rows:
    _memory(bench.device)  # raises where it cannot be measured
    rows, (names, left_out) = Rows(), step_names(bench)
    for name in names:
        print(f"{name}: ", end="", file=sys.stderr, flush=True)
        command = [sys.executable, __file__, "memory", *bench.arguments, "--only", name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:  # killed, for memory as a rule
            left_out[name] = " ".join([f"exit code {done.returncode}", *done.stderr.strip().splitlines()[-1:]])
            print(left_out[name], file=sys.stderr)
            continue
        peak = float(done.stdout.split()[-1])
        rows.append({"name": name, "peak_gib": peak, "times_first": peak / (rows[0]["peak_gib"] if rows else peak)})
        print(f"{peak:.3g} GiB, {rows[-1]['times_first']:.2f} times {rows[0]['name']}", file=sys.stderr)
    return rows + [{"name": name, "left_out": reason} for name, reason in left_out.items()]


def memory_of(bench: Bench, name: str) -> float:
    """GiB that three steps of one contender add at their peak to what the process held after its imports."""
    import transformers.models.deepseek_v3.modeling_deepseek_v3  # noqa: F401  # its imports are not its step's memory

    shape = (bench.config.micro_rows, bench.config.data.seq_len + 2)
    tokens = torch.randint(bench.config.model.vocab_size, shape, generator=bench.rng).to(bench.device)
    before, _ = _memory(bench.device)
    with tempfile.TemporaryDirectory() as place:
        step = step_contender(bench, name, save(bench.build(bench.plain), place), tokens)
    gc.collect()
    if bench.device.type == "cuda":  # loading is not the step's
        torch.cuda.reset_peak_memory_stats(bench.device)
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # proc(5): resets the peak
    for _ in range(3):
        step()
    return _memory(bench.device)[1] - before


def _memory(device: torch.device) -> tuple[float, float]:
    """GiB now and at the peak: allocated on a GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**30, torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if not status.exists():
        raise UserError("memory: on a CPU it is measured on Linux only")
    sizes = dict(re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB", status.read_text("utf-8"), re.MULTILINE))
    return int(sizes["VmRSS"]) / 2**20, int(sizes["VmHWM"]) / 2**20


def decoder(bench: Bench, name: str, folder: Path, prompt: list[int]) -> Callable[[], list[int]]:
    """Greedy decoding by `ours bf16` or `transformers eager bf16`, with weights in bf16, too."""
    who, *words = name.split()
    if who == "ours":
        model = generate.load_model(folder, bench.device, words[0])
        return lambda: generate.generate(model, [prompt], max_new_tokens=NEW_TOKENS)[0]
    theirs, ids = load_theirs(bench, folder, *words), torch.tensor([prompt], device=bench.device)
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "use_cache": True}
    return lambda: theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()


def same_tokens(model: DeepSeekV3, prompt: list[int], ours: list[int], theirs: list[int], who: str) -> int:
    """How many of the first tokens are equal. All, or those before a near-tie."""
    same = next((i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), len(ours))
    if same < len(ours):
        with torch.no_grad():
            logits_W = model(torch.tensor([prompt + ours[:same]], device=model.lm_head.weight.device))[0, -1]
        gap = float((logits_W[ours[same]] - logits_W[theirs[same]]).abs() / logits_W.abs().max())
        if not gap <= TOLERANCE["fp32"]:
            raise UserError(f"{who}: token {same} is another, and not by a near-tie ({gap:.2g}); not timed")
    return same


def bench_generate(bench: Bench) -> Rows:
    prompt, model = text_tokens(bench)[0, :PROMPT_TOKENS].tolist(), bench.build(bench.plain)
    generate.check_lengths(model.config, [prompt], NEW_TOKENS)
    everyone = ["ours", *(f"transformers {experts}" for experts in THEIR_EXPERTS)]
    with tempfile.TemporaryDirectory() as place:
        names, folder = [f"{who} {dtype}" for who in everyone for dtype in bench.dtypes], save(model, place)
        makers = {name: functools.partial(decoder, bench, name, folder, prompt) for name in names}
        texts = {f"{who} fp32": makers[f"{who} fp32"]()() for who in everyone}
        same = {name: same_tokens(model, prompt, texts["ours fp32"], text, name) for name, text in texts.items()}
        rows = bench.duels(makers)
    for row in rows:
        row |= {"tokens_per_sec": 1e3 * NEW_TOKENS / row["median_ms"], "same_tokens": same.get(row["name"], "")}
    return rows


# --------------------------------------------------------------------------------------------------------------- layers


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
    """Hidden matrices only, bf16 Newton-Schulz on both sides, the same gradients."""
    model = bench.build(bench.config.model)
    optimizers = Optimizers(model, bench.config.optim.model_copy(update={"name": "muon", "ns_dtype": "bf16"}))
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
    ours.step()
    theirs.step()
    for mine, other in zip(views, singles, strict=True):
        bench.check("torch.optim.Muon, updates", mine, other, 0.1)  # bf16 iterations leave up to 0.06
    makers = {"ours": lambda: ours.step, "torch.optim.Muon": lambda: theirs.step}
    return bench.duels(makers, matrices=len(singles), elements=sum(matrix.numel() for matrix in singles))


SUITES = {
    "step": bench_step, "memory": bench_memory, "generate": bench_generate, "moe": bench_moe,
    "attention": bench_attention, "loss": bench_loss, "optim": bench_optim,
}  # fmt: skip


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
    wanted = {"torch", "transformers", "triton", "liger-kernel"} & installed.keys()
    return {"python": platform.python_version(), **{name: installed[name] for name in sorted(wanted)}}


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="bench.py", description="Times this repository beside other code; see the top of the file.")
    parser.add_argument("suite", choices=list(SUITES), help="what to compare")
    parser.add_argument("--config", default="quickstart", metavar="PATH|NAME", help="shapes (default: quickstart)")
    parser.add_argument("--repeats", type=int, default=20, metavar="N", help="runs of each contender (default: 20)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks", metavar="DIR", help="where the JSON goes")
    parser.add_argument("--only", help="with memory: this contender, in this process; prints GiB")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change keys of the configuration")
    try:
        given = parser.parse_intermixed_args(arguments)
        if given.repeats < 1:
            raise UserError(f"--repeats {given.repeats} must be at least 1")
        config = configuration.load(given.config, given.overrides)
        if config.train.micro_batch is None:
            raise UserError("train.micro_batch = null: the bench does not search, give a number of rows")
        device = parallel.pick_device(0, allow_cpu=True)
        precision = parallel.pick_precision(config.train.precision, device)
        parallel.set_arithmetic(precision, device)
        bench = Bench(config, device, precision, given.repeats, ["--config", given.config, *given.overrides])
        if given.only is not None:
            names, _ = step_names(bench)
            if given.suite != "memory" or given.only not in names:
                raise UserError(f"--only {given.only}: with memory, one of {', '.join(names)}")
            print(memory_of(bench, given.only))
            return 0
        bench.roofs |= {name: product_rate(device, DTYPES[name]) / 1e12 for name in bench.dtypes}
        rows = SUITES[given.suite](bench)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    where, roofs = hardware(device), ", ".join(f"{name} {roof:.2f} TFLOP/s" for name, roof in bench.roofs.items())
    print(f"{given.suite}, {config.run.name}, {precision}, {bench.num_tokens:,} tokens\n{where}; best product {roofs}")
    print(table(rows))
    entry = {
        "suite": given.suite, "config": config.run.name, "overrides": given.overrides, "precision": precision,
        "tokens": bench.num_tokens, "hardware": where, "versions": versions(), "repeats": given.repeats,
        "command": " ".join(["python scripts/bench.py", *(sys.argv[1:] if arguments is None else arguments)]),
        "product_tflops": bench.roofs, "checks": bench.checks, "rows": rows,
    }  # fmt: skip
    slug = re.sub(r"[^a-z0-9]+", "-", where.lower()).strip("-")
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / f"{given.suite}-{config.run.name}-{slug}.json"
    path.write_text(json.dumps(entry, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
