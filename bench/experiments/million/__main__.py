"""`python -m segattn.bench.experiments.million`: the demo's passkeys in texts of a million tokens."""

from ...requirements import start

start("segattn.bench.experiments.million", ".experiment", "cli", "rich")
