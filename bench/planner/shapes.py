"""Sizes of decoders: named models, or numbers."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ...runs.checkpoint import SettingError

# of any size: the products of all stay within what a float holds
LARGEST = 10**15


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes; V = K.

    width: of the hidden states, d. ff: of the feed-forward network, with one matrix into it, or two where `gated`.
    embedding_width: where it is not d, the model has a projection at either end.
    rotary: positions are turned into queries and keys, which a memory wants without them.
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
        """Numbers of a row's queries, H K."""
        return self.heads * self.head_width

    @property
    def keys(self) -> int:
        """Numbers of a row's keys, G K; its values are as many."""
        return self.kv_heads * self.head_width

    @property
    def into(self) -> int:
        """Numbers that a row enters the feed-forward network with."""
        return self.ff * (2 if self.gated else 1)

    @property
    def layer_matrices(self) -> int:
        """Elements of one layer's matrices: q, k, v and output projections, feed-forward network."""
        return self.width * (2 * self.queries + 2 * self.keys + self.into + self.ff)

    @property
    def projections(self) -> int:
        """Elements of the matrices between embeddings and hidden states, at both ends."""
        return 2 * self.width * self.embedding_width

    @property
    def head(self) -> int:
        """Elements of the matrix that makes logits."""
        return (self.embedding_width or self.width) * self.vocabulary

    @property
    def matrices(self) -> int:
        """Elements of all matrices that rows are multiplied by. Embeddings are looked up, biases and norms small."""
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
NUMBERS = tuple(field.name for field in fields(Shape) if field.name not in ("name", "gated", "rotary"))


def shape_of(given: str) -> Shape:
    """A named model, or numbers as "layers=12,width=768,heads=12,vocabulary=50272".

    Of the numbers, kv_heads is heads where not given, head_width is width / heads, and ff is 4 width. `gated` and
    `rotary` are 1 or 0, default 0.

    Raises:
        SettingError: of `shape`.
    """
    if "=" not in given:
        if given.lower() in SHAPES:
            return SHAPES[given.lower()]
        raise _error(f"one of {', '.join(SHAPES)}, or numbers as layers=12,width=768,heads=12,vocabulary=50272", given)
    numbers = _numbers(given)
    if missing := [name for name in ("layers", "width", "heads", "vocabulary") if name not in numbers]:
        raise _error(f"numbers with {', '.join(missing)}", given)
    gated, rotary = numbers.pop("gated", 0), numbers.pop("rotary", 0)
    if gated > 1 or rotary > 1:
        raise _error("numbers with gated and rotary 0 or 1", given)
    if zero := [name for name, number in numbers.items() if not number and name != "embedding_width"]:
        raise _error(f"numbers with {zero[0]} at least 1", given)
    width, heads = numbers["width"], numbers["heads"]
    if "head_width" not in numbers and width % heads:
        raise _error("numbers with width a multiple of heads, or with head_width", given)
    default = {"kv_heads": heads, "head_width": width // heads, "ff": 4 * width}
    numbers = default | numbers
    if heads % numbers["kv_heads"]:
        raise _error("numbers with heads a multiple of kv_heads", given)
    return Shape(name=given, gated=bool(gated), rotary=bool(rotary), **numbers)


def _numbers(given: str) -> dict[str, int]:
    known = (*NUMBERS, "gated", "rotary")
    numbers = {}
    for part in given.split(","):
        name, _, number = part.strip().partition("=")
        if name not in known or not (number.isascii() and number.isdecimal()):
            raise _error(f"numbers of {', '.join(known)}, as layers=12,width=768", given)
        # so many digits are not even read
        if len(number) > len(str(LARGEST)) or int(number) > LARGEST:
            raise SettingError("shape", f"must be numbers of at most {LARGEST:,}; got {name} of {len(number)} digits")
        numbers[name] = int(number)
    return numbers


def _error(wanted: str, given: str) -> SettingError:
    return SettingError("shape", f"must be {wanted}; got {given!r}")
