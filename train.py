"""Train a DeepSeek-V3: `python train.py --config quickstart`, `torchrun --standalone --nproc_per_node=8 train.py`.

From here to the loss: `main` -> `train` -> `train_step` -> `DeepSeekV3.forward` in model.py.
torch is imported inside functions, so that a mistake in the configuration is told at once.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import config as configuration
import environment
from config import Config, OpsConfig, UserError
from options import Parser
from signals import StopFlag, Stopped
from text import report

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerFast

    from counts import Counts
    from data import Loader, Validation
    from metrics import Clock
    from model import DeepSeekV3
    from optim import LossScale, Optimizers
    from parallel import Mesh
    from resume import TrainState
    from stream import Batch
    from tracker import Tracker

CPU_MICRO_TOKENS = 2048  # tokens at a time: a guess at what a CPU's caches like
DIVERGED_AFTER = 20  # steps in a row without a finite gradient
MOST_WAITING = 0.05  # share of the time that may be spent waiting for data without a word
EXIT_TIME = 3
EXIT_CODES = (
    "exit codes: 0 finished, 1 failed, 2 bad input; with the last step saved: 3 train.max_minutes over, "
    "130 stopped by SIGINT, 143 by SIGTERM"
)


# ------------------------------------------------------------------------------------------------------------ one step


@dataclass
class Run:
    """What a step needs."""

    config: Config
    mesh: Mesh
    model: DeepSeekV3
    replica: nn.Module  # the model, under DDP when there are several ranks
    optimizers: Optimizers
    scale: LossScale
    steps: int
    stop: StopFlag
    tracker: Tracker
    eos: int

    def weight_at(self, step: int) -> float:
        """The MTP loss's weight: the first one, then the final one (2412.19437, section 4.2)."""
        train = self.config.train
        return train.mtp_weight if step < train.mtp_switch * self.steps else train.mtp_weight_final


