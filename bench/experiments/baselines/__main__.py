"""`python -m segattn.bench.experiments.baselines`: the baselines of the papers in one harness."""

from ...requirements import start

start("segattn.bench.experiments.baselines", ".experiment", "cli,hf", "rich", "matplotlib", "transformers")
