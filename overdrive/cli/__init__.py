"""The `overdrive` command. The library never imports it."""

from __future__ import annotations

import sys

EXTRA = {"typer", "rich", "matplotlib"}


def main() -> None:
    """Run the command line, or say which extra to install for it."""
    try:
        from overdrive.cli.main import app
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRA:
            raise
        sys.exit(f"The overdrive command needs {package}, which is not installed: pip install 'overdrive[cli]'")
    app()
