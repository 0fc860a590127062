"""What must hold of the operation whatever the backend: causality, pieces, rows, groups, extremes."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from calls import KINDS, Call, apply, error, everything, for_kernels, gradients, random_calls, tensors, worst
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from segattn import MemoryState, memory_read, memory_write, segment_attention, segment_decode

BACKENDS = ("torch", "reference")
UPDATES = ("delta", "linear")
# what gives the same numbers by another way: to the last digits of float64, or by the kernels bit for bit
EQUAL = {"torch": (torch.float64, 1e-12), "triton": (torch.float32, 0.0)}

# tensors that rows and sequences share
OF_HEADS = ("gate", "sink_logits")


def fitted(call: Call, backend: str) -> Call:
    """Return the call in widths that the backend takes; the kernels, which may be interpreted, get fewer heads."""
    return replace(for_kernels(call), H=2, G=1) if backend == "triton" else call


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize(("segment_len", "windows"), [(1, {}), (5, {}), (64, {}), (5, {"lookback": 1, "sinks": 3})])
def test_dependency_matrix(
    backend: str, update: str, segment_len: int, windows: dict[str, int], device: torch.device
) -> None:
    """Every token reaches every later output, through its segment or the memory, and no earlier one: bit for bit."""
    call = Call(B=1, H=2, G=1, Tq=23, Tk=23, segment_len=segment_len, update=update, **windows)
    made = tensors(call, torch.float64, device)
    out = apply(call, made, backend)["out"]
    reached = torch.zeros(call.Tk, call.Tk, dtype=torch.bool)
    for j in range(call.Tk):
        moved = {name: x.detach().clone() for name, x in made.items()}
        for name in ("q", "k", "v", "memory_q", "memory_k"):
            moved[name][:, :, j] += 0.5
        reached[:, j] = (apply(call, moved, backend)["out"] != out).any(-1).all(1)[0].cpu()
        assert torch.equal(apply(call, moved, backend)["out"][:, :, :j], out[:, :, :j])
    assert torch.equal(reached, torch.ones_like(reached).tril())


@settings(max_examples=100)
@given(st.data())
def test_pieces_equal_the_whole(data: st.DataObject) -> None:
    """Cuts anywhere: the caller keeps the unfinished segment, the window and the sinks, the operation the rest."""
    call = Call(
        B=2, Tq=29, Tk=29, segment_len=data.draw(st.integers(1, 12)), update=data.draw(st.sampled_from(UPDATES))
    )
    sinks = data.draw(st.integers(0, call.segment_len))
    call = replace(call, lookback=data.draw(st.integers(0, 1)), sinks=sinks)
    call = replace(call, sink_logits=data.draw(st.booleans()), alibi=data.draw(st.booleans()))
    cuts = sorted(data.draw(st.sets(st.integers(1, 28), max_size=6)))
    made = tensors(call, torch.float64)
    whole = apply(call, made)
    state = MemoryState(made["memory"], made["normalizer"])
    held, outs = 0, []
    for first, last in zip([0, *cuts], [*cuts, 29], strict=True):
        passed = {f"sink_{x}": made[x][:, :, :sinks] for x in ("k", "v") if held and sinks}
        out, state = segment_attention(
            made["q"][:, :, first:last],
            made["k"][:, :, held:last],
            made["v"][:, :, held:last],
            memory_q=made["memory_q"][:, :, first:last],
            memory_k=made["memory_k"][:, :, held:last],
            gate=made["gate"],
            segment_len=call.segment_len,
            update=call.update,
            state=state,
            lookback=call.lookback,
            sinks=sinks,
            past=held,
            sink_logits=made.get("sink_logits"),
            alibi_slopes=call.slopes(made["q"]),
            **passed,
        )
        held += max((last - held) // call.segment_len - call.lookback, 0) * call.segment_len
        outs.append(out)
    pieces = {"out": torch.cat(outs, 2), "memory": state.memory, "normalizer": state.normalizer}
    assert worst(pieces, whole)[0] < 1e-12
    assert worst(gradients(pieces, made), gradients(whole, made))[0] < 1e-10


@pytest.mark.parametrize("backend", EQUAL)
@pytest.mark.parametrize(
    "name",
    [
        "rows", "left padding", "right padding", "padding, last queries", "padding, bidirectional", "local",
        "window", "sinks of each segment", "window, padding, past", "window, unequal past, decode",
        "sink logits", "alibi", "alibi, sink logits, window, padding",
    ],
)  # fmt: skip
def test_a_row_equals_that_row_alone(name: str, backend: str, device: torch.device) -> None:
    dtype, limit = EQUAL[backend]
    call = replace(fitted(KINDS[name], backend), B=2)
    made = tensors(call, dtype, device)
    together = apply(call, made, backend)
    for b in range(2):
        alone = replace(call, B=1, spans=None if call.spans is None else call.spans[b : b + 1], past=call.pasts[b])
        one = apply(alone, {key: x if key in OF_HEADS else x[b : b + 1] for key, x in made.items()}, backend)
        assert worst(one, {key: x[b : b + 1] for key, x in together.items()})[0] <= limit


@settings(max_examples=60)
@given(random_calls(), st.integers(0, 5), st.integers(0, 5))
def test_padded_equals_unpadded(call: Call, left: int, right: int) -> None:
    """Padding of any values, NaN too, changes nothing, gives 0, and gets no gradient."""
    past = call.past[:1] if isinstance(call.past, tuple) else call.past
    call = replace(call, B=1, Tq=call.Tk, spans=None, cu_seqlens=None, num_read=0, num_write=0, past=past)
    made = tensors(call, torch.float64)
    bare = apply(call, made)
    tokens = ("q", "k", "v", "memory_q", "memory_k")
    padded = {
        name: F.pad(x.detach(), (0, 0, left, right), value=float("nan")).requires_grad_() if name in tokens else x
        for name, x in made.items()
    }
    segments, more = (-(-time // call.segment_len) for time in (call.Tk, left + call.Tk + right))
    if call.own_sinks == "segment":
        for name in ("sink_k", "sink_v"):
            # of segments that the row does not have
            spare = (0, 0, 0, 0, 0, more - segments)
            padded[name] = F.pad(made[name].detach(), spare, value=float("nan")).requires_grad_()
    spanned = apply(replace(call, spans=((left, left + call.Tk),)), padded)
    grads = gradients(spanned | {"out": spanned["out"][:, :, left : left + call.Tk]}, padded)
    if call.own_sinks == "segment":
        for name in ("dsink_k", "dsink_v"):
            grads[name], after = grads[name].split([segments, more - segments], 2)
            assert not after.any()
    for name in tokens:
        if f"d{name}" in grads:
            before, inside, after = grads[f"d{name}"].split([left, call.Tk, right], 2)
            assert not before.any()
            assert not after.any()
            grads[f"d{name}"] = inside
    assert worst(grads, gradients(bare, made))[0] < 1e-10
    outside = spanned["out"].clone()
    outside[:, :, left : left + call.Tk] = 0
    assert not outside.any()
    spanned["out"] = spanned["out"][:, :, left : left + call.Tk]
    assert worst(spanned, bare)[0] < 1e-12


@pytest.mark.parametrize("backend", EQUAL)
@pytest.mark.parametrize(
    "name", ["packed", "window, packed", "window, packed, past", "sink logits, softcap, packed", "alibi, packed"]
)
def test_packed_equals_each_sequence_alone(name: str, backend: str, device: torch.device) -> None:
    """Empty sequences among them: theirs is the state they came with."""
    dtype, limit = EQUAL[backend]
    call = fitted(KINDS[name], backend)
    made = tensors(call, dtype, device)
    packed = apply(call, made, backend)
    for n, (begin, end) in enumerate(pairwise(call.cu_seqlens)):
        alone = replace(call, cu_seqlens=None, Tq=end - begin, Tk=end - begin, past=call.pasts[n])
        of_sequences = ("memory", "normalizer", "sink_k", "sink_v")
        mine = {
            key: x if key in OF_HEADS else x[n : n + 1] if key in of_sequences else x[:, :, begin:end]
            for key, x in made.items()
        }
        if call.own_sinks == "segment":
            mine |= {key: mine[key][:, :, : -(-alone.Tk // call.segment_len)] for key in ("sink_k", "sink_v")}
        one = apply(alone, mine, backend)
        expected = {"out": packed["out"][:, :, begin:end], "memory": packed["memory"][n : n + 1]}
        assert worst({key: one[key] for key in expected}, expected)[0] <= limit
        if begin == end:
            assert torch.equal(one["memory"], mine["memory"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name",
    [
        "rows", "packed", "left padding", "local", "prefill in pieces", "window", "window, packed, past", "lookback",
        "sink logits", "alibi", "alibi, window, packed, past",
    ],
)  # fmt: skip
def test_grouped_heads_equal_expanded_heads(name: str, backend: str) -> None:
    """Head h reads key/value head h // (H / G): [0, 0, 1, 1], not [0, 1, 0, 1]."""
    grouped = replace(KINDS[name], H=6, G=2)
    made = tensors(grouped, torch.float64)
    shared = ("k", "v", "memory_k", "memory", "normalizer", "sink_k", "sink_v")
    expanded = {key: x.repeat_interleave(3, 1) if key in shared else x for key, x in made.items()}
    few, many = apply(grouped, made, backend), apply(replace(grouped, G=6), expanded, backend)
    assert error(few["out"], many["out"]) < 1e-12
    for key in few.keys() - {"out"}:
        assert error(few[key].repeat_interleave(3, 1), many[key]) < 1e-12


