"""What a run goes on from: which checkpoint, whether the configuration still fits it, the state beside the weights."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

import checkpoint
import convert
import tokenizer as tokenizers
from config import Config, SourceConfig, UserError
from model import DeepSeekV3
from stream import Cursor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SCHEMA = 3  # 2 lacked rollbacks and environment, and kept the generators of rank 0 alone; it is still read
MAY_DIFFER = {  # from the model of train.init_from: what no tensor's shape or meaning depends on, and context extension
    "num_nextn_predict_layers", "initializer_range", "aux_loss_alpha", "max_position_embeddings", "rope_scaling",
}  # fmt: skip
STATE_FILE = "training_state.json"
RUN_FILES = {
    "config.yaml", "metrics.jsonl", "samples.md", "checkpoints", "metrics.tmp", "samples.tmp", "profile.json",
    "profile.txt", "diverged.json", "hub.json", "hub.json.tmp",
}  # fmt: skip
# What may change on resume: it decides how long, how visibly and how comfortably a run goes on, not what it learns.
FREE_SECTIONS = ("run", "ops", "log", "eval", "sample", "checkpoint", "hub")
FREE_KEYS = {
    "data.workers", "data.cache", "data.max_skipped", "train.steps", "train.tokens_per_active_param",
    "train.max_minutes", "train.hang_minutes", "train.deterministic", "train.micro_batch", "train.recompute",
    "train.compile", "train.init_from",
}  # fmt: skip
ORDER = {  # what decides, with the documents, which rows a step is of
    "data.tokenizer", "data.seq_len", "data.val_fraction", "data.shuffle_window", "data.packing", "train.seed",
    "train.batch_tokens",
}  # fmt: skip


@dataclass
class TrainState:
    """Everything but tensors that the next step depends on. No time, host or path."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    config: dict[str, Any]  # the sections that must not change
    sources: str  # fingerprint of the documents
    tokenizer: str  # fingerprint
    precision: str  # as resolved for the device
    step: int = 0
    tokens: int = 0
    skipped_steps: int = 0
    cursor: dict[str, Any] = field(default_factory=dict)
    exhausted: bool = False  # every source had come to its last epoch's end
    fallback: bool = False  # trained on data.fallback
    loss_scale: dict[str, Any] = field(default_factory=dict)
    ops: dict[str, str] = field(default_factory=dict)  # the paths taken, see probe.py
    bad_in_a_row: int = 0  # steps skipped last, for want of a finite gradient
    rollbacks: int = 0
    rows_asked: int = 0  # at a time, of which memory was too small; 0: it was not
    rows_fitting: int = 0
    environment: dict[str, Any] = field(default_factory=dict)  # torch's version, the device, the number of ranks
    origin: str = ""  # SHA-256 of the manifest of the checkpoint that --resume PATH branched off from

    def rows(self, asked: int) -> int:
        """Rows at a time: as asked for, or what such a request came to before."""
        return self.rows_fitting if asked == self.rows_asked else asked

    def keep_rows(self, asked: int, now: int) -> None:
        self.rows_asked, self.rows_fitting = (asked, now) if now < asked else (0, 0)

    def ended(self, config: Config, steps: int) -> bool:
        """Whether there is nothing left to do: no step is asked for, or no document is left and no epoch was added."""
        added = self._of_sources(self.config, "epochs") != self._of_sources(learned(config), "epochs")
        return self.step >= steps or (self.exhausted and not added)

    def _of_sources(self, config: dict[str, Any], key: str) -> list[Any]:
        """A key of each source trained on, as a checkpoint's or the present configuration has it."""
        return [source.get(key) for source in config["data"]["fallback" if self.fallback else "sources"]]

    def to_json(self) -> bytes:
        return (json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1, sort_keys=True) + "\n").encode()

    @classmethod
    def read(cls, path: Path) -> TrainState:
        if not (path / STATE_FILE).exists():
            raise UserError(
                f"--resume {path}: a model without training state; to start from its weights: train.init_from={path}"
            )
        values = checkpoint.read_json(path / STATE_FILE)
        schema = values.pop("schema", None)
        if schema not in (2, SCHEMA):
            raise UserError(
                f"{path / STATE_FILE}: of schema {schema}, this version of the program reads 2 and {SCHEMA}; go on "
                f"with the version that wrote it, or start from its weights: train.init_from={path}"
            )
        try:
            state = TypeAdapter(cls).validate_json(json.dumps(values), strict=True)
            state._check_nested()
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(f"{path / STATE_FILE}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise UserError(f"{path / STATE_FILE}: not as this program writes it ({error!r})") from None
        return state

    def _check_nested(self) -> None:
        """Raise something unless what is nested has the form that its readers take for granted."""
        data = self.config["data"]
        _flat(self.config)
        Path(data["tokenizer"])
        for source in (*data["sources"], *data.get("fallback", ())):
            Path(source["path"])
        cursor = Cursor.from_dict(self.cursor)
        numbers = [cursor.row, *(number for place in cursor.places for number in astuple(place))]
        numbers += [self.step, self.tokens, self.skipped_steps, self.bad_in_a_row, self.rollbacks]
        numbers += [self.rows_asked, self.rows_fitting]
        if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
            raise ValueError("a count out of range")
        if self.rows_asked and not 0 < self.rows_fitting < self.rows_asked:
            raise ValueError("rows_fitting")
        if any(type(value) not in (bool, int, float) for value in self.loss_scale.values()):
            raise ValueError("loss_scale")
        if self.loss_scale.keys() - {"dynamic", "value", "good_steps", "growth_interval"}:
            raise ValueError("loss_scale")


def learned(config: Config) -> dict[str, Any]:
    """The part of a configuration that a checkpoint is bound to. Of local paths the last part, not where they are."""
    values = json.loads(config.model_dump_json(exclude=set(FREE_SECTIONS)))
    for key in FREE_KEYS:
        section, name = key.split(".")
        del values[section][name]
    values["data"]["tokenizer"] = _unplaced(values["data"]["tokenizer"])
    for source in (*values["data"]["sources"], *values["data"]["fallback"]):
        source["path"] = _unplaced(source["path"])
    return values


def _unplaced(name: str) -> str:
    path = Path(name)
    return path.name if path.is_absolute() or path.suffix or path.exists() else name


def pick(run_dir: Path, wanted: str, known: checkpoint.Known | None = None) -> Path | None:
    """The checkpoint to go on from: the newest intact one (`auto`), none (`never`) or the one given.

    Newer ones that are damaged are renamed, nothing else is changed; `move_aside` comes later, when everything else has
    worked. What is `known` to be intact is not verified again.
    """
    checkpoints = run_dir / "checkpoints"
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"run.dir = {str(run_dir)!r} is a file; give the name of a folder")
    if wanted == "never":
        return None
    newest = checkpoint.latest(checkpoints, quarantine=True, known=known)
    if wanted == "auto":
        found = [path.name for path in checkpoints.iterdir()] if newest is None and checkpoints.is_dir() else []
        damaged = [name for name in found if checkpoint.STEP.fullmatch(name)]
        if damaged:
            raise UserError(
                f"{checkpoints}: no intact checkpoint among {', '.join(sorted(damaged))}; restore one, or start afresh "
                "with --resume never (which keeps this folder under another name)"
            )
        return newest
    chosen = checkpoint.find(wanted)
    if newest is not None and newest.parent.resolve() == chosen.parent.resolve() and newest.name > chosen.name:
        raise UserError(
            f"--resume {wanted}: {run_dir} has a later checkpoint, {newest.name}; branch to another run.name or run.dir"
        )
    if newest is not None and newest.parent.resolve() != chosen.parent.resolve():
        if _origin(newest) == identity(chosen):
            return newest  # this branch, started again
        raise UserError(
            f"--resume {wanted}: {run_dir} has checkpoints of its own; branch to another run.name or run.dir"
        )
    return chosen


