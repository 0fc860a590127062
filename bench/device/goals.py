"""The speed and memory to reach, and how far a run got: ratios within one run, on the same inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from ..speed.decode_calls import EAGER
from ..speed.workloads import BOTH, CASES, LONG, MAIN, TINY_CASES, TINY_MAIN

Document = Mapping[str, Any]
FLASH = "SDPA flash local"
DECODER = "segattn delta"


def judged(what: str, value: float | None, *, least: float = -math.inf, most: float = math.inf) -> dict[str, Any]:
    """Return a goal, its one bound, and whether the figure meets it; a figure of None was not measured."""
    return {
        "goal": what,
        "bound": f"≤ {most:g}" if most < math.inf else f"≥ {least:g}",
        "measured": None if value is None else float(f"{value:.4g}"),
        "met": None if value is None else least <= value <= most,
    }


def _timed(document: Document, peer: str, direction: str) -> Iterator[dict[str, Any]]:
    """Return what is known of each timed row of a peer in a direction."""
    for benchmark in document.get("benchmarks", ()):
        info = benchmark["extra_info"]
        if (info["provider"], info["direction"]) == (peer, direction):
            yield info


def find(document: Document, case: str, peer: str, direction: str, key: str) -> float | None:
    """Return a figure of a peer in a case; None where it was not measured."""
    return next((x[key] for x in _timed(document, peer, direction) if x["case"]["name"] == case), None)


def ratio(document: Document, case: str, direction: str, above: str, below: str) -> float | None:
    """Return one peer's time ÷ another's."""
    first, second = (find(document, case, peer, direction, "ms") for peer in (above, below))
    return None if first is None or second is None else first / second


def _extra_bytes(document: Document, case: str, peer: str) -> float | None:
    """Return the peak of forward and backward beyond the output and the gradients of q, k and v."""
    peak = find(document, case, peer, BOTH, "peak_bytes")
    sizes = next(x.sizes() for x in (*CASES, *TINY_CASES) if x.name == case)
    return None if peak is None else peak - sizes.outputs - sizes.queries - sizes.keys_values


def growth(document: Document, long: str, short: str, peer: str) -> float | None:
    """Return the extra bytes of one case ÷ those of another."""
    first, second = (_extra_bytes(document, case, peer) for case in (long, short))
    return None if first is None or second is None or second <= 0 else first / second


def _steps(document: Document) -> list[dict[str, Any]]:
    """Return our decoding steps, those of CUDA graphs where there are some."""
    return list(_timed(document, f"{DECODER} graph", "decode")) or list(_timed(document, DECODER, "decode"))


def decode_share(document: Document, rows: int) -> float | None:
    """Return the slowest step of `rows` rows over the time that its bytes need.

    The rate is the data sheet's, or else that of a measured copy.
    """
    rate = document.get("machine_info", {}).get("peak_bytes_per_s")
    rate = rate or (document.get("ceilings") or {}).get("copy_bytes_per_s")
    steps = [x for x in _steps(document) if rate and x["case"]["B"] == rows]
    return max((x["ms"] * 1e-3 / (x["bytes"] / rate) for x in steps), default=None)


def decode_flatness(document: Document) -> float | None:
    """Return the worst over batch sizes of slowest ÷ fastest step, among contexts that leave the same tail."""
    groups: dict[tuple[int, int], list[float]] = {}
    for step in _steps(document):
        groups.setdefault((step["case"]["B"], step["case"]["tail"]), []).append(step["ms"])
    return max((max(x) / min(x) for x in groups.values() if len(x) > 1), default=None)


def decode_launches(document: Document) -> float | None:
    """Return the most launches of one step."""
    steps = _timed(document, DECODER, "decode")
    return max((x["launches"] for x in steps if x["launches"] is not None), default=None)


def held_growth(document: Document) -> float | None:
    """Return the bytes kept of the longest context ÷ of the shortest with the same tail."""
    steps = [*_timed(document, DECODER, "decode"), *_timed(document, EAGER, "decode")]
    kept = {
        (x["case"]["B"], x["case"]["context"]): x["kept_bytes"]
        for x in steps
        if x["case"]["tail"] == x["case"]["L"] - 1
    }
    if len({context for _, context in kept}) < 2:
        return None
    first = min(kept)
    last = max(x for x in kept if x[0] == first[0])
    return float(kept[last] / kept[first])


def judge(document: Document, tiny: bool) -> list[dict[str, Any]]:
    """Return every goal, judged by a run's document; by both rules where there are two."""
    main = TINY_MAIN if tiny else MAIN
    short = TINY_CASES[1].name if tiny else next(c.name for c in CASES if (c.T, c.K, c.L) == (main.T, main.K, 512))
    # a tiny run has its full attention beside short segments
    long = short if tiny else LONG.name
    found = []

    def time(case: str, direction: str, above: str, below: str, **bound: float) -> None:
        figure = ratio(document, case, direction, above, below)
        found.append(judged(f"{case}: {above} ÷ {below}, {direction}", figure, **bound))

    for update in ("delta",) if tiny else ("delta", "linear"):
        ours = f"segattn {update}"
        for case in (main.name,) if tiny else (main.name, long):
            time(case, "forward", ours, FLASH, most=1.0)
            time(case, "forward", ours, "segattn local", most=1.15)
            time(case, BOTH, ours, FLASH, most=1.0)
        time(main.name, BOTH, f"eager loop {update}", ours, least=3.0)
        for direction in ("forward", BOTH):
            time(long, direction, "SDPA flash full", ours, least=20.0)
        what = f"{ours}: bytes beyond q, k, v, o and gradients, L {main.L} ÷ short L, same T"
        found.append(judged(what, growth(document, main.name, short, ours), most=1.0))
    for rows in (1,) if tiny else (64, 1):
        what = f"decode, {rows} rows: slowest step ÷ the time that its bytes need"
        found.append(judged(what, decode_share(document, rows), most=1.2))
    flatness, launches = decode_flatness(document), decode_launches(document)
    found.append(judged("decode: slowest ÷ fastest context with the same tail", flatness, most=1.2))
    found.append(judged("decode: launches per token and layer", launches, most=1.0))
    held = "streaming: bytes held at the longest context ÷ at the shortest"
    return [*found, judged(held, held_growth(document), most=1.0)]
