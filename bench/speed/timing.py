"""Times of several functions side by side on one device: by events on a GPU, by the clock on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from .measure import synchronize

# prepare(i) makes ready what round i times, on copy i of the inputs
Prepare = Callable[[int], Callable[[], object]]

# about 0.2 ms: the GPU waits while the CPU queues what is timed, so that launches hide as they do in a training step
SPACER_CYCLES = 400_000


@dataclass(frozen=True)
class Times:
    """Milliseconds: the median, the 20th and the 80th percentile of `rounds` rounds."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, milliseconds: list[float]) -> Times:
        if len(milliseconds) == 1:
            return cls(milliseconds[0], milliseconds[0], milliseconds[0], 1)
        fifths = statistics.quantiles(milliseconds, n=5, method="inclusive")
        return cls(statistics.median(milliseconds), fifths[0], fifths[3], len(milliseconds))


def time_once(prepare: Prepare, copy: int, device: torch.device) -> float:
    """Milliseconds of one run, apart from its preparation."""
    run = prepare(copy)
    synchronize(device)
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(SPACER_CYCLES)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def interleaved(
    prepares: Mapping[str, Prepare],
    device: torch.device,
    *,
    copies: int = 1,
    seconds: float = 3.0,
    rounds: tuple[int, int] = (5, 30),
    warm_up: bool = True,
) -> dict[str, Times]:
    """Every function once per round, each round from another one on, for about `seconds` within the bounds on rounds.

    warm_up: each is run once before, untimed, as what is first may compile, allocate, and load.
    """
    names = list(prepares)
    for name in names if warm_up else ():
        prepares[name](0)()
    synchronize(device)
    found: dict[str, list[float]] = {name: [] for name in names}
    begin = time.perf_counter()
    least, most = rounds
    for number in range(most):
        if number >= least and time.perf_counter() - begin > seconds:
            break
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            found[name].append(time_once(prepares[name], number % copies, device))
    return {name: Times.of(milliseconds) for name, milliseconds in found.items()}


def copies_needed(input_bytes: int, device: torch.device) -> int:
    """Copies of the inputs that together are more than twice the L2 cache, so that no round finds its own there."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return 1 if input_bytes > 2 * cache else min(64, 2 * cache // max(input_bytes, 1) + 2)


def captured(run: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """`run` as the replay of a CUDA graph.

    Raises:
        RuntimeError: something in it cannot be captured.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
