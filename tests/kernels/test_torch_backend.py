"""`backend="torch"` equals the reference: outputs and every gradient, calls of every kind, every dtype."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from calls import (
    GATES,
    KINDS,
    Call,
    apply,
    check_gates,
    everything,
    golden,
    gradients,
    random_calls,
    tensors,
    worst,
)
from hypothesis import given, settings


@pytest.mark.parametrize("name", KINDS)
def test_equals_the_reference(name: str, device: torch.device) -> None:
    call = KINDS[name]
    worst_error, where = worst(everything(call, "torch", torch.float64, device), golden(call, torch.float64, device))
    assert worst_error < 1e-12, where


@settings(max_examples=400)
@given(random_calls())
def test_equals_the_reference_on_random_calls(call: Call) -> None:
    worst_error, where = worst(everything(call, "torch", torch.float64), golden(call, torch.float64))
    assert worst_error < 1e-9, where


WIDE = {
    "rows": Call(Tq=150, Tk=150, K=32, V=32, segment_len=32),
    "linear": Call(Tq=150, Tk=150, K=32, V=32, segment_len=32, update="linear"),
    "no state": Call(Tq=128, Tk=128, K=16, V=48, segment_len=32, with_state=False),
    "shared inputs": Call(Tq=150, Tk=150, K=64, V=64, segment_len=37, with_state=False, own_memory_inputs=False),
    "pieces": Call(Tq=70, Tk=150, K=32, V=32, segment_len=32),
    "packed": Call(B=1, Tq=150, Tk=150, K=32, V=32, segment_len=16, cu_seqlens=(0, 16, 17, 99, 150)),
    "padding": Call(Tq=150, Tk=150, K=32, V=32, segment_len=16, spans=((0, 150), (63, 150))),
    "local": Call(Tq=150, Tk=150, K=32, V=32, segment_len=32, gated=False),
    "window": Call(Tq=150, Tk=150, K=32, V=32, segment_len=32, lookback=1, sinks=4),
    "sink logits": Call(Tq=150, Tk=150, K=32, V=32, segment_len=32, sink_logits=True),
    "alibi": Call(Tq=150, Tk=150, K=32, V=32, segment_len=32, alibi=True),
    "window, packed": Call(
        B=1, Tq=150, Tk=150, K=32, V=32, segment_len=16, cu_seqlens=(0, 16, 17, 99, 150), lookback=1, sinks=4
    ),
    "window, pieces": Call(
        Tq=70, Tk=150, K=32, V=32, segment_len=32, lookback=1, sinks=4, own_sinks="sequence", past=64
    ),
}


@pytest.mark.parametrize("dtype", GATES, ids=str)
@pytest.mark.parametrize("name", WIDE)
def test_error_stays_within_the_gates(name: str, dtype: torch.dtype, device: torch.device) -> None:
    call = WIDE[name]
    check_gates(call, everything(call, "torch", dtype, device), golden(call, dtype, device), dtype)


def test_columns_apart_in_storage_equal_the_reference() -> None:
    """PyTorch's attention for a CPU takes widths of stride 1 alone; a call takes any strides."""
    made = tensors(Call(Tq=70, Tk=70, K=6, V=6, segment_len=16), torch.float64)
    apart = {
        name: x.mT.contiguous().mT.detach().requires_grad_() if x.ndim == 4 else x.detach().requires_grad_()
        for name, x in made.items()
    }
    assert apart["q"].stride(3) != 1
    call = Call(Tq=70, Tk=70, K=6, V=6, segment_len=16)
    outputs, expected = apply(call, apart, "torch"), apply(call, made, "reference")
    assert worst(outputs, expected)[0] < 1e-12
    assert worst(gradients(outputs, apart), gradients(expected, made))[0] < 1e-12


@pytest.mark.parametrize(
    "name",
    [
        "rows",
        "linear",
        "no state",
        "shared inputs",
        "gated when empty",
        "packed",
        "left padding",
        "lookback",
        "window",
        "window, packed",
        "window, unequal past",
        "sink logits",
        "sink logits, block mask",
        "alibi, packed",
        "alibi, sink logits, window, padding",
    ],
)
def test_gradcheck(name: str) -> None:
    kind = KINDS[name]
    call = replace(kind, B=kind.B if kind.spans or isinstance(kind.past, tuple) else 1, H=2, G=1, K=3, V=2)
    made = tensors(call, torch.float64)
    names = list(made)

    def f(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(apply(call, dict(zip(names, values, strict=True)), "torch").values())

    assert torch.autograd.gradcheck(f, tuple(made.values()), atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_nothing_of_tokens_by_segment_is_saved(name: str) -> None:
    """All that autograd keeps is a few tensors of tokens, indices, and the states."""
    kind = KINDS[name]
    # the kind's call, 40 times as long
    lengths = {"Tq": 40 * kind.Tq, "Tk": 40 * kind.Tk, "segment_len": 40 * kind.segment_len}
    offsets = {
        "cu_seqlens": None if kind.cu_seqlens is None else tuple(40 * x for x in kind.cu_seqlens),
        "spans": None if kind.spans is None else tuple((40 * a, 40 * b) for a, b in kind.spans),
    }
    past = tuple(40 * n for n in kind.pasts) if isinstance(kind.past, tuple) else 40 * kind.past
    call = replace(kind, **lengths, **offsets, num_read=40 * kind.num_read, num_write=40 * kind.num_write, past=past)
    made = tensors(call, torch.float32)
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        assert apply(call, made, "torch")["out"].requires_grad
    # slots are as wide as the longest sequence allows, which for these calls is less than 3 times their tokens
    token = 4 * call.B * call.H * (call.K + call.V)
    slots = call.B * (call.Tk // call.segment_len + call.sequences)
    states = 4 * slots * call.G * call.K * (call.V + 1)
    assert sum(kept.values()) < 16 * token * call.Tk + states
    assert 16 * token < 4 * call.B * call.H * call.segment_len * 4
