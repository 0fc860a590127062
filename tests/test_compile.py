"""The operation inside PyTorch: opcheck, one compiled graph, autocast, and no second derivative."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from calls import KINDS, Call, apply, error, gradients, tensors, worst

from segattn import MemoryState, memory_read, memory_write, segment_attention
from segattn.kernels.sequences import checked_bounds
from segattn.kernels.torch_memory import fold_segments, fold_segments_backward, read_and_blend, read_and_blend_backward

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
            (*detached, complete, owner, True, *detached[2:], memory.detach(), normalizer.detach()),
        ),
        "read": (read_and_blend, (local, q, before, z_before, normal(H), False)),
        "read always": (read_and_blend, (local.bfloat16(), q.bfloat16(), before, z_before, normal(H), True)),
        "read backward": (
            read_and_blend_backward,
            (local.detach(), q.detach(), *detached[2:], torch.zeros(H), False, torch.ones(F, H, L, V)),
        ),
        "spans": (checked_bounds, (torch.tensor([[0, 5], [2, 4]], dtype=torch.int32), False, 5, -1, 0)),
        "cu_seqlens": (checked_bounds, (torch.tensor([0, 2, 5], dtype=torch.int32), True, 5, -1, 0)),
    }


@pytest.mark.parametrize("name", operations())
def test_opcheck(name: str) -> None:
    operation, arguments = operations()[name]
    torch.library.opcheck(operation, arguments)


@pytest.mark.parametrize(
    "name", ["rows", "linear", "prefill in pieces", "packed", "left padding", "local", "block mask", "decode"]
)
def test_one_graph(name: str, device: torch.device) -> None:
    """fullgraph=True raises at a graph break; values and gradients stay those of the eager call."""
    call = KINDS[name]
    made = tensors(call, torch.float64, device)
    offsets = {
        key: None if value is None else torch.tensor(value, dtype=torch.int32, device=device)
        for key, value in (("cu_seqlens", call.cu_seqlens), ("spans", call.spans))
    }

    def run(values: dict[str, torch.Tensor], offsets: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
        return apply(call, {key: x * 1 for key, x in values.items()}, **offsets)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    outputs, expected = compiled(made, offsets), run(made, offsets)
    assert worst(outputs, expected)[0] < 1e-12
    assert worst(gradients(outputs, made), gradients(expected, made))[0] < 1e-10


def test_one_graph_for_many_lengths() -> None:
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
        assert (
            error(
                compiled(x, x, x, segment_len=8, gate=gate).out,
                segment_attention(x, x, x, segment_len=8, gate=gate).out,
            )
            < 1e-6
        )
    assert graphs <= 3


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


def test_autocast_computes_in_its_dtype_and_keeps_the_state(device: torch.device) -> None:
    call = Call(Tq=20, Tk=20, own_memory_inputs=False)
    made = tensors(call, torch.float32, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        outputs = apply(call, made)
        grads = gradients(outputs, made)
    low = {key: x.detach().bfloat16().requires_grad_() if key in "qkv" else x for key, x in made.items()}
    expected = apply(call, low)
    assert outputs["out"].dtype == torch.bfloat16
    assert outputs["memory"].dtype == torch.float32
    for key, value in (expected | gradients(expected, low)).items():
        assert torch.equal((outputs | grads)[key], value.to((outputs | grads)[key].dtype)), key


@pytest.mark.parametrize("name", ["rows", "local"])
def test_a_second_derivative_is_refused(name: str) -> None:
    call = KINDS[name]
    made = tensors(call, torch.float64)
    out = apply(call, made)["out"]
    (first,) = torch.autograd.grad(out.square().sum(), made["memory_k" if call.gated else "k"], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative" if call.gated else "derivative for aten"):
        first.square().sum().backward()


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


def test_shapes_without_data() -> None:
    """Meta tensors: what initialisation of large models runs on."""
    q, gate = torch.empty(1, 2, 10, 4, device="meta"), torch.empty(2, device="meta")
    out, state = segment_attention(q, q, q, segment_len=4, gate=gate)
    assert out.shape == (1, 2, 10, 4)
    assert state.memory.shape == (1, 2, 4, 4)
    assert out.device.type == state.memory.device.type == "meta"
