"""`python -m segattn.bench.baselines`."""

import sys

from .experiment import main

if __name__ == "__main__":
    sys.exit(main())
