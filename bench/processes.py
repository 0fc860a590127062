"""Have jobs done by several processes, of which each may end too early."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, get_context
from typing import TypeVar

Job = TypeVar("Job", bound=Hashable)
Result = TypeVar("Result")


def each(
    do: Callable[[Job], Result], jobs: Sequence[Job], workers: int, ended: Callable[[Job], Result]
) -> Iterator[Result]:
    """Do jobs in `workers` new processes, and yield each result when it is there, in no order.

    A job may end its process, and with it the pool. The jobs that were under way are then done alone, one by one, and
    the one that ends its process again gives `ended(job)`. An error of a job, or an interrupt, ends the others at once.
    """
    left = dict.fromkeys(jobs)
    while left:
        with _pool(workers) as pool:
            futures = {pool.submit(do, job): job for job in left}
            for future in as_completed(futures):
                if not isinstance(future.exception(), BrokenProcessPool):
                    del left[futures[future]]
                    yield future.result()
        # the first that were not answered were under way
        for job in list(left)[:workers]:
            del left[job]
            yield _alone(do, job, ended)


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Have new processes inside, which end at once where an error or an interrupt leaves it: a pool would go on."""
    others = set(active_children())
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(active_children()) - others:
                process.terminate()
            raise


def _alone(do: Callable[[Job], Result], job: Job, ended: Callable[[Job], Result]) -> Result:
    """Do a job in a process that no other shares, and return its result, or `ended(job)` where the process ends."""
    with _pool(1) as pool:
        try:
            return pool.submit(do, job).result()
        except BrokenProcessPool:
            return ended(job)
