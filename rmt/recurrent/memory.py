"""The Recurrent Memory Transformer (arXiv 2207.06881, 2304.11062) around any model that takes embeddings."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...kernels import validation as check
from ...kernels.inference import normal
from ..backbone import OFFLOAD_THE_MODEL, Outputs, check_model, check_not_offloaded, embedding_of, kind_of
from ..growing_segment import Extension
from ..inputs import check_inputs
from ..module import MemoryModule, draw_memory_tokens, with_zero_gradients
from ..segments import Segment, bounds, cut
from ..twins import Shown
from .caller import Caller
from .gradients import reached, truncate
from .results import gather, summed_loss, targets_of
from .settings import RecurrentSettings
from .state import RecurrentOutput, RecurrentState


class RecurrentMemory(MemoryModule):
    """A model that reads a sequence segment by segment, with memory tokens that each segment writes for the next.

    A decoder's segment is [read | tokens | write], the same memory at both ends, and what the last layer makes of the
    write rows is the next memory (arXiv 2207.06881, section 3). An encoder's is [first | memory | separator | tokens |
    separator], its memory read and written in place (arXiv 2304.11062, section 2). Positions begin anew with each
    segment. Nothing is kept on the module between calls but its parameters: the state of one call goes into the next,
    and a text read in pieces of whole segments equals the text read at once.

    Args:
        model: a Hugging Face encoder or decoder with any head, or a module that is called with `inputs_embeds`
            [B, T, d] and `attention_mask`, bool [B or 1, 1, T, T], True where a row sees another, and returns the last
            layer's rows [B, T, d], or an object with `last_hidden_state` or `hidden_states`, and `logits`.
        num_memory_tokens: m.
        segment_len: L, tokens of the text per segment, without memory and special tokens.
        kind: "decoder" or "encoder"; default: as the attention of a Hugging Face model is.
        mask: of a decoder: "paper", the default: memory rows see all of their own block, and write rows everything;
            "causal": each row sees those before it, as in released checkpoints.
        special_tokens: of an encoder: the ids (first, separator), such as BERT's 101 and 102; default none.
        bptt: segments through which gradients reach back, counted from each row's last; they are cut at every multiple
            of it, so that all segments train where all have a loss. Default: through all.
        alignment: "left": a row's last segment is the short one; "right": its first.
        loss: of what "all" segments predict, or each row's "last"; default: all for a decoder, last for an encoder.
            A decoder's last segment predicts its tokens but for the first, which the segment before predicts.
        attention: "segattn" for a Hugging Face decoder to run on `segment_attention` and its block mask; default: its
            own attention, with a mask [1, 1, T, T], or none for "causal".
        embedding: token ids to vectors; default the model's own.
        head: the last layer's rows of tokens [B, T, d] to logits, or an encoder's first row [B, d]; default the
            model's own logits.
        checkpoint: keep only a segment's inputs for the backward pass, and run the segment again there.
        noise: in training, standard deviation of the noise that is added to the memory between segments, relative to
            the size of its rows, so that the memory withstands more segments than it was trained on. `generate` adds
            none.

    Attributes:
        memory: [m, d], the first segment's memory.
        model: another one that fits may be assigned, such as the same with adapters.
        checkpoint, noise, head: may be assigned.

    Raises:
        TypeError, ValueError: naming the argument, what it must be, and what it was: a segment shorter than the memory,
            a model without embeddings, more rows than the model knows positions.
    """

    settings: RecurrentSettings

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
        check_not_offloaded("model", model, model.parameters(), OFFLOAD_THE_MODEL)
        kind = kind_of(model) if kind is None else kind
        self.settings = RecurrentSettings(
            num_memory_tokens, segment_len, kind, mask, special_tokens, bptt, alignment, loss, attention
        )
        check.check_bool("checkpoint", checkpoint)
        if head is not None and not callable(head):
            raise TypeError(f"head must be callable, got {type(head).__name__}")
        if isinstance(noise, bool) or not isinstance(noise, (int, float)) or not 0 <= noise < math.inf:
            raise ValueError(f"noise must be a number of at least 0, got {noise!r}")
        self._caller = Caller.of(model, self.settings, embedding)
        self.model = model
        self.embedding = embedding
        self.head = head
        self.checkpoint = checkpoint
        self.noise = noise
        self.memory = draw_memory_tokens(self._embedding.weight, num_memory_tokens)
        self._compile_options: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._compiled: Callable[..., tuple[Tensor, Tensor | None]] | None = None

    @property
    def attention(self) -> str | None:
        """The argument `attention`."""
        return self.settings.attention

    @property
    def _embedding(self) -> Any:
        """The module that embeds token ids."""
        return embedding_of(self.model) if self.embedding is None else self.embedding

    def _fit(self, model: nn.Module) -> None:
        check_model(model)
        embedding: Any = embedding_of(model) if self.embedding is None else self.embedding
        width = embedding.weight.shape[1]
        if width != self.memory.shape[1]:
            raise ValueError(
                f"model must be as wide as the memory, {self.memory.shape[1]}, got {width}: make a new RecurrentMemory "
                "around it"
            )
        self._caller = Caller.of(model, self.settings, self.embedding)

    def get_input_embeddings(self) -> nn.Module:
        """Return the module that embeds token ids."""
        embedding: nn.Module = self._embedding
        return embedding

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the pass over one segment, by `torch.compile` with these arguments; the loop stays as it is.

        With mode="reduce-overhead" a GPU replays it as a CUDA graph where no gradients are wanted.
        """
        self._compile_options, self._compiled = (args, kwargs), None

    def __getstate__(self) -> dict[str, Any]:
        # a copy compiles for itself
        return self.__dict__ | {"_compiled": None}

    def embed(self, ids: Tensor) -> Tensor:
        """Embed token ids [B, T] as vectors [B, T, d]."""
        vectors: Tensor = self._embedding(ids)
        return vectors

    def initial_state(self, batch_size: int) -> RecurrentState:
        """Return the trainable memory that a sequence begins with, for `batch_size` rows."""
        check.check_integer("batch_size", batch_size, 1)
        check_not_offloaded("memory", self, [self.memory], OFFLOAD_THE_MODEL)
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
            input_ids: int [B, T]; or `inputs_embeds` [B, T, d].
            attention_mask: [B, T], 0 where padding stands before or after a row's tokens.
            labels: int [B, T], one for each token, -100 where it does not count: a decoder's logits predict the next
                token, also over the border of two segments, an encoder's the token at their place; or [B], the class
                of each row, of an encoder.
            state: what an earlier call returned, to continue from; default the trainable memory. A call ends its last
                segment, so cut pieces of a text at multiples of `segment_len` (with alignment="right" counted from its
                end).
            output_logits: keep logits of every token; default: where there are no labels. [B, C] is always kept.

        Returns:
            RecurrentOutput(loss, logits, state).

        Raises:
            TypeError, ValueError: naming the argument, what it must be, and what it was.

        Warns:
            UntrainedMemoryWarning: once, in training: two calls in turn had no text longer than a segment and no
                state.
        """
        settings = self.settings
        self._refuse_graph("call its compile(), which compiles the pass over a segment")
        x = check_inputs(input_ids, inputs_embeds, self.memory)
        batch, time = x.shape[:2]
        rows = bounds(attention_mask, batch, time)
        self._warn_untrained(rows, state)
        targets = None if labels is None else targets_of(labels, settings.kind, rows, time)
        keep = labels is None if output_logits is None else output_logits
        memory = self._state(state, batch).memory
        loss = torch.zeros((), device=x.device, dtype=torch.float32)
        count = torch.zeros((), device=x.device, dtype=torch.long)
        kept = []
        for segment in cut(rows, settings.segment_len, settings.alignment):
            scored = targets is not None and (settings.loss == "all" or 1 in segment.left)
            # the trainable memory belongs to the first segment
            if segment.number or state is not None:
                memory = truncate(memory, segment, settings.bptt)
            trains = keep or scored or reached(segment, settings.bptt)
            with torch.set_grad_enabled(torch.is_grad_enabled() and trains):
                noise = self.noise if self.training and segment.number else 0.0
                memory, logits = self._read(x, segment, memory, keep or scored, noise)
            if logits is not None and (keep or logits.ndim == 2):
                kept.append((segment, logits))
            if targets is not None and scored and logits is not None:
                own, number = summed_loss(logits, targets, segment, settings.loss == "last")
                loss, count = loss + own, count + number
        logits = gather(kept, batch, time)
        # gradients do not reach the trainable memory behind a state, or more than `bptt` segments back
        return RecurrentOutput(
            None if targets is None else with_zero_gradients(loss / count.clamp(min=1), [self.memory]),
            None if logits is None else with_zero_gradients(logits, [self.memory]),
            # by itself, so that it does not keep the last segment's other rows
            RecurrentState(memory.clone()),
        )

    def _state(self, state: RecurrentState | None, batch: int) -> RecurrentState:
        """Return the state that `batch` rows begin with: the caller's, checked, or the trainable memory."""
        if state is None:
            return self.initial_state(batch)
        if not isinstance(state, RecurrentState):
            raise TypeError(f"state must be a RecurrentState, got {type(state).__name__}")
        check.check_floating("state", state.memory)
        check.check_shape("state", state.memory, "[B, m, d]", (batch, *self.memory.shape))
        check.check_device("state", state.memory, "memory", self.memory)
        return RecurrentState(normal(state.memory))

    def _read(
        self, x: Tensor, segment: Segment, memory: Tensor, required: bool, noise: float = 0.0
    ) -> tuple[Tensor, Tensor | None]:
        """Read one segment of those rows that have it.

        Args:
            x: all rows' ids [B, T] or embeddings [B, T, d].
            memory: [B, m, d].
            required: whether logits are wanted; those of an encoder's last segment are computed in any case.
            noise: added to the memory, relative to the size of its rows.

        Returns:
            The memory after the segment [B, m, d], and logits of the segment's rows.
        """
        before = segment.rows_of(memory)
        if noise:
            before = add_noise(before, noise)
        classify = self.settings.kind == "encoder" and 1 in segment.left
        arguments = segment.of(x), before, segment.lengths(x.device), required or classify
        if self.checkpoint and torch.is_grad_enabled():
            after, logits = checkpoint(self._segment, *arguments, use_reentrant=False)
        else:
            after, logits = self._segment(*arguments)
        if required and logits is None:
            raise TypeError(_no_logits(self.model))
        if logits is not None and logits.ndim == 2 and self.settings.kind == "decoder":
            raise TypeError(
                f"model must return logits of every token, got {type(self.model).__name__}, which classifies rows: "
                "pass head= for classes by token"
            )
        if len(segment.rows) < x.shape[0]:
            after = memory.to(after.dtype).index_copy(0, torch.tensor(segment.rows, device=x.device), after)
        return after, logits

    def _segment(self, *arguments: Any) -> tuple[Tensor, Tensor | None]:
        """Call `_eager_segment`, compiled where `compile` was called."""
        arguments = self._caller.shown(self.model), *arguments
        if self._compile_options is None:
            return self._eager_segment(*arguments)
        if self._compiled is None:
            args, kwargs = self._compile_options
            self._compiled = torch.compile(self._eager_segment, *args, **kwargs)
        if torch.is_grad_enabled():
            return self._compiled(*arguments)
        # a graph's next replay writes over what this one returns
        torch.compiler.cudagraph_mark_step_begin()
        memory, logits = self._compiled(*arguments)
        return memory.clone(), None if logits is None else logits.clone()

    def _eager_segment(
        self, model: Shown, tokens: Tensor, memory: Tensor, lengths: Tensor | None, with_logits: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Run the model over one segment of tokens, and return the next memory and, where wanted, logits.

        Args:
            model: one that shows the last layer's rows.
            tokens: ids [b, n] or embeddings [b, n, d].
            memory: [b, m, d].
            lengths: tokens of each sequence [b]; None: all have n.
        """
        layout = self._caller.layout
        x = tokens if tokens.is_floating_point() else self.embed(tokens)
        memory = memory.to(x.dtype)
        if self.settings.kind == "decoder":
            before = after = memory
        elif self.settings.special_tokens:
            ids = torch.tensor(self.settings.special_tokens, device=x.device)
            special = self.embed(ids).expand(x.shape[0], -1, -1)
            before, after = torch.cat((special[:, :1], memory, special[:, 1:]), 1), special[:, 1:]
        else:
            before, after = memory, memory[:, :0]
        out = self._caller.whole(model, layout.join(before, x, after, lengths), lengths, with_logits)
        return layout.memory_of(out.hidden, lengths), self._logits(out) if with_logits else None

    def _logits(self, out: Outputs) -> Tensor | None:
        """Return the logits of a segment, by the head or the model."""
        if self.head is None:
            return out.logits
        first = self.settings.kind == "encoder"
        return self.head(out.hidden[:, 0] if first else self._caller.layout.tokens_of(out.hidden))

    def _start_text(self, input_ids: Tensor, state: RecurrentState | None) -> RecurrentState:
        if self.settings.kind != "decoder":
            raise TypeError("generate is for decoders, got a RecurrentMemory of kind 'encoder'")
        return self._state(state, check_inputs(input_ids, None, self.memory).shape[0])

    def _read_segments(self, input_ids: Tensor, rows: list[tuple[int, int]], state: RecurrentState) -> RecurrentState:
        memory = state.memory
        for segment in cut(rows, self.settings.segment_len, self.settings.alignment):
            memory, _ = self._read(input_ids, segment, memory, False)
        return RecurrentState(memory)

    def _extend_segment(self, tokens: Tensor, state: RecurrentState, cache: Any, write: bool) -> Extension:
        rows = self.embed(tokens)
        memory = state.memory.to(rows.dtype)
        if cache is None:
            rows = torch.cat((memory, rows), 1)
        if write:
            rows = torch.cat((rows, memory), 1)
        out = self._caller.newest(self._caller.shown(self.model), rows, write, cache)
        if write:
            return Extension(None, RecurrentState(out.hidden[:, -self.settings.num_memory_tokens :]), None)
        logits = out.logits if self.head is None else self.head(out.hidden[:, -1:])
        if logits is None:
            raise TypeError(_no_logits(self.model))
        return Extension(logits[:, -1], state, out.cache)


def add_noise(memory: Tensor, noise: float) -> Tensor:
    """Add Gaussian noise to a memory [B, m, d], of `noise` times the root mean square of each row."""
    size = memory.detach().square().mean(-1, keepdim=True).sqrt()
    return memory + noise * size * torch.randn_like(memory)


def _no_logits(model: nn.Module) -> str:
    """Return the message of an error where logits are wanted and there are none."""
    return (
        f"model must return logits, got {type(model).__name__}, which returns hidden rows alone: pass head=, or "
        "output_logits=False for the memory alone"
    )
