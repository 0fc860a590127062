"""Ways to write text behind a long one: ours, the peer, and a Llama that keeps all keys and values.

Ours keeps one segment's keys and values; the peer keeps none, and runs the segment again for each token.

All have read a text of whole segments before; what is timed is reading the half of another segment, and one segment's
worth of new tokens, the likeliest each time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .associative_loop import AssociativeLoop
from .measure import kept_bytes
from .recurrent import PEER
from .recurrent_models import (
    VOCABULARY,
    Sizes,
    associative,
    first_memory,
    llama,
    peer_transformer,
    plain_llama,
    plain_peer,
    recurrent,
)

# the threshold of the peer's sampling that leaves one token to choose from
GREEDY = 1 - 0.5 / VOCABULARY
TOLERANCE = 1e-4


class Writer(NamedTuple):
    """A model that has read a text, and goes on with it.

    write: Returns the new tokens [B, n], the same at every call.
    kept_bytes: Of the text: memory, or keys and values.
    """

    write: Callable[[], Tensor]
    kept_bytes: int


# from sizes, a text [B, S · L], the open segment behind it [B, n], and how many tokens to write
Make = Callable[[Sizes, Tensor, Tensor, int], Writer]
Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Entry:
    """One way to write, beside its definition.

    definition: Returns the logits [B, T, vocabulary] of a text from the same weights, read at once.
    """

    make: Make
    definition: Callable[[Sizes, torch.device], Logits]


def ours(make: Callable[[Sizes, torch.device], Any], sizes: Sizes, text: Tensor, opened: Tensor, count: int) -> Writer:
    """Return ours with a memory, which `make` builds."""
    module = make(sizes, text.device).eval()
    with torch.no_grad():
        state = module(text, output_logits=False).state
    write = functools.partial(module.generate, opened, max_new_tokens=count, state=state, eos_token_id=None)
    return Writer(write, kept_bytes(state))


def peer(sizes: Sizes, text: Tensor, opened: Tensor, count: int) -> Writer:
    """Return the peer, which runs the segment again for each token."""
    from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformerWrapper

    wrapper = RecurrentMemoryTransformerWrapper(peer_transformer(sizes, text.device)).eval()
    with torch.no_grad():
        memory = wrapper(text, memories=first_memory(sizes, text.device))[1]
    length = opened.shape[1] + count

    def write() -> Tensor:
        new: Tensor = wrapper.generate(opened, length=length, memories=memory, filter_thres=GREEDY)
        return new

    return Writer(write, kept_bytes(memory))


def full(sizes: Sizes, text: Tensor, opened: Tensor, count: int) -> Writer:
    """Return a Llama that attends to the whole text, its keys and values in transformers' `DynamicCache`."""
    from transformers import DynamicCache

    length = text.shape[1]
    model: Any = llama(sizes, text.device).eval()
    cache: Any = DynamicCache(config=model.config)
    with torch.no_grad():
        for piece in text.split(8 * sizes.L, 1):
            model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
    kept = kept_bytes(cache)

    @torch.no_grad()
    def write() -> Tensor:
        if added := cache.get_seq_length() - length:
            # what an earlier call has added
            cache.crop(-added)
        ids, new = opened, []
        for _ in range(count):
            logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            ids = logits[:, -1:].argmax(-1)
            new.append(ids)
        return torch.cat(new, 1)

    return Writer(write, kept)


def full_logits(sizes: Sizes, device: torch.device) -> Logits:
    """Return the logits of a Llama that reads a text at once."""
    model = llama(sizes, device).eval()
    return lambda ids: cast(Tensor, model(ids).logits)


BASELINE = "Llama, all keys and values"
WRITERS: Mapping[str, Entry] = {
    BASELINE: Entry(full, full_logits),
    "segattn": Entry(functools.partial(ours, recurrent), lambda sizes, device: plain_llama(sizes, device).logits),
    "segattn, associative": Entry(
        functools.partial(ours, associative), lambda sizes, device: AssociativeLoop(associative(sizes, device)).logits
    ),
    PEER: Entry(peer, lambda sizes, device: plain_peer(sizes, device).logits),
}


def texts(sizes: Sizes, segments: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return as many whole segments [B, S · L], and the half of another."""
    whole, half = segments * sizes.L, max(1, sizes.L // 2)
    text, opened = sizes.ids(device, whole + half).split([whole, half], 1)
    return text, opened


@torch.no_grad()
def check(definition: Logits, text: Tensor, opened: Tensor, new: Tensor) -> float:
    """Return how far a chosen token's logit lies below the best of its place, at most, in deviations of logits.

    The definition reads all that was written at once.
    """
    logits = definition(torch.cat((text, opened, new), 1))[:, -new.shape[1] - 1 : -1]
    below = logits.amax(-1) - logits.gather(-1, new.unsqueeze(-1)).squeeze(-1)
    return float(below.max() / logits.std())
