"""`python -m segattn.bench.compiled`: what `ci/compile` runs."""

from ..requirements import start

start("segattn.bench.compiled", ".report", "cli", "rich")
