"""ARMT as it is published: hooks on the model's layers read and write a memory, segment by segment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...rmt.associative.memory import AssociativeMemory
from .recurrent_models import Loop, trained

# a query or key may have no feature in common with the earlier ones
TINY = 1e-30


def memory_first(module: AssociativeMemory) -> list[Tensor]:
    """Return the trained parameters, the memory tokens first."""
    return [module.memory_tokens, *(x for x in trained(module) if x is not module.memory_tokens)]


class AssociativeLoop(Loop):
    """The mechanism of arXiv 2407.04841 over the weights of a module around a Llama, which is not called."""

    def __init__(self, module: AssociativeMemory) -> None:
        self.module = module
        self.llama = cast(Any, module.model)
        self.parameters = memory_first(module)
        self.memory: dict[str, tuple[Tensor, Tensor]] = {}
        for name, weights in module.memories.items():
            layer: nn.Module = self.llama.model.layers[int(name)]
            layer.register_forward_pre_hook(self._before(name, weights))
            layer.register_forward_hook(self._after(name, weights))

    def features(self, x: Tensor) -> Tensor:
        """Return DPFP features (arXiv 2102.11174, equation 37), of length 1."""
        y = torch.cat((x.relu(), (-x).relu()), -1)
        return F.normalize(torch.cat([y * y.roll(j, -1) for j in range(1, self.module.settings.nu + 1)], -1), dim=-1)

    def _before(self, name: str, weights: Any) -> Any:
        def read(layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            if name not in self.memory:
                return args
            memory, normalizer = self.memory[name]
            q = self.features(weights.query(args[0]))
            return (args[0] + q @ memory / (q @ normalizer).clamp(min=TINY), *args[1:])

        return read

    def _after(self, name: str, weights: Any) -> Any:
        def write(layer: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
            # before transformers 5 a layer may return a tuple
            hidden: Tensor = output[0] if isinstance(output, tuple) else output
            self._write(name, weights, hidden[:, -self.module.settings.num_memory_tokens :])

        return write

    def _write(self, name: str, weights: Any, x: Tensor) -> None:
        k, v, beta = self.features(weights.key(x)), weights.value(x), weights.strength(x).sigmoid()
        if name not in self.memory:
            self.memory[name] = k.mT @ (beta * v), k.sum(1).unsqueeze(-1)
            return
        memory, normalizer = self.memory[name]
        known = (k @ normalizer).clamp(min=TINY)
        gamma = (1 - known / k.square().sum(-1, keepdim=True).clamp(min=TINY)).clamp(0, 1).detach()
        self.memory[name] = (
            memory + k.mT @ (beta * (v - k @ memory / known)),
            normalizer + (gamma * k).sum(1)[..., None],
        )

    def segments(self, ids: Tensor) -> Iterator[Tensor]:
        """Return each segment's last rows of its tokens, [B, n, d]."""
        self.memory.clear()
        tokens = self.module.memory_tokens.expand(ids.shape[0], -1, -1)
        for segment in ids.split(self.module.settings.segment_len, 1):
            rows = torch.cat((self.llama.model.embed_tokens(segment), tokens), 1)
            hidden: Tensor = self.llama.model(inputs_embeds=rows).last_hidden_state
            yield hidden[:, : segment.shape[1]]

    def logits(self, ids: Tensor) -> Tensor:
        return torch.cat([self.llama.lm_head(rows) for rows in self.segments(ids)], 1)

    def read(self, ids: Tensor) -> Sequence[Tensor]:
        """Return each layer's memory [B, 1, K, d] and normalizer [B, 1, K], as `AssociativeState` has them."""
        for _ in self.segments(ids):
            pass
        return [x for memory, normalizer in self.memory.values() for x in (memory[:, None], normalizer[:, None, :, 0])]
