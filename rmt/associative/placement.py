"""The places of tokens and memory tokens once a batch is cut into segments of equal width."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Placement(NamedTuple):
    """S segments of B rows, each [tokens | memory tokens | padding] of width W.

    Padding stands last, where causal attention lets nothing see it.

    inputs: int [S, B, W], which of [B · T tokens | m memory tokens] stands there.
    outputs: int [B, T], which of S · B · W a token became; anything for padding.
    writes: int [S, B, m], where the memory tokens stand; None: last.
    alive: bool [S, B], where a row has the segment; None: everywhere.
    linked: bool [S, B], where gradients reach the memory before the segment; None: everywhere.
    """

    inputs: Tensor
    outputs: Tensor
    writes: Tensor | None
    alive: Tensor | None
    linked: Tensor | None

    @classmethod
    def of(
        cls,
        rows: list[tuple[int, int]],
        time: int,
        segment_len: int,
        num_memory: int,
        bptt: int | None,
        device: torch.device,
    ) -> Placement:
        """Place the tokens of rows that begin and end at the columns `rows` of T = `time`.

        Args:
            segment_len: L.
            num_memory: memory tokens behind each segment, m.
            bptt: segments through which gradients reach back, counted from each row's last; None: through all.
            device: of the result.
        """
        # on the CPU, and copied once
        host = torch.device("cpu")
        begin, end = torch.tensor(rows, device=host).unbind(1)
        length, row = end - begin, torch.arange(len(rows), device=host)
        size = min(segment_len, int(length.max()))
        segment = torch.arange(-(-int(length.max()) // segment_len), device=host)[:, None]
        count = (length - segment * segment_len).clamp(0, size)

        at = torch.arange(size + num_memory, device=host)
        token = (row * time + begin + segment * segment_len)[..., None] + at
        memory = len(rows) * time + (at - count[..., None]).clamp(max=num_memory - 1)
        inputs = torch.where(at < count[..., None], token, memory)

        index = (torch.arange(time, device=host) - begin[:, None]).clamp(min=0).minimum(length[:, None] - 1)
        slot = index // segment_len * len(rows) + row[:, None]
        outputs = slot * len(at) + index % segment_len

        writes = None if bool((count == size).all()) else count[..., None] + at[:num_memory]
        alive = None if bool(count.all()) else count > 0
        left = -(-length // segment_len) - segment
        linked = None if bptt is None else left % bptt != 0
        return cls(*(None if x is None else x.to(device) for x in (inputs, outputs, writes, alive, linked)))  # type: ignore[arg-type]

    def of_segments(self, segments: tuple[int, ...]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return `writes` [A, B, m], `alive` and `linked` [A, B] of A segments."""
        return _rows(self.writes, segments), _rows(self.alive, segments), _rows(self.linked, segments)


def _rows(x: Tensor | None, segments: tuple[int, ...]) -> Tensor | None:
    """Return the entries of some segments [A, ...]."""
    return None if x is None else torch.stack([x[segment] for segment in segments])
