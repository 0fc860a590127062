"""The training end to end of `segattn adapt`: its gradients are the whole model's, and it goes on after a stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
from models import make, save_plain
from stopping import stopped_after

import segattn
from segattn.infini.adapt import passkey_rounds as stage
from segattn.infini.adapt import passkeys
from segattn.infini.adapt.fit import memory_parameters
from segattn.infini.adapt.kept import Kept
from segattn.infini.adapt.lookups import Prompts, least_length, make_prompts
from segattn.infini.adapt.passkey_rounds import answer_logits, read_prefixes, write_counted
from segattn.infini.adapt.run import run_adaptation
from segattn.infini.adapt.settings import Adaptation, Passkeys
from segattn.infini.evaluate.loading import ByteTokenizer, Loaded
from segattn.infini.evaluate.passkey import QUESTION
from segattn.infini.evaluate.settings import Checkpoint
from segattn.infini.huggingface.settings import attentions_of, trunk_of
from segattn.runs.errors import SettingError
from segattn.runs.silence import SILENT, Silent

L = 16
MODELS = ("full attention", "window alone", "adapted")
ASKED = len(QUESTION) + 1


def converted(layers: list[int], update: str = "linear", maps: bool = True) -> Any:
    """Return a tiny model whose maps and gates have values of their own."""
    options: dict[str, Any] = {"update": update, "lookback": 1, "memory_maps": maps, "memory_layers": layers}
    model = segattn.convert(make(vocab_size=256), L, quiet=True, sinks=3, **options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for attention in attentions_of(trunk_of(model.requires_grad_(False))):
            for parameter in memory_parameters(attention).values():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def prompts(length: int = 20 * L + 9) -> Prompts:
    return make_prompts(ByteTokenizer(), 3, length, L, 1, seed=1)


def gradients(model: Any, logits: Tensor, layer: int) -> list[Tensor]:
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    parameters = memory_parameters(attentions_of(trunk_of(model))[layer])
    return list(torch.autograd.grad((logits * weight).sum(), list(parameters.values()), retain_graph=True))


@pytest.mark.parametrize("update", ["linear", "delta"])
def test_what_prompts_begin_with_alike_is_read_once(update: str) -> None:
    """As if each were read alone, whole segments at a time until it differs from all others."""
    model, drawn, read = converted([0, 1], update).double(), prompts(), []
    handle = trunk_of(model).register_forward_pre_hook(
        lambda trunk, arguments, inputs: read.append(inputs["input_ids"]), with_kwargs=True
    )
    ours = read_prefixes(model, drawn, ASKED)
    handle.remove()
    begins = range(0, drawn.tokens.shape[1] - ours.asked.shape[1], L)
    distinct = [len({tuple(row[: begin + L]) for row in drawn.tokens.tolist()}) for begin in begins]
    assert [len(tokens) for tokens in read] == distinct
    assert (distinct[0], distinct[-1]) == (1, 3)
    assert sum(tokens.shape[1] for tokens in read) == drawn.tokens.shape[1] - ours.asked.shape[1]
    for row in range(3):
        alone = read_prefixes(model, Prompts(*(x[row : row + 1] for x in drawn)), ASKED)
        for one, other in zip(ours.cache.layers, alone.cache.layers, strict=True):
            for x, y in zip(one.state.tensors(), other.state.tensors(), strict=True):
                assert torch.allclose(x[row], y[0], rtol=0, atol=1e-10)
        for layer in (0, 1):
            for x, y in zip(ours.written[layer], alone.written[layer], strict=True):
                assert torch.allclose(x[row], y[0], rtol=0, atol=1e-10)
        assert torch.equal(ours.asked[row], alone.asked[0])


@pytest.mark.parametrize(("update", "maps"), [("linear", True), ("delta", True), ("delta", False)])
@pytest.mark.parametrize("length", [20 * L + 9, 21 * L - 1])
def test_logits_and_gradients_are_those_of_the_whole_model(length: int, update: str, maps: bool) -> None:
    model, drawn, rows = converted([0, 1], update, maps), prompts(length), torch.tensor([2, 0])
    prefixes = read_prefixes(model, drawn, ASKED)
    for attention in attentions_of(trunk_of(model)):
        for parameter in memory_parameters(attention).values():
            parameter.requires_grad_(True)
    ours = answer_logits(model, prefixes, rows, torch.ones(2))
    whole = model(drawn.tokens[rows], use_cache=False).logits[:, -drawn.asking :]
    assert torch.allclose(ours, whole, atol=2e-5)
    # nothing of the last layer reaches its memory, so that nothing is left out
    for one, other in zip(gradients(model, ours, 1), gradients(model, whole, 1), strict=True):
        assert other.abs().max() > 0
        assert torch.allclose(one, other, atol=1e-4 * float(other.abs().max()), rtol=1e-3)
    # of the layer below, the way through what the last one writes is
    one, other = (torch.cat([x.flatten() for x in gradients(model, logits, 0)]) for logits in (ours, whole))
    assert not torch.allclose(one, other, rtol=1e-3)


def test_logits_of_a_model_in_float64() -> None:
    model, drawn, rows = converted([0, 1]).double(), prompts(), torch.tensor([2, 0])
    ours = answer_logits(model, read_prefixes(model, drawn, ASKED), rows, torch.ones(2))
    whole = model(drawn.tokens[rows], use_cache=False).logits[:, -drawn.asking :]
    # logits are compared in float32, and rotary angles are of that too
    assert torch.allclose(ours, whole.float(), atol=2e-6)


def test_filler_that_is_counted_is_filler_that_is_written_again() -> None:
    model, drawn = converted([1]), prompts()
    prefixes, rows = read_prefixes(model, drawn, ASKED), torch.tensor([1])
    k, v = prefixes.written[1]
    filler = drawn.filler[1, : k.shape[2]].nonzero().flatten()
    columns = torch.cat([torch.arange(k.shape[2]), filler, filler])
    longer = drawn._replace(filler=torch.zeros_like(drawn.filler).repeat(1, 3))
    repeated = prefixes._replace(prompts=longer, written={1: (k[:, :, columns], v[:, :, columns])})
    with torch.no_grad():
        ours = answer_logits(model, prefixes, rows, torch.tensor([3.0]))
        assert torch.allclose(ours, answer_logits(model, repeated, rows, torch.ones(1)), atol=1e-5)
        assert not torch.allclose(ours, answer_logits(model, prefixes, rows, torch.ones(1)), atol=1e-4)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("update", ["linear", "delta"])
def test_counts_multiply_what_a_token_adds(update: str) -> None:
    """Twice for each segment, of 4, 4 and 3 tokens: by half of the count and more, then by what is left."""
    features, v = random(2, 3, 11, 5, seed=0).exp(), random(2, 3, 11, 4, seed=1)
    counts = 1 + random(2, 11, seed=2).exp()
    counts[:, ::3] = 1
    memory, z = torch.zeros(2, 3, 5, 4, dtype=torch.float64), torch.zeros(2, 3, 5, dtype=torch.float64)
    for segment in (slice(0, 4), slice(4, 8), slice(8, 11)):
        for half in ((counts + 1) / 2, (counts - 1) / 2):
            keys, values = features[:, :, segment], v[:, :, segment]
            if update == "delta" and z.any():
                values = values - (keys @ memory) / (keys @ z.unsqueeze(-1))
            weighted = half[:, None, segment, None] * keys
            memory, z = memory + weighted.mT @ values, z + weighted.sum(2)
    ours = write_counted(features, v, counts, 4, update)
    assert torch.allclose(ours.memory, memory)
    assert torch.allclose(ours.normalizer, z)
    features.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: tuple(write_counted(x, v, counts, 4, update)), (features,))


@pytest.mark.parametrize("before", [0, 1, 3])
def test_by_the_delta_rule_too_counted_filler_is_that_of_a_long_text(before: int) -> None:
    """A statement in one of four segments, and what is recalled by it, beside the text of 800 segments."""
    times, after = 200, 3 - before
    filler, values = random(8, 6, seed=0).exp(), random(8, 4, seed=1)
    # unlike the statement, though not wholly
    filler[:, 0] *= 0.001
    stated, said = torch.tensor([60.0, 0.01, 0.01, 0.01, 0.01, 0.01], dtype=torch.float64), values[2] + 3

    def recalled(before: int, after: int, count: float) -> Tensor:
        k, v = filler.repeat(before + 1 + after, 1), values.repeat(before + 1 + after, 1)
        counts = torch.full((len(k),), count, dtype=torch.float64)
        k[8 * before + 2], v[8 * before + 2], counts[8 * before + 2] = stated, said, 1
        memory = write_counted(k[None, None], v[None, None], counts[None], 8, "delta")
        return ((stated @ memory.memory) / (stated @ memory.normalizer[0, 0])).flatten()

    long = recalled(before * times, after * times + times - 1, 1)
    assert torch.allclose(recalled(before, after, times), long, rtol=0.02)
    # it is another where filler counts once
    assert ((recalled(before, after, 1) - long) / long).abs().max() > 0.2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a model of bytes, and running text."""
    folder: Path = tmp_path_factory.mktemp("models")
    save_plain(folder)
    return folder


