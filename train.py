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
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import signals

if __name__ == "__main__":  # Ctrl-C comes before what takes time to import
    signals.quiet()

import config as configuration
import environment
from config import Config, UserError
from options import Parser
from signals import ASKS, StopFlag, Stopped
from text import report, say

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

    from data import Loader, Validation
    from metrics import Clock
    from mirror import Mirror
    from model import LossWeights
    from parallel import Mesh
    from resume import TrainState
    from run import Run
    from saver import Contents, Saver
    from stream import Batch

CPU_MICRO_TOKENS = 2048  # tokens at a time: a guess at what a CPU's caches like
LATE, HOPELESS, DIVERGED = "late", "hopeless", "diverged"
MOST_SKIPPED = 5  # steps in a row without a finite gradient; one more puts the run back to a checkpoint
MOST_ROLLBACKS = 3
LESS_MEMORY = "train.recompute=full, optim.momentum_dtype=bf16, a smaller data.seq_len or model would take less"
SPARE = 1.25  # of the time that a step and a checkpoint took, kept free before train.max_minutes are over
EXIT_TIME, EXIT_DIVERGED, EXIT_UNSAVED, EXIT_UNPUSHED = 3, 4, 5, 6
EXIT_CODES = (
    "exit codes: 0 finished, 1 failed, 2 bad input, 3 train.max_minutes over, 4 diverged, 5 the last checkpoint could "
    "not be written, 6 finished but not on the Hub, "
    + ", ".join(f"{128 + number} stopped by {signal.Signals(number).name}" for number in sorted(ASKS))
    + " (after the codes of a time or a signal, the last step is saved)"
)


# ------------------------------------------------------------------------------------------------------------ one step


def train_step(run: Run, step: int, batch: Batch) -> dict[str, Any] | None:
    """One optimizer step over this rank's rows; its metrics, or None when a signal came before anything changed."""
    import torch

    from metrics import step_metrics
    from model import LossWeights
    from optim import clip_gradients, lr_at, update_router_bias
    from parallel import abandon

    config, mesh, depth = run.config, run.mesh, run.config.model.num_nextn_predict_layers
    rows = config.rows_per_step
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
    run.drop_gradients()
    sums: Tensor | None = None
    full = False
    for number, part in enumerate(parts):
        stopped, short = mesh.any(run.stop.requested, full)
        if short:
            raise OutOfMemory
        if stopped:
            run.drop_gradients()
            return None
        # With more turns than rows (one row at a time, dealt unevenly) a rank idles on its first row, weighing nothing:
        # DDP has collectives in forward, too, so all ranks must make the same calls.
        idle = part.start == part.stop
        rows_BX = batch.tokens[slice(0, 1) if idle else part]
        last, weight = number == len(parts) - 1, nothing if idle else weights
        part_sums = environment.within_memory(add_gradients, run, rows_BX, weight, last=last)
        full = part_sums is None
        if not idle and part_sums is not None:
            sums = part_sums if sums is None else sums + part_sums
        run.progress(step + (number + 1) / len(parts), f"micro-batch {number + 1}/{len(parts)}")
    if full:
        abandon(run.replica)
    if any(mesh.any(full)):
        raise OutOfMemory
    assert sums is not None
    mesh.sum(sums)
    norm = clip_gradients(run.model.parameters(), config.train.grad_clip, run.scale.value)
    parts_of_loss = 2 * (1 + depth) + 1
    # The one wait for a GPU in a step.
    grad_norm, *step_sums = torch.cat((norm.double()[None], sums[:parts_of_loss])).tolist()
    nats, balance = step_sums[: 1 + depth], step_sums[-1]
    (bad,) = mesh.any(not all(map(math.isfinite, (grad_norm, *nats, balance))))
    finite = not bad
    lr = lr_at(step, run.steps, config.optim)
    counts_LE = sums[parts_of_loss:].view(-1, config.model.n_routed_experts)
    if finite:  # branch, never multiply: nothing that is not finite reaches a state
        run.optimizers.step(lr)
        if step < config.optim.bias_until * run.steps:
            update_router_bias(run.model, counts_LE, config.optim.bias_speed)
    run.scale.update(finite)
    metrics = step_metrics(step_sums, batch.num_targets, rows, mtp_weight, config)
    return metrics | {"lr": lr, "grad_norm": grad_norm if finite else None, "skipped": not finite, "counts": counts_LE}


