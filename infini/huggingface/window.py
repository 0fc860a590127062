"""What the segments of a pass see beside themselves: sinks and the segment before, and their rotary positions.

Local attention depends on distances alone, so positions begin where that keeps them small: at a row's tail, which
begins with the segment looked back at. Sinks stand just before the window of each segment, as in a cache that holds
sinks and window alone; no distance is greater than (1 + lookback) · L + sinks, however long the text.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels.sinks import first_tokens
from ..rotary import sink_positions
from .cache_layer import LayerState
from .rows import Rows
from .settings import Conversion, Settings
from .traits import RotaryCall, Traits

# rotary embeddings by the calls that made them
Embeddings = dict[RotaryCall, Any]


class Window(NamedTuple):
    """Hold what the layers of a pass need beside the tokens of their segments.

    settings: how the model was converted.
    rows, after: how far each row has been read before the pass, and after it.
    past: tokens that the rows have folded before the pass: one number for all, or int64 [B].
    places: at how many places the sinks stand: 1, or one for each segment; 0: no segment of the pass sees them.
    sinks_at: the embeddings of these places, of positions [1 or B, places · sinks].
    tails_at: those of the tail after the pass, of positions [1 or B, P]; empty where it stays where it stands.
    """

    settings: Settings
    rows: Rows
    after: Rows
    past: int | Tensor
    places: int
    sinks_at: Embeddings
    tails_at: Embeddings

    def sinks(
        self, state: LayerState | None, memory_k: Tensor, v: Tensor, bounds: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """Return keys and values of the sinks [N, G, n, ·], before rotary embedding; None: there are none.

        Args:
            state: what the layer keeps of the tokens before.
            memory_k, v: [B, G, T, ·] from the first token of each row's tail on, before rotary embedding.
            bounds: int [N, 2] of the sequences among these columns; None: whole rows.
        """
        count = self.settings.sinks
        if not count or not (self.places or any(self.after.folded)):
            return None
        kept = None if state is None else state.sinks
        if kept is not None and all(self.rows.folded):
            return kept
        bounds = None if bounds is None else bounds.to(v.device)
        first = first_tokens(memory_k, bounds, count), first_tokens(v, bounds, count)
        if kept is None or not isinstance(self.past, Tensor):
            return first
        begun = self.past.to(v.device)[:, None, None, None] > 0
        return torch.where(begun, kept[0], first[0]), torch.where(begun, kept[1], first[1])

    def arguments(self, traits: Traits, sinks: tuple[Tensor, Tensor] | None, k: Tensor, v: Tensor) -> dict[str, Any]:
        """Return the arguments of `segment_attention` that say what is seen beside a segment of k and v."""
        lookback = {"lookback": self.settings.lookback}
        if not self.places or sinks is None:
            return lookback
        keys, values = sinks
        if traits.rotary is not None and traits.rotary.call is not None:
            each = keys.repeat(1, 1, self.places, 1)
            keys = traits.rotary.redo(each, self.sinks_at[traits.rotary.call])
            if self.places > 1:
                keys = keys.unflatten(2, (self.places, -1))
        past = self.past.to(k.device) if isinstance(self.past, Tensor) else self.past
        return lookback | {
            "sinks": self.settings.sinks,
            "sink_k": keys.to(k.dtype),
            "sink_v": values.to(v.dtype),
            "past": past,
        }

    def left(self, traits: Traits, state: LayerState, sinks: tuple[Tensor, Tensor] | None) -> LayerState:
        """Return the state that a layer leaves, with its tail where it stands in the next pass, and with the sinks.

        Args:
            traits: of the layer.
            state: what it leaves, the tail where it stood in this pass.
            sinks: what `sinks` returned.
        """
        if self.tails_at and traits.rotary is not None and traits.rotary.call is not None:
            keys = traits.rotary.redo(state.memory_keys, self.tails_at[traits.rotary.call])
            state = state._replace(keys=keys.to(state.keys.dtype))
        if sinks is None or not any(self.after.folded):
            return state
        # cloned, so that the rest of a long piece is not kept alive
        return state._replace(sinks=sinks if all(self.rows.folded) else (sinks[0].clone(), sinks[1].clone()))


def window_of(
    trunk: Any, conversion: Conversion, rows: Rows, after: Rows, columns: int, packed: bool, device: torch.device
) -> Window | None:
    """Return what a pass sees beside its segments, None where that is nothing.

    Args:
        trunk: the module that runs the layers.
        conversion: how the model was converted.
        rows, after: how far each row has been read before the pass, and after it.
        columns: number of columns of tails and new tokens together, of packed rows those laid end to end.
        packed: whether the rows are packed sequences.
        device: where the tokens are.
    """
    settings = conversion.settings
    length, lookback = settings.segment_len, settings.lookback
    if not (lookback or settings.sinks):
        return None
    segments = -(-columns // length)
    last = segments if packed else -(-max(after.lengths) // length)
    places = 0
    if settings.sinks and last > lookback + 1:
        places = segments if conversion.period is None else 1
    sinks_at = embeddings_at(trunk, conversion, _sink_positions(conversion, rows, places, device)) if places else {}
    tails_at = {}
    if conversion.restart and lookback and not packed and after.folded != rows.folded:
        tails_at = embeddings_at(trunk, conversion, _tail_positions(after, device))
    past = rows.folded[0] if len(set(rows.folded)) == 1 else torch.tensor(rows.folded, device=device)
    return Window(settings, rows, after, past, places, sinks_at, tails_at)


def embeddings_at(trunk: Any, conversion: Conversion, positions: Tensor) -> Embeddings:
    """Return the rotary embeddings of positions, int64 [1 or B, T], by the calls that make them."""
    calls = dict.fromkeys(traits.rotary.call for traits in conversion.traits.values() if traits.rotary is not None)
    return {call: call(trunk, positions) for call in calls if call is not None}


def _sink_positions(conversion: Conversion, rows: Rows, places: int, device: torch.device) -> Tensor:
    """Return the positions of the sinks [1 or B, places · sinks]: those just before the window of each segment."""
    settings = conversion.settings
    # a period has one place and no lookback
    starts = torch.arange(places, device=device) * settings.segment_len
    positions = sink_positions(starts, settings.sinks, settings.lookback * settings.segment_len).flatten()
    if conversion.restart:
        return positions[None]
    # positions count over the whole text
    folded = rows.folded[:1] if len(set(rows.folded)) == 1 else rows.folded
    return torch.tensor(folded, device=device)[:, None] + positions


def _tail_positions(rows: Rows, device: torch.device) -> Tensor:
    """Return the positions of the tails [1 or B, P], each counted from its first token; 0 before it."""
    tails = torch.tensor(rows.tails[:1] if len(set(rows.tails)) == 1 else rows.tails, device=device)
    width = max(rows.tails)
    return (torch.arange(width, device=device) - width + tails[:, None]).clamp(min=0)
