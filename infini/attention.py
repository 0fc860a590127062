"""Infini-attention as a PyTorch module: projections and rotary positions around `segment_attention`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..kernels import validation as check
from ..kernels.attention import segment_attention
from ..kernels.autocast import autocast, autocast_holds
from ..kernels.backends import check_backend
from ..kernels.exchange import Ranks, agree_on_runs, modes
from ..kernels.sequence_parallel import sequence_parallel_attention, under_context_parallel
from ..kernels.sinks import first_tokens
from ..kernels.state import MemoryState, SegmentOutput
from ..kernels.text import check_no_wider
from ..runs.untrained import warn_untrained_piece, without_memory
from .gate import Gate
from .memory_map import MemoryMap
from .rotary import rotate, sink_positions

ROPE = ("segment", "sequence", None)


class InfiniState(NamedTuple):
    """Hold what an `InfiniAttention` keeps of the tokens it has read: a value of constant size, differentiable.

    memory: MemoryState of the completed segments, float32; with lookback=1, of all of them but the last.
    keys, values: [B, G, P, K] of the tokens that the memory does not hold, before rotary embedding: the unfinished
        segment, with lookback=1 also the whole one before it. P < (1 + lookback) · L.
    position: number of tokens read.
    sink_keys, sink_values: [B, G, sinks, K] of the text's first tokens, once they are in the memory; before that, and
        without sinks, None.
    """

    memory: MemoryState
    keys: Tensor
    values: Tensor
    position: int
    sink_keys: Tensor | None = None
    sink_values: Tensor | None = None

    def detach(self) -> InfiniState:
        """Return the state cut from the graph, where truncated back-propagation ends."""
        keys, values = self.keys.detach(), self.values.detach()
        sinks = (None if x is None else x.detach() for x in (self.sink_keys, self.sink_values))
        return InfiniState(self.memory.detach(), keys, values, self.position, *sinks)


class InfiniAttention(nn.Module):
    """Causal attention inside segments, and a memory of constant size across them.

    This is Infini-attention, arXiv 2404.07143, equations 6 to 10; `infini/README.md` has them as computed here. A text
    read in pieces of any sizes, each with the state that the call before returned, gives the same as the text read at
    once.

    Args:
        width: width of the input and the output.
        heads: query heads, H.
        segment_len: tokens per segment, L.
        kv_heads: key/value heads, G, a divisor of `heads`; default `heads`.
        head_width: width of a head's keys and values, K = V; default `width / heads`.
        update: how the memory is written, "delta" or "linear" (equations 9 and 8).
        gate_init: initial value of the gate β of every head; 0 weighs memory and local attention equally.
        qk_norm: apply an RMS norm to the queries and keys of each head.
        rope: rotary positions of local attention: "segment" restarts them with each segment, "sequence" counts over
            the whole text, None has none. The memory sees queries and keys without them. Both give the same up to
            rounding, as local attention depends on distances; take "sequence" for weights trained with such positions.
            With lookback=1 both count over the whole text, since a key is seen from two segments.
        rope_base: base of the rotary frequencies.
        write_bias: initial value of a learnt bias on the keys that the memory is written with; None: no bias. A
            negative one writes little until training asks for more, which keeps the noise of a long text out. It is
            not in the paper.
        lookback: 1 lets a token also see the whole segment before its own; 0 or 1. As in `segment_attention`.
        sinks: the number of a text's first tokens that all later ones see, at most L. Their rotary positions are those
            just before the window: no distance is greater than (1 + lookback) · L + sinks.
        memory_maps: give the memory a learnt map of its queries and of its keys, one for each head (`MemoryMap`), the
            identity at first. `write_bias` is then the initial value of the keys' bias.
        bias: give the four projections a bias.
        empty_memory, backend: as in `segment_attention`.

    Raises:
        TypeError, ValueError: a size is no positive integer, heads do not divide, `head_width` is odd with rotary
            positions, or an option is unknown.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        segment_len: int,
        kv_heads: int | None = None,
        head_width: int | None = None,
        update: str = "delta",
        gate_init: float = 0.0,
        qk_norm: bool = False,
        rope: str | None = "segment",
        rope_base: float = 10_000.0,
        write_bias: float | None = None,
        lookback: int = 0,
        sinks: int = 0,
        memory_maps: bool = False,
        bias: bool = False,
        empty_memory: str = "local",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        head_width = _checked_head_width(width, heads, kv_heads, head_width)
        check.check_integer("segment_len", segment_len, 1)
        lookback, sinks = check.check_lookback(lookback, sinks, segment_len, False)
        check.check_bool("memory_maps", memory_maps)
        check.check_choice("update", update, check.UPDATES)
        check.check_choice("empty_memory", empty_memory, check.EMPTY_MEMORY)
        check_backend(backend)
        if rope not in ROPE:
            raise ValueError(f"rope must be one of 'segment', 'sequence', None, got {rope!r}")
        if rope is not None and head_width % 2:
            raise ValueError(f"head_width must be even for rotary embedding, got {head_width}")
        self.segment_len = segment_len
        self.heads, self.kv_heads, self.head_width = heads, kv_heads, head_width
        self.update, self.empty_memory, self.backend = update, empty_memory, backend
        self.rope, self.rope_base = rope, rope_base
        self.lookback, self.sinks = lookback, sinks
        self.q_proj = nn.Linear(width, heads * head_width, bias=bias)
        self.k_proj = nn.Linear(width, kv_heads * head_width, bias=bias)
        self.v_proj = nn.Linear(width, kv_heads * head_width, bias=bias)
        self.o_proj = nn.Linear(heads * head_width, width, bias=bias)
        self.q_norm = nn.RMSNorm(head_width) if qk_norm else None
        self.k_norm = nn.RMSNorm(head_width) if qk_norm else None
        self.gate = Gate(heads, gate_init)
        self.write_bias = self.memory_q_map = self.memory_k_map = None
        if memory_maps:
            self.memory_q_map = MemoryMap(heads, head_width)
            self.memory_k_map = MemoryMap(kv_heads, head_width, 0.0 if write_bias is None else write_bias)
        elif write_bias is not None:
            # a vector, so that optimisers keep weight decay off it
            self.write_bias = nn.Parameter(torch.full((kv_heads * head_width,), float(write_bias)))

    def extra_repr(self) -> str:
        """Return what `print(model)` shows of the settings."""
        window = f", lookback={self.lookback}, sinks={self.sinks}" if self.lookback or self.sinks else ""
        return f"segment_len={self.segment_len}, update={self.update!r}, rope={self.rope!r}{window}"

    def forward(
        self,
        x: Tensor,
        state: InfiniState | None = None,
        *,
        spans: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        group: Any = None,
    ) -> tuple[Tensor, InfiniState | None]:
        """Attend from each token of x to its segment, and to the memory of all segments before.

        Args:
            x: [B, T, width].
            state: state after the text so far, from an earlier call; default none.
            spans, cu_seqlens: padded rows or packed sequences, as in `segment_attention`. Such a call takes no state
                and returns None for it, since its rows stop at different places of a segment.
            group: process group, or one dimension of a device mesh, over whose ranks the texts are spread: x is then
                this rank's run, as in `sequence_parallel_attention`. `state` is the one before the whole texts, equal
                on all ranks, and ends with a whole segment; the state returned is the one after the whole texts, on
                every rank, and holds the unfinished segment on the last rank alone.

        Returns:
            The output [B, T, width] in x's dtype (autocast's, where that is on), and the state to continue from.

        Raises:
            TypeError, ValueError: x has another width; the state is of another type, batch or layer, or comes with
                spans or cu_seqlens; or `segment_attention` refuses the arguments. With a group, on every rank.
            RuntimeError: with a group, PyTorch's context_parallel is on.

        Warns:
            UntrainedMemoryWarning: once, in training: two calls in turn had no state, and no text long enough to read a
                memory.
        """
        ranks = None if group is None else Ranks.of(group)
        operation: Callable[..., SegmentOutput] = segment_attention
        if ranks is None or ranks.size == 1:
            self._check(x, state, spans, cu_seqlens)
            first, total = 0, x.shape[1]
        else:
            times = self._agree(ranks, x, state, spans, cu_seqlens)
            first, total = sum(times[: ranks.rank]), sum(times)
            operation = partial(sequence_parallel_attention, group=ranks, check_ranks=False)
        self._warn_untrained(state, total, spans, cu_seqlens)
        q = _normalised(self._heads(self.q_proj(x)), self.q_norm)
        k = _normalised(self._heads(self.k_proj(x)), self.k_norm)
        v = self._heads(self.v_proj(x))
        read, memory, unfinished = 0, None, 0
        if state is not None:
            read, memory, unfinished = state.position, state.memory, state.keys.shape[2]
            k, v = torch.cat([state.keys, k], dim=2), torch.cat([state.values, v], dim=2)
        # position of the first key, where a segment begins
        begin = read + first - unfinished
        positions = self._positions(k, begin, spans, cu_seqlens)
        sinks = self._sink_tokens(k, v, state if begin else None, spans, cu_seqlens)
        out, memory = operation(
            self._rotate(q, positions[..., unfinished:]),
            self._rotate(k, positions),
            v,
            segment_len=self.segment_len,
            gate=self.gate(),
            update=self.update,
            memory_q=q if self.memory_q_map is None else self.memory_q_map(q),
            memory_k=self._memory_keys(k),
            state=memory,
            spans=spans,
            cu_seqlens=cu_seqlens,
            empty_memory=self.empty_memory,
            backend=self.backend,
            **self._window(sinks, begin, k.shape[2]),
        )
        out = self.o_proj(out.transpose(1, 2).flatten(2))
        if spans is not None or cu_seqlens is not None or memory is None:
            return out, None
        # cloned, so that the rest of a long piece is not kept alive
        tail = self._folded(k.shape[2])
        kept: tuple[Tensor | None, Tensor | None] = (None, None)
        if sinks is not None and begin + tail > 0:
            kept = sinks if begin else (sinks[0].clone(), sinks[1].clone())
        return out, InfiniState(memory, k[:, :, tail:].clone(), v[:, :, tail:].clone(), read + total, *kept)

    def _check(self, x: Tensor, state: InfiniState | None, spans: Tensor | None, cu_seqlens: Tensor | None) -> None:
        check.check_floating("x", x)
        check.check_offsets(cu_seqlens, spans, x)
        if x.ndim != 3 or x.shape[-1] != self.q_proj.in_features:
            raise ValueError(f"x must have shape [B, T, {self.q_proj.in_features}], got {list(x.shape)}")
        if (dtype := self.q_proj.weight.dtype).is_floating_point:
            check_no_wider("x", x, dtype)
        if state is not None and (spans is not None or cu_seqlens is not None):
            raise ValueError("state cannot go with spans or cu_seqlens: feed each row by itself, got both")
        if state is not None:
            self._check_state(state, x)

    def _agree(
        self, ranks: Ranks, x: Tensor, state: InfiniState | None, spans: Tensor | None, cu_seqlens: Tensor | None
    ) -> list[int]:
        """Check the call on all ranks together, and return the number of tokens of each."""
        problem: Exception | None = under_context_parallel("x, a run of a text over several processes,")
        settings: dict[str, object] = {}
        try:
            self._check(x, state, spans, cu_seqlens)
            if spans is not None or cu_seqlens is not None:
                raise ValueError("spans and cu_seqlens must be None with a group: each row is one text")
            if self.lookback or self.sinks:
                raise ValueError(
                    f"lookback and sinks must be 0 with a group, got {self.lookback} and {self.sinks}, for which "
                    "ranks would have to see each other's tokens: give each rank whole texts, without a group"
                )
            if state is not None and state.keys.shape[2]:
                raise ValueError(
                    f"state must end with a whole segment for a group, got {state.keys.shape[2]} more tokens"
                )
            names = ("segment_len", "update", "empty_memory", "rope", "rope_base", "heads", "kv_heads", "head_width")
            settings = {name: getattr(self, name) for name in (*names, "backend")} | {
                "x's batch size": x.shape[0],
                "x's dtype": x.dtype,
                "qk_norm": self.q_norm is not None,
                "write_bias given": self.write_bias is not None,
                "memory_maps": self.memory_k_map is not None,
                "state given": state is not None,
                **modes(x.device.type),
            }
            if state is not None:
                like = x.new_empty(x.shape[0], self.kv_heads, 0, self.head_width)
                like = autocast(like) if autocast_holds(x.device.type) else like
                check.check_state(state.memory, x.shape[0], like, like)
                check.check_shape("state.values", state.values, "that of its keys", state.keys.shape)
                kinds = {"keys": state.keys, "values": state.values, "memory": state.memory.memory}
                settings |= {f"the dtype of the state's {name}": part.dtype for name, part in kinds.items()}
                settings["the state's position"] = state.position
        except (TypeError, ValueError) as error:
            problem = problem or error
        return agree_on_runs(ranks, settings, 0 if problem else x.shape[1], self.segment_len, problem)

    def _check_state(self, state: InfiniState, x: Tensor) -> None:
        if not isinstance(state, InfiniState):
            raise TypeError(f"state must be the InfiniState of an earlier call, got {type(state).__name__}")
        batch, heads, time, width = state.keys.shape
        if batch != x.shape[0]:
            raise ValueError(f"state must be of x's batch size {x.shape[0]}, got {batch}")
        most = (1 + self.lookback) * self.segment_len
        if (heads, width) != (self.kv_heads, self.head_width) or time >= most:
            wanted = f"[B, {self.kv_heads}, P < {most}, {self.head_width}]"
            raise ValueError(f"state must hold keys of shape {wanted}, got {list(state.keys.shape)}")
        held = self._folded(state.position)
        if state.position - held != time:
            raise ValueError(
                f"state must hold the last {state.position - held} tokens of its {state.position} for segments of "
                f"{self.segment_len} and lookback = {self.lookback}, got {time} keys: it is of another segment_len or "
                "lookback"
            )
        for name, sink in (("sink_keys", state.sink_keys), ("sink_values", state.sink_values)):
            shape = (batch, self.kv_heads, self.sinks, self.head_width)
            if (sink is None) != (held == 0 or not self.sinks) or (sink is not None and sink.shape != shape):
                got = "none" if sink is None else list(sink.shape)
                raise ValueError(
                    f"state.{name} must be {list(shape) if held and self.sinks else None}, got {got}: it is of a layer "
                    "of other sinks"
                )

    def _warn_untrained(
        self, state: InfiniState | None, time: int, spans: Tensor | None, cu_seqlens: Tensor | None
    ) -> None:
        """Warn once of training on texts that end before a memory is read; `time` is their number of tokens."""

        def longest() -> int:
            bounds = _bounds(spans, cu_seqlens)
            return time if bounds is None else int(bounds.diff(dim=1).max())

        limit = without_memory(self.segment_len, self.lookback)
        warn_untrained_piece(self, state is not None, limit, longest, name="x")

    def _folded(self, tokens: int) -> int:
        """Return how many of a text's first tokens are in the memory, and no longer among the keys."""
        return max(tokens // self.segment_len - self.lookback, 0) * self.segment_len

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_width)).transpose(1, 2)

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        return x if self.rope is None else rotate(x, positions, self.rope_base)

    def _memory_keys(self, k: Tensor) -> Tensor:
        """Return what the memory is written by."""
        if self.memory_k_map is not None:
            return self.memory_k_map(k)
        return k if self.write_bias is None else k + self.write_bias.view(self.kv_heads, 1, self.head_width)

    def _positions(self, k: Tensor, begin: int, spans: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        """Return the positions [T] or [B, T] of the keys, the first of which is `begin`, where a segment begins."""
        restart = self.rope == "segment" and not self.lookback
        positions = torch.arange(k.shape[2], device=k.device)
        if spans is not None:
            positions = positions - spans[:, :1]
        elif cu_seqlens is not None:
            sequence = torch.searchsorted(cu_seqlens.to(positions.dtype), positions, right=True) - 1
            positions = positions - cu_seqlens[sequence]
        elif not restart:
            positions = positions + begin
        return positions % self.segment_len if restart else positions

    def _sink_tokens(
        self, k: Tensor, v: Tensor, state: InfiniState | None, spans: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """Return keys and values of the sinks, [N, G, sinks, K] before rotary embedding; None: there are none yet.

        state: the state with the sinks, where the text did not begin in this call.
        """
        if not self.sinks:
            return None
        if state is not None:
            kept = state.sink_keys, state.sink_values
            return None if kept[0] is None or kept[1] is None else (kept[0], kept[1])
        bounds = _bounds(spans, cu_seqlens)
        if bounds is None and k.shape[2] < self.sinks:
            return None
        return first_tokens(k, bounds, self.sinks), first_tokens(v, bounds, self.sinks)

    def _window(self, sinks: tuple[Tensor, Tensor] | None, begin: int, time: int) -> dict[str, Any]:
        """Return the arguments of the operation that say what is seen besides a segment: what is given up for none."""
        if not self.lookback and not self.sinks:
            return {}
        window: dict[str, Any] = {"lookback": self.lookback, "sinks": self.sinks, "past": begin}
        if sinks is None:
            return window
        keys, values = sinks
        segments = -(-time // self.segment_len)
        each = keys.unsqueeze(2).expand(-1, -1, segments, -1, -1)
        starts = torch.arange(segments, device=keys.device) * self.segment_len + begin
        starts = starts if self.lookback or self.rope == "sequence" else 0 * starts
        positions = sink_positions(starts, self.sinks, self.lookback * self.segment_len)
        rotated = self._rotate(each.flatten(2, 3), positions.flatten()).unflatten(2, (segments, self.sinks))
        return window | {"sink_k": rotated, "sink_v": values}


def _checked_head_width(width: int, heads: int, kv_heads: int, head_width: int | None) -> int:
    """Check the sizes of the projections, and return the width of a head."""
    for name, size in {"width": width, "heads": heads, "kv_heads": kv_heads}.items():
        check.check_integer(name, size, 1)
    if heads % kv_heads:
        raise ValueError(f"heads must be a multiple of kv_heads, got {heads} and {kv_heads}")
    if head_width is not None:
        return check.check_integer("head_width", head_width, 1)
    if width % heads:
        raise ValueError(f"width must be a multiple of heads unless head_width is given, got {width} and {heads}")
    return width // heads


def _bounds(spans: Tensor | None, cu_seqlens: Tensor | None) -> Tensor | None:
    """Return the bounds of padded rows or packed sequences, [N, 2]; None: whole rows."""
    return spans if cu_seqlens is None else torch.stack([cu_seqlens[:-1], cu_seqlens[1:]], dim=1)


def _normalised(x: Tensor, norm: nn.RMSNorm | None) -> Tensor:
    """Return x normalised in the norm's dtype, which autocast does not lower."""
    return x if norm is None else norm(x.to(norm.weight.dtype))
