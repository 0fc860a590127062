"""Ctrl-C between two steps of a run, so that its checkpoint is written first."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class InterruptedRunError(Exception):
    """A run that Ctrl-C stopped, once its checkpoint is written."""


@contextmanager
def deferred_interrupt() -> Iterator[list[int]]:
    """Yield a list that Ctrl-C appends to, instead of breaking into a step; a second one breaks in all the same."""
    caught: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    with handled(signal.SIGINT, handle):
        yield caught


@contextmanager
def handled(number: int, handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Let `handle` receive a signal. Outside the main thread, to which signals belong, nothing changes."""
    try:
        previous = signal.signal(number, handle)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(number, previous)
