"""Runs that are stopped on their way, as by Ctrl-C."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def stopped_after(owner: type, method: str) -> Iterator[None]:
    """Stop the run inside, which must come so far, as soon as a method has returned for the first time."""
    wanted = getattr(owner, method)

    def stop(*arguments: Any) -> None:
        wanted(*arguments)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, method, stop)
        with pytest.raises(KeyboardInterrupt):
            yield
