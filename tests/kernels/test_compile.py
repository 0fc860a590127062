"""The operation inside PyTorch: opcheck, one compiled graph, autocast, and no second derivative."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from calls import KINDS, Call, apply, error, for_kernels, gradients, tensors, worst
from torch._subclasses.fake_tensor import FakeTensorMode

from segattn import MemoryState, memory_read, memory_write, segment_attention
from segattn.kernels.sequences import checked_bounds
from segattn.kernels.sinks import repeat_over_slots, sum_over_slots
from segattn.kernels.state import Options
from segattn.kernels.torch.memory import fold_segments, fold_segments_backward, read_and_blend, read_and_blend_backward
from segattn.kernels.triton.ops import Inputs

F, G, H, L, K, V, N = 3, 2, 4, 5, 4, 6, 2


def normal(*shape: int, grad: bool = True) -> torch.Tensor:
    return torch.randn(*shape).requires_grad_(grad)


def operations() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """One sample of every registered operation, and of its optional arguments."""
    k, v, local, q = (
        normal(F, L, G, K).transpose(1, 2),
        normal(F, G, L, V),
        normal(F, L, H, V).transpose(1, 2),
        normal(F, H, L, K),
    )
    memory, normalizer = normal(N, G, K, V), normal(N, G, K, grad=False).abs().requires_grad_()
    before, z_before = normal(F, G, K, V), normal(F, G, K, grad=False).abs().requires_grad_()
    complete, owner = torch.tensor([True, False, True]), torch.tensor([0, 0, 2])
    rows = (k, v, memory[:1], normalizer[:1], None, None, True)
    detached = [x.detach() for x in (k, v, before, z_before)]
    return {
        "fold rows": (fold_segments, rows),
        "fold sequences": (fold_segments, (k, v, memory, normalizer, complete, owner, True)),
        "fold linear": (fold_segments, (*rows[:-1], False)),
        "fold half": (fold_segments, (k.bfloat16(), v.bfloat16(), *rows[2:])),
        "fold backward": (
            fold_segments_backward,
            (
                *detached,
                normal(F, G, K, K, grad=False),
                complete,
                owner,
                True,
                *detached[2:],
                memory.detach(),
                normalizer.detach(),
            ),
        ),
        "read": (read_and_blend, (local, q, before, z_before, normal(H), False)),
        "read always": (read_and_blend, (local.bfloat16(), q.bfloat16(), before, z_before, normal(H), True)),
        "read backward": (
            read_and_blend_backward,
            (local.detach(), q.detach(), *detached[2:], torch.zeros(H), False, torch.ones(F, H, L, V)),
        ),
        "sinks over slots": (repeat_over_slots, (normal(N, G, 2, K), torch.tensor([0, 1, 1, 2]))),
        "sinks summed": (sum_over_slots, (normal(F, G, 2, K, grad=False).bfloat16(), torch.tensor([0, 1, 2]), N)),
        "spans": (checked_bounds, (torch.tensor([[0, 5], [2, 4]], dtype=torch.int32), False, 5, -1, 0)),
        "cu_seqlens": (checked_bounds, (torch.tensor([0, 2, 5], dtype=torch.int32), True, 5, -1, 0)),
    }


@pytest.mark.parametrize("name", operations())
def test_opcheck(name: str) -> None:
    operation, arguments = operations()[name]
    torch.library.opcheck(operation, arguments)


def kernel_operations(device: torch.device) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Samples of the kernels' operations. They are differentiated by functions around them, so no sample needs it.

    Where A is kept, every segment is whole: A of an unfinished one is never read nor written, and NaN equals nothing.
    """
    ops = torch.ops.segattn
    options = Options(4, "delta", True, 0, 0, "local", 0.25)

    def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    def inputs(gated: bool, dtype: torch.dtype = torch.float32, packed: bool = False, own: bool = True) -> Inputs:
        q, k, v = drawn(1, 2, 8, 16, dtype=dtype), drawn(1, 1, 8, 16, dtype=dtype), drawn(1, 1, 8, 24, dtype=dtype)
        bounds = torch.tensor([[0, 5], [5, 8]], device=device) if packed else None
        n = 2 if packed else 1
        if not gated:
            return Inputs(q, k, v, bounds=bounds)
        asked = (q.clone(), k.clone()) if own else (None, None)
        return Inputs(q, k, v, *asked, drawn(2), drawn(n, 1, 16, 24), drawn(n, 1, 16).abs(), bounds=bounds)

    def with_sinks(given: Inputs) -> Inputs:
        sink_k, sink_v = (drawn(2, 1, 3, x.shape[3], dtype=x.dtype) for x in (given.k, given.v))
        return given._replace(sink_k=sink_k, sink_v=sink_v, sink_seen=torch.tensor([False, True], device=device))

    def with_biases(given: Inputs) -> Inputs:
        return given._replace(sink_logits=drawn(2), slopes=drawn(2).abs())

    def backward(given: Inputs, chosen: Options = options) -> tuple[Any, ...]:
        out, memory, normalizer, *saved = ops.attend(given, *chosen, True)
        dout = drawn(*out.shape, dtype=out.dtype)
        if given.gate is None:
            return given, [out, *saved[1:]], *chosen, dout, []
        return given, saved, *chosen, dout, [memory, normalizer]

    major = inputs(True)
    major = Inputs(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in major[:5]), *major[5:])
    linear = options._replace(update="linear")
    q, k, v, memory_q, _, gate, memory, normalizer, *_ = inputs(True)
    half = [x.bfloat16() for x in (q, k, v)]
    beta = torch.rand(1, 1, 8, device=device)
    lengths, counters = (torch.full((1,), n, dtype=torch.int32, device=device) for n in (5, 0))
    state = memory, normalizer
    _, _, *written = ops.write(k, v, beta, *state, "delta", True, False)
    _, _, *plain = ops.write(half[1], half[2], None, *state, "linear", False, True)
    step = Inputs(q[:, :, :1], k, v, None, None, gate, *state)
    asked = step._replace(memory_q=memory_q[:, :, :1])
    local = Inputs(half[0][:, :, :2], *half[1:])
    window = options._replace(lookback=1)
    sinks = {"sink_k": k[:, :, :3], "sink_v": v[:, :, :3], "sink_seen": torch.ones(1, dtype=torch.bool, device=device)}
    gated, seen_by_all = options._replace(empty_memory="gated", softcap=1.5), options._replace(causal=False)
    return {
        "attend": (ops.attend, (inputs(True), *options, True)),
        "attend without a backward": (ops.attend, (inputs(True, own=False), *options, False)),
        "attend linear half": (ops.attend, (inputs(True, torch.bfloat16), *linear, True)),
        "attend packed": (ops.attend, (inputs(True, packed=True), *options, False)),
        "attend local": (ops.attend, (inputs(False), *options, True)),
        "attend window": (ops.attend, (with_sinks(inputs(True)), *window._replace(update="linear"), True)),
        "attend biased": (ops.attend, (with_biases(inputs(True)), *options, True)),
        "attend token major": (ops.attend, (major, *options, True)),
        "attend backward": (ops.attend_backward, backward(inputs(True))),
        "attend backward half": (ops.attend_backward, backward(inputs(True, torch.float16, own=False), linear)),
        "attend backward packed": (ops.attend_backward, backward(inputs(True, packed=True))),
        "attend backward local": (ops.attend_backward, backward(inputs(False))),
        "attend backward window": (ops.attend_backward, backward(with_sinks(inputs(True)), window)),
        "attend backward sinks half": (ops.attend_backward, backward(with_sinks(inputs(False, torch.float16)))),
        "attend backward biased": (ops.attend_backward, backward(with_biases(inputs(True, packed=True)))),
        "attend backward local biased": (ops.attend_backward, backward(with_biases(inputs(False, torch.bfloat16)))),
        "attend backward token major": (ops.attend_backward, backward(major)),
        "decode": (ops.decode, (step, *options, None, None)),
        "decode into counters": (ops.decode, (asked, *gated, lengths, counters)),
        "decode sinks": (ops.decode, (asked._replace(**sinks), *options, lengths, counters)),
        "decode biased": (ops.decode, (with_biases(asked), *options, lengths, counters)),
        "decode local half": (ops.decode, (local, *seen_by_all, lengths, None)),
        "read": (ops.read, (q, *state, True)),
        "read mapped half": (ops.read, (half[0], *state, False)),
        "read backward": (ops.read_backward, (q, *state, True, drawn(1, 2, 8, 24))),
        "write": (ops.write, (k, v, beta, *state, "delta", True, False)),
        "write half linear": (ops.write, (*half[1:], None, *state, "linear", False, True)),
        "write backward": (ops.write_backward, (k, v, beta, written, False, [*state])),
        "write backward half linear": (ops.write_backward, (*half[1:], None, plain, True, [*state])),
    }


