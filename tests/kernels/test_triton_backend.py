"""`backend="triton"` equals the reference, on a GPU or interpreted: outputs and every gradient, whatever the call.

Interpreted tiles are 16 x 16, so that calls of a few dozen tokens have several; a program takes about 7 ms.
"""

from __future__ import annotations

import mmap
import re
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton.language as tl
from calls import (
    GATES,
    KINDS,
    Call,
    apply,
    check_gates,
    error,
    everything,
    for_kernels,
    golden,
    gradients,
    random_calls,
    tensors,
    worst,
)
from hypothesis import given, settings

from segattn import MemoryState, memory_read, memory_write, segment_attention
from segattn.kernels import backends
from segattn.kernels.state import Options
from segattn.kernels.triton.attention import NOT_SAVED
from segattn.kernels.triton.configs import TABLE, TARGETS, Tile, tile_for
from segattn.kernels.triton.launch import Launch, dense_rows, recording, trying, warn_of_compiler
from segattn.kernels.triton.ops import Inputs, attention_backward, attention_forward

WHOLE = ("rows", "packed")
TOKENS = ("q", "k", "v", "memory_q", "memory_k")
SINKS = ("sink_k", "sink_v")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def small(name: str) -> Call:
    """The kind's call, whole or cut down to a few segments, so that the interpreter runs it in a second or two."""
    return for_kernels(KINDS[name], None if name in WHOLE else 4)


@pytest.mark.parametrize("name", KINDS)
def test_equals_the_reference(name: str, device: torch.device) -> None:
    call = small(name)
    check_gates(
        call, everything(call, "triton", torch.float32, device), golden(call, torch.float32, device), torch.float32
    )


@settings(max_examples=5)
@given(random_calls())
def test_equals_the_reference_on_random_calls(call: Call) -> None:
    call = for_kernels(call, 4)
    worst_error, where = worst(everything(call, "triton", torch.float32, DEVICE), golden(call, torch.float32, DEVICE))
    # a gradient of few terms that cancel may lose a digit
    assert worst_error < 1e-4, where


WIDE = {
    "rows": Call(B=1, H=2, G=1, Tq=70, Tk=70, K=32, V=32, segment_len=32),
    "linear": Call(B=1, H=2, G=1, Tq=70, Tk=70, K=32, V=48, segment_len=32, update="linear"),
    "no state": Call(B=1, H=2, G=1, Tq=70, Tk=70, K=48, V=24, segment_len=20, with_state=False),
    "shared inputs": Call(B=1, H=2, G=1, Tq=70, Tk=70, K=32, V=32, segment_len=32, own_memory_inputs=False),
    "pieces": Call(B=1, H=2, G=1, Tq=40, Tk=90, K=32, V=32, segment_len=32),
    "packed": Call(B=1, H=2, G=1, Tq=90, Tk=90, K=32, V=32, segment_len=32, cu_seqlens=(0, 32, 33, 90)),
    "local": Call(B=1, Tq=90, Tk=90, K=32, V=32, segment_len=40, gated=False),
    "alibi": Call(B=1, H=2, G=1, Tq=70, Tk=70, K=32, V=32, segment_len=32, alibi=True, sink_logits=True),
    "window": Call(B=1, H=2, G=1, Tq=90, Tk=90, K=32, V=32, segment_len=24, lookback=1, sinks=4),
}


# an interpreted tile of 32 x 32 takes little longer than the table's 16 x 16
LARGE = Tile(32, 32, 32, 32, 32, "ieee")


