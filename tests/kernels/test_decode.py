"""`segment_decode`: every backend against the reference, from buffers that are partly filled with NaN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from calls import GATES, error

from segattn import MemoryState, memory_write, segment_attention, segment_decode

BACKENDS = ("triton", "torch")


@dataclass(frozen=True)
class Step:
    """A decoding step; tensors are drawn from the seed."""

    B: int = 2
    H: int = 4
    G: int = 2
    Tq: int = 1
    L: int = 20
    K: int = 16
    V: int = 24
    lengths: tuple[int, ...] | None = (20, 7)
    lengths_dtype: torch.dtype = torch.int32
    gated: bool = True
    empty: bool = False
    own_memory_q: bool = True
    token_major: bool = False
    causal: bool = True
    empty_memory: str = "local"
    scale: float | None = None
    sinks: int = 0
    # which rows see them; None: all
    seen: tuple[bool, ...] | None = None
    sink_logits: bool = False
    alibi: bool = False


def inputs(step: Step, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Arguments of the call, NaN in tokens past a row's length and in sinks that a row does not see."""
    generator = torch.Generator().manual_seed(5)

    def tokens(heads: int, time: int, width: int) -> torch.Tensor:
        shape = (step.B, time, heads, width) if step.token_major else (step.B, heads, time, width)
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)
        return x.transpose(1, 2) if step.token_major else x

    made: dict[str, Any] = {
        "q": tokens(step.H, step.Tq, step.K),
        "k": tokens(step.G, step.L, step.K),
        "v": tokens(step.G, step.L, step.V),
        "lengths": None
        if step.lengths is None
        else torch.tensor(step.lengths, dtype=step.lengths_dtype, device=device),
        "causal": step.causal,
        "empty_memory": step.empty_memory,
        "scale": step.scale,
    }
    for row, length in enumerate(step.lengths or ()):
        for name in ("k", "v"):
            made[name][row, :, length:] = float("nan")
    if step.sinks:
        made |= {"sink_k": tokens(step.G, step.sinks, step.K), "sink_v": tokens(step.G, step.sinks, step.V)}
    if step.seen is not None:
        made["sink_seen"] = torch.tensor(step.seen, device=device)
        for name in ("sink_k", "sink_v"):
            made[name][~made["sink_seen"]] = float("nan")
    if step.sink_logits:
        made["sink_logits"] = torch.randn(step.H, generator=generator).to(device)
    if step.alibi:
        made["alibi_slopes"] = 0.3 / torch.arange(1, step.H + 1, device=device)
    if step.gated:
        made["gate"] = torch.randn(step.H, generator=generator).to(device)
        if step.own_memory_q:
            made["memory_q"] = tokens(step.H, step.Tq, step.K)
        memory = torch.randn(step.B, step.G, step.K, step.V, generator=generator).to(device)
        normalizer = torch.rand(step.B, step.G, step.K, generator=generator).to(device) + 0.5
        held = 0.0 if step.empty else 1.0
        made["state"] = MemoryState(memory * held, normalizer * held)
    return made


def in_double(made: dict[str, Any]) -> dict[str, Any]:
    """The same numbers in float64."""

    def double(x: Any) -> Any:
        if isinstance(x, MemoryState):
            return MemoryState(*(y.double() for y in x))
        return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    return {name: double(x) for name, x in made.items()}


