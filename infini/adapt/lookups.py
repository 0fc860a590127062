"""What full attention looks up far back in passkey prompts, recorded in passes of a frozen model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..evaluate.loading import Tokenizer
from ..evaluate.passkey import STATEMENT, TASK, PasskeyText
from ..huggingface.settings import conversion_of, trunk_of
from ..huggingface.watching import AttentionCall, watched

# prompts that a pass reads side by side
BATCH = 8
# rows of each prompt that do not ask for anything, which the memory must not disturb
OTHER_ROWS = 64


class Prompts(NamedTuple):
    """Passkey prompts of one length; the last `asking` rows of each are those that predict the answer.

    tokens: int64 [N, T], with the answer but for its last token.
    answers: int64 [N, asking].
    stated: bool [N, T], where the passkey is stated, before the window of all rows that ask.
    keys: bool [N, T], the passkey's tokens in its statement.
    filler: bool [N, T], what a longer prompt has more of.
    """

    tokens: Tensor
    answers: Tensor
    stated: Tensor
    keys: Tensor
    filler: Tensor

    @property
    def asking(self) -> int:
        """The number of rows that ask."""
        return self.answers.shape[1]

    @property
    def answered(self) -> Tensor:
        """The statement's tokens that each row that asks has to answer with, bool [N, asking, T]."""
        return self.stated[:, None] & (self.tokens[:, None] == self.answers[:, :, None])

    def first(self, count: int) -> Prompts:
        """Return the first of the prompts."""
        return Prompts(*(x[:count] for x in self))


class Lookups(NamedTuple):
    """Hold what heads of one layer look up in full attention, and what a memory has to recall it from.

    heads: the A heads; groups: for each, its place among the key/value heads of k and v, of which there are G.
    rows: int64 [N, R], those recorded, the ones that ask first.
    q, k, v: [N, A, R, K], [N, G, T, K] and [N, G, T, V], before rotary embedding.
    window, full: [N, A, R, V], the outputs of the window alone and of full attention.
    wanted: [N, A, asking, T], the weights of full attention, on the statements alone.
    """

    heads: list[int]
    groups: list[int]
    rows: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    window: Tensor
    full: Tensor
    wanted: Tensor


