"""The command `segattn finetune`: train a Hugging Face model with a memory on a text, in one process or several."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..infini.train.settings import TrainSettings
from .options import options_of
from .progress import Progress, is_due
from .shell import Command, print_files, quiet_transformers

FOLDER = Path("segattn-finetune")
SMALLER = (
    "more processes and --sequence-ranks, --gradient-checkpointing, --lora, or a smaller --batch, --length, --piece or "
    "--truncate"
)


@options_of(TrainSettings, arguments=("model",))
def finetune(
    device: Annotated[
        str | None, typer.Option(help="Where to run, such as cpu or cuda. Default: GPUs where there are any.")
    ] = None,
    keep: Annotated[int, typer.Option(help="Number of newest checkpoints to keep.")] = 2,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for a process that does not answer.")] = 600.0,
    out: Annotated[Path, typer.Option(help="Folder for everything that is written, one for all processes.")] = FOLDER,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint, on any number of processes.")
    ] = False,
    **given: Any,
) -> None:
    """Train a model with a memory on a text; a plain model is converted first.

    On several GPUs: torchrun --nproc-per-node 8 -m segattn finetune MODEL ...
    The processes share the weights (FSDP2) and every row.

    Ctrl-C or SIGTERM leaves a checkpoint, from which --resume goes on to what the run would have come to.
    The trained model, adapters merged, is in OUT/model, for segattn.from_pretrained.

    With --resume, settings are the checkpoint's. These may be given anew:
    --steps, also more of them for a run that is done, --lr, --gate-lr, --warmup:
    steps still to come have the rates of a run with these from its first step;
    --gradient-checkpointing, --sequence-ranks, --eval-every, --save-every, --log;
    and where model, tokenizer and text are, if they hold the same.

    A process that is given a wrong option says so in one line, and ends with 2.
    torchrun adds a report of its own, ChildFailedError, and ends with 1.
    """
    several = "go on, with as many processes as you like:" if "RANK" in os.environ else "go on with:"
    command = Command(
        "finetune",
        {"model": "MODEL"},
        f"{several} segattn finetune --resume --out {shlex.quote(str(out))}",
        partial(_is_saved, out),
        SMALLER,
    )
    with command.run():
        quiet_transformers()
        from ..infini.train.processes import agreed, is_first, joined
        from ..infini.train.run import Outputs, resumed, run_training

        with joined(device, timeout) as place, _together(command):
            settings, steps = agreed(lambda: resumed(out, given) if resume else (TrainSettings(**given), 0))
            console = Console(soft_wrap=True, highlight=False, quiet=not is_first())
            with Steps(console, f"already done: {steps} steps; --steps goes on to more") as listener:
                figures = run_training(settings, out, listener, place, keep=keep, resume=resume)
            if figures:
                console.print(_summary(figures))
            print_files(console, Outputs.of(out)._asdict())


def _summary(figures: Mapping[str, Any]) -> str:
    evaluations = list(figures["eval_loss"].values())
    held_out = f", {evaluations[-1]:.4f} on held-out rows," if evaluations else ""
    speed = f"{figures['tokens_per_second']:.0f} tokens/s, at most {figures['peak_bytes'] / 2**20:.0f} MiB a process"
    return f"loss {figures['loss']:.4f}{held_out} after {figures['tokens']} tokens, {speed}"


@contextmanager
def _together(command: Command) -> Iterator[None]:
    """End several processes together, with the first one's line; an error of some of them keeps its traceback."""
    import torch.distributed as dist
    from torch import OutOfMemoryError

    try:
        yield
    except BaseException as error:
        if dist.get_world_size() == 1:
            raise
        ending = command.ending(error)
        if ending is None and isinstance(error, RuntimeError):
            lost = (
                f"process {dist.get_rank()} of {dist.get_world_size()} ends: unless the error below is its own, "
                "another process has ended, or did not answer within --timeout"
            )
            command.say(lost + command.way_on())
        if ending is None or isinstance(error, OutOfMemoryError | KeyboardInterrupt):
            # of this process alone: others would not meet it
            raise
        if dist.get_rank() == 0:
            command.say(ending.message)
        # torchrun ends all when one has ended
        dist.barrier()
        raise SystemExit(ending.status) from None


def _is_saved(out: Path) -> bool:
    # without `checkpoints.whole`: Ctrl-C may have broken into the import of PyTorch
    return any(out.glob("checkpoints/step-*/.metadata"))


def _note(figures: Mapping[str, Any]) -> str:
    held_out = f" ({figures['eval_loss']:.4f} held out)" if "eval_loss" in figures else ""
    gates = f"gates {figures['gate_least']:.3f} to {figures['gate_largest']:.3f}"
    return f"loss {figures['loss']:.4f}{held_out}, {gates}, {figures['tokens_per_second']:.0f} tokens/s"


class Steps(Progress):
    """The steps of a training; the lines are one for each evaluation, and for about every twentieth of the steps."""

    def trained(self, step: int, steps: int, figures: Mapping[str, Any]) -> None:
        """Show a step."""
        self.bar("train", step, steps, _note(figures))
        if is_due(step, steps, 20) or "eval_loss" in figures:
            self.line(f"step {step} of {steps}: {_note(figures)}")
