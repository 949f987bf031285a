"""Keys, typing errors and YAML: what `options` does whatever the keys mean, tried through the real schema."""

import random
import re
import string
import time
from functools import cache
from pathlib import Path

import pytest

import config
from options import MAX_FILE_BYTES, Schema, UserError, dump

SCHEMA = Schema(config.Config)
KEYS = [key for key in SCHEMA.keys if key not in SCHEMA.sections and "[]" not in key]


@cache
def edits(a: str, b: str) -> int:
    """Insertions, deletions, replacements and exchanges of neighbours, by the definition."""
    if not a or not b:
        return len(a) + len(b)
    if a[0] == b[0]:
        return edits(a[1:], b[1:])
    swapped = [edits(a[2:], b[2:])] if a[:2] == b[1::-1] and len(b) > 1 else []
    return 1 + min(edits(a[1:], b), edits(a, b[1:]), edits(a[1:], b[1:]), *swapped)


def typo(key: str, rng: random.Random) -> str:
    """One or two characters inserted, dropped or replaced, or two neighbours exchanged."""
    letters = string.ascii_lowercase + "_"
    if rng.random() < 0.3:
        i = rng.randrange(len(key) - 1)
        return key[:i] + key[i + 1] + key[i] + key[i + 2 :]
    for _ in range(rng.randint(1, 2)):
        i, letter = rng.randrange(len(key)), rng.choice(letters)
        key = rng.choice([key[:i] + letter + key[i:], key[:i] + key[i + 1 :], key[:i] + letter + key[i + 1 :]])
    return key


def refused(tmp_path: Path, text: str) -> str:
    file = tmp_path / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as failure:
        config.load(str(file))
    return str(failure.value)


@pytest.mark.parametrize("key", KEYS)
def test_a_typing_error_names_the_key_meant(key: str) -> None:
    rng = random.Random(key)
    for typed in {typo(key, rng) for _ in range(5)} - set(SCHEMA.keys):
        message = str(SCHEMA.unknown(typed, "'1'", "command line"))
        offered = re.split(", | or ", message.partition("did you mean ")[2].partition("?")[0])
        assert f"unknown key {typed} = '1'" in message
        assert key in offered or all(edits(typed, other) < edits(typed, key) for other in offered), message


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("train.lr", "optim.lr"),
        ("optim.steps", "train.steps"),
        ("seq_len", "data.seq_len"),
        ("trian.stesp", "train.steps"),
        ("run.seed", "train.seed"),
        ("model.rope_scaling.facto", "model.rope_scaling.factor"),
        ("optim.learning_rate", "optim.lr"),
        ("model.num_layers", "did you mean model.num_hidden_layers or model.num_nextn_predict_layers?"),
        ("model.n_experts", "model.n_routed_experts, model.n_shared_experts or model.num_experts_per_tok?"),
        ("model.heads", "did you mean model.num_attention_heads?"),
        ("log.steps", "did you mean log.every_steps?"),
        ("train.batch_size", "train.batch_tokens"),
        ("model.d_model", "model.hidden_size"),
        ("nothing.like_it", "checkpoint"),
    ],
)
def test_keys_further_off(typed: str, meant: str) -> None:
    with pytest.raises(UserError, match=re.escape(meant)):
        config.load("mini", [f"{typed}=1"])


def test_a_typing_error_in_a_file_names_line_and_key(tmp_path: Path) -> None:
    message = refused(tmp_path, "train:\n  seed: 1\n  setps: 3\n")
    assert message.endswith(
        "mine.yaml:3: unknown key train.setps = '3'; did you mean train.steps? It is an integer >= 1, or null"
    )
    assert "did you mean train?" in refused(tmp_path, "trian:\n  seed: 1\n")
    assert "data.sources[0].pth" in refused(tmp_path, "data:\n  sources:\n  - pth: a.txt\n")
    assert "data.sources[].path" in refused(tmp_path, "data:\n  sources:\n    pth: a.txt\n")


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "0.001", "1.0e-3", ".001", "+1e-3", "1_0e-4"])
def test_numbers_as_people_write_them(text: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"optim:\n  lr: {text}\n")
    assert config.load(str(file)).optim.lr == config.load("mini", [f"optim.lr={text}"]).optim.lr == 1e-3


@pytest.mark.parametrize(
    "text", ["yes", "on", "no", "2024-01-01", "1e5", "007", "true", "0x1F", "12e4567", "1_000", "12"]
)
def test_text_stays_as_written(text: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        f"run:\n  name: {text}\ndata:\n  sources:\n    path: a\n    revision: {text}\nsample:\n  prompts: [{text}]\n"
    )
    read = config.load(str(file))
    assert read.run.name == read.data.sources[0].revision == read.sample.prompts[0] == text
    assert config.load("mini", [f"run.name={text}"]).run.name == text


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("data.sources=*.txt", "*.txt"),
        ("data.sources=C:\\texts\\a.txt", "C:\\texts\\a.txt"),
        ("data.sources=[a.txt, {path: b, name: c}]", "a.txt"),
        ("data.sources={path: x, split: test}", "x"),
        ('data.sources="quoted.txt"', "quoted.txt"),
        ("data.sources=a=b.txt", "a=b.txt"),
    ],
)
def test_sources_on_the_command_line(override: str, value: str) -> None:
    assert config.load("mini", [override]).data.sources[0].path == value


