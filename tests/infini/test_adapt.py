"""`segattn adapt`: its pass is the plain model's, its fit lowers the loss it names, and it goes on where it stopped."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
commands = pytest.importorskip("segattn.cli.main")
from models import NAMES, make, save_plain
from rich.console import Console
from typer.testing import CliRunner, Result

import segattn
from segattn.cli.adapt import Stages
from segattn.infini.adapt import run
from segattn.infini.adapt.fit import LayerFit, Recipe, fit_layer, memory_parameters
from segattn.infini.adapt.run import Outputs, run_adaptation
from segattn.infini.adapt.settings import Adaptation
from segattn.infini.evaluate.settings import Checkpoint
from segattn.infini.huggingface.settings import attentions_of, trunk_of
from segattn.infini.huggingface.watching import AttentionCall, watched
from segattn.infini.train import model as model_of_run
from segattn.runs.errors import SettingError
from segattn.runs.text import generate_text

L = 16


def tokens(rows: int, time: int) -> Tensor:
    return torch.randint(3, 61, (rows, time), generator=torch.Generator().manual_seed(1))


def converted(name: str = "llama", **options: Any) -> Any:
    return segattn.convert(make(name), L, quiet=True, **options).requires_grad_(False)


@pytest.mark.parametrize("name", [x for x in ("llama", "gemma2", "stablelm", "gpt_neox") if x in NAMES])
@pytest.mark.parametrize("options", [{}, {"sinks": 3}, {"lookback": 1, "sinks": 3, "memory_maps": True}])
def test_full_attention_in_its_place_is_the_plain_model(name: str, options: dict[str, Any]) -> None:
    model, x = converted(name, **options), tokens(2, 5 * L + 3)

    def logits(model: Any) -> Tensor:
        return model(x, use_cache=False).logits

    with torch.no_grad():
        wanted, before = logits(make(name)), logits(model)
        with watched(model, lambda call: call.full()):
            assert torch.allclose(logits(model), wanted, atol=2e-5)
        with watched(model, lambda call: call.segmented()):
            assert torch.allclose(logits(model), before, atol=2e-5)
        with watched(model, lambda call: torch.cat([call.rows(0, 1).segmented(), call.rows(1, 2).segmented()])):
            assert torch.allclose(logits(model), before, atol=2e-5)
        assert not torch.allclose(wanted, before, atol=1e-2)
        assert torch.equal(logits(model), before)


def losses(call: AttentionCall, first: int, gates: Tensor | None = None) -> Tensor:
    """Return the loss of each head over that of local attention alone, with the gates as they are, or others."""
    gate = call.attention.segattn_gate.bias
    kept = gate.clone()

    def error() -> Tensor:
        return (call.segmented() - call.full())[:, :, first:].square().sum((0, 2, 3))

    if gates is not None:
        gate.copy_(gates)
    loss = error()
    gate.fill_(-1000.0)
    alone = error()
    gate.copy_(kept)
    return loss / alone


@pytest.mark.parametrize("options", [{"sinks": 2}, {"lookback": 1, "sinks": 3, "memory_maps": True}])
def test_a_layer_is_fitted(options: dict[str, Any]) -> None:
    model, x = converted(**options), tokens(3, 6 * L)
    first = (1 + options.get("lookback", 0)) * L
    frozen = {name: weight.clone() for name, weight in make().state_dict().items()}
    seen = []

    def fit(call: AttentionCall) -> Tensor:
        held_out = call.rows(2, 3)
        # the best gates of the stretches that are fitted to are better than those beside them
        fit_layer(call, call.full(), Recipe(first, 0, 0.05, 0.003, 0))
        best = call.attention.segattn_gate.bias.clone()
        fitted_to = call.rows(0, 2)
        at_best = losses(fitted_to, first)
        for step in (-0.3, 0.3):
            inside = (best.sigmoid() > 0.002) & (best.sigmoid() < 0.89)
            assert (losses(fitted_to, first, best + step) >= at_best)[inside].all()
        before = losses(held_out, first)
        count: list[int] = []
        fitted = fit_layer(call, call.full(), Recipe(first, 30, 0.05, 0.02, 0), on_step=lambda: count.append(1))
        assert len(count) == 30
        assert fitted.before == pytest.approx(before.tolist(), rel=1e-4)
        assert fitted.after == pytest.approx(losses(held_out, first).tolist(), rel=1e-4)
        assert fitted.gates == pytest.approx(call.attention.segattn_gate.bias.sigmoid().tolist())
        missed = (held_out.full() - held_out.rows(0, 1).full()).square().sum()
        assert missed == 0
        assert 0 < fitted.beyond < 4
        seen.append((fitted, at_best, losses(fitted_to, first)))
        return call.full()

    with torch.no_grad(), watched(model, fit):
        model.model(x, use_cache=False)
    assert [fitted.layer for fitted, _, _ in seen] == [0, 1]
    if "memory_maps" in options:
        for _, before, after in seen:
            # maps lower what gates alone cannot
            assert after.mean() < 0.99 * before.mean()
    for name, weight in model.state_dict().items():
        assert "segattn" in name or torch.equal(weight, frozen[name])
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a model of bytes, and running text."""
    folder: Path = tmp_path_factory.mktemp("models")
    save_plain(folder)
    (folder / "other.txt").write_text(generate_text(80, seed=2), encoding="utf-8")
    return folder


