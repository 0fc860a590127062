"""`python -m segattn.bench.report`: the documents' tables, and the plots, from the results."""

import sys

from ..requirements import require


def run() -> int:
    """Check what is installed, and run the command."""
    require("segattn.bench.report", "cli", "matplotlib")
    from .main import main

    return main()


sys.exit(run())
