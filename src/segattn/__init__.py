"""Fused segment attention in Triton: local attention, a compressive memory, and two architectures built on them."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if Path(__file__).with_name("kernels").is_file():
    raise ImportError(
        "src/segattn/kernels must be a symbolic link to the folder kernels, got a file: this checkout was made without "
        "symbolic links. In it, on Windows with developer mode on, run: git config core.symlinks true; "
        "git checkout -- src/segattn"
    )

if TYPE_CHECKING:
    from .infini.attention import InfiniAttention, InfiniState
    from .infini.gate import parameter_groups
    from .infini.huggingface.cache import InfiniCache
    from .infini.huggingface.conversion import convert, revert
    from .infini.huggingface.parallel import sequence_parallel
    from .infini.huggingface.pieces import backward_in_pieces, loss_in_pieces, read_in_pieces
    from .infini.huggingface.saving import from_pretrained, load_gates, save_gates, save_pretrained
    from .infini.huggingface.static_cache import StaticInfiniCache
    from .infini.loss import mean_loss
    from .infini.sharding import shard_batch
    from .kernels.attention import segment_attention
    from .kernels.backends import show_config
    from .kernels.decoding import segment_decode
    from .kernels.memory import memory_read, memory_write
    from .kernels.sequence_parallel import sequence_parallel_attention
    from .kernels.state import MemoryState, SegmentOutput
    from .rmt.associative.memory import AssociativeMemory
    from .rmt.associative.state import AssociativeState
    from .rmt.recurrent.memory import RecurrentMemory
    from .rmt.recurrent.state import RecurrentState
    from .rmt.saving import load_memory, save_memory
    from .runs.errors import UntrainedMemoryWarning

__version__ = "0.1.0"

# imported at their first use: PyTorch and transformers are slow to import, and the latter may be missing
_MODULES = {
    "AssociativeMemory": "rmt.associative.memory",
    "AssociativeState": "rmt.associative.state",
    "InfiniAttention": "infini.attention",
    "InfiniCache": "infini.huggingface.cache",
    "InfiniState": "infini.attention",
    "MemoryState": "kernels.state",
    "RecurrentMemory": "rmt.recurrent.memory",
    "RecurrentState": "rmt.recurrent.state",
    "SegmentOutput": "kernels.state",
    "StaticInfiniCache": "infini.huggingface.static_cache",
    "UntrainedMemoryWarning": "runs.errors",
    "backward_in_pieces": "infini.huggingface.pieces",
    "convert": "infini.huggingface.conversion",
    "from_pretrained": "infini.huggingface.saving",
    "load_gates": "infini.huggingface.saving",
    "load_memory": "rmt.saving",
    "loss_in_pieces": "infini.huggingface.pieces",
    "mean_loss": "infini.loss",
    "memory_read": "kernels.memory",
    "memory_write": "kernels.memory",
    "parameter_groups": "infini.gate",
    "read_in_pieces": "infini.huggingface.pieces",
    "revert": "infini.huggingface.conversion",
    "save_gates": "infini.huggingface.saving",
    "save_memory": "rmt.saving",
    "save_pretrained": "infini.huggingface.saving",
    "segment_attention": "kernels.attention",
    "segment_decode": "kernels.decoding",
    "sequence_parallel": "infini.huggingface.parallel",
    "sequence_parallel_attention": "kernels.sequence_parallel",
    "shard_batch": "infini.sharding",
    "show_config": "kernels.backends",
}

__all__ = [
    "AssociativeMemory",
    "AssociativeState",
    "InfiniAttention",
    "InfiniCache",
    "InfiniState",
    "MemoryState",
    "RecurrentMemory",
    "RecurrentState",
    "SegmentOutput",
    "StaticInfiniCache",
    "UntrainedMemoryWarning",
    "backward_in_pieces",
    "convert",
    "from_pretrained",
    "load_gates",
    "load_memory",
    "loss_in_pieces",
    "mean_loss",
    "memory_read",
    "memory_write",
    "parameter_groups",
    "read_in_pieces",
    "revert",
    "save_gates",
    "save_memory",
    "save_pretrained",
    "segment_attention",
    "segment_decode",
    "sequence_parallel",
    "sequence_parallel_attention",
    "shard_batch",
    "show_config",
]


def __getattr__(name: str) -> Any:
    module = _MODULES.get(name)
    if module is None:
        raise AttributeError(f"module 'segattn' has no attribute {name!r}")
    try:
        value = globals()[name] = getattr(import_module(f".{module}", __name__), name)
    except ModuleNotFoundError as error:
        if error.name not in ("transformers", "safetensors"):
            raise
        raise ImportError(f"segattn.{name} needs {error.name}: pip install 'segattn[hf]'", name=error.name) from error
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