def test_overrides_apply_in_order_and_nest() -> None:
    read = config.load(
        "mini", ["train.steps=5", "train.steps=7", "model.rope_scaling.factor=4", "model.q_lora_rank=null"]
    )
    assert (read.train.steps, read.model.q_lora_rank) == (7, None)
    assert read.model.rope_scaling == config.YarnConfig(factor=4)
    assert config.load("mini", ["train.steps=", "train.init_from=", "run.name="]).run.name == "mini"
    assert config.load("mini", ["sample.prompts=Question: why", "sample.prompts=[]"]).sample.prompts == ()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train:\n  seed: 1\n  seed: 2\n", "mine.yaml:3: train.seed is given twice; the first is at"),
        ("train: {}\ntrain: {}\n", "mine.yaml:2: train is given twice"),
        ("sample:\n  prompts: &a [x]\nrun:\n  name: *a\n", "mine.yaml:4: is not valid YAML: aliases"),
        ("train:\n\tseed: 1\n", "mine.yaml:2: is not valid YAML: found character '\\t'"),
        ("train: [1\n", "is not valid YAML"),
        ("train:\n  seed: 1\n seed: 2\n", "mine.yaml:3: is not valid YAML"),
        ("- 1\n- 2\n", "holds [1, 2] in place of sections (run, model,"),
        ("hello\n", "holds 'hello' in place of sections"),
        ("train: 3\n", "mine.yaml:1: train = 3 must be a mapping with the keys steps,"),
        ("--- {}\n--- {}\n", "mine.yaml:2: is not valid YAML: but found another document"),
        ("? [a]\n: 1\n", "mine.yaml:1: a key must be a word"),
        ("train:\n  seed: !!python/object/apply:os.getcwd []\n", "mine.yaml:2: train.seed"),
        ("train:\n  seed: !!python/name:os.getcwd ''\n", "tags are not supported"),
        ("train:\n  seed: !!int abc\n", "mine.yaml:2: train.seed = 'abc' is not a number one can read"),
        (f"train:\n  seed: {'9' * 5000}\n", "mine.yaml:2: train.seed = '999"),
        ("train:\n  seed: " + "[" * 20000 + "\n", "mine.yaml:2: is not valid YAML: it is nested too deeply"),
        ("train:\n  seed: " + "[" * 100 + "]" * 100 + "\n", "mine.yaml:2: is not valid YAML: it is nested too deeply"),
        ('run:\n  dir: "a\\0b"\n', "mine.yaml:2: run.dir = 'a\\x00b' holds a character"),
        ('run:\n  dir: "\\ud800"\n', "holds a character"),
        ("run:\n  dir: \x07\n", "is not valid YAML: special characters are not allowed"),
        ("<<: {train: {seed: 1}}\n", "unknown key <<"),
        ("%YAML 9.9 9\n---\n{}\n", "is not valid YAML"),
        ('"\\e[31m": 1\n', "unknown key '\\x1b[31m' = '1'"),
        ("x" * (MAX_FILE_BYTES + 1), f"is larger than {MAX_FILE_BYTES} bytes"),
    ],
)
def test_files_that_are_refused(text: str, words: str, tmp_path: Path) -> None:
    start = time.process_time()
    message = refused(tmp_path, text)
    assert words in message and message.isprintable() and len(message) < 700
    assert time.process_time() - start < 2


def test_an_alias_bomb_is_refused_at_once(tmp_path: Path) -> None:
    lines = ["sample:", "  prompts:", "  - &a0 x"]
    lines += [f"  - &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    assert "aliases (*name) are not supported" in refused(tmp_path, "\n".join(lines))


def test_the_largest_file_is_read_in_time(tmp_path: Path) -> None:
    lines = "sample:\n  prompts:\n" + "  - some words to begin with\n" * ((MAX_FILE_BYTES - 30) // 29)
    start = time.process_time()
    assert "unknown key" in refused(tmp_path, lines + "a: 1\n")
    assert time.process_time() - start < 2


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes(b"run:\n  name: \xff\n")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        config.load(str(file))
    file.write_bytes(b"\xef\xbb\xbfrun:\r\n  name: windows\r\n")
    assert config.load(str(file)).run.name == "windows"


def test_empty_sections_mean_the_defaults_and_an_empty_file_a_mistake(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("# nothing\ntrain:\n")
    assert config.load(str(file)) == config.Config(run=config.RunConfig(name="mine", dir="runs/mine"))
    for nothing in ("", "# nothing\n", "null\n"):
        file.write_text(nothing)
        with pytest.raises(UserError, match="is empty; for the defaults"):
            config.load(str(file))


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    file = tmp_path / "again.yaml"
    rng = random.Random(0)
    odd = [
        "1e5",
        "yes",
        "~",
        "null",
        "a: b",
        "#",
        "- x",
        "*a",
        "!t",
        "é\u2028 \x85",
        "\x1b[0m",
        "a\nb\n\n",
        " ",
        "",
        "1e-3",
        "\U0001f600",
    ]
    odd += ["".join(rng.choices(string.printable, k=30)) for _ in range(50)]
    prompts = config.SampleConfig(prompts=tuple(odd))
    model = config.ModelConfig(rope_scaling=config.YarnConfig(factor=1.5), q_lora_rank=None, initializer_range=1e-17)
    original = config.Config(run=config.RunConfig(name="1e5", dir="x ~"), model=model, sample=prompts)
    file.write_text(dump(original), encoding="utf-8", newline="")
    assert config.load(str(file)) == original
    assert dump(config.load(str(file))) == dump(original)
