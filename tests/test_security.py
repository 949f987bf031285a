"""What leaves a process: no secret in any sink, nothing that a terminal would obey."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from text import HIDDEN, clean, keep_secret, redact, safe_text

ROOT = Path(__file__).resolve().parent.parent
BIDI = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
STARTS = [  # CSI, OSC, DCS, APC, PM, SOS, a title, clear the screen, a hyperlink; 7 and 8 bits
    "\x1b[31m", "\x1b]0;evil\x07", "\x1bP1$r\x1b\\", "\x1b_G\x1b\\", "\x1b^x\x1b\\", "\x1bXx\x1b\\", "\x1bc", "\x1b[2J",
    "\x1b]8;;https://example.org\x1b\\", "\x9b31m", "\x9d0;evil\x9c", "\x90q\x9c", "\x9fx\x9c", "\x9ex\x9c", "\x98x",
    "\r", "\b", "\x7f", "\x00", "\x0b", "\x0c", "\x85", "\u202e", "\u2066", "\u200f", "\u061c", "\ud800", "\udc80",
]  # fmt: skip


def token(seed: int, length: int = 34) -> str:
    """Made here: no file holds anything that looks like a token."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
    return "hf_" + "".join(random.Random(seed).choices(letters, k=length))


# ------------------------------------------------------------------------------------------------------------ terminal


def test_no_control_character_survives() -> None:
    """10,000 strings of orders to a terminal, ordinary text and any characters at all."""
    rng = random.Random(0)
    for _ in range(10_000):
        parts = (rng.choice(STARTS), chr(rng.randrange(0x100)), chr(rng.randrange(0x110000)), "Grüße\n\t", "早上")
        text = "".join(rng.choice(parts) for _ in range(rng.randrange(1, 12)))
        for told in (safe_text(text), clean(text)):
            for char in set(told) - {"\n", "\t"}:
                assert unicodedata.category(char) not in ("Cc", "Cs"), repr(text)
                assert unicodedata.bidirectional(char) not in BIDI and char not in "\u061c\u200e\u200f", repr(text)
            told.encode()


def test_what_is_harmless_stays() -> None:
    rng = random.Random(1)
    kept = 0
    for _ in range(2000):
        char = chr(rng.randrange(32, 0x110000))
        if unicodedata.category(char)[0] in "LMNPSZ":
            assert safe_text(char) == char
            kept += 1
    assert kept > 100


# ------------------------------------------------------------------------------------------------------------- secrets


def test_what_looks_like_a_secret_is_hidden() -> None:
    for number in range(200):
        secret = token(number, 20 + number % 30)
        for text in (
            secret,
            f"'{secret}'",
            f"Bearer {secret}",
            f"x_{secret}",
            f"https://u:{secret}@h/p?t={secret}",
            f"{secret}.",
        ):
            assert secret not in redact(text) and secret[:12] not in redact(text) and HIDDEN in redact(text)
    assert redact(f"... {token(1)[:15]}...") == f"... {HIDDEN}..."  # cut short for a message
    assert redact("GET https://me:pa55@word@example.org/a@b?c") == f"GET https://{HIDDEN}@example.org/a@b?c"
    assert redact("authorization: Bearer abc.DEF-ghi_1") == f"authorization: Bearer {HIDDEN}"


@pytest.mark.parametrize(
    "text",
    [
        "hf_token, hf_hub_url and hf_transfer", "https://example.org/a@b", "owner/name@607a30d783dfa663", "me@h.org",
        "hf://datasets/owner/name@607a30d783/a.parquet", "hf://owner@main/x", "tokens/s 4,522  MFU 42.9%", "",
    ],
)  # fmt: skip
def test_what_does_not_is_left(text: str) -> None:
    assert redact(text) == text


def test_known_values_are_hidden_whatever_they_look_like() -> None:
    keep_secret("correct horse battery", "  padded-value \n", "short", None, "")
    assert redact("a correct horse battery, padded-value, short") == f"a {HIDDEN}, {HIDDEN}, short"


SINKS = """
import logging, os, pathlib, sys, threading, warnings
import environment
early = logging.getLogger("early")
early.addHandler(logging.StreamHandler(sys.stdout))
environment.prepare()
environment.prepare()
from config import UserError
from text import report
from tracker import Tracker
secrets = [os.environ[name] for name in environment.SECRETS]
said = "said: " + " ".join(secrets) + " https://user:pa55word@example.org \\x1b[2J"
early.error("%s", said)
logging.getLogger("other").warning("a root without handlers: %s", said)
logging.getLogger().addHandler(logging.FileHandler("log.txt"))
late = logging.getLogger("late")
try:
    raise ValueError(said)
except ValueError:
    late.exception("failed: %(what)s", {"what": said})
late.error("one %s too many", said, said)
warnings.warn(said)
report(UserError(said))
tracker = Tracker(pathlib.Path("run"), total_steps=1, first_step=0)
tracker.note(said)
tracker.log(1, {"loss": 1.0, "note": said})
tracker.samples(1, [(said, said)])
thread = threading.Thread(target=lambda: 1 / 0 if not said else (_ for _ in ()).throw(RuntimeError(said)))
thread.start()
thread.join()
def deeper(said):
    raise RuntimeError(said) from KeyError(said)
deeper(said)
"""


