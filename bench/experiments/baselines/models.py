"""The models that are compared, by name: one small Llama, the same weights, and what each does across segments."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from functools import partial
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn
from transformers import LlamaForCausalLM

from ....infini.huggingface.cache import InfiniCache
from ....infini.huggingface.conversion import convert
from ....rmt.recurrent.memory import RecurrentMemory
from ....runs.errors import SettingError
from ..book.experiment import build as build_llama
from ..book.setup import Setup
from .full_attention import FullAttention
from .lookback import Lookback
from .memorizing import Memorizing
from .replacing import Attention, read, replace
from .transformer_xl import TransformerXL


@dataclass(frozen=True)
class BaselineSetup(Setup):
    """The sizes and the recipe of all models, and the sizes of some.

    cached: tokens in the caches of Transformer-XL and Memorizing Transformers.
    memory_tokens: of RMT.
    stored, neighbours: tokens in the store of Memorizing Transformers, and keys that a query retrieves.
    lr_factors: what `lr` is multiplied by; each model is trained with the product that served it best.
    validation: share of the bytes to train on, their end, that this is judged by.
    """

    MAY_BE_ZERO: ClassVar[tuple[str, ...]] = ("cached",)

    row: int = 256
    steps: int = 300
    held_out: float = 0.05
    cached: int = 16
    memory_tokens: int = 10
    stored: int = 256
    neighbours: int = 16
    lr_factors: tuple[float, ...] = (0.1, 0.3, 1.0)
    validation: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.lr_factors and all(0 < factor < math.inf for factor in self.lr_factors)):
            raise SettingError("lr_factors", f"must be positive and finite, got {list(self.lr_factors)}")
        if not 0 < self.validation < 1:
            raise SettingError("validation", f"must be between 0 and 1, got {self.validation}")

    def check(self, text: Tensor) -> None:
        """Check that the text is long enough, also to choose a learning rate by."""
        super().check(text)
        Setup.check(replace_fields(self, held_out=self.validation, reach=1), text[: self.cut(text)])

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


def _infini(update: str, lookback: int, setup: BaselineSetup, seed: int) -> nn.Module:
    options: dict[str, Any] = {"gate_init": 0.0, "lookback": lookback, "quiet": True}
    return convert(build_llama(setup, "full", seed), setup.segment_len, update, **options)


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
    "lookback": lambda setup, layer: Lookback(setup.segment_len),
    "memorizing": _memorizing,
}
BASELINES = {name: Baseline(partial(_replaced, make), read) for name, make in ATTENTIONS.items()} | {
    "rmt": Baseline(_recurrent, _read_recurrent),
    "linear": Baseline(partial(_infini, "linear", 0), _read_infini),
    "delta": Baseline(partial(_infini, "delta", 0), _read_infini),
    "delta-lookback": Baseline(partial(_infini, "delta", 1), _read_infini),
}
