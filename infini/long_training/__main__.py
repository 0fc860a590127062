"""`torchrun … -m segattn.infini.long_training`, or without torchrun in one process."""

import sys
from importlib.util import find_spec

REQUIREMENTS = {"typer": "cli", "rich": "cli", "transformers": "hf", "safetensors": "hf"}

missing = [name for name in REQUIREMENTS if find_spec(name) is None]
if missing:
    extras = ",".join(sorted({REQUIREMENTS[name] for name in missing}))
    sys.exit(f"long_training: needs {', '.join(missing)}: pip install 'segattn[{extras}]'")

from .command import app  # noqa: E402

if __name__ == "__main__":
    app()
