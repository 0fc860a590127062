"""What is particular to the attention of a layer, whatever model it is of."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..rotary import inverse, rotate_by


class RotaryCall(NamedTuple):
    """Name the call of a model's module that makes a rotary embedding.

    module: its name inside the module that runs the layers.
    options: its arguments besides hidden states and positions, such as the type of layer.
    """

    module: str
    options: tuple[tuple[str, Any], ...] = ()

    def __call__(self, trunk: Any, positions: Tensor) -> Any:
        """Return the rotary embedding of positions, int64 [1 or B, T], negative ones too."""
        # of the hidden states it takes the device and dtype alone
        like = torch.empty(1, device=positions.device, dtype=torch.float32)
        return trunk.get_submodule(self.module)(like, position_ids=positions, **dict(self.options))


class Rotary(NamedTuple):
    """Describe how queries and keys are rotated.

    interleaved, last: as in `rotate_by`.
    angles: the entries of the cosine and sine that hold one angle for each pair of channels: the first of two equal
        "halves", one of two equal "neighbours", or "all".
    call: what makes the embeddings; None: it is no module of the model.
    """

    interleaved: bool
    last: bool
    angles: str
    call: RotaryCall | None = None

    def undo(self, embeddings: Any, *rotated: Tensor) -> tuple[Tensor, ...]:
        """Return queries and keys [B, heads, T, K] before the rotation.

        Args:
            embeddings: cosine and sine [1 or B, T, ·], or one complex tensor of both.
            rotated: queries or keys, of one dtype.
        """
        angles = inverse(*self._angles(embeddings), rotated[0].dtype)
        return tuple(rotate_by(x, *angles, interleaved=self.interleaved, last=self.last) for x in rotated)

    def redo(self, x: Tensor, embeddings: Any) -> Tensor:
        """Return queries or keys after the rotation: the inverse of `undo`."""
        return rotate_by(x, *self._angles(embeddings), interleaved=self.interleaved, last=self.last)

    def _angles(self, embeddings: Any) -> tuple[Tensor, Tensor]:
        """Return the cosine and sine of one angle for each pair of channels."""
        cos, sin = (embeddings.real, embeddings.imag) if isinstance(embeddings, Tensor) else embeddings
        if self.angles == "halves":
            return cos.chunk(2, dim=-1)[0], sin.chunk(2, dim=-1)[0]
        return (cos[..., ::2], sin[..., ::2]) if self.angles == "neighbours" else (cos, sin)


class Traits(NamedTuple):
    """Hold what a converted layer needs to know of its attention.

    heads, groups: query heads H and key/value heads G.
    key_width, value_width: K and V.
    rotary: how queries and keys arrive rotated; None: they are not.
    query_factor: queries arrive multiplied by it, and scores are scaled by that much less.
    hands_on: whether arguments of a forward pass reach the attention function; else only its mask does.
    """

    heads: int
    groups: int
    key_width: int
    value_width: int
    rotary: Rotary | None
    query_factor: float
    hands_on: bool

    def without_positions(self, q: Tensor, k: Tensor, embeddings: Any) -> tuple[Tensor, Tensor]:
        """Return the queries and keys of the memory: before rotary embedding, and not scaled.

        Args:
            q, k: [B, H, T, K] and [B, G, T, K], as attention uses them.
            embeddings: the rotary embedding that the layer was called with.
        """
        if self.query_factor != 1:
            q = q / self.query_factor
        if self.rotary is None:
            return q, k
        q, k = self.rotary.undo(embeddings, q, k)
        return q, k
