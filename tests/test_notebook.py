"""notebooks/colab.ipynb: its form, and its cells in their order.

Colab's own modules and what takes a network are stubs; the commands of this project go through their parsers and the
configuration, one of them up to the plan of a run.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import config as configuration
import generate
import train

ROOT = Path(train.__file__).parent
NOTEBOOK = json.loads((ROOT / "notebooks" / "colab.ipynb").read_text(encoding="utf-8"))
TOKEN = "hf_" + "Qq7" * 11  # no token of anyone


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


class Colab:
    """A session: runs cells as IPython does, and keeps the shell's commands for `shell` to answer."""

    def __init__(self, secrets: dict[str, str], monkeypatch: pytest.MonkeyPatch):
        self.commands: list[str] = []
        self.values: dict[str, Any] = {"_shell": self.shell, "_cd": self.commands.append}
        userdata: Any = types.ModuleType("google.colab.userdata")
        userdata.SecretNotFoundError = type("SecretNotFoundError", (Exception,), {})
        userdata.NotebookAccessError = type("NotebookAccessError", (Exception,), {})

        def get(name: str) -> str:
            if name not in secrets:
                raise userdata.SecretNotFoundError(name)
            return secrets[name]

        userdata.get = get
        colab: Any = types.ModuleType("google.colab")
        colab.userdata = userdata
        google: Any = types.ModuleType("google")
        google.colab = colab
        for name, module in (("google", google), ("google.colab", colab), ("google.colab.userdata", userdata)):
            monkeypatch.setitem(sys.modules, name, module)

    def run(self, code: str) -> None:
        code = re.sub(r"(?m)^(\s*)!(.*)$", lambda m: f"{m[1]}_shell({m[2]!r})", code)
        code = re.sub(r"(?m)^(\s*)%cd (.*)$", lambda m: f"{m[1]}_cd({'cd ' + m[2]!r})", code)
        exec(compile(code, "cell", "exec"), self.values)  # noqa: S102

    def shell(self, line: str) -> None:
        line = re.sub(r"\{(\w+)\}", lambda match: str(self.values[match[1]]), line)
        self.commands.append(line)
        words = shlex.split(line)
        if words[:2] == ["python", "train.py"]:
            given = train.parse(words[2:])
            self.config = configuration.load(given.config, given.overrides)
            if self.config.hub.repo_id:
                assert train.main([*words[2:], "--dry-run"]) == 0
        elif words[:2] == ["python", "generate.py"]:
            assert generate.parse_arguments(words[2:]).prompt == "Once upon a time"
        else:
            assert words[0] in ("nvidia-smi", "git", "pip"), line


def test_it_is_a_notebook_without_outputs() -> None:
    assert NOTEBOOK["nbformat"] == 4 and NOTEBOOK["nbformat_minor"] == 5
    assert NOTEBOOK["metadata"]["accelerator"] == "GPU" and NOTEBOOK["metadata"]["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name) for name in ids)
    for cell in NOTEBOOK["cells"]:
        keys = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            keys |= {"outputs", "execution_count"}
            assert cell["outputs"] == [] and cell["execution_count"] is None
        assert cell.keys() == keys and cell["cell_type"] in ("code", "markdown")
        assert all(line.endswith("\n") for line in cell["source"][:-1]) and not cell["source"][-1].endswith("\n")
    text = json.dumps(NOTEBOOK)
    assert "print(os.environ" not in text and "URL-OF-THIS-REPOSITORY" in (ROOT / "README.md").read_text(
        encoding="utf-8"
    )


@pytest.mark.parametrize("secret", [True, False])
def test_its_cells_run_in_their_order(
    secret: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.delenv("HF_REPO_ID", raising=False)
    monkeypatch.chdir(tmp_path)
    session = Colab({"HF_TOKEN": TOKEN} if secret else {}, monkeypatch)
    told = ""
    for cell in NOTEBOOK["cells"]:
        if cell["cell_type"] == "code":
            session.run(source(cell).replace('HF_REPO_ID = ""  #', 'HF_REPO_ID = "someone/a-model"  #'))
            told += "".join(capfd.readouterr())
    assert [re.match(r"\S+( \w+\.py)?", command)[0] for command in session.commands] == [  # type: ignore[index]
        "nvidia-smi", "cd", "git", "cd", "pip", "python train.py", "python generate.py",
    ]  # fmt: skip
    assert "git clone URL-OF-THIS-REPOSITORY deepseek" in session.commands
    wanted = "python train.py --config 30m hub.repo_id=" + "someone/a-model" * secret
    assert wanted in session.commands
    assert session.config.hub.repo_id == ("someone/a-model" if secret else None)
    assert ("repo_id: someone/a-model" in told) == secret and ("no secret HF_TOKEN" in told) != secret
    assert os.environ.get("HF_TOKEN") == (TOKEN if secret else None)
    everything = told + repr(session.commands) + "".join(path.read_text() for path in tmp_path.rglob("*.*"))
    assert TOKEN not in everything and TOKEN[:10] not in everything


def test_a_second_session_finds_the_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All cells again: nothing is cloned into the clone."""
    (tmp_path / "deepseek").mkdir()
    monkeypatch.chdir(tmp_path)
    session = Colab({}, monkeypatch)
    session.run(next(source(cell) for cell in NOTEBOOK["cells"] if cell["id"] == "choices"))
    session.run(next(source(cell) for cell in NOTEBOOK["cells"] if cell["id"] == "install"))
    assert session.commands[0] == "cd /content" and not any("git clone" in command for command in session.commands)
