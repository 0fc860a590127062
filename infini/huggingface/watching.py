"""A pass of a converted model in which another function runs the attention of its converted layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from ...kernels.attention import segment_attention
from .settings import conversion_of


class AttentionCall(NamedTuple):
    """The call of a converted layer's attention in a pass over whole rows, without a cache.

    attention: the module, with its gate and maps.
    q, k, v: [B, H, T, K], [B, G, T, K] and [B, G, T, V], rotated by their positions in the text.
    scale, softcap, sink_logits: of the local scores, as in `segment_attention`.
    converted: from q, k, v and the rotary embedding to the output [B, H, T, V] of the layer as it is converted.
    rotary: the rotary embedding of all rows: cosine and sine, one complex tensor of both, or None.
    """

    attention: Any
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float | None
    softcap: float | None
    sink_logits: Tensor | None
    converted: Callable[..., Tensor]
    rotary: Any

    @property
    def layer(self) -> int:
        """The layer's index."""
        return int(self.attention.layer_idx)

    def rows(self, begin: int, end: int) -> AttentionCall:
        """Return the call with the rows [begin, end) alone."""
        batch, rotary = len(self.q), self.rotary
        parts = (rotary,) if isinstance(rotary, Tensor) else rotary or ()
        parts = tuple(part[begin:end] if len(part) == batch else part for part in parts)
        q, k, v = (x[begin:end] for x in (self.q, self.k, self.v))
        rotary = parts[0] if isinstance(rotary, Tensor) else parts or None
        return self._replace(q=q, k=k, v=v, rotary=rotary)

    def full(self) -> Tensor:
        """Return the output [B, H, T, V] of full attention."""
        whole = max(2, self.q.shape[2])
        return segment_attention(
            self.q,
            self.k,
            self.v,
            segment_len=whole,
            scale=self.scale,
            softcap=self.softcap,
            sink_logits=self.sink_logits,
        ).out

    def segmented(self) -> Tensor:
        """Return the output [B, H, T, V] of the layer as it is converted, with gradients to its gate and maps."""
        return self.converted(self.q, self.k, self.v, self.rotary)


# runs an attention in the place of its layer; returns the output [B, H, T, V] that the pass goes on with
Watcher = Callable[[AttentionCall], Tensor]


@contextmanager
def watched(model: nn.Module, watcher: Watcher) -> Iterator[None]:
    """Let `watcher` run the attention of every converted layer, in passes without a cache over rows without padding.

    Rotary positions then run on over the whole text, as full attention needs them; local attention knows distances
    alone, so that the converted layers give what they gave before, up to rounding.
    """
    conversion = conversion_of(model)
    restart = conversion.restart
    # with a lookback positions run on through a pass in any case
    conversion.restart = restart and bool(conversion.settings.lookback)
    conversion.watcher = watcher
    try:
        yield
    finally:
        conversion.restart, conversion.watcher = restart, None
