"""What a command of `bench/` needs beyond PyTorch, asked for before it is imported."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec


def start(package: str, module: str, extras: str, *names: str) -> None:
    """Run the `main` of a package's module as a command, and end the process with its status.

    Where an installed package is missing, one line says what to install.

    Args:
        package: As it is run by `python -m`.
        module: Relative to the package; imported once its needs are there.
        extras: The extras of segattn that bring the names.
        names: The packages that the module needs.
    """
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        sys.exit(f"python -m {package} needs {', '.join(missing)}: pip install 'segattn[{extras}]'")
    sys.exit(import_module(module, package).main())