def run(
    folder: Path,
    out: Path,
    *,
    resume: bool = False,
    listener: Any = SILENT,
    update: str = "linear",
    lookback: int = 1,
    maps: bool = True,
    eval_tokens: int = 100,
    **changes: Any,
) -> dict[str, Any]:
    options: dict[str, Any] = {"segment_len": L, "lookback": lookback, "sinks": 2, "update": update}
    options |= {"memory_maps": maps, "eval_tokens": eval_tokens, "prompts": 5, "rounds": 2}
    options |= {name: changes.pop(name) for name in ("rounds", "round_lr") if name in changes}
    adaptation = Adaptation(str(folder / "text.txt"), **options)
    sizes = {"prompt_tokens": 30 * L, "prompt_steps": 2, "attended": 1e-3, "ask": ()}
    checkpoint = Checkpoint(str(folder / "plain"), "bytes", device="cpu")
    return run_adaptation(checkpoint, adaptation, out, listener, passkeys=Passkeys(**sizes | changes), resume=resume)


class Heard(Silent):
    """A listener that knows which stages have begun, and with how much to do."""

    def __init__(self) -> None:
        self.begun: list[tuple[str, int]] = []

    def begin(self, *what: Any) -> None:
        self.begun.append(what)


@pytest.fixture
def small_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("PROMPTS", 6), ("PASSES", 2), ("BATCH", 4)):
        monkeypatch.setattr(stage, name, size)