def read(start: Path, config: Config, precision: str, steps: int) -> TrainState:
    """A checkpoint's state, of this configuration; one of another run says where this one branches off."""
    state = TrainState.read(start)
    check_config(state, config, precision)
    if not belongs(start, Path(config.run.dir)):
        if state.step >= steps:
            raise UserError(
                f"--resume {start}: it is step {state.step} already; to branch off, give train.steps above it"
            )
        state.origin = identity(start) or ""
    return state


def belongs(start: Path, run_dir: Path) -> bool:
    """Whether a checkpoint is one of the run's own."""
    return start.resolve().parent == (run_dir / "checkpoints").resolve()


def identity(start: Path) -> str | None:
    """The SHA-256 of a checkpoint's manifest; None for a model directory without one."""
    return checkpoint.key_of(start)[1] if (start / checkpoint.MANIFEST).is_file() else None


def _origin(start: Path) -> str:
    """What a run's checkpoint branched off from; empty where it did not, or does not tell."""
    try:
        return TrainState.read(start).origin
    except UserError:
        return ""


class Claim:
    """A run's folder, locked from when it is there until `cleanup`."""

    def __init__(self, folder: Path, cleanup: contextlib.ExitStack):
        self.folder, self.cleanup, self.held = folder, cleanup, False

    def take(self, *, make: bool = False) -> None:
        if make:
            checkpoint.make_folder(self.folder)
        if not self.held and self.folder.exists():
            self.cleanup.enter_context(checkpoint.locked(self.folder))
            self.held = True