def checkpoint(folder: Path) -> Checkpoint:
    return Checkpoint(str(folder / "plain"), "bytes", device="cpu")


def adaptation(folder: Path, **changes: Any) -> Adaptation:
    sizes = {"segment_len": L, "sinks": 2, "length": 5 * L, "rows": 2, "steps": 6, "eval_tokens": 100}
    return Adaptation(str(folder / "text.txt"), **sizes | changes)


def test_command_and_its_files(folder: Path, tmp_path: Path) -> None:
    options = {"text": folder / "text.txt", "eval-text": folder / "other.txt", "segment-len": L, "sinks": 2}
    sizes = {"length": 5 * L, "rows": 2, "steps": 6, "eval-tokens": 100, "tokenizer": "bytes", "device": "cpu"}
    words = [str(x) for name, value in (options | sizes).items() for x in (f"--{name}", value)]
    said: Result = CliRunner().invoke(
        commands.app, ["adapt", str(folder / "plain"), *words, "--out", str(tmp_path)], env={"COLUMNS": "200"}
    )
    assert said.exit_code == 0, said.output
    figures = json.loads((tmp_path / "adapt.json").read_text())
    assert [row["conversion"] for row in figures["rows"]] == ["full attention", "untrained", "window alone", "adapted"]
    measured = {row["conversion"]: row["perplexity"] for row in figures["rows"]}
    model = segattn.from_pretrained(tmp_path / "model", quiet=True)
    settings = segattn.infini.huggingface.settings.conversion_of(model).settings
    assert (settings.segment_len, settings.lookback, settings.sinks, settings.memory_maps) == (L, 1, 2, True)
    x = torch.tensor([list((folder / "other.txt").read_bytes()[:100])])
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder / "plain")
    window = segattn.convert(
        transformers.AutoModelForCausalLM.from_pretrained(folder / "plain"), L, lookback=1, sinks=2, quiet=True
    )
    with torch.no_grad():
        for attention in attentions_of(trunk_of(window)):
            attention.segattn_gate.bias.fill_(-1000)
        for name, each in (("full attention", plain), ("window alone", window), ("adapted", model)):
            assert measured[name] == pytest.approx(each(x, labels=x).loss.exp().item(), rel=1e-4), name
    for layer, figure in enumerate(figures["layers"]):
        gates = attentions_of(trunk_of(model))[layer].segattn_gate.bias.sigmoid()
        assert figure["layer"] == layer
        assert figure["gates"] == pytest.approx(gates.tolist(), rel=1e-5)
        assert figures["gates"][str(layer)] == pytest.approx(gates.tolist(), rel=1e-5)
        assert f"layer {layer}: " in said.output
    for path in Outputs.of(tmp_path)[:4]:
        assert path.stat().st_size > 500