def least_length(tokenizer: Tokenizer, segment_len: int, lookback: int) -> int:
    """Return the least number of tokens of a prompt: the text of a passkey in whole segments, a window, and two rows.

    The rows are the first that asks and the one before, both with the segments before the window in their memory.
    """
    return (-(-PasskeyText(tokenizer).shortest // segment_len) + lookback) * segment_len + 2


def make_prompts(tokenizer: Tokenizer, count: int, length: int, segment_len: int, lookback: int, seed: int) -> Prompts:
    """Draw prompts whose answers have one number of tokens, each statement where the rows that ask have it in memory.

    Raises:
        ValueError: naming length, too short for that.
    """
    task, generator = PasskeyText(tokenizer), torch.Generator().manual_seed(seed)
    begin = len(tokenizer.prefix) + len(tokenizer.encode(TASK + "\n"))
    least = least_length(tokenizer, segment_len, lookback)
    if length < least:
        raise ValueError(f"length must be at least {least}, for statements beyond the window, got {length}")
    behind = (length // segment_len - lookback) * segment_len
    tokens: list[list[int]] = []
    answers: list[list[int]] = []
    stated = torch.zeros(count, length, dtype=torch.bool, device="cpu")
    while len(tokens) < count:
        depth = float(torch.rand((), generator=generator, dtype=torch.float32, device="cpu"))
        prompt = task.prompt(length, depth * (behind - task.shortest) / length, generator)
        if answers and len(prompt.answer) != len(answers[0]):
            continue
        statement = tokenizer.encode(f"\n{STATEMENT.format(key=tokenizer.decode(prompt.answer).strip())}\n")
        stated[len(tokens), prompt.start : prompt.start + len(statement)] = True
        tokens.append([*prompt.tokens, *prompt.answer[:-1]])
        answers.append(prompt.answer)
    stated = torch.nn.functional.pad(stated, (0, len(answers[0]) - 1))
    asked, of_answers = torch.tensor(tokens, device="cpu"), torch.tensor(answers, device="cpu")
    keys = stated & (asked.unsqueeze(2) == of_answers.unsqueeze(1)).any(2)
    filler = ~stated & (torch.arange(stated.shape[1], device="cpu") >= begin)
    return Prompts(asked, of_answers, stated, keys, filler)


def looked_up(
    model: Any,
    prompts: Prompts,
    wanted: Tensor,
    full: Collection[int],
    on_prompts: Callable[[int], None] = lambda count: None,
) -> dict[int, Tensor]:
    """Return how much of its attention each head [H] gives to some tokens, over the rows that ask, by layer.

    Args:
        model: converted, and `without_memory`: its gates are closed.
        wanted: these tokens for each row, bool [N, asking, T], or for all rows, [N, 1, T].
        full: layers in full attention, whose heads are returned; the others see their window alone.
        on_prompts: called with the number of prompts of each pass.
    """
    shares: dict[int, list[Tensor]] = {layer: [] for layer in full}

    def watch(call: AttentionCall, batch: slice) -> Tensor:
        if call.layer not in shares:
            return call.segmented()
        weights = attention_weights(call, _asking(prompts, batch).to(call.q.device))
        shares[call.layer].append((weights * wanted[batch, None].to(weights.device)).sum(-1).mean(2))
        return call.full()

    _pass(model, prompts, watch, max(full), on_prompts)
    return {layer: torch.cat(parts).mean(0) for layer, parts in shares.items()}


def record(
    model: Any,
    prompts: Prompts,
    heads: Mapping[int, list[int]],
    seed: int,
    on_prompts: Callable[[int], None] = lambda count: None,
) -> dict[int, Lookups]:
    """Return what these heads look up, by layer; those layers are in full attention, the others see their window.

    Args:
        seed: of the rows that do not ask.
        on_prompts: called with the number of prompts of each pass.
    """
    conversion = conversion_of(model)
    settings, time = conversion.settings, prompts.tokens.shape[1]
    generator = torch.Generator().manual_seed(seed)
    others = torch.randint(
        settings.window, time - prompts.asking, (len(prompts.tokens), OTHER_ROWS), generator=generator, device="cpu"
    )
    rows = torch.cat([_asking(prompts, slice(None)), others], dim=1)
    parts: dict[int, list[Lookups]] = {layer: [] for layer in heads}

    def watch(call: AttentionCall, batch: slice) -> Tensor:
        window = call.segmented()
        if call.layer not in heads:
            return window
        full, chosen = call.full(), heads[call.layer]
        traits = conversion.traits[call.layer]
        q, k = traits.without_positions(call.q, call.k, call.rotary)
        of_heads = [head // (traits.heads // traits.groups) for head in chosen]
        kept = sorted({*of_heads})
        each = rows[batch].to(q.device)
        index = each[:, None, :, None]
        asked_by, alone, whole = (x[:, chosen].take_along_dim(index, 2).float() for x in (q, window, full))
        wanted = attention_weights(call, each[:, : prompts.asking])[:, chosen] * prompts.stated[batch, None, None].to(
            q.device
        )
        groups = [kept.index(group) for group in of_heads]
        k, v = k[:, kept].float(), call.v[:, kept].float()
        parts[call.layer].append(Lookups(chosen, groups, each, asked_by, k, v, alone, whole, wanted))
        return full

    _pass(model, prompts, watch, max(heads), on_prompts)
    return {layer: _joined(each) for layer, each in parts.items()}


def choose(shares: Mapping[int, Tensor], least: float) -> dict[int, list[int]]:
    """Return the heads of each layer that give at least that share of their attention, where there are any."""
    heads = {layer: (share >= least).nonzero().flatten().tolist() for layer, share in shares.items()}
    return {layer: chosen for layer, chosen in heads.items() if chosen}


class _SeenError(Exception):
    """The end of a pass at the last layer that is watched."""


def _pass(
    model: Any, prompts: Prompts, watch: Callable[..., Tensor], last: int, on_prompts: Callable[[int], None]
) -> None:
    """Read the prompts up to the attention of the layer `last`."""

    def watch_to_last(call: AttentionCall, batch: slice) -> Tensor:
        out = watch(call, batch)
        if call.layer == last:
            raise _SeenError
        return out

    for begin in range(0, len(prompts.tokens), BATCH):
        batch = slice(begin, begin + BATCH)
        tokens = prompts.tokens[batch].to(model.device)
        with torch.no_grad(), watched(model, partial(watch_to_last, batch=batch)), suppress(_SeenError):
            trunk_of(model)(input_ids=tokens, use_cache=False)
        on_prompts(len(tokens))


def _asking(prompts: Prompts, batch: slice) -> Tensor:
    """Return the rows [B, asking] that ask."""
    count, time = prompts.tokens[batch].shape
    return torch.arange(time - prompts.asking, time, device="cpu").expand(count, -1)


def attention_weights(call: AttentionCall, rows: Tensor) -> Tensor:
    """Return the weights [B, H, R, T] by which the rows [B, R] attend in full attention."""
    k = call.k.repeat_interleave(call.q.shape[1] // call.k.shape[1], dim=1)
    scores = (call.q.take_along_dim(rows[:, None, :, None], 2) @ k.mT).float()
    scores = scores * (call.q.shape[3] ** -0.5 if call.scale is None else call.scale)
    if call.softcap:
        scores = call.softcap * (scores / call.softcap).tanh()
    time = scores.shape[3]
    future = torch.arange(time, device=rows.device) > rows[:, None, :, None]
    scores = scores.masked_fill(future, -torch.inf)
    if call.sink_logits is not None:
        sinks = call.sink_logits.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], dim=3)
    return scores.softmax(dim=3)[..., :time]


def _joined(parts: list[Lookups]) -> Lookups:
    """Return the lookups of all batches together."""
    heads, groups = parts[0][:2]
    return Lookups(heads, groups, *(torch.cat(each) for each in zip(*(part[2:] for part in parts), strict=True)))
