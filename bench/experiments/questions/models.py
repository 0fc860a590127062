"""The models that are asked, by name: one small Llama, and what it keeps of a text, all called as RMT is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....infini.huggingface.cache import InfiniCache
from ....infini.huggingface.conversion import convert
from ....kernels.state import MemoryState
from ....rmt.associative.memory import AssociativeMemory
from ....rmt.recurrent.memory import RecurrentMemory
from ....rmt.runs.models import small_decoder
from ...speed.measure import tensors_in
from .setup import Setup


@dataclass(frozen=True)
class CachedSettings:
    """Hold what the curriculum sets; the segments of a converted model stay as long as they are."""

    segment_len: int


class Kept:
    """A cache as the state of a text: its tensors, one after another."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    def __iter__(self) -> Iterator[Tensor]:
        if isinstance(self.cache, InfiniCache):
            for kept in self.cache.states.values():
                yield from () if kept is None else kept.tensors()
        else:
            yield from tensors_in(self.cache)

    def select(self, rows: Tensor) -> Kept:
        """Return the state of some rows of the batch, int [b], in this order."""
        self.cache.reorder_cache(rows)
        return self


class CachedOutput(NamedTuple):
    """Hold what a call of a `Cached` returns, as that of a `RecurrentMemory`."""

    loss: Tensor | None
    logits: Tensor | None
    state: Kept | None


class Cached(nn.Module):
    """A causal model and its cache, called as `RecurrentMemory` is; in training it reads whole texts.

    Args:
        stretch: greatest factor by which half of the training texts have their memory multiplied at the end of a
            segment, as if what was read up to there had been read so often: 1 for none.
    """

    def __init__(self, model: nn.Module, segment_len: int, stretch: float = 1.0) -> None:
        super().__init__()
        self.model = model
        self.stretch = stretch
        self.settings = CachedSettings(segment_len)

    def forward(
        self, input_ids: Tensor, labels: Tensor | None = None, state: Kept | None = None, output_logits: bool = True
    ) -> CachedOutput:
        """Read tokens [B, T]; return the loss of the labels [B, T] that count, the logits, and the state after them."""
        model: Any = self.model
        if labels is not None:
            logits = self._training_logits(input_ids)
            return CachedOutput(F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), logits, None)
        keep = {} if output_logits else {"logits_to_keep": 1}
        out = model(input_ids, past_key_values=None if state is None else state.cache, use_cache=True, **keep)
        return CachedOutput(None, out.logits if output_logits else None, Kept(out.past_key_values))

    def _training_logits(self, input_ids: Tensor) -> Tensor:
        """Return the logits [B, T, C]; zeros for the segments before a stretched memory, where no label is."""
        model: Any = self.model
        segments = input_ids.shape[1] // self.settings.segment_len
        if self.stretch == 1 or segments < 2 or torch.rand(()) < 0.5:
            logits: Tensor = model(input_ids, use_cache=False).logits
            return logits
        cut = self.settings.segment_len * int(torch.randint(1, segments, ()))
        cache = InfiniCache(model)
        model(input_ids[:, :cut], past_key_values=cache, use_cache=True, logits_to_keep=1)
        _multiply(cache, self.stretch ** float(torch.rand(())))
        logits = model(input_ids[:, cut:], past_key_values=cache, use_cache=True).logits
        return F.pad(logits, (0, 0, cut, 0))


def _multiply(cache: InfiniCache, factor: float) -> None:
    """Multiply the memory of a cache, which recalls the same, and weighs more beside what is written later."""
    states = {
        layer: kept._replace(memory=MemoryState(*(x * factor for x in kept.memory)))
        for layer, kept in cache.states.items()
        if kept is not None and kept.memory is not None
    }
    cache.commit(cache.rows, states)


def build(setup: Setup, name: str, vocabulary: int) -> nn.Module:
    """Return an untrained model; all have the same weights where they have the same parameters."""
    torch.manual_seed(setup.seed)
    # positions of the segment and RMT's tokens; rotary ones have no end
    return MODELS[name](setup, small_decoder(vocabulary, setup.segment_len + 2 * setup.memory_tokens, setup.sizes))


def _recurrent(setup: Setup, model: Any) -> nn.Module:
    return RecurrentMemory(model, setup.memory_tokens, setup.segment_len, loss="last", noise=setup.noise)


MODELS: dict[str, Callable[[Setup, Any], nn.Module]] = {
    "full": lambda setup, model: Cached(model, setup.segment_len),
    "delta": lambda setup, model: Cached(
        convert(model, setup.segment_len, "delta", gate_init=0.0, quiet=True), setup.segment_len, setup.stretch
    ),
    "rmt": _recurrent,
    "armt": lambda setup, model: AssociativeMemory(model, setup.memory_tokens, setup.segment_len, d_mem=setup.d_mem),
}
