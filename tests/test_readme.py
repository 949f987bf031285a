"""README.md held to the truth: its commands run or parse, and what it names (keys, flags, files, metrics) exists."""

from __future__ import annotations

import contextlib
import fnmatch
import io
import itertools
import json
import math
import re
import shlex
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import checkpoints
import config_table
import export
import fault_matrix
import inspect_data
import prepare_data
import pytest
import torch
import train_tokenizer

import checkpoint
import config
import generate
import memory
import parallel
import resume
import train
from counts import count_parameters, num_steps
from model import meta_model
from run import checkpoint_bytes

ROOT = Path(train.__file__).resolve().parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(?P<kind>[^\n]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
PROSE = FENCE.sub("", README)
SNIPPETS = [block["body"] for block in FENCE.finditer(README) if block["kind"] == "python"]
# What makes the quickstart short; what it prints and writes stays the same.
SHORT = (
    "train.steps=2", "train.batch_tokens=512", "train.micro_batch=2", "model.vocab_size=512", "eval.tokens=1",
    "sample.max_new_tokens=2", "log.every_steps=1", "data.workers=0",
)  # fmt: skip


def commands() -> list[list[str]]:
    """Every command of the shell blocks, in order, as words."""
    found = []
    for block in FENCE.finditer(README):
        if block["kind"] not in ("bash", "powershell"):
            continue
        for line in block["body"].replace("\\\n", " ").replace("\\", "/").splitlines():
            words = shlex.shlex(line.removeprefix("!"), posix=True, punctuation_chars="&;|")
            words.whitespace_split = True
            found.append([])
            for word in words:
                if set(word) <= set("&;|"):
                    found.append([])
                else:
                    found[-1].append(word)
    return [words for words in found if words]


COMMANDS = commands()


def section(title: str) -> str:
    """What stands under a heading, subsections included, without code blocks."""
    start = re.search(rf"^(#+) {re.escape(title)}$", PROSE, re.MULTILINE)
    assert start, f"README.md has no heading {title!r}"
    end = re.search(rf"^#{{1,{len(start[1])}}} ", PROSE[start.end() :], re.MULTILINE)
    return PROSE[start.end() :][: end.start() if end else None]


def first_cells(text: str) -> list[str]:
    """The first column of the tables, without their heads."""
    rows = re.findall(r"^\| ?(.*?) ?\|", text, re.MULTILINE)
    return [row for row, below in zip(rows, [*rows[1:], ""], strict=True) if not {row, below} & {"---", "--:"}]


def code(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", text)


def flags(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text))


def schema_keys() -> set[str]:
    return set(re.findall(r"^  ([\w.\[\]]+)(?: =|$)", config.describe(), re.MULTILINE))


class Quickstart(NamedTuple):
    folder: Path  # the working directory; the run is runs/quickstart in it
    output: str

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "quickstart"


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Quickstart:
    """The README's first training command, with SHORT behind it, in an empty directory."""
    folder, output = tmp_path_factory.mktemp("clone"), io.StringIO()
    command = next(words for words in COMMANDS if words[:2] == ["python", "train.py"])
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.chdir(folder)
        assert train.main([*command[2:], *SHORT]) == 0
    return Quickstart(folder, output.getvalue())


# --- commands ---


def check_train(words: list[str]) -> None:
    """They parse, and configuration and counts can be made; tests/test_plan.py has the default run's plan in full."""
    args = train.parse(words)
    settings = config.load(args.config, args.overrides)
    assert num_steps(settings, count_parameters(meta_model(settings.model))) > 0


def check_torchrun(words: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    given = get_args_parser().parse_args(words)
    assert given.training_script == "train.py"
    check_train(given.training_script_args)


def check_generate(words: list[str]) -> None:
    generate.parse_arguments(words)


def check_export(words: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "export", lambda *_, **__: None)
        assert export.main(words) == 0


def check_script(script: ModuleType, does: str) -> Callable[[list[str]], None]:
    """They parse and the configuration loads; `does` is what would do the work."""

    def check(words: list[str]) -> None:
        seen: list[Any] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(script, does, lambda given, *_: seen.append(given) or (None, None))
            patch.setattr(script, "stats", lambda *_: 0, raising=False)
            for command in ("peek", "trace"):
                patch.setattr(script, command, lambda *_: 0, raising=False)
            patch.setattr(script, "Doctor", lambda *_: SimpleNamespace(run=lambda: 0), raising=False)
            assert script.main(words) == 0
        config.load(seen[0].config, seen[0].overrides)

    return check


def check_checkpoints(words: list[str]) -> None:
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("listing", "verify", "prune"):
            patch.setattr(checkpoints, name, lambda *_, name=name: seen.append(name) or 0)
        patch.setattr(checkpoints, "folder_of", lambda path: path)
        assert checkpoints.main(words) == 0
    assert seen == [words[0].replace("list", "listing")]


def check_pip(words: list[str]) -> None:
    assert words[0] == "install"
    assert all((ROOT / name).is_file() for option, name in itertools.pairwise(words) if option == "-r")
    assert all(word == parallel.TORCH_RANGE for word in words if word.startswith("torch"))


def check_nothing(words: list[str]) -> None:
    """Not ours."""


def check_cp(words: list[str]) -> None:
    assert (ROOT / words[0]).is_file()


PROGRAMS: dict[str, Callable[[list[str]], None]] = {
    "python train.py": check_train,
    "python generate.py": check_generate,
    "python scripts/checkpoints.py": check_checkpoints,
    "python scripts/export.py": check_export,
    "python scripts/fault_matrix.py": fault_matrix.parse,
    "python scripts/inspect_data.py": check_script(inspect_data, "_open"),
    "python scripts/prepare_data.py": check_script(prepare_data, "prepare"),
    "python scripts/train_tokenizer.py": check_script(train_tokenizer, "make"),
    "python -m": check_nothing,
    "torchrun": check_torchrun,
    "pytest": check_nothing,
    "pip": check_pip,
    "cp": check_cp,
    "git": check_nothing,
    "%cd": check_nothing,
    ".": check_nothing,
    ".venv/Scripts/activate": check_nothing,
    "nvidia-smi": check_nothing,
}


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_parses(words: list[str]) -> None:
    length = 2 if words[0] == "python" else 1
    program = " ".join(words[:length])
    assert program in PROGRAMS, f"{program}: say in PROGRAMS how it is checked"
    PROGRAMS[program](words[length:])


def test_the_commands_that_ci_runs_are_marked() -> None:
    names = re.findall(r"\breadme ([a-z]+)", (ROOT / ".ci" / "run").read_text(encoding="utf-8"))
    assert set(names) == set(re.findall(r"^<!-- ci:(\w+) -->$", README, re.MULTILINE))
    for name in names:
        assert len(re.findall(rf"^<!-- ci:{name} -->\n```bash\n\S", README, re.MULTILINE)) == 1


def test_the_quickstart_prints_what_is_shown(quickstart: Quickstart) -> None:
    (shown,) = (block["body"] for block in FENCE.finditer(README) if block["kind"] == "text")
    lines = iter(quickstart.output.splitlines())
    for line in shown.splitlines():
        for prompt in config.load("quickstart").sample.prompts:
            line = f"{prompt}..." if line.startswith(prompt) else line  # what follows is drawn
        parts = re.split(r"(\.\.\.|\d[\w.,]*(?:-\d+)?%?)", line.replace("fp32 on CPU", "... on CPU"))
        shapes = [".*" if part == "..." else r"\d[\w.,]*(?:-\d+)?%?" for part in parts[1::2]]
        pattern = "".join(itertools.chain(*itertools.zip_longest(map(re.escape, parts[::2]), shapes, fillvalue="")))
        assert any(re.fullmatch(pattern, printed) for printed in lines), f"{line}\nnot in\n{quickstart.output}"


def test_sampling_and_exporting(
    quickstart: Quickstart, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The README's commands for it, in order, on what the quickstart left."""
    monkeypatch.chdir(quickstart.folder)
    Path("prompts.txt").write_text("Emma\nMr. Darcy\n", encoding="utf-8")
    for words in COMMANDS:
        if "OWNER/NAME" in words:
            continue  # tests/test_mirror.py has it, with a Hub
        if words[:2] == ["python", "generate.py"]:
            assert generate.main([*words[2:], "--max-new-tokens", "2"]) == 0, words
            assert "Emma" in (printed := capsys.readouterr().out) or "truth" in printed
        elif words[:2] == ["python", "scripts/export.py"]:
            assert export.main(words[2:]) == 0, words
    assert {path.name for path in Path("exported").iterdir()} >= {"model.safetensors", "config.json", "tokenizer.json"}


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet.splitlines()[0])
def test_a_snippet_runs(
    quickstart: Quickstart, snippet: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    last = config.load("quickstart").train.steps
    assert set(re.findall(r"step_\d+", snippet)) <= {f"step_{last:08d}"}
    newest = checkpoint.latest(quickstart.run / "checkpoints")
    assert newest is not None
    monkeypatch.chdir(quickstart.folder)
    names: dict[str, object] = {}
    exec(snippet.replace(f"step_{last:08d}", newest.name), names)  # noqa: S102
    assert type(names["model"]).__name__ in ("DeepseekV3ForCausalLM", "DeepSeekV3")
    assert capsys.readouterr().out.strip()


def test_there_are_two_snippets() -> None:
    assert [re.search(r"^(?:import|from) (\w+)", snippet, re.MULTILINE)[1] for snippet in SNIPPETS] == [  # type: ignore[index]
        "generate", "transformers",
    ]  # fmt: skip


# --- names ---


def test_keys_exist() -> None:
    sections = "|".join(config.Config.model_fields)
    named = {match[1] for span in code(PROSE) if (match := re.fullmatch(rf"((?:{sections})\.\w+)(=.*)?", span))}
    named = {key for key in named if not (ROOT / key).exists()}  # train.py, data.py
    assert len(named) > 30 and named <= schema_keys(), named - schema_keys()


def help_of(start: Callable[[list[str]], object], capsys: pytest.CaptureFixture[str]) -> set[str]:
    with pytest.raises(SystemExit) as stop:
        start(["--help"])
    assert stop.value.code == 0
    return flags(capsys.readouterr().out) - {"--help"}


def test_flags_are_those_of_the_programs(capsys: pytest.CaptureFixture[str]) -> None:
    training, sampling, exporting = (
        help_of(start, capsys) for start in (train.parse, generate.parse_arguments, export.main)
    )
    assert flags(" ".join(first_cells(section("Configuration")))) == training
    assert flags(" ".join(first_cells(section("Generate")))) == sampling
    assert flags(section("Use the model elsewhere")) == exporting
    assert flags(PROSE) <= training | sampling | exporting | help_of(fault_matrix.parse, capsys) | {"--help"}


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="signals of POSIX")
def test_exit_codes() -> None:
    """As on Linux; SIGUSR1 has another number elsewhere."""
    codes = [int(number) for number in re.findall(r"\b\d+\b", train.EXIT_CODES)]
    on_linux = sorted(138 if code == 128 + signal.SIGUSR1 else code for code in codes)
    assert [int(cell) for cell in first_cells(section("Exit codes"))] == on_linux
    assert f"{128 + signal.SIGUSR1} stopped by SIGUSR1" in train.EXIT_CODES


def test_what_may_change_on_resume() -> None:
    bullet = re.search(r"^- May change: (.*?)^- ", section("Resume"), re.MULTILINE | re.DOTALL)
    assert bullet
    named = {span for span in code(bullet[1]) if span not in ("auto", "epochs")}
    compared = {"data.sources", "train.precision"}  # by what they come to
    assert named == {*resume.FREE_SECTIONS, *resume.FREE_KEYS, *compared}


def test_metrics_are_those_of_a_run(quickstart: Quickstart) -> None:
    written = set()
    for line in (quickstart.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        metrics = json.loads(line)
        written |= metrics.keys() | {key for layer in metrics["experts"] for key in layer}
    named = [name for cell in first_cells(section("Metrics")) for name in code(cell)]
    hub = {"hub_pushed_step", "hub_lag_steps", "hub_lag_sec", "hub_error"}  # tests/test_mirror.py has them
    assert sorted(named) == sorted(written | hub | {"packing_used", "packing_cropped", "cut_short"})


def test_files_are_those_of_a_run(quickstart: Quickstart) -> None:
    cells = first_cells(section("What a run writes").partition("### Metrics")[0])
    patterns = [name.rstrip("/").replace("step_XXXXXXXX", "step_*") for cell in cells for name in code(cell)]
    newest = checkpoint.latest(quickstart.run / "checkpoints")
    assert newest is not None
    files = [path.relative_to(quickstart.run).as_posix() for path in quickstart.run.iterdir() if path.is_file()]
    files += [f"checkpoints/{newest.name}", *(path.name for path in newest.iterdir())]
    for name in files:
        assert any(fnmatch.fnmatch(name, pattern) for pattern in patterns), name
    for pattern in patterns:
        assert fnmatch.filter(files, pattern), pattern


def anchors(path: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", PROSE)
    assert {"LICENSE", "CONTRIBUTING.md", "LOG.md", "configs/README.md", ".env.example"} <= set(links)
    for link in links:
        if not link.startswith("https://"):
            name, _, anchor = link.partition("#")
            path = ROOT / (name or "README.md")
            assert path.exists(), link
            assert not anchor or anchor in anchors(path), link


def test_reading_order_has_every_module() -> None:
    links = re.findall(r"^\| \[(.+?)\]\((.+?)\) \|", section("Reading order"), re.MULTILINE)
    assert all(text == target for text, target in links)
    files = [*ROOT.glob("*.py"), *ROOT.glob("scripts/*.py")]
    assert sorted(target for _, target in links) == sorted(path.relative_to(ROOT).as_posix() for path in files)


def test_presets_are_named_as_they_are() -> None:
    presets = {path.stem for path in config.CONFIGS.glob("*.yaml")}
    sizes = {span for span in code(PROSE) if re.fullmatch(r"\d+[mb]", span)}
    assert sizes and sizes <= presets


# --- numbers ---


def test_derived_numbers() -> None:
    """Counts and sizes; anything measured would need its file in benchmarks/."""
    settings, mini = config.load("mini"), config_table.figures("mini")
    model = settings.model
    for number in (f"{mini.total:,} parameters", f"({mini.total + mini.mtp:,} with its MTP layer)"):
        assert number in PROSE
    assert f"from {config_table.figures('quickstart').total / 1e6:.0f} million parameters up" in PROSE
    ran = json.loads((ROOT / "benchmarks" / "quickstart-amd-epyc-2-threads-avx2.json").read_text(encoding="utf-8"))
    for number in (f"{ran['tokens'] / 1e6:.2f} million tokens", f"{ran['val_bpb']:.2f} bits per byte"):
        assert number in PROSE
    assert f"in {ran['wall_sec']} seconds" in " ".join(PROSE.split())
    latent = model.kv_lora_rank + model.qk_rope_head_dim
    plain = model.num_attention_heads * (model.qk_head_dim + model.v_head_dim)
    prose = " ".join(PROSE.split())
    assert f"{latent} numbers per token and layer" in prose
    assert f"would keep {plain:,}: {plain / latent:.1f} times less, {2 * latent} bytes in bf16" in prose
    size = checkpoint_bytes(settings, meta_model(model))
    assert f"A checkpoint of `mini` has about {size / 1e9:.0f} GB" in PROSE


def test_the_estimate_for_mini() -> None:
    """Without recomputation not even a T4's 15 GiB hold it. That it fits 12 GB as it is: tests/test_plan.py."""
    settings = config.load("mini", ["train.recompute=none"])
    assert memory.peak(settings, dtype=torch.float16, rows=settings.micro_rows).total > 15 * 2**30
    for override in ("train.micro_batch=1", "train.micro_batch=auto", "train.recompute=none"):
        assert f"`{override}`" in PROSE


# --- figures ---


def test_what_was_survived() -> None:
    folder = ROOT / "benchmarks"
    stored = json.loads((folder / "faults-amd-epyc-2-threads-avx512-with-bf16.json").read_text(encoding="utf-8"))
    rows = {row["fault"]: row for row in stored["rows"]}
    assert rows.keys() == set(fault_matrix.FAULTS)
    told = " ".join(README.split())
    for row in rows.values():
        assert row["tried"] == row["survived"] > 0 and not row["failed"] and "unfinished" not in row, row["fault"]
    figures = {name: row["figures"] for name, row in rows.items()}
    for claim in (
        f"{rows['F1']['tried']} deaths in saves", f"{figures['F2']['kills']} kills at random",
        f"{rows['F9']['tried']} signals", f"{rows['F6']['tried']:,} bits flipped in files",
        f"{figures['F11']['stops']} stops in {figures['F11']['combinations']} set-ups",
        f"died {figures['Colab']['deaths']} times in {figures['Colab']['steps']:,} steps",
        f"kept {figures['Colab']['goodput']:.1%} of its work, and ended with the bits",
        f"{stored['overhead']['percent']:g}% of its tokens per second",
        f"waits for saves {stored['overhead']['stall, percent']:.1g}% of the time",
    ):  # fmt: skip
        assert claim in told, claim


def measured(suite: str, shape: str, machine: str) -> list[dict]:
    path = ROOT / "benchmarks" / f"{suite}-{shape}-amd-epyc-2-threads-{machine}.json"
    if not path.exists():
        return []
    return [row for row in json.loads(path.read_text(encoding="utf-8"))["rows"] if "left_out" not in row]


def table_of_figures() -> list[str]:
    """What the README's table has to say, from the files."""
    columns = (
        ("quickstart", "avx2"), ("55m", "avx2"), ("105m", "avx2"), ("quickstart", "avx512-with-bf16"),
        ("55m", "avx512-with-bf16"), ("105m", "avx512-with-bf16"),
    )  # fmt: skip

    def times(suite: str, column: tuple[str, str]) -> str:
        best: dict[str, float] = {}
        for row in measured(suite, *column):
            who = row["name"].split()[0]
            best[who] = min(best.get(who, math.inf), row["times_first"])
        if not best:
            return ""
        return f"{best['transformers'] / (best['ours'] if suite == 'generate' else 1):.2f}"

    def row(title: str, suite: str) -> str:
        return f"| {title} | {' | '.join(times(suite, each) for each in columns)} |"

    return [
        "| | quickstart, fp32 | 55m, fp32 | 105m, fp32 | quickstart, bf16 | 55m, bf16 | 105m, bf16 |",
        "|---|--:|--:|--:|--:|--:|--:|",
        row("time of a training step, theirs over ours", "step"),
        row("its peak of memory, theirs over ours", "memory"),
        row("time of greedy generation, theirs over ours", "generate"),
    ]


def test_the_supply_of_data_is_that_of_the_file() -> None:
    table = README.partition("<!-- table: benchmarks/data -->\n")[2].partition("\n<!-- end of table -->")[0]
    rows = {row["name"]: row for row in measured("data", "quickstart", "avx2")}
    rates = {name: row["tokens_per_sec"] for name, row in rows.items() if "tokens_per_sec" in row}
    lines = [f"| {name} | {rate / 1e6:.2g} million |" for name, rate in rates.items()]
    assert table.splitlines() == ["| | tokens per second |", "|---|--:|", *lines]
    fast, plain = (rows[f"{backend} alone"]["mb_per_sec"] for backend in ("fastokens", "tokenizers"))
    assert f"encodes {fast:.2g} MB/s, and tokenizers {plain:.2g}:" in README


def test_figures_are_those_of_the_files() -> None:
    table = README.partition("<!-- table: benchmarks/ -->\n")[2].partition("\n<!-- end of table -->")[0]
    assert table.splitlines() == table_of_figures()
