"""`python -m segattn.bench.experiments.baselines`: the baselines of the papers in one harness."""

import sys

from ...requirements import require


def run() -> int:
    """Check what is installed, and run the command."""
    require("segattn.bench.experiments.baselines", "cli,hf", "rich", "matplotlib", "transformers")
    from .experiment import main

    return main()


sys.exit(run())
