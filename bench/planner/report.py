"""The figures of a plan as plain values, and the formulas that stand beside them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .exchange import EXCHANGES, Links, Split
from .floors import Peak, seconds
from .memory_tokens import Associative, Recurrent
from .schemes import Full, Infini, Local
from .settings import PlanSettings
from .shapes import Shape

SCHEMES: tuple[type[Full], ...] = (Full, Local, Recurrent, Infini, Associative)
PLAN_NOTES = (
    "FLOPs: 2 · rows · matrices + layers · H · visible pairs · 2 (K + V) + the memory's products + 2 T d V for logits",
    "rows: T; rmt T + 2 m a segment; armt T + m a segment. Pairs: full T (T + 1) / 2, others within segments",
    "a lookback adds L pairs a token behind the first segment, n sinks n a token behind the window, (1 + lookback) L",
    "infini, a layer and token: read 2 H K V behind the first window, write 2 G K V, by the delta rule twice that",
    "armt, a layer: read 2 d (d_mem + F) a row behind the first segment, F = 2 nu d_mem; "
    "write 2 d (d_mem + d + 1 + 2 F) a memory token",
    "moved: operands of products and attention read once, results written once; weights once, by rmt once a segment",
    "state: infini l G K (V + 1) float32; rmt m d; armt l F (d + 1) float32. cache: keys, values of T, or of a window "
    "and sinks",
    "activations: what the backward pass needs, and float32 logits; checkpointed: layers' inputs, and one layer",
    "floor: the slower of FLOPs over the peak (bfloat16) and bytes moved over the bandwidth",
    "prefill: a text, one token's logits. decode: a token, mean over the last segment, its memory's writing included",
    "FLOPs, moved and floors are of the batch; state, cache and activations of one sequence",
)
LETTERS = (
    "letters: T tokens of text, l layers, d width of the model, H query heads, G key/value heads, K and V width of a "
    "key and of a value, m memory tokens, F features of a key, nu of their map, W ranks"
)
SLOWER_PRODUCTS = "float32: its products are slower than those of the peak (bfloat16), so these floors lie too low"
EXCHANGE_NOTES = (
    "Sent by one rank of W, a layer and training step (forward and backward), for one sequence of T tokens",
    "ring: 2 (W - 1) + W hops of T / W · 2 G K numbers",
    "ulysses: 4 (H + G + W - gcd(G, W)) K (W - 1) / W · T / W numbers; W divides H",
    "linear: W - 1 states of G K (V + 1) float32, gathered by all, and as many gradients; "
    "linear scan: 2 log2 W of them, passed on",
    "delta: the same and (W - 1) G K K float32 maps, forward and again backward",
    "linear and delta need a segment a rank; the state after the text is not wanted",
    "not counted: what is gathered, W times a rank's own, held for a moment; delta's composition, up to W - 1 products "
    "K × K × V in float64, one after another, forward and backward; its keys written once more, V + K wide",
    "time: bytes over the link, and latency times messages that wait for each other, nothing overlapped; a ring of "
    "several nodes waits for the link between them",
    "rmt's memory passes through all layers and is no sum or affine map of its segments: none of these splits it",
)


def estimate(scheme: type[Full], plan: PlanSettings, peak: Peak) -> dict[str, Any]:
    """Return the cost of one scheme: FLOPs, bytes moved and times of the batch, other bytes of one sequence."""
    cost = scheme(plan)
    forward, prefill, decoding = cost.forward(), cost.forward(logits=1), cost.decoding()
    return {
        "scheme": scheme.name,
        "length": plan.length,
        "forward_flops": forward.operations,
        "flops_saving": Full(plan).forward().operations / forward.operations,
        "forward_bytes": forward.bytes,
        "state_bytes": cost.state_bytes(),
        "cache_bytes": cost.cache_bytes(),
        "activation_bytes": cost.activation_bytes(),
        "checkpointed_bytes": cost.checkpointed_bytes(),
        "forward_floor_s": seconds(forward, peak),
        "prefill_floor_s": seconds(prefill, peak),
        "decode_flops_per_token": decoding.operations / cost.decoded,
        "decode_bytes_per_token": decoding.bytes / cost.decoded,
        "decode_floor_s_per_token": seconds(decoding, peak) / cost.decoded,
    }


def estimates(plans: Iterable[PlanSettings], peak: Peak) -> list[dict[str, Any]]:
    """Return the cost of every scheme for every plan."""
    return [estimate(scheme, plan, peak) for plan in plans for scheme in SCHEMES]


def exchanges(
    shape: Shape, lengths: Iterable[int], ranks: Iterable[int], segment_len: int, dtype: str, links: Links
) -> list[dict[str, Any]]:
    """Return the traffic of every length over every number of ranks; None where a scheme cannot split so far."""
    rows = []
    for split in [Split(shape, length, W, segment_len, dtype) for length in lengths for W in ranks]:
        traffic = {name: exchange(split) for name, exchange in EXCHANGES.items()}
        rows.append(
            {
                "length": split.length,
                "ranks": split.ranks,
                "bytes": {name: None if x is None else x.bytes for name, x in traffic.items()},
                "seconds": {name: None if x is None else links.seconds(x, split.ranks) for name, x in traffic.items()},
            }
        )
    return rows
