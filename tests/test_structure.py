"""The layout's rules (budgets, who may import whom, what may not be used), each shown to fail on a bad example.

A rule takes a `File` and yields complaints. Most read the syntax tree and import nothing of the project.
"""

from __future__ import annotations

import ast
import fnmatch
import functools
import importlib.metadata
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent

# Who may import whom: modules of the rows above one's own, and the neighbours named below. A new module gets its row
# here and its line under "Reading order" in the README.
LAYERS = (
    ("options", "config", "text", "tracker", "signals"),  # standard library, pydantic, yaml
    ("remote", "environment", "ops", "triton_ops", "losses", "tokenizer", "foreign", "checkpoint"),  # receive values
    (
        "model",
        "documents",
        "sources",
        "shards",
        "packing",
        "stream",
        "feeder",
        "data",
        "convert",
        "card",
        "hub",
        "pusher",
    ),
    ("counts", "profiling", "parallel", "optim", "evals", "metrics", "resume", "dataset", "saver"),
    ("generate", "probe", "memory", "run"),
    ("plan", "journal", "mirror"),
    ("train",),
)
NEIGHBOURS = {  # rooms split off a module, and what is built from its neighbour
    ("config", "options"),
    ("text", "options"),
    ("config", "text"),
    ("tracker", "text"),
    ("checkpoint", "foreign"),
    ("tokenizer", "remote"),
    ("documents", "shards"),  # inside a function: the shards are read like the rest
    ("shards", "documents"),
    ("sources", "documents"),
    ("sources", "shards"),
    ("stream", "documents"),
    ("stream", "packing"),
    ("stream", "shards"),
    ("feeder", "stream"),
    ("data", "documents"),
    ("data", "feeder"),
    ("data", "stream"),
    ("dataset", "resume"),
    ("ops", "triton_ops"),
    ("losses", "ops"),
    ("evals", "parallel"),
    ("pusher", "card"),
    ("pusher", "hub"),
}
ROW = {module: row for row, modules in enumerate(LAYERS) for module in modules}
LIGHT = sys.stdlib_module_names | {"__future__", "pydantic", "yaml"}  # what row 0 may import when it is imported

MAX_MODULE_LINES = 600
MAX_FUNCTION_LINES = 80
LONGER_FUNCTIONS = {("train.py", "train"): 150}  # the table of contents of the project

MAY_USE_DISTRIBUTED = {"parallel.py", "checkpoint.py", "optim.py"}
MAY_READ_ENVIRONMENT = {"parallel.py", "environment.py", "train.py"}
MAY_PARSE_ARGUMENTS = {"generate.py", "options.py", "train.py"}
OPTIONAL = {"wandb", "mlflow", "tensorboard", "triton", "liger_kernel"}  # each is imported in one place
NEEDS_TRITON = {"triton_ops"}  # cannot be imported without it, so nobody imports these when imported themselves
POSIX_ONLY = {"fcntl", "resource", "termios", "tty", "pty", "pwd", "grp", "posix", "syslog"}
PICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "jsonpickle", "joblib", "marshal", "shelve"}
PICKLING = {  # torch's distributed checkpoint keeps its metadata as a pickle
    "torch.save", "torch.load", "torch.package", "torch.serialization", "torch.distributed.checkpoint",
    "torch.jit.load", "torch.jit.save", "torch.hub", "pandas.read_pickle", "pd.read_pickle", "yaml.unsafe_load",
    "yaml.full_load", "yaml.Loader", "yaml.FullLoader", "yaml.UnsafeLoader",
}  # fmt: skip
WRITTEN_ONLY = {"YarnConfig.type"}  # what consumers of the checkpoint tell extensions apart by
SCRIPT_ROOMS = {"duels", "bench_layers", "bench_data", "config_table"}  # what scripts share
VAGUE = {"utils", "util", "common", "helpers", "misc"}


class File(NamedTuple):
    """A file by its path from the root, with forward slashes."""

    path: str
    text: str

    @property
    def tree(self) -> ast.Module:
        return _parse(self.text)

    @property
    def module(self) -> str:
        """The name of a top-level module; empty for scripts and tests."""
        return "" if "/" in self.path else PurePosixPath(self.path).stem

    @property
    def is_test(self) -> bool:
        return self.path.startswith("tests/")

    @property
    def is_script(self) -> bool:
        return self.path.startswith("scripts/")


