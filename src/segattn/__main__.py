"""The command line's entry: `segattn`, and `python -m segattn`."""

from __future__ import annotations

import sys
from importlib.util import find_spec

REQUIREMENTS = ("typer", "rich", "matplotlib")


def main() -> None:
    """Run the command line, or say what to install where its requirements are missing."""
    if missing := [name for name in REQUIREMENTS if find_spec(name) is None]:
        sys.exit(f"segattn: the commands need {', '.join(missing)}: pip install 'segattn[cli]'")
    from .cli.main import app

    app(prog_name="segattn")


if __name__ == "__main__":
    main()
