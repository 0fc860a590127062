"""`python -m segattn.bench.experiments.questions`: questions about a book of 500K tokens."""

from ...requirements import start

start("segattn.bench.experiments.questions", ".experiment", "cli,hf", "rich", "matplotlib", "transformers")
