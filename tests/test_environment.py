"""environment.py, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import environment

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


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
@pytest.mark.parametrize(
    ("mode", "content", "warned"),
    [
        (0o644, "HF_TOKEN=abc", True),
        (0o640, "HF_TOKEN=abc", True),
        (0o600, "HF_TOKEN=abc", False),
        (0o644, "A=b", False),
    ],
)
def test_secrets_that_others_may_read(mode: int, content: str, warned: bool, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(content)
    (tmp_path / ".env").chmod(mode)
    result = prepared(tmp_path)
    assert result.returncode == 0 and result.stderr.count("\n") == warned
    assert not warned or result.stderr.endswith("may read the secrets in .env; chmod 600 .env\n")


@pytest.mark.skipif(os.name != "posix", reason="file descriptors of POSIX")
def test_closed_standard_streams_are_the_null_device() -> None:
    """Here and in a child: no file of the run takes their numbers."""
    child = "import os, sys; sys.exit(any(os.fstat(fd).st_rdev != os.stat(os.devnull).st_rdev for fd in range(3)))"
    code = (
        "import environment, subprocess, sys; environment.prepare(); print(1, sys.stdin.read(), file=sys.stderr)\n"
        f"sys.exit(subprocess.call([sys.executable, '-c', {child!r}]))"
    )
    shell = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", code]
    assert subprocess.run(shell, cwd=ROOT).returncode == 0


def prepared(folder: Path, *packages: Path) -> subprocess.CompletedProcess[str]:
    """`environment.prepare()` in a process of its own, which finds `packages` before what is installed."""
    code = (
        "import sys, environment, text, config\n"
        "try:\n    environment.prepare()\nexcept config.UserError as error:\n    sys.exit(text.report(error))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *packages)))}
    for name in ("HF_TOKEN", "RANK"):
        environment.pop(name, None)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, env=environment)


@pytest.mark.parametrize(("version", "works"), [("1.13.1", False), ("2.8.0+cu128", False), ("2.9.0a0+git", True)])
def test_a_torch_that_is_too_old_is_one_line(version: str, works: bool, tmp_path: Path) -> None:
    """Told from the package's metadata, before it is imported."""
    info = tmp_path / f"torch-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    result = prepared(tmp_path, tmp_path)
    assert result.returncode == (0 if works else 2), result.stderr
    if not works:
        assert result.stderr == (f"error: torch {version} is too old, 2.9 is needed: pip install -r requirements.txt\n")
        assert "torch>=2.9," in (ROOT / "requirements.txt").read_text(encoding="utf-8")


def test_memory_that_ran_out_is_told_from_other_failures() -> None:
    """What torch raises for a GPU and for the machine, and what Python raises."""
    with pytest.raises(RuntimeError) as host:
        torch.empty(10**16)
    full = (host.value, torch.OutOfMemoryError("CUDA out of memory"), MemoryError())
    assert all(environment.out_of_memory(error) for error in full)
    assert not any(environment.out_of_memory(error) for error in (RuntimeError("shape"), KeyError("a"), None))


@pytest.mark.parametrize(("real", "kept"), [({}, "64"), ({"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "9"}, "9")])
def test_few_kernels_are_kept_unless_told_otherwise(real: dict[str, str], kept: str) -> None:
    code = "import environment, os; environment.prepare(); print(os.environ['ONEDNN_PRIMITIVE_CACHE_CAPACITY'])"
    before = {key: value for key, value in os.environ.items() if key != "ONEDNN_PRIMITIVE_CACHE_CAPACITY"} | real
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=before, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == kept
