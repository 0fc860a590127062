"""The cost of RMT and ARMT to a decoder: schemes with memory tokens in every segment."""

from __future__ import annotations

from . import floors
from .floors import FLOAT32, Work
from .schemes import Local


class Recurrent(Local):
    """RMT: memory tokens around each segment, from the last layer to the next segment's first (arXiv 2207.06881).

    Read tokens see each other, the segment's tokens see them and the tokens before, write tokens see all.
    """

    name = "rmt"
    windowed = False

    @property
    def extra_rows(self) -> int:
        return 2 * self.plan.memory

    @property
    def passes(self) -> int:
        """The number of segments, since each needs all layers of the one before."""
        return self.segments_of(self.plan.length)

    def pairs(self, tokens: int) -> int:
        """Count the visible pairs of a segment."""
        m = self.plan.memory
        return m * m + tokens * m + floors.pairs(tokens, tokens) + m * (tokens + 2 * m)

    def mixing(self) -> Work:
        whole, last = divmod(self.plan.length, self.plan.segment_len)
        pairs = whole * self.pairs(self.plan.segment_len) + (self.pairs(last) if last else 0)
        return Work(self._products(pairs), floors.local_forward(self.sizes(self.rows)).bytes)

    def mixing_one_by_one(self) -> Work:
        n, m = self.decoded, self.plan.memory
        tokens = self._tokens(m + 1, m + n, gated=False)
        # the two blocks of memory tokens: their queries and outputs, and the keys and values that they see
        memory = self.sizes(2 * m)
        seen = self.sizes(m).keys_values + self.sizes(n + 2 * m).keys_values
        return Work(self._products(self.pairs(n)), tokens.bytes + memory.queries + memory.outputs + seen)

    def _products(self, pairs: int) -> int:
        return 4 * self.plan.batch * self.shape.queries * pairs

    def state_bytes(self) -> int:
        return self.plan.memory * self.shape.width * self.plan.itemsize

    @property
    def recomputed(self) -> int:
        return min(self.trained, self.plan.segment_len)


class Associative(Recurrent):
    """ARMT: memory tokens behind each segment, written into an associative memory in every layer (arXiv 2407.04841)."""

    name = "armt"

    @property
    def extra_rows(self) -> int:
        return self.plan.memory

    @property
    def passes(self) -> int:
        """One: memory stays inside a layer, which may run over the whole text before the next."""
        return 1

    @property
    def features(self) -> int:
        return 2 * self.plan.nu * self.plan.d_mem

    def pairs(self, tokens: int) -> int:
        rows = tokens + self.plan.memory
        return floors.pairs(rows, rows)

    def mixing(self) -> Work:
        count = self.segments_of(self.plan.length)
        later = self.rows - self.inputs_of(min(self.plan.length, self.plan.segment_len))
        # the state is read and written once a segment, and not read in the first
        states = (2 * count - 1) * self.plan.batch * self.layer_state()
        weights = Work(0, self.memory_matrices * self.plan.itemsize + states)
        return super().mixing() + self.reading(later) + self.writing(count, count - 1) + weights

    def mixing_one_by_one(self) -> Work:
        n, m, several = self.decoded, self.plan.memory, int(self.several)
        memory = self.sizes(m)
        block = memory.queries + memory.outputs + self.sizes(n + m).keys_values
        attention = Work(self._products(self.pairs(n)), self._tokens(1, n, gated=False).bytes + block)
        queries = (several * (n + 1) - 1) * self.shape.width * self.plan.d_mem
        weights = (queries + self.memory_matrices) * self.plan.itemsize
        states = (several * (n + 1) + 1) * self.plan.batch * self.layer_state()
        work = attention + self.reading(several * (n + m)) + self.writing(1, several)
        return work + Work(0, weights + states)

    @property
    def memory_matrices(self) -> int:
        """The number of elements of one layer's projections to queries, keys, values and strengths."""
        return self.shape.width * (2 * self.plan.d_mem + self.shape.width + 1)

    def reading(self, rows: int) -> Work:
        """Count the query, and φ(q) A, for `rows` rows of each sequence."""
        d, tokens = self.shape.width, self.plan.batch * rows
        return Work(2 * tokens * d * (self.plan.d_mem + self.features), 2 * tokens * d * self.plan.itemsize)

    def writing(self, count: int, looked_up: int) -> Work:
        """Count key, value, strength and φ(k)ᵀ v of the memory tokens of `count` segments, φ(k) A of `looked_up`."""
        d, tokens = self.shape.width, self.plan.batch * self.plan.memory
        operations = count * (d * (self.plan.d_mem + d + 1) + self.features * d) + looked_up * self.features * d
        return Work(2 * tokens * operations, count * tokens * d * self.plan.itemsize)

    def layer_state(self) -> int:
        return self.features * (self.shape.width + 1) * FLOAT32

    def state_bytes(self) -> int:
        return self.shape.layers * self.layer_state()

    def checkpointed_bytes(self) -> int:
        states = self.shape.layers * self.segments_of(self.trained) * self.layer_state()
        return super().checkpointed_bytes() + states

    def layer_bytes(self, tokens: int) -> int:
        """Add the input before the read; the memory's queries, keys, values and read values; each segment's state."""
        d, count = self.shape.width, self.segments_of(tokens)
        read = self.inputs_of(tokens) * (d + self.plan.d_mem)
        written = count * self.plan.memory * (self.plan.d_mem + 2 * d)
        return super().layer_bytes(tokens) + (read + written) * self.plan.itemsize + count * self.layer_state()