def add_gradients(run: Run, rows_BX: Tensor, weights: LossWeights, *, last: bool) -> Tensor:
    """Forward and backward of a micro-batch; the sums of `train_step`, flat."""
    import torch

    from data import inputs
    from parallel import synchronised

    data = run.config.data
    with synchronised(run.replica, last=last):
        given = inputs(
            rows_BX.to(run.mesh.device, non_blocking=True), data.seq_len, run.eos, packed=data.packing == "best_fit",
            isolated=data.document_mask, crossing=data.cross_targets,
        )  # fmt: skip
        out = run.replica(
            given.tokens, given.targets, positions=given.positions, doc_ids=given.doc_ids, loss_weights=weights
        )
        out.loss.backward()
    counted = (out.nats, out.num_correct, out.balance, out.expert_counts)
    return torch.cat([tensor.detach().double().flatten() for tensor in counted])


class OutOfMemory(Exception):
    """In forward or backward; nothing has changed, and all ranks know."""


def step_within_memory(run: Run, step: int, batch: Batch) -> dict[str, Any] | UserError | None:
    """`train_step`, over fewer rows at a time where memory runs out; the UserError where one row is too many."""
    while True:
        try:
            return train_step(run, step, batch)
        except OutOfMemory:
            if not run.halve_micro_batch():
                return UserError(f"out of memory with one row of data.seq_len at a time; {LESS_MEMORY}")


