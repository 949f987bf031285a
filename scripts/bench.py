"""Times and weighs this repository beside other code: `python scripts/bench.py step --config quickstart`.

    step       a training step against transformers' DeepseekV3ForCausalLM: every way it computes experts, fp32 and bf16
    ladder     our step with one technique taken away, or put on, at a time
    memory     their peak memory, above what a process holds after its imports: the median of up to five child processes
    generate   greedy tokens with a KV cache against transformers' `generate`, fp32 and bf16
    moe        a layer of experts: ours, expert by expert, and a dense SwiGLU of equal active width
    attention  ours, torch's fused kernel and the plain formula
    loss       the vocabulary head with cross-entropy: ours, full logits, torch's and Liger's where there are any
    optim      Muon: ours against torch.optim.Muon over the same matrices one by one
    data       the supply of tokens: mapped shards, streamed text, packing, resume, the wait of a run

Each contender meets the first in a duel: one process, the same weights and tokens, run in turn, so that a machine's
moods meet both; before, results and gradients are compared. The table goes to standard output and, as JSON, to
`benchmarks/<suite>-<config>-<hardware>.json`, progress to standard error. Products are the best of large matrices.
"""

from __future__ import annotations

import functools
import gc
import itertools
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the modules lie beside this folder

import signals

signals.quiet()

import config as configuration
import environment
from config import UserError

if __name__ == "__main__":  # before torch is imported, as a training run does; who imports this file changes nothing
    try:
        environment.prepare()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

import torch
import torch.nn.functional as F
from bench_data import bench_data
from bench_layers import bench_attention, bench_loss, bench_moe, bench_optim
from duels import TOLERANCE, Bench, Rows, Run, hardware, table, versions
from torch import Tensor, nn

import checkpoint
import convert
import data
import generate
import losses
import ops
import parallel
import sources
import tokenizer as tokenizers
from config import OpsConfig
from counts import count_parameters, flops_per_token
from model import DeepSeekV3, LossWeights, meta_model
from ops import DTYPES
from optim import update_router_bias
from options import Parser

MOST_FLIPS = 1e-3  # rows with a token routed otherwise, as a share of all tokens
MOST_COPIES_GIB = 4.0
MOST_CHILDREN = 5  # whose peaks differ by some percent, as the C library's allocator cuts its memory
PROMPT_TOKENS, NEW_TOKENS = 16, 64
THEIR_EXPERTS = ("eager", "batched_mm", "grouped_mm")  # transformers' experts_implementation that train without a GPU


# ------------------------------------------------------------------------------------------------------ a training step


def text_tokens(bench: Bench) -> Tensor:
    """Real text, (rows, T + 2), int64: a micro-batch of the bundled corpus under a BPE trained on it."""
    texts = list(data.training_texts(sources.resolve(configuration.load("quickstart").data.sources), 0, 1 << 20))
    tok = tokenizers.train_bpe(iter(texts), min(bench.config.model.vocab_size, 8192))
    shape = (bench.config.micro_rows, bench.config.data.seq_len + 2)
    encoder = tokenizers.Encoder(tok)
    documents = [[*ids.tolist(), encoder.eos] for ids in encoder(texts) if ids is not None]
    ids = list(itertools.chain.from_iterable(documents))
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
        model = bench.build(bench.config.model if "MTP" in words else bench.plain, dtype)
        return our_step(model, folder, tokens)
    theirs = load_theirs(bench, folder, words[0], dtype if "weights" in words else "fp32").train()
    cast = next(theirs.parameters()).dtype != DTYPES[dtype]

    def loss() -> Tensor:
        with torch.autocast(bench.device.type, DTYPES[dtype], enabled=cast):
            return theirs(input_ids=inputs, labels=inputs, use_cache=False).loss

    return optimized(theirs, loss)


def our_step(model: DeepSeekV3, folder: Path, tokens: Tensor) -> Run:
    """A step of our model with the weights of the folder."""
    model.load_state_dict(convert.load(folder)[1], strict=False)
    inputs, depth = tokens[:, :-2], len(model.mtp)
    share, targets = 1 / inputs.numel(), tokens[:, 1 : inputs.shape[1] + 1 + depth]
    weights = LossWeights(share, (0.3 * share,) * depth, model.config.aux_loss_alpha / len(tokens))
    return optimized(model, lambda: model(inputs, targets, loss_weights=weights).loss)  # type: ignore[union-attr]


