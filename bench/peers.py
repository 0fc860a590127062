"""Who is timed on a device: ours, local attention alone, and the ways in PyTorch to do the whole, for one row of text.

A peer is a function of (q, k, v, gate, segment_len). Peers of segments take [S, heads, L, width], a view of the same
memory, so that none of them is timed copying.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..kernels.backends import HAS_TRITON
from ..kernels.operation import segment_attention
from .check import interpreted
from .providers import eager_loop
from .workloads import Inputs

Function = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class Peer:
    """update: the memory's rule; None: attention alone. `full`: over the whole text, not inside segments."""

    run: Function
    update: str | None = None
    full: bool = False
    of_segments: bool = False
    ours: bool = False
    needs_gpu: bool = False
    equal_heads: bool = False

    def refusal(self, device: torch.device, grouped: bool) -> str | None:
        """Why it cannot run here, if it cannot."""
        if self.needs_gpu and device.type != "cuda":
            return "needs a GPU"
        if self.ours and not (HAS_TRITON and (device.type == "cuda" or interpreted())):
            return "the kernels need a GPU, or TRITON_INTERPRET=1 before Python starts"
        if self.equal_heads and grouped:
            return "takes no grouped heads"
        return None


def to_segments(x: Tensor, segment_len: int) -> Tensor:
    """[1, heads, T, width] → [S, heads, L, width], a view."""
    return x[0].unflatten(1, (-1, segment_len)).transpose(0, 1)


def from_segments(x: Tensor) -> Tensor:
    """The inverse, which may copy."""
    return x.transpose(0, 1).flatten(1, 2)[None]


def ours(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, segment_len: int, *, update: str | None, backend: str = "triton"
) -> Tensor:
    if update is None:
        return segment_attention(q, k, v, segment_len=segment_len, backend=backend).out
    return segment_attention(q, k, v, segment_len=segment_len, gate=gate, update=update, backend=backend).out


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, segment_len: int, *, backend: SDPBackend | None = None
) -> Tensor:
    """PyTorch's causal attention over each row of what it is given, by one of its kernels."""
    grouped = q.shape[1] != k.shape[1]
    if backend is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)


def loop(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, segment_len: int, *, update: str) -> Tensor:
    """The public form, in the inputs' dtype throughout."""
    return eager_loop(Inputs(q, k, v, gate.to(q.dtype)), segment_len, update=update)


@functools.cache
def _compiled_ours(update: str) -> Function:
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(functools.partial(ours, update=update, backend="torch"), dynamic=False)


def compiled(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, segment_len: int, *, update: str) -> Tensor:
    """The `torch` backend through torch.compile."""
    return _compiled_ours(update)(q, k, v, gate, segment_len)


@functools.cache
def _flex_parts(time: int, segment_len: int, device: torch.device) -> tuple[Callable[..., Tensor], object]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def inside(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (i // segment_len == j // segment_len)

    mask = create_block_mask(inside, None, None, time, time, device=str(device))
    return torch.compile(flex_attention, dynamic=False), mask


def flex(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, segment_len: int) -> Tensor:
    """FlexAttention over the whole text with a block mask; the mask is made once, untimed."""
    run, mask = _flex_parts(q.shape[2], segment_len, q.device)
    return run(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


FLASH = functools.partial(sdpa, backend=SDPBackend.FLASH_ATTENTION)

PEERS: dict[str, Peer] = {
    "segattn delta": Peer(functools.partial(ours, update="delta"), "delta", ours=True),
    "segattn linear": Peer(functools.partial(ours, update="linear"), "linear", ours=True),
    "segattn local": Peer(functools.partial(ours, update=None), ours=True),
    "SDPA flash local": Peer(FLASH, of_segments=True),
    "SDPA cuDNN local": Peer(
        functools.partial(sdpa, backend=SDPBackend.CUDNN_ATTENTION), of_segments=True, needs_gpu=True
    ),
    "FlexAttention local": Peer(flex, needs_gpu=True),
    "SDPA flash full": Peer(FLASH, full=True),
    "eager loop delta": Peer(functools.partial(loop, update="delta"), "delta", equal_heads=True),
    "eager loop linear": Peer(functools.partial(loop, update="linear"), "linear", equal_heads=True),
    "torch backend delta": Peer(functools.partial(ours, update="delta", backend="torch"), "delta"),
    "torch backend linear": Peer(functools.partial(ours, update="linear", backend="torch"), "linear"),
    "compiled torch delta": Peer(functools.partial(compiled, update="delta"), "delta", needs_gpu=True),
    "compiled torch linear": Peer(functools.partial(compiled, update="linear"), "linear", needs_gpu=True),
}
