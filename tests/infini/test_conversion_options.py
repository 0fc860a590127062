"""The options of conversion are those of `convert`, the same for every command, and mean the same."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
commands = pytest.importorskip("segattn.cli.main")
from models import make_of_bytes
from typer.testing import CliRunner, Result

import segattn
from segattn.infini.conversion_options import NAMES, UPDATES, ConversionOptions
from segattn.infini.evaluate.conversions import arguments_of
from segattn.infini.evaluate.loading import load
from segattn.infini.evaluate.settings import Source
from segattn.infini.gate import Gate
from segattn.infini.huggingface.saving import save_pretrained
from segattn.infini.huggingface.settings import conversion_of
from segattn.infini.memory_map import MemoryMap
from segattn.infini.train.model import build_model
from segattn.infini.train.settings import TrainSettings
from segattn.kernels import validation
from segattn.runs.errors import SettingError
from segattn.runs.text import generate_text

L, TOKENS = 24, 203
OPTIONS: dict[str, Any] = {"segment_len": L, "update": "linear", "gate_init": -1.5, "lookback": 1, "sinks": 3}
OPTIONS |= {"memory_maps": True, "memory_layers": "-1"}
CONVERTING = (
    "adapt",
    "finetune",
    *(f"evaluate {name}" for name in "passkey needle book perplexity ruler babilong".split()),
)


def test_commands_know_the_rules_of_the_operation() -> None:
    assert UPDATES == validation.UPDATES


def tiny() -> Any:
    return make_of_bytes(256)


def flags(options: dict[str, Any]) -> list[str]:
    given = []
    for name, value in options.items():
        given += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return given


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain checkpoint, one converted with all options, and running text."""
    folder: Path = tmp_path_factory.mktemp("models")
    tiny().save_pretrained(folder / "plain")
    save_pretrained(converted(), folder / "converted")
    (folder / "text.txt").write_text(generate_text(400, seed=1), encoding="utf-8")
    return folder


def converted() -> Any:
    return segattn.convert(tiny(), quiet=True, **OPTIONS | {"memory_layers": [-1]})


def training(folder: Path, **changed: Any) -> TrainSettings:
    given = {"model": str(folder / "plain"), "text": str(folder / "text.txt"), "tokenizer": "bytes", "length": 75}
    return TrainSettings(**given | OPTIONS | changed)


def invoke(*arguments: Any) -> Result:
    return CliRunner().invoke(commands.app, [str(x) for x in arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})


def test_options_are_arguments_of_convert() -> None:
    assert set(NAMES) <= inspect.signature(segattn.convert).parameters.keys()
    assert ConversionOptions().convert_arguments() == {}
    given = ConversionOptions(**OPTIONS).convert_arguments()
    assert given == OPTIONS | {"memory_layers": [-1]}
    assert ConversionOptions(lookback=0, sinks=0).convert_arguments() == {"lookback": 0, "sinks": 0}
    # which the options' help says
    defaults = {name: x.default for name, x in inspect.signature(segattn.convert).parameters.items()}
    assert (defaults["segment_len"], defaults["update"], defaults["gate_init"]) == (2048, "delta", -4.0)
    assert (defaults["lookback"], defaults["sinks"], defaults["memory_maps"]) == (0, 0, False)


@pytest.mark.parametrize("command", CONVERTING)
def test_every_command_that_converts_has_all_of_them(command: str) -> None:
    said = invoke(*command.split(), "--help").output
    assert "Conversion of a plain model" in said
    panel = said.partition("Conversion of a plain model")[2]
    for name in NAMES:
        assert re.search(rf"--{name.replace('_', '-')}[\s,]", panel)
    assert "--out" not in panel


@pytest.mark.parametrize(
    ("text", "layers"),
    [("10-13", [10, 11, 12, 13]), ("0, 5,-1", [0, 5, -1]), ("-3--1", [-3, -2, -1]), ("2-2", [2]), ("-1-1", [-1, 0, 1])],
)
def test_layers_are_numbers_and_ranges(text: str, layers: list[int]) -> None:
    assert ConversionOptions(memory_layers=text).convert_arguments() == {"memory_layers": layers}


@pytest.mark.parametrize("text", ["", "a", "3-1", "1,,2", "1.5", "5--1", "1-2-3", "-"])
def test_layers_that_are_none(text: str) -> None:
    said = f"memory_layers must be numbers of layers and ranges of them with commas, .* got {text!r}"
    with pytest.raises(SettingError, match=said):
        ConversionOptions(memory_layers=text)
    with pytest.raises(SettingError, match=said):
        Source("model", convert=True, memory_layers=text)
    with pytest.raises(SettingError, match=said):
        TrainSettings(model="model", text="text", memory_layers=text)