@pytest.mark.parametrize("before", ["", "import signals; signals.quiet()"], ids=["as it is", "after quiet"])
def test_no_sink_tells_a_secret(tmp_path: Path, before: str) -> None:
    """Records of logging, warnings, tracebacks of threads and the program, messages, what a tracker writes."""
    from environment import SECRETS

    values = [token(1), "a secret of no form 1", *(f"value-of-{number}" for number in range(len(SECRETS) - 2))]
    given = dict(zip(SECRETS, values, strict=True))
    (tmp_path / ".env").write_text("\n".join(f'{name}="{value}"' for name, value in list(given.items())[1:]))
    (tmp_path / ".env").chmod(0o600)
    environment = {key: value for key, value in os.environ.items() if key not in SECRETS}
    environment |= {"PYTHONPATH": str(ROOT), SECRETS[0]: values[0]}
    done = subprocess.run([sys.executable, "-c", before + SINKS], cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 1 and b"RuntimeError: said: [hidden]" in done.stderr, done.stderr.decode()
    (tmp_path / ".env").unlink()
    assert_hidden(tmp_path, done, [*values, "pa55word"], at_least=12)
    everything = done.stdout + done.stderr + (tmp_path / "log.txt").read_bytes()
    assert everything.count(b"ValueError: said") == 1 and everything.count(b"\\x1b[2J") >= 8


def assert_hidden(folder: Path, done: subprocess.CompletedProcess[bytes], secrets: list[str], *, at_least: int) -> None:
    outputs = {"stdout": done.stdout, "stderr": done.stderr}
    outputs |= {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name, content in outputs.items():
        for secret in secrets:
            for form in (secret.encode(), secret.encode("utf-16-le"), repr(secret).encode()):
                assert form not in content, name
        assert b"\x1b" not in content or name.endswith((".safetensors", ".parquet")), name
    assert sum(content.count(HIDDEN.encode()) for content in outputs.values()) >= at_least


TINY = """
model:
  {vocab_size: 300, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, q_lora_rank: 16, kv_lora_rank: 16,
   qk_nope_head_dim: 8, qk_rope_head_dim: 8, v_head_dim: 16, intermediate_size: 48, moe_intermediate_size: 16,
   n_routed_experts: 4, num_experts_per_tok: 2, max_position_embeddings: 64}
data: {sources: text.jsonl, tokenizer: bytes, seq_len: 32, val_fraction: 0.1, workers: 0}
train: {steps: 3, micro_batch: 4, batch_tokens: 256, precision: fp32}
log: {every_steps: 1}
eval: {tokens: 300}
sample: {max_new_tokens: 4, prompts: [Emma]}
"""
# A run to its end; then one whose forward pass dies of an exception that holds every secret, as a library's may.
PROGRAM = """
import os, runpy, sys
def run(*arguments):
    sys.argv = ["train.py", "--config", "tiny.yaml", *arguments]
    try:
        runpy.run_path(os.path.join(os.environ["PYTHONPATH"], "train.py"), run_name="__main__")
    except SystemExit as end:
        return end.code
assert run("--profile") == 0
import model
def forward(*args, **kwargs):
    raise RuntimeError("401 for https://u:" + os.environ["WANDB_API_KEY"] + "@h.org: " + os.environ["HF_TOKEN"])
model.DeepSeekV3.forward = forward
run("run.name=crash")
"""


def test_a_run_keeps_its_secrets(tmp_path: Path) -> None:
    """The environment's and those of .env: not in the output, in no byte of any file, nor when it crashes."""
    secrets = [token(2), "x9" * 20]
    (tmp_path / "tiny.yaml").write_text(TINY)
    rng = random.Random(0)
    words = [" ".join(rng.choices(["emma", "was", "handsome", "clever", "and", "rich"], k=40)) for _ in range(60)]
    (tmp_path / "text.jsonl").write_text("".join(f'{{"text": "{line}"}}\n' for line in words))
    (tmp_path / ".env").write_text(f"WANDB_API_KEY={secrets[1]}\n")
    (tmp_path / ".env").chmod(0o644)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_TOKEN": secrets[0], "HF_HUB_OFFLINE": "1"}
    environment.pop("WANDB_API_KEY", None)
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=tmp_path, env=environment, capture_output=True)
    err = done.stderr.decode()
    assert done.returncode == 1 and "Traceback" in err and f"401 for https://{HIDDEN}@h.org: {HIDDEN}" in err, err
    assert len(re.findall("warning: others on this machine may read the secrets in .env", err)) == (
        2 if os.name == "posix" else 0
    )
    (tmp_path / ".env").unlink()
    names = {path.name for path in (tmp_path / "runs").rglob("*")}
    assert {"config.yaml", "metrics.jsonl", "samples.md", "profile.json", "manifest.json", "model.safetensors"} <= names
    assert_hidden(tmp_path, done, secrets, at_least=2)
