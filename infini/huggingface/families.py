"""The Hugging Face model types that can be converted, and how each brings positions and scale to its attention."""

from __future__ import annotations

from typing import NamedTuple


class Family(NamedTuple):
    """What is particular to the attention of a model type.

    rotary: queries and keys arrive rotated, in halves, by the `position_embeddings` passed to their layer.
    positions: name of the configuration entry with the number of learnt positions; None: positions are not learnt.
    scaled_queries: queries arrive multiplied by the layer's `scaling`.
    """

    rotary: bool = True
    positions: str | None = None
    scaled_queries: bool = False


# by `model_type` of the configuration
FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "gemma2": Family(),
    "gemma3_text": Family(),
    "phi3": Family(),
    "gpt_neox": Family(),
    "gpt2": Family(rotary=False, positions="n_positions"),
    "opt": Family(rotary=False, positions="max_position_embeddings", scaled_queries=True),
}
