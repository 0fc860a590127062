"""How a model is called with the rows of a segment: its mask, its positions, its cache."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backbone import (
    ROUNDING,
    Outputs,
    accepted,
    check_positions,
    check_sight,
    check_widths,
    check_windows,
    distances,
    embedding_of,
    first_position,
    huggingface_of,
    random_rows,
    run,
)
from ..twins import HIDDEN_STATES, Branches, Shown, branches_of, evaluating, shown
from . import block_attention
from .block_attention import Block
from .layout import Layout, block_mask
from .settings import RecurrentSettings


class Caller(NamedTuple):
    """Hold the parts of a model and of a memory's settings that a call depends on.

    kind: "decoder" or "encoder".
    layout: where tokens and memory stand among a segment's rows.
    block: rows at each end of a decoder's segment that its mask treats as memory; 0: the mask is plain causal.
    accepts: names of the arguments that the model's forward takes.
    branches: where Hugging Face models are in the model; None: there is none.
    fused: whether its attention is `block_attention`, which takes a `Block` in place of a mask.
    first: the position of a segment's first row.
    """

    kind: str
    layout: Layout
    block: int
    accepts: frozenset[str]
    branches: Branches | None
    fused: bool
    first: int = 0

    @classmethod
    def of(cls, model: nn.Module, settings: RecurrentSettings, embedding: nn.Module | None) -> Caller:
        """Check that segments can be read with a model, and return how it is called.

        Args:
            model: one that passes `check_model`.
            settings: of the memory around it.
            embedding: token ids to vectors; None: the model's own.

        Raises:
            TypeError, ValueError: naming the argument, what it must be, and what it was.
        """
        fused, extra = settings.attention == "segattn", settings.extra_rows
        check_sight(model, settings.kind, settings.mask == "paper" or fused)
        check_widths(model)
        check_positions(model, settings.segment_len + extra, extra)
        if settings.kind == "decoder":
            check_windows(model, settings.segment_len + extra, extra)
        known: Any = embedding_of(model) if embedding is None else embedding
        tokens = len(known.weight)
        if max(settings.special_tokens or (0,)) >= tokens:
            raise ValueError(f"special_tokens must be below the model's {tokens} tokens, got {settings.special_tokens}")
        inner = huggingface_of(model)
        if fused and (settings.kind != "decoder" or inner is None):
            raise ValueError(
                f"attention='segattn' is for Hugging Face decoders, got a {type(model).__name__} as {settings.kind!r}"
            )
        block = settings.num_memory_tokens if settings.mask == "paper" else 0
        known_arguments, first = accepted(model), first_position(model)
        caller = cls(settings.kind, settings.layout, block, known_arguments, branches_of(model), fused, first)
        if fused:
            with block_attention.used(inner):
                caller._check_mask(inner)
        elif block and inner is not None:
            caller._check_mask(inner)
        return caller

    def shown(self, model: nn.Module) -> Shown:
        """Return what to call in the place of `model` for the last layer's rows."""
        return shown(model, self.branches)

    def whole(self, model: Shown, rows: Tensor, lengths: Tensor | None, with_logits: bool) -> Outputs:
        """Run a model over a whole segment.

        Args:
            model: one that shows the last layer's rows.
            rows: [B, T, d], in the order of the layout.
            lengths: tokens of each sequence [B]; None: all have as many, and there is no padding.
            with_logits: whether logits are wanted, [B, L, C] of the tokens or [B, C] of an encoder's row.
        """
        ends = None if lengths is None else self.layout.ends(lengths)
        arguments: dict[str, Any] = {"use_cache": False} if "use_cache" in self.accepts else {}
        selects = "logits_to_keep" in self.accepts
        if selects:
            at = torch.arange(rows.shape[1], device=rows.device)
            arguments["logits_to_keep"] = self.layout.tokens_of(at[None])[0] if with_logits else 1
        if self.kind == "decoder":
            arguments |= self._decoder_mask(rows, ends, 0, True)
        else:
            arguments |= {"attention_mask": self._encoder_mask(rows, ends)}
        out = run(model.module, rows, arguments | model.asked)
        if selects or out.logits is None or out.logits.ndim == 2:
            return out
        return out._replace(logits=self.layout.tokens_of(out.logits))

    def newest(self, model: Shown, rows: Tensor, writes: bool, cache: Any) -> Outputs:
        """Run a decoder over the newest rows [B, n, d] of a segment that grows.

        Args:
            model: one that shows the last layer's rows.
            writes: whether the last rows are the memory's, so that the segment is whole.
            cache: keys and values of the rows before; None: there are none, or the model keeps none.
        """
        past = 0 if cache is None else cache.get_seq_length()
        arguments = self._decoder_mask(rows, None, past, writes) | model.asked
        if "logits_to_keep" in self.accepts:
            arguments["logits_to_keep"] = 1
        # its name since transformers 5.24, and before
        name = next((name for name in ("cache", "past_key_values") if name in self.accepts), None)
        if name is not None and "use_cache" in self.accepts:
            return run(model.module, rows, arguments | {"use_cache": True, name: cache})
        if "use_cache" in self.accepts:
            arguments["use_cache"] = False
        return run(model.module, rows, arguments)._replace(cache=None)

    @torch.no_grad()
    def _check_mask(self, model: Any) -> None:
        """Check that a Hugging Face model keeps to a mask that lets its memory rows see each other.

        A row must change with those that it sees ten times as much as with others, from which rounding reaches it where
        experts multiply the rows of a batch together.

        Raises:
            ValueError: it does not, or takes none.
        """
        weight = model.get_input_embeddings().weight
        if weight.is_meta:
            return
        # [read, read | token | write, write]
        two = self._replace(block=2)
        texts, changed = random_rows(weight, 5).repeat(3, 1, 1), [1, 4]
        for text, row in enumerate(changed, start=1):
            texts[text, row] += 2 * texts[text, row].roll(1)
        try:
            # in one batch, whose rows are rounded alike
            mask = two._decoder_mask(texts, None, 0, True)
            hidden = run(evaluating(model), texts, mask | HIDDEN_STATES).hidden
        except (TypeError, ValueError, RuntimeError, IndexError, AssertionError) as error:
            if self.fused:
                raise
            reason = next(iter(str(error).splitlines()), "no message")
            raise ValueError(
                f"mask must be 'causal' for a {type(model).__name__}, which takes no mask [1, 1, T, T]: its forward "
                f"pass fails with one ({type(error).__name__}: {reason})"
            ) from None
        seen, distance = block_mask(5, 2, 2)[0, 0, :, changed].mT, distances(hidden).cpu()
        if not distance[seen].min() > max(10 * distance[~seen].max().item(), ROUNDING):
            must = "attention must be None" if self.fused else "mask must be 'causal'"
            raise ValueError(f"{must} for a {type(model).__name__}, whose attention does not keep to the mask")

    def _decoder_mask(self, rows: Tensor, ends: Tensor | None, past: int, writes: bool) -> dict[str, Any]:
        """Return the arguments that tell a decoder which row sees which.

        Args:
            rows: the newest, [B, n, d].
            ends: where each sequence's rows end [B]; None: with the last.
            past: rows in the cache.
            writes: whether the segment ends with the memory's write rows.
        """
        queries, time = rows.shape[1], past + rows.shape[1]
        read, write = self.block, self.block if writes else 0
        positions: dict[str, Any] = {}
        if "position_ids" in self.accepts:
            positions = {"position_ids": torch.arange(past, time, device=rows.device)[None] + self.first}
        # models count a text's positions by themselves without a mask, but not all of them behind a cache
        uncounted = positions if self.first else {}
        if self.fused:
            spans = None if ends is None else torch.stack((torch.zeros_like(ends), ends), 1).int()
            return {"segattn_block": Block(read, write, spans)} | uncounted
        # a causal model sees no padding, which stands behind all else, and a single new row sees everything
        if self.branches is not None and (not read or (past and queries == 1)):
            return uncounted
        visible = block_mask(time, read, write, ends, queries=queries, device=rows.device)
        if self.branches is None:
            return {"attention_mask": visible}
        return {"attention_mask": additive_mask(visible, rows.dtype)} | positions

    def _encoder_mask(self, rows: Tensor, ends: Tensor | None) -> Tensor | None:
        """Return the mask that hides padding: [B, T] for a Hugging Face model, [B or 1, 1, T, T] for others."""
        batch, time = rows.shape[:2]
        at = torch.arange(time, device=rows.device)
        real = None if ends is None else at < ends[:, None]
        if self.branches is not None:
            return None if real is None else real.long()
        if real is None:
            return torch.ones(1, 1, time, time, dtype=torch.bool, device=rows.device)
        return real[:, None, None].expand(batch, 1, time, time)


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 where `visible`, and the least number of `dtype` elsewhere."""
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