@pytest.mark.parametrize("update", UPDATES)
def test_gradient_reaches_earlier_segments(update: str) -> None:
    """dL(segment s) / dk, dv(segment r) is alive for every r < s, and the memory's write is trained."""
    call = Call(B=1, H=2, G=2, Tq=15, Tk=15, segment_len=5, update=update, with_state=False)
    made = tensors(call, torch.float64)
    out = apply(call, made)["out"]
    for s in (1, 2):
        grads = torch.autograd.grad(
            out[:, :, 5 * s : 5 * s + 5].square().sum(), [made["memory_k"], made["v"]], retain_graph=True
        )
        for r in range(s):
            assert all((g[:, :, 5 * r : 5 * r + 5].abs().amax(-1) > 0).all() for g in grads)
        assert not any(g[:, :, 5 * (s + 1) :].any() for g in grads)


@pytest.mark.parametrize("backend", EQUAL)
@pytest.mark.parametrize("update", UPDATES)
def test_checkpointing_changes_nothing(update: str, backend: str, device: torch.device) -> None:
    call = fitted(Call(update=update), backend)
    made = tensors(call, EQUAL[backend][0], device)

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        return tuple(apply(call, dict(zip(made, values, strict=True)), backend).values())

    plain = dict(zip(("out", "memory", "normalizer"), run(*made.values()), strict=True))
    replayed = dict(zip(plain, checkpoint(run, *made.values(), use_reentrant=False), strict=True))
    expected = gradients(plain, made)
    for name, value in gradients(replayed, made).items():
        assert torch.equal(value, expected[name]), name


