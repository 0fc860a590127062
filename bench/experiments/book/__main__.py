"""`python -m segattn.bench.experiments.book`: what a memory is worth on a book."""

from ...requirements import start

start("segattn.bench.experiments.book", ".experiment", "cli,hf", "rich", "matplotlib", "transformers")