class Import(NamedTuple):
    module: str  # a dotted name
    names: tuple[str, ...]  # what `from module import` takes; empty for `import module`
    line: int
    lazy: bool  # not when the file itself is imported: in a function, or for types only

    @property
    def root(self) -> str:
        return self.module.partition(".")[0]


Rule = Callable[[File], Iterator[str]]


@functools.cache
def _parse(text: str) -> ast.Module:
    return ast.parse(text)


def _imports(node: ast.AST, lazy: bool = False) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, (), child.lineno, lazy)
        elif isinstance(child, ast.ImportFrom):
            yield Import(child.module or ".", tuple(alias.name for alias in child.names), child.lineno, lazy)
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            for_types = isinstance(child, ast.If) and _dotted(child.test) == "TYPE_CHECKING"
            yield from _imports(child, lazy or inside or for_types)


def _dotted(node: ast.AST) -> str:
    """`a.b.c` of nested attributes; the part that is no name stays empty."""
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _uses(file: File) -> Iterator[tuple[str, int]]:
    """Every dotted name that a file imports or reads, with its line."""
    for found in _imports(file.tree):
        yield found.module, found.line
        for name in found.names:
            yield f"{found.module}.{name}", found.line
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Attribute):
            yield _dotted(node), node.lineno


# --- rules for one file ---


def short_module(file: File) -> Iterator[str]:
    if (lines := len(file.text.splitlines())) > MAX_MODULE_LINES:
        yield f"{file.path}: {lines} lines, at most {MAX_MODULE_LINES}; split it along a noun"


def short_functions(file: File) -> Iterator[str]:
    for node in ast.walk(file.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            budget = LONGER_FUNCTIONS.get((file.path, node.name), MAX_FUNCTION_LINES)
            if lines > budget:
                yield f"{file.path}:{node.lineno}: {node.name} has {lines} lines, at most {budget}"


def layers(file: File) -> Iterator[str]:
    """Modules import from the rows above, scripts anything but train; nobody train, tests, scripts (but rooms)."""
    if file.is_test:
        return
    if file.module and file.module not in ROW:
        yield f"{file.path}: give it a row in LAYERS"
        return
    for found in _imports(file.tree):
        at, target = f"{file.path}:{found.line}", found.root
        if file.is_script and target in SCRIPT_ROOMS:
            continue
        if target in ("train", "scripts", "tests", "conftest") or target.startswith("test_") or target in _scripts():
            yield f"{at}: nobody imports {target}"
        elif file.module and target in ROW and target != file.module:
            own, other = ROW[file.module], ROW[target]
            if other > own or (other == own and (file.module, target) not in NEIGHBOURS):
                yield f"{at}: {file.module} (row {own}) may not import {target} (row {other})"


def values_not_config(file: File) -> Iterator[str]:
    """Row 1 receives values: it may know a section's type or UserError, never the whole configuration."""
    if ROW.get(file.module) == 1:
        for name, line in _uses(file):
            if name in ("config.Config", "config.load"):
                yield f"{file.path}:{line}: {file.module} takes values, not {name}"


def light_first_row(file: File) -> Iterator[str]:
    """A mistake in the configuration is answered before torch is imported."""
    if ROW.get(file.module) == 0:
        for found in _imports(file.tree):
            if not found.lazy and found.root not in LIGHT and found.root not in ROW:
                yield f"{file.path}:{found.line}: {file.module} may not import {found.root} when it is imported"


def optional_lazily(file: File) -> Iterator[str]:
    """What may be missing is imported in functions. Kernels need Triton when they are defined: so does their module."""
    if file.path != "triton_ops.py":
        for found in _imports(file.tree):
            if found.root in OPTIONAL | NEEDS_TRITON and not found.lazy:
                yield f"{file.path}:{found.line}: import {found.root} in the function that needs it, behind a check"


def distributed_at_home(file: File) -> Iterator[str]:
    if not file.is_test and file.path not in MAY_USE_DISTRIBUTED:
        for name, line in _uses(file):
            if f"{name}.".startswith("torch.distributed."):
                yield f"{file.path}:{line}: {name} belongs in {', '.join(sorted(MAY_USE_DISTRIBUTED))}"


def environment_at_home(file: File) -> Iterator[str]:
    if file.module and file.path not in MAY_READ_ENVIRONMENT:
        for name, line in _uses(file):
            if name in ("os.environ", "os.environb", "os.getenv", "os.putenv", "os.unsetenv"):
                yield f"{file.path}:{line}: {name} belongs in {', '.join(sorted(MAY_READ_ENVIRONMENT))} or a script"


def arguments_at_home(file: File) -> Iterator[str]:
    if not file.is_script and file.path not in MAY_PARSE_ARGUMENTS:
        for name, line in _uses(file):
            if name in ("argparse", "optparse", "getopt"):
                yield f"{file.path}:{line}: {name} belongs in {', '.join(sorted(MAY_PARSE_ARGUMENTS))} or a script"


def no_pickle(file: File) -> Iterator[str]:
    """Nothing that runs code from a file. Tests may: they show what a pickle is answered with."""
    if file.is_test:
        return
    for name, line in _uses(file):
        if name.partition(".")[0] in PICKLERS or any(f"{name}.".startswith(f"{p}.") for p in PICKLING):
            yield f"{file.path}:{line}: {name} reads or writes pickles; use safetensors or JSON"
    for node in ast.walk(file.tree):
        if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "trust_remote_code"):
            off = isinstance(node.value, ast.Constant) and node.value.value is False
            if not off:
                yield f"{file.path}:{node.value.lineno}: {node.arg} other than False runs what a file brings"
        if isinstance(node, ast.Call) and _dotted(node.func) in ("np.load", "numpy.load") and len(node.args) > 2:
            yield f"{file.path}:{node.lineno}: allow_pickle without its name"
        for key in node.keys if isinstance(node, ast.Dict) else ():
            if isinstance(key, ast.Constant) and key.value in ("allow_pickle", "trust_remote_code"):
                yield f"{file.path}:{key.lineno}: {key.value} in a mapping hides from this rule"


