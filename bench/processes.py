"""Have jobs done by several processes, of which each may end too early."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TypeVar

Job = TypeVar("Job", bound=Hashable)
Result = TypeVar("Result")


def each(
    do: Callable[[Job], Result], jobs: Sequence[Job], workers: int, ended: Callable[[Job], Result]
) -> Iterator[Result]:
    """Do jobs in `workers` new processes, and yield each result when it is there, in no order.

    A job may end its process, and with it the pool. The jobs that were under way are then done alone, one by one, and
    the one that ends its process again gives `ended(job)`.
    """
    left = dict.fromkeys(jobs)
    while left:
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            futures = {pool.submit(do, job): job for job in left}
            for future in as_completed(futures):
                if not isinstance(future.exception(), BrokenProcessPool):
                    del left[futures[future]]
                    yield future.result()
        # the first that were not answered were under way
        for job in list(left)[:workers]:
            del left[job]
            yield _alone(do, job, ended)


def _alone(do: Callable[[Job], Result], job: Job, ended: Callable[[Job], Result]) -> Result:
    """Do a job in a process that no other shares, and return its result, or `ended(job)` where the process ends."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        try:
            return pool.submit(do, job).result()
        except BrokenProcessPool:
            return ended(job)
