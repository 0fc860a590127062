"""`python -m segattn.bench.experiments.lengths`: what a token costs in long texts."""

from ...requirements import start

start("segattn.bench.experiments.lengths", ".experiment", "cli,hf", "rich", "matplotlib", "transformers")
