"""`python -m segattn.bench.report`: the documents' tables, and the plots, from the results."""

from ..requirements import start

start("segattn.bench.report", ".main", "cli", "matplotlib")