def test_a_stopped_run_goes_on_to_the_same(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run_adaptation(checkpoint(folder), adaptation(folder), tmp_path / "whole")

    def stop(call: AttentionCall, full: Tensor, recipe: Recipe, **options: Any) -> Any:
        if call.layer == 1:
            raise KeyboardInterrupt
        return fit_layer(call, full, recipe, **options)

    monkeypatch.setattr(run, "fit_layer", stop)
    with pytest.raises(KeyboardInterrupt):
        run_adaptation(checkpoint(folder), adaptation(folder), tmp_path / "parts")
    monkeypatch.undo()
    with pytest.raises(SettingError, match="steps must be the checkpoint's with --resume, 6, got 7"):
        run_adaptation(checkpoint(folder), adaptation(folder, steps=7), tmp_path / "parts", resume=True)
    calls: list[int] = []
    monkeypatch.setattr(run, "fit_layer", lambda call, *x, **y: (calls.append(call.layer), fit_layer(call, *x, **y))[1])
    parts = run_adaptation(checkpoint(folder), adaptation(folder), tmp_path / "parts", resume=True)
    assert calls == [1]
    assert parts["layers"] == whole["layers"]
    one, other = (segattn.from_pretrained(tmp_path / name / "model", quiet=True) for name in ("whole", "parts"))
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]), name


def test_resume_needs_the_checkpoint_of_the_earlier_run(folder: Path, tmp_path: Path) -> None:
    run_adaptation(checkpoint(folder), adaptation(folder, steps=0), tmp_path)
    # measured tokens move the stretches that are fitted to, unless they are of another text
    with pytest.raises(SettingError, match="eval_tokens must be the checkpoint's with --resume, 100, got 90"):
        run_adaptation(checkpoint(folder), adaptation(folder, steps=0, eval_tokens=90), tmp_path, resume=True)
    path = Outputs.of(tmp_path).checkpoint
    for junk in (b"", b"G12", b"\x80\x02", b"junk", b"K", b"0", b"(d."):
        path.write_bytes(junk)
        with pytest.raises(
            SettingError, match=r"resume needs a checkpoint of segattn adapt; .* another file, or damaged"
        ):
            run_adaptation(checkpoint(folder), adaptation(folder, steps=0), tmp_path, resume=True)
    path.unlink()
    with pytest.raises(SettingError, match="resume needs a checkpoint in the output folder, and there is no"):
        run_adaptation(checkpoint(folder), adaptation(folder, steps=0), tmp_path, resume=True)


def test_another_text_is_named_and_no_hash(folder: Path, tmp_path: Path) -> None:
    run_adaptation(checkpoint(folder), adaptation(folder, steps=0), tmp_path)
    other = adaptation(folder, steps=0, eval_text=str(folder / "other.txt"))
    with pytest.raises(
        SettingError, match=r"eval_text must be the earlier run's with --resume, got '.*other\.txt', which"
    ):
        run_adaptation(checkpoint(folder), other, tmp_path, resume=True)


def test_no_bar_of_transformers_comes_between(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.utils import logging

    shown: list[bool] = []
    save = model_of_run.save_pretrained
    monkeypatch.setattr(
        model_of_run,
        "save_pretrained",
        lambda *x, **y: (shown.append(logging.is_progress_bar_enabled()), save(*x, **y))[1],
    )
    logging.enable_progress_bar()
    run_adaptation(checkpoint(folder), adaptation(folder, steps=0), tmp_path)
    assert "it/s" not in capfd.readouterr().err
    assert shown == [False]
    # and they are as they were
    assert logging.is_progress_bar_enabled()


@pytest.mark.parametrize(
    ("beyond", "after", "said"),
    [
        (8.0, [0.5, 0.25], "misses 800.0 %, of which 62.5 % came back"),
        (0.0123, [20.0], "misses 1.2 %, of which -1,900.0 %"),
    ],
)
def test_shares_of_a_layer_have_no_exponent(beyond: float, after: list[float], said: str) -> None:
    assert said in run._said_of_layer(LayerFit(3, beyond, [1.0], after, [0.5]))


def test_own_activations_are_another_fit(folder: Path, tmp_path: Path) -> None:
    runs = [
        run_adaptation(checkpoint(folder), adaptation(folder, own=own), tmp_path / str(own))["layers"]
        for own in (False, True)
    ]
    # the first layer sees the same
    assert runs[0][0] == runs[1][0]
    assert runs[0][1] != runs[1][1]


def test_layers_without_a_memory_see_their_window(folder: Path, tmp_path: Path) -> None:
    figures = run_adaptation(checkpoint(folder), adaptation(folder, memory_layers="-1", gate_init=-1.0), tmp_path)
    assert [layer["layer"] for layer in figures["layers"]] == [1]
    options: dict[str, Any] = {"lookback": 1, "sinks": 2, "memory_layers": [1], "gate_init": -1.0}
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder / "plain")
    model, x = (
        segattn.convert(plain, L, quiet=True, **options),
        torch.tensor([list((folder / "text.txt").read_bytes()[:100])]),
    )
    untrained = next(row["perplexity"] for row in figures["rows"] if row["conversion"] == "untrained")
    with torch.no_grad():
        assert untrained == pytest.approx(model(x, labels=x).loss.exp().item(), rel=1e-4)
    settings = segattn.infini.huggingface.settings.conversion_of
    assert settings(segattn.from_pretrained(tmp_path / "model", quiet=True)).settings.memory_layers == (1,)


