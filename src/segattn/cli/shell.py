"""What all commands share: where they print, what they say of an error, and how they read lists of numbers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import typer
from rich.console import Console

from ..runs.errors import SettingError, UntrainedMemoryWarning
from ..runs.interrupts import InterruptedRunError

# module that is missing → what brings it
INSTALL = {
    "transformers": "'segattn[hf]'",
    "safetensors": "'segattn[hf]'",
    "huggingface_hub": "'segattn[hf]'",
    "datasets": "'segattn[data]'",
    "matplotlib": "'segattn[cli]'",
    "peft": "peft",
    "gguf": "'segattn[pretrained]'",
    **dict.fromkeys(("lm_eval", "nltk", "wonderwords", "scipy"), "'segattn[lm-eval]'"),
}
UNITS = {"K": 2**10, "M": 2**20}
MOST_DIGITS = 15


class Ending(NamedTuple):
    """The line that a command ends with, and its exit status."""

    message: str
    status: int


@dataclass(frozen=True)
class Command:
    """A command, and what its user is told when it cannot go on.

        with Command("demo", again=f"go on with: segattn demo --resume --out {out}").run() as console:
            console.print(...)

    An error that the user can mend becomes one line on stderr and an exit status: 2 for a `SettingError`, 1 for a
    missing package and for memory that does not suffice, 130 after Ctrl-C. Every other error is a fault of the program
    and keeps its traceback. Where several processes fail together, `ending` and `say` are the parts of this.

    Args:
        name: of the command, without `segattn`: "demo", "rmt train".
        typed: setting → what the user types for it, where that is not `--` and the setting's name with dashes: an
            argument ({"model": "MODEL"}), or an option of another name ({"gates_only": "--freeze-but-gates"}).
        again: how to go on after a stop; "" where a command cannot.
        saved: says whether a stopped run could go on already, such as `checkpoint.is_file`; by default it can.
        smaller: what needs less memory, such as "a smaller --batch".
    """

    name: str
    typed: Mapping[str, str] = field(default_factory=dict)
    again: str = ""
    saved: Callable[[], object] = lambda: True
    smaller: str = "smaller sizes"

    @contextmanager
    def run(self) -> Iterator[Console]:
        """Yield the console to print to, and end the process with one line where `ending` knows one."""
        try:
            with self._warnings_in_a_line():
                yield Console(soft_wrap=True, highlight=False)
        except BaseException as error:
            ending = self.ending(error)
            if ending is None:
                raise
            self.say(ending.message)
            raise typer.Exit(ending.status) from None

    def ending(self, error: BaseException) -> Ending | None:
        """Return the line for an error that the user can mend and the exit status; None for any other error."""
        match error:
            case SettingError():
                typed = self.typed.get(error.name, f"--{error.name.replace('_', '-')}")
                return Ending(f"{typed} {error.problem}", 2)
            case ImportError() if error.name in INSTALL:
                return Ending(f"needs {error.name}: pip install {INSTALL[error.name]}", 1)
            case InterruptedRunError():
                return Ending(f"stopped, checkpoint written{self.way_on()}", 130)
            case KeyboardInterrupt():
                return Ending(f"stopped{self.way_on() or self._nothing_saved()}", 130)
            case RuntimeError() if _is_out_of_memory(error):
                return Ending(f"out of memory: try {self.smaller}{self.way_on()}", 1)
        return None

    def say(self, message: str) -> None:
        """Print a line to stderr, after the command's name."""
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"segattn {self.name}: {message}", markup=False)

    def way_on(self) -> str:
        """Return how to go on, to be put behind a message; nothing where there is no way yet."""
        return f"; {self.again}" if self.again and self.saved() else ""

    @contextmanager
    def _warnings_in_a_line(self) -> Iterator[None]:
        """Print each warning of a memory that is not trained in one line, as errors, and leave others alone."""
        with warnings.catch_warnings():
            show = warnings.showwarning

            def line(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
                if category is UntrainedMemoryWarning:
                    self.say(str(message))
                else:
                    show(message, category, *where, **more)

            warnings.showwarning = line
            warnings.simplefilter("always", UntrainedMemoryWarning)
            yield

    def _nothing_saved(self) -> str:
        return "; there is nothing to go on from yet" if self.again else ""


def _is_out_of_memory(error: RuntimeError) -> bool:
    # slow to import, and loaded by whatever raises it; Ctrl-C may have broken into its import, so nothing else asks
    from torch import OutOfMemoryError

    return isinstance(error, OutOfMemoryError)


def counts(name: str, text: str, example: str) -> list[int]:
    """Read numbers from 1 on, such as "4096,32K,1M", in the order in which they stand; K is 1024, M is 1024².

    Raises:
        SettingError: of `name`, with `example` for what it must be.
    """
    numbers = []
    for part in text.split(","):
        digits = part.strip().upper()
        unit = UNITS.get(digits[-1:], 1)
        digits = digits if unit == 1 else digits[:-1]
        if not (digits.isascii() and digits.isdecimal() and digits.strip("0")):
            raise SettingError(name, f"must be numbers from 1 on with commas, as {example}, got {text!r}")
        # longer ones are not even read
        if len(digits) > MOST_DIGITS:
            raise SettingError(name, f"must be numbers of at most {MOST_DIGITS} digits, got one of {len(digits)}")
        numbers.append(int(digits) * unit)
    return numbers


def check_file(name: str, path: Path | None) -> None:
    """Check before any work that a file could be written there.

    Raises:
        SettingError: of `name`: `path` is a folder, is in none, or is no path here.
    """
    if path is None:
        return
    try:
        possible = path.parent.is_dir() and not path.is_dir()
    except OSError as error:
        raise _cannot_write(name, path, error) from None
    if not possible:
        raise SettingError(name, f"must be a file in a folder that exists, got {str(path)!r}")


def write_json(name: str, path: Path, document: Mapping[str, Any]) -> None:
    """Write a document whole, or leave what was there.

    Raises:
        SettingError: of `name`: it cannot be written.
    """
    from ..runs.figures import write_figures

    try:
        write_figures(path, document)
    except OSError as error:
        raise _cannot_write(name, path, error) from None


def _cannot_write(name: str, path: Path, error: OSError) -> SettingError:
    return SettingError(name, f"must be a file that can be written, got {str(path)!r} ({error.strerror})")


def print_files(console: Console, files: Mapping[str, Path]) -> None:
    """Print the files that a command wrote, a line each behind what they hold."""
    width = max(map(len, files))
    for name, path in files.items():
        console.print(f"{name:{width}} {path}", markup=False)


def quiet_transformers() -> None:
    """Keep the progress bars of transformers, as of a model's loading, from breaking into ours."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