@pytest.mark.usefixtures("small_rounds")
def test_a_stopped_run_goes_on_to_the_same(folder: Path, tmp_path: Path) -> None:
    whole = run(folder, tmp_path / "whole")
    fitted = run(folder, tmp_path / "fitted", rounds=0)
    assert len(whole["rounds"]) == 2
    assert fitted["rounds"] == []
    with stopped_after(Kept, "add_round"):
        run(folder, tmp_path / "parts")
    with pytest.raises(SettingError, match="rounds must be the checkpoint's with --resume, 2, got 3: of these 1 are"):
        run(folder, tmp_path / "parts", resume=True, rounds=3)
    assert run(folder, tmp_path / "parts", resume=True)["rounds"] == whole["rounds"]
    states = [
        segattn.from_pretrained(tmp_path / name / "model", quiet=True).state_dict()
        for name in ("whole", "parts", "fitted")
    ]
    for name, weight in states[0].items():
        assert torch.equal(weight, states[1][name]), name
    # what is written of the gates is what the rounds left, not the fit
    for layer, gates in whole["gates"].items():
        beta = states[0][f"model.layers.{layer}.self_attn.segattn_gate.bias"]
        assert gates == pytest.approx(beta.sigmoid().tolist())
        assert gates != fitted["gates"][layer]
    # all maps and gates move, and nothing else
    changed = {name for name, weight in states[0].items() if not torch.equal(weight, states[2][name])}
    assert changed == {name for name in states[0] if "segattn" in name}


