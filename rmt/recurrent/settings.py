"""How a recurrent memory is laid around a model."""

from __future__ import annotations

from dataclasses import dataclass

from ...kernels import validation as check
from ..inputs import check_sizes
from .layout import Layout, decoder_layout, encoder_layout

KINDS = ("decoder", "encoder")
MASKS = ("paper", "causal")
ALIGNMENTS = ("left", "right")
LOSSES = ("all", "last")
ATTENTIONS = (None, "segattn")


@dataclass(frozen=True)
class RecurrentSettings:
    """The arguments of `RecurrentMemory`, checked.

    Raises:
        TypeError, ValueError: naming the argument, what it must be, and what it was.
    """

    num_memory_tokens: int
    segment_len: int
    kind: str
    mask: str | None = None
    special_tokens: tuple[int, int] | None = None
    bptt: int | None = None
    alignment: str = "left"
    loss: str | None = None
    attention: str | None = None

    def __post_init__(self) -> None:
        check.check_choice("kind", self.kind, KINDS)
        check_sizes(self.num_memory_tokens, self.segment_len, self.bptt)
        check.check_choice("alignment", self.alignment, ALIGNMENTS)
        object.__setattr__(self, "loss", self.loss or ("all" if self.kind == "decoder" else "last"))
        check.check_choice("loss", self.loss, LOSSES)
        if self.attention not in ATTENTIONS:
            raise ValueError(f"attention must be None or 'segattn', got {self.attention!r}")
        if self.kind == "decoder":
            self._check_decoder()
        else:
            self._check_encoder()

    def _check_decoder(self) -> None:
        object.__setattr__(self, "mask", self.mask or "paper")
        check.check_choice("mask", self.mask, MASKS)
        if self.special_tokens is not None:
            raise ValueError(f"special_tokens are for encoders and must be None, got {self.special_tokens}")

    def _check_encoder(self) -> None:
        if self.mask is not None:
            raise ValueError(f"mask is for decoders and must be None, since an encoder sees all; got {self.mask!r}")
        if self.special_tokens is None:
            return
        if not isinstance(self.special_tokens, (tuple, list)) or len(self.special_tokens) != 2:
            raise TypeError(f"special_tokens must be a pair of ids (first, separator), got {self.special_tokens!r}")
        ids = tuple(check.check_integer("special_tokens", token, 0) for token in self.special_tokens)
        object.__setattr__(self, "special_tokens", ids)

    @property
    def layout(self) -> Layout:
        """The rows of a segment."""
        if self.kind == "decoder":
            return decoder_layout(self.num_memory_tokens)
        return encoder_layout(self.num_memory_tokens, self.special_tokens is not None)

    @property
    def extra_rows(self) -> int:
        """The rows of a segment besides its tokens: memory and special tokens."""
        layout = self.layout
        return layout.before + layout.after
