"""One way for all experiments: settings, runs that are kept in a JSON as each ends, and a picture of the JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ...runs.errors import SettingError
from ...runs.figures import write_figures
from ..speed.machine import commit, device_facts

AnySetup = TypeVar("AnySetup")
Figures = dict[str, Any]
# what tells a run from the others, by the names in `Runs.identity`
Job = tuple[Any, ...]
# takes an amount of work that is done, and a word on it
Advance = Callable[[int, str], None]


class Runs(NamedTuple):
    """The runs of an experiment.

    key: Where they stand in the JSON.
    identity: The keys of a run that tell it from the others.
    amounts: Each run's amount of work, by its identity, in their order.
    perform: Does one of them, and returns its figures.
    line: A run's figures as a line of the output.
    summarise: From all figures to those that are added after each run.
    """

    key: str
    identity: Sequence[str]
    amounts: Mapping[Job, int]
    perform: Callable[[Job, Advance], Figures]
    line: Callable[[Figures], str]
    summarise: Callable[[Figures], Figures]


def run_all(path: Path, figures: Figures, runs: Runs) -> Figures:
    """Return the figures with every run; those that they lack are performed, and written to `path` as each ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    done = {tuple(run[name] for name in runs.identity) for run in figures[runs.key]}
    left = {job: amount for job, amount in runs.amounts.items() if job not in done}
    console = Console(soft_wrap=True, highlight=False)
    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=sum(left.values()))
        for job in left:

            def advance(amount: int, word: str = "", name: str = ", ".join(map(str, job))) -> None:
                progress.update(task, advance=amount, description=f"{name}{word}")

            run = dict(zip(runs.identity, job, strict=True)) | runs.perform(job, advance)
            figures[runs.key].append(run)
            figures |= runs.summarise(figures)
            write_figures(path, figures)
            console.print(runs.line(run))
            console.file.flush()
    return figures


def earlier(path: Path, about: Mapping[str, Any], key: str, free: Sequence[str] = ()) -> Figures:
    """Return the figures in `path` to go on with, or those of no run.

    Args:
        about: What the runs are of: `setup`, by name, and anything else that must be the same.
        key: Where the runs stand in the JSON.
        free: Settings that may differ.

    Raises:
        SettingError: Naming the setting that differs, or `out` where the figures are of something else.
    """
    if not path.is_file():
        return dict(about) | {key: []}
    try:
        figures: Figures = json.loads(path.read_text(encoding="utf-8"))
        before = figures["setup"]
        before.update({name: about["setup"][name] for name in free})
        others = {name: figures[name] for name in (*about, key) if name != "setup"}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise SettingError("out", f"must hold figures of this command or none; {path} is damaged, or other's") from None
    if before.keys() != about["setup"].keys():
        raise SettingError("out", f"must be another: {path} is of another version, with other settings")
    for name, value in about["setup"].items():
        if before[name] != value:
            raise SettingError(name, f"must be {before[name]} as in {path}, got {value}: or choose another --out")
    for name, value in about.items():
        if name != "setup" and others[name] != value:
            raise SettingError(name, f"must be the one of {path}, which is another: or choose another --out")
    return figures


def made_by() -> dict[str, Any]:
    """Return the commit, whether files differ from it, and the processor."""
    machine = {"processor": processor(), "capability": torch.backends.cpu.get_cpu_capability()}
    return commit() | device_facts(torch.device("cpu")) | machine


def processor() -> str | None:
    """Return the processor's name; None where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def command(
    setup_type: type[AnySetup],
    experiment: Callable[..., object],
    name: str,
    about: str,
    arguments: Sequence[str] | None,
    **paths: str,
) -> int:
    """Run an experiment as a command whose options are the setup's fields, and paths by name with their help.

    A field's metadata may hold its `help`, and `parse`, from the option's text to the value.

    Returns:
        The exit status: 2 for an impossible setting, or figures of another experiment; 130 after an interruption.
    """
    parser = argparse.ArgumentParser(prog=f"python -m segattn.bench.experiments.{name}", description=about)
    for option, text in paths.items():
        parser.add_argument(f"--{option}", type=Path, required=True, help=text)
    options: Sequence[Field[Any]] = fields(setup_type)  # type: ignore[arg-type]
    for field in options:
        _add(parser, field)
    given = vars(parser.parse_args(arguments))
    try:
        values = {field.name: _value(field, given[field.name]) for field in options}
        experiment(setup_type(**values), **{option: given[option] for option in paths})
    except SettingError as error:
        sys.stderr.write(f"{name}: --{error.name.replace('_', '-')} {error.problem}\n")
        return 2
    except (OSError, ValueError) as error:
        sys.stderr.write(f"{name}: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write(f"{name}: stopped; the same command goes on after the last whole run\n")
        return 130
    return 0


def _add(parser: argparse.ArgumentParser, field: Field[Any]) -> None:
    option, text = f"--{field.name.replace('_', '-')}", field.metadata.get("help", "default: %(default)s")
    if "parse" in field.metadata:
        parser.add_argument(option, help=text)
    elif isinstance(field.default, tuple):
        kind = type(field.default[0])
        parser.add_argument(option, type=kind, nargs="+", default=field.default, help=text)
    else:
        parser.add_argument(option, type=type(field.default), default=field.default, help=text)


def _value(field: Field[Any], given: Any) -> Any:
    if "parse" in field.metadata:
        return field.default if given is None else field.metadata["parse"](given)
    return tuple(given) if isinstance(field.default, tuple) else given