def test_options_of_conversion_are_those_of_other_commands(folder: Path, tmp_path: Path) -> None:
    """With the names that they had before."""
    words = ["adapt", str(folder / "plain"), "--text", str(folder / "text.txt"), "--tokenizer", "bytes"]
    words += ["--device", "cpu", "--segment-len", str(L), "--length", "80", "--rows", "1", "--steps", "0"]
    words += ["--eval-tokens", "50", "--gate-init", "-2", "--no-maps", "--prompt-layers", "1", "--update", "linear"]
    said = CliRunner().invoke(commands.app, [*words, "--out", str(tmp_path)])
    assert said.exit_code == 0, said.output
    entry = json.loads((tmp_path / "adapt.json").read_text())["model"]["conversion"]
    wanted = {"segment_len": L, "gate_init": -2.0, "memory_maps": False, "memory_layers": [1], "update": "linear"}
    assert {name: entry[name] for name in wanted} == wanted
    assert (entry["lookback"], entry["sinks"]) == (1, 4)


def test_each_stage_has_a_bar() -> None:
    file = io.StringIO()
    with Stages(Console(file=file, force_terminal=True, width=60)) as stages:
        stages.begin("one", 4)
        stages.begin("two", 3)
        stages.begin("none", 0)
        for _ in range(4):
            stages.read("one", 1)
        stages.read("two", 2)
        stages.finished("so far")
        bars = {task.description: (task.completed, task.total) for task in stages.bars.tasks}
    assert bars == {"one": (4, 4), "two": (2, 3)}
    assert file.getvalue().count("so far") == 1


def test_gates_alone(folder: Path, tmp_path: Path) -> None:
    run_adaptation(checkpoint(folder), adaptation(folder, memory_maps=False, update="linear"), tmp_path)
    model = segattn.from_pretrained(tmp_path / "model", quiet=True)
    [names] = {tuple(memory_parameters(attention)) for attention in attentions_of(trunk_of(model))}
    assert names == ("segattn_gate.bias",)


def test_what_is_wrong_is_named(folder: Path, tmp_path: Path) -> None:
    long = tmp_path / "long.txt"
    long.write_text("a" * 5000)
    for changes, message in (
        ({"length": 2 * L}, "length must be more than the 32 tokens"),
        ({"eval_tokens": 2 * L}, "eval_tokens must be more than the 32 tokens that local attention sees, got 32"),
        ({"length": 4097}, "length must be at most the 4096 positions of .* 4097: choose fewer"),
        ({"lookback": 2}, "lookback must be 0 or 1"),
        ({"sinks": L + 1}, "sinks must be"),
        ({"update": "none"}, "update must be"),
        ({"lookback": "1"}, "lookback must be 0 or 1"),
        ({"rows": 0}, "rows must be at least 1"),
        ({"rows": "2"}, "rows must be a number, got '2'"),
        ({"map_lr": "fast"}, "map_lr must be 0 or more, got 'fast'"),
        ({"gate_lr": float("nan")}, "gate_lr must be 0 or more"),
        (
            {"rows": 500},
            r"text must be of 40080 tokens and more for --rows 500, got \d+ behind the first 100, which are "
            "measured on: give fewer --rows, or another text to measure on by --eval-text$",
        ),
        (
            {"rows": 500, "eval_text": str(long)},
            r"text must be of 40080 tokens and more for --rows 500, got \d+: give fewer --rows$",
        ),
        ({"eval_tokens": 5000}, "eval_tokens must be at most"),
        ({"eval_text": str(long), "eval_tokens": 4500}, "eval_tokens must be at most the 4096 positions"),
        ({"eval_text": str(folder / "none.txt")}, "text must be a file"),
    ):
        with pytest.raises(SettingError, match=message):
            run_adaptation(checkpoint(folder), adaptation(folder, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()
