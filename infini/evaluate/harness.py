"""Converted models in EleutherAI's lm-evaluation-harness, with any of its tasks.

The harness's command loads models without their memory; this is the same command with one more kind of model, segattn:

    python -m segattn.infini.evaluate.harness --model segattn --model_args pretrained=FOLDER,dtype=bfloat16 \\
        --batch_size 4 --tasks ruler --metadata '{"max_seq_lengths": [4096, 32768, 131072]}'

In Python: `lm_eval.simple_evaluate(model=harness_class()(FOLDER), ...)`. RULER and BABILong on texts that are made and
not downloaded: `segattn evaluate ruler | babilong`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any


def harness_class() -> Any:
    """Return the harness's HFLM for the models that `segattn evaluate` loads, and register it there as "segattn".

    Its arguments are those of `SegattnLM`.

    Raises:
        ImportError: lm_eval is not installed.
    """
    try:
        register = import_module("lm_eval.api.registry").register_model
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise
        raise ImportError(
            "segattn.infini.evaluate.harness needs lm_eval: pip install lm-eval", name="lm_eval"
        ) from error
    from .harness_model import SegattnLM

    return register("segattn")(SegattnLM)


def main() -> int:
    """Run the harness's command line; return 2 where it would load the model without its memory."""
    if (kind := _asked_model(sys.argv[1:])) not in (None, "segattn"):
        sys.stderr.write(f"harness: --model must be segattn, got {kind}, which loads a model without its memory\n")
        return 2
    harness_class()
    import_module("lm_eval.__main__").cli_evaluate()
    return 0


def _asked_model(arguments: Sequence[str]) -> str | None:
    """Return the kind of model that the arguments ask for; None where they name no tasks, or a file of settings."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for names in (("--model", "-M"), ("--config", "-C"), ("--tasks", "-t")):
        parser.add_argument(*names, nargs="*", default=[])
    asked, _ = parser.parse_known_args(arguments)
    # lm-eval's default
    default = ["hf"] if asked.tasks and not asked.config else [None]
    return (asked.model or default)[0]


if __name__ == "__main__":
    sys.exit(main())
