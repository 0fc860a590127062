"""A text as models take it, checked alike wherever one is read: token ids or embeddings, a padding mask, labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .autocast import autocast_holds
from .validation import check_floating, check_ids, check_shape

MASK_OF_PADDING_ID = (
    "A mask made by pad_token_id, as generate makes one, takes it for padding in a prompt that holds pad_token_id: "
    "pass it attention_mask=torch.ones_like(input_ids)"
)


def check_text(
    input_ids: object, inputs_embeds: object, width: int | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Return the token ids [B, T], or the embeddings [B, T, width], of at least one token; the other is None.

    Args:
        input_ids: int32 or int64.
        inputs_embeds: floats no wider than `dtype`, except float32 or narrower ones under autocast.
        width: of the model's embeddings; None: not known.
        dtype: of the model's embeddings; None: not known.

    Raises:
        TypeError, ValueError: naming the argument, what it must be, and what it was.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("input_ids or inputs_embeds must be given, and not both")
    if input_ids is not None:
        name, x, shape = "input_ids", check_ids("input_ids", input_ids), "[B, T]"
        fits = x.ndim == 2
    else:
        check_floating("inputs_embeds", inputs_embeds)
        name, x, shape = "inputs_embeds", inputs_embeds, f"[B, T, {'width' if width is None else width}]"  # type: ignore[assignment]
        fits = x.ndim == 3 and width in (None, x.shape[2])
    if not fits or not x.shape[0] or not x.shape[1]:
        raise ValueError(f"{name} must be {shape} of at least one token, got {list(x.shape)}")
    if input_ids is None and dtype is not None:
        check_no_wider(name, x, dtype)
    return x


def check_no_wider(name: str, x: Tensor, dtype: torch.dtype) -> None:
    """Check that floats are no wider than a model's weights; autocast narrows all but float64.

    Raises:
        TypeError: they are.
    """
    fits = torch.promote_types(x.dtype, dtype) == dtype
    if not (fits or (x.dtype != torch.float64 and autocast_holds(x.device.type))):
        raise TypeError(f"{name} must be of the model's dtype, {dtype}, got {x.dtype}")


def check_labels(name: str, labels: object, letters: str, shape: Sequence[int]) -> Tensor:
    """Return labels as int64, which PyTorch's cross-entropy takes alone, once they are int32 or int64 of a shape."""
    x = check_ids(name, labels)
    check_shape(name, x, letters, shape)
    return x.long()


def token_runs(mask: Tensor, *, without_tokens: bool = False) -> list[tuple[int, int]]:
    """Return the columns at which each row's tokens begin and end in a padding mask [B, T], looked up on the host.

    Args:
        mask: ones, or True, at tokens.
        without_tokens: whether a row may have none; it then begins and ends at 0.

    Raises:
        ValueError: the mask has other values, the tokens of a row are not one run, or a row has none.
    """
    real, time = mask.bool(), mask.shape[1]
    # one copy to the host, for all rows
    ends = real.int().argmax(1), time - real.flip(1).int().argmax(1)
    *found, others = torch.stack((real.sum(1), *ends, (mask != real).sum(1))).tolist()
    for row, count in enumerate(others):
        if count:
            raise ValueError(f"attention_mask must be of ones and zeros, got {count} other values in row {row}")
    runs = []
    for row, (count, begin, end) in enumerate(zip(*found, strict=True)):
        if not count and not without_tokens:
            raise ValueError(f"attention_mask must have a token in every row, got row {row} without one")
        if count and end - begin != count:
            raise ValueError(
                f"attention_mask must hold one run of ones in each row, with padding only around it: row {row} has "
                f"{count} ones between {begin} and {end}. {MASK_OF_PADDING_ID}"
            )
        runs.append((begin, end) if count else (0, 0))
    return runs
