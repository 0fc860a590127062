"""Training on texts too short to read a memory is warned of once, whatever reads them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from models import converted, make, tokens

import segattn

L = 8


def warned(call: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(one.message) for one in caught if one.category is segattn.UntrainedMemoryWarning]


def recurrent(**options: Any) -> Any:
    memory = segattn.RecurrentMemory(make(), 2, L, **options)
    return lambda time, state=None: memory(tokens(2, time), labels=tokens(2, time), state=state).state, memory


def associative() -> Any:
    memory = segattn.AssociativeMemory(make(), 2, L, d_mem=4)
    return lambda time, state=None: memory(tokens(2, time), labels=tokens(2, time), state=state).state, memory


def attention(**options: Any) -> Any:
    layer = segattn.InfiniAttention(16, 2, segment_len=L, **options)
    return lambda time, state=None: layer(torch.randn(2, time, 16), state)[1], layer


KEEP_STATE = {
    "RecurrentMemory": recurrent,
    "aligned right": lambda: recurrent(alignment="right"),
    "AssociativeMemory": associative,
    "InfiniAttention": attention,
}


@pytest.mark.parametrize("kind", KEEP_STATE)
def test_a_module_that_returns_its_state_waits_for_a_second_text(kind: str) -> None:
    read, module = KEEP_STATE[kind]()
    name = "x" if kind == "InfiniAttention" else "input_ids"
    assert not warned(lambda: read(L))
    [message] = warned(lambda: read(L - 3))
    assert f"no memory is trained: {name} must be longer than segment_len, {L}" in message
    assert (
        f"got texts of at most {L - 3} tokens: pass longer blocks, or make the {type(module).__name__} with" in message
    )
    assert not warned(lambda: [read(L) for _ in range(3)])
    # of each module by itself
    other, _ = KEEP_STATE[kind]()
    assert len(warned(lambda: [other(L), other(L)])) == 1


@pytest.mark.parametrize("kind", KEEP_STATE)
def test_pieces_and_longer_texts_train_a_memory(kind: str) -> None:
    read, module = KEEP_STATE[kind]()

    def quiet() -> None:
        read(L)
        read(L + 1)
        # two texts in pieces of a segment
        for _ in range(2):
            read(L, read(L, read(L)))
        read(L)
        read(L)

    assert not warned(quiet)
    read, module = KEEP_STATE[kind]()
    module.eval()
    assert not warned(lambda: [read(L) for _ in range(3)])
    module.train()
    with torch.no_grad():
        assert not warned(lambda: [read(L) for _ in range(3)])


def test_the_window_of_an_attention_that_looks_back_reads_no_memory() -> None:
    read, _ = attention(lookback=1, rope=None)
    read(2 * L)
    [message] = warned(lambda: read(2 * L))
    assert f"x must be longer than (1 + lookback) · segment_len, {2 * L}" in message
    read, _ = attention(lookback=1, rope=None)
    assert not warned(lambda: [read(2 * L + 1) for _ in range(3)])


def test_padding_and_packed_sequences_are_measured() -> None:
    layer, x = segattn.InfiniAttention(16, 2, segment_len=L), torch.randn(2, 20, 16)
    long, short = torch.tensor([[0, L + 1], [3, 9]]), torch.tensor([[0, L], [12, 20]])
    assert not warned(lambda: [layer(x, spans=long) for _ in range(3)])
    assert len(warned(lambda: [layer(x, spans=short) for _ in range(3)])) == 1
    layer = segattn.InfiniAttention(16, 2, segment_len=L)
    assert not warned(lambda: [layer(x[:1], cu_seqlens=torch.tensor([0, 11, 20])) for _ in range(3)])
    assert len(warned(lambda: [layer(x[:1], cu_seqlens=torch.tensor([0, 8, 14, 20])) for _ in range(3)])) == 1


@pytest.mark.parametrize("call", ["read_in_pieces", "loss_in_pieces", "backward_in_pieces"])
def test_a_text_in_pieces_is_measured_whole(call: str) -> None:
    run, ids = getattr(segattn, call), tokens(2, 3 * L)
    mask = torch.ones_like(ids)
    mask[:, : 2 * L] = 0
    for arguments in ({"input_ids": ids[:, :L]}, {"input_ids": ids, "attention_mask": mask}):
        model = converted("llama", L).train()
        [message] = warned(lambda: run(model, piece_len=5, **arguments))  # noqa: B023
        assert f"segment_len, {L}, for a text to read its memory, got texts of at most {L} tokens" in message
        assert not warned(lambda: run(model, piece_len=5, **arguments))  # noqa: B023
    model = converted("llama", L).train()
    assert not warned(lambda: run(model, ids, L))
    before = segattn.InfiniCache(model)
    with torch.no_grad():
        model(ids[:, :L], past_key_values=before)
    assert not warned(lambda: run(model, ids[:, L : L + 4], 4, cache=before))
    assert not warned(lambda: run(model.eval(), ids[:, :L], 4))


def test_a_copy_is_warned_of_by_itself() -> None:
    model, ids = converted("llama", L).train(), tokens(1, L)
    assert len(warned(lambda: [model(ids, use_cache=False) for _ in range(2)])) == 1
    assert len(warned(lambda: copy.deepcopy(model)(ids, use_cache=False))) == 1