def test_opcheck_of_the_kernels(device: torch.device, subtests: pytest.Subtests) -> None:
    for name, (operation, arguments) in kernel_operations(device).items():
        with subtests.test(name):
            torch.library.opcheck(operation, arguments)


@pytest.mark.parametrize(
    "name",
    [
        "rows",
        "linear",
        "prefill in pieces",
        "packed",
        "left padding",
        "local",
        "block mask",
        "decode",
        "window",
        "window, in pieces",
        "window, packed, past",
        "window, unequal past, decode",
        "alibi, sink logits",
        "alibi, packed",
    ],
)
def test_one_graph(name: str, device: torch.device) -> None:
    """fullgraph=True raises at a graph break; values and gradients stay those of the eager call."""
    call = KINDS[name]
    made = tensors(call, torch.float64, device)
    offsets = {
        key: None if value is None else torch.tensor(value, dtype=torch.int32, device=device)
        for key, value in (("cu_seqlens", call.cu_seqlens), ("spans", call.spans))
    }
    if isinstance(call.past, tuple):
        offsets["past"] = torch.tensor(call.past, device=device)

    def run(values: dict[str, torch.Tensor], offsets: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
        return apply(call, {key: x * 1 for key, x in values.items()}, **({"past": call.past} | offsets))

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    outputs, expected = compiled(made, offsets), run(made, offsets)
    assert worst(outputs, expected)[0] < 1e-12
    assert worst(gradients(outputs, made), gradients(expected, made))[0] < 1e-10


@pytest.mark.parametrize("windows", [{}, {"lookback": 1, "sinks": 3}])
def test_one_graph_for_many_lengths(windows: dict[str, int]) -> None:
    """Twenty lengths, whole segments and not: a graph or two, not one each."""
    graphs = 0

    def count(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        nonlocal graphs
        graphs += 1
        return module.forward

    torch._dynamo.reset()
    compiled = torch.compile(segment_attention, fullgraph=True, backend=count, dynamic=True)
    gate = torch.zeros(2)
    for time in range(41, 61):
        x = torch.randn(1, 2, time, 4)
        options = {"segment_len": 8, "gate": gate, **windows}
        assert error(compiled(x, x, x, **options).out, segment_attention(x, x, x, **options).out) < 1e-6
    assert graphs <= 3


@pytest.mark.parametrize("name", ["scale", "softcap"])
def test_numbers_may_be_symbols_of_a_graph(name: str) -> None:
    """dynamic=True makes symbols of a call's floats; what is not positive and finite is still refused."""
    torch._dynamo.reset()
    x, gate = torch.randn(1, 2, 11, 4), torch.zeros(2)

    def run(value: float) -> torch.Tensor:
        return segment_attention(x, x, x, segment_len=4, gate=gate, **{name: value}).out

    compiled = torch.compile(run, fullgraph=True, backend="eager", dynamic=True)
    for value in (0.3, 0.7):
        assert error(compiled(value), run(value)) < 1e-6
    for value in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"{name} must be positive and finite"):
            run(value)


def test_bad_values_are_refused_in_a_compiled_graph() -> None:
    torch._dynamo.reset()
    x = torch.ones(1, 1, 6, 4)
    compiled = torch.compile(segment_attention, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to T = 6"):
        compiled(x, x, x, segment_len=2, cu_seqlens=torch.tensor([0, 7], dtype=torch.int32))


def test_memory_functions_compile() -> None:
    torch._dynamo.reset()

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return memory_read(q, memory_write(k, v, memory_write(k, v), corrected=True))

    q, k, v = torch.randn(1, 4, 3, 6), torch.randn(1, 2, 3, 6), torch.randn(1, 2, 3, 5)
    assert error(torch.compile(run, fullgraph=True, backend="aot_eager")(q, k, v), run(q, k, v)) < 1e-6


def test_inference_reuses_no_input() -> None:
    """Without gradients the blend is in place: the caller's tensors stay as they were, the result the same."""
    call = Call(Tq=20, Tk=20)
    made = tensors(call, torch.float32)
    copies = {key: x.detach().clone() for key, x in made.items()}
    trained = apply(call, made)
    with torch.inference_mode():
        inferred = apply(call, made)
    for key, x in copies.items():
        assert torch.equal(made[key], x)
    for key, x in trained.items():
        assert torch.equal(inferred[key], x), key


def test_state_travels_through_a_compiled_loop() -> None:
    """Streaming under compilation: the state is an input and an output of the graph."""
    torch._dynamo.reset()
    gate = torch.zeros(2)

    def step(x: torch.Tensor, state: MemoryState) -> tuple[torch.Tensor, MemoryState]:
        return segment_attention(x, x, x, segment_len=4, gate=gate, state=state)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 2, 24, 4)
    state, outs = MemoryState.zeros(1, 2, 4, 4), []
    for piece in x.split(8, 2):
        out, state = compiled(piece, state)
        outs.append(out)
    whole = segment_attention(x, x, x, segment_len=4, gate=gate)
    assert error(torch.cat(outs, 2), whole.out) < 1e-6
    assert error(state.memory, whole.state.memory) < 1e-6


@pytest.mark.parametrize("time", [3, 20])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_state_of_inference_mode_is_trained_on_in_one_graph(backend: str, time: int, device: torch.device) -> None:
    gate = torch.zeros(2, device=device, requires_grad=True)
    x = torch.randn(1, 2, time, 16, device=device, requires_grad=True)
    with torch.inference_mode():
        _, state = segment_attention(*[torch.randn(1, 2, 8, 16, device=device)] * 3, segment_len=8, gate=gate)

    def step(x: torch.Tensor, gate: torch.Tensor, state: MemoryState) -> torch.Tensor:
        out, after = segment_attention(x, x, x, segment_len=8, gate=gate, state=state, backend=backend)
        later = memory_read(x, memory_write(x, x, state, backend=backend), backend=backend)
        return out.square().sum() + after.memory.square().sum() + later.square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    mine, expected = (torch.autograd.grad(call(x, gate, state), (x, gate)) for call in (compiled, step))
    for one, other in zip(mine, expected, strict=True):
        assert error(one, other) < 1e-6


def test_state_travels_through_copies_and_exported_programs() -> None:
    """A state is no tuple, and yet has what tuples have: parts, copies, pickles, and a place in a graph."""
    state = MemoryState(torch.randn(1, 2, 4, 4), torch.rand(1, 2, 4))
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    with torch.serialization.safe_globals([MemoryState]):
        loaded = torch.load(buffer, weights_only=True)
    for other in (copy.deepcopy(state), pickle.loads(pickle.dumps(state)), loaded, MemoryState(*state)):
        assert isinstance(other, MemoryState)
        assert torch.equal(other[0], state.memory)
        assert torch.equal(other[-1], state.normalizer)

    class Reader(torch.nn.Module):
        def forward(self, x: torch.Tensor, state: MemoryState) -> tuple[torch.Tensor, MemoryState]:
            return segment_attention(x, x, x, segment_len=4, gate=torch.zeros(2), state=state)

    x = torch.randn(1, 2, 8, 4)
    exported = torch.export.export(Reader(), (x, state)).module()
    (out, after), (wanted, expected) = exported(x, state), Reader()(x, state)
    assert error(out, wanted) < 1e-6
    assert error(after.memory, expected.memory) < 1e-6


def test_shapes_without_data() -> None:
    """Meta tensors: what initialisation of large models runs on."""
    q, gate = torch.empty(1, 2, 10, 4, device="meta"), torch.empty(2, device="meta")
    for windows in ({}, {"lookback": 1, "sinks": 2}):
        out, state = segment_attention(q, q, q, segment_len=4, gate=gate, **windows)
    assert out.shape == (1, 2, 10, 4)
    assert state.memory.shape == (1, 2, 4, 4)
    assert out.device.type == state.memory.device.type == "meta"


KERNEL_KINDS = (
    "exact segments",
    "linear",
    "prefill in pieces",
    "packed, last queries",
    "left padding",
    "local",
    "decode",
    "window",
    "alibi, sink logits",
)


@pytest.mark.parametrize("name", KERNEL_KINDS)
def test_the_kernels_in_one_graph(name: str, device: torch.device) -> None:
    """Forward and backward of backend="triton": no graph break, the same bits as the eager call."""
    call = replace(for_kernels(KINDS[name], 4), H=2, G=1)
    if call.spans is None and call.cu_seqlens is None:
        call = replace(call, Tq=min(call.Tq, 7), Tk=min(call.Tk, 10))
    made = tensors(call, torch.float32, device)
    offsets = {
        key: None if value is None else torch.tensor(value, dtype=torch.int32, device=device)
        for key, value in (("cu_seqlens", call.cu_seqlens), ("spans", call.spans))
    }

    def run(values: dict[str, torch.Tensor], offsets: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
        return apply(call, {key: x * 1 for key, x in values.items()}, "triton", **offsets)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    outputs, expected = compiled(made, offsets), run(made, offsets)
    found = outputs | gradients(outputs, made)
    for key, value in (expected | gradients(expected, made)).items():
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize(("training", "dynamic"), [(True, None), (False, True)])
def test_one_graph_of_the_kernels_for_many_lengths(training: bool, dynamic: bool | None, device: torch.device) -> None:
    """Twenty lengths, whole segments and not: a graph or two, not one each."""
    graphs = 0

    def count(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        nonlocal graphs
        graphs += 1
        return module.forward

    torch._dynamo.reset()
    compiled = torch.compile(segment_attention, fullgraph=True, backend=count, dynamic=dynamic)
    gate = torch.zeros(1, device=device)
    for time in range(41, 61):
        x = torch.randn(3, 1, 1, time, 16, device=device).requires_grad_(training).unbind()
        out = compiled(*x, segment_len=24, gate=gate, update="linear", backend="triton").out
        expected = segment_attention(*x, segment_len=24, gate=gate, update="linear", backend="torch").out
        assert error(out, expected) < 2e-6
    assert graphs <= 3


def test_the_kernels_compile_with_one_tensor_for_all(device: torch.device) -> None:
    """q, k and v the same tensor, whose gradient is the sum of theirs."""
    x = torch.randn(1, 1, 6, 16, device=device, requires_grad=True)

    def run(x: torch.Tensor) -> torch.Tensor:
        return segment_attention(x, x, x, segment_len=4, gate=torch.zeros(1, device=device), backend="triton").out

    torch._dynamo.reset()
    out, expected = torch.compile(run, fullgraph=True, backend="aot_eager")(x), run(x)
    assert torch.equal(out, expected)
    (found,), (wanted,) = (torch.autograd.grad(y.square().sum(), x) for y in (out, expected))
    assert error(found, wanted) < 1e-6


def test_states_of_the_kernels_carry_gradients(device: torch.device) -> None:
    """A loss on the second call alone trains the first one's keys and values, through the state between them."""
    x = torch.randn(1, 1, 10, 16, device=device)
    gate = torch.zeros(1, device=device)
    grads = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        first = x.to(dtype).detach().requires_grad_()
        _, state = segment_attention(first, first, first, segment_len=5, gate=gate.to(dtype), backend=backend)
        second = x.flip(2).to(dtype)
        out, _ = segment_attention(
            second, second, second, segment_len=5, gate=gate.to(dtype), state=state, backend=backend
        )
        grads.append(torch.autograd.grad(out.square().sum(), first)[0])
    assert grads[1].abs().amax(-1).min() > 0
    assert error(*grads) < 1e-5


def test_shapes_of_the_kernels_without_data() -> None:
    """As fake tensors, which is what a compiler and the initialisation of large models see: those of the real call."""
    call = Call(B=1, H=2, G=1, Tq=6, Tk=6, K=16, V=24, token_major=True)
    made = tensors(call, torch.float32)
    outputs = apply(call, made, "triton")
    real = outputs | gradients(outputs, made)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = {name: mode.from_tensor(x.detach()).requires_grad_() for name, x in made.items()}
        outputs = apply(call, fakes, "triton")
        found = torch.autograd.grad([x.sum() for x in outputs.values()], list(fakes.values()))
    fake = outputs | dict(zip((f"d{name}" for name in fakes), found, strict=True))
    assert fake.keys() == real.keys()
    for name, x in real.items():
        assert (fake[name].shape, fake[name].stride(), fake[name].dtype) == (x.shape, x.stride(), x.dtype), name