def optimized(model: nn.Module, loss: Callable[[], Tensor]) -> Run:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def bench_ladder(bench: Bench) -> Rows:
    """Our step with one technique taken away, or put on, at a time; routing as initialised."""
    cfg, tokens = bench.plain, text_tokens(bench)
    shape = (bench.device, DTYPES[bench.precision])
    experts = ops.experts_paths(*shape, cfg.hidden_size, cfg.moe_intermediate_size)
    attention = ops.attention_paths(*shape, bench.config.data.seq_len)
    rungs: dict[str, dict[str, Any]] = {"ours": {}}
    rungs |= {f"experts {path}": {"paths": OpsConfig(experts=path)} for path in experts[1:]}  # type: ignore[arg-type]
    rungs |= {f"attention {path}": {"paths": OpsConfig(attention=path)} for path in attention[1:]}  # type: ignore[arg-type]
    rungs |= {"full logits": {}, "recompute selective": {"recompute": "selective"}}
    rungs |= {"recompute full": {"recompute": "full"}}
    if bench.precision != "fp32" and (bench.device.type == "cuda" or shutil.which("g++")):  # what Inductor can compile
        rungs["compile"] = {}
    rungs |= {"fp32": {"dtype": "fp32"}} if bench.precision != "fp32" else {}
    with tempfile.TemporaryDirectory() as place:
        folder = save(bench.build(cfg), place)

        def make(name: str, *, dtype: str = bench.precision, **options: Any) -> Run:
            model = bench.build(cfg, dtype, **options)
            if name == "compile":
                model.compile_blocks()
            step = our_step(model, folder, tokens)
            if name != "full logits":
                return step

            def with_full_logits() -> None:
                with mock.patch.object(losses, "linear_cross_entropy", full_logits):
                    step()

            return with_full_logits

        return bench.duels({name: functools.partial(make, name, **options) for name, options in rungs.items()})


def full_logits(*arguments: Tensor, path: str) -> tuple[Tensor, Tensor, Tensor]:
    return losses.linear_cross_entropy_reference(*arguments)


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
    parts, tokens, (names, left_out) = list[Rows](), text_tokens(bench), step_names(bench)
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
            parts.append(bench.duels(makers, routing=routing, busiest_over_mean=round(load, 2)))
    rows = Rows()
    for part in parts:
        add_rates(bench, part)
        rows += part
    return rows + [{"name": name, "left_out": reason} for name, reason in left_out.items()]


def add_rates(bench: Bench, rows: Rows) -> None:
    """Tokens and FLOP/s, as a share of the best product, too; what MTP costs in time, and in FLOPs."""
    shapes, seq_len = {False: bench.plain, True: bench.config.model}, bench.config.data.seq_len
    flops = {mtp: flops_per_token(s, count_parameters(meta_model(s)), seq_len) for mtp, s in shapes.items()}
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
        peaks: list[float] = []
        for _ in range(min(bench.repeats, MOST_CHILDREN)):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:  # killed, for memory as a rule
                left_out[name] = " ".join([f"exit code {done.returncode}", *done.stderr.strip().splitlines()[-1:]])
                print(left_out[name], file=sys.stderr)
                break
            peaks.append(float(done.stdout.split()[-1]))
        else:
            peak = statistics.median(peaks)
            times = peak / (rows[0]["peak_gib"] if rows else peak)
            spread = {"least_gib": min(peaks), "most_gib": max(peaks), "runs": len(peaks)}
            rows.append({"name": name, "peak_gib": peak, "times_first": times, **spread})
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


SUITES = {
    "step": bench_step, "ladder": bench_ladder, "memory": bench_memory, "generate": bench_generate, "moe": bench_moe,
    "attention": bench_attention, "loss": bench_loss, "optim": bench_optim, "data": bench_data,
}  # fmt: skip


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
        rows = SUITES[given.suite](bench)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    best = ", ".join(f"{name} {roof:.2f} TFLOP/s" for name, roof in bench.roofs.items())
    where, roofs = hardware(device), f"; best product {best}" if best else ""
    print(f"{given.suite}, {config.run.name}, {precision}, {bench.num_tokens:,} tokens\n{where}{roofs}")
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