def test_two_training_steps_in_a_row() -> None:
    """The carried state is the caller's: a second backward has its own graph, and the state is not written to."""
    call = Call(Tq=20, Tk=20)
    made = tensors(call, torch.float64)
    before = made["memory"].detach().clone()
    first = apply(call, made)
    first["out"].sum().backward()
    carried = {**made, "memory": first["memory"].detach(), "normalizer": first["normalizer"].detach()}
    second = apply(call, carried)
    second["out"].sum().backward()
    assert torch.equal(made["memory"], before)
    assert not torch.equal(first["out"], second["out"])


def test_gate_at_its_start_has_a_gradient() -> None:
    call = Call(with_state=False)
    made = tensors(call, torch.float32)
    made["gate"] = torch.zeros(call.H, requires_grad=True)
    (gradient,) = torch.autograd.grad(apply(call, made)["out"].square().sum(), made["gate"])
    assert (gradient.abs() > 1e-3).all()


def test_up_to_one_segment_the_gate_changes_nothing() -> None:
    """To the bit, and the gate stays in the graph with a gradient of zero."""
    call = Call(Tq=5, Tk=5, with_state=False)
    made = tensors(call, torch.float32)
    local = segment_attention(made["q"], made["k"], made["v"], segment_len=5).out
    out = apply(call, made)["out"]
    assert torch.equal(out, local)
    (gradient,) = torch.autograd.grad(out.sum(), made["gate"])
    assert not gradient.any()
    assert not torch.equal(apply(call, made, empty_memory="gated")["out"], local)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gate_leaves_no_state(backend: str) -> None:
    call = KINDS["local"]
    made = tensors(call, torch.float32)
    assert segment_attention(**made, segment_len=5, backend=backend).state is None


