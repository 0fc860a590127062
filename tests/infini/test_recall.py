"""The passkey stage of `segattn adapt`: its outputs are the converted model's, and its fit finds what is stated."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
commands = pytest.importorskip("segattn.cli.main")
from models import make, save_plain
from typer.testing import CliRunner

import segattn
from segattn.infini.adapt import asking
from segattn.infini.adapt import passkeys as stage
from segattn.infini.adapt import run as adaptation_run
from segattn.infini.adapt.fit import memory_parameters
from segattn.infini.adapt.kept import without_memory
from segattn.infini.adapt.lookups import Lookups, Prompts, attention_weights, looked_up, make_prompts, record
from segattn.infini.adapt.recall import Heads, RecallRecipe, fit_recall
from segattn.infini.adapt.run import run_adaptation
from segattn.infini.adapt.settings import Adaptation, Passkeys, check_together
from segattn.infini.evaluate import retrieval
from segattn.infini.evaluate.loading import ByteTokenizer, convert_named
from segattn.infini.evaluate.passkey import FILLER, STATEMENT
from segattn.infini.evaluate.retrieval import measure, measure_grid
from segattn.infini.evaluate.settings import Checkpoint
from segattn.infini.huggingface.settings import attentions_of, conversion_of, trunk_of
from segattn.infini.huggingface.watching import AttentionCall, watched
from segattn.runs.errors import SettingError
from segattn.runs.silence import SILENT, Silent

L = 16


def converted(name: str = "llama", *, memory_maps: bool = True, **options: Any) -> Any:
    model = make(name, vocab_size=256)
    return segattn.convert(model, L, quiet=True, memory_maps=memory_maps, **options).requires_grad_(False)


def prompts(count: int = 3, lookback: int = 1, length: int = 20 * L + 9) -> Prompts:
    return make_prompts(ByteTokenizer(), count, length, L, lookback, seed=1)


def disturb(model: Any) -> None:
    """Give every map and gate values of its own."""
    generator = torch.Generator().manual_seed(3)
    for attention in attentions_of(trunk_of(model)):
        for parameter in memory_parameters(attention).values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def recipe(steps: int = 0, lookback: int = 1, **changes: Any) -> RecallRecipe:
    return RecallRecipe(L, lookback, steps, **{"map_lr": 3e-2, "gate_lr": 5e-2, "stretch": 64.0, "seed": 0} | changes)


def test_prompts_say_where_their_parts_are() -> None:
    drawn = prompts(5)
    assert drawn.asking == 5
    text = FILLER.encode()
    for tokens, answer, stated, keys, filler in zip(*drawn, strict=True):
        key = bytes(answer.tolist()).decode()
        assert bytes(tokens[keys].tolist()).decode() == 2 * key
        assert bytes(tokens[stated].tolist()).decode() == f"\n{STATEMENT.format(key=key)}\n"
        assert bytes(tokens.tolist()).decode().endswith(f"The pass key is {key[:-1]}")
        # the first row that asks has the whole statement in its memory
        first = len(tokens) - drawn.asking
        assert int(stated.nonzero().max()) < (first // L - 1) * L
        assert not (stated & filler).any()
        assert (
            bytes(tokens[filler].tolist())[: len(text) // 2] == text[: len(text) // 2] or stated.nonzero().min() < 250
        )
    assert len({tuple(answer) for answer in drawn.answers.tolist()}) == 5
    for i, row, column in drawn.answered.nonzero().tolist():
        assert drawn.keys[i, column]
        assert drawn.tokens[i, column] == drawn.answers[i, row]
    # the statement has the key twice
    assert (drawn.answered.sum(2) >= 2).all()
    assert torch.equal(drawn.answered.any(1), drawn.keys)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox", "gpt_oss"])
def test_weights_are_those_of_full_attention(name: str) -> None:
    model, drawn = converted(name), prompts(2)
    rows = torch.tensor([[7, 100, 300], [0, 40, 320]])
    seen = []

    def watch(call: AttentionCall) -> Tensor:
        full = call.full()
        v = call.v.repeat_interleave(call.q.shape[1] // call.v.shape[1], dim=1)
        wanted = full.take_along_dim(rows[:, None, :, None], 2)
        assert torch.allclose(attention_weights(call, rows) @ v, wanted, atol=1e-5)
        seen.append(call.layer)
        return full

    with torch.no_grad(), watched(model, watch):
        trunk_of(model)(input_ids=drawn.tokens, use_cache=False)
    assert seen


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"lookback": 1, "sinks": 3}),
        ("llama", {}),
        ("llama", {"memory_maps": False}),
        ("gemma2", {"lookback": 1}),
        ("gpt_neox", {"sinks": 2}),
    ],
)
def test_outputs_and_gradients_are_those_of_the_converted_model(name: str, options: dict[str, Any]) -> None:
    model = converted(name, update="linear", **options)
    lookback = options.get("lookback", 0)
    drawn, heads = prompts(lookback=lookback), [0, 2, 3]
    with without_memory(model):
        lookups = record(model, drawn, {1: heads}, seed=0)[1]
    disturb(model)
    attention = attentions_of(trunk_of(model))[1]
    parameters = memory_parameters(attention)
    found: list[Tensor] = []

    def watch(call: AttentionCall) -> Tensor:
        if call.layer == 0:
            # what the layer below gave while the lookups were recorded
            with without_memory(model):
                return call.segmented()
        with torch.enable_grad():
            out = call.segmented()[:, heads].take_along_dim(lookups.rows[:, None, :, None], 2)
        found.append(out)
        return call.full()

    for parameter in parameters.values():
        parameter.requires_grad_(True)
    with torch.no_grad(), watched(model, watch):
        trunk_of(model)(input_ids=drawn.tokens, use_cache=False)
    [wanted] = found
    out, _ = Heads(parameters, lookups, drawn, recipe(lookback=lookback)).outputs(torch.arange(3), torch.ones(3))
    assert torch.allclose(out, wanted, atol=2e-5)
    assert not torch.allclose(out, lookups.window, atol=1e-2)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    names = list(parameters)
    ours, theirs = (torch.autograd.grad((x * weight).sum(), [parameters[n] for n in names]) for x in (out, wanted))
    for one, other, each in zip(ours, theirs, names, strict=True):
        assert torch.allclose(one, other, atol=1e-4, rtol=1e-3), each


def test_filler_that_is_counted_is_filler_that_is_repeated() -> None:
    model = converted(lookback=1)
    drawn = prompts()
    with without_memory(model):
        lookups = record(model, drawn, {0: [1]}, seed=0)[0]
    disturb(model)
    parameters = memory_parameters(attentions_of(trunk_of(model))[0])
    out, _ = Heads(parameters, lookups, drawn, recipe()).outputs(torch.tensor([2]), torch.tensor([3.0]))
    # three copies of the filler's keys and values, of which a row that reads later finds all
    copies = torch.cat([torch.arange(drawn.tokens.shape[1])] + 2 * [drawn.filler[2].nonzero().flatten()])
    repeated = Heads(parameters, lookups, drawn, recipe())
    repeated.lookups = lookups._replace(k=lookups.k[:, :, copies], v=lookups.v[:, :, copies])
    repeated.held = repeated.held[..., copies]
    repeated.prompts = drawn._replace(filler=drawn.filler[:, copies])
    wanted, _ = repeated.outputs(torch.tensor([2]), torch.ones(1))
    assert torch.allclose(out, wanted, atol=1e-5)


def test_a_fit_finds_what_is_stated() -> None:
    model, drawn = converted(lookback=1, sinks=2), prompts(10)
    with without_memory(model):
        shares = looked_up(model, drawn, drawn.keys[:, None], [1])
        lookups = record(model, drawn, {1: [0, 3]}, seed=0)[1]
    on_keys = (lookups.wanted * drawn.keys[:, None, None]).sum(-1).mean((0, 2))
    assert torch.allclose(on_keys, shares[1][[0, 3]], atol=1e-5)
    # a random model looks nothing up: let it attend to the passkey's tokens alone
    wanted = (drawn.keys / drawn.keys.sum(1, keepdim=True))[:, None, None].expand_as(lookups.wanted)
    full = lookups.window.clone()
    full[:, :, : drawn.asking] = wanted @ lookups.v[:, lookups.groups]
    # its weights are so small that all keys are nearly the same
    lookups = lookups._replace(q=20 * lookups.q, k=20 * lookups.k, wanted=wanted, full=full)
    frozen = {name: weight.clone() for name, weight in model.state_dict().items()}
    attention = attentions_of(trunk_of(model))[1]
    count: list[int] = []
    before = fit_recall(attention, lookups, drawn, recipe(0))
    after = fit_recall(attention, lookups, drawn, recipe(200, map_lr=5e-2), on_step=lambda: count.append(1))
    assert len(count) == 200
    assert (after.layer, after.heads) == (1, [0, 3])
    for one, other in zip(before.found, after.found, strict=True):
        assert other > 2 * one
    assert sum(after.found_stretched) > 4 * sum(before.found_stretched)
    assert sum(after.missed) < 0.8 * sum(before.missed)
    gates = attention.segattn_gate.bias.sigmoid()
    assert after.gates == pytest.approx(gates[[0, 3]].tolist())
    assert gates[[1, 2]].max() < 1e-8
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, frozen[name])}
    assert changed == {f"model.layers.1.self_attn.{name}" for name in memory_parameters(attention)}
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a model of bytes, and running text."""
    folder: Path = tmp_path_factory.mktemp("models")
    save_plain(folder)
    return folder


