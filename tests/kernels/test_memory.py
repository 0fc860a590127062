"""`memory_read` and `memory_write`: the memory on its own, with write strengths and the corrected normaliser."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from calls import GATES, error

from segattn import MemoryState, memory_read, memory_write, segment_attention

DOUBLE = torch.float64


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=DOUBLE)


@pytest.mark.parametrize("update", ["delta", "linear"])
def test_segments_written_and_read_are_the_operation(update: str) -> None:
    q, k, v = drawn(2, 4, 15, 6), drawn(2, 2, 15, 6), drawn(2, 2, 15, 5)
    gate = torch.full((4,), 40.0, dtype=DOUBLE)
    out, expected = segment_attention(q, k, v, segment_len=5, gate=gate, update=update)
    state, outs = None, []
    for s in range(3):
        part = slice(5 * s, 5 * s + 5)
        if state is not None:
            outs.append(memory_read(q[:, :, part], state))
        state = memory_write(k[:, :, part], v[:, :, part], state, update=update)
    assert error(torch.cat(outs, 2), out[:, :, 5:]) < 1e-12
    assert error(state.memory, expected.memory) < 1e-12
    assert error(state.normalizer, expected.normalizer) < 1e-12


def test_associative_rmt_token_by_token() -> None:
    """Arithmetic of arXiv 2407.04841, one token after another, all against the old memory."""
    k, v, beta = drawn(1, 1, 4, 6).abs(), drawn(1, 1, 4, 3), torch.rand(1, 1, 4, dtype=DOUBLE)
    old = memory_write(drawn(1, 1, 5, 6).abs(), drawn(1, 1, 5, 3), feature_map=None)
    new = memory_write(k, v, old, beta=beta, corrected=True, feature_map=None)
    memory, normalizer = old.memory[0, 0].clone(), old.normalizer[0, 0].clone()
    for t in range(4):
        key = k[0, 0, t]
        known = key @ old.normalizer[0, 0]
        returned = key @ old.memory[0, 0] / known
        gamma = min(max(1 - known.item() / (key @ key).item(), 0.0), 1.0)
        memory += beta[0, 0, t] * torch.outer(key, v[0, 0, t] - returned)
        normalizer += gamma * key
    assert error(new.memory[0, 0], memory) < 1e-12
    assert error(new.normalizer[0, 0], normalizer) < 1e-12


def test_a_pair_written_again() -> None:
    """The corrected normaliser returns the value in full each time; the plain one halves it from the second time on."""
    k, v = drawn(1, 1, 1, 6), drawn(1, 1, 1, 3)
    for corrected, expected in ((True, 1.0), (False, 0.5)):
        state = None
        for times in range(1, 5):
            state = memory_write(k, v, state, corrected=corrected)
            assert error(memory_read(k, state), v * (1.0 if times == 1 else expected)) < 1e-12


def test_a_rewrite_replaces_the_value() -> None:
    k, first, second = drawn(1, 1, 1, 6), drawn(1, 1, 1, 3), drawn(1, 1, 1, 3)
    state = memory_write(k, second, memory_write(k, first, corrected=True), corrected=True)
    assert error(memory_read(k, state), second) < 1e-12


@pytest.mark.parametrize("feature_map", ["elu1", None])
@pytest.mark.parametrize("update", ["delta", "linear"])
def test_gradcheck(feature_map: str | None, update: str) -> None:
    q, k, v, beta = drawn(1, 4, 3, 3), drawn(1, 2, 3, 3), drawn(1, 2, 3, 2), torch.rand(1, 2, 3, dtype=DOUBLE)
    if feature_map is None:
        q, k = q.abs() + 0.1, k.abs() + 0.1

    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
        state = memory_write(k, v, update=update, beta=beta, feature_map=feature_map)
        return memory_read(
            q,
            memory_write(k.flip(2), v, state, update=update, beta=beta, feature_map=feature_map),
            feature_map=feature_map,
        )

    assert torch.autograd.gradcheck(f, tuple(x.requires_grad_() for x in (q, k, v, beta)))


def test_gamma_carries_no_gradient() -> None:
    k = drawn(1, 1, 2, 4).abs().requires_grad_()
    old = memory_write(drawn(1, 1, 1, 4).abs(), drawn(1, 1, 1, 2), feature_map=None)
    new = memory_write(k, drawn(1, 1, 2, 2), old, corrected=True, feature_map=None)
    (gradient,) = torch.autograd.grad(new.normalizer.sum(), k)
    # ∂z/∂k is γ alone: the same number for every coordinate of a token
    assert torch.equal(gradient, gradient[..., :1].expand_as(gradient))


@pytest.mark.parametrize("feature_map", ["elu1", None])
def test_an_empty_memory_reads_zero(feature_map: str | None) -> None:
    q = torch.zeros(1, 2, 3, 4, requires_grad=True)
    out = memory_read(q, MemoryState.zeros(1, 1, 4, 5), feature_map=feature_map)
    out.sum().backward()
    assert not out.any()
    assert not q.grad.any()


def test_half_precision_keeps_a_float32_state() -> None:
    k, v = torch.randn(1, 2, 5, 4).bfloat16(), torch.randn(1, 2, 5, 3).bfloat16()
    state = memory_write(k, v)
    assert state.memory.dtype == state.normalizer.dtype == torch.float32
    assert error(state.memory, memory_write(k.double(), v.double()).memory) < 1e-6
    assert memory_read(k, state).dtype == torch.bfloat16


def test_autocast_leaves_the_state_in_full() -> None:
    k, v = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 3)
    expected = memory_write(k, v)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        state = memory_write(k, v)
        out = memory_read(k, state)
    assert torch.equal(state.memory, expected.memory)
    assert torch.equal(out, memory_read(k, expected))


def test_small_features_do_not_vanish() -> None:
    """σ(−60) is 1e-26 and its square no float32; the operation and the functions agree all the same."""
    k, v = torch.randn(1, 1, 8, 4) - 60, torch.randn(1, 1, 8, 4)
    gate = torch.full((1,), 40.0)
    read = memory_read(k[:, :, 4:], memory_write(k[:, :, :4], v[:, :, :4]))
    for backend in ("torch", "reference"):
        out = segment_attention(k, k, v, segment_len=4, gate=gate, backend=backend).out
        assert error(out[:, :, 4:], read) < 1e-5


KERNEL_CALLS = {
    "delta": {},
    "linear": {"update": "linear"},
    "strengths": {"beta": True},
    "linear strengths": {"beta": True, "update": "linear"},
    "corrected": {"corrected": True},
    "corrected strengths": {"beta": True, "corrected": True},
    "mapped": {"feature_map": None, "beta": True},
    "mapped, linear": {"feature_map": None, "update": "linear"},
    "mapped, corrected": {"feature_map": None, "beta": True, "corrected": True},
    "linear, corrected": {"update": "linear", "corrected": True},
}


def by(backend: str, options: dict[str, Any], dtype: torch.dtype, with_state: bool) -> dict[str, torch.Tensor]:
    """What is read after two writes, the state, and every gradient."""
    generator = torch.Generator().manual_seed(7)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    computed = DOUBLE if backend == "reference" else dtype

    def tokens(*shape: int, of: torch.dtype = dtype, positive: bool = False) -> torch.Tensor:
        x = torch.randn(shape, generator=generator, dtype=DOUBLE)
        x = (x.abs() + 0.05 if positive else x).to(of).to(device)
        return x.to(torch.promote_types(computed, of)).requires_grad_()

    mapped = options.get("feature_map", "elu1") is None
    leaves = {
        "q": tokens(1, 2, 33, 16, positive=mapped),
        "k": tokens(1, 1, 33, 16, positive=mapped),
        "v": tokens(1, 1, 33, 24),
        "beta": tokens(1, 1, 33, of=torch.float32, positive=True),
        "memory": tokens(1, 1, 16, 24, of=torch.float32),
        "normalizer": tokens(1, 1, 16, of=torch.float32, positive=True),
    }
    options = options | {"backend": backend, "beta": leaves["beta"] if options.get("beta") else None}
    state = MemoryState(leaves["memory"], leaves["normalizer"]) if with_state else None
    state = memory_write(leaves["k"], leaves["v"], state, **options)
    feature_map = {"feature_map": None} if mapped else {}
    out = memory_read(leaves["q"], state, backend=backend, **feature_map)
    results = {"out": out, "memory": state.memory, "normalizer": state.normalizer}
    loss = sum(
        (x.double() * torch.arange(x.numel(), device=device).view(x.shape).sin()).sum() for x in results.values()
    )
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    grads = {f"d{name}": g for name, g in zip(leaves, found, strict=True) if g is not None}
    return results | grads


@pytest.mark.parametrize(
    ("with_state", "dtype"),
    [(True, torch.float32), (False, torch.float32), (True, torch.float16), (False, torch.bfloat16)],
    ids=["state", "empty", "state, float16", "empty, bfloat16"],
)
@pytest.mark.parametrize("name", KERNEL_CALLS)
def test_the_kernels_equal_the_equations(name: str, with_state: bool, dtype: torch.dtype) -> None:
    """Written, then read, forward and backward, twice to the same bits."""
    values = by("triton", KERNEL_CALLS[name], dtype, with_state)
    expected = by("reference", KERNEL_CALLS[name], dtype, with_state)
    assert values.keys() >= expected.keys()
    forward, _, backward = GATES[dtype]
    for key, value in expected.items():
        assert error(values[key], value) < (forward if not key.startswith("d") else backward), key
    assert values["out"].dtype == dtype
    if dtype == torch.float32:
        again = by("triton", KERNEL_CALLS[name], dtype, with_state)
        for key, value in values.items():
            assert torch.equal(again[key], value), key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("feature_map", ["elu1", None])
def test_the_normalizers_gradient_survives_keys_that_are_alike(feature_map: str | None, dtype: torch.dtype) -> None:
    """The gradient sums (σ C σᵀ / (σ z)²) σ over keys; here what they have in common cancels in it."""
    device, heads, K, V = "cuda" if torch.cuda.is_available() else "cpu", 3, 64, 64
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=DOUBLE).to(device)

    def keys(time: int) -> torch.Tensor:
        x = 0.3 * normal(1, heads, time, K)
        return (x.exp() if feature_map is None else x).to(dtype).double()

    k, v = keys(37), normal(1, heads, 37, V).to(dtype).double()
    before = memory_write(keys(16), normal(1, heads, 16, V), feature_map=feature_map)
    before = MemoryState(*(x.float().double() for x in before))

    def gradient(backend: str, tokens: torch.dtype, of_state: torch.dtype, dmemory: torch.Tensor) -> torch.Tensor:
        state = MemoryState(*(x.to(of_state).requires_grad_() for x in before))
        after = memory_write(k.to(tokens), v.to(tokens), state, feature_map=feature_map, backend=backend)
        return torch.autograd.grad(
            after.memory, state.normalizer, dmemory.to(of_state), create_graph=dmemory.requires_grad
        )[0]

    dmemory = normal(1, heads, K, V).requires_grad_()
    along = (gradient("reference", DOUBLE, DOUBLE, dmemory) * before.normalizer).sum()
    (common,) = torch.autograd.grad(along, dmemory)
    share = (dmemory * common).sum((2, 3), keepdim=True) / common.square().sum((2, 3), keepdim=True)
    dmemory = (dmemory - share * common).detach()
    mine = gradient("triton", dtype, torch.float32, dmemory)
    expected = gradient("reference", DOUBLE, DOUBLE, dmemory)
    for head in range(heads):
        assert error(mine[0, head], expected[0, head]) < GATES[dtype].through_delta


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_normalizers_gradient_survives_segments_of_keys_that_are_alike(dtype: torch.dtype) -> None:
    """Segments longer than what the memory holds: the gradient of M, and with it z's, comes through their products."""
    device, heads, K, V, L = "cuda" if torch.cuda.is_available() else "cpu", 2, 64, 64, 64
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=DOUBLE).to(device)

    k, v = (0.3 * normal(1, heads, 2 * L, K)).to(dtype).double(), normal(1, heads, 2 * L, V).to(dtype).double()
    before = memory_write(0.3 * normal(1, heads, 4, K), normal(1, heads, 4, V))
    before = MemoryState(*(x.float().double() for x in before))
    dmemory = normal(1, heads, K, V)
    gradients = []
    for backend, tokens, of_state in (("triton", dtype, torch.float32), ("reference", DOUBLE, DOUBLE)):
        state = MemoryState(*(x.to(of_state).requires_grad_() for x in before))
        x, y, gate = k.to(tokens), v.to(tokens), torch.zeros(heads, device=device, dtype=of_state)
        after = segment_attention(x, x, y, segment_len=L, gate=gate, state=state, backend=backend).state
        gradients.append(torch.autograd.grad(after.memory, state.normalizer, dmemory.to(of_state))[0])
    for head in range(heads):
        assert error(gradients[0][0, head], gradients[1][0, head]) < GATES[dtype].through_delta