def make_folder(claim: Claim, *, afresh: bool) -> None:
    """The run's folder, writable and ours; `afresh` first moves an earlier run aside.

    Everything else has worked by now.
    """
    run_dir = claim.folder
    try:
        if afresh:
            move_aside(run_dir)
            claim.held &= run_dir.exists()  # the lock went with the earlier run
        late = not claim.held and run_dir.exists() and checkpoint.latest(run_dir / "checkpoints") is not None
        claim.take(make=True)
        if late:
            raise UserError(f"run.dir = {str(run_dir)!r}: another process has made it meanwhile; start again")
        checkpoint.make_folder(run_dir / "checkpoints")
        for name in ("config.yaml", "metrics.jsonl", "samples.md"):  # now, not when there is something to lose
            (run_dir / name).open("a").close()
    except OSError as error:
        raise UserError(f"run.dir = {str(run_dir)!r} cannot be written: {error.filename}: {error.strerror}") from None


def move_aside(run_dir: Path) -> None:
    """Rename a run's folder to the first free `<name>.1`, `<name>.2`, ...; leave folders with anything else alone."""
    entries = {path.name for path in run_dir.iterdir()} if run_dir.exists() else set()
    foreign = sorted(entries - RUN_FILES)
    if foreign:
        raise UserError(
            f"--resume never: {run_dir} also holds {foreign[0]!r}, which is no part of a run; move it yourself"
        )
    if entries:
        place = run_dir.resolve()
        number = next(n for n in range(1, 10**6) if not place.with_name(f"{place.name}.{n}").exists())
        os.rename(place, place.with_name(f"{place.name}.{number}"))


def check_config(saved: TrainState, config: Config, precision: str) -> None:
    """Raise UserError naming the first key that must not change and has, with both values."""
    for key, before, now in _changed(saved, config):
        raise _mismatch(key, before, now)
    if config.train.precision != "auto" and saved.precision != precision:
        raise _mismatch("train.precision", saved.precision, precision)


def check_order(saved: TrainState, config: Config, *, sources: str, tokenizer: str) -> None:
    """Raise UserError where `config` deals other rows to a step than the run of this checkpoint did."""
    for key, before, now in _changed(saved, config):
        if key in ORDER:
            raise _mismatch(key, before, now)
    check_content(saved, config, sources=sources, tokenizer=tokenizer)


def _changed(saved: TrainState, config: Config) -> Iterator[tuple[str, Any, Any]]:
    """The keys that must not change and have: key, the checkpoint's value, the present one."""
    defaults, now = _flat(learned(Config())), _flat(learned(config))
    before = {key: defaults[key] for key in now.keys() & defaults.keys()} | _flat(saved.config)  # younger keys
    for key in sorted(before.keys() | now.keys()):
        resolved = key in ("data.sources", "train.precision")  # compared by what they come to
        same = before.get(key) == now.get(key)
        if key == "data.tokenizer":  # a relative folder may be out of sight; the checkpoint has the tokenizer
            same = Path(before[key]).name == Path(now[key]).name
        if not resolved and not same:
            yield key, before.get(key), now.get(key)


def same_names(saved: TrainState, config: Config) -> bool:
    """Whether the sources are called as in the checkpoint; what they hold is told by `check_content`."""
    return saved.config["data"]["sources"] == learned(config)["data"]["sources"]


def check_content(saved: TrainState, config: Config, *, sources: str, tokenizer: str) -> None:
    """Raise UserError where documents or tokenizer, by their fingerprints, are not those of the checkpoint."""
    if saved.sources != sources:
        old, new = saved.config["data"]["sources"], learned(config)["data"]["sources"]
        if old == new:
            raise UserError("data.sources: the documents are not those the checkpoint was trained on; " + _REMEDY)
        raise _mismatch("data.sources", _short(old), _short(new))
    weights, wanted = (saved._of_sources(values, "weight") for values in (saved.config, learned(config)))
    if weights != wanted:
        raise _mismatch("the weights of data.sources", weights, wanted)
    if saved.tokenizer != tokenizer:
        raise UserError(f"data.tokenizer: {config.data.tokenizer!r} is not the checkpoint's tokenizer; " + _REMEDY)


