"""Fused segment attention: local attention, a compressive memory, and the architectures that stand on them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .infini.attention import InfiniAttention, InfiniState
from .infini.gate import parameter_groups
from .kernels.associative import memory_read, memory_write
from .kernels.backends import show_config
from .kernels.decoding import segment_decode
from .kernels.operation import segment_attention
from .kernels.state import MemoryState, SegmentOutput

if TYPE_CHECKING:
    from .infini.huggingface.cache import InfiniCache
    from .infini.huggingface.conversion import convert, revert
    from .infini.huggingface.pieces import backward_in_pieces, loss_in_pieces, read_in_pieces
    from .infini.huggingface.saving import from_pretrained, load_gates, save_gates, save_pretrained
    from .infini.huggingface.static_cache import StaticInfiniCache

__version__ = "0.1.0"

# of Hugging Face models: imported when asked for, since they import transformers
_WITH_TRANSFORMERS = {
    "InfiniCache": "huggingface.cache",
    "StaticInfiniCache": "huggingface.static_cache",
    "backward_in_pieces": "huggingface.pieces",
    "convert": "huggingface.conversion",
    "from_pretrained": "huggingface.saving",
    "load_gates": "huggingface.saving",
    "loss_in_pieces": "huggingface.pieces",
    "read_in_pieces": "huggingface.pieces",
    "revert": "huggingface.conversion",
    "save_gates": "huggingface.saving",
    "save_pretrained": "huggingface.saving",
}

__all__ = [
    "InfiniAttention",
    "InfiniCache",
    "InfiniState",
    "MemoryState",
    "SegmentOutput",
    "StaticInfiniCache",
    "backward_in_pieces",
    "convert",
    "from_pretrained",
    "load_gates",
    "loss_in_pieces",
    "memory_read",
    "memory_write",
    "parameter_groups",
    "read_in_pieces",
    "revert",
    "save_gates",
    "save_pretrained",
    "segment_attention",
    "segment_decode",
    "show_config",
]


def __getattr__(name: str) -> Any:
    module = _WITH_TRANSFORMERS.get(name)
    if module is None:
        raise AttributeError(f"module 'segattn' has no attribute {name!r}")
    try:
        return getattr(import_module(f".infini.{module}", __name__), name)
    except ModuleNotFoundError as error:
        if error.name not in ("transformers", "safetensors"):
            raise
        raise ImportError(f"segattn.{name} needs {error.name}: pip install 'segattn[hf]'", name=error.name) from error


def __dir__() -> list[str]:
    return sorted(__all__)
