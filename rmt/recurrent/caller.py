"""How a model is called with the rows of a segment: its mask, its positions, its cache."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backbone import (
    Outputs,
    accepted,
    check_positions,
    check_sight,
    check_widths,
    check_windows,
    embedding_of,
    evaluating,
    huggingface_of,
    run,
)
from . import block_attention
from .block_attention import Block
from .layout import Layout, block_mask
from .settings import RecurrentSettings


class Caller(NamedTuple):
    """What of a model and a memory's settings a call depends on.

    kind: "decoder" or "encoder".
    layout: where tokens and memory stand among a segment's rows.
    block: rows at each end of a decoder's segment that its mask treats as memory; 0: the mask is plain causal.
    accepts: names of the arguments that the model's forward takes.
    huggingface: whether the model is, or wraps, a Hugging Face model.
    fused: whether its attention is `block_attention`, which takes a `Block` in place of a mask.
    """

    kind: str
    layout: Layout
    block: int
    accepts: frozenset[str]
    huggingface: bool
    fused: bool

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
        if fused:
            if settings.kind != "decoder" or inner is None:
                raise ValueError(
                    f"attention='segattn' is for Hugging Face decoders, got a {type(model).__name__} as "
                    f"{settings.kind!r}"
                )
            block_attention.use(inner)
        block = settings.num_memory_tokens if settings.mask == "paper" else 0
        caller = cls(settings.kind, settings.layout, block, accepted(model), inner is not None, fused)
        if block and inner is not None and not fused:
            caller._check_mask(inner)
        return caller

    def whole(self, model: nn.Module, rows: Tensor, lengths: Tensor | None, with_logits: bool) -> Outputs:
        """Run a model over a whole segment.

        Args:
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
        out = run(model, rows, arguments, self.huggingface)
        if selects or out.logits is None or out.logits.ndim == 2:
            return out
        return out._replace(logits=self.layout.tokens_of(out.logits))

    def newest(self, model: nn.Module, rows: Tensor, writes: bool, cache: Any) -> Outputs:
        """Run a decoder over the newest rows [B, n, d] of a segment that grows.

        Args:
            writes: whether the last rows are the memory's, so that the segment is whole.
            cache: keys and values of the rows before; None: there are none, or the model keeps none.
        """
        past = 0 if cache is None else cache.get_seq_length()
        arguments = self._decoder_mask(rows, None, past, writes)
        if "logits_to_keep" in self.accepts:
            arguments["logits_to_keep"] = 1
        if "past_key_values" in self.accepts and "use_cache" in self.accepts:
            return run(model, rows, arguments | {"use_cache": True, "past_key_values": cache}, self.huggingface)
        if "use_cache" in self.accepts:
            arguments["use_cache"] = False
        return run(model, rows, arguments, self.huggingface)._replace(cache=None)

    @torch.no_grad()
    def _check_mask(self, model: Any) -> None:
        """Check that a Hugging Face model keeps to a mask that lets its memory rows see each other.

        Raises:
            ValueError: it does not, or takes none.
        """
        weight = model.get_input_embeddings().weight
        if weight.is_meta:
            return
        # [read, read | token | write, write]
        two = self._replace(block=2)
        x = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
        others = [x + 2 * x.roll(1, 1) * (torch.arange(5) == row)[:, None].to(x) for row in (1, 4)]
        try:
            with evaluating(model):
                # one by one, so that equal rows come out equal to the bit
                plain, read, write = (
                    run(model, rows[None], two._decoder_mask(rows[None], None, 0, True), True).hidden[0]
                    for rows in (x, *others)
                )
        except (TypeError, ValueError, RuntimeError, IndexError, AssertionError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ValueError(
                f"mask must be 'causal' for a {type(model).__name__}, which takes no mask [1, 1, T, T] ({reason})"
            ) from None
        changed = [(hidden != plain).any(1).tolist() for hidden in (read, write)]
        if changed != [[True] * 5, [False, False, False, True, True]]:
            raise ValueError(
                f"mask must be 'causal' for a {type(model).__name__}, whose attention does not keep to the mask"
            )

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
        if self.fused:
            spans = None if ends is None else torch.stack((torch.zeros_like(ends), ends), 1).int()
            return {"segattn_block": Block(read, write, spans)}
        # a causal model sees no padding, which stands behind all else, and a single new row sees everything
        if self.huggingface and (not read or (past and queries == 1)):
            return {}
        visible = block_mask(time, read, write, ends, queries=queries, device=rows.device)
        if not self.huggingface:
            return {"attention_mask": visible}
        mask = {"attention_mask": additive_mask(visible, rows.dtype)}
        if "position_ids" not in self.accepts:
            return mask
        return mask | {"position_ids": torch.arange(past, time, device=rows.device)[None]}

    def _encoder_mask(self, rows: Tensor, ends: Tensor | None) -> Tensor | None:
        """Return the mask that hides padding: [B, T] for a Hugging Face model, [B or 1, 1, T, T] for others."""
        batch, time = rows.shape[:2]
        at = torch.arange(time, device=rows.device)
        real = None if ends is None else at < ends[:, None]
        if self.huggingface:
            return None if real is None else real.long()
        if real is None:
            return torch.ones(1, 1, time, time, dtype=torch.bool, device=rows.device)
        return real[:, None, None].expand(batch, 1, time, time)


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 where `visible`, and the least number of `dtype` elsewhere."""
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
