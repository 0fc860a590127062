"""What travels with one forward pass of a converted model, from the trunk's hooks to the attention of every layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels.exchange import Ranks
from .cache import InfiniCache
from .cache_layer import LayerState
from .rows import Rows
from .settings import Conversion
from .static_cache import StaticInfiniCache
from .window import Window

# the arguments of every layer's attention that carry the pass, and the cosine and sine of the rotary embedding
ARGUMENT = "segattn_pass"
ROTARY = "segattn_rotary"
EMPTY = Rows.fresh(0)


class ForwardPass:
    """One forward pass: what its attention starts from, and the states that the layers leave.

    It is not a dataclass, since FSDP2 would hand a copy of it to each layer, with every float tensor cast, and what the
    layer leaves in a copy is lost. FSDP2 passes objects of other classes as they are.

    conversion: how the model was converted.
    cache: the cache to read from and write to, except in a static step; None: no cache is kept.
    static: in a static step, one new token in each row, its cache, which keeps the rows and states itself.
    rows, after: how far each row has been read before the pass, and after it.
    spans: int32 [B, 2], bounds of each row's tokens among its tail and the new columns, as in `segment_attention`.
    cu_seqlens: int32 [N + 1], bounds of packed sequences among all rows laid end to end.
    window: what is seen beside segments; None: nothing.
    states: states before the pass, by layer; None where nothing has been read.
    left: states after the pass, by layer, added as the layers run.
    ranks: the processes over which the texts are spread, which have been checked to agree.
    in_graph: whether the states after the pass are to have gradients.
    """

    def __init__(
        self,
        conversion: Conversion,
        *,
        cache: InfiniCache | StaticInfiniCache | None = None,
        static: StaticInfiniCache | None = None,
        rows: Rows = EMPTY,
        after: Rows = EMPTY,
        spans: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        window: Window | None = None,
        states: dict[int, LayerState | None] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.conversion = conversion
        self.cache, self.static = cache, static
        self.rows, self.after = rows, after
        self.spans, self.cu_seqlens, self.window = spans, cu_seqlens, window
        self.states = dict.fromkeys(conversion.settings.layers) if states is None else states
        self.left: dict[int, LayerState] = {}
        self.ranks = ranks
        self.in_graph = cache is not None and torch.is_grad_enabled()

    @property
    def bounds(self) -> Tensor | None:
        """The bounds of rows or packed sequences, int32 [N, 2]; None: whole rows."""
        if self.cu_seqlens is None:
            return self.spans
        return torch.stack([self.cu_seqlens[:-1], self.cu_seqlens[1:]], dim=1)


class Carried(NamedTuple):
    """A mask, and with it what layers that keep other arguments to themselves would not hand on to attention.

    mask: of the layer's attention.
    forward: the forward pass.
    rotary: the rotary embedding.
    """

    mask: Any
    forward: ForwardPass
    rotary: Any = None
