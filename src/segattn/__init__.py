"""Fused segment attention: local attention, a compressive memory, and the architectures that stand on them."""

from .infini.attention import InfiniAttention, InfiniState
from .infini.gate import parameter_groups
from .kernels.associative import memory_read, memory_write
from .kernels.backends import show_config
from .kernels.decoding import segment_decode
from .kernels.operation import segment_attention
from .kernels.state import MemoryState, SegmentOutput

__version__ = "0.1.0"

__all__ = [
    "InfiniAttention",
    "InfiniState",
    "MemoryState",
    "SegmentOutput",
    "memory_read",
    "memory_write",
    "parameter_groups",
    "segment_attention",
    "segment_decode",
    "show_config",
]
