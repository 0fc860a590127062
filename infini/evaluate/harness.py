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

from ...runs.device import usable_device
from ...runs.errors import SettingError


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
    """Run the harness's command line; return 2 where a setting cannot be, or where the memory would be lost."""
    asked = _asked(sys.argv[1:])
    runs = bool(asked.tasks and not asked.config)
    # lm-eval's default
    kind = (asked.model or ["hf" if runs else "segattn"])[0]
    if kind != "segattn":
        sys.stderr.write(f"harness: --model must be segattn, got {kind}, which loads a model without its memory\n")
        return 2
    if runs and not asked.device:
        # lm-eval's default is cuda:0, on any machine
        sys.argv += ["--device", usable_device(None)]
    harness_class()
    try:
        import_module("lm_eval.__main__").cli_evaluate()
    except SettingError as error:
        sys.stderr.write(f"harness: {error}\n")
        return 2
    return 0


def _asked(arguments: Sequence[str]) -> argparse.Namespace:
    """Return those of lm-eval's arguments that decide how the model is loaded, each a list."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for names in (("--model", "-M"), ("--config", "-C"), ("--tasks", "-t"), ("--device",)):
        parser.add_argument(*names, nargs="*", default=[])
    return parser.parse_known_args(arguments)[0]


if __name__ == "__main__":
    sys.exit(main())
