"""A run as it lives in memory: model, optimizers and loss scale, and how they are put back to a checkpoint."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn

import checkpoint
import convert
import resume
from config import Config, OpsConfig
from foreign import CheckpointError
from model import DeepSeekV3, init_weights, meta_model
from ops import DTYPES
from optim import LossScale, Optimizers, uses_muon
from parallel import Mesh, Watch, free_memory, parallelize
from resume import TrainState
from signals import StopFlag
from tracker import Tracker

FIRST_SCALE = 2.0**13  # of fp16's loss


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
    watch: Watch
    eos: int

    def weight_at(self, step: int) -> float:
        """The MTP loss's weight: the first one, then the final one (2412.19437, section 4.2)."""
        train = self.config.train
        return train.mtp_weight if step < train.mtp_switch * self.steps else train.mtp_weight_final

    def progress(self, done: float, doing: str) -> None:
        """`done` steps of the run, with the fraction of the one under way: shown, and told to the other ranks."""
        self.tracker.progress(done, doing)
        self.watch.at(f"step {math.ceil(done)}, {doing}")

    def together(self, step: int, doing: str, work: Callable[[], bool]) -> bool:
        """What rank 0's `work` comes to, however long it takes, on every rank.

        All leave at once: torchrun stops the others when one has left with an exit code, and they would take one that
        is silent for dead.
        """
        mesh = self.mesh
        if mesh.world_size == 1:
            return work()
        found: list[bool | BaseException] = []

        def target() -> None:
            try:
                found.append(work())
            except BaseException as error:  # noqa: BLE001  # raised below
                found.append(error)

        thread = threading.Thread(target=target)
        if mesh.is_main:
            thread.start()
        while mesh.any(thread.is_alive())[0]:
            self.progress(step, doing)
            time.sleep(0.1)
        if found and isinstance(found[0], BaseException):
            raise found[0]
        return bool(mesh.from_main(found[0] if found else None))

    def drop_gradients(self) -> None:
        """DDP's buckets are the gradients: dropping them would make every one twice."""
        self.optimizers.zero_grad(set_to_none=self.replica is self.model)

    def halve_micro_batch(self) -> bool:
        """After memory ran out: half the rows at a time from now on; False where it is one row already."""
        rows = self.config.micro_rows // 2
        if rows == 0:
            return False
        self.replica = self.model  # DDP's buckets go, in whatever state
        self.drop_gradients()
        free_memory(self.mesh.device)
        self.replica = parallelize(self.model, self.mesh)
        self.config = self.config.with_micro_batch(rows)
        self.tracker.note(f"out of memory: {rows} rows at a time from now on; a step is the same rows as before")
        return True


def build(config: Config, mesh: Mesh, precision: str, paths: OpsConfig) -> tuple[DeepSeekV3, Optimizers, LossScale]:
    """Model, optimizers and loss scale, without any value yet."""
    model = meta_model(config.model, DTYPES[precision], recompute=config.train.recompute, paths=paths)
    model.to_empty(device=mesh.device)
    if config.train.compile:
        model.compile_blocks()
    scale = LossScale(dynamic=True, value=FIRST_SCALE) if precision == "fp16" else LossScale()
    return model, Optimizers(model, config.optim), scale


def put_back(
    config: Config, model: DeepSeekV3, optimizers: Optimizers, scale: LossScale, state: TrainState, start: Path | None
) -> None:
    """Weights, router biases, optimizers and loss scale of the checkpoint `start` (its state is `state`); without one,
    those of `train.init_from` or new ones."""
    if start is None:
        init_weights(model, config.train.seed)
        if config.train.init_from is not None:
            resume.load_initial_weights(model, config)
    else:
        model.load_state_dict(convert.load(start)[1])
    try:
        optimizers.load(checkpoint.load(start, "optimizer") if start is not None else {})
    except ValueError as error:
        raise CheckpointError(f"{start}: {error}") from None
    fresh = LossScale(dynamic=scale.dynamic, value=FIRST_SCALE if scale.dynamic else 1.0)
    saved = LossScale(**state.loss_scale) if scale.dynamic and state.loss_scale else fresh
    for key, value in asdict(saved).items():
        setattr(scale, key, value)


def checkpoint_bytes(config: Config, model: DeepSeekV3) -> int:
    """About what a checkpoint of a model, on any device, takes on disk: fp32 weights with the MTP layers' copies, both
    optimizers' states."""
    total = 0
    tied = config.model.num_nextn_predict_layers * (
        model.model.embed_tokens.weight.numel() + model.lm_head.weight.numel()
    )
    for name, parameter in model.named_parameters():
        muon = config.optim.name == "muon" and uses_muon(name, parameter)
        total += parameter.numel() * (4 + (DTYPES[config.optim.momentum_dtype].itemsize if muon else 8))
    return total + 4 * tied
