"""What a run says and writes down beside its checkpoints: its beginning and end, log entries, samples, a dump."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import checkpoint
import environment
import generate
from config import Config, to_yaml
from counts import Counts
from data import Loader, Validation
from metrics import Clock, data_metrics, expert_metrics
from model import LatentCache
from parallel import Mesh, cpu_has_bf16, peak_memory_gib
from resume import TrainState
from run import Run
from signals import Stopped
from stream import Batch
from text import clean, say
from tracker import duration

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MOST_WAITING = 0.05  # share of the time that may be spent waiting for data without a word


def warn_if_slow(mesh: Mesh, precision: str, seconds_at_peak: float) -> None:
    if mesh.device.type == "cpu" and precision == "bf16" and not cpu_has_bf16():
        say("this CPU emulates bf16; train.precision=fp32 is many times faster here")
    if mesh.device.type == "cpu" and seconds_at_peak > 1800:
        say(
            f"no GPU found: on this CPU this run would take about {duration(2 * seconds_at_peak / mesh.world_size)}; "
            "for one that takes minutes: python train.py --config quickstart"
        )


def announce(
    run: Run, counts: Counts, state: TrainState, start: Path | None, held_out: Validation, told: Sequence[str],
    *, repo_id: str | None,
) -> None:  # fmt: skip
    """The configuration into the run's folder; what it comes to, and what was `told`, on the screen."""
    Path(run.config.run.dir, "config.yaml").write_text(to_yaml(run.config), encoding="utf-8")
    model, config, note = run.config.model, run.config, run.tracker.note
    total, active = counts.total + counts.mtp, counts.active_with_head
    note(f"{config.run.name}: {total / 1e6:,.1f}M parameters with MTP, {active / 1e6:,.1f}M active per token")
    hardware, *more = told
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
    for line in more:
        note(line)
    if start is not None:
        note(f"resumed from {start} after step {state.step}")
        before, now = dict(state.environment), set_up(run.mesh)
        if before and before != now:
            changed = ", ".join(f"{key} {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key])
            note(f"not the set-up of that checkpoint ({changed}): the same order of data, but not to the last bit")
    service = environment.passing_disk()
    if service and repo_id is None:
        note(f"the disk of {service} goes with the session, and checkpoints with it; hub.repo_id=owner/name keeps them")
    if drive := checkpoint.network_drive(Path(config.run.dir)):
        note(
            f"run.dir is on a network drive ({drive}), which may lose what it has acknowledged; a local run.dir, and "
            "hub.repo_id to keep checkpoints elsewhere, are safer"
        )


def set_up(mesh: Mesh) -> dict[str, Any]:
    """What bits depend on beside the checkpoint."""
    name = torch.cuda.get_device_name(mesh.device) if mesh.device.type == "cuda" else "CPU"
    return {"torch": torch.__version__, "device": name, "world_size": mesh.world_size}


def log_entry(
    run: Run, state: TrainState, batch: Batch, metrics: dict[str, Any], clock: Clock, loader: Loader, per_token: float
) -> dict[str, Any]:
    """A line of `metrics.jsonl`. `per_token`: FLOPs per token over the device's peak."""
    rates = clock.rates()
    share = rates["data_wait_sec"] * rates["steps_per_sec"]
    starting = state.step - run.tracker.first_step <= run.config.log.every_steps
    if share > MOST_WAITING and not starting:
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
        "rollbacks": state.rollbacks,
        "loss_scale": run.scale.value,
        "experts": expert_metrics(run.model, counts_LE),
    }


def write_samples(run: Run, tokenizer: PreTrainedTokenizerFast, step: int, *, shown: bool) -> None:
    """The configured prompts continued, the same seed every time, into `samples.md`, and on the screen if `shown`."""
    if not run.mesh.is_main:
        return

    def go_on(row: int, token: int) -> None:
        run.progress(step, "sampling")
        if run.stop.requested:
            raise Stopped

    sample = run.config.sample
    room = run.config.model.max_position_embeddings - sample.max_new_tokens
    end: Any = tokenizer.eos_token_id
    prompts = [tokenizer.encode(text, add_special_tokens=False)[: max(1, room)] or [end] for text in sample.prompts]
    try:
        texts = generate.generate(
            run.model, prompts, max_new_tokens=min(sample.max_new_tokens, run.config.model.max_position_embeddings - 1),
            temperature=sample.temperature, top_k=sample.top_k, seed=run.config.train.seed, eos_ids=(end,),
            vocab_limit=len(tokenizer), on_token=go_on,
        )  # fmt: skip
    except Stopped:
        run.tracker.samples(step, None)
        return
    except Exception as error:  # noqa: BLE001  # whatever it is, a sample is not worth a run
        run.tracker.note(f"no samples: {error}")
        return
    safe = [generate.safe_text(str(tokenizer.decode(text))) for text in texts]
    run.tracker.samples(step, list(zip(sample.prompts, safe, strict=True)))
    if shown:
        for prompt, text in zip(sample.prompts, safe, strict=True):
            run.tracker.note(f"\n{prompt}{text}")


def dump(run: Run, state: TrainState, metrics: dict[str, Any]) -> Path:
    """Where a run that diverged stood, in `diverged.json`: its last step's metrics, the norms of every parameter and of
    its gradient (null: not finite)."""
    norms = {}
    for name, parameter in run.model.named_parameters():
        pair = [float(tensor.norm()) if tensor is not None else None for tensor in (parameter.detach(), parameter.grad)]
        norms[name] = [value if value is not None and math.isfinite(value) else None for value in pair]
    told = {key: value for key, value in metrics.items() if key != "counts"}
    content = {"step": state.step, "cursor": state.cursor, "metrics": told, "norms": norms}
    path = Path(run.config.run.dir, "diverged.json")
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path


def say_done(config: Config) -> None:
    say(f"\ndone: the model is in {config.run.dir}/checkpoints, in Hugging Face format")
    _say_next(config)


def say_finished(config: Config, step: int, start: Path | None) -> None:
    place = clean(str(start))
    say(f"{config.run.name} is finished: {place} is step {step}, and no more are asked for; nothing was changed")
    _say_next(config)


def _say_next(config: Config) -> None:
    named = config.run.dir == f"runs/{config.run.name}"
    say(NEXT.format(dir=shlex.quote(config.run.dir), other="run.name" if named else "run.dir"))


NEXT = """next:
  sample   python generate.py --checkpoint {dir} --prompt "..."
  extend   the same command with train.steps=N, more than before
  afresh   the same command with {other}=ANOTHER, or with --resume never (which moves this run aside)"""
