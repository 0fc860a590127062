"""What the attention of each layer does to queries and keys, read by running it on a few rows of random numbers.

A model is converted because of what it is, not because of its name: every attention runs with its rotary angles and
without any, and the difference tells how they are undone. What else a model does to queries and keys, such as norms,
needs no reading: attention functions get what comes out.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AttentionInterface
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import AttentionMaskInterface

from ...kernels.attention_arguments import with_effect
from ...runs.errors import first_line
from .forward_pass import ARGUMENT
from .inputs import HARMLESS
from .settings import cache_name, layers_of
from .traits import Rotary, RotaryCall, Traits

IMPLEMENTATION = "segattn_probe"
# the angles of the last one are large
ROWS = 16
# arguments of attention functions that a converted layer takes, or makes nothing of
TAKEN = HARMLESS | {"scaling", "dropout", "softcap", "s_aux", "output_attentions", ARGUMENT}
# tokens read, or a position, far behind any segment
FAR = 2**20


class Probe(NamedTuple):
    """Hold what was read of a model.

    layers: the traits of those layers that were asked for, by index.
    learnt: whether positions are added to the embeddings of tokens.
    """

    layers: dict[int, Traits]
    learnt: bool


class _Seen(NamedTuple):
    """The arguments of an attention function: [B, heads, T, ·], and others by name."""

    q: Tensor
    k: Tensor
    v: Tensor
    others: dict[str, Any]


class _Record:
    """Hold calls of an attention function, through which it goes in place of the mask.

    It is no list, of which accelerate would hand each module a copy.
    """

    def __init__(self) -> None:
        self.calls: list[_Seen] = []


class _LongRead(DynamicCache):
    """A cache of many tokens that has none of them."""

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return FAR

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states


class _Attention:
    """An attention, and the arguments that its layer calls it with."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.module = module
        self.names = tuple(inspect.signature(module.forward).parameters)
        self.arguments = dict(zip(self.names, args, strict=False)) | kwargs
        self.hidden: Tensor = self.arguments[self.names[0]]
        generator = torch.Generator("cpu").manual_seed(0)
        rows = torch.randn(self.hidden.shape, generator=generator, device="cpu", dtype=torch.float32)
        self.rows = rows.to(self.hidden)
        self.rotary_call: RotaryCall | None = None
        # vectors as they are before training, such as ones of a norm, would hide what they do once they are trained
        self.trained = {
            name: torch.rand(x.shape, generator=generator, device="cpu").add(0.5).to(x)
            for name, x in module.named_parameters()
            if x.ndim == 1 and x.numel() > 1 and bool((x == x[0]).all())
        }

    @property
    def embeddings(self) -> Any:
        """The rotary embedding: cosine and sine, one complex tensor of both, or None."""
        return self.arguments.get("position_embeddings")

    def __call__(self, rows: Tensor, **changes: Any) -> _Seen:
        """Run the attention on rows [1, T, d], with some of its arguments changed."""
        record = _Record()
        arguments = self.arguments | {self.names[0]: rows, "attention_mask": record} | changes
        functional_call(self.module, self.trained, kwargs=arguments)
        if len(record.calls) != 1:
            self.refuse("call its attention function once in each pass, with the mask of its layer")
        return record.calls[0]

    def plain(self, rows: Tensor, **changes: Any) -> _Seen:
        """Run the attention with rotary angles of 0."""
        embeddings = self.embeddings
        if isinstance(embeddings, Tensor):
            changes["position_embeddings"] = torch.ones_like(embeddings)
        elif embeddings is not None:
            cos, sin = embeddings
            changes["position_embeddings"] = torch.ones_like(cos), torch.zeros_like(sin)
        return self(rows, **changes)

    def refuse(self, must: str) -> NoReturn:
        """Say what the attention must do.

        Raises:
            ValueError: always.
        """
        layer: Any = self.module.layer_idx
        raise ValueError(
            f"layer {layer} cannot be converted: its {type(self.module).__name__} must {must}. Leave it out of layers, "
            "or give the model a segattn.RecurrentMemory, which leaves attention as it is"
        )


@torch.no_grad()
def probe(trunk: Any, attentions: list[Any], layers: tuple[int, ...], period: int | None) -> Probe:
    """Read what is particular to the attention of each layer that is to be converted.

    Args:
        trunk: the module that runs the layers.
        attentions: the attention of every layer.
        layers: those to be converted.
        period: tokens after which positions start again where every layer is converted or positions are learnt; None:
            they run on.

    Raises:
        ValueError: an attention cannot be converted; it is named, with why.
    """
    with _probing(trunk):
        calls = _calls(trunk, attentions)
        if missing := [layer for layer in layers if layer not in calls]:
            raise ValueError(f"model must run all of its layers, got one that runs no attention in layers {missing}")
        first: Tensor = calls[min(calls)].hidden
        # of equal rows, and before any attention
        learnt = not _close(first, first[:, :1].expand_as(first))
        restart = learnt or len(layers) == len(attentions)
        last = period - 1 if period is not None and restart else FAR
        return Probe({layer: _read(calls[layer], last) for layer in layers}, learnt)


