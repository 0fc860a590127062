"""The Recurrent Memory Transformer (arXiv 2207.06881, 2304.11062) around any model that takes embeddings."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...kernels import validation as check
from ..backbone import (
    Caller,
    Outputs,
    accepted,
    check_model,
    check_positions,
    check_sight,
    check_widths,
    check_windows,
    embedding_of,
    huggingface_of,
    kind_of,
)
from ..checkpointing import Checkpointing
from ..generation import generate
from ..inputs import check_inputs
from ..segments import IGNORED, Segment, bounds, cut, next_tokens
from . import block_attention
from .gathering import gather, summed_loss
from .layout import decoder_layout, encoder_layout
from .open_segment import open_segments
from .settings import Settings
from .state import RecurrentState, trainable

ATTENTIONS = (None, "segattn")


class RecurrentOutput(NamedTuple):
    """loss: scalar, None without labels. logits: [B, T, C] of every token, [B, C] of a row's last segment, or None."""

    loss: Tensor | None
    logits: Tensor | None
    state: RecurrentState


class RecurrentMemory(Checkpointing, nn.Module):
    """Reads a sequence segment by segment; memory tokens, written by each segment, are read by the next.

    A decoder's segment is [read | tokens | write], the same memory at both ends, and what the last layer makes of the
    write rows is the next memory (arXiv 2207.06881, section 3). An encoder's is [first | memory | separator | tokens |
    separator], its memory read and written in place (arXiv 2304.11062, section 2). Positions begin anew with each
    segment. Nothing is kept on the module between calls but its parameters. Pieces of whole segments, each with the
    state that the last one returned, equal the text read at once.

    Args:
        model: a Hugging Face encoder or decoder with any head, or a module that is called with `inputs_embeds`
            [B, T, d] and `attention_mask`, bool [B or 1, 1, T, T], True where a row sees another, and returns the last
            layer's rows [B, T, d], or an object with `last_hidden_state` or `hidden_states`, and `logits`.
        num_memory_tokens: m.
        segment_len: L, tokens of the text per segment, without memory and special tokens.
        kind: "decoder" or "encoder"; default: what a Hugging Face model's attention is.
        mask: of a decoder: "paper", the default: memory rows see all of their own block, and write rows everything;
            "causal": each row sees those before it, as in released checkpoints.
        special_tokens: of an encoder: the ids (first, separator), such as BERT's 101 and 102; default none.
        bptt: segments through which gradients reach back, counted from each row's last; they are cut at every multiple
            of it, so that all segments train where all have a loss. Default: through all.
        alignment: "left": a row's last segment is the short one; "right": its first.
        loss: of what "all" segments predict, or each row's "last"; default: all for a decoder, last for an encoder.
            A decoder's last segment predicts its tokens but for the first, which the segment before predicts.
        attention: "segattn" for a Hugging Face decoder to run on `segment_attention` and its block mask; default: as it
            is, with a mask [1, 1, T, T], or none for "causal".
        embedding: token ids to vectors; default the model's own.
        head: the last layer's rows of tokens [B, T, d] to logits, or an encoder's first row [B, d]; default the
            model's own logits.
        checkpoint: keep a segment's inputs alone for its backward, and run it again there.
        noise: in training, standard deviation of the noise that is added to the memory between segments, relative to
            the size of its rows; what is remembered then withstands more segments than it was trained on. `generate`
            adds none.

    Attributes:
        memory: [m, d], the first segment's memory.
        model: one that fits may take its place, such as the same with adapters.

    Raises:
        TypeError, ValueError: naming the argument, what it must be, and what it was: a segment shorter than the memory,
            a model without embeddings, more rows than the model knows positions.
    """

    def __init__(
        self,
        model: nn.Module,
        num_memory_tokens: int,
        segment_len: int,
        *,
        kind: str | None = None,
        mask: str | None = None,
        special_tokens: tuple[int, int] | None = None,
        bptt: int | None = None,
        alignment: str = "left",
        loss: str | None = None,
        attention: str | None = None,
        embedding: nn.Module | None = None,
        head: Callable[[Tensor], Tensor] | None = None,
        checkpoint: bool = False,
        noise: float = 0.0,
    ) -> None:
        super().__init__()
        check_model(model)
        kind = kind_of(model) if kind is None else kind
        self.settings = Settings(num_memory_tokens, segment_len, kind, mask, special_tokens, bptt, alignment, loss)
        check.check_bool("checkpoint", checkpoint)
        if head is not None and not callable(head):
            raise TypeError(f"head must be callable, got {type(head).__name__}")
        if isinstance(noise, bool) or not isinstance(noise, (int, float)) or not 0 <= noise < math.inf:
            raise ValueError(f"noise must be a number of at least 0, got {noise!r}")
        self.model = model
        self.embedding = embedding
        self.head = head
        self.checkpoint = checkpoint
        self.noise = noise
        if attention not in ATTENTIONS:
            raise ValueError(f"attention must be None or 'segattn', got {attention!r}")
        self._attention = attention
        self._layout = (
            decoder_layout(num_memory_tokens)
            if kind == "decoder"
            else encoder_layout(num_memory_tokens, special_tokens is not None)
        )
        self._take(model)
        weight = self._embedding.weight
        # as far from zero as the embeddings it stands among
        spread = weight.detach().float().std()
        self.memory = nn.Parameter(torch.randn(num_memory_tokens, weight.shape[1]).to(weight) * spread)
        self._how_compiled: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._compiled: Callable[..., tuple[Tensor, Tensor | None]] | None = None

    generate = generate
    open_segments = open_segments

    def __setattr__(self, name: str, value: Any) -> None:
        # the model may give its place to another, such as itself with adapters
        if name == "model" and "_accepts" in self.__dict__:
            self._take(value)
        super().__setattr__(name, value)

    def _take(self, model: nn.Module) -> None:
        """See that segments can be read with a model, and how it is called."""
        own = self.settings
        fused = self.attention == "segattn"
        check_model(model)
        check_sight(model, own.kind, own.mask == "paper" or fused)
        check_widths(model)
        check_positions(model, own.segment_len + own.extra_rows, own.extra_rows)
        if own.kind == "decoder":
            check_windows(model, own.segment_len + own.extra_rows, own.extra_rows)
        embedding: Any = embedding_of(model) if self.embedding is None else self.embedding
        memory, width = getattr(self, "memory", None), embedding.weight.shape[1]
        if memory is not None and memory.shape[1] != width:
            raise ValueError(
                f"model must be as wide as the memory, {memory.shape[1]}, got {width}: make a new RecurrentMemory "
                "around it"
            )
        if max(own.special_tokens or (0,)) >= len(embedding.weight):
            raise ValueError(
                f"special_tokens must be below the model's {len(embedding.weight)} tokens, got {own.special_tokens}"
            )
        if fused:
            _use_block_attention(model, own.kind)
        caller = Caller(model, own, self._layout, accepted(model), huggingface_of(model) is not None, fused)
        caller.check_mask()
        self._accepts, self._huggingface = caller.accepts, caller.huggingface

    @property
    def attention(self) -> str | None:
        """The argument."""
        return self._attention

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] → vectors [B, T, d]."""
        vectors: Tensor = self._embedding(ids)
        return vectors

    @property
    def _embedding(self) -> Any:
        return embedding_of(self.model) if self.embedding is None else self.embedding

    @property
    def _caller(self) -> Caller:
        fused = self.attention == "segattn"
        return Caller(self.model, self.settings, self._layout, self._accepts, self._huggingface, fused)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile what is done with one segment, by `torch.compile` with these arguments; the loop stays as it is.

        With mode="reduce-overhead" a GPU replays it as a CUDA graph where no gradients are wanted.
        """
        self._how_compiled, self._compiled = (args, kwargs), None

    def __getstate__(self) -> dict[str, Any]:
        # a copy compiles for itself
        return self.__dict__ | {"_compiled": None}

    def initial_state(self, batch_size: int) -> RecurrentState:
        """The trainable memory that a sequence begins with, for so many rows."""
        check.check_integer("batch_size", batch_size, 1)
        return RecurrentState(self.memory.expand(batch_size, -1, -1))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        state: RecurrentState | None = None,
        output_logits: bool | None = None,
    ) -> RecurrentOutput:
        """Read sequences of any length.

        Args:
            input_ids: [B, T]; or `inputs_embeds` [B, T, d].
            attention_mask: [B, T], 0 where padding stands before or after a row's tokens.
            labels: [B, T], each token its own, -100 where none: a decoder's logits predict the next token, also over
                the border of two segments, an encoder's the token at their place; or [B], an encoder's class of
                the row.
            state: what an earlier call returned, to go on from; default the trainable memory. A call ends its last
                segment, so cut pieces of a text at multiples of `segment_len` (with alignment="right" counted from its
                end).
            output_logits: keep logits of every token; default: where there are no labels. [B, C] is always kept.

        Returns:
            The mean cross-entropy over labels that count (0 where none does), logits, and the memory at the end.

        Raises:
            TypeError, ValueError: naming the argument, what it must be, and what it was.
        """
        x = self.check_inputs(input_ids, inputs_embeds)
        rows = bounds(attention_mask, *x.shape[:2])
        targets = None if labels is None else self._targets(labels, x, rows)
        keep = labels is None if output_logits is None else output_logits
        memory = self.check_state(state, x.shape[0]).memory
        loss = count = torch.zeros((), device=x.device)
        kept = []
        for segment in cut(rows, self.settings.segment_len, self.settings.alignment):
            scored = targets is not None and (self.settings.loss == "all" or 1 in segment.left)
            memory = self._truncate(memory, segment, state is not None)
            with torch.set_grad_enabled(torch.is_grad_enabled() and (keep or scored or self._reached(segment))):
                memory, logits = self.read(x, segment, memory, keep or scored, disturbed=True)
            if logits is not None and (keep or logits.ndim == 2):
                kept.append((segment, logits))
            if targets is not None and scored and logits is not None:
                own, number = summed_loss(logits, targets, segment, self.settings.loss == "last")
                loss, count = loss + own, count + number
        return RecurrentOutput(
            None if targets is None else loss / count.clamp(min=1),
            gather(kept, *x.shape[:2]),
            # by itself, so that it does not keep the last segment's other rows
            RecurrentState(memory.clone()),
        )

    def read(
        self, x: Tensor, segment: Segment, memory: Tensor, required: bool, *, disturbed: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The memory [B, m, d] after a segment of those rows that have it, and its logits where they are wanted.

        Args:
            disturbed: by noise, where there is some in training.
        """
        classify = self.settings.kind == "encoder" and 1 in segment.left
        before = segment.rows_of(memory)
        before = self._disturb(before, segment) if disturbed else before
        arguments = segment.of(x), before, segment.lengths(x.device), required or classify
        if self.checkpoint and torch.is_grad_enabled():
            own, logits = checkpoint(self._step, *arguments, use_reentrant=False)
        else:
            own, logits = self._step(*arguments)
        if required and logits is None:
            raise TypeError(_no_logits(self.model))
        if logits is not None and logits.ndim == 2 and self.settings.kind == "decoder":
            raise TypeError(
                f"model must return logits of every token, got {type(self.model).__name__}, which classifies rows: "
                "pass head= for classes by token"
            )
        if len(segment.rows) < x.shape[0]:
            own = memory.to(own.dtype).index_copy(0, torch.tensor(segment.rows, device=x.device), own)
        return own, logits

    def _reached(self, segment: Segment) -> bool:
        """Whether gradients from a row's last segment come here."""
        return self.settings.bptt is None or min(segment.left) <= self.settings.bptt

    def _truncate(self, memory: Tensor, segment: Segment, earlier: bool) -> Tensor:
        """Cut the graph in front of every `bptt` segments, counted from each row's last."""
        depth = self.settings.bptt
        # the trainable memory belongs to the first segment
        if depth is None or (segment.number == 0 and not earlier):
            return memory
        ends = [row for row, left in zip(segment.rows, segment.left, strict=True) if left % depth == 0]
        if len(ends) == memory.shape[0]:
            return memory.detach()
        rows = torch.tensor(ends, dtype=torch.long, device=memory.device)
        return memory.index_copy(0, rows, memory[rows].detach()) if ends else memory

    def _disturb(self, memory: Tensor, segment: Segment) -> Tensor:
        if not self.training or not self.noise or segment.number == 0:
            return memory
        size = memory.detach().square().mean(-1, keepdim=True).sqrt()
        return memory + self.noise * size * torch.randn_like(memory)

    def _step(self, *arguments: Any) -> tuple[Tensor, Tensor | None]:
        """`_segment`, compiled where it was asked for."""
        if self._how_compiled is None:
            return self._segment(*arguments)
        if self._compiled is None:
            args, kwargs = self._how_compiled
            self._compiled = torch.compile(self._segment, *args, **kwargs)
        if torch.is_grad_enabled():
            return self._compiled(*arguments)
        # a graph's next replay writes over what this one returns
        torch.compiler.cudagraph_mark_step_begin()
        memory, logits = self._compiled(*arguments)
        return memory.clone(), None if logits is None else logits.clone()

    def _segment(
        self, tokens: Tensor, memory: Tensor, lengths: Tensor | None, with_logits: bool
    ) -> tuple[Tensor, Tensor | None]:
        """One segment of tokens (ids [B, n] or embeddings [B, n, d]): the next memory, and logits of the tokens."""
        layout, embed = self._layout, self.embed
        x = tokens if tokens.is_floating_point() else embed(tokens)
        memory = memory.to(x.dtype)
        if self.settings.kind == "decoder":
            before = after = memory
        elif self.settings.special_tokens:
            special = embed(torch.tensor(self.settings.special_tokens, device=x.device)).expand(x.shape[0], -1, -1)
            before, after = torch.cat((special[:, :1], memory, special[:, 1:]), 1), special[:, 1:]
        else:
            before, after = memory, memory[:, :0]
        rows = layout.join(before, x, after, lengths)
        ends = None if lengths is None else layout.before + lengths + layout.after
        out = self._caller.segment(rows, ends, with_logits)
        return layout.memory_of(out.hidden, lengths), self._logits(out) if with_logits else None

    def _logits(self, out: Outputs) -> Tensor | None:
        if self.head is not None:
            encoder = self.settings.kind == "encoder"
            return self.head(out.hidden[:, 0] if encoder else self._layout.tokens_of(out.hidden))
        return out.logits

    def newest(self, rows: Tensor, writes: bool, cache: Any) -> tuple[Tensor, Tensor, Any]:
        """The newest rows of a growing segment: the last m hidden rows, the last logits [B, C], and the cache.

        Args:
            rows: embeddings [B, n, d], the memory before the first token and again behind the last.
            writes: whether the memory is behind the last token, so that the segment is whole.
            cache: what this returned for the rows before; None: these are all.
        """
        out = self._caller.newest(rows, writes, cache)
        last = out.logits if self.head is None else self.head(out.hidden[:, -1:])
        if last is None:
            raise TypeError(_no_logits(self.model))
        return out.hidden[:, -self.settings.num_memory_tokens :], last[:, -1], out.cache

    def check_inputs(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """The one of the two that is given."""
        return check_inputs(input_ids, inputs_embeds, self.memory.shape[1])

    def _targets(self, labels: Tensor, x: Tensor, rows: list[tuple[int, int]]) -> Tensor:
        check.check_ids("labels", labels)
        if labels.ndim == 1 and self.settings.kind == "encoder":
            check.check_shape("labels", labels, "[B]", x.shape[:1])
            return labels
        check.check_shape("labels", labels, "[B, T]", x.shape[:2])
        if self.settings.kind == "decoder":
            return next_tokens(labels, rows)
        at = torch.arange(labels.shape[1], device=labels.device)
        begin, end = torch.tensor(rows, device=labels.device)[..., None].unbind(1)
        return labels.masked_fill((at < begin) | (at >= end), IGNORED)

    def check_state(self, state: RecurrentState | None, batch: int) -> RecurrentState:
        """The state that so many rows begin with: as given, or the trainable memory."""
        if state is None:
            return self.initial_state(batch)
        if not isinstance(state, RecurrentState):
            raise TypeError(f"state must be a RecurrentState, got {type(state).__name__}")
        check.check_floating("state", state.memory)
        check.check_shape("state", state.memory, "[B, m, d]", (batch, *self.memory.shape))
        check.check_device("state", state.memory, "memory", self.memory)
        return RecurrentState(trainable(state.memory))


def _use_block_attention(model: nn.Module, kind: str) -> None:
    inner = huggingface_of(model)
    if kind != "decoder" or inner is None:
        raise ValueError(f"attention='segattn' is for Hugging Face decoders, got a {type(model).__name__} as {kind!r}")
    block_attention.use(inner)


def _no_logits(model: nn.Module) -> str:
    return (
        f"model must return logits, got {type(model).__name__}, which returns hidden rows alone: pass head=, or "
        "output_logits=False for the memory alone"
    )
