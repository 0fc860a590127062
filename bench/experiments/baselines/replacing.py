"""Another attention in a Llama's layers, and one pass that goes on from a state and leaves the next."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, LlamaForCausalLM
from transformers.masking_utils import AttentionMaskInterface

from ....infini.huggingface.forward import bring_rotary
from ....infini.rotary import unrotate
from ....rmt.recurrent.block_attention import no_mask

IMPLEMENTATION = "segattn_baseline"
ATTRIBUTE = "segattn_baseline"
PASS = "segattn_pass"


class Tokens(NamedTuple):
    """The tokens of one layer: q and k [B, H, T, K] turned by their positions in the sequence, v [B, H, T, V]."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    rotary: tuple[Tensor, Tensor]

    @property
    def plain_q(self) -> Tensor:
        """Return q before rotary embedding."""
        return unrotate(self.q, *self._angles)

    @property
    def plain_k(self) -> Tensor:
        """Return k before rotary embedding."""
        return unrotate(self.k, *self._angles)

    @property
    def _angles(self) -> tuple[Tensor, ...]:
        # both halves of a Llama's are equal
        return tuple(x.chunk(2, dim=-1)[0] for x in self.rotary)


class Attention(nn.Module, ABC):
    """A layer's attention in place of softmax over the whole sequence.

    Its state is a value; None before the first token.
    """

    @abstractmethod
    def attend(self, tokens: Tokens, state: Any) -> Tensor:
        """Return the attention [B, H, T, V] of whole segments."""

    @abstractmethod
    def keep(self, tokens: Tokens, state: Any) -> Any:
        """Return the state after the tokens."""


class ReadState(NamedTuple):
    """The number of tokens read, and the state of every layer."""

    tokens: int
    layers: tuple[Any, ...]


@dataclass(eq=False)
class Pass:
    """One pass over the layers, with the states before and after it, by layer."""

    before: tuple[Any, ...]
    after: dict[int, Any] = field(default_factory=dict)


def replaced_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    scaling: float,
    segattn_rotary: tuple[Tensor, Tensor],
    segattn_pass: Pass | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return a layer's attention as transformers calls it: query, key and value [B, H, T, ·] → [B, T, H, V]."""
    attention: Any = getattr(module, ATTRIBUTE)
    tokens = Tokens(query, key, value, scaling, segattn_rotary)
    state = None
    if segattn_pass is not None:
        layer: Any = module.layer_idx
        state = segattn_pass.before[layer]
        segattn_pass.after[layer] = attention.keep(tokens, state)
    return attention.attend(tokens, state).transpose(1, 2), None


def replace(model: LlamaForCausalLM, make: Callable[[int], Attention]) -> LlamaForCausalLM:
    """Give every layer the attention that `make` returns for its number, on the instance, which is returned."""
    AttentionInterface.register(IMPLEMENTATION, replaced_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, no_mask)
    model.set_attn_implementation(IMPLEMENTATION)
    for number, layer in enumerate(model.model.layers):
        setattr(layer.self_attn, ATTRIBUTE, make(number))
        layer.self_attn.register_forward_pre_hook(bring_rotary, with_kwargs=True)
    return model


def read(model: nn.Module, rows: Tensor, state: ReadState | None) -> tuple[Tensor, ReadState]:
    """Return the logits of rows int64 [B, T], whole segments behind those of the state, and the state after them."""
    layers: Any = model.model.layers  # type: ignore[union-attr]
    state = ReadState(0, (None,) * len(layers)) if state is None else state
    end = state.tokens + rows.shape[1]
    one = Pass(state.layers)
    positions = torch.arange(state.tokens, end, device=rows.device)[None]
    logits = model(rows, position_ids=positions, **{PASS: one}).logits
    return logits, ReadState(end, tuple(one.after[layer] for layer in range(len(layers))))
