"""Rounds of passkey prompts: the adapted model is to answer them, with a memory written anew at each step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.memory import memory_write
from ...kernels.state import MemoryState
from ...kernels.validation import state_dtype
from ..evaluate.loading import Loaded
from ..evaluate.passkey import QUESTION
from ..huggingface.cache import InfiniCache
from ..huggingface.settings import MAP_K, attentions_of, conversion_of, trunk_of
from .lookups import Prompts, least_length, make_prompts
from .rounds import Step
from .settings import Adaptation, Passkeys

# of a round: its prompts, how often each is asked, and how many are asked in one step
PROMPTS, PASSES, BATCH = 64, 6, 16


class Round(NamedTuple):
    """The figures of a round, on prompts that were not trained on before: of the first time that each is asked.

    loss: nats of a token of the answer.
    digits, keys: shares of the answer's tokens, and of whole answers, that are the likeliest.
    """

    loss: float
    digits: float
    keys: float


class Prefixes(NamedTuple):
    """Hold prompts as they are read up to their questions, without gradients.

    asked: int64 [N, R], the tokens from the question on.
    cache: behind the tokens before.
    written: for each layer with a memory, the keys before rotary embedding [N, G, T, K] and the values [N, G, T, V]
        of the tokens that it holds, which are the prompt's first T.
    """

    prompts: Prompts
    asked: Tensor
    cache: InfiniCache
    written: dict[int, tuple[Tensor, Tensor]]


def read_prefixes(model: Any, prompts: Prompts, question: int) -> Prefixes:
    """Read prompts up to their questions, of which there are `question` tokens before the answer's first.

    Args:
        model: converted with a lookback, so that the tail of its cache has a whole segment.
    """
    settings = conversion_of(model).settings
    size, time = settings.segment_len, prompts.tokens.shape[1] - prompts.asking + 1 - question
    kept: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in settings.memory_layers}
    cache = InfiniCache(model)
    # prompts that begin alike, which are read as one until they differ: for each, its place among those that are read
    alike = torch.zeros(len(prompts.tokens), dtype=torch.long, device="cpu")
    with torch.no_grad():
        for begin in range(0, time, size):
            end, before = min(begin + size, time), alike
            _, alike = torch.unique(prompts.tokens[:, :end], dim=0, return_inverse=True)
            # of each that is read, one of the prompts that begin so
            rows = torch.empty(int(alike.max()) + 1, dtype=torch.long, device="cpu")
            rows[alike] = torch.arange(len(alike), device="cpu")
            if begin:
                cache.batch_select_indices(before[rows])
            part = prompts.tokens[rows, begin:end].to(model.device)
            trunk_of(model)(input_ids=part, past_key_values=cache, use_cache=True)
            for layer, parts in kept.items():
                state = cache.layers[layer].state
                # the segment is the last of the tail
                k, v = (x[alike.to(x.device), :, begin - end :] for x in (state.memory_keys, state.values))
                parts.append((k, v))
        cache.batch_select_indices(alike)
    folded = (time // size - settings.lookback) * size
    written = {}
    for layer, parts in kept.items():
        k, v = (torch.cat(each, dim=2)[:, :, :folded] for each in zip(*parts, strict=True))
        written[layer] = k, v
    return Prefixes(prompts, prompts.tokens[:, time:].to(model.device), cache, written)


def answer_logits(model: Any, prefixes: Prefixes, rows: Tensor, times: Tensor) -> Tensor:
    """Return the logits [B, asking, vocabulary] of the answers to some prompts, with gradients to maps and gates.

    The memory is written anew. What the tokens before the question are at each layer stays as it was when they were
    read: that lower layers' memories take part in it has no gradient.

    Args:
        rows: indices of the prompts, [B].
        times: the filler before the question is counted so many times, [B].
    """
    prompts, cache, attentions = prefixes.prompts, prefixes.cache.copy(), attentions_of(trunk_of(model))
    settings = conversion_of(model).settings
    cache.batch_select_indices(rows)
    for layer, (k, v) in prefixes.written.items():
        index, filler = rows.to(k.device), prompts.filler[rows, : k.shape[2]]
        counts = torch.where(filler, times[:, None], 1.0).to(k.device)
        keys = getattr(attentions[layer], MAP_K, nn.Identity())(k[index])
        dtype = state_dtype(v)
        features = F.elu(keys.to(dtype)) + 1
        memory = write_counted(features, v[index].to(dtype), counts.to(dtype), settings.segment_len, settings.update)
        cache.layers[layer].state = cache.layers[layer].state._replace(memory=memory)
    asked = prefixes.asked[rows.to(prefixes.asked.device)]
    # as indices, since what a slice leaves is no matrix, and slow to multiply by the vocabulary
    rows_asking = torch.arange(asked.shape[1] - prompts.asking, asked.shape[1], device=asked.device)
    output = model(asked, past_key_values=cache, use_cache=True, logits_to_keep=rows_asking)
    logits: Tensor = output.logits
    return logits.float()


def write_counted(features: Tensor, v: Tensor, counts: Tensor, segment_len: int, update: str) -> MemoryState:
    """Return the memory that holds some tokens, written one segment after another, each token counted so many times.

    M takes c σ(k)ᵀ (v − v̄) and z takes c σ(k) of a token that counts c times. By the delta rule v̄, what the memory
    returns, comes to rest in a long text, since it depends on the proportions in M and z alone. In the first filler it
    has not: 0, then v, then about half of v for good. So a segment's repetitions are written in two halves.

    Args:
        features: σ(k), [B, G, T, K].
        v: [B, G, T, V].
        counts: [B, T], at least 1.
        update: "delta" or "linear".
    """
    batch, groups, _, width = features.shape
    memory = MemoryState.zeros(batch, groups, width, v.shape[3], device=v.device, dtype=features.dtype)
    segments = (x.split(segment_len, dim=2) for x in (features, v, counts[:, None, :, None]))
    for keys, values, times in zip(*segments, strict=True):
        for share in ((times + 1) / 2, (times - 1) / 2):
            # features that are c times as large return the same v̄, and are written c times as strongly
            memory = memory_write(share * keys, values, memory, update=update, feature_map=None)
    return memory


class PasskeyRounds:
    """Give the loss of passkeys' answers, in nats a token: each round has new prompts, which are asked several times.

    Args:
        loaded: a converted model.
    """

    def __init__(self, loaded: Loaded, adaptation: Adaptation, passkeys: Passkeys) -> None:
        self.loaded, self.adaptation, self.passkeys = loaded, adaptation, passkeys

    @property
    def steps(self) -> int:
        """The number of steps of a round."""
        return PASSES * math.ceil(PROMPTS / BATCH)

    def losses(self, generator: torch.Generator) -> Iterator[Step]:
        """Yield the losses of batches of prompts, and which tokens of their answers are right."""
        with torch.no_grad():
            prefixes = _new_prompts(self.loaded, self.adaptation, self.passkeys, generator)
        for _ in range(PASSES):
            for rows in torch.randperm(PROMPTS, generator=generator, device="cpu").split(BATCH):
                times = torch.rand(len(rows), generator=generator, dtype=torch.float32, device="cpu")
                logits = answer_logits(self.loaded.model, prefixes, rows, self.passkeys.stretch**times)
                answers = prefixes.prompts.answers[rows].to(logits.device)
                right = logits.detach().argmax(-1) == answers
                yield Step(F.cross_entropy(logits.flatten(0, 1), answers.flatten()), right)

    def figures(self, losses: Sequence[float], rest: Sequence[Tensor]) -> dict[str, float]:
        """Return the figures of the first time that each prompt is asked."""
        count = self.steps // PASSES
        right = torch.cat([*rest[:count]]).float()
        return Round(fmean(losses[:count]), right.mean().item(), right.amin(1).mean().item())._asdict()

    def said(self, figures: Mapping[str, float]) -> str:
        """Return the shares of digits and keys in words."""
        return f"{100 * figures['digits']:.0f} % of digits, {100 * figures['keys']:.0f} % of keys"


def _new_prompts(loaded: Loaded, adaptation: Adaptation, passkeys: Passkeys, generator: torch.Generator) -> Prefixes:
    """Draw the prompts of a round, all of one length, and read them.

    The length is between two thirds and all of `prompt_tokens`, and no less than prompts must have.
    """
    longest = passkeys.prompt_tokens
    shortest = max(2 * longest // 3, least_length(loaded.tokenizer, adaptation.segment_len, adaptation.lookback))
    length = int(torch.randint(shortest, longest + 1, (), generator=generator, device="cpu"))
    seed = int(torch.randint(2**31, (), generator=generator, device="cpu"))
    prompts = make_prompts(loaded.tokenizer, PROMPTS, length, adaptation.segment_len, adaptation.lookback, seed)
    return read_prefixes(loaded.model, prompts, len(loaded.tokenizer.encode("\n" + QUESTION)))
