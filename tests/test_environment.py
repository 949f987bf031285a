"""environment.py, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_dotenv_is_read_and_real_variables_win(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("HF_TOKEN=from-file\nHF_HOME=from-file\n")
    code = "import environment, os; environment.prepare(); print(os.environ['HF_TOKEN'], os.environ['HF_HOME'])"
    environment = {**os.environ, "HF_HOME": "real", "PYTHONPATH": str(ROOT)}
    environment.pop("HF_TOKEN", None)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.stdout.split() == ["from-file", "real"], result.stderr


@pytest.mark.parametrize("content", [b"HF_TOKEN=a\0b\n", b"HF_TOKEN=\xff\xfe\n"])
def test_a_dotenv_that_cannot_be_read_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(content)
    command = [sys.executable, str(ROOT / "train.py"), "--config", "quickstart", "--dry-run"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2 and result.stderr.startswith("error: .env: no plain UTF-8 text")
    assert result.stderr.count("\n") == 1