@pytest.mark.usefixtures("small_rounds")
def test_rounds_go_on_from_a_finished_fit(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {"ask": (300,), "ask_depths": (0.5,), "ask_samples": 1}
    whole = run(folder, tmp_path / "whole", rounds=1, round_lr=1e-2)
    fitted = run(folder, tmp_path / "parts", rounds=0, **asked)
    # nothing is fitted again
    monkeypatch.setattr(passkeys, "fit_recall", None)
    heard = Heard()
    parts = run(
        folder, tmp_path / "parts", resume=True, rounds=1, round_lr=1e-2, eval_tokens=130, listener=heard, **asked
    )
    # of the passkeys only what the rounds have changed is asked again
    assert {stage for stage, count in heard.begun if count} & {f"passkeys, {name}" for name in MODELS} == {
        "passkeys, adapted"
    }
    assert [cell["conversion"] for cell in parts["passkeys"]] == list(MODELS)
    assert parts["passkeys"][:2] == fitted["passkeys"][:2]
    assert (parts["layers"], parts["rounds"]) == (whole["layers"], whole["rounds"])
    assert (parts["settings"]["rounds"], parts["settings"]["eval_tokens"]) == (1, 130)
    # all is measured on the other tokens, full attention too
    assert parts["rows"][0]["perplexity"] != fitted["rows"][0]["perplexity"]
    one, other = (segattn.from_pretrained(tmp_path / name / "model", quiet=True) for name in ("whole", "parts"))
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]), name
    with pytest.raises(SettingError, match=r"round_lr must be the checkpoint's with --resume, 0\.01, got 0\.02"):
        run(folder, tmp_path / "parts", resume=True, rounds=1, round_lr=2e-2)


@pytest.mark.usefixtures("small_rounds")
@pytest.mark.parametrize("update", ["linear", "delta"])
def test_the_loss_falls(folder: Path, tmp_path: Path, update: str) -> None:
    rounds = run(folder, tmp_path / "out", update=update, rounds=4, round_lr=3e-2)["rounds"]
    still = run(folder, tmp_path / "still", update=update, rounds=4, round_lr=0.0)["rounds"]
    assert rounds[-1]["loss"] < still[-1]["loss"] - 1e-3


@pytest.mark.usefixtures("small_rounds")
def test_without_maps_the_gates_alone_are_trained(folder: Path, tmp_path: Path) -> None:
    for rounds in (0, 1):
        run(folder, tmp_path / str(rounds), maps=False, rounds=rounds)
    one, other = (segattn.from_pretrained(tmp_path / name / "model", quiet=True).state_dict() for name in "01")
    changed = {name for name, weight in one.items() if not torch.equal(weight, other[name])}
    assert changed == {f"model.layers.{layer}.self_attn.segattn_gate.bias" for layer in (0, 1)}
    assert not any("segattn_memory" in name for name in one)


@pytest.mark.usefixtures("small_rounds")
def test_prompts_of_rounds_are_long_enough_where_two_thirds_are_not(folder: Path, tmp_path: Path) -> None:
    least = least_length(ByteTokenizer(), L, 1)
    figures = run(folder, tmp_path / "out", prompt_tokens=least, rounds=3)
    assert len(figures["rounds"]) == 3
    with pytest.raises(SettingError, match=f"prompt_tokens must be at least {least}, .* got {least - 1}"):
        run(folder, tmp_path / "short", prompt_tokens=least - 1)


@pytest.mark.parametrize(("size", "longest", "shortest"), [(8, 640, 426), (64, 400, 322), (16, 300, 274)])
def test_lengths_that_are_drawn(size: int, longest: int, shortest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = Loaded(torch.nn.Linear(1, 1), ByteTokenizer(), {})
    adaptation, settings = Adaptation("text", prompts=2, segment_len=size), Passkeys(longest)
    drawn: list[int] = []

    def note(model: Any, prompts: Prompts, question: int) -> None:
        drawn.append(prompts.tokens.shape[1] - prompts.asking + 1)

    monkeypatch.setattr(stage, "read_prefixes", note)
    monkeypatch.setattr(stage, "PROMPTS", 1)
    for seed in range(60):
        stage._new_prompts(loaded, adaptation, settings, torch.Generator().manual_seed(seed))
    wanted = [
        int(torch.randint(shortest, longest + 1, (), generator=torch.Generator().manual_seed(seed)))
        for seed in range(60)
    ]
    assert drawn == wanted


def test_what_is_wrong_is_named(folder: Path, tmp_path: Path) -> None:
    for changes, message in (
        ({"rounds": -1}, "rounds must be at least 0"),
        ({"rounds": 1, "lookback": 0}, "rounds must be 0 with --prompts and --lookback 0, got 1"),
        ({"round_lr": float("inf")}, "round_lr must be 0 or more"),
    ):
        with pytest.raises(SettingError, match=message):
            run(folder, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()
