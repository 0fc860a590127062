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
from ..kernels.state import MemoryState, SegmentOutput
from .gate import Gate
from .rotary import rotate

ROPE = ("segment", "sequence", None)


class InfiniState(NamedTuple):
    """What an `InfiniAttention` keeps of the tokens it has read: a value of constant size, differentiable.

    memory: MemoryState of the completed segments, float32.
    keys, values: [B, G, P, K] of the unfinished segment, P < L, before rotary embedding.
    position: number of tokens read.
    """

    memory: MemoryState
    keys: Tensor
    values: Tensor
    position: int

    def detach(self) -> InfiniState:
        """Return the state cut from the graph, where truncated back-propagation ends."""
        return InfiniState(self.memory.detach(), self.keys.detach(), self.values.detach(), self.position)


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
        rope_base: base of the rotary frequencies.
        write_bias: initial value of a learnt bias on the keys that the memory is written with; None: no bias. A
            negative one writes little until training asks for more, which keeps the noise of a long text out. It is
            not in the paper.
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
        bias: bool = False,
        empty_memory: str = "local",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        head_width = _checked_head_width(width, heads, kv_heads, head_width)
        check.check_integer("segment_len", segment_len, 1)
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
        self.q_proj = nn.Linear(width, heads * head_width, bias=bias)
        self.k_proj = nn.Linear(width, kv_heads * head_width, bias=bias)
        self.v_proj = nn.Linear(width, kv_heads * head_width, bias=bias)
        self.o_proj = nn.Linear(heads * head_width, width, bias=bias)
        self.q_norm = nn.RMSNorm(head_width) if qk_norm else None
        self.k_norm = nn.RMSNorm(head_width) if qk_norm else None
        self.gate = Gate(heads, gate_init)
        # a vector, so that optimisers keep weight decay off it
        bias_shape = (kv_heads * head_width,)
        self.write_bias = None if write_bias is None else nn.Parameter(torch.full(bias_shape, float(write_bias)))

    def extra_repr(self) -> str:
        """Return what `print(model)` shows of the settings."""
        return f"segment_len={self.segment_len}, update={self.update!r}, rope={self.rope!r}"

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
        q = _normalised(self._heads(self.q_proj(x)), self.q_norm)
        k = _normalised(self._heads(self.k_proj(x)), self.k_norm)
        v = self._heads(self.v_proj(x))
        read, memory = 0, None
        if state is not None:
            read, memory = state.position, state.memory
            k, v = torch.cat([state.keys, k], dim=2), torch.cat([state.values, v], dim=2)
        time, unfinished = k.shape[2], k.shape[2] - x.shape[1]
        positions = self._positions(x, read + first - unfinished, time, spans, cu_seqlens)
        out, memory = operation(
            self._rotate(q, positions[..., unfinished:]),
            self._rotate(k, positions),
            v,
            segment_len=self.segment_len,
            gate=self.gate(),
            update=self.update,
            memory_q=q,
            memory_k=k if self.write_bias is None else k + self.write_bias.view(self.kv_heads, 1, self.head_width),
            state=memory,
            spans=spans,
            cu_seqlens=cu_seqlens,
            empty_memory=self.empty_memory,
            backend=self.backend,
        )
        out = self.o_proj(out.transpose(1, 2).flatten(2))
        if spans is not None or cu_seqlens is not None or memory is None:
            return out, None
        # cloned, so that the rest of a long piece is not kept alive
        tail = time // self.segment_len * self.segment_len
        return out, InfiniState(memory, k[:, :, tail:].clone(), v[:, :, tail:].clone(), read + total)

    def _check(self, x: Tensor, state: InfiniState | None, spans: Tensor | None, cu_seqlens: Tensor | None) -> None:
        check.check_floating("x", x)
        check.check_offsets(cu_seqlens, spans, x)
        if x.ndim != 3 or x.shape[-1] != self.q_proj.in_features:
            raise ValueError(f"x must have shape [B, T, {self.q_proj.in_features}], got {list(x.shape)}")
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
        if (heads, width) != (self.kv_heads, self.head_width) or time >= self.segment_len:
            wanted = f"[B, {self.kv_heads}, P < {self.segment_len}, {self.head_width}]"
            raise ValueError(f"state must hold keys of shape {wanted}, got {list(state.keys.shape)}")
        if state.position % self.segment_len != time:
            raise ValueError(
                f"state must stop {state.position % self.segment_len} tokens into a segment of {self.segment_len}, "
                f"as its position {state.position} does, got {time} keys: it is of another segment_len"
            )

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_width)).transpose(1, 2)

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        return x if self.rope is None else rotate(x, positions, self.rope_base)

    def _positions(self, x: Tensor, first: int, time: int, spans: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        """Return the positions [T] or [B, T] of the keys, the first of which is `first`, where a segment begins."""
        positions = torch.arange(time, device=x.device)
        if spans is not None:
            positions = positions - spans[:, :1]
        elif cu_seqlens is not None:
            sequence = torch.searchsorted(cu_seqlens.to(positions.dtype), positions, right=True) - 1
            positions = positions - cu_seqlens[sequence]
        elif self.rope == "sequence":
            positions = positions + first
        return positions % self.segment_len if self.rope == "segment" else positions


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


def _normalised(x: Tensor, norm: nn.RMSNorm | None) -> Tensor:
    """Return x normalised in the norm's dtype, which autocast does not lower."""
    return x if norm is None else norm(x.to(norm.weight.dtype))