def run(
    folder: Path, out: Path, *, resume: bool = False, own: bool = True, listener: Any = SILENT, **changes: Any
) -> dict[str, Any]:
    options: dict[str, Any] = {"segment_len": L, "sinks": 2, "own": own, "eval_tokens": 100, "prompts": 5}
    options |= {name: changes.pop(name) for name in ("prompts", "memory_layers", "rounds") if name in changes}
    adaptation = Adaptation(str(folder / "text.txt"), **options)
    sizes = {"prompt_tokens": 20 * L + 5, "prompt_steps": 4, "attended": 1e-3, "ask": ()}
    passkeys = Passkeys(**sizes | changes)
    checkpoint = Checkpoint(str(folder / "plain"), "bytes", device="cpu")
    return run_adaptation(checkpoint, adaptation, out, listener, passkeys=passkeys, resume=resume)


def test_command(folder: Path, tmp_path: Path) -> None:
    options = {"text": folder / "text.txt", "segment-len": L, "sinks": 2, "eval-tokens": 100, "prompts": 5}
    sizes = {"prompt-tokens": 325, "prompt-steps": 4, "attended": 0.001, "tokenizer": "bytes", "device": "cpu"}
    sizes |= {"ask": "300,4K", "ask-depths": "0.25,end", "ask-samples": 1}
    words = [str(x) for name, value in (options | sizes).items() for x in (f"--{name}", value)]
    said = CliRunner().invoke(
        commands.app, ["adapt", str(folder / "plain"), *words, "--out", str(tmp_path)], env={"COLUMNS": "200"}
    )
    assert said.exit_code == 0, said.output
    assert "layer 1: head 0 finds " in said.output
    assert f"segattn evaluate passkey {tmp_path / 'model'} --lengths " in said.output
    # full attention has no positions for 4096 tokens and an answer
    [heading] = [line.split() for line in said.output.splitlines() if "at 25 %" in line and ":" not in line]
    assert heading == "conversion at 25 % at 100 % at 25 % at 100 %".split()
    for name, places in (("full attention", 2), ("window alone", 4), ("adapted", 4)):
        assert re.search(rf"^ {name}( +\d+ / \d+){{{places}}} *$", said.output, re.MULTILINE), name
    model = segattn.from_pretrained(tmp_path / "model", quiet=True)
    assert conversion_of(model).settings.memory_layers == (0, 1)


