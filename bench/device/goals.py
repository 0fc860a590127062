"""The speed and memory to reach, and how far a run got: ratios within one run, on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..speed.workloads import CASES, LONG, MAIN, TINY_CASES, TINY_MAIN

Document = Mapping[str, Any]
BOTH = "forward + backward"
FLASH = "SDPA flash local"


@dataclass(frozen=True)
class Goal:
    """value: from a run's document, None where it was not measured. `reach`: at least the bound, not at most."""

    what: str
    bound: float
    value: Callable[[Document], float | None]
    reach: bool = False

    def judge(self, document: Document) -> dict[str, Any]:
        value = self.value(document)
        met = None if value is None else (value >= self.bound if self.reach else value <= self.bound)
        return {
            "goal": self.what,
            "bound": f"{'≥' if self.reach else '≤'} {self.bound:g}",
            "measured": None if value is None else float(f"{value:.4g}"),
            "met": met,
        }


def find(document: Document, case: str, peer: str, direction: str, key: str) -> float | None:
    for record in document.get("timings", ()):
        if record["name"] == case:
            value = record["peers"].get(peer, {}).get(direction, {}).get(key)
            return None if value is None else float(value)
    return None


def ratio(case: str, direction: str, above: str, below: str) -> Callable[[Document], float | None]:
    def value(document: Document) -> float | None:
        first, second = (find(document, case, peer, direction, "median_ms") for peer in (above, below))
        return None if first is None or second is None else first / second

    return value


def _extra_bytes(document: Document, case: str, peer: str) -> float | None:
    """Peak of forward and backward beyond the output and the gradients of q, k and v."""
    peak = find(document, case, peer, BOTH, "peak_bytes")
    sizes = next(x.sizes() for x in (*CASES, *TINY_CASES) if x.name == case)
    return None if peak is None else peak - sizes.outputs - sizes.queries - sizes.keys_values


def growth(long: str, short: str, peer: str) -> Callable[[Document], float | None]:
    def value(document: Document) -> float | None:
        first, second = (_extra_bytes(document, case, peer) for case in (long, short))
        return None if first is None or second is None or second <= 0 else first / second

    return value


def _decodes(document: Document, key: str, decoder: str) -> Iterator[tuple[dict[str, Any], float]]:
    for record in document.get("decode", ()):
        value = record["decoders"].get(decoder, {}).get(key)
        if value is not None:
            yield record, value


def decode_share(rows: int) -> Callable[[Document], float | None]:
    """The slowest step of `rows` rows over its bytes' time, by the data sheet or else by a measured copy."""

    def value(document: Document) -> float | None:
        rate = document.get("device", {}).get("peak_bytes_per_s")
        rate = rate or (document.get("ceilings") or {}).get("copy_bytes_per_s")
        found = [
            ms * 1e-3 / (record["decoders"][name]["bytes"] / rate)
            for name in _decoders(document)
            for record, ms in _decodes(document, "median_ms", name)
            if rate and record["B"] == rows
        ]
        return max(found, default=None)

    return value


def _decoders(document: Document) -> tuple[str, ...]:
    graph = next(_decodes(document, "median_ms", "segattn graph"), None)
    return ("segattn",) if graph is None else ("segattn graph",)


def decode_flatness(document: Document) -> float | None:
    """The worst over batch sizes of slowest ÷ fastest step, among contexts that leave the same tail."""
    groups: dict[tuple[int, int], list[float]] = {}
    for name in _decoders(document):
        for record, ms in _decodes(document, "median_ms", name):
            groups.setdefault((record["B"], record["tail"]), []).append(ms)
    return max((max(x) / min(x) for x in groups.values() if len(x) > 1), default=None)


def decode_launches(document: Document) -> float | None:
    return max((value for _, value in _decodes(document, "launches", "segattn")), default=None)


def held_growth(document: Document) -> float | None:
    """Bytes held at the longest context ÷ at the shortest with the same tail."""
    rows = [r for r in document.get("decode", ()) if r["tail"] == r["L"] - 1]
    if len({r["context"] for r in rows}) < 2:
        return None
    first = min(rows, key=lambda r: (r["B"], r["context"]))
    last = max((r for r in rows if r["B"] == first["B"]), key=lambda r: r["context"])
    return float(last["held_bytes"] / first["held_bytes"])


def goals_of(tiny: bool) -> list[Goal]:
    """One row for each rule where the design says "ours"."""
    main = TINY_MAIN if tiny else MAIN
    short = TINY_CASES[1].name if tiny else next(c.name for c in CASES if (c.T, c.K, c.L) == (main.T, main.K, 512))
    # a tiny run has its full attention beside short segments
    long = short if tiny else LONG.name
    goals = []
    for update in ("delta",) if tiny else ("delta", "linear"):
        own = f"segattn {update}"
        loop = f"eager loop {update}"
        for case in (main.name,) if tiny else (main.name, long):
            goals += [
                Goal(f"{case}: {own} ÷ {FLASH}, forward", 1.0, ratio(case, "forward", own, FLASH)),
                Goal(f"{case}: {own} ÷ segattn local, forward", 1.15, ratio(case, "forward", own, "segattn local")),
                Goal(f"{case}: {own} ÷ {FLASH}, {BOTH}", 1.0, ratio(case, BOTH, own, FLASH)),
            ]
        goals.append(Goal(f"{main.name}: {loop} ÷ {own}, {BOTH}", 3.0, ratio(main.name, BOTH, loop, own), True))
        for direction in ("forward", BOTH):
            name = f"{long}: SDPA flash full ÷ {own}, {direction}"
            goals.append(Goal(name, 20.0, ratio(long, direction, "SDPA flash full", own), True))
        name = f"{own}: bytes beyond q, k, v, o and gradients, L {main.L} ÷ short L, same T"
        goals.append(Goal(name, 1.0, growth(main.name, short, own)))
    return [
        *goals,
        *(
            Goal(f"decode, {rows} rows: slowest step ÷ the time that its bytes need", 1.2, decode_share(rows))
            for rows in ((1,) if tiny else (64, 1))
        ),
        Goal("decode: slowest ÷ fastest context with the same tail", 1.2, decode_flatness),
        Goal("decode: launches per token and layer", 1.0, decode_launches),
        Goal("streaming: bytes held at the longest context ÷ at the shortest", 1.0, held_growth),
    ]


def judge(document: Document, tiny: bool) -> list[dict[str, Any]]:
    return [goal.judge(document) for goal in goals_of(tiny)]
