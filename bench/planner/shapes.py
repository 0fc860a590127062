"""Sizes of decoders: of named models, of a model's configuration, or as numbers."""

from __future__ import annotations

import os.path
from dataclasses import dataclass, fields
from pathlib import Path

from ...runs.errors import SettingError

# the largest that any size may be: products of all sizes stay within the range of a float
LARGEST = 10**15
EXAMPLE = "layers=12,width=768,heads=12,vocabulary=50272"


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder, with V = K.

    width: of the hidden states, d.
    ff: width of the feed-forward network, with one matrix into it, or two where `gated`.
    embedding_width: of the embeddings where it is not d; there is then a projection at either end. 0: d.
    rotary: queries and keys are rotated by their position, which a memory needs them without.
    """

    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    ff: int
    vocabulary: int
    gated: bool = False
    rotary: bool = False
    embedding_width: int = 0

    @property
    def queries(self) -> int:
        """The width of a row's queries of all heads, H K."""
        return self.heads * self.head_width

    @property
    def keys(self) -> int:
        """The width of a row's keys of all heads, G K, which is that of its values too."""
        return self.kv_heads * self.head_width

    @property
    def into(self) -> int:
        """The width of a row behind the first products of the feed-forward network."""
        return self.ff * (2 if self.gated else 1)

    @property
    def layer_matrices(self) -> int:
        """The number of elements of one layer's matrices: q, k, v and output projections, feed-forward network."""
        return self.width * (2 * self.queries + 2 * self.keys + self.into + self.ff)

    @property
    def projections(self) -> int:
        """The number of elements of the matrices between embeddings and hidden states, at both ends."""
        return 2 * self.width * self.embedding_width

    @property
    def head(self) -> int:
        """The number of elements of the matrix that makes logits."""
        return (self.embedding_width or self.width) * self.vocabulary

    @property
    def matrices(self) -> int:
        """The number of elements of all matrices that rows are multiplied by.

        Embeddings are looked up, biases and norms are small; a head that is tied to the embeddings counts once.
        """
        return self.layers * self.layer_matrices + self.projections + self.head


def _opt(size: str, layers: int, heads: int, width: int, embedding_width: int = 0) -> Shape:
    return Shape(
        f"opt-{size}", layers, width, heads, heads, width // heads, 4 * width, 50272, embedding_width=embedding_width
    )


def _llama(name: str, layers: int, width: int, heads: int, head_width: int, ff: int) -> Shape:
    return Shape(f"llama-{name}", layers, width, heads, 8, head_width, ff, 128256, gated=True, rotary=True)


# arXiv 2205.01068, table 1; the 350M model's embeddings are narrower, as its configuration says
OPT = (
    _opt("125m", 12, 12, 768),
    _opt("350m", 24, 16, 1024, embedding_width=512),
    _opt("1.3b", 24, 32, 2048),
    _opt("2.7b", 32, 32, 2560),
    _opt("6.7b", 32, 32, 4096),
    _opt("13b", 40, 40, 5120),
    _opt("30b", 48, 56, 7168),
    _opt("66b", 64, 72, 9216),
    _opt("175b", 96, 96, 12288),
)
# arXiv 2407.21783, table 3; 1B and 3B by their configurations
LLAMA = (
    _llama("3.2-1b", 16, 2048, 32, 64, 8192),
    _llama("3.2-3b", 28, 3072, 24, 128, 8192),
    _llama("3-8b", 32, 4096, 32, 128, 14336),
    _llama("3.1-8b", 32, 4096, 32, 128, 14336),
    _llama("3-70b", 80, 8192, 64, 128, 28672),
    _llama("3.1-70b", 80, 8192, 64, 128, 28672),
    _llama("3.1-405b", 126, 16384, 128, 128, 53248),
)
SHAPES = {shape.name: shape for shape in (*OPT, *LLAMA)}
SWITCHES = ("gated", "rotary")
NUMBERS = tuple(field.name for field in fields(Shape) if field.name not in ("name", *SWITCHES))
REQUIRED = ("layers", "width", "heads", "vocabulary")


def shape_of(text: str) -> Shape:
    """Return the sizes of a named model, of a model's folder or `config.json`, or of numbers.

    Numbers stand as in "layers=12,width=768,heads=12,vocabulary=50272". Where they are left out, kv_heads is heads,
    head_width is width / heads, ff is 4 width, and `gated` and `rotary`, which are 1 or 0, are 0.

    Raises:
        SettingError: of `shape`.
        ImportError: a configuration needs transformers, which is not installed.
    """
    if text.lower() in SHAPES:
        return SHAPES[text.lower()]
    if os.path.exists(text):
        # PyTorch takes a second to import, and only this needs it
        from .configurations import sizes_of

        return Shape(**sizes_of(Path(text)))
    if "=" in text:
        return _of_numbers(text)
    raise _error(f"one of {', '.join(SHAPES)}, a model's folder or config.json, or numbers such as {EXAMPLE}", text)


def _of_numbers(text: str) -> Shape:
    """Read sizes such as `EXAMPLE`, and fill in those that follow from others."""
    sizes = {}
    for part in text.split(","):
        name, _, number = part.strip().partition("=")
        if name not in (*NUMBERS, *SWITCHES) or not (number.isascii() and number.isdecimal()):
            raise _error(f"numbers of {', '.join((*NUMBERS, *SWITCHES))}, such as layers=12,width=768", text)
        # longer ones are not even read
        if len(number) > len(str(LARGEST)) or int(number) > LARGEST:
            raise SettingError("shape", f"must be numbers of at most {LARGEST:,}; got {name} of {len(number)} digits")
        sizes[name] = int(number)
    if missing := [name for name in REQUIRED if name not in sizes]:
        raise _error(f"numbers with {', '.join(missing)}", text)
    gated, rotary = (sizes.pop(name, 0) for name in SWITCHES)
    if gated > 1 or rotary > 1:
        raise _error("numbers with gated and rotary 0 or 1", text)
    if zero := [name for name, size in sizes.items() if not size and name != "embedding_width"]:
        raise _error(f"numbers with {zero[0]} at least 1", text)
    width, heads = sizes["width"], sizes["heads"]
    if "head_width" not in sizes and width % heads:
        raise _error("sizes with width a multiple of heads, or with head_width", text)
    sizes = {"kv_heads": heads, "head_width": width // heads, "ff": 4 * width} | sizes
    if heads % sizes["kv_heads"]:
        raise _error("sizes with heads a multiple of kv_heads", text)
    return Shape(name=text, gated=bool(gated), rotary=bool(rotary), **sizes)


def _error(wanted: str, got: str) -> SettingError:
    return SettingError("shape", f"must be {wanted}; got {got!r}")
