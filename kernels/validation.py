"""The checks of a call. Each names the argument, what it must be and what it was; none touches the device."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .state import HeadBiases, MemoryState

UPDATES = ("delta", "linear")
EMPTY_MEMORY = ("local", "gated")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Check that an option is one of the values that it may take."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_integer(name: str, value: object, least: int) -> int:
    """Return an integer of at least `least`, checked: an int, or the symbol of a compiled graph as it is."""
    if isinstance(value, bool) or not isinstance(value, (Integral, torch.SymInt)):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value if isinstance(value, torch.SymInt) else operator.index(value)  # type: ignore[return-value]


def check_bool(name: str, value: object) -> None:
    """Check that an option is True or False, not a number that stands for it."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_floating(name: str, x: object) -> None:
    """Check that a value is a dense tensor of one of `DTYPES`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be bfloat16, float16, float32 or float64, got {x.dtype}")
    if x.is_nested or x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {'a nested one' if x.is_nested else x.layout}")


def check_ids(name: str, x: object) -> Tensor:
    """Return a tensor of token ids or labels, once its dtype is checked."""
    if not isinstance(x, Tensor) or x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be an int32 or int64 tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    return x


def check_like(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Check that two tensors have the same dtype and device."""
    if x.dtype != other.dtype:
        raise TypeError(f"{name} must have {other_name}'s dtype {other.dtype}, got {x.dtype}")
    check_device(name, x, other_name, other)


def check_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Check that two tensors are on the same device."""
    if x.device != other.device:
        raise ValueError(f"{name} must be on {other_name}'s device {other.device}, got {x.device}")


def check_shape(name: str, x: Tensor, letters: str, shape: Sequence[int]) -> None:
    """Check that a tensor has a shape, which the error shows as letters and as numbers."""
    if x.shape != tuple(shape):
        raise ValueError(f"{name} must have shape {letters} = {list(shape)}, got {list(x.shape)}")


def check_tokens(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check the shapes q [B, H, Tq, K], k [B, G, Tk, K], v [B, G, Tk, V], and what they share."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_floating(name, x)
        if x.ndim != 4:
            raise ValueError(f"{name} must have 4 dimensions [batch, heads, time, width], got shape {list(x.shape)}")
        if x.shape[1] < 1 or x.shape[3] < 1:
            raise ValueError(f"{name} must have at least one head and a width of at least 1, got shape {list(x.shape)}")
    check_like("k", k, "q", q)
    check_like("v", v, "q", q)
    batch, heads, query_time, width = q.shape
    groups, time = k.shape[1], k.shape[2]
    if k.shape[0] != batch:
        raise ValueError(f"k must have q's batch size {batch}, got {k.shape[0]}")
    if k.shape[3] != width:
        raise ValueError(f"k must have q's width K = {width}, got {k.shape[3]}")
    check_shape("v", v, "[B, G, Tk, V]", (batch, groups, time, v.shape[3]))
    if heads % groups:
        raise ValueError(f"q must have a multiple of k's heads: H % G == 0, got H = {heads}, G = {groups}")
    if query_time > time:
        raise ValueError(f"q must cover the last Tq <= Tk positions, got Tq = {query_time}, Tk = {time}")


def check_memory_inputs(q: Tensor, k: Tensor, memory_q: Tensor | None, memory_k: Tensor | None) -> None:
    """Check that the memory's queries and keys, where they are passed, match q and k in shape, dtype and device."""
    for name, x, like_name, like in (("memory_q", memory_q, "q", q), ("memory_k", memory_k, "k", k)):
        if x is not None:
            check_floating(name, x)
            check_like(name, x, like_name, like)
            check_shape(name, x, f"that of {like_name}", like.shape)


def check_per_head(name: str, x: Tensor, q: Tensor) -> None:
    """Check that a tensor has one float for each query head, [H], on q's device; its dtype may be another."""
    check_floating(name, x)
    check_shape(name, x, "[H]", (q.shape[1],))
    check_device(name, x, "q", q)


