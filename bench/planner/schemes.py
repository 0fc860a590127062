"""The cost of full attention, separate segments and Infini-attention to a decoder.

Operations are those of matrix products, for visible pairs only. Bytes are those that each product and each attention
call reads and writes once, weights once a pass through the layers; element-wise work is fused into them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

from . import floors
from .floors import FLOAT32, Sizes, Work
from .settings import PlanSettings
from .shapes import Shape


def times(work: Work, count: int) -> Work:
    """Multiply work by a count."""
    return Work(work.operations * count, work.bytes * count)


class Full:
    """Causal attention to all tokens before; the other schemes override what differs."""

    name = "full"

    def __init__(self, plan: PlanSettings) -> None:
        self.plan = plan
        self.shape: Shape = plan.shape

    def sizes(self, time: int, segment_len: int | None = None) -> Sizes:
        """Return the sizes of one layer's attention call."""
        s, p = self.shape, self.plan
        return Sizes(
            p.batch, s.heads, s.kv_heads, time, s.head_width, s.head_width, segment_len or max(time, 1), p.itemsize
        )

    # reading a text

    @cached_property
    def rows(self) -> int:
        """The number of rows of one sequence that go through the layers."""
        return self.inputs_of(self.plan.length)

    @property
    def passes(self) -> int:
        """The number of times that the weights are read for a text: one where a layer can run over the whole of it."""
        return 1

    def mixing(self) -> Work:
        """Count one layer's attention and memory over a text."""
        return floors.local_forward(self.sizes(self.plan.length))

    def forward(self, logits: int | None = None) -> Work:
        """Count a forward pass of the batch.

        logits: tokens of a sequence whose logits are made; None: all.
        """
        mixed = times(self.mixing(), self.shape.layers)
        return mixed + self.dense(self.rows, self.plan.length if logits is None else logits, self.passes)

    def dense(self, rows: int, logits: int, passes: int) -> Work:
        """Count all products with weights: `rows` rows of each sequence in the layers, `logits` rows in the head."""
        s, batch = self.shape, self.plan.batch
        tokens = batch * rows
        operations = 2 * tokens * (s.layers * s.layer_matrices + s.projections) + 2 * batch * logits * s.head
        # inputs and outputs of q, k, v; of the output projection; of the feed-forward network's two products
        layer = (s.width + s.queries + 2 * s.keys) + (s.queries + s.width) + 2 * (s.width + s.into)
        ends = batch * logits * (s.width + s.vocabulary)
        weights = passes * (s.layers * s.layer_matrices + s.projections) + min(passes, logits) * s.head
        return Work(operations, (weights + tokens * s.layers * layer + ends) * self.plan.itemsize)

    # writing a text

    @property
    def decoded(self) -> int:
        """The number of tokens that `decoding` counts: the text's last ones, a whole segment where it has one."""
        return min(self.plan.length, self.plan.segment_len)

    def decoding(self) -> Work:
        """Count `decoded` tokens one after another, and the writing of the segment that they complete."""
        mixed = times(self.mixing_one_by_one(), self.shape.layers)
        passes = self.decoded + (1 if self.extra_rows else 0)
        return mixed + self.dense(self.decoded + self.extra_rows, self.decoded, passes)

    @property
    def extra_rows(self) -> int:
        """The number of memory tokens around a segment's tokens."""
        return 0

    def mixing_one_by_one(self) -> Work:
        """Count one layer's attention and memory over `decoded` tokens one after another."""
        last = self.plan.length
        return self._tokens(last - self.decoded + 1, last, gated=False)

    def _tokens(self, first: int, last: int, gated: bool) -> Work:
        """Count single queries at the end of `first` to `last` tokens, whose cost grows evenly."""
        ends = [floors.decode(self.sizes(time), gated) for time in (first, last)]
        count = last - first + 1
        return Work(count * sum(x.operations for x in ends) // 2, count * sum(x.bytes for x in ends) // 2)

    # what is kept of a sequence

    def state_bytes(self) -> int:
        """Return the bytes of the state that segments pass on, constant in the text's length."""
        return self.shape.layers * self.layer_state()

    def layer_state(self) -> int:
        """Return the bytes of one layer's state, float32."""
        return 0

    def cache_bytes(self) -> int:
        """Return the bytes of keys and values, at most."""
        return 2 * self.shape.layers * self.shape.keys * self.cached * self.plan.itemsize

    @property
    def cached(self) -> int:
        """The number of rows whose keys and values are kept."""
        return self.plan.length

    # what training keeps of a sequence for the backward pass

    def activation_bytes(self) -> int:
        """Return the bytes of activations with nothing computed twice."""
        return self.shape.layers * self.layer_bytes(self.trained) + self.logit_bytes()

    def checkpointed_bytes(self) -> int:
        """Return the bytes of activations with every layer computed again from its input."""
        inputs = self.shape.layers * self.inputs_of(self.trained) * self.shape.width * self.plan.itemsize
        return inputs + self.layer_bytes(self.recomputed) + self.logit_bytes()

    @property
    def trained(self) -> int:
        """The number of tokens whose activations are held at once."""
        return self.plan.length

    @property
    def recomputed(self) -> int:
        """The number of tokens that a layer is computed again for at once."""
        return self.trained

    def inputs_of(self, tokens: int) -> int:
        """Return the number of rows that enter a layer with `tokens` tokens."""
        return tokens

    def layer_bytes(self, tokens: int) -> int:
        """Return one layer's bytes: inputs of norms and products, q, k, v, the output, and a float32 a row and head."""
        s = self.shape
        # relu's derivative follows from its output; a gated network keeps both factors too
        kept = 4 * s.width + 2 * s.queries + 2 * s.keys + s.ff * (3 if s.gated else 1)
        return self.inputs_of(tokens) * (kept * self.plan.itemsize + s.heads * FLOAT32)

    def logit_bytes(self) -> int:
        """Return the bytes of float32 logits, and of the inputs of the last norm and the product behind it."""
        s = self.shape
        return self.trained * (s.vocabulary * FLOAT32 + 2 * s.width * self.plan.itemsize)


class Local(Full):
    """Attention inside segments, with lookback and sinks, and nothing else across them."""

    name = "local"
    # whether lookback and sinks are the scheme's
    windowed = True

    def mixing(self) -> Work:
        return floors.local_forward(self.in_segments())

    def in_segments(self) -> Sizes:
        """Return the sizes of one layer's call over the whole text."""
        sizes = self.sizes(self.plan.length, self.plan.segment_len)
        return replace(sizes, lookback=self.plan.lookback, sinks=self.plan.sinks)

    def mixing_one_by_one(self) -> Work:
        return self._tokens(1 + self.before, self.decoded + self.before, gated=False)

    @property
    def looked_back(self) -> int:
        """The number of tokens that are seen before the segment of the last ones."""
        return min(self.plan.length - self.decoded, self.plan.lookback * self.plan.segment_len) if self.windowed else 0

    @property
    def sinks(self) -> int:
        """The number of sinks that are kept beside the window."""
        return self.plan.sinks if self.windowed and self.plan.length > self.plan.window else 0

    @property
    def before(self) -> int:
        """The number of keys that are seen before those of the last tokens' segment."""
        return self.looked_back + self.sinks

    def inputs_of(self, tokens: int) -> int:
        return tokens + self.segments_of(tokens) * self.extra_rows

    @property
    def cached(self) -> int:
        return self.decoded + self.extra_rows + self.before

    @property
    def trained(self) -> int:
        reach = self.plan.length if self.plan.bptt is None else self.plan.bptt * self.plan.segment_len
        return min(self.plan.length, reach)

    @property
    def several(self) -> bool:
        """Return whether the text has more than one segment."""
        return self.plan.length > self.plan.segment_len

    def segments_of(self, tokens: int) -> int:
        """Return the number of segments of `tokens` tokens."""
        return -(-tokens // self.plan.segment_len)


class Infini(Local):
    """Attention inside segments, and a compressive memory in every layer (arXiv 2404.07143)."""

    name = "infini"

    def mixing(self) -> Work:
        return floors.forward(self.in_segments(), self.plan.update)

    def mixing_one_by_one(self) -> Work:
        remembers = self.plan.length > self.plan.window
        work = self._tokens(1 + self.before, self.decoded + self.before, gated=remembers)
        # writing the segment reads its keys and values again, and the state
        sizes = self.sizes(self.decoded, self.decoded)
        written = floors.write(sizes, "linear")
        looked_up = written.operations if remembers and self.plan.update == "delta" else 0
        return work + written + Work(looked_up, sizes.keys_values + sizes.state * remembers)

    def cache_bytes(self) -> int:
        """Add the keys before rotation, which the memory is written by; those of sinks are kept so alone."""
        s = self.shape
        unrotated = s.layers * s.keys * (self.cached - self.sinks) * self.plan.itemsize if s.rotary else 0
        return super().cache_bytes() + unrotated

    def layer_state(self) -> int:
        s = self.shape
        return s.kv_heads * s.head_width * (s.head_width + 1) * FLOAT32

    def layer_bytes(self, tokens: int) -> int:
        s = self.shape
        before_rotation = tokens * (s.queries + s.keys) * self.plan.itemsize if s.rotary else 0
        return super().layer_bytes(tokens) + before_rotation + self.segments_of(tokens) * self.layer_state()
