"""The memory on its own as operations: reading and writing by the kernels, differentiable once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..sequences import Layout
from ..state import MemoryState
from ..torch.memory import scaled
from .launch import dense_rows, new_tokens
from .ops import LIBRARY, distinct, or_empty, or_none
from .read import read, read_grads
from .write import products, write
from .write_backward import state_grads, write_grads


def _rows(batch: int) -> Layout:
    """Every row one segment, whatever its length."""
    return Layout(batch, batch, 1, None, None)


LIBRARY.define("read(Tensor q, Tensor memory, Tensor normalizer, bool elu) -> Tensor")
LIBRARY.define(
    "read_backward(Tensor q, Tensor memory, Tensor normalizer, bool elu, Tensor dout) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "write(Tensor k, Tensor v, Tensor? beta, Tensor memory, Tensor normalizer, bool delta, bool corrected, bool elu)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "write_backward(Tensor k, Tensor v, Tensor? beta, Tensor before, Tensor rest, Tensor z_before, "
    "Tensor inverse_peak, Tensor erased, Tensor gamma, bool elu, Tensor dmemory, Tensor dnormalizer) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _read(q: Tensor, memory: Tensor, normalizer: Tensor, elu: bool) -> Tensor:
    z, inverse_peak = scaled(normalizer)
    return read(q, (memory * inverse_peak.unsqueeze(-1)).to(q.dtype), z, elu)


def _read_backward(
    q: Tensor, memory: Tensor, normalizer: Tensor, elu: bool, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    z, inverse_peak = scaled(normalizer)
    dout, groups, time = dense_rows(dout), memory.shape[1], q.shape[2]
    exact = memory * inverse_peak.unsqueeze(-1)
    rounded = exact.to(q.dtype)
    rest = None if q.dtype == torch.float32 else (exact - rounded).to(q.dtype)
    dq, along = read_grads(q, rounded, rest, z, dout, elu)
    dmemory, dnormalizer = products(
        *(q, dout, z, inverse_peak, None, None, along, groups, time, _rows(q.shape[0]), time),
        elu=elu,
        whole=False,
        summed=True,
    )
    return dq, dmemory, dnormalizer


def _write(
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    memory: Tensor,
    normalizer: Tensor,
    delta: bool,
    corrected: bool,
    elu: bool,
) -> tuple[Tensor, ...]:
    """The state after, and what the backward needs: M / peak and z / peak before, 1 / peak, A and γ."""
    layout = _rows(k.shape[0])
    done = write(k, v, memory, normalizer, layout, k.shape[2], delta, beta=beta, corrected=corrected, elu=elu)
    return (
        done.memory,
        done.normalizer,
        *or_empty(k, done.before, done.rest, done.z_before, done.inverse_peak, done.erased, done.gamma),
    )


def _write_backward(
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    before: Tensor,
    rest: Tensor,
    z_before: Tensor,
    inverse_peak: Tensor,
    erased: Tensor,
    gamma: Tensor,
    elu: bool,
    dmemory: Tensor,
    dnormalizer: Tensor,
) -> tuple[Tensor, ...]:
    read_nothing = torch.zeros_like(dmemory), torch.zeros_like(dnormalizer)
    layout, time = _rows(k.shape[0]), k.shape[2]
    grads = state_grads(
        k, before, or_none(rest), z_before, inverse_peak, or_none(erased), dmemory, dnormalizer, *read_nothing, layout,
        time, beta=beta, elu=elu,
    )  # fmt: skip
    dk, dv, dbeta = write_grads(k, v, beta, or_none(gamma), z_before, grads, layout, time, elu=elu)
    return dk, dv, *or_empty(k, dbeta), grads.memory, grads.normalizer


@torch.library.register_fake("segattn::read", lib=LIBRARY)
def _(q: Tensor, memory: Tensor, normalizer: Tensor, elu: bool) -> Tensor:
    return new_tokens(q, q.shape[1], q.shape[2], memory.shape[3])


@torch.library.register_fake("segattn::read_backward", lib=LIBRARY)
def _(q: Tensor, memory: Tensor, normalizer: Tensor, elu: bool, dout: Tensor) -> tuple[Tensor, ...]:
    return new_tokens(q, *q.shape[1:]), memory.new_empty(memory.shape), normalizer.new_empty(normalizer.shape)


@torch.library.register_fake("segattn::write", lib=LIBRARY)
def _(
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    memory: Tensor,
    normalizer: Tensor,
    delta: bool,
    corrected: bool,
    elu: bool,
) -> tuple[Tensor, ...]:
    batch, groups, time, width = k.shape
    return (
        memory.new_empty(memory.shape),
        normalizer.new_empty(normalizer.shape),
        k.new_empty(memory.shape),
        k.new_empty(0 if k.dtype == torch.float32 else memory.shape),
        normalizer.new_empty(normalizer.shape),
        normalizer.new_empty((batch, groups)),
        normalizer.new_empty((batch, groups, width, width)) if delta else k.new_empty(0),
        normalizer.new_empty((batch, groups, time)) if corrected else k.new_empty(0),
    )


@torch.library.register_fake("segattn::write_backward", lib=LIBRARY)
def _(k: Tensor, v: Tensor, beta: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    *_, dmemory, dnormalizer = rest
    dbeta = k.new_empty(0) if beta is None else beta.new_empty(beta.shape)
    dstate = dmemory.new_empty(dmemory.shape), dnormalizer.new_empty(dnormalizer.shape)
    return new_tokens(k, *k.shape[1:]), new_tokens(v, *v.shape[1:]), dbeta, *dstate


for device in ("CPU", "CUDA"):
    LIBRARY.impl("read", _read, device)
    LIBRARY.impl("read_backward", _read_backward, device)
    LIBRARY.impl("write", _write, device)
    LIBRARY.impl("write_backward", _write_backward, device)


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
    """The state after one segment."""

    @staticmethod
    def forward(
        ctx: Any,
        k: Tensor,
        v: Tensor,
        beta: Tensor | None,
        memory: Tensor,
        normalizer: Tensor,
        delta: bool,
        corrected: bool,
        elu: bool,
    ) -> tuple[Tensor, Tensor]:
        m, z, *kept = torch.ops.segattn.write(k, v, beta, memory, normalizer, delta, corrected, elu)
        ctx.save_for_backward(k, v, beta, *kept)
        ctx.elu = elu
        return m, z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dmemory: Tensor, dnormalizer: Tensor) -> tuple[Tensor | None, ...]:
        k, v, beta, *kept = ctx.saved_tensors
        dk, dv, dbeta, *dstate = torch.ops.segattn.write_backward(
            k, v, beta, *kept, ctx.elu, dmemory.contiguous(), dnormalizer.contiguous()
        )
        return dk, dv, None if beta is None else dbeta, *dstate, None, None, None


def memory_read(q: Tensor, state: MemoryState, elu: bool) -> Tensor:
    memory, normalizer = (x.contiguous() for x in state)
    return Read.apply(dense_rows(q), memory, normalizer, elu)


def memory_write(
    k: Tensor, v: Tensor, state: MemoryState, update: str, beta: Tensor | None, corrected: bool, elu: bool
) -> MemoryState:
    beta = None if beta is None else beta.float().contiguous()
    memory, normalizer = (x.contiguous() for x in state)
    tensors = distinct(dense_rows(k), dense_rows(v), beta, memory, normalizer)
    return MemoryState(*Write.apply(*tensors, update == "delta", corrected, elu))
