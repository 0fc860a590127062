"""Options of a command, made from the fields of its settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from dataclasses import fields
from functools import wraps
from typing import Annotated, Any, get_args, get_type_hints

import typer

Command = Callable[..., None]


def options_of(settings: type, *, arguments: Collection[str] = ()) -> Callable[[Command], Command]:
    """Give a command an option for every field of a dataclass.

    A field is `name: Annotated[type, "Help."] = default`, its type one that typer knows; more strings after the help
    are more names of the option. The help ends with the default, where there is one. A field that is False is a flag,
    one that is True a pair of flags. The command is called with its own parameters, and with those fields that the user
    gave. A parameter of the command that is named like a field stands for the field.

    Args:
        settings: the dataclass.
        arguments: fields that are arguments of the command, without dashes, in the order of the fields.
    """

    def decorate(command: Command) -> Command:
        parameters = inspect.signature(command, eval_str=True).parameters.values()
        own = {p.name: p.replace(kind=p.KEYWORD_ONLY) for p in parameters if p.kind is not p.VAR_KEYWORD}
        made = [field.name for field in fields(settings) if field.name not in own]
        made.sort(key=lambda name: name not in arguments)
        hints = get_type_hints(settings, include_extras=True)
        defaults = {field.name: field.default for field in fields(settings)}

        @wraps(command)
        def run(**values: Any) -> None:
            command(**{name: value for name, value in values.items() if name in own or value is not None})

        signature = [_parameter(name, hints[name], defaults[name], name in arguments) for name in made]
        run.__signature__ = inspect.Signature([*signature, *own.values()])  # type: ignore[attr-defined]
        return run

    return decorate


def _parameter(name: str, hint: Any, default: Any, is_argument: bool) -> inspect.Parameter:
    """Return the parameter of a field: None, unless the user gives it."""
    kind, text, *more_names = get_args(hint)
    option = name.replace("_", "-")
    names = [f"--{option}/--no-{option}" if default is True else f"--{option}", *more_names]
    says_default = default is not None and not isinstance(default, bool)
    if is_argument:
        info: Any = typer.Argument(help=text, show_default=False)
    else:
        info = typer.Option(*names, help=f"{text} Default: {default}." if says_default else text, show_default=False)
    parameter = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
    return parameter.replace(annotation=Annotated[kind | None, info])
