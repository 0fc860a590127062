"""Options of commands from the fields of their settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import pytest

typer = pytest.importorskip("typer")
typer_testing = pytest.importorskip("typer.testing")

from segattn.cli.options import help_of, options_of, settings_from


@dataclass(frozen=True)
class Settings:
    steps: Annotated[int, "Steps of the optimizer."] = 10
    rate: Annotated[float | None, "Learning rate. Default: by the model."] = None
    is_shown: Annotated[bool, "Show it.", "-s"] = False
    is_exact: Annotated[bool, "Be exact."] = True
    folder: Annotated[str | None, "Where from."] = None
    device: Annotated[str, "Where."] = "cpu"


def invoke(*arguments: str) -> tuple[dict[str, Any], str]:
    """What a command is called with, and what it says."""
    called: dict[str, Any] = {}
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    @options_of(Settings, arguments=("folder",))
    def command(
        device: Annotated[str, typer.Option(help="On which device.")] = "cuda",
        out: Annotated[str | None, typer.Option(help="Where to.")] = None,
        **given: Any,
    ) -> None:
        """Do it."""
        called.update(given, device=device, out=out)

    result = typer_testing.CliRunner().invoke(app, arguments, env={"COLUMNS": "200", "NO_COLOR": "1"})
    return called, result.output


def test_a_command_is_called_with_what_was_given() -> None:
    own = {"device": "cuda", "out": None}
    assert invoke()[0] == own
    given = ("here", "--steps", "3", "--rate", "0.5", "--is-shown", "--no-is-exact", "--device", "mps")
    wanted = {"folder": "here", "steps": 3, "rate": 0.5, "is_shown": True, "is_exact": False}
    assert invoke(*given)[0] == own | wanted | {"device": "mps"}
    assert invoke("-s", "--is-exact")[0] == own | {"is_shown": True, "is_exact": True}


def test_help_is_that_of_the_fields() -> None:
    _, said = invoke("--help")
    said = " ".join(said.replace("│", " ").split())
    for text in (
        "Do it.",
        "Steps of the optimizer. Default: 10.",
        "Learning rate. Default: by the model.",
        "Where from.",
    ):
        assert text in said
    for text in ("Show it. Default", "Be exact. Default", "Where. Default", "--folder"):
        assert text not in said


def test_values_are_of_the_fields_types() -> None:
    called, said = invoke("--steps", "many")
    assert not called
    assert "Invalid value for '--steps'" in said


@dataclass(frozen=True)
class Text:
    text: Annotated[str, "What to read."]
    length: Annotated[tuple[int, ...], "Tokens of it."] = (8,)
    depth: Annotated[float, "How far in."] = 0.5


def test_options_of_several_settings() -> None:
    """One after the other; a parameter stands in its field's place, and a field without a default must be given."""
    called: dict[str, Any] = {}
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    @options_of(Text, Settings, arguments=("folder",))
    def command(
        out: Annotated[str | None, typer.Option()] = None,
        length: Annotated[str, typer.Option(help=help_of(Text, "length"))] = "8",
        **given: Any,
    ) -> None:
        called.update(given, out=out, length=length)

    def invoke(*arguments: str) -> str:
        return str(typer_testing.CliRunner().invoke(app, arguments, env={"COLUMNS": "200", "NO_COLOR": "1"}).output)

    assert "Missing option '--text'" in invoke("here")
    assert not called
    invoke("here", "--text", "a", "--depth", "1", "--length", "4,5", "--steps", "3")
    assert called == {"folder": "here", "text": "a", "depth": 1.0, "length": "4,5", "steps": 3, "out": None}
    assert settings_from(Text, called | {"length": (4, 5)}) == Text("a", (4, 5), 1.0)
    assert settings_from(Settings, called) == Settings(steps=3, folder="here")
    said = invoke("--help")
    names = ("folder", "--text", "--length", "Tokens of it.", "--depth", "--steps", "--rate", "--out")
    assert sorted(names, key=said.index) == list(names)