@pytest.mark.parametrize("gate", [-100.0, 100.0])
def test_saturated_gates_are_pure(gate: float) -> None:
    call = Call(with_state=True)
    made = tensors(call, torch.float64)
    made["gate"] = torch.full((call.H,), gate, dtype=torch.float64, requires_grad=True)
    outputs = apply(call, made)
    local = segment_attention(made["q"], made["k"], made["v"], segment_len=call.segment_len).out
    if gate < 0:
        assert error(outputs["out"], local) < 1e-12
    else:
        moved = {**made, "q": made["q"] + 1}
        assert error(apply(call, moved)["out"], outputs["out"]) < 1e-12
    assert all(x.isfinite().all() for x in gradients(outputs, made).values())


@settings(max_examples=150)
@given(random_calls(), st.lists(st.sampled_from([0.0, 1e-3, 1.0, 100.0, 1e4]), min_size=5, max_size=5))
def test_finite_inputs_never_give_nan(call: Call, sizes: list[float]) -> None:
    made = tensors(call, torch.float32)
    scaled = dict(zip(("q", "k", "v", "memory_q", "memory_k"), sizes, strict=True))
    made = {name: (x.detach() * scaled.get(name, 1.0)).requires_grad_() for name, x in made.items()}
    outputs = apply(call, made)
    assert all(x.isfinite().all() for x in outputs.values())
    assert all(x.isfinite().all() for x in gradients(outputs, made).values())


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize(
    ("backend", "q_level", "k_level"),
    [
        *product(["torch"], [-100.0, 0.0, 100.0], [-100.0, -60.0, 0.0, 100.0]),
        *(("triton", *levels) for levels in ((-100.0, 0.0), (0.0, -100.0), (100.0, 100.0), (0.0, -60.0))),
    ],
)
def test_features_at_the_extremes(
    backend: str, q_level: float, k_level: float, update: str, device: torch.device
) -> None:
    """σ at ±100 is finite forward and backward in float32, and right wherever float32 can hold it."""
    call = fitted(Call(B=1, H=2, G=1, Tq=12, Tk=12, segment_len=3, update=update, with_state=False), backend)
    made = tensors(call, torch.float32, device)
    for name, level in (("memory_q", q_level), ("memory_k", k_level)):
        made[name] = (made[name].detach() + level).requires_grad_()
    outputs = apply(call, made, backend)
    grads = gradients(outputs, made)
    assert all(x.isfinite().all() for x in (outputs | grads).values())
    if q_level > -100 and k_level > -100:
        expected = apply(call, {name: x.detach().double() for name, x in made.items()}, "reference")
        assert error(outputs["out"], expected["out"]) < 1e-5


def test_small_features_keep_their_digits() -> None:
    """σ(−30) = e⁻³⁰, where ELU(−30) + 1 is 0 in float32."""
    call = Call(B=1, H=1, G=1, Tq=2, Tk=2, K=4, V=4, segment_len=1, with_state=False)
    made = tensors(call, torch.float32)
    made["memory_k"] = torch.full((1, 1, 2, 4), -30.0, requires_grad=True)
    normalizer = apply(call, made)["normalizer"]
    assert error(normalizer, 2 * torch.full((1, 1, 4), -30.0, dtype=torch.float64).exp()) < 1e-6