def portable(file: File) -> Iterator[str]:
    for found in _imports(file.tree):
        if found.root in POSIX_ONLY and not found.lazy:
            yield f"{file.path}:{found.line}: {found.root} is not on Windows; import it in the function that needs it"


def no_secrets_or_places(file: File) -> Iterator[str]:
    """No token, and no path of the machine it was written on."""
    places = r"(?<![\w.:/~-])/(?:home|root|tmp|Users|work|private)/\w", r"\b[A-Z]:\\Users\\"
    for what, pattern in (("a token", r"\bhf_[A-Za-z0-9]{20,}"), *(("a machine's path", place) for place in places)):
        for match in re.finditer(pattern, file.text):
            line = file.text.count("\n", 0, match.start()) + 1
            yield f"{file.path}:{line}: {what}: {match[0][:6]}..."


RULES: tuple[Rule, ...] = (
    short_module, short_functions, layers, values_not_config, light_first_row, optional_lazily, distributed_at_home,
    environment_at_home, arguments_at_home, no_pickle, portable,
)  # fmt: skip


# --- rules for all files ---


def dead_options(schema: File, others: list[File]) -> Iterator[str]:
    """Every key of the configuration is read somewhere, off something that is called as its section or a config.

    `paths` are an OpsConfig whose choices are made.
    """
    read: dict[str, set[str]] = {}
    for file in others:
        for node in ast.walk(file.tree):
            if isinstance(node, ast.Attribute):
                read.setdefault(node.attr, set()).add(_dotted(node.value).rpartition(".")[2])
    for section in schema.tree.body:
        if isinstance(section, ast.ClassDef) and any(_dotted(base) == "Section" for base in section.bases):
            owner = section.name.removesuffix("Config").lower()
            for item in section.body:
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                    key = item.target.id
                    used = read.get(key, set()) & {owner, "config", "cfg", "paths"}
                    if not used and f"{section.name}.{key}" not in WRITTEN_ONLY:
                        yield f"{schema.path}:{item.lineno}: nothing reads {section.name}.{key}"


def one_home(files: list[File]) -> Iterator[str]:
    """An optional package is imported in one module, behind one check that says what is missing."""
    for package in sorted(OPTIONAL):
        homes = [file.path for file in files if package in {found.root for found in _imports(file.tree)}]
        if len(homes) > 1:
            yield f"{package} is imported in {', '.join(homes)}; keep one of them"