def _short(sources: list[dict[str, Any]]) -> list[str | dict[str, Any]]:
    """As a user would write them: without keys at their defaults."""
    defaults = SourceConfig(path="-").model_dump()
    told = [{key: value for key, value in sorted(s.items()) if value != defaults.get(key)} for s in sources]
    return [source["path"] if source.keys() == {"path"} else source for source in told]


_REMEDY = "set it back, or start another run: run.name=... (with run.dir=..., if you give that)"


def _mismatch(key: str, before: Any, now: Any) -> UserError:
    return UserError(f"{key}: the checkpoint was trained with {before!r}, the configuration says {now!r}; {_REMEDY}")


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, values in tree.items() for key, value in values.items()}


def tokenizer_folder(init_from: str | None) -> Path | None:
    """The directory of the initial weights, where it holds a tokenizer."""
    folder = _initial(init_from) if init_from is not None else None
    return folder if folder is not None and (folder / "tokenizer.json").exists() else None


def _initial(init_from: str) -> Path:
    try:
        return checkpoint.find(init_from)
    except UserError as error:
        raise UserError(f"train.init_from = {init_from!r}: {error}") from None


def load_initial_weights(model: DeepSeekV3, config: Config) -> None:
    """`train.init_from`: weights of the same architecture; MTP layers it lacks keep their random start."""
    path = str(config.train.init_from)
    theirs, weights = convert.load(_initial(path))
    for key in type(config.model).model_fields:
        if key not in MAY_DIFFER and getattr(theirs, key) != getattr(config.model, key):
            raise UserError(
                f"model.{key} = {getattr(config.model, key)!r}, but train.init_from={path} has {getattr(theirs, key)!r}"
            )
    missing = model.load_state_dict(
        {k: v for k, v in weights.items() if k in model.state_dict()}, strict=False
    ).missing_keys
    assert all(name.startswith("mtp.") for name in missing), missing


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """This rank's global generators: of torch, its GPU, Python and numpy. The loop itself draws nothing from them."""
    _, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    cuda = {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {
        "cpu": torch.get_rng_state(),
        "python": torch.tensor(words),
        "python_gauss": torch.tensor([math.nan if gauss is None else gauss], dtype=torch.float64),
        "numpy": torch.tensor([*map(int, keys), position, has_gauss]),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
        **cuda,
    }


def restore_rng(seed: int, start: Path | None, device: torch.device, rank: int = 0) -> None:
    """The global generators as this rank's were after the checkpoint's step; where it had no such rank, fresh ones."""
    torch.manual_seed(seed + rank)
    random.seed(seed + rank)
    np.random.seed((seed + rank) % 2**32)
    if start is None:
        return
    try:
        _set_generators(checkpoint.load(start, "rng"), device, rank)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise checkpoint.CheckpointError(
            f"{start}: rng.safetensors is not as this program writes it ({error})"
        ) from None


def _set_generators(saved: dict[str, Tensor], device: torch.device, rank: int) -> None:
    states = {key.rpartition(".")[2]: value.clone() for key, value in saved.items() if _rank_of(key) == rank}
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    if "python" in states:  # schema 2 has torch's alone
        gauss = float(states["python_gauss"])
        random.setstate((3, tuple(states["python"].tolist()), None if math.isnan(gauss) else gauss))
        *keys, position, has_gauss = states["numpy"].tolist()
        np.random.set_state(("MT19937", np.array(keys, np.uint32), position, has_gauss, float(states["numpy_gauss"])))


def _rank_of(key: str) -> int:
    """`rank1.cpu`; without a rank in schema 2."""
    return int(key.partition(".")[0].removeprefix("rank")) if "." in key else 0


def model_files(config: Config, tokenizer: PreTrainedTokenizerFast) -> dict[str, bytes]:
    """What makes a directory of weights a Hugging Face model: its configuration and tokenizer."""
    ends: dict[str, Any] = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    described = {
        "config.json": convert.hf_config(config.model, dtype="float32", **ends),
        "generation_config.json": ends,
    }
    with tempfile.TemporaryDirectory() as folder:
        tokenizers.save(tokenizer, folder)
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    return files | {name: (json.dumps(value, indent=2) + "\n").encode() for name, value in described.items()}
