"""`python -m segattn.bench.experiments.book`: what a memory is worth on a book."""

import sys

from ...requirements import require


def run() -> int:
    """Check what is installed, and run the command."""
    require("segattn.bench.experiments.book", "cli,hf", "rich", "matplotlib", "transformers")
    from .experiment import main

    return main()


sys.exit(run())