def test_the_kernels_read_and_write_strided_tensors() -> None:
    """Token-major inputs, an expanded gradient, several rows and grouped heads."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v = (torch.randn(2, 9, n, 16, device=device).transpose(1, 2) for n in (4, 2, 2))
    results = []
    for change, backend in (
        (lambda x: x, "triton"),
        (torch.Tensor.contiguous, "triton"),
        (torch.Tensor.double, "torch"),
    ):
        leaves = [change(x).detach().requires_grad_() for x in (q, k, v)]
        out = memory_read(leaves[0], memory_write(*leaves[1:], backend=backend), backend=backend)
        direction = torch.tensor(0.5, dtype=out.dtype, device=device).expand_as(out)
        results.append((out, *torch.autograd.grad(out, leaves, direction)))
    for strided, plain, exact in zip(*results, strict=True):
        assert torch.equal(strided, plain)
        assert error(strided, exact) < 1e-5


@pytest.mark.parametrize("feature_map", ["elu1", None])
def test_the_kernels_read_zero_from_an_empty_memory(feature_map: str | None) -> None:
    q = torch.zeros(1, 2, 3, 16, device="cuda" if torch.cuda.is_available() else "cpu", requires_grad=True)
    out = memory_read(q, MemoryState.zeros(1, 1, 16, 24, device=q.device), feature_map=feature_map, backend="triton")
    out.sum().backward()
    assert not out.any()
    assert not q.grad.any()


def test_the_kernels_write_nothing_into_a_copy() -> None:
    """No tokens, no rows: the state as it came, and a read of nothing."""
    state = MemoryState(torch.randn(1, 2, 16, 24), torch.rand(1, 2, 16))
    none = torch.ones(1, 2, 0, 16)
    after = memory_write(none, torch.ones(1, 2, 0, 24), state, backend="triton")
    assert torch.equal(after.memory, state.memory)
    assert torch.equal(after.normalizer, state.normalizer)
    assert memory_read(none, state, backend="triton").shape == (1, 2, 0, 24)


def test_the_kernels_refuse_a_second_derivative() -> None:
    k = torch.randn(1, 1, 3, 16, device="cuda" if torch.cuda.is_available() else "cpu", requires_grad=True)
    state = memory_write(k, k, backend="triton")
    (first,) = torch.autograd.grad(state.memory.square().sum(), k, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|second derivative"):
        first.square().sum().backward()


BAD = {
    "feature_map must be 'elu1' or None": lambda k, v, s: memory_write(k, v, feature_map="relu"),
    "k must have 4 dimensions": lambda k, v, s: memory_write(k[0], v),
    r"v must have shape \[B, G, T, V\]": lambda k, v, s: memory_write(k, v[:, :, :2]),
    "update must be one of": lambda k, v, s: memory_write(k, v, update="both"),
    r"beta must have shape \[B, G, T\] = \[1, 2, 3\]": lambda k, v, s: memory_write(k, v, beta=torch.ones(1, 2)),
    r"state.memory must have shape \[B, G, K, V\] = \[1, 2, 4, 5\]": lambda k, v, s: memory_write(
        k, v, MemoryState.zeros(2, 2, 4, 5)
    ),
    "state.normalizer must have shape": lambda k, v, s: memory_read(k, MemoryState(s.memory, s.normalizer[..., :3])),
    "state.memory must have shape": lambda k, v, s: memory_read(k[..., :3], s),
    "H % G == 0, got H = 3, G = 2": lambda k, v, s: memory_read(torch.ones(1, 3, 3, 4), s),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BAD[message](torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 5), MemoryState.zeros(1, 2, 4, 5))


def test_a_state_must_be_a_state() -> None:
    with pytest.raises(TypeError, match="state must be a MemoryState"):
        memory_read(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 4, 5))
