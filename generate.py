"""Text from a model: batches of ragged prompts, a latent KV cache, sampling, streaming. A library and a program.

    python generate.py --checkpoint runs/quickstart --prompt "Once upon a time"

torch is imported inside functions: the program rejects bad arguments and reads `.env` before that.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import os
import random
import re
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import signals

if __name__ == "__main__":  # Ctrl-C comes before what takes time to import
    signals.quiet()

import environment
from config import DTYPE_NAMES, UserError
from options import Parser
from text import TextStream, prompt_ids, report, safe_text, say, silence

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

    from config import ModelConfig
    from model import DeepSeekV3

DEFAULT_NEW_TOKENS = 128  # or what the context leaves


def load(
    path: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype | str | None = None
) -> tuple[DeepSeekV3, PreTrainedTokenizerFast | None]:
    """The model, in eval mode, and the tokenizer, if any, of a run, a checkpoint or a Hugging Face model directory.

    `model(tokens)` gives logits (B, T, W), fp32. Raises UserError where there is no model or one we cannot represent.

    Args:
        dtype: of parameters and matrix products, a torch dtype or "fp32", "bf16", "fp16"; None: as the weights are
            stored. Router biases and routing stay fp32.
    """
    import checkpoint

    folder = checkpoint.find(path)
    return load_model(folder, device, dtype), load_tokenizer(folder)


def load_model(folder: Path, device: torch.device | str, dtype: torch.dtype | str | None) -> DeepSeekV3:
    """`load` for the directory that holds the weights itself."""
    import torch

    import convert
    from model import DeepSeekV3

    config, state = convert.load(folder)
    wanted = getattr(torch, DTYPE_NAMES[dtype]) if isinstance(dtype, str) else dtype
    matrices = {t.dtype for name, t in state.items() if t.dim() > 1 and not name.endswith("mlp.gate.weight")}
    compute = wanted or functools.reduce(torch.promote_types, matrices)
    if compute not in [getattr(torch, name) for name in DTYPE_NAMES.values()]:
        raise UserError(f"{folder}: weights in {compute} are not supported, only {', '.join(DTYPE_NAMES.values())}")
    with torch.device("meta"):
        model = DeepSeekV3(config, compute)
    for name in list(state):  # one at a time; copies, for they are mapped from files that may be rewritten
        target = torch.float32 if name.endswith(convert.BIAS) else wanted
        state[name] = state[name].to(device, target, copy=True)
    model.load_state_dict(state, assign=True)
    return model.eval()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast | None:
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    import tokenizer

    return tokenizer.load(str(folder))


def end_ids(folder: Path, tok: PreTrainedTokenizerFast) -> set[int]:
    """The tokens that end a text: those of `generation_config.json`, or else the tokenizer's."""
    import checkpoint

    path = folder / "generation_config.json"
    ids = checkpoint.read_json(path).get("eos_token_id") if path.is_file() else None
    ids = tok.eos_token_id if ids is None else ids
    found = {token for token in (ids if isinstance(ids, list) else [ids]) if type(token) is int}
    if len(found) < (len(ids) if isinstance(ids, list) else 1):
        raise UserError(f"{path}: eos_token_id {ids!r} must be a token id or a list of different ones")
    return found


class Sampling(NamedTuple):
    """How a token is chosen. temperature 0: the most likely; top_k 0: from all; top_p: from the smallest such mass."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def check(self) -> None:
        if not self.temperature >= 0:
            raise UserError(f"temperature {self.temperature} must be at least 0 (0: always the most likely token)")
        if self.top_k < 0:
            raise UserError(f"top-k {self.top_k} must be at least 0 (0: all tokens)")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p {self.top_p} must be above 0 and at most 1")


def generate(
    model: DeepSeekV3,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_ids: Collection[int] = (),
    vocab_limit: int | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Continue every prompt by at most `max_new_tokens`; only the new tokens are returned.

    A row ends before the first of `eos_ids`, which is neither returned nor reported. Each row draws from random
    numbers of its own, given by `seed` and its index: torch's generators are neither read nor moved.

    Args:
        prompts: ids; each holds at least one, say BOS (ValueError).
        vocab_limit: only smaller ids are generated; the tokenizer's size, where the vocabulary is padded.
        on_token: called with (row, token) as tokens come.

    Raises UserError where prompt and new tokens exceed the context, or a prompt the vocabulary.
    """
    import torch

    sampling = Sampling(temperature, top_k, top_p)
    sampling.check()
    check_lengths(model.config, prompts, max_new_tokens)
    rows: list[list[int]] = [[] for _ in prompts]
    if not prompts or max_new_tokens == 0:
        return rows
    # A string seeds all of Mersenne Twister's state; torch's CPU generator would use 32 bits of the seed.
    sources = [random.Random(f"{seed} {row}") for row in range(len(prompts))]

    def choose(logits_BW: Tensor, alive: Sequence[int]) -> list[int]:
        if not logits_BW.isfinite().all():
            raise UserError("the model's logits are not finite: it diverged, or exceeds the range of the dtype")
        return choose_tokens(logits_BW[:, :vocab_limit], [sources[row].random() for row in alive], sampling)

    def keep(row: int, token: int) -> bool:
        """Take the token; whether the row goes on."""
        if token in eos_ids:
            return False
        rows[row].append(token)
        if on_token is not None:
            on_token(row, token)
        return len(rows[row]) < max_new_tokens

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():  # not inference_mode: nothing here may leak into training as an inference tensor
            _decode(model, prompts, max_new_tokens, choose, keep)
    finally:
        model.train(was_training)
    return rows