STEPS = {
    "ragged": Step(),
    "int64 lengths": Step(lengths_dtype=torch.int64),
    "full buffers": Step(lengths=None),
    "three queries": Step(Tq=3, lengths=(18, 3)),
    "three queries, seen by all": Step(Tq=3, causal=False),
    "fewer tokens than queries": Step(Tq=3, lengths=(2, 1)),
    "rows without tokens": Step(B=3, lengths=(0, 20, 0)),
    "no row with tokens": Step(lengths=(0, 0)),
    "rows of one length": Step(lengths=(11, 11)),
    "rows of one length, fewer than queries": Step(Tq=3, lengths=(2, 2)),
    "one kv head": Step(H=6, G=1, Tq=3),
    "equal heads": Step(H=3, G=3),
    "no memory": Step(gated=False, Tq=3),
    "no memory, seen by all": Step(gated=False, causal=False),
    "empty memory": Step(empty=True),
    "gated when empty": Step(empty=True, empty_memory="gated", Tq=2),
    "shared queries": Step(own_memory_q=False),
    "token major": Step(token_major=True, Tq=2),
    "wide keys": Step(K=40, V=16, scale=1.0),
    "one token": Step(L=1, lengths=None),
    "longer than its splits": Step(B=1, H=2, G=1, L=150, lengths=(133,), Tq=2),
    # a window of two segments is a longer buffer
    "sinks": Step(sinks=3, lengths=None),
    "sinks, ragged": Step(sinks=4, Tq=3, lengths=(18, 3)),
    "sinks of some rows": Step(B=3, sinks=3, lengths=(20, 7, 2), seen=(False, True, False)),
    "sinks, no memory": Step(sinks=17, gated=False, Tq=2, lengths=None, seen=(True, False)),
    "sinks, seen by all": Step(sinks=1, gated=False, Tq=2, causal=False),
    "sinks, fewer tokens than queries": Step(sinks=2, Tq=3, lengths=(2, 0), seen=(True, True)),
    "sink logits": Step(sink_logits=True, Tq=2),
    "sink logits, no memory, rows without tokens": Step(sink_logits=True, gated=False, lengths=(0, 20)),
    "sink logits, longer than its splits": Step(B=1, G=2, L=150, lengths=(133,), sink_logits=True, alibi=True),
    "alibi": Step(alibi=True, Tq=3, lengths=(18, 3)),
    "alibi, seen by all": Step(alibi=True, Tq=3, lengths=None, causal=False, gated=False),
    "alibi, one query": Step(alibi=True, lengths=None),
    "alibi, sinks of some rows": Step(B=3, alibi=True, sinks=3, lengths=(20, 7, 2), seen=(False, True, False)),
}


