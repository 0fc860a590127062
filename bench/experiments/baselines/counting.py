"""What each model keeps of a text between two segments: by formula, and by the bytes of the tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ....infini.huggingface.cache import InfiniCache
from ....kernels.state import MemoryState
from ....rmt.recurrent.state import RecurrentState
from ...planner.published import memories
from ...speed.measure import tensors_in
from .models import ATTENTIONS, BASELINES, BaselineSetup
from .replacing import Tokens

FLOAT32 = 4
# of the rows of `memories`
TITLES = ("transformer-xl", "memorizing", "rmt", "linear")
# arXiv 2404.07143, section 4.1, and 65 K stored keys as its table 2 counts them
PAPER = BaselineSetup(
    segment_len=2048, row=65536, width=1024, layers=12, heads=8, cached=2048, stored=65000, memory_tokens=100
)


def formulas(setup: BaselineSetup, length: int) -> dict[str, tuple[str, int]]:
    """Return, for each model, table 1 of arXiv 2404.07143 and the numbers kept of `length` tokens, whole segments.

    It counts for RMT 2 d p l, keys and values of p vectors in each layer, where p d are handed on.
    """
    K, heads, layers = setup.width // setup.heads, setup.heads, setup.layers
    cached, window = (min(length, kept) * layers for kept in (setup.cached, setup.segment_len))
    memory = K * (K + 1) * heads * layers
    both = 2 * K * heads
    return {
        "local": ("0", 0),
        "full": ("(K + V) H T l", both * length * layers),
        "transformer-xl": ("(K + V) H min(T, cached) l", both * cached),
        "lookback": ("(K + V) H min(T, L) l", both * window),
        "memorizing": ("(K + V) H (min(T, stored) + min(T, cached) l)", both * (min(length, setup.stored) + cached)),
        "rmt": ("m d", setup.memory_tokens * setup.width),
        "linear": ("K (V + 1) H l", memory),
        "delta": ("K (V + 1) H l", memory),
        # keys as they are seen, and as they are written once the next segment is whole
        "delta-lookback": ("(K (V + 1) + (2 K + V) min(T, L)) H l", memory + both // 2 * 3 * window),
    }


def formula_bytes(setup: BaselineSetup, name: str, length: int) -> int:
    """Return the float32 bytes kept of `length` tokens, by the formula."""
    return FLOAT32 * formulas(setup, length)[name][1]


def bytes_of(state: Any) -> int:
    """Return the bytes of a state's tensors; of a part of a tensor, the bytes of the whole that it keeps alive."""
    if isinstance(state, InfiniCache):
        state = tuple(x for kept in state.states.values() if kept is not None for x in kept.tensors())
    return sum(x.untyped_storage().nbytes() for x in tensors_in(state))


@torch.no_grad()
def counted_bytes(model: nn.Module, name: str, setup: BaselineSetup, lengths: Sequence[int]) -> dict[int, int]:
    """Return the bytes of the state by length, as a model reads one text in pieces of a training row, or less."""
    model.eval()
    generator = torch.Generator().manual_seed(0)
    state, before, found = None, 0, {}
    for length in sorted(lengths):
        while before < length:
            rows = torch.randint(256, (1, min(setup.row, length - before)), generator=generator, device="cpu")
            _, state = BASELINES[name].read(model, rows, state)
            before += rows.shape[1]
        found[length] = bytes_of(state)
    return found


def at_the_papers_sizes() -> list[dict[str, Any]]:
    """Return table 2 of arXiv 2404.07143: by the formulas of its table 1, and counted in tensors of those shapes.

    fewer: how many times fewer than Memorizing Transformers'. printed, printed_fewer: in the paper, in millions.
    """
    counted = {name: _numbers_at(PAPER, name) for name in TITLES}
    return [
        {
            "name": name,
            "title": kept.name,
            "formula": kept.formula,
            "numbers": kept.numbers,
            "counted": counted[name],
            "fewer": round(kept.share, 2),
            "counted_fewer": round(counted["memorizing"] / counted[name], 2),
            "printed": kept.printed,
            "printed_fewer": kept.printed_share,
        }
        for name, kept in zip(TITLES, memories(), strict=True)
    ]


def _numbers_at(setup: BaselineSetup, name: str) -> int:
    """Return how many numbers the state holds after a row; its tensors have no content."""
    K, device = setup.width // setup.heads, "meta"
    state: Any
    if name == "linear":
        state = tuple(MemoryState.zeros(1, setup.heads, K, K, device=device) for _ in range(setup.layers))
    elif name == "rmt":
        state = RecurrentState(torch.empty(1, setup.memory_tokens, setup.width, device=device))
    else:
        x = torch.empty(1, setup.heads, setup.segment_len, K, device=device)
        angles = torch.empty(1, setup.segment_len, K, device=device)
        tokens, layers = Tokens(x, x, x, 1.0, (angles, angles)), [None] * setup.layers
        attentions = [ATTENTIONS[name](setup, layer) for layer in range(setup.layers)]
        for _ in range(setup.row // setup.segment_len):
            layers = [attention.keep(tokens, kept) for attention, kept in zip(attentions, layers, strict=True)]
        state = tuple(layers)
    return bytes_of(state) // FLOAT32


def parameters(model: nn.Module) -> int:
    """Return how many numbers are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