def check_lengths(config: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raise where `generate` would not take these prompts."""
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens {max_new_tokens} must be at least 0")
    for prompt in prompts:
        if not prompt:
            raise ValueError("an empty prompt: start from the BOS or EOS token")
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            wrong = min(prompt) if min(prompt) < 0 else max(prompt)
            raise UserError(f"a prompt holds token {wrong}, the model knows 0 to {config.vocab_size - 1}")
        if len(prompt) + max_new_tokens > config.max_position_embeddings:
            raise UserError(
                f"a prompt of {len(prompt)} tokens and {max_new_tokens} new ones exceed the model's context of "
                f"{config.max_position_embeddings} (max_position_embeddings)"
            )


def _decode(
    model: DeepSeekV3,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    choose: Callable[[Tensor, Sequence[int]], list[int]],
    keep: Callable[[int, int], bool],
) -> None:
    """One prefill of all prompts, padded on the right, then a token per row and step; rows that end leave the batch.

    Padding is harmless: causality hides it from the prompt, and new tokens overwrite its entries in the cache.
    """
    import torch

    from model import LatentCache

    device = model.lm_head.weight.device
    position_B = torch.tensor([len(prompt) for prompt in prompts], device=device)  # of the token that comes next
    longest = int(position_B.max())
    padded_BT = torch.tensor([[*prompt] + [0] * (longest - len(prompt)) for prompt in prompts], device=device)
    capacity = longest + max_new_tokens - 1  # the last token is never fed
    cache = LatentCache(model.config, len(prompts), capacity, device=device, dtype=model.dtype)
    hidden_BTD, _ = model.hidden(padded_BT, cache=cache)
    hidden_BD = hidden_BTD[torch.arange(len(prompts), device=device), position_B - 1]
    alive = list(range(len(prompts)))
    while True:
        tokens = choose(model.logits(hidden_BD), alive)
        going = [i for i, (row, token) in enumerate(zip(alive, tokens, strict=True)) if keep(row, token)]
        if not going:
            return
        if len(going) < len(alive):
            alive, tokens = [alive[i] for i in going], [tokens[i] for i in going]
            index_B = torch.tensor(going, device=device)
            position_B, cache.latent_LBSC = position_B[index_B], cache.latent_LBSC[:, index_B]
        token_BT = torch.tensor(tokens, device=device)[:, None]
        hidden_BTD, _ = model.hidden(token_BT, positions=position_B[:, None], cache=cache)
        hidden_BD = hidden_BTD[:, 0]
        position_B = position_B + 1


def choose_tokens(logits_BW: Tensor, draws: Sequence[float], sampling: Sampling) -> list[int]:
    """A token per row: the most likely one, or where the row's draw of [0, 1) falls in the cumulative distribution."""
    import torch

    if sampling.temperature == 0:
        return logits_BW.argmax(-1).tolist()
    width = logits_BW.shape[-1]
    logits_BX, token_BX = logits_BW.double().topk(min(sampling.top_k or width, width))  # X: candidates, best first
    probs_BX = ((logits_BX - logits_BX[:, :1]) / sampling.temperature).softmax(-1)
    sum_BX = probs_BX.cumsum(-1)
    last_B1 = (sum_BX - probs_BX < sampling.top_p).sum(-1, keepdim=True) - 1  # the token that reaches top_p is the last
    draw_B1 = torch.tensor(draws, dtype=torch.float64, device=sum_BX.device)[:, None] * sum_BX.gather(1, last_B1)
    index_B1 = torch.minimum((sum_BX <= draw_B1).sum(-1, keepdim=True), last_B1)
    return token_BX.gather(1, index_B1).flatten().tolist()


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="generate.py", description="Continue prompts with a trained model.")
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="PATH", help="run, checkpoint, or Hugging Face model directory")
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", help="text to continue; empty: start from nothing")
    prompts.add_argument("--prompts-file", metavar="FILE", help="a prompt per line, blank ones skipped; -: stdin")
    add("--max-new-tokens", type=int, metavar="N", help=f"default: {DEFAULT_NEW_TOKENS}, or what the context leaves")
    add("--temperature", type=float, default=0.8, help="0: always the most likely token (default: 0.8)")
    add("--top-k", type=int, default=50, help="sample from the k most likely tokens; 0: from all (default: 50)")
    add("--top-p", type=float, default=1.0, help="sample from the smallest set with this probability (default: 1)")
    add("--greedy", action="store_true", help="the same as --temperature 0")
    add("--seed", type=int, default=0, help="of the random choices (default: 0)")
    add("--num-samples", type=int, default=1, help="continuations of each prompt (default: 1)")
    add("--device", default="auto", help="cpu, cuda or cuda:N; auto: a GPU if there is one (default)")
    add("--dtype", default="auto", choices=["auto", *DTYPE_NAMES], help="arithmetic; auto: as stored (default)")
    given = parser.parse_args(arguments)
    given.sampling = Sampling(0.0 if given.greedy else given.temperature, given.top_k, given.top_p)
    given.sampling.check()
    if given.num_samples < 1:
        raise UserError(f"--num-samples {given.num_samples} must be at least 1")
    if given.max_new_tokens is not None and given.max_new_tokens < 0:
        raise UserError(f"--max-new-tokens {given.max_new_tokens} must be at least 0")
    return given


