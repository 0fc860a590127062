"""What is measured: sizes of a call, and the tensors drawn for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    """q, k [B, H, T, K], v [B, H, T, V] and gate [H], as leaves that need gradients."""

    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor


@dataclass(frozen=True)
class Workload:
    """One call of causal segment attention with as many key/value heads as query heads."""

    B: int
    H: int
    T: int
    K: int
    V: int
    L: int

    @property
    def name(self) -> str:
        return f"B{self.B}-H{self.H}-T{self.T}-K{self.K}-L{self.L}"

    def inputs(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Inputs:
        generator = torch.Generator().manual_seed(0)

        def normal(width: int) -> Tensor:
            x = torch.randn(self.B, self.H, self.T, width, generator=generator)
            return x.to(device, dtype).requires_grad_()

        return Inputs(
            normal(self.K), normal(self.K), normal(self.V), torch.zeros(self.H, device=device).requires_grad_()
        )


WORKLOADS = (
    Workload(B=1, H=8, T=16384, K=64, V=64, L=1024),
    Workload(B=1, H=8, T=16384, K=128, V=128, L=2048),
)
