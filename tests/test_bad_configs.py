"""Configurations that are wrong: exit code 2 and one line, which names the key and what would be right, before torch.

What each message of `config` says is in test_config.py and test_options.py; here they go through the program, files and
overrides alike, as a user meets them.
"""

from __future__ import annotations

import json
import random
import string
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_config import MISTAKES

import config
import train
from options import MAX_FILE_BYTES, Schema

ROOT = Path(train.__file__).parent
SCHEMA = Schema(config.Config)
SECTIONS = SCHEMA.sections
KEYS = [key for key in SCHEMA.keys if key not in SECTIONS]
SECRET = "hf_" + "Zz9" * 10  # no token of anyone

FILES: dict[str, tuple[bytes, str]] = {  # what it is: its bytes, and words of the message
    "empty": (b"", "bad.yaml: is empty"),
    "blank": (b" \n\n", "bad.yaml: is empty"),
    "binary": (b"\x89PNG\r\n\x1a\n\x00\x00\xff", "is not UTF-8 text (byte 0)"),
    "zeros": (bytes(4096), "special characters are not allowed"),
    "latin": ("run:\n  name: Gr\u00fc\u00dfe".encode("latin-1"), "is not UTF-8 text"),
    "utf-16": ("train: {seed: 1}".encode("utf-16"), "is not UTF-8 text"),
    "too large": (b"#" * (MAX_FILE_BYTES + 1), "is larger than 65536 bytes"),
    "much too large": (b"train:\n" + b"  seed: 1\n" * 10**6, "is larger than 65536 bytes"),
    "tab": (b"train:\n\tseed: 1\n", "bad.yaml:2: is not valid YAML: found character '\\t'"),
    "indentation": (b"train:\n  seed: 1\n seed: 2\n", "bad.yaml:3: is not valid YAML"),
    "unclosed list": (b"data:\n  sources: [a.txt\n", "is not valid YAML"),
    "unclosed quote": (b"run:\n  name: 'x\n", "is not valid YAML"),
    "control character": (b"run:\n  name: \x1b[31m\n", "special characters are not allowed"),
    "duplicate key": (b"train:\n  seed: 1\n  'seed': 2\n", "bad.yaml:3: train.seed is given twice; the first is at"),
    "duplicate section": (b"train: {}\neval: {}\ntrain: {}\n", "bad.yaml:3: train is given twice"),
    "duplicate in a source": (b"data: {sources: [{path: a, path: b}]}", "data.sources[0].path is given twice"),
    "list": (b"- train\n", "holds ['train'] in place of sections (run, model,"),
    "word": (b"train\n", "holds 'train' in place of sections"),
    "number": (b"12\n", "holds 12 in place of sections"),
    "two documents": (b"--- {}\n--- {}\n", "but found another document"),
    "section of a number": (b"optim: 3\n", "bad.yaml:1: optim = 3 must be a mapping with the keys name, lr,"),
    "section of a list": (b"optim: [lr, 3]\n", "optim = ['lr', 3] must be a mapping with the keys"),
    "key of a list": (b"? [a]\n: 1\n", "a key must be a word"),
    "number as key": (b"train:\n  1: 2\n", "unknown key train.1"),
    "null as key": (b"train:\n  ~: 2\n", "unknown key train.~"),
    "merge key": (b"train:\n  <<: {seed: 1}\n", "unknown key train.<<"),
    "alias": (b"run: {name: &n x, dir: *n}\n", "aliases (*name) are not supported"),
    "alias of itself": (b"data: &d {sources: *d}\n", "aliases (*name) are not supported"),
    "a billion laughs": (
        b"sample:\n  prompts:\n  - &a0 x\n"
        + b"".join(b"  - &a%d [%s]\n" % (i, b", ".join([b"*a%d" % (i - 1)] * 9)) for i in range(1, 12)),
        "aliases (*name) are not supported",
    ),
    "deep lists": (b"train:\n  seed: " + b"[" * 30000, "it is nested too deeply"),
    "deep mappings": (b"train: " + b"{a: " * 10000, "is not valid YAML: it is nested too deeply"),
    "deep blocks": (b"".join(b" " * i + b"a:\n" for i in range(300)), "it is nested too deeply"),
    "object": (b"train:\n  seed: !!python/object/apply:os.system ['exit 1']\n", "tags are not supported"),
    "module": (b"train:\n  seed: !!python/module:os ''\n", "tags are not supported"),
    "object of a section": (b"train: !!python/object:config.TrainConfig {seed: 1}\n", "tags are not supported"),
    "binary tag": (b"run:\n  name: !!binary aGVsbG8=\n", "tags are not supported"),
    "digits": (b"train:\n  seed: " + b"9" * 5000 + b"\n", "is not a number one can read"),
    "a lot of digits": (b"train:\n  steps: 1" + b"0" * 60 + b"\n", "or null, and at most 1000000000000000"),
    "secret key": (b"hub_token: " + SECRET.encode(), "unknown key hub_token; a token or password belongs in"),
    "secret in a section": (b"hub:\n  hf_token: abc\n", "(HF_TOKEN=...) or in .env, never here"),
    "secret in a source": (b"data: {sources: [{path: a/b, token: abc}]}", "unknown key data.sources[0].token; a token"),
    "secret as a value": (f"sample:\n  prompts:\n  - my {SECRET}\n".encode(), "prompts[0] = 'my [hidden]' holds a"),
    "secret in a URL": (b"data:\n  sources: https://me:pa55word@h.org/x.txt", "'https://[hidden]@h.org/x.txt' holds a"),
}  # fmt: skip