def larger_tiles(chosen: Tile = LARGE) -> AbstractContextManager[None]:
    """Of every kernel where they are interpreted; a GPU keeps the table's."""
    return nullcontext() if torch.cuda.is_available() else trying(dict.fromkeys(TABLE, chosen))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float16) for name in WIDE if name != "pieces"]
    + [(name, torch.bfloat16) for name in ("rows", "packed", "pieces", "local", "window", "alibi")],
)
def test_half_precision(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Within the gates, and close to the torch backend in the same dtype: 1.5 times its error, gradients 2 times.

    Of the memory's inputs and states only the gates are asked, as the torch backend computes the memory in float32.
    """
    call = WIDE[name]
    with larger_tiles():
        values = everything(call, "triton", dtype, device)
    expected = golden(call, dtype, device)
    check_gates(call, values, expected, dtype)
    other = everything(call, "torch", dtype, device)
    for key, most in (("out", 1.5), ("dq", 2.0), ("dk", 2.0), ("dv", 2.0)):
        assert error(values[key], expected[key]) <= most * error(other[key], expected[key]), key


TILES = {
    "long queries": Tile(32, 16, 16, 16, 32, "ieee"),
    "long keys": Tile(16, 32, 32, 32, 16, "ieee"),
    "longest queries": Tile(64, 32, 32, 32, 32, "ieee"),
    "longest keys": Tile(32, 64, 16, 32, 16, "ieee"),
}


SIDES = replace(WIDE["rows"], H=2, G=1, segment_len=40, K=48)
OTHER = {"causal": False, "update": "linear", "Tq": 33}


@pytest.mark.parametrize(
    ("tile", "call"),
    [
        ("long queries", SIDES),
        ("long keys", replace(SIDES, **OTHER)),
        ("longest queries", WIDE["packed"]),
        ("longest keys", SIDES),
        ("longest keys", replace(KINDS["block mask"], Tq=50, Tk=50, K=16, V=40)),
        # more sinks than a tile of keys holds, and than its rows are divided by
        ("long queries", replace(WIDE["window"], Tq=33, Tk=75, segment_len=21, sinks=19)),
        ("longest keys", replace(WIDE["packed"], lookback=1, sinks=17, causal=False)),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_every_tile_gives_the_same(tile: str, call: Call, device: torch.device) -> None:
    """Blocks of unequal sides, smaller than a segment and larger, with widths that they do not divide."""
    if call.num_read:
        call = replace(call, segment_len=50, num_read=20, num_write=7)
    chosen = TILES[tile]
    with trying(dict.fromkeys(TABLE, chosen)):
        values = everything(call, "triton", torch.float32, device)
    check_gates(call, values, golden(call, torch.float32, device), torch.float32)


SMALL = Call(B=1, H=2, G=1, Tq=3, Tk=3, segment_len=2)


@pytest.mark.parametrize(
    "call",
    [
        *(replace(SMALL, K=K, V=V) for K, V in ((24, 40), (80, 24), (40, 80), (256, 16), (16, 256), (136, 24))),
        replace(SMALL, K=16, V=16, Tq=1, Tk=1),
        replace(SMALL, K=16, V=16, Tq=1, Tk=1, segment_len=1, with_state=False),
        replace(SMALL, K=16, V=16, scale=1.0),
        replace(SMALL, K=32, V=32, Tq=33, Tk=33, segment_len=17, scale=1.0),
        replace(SMALL, K=16, V=16, Tq=32, Tk=32, segment_len=16, gated=False, scale=1.0),
    ],
    ids=lambda c: f"K{c.K} V{c.V} T{c.Tk} scale {c.scale}",
)
def test_widths_lengths_and_scales_of_one(call: Call, device: torch.device) -> None:
    # wide heads are hundreds of the smallest tiles
    with larger_tiles(Tile(16, 16, 64, 64, 64, "ieee")) if max(call.K, call.V) > 80 else nullcontext():
        values = everything(call, "triton", torch.float32, device)
    check_gates(call, values, golden(call, torch.float32, device), torch.float32)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("exact segments", torch.float32),
        ("linear", torch.bfloat16),
        ("packed, last queries", torch.bfloat16),
        ("right padding", torch.float16),
        ("block mask", torch.float32),
        ("window, packed", torch.bfloat16),
    ],
)
def test_twice_the_same_bits(name: str, dtype: torch.dtype, device: torch.device) -> None:
    first, second = (everything(small(name), "triton", dtype, device) for _ in range(2))
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


@pytest.mark.parametrize("options", [{}, {"update": "linear"}, {"lookback": 1, "sinks": 3}], ids=str)
def test_padding_does_not_leak(options: dict[str, Any], device: torch.device) -> None:
    """NaN in the padding of the inputs, of the gradient coming in too: everything else as the row without it."""
    call = Call(B=1, H=2, G=1, Tq=20, Tk=20, K=16, V=24, segment_len=8, **options)
    made = tensors(call, torch.float32, device)
    bare = apply(call, made, "triton")
    expected = gradients(bare, made)
    left, right = 5, 2
    padded = {
        name: torch.nn.functional.pad(x.detach(), (0, 0, left, right), value=float("nan")).requires_grad_()
        if name in TOKENS
        else x.detach().requires_grad_()
        for name, x in made.items()
    }
    spanned = apply(replace(call, spans=((left, left + 20),)), padded, "triton")
    assert not spanned["out"][:, :, :left].any()
    assert not spanned["out"][:, :, left + 20 :].any()
    inside = spanned | {"out": spanned["out"][:, :, left : left + 20]}
    for name, value in inside.items():
        assert error(value, bare[name]) < 1e-6, name
    for name, value in gradients(inside, padded).items():
        if name[1:] in TOKENS:
            before, value, after = value.split([left, 20, right], 2)
            assert not before.any(), name
            assert not after.any(), name
        assert error(value, expected[name]) < 1e-6, name


STRIDES: dict[str, Any] = {
    "token major": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "sliced": lambda x: torch.nn.functional.pad(x, (8, 8, 3, 2, 1, 1, 1, 0))[..., 1:, 1:-1, 3:-2, 8:-8],
    "last dimension strided": lambda x: x.mT.contiguous().mT,
    "every second": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}


def with_gradients(call: Call, device: torch.device, change: Any) -> dict[str, torch.Tensor]:
    """Results and gradients with inputs, and the gradient of the output, changed."""
    made = {key: x.detach() for key, x in tensors(call, torch.float32, device).items()}
    direction = torch.ones(call.B, call.H, call.Tq, call.V, device=device).cumsum(-1).div(8).sin()
    leaves = {key: (change(x) if key in (*TOKENS, *SINKS) else x).requires_grad_() for key, x in made.items()}
    outputs = apply(call, leaves, "triton")
    wanted = list(outputs.values())
    found = torch.autograd.grad(wanted, list(leaves.values()), [change(direction), *wanted[1:]])
    return outputs | dict(zip((f"d{key}" for key in leaves), found, strict=True))


@cache
def contiguous(call: Call, device: torch.device) -> dict[str, torch.Tensor]:
    return with_gradients(call, device, torch.clone)


@pytest.mark.parametrize("options", [{}, {"gated": False}, {"sinks": 3, "own_sinks": "segment"}], ids=str)
@pytest.mark.parametrize("name", STRIDES)
def test_strides_as_they_come(name: str, options: dict[str, Any], device: torch.device) -> None:
    """Of the inputs and of the incoming gradient: bit for bit what contiguous copies give."""
    call = Call(B=2, H=2, G=1, Tq=6, Tk=6, K=16, V=24, segment_len=4, **options)
    strided = with_gradients(call, device, lambda x: STRIDES[name](x.clone()).detach())
    for key, value in contiguous(call, device).items():
        assert torch.equal(strided[key], value), key


def test_expanded_inputs_and_gradients(device: torch.device) -> None:
    """Keys and values of one head seen as many, a gradient of one number seen as all."""
    call = Call(B=1, H=2, G=2, Tq=6, Tk=6, K=16, V=16, segment_len=4, with_state=False)
    made = tensors(replace(call, G=1), torch.float32, device)
    number = torch.tensor(0.75, device=device)
    results = []
    for copy in (False, True):
        leaves = {key: x.detach().requires_grad_() for key, x in made.items()}
        shared = {key: leaves[key].expand(-1, 2, -1, -1) for key in ("k", "v", "memory_k")}
        out = apply(call, leaves | ({key: x.clone() for key, x in shared.items()} if copy else shared), "triton")["out"]
        direction = number.expand_as(out).clone() if copy else number.expand_as(out)
        results.append((out, *torch.autograd.grad(out, list(leaves.values()), direction)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def far(x: torch.Tensor, *strides: int) -> torch.Tensor:
    """x at places so far apart that 32 bits do not count them; only the pages in use take memory."""
    span = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, strides, strict=True))
    assert span > 2**31
    if x.is_cuda:
        held = torch.zeros(span, dtype=x.dtype, device=x.device)
    else:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        held = torch.frombuffer(mmap.mmap(-1, span * x.element_size(), flags=flags), dtype=x.dtype)
    return held.as_strided(x.shape, strides).copy_(x)


@pytest.mark.parametrize("apart", ["rows", "heads", "tokens"])
def test_offsets_beyond_32_bits(apart: str, device: torch.device) -> None:
    """Each stride fits 32 bits, an index times it does not."""
    by_row = apart == "rows"
    call = Call(B=3 if by_row else 1, H=1 if by_row else 3, G=1 if by_row else 3, Tq=1, Tk=1, K=16, V=16, segment_len=1)
    strides = (2**30 + 64, 64, 32, 1) if by_row else (64, 2**30 + 64, 32, 1)
    if apart == "tokens":
        # the last segment's keys alone are looked at, so that a long row stays cheap
        call = Call(B=1, H=1, G=1, Tq=2, Tk=1040, K=16, V=16, segment_len=1024, gated=False)
        strides = (16, 16, 2**21 + 64, 1)
    made = tensors(call, torch.float16, device)
    moved = [name for name in made if name in TOKENS and not (apart == "tokens" and name == "q")]
    spread = {k: far(x.detach(), *strides).requires_grad_() if k in moved else x for k, x in made.items()}
    if apart == "tokens":
        assert torch.equal(apply(call, spread, "triton")["out"], apply(call, made, "triton")["out"])
        return
    outputs, expected = apply(call, spread, "triton"), apply(call, made, "triton")
    direction = torch.randn(expected["out"].shape, device=device).half()
    found = torch.autograd.grad(outputs["out"], list(spread.values()), far(direction, *strides), allow_unused=True)
    wanted = torch.autograd.grad(expected["out"], list(made.values()), direction, allow_unused=True)
    for name in outputs:
        assert torch.equal(outputs[name], expected[name]), name
    for name, a, b in zip(made, found, wanted, strict=True):
        assert torch.equal(a, b), name


def test_rows_too_far_apart_for_a_tile_are_copied() -> None:
    """A tile's own offsets have 32 bits: 128 rows of it may be 2^22 elements apart, no more."""
    near = torch.empty(1, 1, 128, 16, device="meta").as_strided((1, 1, 128, 16), (16, 16, 2**22 - 1, 1))
    assert dense_rows(near) is near
    assert dense_rows(near.as_strided((1, 1, 128, 16), (16, 16, 2**22, 1))).is_contiguous()
    values = torch.arange(6.0).view(1, 1, 3, 2).mT
    assert torch.equal(dense_rows(values), values)
    assert dense_rows(values).stride(-1) == 1


def launched(call: Call, dtype: torch.dtype = torch.float16) -> list[Launch]:
    """Return what a forward and backward of a call without data would launch on a GPU."""
    made = {name: x.detach().to("meta") for name, x in tensors(replace(call, B=1, Tq=1, Tk=1), dtype).items()}

    def tokens(heads: int, time: int, width: int) -> torch.Tensor:
        return torch.empty(call.B, heads, time, width, dtype=dtype, device="meta")

    q, k, v = tokens(call.H, call.Tq, call.K), tokens(call.G, call.Tk, call.K), tokens(call.G, call.Tk, call.V)
    bounds = None if call.cu_seqlens is None else torch.empty(call.sequences, 2, dtype=torch.int64, device="meta")
    memory = torch.empty(call.sequences, call.G, call.K, call.V, device="meta")
    state = (made["gate"], memory, memory[..., 0])
    options = Options(call.segment_len, call.update, call.causal, 0, 0, "local", 0.25, lookback=call.lookback)
    inputs = Inputs(q, k, v, q, k, *state, bounds=bounds)
    if call.sinks:
        slots = call.B * -(-call.Tk // call.segment_len)
        sink_k, sink_v = (k.new_empty(slots, call.G, call.sinks, width) for width in (call.K, call.V))
        inputs = inputs._replace(sink_k=sink_k, sink_v=sink_v, sink_seen=sink_k.new_empty(slots, dtype=torch.bool))
    with recording(TARGETS["sm_90"]) as found:
        out, m, z, *saved = attention_forward(inputs, *options, True)
        attention_backward(inputs, saved, *options, out, [m, z])
    return found


@pytest.mark.parametrize(
    "call",
    [
        Call(B=70000, H=2, G=1, Tq=16, Tk=16, K=16, V=16, segment_len=8),
        Call(B=1, H=64, G=64, Tq=9000, Tk=9000, K=16, V=16, segment_len=8, cu_seqlens=tuple(range(0, 9001, 8))),
        Call(B=70000, H=2, G=1, Tq=16, Tk=16, K=16, V=16, segment_len=8, lookback=1, sinks=2),
    ],
    ids=["rows", "packed", "window"],
)
def test_sequences_times_heads_beyond_65535(call: Call) -> None:
    """A grid's second and third dimension end there: every launch has one, of that many programs."""
    launches = launched(call)
    by_kernel = {x.kernel.__name__: x.programs for x in launches}
    assert len(by_kernel) >= 9
    assert all(65535 < n < 2**31 for n in by_kernel.values()), by_kernel


def test_a_launch_has_a_grid_of_one_dimension(monkeypatch: pytest.MonkeyPatch) -> None:
    """`programs` becomes a grid of one dimension when a kernel runs."""
    from segattn.kernels.triton import attention, launch

    grids: list[Any] = []

    class Kernel:
        __name__ = "attend_kernel"
        arg_names: tuple[str, ...] = ()

        def __getitem__(self, grid: Any) -> Any:
            grids.append(grid)
            return lambda **_: None

    launch.launch(Kernel(), 70000, next(iter(TILES.values())), torch.empty(1))
    assert grids == [(70000,)]
    assert attention.launch is launch.launch


@pytest.mark.parametrize("kernel", ["attend_kernel", "query_grad_kernel", "key_grad_kernel"])
def test_one_ragged_width_is_not_pipelined(kernel: str) -> None:
    """A copy into shared memory beside a tile that passes through registers would not be fenced, says `ci/emulate`."""

    def stages(target: str, key_width: int, value_width: int) -> int:
        return tile_for(kernel, TARGETS[target], torch.bfloat16, key_width, value_width).num_stages

    for target in ("sm_90", "sm_100"):
        assert stages(target, 24, 64) == stages(target, 200, 256) == stages(target, 128, 72) == 1
        assert (
            min(stages(target, 64, 64), stages(target, 128, 64), stages(target, 24, 40), stages(target, 256, 256)) > 1
        )
    assert stages("sm_80", 24, 64) > 1


@pytest.mark.parametrize("window", [{}, {"lookback": 1, "sinks": 4}], ids=str)
@pytest.mark.parametrize("time", [5, 64, 65, 1000])
def test_compiled_variants_do_not_depend_on_lengths(time: int, window: dict[str, int]) -> None:
    """Constants of a launch, by name, and those in tuples: sizes of tokens are none of them."""

    def compiled_in(name: str, value: Any) -> Any:
        if isinstance(value, tuple):
            return [compiled_in(name, x) for x in value]
        return value.value if isinstance(value, tl.constexpr) else value if name.isupper() else None

    def constants(call: Call) -> list[tuple[str, Any]]:
        return [
            (x.kernel.__name__, {name: compiled_in(name, value) for name, value in x.arguments.items()})
            for x in launched(call)
        ]

    assert constants(Call(Tq=time, Tk=time, K=64, V=64, segment_len=64, **window)) == constants(
        Call(Tq=300, Tk=300, K=64, V=64, segment_len=64, **window)
    )


@pytest.mark.parametrize("name", ["exact segments", "packed, last queries", "local", "decode"])
def test_without_gradients_nothing_is_kept(name: str, device: torch.device) -> None:
    """The same output, bit for bit where the same kernel gives it, and no statistics written for a backward."""
    call = small(name)
    made = tensors(call, torch.float32, device)
    trained = apply(call, made, "triton")
    with torch.no_grad():
        inferred = apply(call, made, "triton")
        with recording(TARGETS["sm_90"]) as launches:
            apply(call, made, "triton")
    for key, value in trained.items():
        assert error(inferred[key], value) < 2e-6 if name == "decode" else torch.equal(inferred[key], value), key
    for x in launches:
        assert x.arguments.get("saved") in (None, NOT_SAVED)
        assert x.arguments.get("residual") is None
    kernels = {x.kernel.__name__ for x in launches}
    assert ("decode_kernel" if name == "decode" else "attend_kernel") in kernels
    if name in ("local", "decode"):
        assert len(launches) == 1


@pytest.mark.parametrize("options", [{"causal": False}, {"Tq": 3}, {"gated": False, "softcap": 1.5}], ids=str)
def test_a_window_is_decoded_in_one_launch(options: dict[str, Any], device: torch.device) -> None:
    """The previous segment whole, the unfinished one, and the sinks of the row: those of its last segment."""
    call = Call(B=2, Tq=1, Tk=33, K=16, V=24, segment_len=20, lookback=1, sinks=3, own_sinks="segment", past=20)
    call = replace(call, **options)
    made = tensors(call, torch.float32, device)
    exact = {key: x.detach().double() for key, x in made.items()}
    with torch.no_grad():
        values, expected = apply(call, made, "triton"), apply(call, exact, "reference")
        with recording(TARGETS["sm_90"]) as launches:
            apply(call, made, "triton")
    assert [x.kernel.__name__ for x in launches] == ["decode_kernel"]
    for key, x in expected.items():
        assert error(values[key], x) < 2e-6, key


@pytest.mark.parametrize("names", [("q",), ("v",), ("gate",), ("memory", "memory_k"), ("normalizer", "memory_q")])
def test_gradients_of_some_inputs_alone(names: tuple[str, ...], device: torch.device) -> None:
    call = replace(small("exact segments"), Tq=10, Tk=10)
    made = tensors(call, torch.float32, device)
    expected = gradients(apply(call, made, "triton"), made)
    alone = {key: x.detach().requires_grad_(key in names) for key, x in made.items()}
    outputs = apply(call, alone, "triton")
    found = gradients(outputs, {key: alone[key] for key in names})
    for key, value in found.items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("output", ["out", "memory", "normalizer"])
def test_gradients_of_some_outputs_alone(output: str, device: torch.device) -> None:
    """Those that no loss looks at send back nothing."""
    call = replace(small("exact segments"), Tq=10, Tk=10)
    made = tensors(call, torch.float32, device)
    exact = {key: x.detach().double().requires_grad_() for key, x in made.items()}
    found, expected = (
        torch.autograd.grad(apply(call, x, backend)[output].square().sum(), list(x.values()), allow_unused=True)
        for x, backend in ((made, "triton"), (exact, "reference"))
    )
    for name, a, b in zip(made, found, expected, strict=True):
        if b is None:
            assert a is None or not a.any(), name
        else:
            assert error(a, b) < 1e-5, name


def test_nothing_of_tokens_by_segment_is_saved() -> None:
    """Autograd keeps of a long call tensors of tokens, their statistics, and the states."""
    call = Call(B=1, H=2, G=1, Tq=4096, Tk=4096, K=16, V=16, segment_len=1024, with_state=False)
    made = tensors(call, torch.float32)
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), recording(TARGETS["sm_90"]):
        out = apply(call, made, "triton")["out"]
    assert out.requires_grad
    tokens = sum(made[name].nbytes for name in TOKENS)
    local, lse2 = out.nbytes, 4 * call.H * call.Tq
    states = 4 * call.Tk // call.segment_len * call.G * (2 * call.K * call.K + call.K + 1)
    assert sum(kept.values()) <= tokens + local + lse2 + states + made["gate"].nbytes
    assert tokens + local + lse2 + states < 4 * call.H * call.Tq * call.segment_len / 10


def test_grouped_heads_equal_expanded_heads(device: torch.device) -> None:
    """Head h reads key/value head h // (H / G): [0, 0, 1, 1], not [0, 1, 0, 1]."""
    grouped = Call(B=1, H=4, G=2, Tq=7, Tk=7, K=16, V=16, segment_len=5)
    made = tensors(grouped, torch.float32, device)
    shared = ("k", "v", "memory_k", "memory", "normalizer")
    many = {
        key: (x.detach().repeat_interleave(2, 1) if key in shared else x.detach()).requires_grad_()
        for key, x in made.items()
    }
    few_out, many_out = apply(grouped, made, "triton"), apply(replace(grouped, G=4), many, "triton")
    assert torch.equal(few_out["out"], many_out["out"])
    direction = torch.randn(few_out["out"].shape, device=device)
    few_grads = torch.autograd.grad(few_out["out"], list(made.values()), direction)
    many_grads = torch.autograd.grad(many_out["out"], list(many.values()), direction)
    for name, a, b in zip(made, few_grads, many_grads, strict=True):
        assert error(a, b.unflatten(1, (2, 2)).sum(2) if name in shared else b) < 2e-6, name


@pytest.mark.parametrize("update", ["delta", "linear"])
def test_pieces_equal_the_whole(update: str, device: torch.device) -> None:
    """Cut inside segments and at their ends; the last pieces are what the decoding kernel takes, without gradients."""
    call = Call(B=1, H=2, G=1, Tq=15, Tk=15, K=16, V=16, segment_len=6, update=update)
    made = tensors(call, torch.float32, device)
    whole = apply(call, made, "triton")
    expected = gradients(whole, made)
    for grad in (True, False):
        state, held, outs = MemoryState(made["memory"], made["normalizer"]), 0, []
        with torch.set_grad_enabled(grad):
            for first, last in ((0, 4), (4, 6), (6, 13), (13, 14), (14, 15)):
                at = {
                    name: x[:, :, (first if "q" in name else held) : last] for name, x in made.items() if name in TOKENS
                }
                out, state = segment_attention(
                    **at, gate=made["gate"], state=state, segment_len=6, update=update, backend="triton"
                )
                held += (last - held) // 6 * 6
                outs.append(out)
        pieces = {"out": torch.cat(outs, 2), "memory": state.memory, "normalizer": state.normalizer}
        assert worst(pieces, whole)[0] < 2e-6
        if grad:
            worst_error, where = worst(gradients(pieces, made), expected)
            assert worst_error < 1e-5, where


@pytest.mark.parametrize("update", ["delta", "linear"])
def test_no_output_sees_later_tokens(update: str, device: torch.device) -> None:
    """A token reaches itself and every later one, through its segment or the memory, and none before: bit for bit."""
    call = Call(B=1, H=2, G=1, Tq=40, Tk=40, K=16, V=16, segment_len=18, update=update)
    made = {name: x.detach() for name, x in tensors(call, torch.float32, device).items()}
    out = apply(call, made, "triton")["out"]
    for j in (0, 17, 18, 39):
        moved = {name: x.clone() for name, x in made.items()}
        for name in TOKENS:
            moved[name][:, :, j] += 0.5
        changed = (apply(call, moved, "triton")["out"] != out).any(-1).all(1)[0]
        assert not changed[:j].any()
        assert changed[j:].all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_memory_beyond_half_precision(dtype: torch.dtype, device: torch.device) -> None:
    """M and z of a long text overflow float16: readers take them over z's peak."""
    call = Call(B=1, H=2, G=1, Tq=33, Tk=33, K=32, V=32, segment_len=16, update="linear")
    made = tensors(call, dtype, device)
    for name in ("memory", "normalizer"):
        made[name] = (made[name].detach() * 1e7).requires_grad_()
    exact = {name: x.detach().double().requires_grad_() for name, x in made.items()}
    values, expected = apply(call, made, "triton"), apply(call, exact, "reference")
    assert values["memory"].abs().max() > 65504
    gate = GATES[dtype][0]
    for name, value in values.items():
        assert error(value, expected[name]) < gate, name
    found, wanted = (
        torch.autograd.grad(x["out"].double().sum(), list(y.values())) for x, y in ((values, made), (expected, exact))
    )
    for name, a, b in zip(made, found, wanted, strict=True):
        assert a.isfinite().all(), name
        if name in ("q", "k", "memory", "normalizer"):
            assert error(a, b) < GATES[dtype][1], name


def test_the_gates_gradient_is_each_heads_own(device: torch.device) -> None:
    """Zero where a head's output is not looked at, the same as alone where it is, over several tiles and rows."""
    call = Call(B=2, H=3, G=1, Tq=20, Tk=20, K=16, V=16, segment_len=18)
    made = tensors(call, torch.float32, device)
    exact = {name: x.detach().double().requires_grad_() for name, x in made.items()}
    found, expected = (
        torch.autograd.grad(apply(call, x, backend)["out"][:, 1].square().sum(), x["gate"])[0]
        for x, backend in ((made, "triton"), (exact, "reference"))
    )
    assert not found[[0, 2]].any()
    assert error(found, expected) < 1e-5


Q = torch.ones(1, 2, 3, 16)
REFUSED: dict[str, tuple[str, Any]] = {
    "float64": (
        r"computes in bfloat16, float16 and float32, got torch.float64: convert, or pass backend='torch'",
        lambda x: (x.double(),) * 3,
    ),
    "K 12": (
        r"needs K in 16, 24, 32, ... 256 \(multiples of 8\), got K = 12: pad, or pass backend='torch'",
        lambda x: (x[..., :12], x[..., :12], x),
    ),
    "V 20": (r"needs V in 16, .* got V = 20", lambda x: (x, x, torch.cat([x, x[..., :4]], -1))),
    "K 264": (r"needs K in 16, .* got K = 264", lambda x: (x[..., :1].expand(-1, -1, -1, 264),) * 2 + (x,)),
    "V 8": (r"needs V in 16, .* got V = 8", lambda x: (x, x, x[..., :8])),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_kernels_do_not_take_is_refused(name: str, device: torch.device) -> None:
    message, change = REFUSED[name]
    q, k, v = change(Q.to(device))
    with pytest.raises(ValueError, match=f"backend='triton' {message}"):
        segment_attention(q, k, v, segment_len=2, backend="triton")
    with pytest.raises(ValueError, match=f"backend='triton' {message}"):
        memory_write(k, v, backend="triton")
    state = MemoryState.zeros(
        1, 2, k.shape[3], v.shape[3], device=device, dtype=torch.promote_types(k.dtype, torch.float32)
    )
    with pytest.raises(ValueError, match=f"backend='triton' {message}"):
        memory_read(q, state, backend="triton")


def test_a_cpu_is_refused_unless_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "INTERPRETED", SimpleNamespace(value=False))
    message = (
        "needs tensors on a GPU, got cpu: move them, or pass backend='torch'; .* set TRITON_INTERPRET=1 before Python"
    )
    for call in (
        lambda: segment_attention(Q, Q, Q, segment_len=2, backend="triton"),
        lambda: memory_write(Q, Q, backend="triton"),
        lambda: memory_read(Q, MemoryState.zeros(1, 2, 16, 16), backend="triton"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_compiler_that_leaves_out_fences_is_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for target, version in (
            ("sm_90", "3.7.1"),
            ("sm_90", "3.10.0+git1a2b"),
            ("sm_80", "3.6.0"),
            ("sm_120", "3.6.0"),
        ):
            warn_of_compiler(target, version)
    for target, version in (("sm_90", "3.6.0"), ("sm_90", "3.7.0+git9f8e"), ("sm_100", "3.7.0")):
        said = f"Triton {re.escape(version)} leaves out fences that {target} needs, .* torch>=2.13.* `segattn check`"
        with pytest.warns(RuntimeWarning, match=said):
            warn_of_compiler(target, version)


def test_without_triton_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "HAS_TRITON", False)
    with pytest.raises(
        ValueError, match="backend='triton' needs the triton package: pip install triton, or pass backend='torch'"
    ):
        segment_attention(Q, Q, Q, segment_len=2, backend="triton")
    assert backends.default(torch.device("cuda")) == ("torch", "triton is not installed")


def test_what_a_gpu_runs_when_nothing_is_named() -> None:
    cuda = torch.device("cuda")
    assert backends.default(cuda) == ("triton", "the default on a GPU")
    assert backends.default(cuda, torch.float64) == ("torch", "the kernels do not compute in float64")
    assert backends.default(torch.device("cpu")) == ("torch", "the default on cpu")


@pytest.mark.parametrize("update", ["delta", "linear"])
def test_gates_and_state_gradients_of_any_strides(update: str) -> None:
    """A gate that heads share, and a state that is summed or transposed on: their strides are not those of memory."""
    made = {
        name: x.detach()
        for name, x in tensors(for_kernels(Call(update=update, with_state=False)), torch.float32).items()
    }

    def run(dtype: torch.dtype, backend: str) -> dict[str, torch.Tensor]:
        q, k, v = (made[name].to(dtype).requires_grad_() for name in "qkv")
        gate = torch.tensor([1.5], dtype=dtype).expand(q.shape[1])
        out, state = segment_attention(q, k, v, segment_len=5, gate=gate, update=update, backend=backend)
        loss = out.sum() + state.normalizer.sum() + state.memory.sum() + state.memory.mT.cumsum(-1).sum()
        return dict(zip(("out", "dq", "dk", "dv"), (out, *torch.autograd.grad(loss, (q, k, v))), strict=True))

    assert worst(run(torch.float32, "triton"), run(torch.float64, "reference"))[0] < 1e-5


@pytest.mark.parametrize("update", ["delta", "linear"])
@pytest.mark.parametrize("K", [16, 24])
def test_small_features_stay_finite_in_half_precision(K: int, update: str) -> None:
    """σ(k) / σ(k) z may exceed what float16 holds: by keys far below zero, or by the columns that pad a tile."""
    q, k, v = (torch.randn(1, 1, 12, K).half().requires_grad_() for _ in range(3))
    low = torch.cat([torch.full((K // 2,), -15.0), torch.full((K - K // 2,), 5.0)]).half().expand(1, 1, 12, K)
    z = torch.cat([torch.ones(K // 2), torch.full((K - K // 2,), 1e-6)]).expand(1, 1, K).contiguous()
    for memory_input, normalizer in ((low, z), (torch.full_like(low, -15), torch.ones_like(z))):
        out, state = segment_attention(
            q, k, v, segment_len=4, gate=torch.zeros(1), update=update, memory_q=memory_input, memory_k=memory_input,
            state=MemoryState(normalizer[..., None] * torch.randn(1, 1, K, K), normalizer), backend="triton",
        )  # fmt: skip
        grads = torch.autograd.grad(out.float().sum() + state.memory.sum(), (q, k, v))
        assert all(x.isfinite().all() for x in (out, *state, *grads))
