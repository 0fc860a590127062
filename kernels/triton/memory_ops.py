"""`backend="triton"` for the memory on its own: reading and writing as operations, differentiable once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..sequences import Layout
from ..state import MemoryState, over_peak
from .launch import dense_rows, new_tokens
from .library import distinct, or_empty, or_none, register
from .ops import SavedMemory
from .read import read, read_grads
from .write import Normalizer, SegmentMemory, products, write
from .write_backward import state_grads, write_grads


def _rows(x: Tensor) -> Layout:
    """Return the layout where every row is one segment, whatever its length."""
    batch, time = x.shape[0], x.shape[2]
    return Layout(time, time, batch, batch, 1)


def _slots(memory: Tensor, normalizer: Tensor, dtype: torch.dtype) -> SegmentMemory:
    """Return a state as the kernels read it, with one slot for each row."""
    z, inverse_peak = over_peak(normalizer)
    exact = memory * inverse_peak.unsqueeze(-1)
    matrix = exact.to(dtype)
    residual = None if dtype == torch.float32 else (exact - matrix).to(dtype)
    return SegmentMemory(matrix, residual, Normalizer(z, inverse_peak))


def read_forward(q: Tensor, memory: Tensor, normalizer: Tensor, elu: bool) -> Tensor:
    """Return A_mem [B, H, T, V]."""
    return read(q, _slots(memory, normalizer, q.dtype), elu)


def _read_shapes(q: Tensor, memory: Tensor, normalizer: Tensor, elu: bool) -> Tensor:
    return new_tokens(q, q.shape[1], q.shape[2], memory.shape[3])


register("read", read_forward, _read_shapes)


def read_backward(q: Tensor, memory: Tensor, normalizer: Tensor, elu: bool, dout: Tensor) -> list[Tensor]:
    """Return the gradients of q, memory and normalizer."""
    slots, dout = _slots(memory, normalizer, q.dtype), dense_rows(dout)
    dq, memory_delta = read_grads(q, slots, dout, elu)
    return [dq, *products(
        q, dout, memory.shape[1], _rows(q), normalizer=slots.normalizer, memory_delta=memory_delta, elu=elu,
        read=True, summed=True,
    )]  # fmt: skip


def _read_backward_shapes(q: Tensor, memory: Tensor, normalizer: Tensor, elu: bool, dout: Tensor) -> list[Tensor]:
    return [new_tokens(q, *q.shape[1:]), memory.new_empty(memory.shape), normalizer.new_empty(normalizer.shape)]


register("read_backward", read_backward, _read_backward_shapes)


def write_forward(
    k: Tensor, v: Tensor, beta: Tensor | None, memory: Tensor, normalizer: Tensor, update: str, corrected: bool,
    elu: bool,
) -> list[Tensor]:  # fmt: skip
    """Return the memory and normalizer after, and the fields of `SavedMemory`."""
    written = write(k, v, memory, normalizer, _rows(k), update, beta=beta, corrected=corrected, elu=elu)
    return [written.memory, written.normalizer, *SavedMemory.of(written)]


def _write_shapes(
    k: Tensor, v: Tensor, beta: Tensor | None, memory: Tensor, normalizer: Tensor, update: str, corrected: bool,
    elu: bool,
) -> list[Tensor]:  # fmt: skip
    state = memory.new_empty(memory.shape), normalizer.new_empty(normalizer.shape)
    return [*state, *SavedMemory.shapes(k, v, k.shape[0], update, corrected)]


register("write", write_forward, _write_shapes)


def write_backward(
    k: Tensor, v: Tensor, beta: Tensor | None, saved: list[Tensor], elu: bool, dstate: list[Tensor]
) -> list[Tensor]:
    """Return the gradients of k, v, beta (empty where there is none), memory and normalizer."""
    saved_memory, layout = SavedMemory(*saved), _rows(k)
    before, (dmemory, dnormalizer) = saved_memory.before(), dstate
    reads = torch.zeros_like(dmemory), torch.zeros_like(dnormalizer)
    grads, dm, dz = state_grads(
        k, before, or_none(saved_memory.erased), dmemory, dnormalizer, *reads, layout, beta=beta, elu=elu,
    )  # fmt: skip
    dk, dv, dbeta = write_grads(
        k, v, before.normalizer, grads, layout, beta=beta, gamma=or_none(saved_memory.gamma), elu=elu
    )
    return [dk, dv, *or_empty(k, dbeta), dm, dz]


def _write_backward_shapes(
    k: Tensor, v: Tensor, beta: Tensor | None, saved: list[Tensor], elu: bool, dstate: list[Tensor]
) -> list[Tensor]:
    dbeta = k.new_empty(0) if beta is None else beta.new_empty(beta.shape)
    tokens = [new_tokens(x, *x.shape[1:]) for x in (k, v)]
    return [*tokens, dbeta, *(x.new_empty(x.shape) for x in dstate)]


register("write_backward", write_backward, _write_backward_shapes)


class Read(torch.autograd.Function):
    """A_mem of q, memory [B, G, K, V] and normalizer [B, G, K]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, memory: Tensor, normalizer: Tensor, elu: bool) -> Tensor:
        ctx.save_for_backward(q, memory, normalizer)
        ctx.elu = elu
        return torch.ops.segattn.read(q, memory, normalizer, elu)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return *torch.ops.segattn.read_backward(*ctx.saved_tensors, ctx.elu, dout), None


class Write(torch.autograd.Function):
    """The memory and normalizer after one segment."""

    @staticmethod
    def forward(
        ctx: Any, k: Tensor, v: Tensor, beta: Tensor | None, memory: Tensor, normalizer: Tensor, update: str,
        corrected: bool, elu: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        m, z, *saved = torch.ops.segattn.write(k, v, beta, memory, normalizer, update, corrected, elu)
        ctx.save_for_backward(k, v, beta, *saved)
        ctx.elu = elu
        return m, z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dstate: Tensor) -> tuple[Tensor | None, ...]:
        k, v, beta, *saved = ctx.saved_tensors
        contiguous = [x.contiguous() for x in dstate]
        dk, dv, dbeta, dm, dz = torch.ops.segattn.write_backward(k, v, beta, saved, ctx.elu, contiguous)
        return dk, dv, None if beta is None else dbeta, dm, dz, None, None, None


def triton_memory_read(q: Tensor, state: MemoryState, elu: bool) -> Tensor:
    """Run a call of `memory_read` by the kernels; elu: σ = ELU + 1 is applied to q."""
    memory, normalizer = (x.contiguous() for x in state)
    return Read.apply(dense_rows(q), memory, normalizer, elu)


def triton_memory_write(
    k: Tensor, v: Tensor, state: MemoryState, update: str, beta: Tensor | None, corrected: bool, elu: bool
) -> MemoryState:
    """Run a call of `memory_write` by the kernels; elu: σ = ELU + 1 is applied to k."""
    beta = None if beta is None else beta.float().contiguous()
    memory, normalizer = (x.contiguous() for x in state)
    tensors = distinct(dense_rows(k), dense_rows(v), beta, memory, normalizer)
    return MemoryState(*Write.apply(*tensors, update, corrected, elu))