def bad_names(modules: set[str], scripts: set[str], taken: set[str]) -> Iterator[str]:
    """Root and scripts/ come first on the path: what lies there hides a package, or a module, of the same name."""
    for name in sorted((modules | scripts) & taken):
        yield f"{name} is also the name of an installed package"
    for name in sorted(modules & scripts):
        yield f"scripts/{name}.py hides {name}.py"
    for name in sorted((modules | scripts) & VAGUE):
        yield f"{name} says nothing; name it after what it holds"


# --- the repository ---


def _python(pattern: str) -> list[File]:
    paths = sorted(ROOT.glob(pattern))
    return [File(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in paths]


@functools.cache
def _scripts() -> frozenset[str]:
    return frozenset(path.stem for path in ROOT.glob("scripts/*.py"))


MODULES, SCRIPTS, TESTS = _python("*.py"), _python("scripts/*.py"), _python("tests/**/*.py")


def _walk(folder: Path, ignored: set[str]) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        hidden = path.is_dir() and path.name.startswith(".") and path.name != ".ci"
        if hidden or any(fnmatch.fnmatch(path.name, pattern) for pattern in ignored):
            continue
        if path.is_dir():
            yield from _walk(path, ignored)
        else:
            yield path


def _repository() -> list[File]:
    """Every text file: git's list, or outside git all that .gitignore does not name."""
    tracked = ""
    if (ROOT / ".git").exists():
        command = ["git", "-C", str(ROOT), "ls-files", "-z"]
        tracked = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True).stdout
    ignored = {line.strip().strip("/") for line in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()}
    paths = [ROOT / name for name in tracked.split("\0") if name] or list(_walk(ROOT, ignored))
    files = []
    for path in paths:
        raw = path.read_bytes() if path.is_file() else b""
        if b"\0" not in raw[:4096]:
            files.append(File(path.relative_to(ROOT).as_posix(), raw.decode("utf-8", "replace")))
    return files


def _required() -> set[str]:
    """The distributions that requirements-dev.txt brings here, with what they require: not all that a user has."""
    lines = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("requirements.txt", "requirements-dev.txt"))
    wanted = [line.partition("  #")[0] for line in lines.splitlines() if re.match(r"\w", line)]
    names: set[str] = set()
    while wanted:
        requirement = Requirement(wanted.pop())
        name = canonicalize_name(requirement.name)
        if name in names or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        names.add(name)
        try:
            wanted += importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # the development tools are no condition for the tests
            continue
    return names


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule is not no_pickle], ids=lambda rule: rule.__name__)
def test_the_code_keeps_the_rule(rule: Rule) -> None:
    assert [complaint for file in (*MODULES, *SCRIPTS, *TESTS) for complaint in rule(file)] == []


def test_nothing_reads_or_writes_pickles(row: Callable[[str], Any]) -> None:
    with row("Pickles") as case:
        for file in (*MODULES, *SCRIPTS):
            case.check(list(no_pickle(file)), file.path)


def test_no_file_holds_a_secret_or_a_place() -> None:
    files = _repository()
    assert {"pyproject.toml", "train.py", ".ci/run", "configs/mini.yaml"} <= {file.path for file in files}
    assert [complaint for file in files for complaint in no_secrets_or_places(file)] == []


def test_every_module_has_its_row_and_its_test() -> None:
    modules = {file.module for file in MODULES}
    assert modules == set(ROW)
    assert modules - {file.path.removeprefix("tests/test_").removesuffix(".py") for file in TESTS} == set()


def test_every_option_is_used() -> None:
    schema = next(file for file in MODULES if file.path == "config.py")
    assert list(dead_options(schema, [file for file in (*MODULES, *SCRIPTS) if file != schema])) == []


def test_optional_packages_have_one_home() -> None:
    assert list(one_home([*MODULES, *SCRIPTS])) == []


def test_names_hide_nothing() -> None:
    required = _required()
    packages = importlib.metadata.packages_distributions().items()
    taken = {name for name, owners in packages if required & {canonicalize_name(owner) for owner in owners}}
    assert {"torch", "muon", "datasets", "yaml"} <= taken
    modules, scripts = {file.module for file in MODULES}, set(_scripts())
    assert list(bad_names(modules, scripts, taken | sys.stdlib_module_names)) == []


