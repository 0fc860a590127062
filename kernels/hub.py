"""Fused segment attention with a compressive memory: Triton kernels, and the same in PyTorch where there is no GPU.

What a build for Hugging Face's kernels hub exports. `ci/hub` makes one of this module and those that it imports.
"""

from __future__ import annotations

from .attention import segment_attention
from .backends import show_config
from .decoding import segment_decode
from .memory import memory_read, memory_write
from .model_attention import model_attention
from .state import MemoryState, SegmentOutput

# by these two names transformers knows a build that has an attention function of its own
flash_attn_forward = model_attention
supports_flash_attn = True

__all__ = [
    "MemoryState",
    "SegmentOutput",
    "flash_attn_forward",
    "memory_read",
    "memory_write",
    "model_attention",
    "segment_attention",
    "segment_decode",
    "show_config",
    "supports_flash_attn",
]
