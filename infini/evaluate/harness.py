"""Converted models in EleutherAI's lm-evaluation-harness, so that RULER and BABILong run.

The harness's command loads models without their memory; this is the same command with one more kind of model, segattn:

    python -m segattn.infini.evaluate.harness --model segattn \\
        --model_args pretrained=FOLDER,max_length=131072,dtype=bfloat16 \\
        --batch_size 4 --tasks ruler --metadata '{"max_seq_lengths": [4096, 32768, 131072]}'
    python -m segattn.infini.evaluate.harness --model segattn --model_args pretrained=FOLDER,max_length=131072 \\
        --tasks babilong_qa1 --metadata '{"max_seq_lengths": "32k"}'

`max_length` is needed: longer prompts are cut on the left, by default to the positions that the model had before it was
converted. In Python: `lm_eval.simple_evaluate(model=harness_class()(FOLDER, 131072), ...)`.
"""

from __future__ import annotations

from dataclasses import fields
from importlib import import_module
from typing import Any

from .loading import PretrainedTokenizer, load
from .settings import Source


def harness_class() -> Any:
    """Return the harness's HFLM for the models that `segattn evaluate` loads, and register it there as "segattn".

    Its arguments are `pretrained`, `max_length` in tokens, those of `Source`, and all others of HFLM.

    Raises:
        ImportError: lm_eval is not installed.
    """
    try:
        register = import_module("lm_eval.api.registry").register_model
        base = import_module("lm_eval.models.huggingface").HFLM
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise
        raise ImportError(
            "segattn.infini.evaluate.harness needs lm_eval: pip install lm-eval", name="lm_eval"
        ) from error

    class SegattnLM(base):  # type: ignore[valid-type, misc]
        def __init__(self, pretrained: str, max_length: int, batch_size: int | str = 1, **options: Any) -> None:
            of_source = {field.name for field in fields(Source)} & options.keys()
            model, tokenizer, _ = load(Source(pretrained, **{name: options.pop(name) for name in of_source}))
            if not isinstance(tokenizer, PretrainedTokenizer):
                raise ValueError("tokenizer must be one of transformers for lm_eval, got 'bytes'")
            super().__init__(
                pretrained=model,
                tokenizer=tokenizer.tokenizer,
                max_length=max_length,
                batch_size=batch_size,
                backend="causal",
                **options,
            )

    return register("segattn")(SegattnLM)


def main() -> None:
    """Run the harness's command line."""
    harness_class()
    import_module("lm_eval.__main__").cli_evaluate()


if __name__ == "__main__":
    main()