def check_biases(sink_logits: Tensor | None, alibi_slopes: Tensor | None, q: Tensor) -> HeadBiases:
    """Return what each query head adds to its softmax, checked: floats [H] on q's device, slopes without gradients."""
    for name, x in (("sink_logits", sink_logits), ("alibi_slopes", alibi_slopes)):
        if x is not None:
            check_per_head(name, x, q)
    if alibi_slopes is not None and alibi_slopes.requires_grad:
        raise ValueError("alibi_slopes must not require gradients, which they do not get: pass alibi_slopes.detach()")
    return HeadBiases(*(None if x is None else x.to(state_dtype(q)) for x in (alibi_slopes, sink_logits)))


def check_state(state: object, sequences: int, k: Tensor, v: Tensor) -> MemoryState:
    """Return the state of `sequences` sequences whose keys and values are k and v, once it is checked."""
    if not isinstance(state, (MemoryState, tuple)) or len(state) != 2:
        raise TypeError(f"state must be a MemoryState(memory, normalizer), got {type(state).__name__}")
    memory, normalizer = state
    dtype, shape = state_dtype(k), (sequences, k.shape[1], k.shape[3], v.shape[3])
    for name, x, letters, expected in (
        ("state.memory", memory, "[B, G, K, V]", shape),
        ("state.normalizer", normalizer, "[B, G, K]", shape[:3]),
    ):
        check_floating(name, x)
        if x.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {x.dtype}")
        check_shape(name, x, letters, expected)
        check_device(name, x, "k", k)
    return MemoryState(memory, normalizer)


