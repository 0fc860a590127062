"""The command `segattn finetune`: train a Hugging Face model with a memory on a text, in one process or several."""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch.distributed as dist
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from torch import OutOfMemoryError

from ..infini.train.settings import TrainSettings, UntrainedMemoryWarning
from ..runs.checkpoint import InterruptedRunError, SettingError
from .options import options_of
from .progress import Bars, Lines

FOLDER = Path("segattn-finetune")
OUT_OF_MEMORY = (
    "out of memory: try more processes and --sequence-ranks, --gradient-checkpointing, --lora, or a smaller --batch, "
    "--length, --piece or --truncate"
)


@options_of(TrainSettings, arguments=("model",))
def finetune(
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda. Default: GPUs where there are any.")] = None,
    keep: Annotated[int, typer.Option(help="Checkpoints that stay.")] = 2,
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
    with _errors(out):
        from transformers.utils.logging import disable_progress_bar

        from ..infini.train.processes import agreed, is_first, joined
        from ..infini.train.run import Outputs, resumed, run_training

        # twice: errors before the processes have met, and after
        with joined(device, timeout) as place, _errors(out), _lost_processes(out), _warnings_in_a_line():
            settings, steps = agreed(lambda: resumed(out, given) if resume else (TrainSettings(**given), 0))
            console = Console(soft_wrap=True, highlight=False, quiet=not is_first())
            has_bar = console.is_terminal and is_first()
            if not has_bar:
                disable_progress_bar()
            with _Bar(console) if has_bar else _Lines(console) as listener:
                figures = run_training(settings, out, listener, place, keep=keep, resume=resume)
            if steps == settings.steps:
                console.print(f"already done: {steps} steps; --steps goes on to more")
            if figures:
                console.print(_summary(figures))
            for name, path in Outputs.of(out)._asdict().items():
                console.print(f"{name:12} {path}", markup=False)


def _summary(figures: Mapping[str, Any]) -> str:
    evaluations = list(figures["eval_loss"].values())
    held_out = f", {evaluations[-1]:.4f} on held-out rows," if evaluations else ""
    speed = f"{figures['tokens_per_second']:.0f} tokens/s, at most {figures['peak_bytes'] / 2**20:.0f} MiB a process"
    return f"loss {figures['loss']:.4f}{held_out} after {figures['tokens']} tokens, {speed}"


@contextmanager
def _errors(out: Path) -> Iterator[None]:
    """End the command with one line, which the first process prints, or each one before they have met."""
    try:
        yield
    except SettingError as error:
        option = "MODEL" if error.name == "model" else f"--{error.name.replace('_', '-')}"
        _end(f"{option} {error.problem}", 2)
    except ImportError as error:
        if error.name not in ("transformers", "safetensors"):
            raise
        _end(f"needs {error.name}: pip install 'segattn[hf]'", 1)
    except InterruptedRunError:
        _end(f"stopped, checkpoint written{_again(out)}", 130)
    except KeyboardInterrupt:
        _say(f"stopped{_again(out)}")
        raise SystemExit(130) from None
    except OutOfMemoryError:
        if _several():
            raise
        _end(f"{OUT_OF_MEMORY}{_again(out)}", 1)


@contextmanager
def _lost_processes(out: Path) -> Iterator[None]:
    """Say on each of several processes why it ends, beside its traceback."""
    try:
        yield
    except RuntimeError as error:
        if _several():
            reason = (
                OUT_OF_MEMORY
                if isinstance(error, OutOfMemoryError)
                else (
                    f"process {dist.get_rank()} of {dist.get_world_size()} ends: unless the error below is its own, "
                    "another process has ended, or did not answer within --timeout"
                )
            )
            _say(f"{reason}{_again(out)}")
        raise


def _end(message: str, status: int) -> NoReturn:
    if not _several() or dist.get_rank() == 0:
        _say(message)
    if _several():
        # torchrun ends all when one has ended
        dist.barrier()
    raise SystemExit(status) from None


def _again(out: Path) -> str:
    """Return how to go on, where there is a checkpoint."""
    from ..infini.train.checkpoints import whole
    from ..infini.train.run import Outputs

    if not whole(Outputs.of(out).checkpoints):
        return ""
    how = "go on, with as many processes as you like:" if _several() else "go on with:"
    return f"; {how} segattn finetune --resume --out {shlex.quote(str(out))}"


@contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """Print the warnings of a run in one line, as its errors, and leave others alone."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def line(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if category is UntrainedMemoryWarning:
                _say(str(message))
            else:
                show(message, category, *where, **more)

        warnings.showwarning = line
        warnings.simplefilter("always", UntrainedMemoryWarning)
        yield


def _say(message: str) -> None:
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"segattn finetune: {message}", markup=False)


def _several() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def _note(figures: Mapping[str, Any]) -> str:
    held_out = f" ({figures['eval_loss']:.4f} held out)" if "eval_loss" in figures else ""
    gates = f"gates {figures['gate_least']:.3f} to {figures['gate_largest']:.3f}"
    return f"loss {figures['loss']:.4f}{held_out}, {gates}, {figures['tokens_per_second']:.0f} tokens/s"


class _Bar(Bars):
    """A bar of the steps, on a terminal."""

    def __init__(self, console: Console) -> None:
        note = TextColumn("{task.fields[note]}")
        super().__init__(console, TextColumn("train"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), note)
        self.task = self.progress.add_task("train", total=None, note="")

    def trained(self, step: int, steps: int, figures: Mapping[str, Any]) -> None:
        self.progress.update(self.task, completed=step, total=steps, note=_note(figures))


class _Lines(Lines):
    """A few plain lines, for a file or a pipe."""

    def trained(self, step: int, steps: int, figures: Mapping[str, Any]) -> None:
        if step % max(1, steps // 20) == 0 or step == steps or "eval_loss" in figures:
            self.console.print(f"step {step} of {steps}: {_note(figures)}")