@pytest.mark.parametrize("dtype", GATES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", STEPS)
def test_equals_the_reference(name: str, backend: str, dtype: torch.dtype, device: torch.device) -> None:
    """NaN past the lengths does not leak, and rows without as many tokens as queries give 0 for those."""
    step = STEPS[name]
    made = inputs(step, dtype, device)
    out = segment_decode(**made, backend=backend)
    assert out.dtype == dtype
    assert error(out, segment_decode(**in_double(made), backend="reference")) < GATES[dtype][0]
    for row, length in enumerate(step.lengths or ()):
        assert not out[row, :, : max(step.Tq - length, 0)].any()


@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize("shift", [0.0, -40.0, 60.0])
@pytest.mark.parametrize("sizes", [(1e-12, 1e12), (1e-30, 1e30), (1.0, 0.0), (1e8, 1e-8)], ids=str)
def test_memories_of_any_size_are_read(
    sizes: tuple[float, float], shift: float, queries: int, device: torch.device
) -> None:
    """A row's memory may be tiny, huge or empty beside another's, and what it is read by likewise."""
    made = inputs(Step(H=6, Tq=queries, K=7, V=5), torch.float32, device)
    scaled = torch.tensor(sizes, device=device)
    memory, normalizer = made["state"]
    made["state"] = MemoryState(memory * scaled[:, None, None, None], normalizer * scaled[:, None, None])
    made["memory_q"] = made["memory_q"] + shift
    out = segment_decode(**made, backend="torch")
    exact = segment_decode(**in_double(made), backend="reference")
    for row in range(2):
        assert error(out[row], exact[row]) < GATES[torch.float32].outputs


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
@pytest.mark.parametrize(
    "name", [name for name, step in STEPS.items() if step.lengths is None or 0 not in step.lengths]
)
def test_is_the_same_step_of_segment_attention(name: str, backend: str, device: torch.device) -> None:
    """Each row as a call on its own tokens, by the reference in float64."""
    step = STEPS[name]
    made = in_double(inputs(step, torch.float32, device))
    out = segment_decode(**(made if backend == "reference" else inputs(step, torch.float32, device)), backend=backend)
    lengths = made.pop("lengths")
    state = made.pop("state", None)
    sinks = {key: made.pop(key) for key in ("sink_k", "sink_v") if key in made}
    seen = made.pop("sink_seen", torch.ones(step.B, dtype=torch.bool))
    for row, length in enumerate([step.L] * step.B if lengths is None else lengths.tolist()):
        first, one = max(step.Tq - length, 0), slice(row, row + 1)
        piece = {key: x[one, :, first:] if key in ("q", "memory_q") else x for key, x in made.items()}
        piece |= {key: made[key][one, :, :length] for key in ("k", "v")}
        before = None if state is None else MemoryState(*(x[one] for x in state))
        if sinks and seen[row]:
            piece |= {key: x[one] for key, x in sinks.items()} | {"sinks": step.sinks, "past": step.L + 1}
        expected = segment_attention(**piece, state=before, segment_len=step.L + 1, backend="reference").out
        assert error(out[one, :, first:], expected) < 2e-6


@pytest.mark.parametrize("gated", [True, False])
def test_counters_are_left_at_zero(gated: bool, device: torch.device) -> None:
    """The caller's, step after step: the same bits as with new ones in each call, and twice the same."""
    made = inputs(Step(L=70, lengths=(70, 33), gated=gated), torch.float32, device)
    counters = torch.zeros(4, dtype=torch.int32, device=device)
    expected = segment_decode(**made, backend="triton")
    for _ in range(3):
        assert torch.equal(segment_decode(**made, counters=counters, backend="triton"), expected)
        assert not counters.any()


def test_lengths_are_read_on_the_device(device: torch.device) -> None:
    """Changed in place between two calls, as between two replays of a captured graph."""
    made = inputs(Step(lengths=(20, 20)), torch.float32, device)
    lengths = made["lengths"]
    for filled in ((3, 20), (20, 1)):
        lengths.copy_(torch.tensor(filled))
        out = segment_decode(**made, backend="triton")
        exact = segment_decode(**in_double(made), backend="reference")
        assert error(out, exact) < 2e-6


@pytest.mark.parametrize("update", ["delta", "linear"])
@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_decoding_and_folding_equal_one_call(backend: str, update: str, device: torch.device) -> None:
    """Token by token into buffers of one segment, each full one folded by memory_write."""
    L, T, dtype = 4, 10, torch.float64 if backend == "reference" else torch.float32
    q, k, v = (torch.randn(1, n, T, 16, device=device, dtype=dtype) for n in (2, 1, 1))
    gate = torch.randn(2, device=device, dtype=dtype)
    whole = segment_attention(
        q.double(), k.double(), v.double(), segment_len=L, gate=gate.double(), update=update, backend="reference"
    )
    keys, values = (torch.full((1, 1, L, 16), float("nan"), device=device, dtype=dtype) for _ in range(2))
    state, lengths, outs = (
        MemoryState.zeros(1, 1, 16, 16, device=device, dtype=dtype),
        torch.zeros(1, dtype=torch.int32, device=device),
        [],
    )
    for t in range(T):
        keys[:, :, t % L], values[:, :, t % L] = k[:, :, t], v[:, :, t]
        lengths.fill_(t % L + 1)
        outs.append(segment_decode(q[:, :, t : t + 1], keys, values, lengths, gate=gate, state=state, backend=backend))
        if t % L == L - 1:
            state = memory_write(keys, values, state, update=update, backend=backend)
    assert error(torch.cat(outs, 2), whole.out) < 2e-6
    assert error(state.memory, whole.state.memory) < 2e-6
    assert error(state.normalizer, whole.state.normalizer) < 2e-6


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_decoding_in_windows_equals_one_call(backend: str, device: torch.device) -> None:
    """Token by token into buffers of two segments, of which the first is folded when both are full; and sinks."""
    L, T, n, dtype = 4, 19, 3, torch.float64 if backend == "reference" else torch.float32
    q, k, v = (torch.randn(1, heads, T, 16, device=device, dtype=dtype) for heads in (2, 1, 1))
    gate = torch.randn(2, device=device, dtype=dtype)
    options = {"segment_len": L, "lookback": 1, "sinks": n, "backend": "reference"}
    whole = segment_attention(q.double(), k.double(), v.double(), gate=gate.double(), **options)
    keys, values = (torch.full((1, 1, 2 * L, 16), float("nan"), device=device, dtype=dtype) for _ in range(2))
    state, outs, filled = MemoryState.zeros(1, 1, 16, 16, device=device, dtype=dtype), [], 0
    for t in range(T):
        if filled == 2 * L:
            state = memory_write(keys[:, :, :L], values[:, :, :L], state, backend=backend)
            keys, values, filled = keys.roll(L, 2), values.roll(L, 2), L
        keys[:, :, filled], values[:, :, filled] = k[:, :, t], v[:, :, t]
        filled += 1
        lengths = torch.tensor([filled], device=device)
        sinks = {"sink_k": k[:, :, :n], "sink_v": v[:, :, :n], "sink_seen": torch.tensor([t >= 2 * L], device=device)}
        here = q[:, :, t : t + 1]
        outs.append(segment_decode(here, keys, values, lengths, gate=gate, state=state, **sinks, backend=backend))
    assert error(torch.cat(outs, 2), whole.out) < 2e-6
    assert error(state.memory, whole.state.memory) < 2e-6


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_nothing_asked_gives_nothing(backend: str, device: torch.device) -> None:
    x = torch.ones(2, 2, 5, 16, device=device)
    for q, kv in ((x[:, :, :0], x), (x[:0, :, :1], x[:0])):
        out = segment_decode(q, kv, kv, backend=backend)
        assert out.shape == q.shape
        assert out.device == q.device


X = torch.ones(2, 4, 1, 16)
KV = torch.ones(2, 2, 5, 16)
STATE = MemoryState.zeros(2, 2, 16, 16)
GATE = torch.zeros(4)
BAD: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "gate alone": (ValueError, "gate and state go together", {"gate": GATE}),
    "state alone": (ValueError, "gate and state go together", {"state": STATE}),
    "gate shape": (ValueError, r"gate must have shape \[H\] = \[4\], got \[2\]", {"gate": GATE[:2], "state": STATE}),
    "state shape": (
        ValueError,
        "state.memory must have shape",
        {"gate": GATE, "state": MemoryState.zeros(1, 2, 16, 16)},
    ),
    "lengths shape": (
        ValueError,
        r"lengths must have shape \[B\] = \[2\], got \[3\]",
        {"lengths": torch.ones(3).int()},
    ),
    "lengths dtype": (
        TypeError,
        "lengths must be an int32 or int64 tensor, got torch.float32",
        {"lengths": torch.ones(2)},
    ),
    "lengths type": (TypeError, "lengths must be an int32 or int64 tensor, got list", {"lengths": [1, 2]}),
    "counters dtype": (
        TypeError,
        "counters must be an int32 tensor, got torch.int64",
        {"counters": torch.zeros(4).long()},
    ),
    "counters shape": (ValueError, r"counters must have shape \[B · G\] = \[4\]", {"counters": torch.zeros(2).int()}),
    "lengths elsewhere": (ValueError, "lengths must be on q's device", {"lengths": torch.ones(2).int().to("meta")}),
    "more queries than tokens": (ValueError, "Tq <= Tk", {"q": torch.ones(2, 4, 6, 16)}),
    "memory_q": (ValueError, "memory_q must have shape that of q", {"memory_q": KV}),
    "empty_memory": (ValueError, "empty_memory must be one of", {"empty_memory": "zero"}),
    "causal": (TypeError, "causal must be True or False", {"causal": 1}),
    "scale": (ValueError, "scale must be positive and finite", {"scale": -1.0}),
    "backend": (ValueError, "backend must be one of", {"backend": "cuda"}),
    "sink_k alone": (ValueError, "sink_k and sink_v go together", {"sink_k": KV}),
    "sink_k type": (TypeError, "sink_k must be a tensor, got list", {"sink_k": [1.0], "sink_v": KV}),
    "sink_k shape": (
        ValueError,
        r"sink_k must have shape \[B, G, sinks, K\] = \[2, 2, 5, 16\], got \[1, 2, 5, 16\]",
        {"sink_k": KV[:1], "sink_v": KV},
    ),
    "sink_v length": (ValueError, "sink_v must have shape", {"sink_k": KV, "sink_v": KV[:, :, 1:]}),
    "sink_k dtype": (TypeError, "sink_k must have k's dtype", {"sink_k": KV.half(), "sink_v": KV}),
    "sink_seen alone": (ValueError, "sink_seen needs sink_k and sink_v", {"sink_seen": torch.ones(2).bool()}),
    "sink_seen dtype": (
        TypeError,
        "sink_seen must be a bool tensor, got torch.int32",
        {"sink_k": KV, "sink_v": KV, "sink_seen": torch.ones(2).int()},
    ),
    "sink_seen shape": (
        ValueError,
        r"sink_seen must have shape \[B\] = \[2\], got \[3\]",
        {"sink_k": KV, "sink_v": KV, "sink_seen": torch.ones(3).bool()},
    ),
    "gradients": (RuntimeError, "no gradients: call it under torch.no_grad", {"q": X.clone().requires_grad_()}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    kind, message, changed = BAD[name]
    arguments: dict[str, Any] = {"q": X, "k": KV, "v": KV} | changed
    with pytest.raises(kind, match=message):
        segment_decode(**arguments)


def test_more_queries_than_a_tile_are_refused(device: torch.device) -> None:
    """By the kernels alone, with what to call instead."""
    q, kv = torch.ones(1, 10, 7, 16, device=device), torch.ones(1, 1, 9, 16, device=device)
    message = "at most 64 rows per key/value head, .* got 70: use segment_attention, or pass backend='torch'"
    with pytest.raises(ValueError, match=message):
        segment_decode(q, kv, kv, backend="triton")
    assert error(segment_decode(q, kv, kv, backend="torch"), torch.ones_like(q)) < 1e-6
    most = segment_decode(q[:, :, :6], kv, kv, backend="triton")
    assert error(most, torch.ones_like(most)) < 1e-6


def test_gradients_are_refused_only_when_wanted() -> None:
    q = X.clone().requires_grad_()
    with torch.no_grad():
        assert not segment_decode(q, KV, KV).requires_grad
