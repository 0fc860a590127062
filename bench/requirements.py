"""What a command of `bench/` needs beyond PyTorch, asked for before it is imported."""

from __future__ import annotations

import sys
from importlib.util import find_spec


def require(command: str, extras: str, *names: str) -> None:
    """End the process where a package is not installed, with one line that says what to install.

    Args:
        command: The module that needs the packages, as it is run by `python -m`.
        extras: The package's extras that bring them.
        names: The packages.
    """
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        sys.exit(f"python -m {command} needs {', '.join(missing)}: pip install 'segattn[{extras}]'")