def test_imports_without_posix_and_gpu_packages() -> None:
    """As on Windows: neither our modules nor what they import may need these."""
    code = """
import importlib, runpy, sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"fcntl", "resource", "termios", "pwd", "grp", "triton", "liger_kernel"}:
            raise ModuleNotFoundError(f"No module named {name!r} (hidden)", name=name)

sys.meta_path.insert(0, Hidden())
for name in ("fcntl", "resource", "termios", "pwd", "grp"):
    sys.modules.pop(name, None)
for name in sys.argv[1:]:
    if name.endswith(".py"):
        runpy.run_path(name, run_name="imported")
    else:
        importlib.import_module(name)
try:
    import triton_ops
except ImportError as error:
    assert "pip install triton" in str(error), error
else:
    raise AssertionError("triton_ops did without Triton: take it out of NEEDS_TRITON")
"""
    names = sorted({file.module for file in MODULES} - NEEDS_TRITON) + [str(ROOT / file.path) for file in SCRIPTS]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "scripts")))}
    result = subprocess.run(
        [sys.executable, "-c", code, *names], env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr


# --- every rule can fail ---

LONG = "def f():\n" + "    x = 1\n" * 80
BAD: tuple[tuple[Rule, str, str], ...] = (
    (short_module, "ops.py", "x = 1\n" * 601),
    (short_functions, "ops.py", LONG),
    (short_functions, "train.py", "class A:\n    async " + LONG.replace("\n", "\n    ") + "\n"),
    (short_functions, "train.py", "def train():\n" + "    x = 1\n" * 150),
    (short_functions, "tests/test_ops.py", LONG),
    (layers, "kernels.py", ""),
    (layers, "config.py", "import model"),
    (layers, "losses.py", "def f():\n    from model import MLA"),
    (layers, "losses.py", "import tokenizer"),
    (layers, "model.py", "from optim import Muon"),
    (layers, "sources.py", "if TYPE_CHECKING:\n    import data"),
    (layers, "generate.py", "import train"),
    (layers, "generate.py", "from tests.test_model import tiny"),
    (layers, "generate.py", "import config_table"),
    (layers, "scripts/export.py", "from train import main"),
    (layers, "scripts/export.py", "import test_model"),
    (values_not_config, "checkpoint.py", "from config import Config"),
    (values_not_config, "ops.py", "import config\nconfig.load('mini')"),
    (light_first_row, "config.py", "import torch"),
    (light_first_row, "tracker.py", "try:\n    import wandb\nexcept ImportError:\n    pass"),
    (optional_lazily, "ops.py", "import triton_ops"),
    (optional_lazily, "model.py", "if True:\n    from triton_ops import grouped_product"),
    (optional_lazily, "tests/test_triton_ops.py", "import triton_ops"),
    (optional_lazily, "ops.py", "try:\n    import liger_kernel\nexcept ImportError:\n    pass"),
    (distributed_at_home, "model.py", "import torch.distributed as dist"),
    (distributed_at_home, "data.py", "from torch import distributed"),
    (distributed_at_home, "data.py", "from torch.distributed.nn import all_reduce"),
    (distributed_at_home, "train.py", "import torch\ntorch.distributed.barrier()"),
    (environment_at_home, "model.py", "import os\nos.environ['A'] = '1'"),
    (environment_at_home, "data.py", "import os\nos.getenv('A')"),
    (environment_at_home, "data.py", "from os import environ"),
    (arguments_at_home, "config.py", "import argparse"),
    (arguments_at_home, "tests/test_config.py", "from argparse import ArgumentParser"),
    (no_pickle, "data.py", "import pickle"),
    (no_pickle, "data.py", "def f():\n    from dill import dumps"),
    (no_pickle, "checkpoint.py", "torch.save(x, 'x.pt')"),
    (no_pickle, "checkpoint.py", "from torch import load"),
    (no_pickle, "checkpoint.py", "import torch.distributed.checkpoint as dcp"),
    (no_pickle, "scripts/export.py", "x = torch.load('x.pt', weights_only=True)"),
    (no_pickle, "data.py", "np.load('x.npy', allow_pickle=True)"),
    (no_pickle, "data.py", "np.load('x.npy', None, True)"),
    (no_pickle, "convert.py", "torch.jit.load('x')"),
    (no_pickle, "options.py", "import yaml\nyaml.load(f, Loader=yaml.UnsafeLoader)"),
    (no_pickle, "remote.py", "def f(**options):\n    return {'trust_remote_code': True}"),
    (no_pickle, "tokenizer.py", "AutoTokenizer.from_pretrained(name, trust_remote_code=trust)"),
    (portable, "parallel.py", "import resource"),
    (portable, "checkpoint.py", "if True:\n    from fcntl import flock"),
    (portable, "tests/test_train.py", "import pty"),
    (no_secrets_or_places, "a.md", "HF_TOKEN=" + "hf_" + "Ab1" * 8),
    (no_secrets_or_places, "a.md", "see /" + "home/me/runs"),
    (no_secrets_or_places, "a.md", "cd '/" + "tmp/x'"),
    (no_secrets_or_places, "a.md", "C:" + r"\Users\me"),
)
GOOD: tuple[tuple[Rule, str, str], ...] = (
    (short_module, "ops.py", "x = 1\n" * 600),
    (short_functions, "ops.py", "def f():\n" + "    x = 1\n" * 79),
    (short_functions, "train.py", "def train():\n" + "    x = 1\n" * 149),
    (layers, "model.py", "import math\nimport torch\nimport ops\nfrom config import ModelConfig"),
    (layers, "data.py", "from documents import Manifest"),
    (layers, "tests/test_train.py", "import train"),
    (values_not_config, "checkpoint.py", "from config import UserError"),
    (light_first_row, "tracker.py", "def f():\n    import wandb"),
    (light_first_row, "text.py", "if TYPE_CHECKING:\n    from transformers import AutoTokenizer"),
    (optional_lazily, "triton_ops.py", "import triton.language as tl"),
    (optional_lazily, "ops.py", "def f():\n    from triton_ops import grouped_product"),
    (distributed_at_home, "parallel.py", "import torch.distributed as dist"),
    (environment_at_home, "scripts/export.py", "import os\nos.environ['A']"),
    (environment_at_home, "data.py", "import os\nos.getpid()"),
    (arguments_at_home, "train.py", "import argparse"),
    (no_pickle, "data.py", "np.load(f, allow_pickle=False)\nyaml.load(f)\nfrom torch.utils.data import DataLoader"),
    (portable, "parallel.py", "def f():\n    import resource"),
    (no_secrets_or_places, "a.md", "a hf_token, ~/.cache, https://example.org/home/page, runs/tmp/x"),
)


def _called(case: tuple[Rule, str, str]) -> str:
    return f"{case[0].__name__}-{case[1]}"


@pytest.mark.parametrize("case", BAD, ids=_called)
def test_a_rule_can_fail(case: tuple[Rule, str, str]) -> None:
    rule, path, text = case
    complaints = list(rule(File(path, text)))
    assert complaints
    assert all(complaint.startswith(path) for complaint in complaints)


@pytest.mark.parametrize("case", GOOD, ids=_called)
def test_a_rule_can_pass(case: tuple[Rule, str, str]) -> None:
    rule, path, text = case
    assert list(rule(File(path, text))) == []


def test_every_rule_has_a_bad_and_a_good_example() -> None:
    rules = {*RULES, no_secrets_or_places}
    assert {case[0] for case in BAD} == rules == {case[0] for case in GOOD}


def test_rules_for_all_files_can_fail() -> None:
    schema = File("config.py", "class DataConfig(Section):\n    path: str = Field(default='')\n    size: int = 1\n")
    user = File("data.py", "def f(data, tensor):\n    return data.size, tensor.path")
    assert list(dead_options(schema, [user])) == ["config.py:2: nothing reads DataConfig.path"]
    assert len(list(one_home([File("ops.py", "import triton"), File("data.py", "import triton.language")]))) == 1
    assert len(list(bad_names({"data", "datasets"}, {"data", "muon"}, {"datasets", "muon"}))) == 3
    assert len(list(bad_names({"utils"}, {"common"}, set()))) == 2
