"""Parameters that a model's cast to half precision leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class KeptWide(nn.Module):
    """Keep parameters in float32 when the model is cast: small ones, whose training takes small steps.

    `dtypes` are those that a cast may give them; any other becomes the first.
    """

    dtypes: tuple[torch.dtype, ...] = (torch.float32,)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def wide(x: Tensor) -> Tensor:
            moved = fn(x)
            return moved if moved.dtype in self.dtypes else x.to(moved.device, self.dtypes[0])

        # of the parameters and of their gradients alike
        return super()._apply(wide, recurse)
