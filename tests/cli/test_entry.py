"""The library never needs the command, and the command says what it needs."""

import os
import subprocess
import sys

import pytest


def python(code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "COLUMNS": "80"})


def test_the_library_imports_nothing_of_the_command():
    found = python(
        "import sys, overdrive.pytorch\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('typer', 'rich', 'matplotlib')"
        " or m.startswith(('overdrive.cli', 'overdrive.bench'))])"
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_a_missing_extra_is_named(package):
    found = python(f"import sys; sys.modules[{package!r}] = None\nfrom overdrive.cli import main; main()")
    assert found.returncode == 1
    assert f"needs {package}" in found.stderr
    assert "pip install 'overdrive[cli]'" in found.stderr
    assert "Traceback" not in found.stderr


def test_the_module_runs_as_the_command_does():
    found = subprocess.run(
        [sys.executable, "-m", "overdrive.cli", "--help"], capture_output=True, text=True, timeout=120, check=True
    )
    assert "quickstart" in found.stdout
    assert "bench" in found.stdout
    assert "doctor" in found.stdout
