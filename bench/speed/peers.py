"""The peers, what is timed, by name: attention alone, and the ways to compute segment attention, ours among them.

Peers of segments take [B · S, heads, L, width], a view of the same memory where B = 1, so that none is timed copying.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from . import attention_calls as calls
from .attention_calls import Function
from .workloads import DIRECTIONS

# the denominator of all ratios
BASELINE = "SDPA flash local"


@dataclass(frozen=True)
class Peer:
    """One way to compute a case.

    run: the function, from q, k, v and the case's gate and segment length to the output; of `attention_calls`.
    update: the memory's rule, "delta" or "linear"; None for attention alone.
    full: attends over the whole text, not inside segments.
    of_segments: takes segments as rows, [B · S, heads, L, width], rather than the text.
    ours: is this package's call with its default backend, held to the gates of `segattn check`; others are held to what
        their dtype explains.
    equal_heads: takes no grouped heads: it is skipped where G is not H.
    compiled: is compiled by `torch.compile`, which takes up to minutes.
    gpu_for: directions that need a GPU.
    package: name of the package that must be installed; None: torch and this one suffice.
    definition: what it computes, in float64, where that is not segment attention; None where it is.
    """

    run: Function
    update: str | None = None
    full: bool = False
    of_segments: bool = False
    ours: bool = False
    equal_heads: bool = False
    compiled: bool = False
    gpu_for: tuple[str, ...] = ()
    package: str | None = None
    definition: Function | None = None

    def refusal(self, device: torch.device, grouped: bool, directions: Sequence[str] = DIRECTIONS) -> str | None:
        """Return why the peer cannot run on a device; None where it can."""
        if device.type != "cuda" and set(self.gpu_for) & set(directions):
            return "needs a GPU"
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        if self.equal_heads and grouped:
            return "takes no grouped heads"
        return None


def to_segments(x: Tensor, segment_len: int) -> Tensor:
    """Return [B, heads, T, width] as [B · S, heads, L, width], a view where B = 1."""
    return x.unflatten(2, (-1, segment_len)).transpose(1, 2).flatten(0, 1)


def from_segments(x: Tensor, rows: int = 1) -> Tensor:
    """Return the inverse, which may copy."""
    return x.unflatten(0, (rows, -1)).transpose(1, 2).flatten(2, 3)


def _by_rule(name: str, run: Callable[..., Tensor], peer: Callable[..., Peer] = Peer) -> dict[str, Peer]:
    return {f"{name} {update}": peer(functools.partial(run, update=update), update) for update in ("linear", "delta")}


_FLASH, _CUDNN, _EFFICIENT = (
    functools.partial(calls.sdpa, backend=backend)
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
)
_of_equal_heads = functools.partial(Peer, equal_heads=True)
_of_fla = functools.partial(_of_equal_heads, package="fla", gpu_for=DIRECTIONS)
_torch_backend = functools.partial(calls.ours, backend="torch")

PEERS: dict[str, Peer] = {
    BASELINE: Peer(_FLASH, of_segments=True),
    "SDPA cuDNN local": Peer(_CUDNN, of_segments=True, gpu_for=DIRECTIONS),
    "SDPA efficient local": _of_equal_heads(_EFFICIENT, of_segments=True, gpu_for=DIRECTIONS),
    # PyTorch has no backward pass of it for a CPU
    "FlexAttention local": Peer(calls.flex, compiled=True, gpu_for=DIRECTIONS[1:]),
    "segattn local": Peer(functools.partial(calls.ours, update=None), ours=True),
    **_by_rule("segattn", calls.ours, functools.partial(Peer, ours=True)),
    **_by_rule("torch backend", _torch_backend),
    **_by_rule("compiled torch", calls.compiled(_torch_backend), functools.partial(Peer, compiled=True)),
    **_by_rule("eager loop", calls.eager_loop, _of_equal_heads),
    **_by_rule(
        "compiled eager loop", calls.compiled(calls.eager_loop), functools.partial(_of_equal_heads, compiled=True)
    ),
    **_by_rule(
        "infini-transformer-pytorch",
        calls.infini_transformer_pytorch,
        functools.partial(_of_equal_heads, package="infini_transformer_pytorch"),
    ),
    "SDPA flash full": Peer(_FLASH, full=True),
    "fla linear attention": _of_fla(calls.fla_linear, definition=calls.linear_by_definition),
    "fla gated delta rule": _of_fla(calls.fla_gated_delta, definition=calls.gated_delta_by_definition),
}
