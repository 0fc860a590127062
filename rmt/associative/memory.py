"""The associative recurrent memory transformer: a memory in every layer of a pretrained decoder."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import DynamicCache

from ...kernels import validation as check
from ...kernels.inference import normal
from ...kernels.state import MemoryState
from ...kernels.text import check_labels
from ..backbone import (
    OFFLOAD_THE_MODEL,
    check_not_offloaded,
    check_positions,
    check_widths,
    embedding_of,
    huggingface_of,
)
from ..growing_segment import Extension
from ..inputs import check_inputs
from ..module import MemoryModule, draw_memory_tokens, with_zero_gradients
from ..segments import IGNORED, bounds, next_tokens
from . import cells
from .decoder import Decoder, Layer
from .layer import DPFP, AssociativeLayer
from .placement import Placement
from .settings import AssociativeSettings, layers_with_memory
from .state import AssociativeOutput, AssociativeState

# tokens whose logits are held at once for a loss; of more, each part's are computed again in the backward pass
LOSS_ROWS = 2048


class AssociativeMemory(MemoryModule):
    """A Hugging Face decoder that reads text of any length, segment by segment (ARMT, arXiv 2407.04841).

    Every segment is followed by m trainable memory tokens, and is all that attention sees. What a layer makes of the
    memory tokens is written into the layer's own memory, by the delta rule; tokens of later segments read it before the
    layer. Positions begin anew with each segment. The last segment of a text may be shorter.

    Nothing of what was read is kept on the module: the state of one call goes into the next, and a text read in pieces
    of whole segments equals the text read at once.

    Parameters beside the model's are `memory_tokens` and those of `memories.<layer>`. The values written are 0 before
    training, so a pretrained model begins as itself within each segment.

    Args:
        model: a Hugging Face causal language model with weights; it is not changed. Wrap the AssociativeMemory
            for data parallelism, not the model, and compile its layers in place.
        num_memory_tokens: m, at most segment_len.
        segment_len: tokens per segment, without memory tokens, L.
        d_mem: width of queries and keys before their features.
        nu: of DPFP; features have K = 2 · nu · d_mem numbers.
        normalize: scale features to Euclidean length 1 (as the authors' later code; not in the paper).
        layers: indices of those with a memory, negative ones from the end; default all.
        schedule: the order of layers and segments; all results are equal but for rounding. "vertical": segment by
            segment; "horizontal": layer by layer; "diagonal": layers side by side, each in another segment (arXiv
            2506.05229), which holds a second copy of the layers' weights during a call, and takes as many steps as
            there are segments and layers, not their product.
        epsilon: added to the denominators of reads and writes. 1e-5 for weights of the authors' code, which has it to
            avoid a division by 0, and whose features may be as small; default 0, since empty memories return 0 here.
        bptt: segments through which gradients reach back, counted from each row's last; they are cut at every multiple
            of it, so that all segments train where all have a loss. Default: through all, and into `state`.
        checkpoint: keep only the inputs of each layer and segment for the backward pass, and run them again there.

    Attributes:
        model: another one that fits may be assigned, such as the same with adapters.
        checkpoint: may be assigned.

    Raises:
        TypeError, ValueError: naming the argument, what it must be, and what it was: a model without causal layers or
            embeddings, a segment shorter than the memory, more tokens in it than the model knows positions.
    """

    settings: AssociativeSettings

    def __init__(
        self,
        model: nn.Module,
        num_memory_tokens: int,
        segment_len: int,
        *,
        d_mem: int = 64,
        nu: int = 3,
        normalize: bool = True,
        layers: Iterable[int] | None = None,
        schedule: str = "vertical",
        epsilon: float = 0.0,
        bptt: int | None = None,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.decoder = Decoder.of(model)
        check_not_offloaded("model", model, model.parameters(), OFFLOAD_THE_MODEL)
        modules = self.decoder.modules(model)
        self.settings = AssociativeSettings(
            num_memory_tokens,
            segment_len,
            d_mem,
            nu,
            normalize,
            layers_with_memory(layers, len(modules)),
            schedule,
            bptt,
            epsilon,
        )
        check_widths(model)
        check_positions(model, segment_len + num_memory_tokens, num_memory_tokens)
        check.check_bool("checkpoint", checkpoint)
        self.checkpoint = checkpoint
        self.model = model
        weight = embedding_of(model).weight
        self.memories = nn.ModuleDict()
        for layer in self.settings.layers:
            device = next(modules[layer].parameters()).device
            self.memories[str(layer)] = AssociativeLayer(weight.shape[1], d_mem, device=device, dtype=weight.dtype)
        self.memory_tokens = draw_memory_tokens(weight, num_memory_tokens)

    def _fit(self, model: nn.Module) -> None:
        decoder = Decoder.of(model)
        depth, width = len(decoder.modules(model)), embedding_of(model).weight.shape[1]
        if depth <= self.settings.layers[-1] or width != self.memory_tokens.shape[1]:
            raise ValueError(
                f"model must have at least {self.settings.layers[-1] + 1} layers and be as wide as the memory, "
                f"{self.memory_tokens.shape[1]}, got {depth} and {width}: make a new AssociativeMemory around it"
            )
        check_widths(model)
        check_positions(model, self.settings.segment_len + len(self.memory_tokens), len(self.memory_tokens))
        self.decoder = decoder

    def get_input_embeddings(self) -> nn.Module:
        """Return the module that embeds token ids."""
        embedding: nn.Module = embedding_of(self.model)
        return embedding

    def embed(self, ids: Tensor) -> Tensor:
        """Embed token ids [B, T] as vectors [B, T, d]."""
        vectors: Tensor = embedding_of(self.model)(ids)
        return vectors

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [..., vocabulary] of the model's last hidden states [..., d]."""
        return self.decoder.logits(self.model, hidden)

    def initial_state(self, batch_size: int) -> AssociativeState:
        """Return the empty memories that a text begins with, for `batch_size` rows."""
        check.check_integer("batch_size", batch_size, 1)
        weights = [layer.value.weight for layer in self._layers()]
        check_not_offloaded("memory", self, weights, OFFLOAD_THE_MODEL)
        sizes = batch_size, 1, self.settings.key_width, self.memory_tokens.shape[1]
        return AssociativeState(
            tuple(MemoryState.zeros(*sizes, device=x.device, dtype=check.state_dtype(x)) for x in weights)
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        state: AssociativeState | None = None,
        output_logits: bool | None = None,
    ) -> AssociativeOutput:
        """Read texts of any length.

        Args:
            input_ids: int [B, T]; or `inputs_embeds` [B, T, d].
            attention_mask: [B, T], 0 where padding stands before or after a row's tokens, which begin a segment.
            labels: int [B, T], one for each token, as for Hugging Face models: the token before predicts it, also over
                the border of two segments. -100 does not count, nor does the label of a row's first token.
            state: what an earlier call returned, to continue from; default empty memories. A call ends its last
                segment, so cut pieces of a text at multiples of `segment_len`.
            output_logits: keep logits of every token; default: where there are no labels.

        Returns:
            AssociativeOutput(loss, logits, state).

        Raises:
            TypeError, ValueError: naming the argument, what it must be, and what it was.

        Warns:
            UntrainedMemoryWarning: once, in training: two calls in turn had no text longer than a segment and no
                state.
        """
        self._refuse_graph("compile its model's layers in place, for layer in model.model.layers: layer.compile()")
        x = check_inputs(input_ids, inputs_embeds, self.memory_tokens)
        batch, time = x.shape[:2]
        rows = bounds(attention_mask, batch, time)
        self._warn_untrained(rows, state)
        if labels is not None:
            labels = check_labels("labels", labels, "[B, T]", (batch, time))
        hidden, state = self._read_text(x if input_ids is None else self.embed(x), rows, self._state(state, batch))
        # no token reads what the last segment writes
        hidden = with_zero_gradients(hidden, (part for memory in state.memories for part in memory))
        loss = None if labels is None else self._loss(hidden, next_tokens(labels, rows))
        wanted = labels is None if output_logits is None else output_logits
        return AssociativeOutput(loss, self.logits(hidden) if wanted else None, state)

    def _state(self, state: AssociativeState | None, batch: int) -> AssociativeState:
        """Return the state that `batch` rows begin with: the caller's, checked, or empty memories."""
        if state is None:
            return self.initial_state(batch)
        if not isinstance(state, AssociativeState):
            raise TypeError(f"state must be an AssociativeState, got {type(state).__name__}")
        if len(state.memories) != len(self.memories):
            raise ValueError(
                f"state must have {len(self.memories)} memories, one of each layer with one, got {len(state.memories)}"
            )
        memories = []
        for layer, memory in zip(self._layers(), state.memories, strict=True):
            like, widths = layer.value.weight, (self.settings.key_width, self.memory_tokens.shape[1])
            k, v = (torch.empty(batch, 1, 0, width, dtype=like.dtype, device=like.device) for width in widths)
            memories.append(MemoryState(*map(normal, check.check_state(memory, batch, k, v))))
        return AssociativeState(tuple(memories))

    def _layers(self) -> list[AssociativeLayer]:
        """Return the layers' memories, in order."""
        return [self.memories[str(layer)] for layer in self.settings.layers]  # type: ignore[misc]

    def _read_text(
        self, embeds: Tensor, rows: list[tuple[int, int]], state: AssociativeState
    ) -> tuple[Tensor, AssociativeState]:
        """Read embeddings [B, T, d] between the begin and end columns of each row, and return the last hidden states.

        Returns:
            [B, T, d], meaningless at padding, and the state after every segment.
        """
        own = self.settings
        places = Placement.of(rows, embeds.shape[1], own.segment_len, own.num_memory_tokens, own.bptt, embeds.device)
        table = torch.cat((embeds.flatten(0, 1), self.memory_tokens.to(embeds.dtype)))
        hidden, state = self._read(F.embedding(places.inputs, table), state, places, own.num_memory_tokens)
        return F.embedding(places.outputs, hidden.flatten(0, 2)), state

    def _read(
        self, hidden: Tensor, state: AssociativeState, places: Placement | None, num_write: int, **kwargs: Any
    ) -> tuple[Tensor, AssociativeState]:
        """Run the model over segments of embeddings [S, B, W, d], and return the last hidden states.

        Args:
            places: where memory tokens stand; None: in the last rows of each segment.
            num_write: memory tokens of each segment; 0: the memory is only read.
            kwargs: for the model's layers.

        Returns:
            [S, B, W, d], and the state after the segments.
        """
        segments, batch = hidden.shape[:2]
        own = self.settings
        options = cells.Options(own.schedule, DPFP(own.nu, own.normalize), own.epsilon, num_write, self.checkpoint)
        after: list[MemoryState | None] = []

        def over(layers: list[Layer], x: Tensor) -> Tensor:
            memories: list[AssociativeLayer | None] = [None] * len(layers)
            begin: list[MemoryState | None] = [None] * len(layers)
            for layer, memory, before in zip(own.layers, self._layers(), state.memories, strict=True):
                memories[layer], begin[layer] = memory, before
            x, after[:] = cells.run(layers, memories, x.unflatten(0, (segments, batch)), begin, places, options)
            return x.flatten(0, 1)

        hidden = self.decoder.run(self.model, hidden.flatten(0, 1), over, **kwargs)
        memories = tuple(memory for memory in after if memory is not None)
        return hidden.unflatten(0, (segments, batch)), AssociativeState(memories)

    def _loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy over the targets that count, holding a part of a long text's logits at a time.

        Args:
            hidden: [B, T, d].
            targets: [B, T].
        """
        labelled = targets != IGNORED
        parts = list(zip(hidden[labelled].split(LOSS_ROWS), targets[labelled].split(LOSS_ROWS), strict=True))
        if len(parts) == 1:
            total = self._summed_loss(*parts[0])
        else:
            total = torch.stack([checkpoint(self._summed_loss, *part, use_reentrant=False) for part in parts]).sum()
        return total / labelled.sum().clamp(min=1)

    def _summed_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return the sum of the cross-entropy of hidden states [N, d] and targets [N]."""
        logits = self.logits(hidden)
        return F.cross_entropy(logits.to(check.state_dtype(logits)), targets, reduction="sum")

    def _start_text(self, input_ids: Tensor, state: AssociativeState | None) -> AssociativeState:
        return self._state(state, check_inputs(input_ids, None, self.memory_tokens).shape[0])

    def _read_segments(
        self, input_ids: Tensor, rows: list[tuple[int, int]], state: AssociativeState
    ) -> AssociativeState:
        return self._read_text(self.embed(input_ids), rows, state)[1]

    def _extend_segment(self, tokens: Tensor, state: AssociativeState, cache: Any, write: bool) -> Extension:
        rows, num_write = self.embed(tokens), self.settings.num_memory_tokens if write else 0
        memory = self.memory_tokens[:num_write].to(rows.dtype).expand(rows.shape[0], -1, -1)
        cache = DynamicCache(config=huggingface_of(self.model).config) if cache is None else cache
        hidden, state = self._read(
            torch.cat((rows, memory), 1)[None], state, None, num_write, past_key_values=cache, use_cache=True
        )
        if write:
            return Extension(None, state, None)
        # where gradients are checkpointed, transformers keeps nothing
        return Extension(self.logits(hidden[0, :, -1]), state, cache if cache.get_seq_length() else None)