def read_prompts(given: argparse.Namespace) -> list[str]:
    if given.prompts_file is None:
        return [given.prompt]
    name = "standard input" if given.prompts_file == "-" else given.prompts_file
    try:
        if given.prompts_file == "-":
            content = sys.stdin.buffer.read()
        else:
            content = Path(os.path.expanduser(given.prompts_file)).read_bytes()
        lines = content.decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except (OSError, ValueError) as error:  # UnicodeDecodeError, and a null character in the name, are ValueErrors
        raise UserError(f"--prompts-file {name} cannot be read: {error}") from None
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--prompts-file {name} holds no prompt, only blank lines")
    return prompts


def find_folder(name: str) -> Path:
    """The model directory; a name that does not exist is answered with its nearest neighbour, before torch loads."""
    path = Path(os.path.expanduser(name))
    try:
        if not path.exists() and path.parent.is_dir():
            near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir() if p.is_dir()], n=1)
            if near:
                raise UserError(f"--checkpoint {path} does not exist; did you mean {path.parent / near[0]}?")
        import checkpoint
        import hub

        if not path.exists() and not path.parent.exists() and hub.PLACE.fullmatch(name.partition("@")[0]):
            say(f"no folder {name}: the model of that name on the Hugging Face Hub", out=sys.stderr)
            return hub.download_model(name)
        return checkpoint.find(path)
    except OSError as error:
        raise UserError(f"--checkpoint {path}: {error.strerror}") from None


def find_device(name: str) -> torch.device:
    import torch

    num_gpus = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda" if num_gpus else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name):
        raise UserError(f"--device {name} is not supported; allowed are auto, cpu, cuda and cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= num_gpus:
        raise UserError(f"--device {name}: torch {torch.__version__} sees {num_gpus} GPUs; try --device cpu")
    return device


def run(given: argparse.Namespace) -> None:
    texts = [text for text in read_prompts(given) for _ in range(given.num_samples)]
    folder = find_folder(given.checkpoint)
    device = find_device(given.device)
    tok = load_tokenizer(folder)
    if tok is None:
        raise UserError(f"--checkpoint {folder} has no tokenizer (tokenizer.json), so it cannot read or write text")
    prompts = [prompt_ids(tok, text) for text in texts]
    model = load_model(folder, device, None if given.dtype == "auto" else given.dtype)
    room = model.config.max_position_embeddings - max(map(len, prompts))
    num_new = min(DEFAULT_NEW_TOKENS, max(room, 1)) if given.max_new_tokens is None else given.max_new_tokens
    check_lengths(model.config, prompts, num_new)
    streams = [TextStream(tok, prompt) for prompt in prompts]
    single = len(prompts) == 1
    if single:
        write(safe_text(texts[0]))
    start = time.perf_counter()
    rows = generate(
        model, prompts, max_new_tokens=num_new, **given.sampling._asdict(), seed=given.seed,
        eos_ids=end_ids(folder, tok), vocab_limit=len(tok),
        on_token=(lambda _, token: write(streams[0].feed(token))) if single else None,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    if single:
        write(streams[0].feed(end=True) + "\n")
    else:
        for i, row in enumerate(rows):
            prompt, sample = divmod(i, given.num_samples)
            text = safe_text(texts[i]) + streams[i].feed(*row, end=True)
            write(f"--- prompt {prompt + 1}, sample {sample + 1}\n{text}\n")
    total = sum(map(len, rows))
    say(f"{total} tokens in {seconds:.1f} s, {total / max(seconds, 1e-9):.0f} tokens/s", out=sys.stderr)


def write(text: str) -> None:
    """To standard output at once; what its encoding lacks is escaped. Raises UserError where it cannot be written."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        silence(sys.stdout)
        raise UserError(f"standard output cannot be written: {error.strerror}") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """0, 2 after a user's mistake (one line on standard error), 130 after Ctrl-C."""
    try:
        given = parse_arguments(arguments)
        environment.prepare()
        run(given)
    except UserError as error:
        return report(error)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader (head, less) has seen enough; nothing is left to flush at exit
        silence(sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
