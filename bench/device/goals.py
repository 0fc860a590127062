"""The speed and memory to reach, and how far a run got: ratios within one run, on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..speed.decode_calls import EAGER
from ..speed.workloads import BOTH, CASES, LONG, MAIN, TINY_CASES, TINY_MAIN

Document = Mapping[str, Any]
FLASH = "SDPA flash local"
DECODER = "segattn delta"


@dataclass(frozen=True)
class Goal:
    """One figure to reach.

    value: From a run's document to the figure, None where it was not measured.
    reach: The figure must be at least the bound; otherwise at most.
    """

    what: str
    bound: float
    value: Callable[[Document], float | None]
    reach: bool = False

    def judge(self, document: Document) -> dict[str, Any]:
        """Return the goal, its bound, and whether the document's figure meets it."""
        value = self.value(document)
        met = None if value is None else (value >= self.bound if self.reach else value <= self.bound)
        return {
            "goal": self.what,
            "bound": f"{'≥' if self.reach else '≤'} {self.bound:g}",
            "measured": None if value is None else float(f"{value:.4g}"),
            "met": met,
        }


def _timed(document: Document, provider: str, direction: str) -> Iterator[dict[str, Any]]:
    """Return what is known of each timed row of a provider in a direction."""
    for benchmark in document.get("benchmarks", ()):
        info = benchmark["extra_info"]
        if (info["provider"], info["direction"]) == (provider, direction):
            yield info


def find(document: Document, case: str, provider: str, direction: str, key: str) -> float | None:
    """Return a figure of a provider in a case; None where it was not measured."""
    return next((x[key] for x in _timed(document, provider, direction) if x["case"]["name"] == case), None)


def ratio(case: str, direction: str, above: str, below: str) -> Callable[[Document], float | None]:
    """Return the figure of a goal: one provider's time ÷ another's."""

    def value(document: Document) -> float | None:
        first, second = (find(document, case, provider, direction, "ms") for provider in (above, below))
        return None if first is None or second is None else first / second

    return value


def _extra_bytes(document: Document, case: str, provider: str) -> float | None:
    """Return the peak of forward and backward beyond the output and the gradients of q, k and v."""
    peak = find(document, case, provider, BOTH, "peak_bytes")
    sizes = next(x.sizes() for x in (*CASES, *TINY_CASES) if x.name == case)
    return None if peak is None else peak - sizes.outputs - sizes.queries - sizes.keys_values


def growth(long: str, short: str, provider: str) -> Callable[[Document], float | None]:
    """Return the figure of a goal: the extra bytes of one case ÷ those of another."""

    def value(document: Document) -> float | None:
        first, second = (_extra_bytes(document, case, provider) for case in (long, short))
        return None if first is None or second is None or second <= 0 else first / second

    return value


def _steps(document: Document) -> list[dict[str, Any]]:
    """Return our decoding steps, those of CUDA graphs where there are some."""
    return list(_timed(document, f"{DECODER} graph", "decode")) or list(_timed(document, DECODER, "decode"))


def decode_share(rows: int) -> Callable[[Document], float | None]:
    """Return the figure of a goal: the slowest step of `rows` rows over the time that its bytes need.

    The rate is the data sheet's, or else that of a measured copy.
    """

    def value(document: Document) -> float | None:
        rate = document.get("machine_info", {}).get("peak_bytes_per_s")
        rate = rate or (document.get("ceilings") or {}).get("copy_bytes_per_s")
        steps = [x for x in _steps(document) if rate and x["case"]["B"] == rows]
        return max((x["ms"] * 1e-3 / (x["bytes"] / rate) for x in steps), default=None)

    return value


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


def goals_of(tiny: bool) -> list[Goal]:
    """Return the goals, by both rules where there are two."""
    main = TINY_MAIN if tiny else MAIN
    short = TINY_CASES[1].name if tiny else next(c.name for c in CASES if (c.T, c.K, c.L) == (main.T, main.K, 512))
    # a tiny run has its full attention beside short segments
    long = short if tiny else LONG.name
    goals = []
    for update in ("delta",) if tiny else ("delta", "linear"):
        ours, loop = f"segattn {update}", f"eager loop {update}"
        for case in (main.name,) if tiny else (main.name, long):
            goals += [
                Goal(f"{case}: {ours} ÷ {FLASH}, forward", 1.0, ratio(case, "forward", ours, FLASH)),
                Goal(f"{case}: {ours} ÷ segattn local, forward", 1.15, ratio(case, "forward", ours, "segattn local")),
                Goal(f"{case}: {ours} ÷ {FLASH}, {BOTH}", 1.0, ratio(case, BOTH, ours, FLASH)),
            ]
        goals.append(Goal(f"{main.name}: {loop} ÷ {ours}, {BOTH}", 3.0, ratio(main.name, BOTH, loop, ours), True))
        for direction in ("forward", BOTH):
            name = f"{long}: SDPA flash full ÷ {ours}, {direction}"
            goals.append(Goal(name, 20.0, ratio(long, direction, "SDPA flash full", ours), True))
        name = f"{ours}: bytes beyond q, k, v, o and gradients, L {main.L} ÷ short L, same T"
        goals.append(Goal(name, 1.0, growth(main.name, short, ours)))
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
    """Return every goal, judged by a run's document."""
    return [goal.judge(document) for goal in goals_of(tiny)]
