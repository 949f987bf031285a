"""environment.py, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_dotenv_is_read_and_real_variables_win(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("HF_TOKEN=from-file\nHF_HOME=from-file\n")
    code = "import environment, os; environment.prepare(); print(os.environ['HF_TOKEN'], os.environ['HF_HOME'])"
    environment = {**os.environ, "HF_HOME": "real", "PYTHONPATH": str(ROOT)}
    environment.pop("HF_TOKEN", None)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.stdout.split() == ["from-file", "real"], result.stderr
