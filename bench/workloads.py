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

    @classmethod
    def parse(cls, sizes: str) -> Workload:
        """From "B,H,T,K,L", with V = K.

        Raises:
            ValueError: anything but five positive integers, T a multiple of L.
        """
        numbers = [int(x) if x.isdecimal() else 0 for x in sizes.split(",")]
        if len(numbers) != 5 or min(numbers) < 1 or numbers[2] % numbers[4]:
            raise ValueError(f"workload must be five positive integers B,H,T,K,L, T a multiple of L, got {sizes!r}")
        batch, heads, time, width, segment_len = numbers
        return cls(batch, heads, time, width, width, segment_len)

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
