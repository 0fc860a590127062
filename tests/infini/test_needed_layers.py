"""Reading without layers and rows that no later token sees."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from models import CHOSEN, OPTIONS, double, make, open_gates, tokens

import segattn
from segattn.infini.evaluate.reading import Reading, decode, read
from segattn.infini.huggingface.settings import layers_of, trunk_of

L = 8
DEPTH = 5


def remembering(layers: list[int], name: str = "llama", **options: Any) -> Any:
    """Return a converted model in float64 of which these layers have a memory, and their gates are open."""
    types = getattr(make(name).config, "layer_types", None)
    changes = {} if types is None else {"layer_types": [types[i % len(types)] for i in range(DEPTH)]}
    model = make(name, num_hidden_layers=DEPTH, **changes)
    options = OPTIONS.get(name, {}) | {"lookback": 1, "sinks": 3} | options
    segattn.convert(model, L, memory_layers=layers, quiet=True, **options)
    open_gates(model)
    return double(model)


def differing(time: int, where: slice, batch: int = 3) -> Tensor:
    """Return texts [batch, time] that differ in some columns alone."""
    texts = tokens(1, time).repeat(batch, 1)
    texts[:, where] = tokens(batch, time, seed=1)[:, where]
    return texts


def by_all_layers(model: Any, texts: Tensor, piece: int = L, begun: int = 0) -> tuple[Tensor, Tensor]:
    """Return the last logits of texts that all layers read, in pieces after a first of `begun` tokens; what follows."""
    cache = segattn.InfiniCache(model)
    parts = [texts[:, :begun], *texts[:, begun:].split(piece, dim=1)]
    with torch.no_grad():
        for part in parts[not begun :]:
            output = model(part, use_cache=True, past_key_values=cache)
    reading = Reading(output.logits[:, -1], cache)
    return reading.logits, decode(model, reading, L + 1)


def runs(model: Any) -> list[tuple[int, int]]:
    """Return a list that takes each run of a layer: its index, and its rows."""
    taken: list[tuple[int, int]] = []
    for index, layer in enumerate(layers_of(trunk_of(model))):

        def note(module: Any, args: Any, kwargs: Any, output: Any, index: int = index) -> None:
            hidden = output if isinstance(output, Tensor) else output[0]
            taken.append((index, len(hidden)))

        layer.register_forward_hook(note, with_kwargs=True)
    return taken


@pytest.mark.parametrize("memory", [[2], [1, 3], [0, 4]], ids=str)
@pytest.mark.parametrize("update", ["linear", "delta"])
@pytest.mark.parametrize("window", [{}, {"lookback": 0}, {"lookback": 0, "sinks": 0}], ids=str)
def test_it_changes_nothing(memory: list[int], update: str, window: dict[str, int]) -> None:
    model = remembering(memory, update=update, **window)
    for where in (
        slice(1, 5),
        slice(2 * L - 1, 2 * L),
        slice(3 * L, 3 * L),
        slice(4 * L + 3, 6 * L + 1),
        slice(0, 200),
    ):
        texts = differing(13 * L + 5, where)
        for piece in (L, 3 * L):
            logits, said = by_all_layers(model, texts, piece)
            reading = read(model, texts, piece=piece)
            assert (reading.logits - logits).abs().max() < 1e-10
            assert torch.equal(decode(model, reading, L + 1), said)


@pytest.mark.parametrize("name", CHOSEN)
def test_families(name: str) -> None:
    # learnt positions begin anew with each segment
    window = {"lookback": 0, "sinks": 0} if name in ("gpt2", "opt") else {}
    model = remembering([2], name, **window)
    texts = differing(16 * L + 3, slice(L, L + 3))
    logits, said = by_all_layers(model, texts)
    taken = runs(model)
    reading = read(model, texts, piece=L)
    assert (reading.logits - logits).abs().max() < 1e-10
    assert len(taken) < 17 * DEPTH
    assert (0, 1) in taken
    assert torch.equal(decode(model, reading, L + 1), said)


@pytest.mark.parametrize("lookback", [0, 1])
def test_rows_that_go_on_alike_run_once(lookback: int) -> None:
    model = remembering([2, 3], lookback=lookback)
    texts, taken = differing(12 * L + 3, slice(L + 1, L + 3)), runs(model)
    read(model, texts, piece=L)
    # the second segment differs, and each of the two layers below the memory sees a lookback further
    apart = 2 + 2 * lookback
    assert [rows for layer, rows in taken if layer == 1] == [3] * apart + [1] * (13 - apart)
    assert [rows for layer, rows in taken if layer == 2] == [3] * 13


@pytest.mark.parametrize("lookback", [0, 1])
def test_layers_above_the_memory_run_at_the_end(lookback: int) -> None:
    model = remembering([1, 2], lookback=lookback)
    texts, taken = differing(12 * L + 3, slice(0, 12 * L + 3)), runs(model)
    read(model, texts, piece=L)
    # at first until the memory holds something; at the end in the last segment, and a lookback more for each layer
    first, last = 1 + lookback, 1 + 2 * lookback
    assert [layer for layer, _ in taken].count(4) == first + last
    assert [layer for layer, _ in taken].count(2) == 13


def test_what_may_differ_runs_for_all_rows() -> None:
    model = remembering([2])
    before, texts = tokens(3, 4 * L, seed=5), tokens(1, 12 * L).repeat(3, 1)
    reading, taken = read(model, before), runs(model)
    read(model, texts, after=reading, piece=L)
    assert (0, 1) not in taken
    # after one beginning they are known to be alike
    read(model, texts, after=read(model, before[:1]), piece=L)
    assert (0, 1) in taken


@pytest.mark.parametrize("lookback", [0, 1])
def test_the_beginning_may_end_within_a_segment(lookback: int) -> None:
    model = remembering([1, 2], lookback=lookback)
    for begun in (4 * L + 3, 2, 2 * L + 1):
        # up to the end of the first piece
        texts = differing(16 * L, slice(begun + 1, begun + L))
        logits, said = by_all_layers(model, texts, begun=begun)
        beginning = read(model, texts[:1, :begun])
        reading = read(model, texts[:, begun:], after=beginning, piece=L)
        assert (reading.logits - logits).abs().max() < 1e-10
        assert torch.equal(decode(model, reading, L + 1), said)
        # the beginning stays as it was
        again = read(model, texts[:, begun:], after=beginning, piece=L)
        assert torch.equal(again.logits, reading.logits)


def test_a_cache_that_records_is_read_by_all_layers() -> None:
    model = remembering([0])
    texts = differing(12 * L + 3, slice(L, L + 2))
    wanted, _ = by_all_layers(model, texts)
    beginning = read(model, texts[:1, :L])
    beginning.cache.activate_past_recording()
    reading = read(model, texts[:, L:], after=beginning, piece=L)
    # keys stand elsewhere in a longer tail, by angles in float32
    assert (reading.logits - wanted).abs().max() < 1e-6
    reading.cache.crop(-L)
    with torch.no_grad():
        again = model(texts[:, 11 * L + 3 :], past_key_values=reading.cache, use_cache=True).logits[:, -1]
    assert (again - wanted).abs().max() < 1e-6


def test_threads_read_one_model() -> None:
    model = remembering([2])
    texts = [differing(10 * L + i, slice(1, 5)) for i in range(1, 5)]
    wanted = [by_all_layers(model, each)[0] for each in texts]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: read(model, texts[i % 4], piece=L).logits, range(16)))
    for i, logits in enumerate(found):
        assert (logits - wanted[i % 4]).abs().max() < 1e-10
    assert len(layers_of(trunk_of(model))) == DEPTH


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_pass_that_ends_in_an_error_leaves_the_model_as_it_was(error: type[BaseException]) -> None:
    model = remembering([1, 2])
    texts, count = differing(12 * L + 3, slice(1, 5)), 0
    wanted, _ = by_all_layers(model, texts)

    def stop(*arguments: Any) -> None:
        nonlocal count
        count += 1
        if count == 7:
            raise error

    handle = layers_of(trunk_of(model))[2].register_forward_pre_hook(stop)
    with pytest.raises(error):
        read(model, texts, piece=L)
    handle.remove()
    assert len(layers_of(trunk_of(model))) == DEPTH
    with torch.no_grad():
        assert (model(texts, use_cache=False).logits[:, -1] - wanted).abs().max() < 1e-6
    assert (read(model, texts, piece=L).logits - wanted).abs().max() < 1e-10


def test_a_model_with_layers_that_are_not_converted_runs_whole() -> None:
    model = segattn.convert(make("llama", num_hidden_layers=DEPTH), L, layers=[1, 2], quiet=True).double()
    texts, taken = differing(12 * L, slice(1, 5)), runs(model)
    logits, _ = by_all_layers(model, texts)
    taken.clear()
    assert (read(model, texts, piece=L).logits - logits).abs().max() < 1e-10
    assert taken == [(layer, 3) for _ in range(12) for layer in range(DEPTH)]