def test_an_evaluation_reads_with_the_model_that_was_asked_for(folder: Path, tmp_path: Path) -> None:
    given = ["evaluate", "perplexity", folder / "plain", "--text", folder / "text.txt", "--limit", TOKENS]
    given += ["--tokenizer", "bytes", "--device", "cpu", "--out", tmp_path]
    result = invoke(*given, "--convert", *flags(OPTIONS))
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "perplexity.json").read_text())
    wanted = conversion_of(converted()).settings.as_entry()
    assert figures["model"]["conversion"] == json.loads(json.dumps(wanted))
    tokens = torch.tensor([list((folder / "text.txt").read_bytes())[:TOKENS]])
    with torch.no_grad():
        nats = F.cross_entropy(converted()(tokens).logits[0, :-1], tokens[0, 1:]).item()
    assert figures["mean"]["nats"] == pytest.approx(nats, rel=1e-5)
    # the same model without one of them reads otherwise
    for name in ("lookback", "sinks"):
        other = segattn.convert(tiny(), quiet=True, **OPTIONS | {"memory_layers": [-1], name: 0})
        with torch.no_grad():
            assert F.cross_entropy(other(tokens).logits[0, :-1], tokens[0, 1:]).item() != pytest.approx(nats, rel=1e-5)
    # goes on where conversion and weights are the same
    again = invoke(*given, "--convert", *flags(OPTIONS | {"memory_layers": "1"}), "--resume")
    assert again.exit_code == 0, again.output
    other = invoke(*given, "--convert", *flags(OPTIONS | {"sinks": 2}), "--resume")
    assert other.exit_code == 2
    assert "MODEL must be the earlier run's with --resume" in other.stderr


def test_a_training_trains_the_model_that_was_asked_for(folder: Path) -> None:
    model, _ = build_model(training(folder))
    assert conversion_of(model).settings == conversion_of(converted()).settings
    # from scratch the gate begins at 0, unless it is given
    scratch = {"model": None, "layers": 2, "width": 16, "heads": 2}
    for changed, gate in (({"gate_init": None}, 0.0), ({}, -1.5)):
        model, _ = build_model(training(folder, **scratch | changed))
        assert conversion_of(model).settings.gate_init == gate
    # settings of an earlier run, as its checkpoint holds them
    kept = json.loads(json.dumps(asdict(training(folder))))
    assert TrainSettings(**kept) == training(folder)


@pytest.mark.parametrize(
    ("changed", "trained"),
    [({}, None), ({"freeze_but_gates": True}, (Gate,)), ({"lora": 2}, (Gate, MemoryMap))],
    ids=["all", "gates", "lora"],
)
def test_maps_are_trained_where_more_than_gates_is(
    folder: Path, changed: dict[str, Any], trained: tuple[type, ...] | None
) -> None:
    if "lora" in changed:
        pytest.importorskip("peft")
    model, _ = build_model(training(folder, **changed))
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        wanted = trained is None or isinstance(owner, trained) or "lora_" in name
        assert parameter.requires_grad is wanted, name
    assert sum(isinstance(module, MemoryMap) for module in model.modules()) == 2


@pytest.mark.parametrize("name", NAMES)
def test_a_converted_model_is_not_converted_otherwise(folder: Path, name: str) -> None:
    same = training(folder, model=str(folder / "converted"))
    build_model(same)
    other = {"segment_len": 25, "update": "delta", "gate_init": 0.0, "lookback": 0, "sinks": 2, "memory_maps": False}
    with pytest.raises(SettingError, match=f"{name} must be the model's, .*, or left out, got"):
        build_model(replace(same, **{name: (other | {"memory_layers": "0-1"})[name]}))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"lookback": 2}, "--lookback must be 0 or 1"),
        ({"lookback": -1}, "--lookback must be "),
        ({"sinks": L + 1}, "--sinks must be "),
        ({"sinks": -1}, "--sinks must be "),
        ({"gate_init": "inf"}, "--gate-init must be finite, got inf"),
        ({"memory_layers": "2"}, "--memory-layers must lie in [-2, 2), got 2"),
        ({"memory_layers": "x"}, "--memory-layers must be numbers of layers and ranges"),
    ],
)
def test_commands_name_the_option_that_cannot_be(
    folder: Path, tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    given = [folder / "plain", "--text", folder / "text.txt", "--tokenizer", "bytes", "--device", "cpu"]
    given += ["--out", tmp_path / "out", *flags(OPTIONS | changed)]
    for command in (["finetune", *given, "--length", "75"], ["evaluate", "perplexity", *given, "--convert"]):
        result = invoke(*command)
        assert result.exit_code == 2, result.output
        assert said in result.stderr
        assert result.stderr.count("\n") == 1
        assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("name", NAMES)
def test_an_evaluation_that_does_not_convert_takes_none(name: str) -> None:
    with pytest.raises(SettingError, match=f"{name} must come with --convert, got .* without"):
        Source("model", **{name: OPTIONS[name]})


def test_gates_bring_their_own_conversion(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "gates.safetensors"
    segattn.save_gates(converted(), path)
    plain: dict[str, Any] = {"tokenizer": "bytes", "gates": str(path), "device": "cpu", "convert": True}
    loaded = load(Source(str(folder / "plain"), **plain, **OPTIONS))
    assert conversion_of(loaded.model).settings == conversion_of(converted()).settings
    with pytest.raises(SettingError, match="sinks must be that of the gates, 3, or left out, got 4"):
        load(Source(str(folder / "plain"), **plain, sinks=4))


def test_words_of_a_report_are_options() -> None:
    assert arguments_of("24 gate=-4 lookback=1 sinks=4 update=linear memory_layers=10-12") == {
        "segment_len": 24,
        "gate_init": -4.0,
        "lookback": 1,
        "sinks": 4,
        "update": "linear",
        "memory_layers": [10, 11, 12],
    }
    with pytest.raises(SettingError, match="conversions memory_layers must be numbers of layers and ranges"):
        arguments_of("24 memory_layers=3-1")
