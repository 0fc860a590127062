"""The associative recurrent memory transformer: a memory in every layer of a pretrained decoder."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import DynamicCache

from ...kernels import validation as check
from ...kernels.state import MemoryState
from ..backbone import check_positions, check_widths, embedding_of, huggingface_of
from ..checkpointing import Checkpointing
from ..generation import generate
from ..inputs import check_inputs
from ..recurrent.state import trainable
from ..segments import IGNORED, bounds, next_tokens
from . import schedules
from .decoder import Decoder, Layer
from .layer import DPFP, AssociativeLayer
from .open_segment import open_segments
from .placement import Placement
from .settings import AssociativeSettings, chosen

# tokens whose logits are held at once for a loss; of more, each part's are made again in the backward
LOSS_ROWS = 2048


class AssociativeState(NamedTuple):
    """What an `AssociativeMemory` keeps of the segments it has read: constant in size, a value, differentiable.

    memories: one for each layer with a memory, in order: memory [B, 1, K, d] and normalizer [B, 1, K] with
        K = 2 · nu · d_mem, float32 (float64 for a float64 model).
    """

    memories: tuple[MemoryState, ...]

    def detach(self) -> AssociativeState:
        """The same state, cut from the graph."""
        return AssociativeState(tuple(memory.detach() for memory in self.memories))

    def select(self, rows: Tensor) -> AssociativeState:
        """Of these rows of the batch, int [b], in this order."""
        return AssociativeState(tuple(MemoryState(*(x[rows] for x in memory)) for memory in self.memories))


class AssociativeOutput(NamedTuple):
    """What `AssociativeMemory` returns.

    loss: mean cross-entropy over the labels that count, 0 where none does; None without labels.
    logits: [B, T, vocabulary]; None where not asked for. At padding they mean nothing.
    state: after every segment that was read.
    """

    loss: Tensor | None
    logits: Tensor | None
    state: AssociativeState


class AssociativeMemory(Checkpointing, nn.Module):
    """A Hugging Face decoder that reads text of any length, segment by segment (ARMT, arXiv 2407.04841).

    Every segment is followed by m trainable memory tokens, and is all that attention sees. What a layer makes of the
    memory tokens is written into the layer's own memory, by the delta rule; tokens of later segments read it before the
    layer. Positions begin anew with each segment. The last segment of a text may be shorter.

    Nothing of what was read is kept on the module: state goes in and comes out as a value. Pieces of whole segments,
    each with the state that the last one returned, equal the text read at once.

    Parameters beside the model's are `memory_tokens` and those of `memories.<layer>`. The values written are 0 before
    training, so a pretrained model begins as itself within each segment. Another model that fits may take the place of
    `model`, such as the same with adapters.

    Args:
        model: a Hugging Face causal language model with weights; it is not changed. Wrap the AssociativeMemory
            for data parallelism, not the model, and compile its layers in place.
        num_memory_tokens: m, at most segment_len.
        segment_len: tokens per segment, without memory tokens, L.
        d_mem: width of queries and keys before their features.
        nu: of DPFP; features have K = 2 · nu · d_mem numbers.
        normalize: features to Euclidean length 1 (as the authors' later code; not in the paper).
        layers: which have a memory, negative ones from the end; default all.
        schedule: the order of layers and segments, equal but for rounding. "vertical": segment by segment;
            "horizontal": layer by layer; "diagonal": layers side by side, each in another segment (arXiv 2506.05229),
            which holds a second copy of the layers' weights during a call, and takes as many steps as there are
            segments and layers, not their product.
        bptt: segments through which gradients reach back, counted from each row's last; they are cut at every multiple
            of it, so that all segments train where all have a loss. Default: through all, and into `state`.
        checkpoint: keep what goes into each layer and segment alone for their backward, and run them again there.

    Raises:
        TypeError, ValueError: naming the argument, what it must be, and what it was: a model without causal layers or
            embeddings, a segment shorter than the memory, more tokens in it than the model knows positions.
    """

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
        bptt: int | None = None,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.decoder = Decoder.of(model)
        modules = self.decoder.modules(model)
        self.settings = AssociativeSettings(
            num_memory_tokens, segment_len, d_mem, nu, normalize, chosen(layers, len(modules)), schedule, bptt
        )
        check_widths(model)
        check_positions(model, segment_len + num_memory_tokens, num_memory_tokens)
        check.check_bool("checkpoint", checkpoint)
        self.checkpoint = checkpoint
        self.model = model
        weight: Tensor = embedding_of(model).weight  # type: ignore[assignment]
        self.memories = nn.ModuleDict()
        for layer in self.settings.layers:
            device = next(modules[layer].parameters()).device
            self.memories[str(layer)] = AssociativeLayer(weight.shape[1], d_mem, device=device, dtype=weight.dtype)
        # as far from zero as the embeddings it stands among
        spread = weight.detach().float().std()
        self.memory_tokens = nn.Parameter(torch.randn(num_memory_tokens, weight.shape[1]).to(weight) * spread)

    generate = generate
    open_segments = open_segments

    def __setattr__(self, name: str, value: Any) -> None:
        # the model may give its place to another, such as itself with adapters
        if name == "model" and "memory_tokens" in self._parameters:
            self._take(value)
        super().__setattr__(name, value)

    def _take(self, model: nn.Module) -> None:
        """See that another model fits the memories, and where its layers are."""
        decoder = Decoder.of(model)
        depth, width = len(decoder.modules(model)), embedding_of(model).weight.shape[1]  # type: ignore[index]
        if depth <= self.settings.layers[-1] or width != self.memory_tokens.shape[1]:
            raise ValueError(
                f"model must have at least {self.settings.layers[-1] + 1} layers and be as wide as the memory, "
                f"{self.memory_tokens.shape[1]}, got {depth} and {width}: make a new AssociativeMemory around it"
            )
        check_widths(model)
        check_positions(model, self.settings.segment_len + len(self.memory_tokens), len(self.memory_tokens))
        self.decoder = decoder

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
        """Read a text, from a segment's beginning on.

        Args:
            input_ids: int [B, T]; or
            inputs_embeds: [B, T, d].
            attention_mask: [B, T] of ones and zeros: padding on either side. A row's segments begin at its first token.
            labels: int [B, T], each at its own token, as for Hugging Face models: the token before predicts it, in the
                segment before where it must. -100 is left out, as is the label of a row's first token.
            state: of the segments before; default none.
            output_logits: default: only without labels.

        Returns:
            AssociativeOutput(loss, logits, state).

        Raises:
            TypeError, ValueError: naming the argument, what it must be, and what it was.
        """
        embeds = self.check_inputs(input_ids, inputs_embeds)
        batch, time = embeds.shape[:2]
        rows = bounds(attention_mask, batch, time)
        if labels is not None:
            check.check_shape("labels", check.check_ids("labels", labels), "[B, T]", (batch, time))
        places = Placement.of(rows, time, self.settings, embeds.device)
        table = torch.cat((embeds.flatten(0, 1), self.memory_tokens.to(embeds.dtype)))
        hidden, state = self.read(F.embedding(places.inputs, table), self.started(state, embeds), places)
        hidden = F.embedding(places.outputs, hidden.flatten(0, 2))
        loss = None if labels is None else self._loss(hidden, next_tokens(labels, rows))
        wanted = labels is None if output_logits is None else output_logits
        return AssociativeOutput(loss, self.logits(hidden) if wanted else None, state)

    def read(
        self,
        hidden: Tensor,
        state: AssociativeState,
        places: Placement | None = None,
        *,
        write: bool = True,
        **kwargs: Any,
    ) -> tuple[Tensor, AssociativeState]:
        """Embeddings of S segments [S, B, W, d] to last hidden states, and the state after them.

        Args:
            places: where memory tokens stand; default in the last rows of each segment.
            write: False where there are none.
            kwargs: for the model's layers.
        """
        segments, batch = hidden.shape[:2]
        own = self.settings
        written = own.num_memory_tokens if write else 0
        options = schedules.Options(own.schedule, DPFP(own.nu, own.normalize), written, self.checkpoint)
        after: list[MemoryState | None] = []

        def over(layers: list[Layer], x: Tensor) -> Tensor:
            memories: list[AssociativeLayer | None] = [None] * len(layers)
            begin: list[MemoryState | None] = [None] * len(layers)
            for layer, memory in zip(own.layers, state.memories, strict=True):
                memories[layer] = self.memories[str(layer)]  # type: ignore[call-overload]
                begin[layer] = memory
            x, after[:] = schedules.run(layers, memories, x.unflatten(0, (segments, batch)), begin, places, options)
            return x.flatten(0, 1)

        hidden = self.decoder.run(self.model, hidden.flatten(0, 1), over, **kwargs)
        memories = tuple(memory for memory in after if memory is not None)
        return hidden.unflatten(0, (segments, batch)), AssociativeState(memories)

    def started(self, state: AssociativeState | None, embeds: Tensor) -> AssociativeState:
        """The state that `embeds` [B, T, d] begin with: as given, once checked, or empty."""
        batch, _, width = embeds.shape
        layers = self.settings.layers
        if state is None:
            sizes, dtype = (batch, 1, self.settings.key_width, width), check.state_dtype(embeds)
            devices = [next(self.memories[str(layer)].parameters()).device for layer in layers]
            return AssociativeState(tuple(MemoryState.zeros(*sizes, device=x, dtype=dtype) for x in devices))
        if not isinstance(state, AssociativeState):
            raise TypeError(f"state must be an AssociativeState, got {type(state).__name__}")
        if len(state.memories) != len(layers):
            raise ValueError(
                f"state must have {len(layers)} memories, one of each layer with one, got {len(state.memories)}"
            )
        k, v = embeds.new_empty(batch, 1, 0, self.settings.key_width), embeds.new_empty(batch, 1, 0, width)
        memories = (check.check_state(memory, batch, k, v) for memory in state.memories)
        return AssociativeState(tuple(MemoryState(*map(trainable, memory)) for memory in memories))

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] → vectors [B, T, d]."""
        vectors: Tensor = embedding_of(self.model)(ids)
        return vectors

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's last hidden states [..., d] → [..., vocabulary]."""
        return self.decoder.logits(self.model, hidden)

    def new_cache(self) -> DynamicCache:
        """An empty one for the model's keys and values of a segment."""
        return DynamicCache(config=huggingface_of(self.model).config)

    def _loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy over the labels that count; of a long text a part of the logits is held at a time."""
        labelled = targets != IGNORED
        parts = list(zip(hidden[labelled].split(LOSS_ROWS), targets[labelled].split(LOSS_ROWS), strict=True))
        if len(parts) == 1:
            total = self._summed_loss(*parts[0])
        else:
            total = torch.stack([checkpoint(self._summed_loss, *part, use_reentrant=False) for part in parts]).sum()
        return total / labelled.sum().clamp(min=1)

    def _summed_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = self.logits(hidden)
        return F.cross_entropy(logits.to(check.state_dtype(logits)), targets, reduction="sum")

    def check_inputs(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """The embeddings [B, T, d] of the one of the two that is given."""
        x = check_inputs(input_ids, inputs_embeds, self.memory_tokens.shape[1])
        return x if input_ids is None else self.embed(x)
