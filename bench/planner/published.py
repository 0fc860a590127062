"""Published figures, computed anew by the formulas of their papers."""

from __future__ import annotations

from typing import Any, NamedTuple

from .shapes import OPT, Shape

# arXiv 2304.11062, figure 3
SEGMENT_LEN = 512
SEGMENTS = tuple(2**n for n in range(13))
MEMORY = 10
PRINTED = {"opt-125m": 295, "opt-175b": 29}
NOTES = (
    "ratio: F(n · 512) / (n F(512)), F(s) = layers (24 s d² + 4 s² d + 3 H s²) + 2 s d V, forward FLOPs by arXiv "
    "2203.15556, appendix F; arXiv 2304.11062, figure 3",
    "with m memory tokens, before and after each segment: n F(512 + 2 m) below the line",
    "share: Memorizing Transformers' numbers over the model's; the printed shares are of numbers already rounded",
)


def flops(shape: Shape, rows: int) -> int:
    """Count the FLOPs of a forward pass over `rows` tokens (arXiv 2203.15556, appendix F).

    layers (24 s d² + 4 s² d + 3 H s²) + 2 s d V: all s² pairs, the softmax counted, 4 d wide feed-forward networks,
    logits once, no embedding matrix.
    """
    d = shape.width
    layer = 24 * rows * d**2 + 4 * rows**2 * d + 3 * shape.heads * rows**2
    return shape.layers * layer + 2 * rows * d * shape.vocabulary


def saving(shape: Shape, segments: int, memory: int = 0) -> float:
    """Return the FLOPs of full attention over those of as many segments, with `memory` read and write tokens each.

    The published figure has memory 0.
    """
    return flops(shape, segments * SEGMENT_LEN) / (segments * flops(shape, SEGMENT_LEN + 2 * memory))


def savings() -> list[dict[str, Any]]:
    """Return for every model of the figure the ratios by number of segments, without and with memory tokens."""
    return [
        {
            "shape": shape.name,
            "segments": list(SEGMENTS),
            "saving": [saving(shape, n) for n in SEGMENTS],
            "saving_with_memory": [saving(shape, n, MEMORY) for n in SEGMENTS],
            "printed": PRINTED.get(shape.name),
        }
        for shape in OPT
    ]


class Kept(NamedTuple):
    """The numbers that a model keeps of a text.

    share: numbers of Memorizing Transformers over these.
    printed: the paper's numbers, in millions.
    printed_share: the paper's share.
    """

    name: str
    formula: str
    numbers: int
    share: float
    printed: float
    printed_share: float


def memories() -> list[Kept]:
    """Return the memories of the language models of arXiv 2404.07143, table 2, by the formulas of its table 1.

    12 layers of 8 heads of width 128, segments of N = 2048, p = 100 memory vectors for RMT; Memorizing Transformers
    keep 65 K keys and values in one layer, and Transformer-XL's cache in all.
    """
    layers, heads, K, N, p, d = 12, 8, 128, 2048, 100, 1024
    cached = 2 * K * heads * N * layers
    most = 2 * K * heads * 65_000 + cached
    rows = (
        ("Transformer-XL", "(K + V) H N l", cached, 50.0, 3.7),
        ("Memorizing Transformers", "(K + V) H (65 000 + N l)", most, 183.0, 1.0),
        ("RMT", "2 d p l", 2 * d * p * layers, 2.5, 73.0),
        ("Infini-attention", "K (V + 1) H l", K * (K + 1) * heads * layers, 1.6, 114.0),
    )
    return [Kept(name, formula, kept, most / kept, *printed) for name, formula, kept, *printed in rows]
