"""The command: options, progress on the first process, and what becomes of errors."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

import torch.distributed as dist
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from torch import OutOfMemoryError
from transformers.utils.logging import disable_progress_bar

from ...cli.progress import Bars, Lines
from ...runs.checkpoint import InterruptedRunError, SettingError
from .checkpoints import whole
from .processes import agreed, is_first, joined
from .runs import Outputs, run_long_training, saved_settings
from .settings import LongSettings

FOLDER = Path("segattn-long")
OF_THE_COMMAND = ("keep", "timeout", "out", "resume")
NAMES = {"model": "MODEL", "gates_only": "--freeze-but-gates"}

app = typer.Typer(add_completion=False)


@app.command()
def train(
    model: Annotated[
        str | None, typer.Argument(help="Folder or name of a model; a plain one is converted.", show_default=False)
    ] = None,
    layers: Annotated[
        int | None, typer.Option(help="Instead of a model, a Llama of bytes from scratch: layers.")
    ] = None,
    width: Annotated[int | None, typer.Option(help="Its width.")] = None,
    heads: Annotated[int | None, typer.Option(help="Its heads.")] = None,
    text: Annotated[Path | None, typer.Option(help="Text to train on, UTF-8, read as it is needed.")] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="Instead, a data set: a folder, or a name of the hub (HF_HUB_OFFLINE=1: ask no network)."),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Of the data set. Default: train.")] = None,
    column: Annotated[str | None, typer.Option(help="Of the data set, with the text. Default: text.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or name, or 'bytes' for a model of bytes. Default: the model's.")
    ] = None,
    segment_len: Annotated[int | None, typer.Option(help="Of a plain model: tokens a segment. Default: 2048.")] = None,
    update: Annotated[str | None, typer.Option(help="Of a plain model: delta or linear. Default: delta.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens per row. Default: 8192.")] = None,
    sequence_ranks: Annotated[
        int | None, typer.Option(help="Processes that share a row; the others read rows of their own. Default: all.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Rows read at once, by all processes together. Default: 1.")] = None,
    accumulate: Annotated[int | None, typer.Option(help="Batches per step. Default: 1.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the optimiser. Default: 1000.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate. Default: 2e-5.")] = None,
    gate_lr: Annotated[float | None, typer.Option(help="Learning rate of the gates. Default: 1e-2.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of matrices. Default: 0.01.")] = None,
    warmup: Annotated[int | None, typer.Option(help="Steps over which the rates rise. Default: 20.")] = None,
    gates_only: Annotated[
        bool | None, typer.Option("--freeze-but-gates", help="Train the gates alone.", show_default=False)
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option("--gradient-checkpointing", help="Less memory for a third more time.", show_default=False),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights from scratch, and of dropout. Default: 0.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of products: float32, bfloat16 or auto; weights are float32. Default: auto.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: GPUs where there are any.")] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints. Default: 100.")] = None,
    keep: Annotated[int, typer.Option(help="Checkpoints that stay.")] = 2,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for a process that does not answer.")] = 600.0,
    out: Annotated[Path, typer.Option(help="Folder for everything that is written, one for all processes.")] = FOLDER,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint, on any number of processes.")
    ] = False,
) -> None:
    """Train a model on long texts, each of them spread over the processes of torchrun.

    Ctrl-C or SIGTERM leaves a checkpoint, from which --resume goes on to what the run would have come to.

    With --resume, settings are the checkpoint's. These may be given anew:
    --steps, also more of them for a run that is done, --lr, --gate-lr, --warmup:
    steps still to come have the rates of a run with these from its first step;
    --gradient-checkpointing, --sequence-ranks, --device, --save-every;
    and where model, tokenizer and text are, if they hold the same.

    A process that is given a wrong option says so in one line, and ends with 2.
    torchrun adds a report of its own, ChildFailedError, and ends with 1.
    """
    given = {name: value for name, value in locals().items() if value is not None and name not in OF_THE_COMMAND}
    if text is not None:
        given["text"] = str(text.resolve())
    errors = _Errors(out)
    # before the processes have met, and after
    with errors, joined(device, timeout) as place, errors:
        settings = agreed(lambda: LongSettings(**(saved_settings(out) if resume else {}) | given))
        console = Console(soft_wrap=True, highlight=False)
        if not (console.is_terminal and is_first()):
            disable_progress_bar()
        with _Bar(console) if console.is_terminal and is_first() else _Lines(console) as listener:
            figures = run_long_training(settings, out, listener, place, keep=keep, resume=resume)
        if figures:
            peak = figures["peak_bytes"] / 2**20
            console.print(
                f"loss {figures['loss']:.4f} after {figures['tokens']} tokens, {figures['tokens_per_second']:.0f} "
                f"tokens/s, at most {peak:.0f} MiB a process"
            )
            for name, path in Outputs.of(out)._asdict().items():
                console.print(f"{name:12} {path}", markup=False)


class _Errors:
    """What becomes of errors: one message of the first process, or of each before they have met."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.told: BaseException | None = None

    def __enter__(self) -> None:
        return

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is self.told:
            return
        self.told = error
        if isinstance(error, SettingError):
            self._stop(f"{NAMES.get(error.name, '--' + error.name.replace('_', '-'))} {error.problem}", 2)
        if isinstance(error, InterruptedRunError):
            self._stop(f"stopped, checkpoint written{self._again()}", 130)
        if isinstance(error, KeyboardInterrupt):
            self._say(f"stopped{self._again()}")
            raise SystemExit(130) from None
        if isinstance(error, OutOfMemoryError):
            self._say(
                "out of memory: try more processes and --sequence-ranks, --gradient-checkpointing, or a smaller "
                f"--batch or --length{self._again()}"
            )
        elif isinstance(error, RuntimeError) and _several():
            self._say(
                f"process {dist.get_rank()} of {dist.get_world_size()} ends: unless the error below is its own, "
                f"another process has ended, or did not answer within --timeout{self._again()}"
            )

    def _again(self) -> str:
        """How to go on, where there is something to go on from."""
        if not whole(Outputs.of(self.out).checkpoints):
            return ""
        return f"; go on, with as many processes as you like: … --resume --out {shlex.quote(str(self.out))}"

    def _stop(self, message: str, status: int) -> None:
        if not _several() or is_first():
            self._say(message)
        if _several():
            # torchrun ends all when one has ended
            dist.barrier()
        raise SystemExit(status) from None

    def _say(self, message: str) -> None:
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"long_training: {message}", markup=False)


def _several() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


class _Bar(Bars):
    """Steps done, on a terminal."""

    def __init__(self, console: Console) -> None:
        note = TextColumn("{task.fields[note]}")
        super().__init__(console, TextColumn("train"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), note)
        self.task = self.progress.add_task("train", total=None, note="")

    def trained(self, step: int, steps: int, figures: Mapping[str, Any]) -> None:
        note = f"loss {figures['loss']:.3f}  {figures['tokens_per_second']:.0f} tokens/s"
        self.progress.update(self.task, completed=step, total=steps, note=note)


class _Lines(Lines):
    """A few plain lines of the first process, for a file or a pipe."""

    def trained(self, step: int, steps: int, figures: Mapping[str, Any]) -> None:
        if is_first() and (step % max(1, steps // 20) == 0 or step == steps):
            rate = f"{figures['tokens_per_second']:.0f} tokens/s"
            self.console.print(f"step {step} of {steps}: loss {figures['loss']:.4f}, {rate}")
