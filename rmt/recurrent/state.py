"""What one call of a recurrent memory leaves to the next."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class RecurrentState(NamedTuple):
    """memory: [B, m, d], what the last segment of each row wrote."""

    memory: Tensor

    def detach(self) -> RecurrentState:
        """The same numbers; gradients end here."""
        return RecurrentState(self.memory.detach())