def state_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of M and z: float32, float64 where the inputs are."""
    return torch.promote_types(x.dtype, torch.float32)


def check_no_tangent(*tensors: Tensor | None) -> None:
    """Check that no tensor carries a tangent of forward-mode differentiation, which registered operations would drop.

    Raises:
        RuntimeError: one does.
    """
    if torch.compiler.is_compiling():
        return
    for x in tensors:
        if x is not None and forward_ad.unpack_dual(x).tangent is not None:
            raise RuntimeError(
                "segment_attention has no forward-mode derivative (torch.func.jvp): pass backend='reference', or take "
                "gradients by torch.autograd.grad"
            )


def check_scale(scale: float | None, q: Tensor) -> float:
    """Return the scale that is passed, checked, or 1 / √K."""
    if scale is None:
        return 1 / math.sqrt(q.shape[3])
    if isinstance(scale, bool) or not isinstance(scale, Real):
        raise TypeError(f"scale must be a number, got {type(scale).__name__}")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be positive and finite, got {scale}")
    return float(scale)


def check_softcap(softcap: float | None) -> float | None:
    """Return None, or the positive number that is passed, checked."""
    if softcap is None:
        return None
    if isinstance(softcap, bool) or not isinstance(softcap, Real):
        raise TypeError(f"softcap must be a number or None, got {type(softcap).__name__}")
    if not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite, or None, got {softcap}")
    return float(softcap)


def check_offsets(cu_seqlens: Tensor | None, spans: Tensor | None, q: Tensor) -> None:
    """Check at most one of cu_seqlens int [N + 1] with B = 1, spans int [B, 2]; `checked_bounds` reads their values."""
    if cu_seqlens is not None and spans is not None:
        raise ValueError("cu_seqlens and spans exclude each other: packed sequences have no padding; got both")
    for name, x in (("cu_seqlens", cu_seqlens), ("spans", spans)):
        if x is None:
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be an int32 or int64 tensor, got {type(x).__name__}")
        if x.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be int32 or int64, got {x.dtype}")
        check_device(name, x, "q", q)
    if cu_seqlens is not None:
        if q.shape[0] != 1:
            raise ValueError(f"cu_seqlens needs one packed row, B = 1, got B = {q.shape[0]}")
        if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
            raise ValueError(f"cu_seqlens must have shape [N + 1], got {list(cu_seqlens.shape)}")
    if spans is not None:
        check_shape("spans", spans, "[B, 2]", (q.shape[0], 2))


def check_block_mask(
    num_read: int, num_write: int, gate: Tensor | None, time: int, segment_len: int, ragged: bool
) -> None:
    """Check the numbers of memory tokens around a text: they fit into one segment, and stand in place of a gate.

    ragged: the call has cu_seqlens or spans, whose lengths `checked_bounds` checks in place of `time`.
    """
    check_integer("num_read", num_read, 0)
    check_integer("num_write", num_write, 0)
    if not (num_read or num_write):
        return
    if gate is not None:
        got = f"got num_read = {num_read}, num_write = {num_write} and a gate"
        raise ValueError(f"num_read and num_write are for memory tokens and take no gate: pass gate=None; {got}")
    if not ragged and time > segment_len:
        raise ValueError(
            "num_read and num_write need a single segment, T <= segment_len, "
            f"got T = {time}, segment_len = {segment_len}"
        )
    if num_read + num_write > time > 0:
        raise ValueError(f"num_read + num_write must not exceed T = {time}, got {num_read} + {num_write}")


def check_lookback(lookback: int, sinks: int, segment_len: int, masked: bool) -> tuple[int, int]:
    """Return lookback and the number of sinks, once they are checked. masked: the call has the RMT mask."""
    check_integer("lookback", lookback, 0)
    if lookback > 1:
        raise ValueError(f"lookback must be 0 or 1 segments, got {lookback}")
    sinks = check_integer("sinks", sinks, 0)
    if sinks > segment_len:
        raise ValueError(f"sinks must be at most segment_len = {segment_len}, got {sinks}")
    if masked and (lookback or sinks):
        got = f"got lookback = {lookback}, sinks = {sinks}"
        raise ValueError(f"lookback and sinks take no num_read or num_write: pass 0 for one pair or the other, {got}")
    return int(lookback), sinks


def check_sinks(
    sinks: int, sink_k: Tensor | None, sink_v: Tensor | None, sequences: int, segments: int | None, k: Tensor, v: Tensor
) -> None:
    """Check the keys and values of sinks: both or neither, [N, G, n, ·] or one for each segment, [N, G, S, n, ·].

    segments: S; None: a call of one segment, with rows for sequences, takes the former alone.
    """
    if (sink_k is None) != (sink_v is None):
        raise ValueError("sink_k and sink_v go together: pass both, or neither")
    groups, n = k.shape[1], "B" if segments is None else "N"
    for name, x, like_name, like, width in (("sink_k", sink_k, "k", k, "K"), ("sink_v", sink_v, "v", v, "V")):
        if x is None:
            continue
        if not sinks:
            raise ValueError(f"{name} needs sinks, the number of tokens that it holds, got sinks = 0")
        check_floating(name, x)
        check_like(name, x, like_name, like)
        if segments is not None and x.ndim == 5:
            shape = (sequences, groups, segments, sinks, like.shape[3])
            check_shape(name, x, f"[{n}, G, S, sinks, {width}]", shape)
        else:
            check_shape(name, x, f"[{n}, G, sinks, {width}]", (sequences, groups, sinks, like.shape[3]))


def check_past(past: int | Tensor, sequences: int, segment_len: int, sink_k: Tensor | None, k: Tensor) -> int | Tensor:
    """Return the numbers of tokens before k, once they are checked: whole segments, and none without sink_k.

    The values of a tensor are looked at on a CPU alone, where nothing waits for them.
    """
    if isinstance(past, Tensor):
        check_ids("past", past)
        check_shape("past", past, "[N]", (sequences,))
        check_device("past", past, "k", k)
        looked_at = past.device.type == "cpu" and not torch.compiler.is_compiling()
        if looked_at and bool(((past < 0) | (past % segment_len != 0)).any()):
            got = past.tolist()
            raise ValueError(f"past must be 0 or multiples of segment_len = {segment_len}, got {got}")
    else:
        past = check_integer("past", past, 0)
        if past % segment_len:
            raise ValueError(f"past must be 0 or a multiple of segment_len = {segment_len}, got {past}")
        if not past:
            return 0
    if sink_k is None:
        raise ValueError(
            "past needs sink_k and sink_v, as k does not begin with the sequence's first tokens: pass both, or past=0"
        )
    return past
