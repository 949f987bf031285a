"""What has to stand before torch and Hugging Face libraries are imported: `.env`, and the settings of allocators."""

from __future__ import annotations

import ctypes
import importlib.metadata
import logging
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import signals
from config import UserError
from text import clean, keep_secret

P = ParamSpec("P")
T = TypeVar("T")

MIN_TORCH = (2, 9)
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD")


def tokenise_alone() -> None:
    """Tokenizers of this process take one thread: training, or others that tokenise, run beside it."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"  # fastokens


def prepare() -> None:
    """Before torch and Hugging Face libraries are imported: `.env`, secrets out of sight, the GPU's allocator."""
    _open_missing()
    _read_dotenv()
    keep_secret(*(os.environ.get(name) for name in SECRETS))
    _guard_outputs()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    release = _torch_release()
    old, new = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"  # the new name works from torch 2.11 on
    if old not in os.environ and new not in os.environ:
        os.environ[new if release >= (2, 11) else old] = "expandable_segments:True"
    # oneDNN, a CPU's 16-bit products, keeps a kernel for each shape; experts have other ones in every step.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")


def keep_freed_memory() -> None:
    """The C library keeps what is freed, however large, for the next step, which else meets fresh pages."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped by itself
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing is given back


def _open_missing() -> None:
    """A standard stream that is closed (`>&-`, a daemon) becomes the null device, or a file would take its number and
    what a library writes there."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode)  # noqa: SIM115
            os.set_inheritable(stream.fileno(), True)  # for the processes that make batches
            setattr(sys, name, stream)


def hub_repository() -> str | None:
    """`HF_REPO_ID`, where hub.repo_id is not given."""
    return os.environ.get("HF_REPO_ID") or None


def out_of_memory(error: BaseException | None) -> bool:
    """Whether a GPU's or the machine's memory ran out. torch's own class by name: it may not be imported."""
    host = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return host or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def within_memory(run: Callable[P, T], *args: P.args, **options: P.kwargs) -> T | None:
    """What `run` returns; None where memory ran out."""
    try:
        return run(*args, **options)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return None


def passing_disk() -> str | None:
    """The service this runs on, where its disk goes with the session."""
    signs = {"COLAB_RELEASE_TAG": "Colab", "KAGGLE_KERNEL_RUN_TYPE": "Kaggle"}
    return next((service for name, service in signs.items() if os.environ.get(name)), None)


def _torch_release() -> tuple[int, ...]:
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        raise UserError("torch is not installed here: pip install -r requirements.txt") from None
    release = tuple(int(part) for part in version.split(".")[:2])
    if release < MIN_TORCH:
        wanted = ".".join(map(str, MIN_TORCH))
        raise UserError(f"torch {version} is too old, {wanted} is needed: pip install -r requirements.txt")
    return release


def _read_dotenv() -> None:
    from dotenv import dotenv_values

    try:
        values = dotenv_values(".env")
        for name, value in values.items():
            if value:  # an empty HF_HOME would put the cache into this folder
                os.environ.setdefault(name, value)  # real variables win
    except ValueError as error:
        raise UserError(f".env: no plain UTF-8 text ({error})") from None
    keep_secret(*(values.get(name) for name in SECRETS))
    seen = os.name == "posix" and any(values.get(name) for name in SECRETS) and os.stat(".env").st_mode & 0o077
    if seen and int(os.environ.get("RANK", 0)) == 0:
        print("warning: others on this machine may read the secrets in .env; chmod 600 .env", file=sys.stderr)


def _guard_outputs() -> None:
    """What is logged, warned of or dies with a traceback shows no secret and gives a terminal no orders.

    Every log record is cleaned as it is made: whatever handlers there are or will be.
    """
    make, form = logging.getLogRecordFactory(), warnings.formatwarning
    if make is not _log_record:
        _made_by.append(make)
        logging.setLogRecordFactory(_log_record)
    if form is not _warning:
        _formed_by.append(form)
        warnings.formatwarning = _warning
    if sys.excepthook in (sys.__excepthook__, signals.uncaught):
        sys.excepthook = _uncaught
    if threading.excepthook is threading.__excepthook__:
        threading.excepthook = lambda found: _uncaught(found.exc_type, found.exc_value, found.exc_traceback)


_made_by: list[Any] = []
_formed_by: list[Any] = []


def _log_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
    record = _made_by[-1](*args, **kwargs)
    try:
        told = record.getMessage()
    except Exception:  # noqa: BLE001  # a message that does not fit its arguments: logging would print them
        told = f"{record.msg!r} % {record.args!r}"
    record.msg, record.args = clean(told), None
    if record.exc_info and record.exc_info[0]:
        record.exc_text = clean("".join(traceback.format_exception(*record.exc_info)).rstrip("\n"))
    return record


def _warning(*args: Any, **kwargs: Any) -> str:
    return clean(_formed_by[-1](*args, **kwargs))


def _uncaught(kind: Any, error: Any, trace: Any) -> None:
    if sys.stderr is not None and not issubclass(kind, KeyboardInterrupt):  # as `signals.uncaught`
        sys.stderr.write(clean("".join(traceback.format_exception(kind, error, trace))))
        sys.stderr.flush()
