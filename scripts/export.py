"""Write a model directory from a training checkpoint: weights in one dtype, config and tokenizer, no training state.

    python scripts/export.py --checkpoint runs/mini --out exported [--dtype fp32|bf16|fp16] [--no-mtp]

The result loads in transformers, vLLM, SGLang and llama.cpp's converter. Router biases stay fp32 in every dtype.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules lie beside this folder

import signals

signals.quiet()

import torch
from torch import Tensor

import checkpoint
import convert
from config import DTYPE_NAMES, UserError
from options import Parser
from text import report

COMPANIONS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def export(checkpoint_path: Path, out: Path, *, dtype: str = "bf16", mtp: bool = True) -> None:
    """Write the model found at `checkpoint_path` to `out`, which must be absent or empty; it appears when whole."""
    out = Path(os.path.expanduser(out)).absolute()
    if out == Path.cwd():
        raise UserError(f"--out {out}: is the working directory; name a new directory")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: exists and is not an empty directory; choose another")
    source = checkpoint.find(checkpoint_path)
    config, state = convert.load(source)
    if not mtp:
        config = config.model_copy(update={"num_nextn_predict_layers": 0})
    tensors = convert.to_checkpoint(state, config)
    target = getattr(torch, DTYPE_NAMES[dtype])
    _check_range(tensors, target)
    hf = checkpoint.read_json(source / "config.json")
    tokens = {f"{name}_token_id": hf.get(f"{name}_token_id") for name in ("bos", "eos")}
    hf_config = convert.hf_config(config, dtype=DTYPE_NAMES[dtype], **tokens)
    files = {name: (source / name).read_bytes() for name in COMPANIONS if (source / name).is_file()}
    files["config.json"] = (json.dumps(hf_config, indent=2) + "\n").encode()
    dtypes = {name: target for name in tensors if not name.endswith(convert.BIAS)}

    temporary = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        checkpoint.write(temporary, {"model": tensors}, files, dtypes=dtypes)
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # nothing there after the rename
    print(f"exported {source} to {out} ({dtype}, {config.num_nextn_predict_layers} MTP layers)")


def _check_range(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """fp16 ends at 65504; a weight beyond it would silently become infinite."""
    if dtype == torch.float16:
        for name, tensor in tensors.items():
            if tensor.abs().max() > torch.finfo(dtype).max:
                raise UserError(f"--dtype fp16: {name} has values beyond {torch.finfo(dtype).max:g}; use bf16")


def main(arguments: list[str] | None = None) -> int:
    summary = "Write a model directory (Hugging Face format) from a training checkpoint."
    parser = Parser(prog="export.py", description=summary)
    parser.add_argument("--checkpoint", type=Path, required=True, help="run, checkpoint, or model directory")
    parser.add_argument("--out", type=Path, required=True, help="directory to write; must not exist or be empty")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, default="bf16", help="dtype of the weights (default: bf16)")
    parser.add_argument("--no-mtp", dest="mtp", action="store_false", help="leave out the MTP layers")
    try:
        given = parser.parse_args(arguments)
        export(given.checkpoint, given.out, dtype=given.dtype, mtp=given.mtp)
    except (UserError, OSError) as error:
        return report(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