def test_none_are_asked(folder: Path, tmp_path: Path) -> None:
    options = ["--text", str(folder / "text.txt"), "--tokenizer", "bytes", "--out", str(tmp_path)]
    words = ["adapt", str(folder / "plain"), *options, "--ask"]
    for given, message in (
        ("none", "--ask goes with --prompts, got none"),
        ("", "--ask must be numbers from 1 on"),
        ("1500", "--ask goes with --prompts, got 1500"),
    ):
        assert message in CliRunner().invoke(commands.app, [*words, given]).stderr


def test_each_model_is_asked_for_passkeys(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the three, by their logits; with the figures that `measure_grid` gives for them."""
    x = torch.tensor([list((folder / "text.txt").read_bytes()[: 6 * L])])
    asked: list[tuple[Tensor, list[Any]]] = []

    def note(model: Any, *arguments: Any, **options: Any) -> Any:
        with torch.no_grad():
            logits = model(x, use_cache=False).logits
        cells = measure_grid(model, *arguments, **options)
        asked.append((logits, cells))
        return cells

    monkeypatch.setattr(asking, "measure_grid", note)
    figures = run(folder, tmp_path, ask=(400, 300), ask_depths=(0.2, 0.9), ask_samples=3)
    adapted = segattn.from_pretrained(tmp_path / "model", quiet=True)
    plain = segattn.revert(segattn.from_pretrained(tmp_path / "model", quiet=True))
    with torch.no_grad():
        wanted = [plain(x).logits]
        with without_memory(adapted):
            wanted.append(adapted(x).logits)
        wanted.append(adapted(x).logits)
    for (logits, _), other in zip(asked, wanted, strict=True):
        assert torch.allclose(logits, other, atol=1e-5)
    assert not torch.allclose(wanted[1], wanted[2], atol=1e-4)
    names = ["full attention", "window alone", "adapted"]
    cells = [
        {"conversion": name} | cell._asdict() for name, (_, each) in zip(names, asked, strict=True) for cell in each
    ]
    assert figures["passkeys"] == cells
    assert [(c["length"], c["depth"], c["samples"]) for c in cells[:4]] == [
        (length, depth, 3) for length in (300, 400) for depth in (0.2, 0.9)
    ]
    assert json.loads((tmp_path / "adapt.json").read_text())["passkeys"] == cells


def test_passkeys_that_are_asked_are_kept(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(Silent):
        def finished(self, *what: Any) -> None:
            if what[0].startswith("window alone: ") and "400 tokens" in what[0]:
                raise KeyboardInterrupt

    sizes: dict[str, Any] = {"ask_depths": (0.5,), "ask_samples": 1}
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path, ask=(300, 400, 500), listener=Stop(), **sizes)
    left: list[int] = []

    def note(model: Any, task: Any, length: int, depth: float, **options: Any) -> Any:
        left.append(length)
        return measure(model, task, length, depth, **options)

    monkeypatch.setattr(retrieval, "measure", note)
    # neither is the search for layers made again
    monkeypatch.setattr(adaptation_run, "search_heads", None)
    figures = run(folder, tmp_path, ask=(300, 400, 500), resume=True, **sizes)
    assert left == [500, 300, 400, 500]
    assert [(c["conversion"], c["length"]) for c in figures["passkeys"]] == [
        (name, length) for name in ("full attention", "window alone", "adapted") for length in (300, 400, 500)
    ]


def test_a_run_that_asks_for_none_reports_none(folder: Path, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"ask_depths": (0.5,), "ask_samples": 1}
    asked = run(folder, tmp_path, ask=(300,), **sizes)["passkeys"]
    assert len(asked) == 3
    assert run(folder, tmp_path, resume=True, **sizes)["passkeys"] == []
    assert json.loads((tmp_path / "adapt.json").read_text())["passkeys"] == []
    # the checkpoint has them still
    again = run(folder, tmp_path, resume=True, ask=(300,), **sizes)
    assert again["passkeys"] == asked


def test_a_model_is_converted_twice_and_read_no_further_than_its_layers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted_with: list[dict[str, Any]] = []

    def note(model: Any, options: dict[str, Any]) -> Any:
        converted_with.append(dict(options))
        return convert_named(model, options)

    monkeypatch.setattr(adaptation_run, "convert_named", note)
    run(folder, tmp_path, memory_layers="0")
    assert [options["memory_layers"] for options in converted_with] == [[0], [0]]
    model, read = converted(lookback=1), []

    def fail(*what: Any) -> None:
        raise AssertionError

    handle = attentions_of(trunk_of(model))[1].register_forward_pre_hook(fail)
    drawn = prompts(9)
    with without_memory(model):
        looked_up(model, drawn, drawn.answered, [0], read.append)
        assert read == [8, 1]
        first = record(model, drawn, {0: [1]}, 0, read.append)[0]
        assert read == [8, 1, 8, 1]
        handle.remove()
        both = record(model, drawn, {0: [1], 1: [2]}, 0)[0]
    for one, other in zip(first[2:], both[2:], strict=True):
        assert torch.equal(one, other)


def test_layers_are_those_of_heads_that_attend_to_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half as much as the best head; of these layers, the heads that attend to any of the passkey."""
    drawn, read = prompts(9), []
    to_answer = {0: [0.1, 0.39, 0.0, 0.1], 1: [0.8, 0.0, 0.1, 0.3], 2: [0.1, 0.2, 0.4, 0.3]}
    to_key = {0: [0.0] * 4, 1: [0.9, 0.1, 0.15, 0.5], 2: [0.1, 0.1, 0.1, 0.1]}

    def note(model: Any, asked: Prompts, wanted: Tensor, full: Any, on_prompts: Any) -> dict[int, Tensor]:
        read.append((len(asked.tokens), wanted, list(full)))
        return {layer: torch.tensor((to_answer if len(read) == 1 else to_key)[layer]) for layer in full}

    monkeypatch.setattr(stage, "looked_up", note)
    model = segattn.convert(make(vocab_size=256, num_hidden_layers=3), L, lookback=1, quiet=True)
    assert stage.search_heads(model, drawn, 0.15, SILENT, everywhere=True) == {1: [0, 2, 3]}
    first = drawn.first(8)
    assert [(count, full) for count, _, full in read] == [(8, [0, 1, 2]), (8, [1, 2])]
    assert torch.equal(read[0][1], first.answered)
    assert torch.equal(read[1][1], first.keys[:, None])
    with pytest.raises(
        SettingError, match=r"attended must be a share that some .*, at most 0\.89 in this model, got 0\.95"
    ):
        stage.search_heads(model, drawn, 0.95, SILENT, everywhere=False)
    # the share that is named is one that goes
    assert stage.search_heads(model, drawn, 0.89, SILENT, everywhere=False) == {1: [0]}


def test_layers_that_are_named_get_the_memory(folder: Path, tmp_path: Path) -> None:
    searched = run(folder, tmp_path / "searched")
    named = run(folder, tmp_path / "named", memory_layers="-1")
    assert [layer["layer"] for layer in searched["layers"]] == [0, 1]
    assert [layer["layer"] for layer in named["layers"]] == [1]
    model = segattn.from_pretrained(tmp_path / "named" / "model", quiet=True)
    assert conversion_of(model).settings.memory_layers == (1,)


def test_a_layer_is_fitted_on_what_fitted_layers_put_out(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: dict[bool, dict[int, Lookups]] = {True: {}, False: {}}
    for own, of_layer in read.items():

        def note(attention: Any, lookups: Lookups, *arguments: Any, into: Any = of_layer, **options: Any) -> Any:
            into[attention.layer_idx] = lookups
            return fit_recall(attention, lookups, *arguments, **options)

        monkeypatch.setattr(stage, "fit_recall", note)
        run(folder, tmp_path / str(own), own=own)
    one, other = read[True], read[False]
    assert torch.equal(one[0].q, other[0].q)
    assert not torch.allclose(one[1].q, other[1].q, atol=1e-6)
    # what it is fitted to stays that of layers in full attention
    assert torch.equal(one[1].full, other[1].full)
    assert torch.equal(one[1].wanted, other[1].wanted)
    model = segattn.from_pretrained(tmp_path / "True" / "model", quiet=True)
    drawn = make_prompts(ByteTokenizer(), 5, 20 * L + 5, L, 1, seed=0)
    with without_memory(attentions_of(trunk_of(model))[1]):
        fitted = record(model, drawn, {1: one[1].heads}, seed=0)[1]
    assert torch.allclose(one[1].q, fitted.q, atol=1e-5)
    assert torch.allclose(one[1].window, fitted.window, atol=1e-5)


def test_a_stopped_run_goes_on_to_the_same(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(folder, tmp_path / "whole")

    def stop(attention: Any, *arguments: Any, **options: Any) -> Any:
        if attention.layer_idx == 1:
            raise KeyboardInterrupt
        return fit_recall(attention, *arguments, **options)

    monkeypatch.setattr(stage, "fit_recall", stop)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "parts")
    monkeypatch.undo()
    with pytest.raises(SettingError, match="prompts must be the checkpoint's with --resume, 5, got 6"):
        run(folder, tmp_path / "parts", resume=True, prompts=6)
    parts = run(folder, tmp_path / "parts", resume=True)
    assert parts["layers"] == whole["layers"]
    one, other = (segattn.from_pretrained(tmp_path / name / "model", quiet=True) for name in ("whole", "parts"))
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]), name


