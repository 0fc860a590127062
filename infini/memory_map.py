"""A learnt map of the queries or keys that the memory is read or written by."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .precision import KeptWide


class MemoryMap(KeptWide):
    """A learnt affine map of each head: x + x Δ + b, the identity at first.

    What a pretrained model attends by need not be what a memory is best addressed by. The map is kept as its difference
    Δ from the identity, so that weight decay pulls it back to where it began. Δ and b stay in float32 or float64 when
    the model is cast. It is not in the paper.

    Args:
        heads: number of heads.
        width: width of a head, K.
        bias: initial value of b.
    """

    dtypes = (torch.float32, torch.float64)

    def __init__(self, heads: int, width: int, bias: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads, width, width, dtype=torch.float32))
        # a vector, so that optimisers keep weight decay off it
        self.bias = nn.Parameter(torch.full((heads * width,), float(bias), dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """Return the map of x [B, heads, T, K], in x's dtype."""
        heads, width, _ = self.weight.shape
        return x + x @ self.weight.to(x.dtype) + self.bias.to(x.dtype).view(heads, 1, width)

    def extra_repr(self) -> str:
        """Return what `print(model)` shows of the map."""
        return f"heads={self.weight.shape[0]}, width={self.weight.shape[1]}"