def train_step(run: Run, step: int, batch: Batch) -> dict[str, Any] | None:
    """One optimizer step over this rank's rows; its metrics, or None when a signal came before anything changed."""
    import torch

    from data import inputs
    from metrics import step_metrics
    from model import LossWeights
    from optim import clip_gradients, lr_at, update_router_bias
    from parallel import synchronised

    config, mesh, depth = run.config, run.mesh, run.config.model.num_nextn_predict_layers
    data, rows = config.data, config.rows_per_step
    # Sums over global counts: accumulation and uneven ranks are right by construction. DDP divides by the world size.
    unit, *mtp_units = (run.scale.value * mesh.world_size / max(1, count) for count in batch.num_targets)
    mtp_weight = run.weight_at(step)
    weights = LossWeights(
        unit,
        tuple(mtp_unit * mtp_weight / depth for mtp_unit in mtp_units),
        run.scale.value * mesh.world_size / rows * config.model.aux_loss_alpha,
    )
    nothing = LossWeights(0.0, (0.0,) * depth, 0.0)
    parts = micro_batches(len(batch.tokens), -(-config.rank_rows(mesh.world_size) // config.micro_rows))
    alone = run.replica is run.model  # DDP's buckets are the gradients: dropping them would make every one twice
    run.optimizers.zero_grad(set_to_none=alone)
    sums: Tensor | None = None
    for number, part in enumerate(parts):
        if mesh.any(run.stop.requested):
            run.optimizers.zero_grad(set_to_none=alone)
            return None
        # With more turns than rows (one row at a time, dealt unevenly) a rank idles on its first row, weighing nothing:
        # DDP has collectives in forward, too, so all ranks must make the same calls.
        idle = part.start == part.stop
        rows_BX = batch.tokens[slice(0, 1) if idle else part].to(mesh.device, non_blocking=True)
        given = inputs(
            rows_BX, data.seq_len, run.eos, packed=data.packing == "best_fit", isolated=data.document_mask,
            crossing=data.cross_targets,
        )  # fmt: skip
        with synchronised(run.replica, last=number == len(parts) - 1):
            out = run.replica(
                given.tokens, given.targets, positions=given.positions, doc_ids=given.doc_ids,
                loss_weights=nothing if idle else weights,
            )  # fmt: skip
            out.loss.backward()
        if not idle:
            counted = (out.nats, out.num_correct, out.balance, out.expert_counts)
            part_sums = torch.cat([tensor.detach().double().flatten() for tensor in counted])
            sums = part_sums if sums is None else sums + part_sums
        run.tracker.progress(step + (number + 1) / len(parts), f"micro-batch {number + 1}/{len(parts)}")
    assert sums is not None
    mesh.sum(sums)
    norm = clip_gradients(run.model.parameters(), config.train.grad_clip, run.scale.value)
    parts_of_loss = 2 * (1 + depth) + 1
    # The one wait for a GPU in a step.
    grad_norm, *step_sums = torch.cat((norm.double()[None], sums[:parts_of_loss])).tolist()
    nats, balance = step_sums[: 1 + depth], step_sums[-1]
    finite = not mesh.any(not all(map(math.isfinite, (grad_norm, *nats, balance))))
    lr = lr_at(step, run.steps, config.optim)
    counts_LE = sums[parts_of_loss:].view(-1, config.model.n_routed_experts)
    if finite:  # branch, never multiply: nothing that is not finite reaches a state
        run.optimizers.step(lr)
        if step < config.optim.bias_until * run.steps:
            update_router_bias(run.model, counts_LE, config.optim.bias_speed)
    run.scale.update(finite)
    metrics = step_metrics(step_sums, batch.num_targets, rows, mtp_weight, config)
    return metrics | {"lr": lr, "grad_norm": grad_norm if finite else None, "skipped": not finite, "counts": counts_LE}


def micro_batches(rows: int, number: int) -> list[slice]:
    """Cut `rows` into `number` parts that differ by at most one row."""
    return [slice(part * rows // number, (part + 1) * rows // number) for part in range(number)]


# ------------------------------------------------------------------------------------------------------------- the run


def train(config: Config, *, resume_from: str = "auto", allow_cpu: bool = False, profile: bool = False) -> int:
    """Train to the end or to a signal; the process's exit code."""
    import checkpoint
    import evals
    import parallel
    import probe
    import profiling
    import resume
    from counts import count_parameters, flops_per_token, num_steps
    from data import Loader
    from dataset import open_dataset
    from metrics import Clock
    from model import meta_model
    from ops import DTYPES
    from stream import Cursor
    from tracker import Tracker

    run_dir, stop, started, late = Path(config.run.dir), StopFlag(), time.monotonic(), False
    with parallel.processes(allow_cpu=allow_cpu) as mesh, contextlib.ExitStack() as cleanup:
        if config.rows_per_step < mesh.world_size:
            raise UserError(
                f"train.batch_tokens = {config.train.batch_tokens} is {config.rows_per_step} rows of data.seq_len = "
                f"{config.data.seq_len}: too few for {mesh.world_size} ranks"
            )
        precision = parallel.pick_precision(config.train.precision, mesh.device)
        parallel.set_arithmetic(precision, mesh.device)
        dtype = DTYPES[precision]
        memory = mesh.least(parallel.usable_memory(mesh.device))
        rows = mesh.from_main(on_main(mesh, lambda: fitting_rows(config, mesh, dtype, memory)))
        config = config.with_micro_batch(rows)
        counts = count_parameters(meta_model(config.model))
        steps = num_steps(config, counts)
        flops = flops_per_token(config.model, counts, config.data.seq_len)
        peak, peak_name = parallel.peak_flops(mesh.device, dtype)
        if mesh.is_main:
            warn_if_slow(mesh, precision, flops * steps * config.train.batch_tokens / peak)

        mesh.from_main(on_main(mesh, lambda: cleanup.enter_context(checkpoint.locked(run_dir))))
        start = mesh.from_main(on_main(mesh, lambda: resume.pick(run_dir, resume_from)))
        state = resume.TrainState.read(start) if start is not None else None
        if state is not None:
            resume.check_config(state, config, precision)
        if state is not None and start is not None and not resume.belongs(start, run_dir):
            if state.step >= steps:
                raise UserError(
                    f"--resume {resume_from}: it is step {state.step} already; to branch off, give train.steps above it"
                )
            state.origin = resume.identity(start) or ""
        if state is not None and state.ended(config, steps) and resume.same_names(state, config):
            return say_finished(config, state.step, start) if mesh.is_main else 0  # the data may be far away
        fallback = None if state is None else state.fallback
        opened = mesh.from_main(on_main(mesh, lambda: open_dataset(config, start, fallback=fallback)))
        held_out = mesh.from_main(on_main(mesh, lambda: opened.validation(config)))
        known = {"sources": opened.manifest.fingerprint, "tokenizer": opened.fingerprint}
        if state is not None:
            resume.check_content(state, config, **known)
            if state.ended(config, steps):
                return say_finished(config, state.step, start) if mesh.is_main else 0
            state.config, state.precision, state.exhausted = resume.learned(config), precision, False
        else:
            learned = resume.learned(config)
            state = resume.TrainState(learned, precision=precision, fallback=opened.fallback, **known)

        paths, told = mesh.from_main(on_main(mesh, lambda: probe.choose(config, mesh.device, dtype, state.ops)))
        state.ops = paths.model_dump()
        model, optimizers, scale = build(config, mesh, precision, paths, state, start)
        mesh.from_main(on_main(mesh, lambda: make_folder(run_dir, cleanup, afresh=resume_from == "never")))
        tracker = Tracker(run_dir if mesh.is_main else None, total_steps=steps, first_step=state.step)
        replica, eos = parallel.parallelize(model, mesh), opened.encoder.eos
        run = Run(config, mesh, model, replica, optimizers, scale, steps, stop, tracker, eos)
        if mesh.is_main:
            (run_dir / "config.yaml").write_text(configuration.to_yaml(config), encoding="utf-8")
            announce(run, counts, state, start, held_out, f"{precision} on {peak_name}: {peak / 1e12:.2f} TFLOP/s")
            for line in told:
                tracker.note(line)
        cleanup.enter_context(stop)  # until now a signal ended the program as ever: there was nothing to save
        feed = opened.feed(config, Cursor.from_dict(state.cursor), rank=mesh.rank, world_size=mesh.world_size)
        loader = Loader(feed, config.data.workers, pin_memory=mesh.device.type == "cuda", note=tracker.note)
        resume.restore_rng(config.train.seed, start, mesh.device)
        saved, bad_in_a_row = state.step, 0
        clock = Clock()
        profiler = profiling.Profiler(run_dir, mesh.device, tracker.note) if profile and mesh.is_main else None
        try:
            while state.step < steps and not state.exhausted:
                late = time.monotonic() - started > 60 * (config.train.max_minutes or math.inf)
                if mesh.any(late):
                    break
                batch = next_batch(clock, loader, stop)
                if mesh.any(batch is None):
                    break
                if mesh.any(isinstance(batch, UserError)):  # the data are gone; what was learned is not
                    if saved < state.step:
                        save(run, state, opened.tokenizer)
                    raise batch if isinstance(batch, UserError) else UserError("another rank could not read its data")
                metrics = train_step(run, state.step, batch)
                if metrics is None:
                    break
                clock.step_done(config.train.batch_tokens)
                if profiler is not None:
                    profiler.step()
                state.step += 1
                state.tokens += config.train.batch_tokens
                state.cursor, state.exhausted = batch.cursor.to_dict(), batch.last
                state.loss_scale = asdict(scale) if scale.dynamic else {}
                bad_in_a_row = bad_in_a_row + 1 if metrics["skipped"] else 0
                state.skipped_steps += metrics["skipped"]
                if bad_in_a_row >= DIVERGED_AFTER:
                    tracker.note(
                        f"no finite gradient for {DIVERGED_AFTER} steps: stopped before saving; lower optim.lr"
                    )
                    return 1
                last = state.step == steps or state.exhausted
                scores = {}
                if last or state.step % config.eval.every_steps == 0:
                    tracker.progress(state.step, "evaluating")
                    isolated = eos if config.data.document_mask else None
                    scores = evals.evaluate(model, held_out, rows=config.micro_rows, mesh=mesh, eos=isolated)
                if scores or last or state.step % config.log.every_steps == 0:
                    entry = log_entry(run, state, batch, metrics, clock, loader, flops / peak)
                    tracker.log(state.step, entry | scores)
                if last or state.step % config.sample.every_steps == 0:
                    write_samples(run, opened.tokenizer, state.step, shown=last)
                if last or state.step % config.checkpoint.every_steps == 0:
                    save(run, state, opened.tokenizer)
                    saved = state.step
            if saved < state.step:
                save(run, state, opened.tokenizer)
        finally:
            loader.close()
            if profiler is not None:
                profiler.stop()
        if state.exhausted:
            tracker.note(f"the sources' last epoch ended at step {state.step} of {steps}: this run is complete")
        elif state.step < steps and late and not stop.requested:
            tracker.note(
                f"train.max_minutes = {config.train.max_minutes:g} are over: stopped after step {state.step} of "
                f"{steps}; the same command goes on"
            )
            return EXIT_TIME
        elif state.step < steps:
            number = stop.signal or signal.SIGTERM  # another rank was told to stop
            tracker.note(
                f"stopped by {signal.Signals(number).name} after step {state.step} of {steps}; the same command goes on"
            )
            return 128 + number
        if mesh.is_main:
            say_done(config)
        return 0


def log_entry(
    run: Run, state: TrainState, batch: Batch, metrics: dict[str, Any], clock: Clock, loader: Loader, per_token: float
) -> dict[str, Any]:
    """A line of `metrics.jsonl`. `per_token`: FLOPs per token over the device's peak."""
    from metrics import data_metrics, expert_metrics
    from parallel import peak_memory_gib

    rates = clock.rates()
    share = rates["data_wait_sec"] * rates["steps_per_sec"]
    if share > MOST_WAITING and state.step > run.config.log.every_steps:  # at first everything starts
        run.tracker.note(
            f"the data come too slowly: {share:.0%} of the time was spent waiting for them; more data.workers, or "
            "scripts/prepare_data.py, which tokenises once, would help"
        )
    counts_LE = metrics.pop("counts")
    return {
        "tokens": state.tokens,
        **metrics,
        "mtp_weight": run.weight_at(state.step - 1),
        **rates,
        "mfu": rates["tokens_per_sec"] * per_token / run.mesh.world_size,
        "peak_memory_gib": peak_memory_gib(run.mesh.device),
        **data_metrics(batch, loader),
        "skipped_steps": state.skipped_steps,
        "loss_scale": run.scale.value,
        "experts": expert_metrics(run.model, counts_LE),
    }


# ------------------------------------------------------------------------------------------------- the start of a run


def next_batch(clock: Clock, loader: Loader, stop: StopFlag) -> Any:
    """The next batch, None if a signal came first, or the UserError in its place: all ranks must hear of it before one
    leaves."""
    try:
        with stop.interrupting():
            return clock.wait_for(loader)
    except Stopped:
        return None
    except UserError as error:
        return error


def on_main(mesh: Mesh, make: Callable[[], Any]) -> Any:
    """On rank 0 what `make` returns, or the UserError it raises, for `Mesh.from_main` to pass on."""
    if not mesh.is_main:
        return None
    try:
        return make()
    except UserError as error:
        return error


def fitting_rows(config: Config, mesh: Mesh, dtype: torch.dtype, available: int) -> int:
    """`train.micro_batch`; for auto the most that fit: on a GPU by the predicted peak, on a CPU its caches."""
    if config.train.micro_batch is not None:
        return config.train.micro_batch
    if mesh.device.type == "cpu":
        return min(config.rank_rows(mesh.world_size), max(1, CPU_MICRO_TOKENS // config.data.seq_len))
    import memory

    return memory.largest_micro_batch(config, dtype=dtype, available=available, world_size=mesh.world_size)


def build(
    config: Config, mesh: Mesh, precision: str, paths: OpsConfig, state: TrainState, start: Path | None
) -> tuple[DeepSeekV3, Optimizers, LossScale]:
    """Model, optimizers and loss scale: of the checkpoint, from `train.init_from`, or new."""
    import checkpoint
    import convert
    import resume
    from model import init_weights, meta_model
    from ops import DTYPES
    from optim import LossScale, Optimizers

    model = meta_model(config.model, DTYPES[precision], recompute=config.train.recompute, paths=paths)
    model.to_empty(device=mesh.device)
    if start is None:
        init_weights(model, config.train.seed)
    optimizers = Optimizers(model, config.optim)
    scale = LossScale(dynamic=True, value=2.0**13) if precision == "fp16" else LossScale()
    if start is not None:
        model.load_state_dict(convert.load(start)[1])
        optimizers.load(checkpoint.load(start, "optimizer"))
        scale = LossScale(**state.loss_scale) if scale.dynamic and state.loss_scale else scale
    elif config.train.init_from is not None:
        resume.load_initial_weights(model, config)
    if config.train.compile:
        model.compile_blocks()
    return model, optimizers, scale


def make_folder(run_dir: Path, cleanup: contextlib.ExitStack, *, afresh: bool) -> None:
    """The run's folder, writable and ours until `cleanup`; `afresh` first moves an earlier run aside.

    Everything else has worked by now.
    """
    import checkpoint
    import resume

    try:
        if afresh:
            resume.move_aside(run_dir)
        new = not run_dir.exists()
        (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        if new:
            cleanup.enter_context(checkpoint.locked(run_dir))
        for name in ("config.yaml", "metrics.jsonl", "samples.md"):  # now, not when there is something to lose
            (run_dir / name).open("a").close()
    except OSError as error:
        raise UserError(f"run.dir = {str(run_dir)!r} cannot be written: {error.filename}: {error.strerror}") from None


def warn_if_slow(mesh: Mesh, precision: str, seconds_at_peak: float) -> None:
    from parallel import cpu_has_bf16
    from tracker import duration

    if mesh.device.type == "cpu" and precision == "bf16" and not cpu_has_bf16():
        print("this CPU emulates bf16; train.precision=fp32 is many times faster here", flush=True)
    if mesh.device.type == "cpu" and seconds_at_peak > 1800:
        print(
            f"no GPU found: on this CPU this run would take about {duration(2 * seconds_at_peak / mesh.world_size)}; "
            "for one that takes minutes: python train.py --config quickstart",
            flush=True,
        )


def announce(
    run: Run, counts: Counts, state: TrainState, start: Path | None, held_out: Validation, hardware: str
) -> None:
    from model import LatentCache

    model, config, note = run.config.model, run.config, run.tracker.note
    total, active = counts.total + counts.mtp, counts.active_with_head
    note(f"{config.run.name}: {total / 1e6:,.1f}M parameters with MTP, {active / 1e6:,.1f}M active per token")
    note(f"{hardware}, {run.mesh.world_size} rank(s); {run.steps:,} steps of {config.train.batch_tokens:,} tokens")
    latent = LatentCache(model, 1, 1, device="meta", dtype=run.model.dtype)
    plain = model.num_hidden_layers * model.num_attention_heads * (model.qk_head_dim + model.v_head_dim)
    plain *= latent.latent_LBSC.element_size()
    ratio = plain / latent.bytes_per_token
    note(f"KV cache {latent.bytes_per_token:,} bytes per token, {ratio:.1f} times less than plain attention's")
    if held_out.num_documents:
        note(f"validation: {held_out.num_documents} held-out documents, {held_out.num_tokens:,} tokens")
    else:
        note("validation: none; no document is held out")
    if start is not None:
        note(f"resumed from {start} after step {state.step}")


# --------------------------------------------------------------------------------------------------- what a run writes


def save(run: Run, state: TrainState, tokenizer: PreTrainedTokenizerFast) -> None:
    """A checkpoint of the last completed step: a model directory with the training state beside the weights."""
    import checkpoint
    import convert
    import resume

    if run.mesh.is_main:
        run.tracker.progress(state.step, "saving")
        tensors = {
            "model": convert.to_checkpoint(run.model.state_dict(), run.config.model),
            "optimizer": run.optimizers.state(),
            "rng": resume.rng_state(run.mesh.device),
        }
        files = resume.model_files(run.config, tokenizer) | {resume.STATE_FILE: state.to_json()}
        root = Path(run.config.run.dir) / "checkpoints"
        checkpoint.save(root, state.step, tensors, files, keep=run.config.checkpoint.keep)
    run.mesh.any(False)  # the others wait: nobody is ahead of what is on disk


def write_samples(run: Run, tokenizer: PreTrainedTokenizerFast, step: int, *, shown: bool) -> None:
    """The configured prompts continued, the same seed every time, into `samples.md`, and on the screen if `shown`."""
    if not run.mesh.is_main:
        return
    import generate

    sample = run.config.sample
    run.tracker.progress(step, "sampling")
    room = run.config.model.max_position_embeddings - sample.max_new_tokens
    end: Any = tokenizer.eos_token_id
    prompts = [tokenizer.encode(text, add_special_tokens=False)[: max(1, room)] or [end] for text in sample.prompts]
    try:
        texts = generate.generate(
            run.model, prompts, max_new_tokens=min(sample.max_new_tokens, run.config.model.max_position_embeddings - 1),
            temperature=sample.temperature, top_k=sample.top_k, seed=run.config.train.seed, eos_ids=(end,),
            vocab_limit=len(tokenizer),
        )  # fmt: skip
    except Exception as error:  # noqa: BLE001  # whatever it is, a sample is not worth a run
        run.tracker.note(f"no samples: {error}")
        return
    safe = [generate.safe_text(str(tokenizer.decode(text))) for text in texts]
    run.tracker.samples(step, list(zip(sample.prompts, safe, strict=True)))
    if shown:
        for prompt, text in zip(sample.prompts, safe, strict=True):
            run.tracker.note(f"\n{prompt}{text}")


def say_done(config: Config) -> None:
    print(f"\ndone: the model is in {config.run.dir}/checkpoints, in Hugging Face format")
    _say_next(config)


def say_finished(config: Config, step: int, start: Path | None) -> int:
    print(f"{config.run.name} is finished: {start} is step {step}, and no more are asked for; nothing was changed")
    _say_next(config)
    return 0


def _say_next(config: Config) -> None:
    named = config.run.dir == f"runs/{config.run.name}"
    print(NEXT.format(dir=config.run.dir, other="run.name" if named else "run.dir"))


NEXT = """next:
  sample   python generate.py --checkpoint {dir} --prompt "..."
  extend   the same command with train.steps=N, more than before
  afresh   the same command with {other}=ANOTHER, or with --resume never (which moves this run aside)"""


# ------------------------------------------------------------------------------------------------------------- program


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 1e-6 <= value <= 1e12:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1e-6 to 1e12")
    return value


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="train.py",
        description="Train a DeepSeek-V3 model. Starting the same command again goes on where it stopped.",
        epilog=configuration.describe() + "\n\n" + EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", default="mini", metavar="PATH|NAME", help="YAML file or preset in configs/ (mini)")
    parser.add_argument("--resume", default="auto", metavar="auto|never|PATH", help="checkpoint to go on from (auto)")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan: config, parameters, FLOPs, memory, cost"
    )
    parser.add_argument("--tokens-per-sec", type=_rate, metavar="X", help="with --dry-run: tells hours")
    parser.add_argument("--price-per-hour", type=_rate, metavar="X", help="with --dry-run: tells the cost")
    parser.add_argument(
        "--allow-cpu", action="store_true", help="go on without the GPU when torch is built for the CPU"
    )
    parser.add_argument("--profile", action="store_true", help="trace the third step and list its dearest operations")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change keys of the configuration")
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        args = parse(sys.argv[1:] if arguments is None else arguments)
        for stream in (sys.stdout, sys.stderr):  # a sample may hold what the console's encoding lacks
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        config = configuration.load(args.config, args.overrides)
        if args.resume not in ("auto", "never") and not os.path.isdir(args.resume):
            raise UserError(f"--resume {args.resume}: no such directory; allowed: auto, never, or a checkpoint's path")
        environment.prepare()
        if args.dry_run:
            if int(os.environ.get("RANK", 0)) == 0:
                import plan

                world_size = int(os.environ.get("WORLD_SIZE", 1))
                options = {"tokens_per_sec": args.tokens_per_sec, "price_per_hour": args.price_per_hour}
                print(plan.describe(config, **options, world_size=world_size))
            return 0
        return train(config, resume_from=args.resume, allow_cpu=args.allow_cpu, profile=args.profile)
    except UserError as error:
        return report(error) if int(os.environ.get("RANK", 0)) == 0 else 2
    except OSError as error:  # a file or folder that may not be read, written or so named
        if error.filename is None:
            raise
        return report(error)
    except KeyboardInterrupt:  # before training listens to signals: nothing to save yet
        return 130


if __name__ == "__main__":
    sys.exit(main())
