"""One layer's associative memory: features of keys, the read in front of the layer and the write behind it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.memory import memory_read, memory_write
from ...kernels.state import MemoryState


class DPFP(NamedTuple):
    """Deterministic parameter-free projection (arXiv 2102.11174, equation 37): [..., n] → [..., 2 nu n], none negative.

    nu: number of neighbours that each of [relu(x), relu(-x)] is multiplied with.
    normalize: scale to Euclidean length 1, so that all keys weigh the same in the memory.
    """

    nu: int = 3
    normalize: bool = True

    def __call__(self, x: Tensor) -> Tensor:
        """Return the features of x [..., n]."""
        halves = torch.cat((x, -x), -1).relu()
        features = torch.cat([halves * halves.roll(shift, -1) for shift in range(1, self.nu + 1)], -1)
        return F.normalize(features, dim=-1) if self.normalize else features


class Projections(NamedTuple):
    """Weights of A layers, side by side.

    query, key: [A, d_mem, d].
    value: [A, d, d].
    strength, bias: [A, 1, d] and [A, 1].
    """

    query: Tensor
    key: Tensor
    value: Tensor
    strength: Tensor
    bias: Tensor

    @classmethod
    def of(cls, layers: list[AssociativeLayer]) -> Projections:
        """Lay the weights of layers of equal sizes side by side; those of a single layer without a copy."""
        return cls(*(side_by_side(group) for group in zip(*(layer() for layer in layers), strict=True)))

    def part(self, layers: slice) -> Projections:
        """Return the weights of some of the layers."""
        return Projections(*(weight[layers] for weight in self))


class AssociativeLayer(nn.Module):
    """Projections of one layer's hidden states to the queries, keys, values and strengths of its memory.

    Values begin at 0: an untrained memory returns nothing. Calling it returns the weights, since a call, unlike a read
    of a parameter, runs hooks that gather sharded ones.

    Args:
        width: of the hidden states, d.
        d_mem: of queries and keys before their features.
        device, dtype: of the weights.
    """

    def __init__(
        self, width: int, d_mem: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.query = nn.Linear(width, d_mem, bias=False, device=device, dtype=dtype)
        self.key = nn.Linear(width, d_mem, bias=False, device=device, dtype=dtype)
        self.value = nn.Linear(width, width, bias=False, device=device, dtype=dtype)
        self.strength = nn.Linear(width, 1, device=device, dtype=dtype)
        nn.init.zeros_(self.value.weight)
        nn.init.ones_(self.strength.bias)

    def forward(self) -> tuple[Tensor, ...]:
        """Return the weights of queries, keys, values and strengths, and the strengths' bias."""
        weights = (self.query.weight, self.key.weight, self.value.weight, self.strength.weight, self.strength.bias)
        # FSDP and ZeRO free the parameters when this call has ended, while they are still needed
        return tuple(weight.clone() for weight in weights) if self._forward_hooks else weights


def side_by_side(tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """Stack tensors to [A, ...]; a single one without a copy."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))


def recall(hidden: Tensor, weights: Projections, state: MemoryState, features: DPFP, epsilon: float = 0.0) -> Tensor:
    """Read the memories: φ(Wq x) M / φ(Wq x) z, 0 where a memory is empty (arXiv 2407.04841, section 3).

    Args:
        hidden: [A, B, T, d], of A layers.
        weights: of the layers.
        state: of A · B memories.
        features: φ.
        epsilon: added to the denominator.

    Returns:
        [A, B, T, d].
    """
    q = features(_project(hidden, weights.query)).flatten(0, 1).unsqueeze(1)
    return _returned(q, state, epsilon).reshape(hidden.shape)


def memorize(
    hidden: Tensor, weights: Projections, state: MemoryState, features: DPFP, epsilon: float = 0.0
) -> MemoryState:
    """Write hidden states into the memories, all at once, by the delta rule (arXiv 2407.04841, section 3).

    Args:
        hidden: [A, B, m, d], of A layers.
        weights: of the layers.
        state: of A · B memories.
        features: φ.
        epsilon: added to the denominators, of the values read back and of γ.

    Returns:
        The state after the write.
    """
    k, v = features(_project(hidden, weights.key)), _project(hidden, weights.value)
    beta = (_project(hidden, weights.strength) + weights.bias[:, None, None]).sigmoid()
    k, v, beta = (x.flatten(0, 1).unsqueeze(1) for x in (k, v, beta.squeeze(-1)))
    if not epsilon:
        return memory_write(k, v, state, update="delta", beta=beta, corrected=True, feature_map=None)
    v = v - _returned(k, state, epsilon)
    memory = memory_write(k, v, state, update="linear", beta=beta, feature_map=None).memory
    known, keys = _known(k, state), k.to(state.normalizer.dtype)
    with torch.no_grad():
        gamma = (1 - (known + epsilon) / (keys.square().sum(-1, keepdim=True) + epsilon)).clamp(0, 1)
        # into an empty memory, all is new
        gamma = torch.where(known > 0, gamma, 1)
    return MemoryState(memory, state.normalizer + (gamma * keys).sum(-2))


def _returned(keys: Tensor, state: MemoryState, epsilon: float) -> Tensor:
    """Return what the memories return for keys [N, 1, T, K]: f M / (f z + ε) [N, 1, T, d]."""
    values = memory_read(keys, state, feature_map=None)
    if not epsilon:
        return values
    known = _known(keys, state)
    return values * (known / (known + epsilon)).to(values.dtype)


def _known(keys: Tensor, state: MemoryState) -> Tensor:
    """Return f z [N, 1, T, 1] for keys [N, 1, T, K], in the state's dtype."""
    return (keys.to(state.normalizer.dtype) * state.normalizer.unsqueeze(-2)).sum(-1, keepdim=True)


def _project(x: Tensor, weight: Tensor) -> Tensor:
    """Project each layer's rows by its own weight: [A, B, T, d], [A, n, d] → [A, B, T, n]."""
    return torch.bmm(x.flatten(1, 2), weight.mT).unflatten(1, x.shape[1:3])
