"""Calls of every kind, for tests, and how far a backend's results are from the reference's."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from segattn.kernels.check import gates
from segattn.kernels.check.calls import Call, apply, evaluate, gradients
from segattn.kernels.check.gates import relative_error as error

__all__ = [
    "GATES", "KINDS", "Call", "apply", "check_gates", "error", "everything", "for_kernels", "golden", "gradients",
    "random_calls", "tensors", "worst",
]  # fmt: skip

GATES = {gates.DTYPES[name]: gate for name, gate in gates.GATES.items()}


def tensors(call: Call, dtype: torch.dtype, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Draw the call's tensors in float64 and round them; the state is of random numbers, which no text need write."""
    generator = torch.Generator().manual_seed(call.seed)

    def normal(*shape: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(to).to(device)

    def tokens(heads: int, time: int, width: int) -> Tensor:
        if call.token_major:
            return normal(call.B, time, heads, width).transpose(1, 2)
        return normal(call.B, heads, time, width)

    wide = torch.promote_types(dtype, torch.float32)
    made = {
        "q": tokens(call.H, call.Tq, call.K),
        "k": tokens(call.G, call.Tk, call.K),
        "v": tokens(call.G, call.Tk, call.V),
    }
    if call.own_sinks is not None:
        made |= {"sink_k": normal(*call.sink_shape(call.K)), "sink_v": normal(*call.sink_shape(call.V))}
    if call.sink_logits:
        made["sink_logits"] = normal(call.H, to=wide)
    if call.gated:
        made["gate"] = normal(call.H, to=wide)
        if call.own_memory_inputs:
            made |= {"memory_q": tokens(call.H, call.Tq, call.K), "memory_k": tokens(call.G, call.Tk, call.K)}
        if call.with_state:
            made["memory"] = normal(call.sequences, call.G, call.K, call.V, to=wide)
            made["normalizer"] = normal(call.sequences, call.G, call.K, to=wide).abs() + 0.5
    return {name: x.detach().requires_grad_() for name, x in made.items()}


def everything(
    call: Call, backend: str | None, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Return outputs and gradients."""
    return evaluate(call, tensors(call, dtype, device), backend)


def golden(call: Call, dtype: torch.dtype, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Return those of the reference in float64, on the values that `dtype` holds."""
    exact = {name: x.detach().double() for name, x in tensors(call, dtype, device).items()}
    return evaluate(call, exact, "reference")


def worst(values: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """Return the largest error, and the name of its tensor."""
    assert values.keys() == expected.keys()
    return max((error(values[name], expected[name]), name) for name in expected)


def check_gates(call: Call, values: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Check that every output and gradient is within the gates of `dtype`."""
    assert values.keys() == expected.keys()
    for name, x in expected.items():
        assert error(values[name], x) < GATES[dtype].of(name, call), name
    assert values["out"].dtype == dtype


def for_kernels(call: Call, most: int | None = None) -> Call:
    """Return the call in widths that the kernels take: K and V of up to 6 become 16, up to 9 become 24.

    most: segments over all rows and key/value heads, which is what an interpreted call's time goes by; above it rows,
    then groups are dropped, then segments made longer.
    """
    call = replace(call, **{name: 8 * max(2, -(-getattr(call, name) // 3)) for name in ("K", "V")})
    segments = -(-call.Tk // call.segment_len)
    if most is not None and call.B * call.G * segments > most and call.spans is None:
        call = replace(call, B=1)
    if most is not None and call.B * call.G * segments > most:
        call = replace(call, H=call.H // call.G, G=1)
    segment_len = call.segment_len
    if most is not None and call.cu_seqlens is None and segments * call.B > most:
        segment_len = max(segment_len, -(-call.Tk * call.B // most))
    # the same number of segments before
    past: list[int] = [n // call.segment_len * segment_len for n in call.pasts]
    return replace(call, segment_len=segment_len, past=tuple(past) if isinstance(call.past, tuple) else past[0])


KINDS = {
    "rows": Call(),
    "no state": Call(with_state=False),
    "shared inputs": Call(own_memory_inputs=False),
    "token major": Call(token_major=True),
    "one segment": Call(Tq=4, Tk=4),
    "exact segments": Call(Tq=20, Tk=20),
    "one head": Call(H=1, G=1),
    "equal heads": Call(H=3, G=3),
    "one kv head": Call(H=6, G=1),
    "wide values": Call(V=9),
    "wide keys": Call(K=9, V=3),
    "linear": Call(update="linear"),
    "gated when empty": Call(empty_memory="gated", with_state=False),
    "bidirectional": Call(causal=False),
    "decode": Call(Tq=1, Tk=3),
    "decode over an edge": Call(Tq=2, Tk=11),
    "prefill in pieces": Call(Tq=14, Tk=18),
    "bidirectional piece": Call(Tq=14, Tk=18, causal=False),
    "no queries": Call(Tq=0, Tk=18),
    "scale": Call(scale=0.3),
    "softcap": Call(scale=1.0, softcap=1.5),
    "softcap, decode": Call(scale=1.0, softcap=1.5, Tq=2, Tk=4),
    "softcap, packed": Call(scale=1.0, softcap=1.5, B=1, cu_seqlens=(0, 5, 5, 6, 14, 23)),
    "sink logits": Call(sink_logits=True),
    "sink logits, local, decode": Call(sink_logits=True, gated=False, Tq=2, Tk=9),
    "sink logits, softcap, packed": Call(sink_logits=True, scale=1.0, softcap=1.5, B=1, cu_seqlens=(0, 5, 5, 14, 23)),
    "sink logits, window": Call(sink_logits=True, lookback=1, sinks=3),
    "sink logits, no queries": Call(sink_logits=True, Tq=0, Tk=18),
    "sink logits, block mask": Call(sink_logits=True, gated=False, Tq=9, Tk=9, segment_len=9, num_read=2, num_write=3),
    "alibi": Call(alibi=True),
    "alibi, bidirectional": Call(alibi=True, causal=False, H=6, G=1),
    "alibi, in pieces": Call(alibi=True, Tq=14, Tk=18, gated=False),
    "alibi, softcap": Call(alibi=True, scale=1.0, softcap=1.5),
    "alibi, packed": Call(alibi=True, B=1, cu_seqlens=(0, 5, 5, 6, 14, 23)),
    "alibi, packed, last queries": Call(alibi=True, B=1, Tq=11, cu_seqlens=(0, 5, 5, 6, 14, 23)),
    "alibi, padding, bidirectional": Call(alibi=True, spans=((3, 21), (0, 6)), causal=False),
    "alibi, window": Call(alibi=True, lookback=1, sinks=3),
    "alibi, window, decode": Call(alibi=True, lookback=1, sinks=3, own_sinks="sequence", past=10, Tq=1, Tk=8),
    "alibi, window, packed, past": Call(
        alibi=True, lookback=1, sinks=2, own_sinks="segment", past=(5, 0, 0, 15), B=1, cu_seqlens=(0, 2, 2, 13, 23)
    ),
    "alibi, block mask, packed": Call(
        alibi=True, B=1, gated=False, Tq=15, Tk=15, segment_len=9, num_read=2, num_write=3, cu_seqlens=(0, 8, 15)
    ),
    "alibi, sink logits": Call(alibi=True, sink_logits=True, update="linear"),
    "alibi, sink logits, window, padding": Call(
        alibi=True, sink_logits=True, lookback=1, sinks=3, Tq=8, spans=((2, 23), (18, 23))
    ),
    "packed": Call(B=1, cu_seqlens=(0, 5, 5, 6, 14, 23)),
    "packed, one sequence": Call(B=1, cu_seqlens=(0, 23)),
    "packed, linear": Call(B=1, cu_seqlens=(0, 12, 23), update="linear", with_state=False),
    "packed, last queries": Call(B=1, Tq=11, cu_seqlens=(0, 5, 5, 6, 14, 23)),
    "packed, bidirectional": Call(B=1, cu_seqlens=(0, 7, 23), causal=False),
    "left padding": Call(spans=((0, 23), (7, 23))),
    "right padding": Call(spans=((0, 19), (0, 4))),
    "padding, last queries": Call(Tq=8, spans=((2, 23), (18, 23))),
    "padding, bidirectional": Call(spans=((3, 21), (0, 6)), causal=False),
    "local": Call(gated=False),
    "local, decode": Call(gated=False, Tq=2, Tk=9),
    "packed, shorter than a segment": Call(B=1, Tq=23, Tk=23, segment_len=30, cu_seqlens=(0, 4, 15, 23)),
    "lookback": Call(lookback=1),
    "lookback, no state": Call(lookback=1, with_state=False, Tq=20, Tk=20),
    "lookback, one segment": Call(lookback=1, Tq=4, Tk=4),
    "lookback, two segments": Call(lookback=1, Tq=9, Tk=9, own_memory_inputs=False),
    "lookback, decode": Call(lookback=1, Tq=1, Tk=8),
    "lookback, in pieces": Call(lookback=1, Tq=14, Tk=18),
    "lookback, local": Call(lookback=1, gated=False),
    "lookback, packed": Call(lookback=1, B=1, cu_seqlens=(0, 5, 5, 6, 17, 23)),
    "sinks": Call(sinks=3),
    "sinks, local, decode": Call(sinks=3, gated=False, Tq=1, own_sinks="sequence", past=10, Tk=4),
    "sinks, more than tokens": Call(sinks=3, Tq=2, Tk=2),
    "sinks, packed": Call(sinks=3, B=1, cu_seqlens=(0, 5, 5, 6, 17, 23)),
    "sinks of each segment": Call(sinks=2, own_sinks="segment"),
    "window": Call(lookback=1, sinks=3),
    "window, linear": Call(lookback=1, sinks=3, update="linear", H=3, G=3),
    "window, as many sinks as a segment": Call(lookback=1, sinks=5, gated=False),
    "window, token major": Call(lookback=1, sinks=3, token_major=True, own_memory_inputs=False, V=9),
    "window, gated when empty": Call(lookback=1, sinks=3, empty_memory="gated", with_state=False),
    "window, bidirectional": Call(lookback=1, sinks=3, causal=False),
    "window, decode": Call(lookback=1, sinks=3, Tq=1),
    "window, in pieces": Call(lookback=1, sinks=3, own_sinks="sequence", past=10, Tq=16),
    "window, no queries": Call(lookback=1, sinks=3, Tq=0),
    "window, softcap": Call(lookback=1, sinks=3, scale=1.0, softcap=1.5),
    "window, packed": Call(lookback=1, sinks=3, B=1, cu_seqlens=(0, 2, 2, 18, 23)),
    "window, packed, last queries": Call(lookback=1, sinks=3, B=1, Tq=7, cu_seqlens=(0, 2, 2, 18, 23)),
    "window, packed, bidirectional": Call(lookback=1, sinks=3, B=1, cu_seqlens=(0, 2, 2, 18, 23), causal=False),
    "window, packed, past": Call(
        lookback=1, sinks=2, own_sinks="segment", past=(5, 0, 0, 15), B=1, cu_seqlens=(0, 2, 2, 13, 23)
    ),
    "window, padding": Call(lookback=1, sinks=3, spans=((0, 23), (7, 23))),
    "window, padding, last queries": Call(lookback=1, sinks=3, Tq=8, spans=((2, 23), (18, 23))),
    "window, padding, past": Call(lookback=1, sinks=2, own_sinks="sequence", past=(10, 0), spans=((0, 19), (7, 23))),
    "window, unequal past": Call(lookback=1, sinks=2, own_sinks="segment", past=(0, 15)),
    "window, unequal past, decode": Call(lookback=1, sinks=2, own_sinks="sequence", past=(5, 10), Tq=1, Tk=8),
    "block mask": Call(gated=False, Tq=9, Tk=9, segment_len=9, num_read=2, num_write=3),
    "block mask, last queries": Call(gated=False, Tq=4, Tk=9, segment_len=12, num_read=2, num_write=3),
    "block mask, padded": Call(gated=False, Tq=9, Tk=9, segment_len=9, num_read=2, num_write=3, spans=((0, 9), (2, 8))),
    "block mask, packed": Call(
        B=1, gated=False, Tq=15, Tk=15, segment_len=9, num_read=2, num_write=3, cu_seqlens=(0, 8, 15)
    ),
    "block mask, bidirectional": Call(gated=False, Tq=9, Tk=9, segment_len=9, num_read=2, num_write=3, causal=False),
}


@st.composite
def random_calls(draw: st.DrawFn) -> Call:
    """Draw any valid call of small, odd sizes."""
    integers, booleans = st.integers, st.booleans()
    G = draw(integers(1, 3))
    Tk = draw(integers(1, 26))
    call = Call(
        B=draw(integers(1, 3)),
        H=G * draw(integers(1, 3)),
        G=G,
        Tq=Tk if draw(booleans) else draw(integers(0, Tk)),
        Tk=Tk,
        K=draw(integers(1, 9)),
        V=draw(integers(1, 9)),
        segment_len=draw(integers(1, 9)),
        gated=draw(booleans),
        with_state=draw(booleans),
        own_memory_inputs=draw(booleans),
        token_major=draw(booleans),
        update=draw(st.sampled_from(["delta", "linear"])),
        empty_memory=draw(st.sampled_from(["local", "gated"])),
        causal=draw(booleans),
        scale=draw(st.sampled_from([None, 0.05, 1.0, 3.0])),
        softcap=draw(st.sampled_from([None, None, 2.0, 50.0])),
        sink_logits=draw(booleans),
        alibi=draw(booleans),
        seed=draw(integers(0, 2**31)),
    )
    kind = draw(st.sampled_from(["rows", "spans", "packed", "block mask"]))
    if kind == "block mask":
        num_read = draw(integers(0, Tk))
        return replace(call, gated=False, segment_len=Tk, num_read=num_read, num_write=draw(integers(0, Tk - num_read)))
    if kind == "spans":
        pairs = [sorted(draw(st.lists(integers(0, Tk), min_size=2, max_size=2, unique=True))) for _ in range(call.B)]
        call = replace(call, spans=tuple((a, b) for a, b in pairs))
    if kind == "packed":
        inner = sorted(draw(st.lists(integers(0, Tk), max_size=4)))
        call = replace(call, B=1, cu_seqlens=(0, *inner, Tk))
    return draw(with_windows(call)) if draw(booleans) else call


@st.composite
def with_windows(draw: st.DrawFn, call: Call) -> Call:
    """Draw a lookback and sinks for a call without the block mask, and whose they are."""
    integers = st.integers
    call = replace(call, lookback=draw(integers(0, 1)), sinks=draw(integers(0, call.segment_len)))
    if not call.sinks:
        return call
    own = draw(st.sampled_from([None, "sequence", "segment"]))
    if own is None:
        return replace(call, own_sinks=None)
    numbers = integers(0, 3).map(lambda segments: segments * call.segment_len)
    each = st.lists(numbers, min_size=call.sequences, max_size=call.sequences).map(tuple)
    return replace(call, own_sinks=own, past=draw(st.one_of(numbers, each)))
