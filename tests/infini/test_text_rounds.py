"""Rounds of running text: the loss is the distance from the plain model, and it falls."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
from models import OPTIONS, double, make, save_plain, tokens
from stopping import stopped_after

import segattn
from segattn.infini.adapt import text_rounds
from segattn.infini.adapt.fit import memory_parameters
from segattn.infini.adapt.kept import Kept
from segattn.infini.adapt.rounds import train_in_rounds
from segattn.infini.adapt.run import run_adaptation
from segattn.infini.adapt.settings import Adaptation
from segattn.infini.adapt.text_rounds import TextRounds
from segattn.infini.evaluate.loading import ByteTokenizer, Loaded
from segattn.infini.evaluate.settings import Checkpoint
from segattn.infini.huggingface.settings import attentions_of, trunk_of
from segattn.runs.silence import SILENT

L, LENGTH = 8, 45
# whose rotary embeddings, and what is done to logits, differ
NAMES = ("llama", "gemma2", "gemma3_text", "gpt_neox", "cohere2")


class Prefixed(ByteTokenizer):
    def __init__(self) -> None:
        self.prefix = [1, 2]


def adapted(name: str = "llama", **options: Any) -> tuple[Any, Any]:
    """Return a plain model in float64, and the same converted, whose maps and gates have values of their own."""
    plain = double(make(name))
    options = {"lookback": 1, "sinks": 3, "memory_maps": True} | OPTIONS.get(name, {}) | options
    model = segattn.convert(copy.deepcopy(plain), L, quiet=True, **options).requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for attention in attentions_of(trunk_of(model)):
            for parameter in memory_parameters(attention).values():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return plain, model


def rounds(model: Any, text: torch.Tensor, window: int = 2 * L) -> TextRounds:
    return TextRounds(Loaded(model, Prefixed(), {}), text, LENGTH, window)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lookback", [0, 1])
def test_the_loss_is_the_divergence_from_the_plain_model(name: str, lookback: int) -> None:
    plain, model = adapted(name, lookback=lookback)
    # the only stretch that there is
    text = tokens(1, LENGTH - 2)[0]
    with torch.no_grad():
        (step, *_) = rounds(model, text, (1 + lookback) * L).losses(torch.Generator())
        whole = torch.cat([torch.tensor([1, 2]), text])[None]
        p, q = (x(whole, use_cache=False).logits[0, (1 + lookback) * L :].softmax(-1) for x in (plain, model))
    divergence = (p * (p / q).log()).sum(-1).mean()
    assert divergence > 1e-5
    # logits are compared in float32
    assert step.loss.item() == pytest.approx(divergence.item(), rel=1e-4, abs=1e-7)


def test_stretches_are_of_the_whole_text(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = adapted()
    text, read = torch.arange(3, 3 + LENGTH), []

    def note(stretch: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        read.append((stretch, rows))
        return torch.zeros(1, len(rows), 5)

    task = rounds(model, text)
    monkeypatch.setattr(task, "_log_probabilities", note)
    monkeypatch.setattr(text_rounds, "COMPARED", 7)
    for seed in range(20):
        list(task.losses(torch.Generator().manual_seed(seed)))
    begins = set()
    for stretch, rows in read:
        assert stretch[0, :2].tolist() == [1, 2]
        assert torch.equal(stretch[0, 2:].diff(), torch.ones(LENGTH - 3, dtype=torch.long))
        assert len(set(rows.tolist())) == 7
        begins.add(int(stretch[0, 2]))
    assert begins == {3, 4, 5}
    # every token beyond the window is compared at some time
    assert {row for _, rows in read for row in rows.tolist()} == set(range(2 * L, LENGTH))


@pytest.mark.parametrize("update", ["linear", "delta"])
def test_rounds_bring_it_closer_to_full_attention(tmp_path: Path, update: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_rounds, "STEPS", 4)
    _, model = adapted(update=update, memory_layers=[1])
    task = rounds(model, tokens(1, 400)[0])
    before = {name: x.clone() for name, x in model.state_dict().items()}

    def distance() -> float:
        with torch.no_grad():
            return sum(step.loss.item() for step in task.losses(torch.Generator().manual_seed(7)))

    start = distance()
    kept = Kept(tmp_path / "checkpoint.pt", {}, "", {})
    train_in_rounds(model, task, 8, 5e-2, 0, kept, SILENT)
    assert distance() < 0.98 * start
    assert len(kept.rounds) == 8
    # nothing but the memory moves
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name]) == ("segattn" not in name), name


def test_a_stopped_run_goes_on_to_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(text_rounds, "STEPS", 2)
    save_plain(tmp_path)
    options: dict[str, Any] = {"segment_len": L, "length": 60, "rows": 2, "steps": 1, "eval_tokens": 100, "rounds": 3}
    adaptation = Adaptation(str(tmp_path / "text.txt"), memory_layers="1", **options)
    checkpoint = Checkpoint(str(tmp_path / "plain"), "bytes", device="cpu")
    whole = run_adaptation(checkpoint, adaptation, tmp_path / "whole")
    with stopped_after(Kept, "add_round"):
        run_adaptation(checkpoint, adaptation, tmp_path / "parts")
    parts = run_adaptation(checkpoint, adaptation, tmp_path / "parts", resume=True)
    assert [round["loss"] for round in parts["rounds"]] == [round["loss"] for round in whole["rounds"]]
    assert len({round["loss"] for round in whole["rounds"]}) == 3
    one, other = (segattn.from_pretrained(tmp_path / name / "model", quiet=True) for name in ("whole", "parts"))
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]), name
    # the rounds, and not the fit alone, have made it
    fitted = run_adaptation(checkpoint, replace(adaptation, rounds=0), tmp_path / "fitted")
    assert fitted["rows"][-1]["perplexity"] != whole["rows"][-1]["perplexity"]
