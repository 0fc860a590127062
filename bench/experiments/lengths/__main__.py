"""`python -m segattn.bench.experiments.lengths`: what a token costs in long texts."""

import sys

from ...requirements import require


def run() -> int:
    """Check what is installed, and run the command."""
    require("segattn.bench.experiments.lengths", "cli,hf", "rich", "matplotlib", "transformers")
    from .experiment import main

    return main()


sys.exit(run())
