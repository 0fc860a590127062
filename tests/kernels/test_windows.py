"""What `lookback` and sinks let a query see, what the memory then holds, and whose sinks they are."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from calls import KINDS, Call, apply, error, gradients, tensors, worst
from torch import Tensor

from segattn import MemoryState, memory_read, memory_write, segment_attention
from segattn.kernels.sinks import sum_over_slots

BACKENDS = ("torch", "reference")
# every one: the dtype that it is tested in, and how close to another way of computing the same it comes
PRECISE = {"torch": (torch.float64, 1e-12), "reference": (torch.float64, 1e-12), "triton": (torch.float32, 1e-5)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("lookback", "sinks"), [(1, 0), (0, 2), (1, 3)])
def test_what_every_query_sees(
    lookback: int, sinks: int, causal: bool, packed: bool, backend: str, device: torch.device
) -> None:
    """Its segment, the one before, the first tokens of its sequence: to the bit nothing else."""
    L, T = 5, 23
    starts = (0, 4, T) if packed else (0, T)
    call = Call(B=1, H=2, G=1, Tq=T, Tk=T, segment_len=L, gated=False, lookback=lookback, sinks=sinks, causal=causal)
    made = tensors(call, torch.float64, device)
    offsets = torch.tensor(starts, dtype=torch.int32, device=device) if packed else None
    out = apply(call, made, backend, cu_seqlens=offsets)["out"]
    seen, expected = torch.zeros(T, T, dtype=torch.bool), torch.zeros(T, T, dtype=torch.bool)
    for j in range(T):
        moved = {name: x.detach().clone() for name, x in made.items()}
        moved["k"][:, :, j] += 0.5
        seen[:, j] = (apply(call, moved, backend, cu_seqlens=offsets)["out"] != out).any(-1).any(1)[0].cpu()
    for begin, end in pairwise(starts):
        for i in range(end - begin):
            for j in range(end - begin):
                in_window = 0 <= i // L - j // L <= lookback and (j <= i or not causal)
                expected[begin + i, begin + j] = in_window or (j < sinks and j // L < i // L)
    # a row that sees one key alone does not depend on what it is
    single = expected.sum(1) == 1
    assert torch.equal(seen[~single], expected[~single])
    assert not seen[single].any()


@pytest.mark.parametrize("backend", PRECISE)
@pytest.mark.parametrize("queries", [23, 9, 1])
def test_a_segment_of_sinks_and_two_of_window_are_full_attention(
    queries: int, backend: str, device: torch.device
) -> None:
    """Up to three segments, by PyTorch's attention: values, and gradients, which the sinks' come on top of."""
    dtype, limit = PRECISE[backend]
    q, k, v = (torch.randn(2, n, T, 16, device=device, dtype=dtype) for n, T in ((4, queries), *[(2, 23)] * 2))
    made, exact = ([x.to(to).requires_grad_() for x in (q, k, v)] for to in (dtype, torch.float64))
    out, _ = segment_attention(*made, segment_len=8, lookback=1, sinks=8, backend=backend)
    mask = torch.ones(queries, 23, dtype=torch.bool, device=device).tril(23 - queries)
    full = F.scaled_dot_product_attention(*exact, attn_mask=mask, enable_gqa=True)
    assert error(out, full) < limit
    found, expected = (torch.autograd.grad(y.square().sum(), x) for y, x in ((out, made), (full, exact)))
    for a, b in zip(found, expected, strict=True):
        assert error(a, b) < limit


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("update", ["delta", "linear"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_memory_is_one_segment_late(packed: bool, update: str, backend: str) -> None:
    """Read with a gate that leaves nothing else: segment s recalls what was written before segment s − 1."""
    L, T, n = 4, 18, 4
    q, k, v = (torch.randn(1, 1, T, 6, dtype=torch.float64) for _ in range(3))
    gate = torch.full((1,), 100.0, dtype=torch.float64)
    offsets = {"cu_seqlens": torch.tensor([0, 0, T])} if packed else {}
    options = {"segment_len": L, "lookback": 1, "update": update, "backend": backend}
    out, last = segment_attention(q, k, v, gate=gate, **options, **offsets)
    state = MemoryState.zeros(1, 1, 6, 6, dtype=torch.float64)
    for s in range(n + 1):
        if s >= 2:
            written = slice((s - 2) * L, (s - 1) * L)
            state = memory_write(k[:, :, written], v[:, :, written], state, update=update, backend="reference")
            here = slice(s * L, (s + 1) * L)
            assert error(out[:, :, here], memory_read(q[:, :, here], state, backend="reference")) < 1e-12
    assert error(last.memory[-1:], state.memory) < 1e-12
    assert error(last.normalizer[-1:], state.normalizer) < 1e-12


def first_tokens(call: Call, x: Tensor) -> Tensor:
    """Return the sinks of every sequence, differentiable in x; zeros where a sequence has fewer tokens."""
    rows = [(b, 0, call.Tk) for b in range(call.B)]
    if call.spans is not None:
        rows = [(b, *span) for b, span in enumerate(call.spans)]
    if call.cu_seqlens is not None:
        rows = [(0, *pair) for pair in pairwise(call.cu_seqlens)]
    tokens = [x[b, :, begin:end][:, : call.sinks] for b, begin, end in rows]
    return torch.stack([F.pad(y, (0, 0, 0, call.sinks - y.shape[1])) for y in tokens])


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("name", ["sinks", "window", "window, packed", "window, padding", "window, bidirectional"])
def test_the_sinks_are_the_first_tokens(name: str, each: bool) -> None:
    """Passed by hand, once or for each segment, they give the same, and k and v the same gradients."""
    call = KINDS[name]
    made = tensors(call, torch.float64)
    passed = {f"sink_{x}": first_tokens(call, made[x]) for x in ("k", "v")}
    if each:
        segments = -(-call.Tk // call.segment_len)
        passed = {key: x.unsqueeze(2).expand(-1, -1, segments, -1, -1) for key, x in passed.items()}
    by_default, by_hand = apply(call, made), apply(call, made | passed)
    assert worst(by_hand, by_default)[0] < 1e-12
    assert worst(gradients(by_hand, made), gradients(by_default, made))[0] < 1e-11


@pytest.mark.parametrize("past", [0, 4, 8, 12])
def test_past_is_where_the_sinks_begin_to_be_seen(past: int) -> None:
    """As an integer, and as one for each row, which are laid out in another way."""
    q, k, v = (torch.randn(2, 2, 14, 6, dtype=torch.float64, requires_grad=True) for _ in range(3))
    sinks = [torch.randn(2, 2, 2, 6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    outs, grads = [], []
    for value in (past, torch.tensor([past, past], dtype=torch.int32)):
        options = {"segment_len": 4, "lookback": 1, "sinks": 2, "past": value}
        outs.append(segment_attention(q, k, v, sink_k=sinks[0], sink_v=sinks[1], **options).out)
        grads.append(torch.autograd.grad(outs[-1].square().sum(), (q, k, v, *sinks)))
    assert error(*outs) < 1e-12
    for a, b in zip(*grads, strict=True):
        assert error(a, b) < 1e-12
    local = segment_attention(q, k, v, segment_len=4, lookback=1).out
    differs = (outs[0] != local).any(-1).all(1).all(0)
    assert differs.tolist() == [past // 4 + t // 4 > 1 for t in range(14)]


@pytest.mark.parametrize("backend", PRECISE)
def test_what_is_not_seen_may_be_anything(backend: str, device: torch.device) -> None:
    """NaN among sinks that no segment sees yet reaches no output and no gradient."""
    call = Call(H=2, G=1, K=16, V=16, lookback=1, sinks=2, own_sinks="segment", past=(0, 5))
    made = tensors(call, PRECISE[backend][0], device)
    for name in ("sink_k", "sink_v"):
        x = made[name].detach()
        x[0, :, :2], x[1, :, 0] = float("nan"), float("nan")
        made[name] = x.requires_grad_()
    outputs = apply(call, made, backend)
    found = outputs | gradients(outputs, made)
    assert all(x.isfinite().all() for x in found.values())
    assert not found["dsink_k"][0, :, :2].any()
    assert found["dsink_k"][0, :, 2:].any(-1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_short_row_looks_back_at_no_padding(backend: str) -> None:
    """Two tokens amid NaN, in a row whose other segments are empty: nothing of it in values or gradients."""
    inside = slice(12, 14)
    bare = [torch.randn(1, 2, 2, 6, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    padded = [F.pad(x.detach(), (0, 0, 12, 6), value=float("nan")).requires_grad_() for x in bare]
    options = {"segment_len": 5, "lookback": 1, "gate": torch.zeros(2, dtype=torch.float64), "backend": backend}
    expected = segment_attention(*bare, **options).out
    out = segment_attention(*padded, spans=torch.tensor([[12, 14]]), **options).out
    assert error(out[:, :, inside], expected) < 1e-12
    wanted = torch.autograd.grad(expected.square().sum(), bare)
    for grad, x in zip(torch.autograd.grad(out.square().sum(), padded), wanted, strict=True):
        assert error(grad[:, :, inside], x) < 1e-12
        assert not grad[:, :, :12].any()
        assert not grad[:, :, 14:].any()


def test_gradients_of_many_slots_are_summed_in_float32() -> None:
    """A sequence of 3000 segments in bfloat16, which would stop counting at 256; spare slots count for none."""
    slots = torch.ones(3007, 1, 2, dtype=torch.bfloat16)
    sequence = torch.tensor([0] * 3000 + [2] * 3 + [3] * 4)
    found = sum_over_slots(slots, sequence, 3)
    assert found.dtype == torch.bfloat16
    assert found[:, 0, 0].tolist() == [torch.tensor(3000.0).bfloat16().item(), 0.0, 3.0]


def test_a_stream_holds_less_than_two_segments_and_the_sinks() -> None:
    """Token by token, with the last whole segment, the sinks and the state: what the whole text gives."""
    L, n = 8, 4
    q, k, v = (torch.randn(1, 2, 100, 6, dtype=torch.float64) for _ in range(3))
    gate = torch.zeros(2, dtype=torch.float64)
    options = {"segment_len": L, "lookback": 1, "sinks": n, "gate": gate}
    whole = segment_attention(q, k, v, **options)
    state, past, outs, held = None, 0, [], (k[:, :, :0], v[:, :, :0])
    sinks = {"sink_k": k[:, :, :n], "sink_v": v[:, :, :n]}
    for t in range(100):
        keys, values = (torch.cat([x, y[:, :, t : t + 1]], 2) for x, y in zip(held, (k, v), strict=True))
        passed = sinks if past else {}
        out, state = segment_attention(q[:, :, t : t + 1], keys, values, state=state, past=past, **passed, **options)
        outs.append(out)
        done = max(keys.shape[2] // L - 1, 0) * L
        held, past = (keys[:, :, done:], values[:, :, done:]), past + done
        assert held[0].shape[2] < 2 * L
    assert error(torch.cat(outs, 2), whole.out) < 1e-12
    assert error(state.memory, whole.state.memory) < 1e-12


@pytest.mark.parametrize("backend", PRECISE)
@pytest.mark.parametrize("time", [3, 7])
def test_keys_that_a_lookback_leaves_unwritten_get_zeros(time: int, backend: str, device: torch.device) -> None:
    """Not None: processes that add up their gradients each need one."""
    q, k, v, memory_k = (torch.randn(1, 1, time, 16, device=device, requires_grad=True) for _ in range(4))
    gate = torch.zeros(1, device=device)
    out, state = segment_attention(q, k, v, memory_k=memory_k, gate=gate, segment_len=4, lookback=1, backend=backend)
    (out.sum() + state.memory.sum()).backward()
    assert memory_k.grad is not None
    assert not memory_k.grad.any()