@pytest.mark.parametrize("update", UPDATES)
def test_a_million_tokens_in_float32(update: str) -> None:
    call = Call(
        B=1,
        H=1,
        G=1,
        Tq=1,
        Tk=2**20,
        K=4,
        V=4,
        segment_len=1024,
        update=update,
        with_state=False,
        own_memory_inputs=False,
    )
    made = {name: x.detach() for name, x in tensors(call, torch.float32).items()}
    found = apply(call, made)
    expected = apply(call, {name: x.double() for name, x in made.items()})
    assert found["normalizer"].min() > 2**20
    assert worst(found, expected)[0] < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_short_first_segment_then_long_ones(backend: str) -> None:
    """A state carried by hand after 2 tokens, then segments of 64: A's largest eigenvalue is near 32, the step
    overshoots, and both backends still give what the rule says."""
    generator = torch.Generator().manual_seed(3)
    k, v = (torch.randn(1, 1, 130, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    gate = torch.zeros(1, dtype=torch.float64)
    _, state = segment_attention(k[:, :, :2], k[:, :, :2], v[:, :, :2], segment_len=2, gate=gate, backend=backend)
    _, after = segment_attention(
        k[:, :, 2:], k[:, :, 2:], v[:, :, 2:], segment_len=64, gate=gate, state=state, backend=backend
    )
    memory, normalizer = torch.zeros(4, 4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    sizes = []
    for first, last in ((0, 2), (2, 66), (66, 130)):
        features = torch.where(k[0, 0] > 0, k[0, 0] + 1, k[0, 0].exp())[first:last]
        weight = features @ normalizer
        recalled = torch.zeros_like(v[0, 0, first:last]) if first == 0 else features @ memory / weight[:, None]
        memory = memory + features.T @ (v[0, 0, first:last] - recalled)
        if first:
            a = features.T @ (features / weight[:, None])
            # A z is the segment's key sum, and its largest eigenvalue is tokens / tokens before
            assert error(a @ normalizer, features.sum(0)) < 1e-12
            sizes.append(torch.linalg.eigvals(a).abs().max().item())
        normalizer = normalizer + features.sum(0)
    assert sizes[0] > 20
    assert sizes[1] < 1.5
    assert error(after.memory[0, 0], memory) < 1e-11
    assert error(after.normalizer[0, 0], normalizer) < 1e-12


@pytest.mark.parametrize("name", KINDS)
def test_twice_the_same_bits(name: str, device: torch.device) -> None:
    """In PyTorch's default mode, not only in its deterministic one."""
    torch.use_deterministic_algorithms(False)
    first, second = (everything(KINDS[name], "torch", torch.float32, device) for _ in range(2))
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("backend", ["triton", *BACKENDS])
def test_empty_calls(backend: str, with_state: bool, device: torch.device) -> None:
    """No rows, no tokens, no sequences: empty outputs, the state as it came or zeros, and gradients of zero."""
    gate = torch.zeros(2, device=device)
    for B, T, cu_seqlens in ((0, 5, None), (3, 0, None), (1, 0, (0, 0, 0)), (1, 0, (0,))):
        x = torch.ones(B, 2, T, 16, device=device, requires_grad=True)
        n = B if cu_seqlens is None else len(cu_seqlens) - 1
        start = (torch.ones if with_state else torch.zeros)(n, 2, 16, 17, device=device)
        state = MemoryState(start[..., :16].contiguous(), start[..., 16].contiguous())
        offsets = None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32, device=device)
        given_state = state if with_state else None
        out, after = segment_attention(
            x, x, x, segment_len=4, gate=gate, state=given_state, cu_seqlens=offsets, backend=backend
        )
        assert out.shape == x.shape
        assert torch.equal(after.memory, state.memory)
        assert torch.equal(after.normalizer, state.normalizer)
        if after.memory.requires_grad or out.requires_grad:
            (out.sum() + after.memory.sum()).backward()
        assert x.grad is None or not x.grad.any()


@pytest.mark.parametrize("backend", EQUAL)
def test_half_the_dtype_of_the_gate(backend: str, device: torch.device) -> None:
    """A gate in half precision is read as it is, its gradient returned in its dtype."""
    call = fitted(Call(own_memory_inputs=False), backend)
    made = tensors(call, torch.float32, device)
    made["gate"] = made["gate"].detach().bfloat16().requires_grad_()
    exact = made | {"gate": made["gate"].detach().float().requires_grad_()}
    outputs, expected = apply(call, made, backend), apply(call, exact, backend)
    assert torch.equal(outputs["out"], expected["out"])
    found, wanted = gradients(outputs, made)["dgate"], gradients(expected, exact)["dgate"]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, wanted.bfloat16())


@pytest.mark.parametrize("windows", [{}, {"lookback": 1, "sinks": 2, "own_sinks": "sequence", "past": 5}], ids=str)
@pytest.mark.parametrize("backend", EQUAL)
def test_autocast_computes_in_its_dtype_and_keeps_the_state(
    backend: str, windows: dict[str, Any], device: torch.device
) -> None:
    call = fitted(Call(Tq=20, Tk=20, own_memory_inputs=False, **windows), backend)
    made = tensors(call, torch.float32, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        outputs = apply(call, made, backend)
        found = outputs | gradients(outputs, made)
    tokens = ("q", "k", "v", "sink_k", "sink_v")
    low = {key: x.detach().bfloat16().requires_grad_() if key in tokens else x for key, x in made.items()}
    expected = apply(call, low, backend)
    assert outputs["out"].dtype == torch.bfloat16
    assert outputs["memory"].dtype == torch.float32
    for key, value in (expected | gradients(expected, low)).items():
        assert torch.equal(found[key], value.to(found[key].dtype)), key


@pytest.mark.parametrize("backend", EQUAL)
@pytest.mark.parametrize("name", ["rows", "local"])
def test_a_second_derivative_is_refused(name: str, backend: str, device: torch.device) -> None:
    call = replace(fitted(KINDS[name], backend), B=1, Tq=6, Tk=6)
    made = tensors(call, EQUAL[backend][0], device)
    out = apply(call, made, backend)["out"]
    (first,) = torch.autograd.grad(out.square().sum(), made["memory_k" if call.gated else "k"], create_graph=True)
    ours = call.gated or backend == "triton"
    with pytest.raises(RuntimeError, match=r"once_differentiable|second derivative" if ours else "derivative for aten"):
        first.square().sum().backward()


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("name", ["q", "gate", "memory"])
def test_forward_mode_is_refused_and_of_the_reference_alone(name: str, softcap: float | None) -> None:
    """Registered operations drop tangents in silence."""
    q, k, v = (torch.randn(1, 2, 8, 4, dtype=torch.float64) for _ in range(3))
    made = {"q": q, "gate": torch.zeros(2, dtype=torch.float64), "memory": torch.rand(1, 2, 4, 4, dtype=torch.float64)}

    def change(x: Tensor, backend: str) -> Tensor:
        def run(x: Tensor) -> Tensor:
            given = made | {name: x}
            state = MemoryState(given["memory"], torch.ones(1, 2, 4, dtype=torch.float64))
            options = {"segment_len": 3, "softcap": softcap, "backend": backend}
            return segment_attention(given["q"], k, v, gate=given["gate"], state=state, **options).out

        return torch.func.jvp(run, (x,), (torch.ones_like(x),))[1]

    assert change(made[name], "reference").any()
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        change(made[name], "torch")
    state = MemoryState(made["memory"], torch.ones(1, 2, 4, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: segment_decode(x, k, v, gate=made["gate"], state=state, softcap=softcap), (q,), (q,))


@pytest.mark.parametrize("name", ["rows", "packed", "left padding", "exact segments", "window", "window, padding"])
def test_strides_and_gradients_as_they_come(name: str) -> None:
    """Slices, expanded and transposed tensors, and an expanded gradient, give what contiguous copies give."""
    call = replace(KINDS[name], H=2, G=2, K=4, V=4, own_memory_inputs=False)
    made = {key: x.detach() for key, x in tensors(call, torch.float64).items()}
    wide = {key: torch.cat([x, x], -1)[..., ::2] if key in ("q", "v") else x for key, x in made.items()}
    wide["k"] = made["k"][:, :, :, :1].expand(-1, -1, -1, 4)
    leaves = {key: x.requires_grad_() for key, x in wide.items()}
    copies = {key: x.detach().contiguous().requires_grad_() for key, x in wide.items()}
    for values in (leaves, copies):
        out = apply(call, values)["out"]
        out.backward(torch.ones((), dtype=torch.float64).expand_as(out))
    for key, x in leaves.items():
        if copies[key].grad is not None:
            assert error(x.grad, copies[key].grad) < 1e-12, key


def of_inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.detach().clone()


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *product(
            ["rows", "one segment", "decode", "packed", "left padding", "softcap", "shared inputs", "window"],
            ["triton", *BACKENDS],
        ),
        *product(["window, packed, past", "sinks of each segment"], BACKENDS),
    ],
)
def test_tensors_of_inference_mode_stand_beside_trained_ones(name: str, backend: str, device: torch.device) -> None:
    """Each input alone from inference mode, the others trained: results and gradients are those of plain tensors."""
    call = replace(for_kernels(KINDS[name], 4), H=2, G=1)
    made = tensors(call, torch.float32, device)
    offsets = {
        key: None if value is None else of_inference(torch.tensor(value, dtype=torch.int32, device=device))
        for key, value in (("cu_seqlens", call.cu_seqlens), ("spans", call.spans))
    }
    for few in ({"memory", "normalizer"}, *({key} for key in made), made.keys() - {"q"}, made.keys() - {"gate"}):
        plain = {key: x.detach() if key in few else x for key, x in made.items()}
        mixed = {key: of_inference(x) if key in few else x for key, x in made.items()}
        trained = {key: x for key, x in made.items() if key not in few}
        expected, outputs = apply(call, plain, backend), apply(call, mixed, backend, **offsets)
        expected |= gradients(expected, trained)
        for key, value in (outputs | gradients(outputs, trained)).items():
            assert torch.equal(value, expected[key]), (few, key)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_the_memory_alone_takes_tensors_of_inference_mode(backend: str, device: torch.device) -> None:
    q, k, v = (torch.randn(1, 2, 3, 16, device=device) for _ in range(3))
    beta = torch.rand(1, 2, 3, device=device)
    state = memory_write(k, v)
    read, written = ((q, *state), (k, v, beta, *state))

    def run(which: str, values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if which == "read":
            return (memory_read(values[0], MemoryState(*values[1:]), backend=backend),)
        return memory_write(*values[:2], MemoryState(*values[3:]), beta=values[2], corrected=True, backend=backend)

    for which, values in (("read", read), ("written", written)):
        for i, x in enumerate(values):
            grads = []
            for others in (values, [of_inference(y) for y in values]):
                one = x.detach().clone().requires_grad_()
                outputs = run(which, (*others[:i], one, *others[i + 1 :]))
                grads.append(torch.autograd.grad(sum(y.square().sum() for y in outputs), one)[0])
            assert torch.equal(*grads)


@pytest.mark.parametrize("backend", ["triton", *BACKENDS])
@pytest.mark.parametrize("update", UPDATES)
def test_a_memory_that_holds_next_to_nothing_for_a_query(update: str, backend: str, device: torch.device) -> None:
    """The memory counts as empty where σ z is so small beside σ that σ / σ z, or the gradient of z, would overflow."""
    call = Call(B=1, H=1, G=1, Tq=3, Tk=3, K=16, V=16, segment_len=1, update=update, with_state=False)
    call = replace(call, own_memory_inputs=False)
    half = torch.tensor([1.0] * 8 + [0.0] * 8)
    for levels in (
        ((100.0, -86.0), (-86.0, 100.0), (-86.0, 100.0)),
        ((-45.0, -86.0), (-60.0, -60.0), (-86.0, 14.0)),
        ((-83.0, -41.0), (100.0, -150.0), (40.0, -86.0)),
    ):
        made = tensors(call, torch.float32, device)
        rows = torch.stack([first * half + second * (1 - half) for first, second in levels]).to(device)
        for name in ("q", "k"):
            made[name] = (rows[None, None] + 0.1 * made[name].detach()).requires_grad_()
        outputs = apply(call, made, backend)
        assert all(x.isfinite().all() for x in (outputs | gradients(outputs, made)).values())