ARGUMENTS: dict[str, tuple[list[str], str]] = {
    "no such preset": (["--config", "mnii"], "did you mean mini? Presets are"),
    "no name": (["--config", ""], "'' does not exist; give a YAML file or one of the presets"),
    "no such file": (["--config", "gone/mini.yml"], "'gone/mini.yml' does not exist; did you mean mini?"),
    "a folder": (["--config", "configs"], "--config 'configs' is a folder"),
    "no value": (["--config"], "argument --config: expected one argument"),
    "no such flag": (["--dry-rnu"], "did you mean --dry-run?"),
    "a key as a flag": (["--train.steps=5"], "keys are given as section.key=value"),
    "a token as a flag": (["--hub-token", "abc"], "--hub-token: no such option; a token or password belongs in"),
    "a token as an override": (["hub.token=abc"], "unknown key hub.token; a token or password belongs in"),
    "a checkpoint that is not there": (["--resume", "gone"], "--resume gone: no such directory; allowed: auto, never"),
    "later ones win": (["train.seed=1", "train.seed=-1"], "train.seed = -1 must be an integer >= 0"),
    "no equals sign": (["train.seed", "1"], "'train.seed' must have the form train.seed=VALUE"),
    "a section": (["train={seed: 1}"], "train is a section; set one of its keys"),
    "an order to the terminal": (["run.dir=a\x1b[2J"], "run.dir = 'a\\x1b[2J' holds a character"),
    "a name that turns": (["run.dir=a\u202eb"], "holds a character that no name of a folder should have"),
}


def typo(key: str, changes: int, rng: random.Random) -> str:
    """`changes` letters inserted, dropped or replaced, in the key's last part."""
    section, dot, leaf = key.replace("[]", "[0]").rpartition(".")
    for _ in range(changes):
        i, letter = rng.randrange(len(leaf)), rng.choice(string.ascii_lowercase)
        leaf = rng.choice(
            [leaf[:i] + letter + leaf[i:], leaf[:i] + leaf[i + 1 :] or letter, leaf[:i] + letter + leaf[i + 1 :]]
        )
    return section + dot + leaf


def as_yaml(key: str, value: str) -> bytes:
    """A file with nothing but this key."""
    text = value
    for part in reversed(key.replace("[0]", ".[0]").split(".")):
        text = f"[{text}]" if part == "[0]" else f"{{{part}: {text}}}"
    return text.encode()


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    start = time.process_time()
    assert train.main(arguments) == 2
    out, err = capsys.readouterr()
    assert time.process_time() - start < 2
    assert out == "" and err.startswith("error: ") and err.endswith("\n") and err[:-1].isprintable() and len(err) < 900
    assert SECRET not in err and "pa55word" not in err
    return err


@pytest.mark.parametrize("what", FILES)
def test_a_file_is_refused(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, words = FILES[what]
    (tmp_path / "bad.yaml").write_bytes(content)
    assert words in refused(["--config", str(tmp_path / "bad.yaml")], capsys)


@pytest.mark.parametrize("what", ARGUMENTS)
def test_arguments_are_refused(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, words = ARGUMENTS[what]
    assert words in refused(arguments, capsys)


@pytest.mark.parametrize("key", KEYS)
def test_a_typing_error_is_answered_with_the_key(key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One wrong letter and two, of every key."""
    rng = random.Random(key)
    for changes in (1, 2):
        while (typed := typo(key, changes, rng)).replace("[0]", "[]") in SCHEMA.keys or typed == key:
            pass
        (tmp_path / "bad.yaml").write_bytes(as_yaml(typed, "77"))
        message = refused(["--config", str(tmp_path / "bad.yaml")], capsys)
        assert f"bad.yaml:1: unknown key {typed} = '77'; did you mean " in message
        assert key in message.partition("did you mean ")[2].partition("?")[0], message


@pytest.mark.parametrize("section", [*SECTIONS, "model.rope_scaling", "data.sources[0]", "data.fallback[0]"])
def test_a_key_like_no_other_is_answered_with_all(
    section: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.yaml").write_bytes(as_yaml(f"{section}.qqqqqqqqqqqqqq", "1"))
    message = refused(["--config", str(tmp_path / "bad.yaml")], capsys)
    keys = [key for key in KEYS if key.rpartition(".")[0] == section.replace("[0]", "[]")]
    assert keys and all(key in message for key in keys)


def test_all_of_them_before_torch(tmp_path: Path) -> None:
    """In one process: whatever is wrong, nothing heavy is imported to say so."""
    given = [arguments for arguments, _ in ARGUMENTS.values()] + [[override] for override in MISTAKES]
    for number, (content, _) in enumerate(FILES.values()):
        (tmp_path / f"{number}.yaml").write_bytes(content)
        given.append(["--config", str(tmp_path / f"{number}.yaml")])
    assert len(given) >= 60
    program = """
import json, sys, time, train
slow, codes = [], set()
for arguments in json.load(sys.stdin):
    start = time.process_time()
    codes.add(train.main(arguments))
    slow += [arguments] * (time.process_time() - start > 2)
print(json.dumps([sorted(codes), slow, sorted({"torch", "numpy", "transformers", "datasets"} & set(sys.modules))]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], input=json.dumps(given), cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[2], [], []]
    assert done.stderr.count("\n") == len(given), "one line for each"
