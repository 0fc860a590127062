"""Options of a command, made from the fields of its settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import typer

Command = Callable[..., None]
Settings = TypeVar("Settings")

# what commands that write have in common
Out = Annotated[Path, typer.Option(help="Folder for everything that is written.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the checkpoint in the output folder.")]
ResumeMeasuring = Annotated[bool, typer.Option("--resume", help="Keep what is measured, and measure the rest.")]


def options_of(*settings: type, arguments: Collection[str] = ()) -> Callable[[Command], Command]:
    """Give a command an option for every field of dataclasses, in their order.

    A field is `name: Annotated[type, "Help."] = default`, its type one that typer knows; more strings after the help
    are more names of the option. The help ends with the default, where there is one. A field that is False is a flag,
    one that is True a pair of flags; one without a default must be given. The command is called with its own
    parameters, and with those fields that the user gave. A parameter of the command that is named like a field stands
    for the field, in its place; the others come last. Fields that a class with a PANEL declares stand under it in the
    command's help.

    Args:
        settings: the dataclasses.
        arguments: fields that are arguments of the command, without dashes, in the order of the fields.
    """

    def decorate(command: Command) -> Command:
        parameters = inspect.signature(command, eval_str=True).parameters.values()
        own = {p.name: p.replace(kind=p.KEYWORD_ONLY) for p in parameters if p.kind is not p.VAR_KEYWORD}
        made = {}
        for each in settings:
            hints, panels = get_type_hints(each, include_extras=True), _panels(each)
            for field in fields(each):
                hint, panel = hints[field.name], panels.get(field.name)
                made[field.name] = _parameter(field.name, hint, field.default, field.name in arguments, panel)

        @wraps(command)
        def run(**values: Any) -> None:
            command(**{name: value for name, value in values.items() if name in own or value is not None})

        signature = sorted((made | own).values(), key=lambda parameter: parameter.name not in arguments)
        run.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]
        return run

    return decorate


def help_of(settings: type, field: str) -> str:
    """Return the help of a field, for a parameter that stands for it."""
    return str(get_args(get_type_hints(settings, include_extras=True)[field])[1])


def settings_from(settings: type[Settings], values: Mapping[str, Any]) -> Settings:
    """Return settings from those of the values that are their fields."""
    names = [field.name for field in fields(settings)]  # type: ignore[arg-type]
    return settings(**{name: values[name] for name in names if name in values})


def _panels(settings: type) -> dict[str, str]:
    """Return the heading of each field that has one."""
    declared = [(base.__dict__["PANEL"], base.__annotations__) for base in settings.__mro__ if "PANEL" in vars(base)]
    return {name: panel for panel, names in declared for name in names}


def _parameter(name: str, hint: Any, default: Any, is_argument: bool, panel: str | None) -> inspect.Parameter:
    """Return the parameter of a field: None, unless the user gives it or must give it."""
    kind, text, *more_names = get_args(hint)
    if default not in (None, MISSING) and not isinstance(default, bool):
        text = f"{text} Default: {format(default, 'g' if isinstance(default, float) else '')}."
    if is_argument:
        info: Any = typer.Argument(help=text, show_default=False)
    else:
        option = name.replace("_", "-")
        names = [f"--{option}/--no-{option}" if default is True else f"--{option}", *more_names]
        info = typer.Option(*names, help=text, show_default=False, rich_help_panel=panel)
    required = default is MISSING
    parameter = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY)
    kind = kind if required else kind | None
    default = inspect.Parameter.empty if required else None
    return parameter.replace(annotation=Annotated[kind, info], default=default)
