"""What one call of a recurrent memory leaves to the next."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RecurrentState(NamedTuple):
    """memory: [B, m, d], what the last segment of each row wrote."""

    memory: Tensor

    def detach(self) -> RecurrentState:
        """The same numbers; gradients end here."""
        return RecurrentState(self.memory.detach())


def trainable(x: Tensor) -> Tensor:
    """`x`, or a copy of it where it comes from inference mode and so could not be kept for a backward."""
    return x.clone() if x.is_inference() and not torch.is_inference_mode_enabled() else x
