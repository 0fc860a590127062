"""`python -m segattn`: the command line."""

from .cli.main import app

app()
