"""Ways to shard a converted model by FSDP2, for tests."""

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from segattn.infini.huggingface.settings import MEMORY


def shard(model: Any, **options: Any) -> Any:
    """Shard a model layer by layer, and return it."""
    for layer in model.model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def shard_gates_apart(model: Any) -> Any:
    """Shard a model whose gates and maps have another dtype than its other weights, as a group has one dtype."""
    for layer in model.model.layers:
        for name in MEMORY:
            if hasattr(layer.self_attn, name):
                fully_shard(getattr(layer.self_attn, name))
    return shard(model)


def shard_in_float32(model: Any) -> Any:
    """Shard a model in float32, whose layers are gathered in bfloat16."""
    return shard(model.float(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))


# what to do with a model in bfloat16, whose gates are float32
HALF: dict[str, Callable[[Any], Any]] = {"gates apart": shard_gates_apart, "float32 weights": shard_in_float32}
