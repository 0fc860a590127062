"""Hugging Face model types that can be converted, and what is particular to each."""

from __future__ import annotations

from typing import NamedTuple


class Family(NamedTuple):
    """How a model type brings positions and scale to its attention.

    rotary: queries and keys arrive turned, in halves, by the `position_embeddings` given to their layer.
    positions: configuration entry with the number of learnt positions, where there are such.
    scaled_queries: queries arrive multiplied by the layer's `scaling`.
    """

    rotary: bool = True
    positions: str | None = None
    scaled_queries: bool = False


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
