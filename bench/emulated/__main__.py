"""`python -m segattn.bench.emulated`: what `ci/emulate` runs."""

from ..requirements import start

start("segattn.bench.emulated", ".report", "cli", "rich")
