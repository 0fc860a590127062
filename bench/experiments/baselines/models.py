"""The models that are compared, by name: one small Llama, the same weights, and what each does across segments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn
from transformers import LlamaForCausalLM

from ....infini.huggingface.cache import InfiniCache
from ....infini.huggingface.conversion import convert
from ....rmt.recurrent.memory import RecurrentMemory
from ..book.experiment import build as build_llama
from ..book.setup import Setup
from .full_attention import FullAttention
from .memorizing import Memorizing
from .replacing import Attention, read, replace
from .transformer_xl import TransformerXL


@dataclass(frozen=True)
class BaselineSetup(Setup):
    """The sizes and the recipe of all models, and the sizes of some.

    cached: tokens in the caches of Transformer-XL and Memorizing Transformers.
    memory_tokens: of RMT.
    stored, neighbours: tokens in the store of Memorizing Transformers, and keys that a query retrieves.
    """

    MAY_BE_ZERO: ClassVar[tuple[str, ...]] = ("cached",)

    steps: int = 600
    seeds: int = 3
    cached: int = 16
    memory_tokens: int = 10
    stored: int = 512
    neighbours: int = 16

    @property
    def looking_up(self) -> int:
        """The layer of Memorizing Transformers that does, from 0: three quarters up, as the ninth of the paper's 12."""
        return -(-3 * self.layers // 4) - 1


class Baseline(NamedTuple):
    """One model that is compared.

    build: From a setup and a seed to an untrained model.
    read: From rows and the state before them to the logits and the state after.
    """

    build: Callable[[BaselineSetup, int], nn.Module]
    read: Callable[[Any, Tensor, Any], tuple[Tensor, Any]]


def build(setup: BaselineSetup, name: str, seed: int) -> nn.Module:
    """Return an untrained model; of one seed all have the same weights where they have the same parameters."""
    return BASELINES[name].build(setup, seed)


def _replaced(make: Callable[[BaselineSetup, int], Attention], setup: BaselineSetup, seed: int) -> nn.Module:
    return replace(build_llama(setup, "full", seed), partial(make, setup))


def _memorizing(setup: BaselineSetup, layer: int) -> Attention:
    if layer != setup.looking_up:
        return TransformerXL(setup.segment_len, setup.cached)
    return Memorizing(setup.segment_len, setup.cached, setup.heads, setup.stored, setup.neighbours)


def _recurrent(setup: BaselineSetup, seed: int) -> nn.Module:
    model: LlamaForCausalLM = build_llama(setup, "full", seed)
    return RecurrentMemory(model, setup.memory_tokens, setup.segment_len, attention="segattn")


def _infini(update: str, setup: BaselineSetup, seed: int) -> nn.Module:
    return convert(build_llama(setup, "full", seed), setup.segment_len, update, gate_init=0.0, quiet=True)


def _read_recurrent(model: RecurrentMemory, rows: Tensor, state: Any) -> tuple[Tensor, Any]:
    out = model(rows, state=state)
    return out.logits, out.state


def _read_infini(model: LlamaForCausalLM, rows: Tensor, state: InfiniCache | None) -> tuple[Tensor, InfiniCache]:
    cache = InfiniCache(model) if state is None else state.copy()
    return model(rows, past_key_values=cache, use_cache=True).logits, cache


# layer by layer in a Llama
ATTENTIONS: dict[str, Callable[[BaselineSetup, int], Attention]] = {
    "local": lambda setup, layer: TransformerXL(setup.segment_len, 0),
    "full": lambda setup, layer: FullAttention(),
    "transformer-xl": lambda setup, layer: TransformerXL(setup.segment_len, setup.cached),
    "memorizing": _memorizing,
}
BASELINES = {name: Baseline(partial(_replaced, make), read) for name, make in ATTENTIONS.items()} | {
    "rmt": Baseline(_recurrent, _read_recurrent),
    "linear": Baseline(partial(_infini, "linear"), _read_infini),
    "delta": Baseline(partial(_infini, "delta"), _read_infini),
}
