"""The one clock: functions take turns on a device, timed by events on a GPU and by the processor's clock elsewhere."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from .measure import synchronize

# prepare(copy) makes a run over that copy of the inputs ready, untimed
Prepare = Callable[[int], Callable[[], object]]

# about 0.2 ms: the GPU waits while the CPU queues what is timed, so that launches hide as they do in a training step
SPACER_CYCLES = 400_000


class Times(NamedTuple):
    """The median, the 20th and the 80th percentile of all rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Times:
        """Return the percentiles of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        fifths = statistics.quantiles(values, n=5, method="inclusive")
        return cls(statistics.median(values), fifths[0], fifths[3])


def time_once(prepare: Prepare, copy: int, device: torch.device) -> tuple[float, object]:
    """Return the milliseconds of one run, its preparation left out, and what the run returned."""
    run = prepare(copy)
    synchronize(device)
    if device.type != "cuda":
        start = time.perf_counter()
        result = run()
        synchronize(device)
        return (time.perf_counter() - start) * 1e3, result
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(SPACER_CYCLES)
    begin.record()
    result = run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)), result


def take_turns(
    prepares: Mapping[str, Prepare],
    device: torch.device,
    *,
    copies: int = 1,
    seconds: float = 3.0,
    rounds: tuple[int, int] = (5, 30),
    warm_up: bool = True,
    before_last: Callable[[str, int], object] = lambda name, copy: None,
    after_last: Callable[[str, int, object], object] = lambda name, copy, result: None,
) -> dict[str, list[float]]:
    """Return each function's milliseconds, round by round.

    Each round runs every function once, beginning with the next one, and each run takes the next copy of the inputs:
    whatever slows the machine for a while slows all of them, and none finds its inputs in the cache.

    Args:
        seconds, rounds: The last round is the first to begin after so many seconds, within the bounds on rounds.
        warm_up: Run each function once before, untimed, as a first run may compile, allocate, and load.
        before_last: Called with a name and the copy of the inputs before a function's last run, to change that copy.
        after_last: Called with a name, the copy and the result after a function's last run, to look at the result.
    """
    names = list(prepares)
    for name in names if warm_up else ():
        prepares[name](0)()
    synchronize(device)
    found: dict[str, list[float]] = {name: [] for name in names}
    least, most = rounds
    begin, copy = time.perf_counter(), -1
    for number in range(most):
        is_last = number + 1 == most or (number + 1 >= least and time.perf_counter() - begin > seconds)
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            copy = (copy + 1) % copies
            if is_last:
                before_last(name, copy)
            milliseconds, result = time_once(prepares[name], copy, device)
            found[name].append(milliseconds)
            if is_last:
                after_last(name, copy, result)
            del result
        if is_last:
            break
    return found


def copies_needed(input_bytes: int, device: torch.device) -> int:
    """Return how many copies of the inputs fill more than twice the L2 cache, so that no run meets its inputs there."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return 1 if input_bytes > 2 * cache else min(64, 2 * cache // max(input_bytes, 1) + 2)


def captured(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Return `run` as the replay of a CUDA graph, which returns the graph's output.

    Raises:
        RuntimeError: Something in `run` cannot be captured.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()

    def replay() -> object:
        graph.replay()
        return output

    return replay