@contextmanager
def _probing(trunk: Any) -> Iterator[None]:
    """Let the model run on the attention function below, in evaluation mode."""
    modes, before = [(module, module.training) for module in trunk.modules()], trunk.config._attn_implementation
    trunk.eval()
    trunk.config._attn_implementation = IMPLEMENTATION
    try:
        yield
    finally:
        trunk.config._attn_implementation = before
        for module, mode in modes:
            module.training = mode


def _calls(trunk: Any, attentions: list[Any]) -> dict[int, _Attention]:
    """Run the model on equal rows, and return how its layers call their attention.

    Raises:
        ValueError: the model does not run on embeddings without a mask, its cache holds more than keys and values, or
            arguments of its forward do not reach its layers.
    """
    calls: dict[int, _Attention] = {}

    def note(layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[layer] = _Attention(module, args, kwargs)

    def check(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if ARGUMENT not in kwargs:
            raise ValueError(
                f"model must hand arguments of its forward on to its layers, got {type(trunk).__name__}, which keeps "
                "them: a newer transformers may have one that does"
            )

    rows = min(ROWS, getattr(trunk.config, "max_position_embeddings", ROWS))
    weight = trunk.get_input_embeddings().weight
    embeds = torch.ones(1, rows, weight.shape[1], dtype=weight.dtype, device=weight.device)
    handles = [layer.register_forward_pre_hook(check, with_kwargs=True) for layer in layers_of(trunk)]
    handles += [
        module.register_forward_pre_hook(lambda *call, layer=layer: note(layer, *call), with_kwargs=True)
        for layer, module in enumerate(attentions)
    ]
    try:
        with _rotary_calls(trunk) as rotary:
            trunk(inputs_embeds=embeds, use_cache=False, **{ARGUMENT: None})
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"model must run on inputs_embeds [1, {rows}, {weight.shape[1]}] by an attention function without a mask, "
            f"got {type(trunk).__name__}, whose forward pass then fails: {first_line(error)}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    _check_cache(trunk, embeds)
    for attention in calls.values():
        same = (call for call, embeddings in rotary if _equal(embeddings, attention.embeddings))
        attention.rotary_call = next(same, None)
    return calls


def _check_cache(trunk: Any, embeds: Tensor) -> None:
    """Check that the model keeps nothing but keys and values, as convolutions and recurrent layers do, in its cache.

    Raises:
        ValueError: it keeps something else, which segattn's caches do not.
    """
    try:
        trunk(inputs_embeds=embeds, use_cache=True, **{cache_name(trunk): DynamicCache()}, **{ARGUMENT: None})
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"model must keep keys and values alone in its cache, got {type(trunk).__name__}, which does not run with "
            f"a DynamicCache() ({first_line(error)}): segattn.RecurrentMemory needs no cache"
        ) from error


@contextmanager
def _rotary_calls(trunk: Any) -> Iterator[list[tuple[RotaryCall, Any]]]:
    """Note the calls of modules outside of layers that take positions, and what they return."""
    calls: list[tuple[RotaryCall, Any]] = []

    def note(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        _, *options = inspect.signature(module.forward).bind(*args, **kwargs).arguments.items()
        calls.append((RotaryCall(name, tuple((key, x) for key, x in options if key != "position_ids")), output))

    inside = {module for layer in layers_of(trunk) for module in layer.modules()}
    handles = [
        module.register_forward_hook(lambda *call, name=name: note(name, *call), with_kwargs=True)
        for name, module in trunk.named_modules()
        if name and module not in inside and "position_ids" in inspect.signature(module.forward).parameters
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _equal(x: Any, y: Any) -> bool:
    """Return whether two rotary embeddings are equal."""
    if isinstance(x, tuple) and isinstance(y, tuple):
        return len(x) == len(y) and all(map(_equal, x, y))
    both = isinstance(x, Tensor) and isinstance(y, Tensor)
    return both and x.shape == y.shape and torch.equal(x, y.to(x.device))


def _read(attention: _Attention, last: int) -> Traits:
    """Return the traits of an attention.

    Args:
        attention: how its layer calls it.
        last: the last position that it is to meet.

    Raises:
        ValueError: it has a property that segment attention or its memory cannot honour.
    """
    embeddings = attention.embeddings
    parts = (embeddings,) if isinstance(embeddings, Tensor) else embeddings or ()
    if len(parts) > 2 or any(part.ndim != 3 for part in parts):
        attention.refuse("get one angle for each token and pair of channels, as position_embeddings [B, T, R]")
    turned = attention(attention.rows)
    if others := with_effect(turned.others, TAKEN):
        attention.refuse(f"pass no {', '.join(others)} to its attention function, which segment attention has not")
    sinks = turned.others.get("s_aux")
    if sinks is not None and sinks.shape != turned.q.shape[1:2]:
        attention.refuse(f"have one learnt sink logit (s_aux) for each of its {turned.q.shape[1]} heads")
    _check_positions(attention, last)
    scaling, passed = getattr(attention.module, "scaling", None), turned.others.get("scaling")
    return Traits(
        heads=turned.q.shape[1],
        groups=turned.k.shape[1],
        key_width=turned.k.shape[3],
        value_width=turned.v.shape[3],
        rotary=_rotary(attention, turned),
        query_factor=scaling / passed if isinstance(scaling, float) and passed else 1.0,
        hands_on=ARGUMENT in turned.others,
    )


def _check_positions(attention: _Attention, last: int) -> None:
    """Check that without a rotary embedding equal rows have equal queries and keys, wherever in a text they stand.

    Raises:
        ValueError: they have others.
    """
    equal = attention.rows[:, :1].expand_as(attention.rows)
    wanted = attention.plain(equal)
    changes: dict[str, Any] = {}
    for name, position in (("position_ids", last), ("cache_position", FAR)):
        if isinstance(positions := attention.arguments.get(name), Tensor):
            changes[name] = positions.clone()
            changes[name][..., -1] = position
    changes |= {name: _LongRead() for name in ("past_key_values", "cache") if name in attention.names}
    far = attention.plain(equal, **changes)
    shorter = f"shorten segments to where it begins, below {last}"
    if last == FAR:
        shorter = "convert every layer with lookback=0 and shorten segments to where it begins"
    if not all(_close(x, y[:, :, :1].expand_as(x)) for x, y in ((far.q, wanted.q), (far.k, wanted.k))):
        attention.refuse(
            "make queries and keys that do not depend on the position but for a rotary embedding: turn scaling by it "
            f"off in the configuration (attn_temperature_tuning), or {shorter}"
        )


def _rotary(attention: _Attention, turned: _Seen) -> Rotary | None:
    """Return how queries and keys are rotated, None where they are not.

    Raises:
        ValueError: they are rotated in a way that cannot be undone.
    """
    plain, embeddings = attention.plain(attention.rows), attention.embeddings
    if torch.equal(turned.q, plain.q) and torch.equal(turned.k, plain.k):
        return None
    cos = embeddings.real if isinstance(embeddings, Tensor) else embeddings[0]
    angles, pairs = "all", cos.shape[-1]
    if pairs % 2 == 0 and torch.equal(*cos.chunk(2, dim=-1)):
        angles, pairs = "halves", pairs // 2
    elif pairs % 2 == 0 and torch.equal(cos[..., ::2], cos[..., 1::2]):
        angles, pairs = "neighbours", pairs // 2
    if 2 * pairs <= turned.q.shape[-1]:
        ways = [Rotary(interleaved, last, angles) for interleaved, last in product((False, True), repeat=2)]
        undone = [torch.cat(way.undo(embeddings, turned.q, turned.k), 1) for way in ways]
        wanted = torch.cat((plain.q, plain.k), 1)
        # the best of them, since half precision tells those apart badly that hardly turn the largest channels
        best = min(range(len(ways)), key=lambda way: float((undone[way] - wanted).float().norm()))
        if _close(undone[best], wanted):
            return ways[best]._replace(call=attention.rotary_call)
    return attention.refuse("rotate pairs of channels as its last step: the memory must be free of positions")


def _close(x: Tensor, y: Tensor) -> bool:
    """Return whether two tensors are equal but for rounding."""
    return bool((x - y).abs().max() <= 8 * torch.finfo(y.dtype).eps * y.abs().max())


def _see(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    """Record the call of an attention function, and return zeros."""
    if isinstance(attention_mask, _Record):
        attention_mask.calls.append(_Seen(query, key, value, kwargs))
    batch, heads, time, _ = query.shape
    return query.new_zeros(batch, time, heads, value.shape[-1]), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Return no mask."""


AttentionInterface.register(IMPLEMENTATION, _see)
AttentionMaskInterface.register(IMPLEMENTATION, _no_mask)
