"""The `segattn` command's entry point, which says what to install where its own requirements are missing."""

from __future__ import annotations

import sys
from importlib.util import find_spec

REQUIREMENTS = ("typer", "rich", "matplotlib")


def app() -> None:
    """Run the command line."""
    missing = [name for name in REQUIREMENTS if find_spec(name) is None]
    if missing:
        sys.exit(f"segattn: the commands need {', '.join(missing)}: pip install 'segattn[cli]'")
    from .demo import app as commands

    commands()


if __name__ == "__main__":
    app()