def test_layers_whose_window_slides_stay_as_they_are(folder: Path, tmp_path: Path) -> None:
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 24, "num_hidden_layers": 4}
    make("gemma3_text", vocab_size=256, **kinds).save_pretrained(tmp_path / "plain")
    (tmp_path / "text.txt").write_bytes((folder / "text.txt").read_bytes())
    figures = run(tmp_path, tmp_path / "out", rounds=1)
    assert [layer["layer"] for layer in figures["layers"]] == [1, 3]
    assert len(figures["rounds"]) == 1
    with pytest.raises(SettingError, match=r"memory_layers must be among the converted layers \[1, 3\], got \[2\]"):
        run(tmp_path, tmp_path / "named", memory_layers="1-2")


def test_what_is_wrong_is_named(folder: Path, tmp_path: Path) -> None:
    for changes, message in (
        ({"prompts": -1}, "prompts must be at least 0"),
        ({"prompts": 1}, "prompts must be 0 or at least 2"),
        ({"prompt_tokens": 100}, "prompt_tokens must be at least 2"),
        ({"prompt_tokens": 4097}, "prompt_tokens must be at most the 4096 positions .* 4097: choose fewer"),
        ({"prompts": "5"}, "prompts must be a number, got '5'"),
        ({"stretch": "64"}, "stretch must be 1 or more, got '64'"),
        ({"attended": None}, "attended must be more than 0 and at most 1, got None"),
        ({"stretch": 0.5}, "stretch must be 1 or more"),
        ({"stretch": float("nan")}, "stretch must be 1 or more"),
        ({"attended": 0.0}, "attended must be more than 0"),
        ({"memory_layers": "1-0"}, "memory_layers must be numbers of layers"),
        ({"memory_layers": "0,2"}, r"memory_layers must lie in \[-2, 2\), got 2"),
        ({"ask": (100,)}, "ask must be at least 2.., for what is hidden and asked, got 100"),
        ({"ask": (0.5,)}, "ask must be a tuple of integers"),
        ({"ask": (400,), "ask_depths": (1.5,)}, "ask_depths must be between 0 and 1, got 1.5"),
        ({"ask_depths": ()}, "ask_depths must name at least one"),
        ({"ask_samples": 0}, "ask_samples must be at least 1"),
        ({"attended": 0.99}, "attended must be a share that some head gives to passkeys, at most 0"),
    ):
        with pytest.raises(SettingError, match=message):
            run(folder, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("of_both", "of_prompts", "message"),
    [
        ({"prompts": 5, "rows": 2}, {}, "rows goes without --prompts, got 2: leave one of the two out"),
        ({"prompts": 5, "steps": 2}, {}, "steps goes without --prompts"),
        ({"prompts": 5, "length": 100}, {}, "length goes without --prompts"),
        ({}, {"prompt_tokens": 600}, "prompt_tokens goes with --prompts, got 600: give both, or leave it out"),
        ({}, {"prompt_steps": 1}, "prompt_steps goes with --prompts"),
        ({}, {"stretch": 1.0}, "stretch goes with --prompts"),
        ({}, {"attended": 0.2}, "attended goes with --prompts"),
        ({}, {"ask": ()}, "ask goes with --prompts"),
        ({}, {"ask_depths": (0.5,)}, "ask_depths goes with --prompts"),
        ({}, {"ask_samples": 3}, "ask_samples goes with --prompts"),
    ],
)
def test_options_of_the_fit_that_does_not_run_are_refused(
    of_both: dict[str, Any], of_prompts: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingError, match=message):
        check_together(Adaptation("text", **of_both), Passkeys(**of_prompts))


