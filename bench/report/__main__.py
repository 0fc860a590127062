"""`python -m segattn.bench.report`: see main.py."""

import sys

from .main import main

sys.exit(main())
