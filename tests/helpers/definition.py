"""Define the operation a second time, token by token in numpy, independently of the reference."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def sigma(x: Array) -> Array:
    return np.array([xi + 1 if xi > 0 else math.exp(xi) for xi in x])


def one_head(
    q: Array,
    k: Array,
    v: Array,
    memory_q: Array,
    memory_k: Array,
    beta: float | None,
    memory: Array,
    normalizer: Array,
    *,
    segment_len: int,
    update: str = "delta",
    causal: bool = True,
    num_read: int = 0,
    num_write: int = 0,
    empty_memory: str = "local",
    scale: float | None = None,
    softcap: float | None = None,
    lookback: int = 0,
    sink_k: Array | None = None,
    sink_v: Array | None = None,
    past: int = 0,
    sink_logit: float | None = None,
    slope: float = 0.0,
) -> tuple[Array, Array, Array]:
    """Return out [Tq, V], M [K, V] and z [K] of one head of one sequence; q [Tq, K] are its last positions.

    sink_k [S, n, K] and sink_v [S, n, V]: the sinks as every segment sees them, beyond its window, before
    which they stand.
    """
    time, width = k.shape
    first = time - len(q)
    scale = 1 / math.sqrt(width) if scale is None else scale
    gate = 0.0 if beta is None else 1 / (1 + math.exp(-beta))
    memories = [(memory.copy(), normalizer.copy())]
    for segment in range(time // segment_len):
        old, z = memories[-1]
        new, new_z = old.copy(), z.copy()
        for t in range(segment * segment_len, (segment + 1) * segment_len):
            key = sigma(memory_k[t])
            value = v[t].copy()
            if update == "delta" and key @ z != 0:
                value -= key @ old / (key @ z)
            new += np.outer(key, value)
            new_z += key
        memories.append((new, new_z))
    out = np.zeros((len(q), v.shape[1]))
    for i in range(first, time):
        segment = i // segment_len
        begin = max(segment - lookback, 0) * segment_len
        seen = [
            (j, k[j], v[j])
            for j in range(begin, min((segment + 1) * segment_len, time))
            if j <= i or not causal or j < num_read or i >= time - num_write
        ]
        if sink_k is not None and past // segment_len + segment > lookback:
            places = range(begin - sink_k.shape[1], begin)
            seen += zip(places, sink_k[segment], sink_v[segment], strict=True)
        weights, total = np.zeros(v.shape[1]), 0.0 if sink_logit is None else math.exp(sink_logit)
        for j, key, value in seen:
            score = scale * (q[i - first] @ key)
            score = score if softcap is None else softcap * math.tanh(score / softcap)
            p = math.exp(score - slope * abs(i - j))
            weights += p * value
            total += p
        local = weights / total
        if beta is None:
            out[i - first] = local
            continue
        old, z = memories[max(segment - lookback, 0)]
        query = sigma(memory_q[i - first])
        if query @ z == 0:
            out[i - first] = local if empty_memory == "local" else (1 - gate) * local
        else:
            out[i - first] = gate * (query @ old) / (query @ z) + (1 - gate) * local
    return out, *memories[max(time // segment_len - lookback, 0)]