def test_defaults_are_those_of_the_fit_that_runs() -> None:
    text, prompts = Adaptation("text"), Adaptation("text", prompts=48)
    assert (text.segment_len, text.gate_lr) == (256, 5e-2)
    assert (prompts.segment_len, prompts.gate_lr) == (128, 1e-2)
    assert Adaptation("text", prompts=48, segment_len=256, gate_lr=5e-2).convert_arguments()["segment_len"] == 256
    for fit in (text, prompts):
        wanted = {"lookback": 1, "sinks": 4, "memory_maps": True, "segment_len": fit.segment_len}
        assert fit.convert_arguments() == wanted


def test_length_matters_to_the_fit_to_text_alone() -> None:
    check_together(Adaptation("text", prompts=5, segment_len=2048), Passkeys())
    with pytest.raises(SettingError, match="length must be more than the 4096 tokens"):
        check_together(Adaptation("text", segment_len=2048), Passkeys())


def test_what_cannot_be_converted_is_refused_before_anything_is_measured(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adaptation_run, "measure", None)
    with pytest.raises(SettingError, match=r"memory_layers must lie in \[-2, 2\), got 2"):
        run(folder, tmp_path / "layers", memory_layers="2")
    kinds = {"layer_types": ["sliding_attention"] * 2, "sliding_window": 24}
    make("gemma3_text", vocab_size=256, **kinds).save_pretrained(tmp_path / "plain")
    (tmp_path / "text.txt").write_bytes((folder / "text.txt").read_bytes())
    with pytest.raises(SettingError, match="model cannot be"):
        run(tmp_path, tmp_path / "sliding")
    assert not (tmp_path / "sliding").exists()
