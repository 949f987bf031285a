"""What has to stand before torch and Hugging Face libraries are imported: `.env`, and the settings of allocators."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import sys

from config import UserError


def prepare() -> None:
    """Before torch and Hugging Face libraries are imported: `.env`, GPU and C allocators."""
    from dotenv import dotenv_values

    try:
        for name, value in dotenv_values(".env").items():
            if value:  # an empty HF_HOME would put the cache into this folder
                os.environ.setdefault(name, value)  # real variables win
    except ValueError as error:
        raise UserError(f".env: no plain UTF-8 text ({error})") from None
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    old, new = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"  # the new name works from torch 2.11 on
    if old not in os.environ and new not in os.environ:
        release = tuple(int(part) for part in importlib.metadata.version("torch").split(".")[:2])
        os.environ[new if release >= (2, 11) else old] = "expandable_segments:True"
    if sys.platform == "linux":
        # Keep freed activations for the next step.
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
