"""The commands `segattn check` and `segattn config`: are the backends right here, and which of them run."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..runs.errors import SettingError
from .progress import Progress
from .shell import Command, check_file, write_json

if TYPE_CHECKING:
    from ..kernels.check.report import CheckReport


def config() -> None:
    """Show which backend runs here, and why."""
    from ..kernels.backends import show_config

    with Command("config").run() as console:
        console.print(show_config())


def check(
    device: Annotated[str | None, typer.Option(help="Where to run: cuda or cpu. Default: a GPU where one is.")] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(help="Backend to check: torch or triton; may be repeated. Default: all that run."),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="Dtype to check: float32, float16 or bfloat16; may be repeated. Default: all three."),
    ] = None,
    call: Annotated[
        list[str] | None,
        typer.Option(
            help="A call to check in place of all kinds, such as B=1,H=8,G=2,T=300,K=96,V=96,segment_len=128; may be "
            "repeated."
        ),
    ] = None,
    emulate: Annotated[
        str | None,
        typer.Option(
            help="Execute the kernels' code for a GPU that is not here, on the CPU: sm_80, sm_90, sm_100 or sm_120."
        ),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="File to write every error to.")] = None,
) -> None:
    """Compare every backend that runs here with the float64 reference, over calls of every kind, each run twice.

    Seconds on a CPU, a minute with TRITON_INTERPRET=1, minutes on a GPU or with --emulate. Exit status 1 if anything
    fails.
    """
    with Command("check", typed={"calls": "--call"}).run() as console:
        from ..kernels.check.check import OptionError, run_check
        from ..kernels.check.table import call_of

        check_file("json", json)
        try:
            calls = {text: call_of(text) for text in call} if call else None
        except ValueError as error:
            raise SettingError("calls", str(error)) from None
        here = _emulated(emulate, device) if emulate is not None else nullcontext()
        if emulate is not None:
            device, backend = "cpu", backend or ["triton"]
        try:
            with here, Comparisons(console) as listener:
                report = run_check(device, backend, dtype, calls, listener=listener.compared)
        except OptionError as error:
            raise SettingError(error.name, error.problem) from None
        if emulate is not None:
            report = replace(report, device=f"{emulate}, executed on the CPU")
        _show(console, report)
        if json is not None:
            write_json("json", json, report.as_json())
        if report.failures:
            raise typer.Exit(1)


def _emulated(target: str, device: str | None) -> AbstractContextManager[object]:
    """Return the context in which the kernels' code for `target` is executed on the CPU.

    Raises:
        SettingError: no such target; a device beside it; Triton is missing, or interprets.
    """
    from ..kernels.backends import HAS_TRITON
    from ..kernels.check.check import interpreted

    if not HAS_TRITON:
        raise SettingError("emulate", "needs the triton package: pip install triton")
    if interpreted():
        raise SettingError("emulate", "compiles the kernels, which TRITON_INTERPRET=1 prevents: unset it")
    if device not in (None, "cpu"):
        raise SettingError("device", f"must be cpu with --emulate, got {device!r}")
    from ..bench.emulated.launches import EMULATED, emulating
    from ..kernels.triton.configs import TARGETS

    if target not in EMULATED:
        raise SettingError("emulate", f"must be one of {', '.join(EMULATED)}, got {target!r}")
    return emulating(TARGETS[target])


class Comparisons(Progress):
    """The calls that a check has compared, on a terminal; it takes seconds, and says nothing elsewhere."""

    def compared(self, done: int, total: int, call: str) -> None:
        """Move the bar."""
        self.bar("check", done, total, call)


def _show(console: Console, report: CheckReport) -> None:
    """Print the largest error of every output, what failed, and how much was compared."""
    table = Table(title=f"Largest relative RMS errors, {report.device}", title_justify="left")
    for column in ("backend", "dtype", "output", "error", "gate", "worst in call"):
        table.add_column(column, justify="right" if column in ("error", "gate") else "left")
    group = None
    for row in report.worst():
        if (row.backend, row.dtype) != group and group is not None:
            table.add_section()
        group = (row.backend, row.dtype)
        table.add_row(row.backend, row.dtype, row.output, f"{row.error:.1e}", f"{row.gate:.0e}", row.call)
    console.print(table)
    for line in report.lines():
        console.print(line, markup=False)