def micro_batches(rows: int, number: int) -> list[slice]:
    """Cut `rows` into `number` parts that differ by at most one row."""
    return [slice(part * rows // number, (part + 1) * rows // number) for part in range(number)]


# ------------------------------------------------------------------------------------------------------------- the run


def train(config: Config, *, resume_from: str = "auto", allow_cpu: bool = False, profile: bool = False) -> int:
    """Train to the end, to a signal or to a time; the process's exit code."""
    import checkpoint
    import journal
    import mirror
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
    from run import Run, build, checkpoint_bytes, put_back
    from saver import Saver
    from stream import Cursor
    from tracker import Tracker, cut_short

    run_dir, stop, started = Path(config.run.dir), StopFlag(), time.monotonic()
    with parallel.processes(allow_cpu=allow_cpu) as mesh, contextlib.ExitStack() as cleanup:
        precision = parallel.pick_precision(config.train.precision, mesh.device)
        parallel.set_arithmetic(precision, mesh.device, deterministic=config.train.deterministic)
        dtype = DTYPES[precision]
        memory = mesh.least(parallel.usable_memory(mesh.device))
        rows = mesh.on_main(lambda: fitting_rows(config, mesh, dtype, memory))
        config = config.with_micro_batch(rows)
        shapes = meta_model(config.model)
        counts = count_parameters(shapes)
        steps = num_steps(config, counts)
        flops = flops_per_token(config.model, counts, config.data.seq_len)
        peak, peak_name = parallel.peak_flops(mesh.device, dtype)
        if mesh.is_main:
            journal.warn_if_slow(mesh, precision, flops * steps * config.train.batch_tokens / peak)

        claim = resume.Claim(run_dir, cleanup)
        mesh.on_main(claim.take)
        num_bytes = checkpoint_bytes(config, shapes)
        repo_id = (config.hub.repo_id or environment.hub_repository()) if mesh.is_main else None
        verified: checkpoint.Known = set()
        hub = mirror.Mirror(repo_id, config, counts, num_bytes, verified)
        cleanup.callback(hub.close)
        mesh.on_main(lambda: hub.fetch(resume_from, precision, lambda: claim.take(make=True)))
        start = mesh.on_main(lambda: resume.pick(run_dir, resume_from, verified))
        state = resume.read(start, config, precision, steps) if start is not None else None
        cut = mesh.on_main(lambda: [] if state is None else cut_short(run_dir, state.step))
        over = state is not None and not cut and state.ended(config, steps)
        if state is not None and over and resume.same_names(state, config):
            return finished(mesh, hub, config, state, start)  # the data may be far away
        keep, afresh = config.checkpoint.keep, resume_from == "never"
        tight = mesh.on_main(lambda: checkpoint.preflight(run_dir, num_bytes, keep, afresh=afresh))
        fallback = None if state is None else state.fallback
        opened = mesh.on_main(lambda: open_dataset(config, start, fallback=fallback))
        held_out = mesh.on_main(lambda: opened.validation(config))
        if state is not None:
            resume.check_content(state, config, sources=opened.manifest.fingerprint, tokenizer=opened.fingerprint)
            if over:
                return finished(mesh, hub, config, state, start)
            state.exhausted &= state.ended(config, steps)
            state.config, state.precision = resume.learned(config), precision
            config = config.with_micro_batch(state.rows(rows))
        else:
            learned, documents = resume.learned(config), opened.manifest.fingerprint
            state = resume.TrainState(learned, documents, opened.fingerprint, precision, fallback=opened.fallback)

        paths, told = mesh.on_main(lambda: probe.choose(config, mesh.device, dtype, state.ops))
        state.ops = paths.model_dump()
        model, optimizers, scale = build(config, mesh, precision, paths)
        put_back(config, model, optimizers, scale, state, start)
        mesh.on_main(hub.start)
        mesh.on_main(lambda: resume.make_folder(claim, afresh=afresh))
        tracker = Tracker(run_dir if mesh.is_main else None, total_steps=steps, first_step=state.step)
        mesh = parallel.for_training(mesh, 60 * config.train.hang_minutes)
        watch = cleanup.enter_context(parallel.Watch(mesh, 60 * config.train.hang_minutes))
        eos, files = opened.encoder.eos, resume.model_files(config, opened.tokenizer) if mesh.is_main else {}
        run = Run(
            config, mesh, model, parallel.parallelize(model, mesh), optimizers, scale, steps, stop, tracker, watch, eos
        )
        if mesh.is_main:
            told = (f"{precision} on {peak_name}: {peak / 1e12:.2f} TFLOP/s", *opened.notes, *told, *tight)
            journal.announce(run, counts, state, start, held_out, told, repo_id=hub.repo_id)
            hub.begin(tracker.note)
        state.environment = journal.set_up(mesh)
        saver = Saver(
            run_dir / "checkpoints", keep=keep, note=tracker.note, on_saved=hub.offer, known=verified,
            every_sec=None if config.checkpoint.every_minutes is None else 60 * config.checkpoint.every_minutes,
        )  # fmt: skip
        cleanup.enter_context(stop)  # until now a signal ended the program as ever: there was nothing to save
        cleanup.callback(saver.close)
        feed = opened.feed(config, Cursor.from_dict(state.cursor), rank=mesh.rank, world_size=mesh.world_size)
        loader = Loader(feed, config.data.workers, pin_memory=mesh.device.type == "cuda", note=tracker.note)
        cleanup.callback(loader.close)
        resume.restore_rng(config.train.seed, start, mesh.device, mesh.rank)
        saved, clock, why, owed = 0 if cut else state.step, Clock(), None, False
        profiler = profiling.Profiler(run_dir, mesh.device, tracker.note) if profile and mesh.is_main else None
        if profiler is not None:
            cleanup.callback(profiler.stop)
        if cut:
            make_up(run, state, held_out, opened.tokenizer, cut)
        while state.step < steps and not state.exhausted:
            saver.check()
            batch = next_batch(clock, loader, stop)
            margin = SPARE * (clock.lap() + (1 + saver.busy) * saver.longest_sec)
            late = time.monotonic() - started + margin > 60 * (config.train.max_minutes or math.inf)
            late, ended, failed, hopeless, due = mesh.any(
                late, batch is None, isinstance(batch, Exception), saver.hopeless, mesh.is_main and saver.due()
            )
            if late or ended or failed or hopeless:
                lost = batch if isinstance(batch, Exception) else UserError("another rank could not read its data")
                why = lost if failed else LATE if late else HOPELESS if hopeless else None
                break
            metrics = step_within_memory(run, state.step, batch)
            if metrics is None or isinstance(metrics, UserError):  # nothing has changed
                why = metrics
                break
            clock.step_done(config.train.batch_tokens)
            if profiler is not None:
                profiler.step()
            bad = advance(run, state, batch, metrics)
            state.keep_rows(rows, run.config.micro_rows)
            if state.bad_in_a_row > MOST_SKIPPED:
                if state.rollbacks == MOST_ROLLBACKS or state.exhausted:
                    why, saved = diverged(run, state, metrics), state.step
                    break
                roll_back(run, state, saver, start)
                save(run, state, saver, files)
                saved = state.step
                continue
            last = state.step == steps or state.exhausted
            scores = validate(run, held_out, state.step) if last or state.step % config.eval.every_steps == 0 else {}
            if scores or last or state.step % config.log.every_steps == 0:
                entry = journal.log_entry(run, state, batch, metrics, clock, loader, flops / peak)
                entry["save_wait_sec"] = round(saver.stall_sec, 4)
                tracker.log(state.step, entry | hub.metrics() | scores)
            if last or state.step % config.sample.every_steps == 0:
                journal.write_samples(run, opened.tokenizer, state.step, shown=last)
            owed |= due or state.step % config.checkpoint.every_steps == 0
            if last or (owed and not bad):  # skipped steps would push out what the run may be put back to
                save(run, state, saver, files)
                saved, owed = state.step, False
        if saved < state.step:
            save(run, state, saver, files)
        if not run.together(state.step, "saving", saver.wait):
            tracker.note(f"checkpoints could not be written; the newest in {run_dir}/checkpoints is what there is")
            return EXIT_UNSAVED
        code = ending(run, state, why)
        hurried = stop.requested or why is LATE
        pushed = run.together(state.step, "pushing", lambda: hub.finish(lambda: stop.requested, hurried=hurried))
        return code or (0 if pushed else EXIT_UNPUSHED)


def finished(mesh: Mesh, hub: Mirror, config: Config, state: TrainState, start: Path | None) -> int:
    """Nothing is left to do, but perhaps to push."""
    import journal

    if not mesh.is_main:
        return 0
    journal.say_finished(config, state.step, start)
    return 0 if hub.catch_up() else EXIT_UNPUSHED


def advance(run: Run, state: TrainState, batch: Batch, metrics: dict[str, Any]) -> bool:
    """The state after a step; whether that was skipped for want of a finite gradient."""
    state.step, state.tokens = state.step + 1, state.tokens + run.config.train.batch_tokens
    state.cursor, state.exhausted = batch.cursor.to_dict(), batch.last
    state.loss_scale = asdict(run.scale) if run.scale.dynamic else {}
    state.skipped_steps += metrics["skipped"]
    bad = metrics["skipped"] and not calibrating(run, metrics)
    state.bad_in_a_row = state.bad_in_a_row + 1 if bad else 0
    return bad


def calibrating(run: Run, metrics: dict[str, Any]) -> bool:
    """Whether a step was skipped for fp16's loss scale alone, which had room to come down."""
    return run.scale.dynamic and run.scale.value > 1 and metrics["total_loss"] is not None


def roll_back(run: Run, state: TrainState, saver: Saver, start: Path | None) -> None:
    """Put the run back to the newest checkpoint from before its bad steps, or to its beginning.

    The data go on from here: what the run failed on is behind it.
    """
    import checkpoint
    import resume
    from run import put_back
    from tracker import keep_until

    run.drop_gradients()
    root, before = Path(run.config.run.dir, "checkpoints"), state.step - state.bad_in_a_row

    run.together(state.step, "saving", saver.wait)
    found = run.mesh.on_main(lambda: checkpoint.latest(root, most=before)) or start
    then = resume.TrainState.read(found) if found is not None else None
    put_back(run.config, run.model, run.optimizers, run.scale, then or state, found)
    failed, state.bad_in_a_row, state.rollbacks = state.step, 0, state.rollbacks + 1
    state.step, state.tokens, state.loss_scale = (then.step, then.tokens, then.loss_scale) if then else (0, 0, {})
    if run.mesh.is_main:
        with contextlib.suppress(OSError):  # a full disk: lines of the steps before stand beside those made anew
            keep_until(Path(run.config.run.dir), state.step)
        checkpoint.set_newer_aside(root, state.step)
    run.tracker.note(
        f"no finite gradient for {MOST_SKIPPED + 1} steps, the last of them {failed}: back to step {state.step}, past "
        f"the data seen since ({state.rollbacks} of {MOST_ROLLBACKS} times)"
    )


def diverged(run: Run, state: TrainState, metrics: dict[str, Any]) -> str:
    import journal

    if run.mesh.is_main:
        try:
            dump = f"norms of every parameter and gradient are in {journal.dump(run, state, metrics)}"
        except OSError as error:  # a full disk
            dump = f"diverged.json could not be written: {error.strerror}"
        run.tracker.note(
            f"no finite gradient for {MOST_SKIPPED + 1} steps, after {MOST_ROLLBACKS} times back to a checkpoint: "
            f"stopped at step {state.step}; lower optim.lr; {dump}"
        )
    return DIVERGED


def validate(run: Run, held_out: Validation, step: int) -> dict[str, Any]:
    """The scores of `evals.evaluate`, or that a signal came before its end."""
    import evals

    def stop() -> bool:
        run.progress(step, "evaluating")
        return run.stop.requested

    return evals.evaluate(
        run.model, held_out, rows=run.config.micro_rows, mesh=run.mesh, stop=stop, note=run.tracker.note,
        eos=run.eos if run.config.data.document_mask else None,
    )  # fmt: skip


def make_up(
    run: Run, state: TrainState, held_out: Validation, tokenizer: PreTrainedTokenizerFast, cut: list[str]
) -> None:
    """Do again what a signal has cut short after the last step: evaluation, samples."""
    import journal
    from tracker import METRICS, SAMPLES, score

    if METRICS in cut:
        scores = validate(run, held_out, state.step)
        if run.mesh.is_main:
            score(Path(run.config.run.dir), state.step, scores)
    if SAMPLES in cut:
        journal.write_samples(run, tokenizer, state.step, shown=state.step >= run.steps or state.exhausted)


def ending(run: Run, state: TrainState, why: str | Exception | None) -> int:
    """Say why the run is over; the exit code. Raises `why` where that is an error."""
    import journal
    from tracker import cut_short

    config, note = run.config, run.tracker.note
    if isinstance(why, Exception):
        raise why
    if why is DIVERGED:
        return EXIT_DIVERGED
    if why is HOPELESS:
        note(f"only now could a checkpoint be written: stopped after step {state.step}; the same command goes on")
        return EXIT_UNSAVED
    (stopped,) = run.mesh.any(run.stop.requested)
    cut = stopped and run.mesh.on_main(lambda: bool(cut_short(Path(config.run.dir), state.step)))
    if state.exhausted and not cut:
        note(f"the sources' last epoch ended at step {state.step} of {run.steps}: this run is complete")
    elif state.step < run.steps and why is LATE and not run.stop.requested:
        note(
            f"train.max_minutes = {config.train.max_minutes:g} are over: stopped after step {state.step} of "
            f"{run.steps}; the same command goes on"
        )
        return EXIT_TIME
    elif state.step < run.steps or cut:
        number = run.stop.signal or signal.SIGTERM  # another rank was told to stop
        note(
            f"stopped by {signal.Signals(number).name} after step {state.step} of {run.steps}; the same command goes on"
        )
        return 128 + number
    if run.mesh.is_main:
        journal.say_done(config)
    return 0


# ------------------------------------------------------------------------------------------------- the start of a run


def next_batch(clock: Clock, loader: Loader, stop: StopFlag) -> Any:
    """The next batch, None if a signal came first, or the error in its place: all ranks must hear of it before one
    leaves."""
    try:
        with stop.interrupting():
            return clock.wait_for(loader)
    except Stopped:
        return None
    except Exception as error:  # noqa: BLE001  # raised when the other ranks know
        return error


def fitting_rows(config: Config, mesh: Mesh, dtype: torch.dtype, available: int) -> int:
    """`train.micro_batch`; for auto the most that fit: on a GPU by the predicted peak, on a CPU its caches.

    Raises UserError where a step has too few rows for the ranks.
    """
    if config.rows_per_step < mesh.world_size:
        raise UserError(
            f"train.batch_tokens = {config.train.batch_tokens} is {config.rows_per_step} rows of data.seq_len = "
            f"{config.data.seq_len}: too few for {mesh.world_size} ranks"
        )
    if config.train.micro_batch is not None:
        return config.train.micro_batch
    if mesh.device.type == "cpu":
        return min(config.rank_rows(mesh.world_size), max(1, CPU_MICRO_TOKENS // config.data.seq_len))
    import memory

    return memory.largest_micro_batch(config, dtype=dtype, available=available, world_size=mesh.world_size)


# --------------------------------------------------------------------------------------------------- what a run writes


def save(run: Run, state: TrainState, saver: Saver, files: dict[str, bytes]) -> None:
    """A checkpoint of the last completed step: a model directory (`files` and weights) with the training state."""
    import convert
    import resume

    run.progress(state.step, "saving")
    run.together(state.step, "saving", saver.wait)  # the one before
    generators = run.mesh.to_main(resume.rng_state(run.mesh.device))

    def contents() -> Contents:
        rng = {f"rank{rank}.{key}": value for rank, states in enumerate(generators) for key, value in states.items()}
        tensors = {
            "model": convert.to_checkpoint(run.model.state_dict(), run.config.model),
            "optimizer": run.optimizers.state(),
            "rng": rng,
        }
        return tensors, files | {resume.STATE_FILE: state.to_json()}

    if run.mesh.is_main:
        saver.save(state.step, contents)
    if any(run.mesh.any(saver.live)):
        run.together(state.step, "saving", saver.wait)


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
                say(plan.describe(config, **options, world_size=world_size))
            return 0
        return train(config, resume_from=args.resume, allow_cpu=args.allow_cpu, profile=args.profile)
    except UserError as error:
        return report(error) if int(os.environ.get("RANK", 0)) == 0 else 2
    except OSError as error:  # a file or folder that may not be read, written or so named
        if error.filename is None:
            raise
        return report(error)
    except (RuntimeError, MemoryError) as error:
        if type(error).__name__ == "RankError":  # torch may not be imported
            report(UserError(str(error)))
            return 1
        if not environment.out_of_memory(error):
            raise
        report(UserError(f"out of memory; the same command goes on from the last checkpoint; {LESS_MEMORY}"))
        return 1
    except KeyboardInterrupt:  # before training listens to signals: nothing to save yet
        return 130


if __name__ == "__main__":
    sys.exit(main())
